from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.ensemble import Ensemble, aggregate, combine, normalise

NORMALISATIONS = ("min_max", "z_score", "rank", "softmax", "none")


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
        stretched = combine(scores * [[1.0], [1000.0]] + [[0.0], [7.0]], method)  # type: ignore[arg-type]
        np.testing.assert_allclose(stretched, combine(scores, method))  # type: ignore[arg-type]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError):
        normalise(np.ones(2), "minmax")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="weights"):
        aggregate(np.ones((2, 3)), "weighted", [1.0])
    with pytest.raises(UsageError, match="temperature"):
        normalise(np.ones(2), "softmax", 0.0)
    with pytest.raises(UsageError):
        Ensemble([])
