from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.ensemble import Ensemble, aggregate, disagreement, normalise, normalise_members

NORMALISATIONS = ("min_max", "z_score", "rank", "softmax", "none")


class Recorded:
    """Scores of one list, as a teacher's folder gives them."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.array([self.scores.get(f"{query_id}/{doc_id}", np.nan) for doc_id in doc_ids], np.float32)


def combine(scores: np.ndarray, normalisation: Any = "min_max", **settings: Any) -> np.ndarray:
    """What an ensemble makes of recorded scores [teachers, documents]."""
    names = [f"d{place}" for place in range(scores.shape[1])]
    members = [Recorded({f"q/{name}": value for name, value in zip(names, row, strict=True)}) for row in scores]
    return Ensemble(members, normalisation, **settings).scores_of("q", names)


def slowly_normalised(t: list[float], method: str, temperature: float) -> list[float]:
    n, mean = len(t), math.fsum(t) / len(t)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in t) / n)
    if method == "min_max":
        return [(x - min(t)) / (max(t) - min(t)) for x in t]
    if method == "z_score":
        return [(x - mean) / deviation for x in t]
    if method == "rank":
        return [sum((x > y) + (x == y) / 2 for j, y in enumerate(t) if j != i) / (n - 1) for i, x in enumerate(t)]
    if method == "softmax":
        total = math.fsum(math.exp(x / temperature) for x in t)
        return [math.exp(x / temperature) / total for x in t]
    return t


@pytest.mark.parametrize("method", NORMALISATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_normalisations_equal_slow_loops(method: str, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=9).round(1)
    with_gaps = np.insert(scores, [2, 5], np.nan)
    result = normalise(with_gaps, method, 0.7)  # type: ignore[arg-type]
    assert np.isnan(result[[2, 6]]).all()
    np.testing.assert_allclose(
        result[~np.isnan(with_gaps)], slowly_normalised(scores.tolist(), method, 0.7), rtol=1e-12
    )


@pytest.mark.parametrize("method", NORMALISATIONS)
@pytest.mark.parametrize("scores", [[0.1, 0.1, 0.1], [3.0], [], [np.nan, np.nan], [1e30, 1e30], [-1e4, 1e4]])
def test_degenerate_lists_stay_finite_and_prefer_no_equal_document(method: str, scores: list[float]) -> None:
    with np.errstate(all="raise", under="ignore"):
        result = normalise(np.array(scores), method)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.isnan(result), np.isnan(scores))
    known = result[~np.isnan(result)]
    assert np.isfinite(known).all()
    if len(set(scores)) == 1:
        assert len(set(known.tolist())) <= 1


@pytest.mark.parametrize("method", ["mean", "weighted", "median", "max"])
def test_aggregations_equal_slow_loops_over_the_teachers_that_have_a_score(method: str) -> None:
    random = np.random.default_rng(1)
    scores = random.normal(size=(4, 12))
    scores[random.random(scores.shape) < 0.3] = np.nan
    scores[:, 5] = np.nan
    weights = [0.1, 2.0, 1.0, 0.4]
    expected = []
    for column in scores.T:
        have = [(w, x) for w, x in zip(weights, column.tolist(), strict=True) if not math.isnan(x)]
        values = [x for _, x in have]
        if not have:
            expected.append(math.nan)
        elif method == "weighted":
            expected.append(sum(w * x for w, x in have) / sum(w for w, _ in have))
        else:
            rule = {"mean": statistics.fmean, "median": statistics.median, "max": max}[method]
            expected.append(rule(values))
    np.testing.assert_allclose(aggregate(scores, method, weights), expected, rtol=1e-12)  # type: ignore[arg-type]


def test_rules_for_missing_scores() -> None:
    scores = np.array([[0.0, 5.0, 10.0, np.nan], [1.0, np.nan, 3.0, 2.0]])
    np.testing.assert_allclose(combine(scores), [0.0, 0.5, 1.0, 0.5])
    np.testing.assert_allclose(combine(scores, missing="drop"), [0.0, np.nan, 1.0, np.nan])
    with pytest.raises(RankdistillError, match="2 of 4 documents"):
        combine(scores, missing="error")


def test_teachers_on_different_scales_count_alike_after_normalising() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 8))
    for method in ("min_max", "z_score", "rank"):
        stretched = combine(scores * [[1.0], [1000.0]] + [[0.0], [7.0]], method)
        np.testing.assert_allclose(stretched, combine(scores, method), atol=1e-5)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError):
        normalise(np.ones(2), "minmax")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="weights"):
        aggregate(np.ones((2, 3)), "weighted", [1.0])
    with pytest.raises(UsageError, match="temperature"):
        normalise(np.ones(2), "softmax", 0.0)
    with pytest.raises(UsageError):
        Ensemble([])


def test_disagreement_equals_a_slow_loop_and_is_zero_with_one_teacher() -> None:
    random = np.random.default_rng(3)
    members = random.normal(size=(3, 10))
    members[random.random(members.shape) < 0.4] = np.nan
    members[:, 0] = np.nan
    expected = []
    for column in members.T:
        have = [value for value in column.tolist() if not math.isnan(value)]
        expected.append(statistics.pstdev(have) if have else math.nan)
    np.testing.assert_allclose(disagreement(members), expected, atol=1e-12)
    assert (disagreement(members[:1, 1:])[~np.isnan(members[0, 1:])] == 0).all()
    # Teachers that order and space a list alike agree, whatever their scale.
    scores = random.normal(size=8)
    np.testing.assert_allclose(
        disagreement(normalise_members(np.stack([scores, 40 * scores + 3]), "z_score")), 0, atol=1e-12
    )


def test_an_ensemble_gives_the_disagreement_of_what_it_combines() -> None:
    first = Recorded({"q/a": 0.0, "q/b": 1.0, "q/c": 2.0})
    second = Recorded({"q/a": 300.0, "q/b": 200.0, "q/c": 100.0})
    ensemble = Ensemble([first, second], "min_max", scale=7.0)
    np.testing.assert_allclose(ensemble.scores_of("q", ["a", "b", "c"]), [3.5, 3.5, 3.5])
    np.testing.assert_allclose(ensemble.disagreement_of("q", ["a", "b", "c", "d"]), [0.5, 0.0, 0.5, np.nan])
    assert ensemble.disagreement_of("q", ["a"]).dtype == np.float32
    assert (Ensemble([first]).disagreement_of("q", ["a", "c"]) == 0).all()


def test_calibrated_members_are_combined_as_probabilities() -> None:
    scores = np.array([[0.0, 2.0, np.nan], [10.0, -10.0, 0.0]])
    halves = [lambda row: row / 2, lambda row: (row + 10) / 20]
    np.testing.assert_allclose(combine(scores, "calibrated", calibrators=halves), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(combine(scores, "calibrated", calibrators=halves, missing="drop"), [0.5, 0.5, np.nan])
    with pytest.raises(UsageError, match="1 calibrations of 2"):
        combine(scores, "calibrated", calibrators=halves[:1])
    with pytest.raises(UsageError, match="calibration of each teacher"):
        combine(scores, "calibrated")


@pytest.mark.parametrize(
    ("stretch", "weights", "warned"), [(50.0, None, True), (5.0, None, False), (50.0, [10.0, 1.0], False)]
)
def test_scales_far_apart_are_warned_of_without_normalisation(
    stretch: float, weights: list[float] | None, warned: bool
) -> None:
    random = np.random.default_rng(0)
    names = [f"d{number}" for number in range(30)]
    members = [
        Recorded({f"q{query}/{name}": factor * random.normal() for query in range(5) for name in names})
        for factor in (1.0, stretch)
    ]
    aggregation = "mean" if weights is None else "weighted"
    plain = Ensemble(members, "none", aggregation, weights, names=["small", "large"])  # type: ignore[arg-type]
    scaled = Ensemble(members, "z_score", aggregation, weights)  # type: ignore[arg-type]
    for query in range(5):
        plain.scores_of(f"q{query}", names)
        scaled.scores_of(f"q{query}", names)
    assert scaled.problems() == []
    assert bool(plain.problems()) == warned
    if warned:
        assert "large" in plain.problems()[0] and "z_score" in plain.problems()[0]


def test_a_teacher_that_covers_half_of_the_lists_is_named_with_the_rule() -> None:
    names = [f"d{number}" for number in range(10)]
    whole = Recorded({f"q{query}/{name}": float(len(name) + query) for query in range(6) for name in names})
    half = Recorded({f"q{query}/{name}": 1.0 for query in range(3) for name in names})
    for normalisation, missing, said in (
        ("z_score", "average", ["scored by the others alone"]),
        ("none", "average", ["scored by the others alone", "missing: drop"]),
        ("z_score", "drop", ["left out"]),
    ):
        ensemble = Ensemble([whole, half], normalisation, missing=missing, names=["whole", "half"])  # type: ignore[arg-type]
        scores = np.concatenate([ensemble.scores_of(f"q{query}", names) for query in range(6)])
        problems = ensemble.problems()
        assert len(problems) == len(said) and all(text in problem for text, problem in zip(said, problems))
        assert "half lacks 30 of 60" in problems[0]
        assert np.isnan(scores[30:]).all() == (missing == "drop") and np.isfinite(scores[:30]).all()
