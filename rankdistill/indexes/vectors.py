"""A collection's vectors, one a text: encoded into one memory-mapped file, 4 · dimension bytes a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, ArtifactWriter, disk_errors, find_artifact, fingerprint, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import Encoder, Vectors, document_fingerprint
from rankdistill.indexes.encoding import Layout, Texts, encode_texts
from rankdistill.progress import say
from rankdistill.students.token_batches import resolve_precision

QUERY_IDS = "query_ids.parquet"
SHARD = 4096


def encode_documents(
    encoder: Encoder, collection: Collection, path: str | Path, *, shard_size: int = SHARD
) -> Artifact:
    """Encode every document into `path`/documents.npy, float32 [documents, dimension], in row order.

    Raises:
        RankdistillError: the encoder returns NaN, infinite or wrongly shaped vectors; the disk is full.
    """
    texts = Texts.documents(collection, shard_size)
    return _encode(path, texts, encoder, encoder.encode_documents, collection, {"side": "documents"})


def encode_queries(
    encoder: Encoder,
    collection: Collection,
    path: str | Path,
    *,
    split: str | None = None,
    query_ids: Sequence[str] | None = None,
    shard_size: int = SHARD,
) -> Artifact:
    """Encode a split's queries (all without one) into `path`/queries.npy, their ids beside it in query_ids.parquet.

    Args:
        query_ids: encode these instead, in this order.
    """
    ids = collection.query_ids(split) if query_ids is None else list(query_ids)
    texts = Texts(
        "queries",
        len(ids),
        lambda start: (
            (first, collection.query_texts(ids[first : first + shard_size]))
            for first in range(start, len(ids), shard_size)
        ),
        lambda row: f"query {ids[row]!r} of {collection.name}",
    )
    settings = {"side": "queries", "split": split, **({} if query_ids is None else {"query_ids": fingerprint(ids)})}
    return _encode(path, texts, encoder, encoder.encode_queries, collection, settings, ids)


def _encode(
    path: str | Path,
    texts: Texts,
    encoder: Encoder,
    encode: Callable[[Sequence[str]], Vectors],
    collection: Collection,
    settings: dict[str, Any],
    ids: list[str] | None = None,
) -> Artifact:
    file, here = f"{texts.side}.npy", made_in(encoder)

    def checked(first: int, shard: list[str]) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        vectors = np.ascontiguousarray(encode(shard), dtype=np.float32)
        check_vectors(vectors, encoder.dimension, texts.name_of, first)
        return np.ones(len(vectors), np.int64), {file: vectors}

    def finish(writer: ArtifactWriter, _: int) -> None:
        if ids is not None:
            with disk_errors(writer.path):
                pq.write_table(pa.table({"query_id": pa.array(ids, pa.string())}), writer.path / QUERY_IDS)
        writer.counts["dimension"] = encoder.dimension
        writer.notes.update({"file": file, "similarity": encoder.similarity, **here})

    made_by = document_fingerprint(encoder) if ids is None else encoder.fingerprint
    artifact = encode_texts(
        path,
        "vectors",
        texts,
        encoder,
        collection,
        checked,
        {file: Layout(np.dtype("<f4"), (encoder.dimension,))},
        fingerprint=fingerprint(["vectors", settings, made_by, collection.fingerprint]),
        settings=settings,
        finish=finish,
    )
    made = {key: str(artifact.manifest.get(key, value)) for key, value in here.items()}
    if made != here:
        there, now = (" on ".join(values.values()) for values in (made, here))
        say(f"{Path(path).name}: vectors made in {there} are used; here they would be made in {now}")
    return artifact


class VectorFolders(NamedTuple):
    """Where document vectors are written, and the folders (pattern below a folder) in which some may lie already."""

    new: Path
    made: Sequence[tuple[Path, str]] = ()

    def find(self, encoder: Encoder, collection: Collection) -> Path | None:
        """Where an encoder's document vectors of a collection lie."""
        key = vectors_fingerprint(encoder, collection.fingerprint)
        places = (place for folder, pattern in self.made for place in sorted(folder.glob(pattern)))
        return next((place for place in places if find_artifact(place, "vectors", key) is not None), None)


def vectors_fingerprint(encoder: Encoder, collection_fingerprint: str) -> str:
    """Of an encoder's document vectors of a collection."""
    return fingerprint(["vectors", {"side": "documents"}, document_fingerprint(encoder), collection_fingerprint])


def open_vectors(artifact: Artifact | str | Path) -> np.memmap[Any, np.dtype[np.float32]]:
    """The float32 [n, dimension] array of a vectors artifact, memory-mapped."""
    artifact = open_artifact(artifact, "vectors")
    path = artifact.path / str(artifact.manifest["file"])
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RankdistillError(f"the vectors cannot be read: {error}", where=str(path)) from None
    assert isinstance(array, np.memmap)
    return array


def check_vectors(vectors: NDArray[Any], dimension: int, name_of: Callable[[int], str], first_row: int = 0) -> None:
    """Refuse vectors of another dimension, NaN and infinity, naming the first bad one."""
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        what = f"vectors of shape {list(vectors.shape)} where [n, {dimension}] was expected"
        raise RankdistillError(what, where=name_of(first_row))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise RankdistillError(
            f"{len(bad)} vectors hold NaN or infinity",
            where=f"first: {name_of(first_row + int(bad[0]))}",
            fix="the model has diverged, or overflows in this precision: use an earlier checkpoint, or fp32",
        )


def row_hashes(rows: NDArray[Any], before: bytes = b"") -> NDArray[np.int64]:
    """A 64-bit hash of each row [n, d] by its bytes, after those of `before`; the same in this process alone."""
    return np.fromiter((hash(before + row.tobytes()) for row in rows), np.int64, len(rows))


def made_in(encoder: Any) -> dict[str, str]:
    """The number format and the kind of device that an encoder computes with, where it says: they change the last
    digits of vectors, and so are no part of the fingerprint."""
    if not (hasattr(encoder, "precision") and hasattr(encoder, "device")):
        return {}
    return {"precision": resolve_precision(encoder.device, encoder.precision), "device": encoder.device.type}
