"""Pointwise losses: each score alone."""

from __future__ import annotations

from torch import Tensor

from rankdistill.losses.base import ListLoss, sums_where


class PointwiseMSE(ListLoss):
    """Mean of (s - t)^2: the student takes over the teacher's very scores, so both need one scale."""

    type = "mse"
    matches = "margins"

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sums_where((student_scores - teacher_scores).square(), mask)
