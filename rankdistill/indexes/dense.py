"""Dense search: text → vector → hits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, fingerprint
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import Encoder, Hits, Rows, Scores, Vectors, document_fingerprint, no_hits, ranked
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.specification import IndexSpecification
from rankdistill.indexes.vectors import check_vectors, open_vectors

if TYPE_CHECKING:
    from rankdistill.collections import Collection

BLOCK = 65_536  # document vectors scored at a time


class VectorIndex(Protocol):
    """What searches vectors: a FAISS index, the vectors themselves, later others."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def check(self, encoder: Encoder | None = None, collection: Any = None) -> None: ...

    def search(self, vectors: Vectors, k: int) -> list[Hits]: ...


class ExactIndex:
    """Brute force over memory-mapped vectors: the reference, with no file of its own. Scores as `FaissIndex` has.

    Memory: one block of vectors and `k` hits a query.
    """

    name = "exact"

    def __init__(
        self,
        vectors: NDArray[np.float32],
        fingerprint: str,
        inputs: dict[str, str] | None = None,
        metric: Literal["inner_product", "l2"] = "inner_product",
    ) -> None:
        self.vectors, self.fingerprint, self.inputs, self.metric = vectors, fingerprint, inputs or {}, metric

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def bytes(self) -> int:
        return int(self.vectors.nbytes)

    def check(self, encoder: Encoder | None = None, collection: Any = None) -> None:
        """Refuse a student or a collection these vectors were not made from.

        Raises:
            RankdistillError: a fingerprint or the dimension differs.
        """
        for what, given in (("encoder", encoder), ("collection", collection)):
            own = {given.fingerprint, document_fingerprint(given)} if given is not None else set()
            if given is not None and self.inputs.get(what, given.fingerprint) not in own:
                raise RankdistillError(
                    f"these vectors belong to another {what}", fix="encode the collection again with this student"
                )
        if encoder is not None and encoder.dimension != self.dimension:
            raise RankdistillError(f"vectors of {self.dimension} dimensions, a student of {encoder.dimension}")

    def search(self, vectors: Vectors, k: int) -> list[Hits]:
        import faiss

        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_vectors(vectors, self.dimension, lambda row: f"query vector {row}")
        k = min(k, len(self.vectors))
        if k < 1 or not len(vectors):
            return [no_hits() for _ in vectors]
        best_scores = np.empty((len(vectors), 0), np.float32)
        best_rows = np.empty((len(vectors), 0), np.int64)
        for start in range(0, len(self.vectors), BLOCK):
            block = np.ascontiguousarray(self.vectors[start : start + BLOCK], dtype=np.float32)
            metric = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
            scores, rows = faiss.knn(vectors, block, min(k, len(block)), metric=metric)
            scores = -scores if self.metric == "l2" else scores
            best_scores, best_rows = np.hstack([best_scores, scores]), np.hstack([best_rows, rows + start])
            if best_scores.shape[1] > k:
                # Blocks come in row order and the sort is stable, so ties keep the lower row.
                order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
                best_scores = np.take_along_axis(best_scores, order, axis=1)
                best_rows = np.take_along_axis(best_rows, order, axis=1)
        return [ranked(best_rows[i], best_scores[i], k) for i in range(len(vectors))]

    def scores(self, vector: Vectors, rows: Rows) -> Scores:
        """[rows] inner products of one query's vector [dimension] with these documents: re-ranking."""
        return np.asarray(self.vectors[rows] @ vector, np.float32)


class DenseEngine:
    """An engine made of an encoder and an index of the vectors it made."""

    def __init__(self, encoder: Encoder, index: VectorIndex, *, collection: Any = None, name: str = "dense") -> None:
        """Raises RankdistillError when the index belongs to another student or collection."""
        index.check(encoder, collection)
        self.encoder, self.index, self.name = encoder, index, name

    @classmethod
    def over(cls, encoder: Encoder, vectors: Artifact | str | Path, *, name: str = "dense") -> DenseEngine:
        """Exact search over a vectors artifact, without an index file."""
        from rankdistill.artifacts import open_artifact

        artifact = vectors if isinstance(vectors, Artifact) else open_artifact(vectors, "vectors")
        index = ExactIndex(open_vectors(artifact), artifact.fingerprint, dict(artifact.manifest["inputs"]))
        return cls(encoder, index, name=name)

    @property
    def fingerprint(self) -> str:
        return fingerprint(["dense", self.encoder.fingerprint, self.index.fingerprint])

    def __repr__(self) -> str:
        return f"DenseEngine({self.encoder!r} over {self.index!r})"

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        if not queries:
            return []
        return self.index.search(self.encoder.encode_queries(queries), k)


def export_index(
    encoder: Encoder,
    collection: Collection,
    vectors: Artifact | str | Path,
    specification: IndexSpecification,
    out_file: str | Path,
) -> FaissIndex:
    """Build a student's index over a collection from its vectors artifact (see `encode_documents`).

    Raises:
        RankdistillError: the vectors are another student's or another collection's; whatever `build_index` raises.
    """
    engine = DenseEngine.over(encoder, vectors)
    engine.index.check(encoder, collection)
    assert isinstance(engine.index, ExactIndex)
    return build_index(
        engine.index.vectors,
        iter_doc_ids(collection),
        specification,
        out_file,
        student_fingerprint=document_fingerprint(encoder),
        collection_fingerprint=collection.fingerprint,
        vectors_fingerprint=engine.index.fingerprint,
        similarity=encoder.similarity,
    )


def iter_doc_ids(collection: Collection, batch_size: int = BLOCK) -> Iterator[str]:
    """A collection's document ids in row order, a batch in memory at a time."""
    for start in range(0, collection.document_count, batch_size):
        yield from collection.doc_ids(np.arange(start, min(start + batch_size, collection.document_count)))
