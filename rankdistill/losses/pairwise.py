"""Pairwise logistic losses: each pair counts alike, by the teacher's ranks, or by what is lost in nDCG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rankdistill.losses.base import ListLoss, margins, ordered
from rankdistill.losses.schedules import Temperature


@dataclass(eq=False)
class RankNet(ListLoss):
    """Weighted mean of log(1 + exp(s_j - s_i)) over the pairs with t_i > t_j (Burges et al. 2005).

    Memory: lists x documents^2.

    Args:
        weighting: `none`: each pair counts the same; `rank`: 1 / (r_i + r_j), r the teacher's rank from 1 (FIRST, Reddy
            et al. 2024, arXiv:2406.15657); `ndcg`: what swapping the two changes in nDCG at the student's present
            ranks, with gain 1 / r (LambdaRank, Burges et al. 2006; JPQ trains with it, arXiv:2108.00644).
        temperature: the student's scores are divided by it.
    """

    type = "ranknet"
    over_pairs = True
    weighting: Literal["none", "rank", "ndcg"] = "none"
    temperature: Temperature = 1.0

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = student / self.now(self.temperature)
        weights = ordered(teacher, mask).to(scores.dtype)
        if self.weighting != "none":
            ranks = ranks_of(teacher, mask)
            if self.weighting == "rank":
                weights = weights / (ranks[:, :, None] + ranks[:, None, :])
            else:
                gain = 1 / ranks
                discount = 1 / torch.log2(ranks_of(scores.detach(), mask) + 1)
                ideal = (gain / torch.log2(ranks + 1) * mask).sum(dim=1).clamp(min=1e-9)
                weights = weights * (margins(gain) * margins(discount)).abs() / ideal[:, None, None]
        losses = functional.softplus(-margins(scores))
        return (losses * weights).sum(dim=(1, 2)), weights.sum(dim=(1, 2))


def ranks_of(scores: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 by falling score, ties by place; what is masked comes last: [lists, documents], scores' dtype."""
    order = scores.masked_fill(~mask, float("-inf")).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places).to(scores.dtype)


@dataclass(eq=False)
class LambdaLoss(ListLoss):
    """Mean over the pairs with g_i > g_j of w_ij * log2(1 + exp((s_j - s_i) / tau)) (Wang et al. 2018, CIKM).

    With G a document's gain by the ideal DCG, D(k) = log2(1 + k) and r the student's present ranks: `ndcg2` weighs by
    |G_i - G_j| * |1 / D(|r_i - r_j|) - 1 / D(|r_i - r_j| + 1)|, a tight bound of nDCG; `ndcg2++` by `mu` times that
    plus LambdaRank's |G_i - G_j| * |1 / D(r_i) - 1 / D(r_j)|, which alone is `ranknet` with `weighting: ndcg`.

    Memory: lists x documents^2.

    Args:
        gain: `teacher`: 1 / (the teacher's rank); `labels`: 2^relevance - 1, 0 where unjudged (no teacher is read).
        weighting: see above.
        mu: share of NDCG-Loss2 in `ndcg2++`.
        k: only pairs with a document in the student's first k count, and the ideal is that of nDCG@k; all if null.
        temperature: the student's scores are divided by it.
    """

    type = "lambda_loss"
    over_pairs = True
    gain: Literal["teacher", "labels"] = "teacher"
    weighting: Literal["ndcg2", "ndcg2++"] = "ndcg2++"
    mu: float = 10.0
    k: int | None = None
    temperature: Temperature = 1.0

    def __post_init__(self) -> None:
        self.needs_labels = self.gain == "labels"
        self.needs_teacher = self.gain == "teacher"

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = student / self.now(self.temperature)
        worth = teacher if self.gain == "teacher" else labels.clamp(min=0).to(scores.dtype)
        wanted, now = ranks_of(worth, mask), ranks_of(scores.detach(), mask)
        counted = ordered(worth, mask)
        gains = (1 / wanted if self.gain == "teacher" else 2**worth - 1).masked_fill(~mask, 0.0)
        ideal = gains / torch.log2(1 + wanted)
        if self.k is not None:
            ideal = ideal.masked_fill(wanted > self.k, 0.0)
            counted = counted & (torch.minimum(now[:, :, None], now[:, None, :]) <= self.k)
        gains = gains / ideal.sum(dim=1, keepdim=True).clamp(min=1e-9)
        apart = margins(now).abs().clamp(min=1.0)
        weights = 1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)
        if self.weighting == "ndcg2++":
            weights = self.mu * weights + margins(1 / torch.log2(1 + now)).abs()
        weights = weights * margins(gains).abs()
        losses = functional.softplus(-margins(scores)) / math.log(2)
        return (losses * weights * counted).sum(dim=(1, 2)), counted.sum(dim=(1, 2)).to(scores.dtype)
