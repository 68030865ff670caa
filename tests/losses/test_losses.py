"""Each loss against another library or a slow loop, and the traps that public implementations fell into."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from torch import Tensor

from rankdistill.losses.base import ListLoss
from rankdistill.losses.contrastive import InfoNCE
from rankdistill.losses.divergence import JensenShannon, KLDivergence, ListNet, ReverseKL, TotalVariation
from rankdistill.losses.lambda_loss import LambdaLoss
from rankdistill.losses.margin_mse import MarginMSE
from rankdistill.losses.plackett_luce import PLD
from rankdistill.losses.pointwise import PointwiseMSE
from rankdistill.losses.ranknet import RankNet
from rankdistill.losses.taid import TAID
from rankdistill.losses.transport import Sinkhorn
from rankdistill.recipe import build, method_names

LOSSES: dict[str, ListLoss] = {
    "margin_mse": MarginMSE(),
    "margin_mse all_pairs": MarginMSE(pairs="all_pairs"),
    "infonce": InfoNCE(temperature=0.7),
    "kl": KLDivergence(temperature=2.0, teacher_temperature=1.5),
    "listnet": ListNet(temperature=1.5),
    "mse": PointwiseMSE(),
    "ranknet": RankNet(),
    "ranknet rank": RankNet("rank", temperature=0.8),
    "ranknet ndcg": RankNet("ndcg"),
    "reverse_kl": ReverseKL(temperature=2.0, teacher_temperature=1.5),
    "jensen_shannon": JensenShannon(temperature=1.5),
    "total_variation": TotalVariation(temperature=1.5),
    "taid": TAID(start=1.0, temperature=2.0, teacher_temperature=1.5),
    "pld": PLD(teacher_temperature=2.0),
    "sinkhorn": Sinkhorn(temperature=2.0),
    "sinkhorn published": Sinkhorn(temperature=2.0, debias=False),
    "lambda_loss": LambdaLoss(temperature=0.8),
    "lambda_loss ndcg2": LambdaLoss(weighting="ndcg2", k=3),
    "lambda_loss labels": LambdaLoss(gain="labels"),
}
RANKNETS = ["ranknet", "ranknet rank", "ranknet ndcg"]
LAMBDAS = ["lambda_loss", "lambda_loss ndcg2"]
SOFTMAXES = ["kl", "listnet", "reverse_kl", "jensen_shannon", "total_variation", "taid", "sinkhorn"]
# Losses that a perfect student does not pay at all.
EXACT: dict[str, ListLoss] = {
    "margin_mse": MarginMSE(),
    "margin_mse all_pairs": MarginMSE(pairs="all_pairs"),
    "kl": KLDivergence(temperature=2.0),
    "reverse_kl": ReverseKL(temperature=2.0),
    "jensen_shannon": JensenShannon(temperature=2.0),
    "total_variation": TotalVariation(temperature=2.0),
    "taid": TAID(temperature=2.0),
    "sinkhorn": Sinkhorn(temperature=2.0),
}


def batch(
    lists: int = 5, documents: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student scores, teacher scores, labels (the first document is the positive) and a full mask."""
    random = torch.Generator().manual_seed(seed)
    student = torch.randn(lists, documents, generator=random, dtype=dtype) * 3
    teacher = torch.randn(lists, documents, generator=random, dtype=dtype) * 5
    labels = torch.full((lists, documents), -1)
    labels[:, 0] = 1
    return student, teacher, labels, torch.ones(lists, documents, dtype=torch.bool)


