"""Weights as integers ("impacts"): what inverted indexes of whole numbers keep of a sparse student's weights.

A weight becomes the nearest whole number of steps, at least 1, so that every term of a document stays; a step is the
highest weight over 2^bits - 1. Anh & Moffat, "Pruned Query Evaluation Using Pre-Computed Impacts", SIGIR 2006.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.errors import RankdistillError
from rankdistill.indexes.sparse_specification import QuantisedSpecification

WEIGHTS_AT_ONCE = 8_000_000  # looked at in memory at a time


@dataclass(frozen=True)
class Quantiser:
    """Weights → 1 … `levels` (2^bits - 1); `maximum` is that of the highest, and what is above is taken for it."""

    maximum: float
    levels: int

    @property
    def step(self) -> float:
        """The weight of 1: a whole number times it is the weight that an index searches with."""
        return self.maximum / self.levels

    def __call__(self, weights: NDArray[np.float32]) -> NDArray[np.int32]:
        """Weights above 0 as whole numbers."""
        steps = np.rint(weights.astype(np.float64) / self.step)
        return np.clip(steps, 1, self.levels).astype(np.int32)


def fit_quantiser(specification: QuantisedSpecification, vectors: Any) -> tuple[Quantiser, dict[str, Any]]:
    """The quantiser of a csr_matrix [documents, vocabulary], and for the manifest: maximum, step, clipped weights.

    An error where a weight is above the specification's maximum and that says `above: error`.
    """
    highest = max((float(part.max()) for part in _parts(vectors.data)), default=0.0)
    maximum = specification.maximum or highest or 1.0
    quantiser = Quantiser(maximum, 2**specification.bits - 1)
    clipped = 0
    if highest > maximum:
        clipped = sum(int((part > maximum).sum()) for part in _parts(vectors.data))
        if specification.above == "error":
            raise RankdistillError(
                f"{clipped:,} of {vectors.nnz:,} weights are above the maximum of {maximum:g}, up to {highest:g}",
                where=f"{specification.name}: maximum",
                fix=f"maximum: {highest:.4g}, or leave it out, or above: clip",
            )
    return quantiser, {"maximum_weight": maximum, "step": quantiser.step, "clipped_weights": clipped}


def term_names(terms: Sequence[str], where: str) -> list[str]:
    """A vocabulary's terms as an index writes them, all different; an id without a term: "[id 17]"."""
    names = [term or f"[id {number}]" for number, term in enumerate(terms)]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise RankdistillError(f"two of the vocabulary's {len(names):,} terms are {twice!r}", where=where)
    return names


def _parts(weights: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(weights), WEIGHTS_AT_ONCE):
        yield weights[start : start + WEIGHTS_AT_ONCE]
