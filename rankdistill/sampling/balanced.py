"""Balanced sampling of pairs: large margins and small ones equally often, whatever the candidates hold most of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rankdistill.errors import RankdistillError
from rankdistill.sampling.base import DocumentSampler


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
