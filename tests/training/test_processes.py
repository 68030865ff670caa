"""Several processes: the same training as one process with the whole batch."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import forked
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from rankdistill.errors import RankdistillError
from rankdistill.training.processes import run_together

RECIPE = {
    "name": "together",
    "candidates": {"depth": 6, "queries": 8, "sources": [{"type": "bm25", "quota": 6}]},
    "training": {
        "losses": [{"type": "margin_mse", "pairs": "all_pairs"}, {"type": "in_batch_infonce"}],
        "batches": {"type": "random_batches", "size": 2},
        "lists": {"type": "random_documents", "size": 4},
        "steps": 4,
        "checkpoints": 2,
        "learning_rate": 5e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "precision": "fp32",
        "log_every": 1,
        "device": "cpu",
        "agreement_queries": 0,
    },
    "evaluation": {"extrapolation": None},
}


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tiny_beir: Path, tiny_encoder: Path, tmp_path: Path) -> Path:
    """Of a dense student, or of the type that the test is parametrised with."""
    model, kind = str(tiny_encoder), getattr(request, "param", "dense")
    given = {"max_length": 48} if kind == "cross_encoder" else {"similarity": "dot", "document_length": 32}
    student = {"type": kind, "model": model, "dropout": 0.0, "precision": "fp32", **given}
    training = RECIPE["training"] | ({"losses": [{"type": "kl"}]} if kind == "cross_encoder" else {})  # type: ignore[operator]
    values = {
        **RECIPE,
        "collection": f"beir:{tiny_beir}",
        "teacher": {"type": "bi_encoder", "model": model, "scale": 9},
    }
    path = tmp_path / "together.yaml"
    path.write_text(yaml.safe_dump({**values, "student": student, "training": training}))
    return path


def train(recipe: Path, out: Path, *options: str, environment: dict[str, str] | None = None) -> forked.Forked:
    arguments = ("train", recipe, "--out", out, "--store", out.parent / "store", *options)
    return forked.program(*arguments, folder=out.parent / f"{out.name}-{len(options)}-out", environment=environment)


def losses(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "student" / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name.startswith("loss")} for line in lines if "loss" in line]


def assert_same_training(left: Path, right: Path, tolerance: float) -> None:
    ours, theirs = losses(left), losses(right)
    assert len(ours) == len(theirs) == 4 and ours[0]["loss"] != ours[-1]["loss"]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    first, second = (load_file(out / "student" / "model" / "model.safetensors") for out in (left, right))
    assert max(float(np.abs(first[name] - second[name]).max()) for name in first) < tolerance


@pytest.fixture
def alone(recipe: Path, tmp_path: Path) -> Path:
    """One process with the batch of two."""
    ending = train(recipe, tmp_path / "alone", "--set", "training.batches.size=4").wait()
    assert ending.code == 0, ending.err
    return tmp_path / "alone"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("recipe", ["dense", "cross_encoder"], indirect=True)
def test_two_processes_train_like_one_with_twice_the_batch(recipe: Path, alone: Path, tmp_path: Path) -> None:
    """Started as `accelerate launch` and torchrun do, by variables; in-batch negatives come from both."""
    out, port = tmp_path / "two", free_port()
    started = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        variables = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in variables.items()}
        arguments = ("train", recipe, "--out", out, "--store", tmp_path / "store")
        started.append(forked.program(*arguments, folder=tmp_path / f"rank{rank}", environment=environment))
    endings = [process.wait(120) for process in started]
    assert [ending.code for ending in endings] == [0, 0], "\n".join(ending.err for ending in endings)
    assert endings[1].out == endings[1].err == ""  # the first speaks for all
    assert_same_training(out, alone, 1e-4)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["training"]["processes"] == 2


def test_nproc_starts_the_processes(recipe: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "nproc"
    ending = train(recipe, out, "--nproc", "2").wait()
    assert ending.code == 0, ending.err
    assert ending.out.count("student/model") == 1
    assert_same_training(out, alone, 1e-4)
    made = (out / "student" / "manifest.json").stat().st_mtime_ns
    assert train(recipe, out, "--nproc", "2").wait().code == 0  # finished: nothing is started
    assert (out / "student" / "manifest.json").stat().st_mtime_ns == made


def test_a_process_that_fails_is_an_error_that_says_so() -> None:
    with pytest.raises(RankdistillError, match="training in 2 processes failed"):
        run_together(2, ["recipes", "show", "no-such-recipe"])
