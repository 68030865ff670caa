"""What dev queries say of a student in training: which checkpoint is best, and whether it learns its teacher's faults.

A student that agrees ever more with its teacher while the dev metric, which the labels decide, falls is learning what
is wrong with the teacher: teacher hacking (Tiapkin et al. 2025, arXiv:2502.02671). Both curves are in `log.jsonl`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, theilslopes

from rankdistill.evaluation.fidelity import kendall_tau_b
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.runs import Run
from rankdistill.sampling.base import generator
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import StudentModel

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DEPTH = 100  # of a ranking that is measured
AGREEMENT = "dev_agreement"
JUDGED = 10  # of a teacher's documents count as relevant where there are no labels
LEAST_POINTS = 4  # with three, even two perfect trends are chance one time in six
ALPHA = 0.05
LEAST_FALL = 0.005  # of the dev metric over the window


class DevPool:
    """Dev queries and a pool of documents that they are searched in.

    A metric over the pool is not the metric over the collection: it serves to compare checkpoints only.

    Args:
        judge: a split, whose labels judge; or the teacher's lists of the dev queries, where there are none.
        query_ids: those without a judgment are left out.
        rows: of the documents.
    """

    def __init__(
        self,
        collection: Collection,
        judge: str | ScoredLists,
        query_ids: Sequence[str],
        rows: NDArray[np.int64],
        metric: str,
    ) -> None:
        self.qrels, self.metric, self.rows = judgments(collection, judge, query_ids), metric, rows
        self.query_ids = list(self.qrels)
        self.queries = collection.query_texts(self.query_ids)
        self.doc_ids, self.documents = collection.doc_ids(rows), collection.document_texts(rows)
        self.judged_by = "" if isinstance(judge, str) else ", judged by the teacher's order"

    @classmethod
    def build(
        cls,
        collection: Collection,
        judge: str | ScoredLists,
        query_ids: Sequence[str],
        candidates: Sequence[Sequence[str]],
        size: int,
        seed: int,
        metric: str,
    ) -> DevPool:
        """The relevant documents and the candidates, as far as the size allows, then random documents."""
        qrels = judgments(collection, judge, query_ids).values()
        relevant = [[doc_id for doc_id, grade in judged.items() if grade > 0] for judged in qrels]
        # The first of every query, then the second, so that a pool cut to size is as fair to each.
        turns = itertools.zip_longest(*relevant, *candidates)
        doc_ids = [doc_id for turn in turns for doc_id in turn if doc_id is not None]
        rows = collection.doc_rows(list(dict.fromkeys(doc_ids))[:size])
        if len(rows) < min(size, collection.document_count):
            more = generator(seed, 1).permutation(collection.document_count)
            rows = np.concatenate([rows, more[~np.isin(more, rows)][: size - len(rows)]])
        return cls(collection, judge, query_ids, np.sort(rows), metric)

    def __str__(self) -> str:
        documents = f"a pool of {len(self.doc_ids)} documents"
        return f"{self.metric} over {documents}, {len(self.query_ids)} queries{self.judged_by}"

    def evaluate(self, student: StudentModel) -> float:
        scores = student.pool_similarities(self.queries, self.documents, self.rows)
        depth = min(DEPTH, scores.shape[1])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        return self._metric_of(
            Run(
                self.query_ids,
                np.arange(len(best) + 1) * depth,
                [self.doc_ids[column] for column in best.ravel()],
                np.take_along_axis(scores, best, axis=1).ravel(),
            )
        )

    def _metric_of(self, run: Run) -> float:
        return float(evaluate_run(run, self.qrels, [self.metric]).means[self.metric])


class RerankPool(DevPool):
    """Dev queries with the first `depth` candidates of each, which a student that reads pairs re-ranks; no other is
    read."""

    def __init__(
        self,
        collection: Collection,
        judge: str | ScoredLists,
        query_ids: Sequence[str],
        candidates: Sequence[Sequence[str]],
        depth: int,
        metric: str,
    ) -> None:
        qrels = judgments(collection, judge, query_ids)
        firsts = [list(dict.fromkeys(ids))[:depth] for query_id, ids in zip(query_ids, candidates) if query_id in qrels]
        owners = np.repeat(np.arange(len(firsts)), [len(ids) for ids in firsts])
        rows = collection.doc_rows(list(itertools.chain.from_iterable(firsts)))
        distinct, column = np.unique(rows[rows >= 0], return_inverse=True)
        self.pairs = np.stack([owners[rows >= 0], column.ravel()], axis=1)  # [N, 2]: query, document
        super().__init__(collection, judge, query_ids, distinct, metric)

    def __str__(self) -> str:
        return super().__str__().replace("over a pool of", "of re-ranked candidates,")

    def evaluate(self, student: StudentModel) -> float:
        return self.measure(student.pair_scores(self.queries, self.documents, self.rows, self.pairs))

    def measure(self, scores: NDArray[Any]) -> float:
        """Of scores [N] of the pairs."""
        ranked: dict[str, dict[str, float]] = {query_id: {} for query_id in self.query_ids}
        for (query, document), score in zip(self.pairs.tolist(), scores.tolist(), strict=True):
            ranked[self.query_ids[query]][self.doc_ids[document]] = score
        return self._metric_of(Run.from_dict(ranked))


def judgments(collection: Collection, judge: str | ScoredLists, query_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """query id → document id → grade, of those of the queries that are judged, in their order."""
    judged = collection.qrels(judge) if isinstance(judge, str) else teacher_judgments(judge, collection)
    return {query_id: judged[query_id] for query_id in query_ids if query_id in judged}


def teacher_judgments(lists: ScoredLists, collection: Collection) -> dict[str, dict[str, int]]:
    """query id → document id → grade by the teacher's order, for dev queries without labels: 10 for its first, 1 for
    its tenth, 0 for the rest. Of a list that the teacher ties throughout nothing is judged.
    """
    judged = {}
    for number in range(len(lists)):
        query_id, rows, scores, _ = lists[number]
        if len(np.unique(scores)) > 1:
            order = np.argsort(-scores, kind="stable")
            doc_ids = collection.doc_ids(rows[order])
            judged[query_id] = {doc_id: max(0, JUDGED - rank) for rank, doc_id in enumerate(doc_ids)}
    return judged


# -- agreement with the teacher ---------------------------------------------------------------------------------------


class Agreement:
    """Dev queries with documents that the teacher scored: how far a student orders them alike. The lists are few and
    short: all their documents are encoded at each evaluation, and their texts are held."""

    def __init__(self, lists: ScoredLists, collection: Collection) -> None:
        members = [lists[number] for number in range(len(lists))]
        rows, index = np.unique(np.concatenate([member.doc_rows for member in members]), return_inverse=True)
        self.queries = collection.query_texts([member.query_id for member in members])
        self.documents = collection.document_texts(rows)
        self.rows, self.index = rows.astype(np.int64), index.ravel()
        self.teacher = np.concatenate([member.scores for member in members]).astype(np.float64)
        self.offsets = np.concatenate([[0], np.cumsum([len(member.doc_rows) for member in members])])

    def __repr__(self) -> str:
        return f"Agreement({len(self.queries)} queries, {len(self.teacher):,} scored documents)"

    def evaluate(self, student: StudentModel) -> float:
        """Mean Kendall τ-b with the teacher; a list that one side ties throughout counts 0, one it cannot differ on
        (the teacher ties it) is left out. NaN where nothing is left.
        """
        pairs = np.stack([np.repeat(np.arange(len(self.queries)), np.diff(self.offsets)), self.index], axis=1)
        scores = student.pair_scores(self.queries, self.documents, self.rows, pairs)
        tau = kendall_tau_b(self.teacher, scores.astype(np.float64), self.offsets)
        untied = np.array([len(np.unique(self.teacher[a:b])) > 1 for a, b in zip(self.offsets, self.offsets[1:])])
        return float(np.nan_to_num(tau[untied]).mean()) if untied.any() else float("nan")


@dataclass(frozen=True)
class Hacking:
    """An alarm: agreement rose and the dev metric fell over a window of evaluations, both more than by chance.

    Attributes:
        from_step, to_step, evaluations: the window.
        agreement_slope, metric_slope: Theil–Sen slopes, a thousand steps.
        agreement_p, metric_p: one-sided Mann–Kendall tests of the two trends.
        fall: of the dev metric over the window, by its slope.
    """

    from_step: int
    to_step: int
    evaluations: int
    agreement_slope: float
    metric_slope: float
    agreement_p: float
    metric_p: float
    fall: float

    def __str__(self) -> str:
        return (
            f"teacher hacking: from step {self.from_step} to {self.to_step} agreement with the teacher rises "
            f"(p {self.agreement_p:.3f}) while the dev metric falls by {self.fall:.4f} (p {self.metric_p:.3f}); "
            "train for fewer steps, on more queries, or with a loss on labels beside"
        )


def find_hacking(
    steps: Sequence[int], agreement: Sequence[float], metric: Sequence[float], alpha: float = ALPHA
) -> Hacking | None:
    """The alarm at the end of two curves, or None.

    Looked at are the last half of the evaluations and at least four. It fires where the Mann–Kendall test finds
    agreement rising and the metric falling, each with p < `alpha`, and the Theil–Sen line of the metric falls by at
    least .005 over the window: medians of slopes, so that one odd evaluation neither makes nor hides a trend.
    """
    window = max(LEAST_POINTS, math.ceil(len(steps) / 2))
    if len(steps) < window:
        return None
    steps, agreement, metric = steps[-window:], agreement[-window:], metric[-window:]
    rising, falling = (float(theilslopes(values, steps).slope) for values in (agreement, metric))
    rising_p, falling_p = trend_p(agreement), trend_p([-value for value in metric])
    fall = -falling * (steps[-1] - steps[0])
    if not (rising > 0 and rising_p < alpha and falling_p < alpha and fall >= LEAST_FALL):
        return None
    return Hacking(steps[0], steps[-1], window, 1000 * rising, 1000 * falling, rising_p, falling_p, fall)


def last_alarm(history: Sequence[dict[str, Any]], metric: str) -> Hacking | None:
    """The last alarm that rang while a training's log grew; `metric` is the key of the dev metric in its entries."""
    entries = [entry for entry in history if metric in entry and AGREEMENT in entry]
    steps, agreement, quality = ([entry[key] for entry in entries] for key in ("step", AGREEMENT, metric))
    for end in range(len(entries), 0, -1):
        alarm = find_hacking(steps[:end], agreement[:end], quality[:end])
        if alarm is not None:
            return alarm
    return None


def trend_p(values: Sequence[float]) -> float:
    """One-sided p-value of the Mann–Kendall test that values rise: exact, a tie counts against it."""
    # Of equal values a later one is lower.
    ranks = np.argsort(np.lexsort((-np.arange(len(values)), np.asarray(values))))
    return float(kendalltau(np.arange(len(values)), ranks, method="exact", alternative="greater").pvalue)
