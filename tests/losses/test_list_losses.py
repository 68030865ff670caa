"""Losses over lists: each against an independent formula, list by list, and the laws that all of them keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import ot
import pytest
import torch
from scipy.spatial.distance import cdist, jensenshannon
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy
from torch import Tensor

from rankdistill.losses.base import ListLoss
from rankdistill.losses.contrastive import LCE, InfoNCE
from rankdistill.losses.divergence import TAID, Divergence, JensenShannon, KLDivergence, ListNet, ReverseKL
from rankdistill.losses.divergence import TotalVariation as TV
from rankdistill.losses.margin_mse import MarginMSE, PointwiseMSE
from rankdistill.losses.pairwise import LambdaLoss, RankNet
from rankdistill.losses.plackett_luce import PLD
from rankdistill.losses.transport import Sinkhorn, transport_plan
from rankdistill.recipe import build, method_names

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Scored(NamedTuple):
    """A list's documents that are no padding: scores, labels, and whether the first of the list is a positive."""

    s: np.ndarray
    t: np.ndarray
    y: np.ndarray
    positive_first: bool


Formula = Callable[[Scored], tuple[float, float]]  # sum and count of a list


def batch(lists: int = 5, documents: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Student scores, teacher scores, labels (the first document is the positive) and a full mask."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, documents, generator=random, dtype=dtype)
    labels = torch.full((lists, documents), -1)
    labels[:, 0] = 1
    return student * 3, teacher * 5, labels, torch.ones(lists, documents, dtype=torch.bool)


def odd_batch() -> Batch:
    """With ties of either side, padding behind, before and throughout, other positives, and a list without one."""
    student, teacher, labels, mask = batch(lists=8)
    teacher[2, 1], student[5, 0] = teacher[2, 3], student[5, 4]
    mask[1, 4:], mask[3, :2], mask[6], mask[7, 1:] = False, False, False, False
    labels[0, 2], labels[2, 4], labels[4, 0], labels[5, 1] = 2, 3, 0, 1
    return student, teacher, labels, mask


def lists_of(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Iterator[Scored]:
    for s, t, y, kept in zip(*(values.detach().numpy() for values in (student, teacher, labels, mask)), strict=True):
        yield Scored(s[kept], t[kept], y[kept], bool(kept[0] and y[0] > 0))


def mean_of(formula: Formula) -> Callable[..., float]:
    def loss(*values: Tensor) -> float:
        sums, counts = zip(*(formula(one) for one in lists_of(*values) if len(one.s)), strict=True)
        return sum(sums) / sum(counts)

    return loss


def margins(all_pairs: bool) -> Formula:
    def formula(one: Scored) -> tuple[float, float]:
        places = range(len(one.s))
        pairs = [(i, j) for i in places for j in places if one.t[i] > one.t[j]]
        if not all_pairs:
            pairs = [(0, j) for j in places if j] if one.positive_first else []
        errors = [((one.s[i] - one.s[j]) - (one.t[i] - one.t[j])) ** 2 for i, j in pairs]
        return sum(errors), len(errors)

    return formula


def softmaxes(tau_s: float, tau_t: float, between: Callable[[np.ndarray, np.ndarray], float]) -> Formula:
    """`between` the teacher's and the student's distribution, of lists of two documents or more."""

    def formula(one: Scored) -> tuple[float, float]:
        several = len(one.s) > 1
        return several * float(between(softmax(one.t / tau_t), softmax(one.s / tau_s))), several

    return formula


def taid(share: float, tau: float) -> Formula:
    def formula(one: Scored) -> tuple[float, float]:
        target = softmax((1 - share) * one.s / tau + share * one.t / tau)
        return tau**2 * float(entropy(target, softmax(one.s / tau))), len(one.s) > 1

    return formula


def infonce(one: Scored, tau: float = 0.7) -> tuple[float, float]:
    competing = np.flatnonzero((np.arange(len(one.s)) == 0) | (one.y <= 0))
    if not one.positive_first or len(competing) < 2:
        return 0, 0
    return float(-log_softmax(one.s[competing] / tau)[0]), 1


def lce(one: Scored) -> tuple[float, float]:
    gains = 2.0 ** np.maximum(one.y, 0) - 1
    if not gains.any() or len(gains) < 2:
        return 0, 0
    return float(-(gains / gains.sum() * log_softmax(one.s)).sum()), 1


def pld(one: Scored, tau_s: float = 0.5, tau_t: float = 3.0) -> tuple[float, float]:
    """Choice by choice: the positive that is first, then by the teacher's score."""
    order = sorted(range(len(one.s)), key=lambda i: (not (i == 0 and one.positive_first), -one.t[i], i))
    s, sure = one.s[order] / tau_s, softmax(one.t / tau_t)[order]
    loss = sum(share * (logsumexp(s[k:]) - s[k]) for k, share in enumerate(sure))
    return (float(loss), 1) if len(s) > 1 else (0, 0)


def ranks(scores: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(-scores, kind="stable"), kind="stable") + 1.0


def ranknet(weighting: str, tau: float = 1.0) -> Formula:
    def formula(one: Scored) -> tuple[float, float]:
        wanted, now, loss, weights = ranks(one.t), ranks(one.s / tau), 0.0, 0.0

        def ndcg(places: np.ndarray) -> float:
            return float((1 / wanted / np.log2(1 + places)).sum() / (1 / wanted / np.log2(1 + wanted)).sum())

        for i, j in np.argwhere(one.t[:, None] > one.t):
            swapped = now.copy()
            swapped[[i, j]] = now[[j, i]]
            weight = {"none": 1, "rank": 1 / (wanted[i] + wanted[j]), "ndcg": abs(ndcg(swapped) - ndcg(now))}[weighting]
            loss, weights = loss + weight * math.log1p(math.exp((one.s[j] - one.s[i]) / tau)), weights + weight
        return loss, weights

    return formula


def lambdas(labels: bool, mu: float, swap: bool = True, k: int = 99, tau: float = 1.0) -> Formula:
    """NDCG-Loss2, `mu` times, plus LambdaRank's weights where `swap`."""

    def formula(one: Scored) -> tuple[float, float]:
        worth = np.maximum(one.y, 0) if labels else one.t
        wanted, now = ranks(worth), ranks(one.s / tau)
        gains = 2.0**worth - 1 if labels else 1 / wanted
        gains = gains / max((gains / np.log2(1 + wanted))[wanted <= k].sum(), 1e-9)
        loss, count = 0.0, 0
        for i, j in np.argwhere(worth[:, None] > worth):
            if min(now[i], now[j]) <= k:
                apart = abs(now[i] - now[j])
                weight = mu * (1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
                weight += swap * abs(1 / math.log2(1 + now[i]) - 1 / math.log2(1 + now[j]))
                loss += weight * abs(gains[i] - gains[j]) * math.log2(1 + math.exp((one.s[j] - one.s[i]) / tau))
                count += 1
        return loss, count

    return formula


def sinkhorn(tau: float, blur: float, iterations: int, debias: bool) -> Callable[..., float]:
    """By the POT library: the lists' softmaxes in their teacher's order are the points."""

    def cost(left: np.ndarray, right: np.ndarray) -> float:
        masses, costs = np.full(len(left), 1 / len(left)), cdist(left, right, metric="cityblock")
        plan = ot.sinkhorn(masses, masses, costs, blur, numItermax=iterations, stopThr=0, warn=False)
        return float((plan * costs).sum())

    def loss(*values: Tensor) -> float:
        width, points = values[0].shape[1], []
        for one in lists_of(*values):
            if len(one.s) > 1:
                order = np.argsort(-one.t, kind="stable")
                sides = [softmax(scores / tau)[order] for scores in (one.s, one.t)]
                points.append([np.pad(side, (0, width - len(side))) for side in sides])
        left, right = np.array(points).swapaxes(0, 1)
        bias = (cost(left, left) + cost(right, right)) / 2 if debias else 0.0
        return cost(left, right) - bias

    return loss


# name → the loss, and what it must be
CASES: dict[str, tuple[ListLoss, Callable[..., float]]] = {
    "mse": (PointwiseMSE(), mean_of(lambda one: (((one.s - one.t) ** 2).sum(), len(one.s)))),
    "margin_mse": (MarginMSE(), mean_of(margins(all_pairs=False))),
    "margin_mse all_pairs": (MarginMSE(pairs="all_pairs"), mean_of(margins(all_pairs=True))),
    "infonce": (InfoNCE(temperature=0.7), mean_of(infonce)),
    "lce": (LCE(), mean_of(lce)),
    "kl": (KLDivergence(2.0, 1.5), mean_of(softmaxes(2.0, 1.5, lambda p, q: 4 * entropy(p, q)))),
    "reverse_kl": (ReverseKL(2.0, 1.5), mean_of(softmaxes(2.0, 1.5, lambda p, q: 4 * entropy(q, p)))),
    "jensen_shannon": (JensenShannon(1.5), mean_of(softmaxes(1.5, 1.5, lambda p, q: 2.25 * jensenshannon(p, q) ** 2))),
    "total_variation": (TV(1.5, 0.5), mean_of(softmaxes(1.5, 0.5, lambda p, q: 1.5 * np.maximum(p - q, 0).sum()))),
    "listnet": (ListNet(1.5), mean_of(softmaxes(1.5, 1.5, lambda p, q: -(p * np.log(q)).sum()))),
    "taid": (TAID(start=0.25, temperature=2.0), mean_of(taid(0.25, 2.0))),
    "taid at its end": (TAID(start=1.0, temperature=2.0), mean_of(taid(1.0, 2.0))),
    "pld": (PLD(0.5, 3.0), mean_of(pld)),
    "ranknet": (RankNet(), mean_of(ranknet("none"))),
    "ranknet rank": (RankNet("rank", temperature=0.8), mean_of(ranknet("rank", 0.8))),
    "ranknet ndcg": (RankNet("ndcg"), mean_of(ranknet("ndcg"))),
    "lambda_loss": (LambdaLoss(mu=3.0, temperature=0.8), mean_of(lambdas(False, 3.0, tau=0.8))),
    "lambda_loss ndcg2": (LambdaLoss(weighting="ndcg2", mu=3.0, k=3), mean_of(lambdas(False, 1.0, swap=False, k=3))),
    "lambda_loss labels": (LambdaLoss("labels", mu=7.0), mean_of(lambdas(True, 7.0))),
    "lambda_loss labels k": (LambdaLoss("labels", mu=7.0, k=2), mean_of(lambdas(True, 7.0, k=2))),
    "sinkhorn": (Sinkhorn(2.0), sinkhorn(2.0, 0.1, 20, True)),
    "sinkhorn published": (Sinkhorn(2.0, blur=0.5, iterations=5, debias=False), sinkhorn(2.0, 0.5, 5, False)),
}
LOSSES = {name: loss for name, (loss, _) in CASES.items()}
SOFTMAXES = {"kl", "reverse_kl", "jensen_shannon", "total_variation", "listnet", "taid", "taid at its end", "sinkhorn"}
PAIRS = {name for name in LOSSES if name.startswith(("ranknet", "lambda_loss"))}
LABELLED = {"margin_mse", "infonce", "lce", "lambda_loss labels", "lambda_loss labels k"}


@pytest.mark.parametrize("name", CASES)
def test_it_equals_an_independent_formula(name: str) -> None:
    loss, formula = CASES[name]
    values = odd_batch()
    assert loss(*values).item() == pytest.approx(formula(*values), rel=1e-9)


# -- what changes nothing ---------------------------------------------------------------------------------------------

SHIFT = torch.tensor([[100.0], [-3.0], [0.5], [7.0], [-40.0]], dtype=torch.float64)


def shuffled(values: Batch) -> list[Tensor]:
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(one)) for one in range(5)])
    return [each.gather(1, order) for each in values]


