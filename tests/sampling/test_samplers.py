"""What a sampler promises: each list once an epoch, the positive first, the same stream for the same seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.sampling.base import BalancedDocuments, RandomBatches, RandomDocuments, generator


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 200), size=st.integers(1, 32), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_no_list_comes_twice_in_an_epoch(count: int, size: int, seed: int, epoch: int) -> None:
    batches = RandomBatches(size).epoch(count, seed, epoch)
    used = batches.ravel()
    assert len(set(used.tolist())) == len(used)
    assert used.min() >= 0 and used.max() < count
    if count < size:
        assert batches.shape == (1, count)  # fewer lists than a batch: one batch of them all
    else:
        assert batches.shape == (count // size, size)  # less than one batch is left over


def test_every_list_is_used_over_the_epochs() -> None:
    """30 lists in batches of 8 leave 6 out an epoch; not always the same ones."""
    sampler = RandomBatches(8)
    assert {int(number) for epoch in range(8) for number in sampler.epoch(30, 1, epoch).ravel()} == set(range(30))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return RandomBatches(4).epoch(40, seed, epoch).ravel().tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_queries_meet_uniformly() -> None:
    """Each of 6 lists is in the first batch of two equally often: chi-square over 3,000 epochs."""
    firsts = np.concatenate([RandomBatches(2).epoch(6, 7, epoch)[0] for epoch in range(3000)])
    assert chisquare(np.bincount(firsts, minlength=6)).pvalue > 1e-3


def choose(relevance: list[int], size: int, seed: int) -> list[int]:
    labels = np.array(relevance, np.int32)
    scores = np.arange(len(labels), dtype=np.float32)
    return RandomDocuments(size).choose(scores, labels, generator(seed)).tolist()


@settings(deadline=None, max_examples=100)
@given(
    relevance=st.lists(st.integers(-1, 2), min_size=1, max_size=20), size=st.integers(1, 12), seed=st.integers(0, 999)
)
def test_the_positive_comes_first_and_no_other_positive_comes_at_all(
    relevance: list[int], size: int, seed: int
) -> None:
    chosen = choose(relevance, size, seed)
    assert chosen == choose(relevance, size, seed)
    positives = {place for place, label in enumerate(relevance) if label > 0}
    assert len(set(chosen)) == len(chosen) <= size
    if positives:
        assert chosen[0] in positives
        assert not positives & set(chosen[1:])
        assert len(chosen) == min(size, 1 + len(relevance) - len(positives))
    else:
        assert len(chosen) == min(size, len(relevance))


def test_negatives_and_positives_are_drawn_uniformly() -> None:
    relevance = [-1, 1, 0, -1, 2, -1, -1]
    drawn = [choose(relevance, 3, seed) for seed in range(4000)]
    negatives = np.bincount([place for chosen in drawn for place in chosen[1:]], minlength=7)
    assert chisquare(negatives[[0, 2, 3, 5, 6]]).pvalue > 1e-3
    assert chisquare(np.bincount([chosen[0] for chosen in drawn], minlength=7)[[1, 4]]).pvalue > 1e-3


@pytest.mark.parametrize("numbers", [(0,), (42, 1), (42, 1, 7), (2**40, 3)])
def test_a_generator_depends_on_its_numbers_alone(numbers: tuple[int, ...]) -> None:
    assert generator(*numbers).integers(1 << 60) == generator(*numbers).integers(1 << 60)
    assert generator(*numbers).integers(1 << 60) != generator(*numbers, 1).integers(1 << 60)


# -- balanced pairs: margins are spread evenly over a query's own range -----------------------------------------------


def choose_pairs(scores: list[float], relevance: list[int], seed: int, size: int = 2, bins: int = 10) -> list[int]:
    sampler = BalancedDocuments(size, bins)
    return sampler.choose(np.array(scores, np.float32), np.array(relevance, np.int32), generator(seed)).tolist()


def bin_of(margin: float, least: float, greatest: float, bins: int = 10) -> int:
    """The definition, by the edges of the bins: [edge k, edge k + 1), the last one closed."""
    edges = [least + (greatest - least) * place / bins for place in range(1, bins)]
    return sum(margin >= edge for edge in edges)


def skewed() -> tuple[list[float], list[int]]:
    """A positive at 10 and 60 negatives, nine of ten of them far below: random pairs are nearly all of one bin."""
    random = np.random.default_rng(4)
    negatives = np.concatenate([random.uniform(0, 0.9, 54), np.arange(1.5, 7.0, 1.0)])
    return [10.0, *negatives.tolist()], [1] + [-1] * 60


def test_bins_are_drawn_uniformly_and_pairs_within_a_bin() -> None:
    scores, relevance = skewed()
    margins = np.float64(np.float32(10.0)) - np.array(scores[1:], np.float32).astype(np.float64)
    bins = np.array([bin_of(margin, margins.min(), margins.max()) for margin in margins])
    full = sorted(set(bins.tolist()))
    assert 5 <= len(full) < 10 and np.bincount(bins).max() > 30  # some bins are empty and one holds most
    drawn = [choose_pairs(scores, relevance, seed)[1] - 1 for seed in range(6000)]
    by_bin = Counter(int(bins[place]) for place in drawn)
    assert sorted(by_bin) == full
    assert chisquare([by_bin[number] for number in full]).pvalue > 1e-3
    largest = int(np.bincount(bins).argmax())
    of_largest = np.bincount([place for place in drawn if bins[place] == largest], minlength=60)[bins == largest]
    assert chisquare(of_largest).pvalue > 1e-3
    # The test can fail: uniform pairs are nothing of the kind.
    uniform = np.bincount(bins[np.random.default_rng(0).integers(0, 60, 6000)], minlength=10)[full]
    assert chisquare(uniform).pvalue < 1e-9


def test_pairs_of_several_positives_share_the_querys_bins() -> None:
    """Margins 1 and 10 of one positive, 9 and 18 of the other, all bins: 1 | 9 10 | 18 in thirds of the range."""
    scores, relevance = [0.0, 10.0, 18.0, 9.0], [0, 1, 2, -1]
    drawn = Counter(tuple(choose_pairs(scores, relevance, seed, bins=3)) for seed in range(3000))
    assert set(drawn) == {(1, 3), (1, 0), (2, 3), (2, 0)}
    wanted = {(1, 3): 1000, (1, 0): 500, (2, 3): 500, (2, 0): 1000}
    assert chisquare([drawn[pair] for pair in wanted], list(wanted.values())).pvalue > 1e-3


@settings(deadline=None, max_examples=150)
@given(
    documents=st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(-1, 2)), min_size=2, max_size=25),
    size=st.integers(2, 30),
    seed=st.integers(0, 999),
)
def test_a_positive_first_then_negatives_without_repeats(
    documents: list[tuple[float, int]], size: int, seed: int
) -> None:
    scores, relevance = [score for score, _ in documents], [label for _, label in documents]
    positives = {place for place, label in enumerate(relevance) if label > 0}
    negatives = len(relevance) - len(positives)
    if not positives or not negatives:
        return
    chosen = choose_pairs(scores, relevance, seed, size)
    assert chosen[0] in positives and not positives & set(chosen[1:])
    assert len(set(chosen)) == len(chosen) == min(size, 1 + negatives)
    assert choose_pairs(scores, relevance, seed, size) == chosen
    assert choose_pairs(scores, relevance, seed, 2) == chosen[:2]  # more documents: the same pair, and others after it


def test_further_negatives_are_balanced_too() -> None:
    """One negative near the positive, 30 far: random lists of 4 hold the near one in a tenth, these nearly always."""
    scores, relevance = [10.0, 9.0, *np.linspace(0, 0.5, 30).tolist()], [1] + [0] * 31
    with_near = np.mean([1 in choose_pairs(scores, relevance, seed, 4) for seed in range(1000)])
    assert 0.84 < with_near < 0.91  # 1 - (1/2)^3


def test_a_shift_and_a_positive_scale_change_nothing() -> None:
    scores, relevance = skewed()
    rounded = np.round(np.array(scores) * 64) / 64  # exact in float32, shifted and scaled
    for seed in range(50):
        assert choose_pairs((rounded * 4 + 8).tolist(), relevance, seed, 5) == choose_pairs(
            rounded.tolist(), relevance, seed, 5
        )


def test_all_margins_equal() -> None:
    """The bins have no width: every pair is as likely."""
    drawn = [choose_pairs([-1e30] * 6, [1, 0, 0, 0, 0, 0], seed) for seed in range(2000)]
    assert {first for first, _ in drawn} == {0}
    assert chisquare(np.bincount([second for _, second in drawn], minlength=6)[1:]).pvalue > 1e-3


@pytest.mark.parametrize(
    "scores", [[3e38, -3e38, 0.0], [1e-45, 0.0, 0.0], [1.0, 1.0, 1.0 + 2e-7], [1e8, 1e8 + 8, 0.0]], ids=str
)
def test_extreme_scores_give_pairs(scores: list[float]) -> None:
    """Margins beyond float32, or of a last digit: no overflow, no bin beyond the last."""
    with np.errstate(all="raise"):
        assert {choose_pairs(scores, [1, 0, 0], seed)[1] for seed in range(40)} == {1, 2}


@pytest.mark.parametrize(
    ("relevance", "usable"),
    [
        ([1, -1], False),  # one pair
        ([1, 0, -1], True),
        ([2, 1, 0], True),  # two positives, one negative: two pairs
        ([0, -1, -1], False),
        ([1, 1, 2], False),
        ([1], False),
    ],
)
def test_lists_of_fewer_than_two_pairs_are_not_usable(relevance: list[int], usable: bool) -> None:
    labels: NDArray[np.int32] = np.array(relevance, np.int32)
    assert BalancedDocuments().usable(np.zeros(len(labels), np.float32), labels) is usable


def test_wrong_settings_and_lists_without_a_pair_are_refused() -> None:
    for key, value in (("size", 1), ("bins", 0)):
        with pytest.raises(UsageError, match="greater than or equal"):
            build("sampler", {"type": "balanced_pairs", key: value})
    with pytest.raises(RankdistillError, match="no pair"):
        choose_pairs([1.0, 2.0], [0, 0], 1)
