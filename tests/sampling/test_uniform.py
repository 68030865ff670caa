"""What a sampler promises: each list once an epoch, the positive first, the same stream for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from rankdistill.sampling.base import RandomBatches, RandomDocuments, generator


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
