"""TAID: its target, how lambda moves, and that its state is part of a checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankdistill.losses.divergence import TAID


def batch(seed: int = 0, lists: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, 6, generator=random) * 3
    return student, teacher, torch.full((lists, 6), -1), torch.ones(lists, 6, dtype=torch.bool)


def trained(loss: TAID, steps: int, of: int, start: int = 0, batches: int = 1) -> list[float]:
    """lambda at each step of a training whose student comes nearer and nearer."""
    shares = []
    for step in range(start, start + steps):
        for part in range(batches):
            loss.at_step(step, of)
            student, teacher, labels, mask = batch(step * batches + part)
            loss(teacher + (student - teacher) * 0.95**step, teacher, labels, mask)
        shares.append(loss.share.item())
    return shares


def test_the_target_is_between_student_and_teacher_and_takes_no_gradient() -> None:
    student, teacher, labels, mask = batch()
    student.requires_grad_()
    loss = TAID(start=0.3, temperature=2.0, teacher_temperature=1.5)
    target = (0.7 * student.detach() / 2 + 0.3 * teacher / 1.5).softmax(1)
    expected = 4 * torch.nn.functional.kl_div((student / 2).log_softmax(1), target, reduction="batchmean")
    found = loss(student, teacher, labels, mask)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(one, student)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_linear_lambda_rises_from_start_to_end() -> None:
    loss = TAID(start=0.4, end=0.9, adaptive=False)
    shares = trained(loss, 101, of=100)
    assert shares == pytest.approx([0.4 + 0.5 * step / 100 for step in range(101)], rel=1e-6)
    assert trained(loss, 5, of=100, start=101) == pytest.approx([0.9] * 5, rel=1e-6)


def test_adaptive_lambda_equals_the_definition() -> None:
    loss = TAID(rate=0.05, momentum=0.9)
    share, trend, previous, now = 0.4, 0.0, None, None
    for step in range(40):
        if now is not None:
            linear = 0.4 + 0.6 * step / 200
            if previous is not None:
                trend = 0.9 * trend + 0.1 * max((previous - now) / previous, -1)
                share += 0.05 / (1 + math.exp(-trend)) * (1 - share)
            share = min(max(share, linear), 1.0)
            previous = now
        loss.at_step(step, 200)
        assert loss.share.item() == pytest.approx(share, rel=1e-5)
        assert loss.trend.item() == pytest.approx(trend, rel=1e-4, abs=1e-6)
        student, teacher, labels, mask = batch(step)
        now = loss(teacher + (student - teacher) * 0.9**step, teacher, labels, mask).item()


def test_lambda_never_falls_and_a_faster_fall_of_the_loss_moves_it_faster() -> None:
    torch.manual_seed(0)
    loss = TAID(rate=0.2, momentum=0.5)
    shares = []
    for step in range(60):  # losses that go up and down
        loss.at_step(step, 100)
        student, teacher, labels, mask = batch(step)
        loss(student * torch.rand(()) * 10, teacher, labels, mask)
        shares.append(loss.share.item())
    assert shares == sorted(shares) and shares[-1] <= 1.0
    falling, rising = TAID(rate=0.2, momentum=0.0), TAID(rate=0.2, momentum=0.0)
    student, teacher, labels, mask = batch()
    for step in range(4):
        for one, factor in ((falling, 0.5**step), (rising, 2.0**step)):
            one.at_step(step, 10_000)
            one(teacher + (student - teacher) * 0.2 * factor, teacher, labels, mask)
    assert 0.4 < rising.share.item() < falling.share.item()


def test_batches_of_one_step_move_lambda_once_by_their_mean() -> None:
    """Accumulation: 2 batches of 5 lists a step are one of 10."""
    halves, whole = TAID(rate=0.1), TAID(rate=0.1)
    for step in range(6):
        parts = [batch(step * 2 + part) for part in range(2)]
        for part in parts:
            halves.at_step(step, 50)
            halves(*part)
        whole.at_step(step, 50)
        whole(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        assert halves.share.item() == pytest.approx(whole.share.item(), rel=1e-6)
        assert halves.trend.item() == pytest.approx(whole.trend.item(), rel=1e-4, abs=1e-7)


def test_a_resumed_training_goes_on_with_the_same_lambda_bit_for_bit() -> None:
    through, first, second = (TAID(rate=0.1, momentum=0.9) for _ in range(3))
    whole, before = trained(through, 30, of=100, batches=2), trained(first, 13, of=100, batches=2)
    second.load_state_dict(first.state_dict())  # a checkpoint is written after the step, before the next is told
    assert before + trained(second, 17, of=100, start=13, batches=2) == whole
    assert all(one.equal(other) for one, other in zip(through.buffers(), second.buffers(), strict=True))
    assert {name for name, _ in through.named_buffers()} == set(through.state_dict())


def test_a_perfect_student_leaves_the_state_finite_and_a_look_outside_of_training_as_it_is() -> None:
    loss = TAID(rate=0.1, momentum=0.5)
    _, teacher, labels, mask = batch()
    for step, factor in enumerate((1.0, 1.0, 0.5, 1.0)):  # losses 0, 0, above 0, 0
        loss.at_step(step, 10)
        loss(teacher * factor, teacher, labels, mask)
    loss.at_step(4, 10)
    assert all(value.isfinite() for value in loss.buffers()) and loss.share.item() < 1
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.eval()(*batch(9))
    assert all(value.equal(before[name]) for name, value in loss.state_dict().items())