# law → the losses that keep it, and the change of a batch
LAWS: dict[str, tuple[set[str], Callable[[Batch], Any]]] = {
    "a shift of a query's teacher scores": (set(LOSSES) - {"mse"}, lambda b: (b[0], b[1] + SHIFT, *b[2:])),
    "a shift of a query's student scores": (set(LOSSES) - {"mse"}, lambda b: (b[0] + SHIFT, *b[1:])),
    "the scale of the teacher's scores": (
        {*PAIRS, "infonce", "lce"},
        lambda b: (b[0], b[1] * 2, *b[2:]),
    ),
    "which document is which": ({"margin_mse all_pairs", "mse", *SOFTMAXES, *PAIRS, "lce"}, shuffled),
    "which list is which": (set(LOSSES), lambda b: [each[[3, 0, 1, 4, 2]] for each in b]),
    "weights that are all alike": (set(LOSSES), lambda b: (*b, torch.full((5,), 1.0, dtype=torch.float64))),
}


@pytest.mark.parametrize(("law", "name"), [(law, name) for law, (names, _) in LAWS.items() for name in sorted(names)])
def test_what_changes_no_loss(law: str, name: str) -> None:
    values = batch()
    before, after = LOSSES[name](*values).item(), LOSSES[name](*LAWS[law][1](values)).item()
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("name", ["mse", "margin_mse", "margin_mse all_pairs", *sorted(SOFTMAXES), "pld"])
def test_the_teachers_scale_does_matter(name: str) -> None:
    student, teacher, labels, mask = batch()
    before, after = (LOSSES[name](student, scores, labels, mask).item() for scores in (teacher, teacher * 2))
    assert abs(after - before) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_neither_the_loss_nor_the_gradient(name: str) -> None:
    student, teacher, labels, mask = batch(documents=4)
    plain = LOSSES[name](student.requires_grad_(), teacher, labels, mask)
    (gradient,) = torch.autograd.grad(plain, student)

    def padded(values: Tensor, filler: float) -> Tensor:
        return torch.cat([values, torch.full((len(values), 3), filler).to(values.dtype)], dim=1)

    wide = padded(student.detach(), 1e4).requires_grad_()
    loss = LOSSES[name](wide, padded(teacher, -1e4), padded(labels, 1), padded(mask, 0))
    (wide_gradient,) = torch.autograd.grad(loss, wide)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(wide_gradient[:, :4], gradient)
    assert not wide_gradient[:, 4:].any()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"sinkhorn", "sinkhorn published"}))
