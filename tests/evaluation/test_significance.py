"""Tests of significance agree with scipy on the same numbers; corrections with their definitions; edges have a rule."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rankdistill.evaluation.results import Evaluation, Row, comparisons_table
from rankdistill.evaluation.significance import (
    Comparison,
    Significance,
    bca,
    compare_values,
    holm,
    paired_t,
    tukey_hsd,
)
from rankdistill.evaluation.significance import randomisation as randomisation_of_many
from rankdistill.evaluation.significance import randomised_tukey_hsd as randomised_tukey_hsd_of_many
from rankdistill.evaluation.tables import latex, markdown, plain_table


def randomisation(differences: Any, *options: Any, **more: Any) -> float:
    return float(randomisation_of_many(np.reshape(differences, (1, -1, 1)), *options, **more)[0, 0])


def randomised_tukey_hsd(table: Any, *options: Any) -> Any:
    return randomised_tukey_hsd_of_many(table[None], *options)[0]


def values(queries: int, systems: int = 2, seed: int = 0, better: float = 0.08) -> Any:
    """[queries, systems] in [0, 1], queries of very different difficulty; system i better by i × `better`."""
    random = np.random.default_rng(seed)
    difficulty = random.beta(1, 1, (queries, 1))
    return np.clip(difficulty + random.normal(0, 0.15, (queries, systems)) + better * np.arange(systems), 0, 1)


@pytest.mark.parametrize("queries", [2, 5, 43, 400])
def test_the_t_test_is_scipys(queries: int) -> None:
    table = values(queries, 3)
    t, p = paired_t(table[:, [1, 2]] - table[:, [0, 0]])
    for column, b in enumerate((1, 2)):
        expected = stats.ttest_rel(table[:, b], table[:, 0])
        assert (t[column], p[column]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


@pytest.mark.parametrize("queries", [2, 6, 12])
def test_few_queries_are_enumerated_as_scipy_does(queries: int) -> None:
    for seed in range(5):
        differences = np.diff(np.round(values(queries, seed=seed), 1))[:, 0]  # coarse values: sums tie
        expected = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert randomisation(differences) == pytest.approx(expected.pvalue, abs=1e-12)
        among_equals = np.concatenate([np.zeros(500), differences])  # zeros do not count towards the limit
        assert randomisation(among_equals) == pytest.approx(expected.pvalue, abs=1e-12)


def test_many_queries_are_sampled_near_scipys_and_never_zero() -> None:
    differences = np.diff(values(60, better=0.03), axis=1)[:, 0]
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=50_000, rng=np.random.default_rng(1)
    ).pvalue
    ours = randomisation(differences, 50_000, seed=1)
    noise = np.sqrt(theirs * (1 - theirs) / 50_000)
    assert 0.001 < theirs < 0.5 and abs(ours - theirs) < 6 * noise
    assert ours == randomisation(differences, 50_000, seed=1) != randomisation(differences, 50_000, seed=2)
    assert randomisation(np.full(30, 0.5), 999) == 1 / 1000


def test_holm_is_step_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).tolist() == [1.0, 1.0] and holm([]).tolist() == []
    p = np.random.default_rng(0).random(7) ** 2
    expected = [min(1.0, max((7 - rank) * q for rank, q in enumerate(sorted(p)) if q <= own)) for own in p]
    assert holm(p).tolist() == pytest.approx(expected)


def test_tukey_of_two_systems_is_the_uncorrected_test() -> None:
    for seed in range(5):
        table = values(30, seed=seed, better=0.05)
        assert tukey_hsd(table, [(0, 1)])[0] == pytest.approx(
            stats.ttest_rel(table[:, 0], table[:, 1]).pvalue, rel=1e-6
        )
    p = randomised_tukey_hsd(table, [(0, 1)], 20_000)[0]
    assert p == pytest.approx(randomisation(table[:, 1] - table[:, 0], 20_000), abs=0.02)


def test_tukey_is_computed_on_the_residual_of_the_two_way_layout() -> None:
    """Against the textbook sums of squares: what a query adds to every system does not widen the error."""
    table = values(25, 4, seed=3)
    pairs = list(itertools.combinations(range(4), 2))
    grand, rows, columns = table.mean(), table.mean(axis=1), table.mean(axis=0)
    total = ((table - grand) ** 2).sum()
    error = (total - 4 * ((rows - grand) ** 2).sum() - 25 * ((columns - grand) ** 2).sum()) / (24 * 3)
    expected = [stats.studentized_range.sf(abs(columns[a] - columns[b]) / np.sqrt(error / 25), 4, 72) for a, b in pairs]
    assert tukey_hsd(table, pairs).tolist() == pytest.approx(expected, rel=1e-9)
    shifted = table + np.random.default_rng(0).normal(0, 9, (25, 1))
    assert tukey_hsd(shifted, pairs).tolist() == pytest.approx(expected, rel=1e-4)
    # Randomised, the real differences of other systems count as noise too; among like systems the two agree.
    alike = values(40, 4, seed=5, better=0.0)
    assert randomised_tukey_hsd(alike, pairs, 4000).tolist() == pytest.approx(
        tukey_hsd(alike, pairs).tolist(), abs=0.04
    )


def test_randomised_tukey_is_the_share_of_all_permutations() -> None:
    table = np.array([[0.1, 0.5, 0.4], [0.0, 0.2, 0.7], [0.3, 0.3, 0.9]])
    ranges = [
        np.ptp(np.mean([table[q][list(order)] for q, order in enumerate(orders)], axis=0))
        for orders in itertools.product(itertools.permutations(range(3)), repeat=3)
    ]
    exact = [(np.array(ranges) >= table[:, b].mean() - table[:, a].mean() - 1e-12).mean() for a, b in ((0, 2), (0, 1))]
    assert randomised_tukey_hsd(table, [(0, 2), (0, 1)], 20_000).tolist() == pytest.approx(exact, abs=0.015)


def test_a_family_of_like_systems_is_rarely_called_different() -> None:
    """The chance of one false alarm among all pairs stays near alpha; uncorrected it is several times that."""
    alarms = {"holm": 0, "tukey": 0, "none": 0}
    for seed in range(40):
        table = values(20, 5, seed=100 + seed, better=0.0)
        given = {f"s{n}": {"m": table[:, n]} for n in range(5)}
        for correction in ("holm", "tukey"):
            found = compare_values(given, correction=correction, permutations=500, resamples=10, seed=seed)
            alarms[correction] += any(pair.significant for pair in found.comparisons)
        alarms["none"] += any(pair.p_randomisation < 0.05 for pair in found.comparisons)
    assert max(alarms["holm"], alarms["tukey"]) <= 6 < alarms["none"]


def test_intervals_are_scipys() -> None:
    sample = values(50, 1, seed=7)[:, 0] ** 3  # skewed: BCa differs from the percentiles
    found = compare_values({"a": {"m": sample}}, seed=3)
    theirs = stats.bootstrap(
        (sample,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(3), vectorized=True
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.intervals["a"]["m"] == pytest.approx([theirs.low, theirs.high], abs=0.03 * width)
    resampled = np.random.default_rng(0).choice(sample, (5000, 50)).mean(axis=1)
    assert bca(resampled, sample) != pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=1e-6)


@pytest.fixture
def found() -> Significance:
    table = values(40, 4, seed=2, better=0.12)
    given = {
        name: {"ndcg@10": table[:, n], "map": np.round(table[:, n], 1)}
        for n, name in enumerate(["first", "BM25", "student", "teacher"])
    }
    return compare_values(given, permutations=5000, resamples=500)


def test_every_pair_is_compared_and_the_figures_belong_together(found: Significance) -> None:
    assert (found.baseline, found.family, found.queries) == ("BM25", "all", 40)
    assert len(found.comparisons) == 2 * 6
    assert {pair.b for pair in found.comparisons if "BM25" in (pair.a, pair.b)} == {"BM25"}
    for pair in found.comparisons:
        assert pair.difference == pytest.approx(pair.mean_a - pair.mean_b)
        assert pair.wins + pair.ties + pair.losses == 40
        assert pair.low is not None and pair.high is not None and pair.low <= pair.difference <= pair.high
        assert pair.p_t <= pair.p_t_corrected and pair.p_randomisation <= pair.p_randomisation_corrected
        assert pair.significant == (pair.p_randomisation_corrected < 0.05)
        assert pair.t is not None and pair.effect_size == pytest.approx(pair.t / np.sqrt(40))
    turned, straight = found.of("BM25", "student", "map"), found.of("student", "BM25", "map")
    assert turned.difference == -straight.difference and turned.low == -float(straight.high or 0)
    with pytest.raises(KeyError):
        found.of("student", "nobody", "map")
    assert Significance.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_marks_say_better_or_worse_than_the_baseline(found: Significance) -> None:
    assert found.mark("teacher", "ndcg@10") == 1 and found.mark("BM25", "ndcg@10") == 0
    best = compare_values(
        {name: {"m": values(40, 4, seed=2)[:, n]} for n, name in enumerate("abcd")}, baseline="d", family="baseline"
    )
    assert {(pair.a, pair.b) for pair in best.comparisons} == {("a", "d"), ("b", "d"), ("c", "d")}
    assert best.mark("a", "m") == -1


def test_more_queries_get_fewer_permutations_and_say_so() -> None:
    table = values(20_000, better=0.001)
    made = compare_values({"a": {"m": table[:, 0]}, "b": {"m": table[:, 1]}}, resamples=100)
    assert made.permutations == 10_000


# -- edges ------------------------------------------------------------------------------------------------------------


def one_pair(a: list[float], b: list[float], correction: str = "holm") -> Comparison:
    found = compare_values({"b": {"m": b}, "a": {"m": a}}, correction=correction, resamples=200, permutations=500)
    assert found.to_json() == json.loads(json.dumps(found.to_json(), allow_nan=False))
    return found.comparisons[0]


@pytest.mark.parametrize("correction", ["holm", "tukey_hsd"])
def test_one_query_proves_nothing_and_systems_that_are_the_same_do_not_differ(correction: str) -> None:
    pair = one_pair([0.9], [0.1], correction)
    assert (pair.p_t, pair.p_randomisation, pair.p_randomisation_corrected, pair.significant) == (1, 1, 1, False)
    assert pair.low is None and pair.effect_size is None and pair.t is None and pair.wins == 1
    pair = one_pair([0.3, 0.7, 0.2], [0.3, 0.7, 0.2], correction)
    assert (pair.p_t, pair.p_randomisation, pair.p_t_corrected, pair.p_randomisation_corrected) == (1, 1, 1, 1)
    assert (pair.low, pair.high, pair.effect_size, pair.t, pair.ties) == (0, 0, 0, 0, 3)


def test_a_difference_that_never_varies_is_certain_by_t_and_counted_by_randomisation() -> None:
    pair = one_pair([0.3, 0.5, 0.7, 0.9], [0.2, 0.4, 0.6, 0.8])
    assert (pair.p_t, pair.t, pair.effect_size) == (0.0, None, None)
    assert pair.p_randomisation == 2 / 16 and not pair.significant


def test_one_system_and_none_and_values_that_are_no_pairs() -> None:
    alone = compare_values({"a": {"m": [0.1, 0.2]}}, resamples=100)
    assert alone.comparisons == [] and alone.baseline == "a" and len(alone.intervals["a"]["m"]) == 2
    assert compare_values({}).comparisons == [] and compare_values({}).baseline is None
    assert compare_values({"a": {"m": [0.5]}}).intervals == {"a": {}}
    with pytest.raises(ValueError, match="different shapes"):
        compare_values({"a": {"m": [0.1]}, "b": {"m": [0.1, 0.2]}})
    with pytest.raises(ValueError, match="not finite"):
        compare_values({"a": {"m": [np.nan, 0.2]}})


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation() -> Evaluation:
    table = values(40, 3, seed=2)
    names = ["BM25", "student_50% & <b>", "teacher"]
    rows = [
        Row(name, {"ndcg@10": float(table[:, n].mean())}, {"queries": 40, "judged@10": 0.5, "missing_queries": n}, "")
        for n, name in enumerate(names)
    ]
    made = Evaluation("facts", "test", {}, ["ndcg@10"], 10, 1, False, rows)
    made.per_query = {name: {"ndcg@10": table[:, n]} for n, name in enumerate(names)}
    made.compare_rows()
    return made


def test_the_table_marks_what_is_significant_and_says_by_which_test(evaluation: Evaluation) -> None:
    assert evaluation.significance is not None and evaluation.significance.mark("teacher", "ndcg@10") == 1
    assert evaluation.significance.notes == {"missing_queries": {"student_50% & <b>": 1, "teacher": 2}}
    text = plain_table(evaluation)
    mean = f"{evaluation['teacher'].means['ndcg@10']:.4f}"
    assert f"{mean}▲" in text and f"{evaluation['BM25'].means['ndcg@10']:.4f}▲" not in text
    assert "▲ ▼ better or worse than BM25: randomisation test, p < 0.05 after Holm over all pairs" in text
    assert len({len(line.rstrip("▲▼")) for line in text.splitlines()[2:5]}) == 1  # figures stay under each other
    low, high = evaluation["teacher"].intervals["ndcg@10"]
    assert f"| teacher | {low:.4f} to {high:.4f} |" in markdown(evaluation)
    assert "significance" not in evaluation.to_json() and evaluation.to_json()["rows"][2]["intervals"]["ndcg@10"]
    pairs = comparisons_table(evaluation.significance, "pairs").texts()
    assert len(pairs) == 3 and pairs[0][:3] == ["ndcg@10", "student_50% & <b>", "BM25"]


def test_latex_is_escaped_and_balanced(evaluation: Evaluation) -> None:
    text = latex(evaluation)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"student\_50\% \& $<$b$>$" in body and r"$^{\dagger}$" in body and r"\textbf{" in body
    assert body.count("{") == body.count("}") and body.count(r"\begin") == body.count(r"\end")
    rows = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 4 and all(line.replace(r"\&", "").count("&") == 1 for line in rows)
    assert "▲" not in body and r"$^{\ddagger}$ worse than BM25" in body
