"""What a teacher is worth, before a long scoring is paid for: a few labelled training queries, re-ranked.

The scores go to the store, so that a probe costs nothing where the whole job follows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rankdistill.collections.storage import id_hash
from rankdistill.errors import UsageError
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import compare_values
from rankdistill.progress import duration
from rankdistill.runs import Run
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import Teacher
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection

METRIC = "ndcg@10"
FIRST = "first stage"


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

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f", 95 % {self.low:+.3f} to {self.high:+.3f}"
        text = (
            f"{self.teacher}: {METRIC} {self.value:.3f}, its first stage {self.first:.3f} "
            f"({self.value - self.first:+.3f}{interval}; {self.queries} training queries)"
        )
        if self.pairs_per_second:
            seconds = self.pairs / self.pairs_per_second
            text += f"; {self.pairs_per_second:,.1f} pairs/s, {self.pairs:,} pairs in about {duration(seconds)}"
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
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    count: int,
    store: ScoreStore | None = None,
    split: str = "train",
) -> list[Probe]:
    """Teachers by nDCG@10 of re-ranking the candidates of some labelled queries, best first.

    Args:
        teachers: by the name they are to have.
        candidates: (query_id, doc_ids, _) a query, in the first stage's order.
        count: labelled queries that are asked; which, depends on their ids alone.

    Raises:
        UsageError: none of the candidates' queries has a positive of the split.
    """
    qrels = collection.qrels(split) if split in collection.splits else {}
    lists = [(query_id, list(dict.fromkeys(doc_ids)), scores) for query_id, doc_ids, scores in candidates]
    pairs = sum(len(doc_ids) for _, doc_ids, _ in lists)
    labelled = [item for item in lists if any(grade > 0 for grade in qrels.get(item[0], {}).values())]
    chosen = sorted(labelled, key=lambda item: id_hash(item[0]))[:count]
    if not chosen:
        raise UsageError(
            f"no query of the candidates has a label of split {split!r}: there is nothing to probe with",
            where="--probe",
            fix="mine candidates of labelled training queries (dev and test are for measuring, never for choosing)",
        )
    judged = {query_id: qrels[query_id] for query_id, _, _ in chosen}
    rankings = {FIRST: {query_id: _falling(doc_ids) for query_id, doc_ids, _ in chosen}}
    speeds: dict[str, float | None] = {}
    for name, teacher in teachers.items():
        started = time.monotonic()
        scores = score_candidates(teacher, collection, chosen, store, total=sum(len(item[1]) for item in chosen))
        seconds = time.monotonic() - started
        speeds[name] = scores.scored / max(seconds, 1e-9) if scores.scored and teacher.live else None
        rankings[name] = {
            query_id: _ordered(doc_ids, scores.scores_of(query_id, doc_ids)) for query_id, doc_ids, _ in chosen
        }
    values = {
        name: {METRIC: evaluate_run(Run.from_dict(ranking, name), judged, [METRIC]).per_query[METRIC]}
        for name, ranking in rankings.items()
    }
    found = {
        one.a if one.b == FIRST else one.b: one
        for one in compare_values(values, baseline=FIRST, family="baseline").comparisons
    }
    first = float(values[FIRST][METRIC].mean())
    probes = []
    for name in teachers:
        one = found[name]
        bounds = (one.low, one.high) if one.b == FIRST else (_minus(one.high), _minus(one.low))
        value = float(values[name][METRIC].mean())
        probes.append(Probe(name, len(chosen), value, first, *bounds, one.significant, speeds[name], pairs))
    return sorted(probes, key=lambda one: -one.value)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _falling(doc_ids: Sequence[str]) -> dict[str, float]:
    """Scores that keep this order."""
    return {doc_id: -float(place) for place, doc_id in enumerate(doc_ids)}


def _ordered(doc_ids: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """By score; what has none keeps its place behind the rest, and so do ties among themselves."""
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")
    return _falling([doc_ids[at] for at in order])
