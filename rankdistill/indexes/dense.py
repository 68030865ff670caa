"""Dense search: text → vector → hits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import (
    Best,
    DocumentIds,
    Encoder,
    Hits,
    Rows,
    Scores,
    StudentEngine,
    Vectors,
    check_inputs,
    document_fingerprint,
    no_hits,
)
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.specification import IndexSpecification
from rankdistill.indexes.vectors import check_vectors, open_vectors

BLOCK = 65_536  # document vectors scored at a time


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

    @classmethod
    def open(cls, vectors: Artifact | str | Path) -> ExactIndex:
        """Over a vectors artifact."""
        artifact = open_artifact(vectors, "vectors")
        return cls(open_vectors(artifact), artifact.fingerprint, dict(artifact.manifest["inputs"]))

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def bytes(self) -> int:
        return int(self.vectors.nbytes)

    def check(self, encoder: Encoder | None = None, collection: Collection | None = None) -> None:
        """Refuse a student or a collection these vectors were not made from."""
        check_inputs(self.inputs, encoder, collection, None)
        if encoder is not None and encoder.dimension != self.dimension:
            raise RankdistillError(f"vectors of {self.dimension} dimensions, a student of {encoder.dimension}")

    def search(self, vectors: Vectors, k: int) -> list[Hits]:
        import faiss

        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_vectors(vectors, self.dimension, lambda row: f"query vector {row}")
        k = min(k, len(self.vectors))
        if k < 1 or not len(vectors):
            return [no_hits() for _ in vectors]
        best, l2 = Best(len(vectors), k), self.metric == "l2"
        metric = faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT
        for start in range(0, len(self.vectors), BLOCK):
            block = np.ascontiguousarray(self.vectors[start : start + BLOCK], dtype=np.float32)
            scores, rows = faiss.knn(vectors, block, min(k, len(block)), metric=metric)
            best.add(-scores if l2 else scores, rows + start)
        return best.hits()

    def scores(self, vector: Vectors, rows: Rows) -> Scores:
        """[rows] inner products of one query's vector [dimension] with these documents: re-ranking."""
        return np.asarray(self.vectors[rows] @ vector, np.float32)


class DenseEngine(StudentEngine):
    """An encoder over its vectors or a FAISS index of them."""

    kind, exact = "dense", ExactIndex


def export_index(
    encoder: Encoder,
    collection: Collection,
    vectors: Artifact | str | Path,
    specification: IndexSpecification,
    out_file: str | Path,
) -> FaissIndex:
    """Build a student's index over a collection from its vectors artifact (see `encode_documents`).

    An error where the vectors are another student's or another collection's.
    """
    exact = ExactIndex.open(vectors)
    exact.check(encoder, collection)
    return build_index(
        exact.vectors,
        DocumentIds(collection),
        specification,
        out_file,
        student_fingerprint=document_fingerprint(encoder),
        collection_fingerprint=collection.fingerprint,
        vectors_fingerprint=exact.fingerprint,
        similarity=encoder.similarity,
    )
