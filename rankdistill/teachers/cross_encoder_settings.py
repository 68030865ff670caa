"""How a cross-encoder is fine-tuned before it teaches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rankdistill.plain import Section
from rankdistill.students.token_batches import Precision


class CrossEncoderTraining(Section):
    """The keys of `teacher.train`."""

    start: Literal["encoder", "head"] = Field(
        "encoder",
        description="rank as the encoder does before the first step (see students/pair_encoder.py; an encoder that "
        "cannot be had that way falls back), or a new head on the first token, which starts at random",
    )
    loss: Literal["lce", "bce", "listnet", "lambda"] = Field(
        "lce",
        description="over a positive and its negatives: softmax cross-entropy to the labels' gains, binary "
        "cross-entropy (positives weighted by the number of negatives), ListNet, or LambdaLoss",
    )
    target_temperature: float = Field(
        0.2, gt=0, description="of listnet: the target is softmax(grade / this); at 1 a positive gets e times the rest"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training lists")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(1e-4, gt=0)
    head_learning_rate: float | None = Field(
        None, gt=0, description="of what is new (head, pooler, classifier); 10 times the encoder's by default"
    )
    gate_learning_rate: float = Field(1e-2, gt=0, description="of the gates between the sides, with start: encoder")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: int = Field(8, ge=1, description="lists a step: a positive and its negatives each")
    negatives: int = Field(3, ge=1, description="negatives a positive, one from each depth of the candidates")
    positives: int = Field(1, ge=1, description="labelled positives a query at most, each with its own negatives")
    refresh: bool = Field(
        False, description="halfway, score the candidates with the model as it is and draw negatives by its order"
    )
    negatives_below: float = Field(
        0.95, gt=0, le=1, description="at the refresh, only documents below this share of the positive's score"
    )
    queries: int | None = Field(None, ge=1, description="training queries at most, drawn by the seed")
    checkpoints: int = Field(
        4, ge=1, description="looks at dev, beside the one before the first step; the best is kept"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many looks at dev without a better one")
    dev_queries: int = Field(100, ge=0, description="dev queries that choose the checkpoint; 0 keeps the last one")
    dev_depth: int = Field(20, ge=2, description="of what the first source finds for them, as many are re-ranked")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="the encoder's own by default; 0 spares a CPU a third of each step"
    )
    max_length: int | None = Field(None, ge=8, description="tokens a pair in training; the teacher's own by default")
    precision: Precision = "auto"
