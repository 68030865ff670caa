"""Uniform sampling: the baseline of every other sampler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankdistill.sampling.base import BatchSampler, DocumentSampler, generator


@dataclass
class RandomBatches(BatchSampler):
    """Queries in a random order, without replacement within an epoch.

    Args:
        size: queries in a batch.
    """

    type = "random_batches"
    size: int = 16

    def epoch(self, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
        order = generator(seed, epoch).permutation(count)
        if count < self.size:  # fewer lists than one batch holds: the batch is all of them
            return order[None, :]
        return order[: count - count % self.size].reshape(-1, self.size)


@dataclass
class RandomDocuments(DocumentSampler):
    """A random labelled positive first, then documents not labelled relevant, drawn uniformly without replacement.

    A list without a positive gives documents drawn uniformly from all of it.

    Args:
        size: documents a list.
    """

    type = "random_documents"
    size: int = 8

    def choose(
        self, scores: NDArray[np.float32], relevance: NDArray[np.int32], random: np.random.Generator
    ) -> NDArray[np.int64]:
        positives = np.flatnonzero(relevance > 0)
        others = np.flatnonzero(relevance <= 0)
        first = random.choice(positives, 1) if len(positives) else positives
        rest = random.choice(others, min(self.size - len(first), len(others)), replace=False)
        return np.concatenate([first, rest])
