"""Weights by what the student finds hard at present."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankdistill.losses.base import comparable, evenness, log_softmax_where
from rankdistill.losses.schedules import Schedule, Temperature
from rankdistill.losses.weighting.base import Weighting, mean_one


@dataclass(eq=False)
class Difficulty(Weighting):
    """difficulty^power of each list: hard ones count more, anew in each batch, so that what is learnt recedes.

    After dynamic contrastive distillation (Rao et al. 2022, arXiv:2207.01426). Lists of one document count 0.

    Args:
        by: `entropy`: that of softmax(s / tau), as a share of the greatest possible, so that long lists are no harder;
            `loss`: KL(softmax(t / tau) || softmax(s / tau)), how far the student is from the teacher.
        power: 0: all lists alike; above 1: the hardest alone; below 0: the easy ones first (a ramp makes a curriculum).
        temperature: tau, of both.
    """

    type = "difficulty"
    by: Literal["entropy", "loss"] = "entropy"
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
        temperature = self.now(self.temperature)
        if self.by == "entropy":
            difficulty = evenness(student_scores / temperature, mask)
        else:
            student = log_softmax_where(student_scores / temperature, mask)
            teacher = log_softmax_where(teacher_scores / temperature, mask)
            difficulty = (teacher.exp() * (teacher - student)).masked_fill(~mask, 0.0).sum(dim=1)
        # Above 0, for powers below 0.
        return mean_one(difficulty.clamp(min=1e-3) ** self.now(self.power) * comparable(mask))
