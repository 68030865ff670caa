"""What the verbs that search and index ask of a run before they start: its workspace, and options it has no use for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rankdistill.errors import UsageError

if TYPE_CHECKING:
    from rankdistill.stages import Workspace


def searching_workspace(folder: Path) -> Workspace:
    """A run's workspace, to search with.

    The saved recipe of an inference-free student is read without importing the methods it names, and so without torch:
    its own search needs none of them.

    Raises:
        RankdistillError: this is no run.
    """
    from rankdistill.indexes.by_student import INFERENCE_FREE
    from rankdistill.recipe import Recipe, check_values, read_yaml
    from rankdistill.run_folder import RECIPE
    from rankdistill.stages import Workspace

    saved = folder / RECIPE
    if saved.is_file():
        recipe = check_values(Recipe, read_yaml(saved), str(saved))
        if recipe.student_kind == INFERENCE_FREE:
            return Workspace(folder, recipe)
    return Workspace(folder)


def refuse_for_sparse(student_type: str, option: str) -> None:
    """Refuse an option that means something for FAISS indexes alone.

    Raises:
        UsageError: the student is a sparse one.
    """
    from rankdistill.indexes.by_student import SPARSE_STUDENTS

    if student_type in SPARSE_STUDENTS:
        raise UsageError(
            f"{option} is for FAISS indexes; a sparse student has none",
            where=f"student.type: {student_type}",
            fix="leave it out; how Seismic searches is in its specification (query_cut, heap_factor)",
        )