def slow_margin_mse(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, pairs: str) -> float:
    """The definition, pair by pair, in Python's double precision."""
    errors = []
    for s, t, y, m in zip(student.tolist(), teacher.tolist(), labels.tolist(), mask.tolist(), strict=True):
        here = [place for place, kept in enumerate(m) if kept]
        if pairs == "positive_vs_rest":
            chosen = [(0, j) for j in here if j != 0] if m[0] and y[0] > 0 else []
        else:
            chosen = [(i, j) for i in here for j in here if t[i] > t[j]]
        errors += [((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in chosen]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("pairs", ["positive_vs_rest", "all_pairs"])
def test_margin_mse_equals_the_definition(pairs: Any) -> None:
    student, teacher, labels, mask = batch(lists=7)
    teacher[2, 1] = teacher[2, 3]  # a tie is no pair
    mask[1, 4:] = False
    mask[3, 2:] = False
    labels[4, 0] = 0  # a list without a positive
    loss = MarginMSE(pairs=pairs)(student, teacher, labels, mask)
    assert loss.item() == pytest.approx(slow_margin_mse(student, teacher, labels, mask, pairs), rel=1e-12)


class _Fixed(torch.nn.Module):
    """An encoder that returns given embeddings: what MarginMSELoss needs of a model."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}


def test_margin_mse_equals_sentence_transformers() -> None:
    random = torch.Generator().manual_seed(3)
    queries, documents = torch.randn(6, 8, generator=random), torch.randn(6, 5, 8, generator=random)
    _, teacher, labels, mask = batch(6, 5, torch.float32)
    student = torch.einsum("qd,qnd->qn", queries, documents)
    model = SentenceTransformer(modules=[_Fixed()], device="cpu")
    reference = MarginMSELoss(model)
    columns = [{"vectors": queries}, *({"vectors": documents[:, column]} for column in range(5))]
    expected = reference(columns, teacher[:, :1] - teacher[:, 1:])
    assert MarginMSE()(student, teacher, labels, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_margin_mse_averages_over_pairs_not_over_a_matrix_with_its_diagonal() -> None:
    """The trap: a mean over n documents, the pair of the positive with itself among them, is (n-1)/n of the loss."""
    student, teacher, labels, mask = batch(documents=5)
    error = ((student[:, :1] - student) - (teacher[:, :1] - teacher)).square()
    assert MarginMSE()(student, teacher, labels, mask).item() == pytest.approx(error.mean().item() * 5 / 4, rel=1e-12)
    margins = (student[:, :, None] - student[:, None]) - (teacher[:, :, None] - teacher[:, None])
    all_pairs = MarginMSE(pairs="all_pairs")(student, teacher, labels, mask).item()
    assert all_pairs == pytest.approx(margins.square().mean().item() * 5 / 4, rel=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_a_perfect_student_has_loss_zero(name: str) -> None:
    """Exactly 0, also in float32 and for a student that is off by a constant a query. The trap: a KL divergence that
    is handed probabilities in place of their logarithms is not 0 here."""
    loss = EXACT[name]
    _, teacher, labels, mask = batch(dtype=torch.float32)
    assert loss(teacher.clone(), teacher, labels, mask).item() == 0.0
    # Whole numbers, so that adding a constant rounds nothing.
    whole = teacher.round()
    assert loss(whole + 16.0, whole, labels, mask).item() == pytest.approx(0.0, abs=1e-6 if name == "taid" else 1e-12)


@pytest.mark.parametrize("name", ["margin_mse", "margin_mse all_pairs", *SOFTMAXES, "pld", *RANKNETS, *LAMBDAS])
def test_a_shift_of_a_querys_teacher_scores_changes_nothing(name: str) -> None:
    student, teacher, labels, mask = batch()
    shift = torch.tensor([[100.0], [-3.0], [0.5], [7.0], [-40.0]], dtype=torch.float64)
    before, after = (LOSSES[name](student, scores, labels, mask).item() for scores in (teacher, teacher + shift))
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mse"])
def test_a_shift_of_a_querys_student_scores_changes_nothing(name: str) -> None:
    student, teacher, labels, mask = batch()
    shift = torch.tensor([[100.0], [-3.0], [0.5], [7.0], [-40.0]], dtype=torch.float64)
    before, after = (LOSSES[name](scores, teacher, labels, mask).item() for scores in (student, student + shift))
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("name", ["margin_mse all_pairs", "mse", *SOFTMAXES, *RANKNETS, *LAMBDAS, "lambda_loss labels"])
def test_the_order_of_a_lists_documents_changes_nothing(name: str) -> None:
    student, teacher, labels, mask = batch()
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(one)) for one in range(5)])
    shuffled = [values.gather(1, order) for values in (student, teacher, labels, mask)]
    before, after = LOSSES[name](student, teacher, labels, mask), LOSSES[name](*shuffled)
    assert after.item() == pytest.approx(before.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["margin_mse", "margin_mse all_pairs", *SOFTMAXES, "mse"])
def test_the_teachers_scale_does_matter(name: str) -> None:
    student, teacher, labels, mask = batch()
    before, after = (LOSSES[name](student, scores, labels, mask).item() for scores in (teacher, teacher * 2))
    assert abs(after - before) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_neither_the_loss_nor_the_gradient(name: str) -> None:
    student, teacher, labels, mask = batch(documents=4)
    student.requires_grad_()
    plain = LOSSES[name](student, teacher, labels, mask)
    (gradient,) = torch.autograd.grad(plain, student)

    def padded(values: Tensor, filler: float) -> Tensor:
        return torch.cat([values, torch.full((len(values), 3), filler).to(values.dtype)], dim=1)

    wide = padded(student.detach(), 1e4).requires_grad_()
    loss = LOSSES[name](wide, padded(teacher, -1e4), padded(labels, 1), padded(mask, 0))
    (wide_gradient,) = torch.autograd.grad(loss, wide)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(wide_gradient[:, :4], gradient)
    assert not wide_gradient[:, 4:].any()


@pytest.mark.parametrize("name", ["margin_mse", "infonce", "lambda_loss labels"])
def test_lists_without_a_positive_count_nothing(name: str) -> None:
    student, teacher, labels, mask = batch()
    alone = LOSSES[name](student[:3], teacher[:3], labels[:3], mask[:3]).item()
    labels[3:, 0] = -1
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, labels, mask)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(alone, rel=1e-12)
    assert gradient.isfinite().all() and not gradient[3:].any() and gradient[:3].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_with_nothing_to_learn_has_loss_and_gradient_zero(name: str) -> None:
    student, teacher, labels, mask = batch()
    student.requires_grad_()
    if name == "margin_mse all_pairs" or name in RANKNETS + LAMBDAS:
        teacher = torch.ones_like(teacher)  # nothing but ties
    elif LOSSES[name].needs_labels:
        labels = torch.zeros_like(labels)
    else:
        mask = torch.zeros_like(mask)
    loss = LOSSES[name](student, teacher, labels, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()  # NaN counts as something


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_that_is_all_padding_teaches_nothing(name: str) -> None:
    student, teacher, labels, mask = batch()
    mask[2] = False
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, labels, mask)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()
    assert not gradient[2].any() and gradient[0].any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mse"])
def test_a_list_of_one_document_teaches_nothing_and_does_not_dilute_the_mean(name: str) -> None:
    student, teacher, labels, mask = batch()
    without = [values[[0, 1, 3, 4]] for values in (student, teacher, labels, mask)]
    mask[2, 1:] = False
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, labels, mask)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(LOSSES[name](*without).item(), rel=1e-12)
    assert gradient.isfinite().all() and not gradient[2].any()


@pytest.mark.parametrize("name", LOSSES)
def test_scores_that_are_all_alike_give_finite_losses_and_gradients(name: str) -> None:
    """All margins equal, on either side or on both: a ratio of two zeros somewhere would show here."""
    student, teacher, labels, mask = batch(dtype=torch.float32)
    alike = torch.full_like(teacher, 3.0)
    for own, theirs in ((student, alike), (alike.clone(), teacher), (alike.clone(), alike)):
        own = own.clone().requires_grad_()
        loss = LOSSES[name](own, theirs, labels, mask)
        loss.backward()
        assert loss.isfinite() and own.grad is not None and own.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_lists_are_a_weighted_mean(name: str) -> None:
    """Weight 0 is a list left out (Sinkhorn's lists meet in one plan: there it is the list's own mass alone)."""
    student, teacher, labels, mask = batch()
    ones = LOSSES[name](student, teacher, labels, mask, torch.full((5,), 1.0, dtype=torch.float64))
    assert ones.item() == pytest.approx(LOSSES[name](student, teacher, labels, mask).item(), rel=1e-12)
    if not name.startswith("sinkhorn"):
        weights = torch.tensor([1.0, 1, 0, 1, 0], dtype=torch.float64)
        kept = [values[weights > 0] for values in (student, teacher, labels, mask)]
        weighted = LOSSES[name](student, teacher, labels, mask, weights)
        assert weighted.item() == pytest.approx(LOSSES[name](*kept).item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right(name: str) -> None:
    student, teacher, labels, mask = batch(lists=3, documents=4)
    mask[1, 3] = False
    labels[2, 2] = 1
    assert torch.autograd.gradcheck(
        lambda scores: LOSSES[name](scores, teacher, labels, mask), student.requires_grad_()
    )


def test_infonce_equals_cross_entropy() -> None:
    student, teacher, labels, mask = batch()
    expected = torch.nn.functional.cross_entropy(student / 0.7, torch.zeros(5, dtype=torch.long))
    assert InfoNCE(temperature=0.7)(student, teacher, labels, mask).item() == pytest.approx(expected.item(), rel=1e-12)


def test_infonce_leaves_other_labelled_positives_out() -> None:
    student, teacher, labels, mask = batch()
    labels[:, 2] = 2
    kept = student[:, [0, 1, 3, 4, 5]]
    expected = torch.nn.functional.cross_entropy(kept, torch.zeros(5, dtype=torch.long)).item()
    assert InfoNCE()(student, teacher, labels, mask).item() == pytest.approx(expected, rel=1e-12)


def test_infonce_reads_no_teacher() -> None:
    student, teacher, labels, mask = batch()
    loss = InfoNCE()
    assert loss(student, teacher, labels, mask).equal(loss(student, teacher.flip(1) * 9, labels, mask))
    assert not loss.needs_teacher and loss.needs_labels


@pytest.mark.parametrize(("student_tau", "teacher_tau"), [(1.0, 1.0), (2.0, 0.5)])
def test_kl_equals_torch(student_tau: float, teacher_tau: float) -> None:
    student, teacher, labels, mask = batch()
    expected = student_tau**2 * torch.nn.functional.kl_div(
        (student / student_tau).log_softmax(1), (teacher / teacher_tau).softmax(1), reduction="batchmean"
    )
    loss = KLDivergence(student_tau, teacher_tau)(student, teacher, labels, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_huge_spreads_stay_finite_in_float32(name: str, spread: float) -> None:
    """Where a float32 softmax underflows, the logarithm of it must not be taken."""
    student, teacher, labels, mask = batch(dtype=torch.float32)
    student, teacher = (student * spread).requires_grad_(), teacher * spread
    loss = LOSSES[name](student, teacher, labels, mask)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_listnet_is_cross_entropy_against_the_teachers_distribution(temperature: float) -> None:
    student, teacher, labels, mask = batch()
    expected = torch.nn.functional.cross_entropy(student / temperature, (teacher / temperature).softmax(1))
    loss = ListNet(temperature)
    assert loss(student, teacher, labels, mask).item() == pytest.approx(expected.item(), rel=1e-12)
    # Its least value is the teacher's entropy, where the student is the teacher, up to a constant.
    entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy().mean().item()
    assert loss(teacher + 4.0, teacher, labels, mask).item() == pytest.approx(entropy, rel=1e-12)
    assert loss(teacher * 1.1, teacher, labels, mask).item() > entropy


def test_listnet_has_the_gradient_of_the_kl_divergence() -> None:
    student, teacher, labels, mask = batch()
    mask[1, 3:] = False
    student.requires_grad_()
    gradients = [
        torch.autograd.grad(loss(student, teacher, labels, mask), student)[0] for loss in (ListNet(), KLDivergence())
    ]
    torch.testing.assert_close(*gradients)


def test_pointwise_mse_is_the_mean_over_what_is_not_padding() -> None:
    student, teacher, labels, mask = batch()
    mask[1, 2:] = False
    mask[4] = False
    rows = zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True)
    errors = [(s - t) ** 2 for row in rows for s, t, kept in zip(*row, strict=True) if kept]
    assert PointwiseMSE()(student, teacher, labels, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    assert PointwiseMSE()(teacher, teacher, labels, mask).item() == 0.0
    # Unlike the others it wants the very scores: a constant is an error too.
    assert PointwiseMSE()(teacher + 2.0, teacher, labels, mask).item() == pytest.approx(4.0, rel=1e-12)


def slow_ranknet(
    student: Tensor, teacher: Tensor, mask: Tensor, weighting: str, temperature: float
) -> tuple[float, float]:
    """(loss, sum of weights) by the definition, pair by pair, in Python's double precision."""
    total = weights = 0.0
    for s, t, m in zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True):
        here = [place for place, kept in enumerate(m) if kept]

        def ranks(scores: list[float], here: list[int] = here) -> dict[int, int]:
            return {i: rank for rank, i in enumerate(sorted(here, key=lambda i: (-scores[i], i)), start=1)}

        wanted, now = ranks(t), ranks([value / temperature for value in s])
        ideal = sum(1 / wanted[i] / math.log2(1 + wanted[i]) for i in here)

        def ndcg(places: dict[int, int], wanted: dict[int, int] = wanted, ideal: float = ideal) -> float:
            return sum(1 / wanted[i] / math.log2(1 + place) for i, place in places.items()) / ideal

        for i in here:
            for j in here:
                if t[i] <= t[j]:
                    continue
                weight = 1.0
                if weighting == "rank":
                    weight = 1 / (wanted[i] + wanted[j])
                elif weighting == "ndcg":  # nDCG as it is, and with the two in each other's place
                    weight = abs(ndcg({**now, i: now[j], j: now[i]}) - ndcg(now))
                total += weight * math.log1p(math.exp((s[j] - s[i]) / temperature))
                weights += weight
    return total / weights, weights


@pytest.mark.parametrize("weighting", ["none", "rank", "ndcg"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ranknet_equals_the_definition(weighting: Any, temperature: float) -> None:
    student, teacher, labels, mask = batch(lists=7)
    teacher[2, 1] = teacher[2, 3]  # a tie of the teacher is no pair
    student[5, 0] = student[5, 4]  # one of the student is
    mask[1, 4:] = False
    mask[3, :3] = False  # also where the padding comes first
    mask[6] = False
    expected, _ = slow_ranknet(student, teacher, mask, weighting, temperature)
    loss = RankNet(weighting, temperature)(student, teacher, labels, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", RANKNETS)
def test_ranknet_reads_the_teachers_order_alone(name: str) -> None:
    student, teacher, labels, mask = batch()
    loss = LOSSES[name](student, teacher, labels, mask).item()
    assert loss == pytest.approx(LOSSES[name](student, teacher.exp() * 3, labels, mask).item(), rel=1e-12)
    assert loss == pytest.approx(LOSSES[name](student + 5.0, teacher, labels, mask).item(), rel=1e-9)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    permuted = LOSSES[name](student[:, shuffled], teacher[:, shuffled], labels[:, shuffled], mask)
    assert loss == pytest.approx(permuted.item(), rel=1e-12)
    # The right order costs less than the wrong one, and less the clearer it is.
    right, clear, wrong = (LOSSES[name](teacher * factor, teacher, labels, mask).item() for factor in (1, 9, -1))
    assert clear < right < wrong


def test_weights_are_settings_of_every_loss() -> None:
    names = method_names("loss")
    assert len(names) >= 17
    for name in names:
        loss = build("loss", {"type": name, "weight": 2.5})
        loss.at_step(10, 10)  # regularisers come to their weight by a ramp
        assert loss.strength() == 2.5


def test_losses_over_all_pairs_say_so() -> None:
    over_pairs = {name for name, loss in LOSSES.items() if loss.over_pairs}
    assert over_pairs == {"margin_mse all_pairs", *RANKNETS, *LAMBDAS, "lambda_loss labels"}
