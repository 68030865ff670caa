"""TAID: a target that starts near the student and moves to the teacher while the student learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankdistill.losses.base import comparable, log_softmax_where
from rankdistill.losses.divergence import KLDivergence


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

    def terms(
        self, student_scores: Tensor, teacher_scores: Tensor, labels: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        temperature, teacher_temperature = self.temperatures()
        student = student_scores / temperature
        teacher = teacher_scores / teacher_temperature
        # s + lambda * (t - s), so that a perfect student is its own target to the last digit.
        target = student.detach() + self.share.to(student.dtype) * (teacher - student.detach())
        divergence = self.between(log_softmax_where(target, mask), log_softmax_where(student, mask))
        sums = temperature**2 * divergence.masked_fill(~mask, 0.0).sum(dim=1)
        counts = comparable(mask).to(sums.dtype)
        if self.training:
            self.loss_sum += sums.detach().sum()
            self.loss_count += counts.sum()
        return sums, counts
