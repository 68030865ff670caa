"""Calibration: a teacher's scores as probabilities of relevance, fitted on labels, and how far off they were before.

Labels are those of the training queries: a calibration that has seen dev or test judgments would leak them into every
list it scores. Errors "after" are cross-fitted: each query's probabilities come from a fit without that query.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankdistill.collections.storage import id_hash
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import warn
from rankdistill.scores.store import ScoreKind

Method = Literal["platt", "isotonic"]
Negatives = Literal["auto", "judged", "unjudged"]
Floats = NDArray[np.float64]
BINS = 15
FOLDS = 5


@dataclass(frozen=True)
class Platt:
    """p = 1 / (1 + exp(-(slope · score + intercept))): keeps the order of a list (Platt 1999)."""

    slope: float
    intercept: float

    def __call__(self, scores: NDArray[Any]) -> Floats:
        """Probabilities, float64 of the same shape; NaN stays NaN."""
        return _sigmoid(self.slope * np.asarray(scores, np.float64) + self.intercept)


@dataclass(frozen=True)
class Isotonic:
    """A rising step-wise linear map through `points` (score, probability): any rising shape, but it ties documents.

    Pool-adjacent-violators (Zadrozny and Elkan 2002); outside the fitted scores the outermost value holds.
    """

    scores: tuple[float, ...]
    values: tuple[float, ...]

    def __call__(self, scores: NDArray[Any]) -> Floats:
        return np.interp(np.asarray(scores, np.float64), self.scores, self.values)


Calibrator = Platt | Isotonic


def fit_platt(scores: NDArray[Any], labels: NDArray[Any]) -> Platt:
    """Logistic regression of labels [n] (0 or 1) on scores [n], to Platt's smoothed targets, which keep it finite
    where the scores separate the labels. All scores equal: the share of relevant ones, slope 0."""
    from scipy.optimize import minimize

    scores, labels = _checked(scores, labels)
    mean, deviation = float(scores.mean()), float(scores.std())
    if scores.max() == scores.min():
        deviation = 0.0  # equal scores may have a standard deviation of 1e-17
    x = (scores - mean) / deviation if deviation > 0 else np.zeros_like(scores)
    positives = float(labels.sum())
    negatives = len(labels) - positives
    target = np.where(labels > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(parameters: Floats) -> tuple[float, Floats]:
        z = parameters[0] * x + parameters[1]
        residual = _sigmoid(z) - target
        value = (np.logaddexp(0.0, z) - target * z).mean()
        return float(value), np.array([(residual * x).mean(), residual.mean()])

    start = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    slope, intercept = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    slope = slope / deviation if deviation else 0.0
    return Platt(float(slope), float(intercept - slope * mean))


def fit_isotonic(scores: NDArray[Any], labels: NDArray[Any]) -> Isotonic:
    """The rising map of scores [n] with the least squared error to labels [n] (0 or 1); equal scores get one value."""
    from scipy.optimize import isotonic_regression

    scores, labels = _checked(scores, labels)
    points, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    means = np.bincount(place, labels) / counts
    values = np.clip(isotonic_regression(means, weights=counts).x, 0.0, 1.0)
    # Only the ends of each plateau decide the map.
    ends = np.ones(len(values), bool)
    ends[1:-1] = (values[1:-1] != values[:-2]) | (values[1:-1] != values[2:])
    return Isotonic(tuple(points[ends].tolist()), tuple(values[ends].tolist()))


def fit(scores: NDArray[Any], labels: NDArray[Any], method: Method = "platt") -> Calibrator:
    """`fit_platt` or `fit_isotonic`.

    Raises:
        UsageError: another method.
        RankdistillError: no relevant or no other document; a NaN or infinite score.
    """
    if method not in ("platt", "isotonic"):
        raise UsageError(f"unknown calibration {method!r}", fix="platt or isotonic")
    return fit_platt(scores, labels) if method == "platt" else fit_isotonic(scores, labels)


def _checked(scores: NDArray[Any], labels: NDArray[Any]) -> tuple[Floats, Floats]:
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise UsageError(f"scores of shape {list(scores.shape)} and labels of shape {list(labels.shape)}")
    if not np.isfinite(scores).all():
        raise RankdistillError("a score to calibrate is NaN or infinite", fix="leave missing pairs out")
    if not 0 < labels.sum() < len(labels):
        raise RankdistillError(
            f"calibration needs both kinds of documents: {int(labels.sum()):,} of {len(labels):,} pairs are relevant",
            fix="score more candidates of the training queries, mined ones beside labelled ones",
        )
    return scores, labels


class Bin(NamedTuple):
    """Pairs whose probability lies in one bin: how many, what was said on average, and what share is relevant."""

    pairs: int
    probability: float
    relevant: float


def reliability(probabilities: NDArray[Any], labels: NDArray[Any], bins: int = BINS) -> list[Bin]:
    """The reliability table: bins of equal width over [0, 1] that hold any pair, in rising order.

    Args:
        probabilities, labels: [n]; a probability on an edge belongs to the bin above, 1 to the last.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    said = np.bincount(place, probabilities, bins)
    relevant = np.bincount(place, labels, bins)
    return [Bin(int(n), float(p / n), float(r / n)) for n, p, r in zip(counts, said, relevant, strict=True) if n]


def calibration_error(table: Iterable[Bin]) -> float:
    """Expected calibration error: mean |probability - share relevant| over pairs (Naeini et al. 2015)."""
    pairs, said, relevant = np.array(list(table)).reshape(-1, 3).T
    return float(np.average(abs(said - relevant), weights=pairs)) if len(pairs) else float("nan")


