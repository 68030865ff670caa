"""A look at a training's first batch: do the student's and the teacher's scores fit each other and the losses?

What is found is a warning, not an error: the training would run, and learn little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from rankdistill.losses.base import Loss, evenness
from rankdistill.losses.schedules import Schedule, value_at
from rankdistill.progress import warn

UNDERFLOW = 100.0  # spread / temperature from which a float32 softmax holds nothing but its greatest
FLAT = 0.995  # entropy, of the greatest possible, from which a softmax says next to nothing
OFF_SCALE = 10.0  # one side's spread, in that of the other, from which a loss is about scale before it is about order


class _Look(NamedTuple):
    """What the scores of the first batch's lists of two documents or more show."""

    lowest: float
    highest: float
    spread: float  # median over lists of highest less lowest
    widest: float  # the greatest
    tied: float  # share of the lists whose scores are all the same

    @classmethod
    def at(cls, scores: Tensor, mask: Tensor) -> _Look:
        top = scores.double().masked_fill(~mask, -math.inf).amax(dim=1)
        low = scores.double().masked_fill(~mask, math.inf).amin(dim=1)
        spreads = top - low
        tied = (spreads == 0).double().mean()
        return cls(*map(float, (low.min(), top.max(), spreads.median(), spreads.max(), tied)))

    def __str__(self) -> str:
        """The range, and what scores in it usually are."""
        least = 0 if self.lowest >= 0 else -1
        kind = "" if self.lowest < least or self.highest > 1 else " (cosines?)" if least else " (probabilities?)"
        return f"between {self.lowest:.3g} and {self.highest:.3g}{kind}"


@torch.no_grad()
def check_scale(
    student_scores: Tensor,
    teacher_scores: Tensor,
    losses: Mapping[str, Loss],
    similarity: str,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    learn_scale: bool = False,
) -> list[str]:
    """Warn of scores that do not fit the losses; says the cause, the number to change and the fix.

    Args:
        student_scores, teacher_scores: [lists, documents] of the first batch.
        losses: name → loss, told which step this is.
        similarity: `cos` or `dot`, the student's.
        mask: [lists, documents], bool: False pads.
        scale: factor on the student's cosine.
        learn_scale: it is learnt: no bound then.

    Returns:
        The warnings, which were printed.
    """
    mask = torch.ones_like(teacher_scores, dtype=torch.bool) if mask is None else mask
    kept = mask.sum(dim=1) > 1
    readers = {name: loss for name, loss in losses.items() if loss.needs_teacher}
    if not kept.any() or not readers:
        return []
    student, teacher = (_Look.at(scores[kept], mask[kept]) for scores in (student_scores, teacher_scores))
    warnings = []
    if teacher.tied > 0.5:
        warnings.append(
            f"the teacher scores all documents alike in {teacher.tied:.0%} of the first batch's lists, which teach "
            "nothing then: look at the scores, or mine candidates that differ more"
        )
    if teacher.spread > 0:
        reach = 2 * abs(scale) if similarity == "cos" and not learn_scale else math.inf
        least = 0.0 if learn_scale else 1 / OFF_SCALE  # of the student's spread in the teacher's
        for name, loss in readers.items():
            told = ""
            if loss.matches == "margins":
                told = _margins(student, teacher, reach, least)
            elif (schedule := getattr(loss, "teacher_temperature", None)) is not None:
                even = evenness(teacher_scores[kept].double() / loss.now(schedule), mask[kept])
                told = _softmax(loss, schedule, student, teacher, float(even.median()), reach, least)
            warnings += [f"{name}: {told}"] if told else []
    for text in warnings:
        warn(text)
    return warnings


def _margins(student: _Look, teacher: _Look, reach: float, least: float) -> str:
    if teacher.widest > reach:
        return (
            f"the teacher's margins go up to {teacher.widest:.3g}, and a cosine student of scale "
            f"{reach / 2:.3g} reaches {reach:.3g} at most: set student.scale to {_round(teacher.widest)} or more, "
            "student.learn_scale: true, or student.similarity: dot"
        )
    ratio = student.spread / teacher.spread
    if ratio > OFF_SCALE:
        return (
            f"the teacher's scores lie {teacher}; "
            f"a list of its spans {teacher.spread:.3g}, one of the student's {student.spread:.3g}: the student would "
            f"shrink its scores before it learns an order. Give the teacher's logits, scale its scores by about "
            f"{_round(ratio)} (an ensemble of this one teacher has `scale`), or take a loss that reads the order alone "
            "(ranknet) or has a teacher_temperature (kl)"
        )
    if ratio < least:
        return (
            f"a list of the teacher's spans {teacher.spread:.3g}, one of the student's {student.spread:.3g}: "
            "the student would stretch its scores before it learns an order. Set student.scale to about "
            f"{_round(1 / ratio)} times what it is, or student.learn_scale: true"
        )
    return ""


def _softmax(
    loss: Loss, schedule: Schedule, student: _Look, teacher: _Look, even: float, reach: float, least: float
) -> str:
    """`schedule` is of the teacher's temperature, `even` the evenness of its softmax."""
    temperature = loss.now(schedule)
    coldest = min(temperature, value_at(schedule, loss.steps, loss.steps))
    key = "teacher_temperature" if "teacher_temperature" in signature(type(loss)).parameters else "temperature"
    if teacher.spread / coldest > UNDERFLOW:
        return (
            f"a list of the teacher's spans {teacher.spread:.3g}, {teacher.spread / coldest:.3g} times its "
            f"temperature {coldest:.3g}: in float32 the softmax is 0 beyond the first documents. Set {key} to about "
            f"{_round(teacher.spread / 10)}"
        )
    if loss.matches != "softmax":
        return ""
    if even > FLAT:
        return (
            f"the teacher's scores lie {teacher}; "
            f"at temperature {temperature:.3g} their softmax is flat (entropy {even:.3f} of 1) and says next to "
            f"nothing. Give the teacher's logits, or set {key} to about {_round(teacher.spread / 5)}"
        )
    own = loss.now(getattr(loss, "temperature", 1.0))
    due, ratio = teacher.spread / temperature, (student.spread / own) / (teacher.spread / temperature)
    if due > reach / own:
        return (
            f"a list of the teacher's spans {due:.3g} temperatures, and a cosine student of scale "
            f"{reach / 2:.3g} reaches {reach / own:.3g} at most: set student.scale to {_round(due * own)} or more, "
            f"or raise {key}"
        )
    if not least <= ratio <= OFF_SCALE:
        return (
            f"a list of the teacher's spans {due:.3g} temperatures, one of the student's "
            f"{student.spread / own:.3g}: one softmax is sharp where the other is flat. Multiply the student's "
            f"temperature or divide student.scale by about {_round(ratio)}"
        )
    return ""


def _round(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"
