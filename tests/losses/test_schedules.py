"""Ramps: their values, that they count optimiser steps, and that recipes take them wherever a number may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankdistill.errors import UsageError
from rankdistill.losses.divergence import KLDivergence
from rankdistill.losses.schedules import Ramp, value_at
from rankdistill.recipe import build, check_recipe


def values(ramp: dict[str, Any], steps: int = 100) -> list[float]:
    return [value_at(Ramp(**ramp), step, steps) for step in (0, 10, 25, 50, 75, 100, 200)]


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ({"start": 1, "end": 3}, [1, 1.2, 1.5, 2, 2.5, 3, 3]),
        ({"start": 3, "end": 1, "over": 0.5}, [3, 2.6, 2, 1, 1, 1, 1]),
        ({"end": 1, "over": 50}, [0, 0.2, 0.5, 1, 1, 1, 1]),
        ({"end": 1, "over": 0.5, "delay": 0.25}, [0, 0, 0, 0.5, 1, 1, 1]),
        ({"end": 1, "over": 25, "delay": 25}, [0, 0, 0, 1, 1, 1, 1]),
        ({"end": 4, "shape": "quadratic"}, [0, 0.04, 0.25, 1, 2.25, 4, 4]),
        ({"end": 2, "shape": "cosine"}, [0, 0.0489434837, 0.2928932188, 1, 1.7071067812, 2, 2]),
    ],
)
def test_ramps(ramp: dict[str, Any], expected: list[float]) -> None:
    assert values(ramp) == pytest.approx(expected) and value_at(3, 0, 10) == value_at(3.0, 10, 10) == 3.0
    assert [value_at(ramp, step, 100) for step in (0, 10)] == pytest.approx(expected[:2])  # as a recipe holds it


def test_a_ramp_is_of_the_step_alone() -> None:
    """Nothing to save: a loss made anew and told the step is where the old one was; batches of a step count once."""
    old = KLDivergence(Ramp(start=4.0, end=1.0))
    for step in range(8):
        for _ in range(3):
            old.at_step(step, 10)
    new = KLDivergence(Ramp(start=4.0, end=1.0))
    new.at_step(7, 10)
    scores = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    rest = (torch.full((3, 4), -1), torch.ones(3, 4, dtype=torch.bool))
    assert new(*scores, *rest).equal(old(*scores, *rest)) and not list(new.buffers())
    assert new(*scores, *rest).equal(KLDivergence(4.0 - 3.0 * 0.7)(*scores, *rest))


def test_recipes_take_ramps_of_weights_and_temperatures() -> None:
    ramp = {"start": 4.0, "end": 1.0, "over": 0.5}
    losses = [{"type": "kl", "temperature": ramp, "weight": {"end": 2.0}}, {"type": "margin_mse", "weight": 0.1}]
    recipe = check_recipe({"collection": "beir:x", "student": {"type": "static"}, "training": {"losses": losses}})
    settings = recipe.training.losses[0].settings()
    assert settings["temperature"] == {**ramp, "delay": 0.0, "shape": "linear"}
    loss = build("loss", settings)
    loss.at_step(25, 100)
    assert loss.now(loss.temperature) == 2.5 and loss.now(loss.weight) == 0.5
    assert check_recipe(recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": {"start": 1.0, "end": 0.0}}, "above 0"),
        ({"teacher_temperature": -1}, "above 0"),
        ({"weight": {"start": 1.0}}, "end"),
        ({"weight": {"end": 1.0, "over": 0}}, "over"),
        ({"weight": {"end": 1.0, "overr": 1}}, "over"),
        ({"weight": {"end": 1.0, "shape": "cubic"}}, "shape"),
    ],
)
def test_wrong_ramps_and_temperatures_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build("loss", {"type": "kl", **settings})
