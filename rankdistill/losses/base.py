"""What a loss is: a function of a batch of scored lists (or of what else it reads) to one number.

Losses are sorted by what they read, so that a trainer needs one call a kind:
    ListLoss    scores of each query's own list, [lists, documents]
    BatchLoss   scores of every query against every document of the batch, [lists, distinct documents]
    VectorLoss  embeddings of one side beside those of a teacher, [texts, dimension]
    Regulariser embeddings of one side alone, [texts, dimension]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankdistill.losses.schedules import Schedule, Scheduled, Temperature


@dataclass(eq=False)
class Loss(Scheduled, ABC):
    """What a student learns to make small.

    Args:
        weight: share in a sum of losses.
    """

    weight: Schedule = field(default=1.0, kw_only=True)

    needs_labels = False
    needs_teacher = True
    needs_batch_teacher = False
    over_pairs = False  # memory grows with the square of a list
    # What of the teacher's scores the student's become: one scale then.
    matches: ClassVar[Literal["", "margins", "softmax"]] = ""

    def __init__(self, weight: Schedule = 1.0) -> None:  # called by those that write a constructor of their own
        self.weight = weight

    def strength(self) -> float:
        """Its weight in the sum of losses at this step."""
        return self.now(self.weight)


class ListLoss(Loss):
    """A loss that reads each list alone: the weighted mean of its terms over all lists of a batch."""

    type: ClassVar[str]  # type: ignore[assignment]  # the recipe's word; hides nn.Module.type, which casts

    @abstractmethod
    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and counts.

        Args:
            student, teacher: scores [lists, documents], float32; the teacher's are raw.
            labels: [lists, documents], int: relevance, -1 where unjudged.
            mask: [lists, documents], bool: False pads lists of unequal length.

        Returns:
            Sum of each list's terms, and how many (or how much weight) they are: float32 [lists] both. A list without
            what the loss needs has 0 of both, with a gradient of 0.
        """

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch of scored lists (see `terms`), each list counting by its weight: [lists], 1 unless given.

        Returns:
            A scalar; 0 (with a gradient of 0) when no list has what the loss needs.
        """
        sums, counts = self.terms(student, teacher, labels, mask)
        if weights is not None:
            sums, counts = sums * weights, counts * weights
        total = counts.sum()
        return sums.sum() / torch.where(total > 0, total, torch.ones_like(total))


class BatchLoss(Loss):
    """A loss over the scores of every query with every document of the batch (in-batch negatives)."""

    type: ClassVar[str]  # type: ignore[assignment]

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor | None, index: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            student: scores [lists, distinct documents], float32; a document of several lists is one column.
            teacher: the same of the batch teacher where `needs_batch_teacher`, else None.
            index: [lists, documents], int: columns of each query's own list.
            labels, mask: [lists, documents], as a ListLoss has them; the `index` of padding names any column.

        Returns:
            A scalar; 0 (with a gradient of 0) when nothing in the batch has what the loss needs.
        """


class VectorLoss(Loss):
    """A loss between the student's embeddings and a batch teacher's of the same texts; its mean over `sides`."""

    type: ClassVar[str]  # type: ignore[assignment]
    needs_teacher = False
    needs_batch_teacher = True
    sides: ClassVar[tuple[Literal["query", "document"], ...]]

    def fit(self, student: int, teacher: int) -> None:
        """Told the widths of both models' vectors before a training."""

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one side of a batch: embeddings [texts, dimension] of the same texts, float32; a scalar."""


class Regulariser(Loss):
    """A penalty on the embeddings of one side of a batch, whatever they score."""

    type: ClassVar[str]  # type: ignore[assignment]
    needs_teacher = False
    needs_idf = False
    side: Literal["query", "document"]  # said by each

    @abstractmethod
    def forward(self, embeddings: Tensor) -> Tensor:
        """The penalty: embeddings [texts, dimension] of the side's distinct texts, float32; a scalar."""

    def use_idf(self, idf: Tensor) -> None:
        """Told before a training where `needs_idf`: float [dimension], of the student's terms in the collection."""


@dataclass(eq=False)
class Softmaxes(Loss):
    """A loss that compares softmax(s / tau_s) with softmax(t / tau_t).

    Args:
        temperature: tau_s, the student's.
        teacher_temperature: tau_t; the student's unless given.
    """

    matches = "softmax"
    temperature: Temperature = 1.0
    teacher_temperature: Temperature | None = None

    def __post_init__(self) -> None:
        self.teacher_temperature = self.teacher_temperature or self.temperature

    def temperatures(self) -> tuple[float, float]:
        """tau_s and tau_t at this step."""
        return self.now(self.temperature), self.now(self.teacher_temperature or self.temperature)


def sums_where(values: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Each list's sum of the values where the mask is set, and how many they are: float32 [lists] both.

    Args:
        values, where: [lists, ...]
    """
    return values.masked_fill(~where, 0.0).flatten(1).sum(dim=1), where.flatten(1).sum(dim=1).to(values.dtype)


def margins(scores: Tensor) -> Tensor:
    """s_i - s_j of every two documents of a list: [lists, documents i, documents j]."""
    return scores[:, :, None] - scores[:, None, :]


def ordered(scores: Tensor, mask: Tensor) -> Tensor:
    """Pairs of a list with s_i > s_j that the mask keeps: bool [lists, documents i, documents j]."""
    return (margins(scores) > 0) & mask[:, :, None] & mask[:, None, :]


def comparable(mask: Tensor) -> Tensor:
    """Lists with something to compare, two documents or more: bool [lists]. A list of one teaches no order."""
    return mask.sum(dim=1) > 1


def log_softmax_where(scores: Tensor, mask: Tensor) -> Tensor:
    """log softmax over the documents of each list that the mask keeps; finite everywhere: [lists, documents].

    A finite floor, not -inf: 0 * (-inf - -inf) would be NaN in the padded places.
    """
    return scores.masked_fill(~mask, -1e30).log_softmax(dim=1)


def evenness(scores: Tensor, mask: Tensor) -> Tensor:
    """Entropy of each list's softmax by the greatest one possible, 0 (all on one document) to 1 (even): [lists].

    Lists of one document: 0.
    """
    logs = log_softmax_where(scores, mask)
    entropy = -(logs.exp() * logs).masked_fill(~mask, 0.0).sum(dim=1)
    return entropy / mask.sum(dim=1).clamp(min=2).to(entropy.dtype).log()
