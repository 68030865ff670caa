"""Clustered vectors of length one, queries near them, and indexes built over them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.specification import IndexSpecification, any_specification, load_specification
from rankdistill.recipe import shipped

COUNT, DIMENSION = 1500, 32
IDS = [f"doc {row}\nwith a line" for row in range(COUNT)]


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


random = np.random.default_rng(0)
VECTORS = unit(
    random.normal(size=(40, DIMENSION))[random.integers(0, 40, COUNT)] + random.normal(size=(COUNT, DIMENSION)) * 0.7
)
QUERIES = unit(VECTORS[:50] + random.normal(size=(50, DIMENSION)) * 0.1)


def specification(**settings: Any) -> IndexSpecification:
    return load_specification({"name": "test", **settings})


def build(
    path: Path,
    vectors: np.ndarray = VECTORS,
    ids: Iterable[str] | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> FaissIndex:
    """`options` are those of `build_index`, `settings` those of the specification."""
    ids = IDS[: len(vectors)] if ids is None else ids
    return build_index(vectors, ids, specification(**settings), path, **(options or {}))


def shipped_specifications() -> dict[str, IndexSpecification]:
    """The shipped ones that are built; the learned ones are made by `rankdistill quantize`."""
    every = {name: any_specification(path) for name, path in shipped("indexes").items()}
    return {name: known for name, known in every.items() if isinstance(known, IndexSpecification)}
