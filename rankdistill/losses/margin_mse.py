"""Margin-MSE: the student learns the teacher's score differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rankdistill.losses.base import ListLoss, sums_where


@dataclass(eq=False)
class MarginMSE(ListLoss):
    """Mean over pairs of ((s_i - s_j) - (t_i - t_j))^2 (Hofstaetter et al. 2020, arXiv:2010.02666).

    Invariant to a shift of the teacher's scores within a query, not to their scale.

    Args:
        pairs: which pairs of a list count. `positive_vs_rest`: i is the first document of the list, which must be
            labelled relevant, j each other one (documents - 1 pairs; lists without a positive count nothing).
            `all_pairs`: every i, j with t_i > t_j (no labels needed).
    """

    type = "margin_mse"
    matches = "margins"
    pairs: Literal["positive_vs_rest", "all_pairs"] = "positive_vs_rest"

    def __post_init__(self) -> None:
        self.needs_labels = self.pairs == "positive_vs_rest"
        self.over_pairs = self.pairs == "all_pairs"

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.pairs == "positive_vs_rest":
            # Margins against the list's first document only: no n x n matrix.
            error = (student_scores[:, :1] - student_scores) - (teacher_scores[:, :1] - teacher_scores)
            counted = mask & mask[:, :1] & (labels[:, :1] > 0)
            counted[:, 0] = False  # the pair of the positive with itself is no pair
            return sums_where(error.square(), counted)
        student_margins = student_scores[:, :, None] - student_scores[:, None, :]
        teacher_margins = teacher_scores[:, :, None] - teacher_scores[:, None, :]
        counted = (teacher_margins > 0) & mask[:, :, None] & mask[:, None, :]
        return sums_where((student_margins - teacher_margins).square(), counted)
