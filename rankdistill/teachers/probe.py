"""What a teacher is worth, before a long scoring is paid for: a few labelled training queries, re-ranked.

The scores go to the store, so that a probe costs nothing where the whole job follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rankdistill.collections.storage import id_hash
from rankdistill.errors import UsageError
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import compare_values
from rankdistill.indexes.sources import RecordedRun
from rankdistill.progress import duration, say, warn
from rankdistill.runs import Run
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import Candidates, Teacher
from rankdistill.teachers.llm.asking import AskingTeacher
from rankdistill.teachers.scoring import missing_pairs, score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.base import Engine

METRIC = "ndcg@10"
FIRST = "first stage"
COUNT = 50  # queries that a run probes with by itself ...
SHARE = 0.25  # ... where they are at most this share of those that it will score
LONG = 180.0  # seconds of scoring from which it does
DEPTH = 1000  # of a first stage, to see in which order it has a list's documents


class Probe(NamedTuple):
    """A teacher's nDCG@10 on candidates, beside that of their own order."""

    teacher: str
    queries: int
    value: float
    first: float
    low: float | None  # 95 % interval of the difference
    high: float | None
    significant: bool  # by a randomisation test, corrected for the number of teachers
    pairs_per_second: float | None  # None where the store had all of them, or there is no speed (recorded scores)
    pairs: int  # of the whole job
    calls: float = 0.0  # of a language model, for all of it, as many a pair as here
    money: float = 0.0  # by the teacher's prices

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f", 95 % {self.low:+.3f} to {self.high:+.3f}"
        text = (
            f"{self.teacher}: {METRIC} {self.value:.3f}, its first stage {self.first:.3f} "
            f"({self.value - self.first:+.3f}{interval}; {self.queries} training queries)"
        )
        if self.pairs_per_second:
            seconds = self.pairs / self.pairs_per_second
            text += f"; {self.pairs_per_second:,.1f} pairs/s, {self.pairs:,} pairs in about {duration(seconds)}"
        if self.calls:
            text += f"; about {self.calls:,.0f} calls" + (f" and {self.money:,.2f} in money" if self.money else "")
        return text

    @property
    def verdict(self) -> str:
        """In words; "" where it is better for certain."""
        if self.significant and self.value > self.first:
            return ""
        if self.value > self.first:
            return f"{self.teacher} is better than its first stage, but that may be chance: probe more queries"
        return f"{self.teacher} ranks no better than its first stage: what it teaches is not worth its scoring"


def probe(
    teachers: Mapping[str, Teacher],
    collection: Collection,
    candidates: Candidates,
    count: int,
    store: ScoreStore | None = None,
    split: str = "train",
    *,
    first: Mapping[str, Sequence[str]] | None = None,
    pairs: Mapping[str, int] | None = None,
) -> list[Probe]:
    """Teachers by nDCG@10 of re-ranking the candidates of some labelled queries, best first.

    Args:
        teachers: by the name they are to have.
        count: labelled queries that are asked; which, depends on their ids alone.
        first: the first stage's order of each query's candidates, where they come in another.
        pairs: of the whole job, a teacher; the candidates' unless given.

    Raises:
        UsageError: none of the candidates' queries has a positive of the split.
    """
    qrels = collection.qrels(split) if split in collection.splits else {}
    lists = [(query_id, list(dict.fromkeys(doc_ids)), scores) for query_id, doc_ids, scores in candidates]
    every = sum(len(doc_ids) for _, doc_ids, _ in lists)
    labelled = [item for item in lists if any(grade > 0 for grade in qrels.get(item[0], {}).values())]
    chosen = sorted(labelled, key=lambda item: id_hash(item[0]))[:count]
    if not chosen:
        raise UsageError(
            f"no query of the candidates has a label of split {split!r}: there is nothing to probe with",
            where="--probe",
            fix="mine candidates of labelled training queries (dev and test are for measuring, never for choosing)",
        )
    judged = {query_id: qrels[query_id] for query_id, _, _ in chosen}
    values: dict[str, dict[str, np.ndarray]] = {}

    def rank(name: str, orders: Mapping[str, Sequence[str]]) -> float:
        ranked = {query_id: {d: -float(place) for place, d in enumerate(ids)} for query_id, ids in orders.items()}
        values[name] = {METRIC: evaluate_run(Run.from_dict(ranked, name), judged, [METRIC]).per_query[METRIC]}
        return float(values[name][METRIC].mean())

    start = rank(FIRST, {query_id: first[query_id] if first else doc_ids for query_id, doc_ids, _ in chosen})
    rows: dict[str, dict[str, Any]] = {}
    for name, teacher in teachers.items():
        started, before = time.monotonic(), _spent(teacher)
        scores = score_candidates(teacher, collection, chosen, store, total=sum(len(item[1]) for item in chosen))
        seconds = max(time.monotonic() - started, 1e-9)
        job = (pairs or {}).get(name, every)
        calls, money = (np.array(_spent(teacher)) - before) * job / max(scores.scored, 1)
        orders = {query_id: _ordered(ids, scores.scores_of(query_id, ids)) for query_id, ids, _ in chosen}
        rows[name] = {
            "value": rank(name, orders),
            "pairs_per_second": scores.scored / seconds if scores.scored and teacher.live else None,
            "pairs": job,
            "calls": float(calls),
            "money": float(money),
        }
    for test in compare_values(values, baseline=FIRST, family="baseline").comparisons:
        bounds = (test.low, test.high)
        if turned := test.a == FIRST:  # the difference is that of the first stage
            bounds = (test.high and -test.high, test.low and -test.low)
        rows[test.b if turned else test.a] |= {"low": bounds[0], "high": bounds[1], "significant": test.significant}
    probes = [Probe(name, len(chosen), first=start, **row) for name, row in rows.items()]
    return sorted(probes, key=lambda probe: -probe.value)


