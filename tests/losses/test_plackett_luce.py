"""Plackett-Luce distillation: its definition, its invariances, its special cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankdistill.losses.plackett_luce import PLD


def batch(lists: int = 6, documents: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, documents, generator=random, dtype=torch.float64) * 3
    labels = torch.full((lists, documents), -1)
    labels[:, 0] = 1
    return student, teacher, labels, torch.ones(lists, documents, dtype=torch.bool)


def slow(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, tau_s: float, tau_t: float) -> float:
    """The definition, choice by choice, in Python's double precision."""
    losses = []
    for s, t, y, m in zip(student.tolist(), teacher.tolist(), labels.tolist(), mask.tolist(), strict=True):
        here = [place for place, kept in enumerate(m) if kept]
        if len(here) < 2:
            continue
        order = sorted(here, key=lambda i: (not (i == 0 and y[0] > 0), -t[i], i))
        total = sum(math.exp(t[i] / tau_t) for i in here)
        loss = 0.0
        for k, i in enumerate(order):
            remaining = math.log(sum(math.exp(s[j] / tau_s) for j in order[k:]))
            loss += math.exp(t[i] / tau_t) / total * (remaining - s[i] / tau_s)
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("tau_s", "tau_t"), [(1.0, 1.0), (0.5, 3.0)])
def test_pld_equals_the_definition(tau_s: float, tau_t: float) -> None:
    student, teacher, labels, mask = batch()
    labels[1, 0] = 0  # by the teacher alone
    labels[2, 3] = 1  # relevant, not first: by its score
    teacher[3, 1] = teacher[3, 4]  # a tie: by place
    mask[4, 2:] = False
    mask[5, :2] = False  # padding first
    expected = slow(student, teacher, labels, mask, tau_s, tau_t)
    assert PLD(tau_s, tau_t)(student, teacher, labels, mask).item() == pytest.approx(expected, rel=1e-12)


def test_with_all_weight_on_the_first_it_is_cross_entropy() -> None:
    student, teacher, labels, mask = batch()
    teacher[:, 0] = 1e4
    expected = torch.nn.functional.cross_entropy(student, torch.zeros(6, dtype=torch.long)).item()
    assert PLD()(student, teacher, labels, mask).item() == pytest.approx(expected, rel=1e-12)


def test_with_equal_weights_it_is_the_likelihood_of_the_order() -> None:
    """ListMLE: minus the logarithm of the Plackett-Luce probability, by the number of documents."""
    student, teacher, labels, mask = batch(lists=1)
    order = [0, *sorted(range(1, 5), key=lambda i: -teacher[0, i].item())]
    probability = 1.0
    for k, i in enumerate(order):
        probability *= math.exp(student[0, i]) / sum(math.exp(student[0, j]) for j in order[k:])
    loss = PLD(teacher_temperature=1e9)(student, teacher, labels, mask).item()
    assert loss == pytest.approx(-math.log(probability) / 5, rel=1e-6)


def test_it_is_convex_in_the_students_scores() -> None:
    student, teacher, labels, mask = batch(200, seed=1)
    other = batch(200, seed=2)[0] * 2

    def lists(scores: Tensor) -> Tensor:
        return PLD().terms(scores, teacher, labels, mask)[0]

    for share in (0.1, 0.5, 0.8):
        between = lists(share * student + (1 - share) * other)
        assert (between <= share * lists(student) + (1 - share) * lists(other) + 1e-12).all()


def test_the_right_order_costs_less() -> None:
    _, teacher, labels, mask = batch()
    teacher[:, 0] = teacher.amax(dim=1) + 1
    right, clear, wrong = (PLD()(teacher * factor, teacher, labels, mask).item() for factor in (1, 4, -1))
    assert clear < right < wrong
    # The labelled positive is first even where the teacher ranks it last.
    last = teacher.clone()
    last[:, 0] = -9.0
    boosted = last.clone()
    boosted[:, 0] = 20.0
    assert PLD(teacher_temperature=50)(boosted, last, labels, mask) < PLD(teacher_temperature=50)(
        last, last, labels, mask
    )
