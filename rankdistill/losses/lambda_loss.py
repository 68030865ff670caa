"""LambdaLoss: pairwise logistic losses weighted so that their sum bounds what is lost in nDCG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rankdistill.losses.base import ListLoss
from rankdistill.losses.ranknet import ranks_of
from rankdistill.losses.schedules import Temperature


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

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = student_scores / self.now(self.temperature)
        worth = teacher_scores if self.gain == "teacher" else labels.clamp(min=0).to(scores.dtype)
        wanted, now = ranks_of(worth, mask), ranks_of(scores.detach(), mask)
        counted = (worth[:, :, None] > worth[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        gains = (1 / wanted if self.gain == "teacher" else 2**worth - 1).masked_fill(~mask, 0.0)
        ideal = gains / torch.log2(1 + wanted)
        if self.k is not None:
            ideal = ideal.masked_fill(wanted > self.k, 0.0)
            counted = counted & (torch.minimum(now[:, :, None], now[:, None, :]) <= self.k)
        gains = gains / ideal.sum(dim=1, keepdim=True).clamp(min=1e-9)
        apart = (now[:, :, None] - now[:, None, :]).abs().clamp(min=1.0)
        weights = 1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)
        if self.weighting == "ndcg2++":
            discount = 1 / torch.log2(1 + now)
            weights = self.mu * weights + (discount[:, :, None] - discount[:, None, :]).abs()
        weights = weights * (gains[:, :, None] - gains[:, None, :]).abs()
        losses = functional.softplus(scores[:, None, :] - scores[:, :, None]) / math.log(2)
        return (losses * weights * counted).sum(dim=(1, 2)), counted.sum(dim=(1, 2)).to(scores.dtype)
