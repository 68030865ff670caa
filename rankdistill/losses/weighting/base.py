"""Weightings: a batch of scored lists in, what each list counts out: by what the student finds hard, by how sure the
teacher is, by how far several teachers agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankdistill.errors import RankdistillError
from rankdistill.losses.base import comparable, evenness, log_softmax_where
from rankdistill.losses.schedules import Schedule, Scheduled, Temperature


class Weighting(Scheduled, ABC):
    """What each list of a batch counts in the losses over lists."""

    type: ClassVar[str]  # type: ignore[assignment]
    needs_disagreement = False  # between the members of an ensemble of teachers

    @abstractmethod
    def forward(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor, disagreement: Tensor | None
    ) -> Tensor:
        """Weights [lists], at least 0 and of mean 1, without a gradient.

        Args:
            student_scores, teacher_scores, labels, mask: [lists, documents], as a ListLoss has them.
            disagreement: [lists, documents], float32, where the lists have it.
        """


def mean_one(weights: Tensor) -> Tensor:
    """Weights of mean 1; all alike where they are all 0."""
    total = weights.sum()
    return torch.where(total > 0, weights * (len(weights) / total.clamp(min=1e-12)), torch.ones_like(weights)).detach()


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
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor, disagreement: Tensor | None
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
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor, disagreement: Tensor | None
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
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor, disagreement: Tensor | None
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
