"""Averages of checkpoints and mixes with the start: 0 is the start, 1 the end, and dev chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from rankdistill.recipe import build
from rankdistill.training.batches import BatchStream
from rankdistill.training.checkpoints import STATE, WEIGHTS, averaged, copy_of, load_mix
from rankdistill.training.dev import DevPool
from rankdistill.training.trainer import fit_scale

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists

MakeRecipe = Callable[..., "Recipe"]


def test_a_mix_of_0_is_the_start_and_of_1_the_end(make_recipe: MakeRecipe) -> None:
    student = build("student", make_recipe().student.settings()).create("cpu")
    start = copy_of(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    end = copy_of(student)
    for share, wanted in ((0.0, start), (1.0, end)):
        load_mix(student, start, end, share)
        assert all(torch.equal(value, wanted[name]) for name, value in copy_of(student).items())
    load_mix(student, start, end, 0.25)
    for name, value in copy_of(student).items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * start[name] + 0.25 * end[name], atol=1e-6), name


def test_the_average_is_that_of_the_last_checkpoints_student(tmp_path: Path) -> None:
    for step, value in ((2, 100.0), (10, 1.0), (20, 4.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"student.w": torch.full((3,), value), "losses.x": torch.ones(1)}, folder / WEIGHTS)
        (folder / STATE).write_text("{}")
    found = averaged(tmp_path, 2)
    assert list(found) == ["w"] and found["w"].tolist() == [2.5, 2.5, 2.5]


def test_the_best_on_dev_is_published_be_it_a_mix(
    train: Callable[..., Artifact], dev_pool: DevPool, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    artifact = train(tmp_path / "student", dev=dev_pool, average=3, interpolate=[0.5], learning_rate=2e-2)
    manifest = artifact.manifest
    assert set(manifest["mixes"]) == {"1", "0.5"}
    best = max([*manifest["dev"].values(), *manifest["mixes"].values()])
    student = build("student", make_recipe().student.settings()).open(artifact.path / "model", "cpu")
    assert dev_pool.evaluate(student) == pytest.approx(best, abs=1e-6)


def test_a_fitted_scale_is_that_of_least_squares(
    lists: ScoredLists, tiny_collection: Collection, make_recipe: MakeRecipe
) -> None:
    """Teacher scores that are 7 times the student's cosines: the scale becomes 7."""
    recipe = make_recipe(student={"similarity": "cos"})
    student = build("student", recipe.student.settings()).create("cpu").eval()
    samplers = (build("sampler", one.settings()) for one in (recipe.training.batches, recipe.training.lists))

    class Planted(BatchStream):
        def __getitem__(self, number: int) -> dict[str, Any]:
            batch = super().__getitem__(number)
            with torch.no_grad():
                queries = student.embed(batch["queries"], "query")
                documents = student.join([student.embed(part, "document") for part in batch["documents"]])
                cosines = torch.einsum("qd,qnd->qn", queries, documents[batch["index"]])
            return batch | {"teacher_scores": 7 * cosines + torch.arange(len(cosines))[:, None]}  # a shift a list

    assert student.scale.item() == 20
    fit_scale(student, Planted(lists, tiny_collection, student, *samplers, 42, 12, 4096))
    assert student.scale.item() == pytest.approx(7, rel=1e-3)
