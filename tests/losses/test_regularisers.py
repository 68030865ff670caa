"""Penalties against sentence-transformers and plain formulas; the ramp and the controller by what they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SparseMarginMSELoss, SpladeLoss
from torch import Tensor
from transformers import TrainerState

from rankdistill.errors import UsageError
from rankdistill.losses.regularisers import L1, L2, Controller, DfFlops, Flops, IdfFlops, Sparsity
from rankdistill.recipe import build

TERMS = 50
REGULARISERS = ("flops", "l1", "l2", "idf_flops", "df_flops")


def made(name: str, **settings: Any) -> Sparsity:
    loss: Sparsity = build("loss", {"type": name, **settings})
    if loss.needs_idf:
        loss.use_idf(torch.linspace(0.1, 5, TERMS))
    return loss


def term_weights(texts: int = 12, seed: int = 0, density: float = 0.3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    weights = torch.rand(texts, TERMS, generator=random)
    # The share of active terms differs from text to text.
    kept = torch.rand(texts, TERMS, generator=random) < density * 2 * torch.rand(texts, 1, generator=random)
    return weights * kept


@pytest.mark.parametrize("threshold", [None, 0, 5, 15, 60])
def test_flops_equal_those_of_sentence_transformers(threshold: int | None) -> None:
    weights = term_weights()
    theirs = FlopsLoss(None, threshold=threshold).compute_loss_from_embeddings(weights)  # type: ignore[arg-type]
    ours = Flops(threshold=threshold)(weights)  # type: ignore[arg-type]
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_the_others_by_their_formulas() -> None:
    weights, idf = term_weights(), torch.linspace(1, 5, TERMS)
    loss = IdfFlops(power=2.0)
    loss.use_idf(idf)
    for ours, theirs in (
        (L1()(weights), weights.abs().sum(dim=1).mean()),
        (L2()(weights), (weights.norm(dim=1) ** 2).mean()),
        # It presses as FLOPS do on the w of a student that scores Σ IDF·w.
        (loss(weights), Flops()(weights / idf) * idf.mean() ** 2),
    ):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    loss.use_idf(torch.tensor([0.005] + [4.2] * (TERMS - 1)))  # a term of every document does not outweigh all others
    assert float(loss.factors.max()) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("batch", [8, 16, 32, 128])
def test_flops_depend_on_the_batch_as_the_formula_says(batch: int) -> None:
    every = term_weights(texts=4000, seed=3)
    mean, variance = every.mean(dim=0), every.var(dim=0)
    measured = torch.stack([Flops()(part) for part in every.split(batch) if len(part) == batch]).mean()
    assert float(measured) == pytest.approx(float((mean**2 + variance / batch).sum()), rel=0.01)


def test_df_flops_cost_what_the_share_of_documents_says() -> None:
    loss = DfFlops(midpoint=0.2)
    shares = torch.tensor([0.0, 0.001, 0.1, 0.2, 0.4, 1.0])
    cost = loss.cost(shares)
    assert cost[0] == 0 and cost[3] == pytest.approx(0.5, abs=1e-5) and cost[5] == 1
    assert (cost.diff() > 0).all() and cost[1] < 1e-6


def test_df_flops_count_shares_over_many_batches() -> None:
    loss = DfFlops(memory=100)
    batches = [term_weights(texts=20, seed=seed) for seed in range(5)]
    shares = (batches[0] > 0).double().mean(dim=0)
    for number, weights in enumerate(batches):
        if number:
            shares = 0.8 * shares + 0.2 * (weights > 0).double().mean(dim=0)
        expected = (loss.cost(shares.float()) * weights.mean(dim=0)).square().sum()
        assert float(loss(weights)) == pytest.approx(float(expected), rel=1e-5)
    # They are loaded where they stopped; measuring a student moves nothing.
    second = DfFlops(memory=100)
    second.load_state_dict(loss.state_dict())
    assert loss.shares is not None and second.shares is not None and torch.equal(second.shares, loss.shares)
    assert torch.equal(loss.eval()(weights), loss(weights)) and torch.equal(second.shares, loss.shares)


@pytest.mark.parametrize("name", REGULARISERS)
def test_gradients(name: str) -> None:
    weights = term_weights(texts=4).double().requires_grad_()
    loss = made(name).eval()  # eval: the running means stay as they are
    if isinstance(loss, IdfFlops):
        loss.factors = loss.factors.double()
    positive = weights.detach() > 0
    assert torch.autograd.gradcheck(lambda w: loss(torch.where(positive, w, 0.0)), [weights])


@pytest.mark.parametrize("name", REGULARISERS)
def test_texts_with_few_terms_feel_nothing(name: str) -> None:
    weights = term_weights().requires_grad_()
    active = (weights > 0).sum(dim=1)
    made(name, threshold=15)(weights).backward()
    assert weights.grad is not None and active.min() <= 15 < active.max()
    felt = (weights.grad != 0).any(dim=1)
    assert torch.equal(felt, active > 15)


@pytest.mark.parametrize("name", REGULARISERS)
def test_nothing_active_costs_nothing_and_stays_finite(name: str) -> None:
    weights = torch.zeros(3, TERMS, requires_grad=True)
    loss = made(name, target=5)(weights)
    loss.backward()
    assert loss.item() == 0 and weights.grad is not None and torch.isfinite(weights.grad).all()


# -- λ over a training ------------------------------------------------------------------------------------------------


def test_the_ramp_is_that_of_sentence_transformers() -> None:
    steps = 90
    inner = SparseMarginMSELoss(None)  # type: ignore[arg-type]
    theirs = SpladeLoss(None, inner, document_regularizer_weight=0.08, query_regularizer_weight=0.1)  # type: ignore[arg-type]
    schedule = SpladeRegularizerWeightSchedulerCallback(theirs)
    state = TrainerState(max_steps=steps)
    schedule.on_train_begin(None, state, None)  # type: ignore[arg-type]
    ours = Flops(weight=0.08)
    for step in range(steps):
        state.global_step = step
        schedule.on_step_begin(None, state, None)  # type: ignore[arg-type]
        ours.at_step(step, steps)
        assert ours.strength() == pytest.approx(theirs.document_regularizer_weight, abs=1e-9)
    assert ours.strength() == 0.08

    loss = made("flops", weight={"start": 0.0, "end": 1.0, "over": 10, "shape": "linear"})
    loss.at_step(5, 100)
    assert loss.strength() == pytest.approx(0.5)
    constant = made("flops", weight=0.3, ramp=0)
    constant.at_step(0, 100)
    assert constant.strength() == 0.3


def toy_training(loss: Sparsity, texts: int, steps: int, rate: float = 0.1, stop: int | None = None) -> Any:
    """Weights relu(θ) that want to stay as they are, and a penalty that wants them away; the active terms of each step.

    Yields after each step, so that a caller can look at and copy what there is.
    """
    random = torch.Generator().manual_seed(1)
    wanted = torch.randn(texts, 400, generator=random) + 1.0
    theta = wanted.clone().requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=rate)
    for step in range(steps):
        loss.at_step(step, steps)
        for _ in range(2):  # two batches a step
            total = (theta - wanted).square().sum(dim=1).mean() / 2 + loss.strength() / 2 * loss(theta.relu())
            total.backward()
        optimiser.step()
        optimiser.zero_grad()
        yield float((theta > 0).float().sum(dim=1).mean())


@pytest.mark.parametrize("name", ["flops", "l1", "df_flops"])
@pytest.mark.parametrize("texts", [8, 128])
def test_the_controller_finds_the_weight_at_any_batch_size(name: str, texts: int) -> None:
    loss = build("loss", {"type": name, "target": 100, "weight": 10.0})
    active = list(toy_training(loss, texts, 400))
    assert np.mean(active[-40:]) == pytest.approx(100, rel=0.1)
    assert min(active) > 60  # without a dive below, from which real terms do not come back
    halfway = active[400 // 6]  # in the middle of the ramp
    assert 130 < halfway < 300


def test_the_controller_goes_on_exactly_where_it_was_stopped() -> None:
    def factors(loss: Sparsity, batches: list[Tensor], first: int) -> list[float]:
        found = []
        for step, weights in enumerate(batches, first):
            loss.at_step(step, 40)
            loss(weights)
            found.append(loss.strength())
        return found

    batches = [term_weights(seed=seed, density=0.5 / (1 + seed)) for seed in range(20)]
    whole, first, second = (build("loss", {"type": "flops", "target": 3}) for _ in range(3))
    expected = factors(whole, batches, 0)
    assert factors(first, batches[:9], 0) == expected[:9]
    second.load_state_dict(first.state_dict())
    assert factors(second, batches[9:], 9) == expected[9:]
    assert len(set(expected)) == 20


def test_the_controller_counts_optimiser_steps_not_batches() -> None:
    one, many = Controller(10), Controller(10)
    for step in range(5):
        for controller, batches in ((one, 1), (many, 4)):
            for _ in range(batches):
                controller.at_step(step, 1.0)
                controller.observe(torch.tensor(100.0 - step))
    assert one.factor == many.factor > 1


@pytest.mark.parametrize("wrong", [{"target": 0}, {"threshold": -1}, {"side": "both"}, {"ramp": -1}, {"midpoint": 1.5}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build("loss", {"type": "df_flops", **wrong})
