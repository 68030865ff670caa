"""Checkpoints of the transformers Trainer in safe formats: safetensors and JSON, no pickle written or read.

A checkpoint counts once its `trainer_state.json`, written last, is whole: a kill while saving costs the steps since
the checkpoint before, nothing else.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rankdistill.errors import RankdistillError
from rankdistill.students.base import StudentModel

WEIGHTS = "model.safetensors"
OPTIMISER = "optimizer"
SCHEDULE = "scheduler.json"
SCALER = "scaler.json"
STATE = "trainer_state.json"


class SafeCheckpoints:
    """Mixed into a transformers Trainer, before it, replaces how its checkpoints are written and read."""

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any

    def __init_subclass__(cls, **settings: Any) -> None:
        """Refuse a Trainer that calls these by other names: it would write pickles."""
        super().__init_subclass__(**settings)
        replaced = [name for name, value in vars(SafeCheckpoints).items() if inspect.isfunction(value)]
        unknown = [name for name in replaced if not hasattr(super(SafeCheckpoints, cls), name)]
        if unknown:
            raise RankdistillError(
                f"this version of transformers saves checkpoints in another way (no {', '.join(unknown)})",
                fix="install an earlier version of transformers",
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_model(self.accelerator.unwrap_model(model or self.model), str(Path(resume_from_checkpoint) / WEIGHTS))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            folder = Path(output_dir)
            save_state(self.optimizer.state_dict(), folder, OPTIMISER)
            (folder / SCHEDULE).write_text(json.dumps(_plain(self.lr_scheduler.state_dict())), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            self.optimizer.load_state_dict(load_state(folder, OPTIMISER))
            self.lr_scheduler.load_state_dict(json.loads((folder / SCHEDULE).read_text(encoding="utf-8")))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            (Path(output_dir) / SCALER).write_text(json.dumps(scaler.state_dict()), encoding="utf-8")

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (path := Path(checkpoint) / SCALER).is_file():
            self.accelerator.scaler.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    def _save_rng_state(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = cast(
            "tuple[str, Any, int, int, float]", np.random.get_state(legacy=True)
        )
        values = {
            "python": [version, list(words), gauss],
            "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        }
        stem = f"random_state_{self.args.process_index}"
        (folder / f"{stem}.json").write_text(json.dumps(values), encoding="utf-8")
        tensors = {"cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, folder / f"{stem}.safetensors")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stem = Path(checkpoint) / f"random_state_{self.args.process_index}"
        if not stem.with_suffix(".json").is_file():
            return  # resumed with another number of processes
        values = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        version, words, gauss = values["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = values["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        tensors = load_file(stem.with_suffix(".safetensors"))
        torch.random.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, or None."""
    return next(iter(checkpoints(folder)), None)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints below `folder`, the newest first."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    whole = []
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole.append(path)
    return whole


def save_state(state: dict[str, Any], folder: Path, name: str) -> None:
    """An optimiser's state_dict: tensors to safetensors, the rest to JSON."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{parameter}.{key}"] = value.contiguous()
            else:
                plain.setdefault(str(parameter), {})[key] = value
    save_file(tensors, folder / f"{name}.safetensors")
    rest = {"plain": plain, "param_groups": _plain(state["param_groups"])}
    (folder / f"{name}.json").write_text(json.dumps(rest), encoding="utf-8")


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """What `save_state` wrote."""
    rest = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {int(parameter): dict(values) for parameter, values in rest["plain"].items()}
    for place, tensor in load_file(folder / f"{name}.safetensors").items():
        parameter, _, key = place.partition(".")
        state.setdefault(int(parameter), {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and mappings only (schedules carry functions, which their owner makes anew)."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, (list, tuple)):
        return [None if callable(item) else _plain(item) for item in value]
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    return value


# -- averages and mixes ------------------------------------------------------------------------------------------------
# After model soups (Wortsman et al. 2022, arXiv:2203.05482) and WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903): on
# the way between two models that share a start there is often one better than both, and away from the training data
# nearly always. Which share of the trained weights is kept, is chosen on dev.

PREFIX = "student."  # of the student's weights in a checkpoint
Weights = Mapping[str, torch.Tensor]


def copy_of(student: StudentModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}


def averaged(folder: Path, count: int) -> dict[str, torch.Tensor]:
    """Mean of the student's weights over the last `count` checkpoints below `folder`."""
    last = checkpoints(folder)[:count]
    total: dict[str, torch.Tensor] = {}
    for path in last:
        for name, value in load_file(path / WEIGHTS).items():
            if name.startswith(PREFIX):
                name = name.removeprefix(PREFIX)
                total[name] = total[name] + value.double() if name in total else value.double()
    return {name: value / len(last) for name, value in total.items()}


def load_mix(student: StudentModel, start: Weights, end: Weights, share: float) -> None:
    """Give a student the weights (1 - share) · start + share · end; counts and other whole numbers are the end's."""
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if name in end:  # weights that two names share are in a checkpoint once
                mixed = end[name]
                if value.is_floating_point() and share != 1:
                    mixed = start[name].double() * (1 - share) + end[name].double() * share
                value.copy_(mixed)


def mixes(
    student: StudentModel, start: Weights, folder: Path, average: int, shares: Sequence[float]
) -> Iterator[float]:
    """The shares of the trained weights, each while the student has that mix; 1 comes first, where it is an average."""
    end: Weights = averaged(folder, average) if average > 1 else copy_of(student)
    for share in [*([1.0] if average > 1 else []), *shares]:
        load_mix(student, start, end, share)
        yield share
