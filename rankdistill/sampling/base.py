"""Which queries and documents meet in a batch.

A sampler is a pure function of (seed, epoch, position): nothing to save in a checkpoint, the same stream whatever
the number of data-loader workers or processes, and exact after resuming at any step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rankdistill.errors import RankdistillError

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


@dataclass
class BalancedDocuments(DocumentSampler):
    """A pair of a positive and a negative, drawn so that its margin is spread evenly (Hofstaetter et al. 2021,
    arXiv:2104.06967; with `topic_batches`, TAS-Balanced).

    The margins t+ - t- of a query's pairs are cut into bins of equal width between that query's own least and greatest.
    A bin is drawn uniformly among those that are not empty, then a pair uniformly in it. Pairs are of documents
    labelled relevant with those that are not; a list with fewer than two has nothing to balance and is not used.

    Args:
        size: documents a list: 2 is one pair, as published. More adds further negatives of the same positive, each
            drawn in the same way (a bin, then a pair in it) from those left.
        bins: how many, between a query's least and greatest margin.
    """

    type = "balanced_pairs"
    size: Annotated[int, Field(ge=2)] = 2
    bins: Annotated[int, Field(ge=1)] = 10

    def usable(self, scores: NDArray[np.float32], relevance: NDArray[np.int32]) -> bool:
        positives = int((relevance > 0).sum())
        return positives * (len(relevance) - positives) >= 2

    def choose(
        self, scores: NDArray[np.float32], relevance: NDArray[np.int32], random: np.random.Generator
    ) -> NDArray[np.int64]:
        positives, negatives = np.flatnonzero(relevance > 0), np.flatnonzero(relevance <= 0)
        if not len(positives) or not len(negatives):
            raise RankdistillError("a list without a positive and a negative has no pair", where="balanced_pairs")
        bins = margin_bins(scores[positives][:, None], scores[negatives][None, :], self.bins)
        of_bin = np.argwhere(bins == random.choice(np.unique(bins)))
        first, second = of_bin[random.integers(len(of_bin))]
        chosen, left = [positives[first], negatives[second]], np.ones(len(negatives), dtype=bool)
        left[second] = False
        while len(chosen) < self.size and left.any():
            bins_left = np.where(left, bins[first], -1)
            second = random.choice(np.flatnonzero(bins_left == random.choice(np.unique(bins[first][left]))))
            chosen.append(negatives[second])
            left[second] = False
        return np.array(chosen, dtype=np.int64)


def margin_bins(positive: NDArray[np.float32], negative: NDArray[np.float32], bins: int) -> NDArray[np.int64]:
    """The bin (0 to bins - 1) of each margin positive - negative; bins of equal width from the least to the greatest.

    Margins that are all equal are all in bin 0.
    """
    margins = positive.astype(np.float64) - negative.astype(np.float64)
    least, width = margins.min(), margins.max() - margins.min()
    if width == 0:
        return np.zeros(margins.shape, dtype=np.int64)
    return np.minimum((margins - least) / width * bins, bins - 1).astype(np.int64)
