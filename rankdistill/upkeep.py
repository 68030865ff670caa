"""What a run looks at before hours of work, and what `--force` throws away. Nothing that is not ours is deleted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankdistill.artifacts import check_file, check_place, remove_artifacts, remove_leftovers
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.metrics import parse_metric
from rankdistill.evaluation.suites import load_suite
from rankdistill.indexes.faiss_index import check_out_file, ids_file, manifest_file
from rankdistill.indexes.specification import QuantizerSpecification
from rankdistill.run_folder import RECIPE, STUDENT, WRITTEN, RunFolder
from rankdistill.students.loading import check_causal_lm, check_model
from rankdistill.students.models import layer_count, resolve_model
from rankdistill.students.provenance import MODELS


def check_run(run: RunFolder) -> None:
    """Refuse what can only fail later, or would delete what is not ours.

    Raises:
        UsageError: an index that the student cannot have, an unknown suite, metric, device or layer, a place that is
            taken.
        RankdistillError: a model is not there.
    """
    _ = run.indexes  # refused before hours of work
    load_suite(run.recipe.evaluation.suite)
    for name in (STUDENT, *run.recipe.baselines):
        recipe = run.recipe_of(name)
        parse_metric(recipe.training.metric)
        _check_parts(recipe.resolved())
        _check_layers(recipe.student.settings())
    _check_places(run)
    remove_leftovers(run.path)


def _check_parts(values: Any) -> None:
    """Every device, model and file that is named anywhere in a recipe."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if not isinstance(value, str) or not value or (key == "model" and values.get("type") == "openai"):
                continue  # the last: what a server calls it
            if key == "device":
                resolve_device(value)
            elif key in MODELS:
                folder = check_model(value)
                if values.get("type") == "transformers":
                    check_causal_lm(folder)
            elif key == "tokenizer":
                resolve_model(value)
            elif key in ("file", "orders") and not Path(value).expanduser().exists():
                raise RankdistillError("there is no file here", where=f"{key}: {value}", fix="give its path")
        values = list(values.values())
    for value in values if isinstance(values, list) else ():
        _check_parts(value)


def _check_layers(student: Mapping[str, Any]) -> None:
    layers = student.get("layers")
    if layers is None:
        return
    count = layer_count(resolve_model(student["model"]).path)
    if not layers or (count is not None and not all(0 <= layer < count for layer in layers)):
        known = "at least one" if count is None else f"of 0 to {count - 1}"
        raise UsageError(f"layers are {known}, not {layers}", where="student.layers", fix="layers that the encoder has")


def _check_places(run: RunFolder) -> None:
    check_file(run.path / RECIPE, mark=WRITTEN)
    members = len(run.recipe.teacher.settings().get("members", ())) if run.recipe.teacher is not None else 0
    teachers = ["teacher", "teacher-calibration", *(f"teacher-{number}" for number in range(members))]
    for name in (STUDENT, "generated", "lists", "dev-lists", *teachers):
        check_place(run.path / name)
    for name in ("candidates", "engines", "vectors", "baselines", "prepared"):
        folder = run.path / name
        for inner in folder.iterdir() if folder.is_dir() else [folder]:
            if not inner.is_file() and not inner.name.startswith("."):
                check_place(inner)
    for specification in run.indexes:
        file = run.index_file(specification)
        if file.suffix == ".faiss":
            check_out_file(file)
        else:
            check_place(file)


def forget(run: RunFolder, stage: str) -> None:
    """Delete what a stage made."""
    folders = {
        "generate": ["generated"],
        "mine": ["candidates", "engines"],
        "teach": [path.name for path in run.path.glob("teacher*")],
        "score": ["lists", "dev-lists"],
        "train": [STUDENT, "baselines"],
        "index": ["indexes", "vectors"],
        "evaluate": ["evaluation"],
    }
    for folder in folders.get(stage, ()):
        remove_artifacts(run.path / folder)
    if stage in ("quantize", "index"):
        learned = {run.index_file(each).name for each in run.indexes if isinstance(each, QuantizerSpecification)}
        for manifest in (run.path / "indexes").rglob("*.faiss.json"):
            index = manifest.with_suffix("")
            if stage == "index" or index.name in learned:
                remove_artifacts(Path(f"{index}.quantizer"))
                for file in (index, ids_file(index), manifest_file(index)):
                    file.unlink(missing_ok=True)
