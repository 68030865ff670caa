"""Divergences between the student's and the teacher's distributions: over a list, or over a whole batch."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rankdistill.losses.base import BatchLoss, ListLoss, Softmaxes, comparable, log_softmax_where
from rankdistill.losses.schedules import Temperature


class Divergence(Softmaxes, ListLoss):
    """tau_s^power * D(softmax(t / tau_t), softmax(s / tau_s)), mean over the lists of two documents or more.

    The power keeps the size of the gradient as the temperature changes (Hinton et al. 2015, arXiv:1503.02531).
    """

    type: ClassVar[str]
    power: ClassVar[int] = 2

    @abstractmethod
    def between(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Each document's share of the divergence, from log probabilities: [lists, documents] all three."""

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        temperature, teacher_temperature = self.temperatures()
        student = log_softmax_where(student_scores / temperature, mask)
        teacher = log_softmax_where(teacher_scores / teacher_temperature, mask)
        divergence = self.between(teacher, student).masked_fill(~mask, 0.0).sum(dim=1)
        return temperature**self.power * divergence, comparable(mask).to(divergence.dtype)


class KLDivergence(Divergence):
    """tau_s^2 * KL(softmax(t / tau_t) || softmax(s / tau_s)): the student covers all that the teacher holds possible.

    Hinton et al. 2015, arXiv:1503.02531; mean over the lists of two documents or more; 0 for a perfect student.
    """

    type = "kl"

    def between(self, teacher: Tensor, student: Tensor) -> Tensor:
        return teacher.exp() * (teacher - student)


class ReverseKL(Divergence):
    """tau_s^2 * KL(softmax(s / tau_s) || softmax(t / tau_t)): the student keeps to what the teacher holds most likely.

    MiniLLM, Gu et al. 2023, arXiv:2306.08543, over a list in place of a vocabulary; 0 for a perfect student.
    """

    type = "reverse_kl"

    def between(self, teacher: Tensor, student: Tensor) -> Tensor:
        return student.exp() * (student - teacher)


class JensenShannon(Divergence):
    """tau_s^2 * [KL(p_t || m) + KL(p_s || m)] / 2, m the mean of both: symmetric, at most tau_s^2 log 2 (Lin 1991)."""

    type = "jensen_shannon"

    def between(self, teacher: Tensor, student: Tensor) -> Tensor:
        # log(p / m) = log 2 - softplus(log q - log p); log 2 as softplus(0), so that equal ones give exactly 0.
        difference = student - teacher
        log2 = functional.softplus(torch.zeros_like(difference))
        from_teacher = teacher.exp() * (log2 - functional.softplus(difference))
        from_student = student.exp() * (log2 - functional.softplus(-difference))
        return (from_teacher + from_student) / 2


class TotalVariation(Divergence):
    """tau_s * sum |p_t - p_s| / 2, from 0 to tau_s (f-divergence distillation, Wen et al. 2023, arXiv:2307.15190).

    Its gradient does not grow with the error: robust to a teacher's faults, slow where student and teacher share
    nothing.
    """

    type = "total_variation"
    power = 1

    def between(self, teacher: Tensor, student: Tensor) -> Tensor:
        return (teacher.exp() - student.exp()).abs() / 2


@dataclass(eq=False)
class ListNet(Divergence):
    """Cross-entropy -sum softmax(t / tau) * log softmax(s / tau) (Cao et al. 2007).

    Its gradient is that of the KL divergence; its least value is the teacher's entropy, not 0.

    Args:
        temperature: tau, of both sides.
    """

    type = "listnet"
    power = 0
    teacher_temperature: Temperature | None = field(default=None, init=False)

    def between(self, teacher: Tensor, student: Tensor) -> Tensor:
        return -teacher.exp() * student


@dataclass(eq=False)
class InBatchKL(Softmaxes, BatchLoss):
    """tau_s^2 * KL(softmax(T / tau_t) || softmax(S / tau_s)) over all documents of the batch, mean over its queries.

    T are the batch teacher's scores of each query with every document (RocketQAv2's dynamic listwise distillation, Ren
    et al. 2021, arXiv:2110.07367, with the documents of the batch for a list); 0 for a perfect student.
    """

    type = "in_batch_kl"
    needs_teacher = False
    needs_batch_teacher = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of_lists = KLDivergence(self.temperature, self.teacher_temperature)

    def forward(
        self, student_scores: Tensor, teacher_scores: Tensor | None, index: Tensor, labels: Tensor, mask: Tensor
    ) -> Tensor:
        assert teacher_scores is not None
        self.of_lists.at_step(self.step, self.steps)
        queries = mask.any(dim=1, keepdim=True).expand_as(student_scores)
        return self.of_lists(student_scores, teacher_scores, labels, queries)
