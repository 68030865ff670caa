"""Fine-tuning a causal language model on answers that follow prompts: listwise rankers, generators of queries."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rankdistill.errors import RankdistillError, require
from rankdistill.progress import quiet_transformers
from rankdistill.students.token_batches import GradientCache
from rankdistill.teachers.llm.chat import Chat
from rankdistill.teachers.llm.local import abilities
from rankdistill.training.loop import TrainingLoop, loop_arguments

CHECKPOINTS = 4  # over a training
RECENT = 20  # steps over which the losses are told
# Of logits float32 [rows, longest answer + 1, vocabulary] of the last places and what else `collate` gave: what is
# minimised, and its parts. What is said at a place follows the one before.
Loss = Callable[..., tuple[Tensor, list[Tensor]]]


def padded(rows: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """Tokens of prompts and of the answers after them as one batch that ends together.

    Returns:
        `input_ids` and `attention_mask`, int64 [rows, width]; `answers` alone, int64 [rows, longest]; their `lengths`.
    """
    lengths = torch.tensor([[len(prompt) + len(answer), len(answer)] for prompt, answer in rows])
    width, longest = lengths.max(dim=0).values.tolist()
    return {
        "input_ids": torch.tensor([[padding] * (width - len(p) - len(a)) + p + a for p, a in rows]),
        "attention_mask": (torch.arange(width) >= width - lengths[:, :1]).long(),
        "answers": torch.tensor([[padding] * (longest - len(answer)) + answer for _, answer in rows]),
        "lengths": lengths[:, 1],
    }


def text_loss(logits: Tensor, answers: Tensor, lengths: Tensor) -> Tensor:
    """Cross-entropy of the answers' tokens, the mean over all of them."""
    width = answers.shape[1]
    said = torch.arange(width, device=answers.device) >= width - lengths[:, None]
    return functional.cross_entropy(logits[:, :-1][said], answers[said])


class CausalTraining(TrainingLoop):
    """Minimises a loss of the answers' logits; `recent` holds the loss's parts of the last steps' batches."""

    def __init__(self, model: Any, args: Any, data: Any, collate: Any, title: str, loss: Loss, fix: str) -> None:
        super().__init__(model, args, data, collate, title)
        self.known, self.cache, self.loss, self.fix = abilities(model), GradientCache(), loss, fix
        self.recent: list[list[float]] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        inputs = dict(inputs)
        texts = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        if self.known.position_ids:
            texts["position_ids"] = (texts["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        kept = inputs["answers"].shape[1] + 1
        whole: dict[str, Any] = {"logits_to_keep": kept} if self.known.logits_to_keep else {}
        logits = self.cache.run(lambda part: model(**part, **whole).logits[:, -kept:], [texts])
        loss, parts = self.loss(torch.cat(logits).float(), **inputs)
        self.recent.append([float(part.detach()) for part in parts])
        del self.recent[: -RECENT * self.args.gradient_accumulation_steps]
        return loss

    def remember(self) -> None:
        self.before = list(self.recent)

    def restore(self) -> None:
        self.recent = list(self.before)

    def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
        self.cache.shrink(error, [inputs], self.args.device, self.fix)


def fine_tune(
    model: Any,
    chat: Chat,
    data: Any,
    collate: Any,
    loss: Loss,
    out: Path,
    *,
    title: str,
    steps: int,
    precision: Any,
    fixes: tuple[str, str],
    lora: Any = None,
    dtype: torch.dtype = torch.float32,
    warmup: float = 0.1,
    **arguments: Any,
) -> list[float]:
    """Train a loaded model and save it as an ordinary one, with its tokenizer; a killed training goes on from its last
    checkpoint, beside `out`.

    Args:
        data: what `collate` makes batches of, in order.
        fixes: where the memory does not hold a batch, where the training diverges.
        lora: settings of adapters; all weights are trained without.
        dtype: of the weights that are saved.

    Returns:
        The mean of each part of the loss over the last steps; NaN where none was done.

    Raises:
        RankdistillError: the training diverged, or `peft` is missing where adapters are asked for.
    """
    device = model.device
    if lora is not None:
        peft = require("peft", extra="llm", why="training adapters (train.lora)")
        names = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": lora.layers}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **names))
    model.config.use_cache = False
    work = out.with_name(f".{out.name}.training")
    common = {"warmup": warmup, "checkpoints": CHECKPOINTS, "logging_steps": max(1, steps // 20), **arguments}
    settings = loop_arguments(work, steps, device, precision, **common)
    trainer = CausalTraining(model, settings, data, collate, title, loss, fixes[0])
    trainer.run()
    if any(not bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        raise RankdistillError(f"{title} diverged", fix=fixes[1])
    if lora is not None:
        model = model.merge_and_unload()
    model.config.use_cache = True
    with quiet_transformers():
        model.to(dtype).save_pretrained(str(out))
        chat.tokenizer.save_pretrained(str(out))
    shutil.rmtree(work, ignore_errors=True)
    return [round(float(mean), 4) for mean in np.mean(trainer.recent, axis=0)] if trainer.recent else [math.nan] * 2
