"""Dual supervision: beside its own pair, a query learns from a batch teacher how the batch's other documents score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankdistill.losses.base import BatchLoss
from rankdistill.losses.schedules import Schedule


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

    def forward(
        self, student_scores: Tensor, teacher_scores: Tensor | None, index: Tensor, labels: Tensor, mask: Tensor
    ) -> Tensor:
        assert teacher_scores is not None
        has_positive = mask[:, 0] & (labels[:, 0] > 0)
        # error[i, d] = (s_ii+ - s_id) - (T_ii+ - T_id)
        difference = student_scores - teacher_scores
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
