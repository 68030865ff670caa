"""Training in several processes: each embeds its share of a batch, all see the whole of it.

The embeddings of all processes are gathered with their gradients, so that the losses, in-batch ones too, are those of
one process with the whole batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from rankdistill.errors import RankdistillError
from rankdistill.progress import is_quiet


@dataclass
class Batch:
    """What the losses read: embeddings [texts, ...], and [lists, documents] tensors (see training/batches.py)."""

    queries: Tensor
    documents: Tensor
    rows: Tensor  # the collection's row of each document
    index: Tensor
    teacher_scores: Tensor
    relevance: Tensor
    mask: Tensor
    disagreement: Tensor | None = None
    teacher_queries: Tensor | None = None
    teacher_documents: Tensor | None = None


def world_size() -> int:
    """Processes of this training."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Tensors of equal shape from all processes; the gradient of each one's own is summed over all."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]


def gather(tensor: Tensor, fill: float = 0) -> list[Tensor]:
    """This tensor of every process, by rank; dimensions but the first are padded to the largest with `fill`."""
    shape = torch.tensor(tensor.shape, device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shapes, shape)
    largest = torch.stack(shapes).amax(dim=0).tolist()
    padding = [size for have, want in zip(reversed(tensor.shape), reversed(largest)) for size in (0, want - have)]
    padded = torch.nn.functional.pad(tensor, padding, value=fill) if any(padding) else tensor
    kind = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
    whole = _Gather.apply(padded.to(kind)).to(tensor.dtype)
    return [part[: int(shape[0])] for part, shape in zip(whole, shapes, strict=True)]


def whole_batch(batch: Batch) -> Batch:
    """The shares of all processes as one batch, with each distinct document once; the batch itself in one process."""
    if world_size() == 1:
        return batch
    rows = gather(batch.rows)
    starts = torch.tensor([0, *(len(part) for part in rows)]).cumsum(0).tolist()
    index = torch.cat([part + start for part, start in zip(gather(batch.index), starts)])
    # The first copy of a document stands for all.
    distinct, column = torch.unique(torch.cat(rows), return_inverse=True)
    first = torch.full_like(distinct, len(column))
    first.scatter_reduce_(0, column, torch.arange(len(column), device=column.device), reduce="amin")

    whole: dict[str, Tensor] = {}
    for name, tensor in vars(batch).items():
        if tensor is not None and name not in ("rows", "index"):
            whole[name] = torch.cat(gather(tensor, -1 if name == "relevance" else 0))
            if name in ("documents", "teacher_documents"):
                whole[name] = whole[name][first]
    return Batch(rows=distinct, index=column[index], **whole)


def run_together(processes: int, arguments: Sequence[str]) -> None:
    """Run the program with these arguments in several processes of this machine, under torchrun, and wait; what was
    saved is resumed by the same call where a process failed."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "rankdistill.cli.main", *arguments, *(["--quiet"] if is_quiet() else [])]
    # Results are for the caller to print.
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()  # torchrun got the signal too and ends its processes
        raise
    if code != 0:
        raise RankdistillError(
            f"training in {processes} processes failed (exit status {code})",
            fix="the error of the process that failed stands above; the same command goes on from the last checkpoint",
        )
