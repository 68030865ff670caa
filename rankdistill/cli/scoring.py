"""What `rankdistill score` does beside scoring: a budget, an estimate, calibration, the probe of teachers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.artifacts import open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import warn
from rankdistill.recipe import build
from rankdistill.runs import iter_run
from rankdistill.scores.calibration import calibrate
from rankdistill.scores.store import ScoreStore, TeacherScores
from rankdistill.teachers.base import Teacher
from rankdistill.teachers.llm.asking import AskingTeacher
from rankdistill.teachers.probe import named, probe
from rankdistill.teachers.scoring import dry_run, missing_pairs


def limited(teacher: Teacher, budget: str | None) -> Teacher:
    """The teacher, held to a budget instead of its recipe's.

    Raises:
        UsageError: not a budget, or a teacher that asks no language model.
    """
    if budget is None:
        return teacher
    if not isinstance(teacher, AskingTeacher):
        what = f"a teacher of type {teacher.type!r} asks no language model: there is nothing to limit"
        raise UsageError(what, where="--budget", fix="leave it out")
    try:
        teacher.asking.budget.set_limit(budget)
    except UsageError as error:
        raise UsageError(error.what, where="--budget", fix=error.fix) from None
    return teacher


def print_estimate(
    teacher: Teacher,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore,
) -> None:
    """What scoring these candidates would cost; nothing is asked and nothing is kept."""
    if isinstance(teacher, AskingTeacher):
        print("\n".join(dry_run(teacher, collection, candidates, store).lines()))
        return
    pairs = missing_pairs(teacher, collection, candidates, store)
    print(f"{pairs:,} pairs to score; a teacher of type {teacher.type!r} asks no language model")


def calibrate_scores(scores: TeacherScores, collection: Collection, method: Any, out: Path | None) -> None:
    """Fit a teacher's scores in the store to the labels of the training queries, and print error and tables.

    Dev queries are left out, also those that are held out of the train split; `out` gets calibrated probabilities of
    all scores of the folder.

    Raises:
        RankdistillError: no train split, or no labelled pair among the scores.
    """
    if "train" not in collection.splits:
        raise RankdistillError(
            "calibration needs labels of training queries, and there is no train split",
            where=collection.spec,
            fix="leave --calibrate out; labels of dev and test stay for measuring",
        )
    judged = collection.qrels("train")
    training, _ = collection.training_splits()
    qrels = {query_id: judged[query_id] for query_id in training if query_id in judged}
    calibration = calibrate(scores, qrels, scores.score_kind, method)
    print(calibration)
    if out is not None:
        scores.export(out, calibration.calibrator)


def probe_teachers(
    settings: Sequence[str], budget: str | None, collection: Collection, candidates: Path, count: int, store: ScoreStore
) -> None:
    """Print what teachers are worth on labelled training queries, best first, and what is to be said against them.

    Raises:
        UsageError: the candidates have their positives first, so that their order is no first stage's.
    """
    if candidates.is_dir():
        if open_artifact(candidates, "candidates").manifest["settings"].get("include_positives"):
            raise UsageError(
                "these candidates have the labelled positives first: their order is not that of a first stage",
                where=str(candidates),
                fix="`rankdistill mine ... --no-positives` for the probe, or a run file",
            )
        candidates /= "candidates.parquet"
    teachers = named(limited(build("teacher", text, "--teacher"), budget) for text in settings)
    probed = probe(teachers, collection, iter_run(candidates), count, store)
    print("\n".join(map(str, probed)))
    for verdict in filter(None, (each.verdict for each in probed)):
        warn(verdict)
