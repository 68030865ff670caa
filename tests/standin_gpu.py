"""A stand-in for a GPU: it computes on the CPU and refuses what CUDA refuses, tensors of two devices in one operation.

Python sees `cuda:0`; torch's core is told `meta`, as FakeTensor does it, so that autograd works without CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
seen = [0]  # tensors on the stand-in that operations were given


class Away(torch.Tensor):
    """A tensor on the stand-in; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="meta", **layout)
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_indices(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_indices(key), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _indices(key: Any) -> Any:
    """Lists of numbers as tensors: torch's core would make them where it is told that this is, without numbers."""
    if isinstance(key, tuple):
        return tuple(_indices(one) for one in key)
    return torch.tensor(key, device=GPU) if isinstance(key, list) else key


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    away = [one for one in tensors if isinstance(one, Away)]
    if away and func not in MOVES and any(not isinstance(one, Away) and one.dim() for one in tensors):
        where = [(one.device.type, tuple(one.shape)) for one in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, in {func}: {where}")
    seen[0] += len(away)
    place = kwargs.get("device")
    stays = isinstance(args[0], Away) if func is aten.copy_.default else bool(away)
    goes = torch.device(place).type in ("cuda", "meta") if place is not None else stays
    kwargs = {**kwargs, **({"device": torch.device("cpu")} if place is not None else {})}
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    name = func._schema.name
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Away):  # in place, unlike `__and__`
        return args[0]
    return tree_map(lambda one: Away(one) if goes and isinstance(one, torch.Tensor) else one, made)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Away) else one


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`module.to(...)` that keeps weights of two names one weight: there they are replaced, on a GPU filled anew."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for one in module.modules():
        for name, parameter in one._parameters.items():
            slots.setdefault(id(parameter), []).append((one, name))
    nn.Module._to(module, *args, **kwargs)  # type: ignore[operator]
    for (first, own), *others in slots.values():
        for one, name in others:
            one._parameters[name] = first._parameters[own]
    return module


@contextmanager
def standin_gpu() -> Iterator[list[int]]:
    """While it is open there is a device `cuda:0`; gives how many of its tensors operations were given so far."""
    seen[0] = 0
    before = torch._C._only_lift_cpu_tensors()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1.0, device=...)` is made on the CPU, then moved
    try:
        with pytest.MonkeyPatch.context() as patch, _Mode():
            patch.setattr(torch.cuda, "_lazy_init", lambda: None)
            patch.setattr(torch, "inference_mode", torch.no_grad)  # in it, no view of a wrapped tensor can be taken
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
            patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
            patch.setattr(nn.Module, "_to", nn.Module.to, raising=False)
            patch.setattr(nn.Module, "to", _moved)
            patch.setattr(torch, "inference_mode", torch.no_grad)  # a wrapped tensor cannot be made within the former
            yield seen
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
