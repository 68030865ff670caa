"""Plackett-Luce distillation: the student is to draw the documents in the teacher's order, one after another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rankdistill.losses.base import ListLoss, comparable, log_softmax_where
from rankdistill.losses.schedules import Temperature


@dataclass(eq=False)
class PLD(ListLoss):
    """sum_k alpha_k * (logsumexp_{l >= k} s_l - s_k), documents in the order to be learnt (Bassam et al. 2025,
    arXiv:2506.12542), mean over the lists of two documents or more.

    First the list's first document where it is labelled relevant, then the others by falling teacher score; a list
    without that label goes by the teacher's scores alone. alpha = softmax(t / tau): what the teacher is sure of counts
    most. With all weight on the first it is cross-entropy. Convex in s and invariant to a shift of s or t.

    Args:
        temperature: the student's scores are divided by it.
        teacher_temperature: tau.
    """

    type = "pld"
    temperature: Temperature = 1.0
    teacher_temperature: Temperature = 1.0

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        key = teacher.masked_fill(~mask, float("-inf"))
        first = mask[:, 0] & (labels[:, 0] > 0)
        key[:, 0] = key[:, 0].masked_fill(first, float("inf"))
        order = key.argsort(dim=1, descending=True, stable=True)  # padding last
        weights = log_softmax_where(teacher / self.now(self.teacher_temperature), mask).exp().gather(1, order)
        scores = (student / self.now(self.temperature)).masked_fill(~mask, -1e30).gather(1, order)
        remaining = scores.flip(1).logcumsumexp(dim=1).flip(1)
        counted = comparable(mask)
        choices = (weights * (remaining - scores)).masked_fill(~(mask.gather(1, order) & counted[:, None]), 0.0)
        return choices.sum(dim=1), counted.to(choices.dtype)