def test_a_list_of_weight_0_is_left_out(name: str) -> None:
    """(Sinkhorn's lists meet in one plan: there it is the list's own mass alone.)"""
    values, weights = batch(), torch.tensor([1.0, 1, 0, 1, 0], dtype=torch.float64)
    kept = [each[weights > 0] for each in values]
    assert LOSSES[name](*values, weights).item() == pytest.approx(LOSSES[name](*kept).item(), rel=1e-12)


# -- what teaches nothing ---------------------------------------------------------------------------------------------


def emptied(what: str, values: Batch, rows: Any) -> Batch:
    student, teacher, labels, mask = (each.clone() for each in values)
    if what == "padding":
        mask[rows] = False
    elif what == "one document":
        mask[rows, 1:] = False
    elif what == "no positive":
        labels[rows] = 0
    else:
        teacher[rows], labels[rows] = 1.0, 1
    return student.requires_grad_(), teacher, labels, mask


# what a list is → the losses that learn nothing from it
NOTHING = {
    "padding": set(LOSSES),
    "one document": set(LOSSES) - {"mse"},
    "no positive": LABELLED,
    "ties": {*PAIRS, "margin_mse all_pairs"},
}


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, names in NOTHING.items() for name in sorted(names)])
def test_a_list_with_nothing_to_learn_counts_nothing(what: str, name: str) -> None:
    """No gradient, and the mean is not diluted; where all lists are such, the loss is 0 and its gradient too."""
    values = emptied(what, batch(), [2])
    loss = LOSSES[name](*values)
    (gradient,) = torch.autograd.grad(loss, values[0])
    assert gradient.isfinite().all() and not gradient[2].any() and gradient[0].any()
    assert loss.item() == pytest.approx(LOSSES[name](*(each[[0, 1, 3, 4]] for each in values)).item(), rel=1e-12)
    values = emptied(what, batch(), slice(None))
    loss = LOSSES[name](*values)
    loss.backward()
    assert loss.item() == 0.0 and values[0].grad is not None and not values[0].grad.any()  # NaN counts as something


