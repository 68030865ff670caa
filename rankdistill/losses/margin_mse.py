"""Losses on the teacher's very scores and on their differences, over a list and over a whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankdistill.losses.base import BatchLoss, ListLoss, margins, ordered, sums_where
from rankdistill.losses.schedules import Schedule


class PointwiseMSE(ListLoss):
    """Mean of (s - t)^2: the student takes over the teacher's very scores, so both need one scale."""

    type = "mse"
    matches = "margins"

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return sums_where((student - teacher).square(), mask)


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

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.pairs == "positive_vs_rest":
            # Margins against the list's first document only: no n x n matrix.
            error = (student[:, :1] - student) - (teacher[:, :1] - teacher)
            counted = mask & mask[:, :1] & (labels[:, :1] > 0)
            counted[:, 0] = False  # the pair of the positive with itself is no pair
            return sums_where(error.square(), counted)
        return sums_where((margins(student) - margins(teacher)).square(), ordered(teacher, mask))


@dataclass(eq=False)
class InBatchMarginMSE(BatchLoss):
    """1/2 [MSE(s_ii+ - s_ij+, T_ii+ - T_ij+) + MSE(s_ii+ - s_ij-, T_ii+ - T_ij-)] over all i and j != i (Hofstaetter et
    al. 2021, arXiv:2104.06967), s_ij the student's and T_ij the batch teacher's score of query i with a document of
    query j.

    Added to `margin_mse` it is the paper's dual supervision. A list's positive is its first document, labelled
    relevant; its other documents are its negatives. A list without a positive has no i and no j+, but its documents
    are j-. A document that is in list i too is no j of it: its pair is the business of the loss over lists. Each of the
    two means is over its own terms, a document of two lists counting in each.

    Invariant to a shift of the teacher's scores within a query, not to their scale: the batch teacher should be on the
    scale of the teacher of the pairs.

    Args:
        weight: share in a sum of losses; 0.75 as published.
    """

    type = "in_batch_margin_mse"
    needs_labels = True
    needs_teacher = False
    needs_batch_teacher = True
    weight: Schedule = 0.75

    def forward(self, student: Tensor, teacher: Tensor | None, index: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        assert teacher is not None
        has_positive = mask[:, 0] & (labels[:, 0] > 0)
        # error[i, d] = (s_ii+ - s_id) - (T_ii+ - T_id)
        difference = student - teacher
        squares = (difference.gather(1, index[:, :1]) - difference).square()
        own = torch.zeros_like(squares).scatter_add_(1, index, mask.to(squares.dtype)) > 0
        counted = has_positive[:, None] & ~own
        # How many lists have a document as their positive, and as one of their negatives.
        as_positive, as_negative = (squares.new_zeros(squares.shape[1]) for _ in range(2))
        as_positive.scatter_add_(0, index[:, 0], has_positive.to(squares.dtype))
        as_negative.scatter_add_(0, index.flatten(), mask.flatten().to(squares.dtype))
        terms = squares.masked_fill(~counted, 0.0)
        halves = []
        for times in (as_positive, as_negative - as_positive):
            count = (counted * times).sum()
            halves.append((terms * times).sum() / torch.where(count > 0, count, torch.ones_like(count)))
        return 0.5 * (halves[0] + halves[1])
