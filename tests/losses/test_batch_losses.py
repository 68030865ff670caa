"""Losses over a whole batch: each against its definition, query by query, and what is no negative."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from torch import Tensor

from rankdistill.losses.base import BatchLoss
from rankdistill.losses.contrastive import InBatchInfoNCE
from rankdistill.losses.divergence import InBatchKL
from rankdistill.losses.margin_mse import InBatchMarginMSE

Batch = list[Tensor]
Lists = list[tuple[np.ndarray, np.ndarray, list[int], list[int]]]  # scores of both, own columns, their labels


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Scores of 5 queries with 14 documents, some in two lists; unequal lengths, one list without a positive."""
    random = torch.Generator().manual_seed(seed)
    index = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 0], [6, 1, 7, 0], [8, 9, 10, 0], [11, 12, 4, 13]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    labels = torch.where(mask, torch.tensor([2, -1, 0, 1]), 1)  # padding may say what it likes
    labels[0, 1], labels[3, 0] = 1, 0  # document 1 is in the third list too: no negative of the first query anywhere
    student, teacher = torch.randn(2, 5, 14, generator=random, dtype=dtype)
    return [student * 3, teacher * 5, index, labels, mask]


def lists_of(student: Tensor, teacher: Tensor, index: Tensor, labels: Tensor, mask: Tensor) -> Iterator:  # type: ignore[type-arg]
    for s, t, columns, y, kept in zip(student.numpy(), teacher.numpy(), index, labels, mask, strict=True):
        if kept.any():
            yield s, t, columns[kept].tolist(), y[kept].tolist()


def infonce(lists: Lists, tau: float) -> float:
    losses = []
    for s, _, columns, labels in lists:
        if labels[0] > 0:
            relevant = {column for column, label in zip(columns, labels, strict=True) if label > 0}
            competing = [columns[0], *(column for column in range(len(s)) if column not in relevant)]
            losses.append(-log_softmax(s[competing] / tau)[0])
    return float(np.mean(losses))


def kl(lists: Lists, tau_s: float, tau_t: float) -> float:
    return float(np.mean([tau_s**2 * entropy(softmax(t / tau_t), softmax(s / tau_s)) for s, t, _, _ in lists]))


def margins(lists: Lists) -> float:
    """Every i, j and document of j that is not i's own."""
    against_positives, against_negatives = [], []
    for i, (s, t, own, labels) in enumerate(lists):
        for j, (_, _, other, others_labels) in enumerate(lists):
            for place, column in enumerate(other):
                if labels[0] > 0 and i != j and column not in own:
                    error = ((s[own[0]] - s[column]) - (t[own[0]] - t[column])) ** 2
                    is_positive = place == 0 and others_labels[0] > 0
                    (against_positives if is_positive else against_negatives).append(error)
    return float(0.5 * sum(np.mean(errors) for errors in (against_positives, against_negatives)))


