"""The last step of a sparse encoder: token vectors × vocabulary, pooled over each text's tokens, in little memory.

A text of 128 tokens has four million logits over a vocabulary of 30,522 and keeps 30,522 of them. So the logits are
made a part of the vocabulary at a time and pooled at once:

- `max` pooling commutes with everything that rises, so relu and log1p follow the pooling, and the bias, the same for
  every token, is added after it. The gradient flows through the best token of each active (text, term) pair alone: it
  is a sparse matrix product, cheap once few terms are active.
- `sum` pooling makes each part of the logits again when its gradient is due.

Equal to SpladePooling over the logits (Formal et al. 2021, arXiv:2109.10086), tested against it. Measured for max
pooling, forward and backward, 64 texts of 128 tokens, 30,522 terms, width 384, one core in bf16: 0.6 s with 150 active
terms a text and 0.9 s with 15,000, against 5.6 s over all logits; 0.15 GB of memory against 2.0 GB.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Pooling = Literal["max", "sum"]
Activation = Literal["relu", "log1p_relu"]
LOGITS = 1 << 23  # logits held at a time (32 MiB in float32)
WIDE = 512  # terms a part has at least: narrower products are slow


def pool_terms(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pooling: Pooling = "max",
    activation: Activation = "relu",
) -> Tensor:
    """Weights of terms, [texts, vocabulary], at least 0, float32 (float64 of float64 input).

    Products are computed in autocast's number format where it is on; pooling and what follows in the result's.

    Args:
        hidden: [texts, tokens, width] what the vocabulary's matrix is applied to.
        mask: [texts, tokens] true where a token counts; a text without any has no terms.
        weight: [vocabulary, width].
        bias: [vocabulary].
        pooling: over the tokens of a text.
        activation: `relu`: log(1 + relu(x)); `log1p_relu`: log(1 + log(1 + relu(x))).
    """
    mask = mask.bool()
    if not mask.shape[1]:
        return weight.new_zeros(len(mask), len(weight))
    kind = hidden.device.type
    number = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        if pooling == "max":
            inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
            keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
            largest: Tensor = _MaxTerms.apply(hidden, weight, bias, mask, number, keep)
            return _activate(largest, activation)
        terms = max(WIDE, LOGITS // max(1, mask.numel()))
        shifts = bias.split(terms) if bias is not None else [None] * -(-len(weight) // terms)
        parts = []
        for part, shift in zip(weight.split(terms), shifts, strict=True):
            terms_of = (hidden, part, shift, mask, number, activation)
            again = torch.is_grad_enabled()
            parts.append(checkpoint(_sum_terms, *terms_of, use_reentrant=False) if again else _sum_terms(*terms_of))
        return torch.cat(parts, dim=1)


def largest_logits(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[texts, vocabulary] the largest logit of each term over the tokens of a text, without gradient; see `pool_terms`.

    A text without a token that counts has what its first place gives.
    """
    best = _largest(hidden.detach(), weight.detach(), _counting(mask.bool()), hidden.dtype)
    return best if bias is None else best + bias.detach()


def _activate(logits: Tensor, activation: Activation) -> Tensor:
    weights = logits.relu().log1p()
    return weights.log1p() if activation == "log1p_relu" else weights


def _wide(number: torch.dtype) -> torch.dtype:
    return torch.float64 if number == torch.float64 else torch.float32


def _sum_terms(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, number: torch.dtype, activation: Activation
) -> Tensor:
    """[texts, terms of this part]."""
    logits = (hidden.to(number) @ weight.to(number).T).to(_wide(number))
    if bias is not None:
        logits = logits + bias
    return (_activate(logits, activation) * mask[..., None]).sum(dim=1)


def _counting(mask: Tensor) -> Tensor:
    """[texts, tokens] places of tokens: their own, and for those that do not count the first that does."""
    first = mask.int().argmax(dim=1, keepdim=True)
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), first)


def _largest(hidden: Tensor, weight: Tensor, place: Tensor, number: torch.dtype, where: Tensor | None = None) -> Tensor:
    """[texts, vocabulary] largest logits over the tokens of each text; `where` takes their tokens' places.

    A place that does not count repeats one that does, so that the maximum needs no mask.
    """
    texts, tokens, width = hidden.shape
    rows = hidden.gather(1, place[..., None].expand(-1, -1, width)).to(number)
    matrix = weight.to(number)
    best = hidden.new_empty(texts, len(weight), dtype=_wide(number))
    at_once = max(1, min(texts, LOGITS // (tokens * WIDE)))
    terms = max(WIDE, LOGITS // (tokens * at_once))
    for start in range(0, texts, at_once):
        some = slice(start, start + at_once)
        columns = rows[some].flatten(0, 1).T
        for left in range(0, len(weight), terms):
            part = slice(left, left + terms)
            logits = (matrix[part] @ columns).unflatten(1, (-1, tokens))  # [terms, texts, tokens]
            if where is None:
                best[some, part] = logits.amax(dim=-1).T.to(best.dtype)
            else:
                largest = logits.max(dim=-1)
                best[some, part] = largest.values.T.to(best.dtype)
                where[some, part] = largest.indices.T.int()
    return best


class _MaxTerms(torch.autograd.Function):
    """relu(max over tokens of logits + bias), [texts, vocabulary]; the best token's place is kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, number: torch.dtype, keep: bool
    ) -> Tensor:
        place = _counting(mask)
        where = torch.empty(len(hidden), len(weight), dtype=torch.int32, device=hidden.device) if keep else None
        best = _largest(hidden.detach(), weight.detach(), place, number, where)
        if bias is not None:
            best += bias.detach()
        best.relu_().mul_(mask.any(dim=1, keepdim=True))
        if where is not None:
            ctx.save_for_backward(hidden, weight, place, best, where)
        ctx.has_bias = bias is not None
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, place, best, where = ctx.saved_tensors
        texts, tokens, width = hidden.shape
        gradient = gradient * (best > 0)
        by_term = gradient.T.nonzero()  # [active pairs with a gradient, (term, text)], sorted
        term, text = by_term[:, 0], by_term[:, 1]
        value = gradient[text, term]
        token = text * tokens + place[text, where[text, term].long()]
        number = _wide(hidden.dtype)
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            order = token.argsort()
            summed = _weighted_sums(weight.to(number), term[order], token[order], value[order], texts * tokens)
            of_hidden = summed.view(texts, tokens, width).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            rows = hidden.flatten(0, 1).to(number)
            of_weight = _weighted_sums(rows, token, term, value, len(weight)).to(weight.dtype)
        of_bias = gradient.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_hidden, of_weight, of_bias, None, None, None


def _weighted_sums(table: Tensor, taken: Tensor, into: Tensor, value: Tensor, count: int) -> Tensor:
    """[count, width] sums of value · table[taken] by `into`, which is sorted."""
    sizes = torch.bincount(into, minlength=count)
    starts = sizes.cumsum(0) - sizes
    return nn.functional.embedding_bag(
        taken, table.detach(), starts, mode="sum", per_sample_weights=value.to(table.dtype)
    )
