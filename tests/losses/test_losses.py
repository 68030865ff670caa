"""Each loss against another library or a slow loop, and the traps that public implementations fell into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from torch import Tensor

from rankdistill.losses.base import ListLoss
from rankdistill.losses.contrastive import InfoNCE
from rankdistill.losses.divergence import KLDivergence
from rankdistill.losses.margin_mse import MarginMSE

LOSSES: dict[str, ListLoss] = {
    "margin_mse": MarginMSE(),
    "margin_mse all_pairs": MarginMSE(pairs="all_pairs"),
    "infonce": InfoNCE(temperature=0.7),
    "kl": KLDivergence(temperature=2.0, teacher_temperature=1.5),
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


@pytest.mark.parametrize("name", ["margin_mse", "margin_mse all_pairs", "kl"])
def test_a_perfect_student_has_loss_zero(name: str) -> None:
    """Exactly 0, also in float32 and for a student that is off by a constant a query."""
    loss = KLDivergence(temperature=2.0) if name == "kl" else LOSSES[name]
    _, teacher, labels, mask = batch(dtype=torch.float32)
    assert loss(teacher.clone(), teacher, labels, mask).item() == 0.0
    # Whole numbers, so that adding a constant rounds nothing.
    whole = teacher.round()
    assert loss(whole + 16.0, whole, labels, mask).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["margin_mse", "margin_mse all_pairs", "kl"])
def test_a_shift_of_a_querys_teacher_scores_changes_nothing(name: str) -> None:
    student, teacher, labels, mask = batch()
    shift = torch.tensor([[100.0], [-3.0], [0.5], [7.0], [-40.0]], dtype=torch.float64)
    before, after = (LOSSES[name](student, scores, labels, mask).item() for scores in (teacher, teacher + shift))
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("name", ["margin_mse", "margin_mse all_pairs", "kl"])
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


@pytest.mark.parametrize("name", ["margin_mse", "infonce"])
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
    if name == "margin_mse all_pairs":
        teacher = torch.ones_like(teacher)  # nothing but ties
    elif name == "kl":
        mask = torch.zeros_like(mask)
    else:
        labels = torch.zeros_like(labels)
    loss = LOSSES[name](student, teacher, labels, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()  # NaN counts as something


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


def test_weights_are_settings_of_every_loss() -> None:
    assert [loss.weight for loss in (MarginMSE(weight=2), InfoNCE(weight=0.5), KLDivergence(weight=3))] == [2, 0.5, 3]
