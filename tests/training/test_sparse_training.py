"""Sparse students in training: they learn, regularisers press on the side they name, everything resumes exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sparse_encoder.losses import FlopsLoss
from torch import Tensor
from torch.nn.modules.module import register_module_full_backward_hook
from trainings import logged

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.training.batches import BatchStream
from rankdistill.training.distiller import Distiller
from rankdistill.training.sparsity import WINDOW, SparsityWatch
from rankdistill.training.trainer import build_losses

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists

FLOPS = [{"type": "flops", "side": side, "weight": 0.01} for side in ("query", "document")]


@pytest.fixture
def train(train: Callable[..., Artifact]) -> Callable[..., Artifact]:
    """With a sparse student, without dropout; `student=` changes its settings."""
    return lambda out, kind="splade", student=None, **changes: train(
        out, student={"type": kind, "dropout": 0.0, **(student or {})}, **changes
    )


def test_figures_leave_the_device_when_they_are_logged(
    train: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    for name in ("__float__", "item", "tolist"):
        real = getattr(Tensor, name)

        def counted(self: Tensor, *given: Any, name: str = name, real: Any = real) -> Any:
            asked = sys._getframe(1).f_code
            if asked.co_filename.endswith(("training/trainer.py", "training/sparsity.py")):
                waits.append(f"{asked.co_name}: {name}")
            return real(self, *given)

        monkeypatch.setattr(Tensor, name, counted)
    losses = [{"type": "margin_mse"}, *FLOPS]
    artifact = train(tmp_path / "out", steps=40, losses=losses, log_every=20)
    assert sorted(waits) == ["log: tolist"] * 2 + ["see: tolist"] * 3
    monkeypatch.undo()
    assert len(logged(artifact, "loss/flops_query")) == len(logged(artifact, "active_terms/document")) == 2


def test_a_regulariser_reads_the_side_it_names(
    make_recipe: Callable[..., Recipe], lists: ScoredLists, tiny_collection: Collection
) -> None:
    recipe = make_recipe({"type": "splade", "dropout": 0.0}, losses=[{"type": "kl"}, *FLOPS])
    student = build("student", recipe.student.settings()).create("cpu")
    batches, documents = (build("sampler", one.settings()) for one in (recipe.training.batches, recipe.training.lists))
    batch = BatchStream(lists, tiny_collection, student, batches, documents, 1, 1, 4096)[0]
    losses = build_losses(recipe.training)
    assert list(losses) == ["kl", "flops_query", "flops_document"]
    distiller = Distiller(student, losses)
    distiller.at_step(10, 10)
    made = distiller(**batch)
    theirs = FlopsLoss(None)  # type: ignore[arg-type]
    with torch.no_grad():
        queries = student.embed(batch["queries"], "query")
        found = torch.cat([student.embed(part, "document") for part in batch["documents"]])
    assert float(made["flops_query"]) == pytest.approx(float(theirs.compute_loss_from_embeddings(queries)), rel=1e-5)
    assert float(made["flops_document"]) == pytest.approx(float(theirs.compute_loss_from_embeddings(found)), rel=1e-5)
    parts = float(made["kl"]) + 0.01 * float(made["flops_query"]) + 0.01 * float(made["flops_document"])
    assert float(made["loss"].detach()) == pytest.approx(parts, rel=1e-5)
    assert float(made["figures"]["active_terms/document"]) == float((found > 0).sum(dim=1).float().mean())


def test_lambda_rises_with_optimiser_steps_not_with_batches(train: Callable[..., Artifact], tmp_path: Path) -> None:
    one, two = (
        train(tmp_path / str(batches), losses=[{"type": "kl"}, FLOPS[1]], steps=9, accumulation=batches)
        for batches in (1, 2)
    )
    expected = [0.01 * min(1, step / 3) ** 2 for step in range(9)]
    assert logged(one, "weight/flops_document") == pytest.approx(expected)
    assert logged(two, "weight/flops_document") == pytest.approx(expected)


def test_a_first_step_that_memory_does_not_hold_leaves_nothing_behind(
    train: Callable[..., Artifact], tmp_path: Path
) -> None:
    """A buffer that the first batch makes is gone again when that batch is done anew."""
    losses = [{"type": "margin_mse"}, {"type": "df_flops", "side": "document", "target": 20, "ramp": 0.5}]
    changes: dict[str, Any] = {"losses": losses, "accumulation": 2, "steps": 3, "token_budget": 256}
    whole = train(tmp_path / "whole", **changes)
    largest = []

    def check(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and sum(largest) < 4:
            largest.append(module.padding_idx is not None)
            if largest[-1] and sum(largest) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = register_module_full_backward_hook(check)
    try:
        small = train(tmp_path / "small", **changes)
    finally:
        handle.remove()
    assert sum(largest) == 4
    for figure in ("loss", "weight/df_flops_document", "active_terms/document"):
        assert logged(small, figure) == pytest.approx(logged(whole, figure), rel=1e-3)


@pytest.mark.parametrize("target", [12, 40])
def test_the_controller_reaches_its_target(target: int, train: Callable[..., Artifact], tmp_path: Path) -> None:
    losses = [{"type": "margin_mse"}, {"type": "flops", "side": "document", "target": target, "weight": 0.01}]
    artifact = train(tmp_path / "out", losses=losses, steps=120, schedule="constant", warmup=0.0)
    assert np.mean(logged(artifact, "active_terms/document")[-20:]) == pytest.approx(target, rel=0.25)


def test_a_collapse_stops_the_training_and_says_why(train: Callable[..., Artifact], tmp_path: Path) -> None:
    losses = [{"type": "kl"}, {"type": "l1", "side": "document", "weight": 100.0, "ramp": 0}]
    with pytest.raises(RankdistillError, match=r"collapsed: .* of the documents have no term"):
        train(tmp_path / "out", losses=losses, steps=300, learning_rate=2e-2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "loss", "told"),
    [("dense", FLOPS[1], "this student has none of"), ("inference_free", FLOPS[0], "fixed table")],
)
def test_regularisers_without_anything_to_press_on_are_refused(
    kind: str, loss: Any, told: str, train: Callable[..., Artifact], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        train(tmp_path / "out", kind=kind, losses=[{"type": "kl"}, loss])


def test_a_trained_table_learns_at_a_rate_of_its_own(train: Callable[..., Artifact], tmp_path: Path) -> None:
    recipe = {"kind": "inference_free", "losses": [{"type": "kl"}], "steps": 1, "warmup": 0.0, "schedule": "constant"}
    tables = []
    for rate in (1e-9, 0.01):
        artifact = train(tmp_path / str(rate), student={"train_idf": True, "idf_learning_rate": rate}, **recipe)
        path = next(path for path in (artifact.path / "model").rglob("*.safetensors") if "weight" in load_file(path))
        tables.append(load_file(path)["weight"])
    change = (tables[1] - tables[0]).abs()
    # Adam's first step is as large as the learning rate.
    assert float(change[change > 1e-6].max()) == pytest.approx(0.01, rel=0.02) and int((change > 1e-6).sum()) > 5


# -- the watch: it looks every 10 batches -----------------------------------------------------------------------------


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


RAMPED = {"type": "flops", "ramp": 0.3}
DENSE = {"active_terms/document": 400.0}


@pytest.mark.parametrize(
    ("figures", "regulariser", "step"),
    [
        ({}, RAMPED, None),  # a healthy student is left alone
        ({"empty/query": 0.6}, RAMPED, WINDOW - 1),
        ({"empty/document": 0.6}, RAMPED, WINDOW - 1),
        ({"empty/query": 0.4, "empty/document": 0.4}, RAMPED, None),
        ({"common_terms/document": 0.99}, RAMPED, 109),
        (DENSE, RAMPED, 309),  # once the regulariser counts in full
        (DENSE, {**RAMPED, "ramp": 0}, 109),
        (DENSE, {**RAMPED, "weight": {"end": 1.0, "over": 500, "delay": 50}}, 559),
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
