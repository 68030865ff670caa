"""How a listwise ranker is trained before it teaches."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rankdistill.artifacts import file_digest, open_artifact
from rankdistill.errors import UsageError
from rankdistill.plain import Section
from rankdistill.students.token_batches import Precision


class Lora(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2021); merged into the weights that are saved."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    layers: Literal["all-linear"] | list[str] = Field("all-linear", description="names of the layers that get one")


class ListwiseTraining(Section):
    """How a listwise ranker is trained; the defaults are FIRST's, but for the batch."""

    orders: str = Field(description="the teacher's orders: a run file, or a folder of scored lists")
    ranking_weight: float = Field(10.0, ge=0, description="of RankNet on the first identifiers' logits; 0: text alone")
    text_weight: float = Field(1.0, ge=0, description="of the answer's language model loss")
    depth: int | None = Field(None, ge=2, description="documents of each order that are used, from its beginning")
    queries: int | None = Field(None, ge=1, description="orders at most, drawn by the seed")
    epochs: float = Field(3.0, gt=0, description="passes over the orders; each draws and shuffles its windows anew")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(5e-6, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(4, ge=1, description="windows in one pass")
    accumulation: int = Field(8, ge=1, description="passes a step")
    noise: float = Field(5.0, ge=0, description="NEFTune: uniform noise on the input embeddings; 0: none")
    lora: Lora | None = Field(None, description="train adapters; null: all weights")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    precision: Precision = "auto"


def orders_fingerprint(orders: str | Path) -> str:
    """Of a run file's bytes, or of scored lists."""
    path = Path(orders).expanduser()
    if path.is_dir():
        return open_artifact(path, "lists").fingerprint
    if not path.is_file():
        raise UsageError("there are no orders here", where=str(orders), fix="a run file or a folder of scored lists")
    return file_digest(path)
