"""Divergences between the student's and the teacher's distributions: over a list, over a whole batch, and on the way
(TAID: the target starts near the student and moves to the teacher while the student learns)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
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

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        temperature, teacher_temperature = self.temperatures()
        sums, counts = self.compare(teacher / teacher_temperature, student / temperature, mask)
        return temperature**self.power * sums, counts

    def compare(self, teacher: Tensor, student: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Each list's divergence of the softmaxes of scores, and 1 where it counts."""
        shares = self.between(log_softmax_where(teacher, mask), log_softmax_where(student, mask))
        sums = shares.masked_fill(~mask, 0.0).sum(dim=1)
        return sums, comparable(mask).to(sums.dtype)


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

    def forward(self, student: Tensor, teacher: Tensor | None, index: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        assert teacher is not None
        self.of_lists.at_step(self.step, self.steps)
        queries = mask.any(dim=1, keepdim=True).expand_as(student)
        return self.of_lists(student, teacher, labels, queries)


@dataclass(eq=False)
class TAID(KLDivergence):
    """tau_s^2 * KL(p || softmax(s / tau_s)), p = softmax((1 - lambda) * stop_grad(s / tau_s) + lambda * t / tau_t).

    Shing et al. 2025, arXiv:2501.16937. lambda rises with the steps from `start` to `end`; where `adaptive`, also by
    rate * sigmoid(m) * (1 - lambda) a step, m the momentum of the loss's relative fall (a rise counts as -1 at most).
    It never falls. At lambda = 1 this is `kl`.

    lambda and m move once an optimiser step, by the mean loss over all batches of the step before (all lists alike);
    every process of a training sees the whole batch, so they stay the same in all. They are kept in buffers: part of a
    checkpoint. 0 for a perfect student.

    Args:
        start: lambda of the first step.
        end: of the last.
        adaptive: faster where the loss falls.
        rate: of the adaptive part (the paper's alpha).
        momentum: share of m that a step keeps (the paper's beta).
    """

    type = "taid"
    start: float = 0.4
    end: float = 1.0
    adaptive: bool = True
    rate: float = 5e-4
    momentum: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.share = nn.Buffer(torch.tensor(float(self.start)))  # lambda
        self.trend = nn.Buffer(torch.tensor(0.0))  # m
        self.previous = nn.Buffer(torch.tensor(-1.0))  # the loss of the step before the last; -1: none yet
        self.loss_sum: Tensor = nn.Buffer(torch.tensor(0.0))  # over the lists of the last step ...
        self.loss_count: Tensor = nn.Buffer(torch.tensor(0.0))  # ... and how many
        self._told = -1  # the last step that was told: batches of one step move lambda once

    @torch.no_grad()
    def at_step(self, step: int, steps: int) -> None:
        super().at_step(step, steps)
        if step == self._told:
            return
        self._told = step
        share = self.share.clamp(min=self.start + (self.end - self.start) * min(step / steps, 1.0))
        counted = self.loss_count > 0
        loss = self.loss_sum / self.loss_count.clamp(min=1.0)
        if self.adaptive:
            known = counted & (self.previous >= 0)
            fall = ((self.previous - loss) / self.previous.clamp(min=1e-12)).clamp(min=-1.0)
            trend = self.momentum * self.trend + (1 - self.momentum) * fall
            self.trend.copy_(torch.where(known, trend, self.trend))
            moved = self.share + self.rate * self.trend.sigmoid() * (1 - self.share)
            share = torch.where(known, torch.maximum(share, moved), share)
        self.share.copy_(torch.maximum(self.share, share.clamp(max=self.end)))
        self.previous.copy_(torch.where(counted, loss, self.previous))
        self.loss_sum.zero_()
        self.loss_count.zero_()

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        temperature, teacher_temperature = self.temperatures()
        student = student / temperature
        teacher = teacher / teacher_temperature
        # s + lambda * (t - s), so that a perfect student is its own target to the last digit.
        target = student.detach() + self.share.to(student.dtype) * (teacher - student.detach())
        sums, counts = self.compare(target, student, mask)
        sums = temperature**2 * sums
        if self.training:
            self.loss_sum += sums.detach().sum()
            self.loss_count += counts.sum()
        return sums, counts
