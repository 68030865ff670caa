"""The Sinkhorn loss against the POT library, and what taking the blur's bias off does."""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import softmax

from rankdistill.losses.transport import Sinkhorn, transport_plan


def batch(lists: int = 7, documents: int = 5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, documents, generator=random, dtype=torch.float64) * 2
    return student, teacher, torch.full((lists, documents), -1), torch.ones(lists, documents, dtype=torch.bool)


def points(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """The softmaxes, each list in its teacher's order."""
    order = np.argsort(-teacher.numpy(), axis=1)
    return tuple(  # type: ignore[return-value]
        np.take_along_axis(softmax(scores.numpy() / tau, axis=1), order, axis=1) for scores in (student, teacher)
    )


def pot(left: np.ndarray, right: np.ndarray, blur: float, iterations: int) -> float:
    """The cost of the entropic plan after so many iterations."""
    masses = np.full(len(left), 1 / len(left))
    cost = cdist(left, right, metric="cityblock")
    plan = ot.sinkhorn(masses, masses, cost, blur, numItermax=iterations, stopThr=0, warn=False)
    return float((plan * cost).sum())


@pytest.mark.parametrize("iterations", [5, 200])
@pytest.mark.parametrize("blur", [0.05, 0.1, 0.5])
def test_sinkhorn_equals_pot(blur: float, iterations: int) -> None:
    student, teacher, labels, mask = batch()
    left, right = points(student, teacher, 2.0)
    loss: Any = Sinkhorn(2.0, blur=blur, iterations=iterations, debias=False)
    expected = pot(left, right, blur, iterations)
    assert loss(student, teacher, labels, mask).item() == pytest.approx(expected, rel=1e-9)
    loss = Sinkhorn(2.0, blur=blur, iterations=iterations)
    expected -= pot(left, left, blur, iterations) / 2 + pot(right, right, blur, iterations) / 2
    assert loss(student, teacher, labels, mask).item() == pytest.approx(expected, rel=1e-9)


def test_with_little_blur_it_is_exact_transport() -> None:
    student, teacher, labels, mask = batch()
    left, right = points(student, teacher, 1.0)
    exact = ot.emd2([], [], cdist(left, right, metric="cityblock"))
    loss = Sinkhorn(blur=2e-3, iterations=500, debias=False)(student, teacher, labels, mask)
    assert loss.item() == pytest.approx(exact, rel=1e-2)


def test_the_plan_is_a_plan_where_its_kernel_underflows() -> None:
    """exp(-cost / blur) is 0 in float32 for every pair here; the log domain does not mind."""
    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) + 1.5
    assert not torch.exp(-cost / 1e-2).any()
    plan = transport_plan(cost, 1e-2, 500)
    torch.testing.assert_close(plan.sum(1), torch.full((6,), 1 / 6))
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6), rtol=1e-2, atol=1e-3)


def test_the_blur_alone_costs_something_unless_it_is_taken_off() -> None:
    _, teacher, labels, mask = batch()
    assert Sinkhorn(debias=False)(teacher, teacher, labels, mask).item() > 0.01
    assert Sinkhorn()(teacher, teacher, labels, mask).item() == 0.0
    # Its gradient, too: without the correction even a perfect student is pulled to the middle.
    for debias, least in ((True, 0.0), (False, 1e-3)):
        student = (teacher + 1e-9).clone().requires_grad_()
        loss = Sinkhorn(blur=0.5, debias=debias)(student, teacher, labels, mask)
        norm = torch.autograd.grad(loss, student)[0].norm().item()
        assert norm >= least
    near = teacher + 0.1 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(4)).double()
    assert Sinkhorn()(near, teacher, labels, mask).item() < Sinkhorn()(-teacher, teacher, labels, mask).item()


def test_one_list_alone_is_total_variation_twice() -> None:
    student, teacher, labels, mask = batch(lists=1)
    left, right = points(student, teacher, 1.0)
    loss = Sinkhorn()(student, teacher, labels, mask).item()
    assert loss == pytest.approx(float(np.abs(left - right).sum()), rel=1e-9)


def test_which_list_of_the_batch_is_which_changes_nothing() -> None:
    student, teacher, labels, mask = batch()
    mask[1, 3:] = False
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    before = Sinkhorn()(student, teacher, labels, mask)
    assert Sinkhorn()(*(one[order] for one in (student, teacher, labels, mask))).item() == pytest.approx(
        before.item(), rel=1e-9
    )
