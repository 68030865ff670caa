"""A finished run of the tiny recipe, made once, and its recipe file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import ran


@pytest.fixture(scope="session")
def recipe_file(
    tiny_recipe: Callable[..., dict[str, Any]], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    model = str(tiny_encoder)
    values = tiny_recipe(
        description="A recipe for tests.",
        candidates={"sources": [{"type": "bm25", "quota": 4}, {"type": "dense", "model": model, "quota": 3}]},
        teacher={"type": "cross_encoder", "model": model, "max_length": 48, "train": {"steps": 2, "batch_size": 8}},
        student={"type": "dense", "model": model, "layers": [0], "similarity": "dot"},
        training={"steps": 6, "learning_rate": 5e-3, "batches": {"type": "random_batches", "size": 4}, "log_every": 2},
        baselines={"labels": {"training": {"losses": [{"type": "infonce"}]}}},
    )
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through; its store is beside it."""
    folder = tmp_path_factory.mktemp("finished")
    ran("run", recipe_file, "--out", folder / "run", "--store", folder / "store", folder=folder / "output")
    return folder / "run"
