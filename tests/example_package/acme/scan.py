"""An index of term weights: the specification, and beside it what builds and opens it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from scipy import sparse

from rankdistill.indexes.base import Hits, ranked
from rankdistill.indexes.sparse_specification import SparseSpecification


class ScanSpecification(SparseSpecification):
    """Every document is looked at, with weights rounded down to a step."""

    step: float = Field(default=0.5, gt=0, description="weights are multiples of it")


def build(
    specification: ScanSpecification, vectors: Any, doc_ids: Sequence[str], terms: Sequence[str], folder: Path
) -> dict[str, Any]:
    rounded = sparse.csr_matrix(vectors)
    rounded.data = np.floor(rounded.data / specification.step) * specification.step
    sparse.save_npz(folder / "vectors.npz", rounded)
    return {}


class Scan:
    def __init__(self, vectors: Any) -> None:
        self.vectors, self.bytes = vectors, vectors.data.nbytes

    def search(self, queries: Any, k: int) -> list[Hits]:
        scores = (queries @ self.vectors.T).toarray()
        return [ranked(np.where(row > 0, np.arange(len(row)), -1), row, k) for row in scores]


def open_index(folder: Path) -> Scan:
    return Scan(sparse.load_npz(folder / "vectors.npz"))