# -- numbers ----------------------------------------------------------------------------------------------------------

ALIKE = torch.full((5, 6), 3.0)
ODD_SCORES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "a spread of 1e3": lambda student, teacher: (student * 1e3, teacher * 1e3),
    "a spread of 1e6": lambda student, teacher: (student * 1e6, teacher * 1e6),
    "a teacher of ties": lambda student, teacher: (student, ALIKE),
    "a student of ties": lambda student, teacher: (ALIKE, teacher),
    "nothing but ties": lambda student, teacher: (ALIKE, ALIKE),
}


@pytest.mark.parametrize("odd", ODD_SCORES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_stay_finite_in_float32(name: str, odd: str) -> None:
    """Where a softmax underflows its logarithm must not be taken; a ratio of two zeros would show in ties."""
    student, teacher, labels, mask = batch(dtype=torch.float32)
    student, teacher = ODD_SCORES[odd](student, teacher)
    student = student.clone().requires_grad_()
    loss = LOSSES[name](student, teacher, labels, mask)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"taid"}))  # its target follows the student: test_taid.py
def test_gradients_are_right(name: str) -> None:
    student, teacher, labels, mask = batch(lists=3, documents=4)
    mask[1, 3], labels[2, 2] = False, 1
    loss = LOSSES[name]
    assert torch.autograd.gradcheck(lambda scores: loss(scores, teacher, labels, mask), student.requires_grad_())


