"""Divergences between the student's and the teacher's distributions over a list."""

from __future__ import annotations

from torch import Tensor

from rankdistill.losses.base import ListLoss


class KLDivergence(ListLoss):
    """tau_s^2 * KL(softmax(t / tau_t) || softmax(s / tau_s)), batch mean (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        temperature: tau_s, the student's.
        teacher_temperature: tau_t; the student's unless given.
        weight: share in a sum of losses.
    """

    type = "kl"

    def __init__(self, temperature: float = 1.0, teacher_temperature: float | None = None, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature

    def forward(self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        # A finite floor, not -inf: 0 * (-inf - -inf) would be NaN in the padded places.
        student = (student_scores / self.temperature).masked_fill(~mask, -1e30).log_softmax(dim=1)
        teacher = (teacher_scores / self.teacher_temperature).masked_fill(~mask, -1e30).log_softmax(dim=1)
        divergence = (teacher.exp() * (teacher - student)).masked_fill(~mask, 0.0).sum(dim=1)
        return self.temperature**2 * divergence.mean()


class ListNet(ListLoss):
    """Cross-entropy -sum softmax(t / tau) * log softmax(s / tau), batch mean (Cao et al. 2007).

    Its gradient is that of the KL divergence; its least value is the teacher's entropy, not 0.

    Args:
        temperature: tau, of both sides.
        weight: share in a sum of losses.
    """

    type = "listnet"

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def forward(self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        student = (student_scores / self.temperature).masked_fill(~mask, -1e30).log_softmax(dim=1)
        teacher = (teacher_scores / self.temperature).masked_fill(~mask, -1e30).softmax(dim=1)
        return -(teacher * student).masked_fill(~mask, 0.0).sum(dim=1).mean()
