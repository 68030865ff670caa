"""Numbers of a loss that change while a student learns: ramps over optimiser steps.

A ramp is a pure function of the step, so it needs no place in a checkpoint and resumes exactly; it counts optimiser
steps, whatever the number of batches or processes that make one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag
from torch import nn

from rankdistill.plain import Section


class Ramp(Section):
    """From `start` to `end`, then constant."""

    start: float = Field(0.0, description="value at the first step")
    end: float = Field(..., description="value from the end of the ramp on")
    over: float = Field(1.0, gt=0, description="length: share of the training's steps up to 1, else steps")
    delay: float = Field(0.0, ge=0, description="first stay at `start` so long: share of the steps below 1, else steps")
    shape: Literal["linear", "quadratic", "cosine"] = "linear"


def _form(value: Any) -> str:
    """So that what is wrong in a ramp is told of the ramp, not of a number that it is not."""
    return "ramp" if isinstance(value, (Ramp, Mapping)) else "number"


_Form = Annotated[Annotated[float, Tag("number")] | Annotated[Ramp, Tag("ramp")], Discriminator(_form)]
Schedule = Annotated[_Form, Field(description="a number, or a ramp: {start, end, over, delay, shape}")]


def _positive(schedule: float | Ramp) -> float | Ramp:
    if min((schedule.start, schedule.end) if isinstance(schedule, Ramp) else (schedule,)) <= 0:
        raise ValueError("a temperature must be above 0, at both ends of a ramp")
    return schedule


# What scores are divided by.
Temperature = Annotated[
    _Form, AfterValidator(_positive), Field(description="above 0: a number, or a ramp: {start, end, over, ...}")
]


def value_at(schedule: float | Ramp | Mapping[str, Any], step: int, steps: int) -> float:
    """What a schedule is after `step` of `steps` optimiser steps."""
    if isinstance(schedule, (int, float)):
        return float(schedule)
    ramp = schedule if isinstance(schedule, Ramp) else Ramp.model_validate(schedule)
    over = ramp.over * steps if ramp.over <= 1 else ramp.over
    delay = ramp.delay * steps if ramp.delay < 1 else ramp.delay
    done = min(max((step - delay) / over, 0.0), 1.0)
    if ramp.shape == "quadratic":
        done = done**2
    elif ramp.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return ramp.start + (ramp.end - ramp.start) * done


class Scheduled(nn.Module):
    """What follows ramps: a loss, a weighting of lists. A dataclass: its fields are the keys of a recipe.

    What it learns about the training's course it keeps in buffers, which are part of a checkpoint.
    """

    step = 0  # optimiser steps done ...
    steps = 1  # ... of the whole training

    def __new__(cls, *_: Any, **__: Any) -> Self:
        module = super().__new__(cls)
        nn.Module.__init__(module)  # here, as the constructor that a dataclass makes calls no other
        return module

    def at_step(self, step: int, steps: int) -> None:
        """The trainer tells how many of the training's optimiser steps are done, before each batch."""
        self.step, self.steps = step, steps

    def now(self, schedule: Schedule) -> float:
        """What a number or a ramp is at this step."""
        return value_at(schedule, self.step, self.steps)
