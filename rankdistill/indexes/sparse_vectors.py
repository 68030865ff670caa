"""A collection's sparse document vectors: a weight for each term that a document fires, encoded shard by shard.

What grows: on disk 16 bytes a posting (a term of a document), half of them by document and half by term, and 8 bytes a
document and a term; in memory one shard, and some POSTINGS_AT_ONCE postings while they are sorted by term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, ArtifactWriter, find_artifact, fingerprint, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import document_fingerprint
from rankdistill.indexes.encoding import Layout, Texts, encode_texts
from rankdistill.indexes.postings import POSTINGS_AT_ONCE, Postings, Triples, open_csr, write_postings
from rankdistill.progress import warn

KIND = "sparse_vectors"
OFFSETS, TERMS, WEIGHTS = "indptr.npy", "terms.npy", "weights.npy"  # by document
BY_TERM = ("by_term.weights.npy", "by_term.documents.npy", "by_term.indptr.npy")  # what exact search reads
LAYOUTS = {TERMS: Layout(np.dtype("<i4")), WEIGHTS: Layout(np.dtype("<f4"))}
SHARD = 1024  # documents encoded and written together


def encode_document_terms(
    encoder: Any, collection: Collection, path: str | Path, *, shard_size: int = SHARD
) -> Artifact:
    """Encode every document into `path`: indptr.npy int64, terms.npy int32, weights.npy float32, a csr_matrix.

    A copy by term lies beside it for exact search. Documents without a term are kept as empty rows, counted and warned
    about.

    Args:
        encoder: a sparse student; it gives csr_matrix [texts, vocabulary] of weights above 0, and `terms` by column.

    Raises:
        RankdistillError: there are no documents, or none has a term; a weight is NaN, infinite or below 0; the disk is
            full.
    """
    texts, dimension = Texts.documents(collection, shard_size), len(encoder.terms)

    def encode(first: int, shard: list[str]) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        vectors = encoder.encode_documents(shard)
        vectors = checked_terms(vectors, dimension, lambda row: texts.name_of(first + row))
        return np.diff(vectors.indptr), {TERMS: vectors.indices, WEIGHTS: vectors.data}

    def finish(writer: ArtifactWriter, postings: int) -> None:
        if not postings:
            what = f"every document of {collection.name} came out empty: no term has a weight"
            raise RankdistillError(what, fix="the student has collapsed: less regularisation, or an earlier checkpoint")
        lengths = np.diff(np.load(writer.path / OFFSETS, allow_pickle=False))
        empty = np.flatnonzero(lengths == 0)
        if len(empty):
            first = texts.name_of(int(empty[0]))
            counted = f"{len(empty):,} of {len(lengths):,} documents came out empty"
            warn(f"{counted} and will never be found: first {first}")
        _sort_by_term(writer.path, dimension)
        writer.counts.update({"dimension": dimension, "postings": postings, "empty_documents": len(empty)})

    return encode_texts(
        path,
        KIND,
        texts,
        encoder,
        collection,
        encode,
        LAYOUTS,
        offsets=OFFSETS,
        fingerprint=vectors_fingerprint(encoder, collection),
        settings={"side": "documents"},
        inputs={"vocabulary": fingerprint(list(encoder.terms))},
        finish=finish,
    )


def find_sparse_vectors(encoder: Any, collection: Collection, path: str | Path) -> Artifact | None:
    """What `encode_document_terms` would return without encoding anything; None where it is not there yet."""
    return find_artifact(path, KIND, vectors_fingerprint(encoder, collection))


def vectors_fingerprint(encoder: Any, collection: Collection) -> str:
    return fingerprint([KIND, document_fingerprint(encoder), collection.fingerprint])


def _sort_by_term(folder: Path, dimension: int) -> None:
    offsets = np.load(folder / OFFSETS, allow_pickle=False)
    terms, weights = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (TERMS, WEIGHTS))
    starts = range(0, len(terms), POSTINGS_AT_ONCE)
    frequencies = np.zeros(dimension, np.int64)
    for start in starts:
        frequencies += np.bincount(terms[start : start + POSTINGS_AT_ONCE], minlength=dimension)

    def parts() -> Iterator[Triples]:
        for start in starts:
            end = min(start + POSTINGS_AT_ONCE, len(terms))
            rows = np.searchsorted(offsets, np.arange(start, end), side="right") - 1
            yield np.asarray(terms[start:end]), rows, np.asarray(weights[start:end])

    write_postings(folder, BY_TERM, frequencies, parts())


def checked_terms(vectors: Any, dimension: int, name_of: Callable[[int], str]) -> Any:
    """A csr_matrix float32 [n, dimension]: columns sorted, none twice, no explicit zeros.

    A weight that is NaN, infinite or below 0 is refused, named by its row.
    """
    from scipy import sparse

    vectors = sparse.csr_matrix(vectors, dtype=np.float32, copy=False)
    if vectors.shape[1] != dimension:
        what = f"sparse vectors over {vectors.shape[1]:,} terms where the vocabulary has {dimension:,}"
        raise RankdistillError(what, where=name_of(0))
    bad = np.flatnonzero(~(np.isfinite(vectors.data) & (vectors.data >= 0)))
    if len(bad):
        place = bad[0]
        first = f"first {vectors.data[place]} of term {vectors.indices[place]}"
        raise RankdistillError(
            f"{len(bad)} weights are NaN, infinite or below 0: {first}",
            where=name_of(int(np.searchsorted(vectors.indptr, place, side="right")) - 1),
            fix="the model has diverged, or overflows in this precision: use an earlier checkpoint, or fp32",
        )
    vectors.sum_duplicates()
    vectors.eliminate_zeros()
    return vectors


def open_sparse_vectors(artifact: Artifact | str | Path) -> Any:
    """The csr_matrix float32 [documents, vocabulary] of an artifact, memory-mapped."""
    return _open(artifact, (WEIGHTS, TERMS, OFFSETS), "documents", "dimension")


def open_postings(artifact: Artifact | str | Path, threads: int = 0) -> Postings:
    """The same by term, memory-mapped, to be searched."""
    return Postings(_open(artifact, BY_TERM, "dimension", "documents"), threads)


def _open(artifact: Artifact | str | Path, names: tuple[str, str, str], rows: str, columns: str) -> Any:
    artifact = open_artifact(artifact, KIND)
    try:
        matrix = open_csr(artifact.path, names, int(artifact.counts[columns]))
        if matrix.shape[0] != artifact.counts[rows]:
            raise ValueError(f"{matrix.shape[0]} rows where there are {artifact.counts[rows]} {rows}")
    except (OSError, ValueError, KeyError) as error:
        what = f"the sparse vectors cannot be read: {error}"
        fix = "delete this folder: they are made again"
        raise RankdistillError(what, where=str(artifact.path), fix=fix) from None
    return matrix
