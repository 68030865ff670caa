"""Pairwise logistic losses: plain, weighted by the teacher's ranks, or by what a swap changes in nDCG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rankdistill.losses.base import ListLoss
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

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = student_scores / self.now(self.temperature)
        better = (teacher_scores[:, :, None] > teacher_scores[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        weights = better.to(scores.dtype)
        if self.weighting != "none":
            ranks = ranks_of(teacher_scores, mask)
            if self.weighting == "rank":
                weights = weights / (ranks[:, :, None] + ranks[:, None, :])
            else:
                gain = 1 / ranks
                discount = 1 / torch.log2(ranks_of(scores.detach(), mask) + 1)
                ideal = (gain / torch.log2(ranks + 1) * mask).sum(dim=1).clamp(min=1e-9)
                swap = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :])
                weights = weights * swap.abs() / ideal[:, None, None]
        losses = functional.softplus(scores[:, None, :] - scores[:, :, None])
        return (losses * weights).sum(dim=(1, 2)), weights.sum(dim=(1, 2))


def ranks_of(scores: Tensor, mask: Tensor) -> Tensor:
    """Ranks from 1 by falling score, ties by place; what is masked comes last: [lists, documents], scores' dtype."""
    order = scores.masked_fill(~mask, float("-inf")).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places).to(scores.dtype)
