"""Dense search: text → vector → hits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, open_artifact
from rankdistill.collections import Collection
from rankdistill.indexes import base
from rankdistill.indexes.base import Encoder, ExhaustiveIndex, Hits, Rows, Scores, StudentEngine, Vectors
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_index import FaissIndex, faiss_metric
from rankdistill.indexes.specification import IndexSpecification
from rankdistill.indexes.vectors import check_vectors, open_vectors

BLOCK = 65_536  # document vectors scored at a time


class ExactIndex(ExhaustiveIndex):
    """Brute force over memory-mapped vectors [documents, dimension]. Scores as `FaissIndex` has."""

    name = "exact"

    def __init__(
        self,
        vectors: NDArray[np.float32],
        fingerprint: str,
        inputs: Mapping[str, str] | None = None,
        metric: Literal["inner_product", "l2"] = "inner_product",
    ) -> None:
        super().__init__(fingerprint, inputs)
        self.vectors, self.metric = vectors, metric

    @classmethod
    def open(cls, artifact: Artifact | str | Path) -> ExactIndex:
        artifact = open_artifact(artifact, "vectors")
        return cls(open_vectors(artifact), artifact.fingerprint, artifact.manifest["inputs"])

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def bytes(self) -> int:
        return int(self.vectors.nbytes)

    def search(self, queries: Vectors, k: int) -> list[Hits]:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        check_vectors(queries, self.dimension, lambda row: f"query vector {row}")
        if (k := min(k, len(self.vectors))) < 1 or not len(queries):
            return [base.no_hits() for _ in queries]
        return base.best_of_blocks(self._blocks(queries, k), len(queries), k)

    def _blocks(self, queries: Vectors, k: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        import faiss

        sign = -1 if self.metric == "l2" else 1
        for start in range(0, len(self.vectors), BLOCK):
            block = np.ascontiguousarray(self.vectors[start : start + BLOCK], dtype=np.float32)
            scores, rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss_metric(self.metric))
            yield sign * scores, rows + start

    def scores(self, query: Vectors, rows: Rows) -> Scores:
        return np.asarray(self.vectors[rows] @ query, np.float32)


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
        base.DocumentIds(collection),
        specification,
        out_file,
        student_fingerprint=base.document_fingerprint(encoder),
        collection_fingerprint=collection.fingerprint,
        vectors_fingerprint=exact.fingerprint,
        similarity=encoder.similarity,
    )
