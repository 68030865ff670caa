"""Divergences between the student's and the teacher's distributions over a list."""

from __future__ import annotations

import torch
from torch import Tensor

from rankdistill.losses.base import ListLoss, log_softmax_where
from rankdistill.losses.schedules import Schedule


class KLDivergence(ListLoss):
    """tau_s^2 * KL(softmax(t / tau_t) || softmax(s / tau_s)), batch mean (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        temperature: tau_s, the student's.
        teacher_temperature: tau_t; the student's unless given.
        weight: share in a sum of losses.
    """

    type = "kl"

    def __init__(
        self, temperature: Schedule = 1.0, teacher_temperature: Schedule | None = None, weight: Schedule = 1.0
    ) -> None:
        super().__init__(weight)
        self.temperature = temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        temperature = self.now(self.temperature)
        student = log_softmax_where(student_scores / temperature, mask)
        teacher = log_softmax_where(teacher_scores / self.now(self.teacher_temperature), mask)
        divergence = (teacher.exp() * (teacher - student)).masked_fill(~mask, 0.0).sum(dim=1)
        return temperature**2 * divergence, torch.ones_like(divergence)


class ListNet(ListLoss):
    """Cross-entropy -sum softmax(t / tau) * log softmax(s / tau), batch mean (Cao et al. 2007).

    Its gradient is that of the KL divergence; its least value is the teacher's entropy, not 0.

    Args:
        temperature: tau, of both sides.
        weight: share in a sum of losses.
    """

    type = "listnet"

    def __init__(self, temperature: Schedule = 1.0, weight: Schedule = 1.0) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        temperature = self.now(self.temperature)
        student = log_softmax_where(student_scores / temperature, mask)
        teacher = log_softmax_where(teacher_scores / temperature, mask).exp()
        entropy = -(teacher * student).masked_fill(~mask, 0.0).sum(dim=1)
        return entropy, torch.ones_like(entropy)
