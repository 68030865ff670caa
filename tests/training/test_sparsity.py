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


def test_a_healthy_student_is_left_alone() -> None:
    assert watched(1000, FLOPS) is None


@pytest.mark.parametrize("side", ["query", "document"])
def test_empty_vectors_stop_it_at_once(side: str) -> None:
    assert watched(1000, FLOPS, **{f"empty/{side}": 0.6}) == WINDOW - 1
    assert watched(1000, FLOPS, **{f"empty/{side}": 0.4}) is None


def test_documents_that_are_all_alike_stop_it_within_the_first_hundreds_of_steps() -> None:
    assert watched(1000, FLOPS, **{"common_terms/document": 0.99}) == 109


def test_a_dense_student_is_stopped_once_the_regulariser_counts_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert watched(1000, FLOPS, **{"active_terms/document": 400.0}) == 309
    assert "400 active terms of 1,000" in capsys.readouterr().err  # told at step 109
    assert watched(1000, {**FLOPS, "ramp": 0}, **{"active_terms/document": 400.0}) == 109
    assert (
        watched(1000, {**FLOPS, "weight": {"end": 1.0, "over": 500, "delay": 50}}, **{"active_terms/document": 400.0})
        == 559
    )


def test_without_a_regulariser_a_dense_student_is_the_recipes_will() -> None:
    assert watched(1000, None, **{"active_terms/document": 400.0}) is None


def test_one_bad_batch_is_no_collapse() -> None:
    watch = SparsityWatch([], 1000, TERMS)
    for step in range(200):
        values = HEALTHY | {"empty/document": 1.0 if step % 3 == 0 else 0.0}
        watch.see(step, {name: torch.tensor(value) for name, value in values.items()})


def test_students_without_figures_are_not_watched() -> None:
    watch = SparsityWatch([], 1000, TERMS)
    for step in range(300):
        watch.see(step, {})