DIVERGENCES = [KLDivergence, ReverseKL, JensenShannon, TV]
EXACT = [MarginMSE(), MarginMSE(pairs="all_pairs"), *(kind(2.0) for kind in DIVERGENCES)]


@pytest.mark.parametrize("loss", [*EXACT, TAID(temperature=2.0), Sinkhorn(2.0)], ids=lambda one: one.type)
def test_a_perfect_student_has_loss_zero(loss: ListLoss) -> None:
    """Exactly 0 in float32; for a student that is off by a constant a query too."""
    _, teacher, labels, mask = batch(dtype=torch.float32)
    assert loss(teacher.clone(), teacher, labels, mask).item() == 0.0
    whole = teacher.round()  # so that adding a constant rounds nothing
    assert loss(whole + 16.0, whole, labels, mask).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", [*sorted(PAIRS - {"lambda_loss labels", "lambda_loss labels k"}), "pld"])
def test_the_right_order_costs_less_and_less_the_clearer_it_is(name: str) -> None:
    _, teacher, labels, mask = batch()
    teacher[:, 0] = teacher.amax(dim=1) + 1
    right, clear, wrong = (LOSSES[name](teacher * factor, teacher, labels, mask).item() for factor in (1, 9, -1))
    assert clear < right < wrong
    if name != "pld":  # it reads the teacher's order alone
        monotone = LOSSES[name](teacher, teacher.exp() * 3, labels, mask).item()
        assert monotone == pytest.approx(right, rel=1e-12)


