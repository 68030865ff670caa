"""Does the student learn its teacher, or its teacher's faults? Agreement on dev lists, and an alarm.

A student that agrees ever more with its teacher while the dev metric, which the labels decide, falls is learning what
is wrong with the teacher: teacher hacking (Tiapkin et al. 2025, arXiv:2502.02671). Both curves are in `log.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import kendalltau, theilslopes

from rankdistill.evaluation.fidelity import kendall_tau_b
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import StudentModel

if TYPE_CHECKING:
    from rankdistill.collections import Collection

AGREEMENT = "dev_agreement"
JUDGED = 10  # of a teacher's documents count as relevant where there are no labels
LEAST_POINTS = 4  # with three, even two perfect trends are chance one time in six
ALPHA = 0.05
LEAST_FALL = 0.005  # of the dev metric over the window


class Agreement:
    """Dev queries with documents that the teacher scored: how far a student orders them alike.

    Args:
        lists: few and short: all their documents are encoded at each evaluation, and their texts are held.
    """

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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    """The last alarm that rang while a training's log grew.

    Args:
        history: entries of the log; those with both figures count.
        metric: the key of the dev metric.
    """
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
