"""When the watch over a sparse student stops a training, and when it leaves it alone. It looks every 10 batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankdistill.errors import RankdistillError
from rankdistill.recipe import build
from rankdistill.training.sparsity import WINDOW, SparsityWatch

TERMS = 1000
HEALTHY = {
    "active_terms/query": 8.0,
    "active_terms/document": 120.0,
    "empty/query": 0.0,
    "empty/document": 0.02,
    "common_terms/document": 0.1,
}


def watched(steps: int, regulariser: dict[str, Any] | None = None, **figures: float) -> int | None:
    """The step at which the watch stops a training of 1,000 steps whose figures are these, if it does."""
    losses = [build("loss", regulariser)] if regulariser else []
    watch = SparsityWatch(losses, 1000, TERMS)
    values = {name: torch.tensor(value) for name, value in (HEALTHY | figures).items()}
    for step in range(steps):
        try:
            watch.see(step, values)
        except RankdistillError as error:
            assert "collapsed" in str(error) or "stays dense" in str(error)
            return step
    return None


FLOPS = {"type": "flops", "ramp": 0.3}
DENSE = {"active_terms/document": 400.0}


@pytest.mark.parametrize(
    ("figures", "regulariser", "step"),
    [
        ({}, FLOPS, None),  # a healthy student is left alone
        ({"empty/query": 0.6}, FLOPS, WINDOW - 1),
        ({"empty/document": 0.6}, FLOPS, WINDOW - 1),
        ({"empty/query": 0.4, "empty/document": 0.4}, FLOPS, None),
        ({"common_terms/document": 0.99}, FLOPS, 109),
        (DENSE, FLOPS, 309),  # once the regulariser counts in full
        (DENSE, {**FLOPS, "ramp": 0}, 109),
        (DENSE, {**FLOPS, "weight": {"end": 1.0, "over": 500, "delay": 50}}, 559),
        (DENSE, None, None),  # without a regulariser it is the recipe's will
    ],
)
def test_the_step_at_which_a_training_is_stopped(
    figures: dict[str, float], regulariser: Any, step: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watched(1000, regulariser, **figures) == step
    assert ("400 active terms of 1,000" in capsys.readouterr().err) == (figures is DENSE and step != 109)


def test_one_bad_batch_is_no_collapse() -> None:
    watch = SparsityWatch([], 1000, TERMS)
    for step in range(200):
        values = HEALTHY | {"empty/document": 1.0 if step % 3 == 0 else 0.0}
        watch.see(step, {name: torch.tensor(value) for name, value in values.items()})
    for step in range(300):  # a student without figures is not watched
        SparsityWatch([], 1000, TERMS).see(step, {})
