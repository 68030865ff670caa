"""What tests of trainings share: stopping one at a step, and reading what it left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rankdistill.artifacts import Artifact
from rankdistill.training.loop import LOG, LogFile


class Stop(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: set[int], act: Callable[[], None] | None = None) -> None:
    """Stop the trainings to come at the end of each of these steps, once, or `act` there."""
    original = LogFile.on_step_end

    def on_step_end(self: LogFile, args: Any, state: Any, control: Any, **options: Any) -> None:
        original(self, args, state, control, **options)
        if state.global_step in steps:
            steps.remove(state.global_step)
            if act is None:
                raise Stop
            act()

    monkeypatch.setattr(LogFile, "on_step_end", on_step_end)


def resumed(train: Callable[[], Artifact], monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> Artifact:
    """A training that was stopped at each of these steps and begun again."""
    stop_at(monkeypatch, left := set(steps))
    for _ in steps:
        with pytest.raises(Stop):
            train()
    artifact = train()
    assert not left
    return artifact


def weights(trained: Artifact | Path) -> dict[str, np.ndarray]:
    """Name → weights of all files of a trained model."""
    folder = (trained if isinstance(trained, Path) else trained.path) / "model"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.relative_to(folder)}: {name}": value for path in files for name, value in load_file(path).items()}


def assert_same_weights(left: Artifact | Path, right: Artifact | Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


def log(trained: Artifact | Path) -> list[dict[str, Any]]:
    folder = trained if isinstance(trained, Path) else trained.path
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def logged(trained: Artifact | Path, name: str = "loss") -> list[float]:
    """A figure of the log, by step."""
    return [entry[name] for entry in log(trained) if name in entry]


def run_values(beir: Path, encoder: Path, student: dict[str, Any], **training: Any) -> dict[str, Any]:
    """A recipe of a run over a BEIR folder that takes seconds; the encoder is the teacher, and what a student starts
    from."""
    return {
        "name": "small",
        "collection": f"beir:{beir}",
        "candidates": {"depth": 6, "sources": [{"type": "bm25", "quota": 6}]},
        "teacher": {"type": "bi_encoder", "model": str(encoder)},
        "student": {"model": str(encoder), **student},
        "training": {"lists": {"type": "random_documents", "size": 4}, "device": "cpu", **training},
    }
