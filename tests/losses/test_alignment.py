"""The losses on vectors: against torch and sentence-transformers, and at a perfect student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

from rankdistill.errors import RankdistillError
from rankdistill.losses.alignment import QueryMSE, VectorMSE


def vectors() -> torch.Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "dimensions"), [(QueryMSE, 1), (VectorMSE, 16)])
def test_they_are_the_squared_distance_and_a_share_of_the_cosine_distance(kind: Any, dimensions: int) -> None:
    """The query's square is a mean over dimensions too."""
    student, teacher = vectors()
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    mse, cosine = (
        EmbedDistillLoss(model, how).compute_loss_from_embeddings([student], [teacher]).item()
        for how in ("mse", "cosine")
    )
    for share in (0.0, 0.3, 1.0):
        expected = dimensions * mse + share * cosine
        assert kind(cosine=share)(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    whole, double = kind()(2 * student, student).item(), kind(cosine=0.0)(2 * student, student).item()
    assert whole == pytest.approx(double, rel=1e-6)  # a longer vector costs no cosine
    assert kind()(student, student.clone()).item() == 0.0
    assert torch.autograd.gradcheck(lambda one: kind(cosine=0.5)(one, teacher), student.requires_grad_())
    nothing = torch.zeros(2, 4, requires_grad=True)
    kind()(nothing, torch.ones(2, 4)).backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_other_widths_and_token_vectors_are_refused() -> None:
    with pytest.raises(RankdistillError, match=r"8 dimensions, the teacher's 16[\s\S]*projection"):
        QueryMSE()(torch.zeros(2, 8), torch.zeros(2, 16))
    with pytest.raises(RankdistillError, match="one vector a token"):
        VectorMSE()(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))


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
