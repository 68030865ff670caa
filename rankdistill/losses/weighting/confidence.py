"""Weights by how sure the teacher is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankdistill.losses.base import comparable, evenness, log_softmax_where
from rankdistill.losses.schedules import Schedule, Temperature
from rankdistill.losses.weighting.base import Weighting, mean_one


@dataclass(eq=False)
class Confidence(Weighting):
    """confidence^power of each list, from the teacher's softmax(t / tau); lists of one document count 0.

    Weighting by teacher confidence as in CA-MKD (Zhang et al. 2022, arXiv:2201.00007), which weighs teachers by it.

    Args:
        by: `entropy`: 1 - entropy / greatest possible entropy; `margin`: the first document's probability less the
            second's.
        power: 0: all lists alike; above 1: the surest alone.
        temperature: tau; at 1 a teacher of logits is sure of most lists.
    """

    type = "confidence"
    by: Literal["entropy", "margin"] = "entropy"
    power: Schedule = 1.0
    temperature: Temperature = 1.0

    @torch.no_grad()
    def forward(
        self,
        student_scores: Tensor,
        teacher_scores: Tensor,
        labels: Tensor,
        mask: Tensor,
        disagreement: Tensor | None,
    ) -> Tensor:
        scores = teacher_scores / self.now(self.temperature)
        if self.by == "entropy":
            confidence = 1 - evenness(scores, mask)
        elif mask.shape[1] > 1:
            best = log_softmax_where(scores, mask).exp().topk(2, dim=1).values
            confidence = best[:, 0] - best[:, 1]
        else:
            confidence = torch.zeros_like(scores[:, 0])
        return mean_one(confidence.clamp(min=0.0) ** self.now(self.power) * comparable(mask))
