"""Weights by how far an ensemble's teachers agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankdistill.errors import RankdistillError
from rankdistill.losses.schedules import Schedule
from rankdistill.losses.weighting.base import Weighting, mean_one


@dataclass(eq=False)
class Agreement(Weighting):
    """exp(-strength * d / mean d), d a list's mean disagreement between the teachers, the other mean the batch's.

    Without a unit, so that any measure of disagreement will do. Documents whose disagreement is not known (NaN: a
    single teacher scored them) are left out of their list's mean; a list that has no other counts as the mean one.

    Args:
        strength: 0: all lists alike.
    """

    type = "agreement"
    needs_disagreement = True
    strength: Schedule = 1.0

    @torch.no_grad()
    def forward(
        self,
        student_scores: Tensor,
        teacher_scores: Tensor,
        labels: Tensor,
        mask: Tensor,
        disagreement: Tensor | None,
    ) -> Tensor:
        if disagreement is None:
            raise RankdistillError(
                "these lists do not say how far their teachers disagree",
                where="training.weighting: agreement",
                fix="score with a teacher of type ensemble, or weight by difficulty or confidence",
            )
        known = mask & ~disagreement.isnan()
        counts = known.sum(dim=1)
        lists = disagreement.masked_fill(~known, 0.0).sum(dim=1) / counts.clamp(min=1)
        middle = lists.sum() / (counts > 0).sum().clamp(min=1)
        relative = torch.where((counts > 0) & (middle > 0), lists / middle.clamp(min=1e-12), torch.ones_like(lists))
        return mean_one((-self.now(self.strength) * relative).exp())
