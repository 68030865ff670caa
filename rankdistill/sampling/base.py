"""Which queries and documents meet in a batch.

A sampler is a pure function of (seed, epoch, position): nothing to save in a checkpoint, the same stream whatever
the number of data-loader workers or processes, and exact after resuming at any step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray


def generator(*numbers: int) -> np.random.Generator:
    """A random generator that depends on these numbers alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers])))


class BatchSampler(ABC):
    """Which queries share a batch."""

    size: int

    @abstractmethod
    def epoch(self, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """[batches, size] list numbers (0 ≤ number < count) of one epoch; no list twice in an epoch.

        An epoch whose last batch would be short ends with the full batch before it.
        """


class DocumentSampler(ABC):
    """Which documents of a query's list are used this time."""

    size: int

    @abstractmethod
    def choose(
        self, scores: NDArray[np.float32], relevance: NDArray[np.int32], random: np.random.Generator
    ) -> NDArray[np.int64]:
        """Positions in the list, at most `size`; a labelled positive, where there is one, comes first.

        Args:
            scores: [documents] the teacher's scores.
            relevance: [documents] labels, -1 where unjudged.
        """
