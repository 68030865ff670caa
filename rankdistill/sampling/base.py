"""Which queries and documents meet in a batch.

A sampler is a pure function of (seed, epoch, position): nothing to save in a checkpoint, the same stream whatever
the number of data-loader workers or processes, and exact after resuming at any step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists


def generator(*numbers: int) -> np.random.Generator:
    """A random generator that depends on these numbers alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers])))


class BatchSampler(ABC):
    """Which queries share a batch. A dataclass: its fields are a recipe's keys."""

    type: str
    size: int

    def prepare(  # noqa: B027 (most need nothing)
        self, lists: ScoredLists, members: NDArray[np.int64], collection: Collection, folder: Path
    ) -> None:
        """Called once before a training; what is worth keeping for the next one goes below `folder`.

        Args:
            members: [count] the list numbers that are trained on; `epoch` gives places in it.
        """

    @abstractmethod
    def epoch(self, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """[batches, size] places of lists (0 ≤ place < count) in one epoch; no list twice in an epoch.

        An epoch whose last batch would be short ends with the full batch before it.
        """


class DocumentSampler(ABC):
    """Which documents of a query's list are used this time. A dataclass: its fields are a recipe's keys."""

    type: str
    size: int

    def usable(self, scores: NDArray[np.float32], relevance: NDArray[np.int32]) -> bool:
        """Whether a list has what this sampler needs; others are dropped before a training, and counted."""
        return True

    @abstractmethod
    def choose(
        self, scores: NDArray[np.float32], relevance: NDArray[np.int32], random: np.random.Generator
    ) -> NDArray[np.int64]:
        """Positions in the list, at most `size`; a labelled positive, where there is one, comes first.

        Args:
            scores: [documents] the teacher's scores.
            relevance: [documents] labels, -1 where unjudged.
        """


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