CASES: dict[str, tuple[BatchLoss, Callable[[Lists], float]]] = {
    "infonce": (InBatchInfoNCE(0.7), lambda lists: infonce(lists, 0.7)),
    "kl": (InBatchKL(2.0, 3.0), lambda lists: kl(lists, 2.0, 3.0)),
    "margin_mse": (InBatchMarginMSE(), margins),
}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_its_definition(name: str) -> None:
    loss, formula = CASES[name]
    for seed in range(3):
        values = batch(seed)
        assert loss(*values).item() == pytest.approx(formula(list(lists_of(*values))), rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_right_and_nothing_to_learn_has_none(name: str) -> None:
    loss = CASES[name][0]
    student, *rest = batch()
    assert torch.autograd.gradcheck(lambda scores: loss(scores, *rest), student.requires_grad_())
    teacher, index, labels, mask = rest
    empty = [(teacher, index, labels, torch.zeros_like(mask))]
    empty += [(teacher, index, labels * 0, mask)] if loss.needs_labels else []
    for nothing in empty:
        value = loss(student, *nothing)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 0.0 and not gradient.any()


@pytest.mark.parametrize("name", CASES)
def test_which_list_and_column_is_which_changes_nothing_nor_does_padding(name: str) -> None:
    student, teacher, index, labels, mask = batch()
    loss = CASES[name][0]
    before = loss(student, teacher, index, labels, mask).item()
    random = torch.Generator().manual_seed(5)
    rows, columns = torch.randperm(5, generator=random), torch.randperm(14, generator=random)
    moved = [student[rows][:, columns], teacher[rows][:, columns], columns.argsort()[index[rows]]]
    assert loss(*moved, labels[rows], mask[rows]).item() == pytest.approx(before, rel=1e-12)
    zeros = torch.zeros(5, 2, dtype=torch.int64)
    wide = [torch.cat(pair, dim=1) for pair in ((index, zeros), (labels, zeros + 1), (mask, zeros.bool()))]
    assert loss(student, teacher, *wide).item() == pytest.approx(before, rel=1e-12)


def test_a_shift_within_a_query_is_not_seen_and_the_scale_of_margins_is() -> None:
    shift = torch.arange(5, dtype=torch.float64)[:, None] * 10 - 20
    student, teacher, *rest = batch()
    for loss, _ in CASES.values():
        before = loss(student, teacher, *rest).item()
        assert loss(student + shift, teacher + shift * 2, *rest).item() == pytest.approx(before, rel=1e-9)
    margin = CASES["margin_mse"][0]
    assert margin(student, teacher * 2, *rest).item() != pytest.approx(margin(student, teacher, *rest).item(), rel=0.01)


@pytest.mark.parametrize("loss", [InBatchKL(), InBatchMarginMSE()], ids=lambda loss: loss.type)
def test_a_perfect_student_has_no_loss(loss: BatchLoss) -> None:
    _, teacher, *rest = batch(dtype=torch.float32)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher, *rest)
    value.backward()
    assert value.item() == 0.0 and student.grad is not None and student.grad.abs().max() < 1e-6


def test_own_and_padded_documents_have_no_say_in_margins() -> None:
    values = batch()
    InBatchMarginMSE()(values[0].requires_grad_(), *values[1:]).backward()
    assert values[0].grad is not None
    seen = values[0].grad != 0
    assert not seen[0, 1:4].any()  # own negatives; 1 is a negative of list 2 too
    assert not seen[1, 5] and seen[1, 0]  # column 0 stands in list 1's padding: it is list 0's document all the same
    assert not seen[3].any() and seen[[0, 1, 2, 4]][:, 8:11].all()  # no positive, no i; the others' negatives


@pytest.mark.parametrize("loss", [InBatchInfoNCE(), InBatchMarginMSE()], ids=lambda loss: loss.type)
def test_one_pair_or_a_shared_one_is_nothing_to_compare(loss: BatchLoss) -> None:
    alone, shared = (torch.tensor([[0]]), torch.tensor([[1]])), (torch.tensor([[0, 1]] * 2), torch.tensor([[1, 0]] * 2))
    for index, labels in [alone, *([] if loss.type == "in_batch_infonce" else [shared])]:
        student = torch.randn(len(index), index.shape[1], requires_grad=True)
        value = loss(student, torch.zeros_like(student), index, labels, torch.ones_like(labels, dtype=torch.bool))
        value.backward()
        assert value.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_in_batch_kl_follows_ramps_and_reads_no_label() -> None:
    student, teacher, index, labels, mask = batch()
    loss = InBatchKL({"start": 1.0, "end": 3.0})  # type: ignore[arg-type]
    loss.at_step(50, 100)
    expected = InBatchKL(2.0)(student, teacher, index, labels, mask).item()
    assert loss(student, teacher, index.flip(0), labels * 0, mask).item() == pytest.approx(expected, rel=1e-12)


def test_they_say_what_they_need() -> None:
    margin, contrast, divergence = InBatchMarginMSE(), InBatchInfoNCE(), InBatchKL()
    assert margin.weight == 0.75 and margin.needs_batch_teacher and margin.needs_labels  # the published share
    assert contrast.needs_labels and not contrast.needs_batch_teacher
    assert divergence.needs_batch_teacher and not divergence.needs_labels
    assert not (margin.needs_teacher or contrast.needs_teacher or divergence.needs_teacher)
