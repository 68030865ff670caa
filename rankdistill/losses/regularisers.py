"""What makes sparse embeddings sparse: penalties on term weights, and a controller that steers how much they count.

Weights are those of one side's texts, w [texts, terms], none negative.

A penalty's weight means something else at every batch size: E[FLOPS] = Σ_j μ_j² + σ_j²/B, so the same activations cost
ten times as much in a batch of 8 as in one of 128. With a `target` the controller finds the weight that fits.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rankdistill.losses.base import Regulariser
from rankdistill.losses.schedules import Ramp, Schedule, value_at

# The controller, a proportional-integral one on the logarithms of λ and of the active terms: without the proportional
# part it would overshoot, and terms that have died do not come back.
INTEGRAL, PROPORTIONAL = 0.1, 0.3
MOST = math.log(1e4)  # how far λ is moved from its given weight, either way
FEWEST = 0.5  # active terms, for the logarithm

Share = Annotated[float, Field(ge=0)]
Terms = Annotated[float, Field(gt=0)]


@dataclass(eq=False)
class Sparsity(Regulariser):
    """A penalty on the term weights of one side.

    Args:
        weight: share in a sum of losses (λ) once the ramp is over; a ramp of one's own replaces the quadratic one.
            Unless given, `usual`, and a hundredth of it where it is steered: a student that was pressed too hard at
            first does not get its terms back.
        side: whose weights.
        ramp: λ rises with the square of the optimiser steps over this share of the training (steps, if above 1); 0: it
            does not rise.
        threshold: texts with at most so many active terms feel nothing (the ℓ0 mask, arXiv:2504.14839).
        target: active terms a text to end with. λ is then steered: the set point goes from what the student starts
            with to the target over the ramp, evenly in logarithms, and stays there.
    """

    type: ClassVar[str]
    usual: ClassVar[float] = 0.08  # λ of FLOPS on documents
    _: KW_ONLY
    weight: Schedule | None = None  # type: ignore[assignment]  # there is one from the constructor's end on
    side: Literal["query", "document"] = "document"
    ramp: Share = 1 / 3
    threshold: Terms | None = None
    target: Terms | None = None

    def __post_init__(self) -> None:
        if self.weight is None:
            self.weight = self.usual if self.target is None else self.usual / 100
        if isinstance(self.weight, (int, float)) and self.ramp > 0:
            self.weight = Ramp(start=0.0, end=self.weight, over=self.ramp, shape="quadratic")
        self.controller = None if self.target is None else Controller(self.target)

    @abstractmethod
    def penalty(self, weights: Tensor) -> Tensor:
        """Of the weights [texts, terms] that feel it (those of other texts are 0): a scalar."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """As the base class has it."""
        weights = embeddings.abs()
        if self.controller is not None or self.threshold is not None:
            active = (weights.detach() > 0).sum(dim=1)
            if self.controller is not None and self.training:
                self.controller.observe(active.float().mean())
            if self.threshold is not None:
                weights = weights * (active > self.threshold)[:, None]
        return self.penalty(weights)

    def at_step(self, step: int, steps: int) -> None:
        super().at_step(step, steps)
        if self.controller is not None:
            way = value_at(Ramp(end=1.0, over=self.ramp), step, steps) if self.ramp > 0 else 1.0
            self.controller.at_step(step, way)

    def strength(self) -> float:
        return super().strength() * (1.0 if self.controller is None else self.controller.factor)


class Flops(Sparsity):
    """Σ_j (mean of |w_j| over the texts)²: the products that a search pays, relaxed (Paria et al. 2020,
    arXiv:2004.05665). It presses on terms that many texts have and leaves rare ones alone.
    """

    type = "flops"

    def penalty(self, weights: Tensor) -> Tensor:
        return weights.mean(dim=0).square().sum()


class L1(Sparsity):
    """Mean over the texts of Σ_j |w_j|: the same pressure on every term."""

    type = "l1"
    usual = 1e-3

    def penalty(self, weights: Tensor) -> Tensor:
        return weights.sum(dim=1).mean()


class L2(L1):
    """Mean over the texts of Σ_j w_j²: presses on heavy terms; it makes weights small, not few."""

    type = "l2"

    def penalty(self, weights: Tensor) -> Tensor:
        return weights.square().sum(dim=1).mean()


@dataclass(eq=False)
class IdfFlops(Flops):
    """FLOPS with each term's part counting by (mean IDF / IDF_j)^power: terms of many documents pay more.

    With a power of 2 it does to a student whose queries have no IDF what FLOPS does to one that scores
    Σ_j IDF_j · w_j (Geng et al. 2024, arXiv:2411.04403). IDF is the collection's, of the student's own tokens;
    below a tenth of the mean it counts as that, or a term of every document would outweigh all others.

    Args:
        power: how much rarity counts.
    """

    type = "idf_flops"
    needs_idf = True
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factors: Tensor
        self.register_buffer("factors", None)

    def use_idf(self, idf: Tensor) -> None:
        self.factors = (idf.mean() / idf.clamp(min=float(idf.mean()) / 10)).pow(self.power).float()

    def penalty(self, weights: Tensor) -> Tensor:
        return (self.factors.to(weights.device) * weights.mean(dim=0).square()).sum()


@dataclass(eq=False)
class DfFlops(Sparsity):
    """Σ_j (c_j · mean of |w_j|)², where c_j goes from 0 to 1 with the share of documents that have the term.

    c_j = 1 / (1 + (x^(log 2 / log midpoint) - 1)^steepness): 1/2 where x = `midpoint`, 1 where every document has the
    term. Terms of few documents cost nothing, so posting lists become short, not vectors (DF-FLOPS, Porco et al. 2025,
    arXiv:2505.15070). The shares x are a running mean over the batches seen, kept in checkpoints; the paper counts them
    on a validation set.

    Args:
        midpoint: share of the documents at which a term counts half.
        steepness: how sharply it sets in.
        memory: texts over which the running mean looks back.
    """

    type = "df_flops"
    midpoint: Annotated[float, Field(gt=0, lt=1)] = 0.1
    steepness: Annotated[float, Field(gt=0)] = 10.0
    memory: Annotated[float, Field(ge=1)] = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shares: Tensor | None
        self.register_buffer("shares", None)

    def penalty(self, weights: Tensor) -> Tensor:
        now = (weights.detach() > 0).float().mean(dim=0)
        before = now if self.shares is None else self.shares.to(now.device)  # a checkpoint's are read on the CPU
        shares = before.lerp(now, min(1.0, len(weights) / self.memory))
        if self.training:
            self.shares = shares
        return (self.cost(shares) * weights.mean(dim=0)).square().sum()

    def cost(self, shares: Tensor) -> Tensor:
        """c [terms] of shares of documents [terms]."""
        # Terms that nothing has: x^(negative) is infinite, and so c is 0.
        odds = shares.pow(math.log(2) / math.log(self.midpoint)) - 1
        return 1 / (1 + odds.clamp(min=0).pow(self.steepness))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: object) -> None:
        # The number of terms is the student's, which a loss learns from the first batch.
        if f"{prefix}shares" in state_dict:
            self.shares = torch.zeros_like(state_dict[f"{prefix}shares"])
        super()._load_from_state_dict(state_dict, prefix, *others)


class Controller(nn.Module):
    """Steers λ so that the mean number of active terms follows its set point; all it knows is in buffers.

    Args:
        target: active terms a text.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target
        self.log_factor = nn.Buffer(torch.zeros(()))
        self.active: Tensor = nn.Buffer(torch.zeros(()))  # of the step under way, and ...
        self.batches: Tensor = nn.Buffer(torch.zeros(()))  # ... of how many batches
        # Logarithms of active terms: at the first step, at the last.
        self.start, self.before = nn.Buffer(torch.full((), math.nan)), nn.Buffer(torch.full((), math.nan))
        self.step = nn.Buffer(torch.full((), -1, dtype=torch.int64))

    @property
    def factor(self) -> float:
        return math.exp(float(self.log_factor))

    def observe(self, active: Tensor) -> None:
        """The mean number of active terms in one batch."""
        self.active += active
        self.batches += 1

    def at_step(self, step: int, way: float) -> None:
        """Move λ once an optimiser step, however many batches made it.

        Args:
            step: optimiser steps done.
            way: how far the set point is on its way to the target, 0 to 1.
        """
        if step == int(self.step):
            return
        self.step.fill_(step)
        if not self.batches:
            return
        now = (self.active / self.batches).clamp(min=FEWEST).log()
        if self.start.isnan():
            self.start.copy_(now)
            self.before.copy_(now)
        point = self.start + way * (math.log(self.target) - self.start)
        move = INTEGRAL * (now - point).clamp(-1, 1) + PROPORTIONAL * (now - self.before).clamp(-1, 1)
        self.log_factor.copy_((self.log_factor + move).clamp(-MOST, MOST))
        self.before.copy_(now)
        self.active.zero_()
        self.batches.zero_()
