"""The one rule of where torch computes, and that everything follows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rankdistill.devices import resolve_device, unplaced, use_device
from rankdistill.errors import UsageError
from rankdistill.recipe import load_recipe
from rankdistill.stages import Workspace


@pytest.fixture(autouse=True)
def _rule() -> Iterator[None]:
    yield
    use_device(None)
    use_device(None, command=True)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "meta", "gpu", "cpu:1", "tpu"])
def test_a_device_that_is_not_there_is_refused_with_what_is(name: str) -> None:
    if name in ("cuda", "cuda:0") and torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(UsageError) as error:
        resolve_device(name)
    assert name in error.value.what and str(error.value.fix).endswith("cpu")


def test_the_command_decides_then_the_class_then_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device() == torch.device("cuda")
    use_device("cuda:1")
    assert (resolve_device(), resolve_device("cuda:2")) == (torch.device("cuda:1"), torch.device("cuda:2"))
    use_device("cuda:3", command=True)
    assert (resolve_device(), resolve_device("cuda:2")) == (torch.device("cuda:3"), torch.device("cuda:3"))
    assert resolve_device(torch.device("cuda:2")) == torch.device("cuda:2"), "one resolved before stays"


def test_a_recipe_s_device_is_followed_and_decides_nothing(tmp_path: Path, tiny_encoder: Path) -> None:
    values: dict[str, Any] = {
        "collection": "python-docs",
        "student": {"type": "dense", "model": str(tiny_encoder)},
        "teacher": {"type": "bi_encoder", "model": str(tiny_encoder)},
    }
    plain, placed = load_recipe(values), load_recipe({**values, "device": "cpu"})
    own = load_recipe({**values, "training": {"device": "cpu"}})
    assert (plain.student_device, placed.student_device, own.student_device) == (None, "cpu", "cpu")
    from rankdistill.training.trainer import training_fingerprint_values

    assert training_fingerprint_values(plain, {}) == training_fingerprint_values(placed, {})
    assert training_fingerprint_values(plain, {}) == training_fingerprint_values(own, {})
    nested = {"type": "x", "device": "cuda:1", "members": [{"device": "cpu", "scale": 2}]}
    assert unplaced(nested) == {"type": "x", "device": None, "members": [{"device": None, "scale": 2}]}
    with pytest.raises(UsageError, match="'cuda:9'"):
        Workspace(tmp_path, load_recipe({**values, "device": "cuda:9"}))
