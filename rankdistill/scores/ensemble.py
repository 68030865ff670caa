"""Ensembles of teachers as data: several recorded scores become one.

Teachers live on different scales, so each teacher's scores are normalised over the query's list first, then the
teachers are aggregated a document at a time. NaN means "this teacher has no score"; it takes part in no statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from rankdistill.errors import RankdistillError, UsageError

Normalisation = Literal["min_max", "z_score", "rank", "softmax", "calibrated", "none"]
Aggregation = Literal["mean", "weighted", "median", "max"]
Missing = Literal["average", "drop", "error"]
Calibrators = Sequence[Callable[[np.ndarray], np.ndarray]]  # one a teacher: scores -> probabilities
APART = 10.0  # teachers whose spreads differ by more than this do not mix unnormalised
ABSENT = 0.1  # share of the documents that a teacher may lack without a word


class ScoreSource(Protocol):
    """Anything that answers with recorded scores (`TeacherScores`, `Ensemble`)."""

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray: ...


def normalise(scores: np.ndarray, method: Normalisation = "min_max", temperature: float = 1.0) -> np.ndarray:
    """Put one teacher's scores of one list on a common scale.

    - `min_max`: (t − min) / (max − min); all equal: 0.5, no document is preferred
    - `z_score`: (t − mean) / standard deviation (of the population); all equal: 0
    - `rank`: the share of the other documents it beats, a tie counting half; a single document: 0.5
    - `softmax`: exp(t / temperature), summing to 1
    - `none`: as they are

    Args:
        scores: [n], NaN where missing.

    Returns:
        float64 [n], NaN where `scores` is NaN.
    """
    result = np.array(scores, dtype=np.float64)
    present = ~np.isnan(result)
    t = result[present]
    if method == "calibrated":
        raise UsageError("calibrated scores need a calibration of each teacher", fix="fit one on the train split")
    if method not in get_args(Normalisation):
        raise UsageError(f"unknown normalisation {method!r}", fix=", ".join(get_args(Normalisation)))
    if len(t) == 0 or method == "none":
        return result
    if method == "min_max":
        spread = t.max() - t.min()
        result[present] = (t - t.min()) / spread if spread > 0 else 0.5
    elif method == "z_score":
        # Equal scores may have a standard deviation of 1e-17 instead of 0.
        result[present] = (t - t.mean()) / t.std() if t.max() > t.min() else 0.0
    elif method == "rank":
        from scipy.stats import rankdata  # slow to import, seldom wanted

        result[present] = (rankdata(t) - 1) / (len(t) - 1) if len(t) > 1 else 0.5
    else:
        if temperature <= 0:
            raise UsageError(f"the temperature must be above 0, not {temperature}")
        weights = np.exp((t - t.max()) / temperature)
        result[present] = weights / weights.sum()
    return result


def aggregate(scores: np.ndarray, method: Aggregation = "mean", weights: Sequence[float] | None = None) -> np.ndarray:
    """One score a document from several teachers: over those that have one (weights are rescaled to them).

    Args:
        scores: [teachers, n], NaN where missing.
        weights: [teachers], for `weighted`.

    Returns:
        float64 [n], NaN where no teacher has a score.
    """
    scores = np.asarray(scores, dtype=np.float64)
    present = ~np.isnan(scores)
    any_teacher = present.any(axis=0)
    result = np.full(scores.shape[1], np.nan)
    if method in ("mean", "weighted"):
        each = np.ones(len(scores)) if method == "mean" else np.asarray(weights, dtype=np.float64)
        if each.shape != (len(scores),) or each.min() < 0:
            what = f"weighted aggregation of {len(scores)} teachers needs {len(scores)} weights of at least 0"
            raise UsageError(what)
        total = each @ present
        known = total > 0
        result[known] = (each[:, None] * np.where(present, scores, 0)).sum(axis=0)[known] / total[known]
    elif method in ("median", "max"):
        combine = np.nanmedian if method == "median" else np.nanmax
        result[any_teacher] = combine(scores[:, any_teacher], axis=0)
    else:
        raise UsageError(f"unknown aggregation {method!r}", fix=", ".join(get_args(Aggregation)))
    return result


def normalise_members(
    scores: np.ndarray,
    normalisation: Normalisation = "min_max",
    *,
    temperature: float = 1.0,
    missing: Missing = "average",
    calibrators: Calibrators | None = None,
) -> np.ndarray:
    """Each teacher's scores of one list on a common scale, after the rule for missing scores.

    Args:
        scores: [teachers, n], NaN where missing.
        missing: a document that some teachers have no score for is
            `average`: aggregated over the teachers that have one, after each is normalised over what it has;
            `drop`: given no score, and left out before normalising, so that all teachers see the same list;
            `error`: refused.
        calibrators: for the normalisation `calibrated`, one a teacher (see scores/calibration.py).

    Returns:
        float64 [teachers, n], NaN where missing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    absent = np.isnan(scores)
    if missing not in get_args(Missing):
        raise UsageError(f"unknown rule for missing scores {missing!r}", fix=", ".join(get_args(Missing)))
    if missing == "error" and absent.any():
        raise RankdistillError(
            f"{int(absent.any(axis=0).sum())} of {scores.shape[1]} documents lack a score of some teacher",
            fix="score them, or choose the rule average or drop for missing scores",
        )
    if missing == "drop":
        scores = np.where(absent.any(axis=0), np.nan, scores)
    if normalisation == "calibrated" and calibrators is not None:
        if len(calibrators) != len(scores):
            raise UsageError(f"{len(calibrators)} calibrations of {len(scores)} teachers")
        return np.stack([probabilities(row) for probabilities, row in zip(calibrators, scores, strict=True)])
    return np.stack([normalise(row, normalisation, temperature) for row in scores])


