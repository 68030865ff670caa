"""Where the memory does not hold a training's batch: the step is done again in parts: same loss, same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankdistill.errors import RankdistillError
from rankdistill.progress import warn
from rankdistill.students.base import Features, split_rows
from rankdistill.students.token_batches import out_of_memory


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

    def run(self, compute: Callable[[Features], Tensor], parts: Sequence[Features]) -> list[Tensor]:
        """Of each part of the texts, or of less."""
        if not self.on:
            return [compute(part) for part in parts]
        parts = [less for part in parts for less in split_rows(part, self.tokens)]
        if not torch.is_grad_enabled():
            return [compute(part) for part in parts]
        return [checkpoint(compute, part, use_reentrant=False) for part in parts]

    def shrink(self, error: RuntimeError, parts: Sequence[Features], device: torch.device, fix: str) -> None:
        """Turn it on, then halve its parts, where the error is for want of memory.

        Args:
            parts: the texts that were computed.
            fix: what a person can do where nothing is left to halve.

        Raises:
            RuntimeError: the error itself, where it is of another kind.
            RankdistillError: the batch came a text at a time already, or other processes wait for this one.
        """
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
