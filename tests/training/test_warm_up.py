"""A warm-up: the cut student comes near to its teacher, is kept for all seeds, and goes on exactly after a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from trainings import assert_same_weights, resumed, run_values

from rankdistill.errors import UsageError
from rankdistill.recipe import build, load_recipe
from rankdistill.stages import Workspace
from rankdistill.training.warm_up import WarmUpTraining

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe

SETTINGS = {"steps": 24, "batch_size": 8, "learning_rate": 3e-3, "documents": 20}
MakeWarmUp = Callable[..., WarmUpTraining]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with layers that do something: one that lost some is no longer what it was."""
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    for name, parameter in model.named_parameters():
        if ".layer." in name and parameter.ndim == 2:
            parameter.data *= 6
    folder = tmp_path_factory.mktemp("deep")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def make_warm_up(make_recipe: Callable[..., Recipe], tiny_collection: Collection, encoder: Path) -> MakeWarmUp:
    def make(seed: int = 42, student: dict[str, Any] | None = None, **changes: Any) -> WarmUpTraining:
        own = {"model": str(encoder), "layers": [1], "similarity": "keep", **(student or {})}
        student = {**own, "warm_up": {**SETTINGS, **changes}}
        recipe = make_recipe(student=student, seed=seed)
        return WarmUpTraining(recipe, tiny_collection, tiny_collection.query_ids("train"))

    return make


def test_a_cut_student_comes_near_to_the_encoder_it_was_cut_from(
    make_warm_up: MakeWarmUp, tiny_collection: Collection, tmp_path: Path
) -> None:
    warm_up = make_warm_up()
    artifact = warm_up.run(tmp_path)
    maker = build("student", warm_up.recipe.student.settings())
    teacher = build("student", warm_up.recipe.training.batch_teacher.settings()).create()
    assert warm_up.recipe.training.batch_teacher.settings()["layers"] is None
    texts = tiny_collection.query_texts(tiny_collection.query_ids("test"))  # none of them was read
    wanted = teacher.encode_queries(texts)

    def apart(student: Any) -> float:
        return float(np.square(student.encode_queries(texts) - wanted).sum(axis=1).mean())

    assert apart(maker.open(artifact.path / "model")) < 0.5 * apart(maker.create())
    assert artifact.counts["steps"] == 24


def test_a_stopped_warm_up_goes_on_exactly(
    make_warm_up: MakeWarmUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_warm_up().run(tmp_path / "whole")
    assert_same_weights(resumed(lambda: make_warm_up().run(tmp_path / "stopped"), monkeypatch, {5, 17}), whole)


def test_one_warm_up_serves_all_seeds_and_other_settings_have_their_own(
    make_warm_up: MakeWarmUp, tmp_path: Path
) -> None:
    first = make_warm_up(seed=1)
    assert make_warm_up(seed=2).fingerprint == first.fingerprint
    others = [make_warm_up(steps=25), make_warm_up(student={"layers": [0]}), make_warm_up(documents=19)]
    assert len({first.fingerprint, *(one.fingerprint for one in others)}) == 4
    made = first.run(tmp_path)
    written = (made.path / "manifest.json").stat().st_mtime_ns
    assert make_warm_up(seed=2).run(tmp_path).path == made.path
    assert (made.path / "manifest.json").stat().st_mtime_ns == written


def test_a_whole_student_and_a_wrong_teacher_are_refused(make_warm_up: MakeWarmUp) -> None:
    with pytest.raises(UsageError, match="its own teacher"):
        make_warm_up(student={"layers": None})
    with pytest.raises(UsageError, match="did you mean 'layers'"):
        make_warm_up(teacher={"type": "dense", "layer": [0]})


def test_in_a_run_a_smaller_student_takes_after_the_trained_one(encoder: Path, tiny_beir: Path, tmp_path: Path) -> None:
    student = {"type": "dense", "query_length": 16, "document_length": 24}
    warm = {"teacher": "student", "steps": 4, "batch_size": 8}
    values = run_values(tiny_beir, encoder, student, steps=2, checkpoints=1)
    values["baselines"] = {"half": {"student": {"layers": [1], "warm_up": warm}}}
    workspace = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    artifact = workspace.train("half")
    warm_up = workspace.warm_up(workspace.recipe_of("half"))
    assert warm_up is not None and artifact.manifest["inputs"]["start"] == warm_up.fingerprint
    assert warm_up.recipe.training.batch_teacher.settings()["model"] == str(tmp_path / "run" / "student" / "model")
    made = tmp_path / "store" / "warm-up" / f"prepared-{warm_up.fingerprint}" / "batch-teacher"
    # The trained student's vectors of the collection are those that are searched: they were not made again.
    assert (made / "queries.npy").is_file() and not (made / "documents.npy").exists()
    own = {**values, "student": {**values["student"], "layers": [1], "warm_up": {"teacher": "student"}}}
    with pytest.raises(UsageError, match="take after itself"):
        Workspace(tmp_path / "own", load_recipe({**own, "baselines": {}}), tmp_path / "store").train()


def test_without_a_step_the_warmed_up_start_is_the_student(encoder: Path, tiny_beir: Path, tmp_path: Path) -> None:
    student = {"type": "dense", "layers": [1], "warm_up": {"steps": 3, "batch_size": 4}}
    values = {**run_values(tiny_beir, encoder, student, steps=0, losses=[{"type": "infonce"}]), "teacher": None}
    workspace = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    artifact, warm_up = workspace.train(), workspace.warm_up(workspace.recipe)
    assert warm_up is not None and len(warm_up.query_ids) == 12
    assert_same_weights(warm_up.run(workspace.warm_up_folder), artifact)
    assert list(artifact.manifest["dev"]) == ["0"] and artifact.counts["steps"] == 0