def _known(scores: np.ndarray) -> Any:
    """[teachers, n] float64, masked where NaN."""
    return np.ma.masked_array(np.asarray(scores, np.float64), np.isnan(scores))


def disagreement(members: np.ndarray) -> np.ndarray:
    """How far teachers are apart on each document: the standard deviation over those that have a score.

    Args:
        members: [teachers, n] normalised scores, NaN where missing.

    Returns:
        float64 [n]; 0 where one teacher has a score, NaN where none has.
    """
    return np.asarray(_known(members).std(axis=0).filled(np.nan))


@dataclass
class Ensemble:
    """Several teachers' recorded scores as one source (`scores_of`, as `TeacherScores` has it).

    What it is asked for it keeps count of: `problems` says what did not fit.

    Args:
        members: the teachers' scores.
        normalisation, temperature, missing, calibrators: see `normalise_members`.
        aggregation, weights: see `aggregate`.
        scale: the combined score is multiplied by this.
        names: of the teachers, for messages.
    """

    members: Sequence[ScoreSource]
    normalisation: Normalisation = "min_max"
    aggregation: Aggregation = "mean"
    weights: Sequence[float] | None = None
    temperature: float = 1.0
    missing: Missing = "average"
    scale: float = 1.0
    calibrators: Calibrators | None = None
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError("an ensemble needs at least one teacher")
        self.names = list(self.names) or [str(number) for number in range(len(self.members))]
        self._asked = 0
        self._absent, self._squares, self._scored = (np.zeros(len(self.members)) for _ in range(3))

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        """float32 [len(doc_ids)], NaN where there is no score."""
        known = _known(scores := self._members_scores(query_id, doc_ids))
        scored = known.count(axis=1)
        self._asked += len(doc_ids)
        self._absent += len(doc_ids) - scored
        self._squares += (known.var(axis=1) * scored).filled(0.0)
        self._scored += scored
        combined = aggregate(self._normalised(scores), self.aggregation, self.weights)
        return (self.scale * combined).astype(np.float32)

    def disagreement_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        """float32 [len(doc_ids)]: see `disagreement`; of the normalised scores, before `scale`."""
        return disagreement(self._normalised(self._members_scores(query_id, doc_ids))).astype(np.float32)

    def _members_scores(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.stack([member.scores_of(query_id, doc_ids) for member in self.members])

    def _normalised(self, scores: np.ndarray) -> np.ndarray:
        options: Any = {"missing": self.missing, "calibrators": self.calibrators}
        return normalise_members(scores, self.normalisation, temperature=self.temperature, **options)

    def problems(self) -> list[str]:
        """What was wrong with the scores that were asked for so far, and what to do about it."""
        problems = []
        partial = [number for number, absent in enumerate(self._absent) if absent > ABSENT * max(1, self._asked)]
        for number in partial:
            rule = {"average": "scored by the others alone", "drop": "left out"}.get(self.missing, "refused")
            problems.append(
                f"ensemble: teacher {self.names[number]} lacks {int(self._absent[number]):,} of {self._asked:,}"
                f" documents; these are {rule} (missing: {self.missing})"
            )
        if self.normalisation != "none":
            return problems
        if partial and self.missing == "average":
            problems.append(
                "ensemble: without normalisation a document's score depends on which teachers have scored it;"
                " use normalisation: z_score, or missing: drop"
            )
        weights = np.ones(len(self.members))
        if self.aggregation == "weighted" and self.weights:
            weights = np.asarray(self.weights, dtype=np.float64)
        spread = np.sqrt(self._squares / np.maximum(self._scored, 1)) * weights
        known = spread[spread > 0]
        if len(known) > 1 and known.max() > APART * known.min():
            large, small = int(np.argmax(spread)), int(np.argmin(np.where(spread > 0, spread, np.inf)))
            problems.append(
                f"ensemble: teacher {self.names[large]}'s scores spread {known.max() / known.min():.0f} times as far"
                f" within a list as teacher {self.names[small]}'s, which then counts for nothing;"
                " use normalisation: z_score (or min_max), or weights that make up for it"
            )
        return problems
