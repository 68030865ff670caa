from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from rankdistill.errors import UsageError
from rankdistill.scores.rank_scores import (
    PositionBias,
    agreement,
    joined_logits,
    mean_rank_scores,
    plackett_luce,
    rank_scores,
    shown_order,
)


def test_rank_functions() -> None:
    np.testing.assert_allclose(rank_scores(4), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(rank_scores(4, "log"), np.log([4, 2, 4 / 3, 1]), atol=1e-12)
    np.testing.assert_allclose(rank_scores(3, "ndcg_gain"), [1, 1 / np.log2(3), 0.5])
    np.testing.assert_array_equal(rank_scores(3, "none"), [-1, -2, -3])
    for function in ("reciprocal", "log", "ndcg_gain", "none"):
        assert (np.diff(rank_scores(50, function)) < 0).all()  # type: ignore[arg-type]
        assert len(rank_scores(0, function)) == 0  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        rank_scores(3, "cubic")  # type: ignore[arg-type]


def test_scores_of_several_orders_are_averaged() -> None:
    scores = mean_rank_scores([[0, 1, 2], [2, 1, 0]], 4)
    np.testing.assert_allclose(scores, [2 / 3, 1 / 2, 2 / 3, np.nan])
    np.testing.assert_allclose(mean_rank_scores([[1, 0], [1]], 2), [0.5, 1])  # over the orders that have it


def likelihood(strengths: np.ndarray, orders: list[list[int]]) -> float:
    """Straight from the definition."""
    total = 0.0
    for order in orders:
        for at in range(len(order)):
            total += strengths[order[at]] - np.log(sum(np.exp(strengths[item]) for item in order[at:]))
    return total


def minorise(orders: list[list[int]], count: int, rounds: int = 20_000) -> np.ndarray:
    """The maximum likelihood by Hunter's (2004) MM algorithm: another method, no ridge."""
    w = np.ones(count)
    for _ in range(rounds):
        wins, weight = np.zeros(count), np.zeros(count)
        for order in orders:
            for at in range(len(order) - 1):
                wins[order[at]] += 1
                weight[order[at:]] += 1 / w[order[at:]].sum()
        w = wins / weight
        w /= w.sum()
    return np.log(w) - np.log(w).mean()


def test_plackett_luce_is_the_maximum_of_its_likelihood() -> None:
    orders = [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [0, 2, 1, 3], [2, 0, 3, 1]]
    found = plackett_luce(orders, 4, ridge=1e-8)
    np.testing.assert_allclose(found, minorise(orders, 4, 2000), atol=2e-3)
    partial = [[0, 1], [1, 2, 0], [2, 0], [0, 2, 1]]  # orders that lack items
    np.testing.assert_allclose(plackett_luce(partial, 3, ridge=1e-8), minorise(partial, 3, 2000), atol=2e-3)
    # The ridge's optimum: no step in any direction is better.
    ridged = plackett_luce(orders, 4, ridge=0.5)
    best = likelihood(ridged, orders) - 0.25 * ridged @ ridged
    random = np.random.default_rng(0)
    for _ in range(50):
        other = ridged + random.normal(0, 0.02, 4)
        assert likelihood(other, orders) - 0.25 * other @ other <= best + 1e-9


def test_plackett_luce_where_orders_agree_and_of_nothing() -> None:
    same = plackett_luce([[2, 0, 1]] * 4, 3)
    assert np.isfinite(same).all() and same[2] > same[0] > same[1]
    np.testing.assert_allclose(plackett_luce([[0, 1], [1, 0]], 3), [0, 0, 0], atol=1e-6)  # 2 is in no order
    np.testing.assert_array_equal(plackett_luce([], 2), [0, 0])
    with pytest.raises(UsageError, match="ridge"):
        plackett_luce([[0, 1]], 2, ridge=0)


def test_plackett_luce_finds_planted_strengths() -> None:
    random = np.random.default_rng(1)
    true = np.linspace(2, -2, 12)
    # Gumbel noise on log-strengths and sorting is a draw from the model.
    orders = [np.argsort(-(true + random.gumbel(size=12))).tolist() for _ in range(400)]
    np.testing.assert_allclose(plackett_luce(orders, 12), true, atol=0.45)


def test_five_repeats_of_a_real_model_agree_better_fused(shared_data: Path) -> None:
    """The fused order of GPT-3.5's repeats is nearer to each repeat than the repeats are to each other."""
    from rankdistill.runs import iter_run

    folder = shared_data / "msmarco-dl19" / "listwise-runs"
    repeats = [
        {query: ids for query, ids, _ in iter_run(folder / f"gpt-3.5-turbo.bm25.repeat{number}.trec")}
        for number in range(1, 6)
    ]
    apart, fused = [], []
    for query in list(repeats[0])[:8]:
        items = {doc_id: at for at, doc_id in enumerate(sorted(repeats[0][query]))}
        orders = [[items[doc_id] for doc_id in run[query]] for run in repeats]
        together = np.argsort(-plackett_luce(orders, len(items)), kind="stable").tolist()
        apart.append(agreement(orders))
        fused.append(np.mean([agreement([together, order]) for order in orders]))
    assert np.mean(fused) > np.mean(apart) + 0.01


# -- logits of several windows ----------------------------------------------------------------------------------------


def test_one_window_keeps_its_logits() -> None:
    np.testing.assert_allclose(joined_logits([([2, 0, 1], np.array([3.0, 1.0, 5.0]))], 3), [-2, 2, 0])


def test_windows_are_brought_to_one_scale() -> None:
    """Logits that differ by a constant a window give the scores they were made from."""
    random = np.random.default_rng(2)
    true = random.normal(size=40)
    true -= true.mean()
    windows = [(list(range(s, s + 20)), true[s : s + 20] + random.normal() * 9) for s in (20, 10, 0)]
    np.testing.assert_allclose(joined_logits(windows, 40), true, atol=1e-9)
    # With noise: the documents of two windows are averaged, and the error is of the size of the noise.
    noisy = [(documents, logits + random.normal(0, 0.1, 20)) for documents, logits in windows]
    assert np.abs(joined_logits(noisy, 40) - true).max() < 0.5


def test_absent_logits_come_last() -> None:
    scores = joined_logits([([0, 1, 2, 3], np.array([1.0, np.nan, -2.0, np.nan]))], 4)
    assert scores[1] == scores[3] < scores[2] < scores[0]
    assert joined_logits([([0, 1], np.array([np.nan, np.nan]))], 2).tolist() == [0, 0]
    assert joined_logits([], 1).tolist() == [0]


# -- orders, agreement, bias ------------------------------------------------------------------------------------------


def test_shown_orders() -> None:
    assert shown_order("given", 4, 0) == [0, 1, 2, 3] and shown_order("reversed", 4, 0) == [3, 2, 1, 0]
    one = shown_order("shuffled", 20, 7, "query", 0, 3)
    assert sorted(one) == list(range(20)) and one == shown_order("shuffled", 20, 7, "query", 0, 3)
    others = [
        shown_order("shuffled", 20, *at)
        for at in ((8, "query", 0, 3), (7, "other", 0, 3), (7, "query", 1, 3), (7, "query", 0, 4))
    ]
    assert all(one != other for other in others)
    first = [shown_order("shuffled", 5, seed, "q")[0] for seed in range(1000)]
    assert np.bincount(first).min() > 150  # uniform: 200 each


def test_agreement_is_the_mean_kendall_tau() -> None:
    random = np.random.default_rng(3)
    orders = [random.permutation(15).tolist() for _ in range(4)]
    ranks = [np.argsort(order) for order in orders]
    expected = np.mean([kendalltau(a, b).statistic for a, b in itertools.combinations(ranks, 2)])
    assert agreement(orders) == pytest.approx(expected)
    assert agreement([[0, 1, 2], [2, 1, 0]]) == -1
    assert agreement([[0, 1]] * 3) == agreement([[1, 0]]) == agreement([[0], [0]]) == 1


@pytest.mark.parametrize(("copies", "effect"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_position_bias_is_told_from_merit(copies: float, effect: float) -> None:
    """A model that orders by merit, one that copies its prompt, and one that does one or the other."""
    random = np.random.default_rng(4)
    bias = PositionBias()
    for _ in range(300):
        merit = random.permutation(10)
        shown, answered = [], []
        for order in (range(10), range(9, -1, -1), random.permutation(10)):
            documents = np.array(list(order))
            places = np.arange(10) if random.random() < copies else np.argsort(merit[documents])
            bias.add(places.tolist())
            x, y = np.empty(10), np.empty(10)
            x[documents] = np.arange(10)
            y[documents[places]] = np.arange(10)
            shown.append(x)
            answered.append(y)
        bias.add_repeats(np.stack(shown), np.stack(answered))
    assert bias.effect == pytest.approx(effect, abs=0.07)
    places_ = [place for place in bias.places() if place is not None]
    assert places_[-1] - places_[0] == pytest.approx(copies, abs=0.1)
    assert PositionBias().effect is None and PositionBias(**bias.to_json()) == bias
