"""What a loss is: a function of a batch of scored lists (or of what else it reads) to one number.

Losses are sorted by what they read, so that a trainer needs one call a kind:
    ListLoss    scores of each query's own list, [lists, documents]
More kinds (scores across the batch, embeddings, regularisers) are further base classes beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn


class Loss(nn.Module, ABC):
    """Constructor parameters are the keys of a recipe; `weight` is its share in a weighted sum of losses."""

    needs_labels = False
    needs_teacher = True
    over_pairs = False  # memory grows with the square of a list

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight


class ListLoss(Loss):
    """A loss that reads each list alone."""

    type: ClassVar[str]  # type: ignore[assignment]  # the recipe's word; hides nn.Module.type, which casts

    @abstractmethod
    def forward(self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The loss of a batch of scored lists.

        Args:
            student_scores: [lists, documents], float32.
            teacher_scores: [lists, documents], float32, raw.
            labels: [lists, documents], int: relevance, -1 where unjudged.
            mask: [lists, documents], bool: False pads lists of unequal length.

        Returns:
            A scalar; 0 (with a gradient of 0) when no list has what the loss needs.
        """


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values where the mask is set; 0, still connected to the graph, where nothing is."""
    values = values.masked_fill(~where, 0.0)
    return values.sum() / where.sum().clamp(min=1)
