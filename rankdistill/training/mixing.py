"""Training that does not lose what was known: averaged checkpoints, and mixes of the trained weights with the start's.

After model soups (Wortsman et al. 2022, arXiv:2203.05482) and WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): on the
way between two models that share a start there is often one better than both, and away from the training data nearly
always. Which share of the trained weights is kept, is chosen on dev.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rankdistill.students.base import StudentModel
from rankdistill.training.checkpoints import WEIGHTS, checkpoints

PREFIX = "student."  # of the student's weights in a checkpoint

Weights = Mapping[str, Tensor]


def copy_of(student: StudentModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}


def averaged(folder: Path, count: int) -> dict[str, Tensor]:
    """Mean of the student's weights over the last `count` checkpoints below `folder`."""
    last = checkpoints(folder)[:count]
    total: dict[str, Tensor] = {}
    for path in last:
        for name, value in load_file(path / WEIGHTS).items():
            if name.startswith(PREFIX):
                name = name.removeprefix(PREFIX)
                total[name] = total[name] + value.double() if name in total else value.double()
    return {name: value / len(last) for name, value in total.items()}


def load_mix(student: StudentModel, start: Weights, end: Weights, share: float) -> None:
    """Give a student the weights (1 - share) · start + share · end; counts and other whole numbers are the end's."""
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if name in end:  # weights that two names share are in a checkpoint once
                mixed = end[name]
                if value.is_floating_point() and share != 1:
                    mixed = start[name].double() * (1 - share) + end[name].double() * share
                value.copy_(mixed)


def mixes(
    student: StudentModel, start: Weights, folder: Path, average: int, shares: Sequence[float]
) -> Iterator[float]:
    """The shares of the trained weights, each while the student has that mix; 1 comes first, where it is an average."""
    end: Weights = averaged(folder, average) if average > 1 else copy_of(student)
    for share in [*([1.0] if average > 1 else []), *shares]:
        load_mix(student, start, end, share)
        yield share
