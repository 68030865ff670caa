"""Contrastive losses on labels: the plain baseline that every distillation must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from rankdistill.losses.base import ListLoss, sums_where
from rankdistill.losses.schedules import Schedule


class InfoNCE(ListLoss):
    """-log softmax of the positive among its list (van den Oord et al. 2018, arXiv:1807.03748); reads no teacher.

    The positive is the list's first document, which must be labelled relevant; other documents of the list that are
    labelled relevant are no negatives and are left out.

    Args:
        temperature: scores are divided by it.
        weight: share in a sum of losses.
    """

    type = "infonce"
    needs_labels = True
    needs_teacher = False

    def __init__(self, temperature: Schedule = 1.0, weight: Schedule = 1.0) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        first = torch.zeros_like(mask)
        first[:, 0] = True
        competing = mask & (first | (labels <= 0))
        logits = (student_scores / self.now(self.temperature)).masked_fill(~competing, float("-inf"))
        counted = mask[:, 0] & (labels[:, 0] > 0)
        logits = logits.masked_fill(~counted[:, None], 0.0)  # a list that counts nothing must give no NaN
        return sums_where(-logits.log_softmax(dim=1)[:, :1], counted[:, None])
