"""The head in little memory: equal to SpladePooling over all logits, values and gradients, and far smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankdistill.students import term_head
from rankdistill.students.term_head import largest_logits, pool_terms

WAYS = [(pooling, activation) for pooling in ("max", "sum") for activation in ("relu", "log1p_relu")]


def naive(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, pooling: Any, activation: Any) -> Tensor:
    """All logits at once, pooled by sentence-transformers."""
    logits = nn.functional.linear(hidden, weight, bias)
    made = SpladePooling(pooling, activation)({"token_embeddings": logits, "attention_mask": mask})
    return made["sentence_embedding"]


def inputs(terms: int = 40, kind: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts of 7, 4 (padded right), 3 (padded left) and no tokens."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 7, 5, generator=random), torch.randn(terms, 5, generator=random)
    bias = torch.randn(terms, generator=random)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:], mask[2, :4], mask[3] = 0, 0, 0
    return hidden.to(kind).requires_grad_(), mask, weight.to(kind).requires_grad_(), bias.to(kind).requires_grad_()


@pytest.mark.parametrize(("pooling", "activation"), WAYS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("small", [False, True])
def test_equal_to_pooling_all_logits(
    pooling: Any, activation: Any, with_bias: bool, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # many parts, of texts and of terms
        monkeypatch.setattr(term_head, "LOGITS", 30)
        monkeypatch.setattr(term_head, "WIDE", 3)
    hidden, mask, weight, bias = inputs()
    given = bias if with_bias else None
    wanted, got = (one(hidden, mask, weight, given, pooling, activation) for one in (naive, pool_terms))
    torch.testing.assert_close(got, wanted)
    assert (got[3] == 0).all()
    largest = nn.functional.linear(hidden, weight, given).masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)
    torch.testing.assert_close(largest_logits(hidden, mask, weight, given)[:3], largest.detach()[:3])
    assert 0 < (got > 0).float().mean() < 1
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    learned = [hidden, weight, bias] if with_bias else [hidden, weight]
    for of_got, of_wanted in zip(
        torch.autograd.grad(got, learned, upstream), torch.autograd.grad(wanted, learned, upstream), strict=True
    ):
        torch.testing.assert_close(of_got, of_wanted)
    with torch.no_grad():
        torch.testing.assert_close(pool_terms(hidden, mask, weight, given, pooling, activation), wanted)


@pytest.mark.parametrize(("pooling", "activation"), WAYS)
def test_gradients_are_those_of_finite_differences(pooling: Any, activation: Any) -> None:
    hidden, mask, weight, bias = inputs(terms=6)
    assert torch.autograd.gradcheck(
        lambda *given: pool_terms(given[0], mask, given[1], given[2], pooling, activation), (hidden, weight, bias)
    )


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_tied_weights_get_both_gradients_and_frozen_ones_none(pooling: Any) -> None:
    _, mask, weight, _ = inputs()
    tokens = torch.randint(40, mask.shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for way in (naive, pool_terms):
        made = way(nn.functional.embedding(tokens, weight), mask, weight, None, pooling, "relu")
        gradients.append(torch.autograd.grad(made.square().sum(), weight)[0])
    torch.testing.assert_close(*gradients)
    hidden, mask, weight, bias = inputs()
    pool_terms(hidden, mask, weight.detach(), bias.detach(), pooling).sum().backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_under_checkpointing_and_autocast(pooling: Any) -> None:
    hidden, mask, weight, bias = inputs(kind=torch.float32)
    plain = pool_terms(hidden, mask, weight, bias, pooling)
    again = checkpoint(pool_terms, hidden, mask, weight, bias, pooling, use_reentrant=False)
    assert isinstance(again, Tensor)
    for one, other in zip(
        torch.autograd.grad(again.sum(), [hidden, weight]),
        torch.autograd.grad(plain.sum(), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        half = pool_terms(hidden, mask, weight, bias, pooling)
    assert half.dtype == torch.float32
    assert not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0.05)
    half.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_the_logits_are_not_kept_for_the_gradient(pooling: Any) -> None:
    texts, tokens, terms, width = 8, 64, 2000, 8
    hidden = torch.randn(texts, tokens, width, requires_grad=True)
    weight, mask = torch.randn(terms, width, requires_grad=True), torch.ones(texts, tokens)

    def kept(way: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            way(hidden, mask, weight, None, pooling, "relu")
        return sum(sizes.values())

    assert kept(naive) >= texts * tokens * terms * 4
    assert kept(pool_terms) < texts * terms * 4 * 4 + (texts * tokens + terms) * width * 4 * 2