def raw_probabilities(scores: NDArray[Any], kind: ScoreKind) -> Floats:
    """What raw scores say if they are read as probabilities, for the error before calibration.

    Logits through the sigmoid; probabilities, and reciprocal ranks, as they are; cosines as (1 + s) / 2; what lies
    outside [0, 1] then (dot products, ranks) is cut to it.
    """
    scores = np.asarray(scores, np.float64)
    if kind == "logit":
        return _sigmoid(scores)
    return np.clip((1 + scores) / 2 if kind == "similarity" else scores, 0.0, 1.0)


def _sigmoid(z: Floats) -> Floats:
    from scipy.special import expit

    return np.asarray(expit(z), np.float64)


@dataclass(frozen=True)
class Calibration:
    """A fitted map (scores → probabilities), what it was fitted on, and what was measured of it.

    Attributes:
        negatives: whether documents judged not relevant were the negatives, or unjudged ones.
        error_before, error_after: expected calibration error of raw and of cross-fitted calibrated scores.
        before, after: their reliability tables.
    """

    calibrator: Calibrator
    method: Method
    negatives: Literal["judged", "unjudged"]
    queries: int
    pairs: int
    relevant: int
    error_before: float = field(init=False)
    error_after: float = field(init=False)
    before: list[Bin] = field(repr=False)
    after: list[Bin] = field(repr=False)

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            object.__setattr__(self, f"error_{name}", calibration_error(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("before", "after"):
            values[name] = [row._asdict() for row in getattr(self, name)]
        return values

    def __str__(self) -> str:
        of = "judged not relevant" if self.negatives == "judged" else "unjudged, taken as not relevant"
        lines = [
            f"{self.method} on {self.pairs:,} pairs of {self.queries:,} training queries:"
            f" {self.relevant:,} relevant, {self.pairs - self.relevant:,} {of}",
            f"expected calibration error: {self.error_before:.4f} before, {self.error_after:.4f} after (cross-fitted)",
        ]
        for name, table in (("before", self.before), ("after", self.after)):
            lines.append(f"{name:9}{'pairs':>10}{'probability':>14}{'relevant':>12}")
            lines += [f"{'':9}{row.pairs:10,}{row.probability:14.4f}{row.relevant:12.4f}" for row in table]
        return "\n".join(lines)


def calibrator_from(values: Mapping[str, Any]) -> Calibrator:
    """What `to_json` wrote of a calibrator."""
    if "slope" in values:
        return Platt(float(values["slope"]), float(values["intercept"]))
    return Isotonic(tuple(map(float, values["scores"])), tuple(map(float, values["values"])))


def calibrate(
    pairs: Iterable[tuple[str, Sequence[str], np.ndarray]],
    qrels: Mapping[str, Mapping[str, int]],
    kind: ScoreKind,
    method: Method = "platt",
    negatives: Negatives = "auto",
) -> Calibration:
    """Fit scores to labels: relevance above 0 is relevant. Memory: 24 bytes a pair.

    Args:
        pairs: (query_id, doc_ids, scores), as a store of scores gives them; NaN is left out. Queries that `qrels` does
            not know are left out: that keeps dev and test queries apart.
        qrels: of the training queries.
        negatives: `judged` documents of relevance 0, or scored `unjudged` documents of the same queries (many
            collections judge relevant ones alone; some of them are relevant, so probabilities come out too low);
            `auto`: judged ones where there are any, else unjudged ones, with a warning.

    Raises:
        RankdistillError: no relevant or no other document is left; an infinite score.
    """
    queries: dict[str, int] = {}
    columns = [np.empty((3, 0))]  # of each list: scores, relevance (-1: unjudged), the query's number
    for query_id, doc_ids, scores in pairs:
        if (judged := qrels.get(query_id)) is not None:
            relevance = [judged.get(doc_id, -1) for doc_id in doc_ids]
            columns.append(np.stack([scores, relevance, [queries.setdefault(query_id, len(queries))] * len(doc_ids)]))
    x, relevance, query = np.concatenate(columns, axis=1)
    keep = ~np.isnan(x)
    chosen = negatives
    if chosen == "auto":
        chosen = "judged" if (relevance[keep] == 0).any() else "unjudged"
    if chosen == "judged":
        keep &= relevance != -1
    if not (relevance[keep] > 0).any():
        raise RankdistillError(
            "none of the scored pairs is labelled relevant",
            fix="score candidates of the training queries, with their labelled documents (mine --positives)",
        )
    if chosen == "unjudged" and negatives == "auto":
        warn("calibration: no scored document is judged not relevant; unjudged ones are taken as not relevant")
    x, y, query = x[keep], (relevance[keep] > 0).astype(np.float64), query[keep].astype(np.int64)
    fold = np.array([id_hash(query_id) % FOLDS for query_id in queries])[query]
    before = reliability(raw_probabilities(x, kind), y)
    after = reliability(_cross_fitted(x, y, fold, method), y)
    fitted = fit(x, y, method)
    return Calibration(fitted, method, chosen, len(np.unique(query)), len(x), int(y.sum()), before, after)


def _cross_fitted(scores: Floats, labels: Floats, fold: NDArray[Any], method: Method) -> Floats:
    """Each query's probabilities by a fit to the other folds' queries."""
    result = np.empty_like(scores)
    for number in range(FOLDS):
        held = fold == number
        rest = ~held if 0 < labels[~held].sum() < (~held).sum() else slice(None)
        # All of them, which flatters, where there are too few queries to leave any out.
        result[held] = fit(scores[rest], labels[rest], method)(scores[held])
    return result
