"""Ensembles of teachers as data: several recorded scores become one.

Teachers live on different scales, so each teacher's scores are normalised over the query's list first, then the
teachers are aggregated a document at a time. NaN means "this teacher has no score"; it takes part in no statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from rankdistill.errors import RankdistillError, UsageError

Normalisation = Literal["min_max", "z_score", "rank", "softmax", "none"]
Aggregation = Literal["mean", "weighted", "median", "max"]
Missing = Literal["average", "drop", "error"]


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
    scores = np.asarray(scores, dtype=np.float64)
    result = scores.copy()
    present = ~np.isnan(scores)
    t = scores[present]
    if method not in ("min_max", "z_score", "rank", "softmax", "none"):
        raise UsageError(f"unknown normalisation {method!r}", fix="min_max, z_score, rank, softmax or none")
    if len(t) == 0 or method == "none":
        return result
    if method == "min_max":
        spread = t.max() - t.min()
        result[present] = (t - t.min()) / spread if spread > 0 else 0.5
    elif method == "z_score":
        # Equal scores may have a standard deviation of 1e-17 instead of 0.
        result[present] = (t - t.mean()) / t.std() if t.max() > t.min() else 0.0
    elif method == "rank":
        ordered = np.sort(t)
        below, up_to = np.searchsorted(ordered, t, "left"), np.searchsorted(ordered, t, "right")
        result[present] = (below + (up_to - below - 1) / 2) / (len(t) - 1) if len(t) > 1 else 0.5
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
        if method == "weighted" and (weights is None or len(weights) != len(scores) or min(weights) < 0):
            raise UsageError(
                f"weighted aggregation of {len(scores)} teachers needs {len(scores)} weights of at least 0"
            )
        each = np.asarray(weights if method == "weighted" else np.ones(len(scores)), dtype=np.float64)[:, None]
        total = (each * present).sum(axis=0)
        known = total > 0
        result[known] = (each * np.where(present, scores, 0)).sum(axis=0)[known] / total[known]
    elif method == "median":
        result[any_teacher] = np.nanmedian(scores[:, any_teacher], axis=0)
    elif method == "max":
        result[any_teacher] = np.nanmax(scores[:, any_teacher], axis=0)
    else:
        raise UsageError(f"unknown aggregation {method!r}", fix="mean, weighted, median or max")
    return result


def combine(
    scores: np.ndarray,
    normalisation: Normalisation = "min_max",
    aggregation: Aggregation = "mean",
    *,
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    missing: Missing = "average",
) -> np.ndarray:
    """Normalise each teacher over the list, then aggregate.

    Args:
        scores: [teachers, n], NaN where missing.
        missing: a document that some teachers have no score for is
            `average`: aggregated over the teachers that have one, after each is normalised over what it has;
            `drop`: given no score, and left out before normalising, so that all teachers see the same list;
            `error`: refused.

    Returns:
        float64 [n], NaN where there is no score.
    """
    scores = np.asarray(scores, dtype=np.float64)
    absent = np.isnan(scores)
    if missing not in ("average", "drop", "error"):
        raise UsageError(f"unknown rule for missing scores {missing!r}", fix="average, drop or error")
    if missing == "error" and absent.any():
        raise RankdistillError(
            f"{int(absent.any(axis=0).sum())} of {scores.shape[1]} documents lack a score of some teacher",
            fix="score them, or choose the rule average or drop for missing scores",
        )
    if missing == "drop":
        scores = np.where(absent.any(axis=0), np.nan, scores)
    return aggregate(np.stack([normalise(row, normalisation, temperature) for row in scores]), aggregation, weights)


class Ensemble:
    """Several teachers' recorded scores as one source (`scores_of`, as `TeacherScores` has it)."""

    def __init__(
        self,
        members: Sequence[ScoreSource],
        normalisation: Normalisation = "min_max",
        aggregation: Aggregation = "mean",
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        missing: Missing = "average",
        scale: float = 1.0,
    ) -> None:
        if not members:
            raise UsageError("an ensemble needs at least one teacher")
        self.members = list(members)
        self.normalisation, self.aggregation, self.weights = normalisation, aggregation, weights
        self.temperature, self.missing, self.scale = temperature, missing, scale

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        """float32 [len(doc_ids)], NaN where there is no score."""
        combined = combine(
            np.stack([member.scores_of(query_id, doc_ids) for member in self.members]),
            self.normalisation,
            self.aggregation,
            weights=self.weights,
            temperature=self.temperature,
            missing=self.missing,
        )
        return (self.scale * combined).astype(np.float32)
