"""Where torch computes: the one rule that every verb, recipe and class follows.

`--device` of the command decides; without it a class's own `device`, then the recipe's, then a GPU if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankdistill.errors import UsageError

if TYPE_CHECKING:
    import torch

_command: str | None = None
_recipe: str | None = None


def use_device(name: str | None, *, command: bool = False) -> None:
    """Let everything in this process that names no device run on this one; `command`: whatever it names.

    Raises:
        UsageError: it is not there.
    """
    global _command, _recipe
    if name is not None:
        resolve_device(name)
    if command:
        _command = name
    else:
        _recipe = name


def command_device() -> str | None:
    """What `--device` named, for processes that this one starts."""
    return _command


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """The device to compute on, by the rule; `name` is a class's own. A torch.device is one that was resolved before.

    Raises:
        UsageError: there is no such device here; what there is is said.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    asked = _command or name or _recipe or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")  # a word that torch does not know
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise UsageError(f"there is no device {asked!r} here", where="device", fix=f"one of: {', '.join(_here(count))}")
    return device


def _here(count: dict[str, int]) -> list[str]:
    import torch

    gpus = [f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(count["cuda"])]
    return [*gpus, *(["mps"] if count["mps"] else []), "cpu"]


def unplaced(settings: Any) -> Any:
    """A method's settings without the devices that it and its parts are given: they decide no content."""
    if isinstance(settings, Mapping):
        return {key: None if key == "device" else unplaced(value) for key, value in settings.items()}
    return [unplaced(value) for value in settings] if isinstance(settings, list) else settings


def synchronise() -> None:
    """Wait for what a GPU was given to do: before a clock is read."""
    torch = sys.modules.get("torch")  # where nothing has loaded it, nothing runs
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def place_training(arguments: Any, device: torch.device) -> None:
    """Make a transformers Trainer of a single process use this GPU; it takes the first, or all of them, by itself."""
    import torch

    if device.type == "cuda" and arguments.world_size == 1:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        arguments.__dict__["_setup_devices"] = device  # where its cached property `device` is kept
        arguments._n_gpu = 1
