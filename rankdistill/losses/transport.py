"""Optimal transport between what the student and what the teacher think of a batch of lists."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rankdistill.losses.base import ListLoss, Softmaxes, comparable, log_softmax_where


@dataclass(eq=False)
class Sinkhorn(Softmaxes, ListLoss):
    """What it costs to carry the batch's student distributions to its teacher distributions (SinKD, Cui et al. 2024,
    arXiv:2402.17110).

    Each list of two documents or more is a point: its softmax, documents in the teacher's order so that a place means
    the same in every list. Cost of list i to list j: the sum of |p_s,i - p_t,j|. The plan is entropic with equal
    masses, from a fixed number of Sinkhorn's iterations in the log domain; the gradient goes through them.

    An entropic plan is blurred: it draws all lists to their common middle, and the cost of a perfect student is not 0.
    `debias` takes half of the cost of student to student and of teacher to teacher off (Sinkhorn divergence, Feydy et
    al. 2019, arXiv:1810.08278): exactly 0 for a perfect student. Without it, the loss as published.

    Memory: lists^2; a weighting multiplies what a list's own mass costs.

    Args:
        temperature: tau_s, of the student's softmax.
        blur: weight of the plan's entropy; costs lie between 0 and 2.
        iterations: of Sinkhorn's scaling.
        debias: subtract what the blur alone costs.
    """

    type = "sinkhorn"
    blur: float = 0.1
    iterations: int = 20
    debias: bool = True

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counted = comparable(mask)
        order = teacher.masked_fill(~mask, float("-inf")).argsort(dim=1, descending=True, stable=True)
        shown = mask.gather(1, order)
        own, theirs = (
            log_softmax_where(scores / tau, mask).exp().gather(1, order).masked_fill(~shown, 0.0)[counted]
            for scores, tau in zip((student, teacher), self.temperatures(), strict=True)
        )
        costs = self._costs(own, theirs)
        if self.debias:
            costs = costs - self._costs(own, own) / 2 - self._costs(theirs, theirs) / 2
        sums = torch.zeros_like(student[:, 0]).masked_scatter(counted, costs)
        return sums, counted.to(sums.dtype)

    def _costs(self, left: Tensor, right: Tensor) -> Tensor:
        """What each of the left points' mass costs, a mass of 1 each: points [lists, documents] → [lists]."""
        if not len(left):
            return left.sum(dim=1)
        cost = torch.cdist(left, right, p=1)
        return (transport_plan(cost, self.blur, self.iterations) * cost).sum(dim=1) * len(left)


def transport_plan(cost: Tensor, blur: float, iterations: int) -> Tensor:
    """Sinkhorn's plan between equal masses (Cuturi 2013, arXiv:1306.0895): [n, m] of sum 1, its rows exactly equal.

    In the log domain: exp(-cost / blur) itself would underflow.
    """
    rows, columns = cost.shape
    kernel = -cost / blur
    left, right = torch.zeros_like(cost[:, 0]), torch.zeros_like(cost[0])
    for _ in range(iterations):
        right = -math.log(columns) - (kernel + left[:, None]).logsumexp(dim=0)
        left = -math.log(rows) - (kernel + right).logsumexp(dim=1)
    return (kernel + left[:, None] + right).exp()
