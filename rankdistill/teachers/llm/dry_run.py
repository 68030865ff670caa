"""What scoring with a language model would cost, before anything is paid for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankdistill.artifacts import MANIFEST
from rankdistill.scores.store import ScoreKind, ScoreStore, TeacherScores
from rankdistill.teachers.base import Teacher
from rankdistill.teachers.llm.asking import AskingTeacher, Estimate
from rankdistill.teachers.scoring import lists_key, score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection


class _UnwrittenScores(TeacherScores):
    """A teacher's scores that can be read; what is added is counted and dropped."""

    def add(self, query_id: str, doc_ids: Sequence[str], scores: np.ndarray | Sequence[float]) -> int:
        self.scored += len(doc_ids)
        return len(doc_ids)


class _UnwrittenStore(ScoreStore):
    """The store as it is; a folder that is not there is made elsewhere."""

    def __init__(self, root: Path, elsewhere: str) -> None:
        super().__init__(root)
        self._elsewhere = elsewhere

    def folder(
        self,
        teacher_fingerprint: str,
        collection_fingerprint: str,
        score_kind: ScoreKind,
        describe: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TeacherScores:
        path = self.root / teacher_fingerprint / collection_fingerprint
        if not (path / MANIFEST).is_file():
            made = ScoreStore(self._elsewhere).folder(teacher_fingerprint, collection_fingerprint, score_kind, describe)
            path = made.path
        return _UnwrittenScores(path).check(collection=collection_fingerprint, score_kind=score_kind)


def dry_run(
    teacher: AskingTeacher,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore | None = None,
) -> Estimate:
    """Walk a whole scoring job, counting calls instead of making them; the store and the cache stay as they are.

    What the store or the cache of answers has already costs nothing here, as it would in the job. The teacher object
    is of no use for scoring afterwards.
    """
    estimate = teacher.asking.dry_run()
    with tempfile.TemporaryDirectory() as elsewhere:
        unwritten = _UnwrittenStore((store or ScoreStore()).root, elsewhere)
        estimate.pairs = score_candidates(teacher, collection, candidates, unwritten).scored
    return estimate


def missing_pairs(
    teacher: Teacher,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore | None = None,
) -> int:
    """Candidates that any teacher would have to score: those that the store lacks."""
    key = teacher.fingerprint()
    if teacher.reads_lists:
        candidates = [(query_id, list(dict.fromkeys(doc_ids)), scores) for query_id, doc_ids, scores in candidates]
        key = lists_key(key, candidates)
    with tempfile.TemporaryDirectory() as elsewhere:
        unwritten = _UnwrittenStore((store or ScoreStore()).root, elsewhere)
        scores = unwritten.folder(key, collection.fingerprint, teacher.score_kind)
        return sum(len(scores.missing(query_id, doc_ids)) for query_id, doc_ids, _ in candidates)
