"""The one training loop, of students and of teachers: a transformers Trainer with safe checkpoints that resume exactly,
steps that are done again in parts where the memory gives out, a log, and the best model by a dev metric kept."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from rankdistill.devices import place_training
from rankdistill.progress import Progress, quiet_transformers, say
from rankdistill.students.token_batches import free_memory
from rankdistill.training.checkpoints import SafeCheckpoints, last_checkpoint

LOG = "log.jsonl"
BEST = "best"


class TrainingLoop(SafeCheckpoints, Trainer):
    """A training in the folder `args.output_dir`, `title` its bar on the terminal; `collate` makes a batch of the
    data's items. A subclass has `compute_loss` and `use_less_memory`; one that is judged has `metric`, `judge` and
    `save_best`, and leaves its best model in `best`."""

    metric = ""  # the dev metric's key in the log; "": the last weights are kept
    _begun = -1  # the step whose batches so far are `_batches`

    def __init__(self, model: nn.Module, args: TrainingArguments, data: Any, collate: Any, title: str) -> None:
        # The eval_dataset is only asked for by the base class: `evaluate` calls `judge`.
        super().__init__(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collate)
        self.model_accepts_loss_kwargs = False  # our losses are means: the base class divides by the accumulation
        self.title = title
        self.remove_callback(PrinterCallback)
        self.log_file = LogFile(Path(str(args.output_dir)) / LOG, args.max_steps, title)
        if args.should_save:
            self.add_callback(self.log_file)

    @property
    def learner(self) -> Any:
        """The model that was given, whatever wraps it."""
        return self.accelerator.unwrap_model(self.model)

    def run(self) -> None:
        """Train to the last step, from the last checkpoint where there is one."""
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        if checkpoint is not None:
            say(f"{self.title}: going on from {checkpoint.name}")
        try:
            with quiet_transformers():
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.log_file.progress.close()

    # -- what subclasses say ------------------------------------------------------------------------------------------

    def rates(self) -> Mapping[nn.Parameter, float]:
        """Learning rates of parameters that do not learn at that of the settings."""
        return {}

    def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
        """`GradientCache.shrink` of what computes this batch."""
        raise NotImplementedError

    def remember(self) -> None:
        """Called before a step's first batch: what the step changes but weights."""

    def restore(self) -> None:
        """Called before a step is done again."""

    def judge(self) -> dict[str, float]:
        """`metric`, and what else is measured beside it for the log."""
        raise NotImplementedError

    def save_best(self, folder: Path) -> None:
        """Write the model as it is now to a folder that does not exist."""
        raise NotImplementedError

    # -- what the base class calls ------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The data in its own order, which is a random one already."""
        workers = self.args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            cast("Any", self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            worker_init_fn=_tokenise_alone,
            multiprocessing_context="fork" if workers else None,  # they read what is open here, and touch no GPU
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, *model: Any) -> torch.optim.Optimizer:
        """With a group of its own for each parameter of `rates`: transformers 5.0 has no other way."""
        optimizer, rates = super().create_optimizer(*model), self.rates()
        for group in list(optimizer.param_groups):
            for apart in [parameter for parameter in group["params"] if parameter in rates]:
                group["params"] = [parameter for parameter in group["params"] if parameter is not apart]
                optimizer.add_param_group({**group, "params": [apart], "lr": rates[apart]})
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> torch.Tensor:
        """As the base class does; where the memory gives out, the step's batches are done again in smaller parts."""
        if self._begun != self.state.global_step:
            self._begun, self._batches = self.state.global_step, list[dict[str, Any]]()
            self.remember()
        self._batches.append(inputs)
        waiting = [inputs]
        while True:
            try:
                for batch in waiting:
                    loss = super().training_step(model, batch, *rest, **options)
                return loss
            except RuntimeError as error:
                self.use_less_memory(error, inputs)
            # A backward pass that was cut short has left part of its gradients.
            model.zero_grad()
            free_memory()
            self.restore()
            waiting = self._batches

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The dev metric, once a step (a resumed training starts at one that was judged); the best model is kept."""
        metrics: dict[str, float] = {}
        if self.metric and self.args.should_save and self.state.global_step not in self.looks():
            metrics = self.judge()
            if metrics[self.metric] > self.best_so_far():
                self.keep_best()
            self.log(metrics)
        # As the base class does; it takes the request to evaluate back, which else is served again at the end.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def keep_best(self) -> None:
        """Save the model as it is to `best`, whole or not at all."""
        best = Path(self.args.output_dir) / BEST
        new = best.with_name(f"{BEST}.new")
        shutil.rmtree(new, ignore_errors=True)
        self.save_best(new)
        shutil.rmtree(best, ignore_errors=True)
        new.rename(best)

    def looks(self) -> dict[int, float]:
        """step → dev metric, of each look so far."""
        return curve(self.state.log_history, self.metric)

    def best_so_far(self) -> float:
        return max(self.looks().values(), default=-math.inf)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return False  # `evaluate` keeps the best


class LogFile(TrainerCallback):
    """The bar on the terminal, and the log as a file, one JSON object a line: step, loss, its parts, rate, dev metric.

    A resumed training's file begins with what its checkpoint knows.
    """

    def __init__(self, path: Path, total: int, title: str) -> None:
        self.path = path
        self.progress = Progress(title, total, "steps")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in state.log_history), encoding="utf-8")
        self.progress.done = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(state.log_history[-1]) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = {key: value for entry in state.log_history[-4:] for key, value in entry.items()}
        note = ", ".join(f"{key} {shown[key]:.4f}" for key in shown if key == "loss" or key.startswith("dev_"))
        self.progress.advance(1, note)


def curve(history: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """step → value of a figure of the log."""
    return {int(entry["step"]): entry[key] for entry in history if key in entry}


def loop_arguments(
    folder: Path,
    steps: int,
    device: torch.device,
    precision: Literal["fp32", "bf16", "fp16"],
    *,
    warmup: float,
    checkpoints: int,
    **settings: Any,
) -> TrainingArguments:
    """What every training asks of transformers.

    Args:
        warmup: share of the steps in which the learning rate rises; then it falls in a line unless `settings` say how.
        checkpoints: over the whole training; each is a look at dev too.
        settings: others of TrainingArguments.
    """
    every = max(1, steps // checkpoints)
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "warmup_steps": round(warmup * steps),
        "lr_scheduler_type": "linear",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": every,
        "eval_on_start": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**{**common, **settings})
    place_training(arguments, device)
    return arguments


def _tokenise_alone(_: int) -> None:
    """In a loader's process: the tokenizers' threads are not there after a fork, and it would wait for them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
