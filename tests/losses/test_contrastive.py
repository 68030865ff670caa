"""InfoNCE over a batch: against sentence-transformers, and what is no negative."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import dot_score
from torch import Tensor

from rankdistill.losses.contrastive import LCE, InBatchInfoNCE


class _Fixed(torch.nn.Module):
    """An encoder that returns given embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}


def slow(scores: Tensor, index: Tensor, labels: Tensor, mask: Tensor, temperature: float = 1.0) -> float:
    """The definition, query by query."""
    losses = []
    for row, columns, relevance, kept in zip(scores, index.tolist(), labels.tolist(), mask.tolist(), strict=True):
        if kept[0] and relevance[0] > 0:
            relevant = {one for one, label, here in zip(columns, relevance, kept, strict=True) if label > 0 and here}
            columns_left = [one for one in range(len(row)) if one == columns[0] or one not in relevant]
            logits = row[columns_left] / temperature
            losses.append((logits.logsumexp(0) - row[columns[0]] / temperature).item())
    return sum(losses) / len(losses) if losses else 0.0


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4 queries, 9 documents: 1, 0 and 3 are in two lists each."""
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    index = torch.tensor([[0, 1, 2], [3, 4, 1], [5, 6, 7], [8, 0, 3]])
    labels = torch.full((4, 3), -1)
    labels[:, 0] = 1
    return scores, index, labels, torch.ones(4, 3, dtype=torch.bool)


def test_in_batch_infonce_equals_sentence_transformers() -> None:
    random = torch.Generator().manual_seed(3)
    queries, documents = torch.randn(6, 8, generator=random), torch.randn(6, 4, 8, generator=random)
    model = SentenceTransformer(modules=[_Fixed()], device="cpu")
    columns = [{"vectors": queries}, *({"vectors": documents[:, column]} for column in range(4))]
    reference = MultipleNegativesRankingLoss(model, scale=0.5, similarity_fct=dot_score)
    expected = reference(columns, torch.zeros(6)).item()
    labels = torch.full((6, 4), -1)
    labels[:, 0] = 1
    index, mask = torch.arange(24).reshape(6, 4), torch.ones(6, 4, dtype=torch.bool)
    scores = queries @ documents.reshape(24, 8).T
    assert InBatchInfoNCE(2.0)(scores, None, index, labels, mask).item() == pytest.approx(expected, rel=1e-5)


def test_in_batch_infonce_equals_the_definition() -> None:
    scores, index, labels, mask = batch()
    assert InBatchInfoNCE(0.7)(scores, None, index, labels, mask).item() == pytest.approx(
        slow(scores, index, labels, mask, 0.7), rel=1e-12
    )
    labels[0, 1] = 2  # the document is in the second list too: no negative of the first query anywhere
    labels[1, 0] = 0  # without a positive
    mask[3, 2] = False  # padding names any column; its label counts nothing
    labels[3, 2] = 1
    expected = slow(scores, index, labels, mask)
    assert InBatchInfoNCE()(scores, None, index, labels, mask).item() == pytest.approx(expected, rel=1e-12)


def test_what_a_query_calls_relevant_is_no_negative_of_its_own_in_any_list() -> None:
    scores, index, labels, mask = batch()
    labels[0, 1] = 1  # column 1, which the second list holds as an unlabelled document
    before = InBatchInfoNCE()(scores, None, index, labels, mask)
    scores[0, 1] += 50
    assert InBatchInfoNCE()(scores, None, index, labels, mask).item() == pytest.approx(before.item(), rel=1e-12)
    scores[1, 1] += 50  # of the second query it is one
    assert InBatchInfoNCE()(scores, None, index, labels, mask).item() > before.item() + 5


def test_padding_and_lists_without_a_positive_change_nothing() -> None:
    scores, index, labels, mask = batch()
    scores.requires_grad_()
    loss = InBatchInfoNCE()(scores, None, index, labels, mask)
    (gradient,) = torch.autograd.grad(loss, scores)
    padding = torch.zeros(4, 2, dtype=torch.long)
    wide = [torch.cat([values, filler], 1) for values, filler in ((index, padding), (labels, padding + 1))]
    padded = InBatchInfoNCE()(scores, None, *wide, torch.cat([mask, padding.bool()], 1))
    assert padded.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(padded, scores)[0], gradient)
    none = InBatchInfoNCE()(scores, None, index, torch.zeros_like(labels), mask)
    (gradient,) = torch.autograd.grad(none, scores)
    assert none.item() == 0.0 and not gradient.any()


def test_a_batch_of_one_pair_has_no_negative_and_teaches_nothing() -> None:
    scores = torch.tensor([[3.0]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.long)
    loss = InBatchInfoNCE()(scores, None, one * 0, one, one.bool())
    loss.backward()
    assert loss.item() == 0.0 and scores.grad is not None and not scores.grad.any()


def test_the_gradient_is_right() -> None:
    scores, index, labels, mask = batch()
    labels[0, 1] = 1
    mask[2, 2] = False
    loss = InBatchInfoNCE(0.8)
    assert torch.autograd.gradcheck(lambda one: loss(one, None, index, labels, mask), scores.requires_grad_())


def test_lce_is_cross_entropy_to_the_gains() -> None:
    scores = torch.tensor([[2.0, 1.0, -1.0, 0.5], [0.3, 0.2, 4.0, 9.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4])
    binary = torch.tensor([[1, 0, 0, -1], [0, 1, 0, -1], [0, 0, 0, 0]])  # the last has no positive
    expected = torch.nn.functional.cross_entropy(
        torch.stack([scores[0], scores[1].masked_fill(~mask[1], float("-inf"))]), torch.tensor([0, 1])
    )
    torch.testing.assert_close(LCE()(scores, torch.zeros(3, 4), binary, mask), expected)
    graded = torch.tensor([[2, 0, 1, 0]])  # gains 3, 0, 1, 0
    expected = torch.nn.functional.cross_entropy(scores[:1], torch.tensor([[0.75, 0.0, 0.25, 0.0]]))
    found = LCE()(scores[:1], torch.zeros(1, 4), graded, mask[:1])
    torch.testing.assert_close(found, expected)
    found.backward()
    assert bool(torch.isfinite(scores.grad).all())  # type: ignore[arg-type]
