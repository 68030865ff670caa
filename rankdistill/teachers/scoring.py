"""The scoring loop: candidate lists through a teacher into the store, only what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import numpy as np

from rankdistill.artifacts import MANIFEST, fingerprint, locked
from rankdistill.progress import progress, say, warn
from rankdistill.scores.store import ScoreStore, TeacherScores
from rankdistill.teachers.base import Teacher, TextList
from rankdistill.teachers.ensemble import EnsembleTeacher
from rankdistill.teachers.llm.asking import AskingTeacher, Health
from rankdistill.teachers.reports import keep_report

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def score_candidates(
    teacher: Teacher,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore | None = None,
    *,
    total: int | None = None,
    chunk_pairs: int = 4096,
) -> TeacherScores:
    """Score what the store lacks of the candidates; memory is one chunk.

    After a kill the same call goes on where it stopped: only the chunk in flight is scored again.

    Where a document's score depends on its list (`Teacher.reads_lists`), the store's key covers all the candidates
    too, ids and order: scores made in other lists are never mixed in, and a list is scored whole or found whole. The
    ids of all candidates are then held in memory. What the teacher counted is added to the folder's report.

    Args:
        candidates: (query_id, doc_ids, _) a query, each query once; one query at a time is held.
        store: by default the one in the user's cache folder.
        total: candidate pairs, for the time left.
        chunk_pairs: pairs handed to the teacher at once: sorted by length together, texts tokenised once.

    Returns:
        The scores; `.scored` pairs are new, `.reused` were in the store, `.unscored` got none from this teacher.
    """
    store = store or ScoreStore()
    health = Health()
    if isinstance(teacher, AskingTeacher):
        teacher.asking.use_store(store.root)
        teacher.asking.health = health
    key = teacher.fingerprint()
    if teacher.reads_lists:
        candidates = [(query_id, list(dict.fromkeys(doc_ids)), np.empty(0)) for query_id, doc_ids, _ in candidates]
        key = lists_key(key, candidates)
    scores = store.folder(
        key,
        collection.fingerprint,
        teacher.score_kind,
        describe={"teacher": teacher.describe(), "collection": collection.name},
    )
    if isinstance(teacher, AskingTeacher):
        warn_of_another_server(teacher, scores)
    unknown = 0
    busy = "score: another process is scoring with this teacher: its scores are waited for, not paid for twice"
    with (
        locked(scores.path / "scoring", busy),
        scores,
        _reporting(teacher, scores),
        progress("scoring", total, "pairs") as bar,
    ):
        scores.refresh()
        chunk: list[tuple[str, list[str]]] = []
        waiting = 0
        prepared = False

        def score_chunk() -> None:
            nonlocal waiting, prepared
            if not prepared:  # not before something is to be scored: it may take long
                teacher.prepare(collection, prepared_folder(store))
                prepared = True
            queries = collection.query_texts([query_id for query_id, _ in chunk])
            rows = np.concatenate([np.asarray(collection.doc_rows(doc_ids)) for _, doc_ids in chunk])
            texts = iter(collection.document_texts(rows))
            lists = [
                TextList(query_id, query, doc_ids, [next(texts) for _ in doc_ids], collection)
                for query, (query_id, doc_ids) in zip(queries, chunk, strict=True)
            ]
            done = 0
            for query_id, doc_ids, values in teacher.score(lists):
                scores.add(query_id, doc_ids, values)
                done += len(doc_ids)
            scores.unscored += waiting - done
            bar.advance(waiting)
            chunk.clear()
            waiting = 0
            scores.refresh()  # another process may have scored what comes next

        for query_id, given, _ in candidates:
            doc_ids = list(dict.fromkeys(given))
            absent = scores.missing(query_id, doc_ids)
            scores.reused += len(doc_ids) - len(absent)
            health.earlier += len(absent) < len(doc_ids)
            bar.advance(len(doc_ids) - len(absent))
            known = (
                [d for d, row in zip(absent, collection.doc_rows(absent), strict=True) if row >= 0] if absent else []
            )
            unknown += len(absent) - len(known)
            if teacher.reads_lists and len(absent) < len(doc_ids):
                known = []  # its list is scored: what has no score now got none
            if waiting and waiting + len(known) > chunk_pairs:
                score_chunk()  # a list is never torn: a listwise teacher reads it whole
            if known:
                chunk.append((query_id, known))
                waiting += len(known)
        if chunk:
            score_chunk()
    if unknown:
        warn(f"{unknown:,} candidates are not in {collection.name} and were not scored")
    if scores.unscored:
        warn(f"the teacher has no score for {scores.unscored:,} of the candidates asked for")
    if isinstance(teacher, AskingTeacher) and teacher.asking.estimate is None:
        for line in health.lines():
            warn(line)
        say(f"spent: {teacher.asking.budget.line()}")
        health.finish()
    return scores


def warn_of_another_server(teacher: AskingTeacher, scores: TeacherScores) -> None:
    """Servers name models freely (`default`): where no revision tells two apart, they would share scores."""
    now = teacher.asking.backend.describe()
    try:
        then = json.loads((scores.path / MANIFEST).read_text(encoding="utf-8"))["description"]["teacher"]["backend"]
        old, new = (urlsplit(str(one["base_url"])).netloc for one in (then, now))
    except (OSError, ValueError, KeyError, TypeError):
        return
    if old != new and not now.get("revision"):
        warn(
            f"these scores were begun with {now['model']} at {old}, and now it is at {new}: if that is another model, "
            "give backend.revision"
        )


def prepared_folder(store: ScoreStore) -> Path:
    """Where teachers keep what they prepare for a collection."""
    return store.root / "prepared"


def lists_key(teacher: str, candidates: Iterable[tuple[str, Sequence[str], np.ndarray]]) -> str:
    """The store's key for a teacher (by fingerprint) whose scores depend on the lists: it covers all ids in order."""
    return fingerprint([teacher, "lists", [[query_id, *doc_ids] for query_id, doc_ids, _ in candidates]])


@contextmanager
def _reporting(teacher: Teacher, scores: TeacherScores) -> Iterator[None]:
    """Keep beside the scores what the teacher counted, and say it; also where the work ends early."""
    try:
        yield
    finally:
        report = teacher.take_report()
        if report and not (isinstance(teacher, AskingTeacher) and teacher.asking.estimate is not None):
            for line in teacher.report_lines(keep_report(scores.path, report)):
                say(line)


def score_list(teacher: Teacher | EnsembleTeacher, item: TextList) -> np.ndarray:
    """Score one list now, past the store: float32 [len(item.doc_ids)], NaN where the teacher has no score."""
    ensemble = teacher if isinstance(teacher, EnsembleTeacher) else None
    members = ensemble.members if ensemble else [cast(Teacher, teacher)]
    given = [_Given(member, item) for member in members]
    source = ensemble.combine(given) if ensemble else given[0]
    return source.scores_of(item.query_id, item.doc_ids)


class _Given:
    """A teacher's scores of one list, as the combination of several reads them."""

    def __init__(self, teacher: Teacher, item: TextList) -> None:
        self._scores: dict[str, float] = {}
        for _, doc_ids, scores in teacher.score([item]):
            self._scores.update(zip(doc_ids, scores.tolist(), strict=True))

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.array([self._scores.get(doc_id, np.nan) for doc_id in doc_ids], dtype=np.float32)
