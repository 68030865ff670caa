"""Sparse students' indexes: exact search over their vectors, and one way to build and open the inverted indexes.

Each type of `sparse_specification.SPARSE` has a module of its own with `build(...)`, and, unless its files are for a
server, `open_index(folder)`. What that returns has `bytes` and `search(queries, k)`: at most `k` hits for each row of a
csr_matrix [queries, vocabulary], best first, ties by row. Both are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.artifacts import MANIFEST, Artifact, ArtifactWriter, file_digest, fingerprint, obtain, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import (
    DocumentIds,
    ExhaustiveIndex,
    Hits,
    Rows,
    Scores,
    StudentEngine,
    check_inputs,
    no_hits,
)
from rankdistill.indexes.postings import Postings
from rankdistill.indexes.sparse_specification import SparseSpecification
from rankdistill.indexes.sparse_vectors import KIND as VECTORS
from rankdistill.indexes.sparse_vectors import open_postings, open_sparse_vectors
from rankdistill.indexes.specification import any_specification
from rankdistill.progress import warn
from rankdistill.recipe import code_of

KIND = "sparse_index"
BUILD_AGAIN = "build the index again with this student"


class SparseIndex(ExhaustiveIndex):
    """Exact search over memory-mapped sparse vectors.

    Memory: the postings that a block of queries touches, and `k` hits a query.

    Args:
        vectors: csr_matrix [documents, vocabulary], for `scores`.
        postings: the same by term, for `search`.
    """

    name = "exact, sparse vectors"

    def __init__(
        self, vectors: Any, postings: Postings, fingerprint: str, inputs: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(fingerprint, inputs)
        self.vectors, self.postings = vectors, postings

    @classmethod
    def open(cls, artifact: Artifact | str | Path) -> SparseIndex:
        artifact = open_artifact(artifact, VECTORS)
        vectors, postings = open_sparse_vectors(artifact), open_postings(artifact)
        return cls(vectors, postings, artifact.fingerprint, artifact.manifest["inputs"])

    def __repr__(self) -> str:
        return f"SparseIndex({self.postings.documents} documents, {self.vectors.nnz} postings)"

    @property
    def dimension(self) -> int:
        return self.postings.terms

    @property
    def bytes(self) -> int:
        matrix = self.postings.matrix
        return int(matrix.data.nbytes + matrix.indices.nbytes + 8 * (matrix.shape[0] + 1))

    def search(self, queries: Any, k: int) -> list[Hits]:
        check_queries(queries, self.dimension)
        return self.postings.search(queries, k)

    def scores(self, query: Any, rows: Rows) -> Scores:
        check_queries(query, self.dimension)
        product = self.vectors[rows] @ query.T
        return np.asarray(product.toarray(), np.float32)[:, 0]


class BuiltSparseIndex:
    """An inverted index on disk: a folder with a manifest and the files of its type."""

    def __init__(self, artifact: Artifact) -> None:
        self.path, self.manifest, self.fingerprint = artifact.path, artifact.manifest, artifact.fingerprint
        specification = any_specification(dict(artifact.manifest["settings"]))
        if not isinstance(specification, SparseSpecification):
            raise RankdistillError("this is no index of a sparse student", where=str(self.path))
        self.specification, self.name, self.type = specification, specification.name, specification.type
        self.counts = artifact.counts
        self.document_count, self.dimension = int(self.counts["documents"]), int(self.counts["dimension"])
        self.bytes = int(self.counts["bytes"])  # without document ids and term lists that only others need
        self.bytes_per_document = self.bytes / max(1, self.document_count)

    def __repr__(self) -> str:
        held = f"{self.document_count} documents, {self.counts.get('postings', '?')} postings"
        return f"BuiltSparseIndex({self.name}: {held}, {self.bytes_per_document:.1f} bytes a document)"

    @cached_property
    def opened(self) -> Any:
        """The engine behind it; a UsageError where the files are for a server."""
        if not searched_here(self.specification):
            what = f"{self.name} holds files for other software; they are not searched here"
            fix = "load them there, or search without --index, or over: seismic, lucene_impact"
            raise UsageError(what, where=str(self.path), fix=fix)
        return _module(self.specification).open_index(self.path)

    def check(self, encoder: Any = None, collection: Any = None) -> None:
        """Refuse a student, vocabulary or collection this index was not made from."""
        check_inputs(self.manifest["inputs"], encoder, collection, str(self.path), BUILD_AGAIN)

    def search(self, queries: Any, k: int) -> list[Hits]:
        """At most `k` hits for each row of a csr_matrix [queries, vocabulary]; an empty row has none."""
        check_queries(queries, self.dimension)
        k = min(k, self.document_count)
        filled = np.flatnonzero(np.diff(queries.indptr) * (k > 0))
        if 0 < len(filled) == queries.shape[0]:
            return list(self.opened.search(queries, k))
        hits = [no_hits() for _ in range(queries.shape[0])]
        for row, found in zip(filled, self.opened.search(queries[filled], k) if len(filled) else (), strict=True):
            hits[row] = found
        return hits


class SparseEngine(StudentEngine):
    """A sparse encoder of queries over an index of the document vectors that belong to it."""

    kind, exact = "sparse", SparseIndex

    @cached_property
    def _shortcut(self) -> tuple[Any, Any] | None:
        """(a query's terms and weights, hits of those) without an array of one row, which costs as much as a search."""
        terms_of: Any = getattr(self.encoder, "query_terms", None)
        search_terms: Any = terms_of and getattr(getattr(self.index, "opened", None), "search_terms", None)
        return (terms_of, search_terms) if search_terms else None

    def steps(self, k: int) -> dict[str, Callable[[Sequence[str], Any], Any]]:
        """How queries are answered one at a time, for measuring: `encode`, then `search`."""
        if self._shortcut is None:
            return {
                "encode": lambda texts, _: self.encoder.encode_queries(texts),
                "search": lambda _, vectors: self.index.search(vectors, k),
            }
        terms_of, search_terms = self._shortcut
        return {
            "encode": lambda texts, _: [terms_of(text) for text in texts],
            "search": lambda _, weighted: [search_terms(terms, weights, k) for terms, weights in weighted],
        }

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """Queries without a single known term have no hits, which is said once a call."""
        if not queries:
            return []
        if len(queries) == 1 and self._shortcut is not None:
            terms, weights = self._shortcut[0](queries[0])
            if not terms:
                warn(f"the query has no term with a weight, so no hits: {queries[0]!r}")
            return [self._shortcut[1](terms, weights, k)]
        vectors = self.encoder.encode_queries(queries)
        empty = np.flatnonzero(np.diff(vectors.indptr) == 0)
        if len(empty):
            first = queries[int(empty[0])]
            warn(f"{len(empty)} of {len(queries)} queries have no term with a weight, so no hits: {first!r}")
        hits: list[Hits] = self.index.search(vectors, k)
        return hits


def build_sparse_index(
    student: Any, collection: Collection, vectors: Artifact, specification: SparseSpecification, out: str | Path
) -> BuiltSparseIndex:
    """Build a sparse student's index in the folder `out` from its vectors; one that is there already is kept.

    Args:
        student: what encoded the vectors; its vocabulary names the terms.
    """
    out, inputs = Path(out), dict(vectors.manifest["inputs"])
    check_inputs(inputs, student, collection, str(vectors.path))
    settings, code = specification.model_dump(mode="json"), code_of(specification.type)

    def make(writer: ArtifactWriter) -> None:
        kept = ("documents", "dimension", "postings", "empty_documents")
        matrix, ids = open_sparse_vectors(vectors), DocumentIds(collection)
        counts = _module(specification).build(specification, matrix, ids, student.terms, writer.path)
        size = sum(path.stat().st_size for path in writer.path.rglob("*") if path.is_file())
        writer.counts.update({**{name: vectors.counts[name] for name in kept}, "bytes": size, **counts})

    _check_place(out)
    key = [KIND, {**settings, "description": ""}, vectors.fingerprint, *([file_digest(code)] if code else [])]
    return BuiltSparseIndex(
        obtain(out, kind=KIND, fingerprint=fingerprint(key), settings=settings, inputs=inputs, make=make)
    )


def _check_place(out: Path) -> None:
    """Refuse to put an index in the place of something else: what is there would be replaced whole."""
    if out.exists() and not out.is_dir():
        raise UsageError("the index of a sparse student is a folder; there is a file here", where=str(out))
    if out.is_dir() and any(out.iterdir()) and not ((out / MANIFEST).is_file() and open_artifact(out).kind == KIND):
        raise UsageError("this folder holds something else than an index", where=str(out), fix="give a new one")


def open_sparse_index(path: str | Path) -> BuiltSparseIndex:
    """Open an index's folder; its files are read when it is first searched."""
    return BuiltSparseIndex(open_artifact(path, KIND))


def searched_here(specification: Any) -> bool:
    """Whether an index of this specification can be searched by this program."""
    return not isinstance(specification, SparseSpecification) or hasattr(_module(specification), "open_index")


def check_queries(queries: Any, dimension: int) -> None:
    """Refuse query vectors over another vocabulary, and weights that are no numbers."""
    if queries.shape[1] != dimension:
        raise RankdistillError(f"queries over {queries.shape[1]:,} terms, an index of {dimension:,}")
    bad = np.flatnonzero(~np.isfinite(queries.data))
    if len(bad):
        row = int(np.searchsorted(queries.indptr, bad[0], side="right")) - 1
        raise RankdistillError("a query's weights hold NaN or infinity", where=f"query {row}")


def _module(specification: SparseSpecification) -> Any:
    """What builds a type, and opens it: a module here, or the one in which another package's specification stands."""
    kind = type(specification)
    return importlib.import_module(f"rankdistill.indexes.{kind.module}" if kind.module else kind.__module__)
