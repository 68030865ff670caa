from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from rankdistill.errors import RankdistillError
from rankdistill.indexes import impacts
from rankdistill.indexes.impacts import Quantiser, fit_quantiser
from rankdistill.indexes.sparse_specification import LuceneImpactSpecification


def vectors(*weights: float) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.array([weights], np.float32))


def test_a_weight_becomes_the_nearest_step_and_at_least_one() -> None:
    quantise = Quantiser(maximum=7.0, levels=7)
    weights = np.array([1e-9, 0.4, 1.0, 1.4, 1.6, 6.9, 7.0, 70.0], np.float32)
    np.testing.assert_array_equal(quantise(weights), [1, 1, 1, 1, 2, 7, 7, 7])
    drawn = np.random.default_rng(0).uniform(0.006, 3, 1000).astype(np.float32)
    fine = Quantiser(3.0, 255)
    assert np.abs(fine(drawn) * fine.step - drawn).max() <= fine.step / 2 * 1.001
    assert fine(drawn).min() >= 1 and fine(drawn).max() <= 255


def test_the_largest_weight_is_the_highest_level_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impacts, "WEIGHTS_AT_ONCE", 2)
    given = vectors(0.5, 1.5, 3.0, 0.1, 2.0)
    quantise, counts = fit_quantiser(LuceneImpactSpecification(name="x", bits=4), given)
    assert (quantise.maximum, quantise.levels, counts["clipped_weights"]) == (3.0, 15, 0)
    assert counts["step"] == pytest.approx(0.2)
    quantise, counts = fit_quantiser(LuceneImpactSpecification(name="x", bits=4, maximum=1.6), given)
    assert (quantise.maximum, counts["clipped_weights"]) == (1.6, 2)
    with pytest.raises(RankdistillError, match=r"2 of 5 weights are above the maximum of 1\.6, up to 3"):
        fit_quantiser(LuceneImpactSpecification(name="x", maximum=1.6, above="error"), given)
    assert fit_quantiser(LuceneImpactSpecification(name="x"), vectors())[0].step > 0  # nothing to fit
