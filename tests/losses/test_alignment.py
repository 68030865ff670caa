"""The losses on vectors: against torch and sentence-transformers, and at a perfect student."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

from rankdistill.errors import RankdistillError
from rankdistill.losses.alignment import QueryMSE, VectorMSE


def vectors() -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_it_is_mse_plus_a_share_of_the_cosine_distance() -> None:
    student, teacher = vectors()
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    mse, cosine = (
        EmbedDistillLoss(model, kind).compute_loss_from_embeddings([student], [teacher]).item()
        for kind in ("mse", "cosine")
    )
    assert QueryMSE(cosine=0.0)(student, teacher).item() == pytest.approx(mse, rel=1e-12)
    assert QueryMSE()(student, teacher).item() == pytest.approx(mse + cosine, rel=1e-12)
    assert QueryMSE(cosine=0.3)(student, teacher).item() == pytest.approx(mse + 0.3 * cosine, rel=1e-12)


def test_a_perfect_student_has_loss_zero_and_a_longer_vector_costs_no_cosine() -> None:
    student = vectors()[0].float()
    assert QueryMSE()(student, student.clone()).item() == 0.0
    whole, double = QueryMSE()(2 * student, student).item(), QueryMSE(cosine=0.0)(2 * student, student).item()
    assert whole == pytest.approx(double, rel=1e-6)


def test_the_gradient_is_right_and_finite_at_zero() -> None:
    student, teacher = vectors()
    assert torch.autograd.gradcheck(lambda one: QueryMSE(0.5)(one, teacher), student.requires_grad_())
    nothing = torch.zeros(2, 4, requires_grad=True)
    QueryMSE()(nothing, torch.ones(2, 4)).backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_other_widths_are_refused_with_the_fix() -> None:
    with pytest.raises(RankdistillError, match="8 dimensions, the teacher's 16") as error:
        QueryMSE()(torch.zeros(2, 8), torch.zeros(2, 16))
    assert "projection" in str(error.value)


def test_vector_mse_is_the_squared_distance_and_the_cosine_distance_of_each_text() -> None:
    student, teacher = vectors()
    square = ((student - teacher) ** 2).sum(dim=1).mean().item()
    cosine = (1 - torch.nn.functional.cosine_similarity(student, teacher)).mean().item()
    assert VectorMSE()(student, teacher).item() == pytest.approx(square + cosine, rel=1e-12)
    assert VectorMSE(cosine=0.0)(student, teacher).item() == pytest.approx(square, rel=1e-12)
    unit, other = (torch.nn.functional.normalize(one, dim=-1) for one in (student, teacher))
    assert VectorMSE()(unit, other).item() == pytest.approx(3 * cosine, rel=1e-12)  # unit vectors: 2 (1 - cos)
    assert VectorMSE()(student, student.clone()).item() == 0.0
    assert torch.autograd.gradcheck(lambda one: VectorMSE()(one, teacher), student.requires_grad_())


def test_a_narrower_student_is_compared_through_a_map_that_keeps_inner_products() -> None:
    """A teacher whose vectors lie in 4 of its 16 dimensions can be learnt exactly by a student of 4."""
    torch.manual_seed(0)  # the map starts at random
    random = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(16, 4, generator=random))
    hidden = torch.randn(32, 4, generator=random)
    teacher, loss = hidden @ basis.T, VectorMSE()
    loss.fit(4, 16)
    student = torch.zeros(32, 4).normal_(generator=random).requires_grad_()
    optimiser = torch.optim.Adam([student, *loss.parameters()], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimiser.step()
    assert value.item() < 1e-3
    mapped = loss.projection(student)
    assert torch.allclose(mapped @ mapped.T, student @ student.T, atol=1e-4)
    assert torch.allclose(student @ student.T, teacher @ teacher.T, atol=0.3)


def test_token_vectors_are_refused() -> None:
    with pytest.raises(RankdistillError, match="one vector a token"):
        VectorMSE()(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
