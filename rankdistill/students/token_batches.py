"""Batches by tokens, not by rows; how many a device holds, a training too; the number format that it is fastest in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import warn

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]
FEW = 16  # rows that are not worth a part for each power of two
SHORT = 128  # tokens: attention's matrices are small, plain products are as good as a fused kernel
GPU_TOKENS = 65_536  # padded tokens in one forward pass: a GPU wants enough rows to fill it
# What torch says where it has no class for it: the CPU's allocator (Linux, Windows), cuBLAS, Metal.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


class TokenBudget:
    """Padded tokens in one forward pass (on a GPU at least GPU_TOKENS), halved where the device's memory gives out,
    which is said once."""

    def __init__(self, device: torch.device | str, tokens: int) -> None:
        import torch

        self.device = torch.device(device)
        self.tokens = tokens if self.device.type == "cpu" else max(tokens, GPU_TOKENS)
        self._said = False

    def halve(self, error: RuntimeError, rows: int, width: int) -> None:
        """Go on with half of the `rows` × `width` tokens that did not fit; the error passes where it is of another
        kind."""
        if not out_of_memory(error):
            raise error
        if rows < 2:
            raise RankdistillError(
                f"a text of {width:,} tokens does not fit the memory",
                where=str(self.device),
                fix="a shorter length, precision: bf16, or another --device",
            ) from None
        self.tokens = max(1, min(self.tokens, rows * width) // 2)
        if not self._said:
            warn(f"the memory of {self.device} does not hold {rows * width:,} tokens at once: going on with fewer")
            self._said = True


def out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory, on any device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def free_memory() -> None:
    """Give back what a failed pass held; call it when its error is handled, as the error keeps its tensors."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def token_budget_batches(
    lengths: np.ndarray,
    budget: int,
    max_rows: int | None = None,
    multiple_of: int = 1,
    few_shapes: bool = False,
) -> list[np.ndarray]:
    """Split texts into batches whose padded size (rows × longest) stays within a budget of tokens.

    Sorted by length, so that little is padded, and longest first, so that a batch too large for the memory fails at
    once and not after an hour. Every text is in exactly one batch; one longer than the budget is a batch of its own.

    Args:
        lengths: [N] tokens of each text.
        budget: padded tokens a batch.
        max_rows: texts a batch, whatever their length.
        multiple_of: the width that rows are padded to is rounded up to this.
        few_shapes: make the number of rows a power of two (a CPU's kernels are made, and kept in memory, one a shape),
            but for the last few.

    Returns:
        Arrays of positions in `lengths`.
    """
    if budget < 1 or multiple_of < 1 or (max_rows is not None and max_rows < 1):
        raise UsageError(f"a batch needs at least one token and one row (budget {budget}, max_rows {max_rows})")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        width = -(-max(int(lengths[order[start]]), 1) // multiple_of) * multiple_of
        rows = min(max(1, budget // width), max_rows or len(order), len(order) - start)
        if few_shapes and not rows == len(order) - start < FEW:
            rows = 1 << (rows.bit_length() - 1)
        batches.append(order[start : start + rows])
        start += rows
    return batches


@lru_cache
def _cpu_gains_from_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX tiles or AVX512-BF16); emulation would be slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return any(f" {flag} " in flags.replace("\n", " ") for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def resolve_precision(device: torch.device | str, precision: Precision = "auto") -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on a device: bf16 where its hardware has it, else fp32. Other values are returned as given."""
    import torch

    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UsageError(f"unknown precision {precision!r}", fix="auto, fp32, bf16 or fp16")
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and _cpu_gains_from_bf16() else "fp32"


def autocast(device: torch.device | str, precision: Precision = "auto") -> AbstractContextManager[None]:
    """Run matrix products in the precision (`torch.autocast`); weights stay as they are.

    Hold one context over many batches: autocast converts the weights once for as long as the outermost one is open.
    """
    import torch

    resolved = resolve_precision(device, precision)
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(torch.device(device).type, dtype=formats[resolved], enabled=resolved != "fp32")


def training_attention(features: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Attention of a batch of texts that is learned from, as plain matrix products on a CPU where the texts are short.

    There the fused kernel's backward pass takes three times as long (torch 2.13, bf16, 64 and 96 tokens); from 256
    tokens on it is the faster one.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = features.get("attention_mask")
    if mask is None or mask.device.type != "cpu" or mask.shape[1] > SHORT or not torch.is_grad_enabled():
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


class GradientCache:
    """What a model makes of a batch's texts, whole, or (`on`) with the activations of one part at a time: each part is
    computed again when its gradient is due (after GradCache, Gao et al. 2021, arXiv:2101.06983). Same gradients, one
    more forward pass.

    Args:
        tokens: padded tokens of a part.
    """

    def __init__(self, on: bool = False, tokens: int = 4096) -> None:
        self.on, self.tokens = on, tokens
        self._said = False  # that the memory gave out

    def run(
        self, compute: Callable[[dict[str, Any]], torch.Tensor], parts: Sequence[dict[str, Any]]
    ) -> list[torch.Tensor]:
        """Of each part of the texts, or of less."""
        import torch
        from torch.utils.checkpoint import checkpoint

        if not self.on:
            return [compute(part) for part in parts]
        parts = [less for part in parts for less in split_rows(part, self.tokens)]
        if not torch.is_grad_enabled():
            return [compute(part) for part in parts]
        return [checkpoint(compute, part, use_reentrant=False) for part in parts]

    def shrink(self, error: RuntimeError, parts: Sequence[dict[str, Any]], device: torch.device, fix: str) -> None:
        """Turn it on, then halve its parts, where the error is for want of memory; else the error passes.

        Args:
            parts: the texts that were computed.
            fix: what a person can do where the batch came a text at a time, or other processes wait for this one.
        """
        import torch

        if not out_of_memory(error):
            raise error
        masks = [part["attention_mask"] for part in parts if "attention_mask" in part]
        longest = max((mask.shape[1] for mask in masks), default=1 << 30)
        whole = sum(mask.numel() for mask in masks) <= self.tokens  # one part
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        together = spread and torch.distributed.get_world_size() > 1
        if together or (self.on and self.tokens <= longest) or sum(map(len, masks)) == 1:
            raise RankdistillError("the memory does not hold a batch", where=str(device), fix=fix) from None
        if self.on or whole:
            self.tokens = max(longest, min(self.tokens, sum(mask.numel() for mask in masks)) // 2)
        if not self._said:
            warn(
                f"the memory of {device} does not hold a batch: going on in parts, each computed again for its"
                " gradient, and smaller ones where it must be"
            )
        self.on = self._said = True


def split_rows(features: dict[str, Any], budget: int) -> list[dict[str, Any]]:
    """Cut features into parts of at most so many padded tokens, in order; features without a mask stay whole."""
    mask = features.get("attention_mask")
    if mask is None:
        return [features]
    rows = max(1, budget // mask.shape[1])

    def part(value: Any, start: int) -> Any:
        by_row = hasattr(value, "ndim") and value.ndim > 0 and len(value) == len(mask)
        return value[start : start + rows] if by_row else value

    starts = range(0, len(mask), rows)
    return [{name: part(value, start) for name, value in features.items()} for start in starts]