def probe_long(
    teachers: Mapping[str, Teacher],
    collection: Collection,
    candidates: Callable[[], Candidates],
    query_ids: Sequence[str],
    first: Engine | RecordedRun,
    store: ScoreStore,
    split: str = "train",
) -> list[Probe]:
    """Probe those teachers whose scoring will take long, or asks a language model; each is said in a line.

    The lists are some of the job's own, so that nothing is paid twice: their scores, or the answers that they are made
    of, are there when it comes to them. How long it takes is told by three lists. The first stage shows in which order
    it has the lists' documents.
    """
    qrels = collection.qrels(split)
    labelled = [query_id for query_id in query_ids if any(grade > 0 for grade in qrels.get(query_id, {}).values())]
    chosen = set(sorted(labelled, key=id_hash)[:COUNT])
    if len(chosen) < COUNT or len(query_ids) < COUNT / SHARE:
        return []
    lists = [item for item in candidates() if item[0] in chosen]
    jobs: dict[str, int] = {}
    for name, teacher in teachers.items():
        missing = missing_pairs(teacher, collection, candidates(), store)
        if missing and (
            isinstance(teacher, AskingTeacher) or missing > LONG * _speed(teacher, collection, lists, store)
        ):
            jobs[name] = missing
    if not jobs:
        return []
    orders = first_orders(first, collection, lists)
    asked = {name: teachers[name] for name in jobs}
    probes = probe(asked, collection, lists, COUNT, store, split, first=orders, pairs=jobs)
    for result in probes:
        say(f"probe: {result}")
    if len(probes) == len(teachers) and probes[0].verdict:  # of several, the best
        warn(probes[0].verdict)
    return probes


def _speed(
    teacher: Teacher,
    collection: Collection,
    lists: Sequence[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore,
) -> float:
    """Pairs a second; infinite where the store has them: an interrupted job has been probed."""
    score_candidates(teacher, collection, lists[:1], store)  # the model is loaded
    started = time.monotonic()
    scored = score_candidates(teacher, collection, lists[1:4], store).scored
    return scored / max(time.monotonic() - started, 1e-9) if scored else math.inf


def first_orders(
    first: Engine | RecordedRun, collection: Collection, lists: Sequence[tuple[str, Sequence[str], np.ndarray]]
) -> dict[str, list[str]]:
    """query id → its documents as a first stage orders them; those that it does not find come last, by chance."""
    ids = [query_id for query_id, _, _ in lists]
    depth = min(DEPTH, collection.document_count)
    if isinstance(first, RecordedRun):
        results = first.recorded(ids, depth)
    else:
        results = first.search(collection.query_texts(ids), depth)
    orders = {}
    for (query_id, doc_ids, _), hits in zip(lists, results, strict=True):
        ranks = {row: rank for rank, row in enumerate(hits.rows.tolist())}
        rows = dict(zip(doc_ids, collection.doc_rows(doc_ids).tolist(), strict=True))
        orders[query_id] = sorted(rows, key=lambda doc_id: (ranks.get(rows[doc_id], depth), id_hash(doc_id)))
    return orders


def named(teachers: Iterable[Teacher]) -> dict[str, Teacher]:
    """Each by its model, or its type, numbered where that is there twice."""
    by_name: dict[str, Teacher] = {}
    for teacher in teachers:
        name = str(teacher.describe().get("model") or teacher.type)
        by_name[name if name not in by_name else f"{name} ({len(by_name) + 1})"] = teacher
    return by_name


def _spent(teacher: Teacher) -> tuple[float, float]:
    """Calls and money so far."""
    budget = teacher.asking.budget if isinstance(teacher, AskingTeacher) else None
    return (float(budget.spent.calls), budget.money(budget.spent)) if budget is not None else (0.0, 0.0)


def _ordered(doc_ids: Sequence[str], scores: np.ndarray) -> list[str]:
    """By score; what has none keeps its place behind the rest, and so do ties among themselves."""
    return [doc_ids[at] for at in np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")]
