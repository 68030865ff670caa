"""What a weighting is: a batch of scored lists in, what each list counts out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from rankdistill.losses.schedules import Scheduled


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