# -- divergences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "most"), [(JensenShannon(), math.log(2)), (TV(), 1.0)], ids=["js", "tv"])
def test_symmetric_ones_are_symmetric_and_bounded(loss: Divergence, most: float) -> None:
    student, teacher, labels, mask = batch()
    other = loss(teacher, student, labels, mask).item()
    assert loss(student, teacher, labels, mask).item() == pytest.approx(other, rel=1e-12)
    apart = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    assert loss(apart, -apart, labels[:1, :2], mask[:1, :2]).item() == pytest.approx(most, rel=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_temperature_changes_neither_the_gradients_size_nor_loses_a_number(kind: type[Divergence]) -> None:
    student, teacher, labels, mask = batch()
    student.requires_grad_()
    norms = [
        torch.autograd.grad(kind(temperature)(student, teacher, labels, mask), student)[0].norm().item()
        for temperature in (50.0, 500.0)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.2)
    # Spread by temperature above 100: the softmax is 0 in float32.
    teacher = torch.tensor([[0.0, 30.0, 10.0], [5.0, -20.0, 3.0]])
    small, exact = (kind(0.05)(t.flip(1), t, labels[:2, :3], mask[:2, :3]) for t in (teacher, teacher.double()))
    assert small.item() > 0 and small.item() == pytest.approx(exact.item(), rel=1e-5)


def test_listnet_has_the_gradient_of_the_kl_divergence() -> None:
    values = odd_batch()
    values[0].requires_grad_()
    torch.testing.assert_close(
        *(torch.autograd.grad(loss(*values), values[0])[0] for loss in (ListNet(), KLDivergence()))
    )


# -- theorems ---------------------------------------------------------------------------------------------------------


def test_lambda_loss_bounds_what_is_lost_in_ndcg() -> None:
    """The sum over pairs of NDCG-Loss2 is at least 1 - nDCG."""
    for seed in range(20):
        student, _, _, mask = batch(documents=5, seed=seed)
        labels = torch.randint(0, 4, student.shape, generator=torch.Generator().manual_seed(seed))
        sums, _ = LambdaLoss("labels", "ndcg2").terms(student, student, labels, mask)
        for loss, s, y in zip(sums.tolist(), student.numpy(), labels.numpy(), strict=True):
            dcg, ideal = (((2.0**y - 1) / np.log2(1 + ranks(order))).sum() for order in (s, y))
            assert not ideal or loss >= 1 - dcg / ideal - 1e-12


def test_pld_is_convex_in_the_students_scores() -> None:
    student, teacher, labels, mask = batch(200, seed=1)
    other = batch(200, seed=2)[0] * 2
    of = lambda scores: PLD().terms(scores, teacher, labels, mask)[0]  # noqa: E731
    for share in (0.1, 0.5, 0.8):
        assert (
            of(share * student + (1 - share) * other) <= share * of(student) + (1 - share) * of(other) + 1e-12
        ).all()


def test_with_little_blur_sinkhorn_is_exact_transport_and_of_one_list_total_variation_twice() -> None:
    values = batch(lists=7, documents=5)
    points = [[softmax(side)[np.argsort(-one.t)] for side in (one.s, one.t)] for one in lists_of(*values)]
    left, right = np.array(points).swapaxes(0, 1)
    exact = ot.emd2([], [], cdist(left, right, metric="cityblock"))
    loss = Sinkhorn(blur=2e-3, iterations=500, debias=False)(*values)
    assert loss.item() == pytest.approx(exact, rel=1e-2)
    alone = Sinkhorn()(*(each[:1] for each in values)).item()
    assert alone == pytest.approx(float(np.abs(left[0] - right[0]).sum()), rel=1e-9)


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
    student = (teacher + 1e-9).requires_grad_()
    loss = Sinkhorn(blur=0.5, debias=False)(student, teacher, labels, mask)
    assert torch.autograd.grad(loss, student)[0].norm() > 1e-3  # even a perfect student is pulled to the middle


# -- what a loss says of itself ---------------------------------------------------------------------------------------


def test_weights_are_settings_of_every_loss() -> None:
    names = method_names("loss")
    assert len(names) >= 17
    for name in names:
        loss = build("loss", {"type": name, "weight": 2.5})
        loss.at_step(10, 10)  # regularisers come to their weight by a ramp
        assert loss.strength() == 2.5


def test_losses_say_what_they_need() -> None:
    assert {name for name, loss in LOSSES.items() if loss.over_pairs} == {"margin_mse all_pairs", *PAIRS}
    assert {name for name, loss in LOSSES.items() if loss.needs_labels} == LABELLED
    assert {name for name, loss in LOSSES.items() if not loss.needs_teacher} == LABELLED - {"margin_mse"}
