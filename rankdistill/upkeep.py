"""What a run looks at before hours of work, and what `--force` throws away. Nothing that is not ours is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankdistill.artifacts import check_file, check_place, remove_artifacts, remove_leftovers
from rankdistill.systems import STUDENT

if TYPE_CHECKING:
    from rankdistill.stages import Workspace


def check_run(run: Workspace) -> None:
    """Refuse what can only fail later, or would delete what is not ours.

    Raises:
        UsageError: an index that the student cannot have, an unknown suite or metric, a place that is taken.
    """
    from rankdistill.evaluation.metrics import parse_metric
    from rankdistill.evaluation.suites import load_suite

    indexes = run.index_files()
    load_suite(run.recipe.evaluation.suite)
    for name in (STUDENT, *run.recipe.baselines):
        parse_metric(run.recipe_of(name).training.metric)
    _check_places(run, indexes)
    remove_leftovers(run.path)


def _check_places(run: Workspace, indexes: list[str]) -> None:
    from rankdistill.indexes.faiss_index import check_out_file

    check_file(run.path / "recipe.yaml")
    members = len(run.recipe.teacher.settings().get("members", ())) if run.recipe.teacher is not None else 0
    teachers = ["teacher", "teacher-calibration", *(f"teacher-{number}" for number in range(members))]
    for name in (STUDENT, "lists", "dev-lists", *teachers):
        check_place(run.path / name)
    for name in ("candidates", "engines", "vectors", "baselines", "prepared"):
        folder = run.path / name
        for inner in folder.iterdir() if folder.is_dir() else [folder]:
            if not inner.is_file() and not inner.name.startswith("."):
                check_place(inner)
    for specification in indexes:
        file = run.index_file(specification)
        if file.suffix == ".faiss":
            check_out_file(file)
        else:
            check_place(file)


def forget(run: Workspace, stage: str) -> None:
    """Delete what a stage made."""
    folders = {
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
        from rankdistill.indexes.faiss_index import ids_file, manifest_file

        learned = {run.index_file(name).name for name in filter(run.learned, run.recipe.indexes)}
        for manifest in (run.path / "indexes").rglob("*.faiss.json"):
            index = manifest.with_suffix("")
            if stage == "index" or index.name in learned:
                remove_artifacts(Path(f"{index}.quantizer"))
                for file in (index, ids_file(index), manifest_file(index)):
                    file.unlink(missing_ok=True)
