"""Divergences against their definitions and against torch and scipy; over lists and over a whole batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax

from rankdistill.losses.divergence import (
    Divergence,
    InBatchKL,
    JensenShannon,
    KLDivergence,
    ReverseKL,
    TotalVariation,
)

TEMPERATURES = [(1.0, 1.0), (2.0, 0.5)]


def scores(lists: int = 5, documents: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, documents, generator=random, dtype=torch.float64)
    return student * 3, teacher * 5


def of(loss: Divergence, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    mask = torch.ones_like(student, dtype=torch.bool) if mask is None else mask
    return loss(student, teacher, torch.full(student.shape, -1), mask).item()


@pytest.mark.parametrize(("student_tau", "teacher_tau"), TEMPERATURES)
def test_reverse_kl_equals_torch(student_tau: float, teacher_tau: float) -> None:
    student, teacher = scores()
    expected = student_tau**2 * torch.nn.functional.kl_div(
        (teacher / teacher_tau).log_softmax(1), (student / student_tau).softmax(1), reduction="batchmean"
    )
    assert of(ReverseKL(student_tau, teacher_tau), student, teacher) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("student_tau", "teacher_tau"), TEMPERATURES)
def test_jensen_shannon_equals_scipy(student_tau: float, teacher_tau: float) -> None:
    student, teacher = scores()
    distances = jensenshannon(
        softmax(teacher.numpy() / teacher_tau, axis=1), softmax(student.numpy() / student_tau, axis=1), axis=1
    )
    expected = student_tau**2 * float(np.mean(distances**2))
    assert of(JensenShannon(student_tau, teacher_tau), student, teacher) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("student_tau", "teacher_tau"), TEMPERATURES)
def test_total_variation_equals_the_definition(student_tau: float, teacher_tau: float) -> None:
    """The most that the two distributions can differ in about any set of documents."""
    student, teacher = scores()
    p, q = softmax(teacher.numpy() / teacher_tau, axis=1), softmax(student.numpy() / student_tau, axis=1)
    largest = []
    for one, other in zip(p, q, strict=True):
        sets = [[place for place in range(6) if number >> place & 1] for number in range(64)]
        largest.append(max(one[members].sum() - other[members].sum() for members in sets))
    expected = student_tau * float(np.mean(largest))
    assert of(TotalVariation(student_tau, teacher_tau), student, teacher) == pytest.approx(expected, rel=1e-9)


def test_symmetric_ones_are_symmetric_and_bounded_and_kl_is_not() -> None:
    student, teacher = scores()
    apart = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    for loss, most in ((JensenShannon(), math.log(2)), (TotalVariation(), 1.0)):
        assert of(loss, student, teacher) == pytest.approx(of(loss, teacher, student), rel=1e-12)
        assert of(loss, apart, -apart) == pytest.approx(most, rel=1e-9)
    assert of(KLDivergence(), student, teacher) == pytest.approx(of(ReverseKL(), teacher, student), rel=1e-12)
    assert abs(of(KLDivergence(), student, teacher) - of(KLDivergence(), teacher, student)) > 0.1


def test_forward_kl_covers_and_reverse_kl_chooses() -> None:
    """A teacher of two likely documents: a student that names one of them pays much forward, little in reverse."""
    teacher = torch.tensor([[10.0, 10.0, 0.0]], dtype=torch.float64)
    one, both = torch.tensor([[12.0, 0.0, 0.0]]).double(), torch.tensor([[2.0, 2.0, 1.0]]).double()
    assert of(KLDivergence(), one, teacher) > of(KLDivergence(), both, teacher)
    assert of(ReverseKL(), one, teacher) < of(ReverseKL(), both, teacher)


@pytest.mark.parametrize("kind", [KLDivergence, ReverseKL, JensenShannon, TotalVariation])
def test_the_gradient_keeps_its_size_as_the_temperature_rises(kind: type[Divergence]) -> None:
    student, teacher = scores()
    student.requires_grad_()
    mask = torch.ones_like(student, dtype=torch.bool)
    norms = []
    for temperature in (50.0, 500.0):
        loss = kind(temperature)(student, teacher, torch.full(student.shape, -1), mask)
        norms.append(torch.autograd.grad(loss, student)[0].norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.parametrize("kind", [KLDivergence, ReverseKL, JensenShannon, TotalVariation])
def test_a_temperature_so_small_that_float32_underflows_loses_no_number(kind: type[Divergence]) -> None:
    """Spread by temperature above 100: the softmax is 0 in float32, its logarithm must not be taken of that 0."""
    teacher = torch.tensor([[0.0, 30.0, 10.0], [5.0, -20.0, 3.0]])
    student = teacher.flip(1).clone().requires_grad_()
    loss = kind(0.05)(student, teacher, torch.full((2, 3), -1), torch.ones(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and loss > 0 and student.grad is not None and student.grad.isfinite().all()
    exact = kind(0.05)(
        teacher.flip(1).double(), teacher.double(), torch.full((2, 3), -1), torch.ones(2, 3, dtype=torch.bool)
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def in_batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Scores of 4 queries with 9 documents, and the columns of each query's own 3."""
    student, teacher = scores(4, 9, seed)
    index = torch.tensor([[0, 1, 2], [3, 4, 1], [5, 6, 7], [8, 0, 3]])
    labels = torch.full((4, 3), -1)
    labels[:, 0] = 1
    return student, teacher, index, labels, torch.ones(4, 3, dtype=torch.bool)


def test_in_batch_kl_is_kl_over_all_documents_of_the_batch() -> None:
    student, teacher, index, labels, mask = in_batch()
    expected = 4.0 * torch.nn.functional.kl_div(
        (student / 2).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean"
    )
    loss = InBatchKL(2.0, 3.0)
    assert loss.needs_batch_teacher and not loss.needs_teacher and not loss.needs_labels
    assert loss(student, teacher, index, labels, mask).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss(teacher * 2 / 3, teacher, index, labels, mask).item() == pytest.approx(0.0, abs=1e-12)
    assert InBatchKL()(teacher.float(), teacher.float(), index, labels, mask).item() == 0.0
    # Labels and whose document it is say nothing here; a query whose list is padding has no say.
    assert loss(student, teacher, index.flip(0), labels * 0, mask).item() == pytest.approx(expected.item(), rel=1e-12)
    mask[2] = False
    three = loss(student[[0, 1, 3]], teacher[[0, 1, 3]], index[[0, 1, 3]], labels[[0, 1, 3]], mask[[0, 1, 3]])
    assert loss(student, teacher, index, labels, mask).item() == pytest.approx(three.item(), rel=1e-12)


def test_in_batch_kl_has_the_right_gradient_and_follows_ramps() -> None:
    student, teacher, index, labels, mask = in_batch()
    loss = InBatchKL({"start": 1.0, "end": 3.0})  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(lambda one: loss(one, teacher, index, labels, mask), student.requires_grad_())
    loss.at_step(50, 100)
    expected = InBatchKL(2.0)(student, teacher, index, labels, mask)
    assert loss(student, teacher, index, labels, mask).item() == pytest.approx(expected.item(), rel=1e-12)
    nothing = loss(student, teacher, index, labels, torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0.0 and student.grad is not None and not student.grad.any()
