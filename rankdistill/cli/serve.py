"""A run's search page: which systems stand side by side (`rankdistill serve`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankdistill.artifacts import MANIFEST, open_artifact
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.search_page import Column, Reranker, SearchPage
from rankdistill.indexes.by_student import exhaustive_engine, open_index
from rankdistill.indexes.sparse import searched_here
from rankdistill.indexes.specification import any_specification
from rankdistill.progress import warn
from rankdistill.recipe import build
from rankdistill.run_folder import STUDENT
from rankdistill.scores.store import ScoreStore
from rankdistill.stages import Workspace
from rankdistill.teachers.base import TextList
from rankdistill.teachers.ensemble import EnsembleTeacher, score_list
from rankdistill.teachers.scoring import prepared_folder


def search_page(workspace: Workspace, indexes: Sequence[str] | None = None, depth: int = 10) -> SearchPage:
    """BM25, the student, indexes of it and the teacher over a run's own collection; `PageServer().run(page)` shows it.

    Args:
        indexes: specifications (one that is not there yet is built) or index files of this student; the recipe's that
            are on disk unless given, but for exhaustive ones in float32, which find what the student finds.
        depth: documents a column.

    Raises:
        RankdistillError: there is no trained student; an index belongs to another one.
    """
    collection, recipe = workspace.documents, workspace.recipe
    student = workspace.student()
    exact: Any = exhaustive_engine(student, workspace.vectors(STUDENT, student, collection))
    bm25 = workspace.bm25()
    columns = [
        Column("BM25", bm25, bm25.bytes, kind="bm25"),
        Column("student", exact, exact.index.bytes, "Every vector as it is, searched exhaustively.", "student"),
    ]
    if indexes is None:
        built = {name: any_specification(name) for name in recipe.indexes if workspace.index_file(name).exists()}
        indexes = [
            name for name, known in built.items() if getattr(known, "factory", "") != "Flat" and searched_here(known)
        ]
    for name in indexes:
        there = name.endswith(".faiss") or (Path(name) / MANIFEST).is_file()
        index = open_index(name) if there else workspace.index(name, student=student)
        index.check(collection=collection)
        engine = workspace.searched(index, student)
        note = index.specification.description
        columns.append(Column(f"student, {index.name}", engine, index.bytes, note, "index"))
    teacher, reason = None, "the recipe names none"
    try:
        teacher = _teacher(workspace)
    except RankdistillError as error:
        reason = error.what
        warn(f"no teacher on the page: {reason}")
    return SearchPage(collection, columns, teacher, name=recipe.name, depth=depth, no_teacher=reason)


def _teacher(workspace: Workspace) -> Reranker | None:
    """The recipe's teacher as the run has trained it; unlike for `Workspace.teacher`, nothing is mined or trained.

    Raises:
        RankdistillError: it has not been trained yet.
    """
    if workspace.recipe.teacher is None:
        return None
    teacher: Any = build("teacher", workspace.recipe.teacher.settings(), "teacher")
    ensemble = isinstance(teacher, EnsembleTeacher)
    for number, member in enumerate(teacher.teachers if ensemble else [teacher]):
        if member.needs_training:
            name = f"teacher-{number}" if ensemble else "teacher"
            member.use_trained(open_artifact(workspace.path / name, "teacher").path / "model")
    teacher.prepare(workspace.documents, prepared_folder(ScoreStore(workspace.store_path)))
    return Reranker(lambda item: score_list(teacher, TextList(*item)), note=workspace.recipe.teacher.type)
