"""The order of stages and what is stale: what does not depend on a change is not made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import load_recipe
from rankdistill.stages import STAGES, Workspace

Open = Callable[..., Workspace]


@pytest.fixture(scope="module")
def values(tiny_beir: Path, tiny_encoder: Path) -> dict[str, Any]:
    model = str(tiny_encoder)
    return {
        "name": "stages",
        "collection": f"beir:{tiny_beir}",
        "candidates": {
            "depth": 6,
            "sources": [{"type": "bm25", "quota": 4}, {"type": "dense", "model": model, "quota": 3}],
        },
        "teacher": {"type": "bi_encoder", "model": model},
        "student": {"type": "static", "model": model},
        "training": {"steps": 4, "checkpoints": 2, "lists": {"type": "random_documents", "size": 4}, "device": "cpu"},
        "indexes": ["flat"],
        "evaluation": {"extrapolation": {"model": model}},
    }


@pytest.fixture(scope="module")
def done(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its store."""
    folder = tmp_path_factory.mktemp("stages")
    Workspace(folder / "run", load_recipe(values), folder / "store").run()
    return folder


@pytest.fixture
def reopen(values: dict[str, Any], done: Path, tmp_path: Path) -> Open:
    """A copy of the finished run under a recipe with these changes."""

    def make(*overrides: str) -> Workspace:
        shutil.copytree(done, tmp_path / "copy")
        return Workspace(tmp_path / "copy" / "run", load_recipe(values, overrides), tmp_path / "copy" / "store")

    return make


ARTIFACTS = {"mine": "candidates/train", "score": "lists", "train": "student"}


def stamps(workspace: Workspace) -> dict[str, int]:
    return {stage: (workspace.path / name / "manifest.json").stat().st_mtime_ns for stage, name in ARTIFACTS.items()}


def made_again(workspace: Workspace) -> set[str]:
    """The stages whose artifact a run of the workspace made anew."""
    before = stamps(workspace)
    workspace.run()
    after = stamps(workspace)
    return {stage for stage in ARTIFACTS if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("name=another", set()),
        ("training.log_every=3", set()),
        ("evaluation.depth=5", set()),
        ("indexes=[flat, sq8]", set()),
        ("training.learning_rate=0.01", {"train"}),
        ("student.scale=3", {"train"}),
        ("seed=7", {"train"}),
        ("teacher.max_length=9", {"score", "train"}),
        ("candidates.depth=5", {"mine", "score", "train"}),
    ],
)
def test_only_what_depends_on_a_change_is_made_again(reopen: Open, override: str, again: set[str]) -> None:
    assert made_again(reopen(override)) == again


def test_moving_everything_makes_nothing_again(done: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    """Fingerprints hold no path: the run, its collection and its encoder may be moved."""
    shutil.copytree(done, tmp_path / "there")
    shutil.copytree(values["collection"].removeprefix("beir:"), tmp_path / "facts")
    shutil.copytree(values["student"]["model"], tmp_path / "encoder")
    text = json.dumps(values)
    text = text.replace(values["collection"], f"beir:{tmp_path}/facts").replace(
        values["student"]["model"], str(tmp_path / "encoder")
    )
    moved = Workspace(tmp_path / "there" / "run", load_recipe(json.loads(text)), tmp_path / "there" / "store")
    assert made_again(moved) == set()


def test_a_second_student_pays_the_teacher_nothing(
    values: dict[str, Any], done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "store", tmp_path / "store")
    parts = sorted((tmp_path / "store").rglob("*.parquet"))
    other = load_recipe(values, ["seed=5", "student.start=words", "training.losses=[{type: kl}]"])
    Workspace(tmp_path / "run", other, tmp_path / "store").run("train")
    assert sorted((tmp_path / "store").rglob("*.parquet")) == parts
    assert "score: 0 pairs scored" in capsys.readouterr().err


def test_until_stops_after_a_stage_and_the_rest_follows(values: dict[str, Any], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    assert workspace.run("mine") is None
    assert (workspace.path / "candidates").is_dir() and not (workspace.path / "lists").exists()
    workspace.run("score")
    assert (workspace.path / "lists").is_dir() and not (workspace.path / "student").exists()
    with pytest.raises(RankdistillError, match="student"):
        workspace.student()
    assert workspace.run() is not None
    # No index of this recipe is learned, so it has no stage `quantize`.
    expected = [stage for stage in STAGES if stage != "quantize"]
    assert list(json.loads((workspace.path / "times.json").read_text())) == expected


def test_force_makes_a_stage_again_and_keeps_the_scores(reopen: Open) -> None:
    workspace = reopen()
    before = stamps(workspace)
    parts = sorted(workspace.path.parent.rglob("part-*.parquet"))
    workspace.run("score", force=["mine", "score"])
    assert {stage for stage, stamp in stamps(workspace).items() if stamp != before[stage]} == {"mine", "score"}
    assert sorted(workspace.path.parent.rglob("part-*.parquet")) == parts
    with pytest.raises(UsageError, match="no stage 'trian'"):
        workspace.run(force=["trian"])


def test_the_saved_recipe_reproduces_the_run(done: Path, tmp_path: Path) -> None:
    saved = yaml.safe_load((done / "run" / "recipe.yaml").read_text())
    again = Workspace(tmp_path / "run", load_recipe(saved), tmp_path / "store")
    result, first = again.run(), Workspace(done / "run", store=done / "store").evaluate(out=tmp_path / "results")
    assert result is not None and result.macro == first.macro
    weights = [(folder / "student/model/model.safetensors").read_bytes() for folder in (done / "run", again.path)]
    assert weights[0] == weights[1]


def test_a_run_opens_from_its_folder_alone(done: Path) -> None:
    workspace = Workspace(done / "run", store=done / "store")
    assert workspace.recipe.name == "stages" and "student" in repr(workspace)
    hits = workspace.engine().search(["which metal rusts"], 5)[0]
    assert len(hits.rows) == 5 and (hits.rows >= 0).all()
    over = workspace.engine(workspace.index_file("flat")).search(["which metal rusts"], 5)[0]
    assert over.rows.tolist() == hits.rows.tolist()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match="this is no run"):
        Workspace(tmp_path)


def test_a_recipe_without_a_teacher_trains_on_labels(values: dict[str, Any], tmp_path: Path) -> None:
    changes = ["teacher=null", "training.losses=[{type: infonce}]"]
    workspace = Workspace(tmp_path / "run", load_recipe(values, changes), tmp_path / "store")
    result = workspace.run()
    assert result is not None and "student" in result.macro and "teacher" not in result.macro
    assert not (tmp_path / "store").exists()
