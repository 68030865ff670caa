"""Cross-encoder teachers: any sequence-classification ranker, or one fine-tuned from an encoder within the run.

How they score: `students/pair_scoring.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.plain import Section
from rankdistill.students.loading import is_cross_encoder
from rankdistill.students.models import resolve_model
from rankdistill.students.pair_scoring import PairScorer, open_cross_encoder
from rankdistill.students.token_batches import Precision, resolve_precision
from rankdistill.teachers.base import Dev, PairTeacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

    from rankdistill.collections import Collection


class CrossEncoderTraining(Section):
    """How a cross-encoder is fine-tuned before it teaches."""

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
    dev_depth: int = Field(20, ge=2, description="of their candidates, as many are re-ranked")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="the encoder's own by default; 0 spares a CPU a third of each step"
    )
    max_length: int | None = Field(None, ge=8, description="tokens a pair in training; the teacher's own by default")
    precision: Precision = "auto"


class CrossEncoderTeacher(PairTeacher):
    """A cross-encoder that reads query and document together; its raw logit is the score.

    Pairs are cut exactly as `CrossEncoder.predict` cuts them (longest first, at `max_length`) as long as the query
    stays within `query_length`. A longer query is cut to `query_length` tokens before, so that room is left for the
    document; how many were cut is said once.

    Args:
        model: a cross-encoder's folder or hub name; with `train`, the encoder it is fine-tuned from.
        max_length: tokens a pair; the model's own limit by default.
        query_length: tokens a query; unlimited (the longest-first rule alone) by default.
        precision: auto, fp32, bf16 or fp16; auto is bf16 where the device's hardware has it.
        token_budget: padded tokens a batch; 2,048 on a CPU and 65,536 on a GPU by default.
        device: cpu, cuda, cuda:1 ...; a GPU if there is one by default.
        train: fine-tune first, see CrossEncoderTraining.
    """

    type = "cross_encoder"
    score_kind = "logit"

    def __init__(
        self,
        model: str,
        max_length: int | None = None,
        query_length: int | None = None,
        precision: Precision = "auto",
        token_budget: int | None = None,
        device: str | None = None,
        train: CrossEncoderTraining | None = None,
    ) -> None:
        self.model_name, self.max_length, self.query_length = model, max_length, query_length
        self.precision: Precision = precision
        self.token_budget, self._device_name = token_budget, device
        self.training = CrossEncoderTraining.model_validate(train) if train is not None else None
        self._reported = 0  # queries that were cut
        self._folder: Path | None = None
        self._scorer: PairScorer | None = None

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def needs_training(self) -> bool:
        return self.training is not None and self._folder is None

    def training_inputs(self) -> dict[str, Any]:
        return {"model": resolve_model(self.model_name).revision}

    def use_trained(self, folder: Path) -> None:
        self._folder, self._scorer, self._reported = Path(folder), None, 0

    def _source(self) -> tuple[Path, str]:
        if self.needs_training:
            raise RankdistillError("this cross-encoder must be trained before it teaches", fix="call train() first")
        source = resolve_model(str(self._folder) if self._folder else self.model_name)
        return source.path, source.revision

    def fingerprint(self) -> str:
        device = self.device
        return fingerprint(
            {
                "type": self.type,
                "revision": self._source()[1],
                "max_length": self.max_length,
                "query_length": self.query_length,
                "precision": resolve_precision(device, self.precision),
            }
        )

    def describe(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "model": self.model_name,
            "max_length": self.max_length,
            "query_length": self.query_length,
            "precision": resolve_precision(self.device, self.precision),
            "train": self.training.model_dump() if self.training else None,
        }

    @property
    def device(self) -> torch.device:
        return resolve_device(self._device_name)

    def load(self) -> CrossEncoder:
        """The model, loaded once.

        Raises:
            RankdistillError: it is no cross-encoder with one score a pair.
        """
        if self._scorer is None:
            folder, _ = self._source()
            if not is_cross_encoder(folder):
                raise RankdistillError(
                    "this model is an encoder, not a cross-encoder: it has no scoring head",
                    where=str(folder),
                    fix="give `train` settings to fine-tune a cross-encoder from it, or use type: bi_encoder",
                )
            model = open_cross_encoder(folder, self.max_length, self.device)
            if model.num_labels != 1:
                raise RankdistillError(
                    f"this model gives {model.num_labels} numbers a pair, a teacher gives one", where=str(folder)
                )
            self._scorer = self._over(model).freeze()
        return self._scorer.model

    def _over(self, model: CrossEncoder) -> PairScorer:
        return PairScorer(model, self.precision, self.token_budget, self.query_length)

    def over(self, model: CrossEncoder) -> CrossEncoderTeacher:
        """A teacher that scores with a model in training, as it is at the time."""
        teacher = CrossEncoderTeacher(self.model_name, self.max_length)
        teacher._scorer = self._over(model)
        return teacher

    @property
    def scorer(self) -> PairScorer:
        self.load()
        assert self._scorer is not None
        return self._scorer

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] logits of pairs [N, 2]; see PairTeacher."""
        return self.scorer.score_pairs(queries, documents, pairs)

    def take_report(self) -> dict[str, Any]:
        """How many queries were cut."""
        counted = self._scorer.cut_queries if self._scorer is not None else 0
        cut, self._reported = counted - self._reported, counted
        return {"cut_query": cut} if cut else {}

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        collection: Collection,
        candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
        out: Path,
        seed: int,
        split: str = "train",
        dev: Dev | None = None,
    ) -> dict[str, Any]:
        """Fine-tune `model` on labels and mined negatives, and use the result from now on.

        Each of a query's positives makes a list of its own, with negatives from its candidates (those of a lower
        grade; their gain is in the target of `lce`), one from each depth. With `start: head` an ordinary CrossEncoder
        is saved; with `start: encoder` one that `CrossEncoder(out, trust_remote_code=True)` loads where this package
        is installed. Either has the identity as its activation, so that `predict` gives the raw logit. A killed
        training goes on from its last checkpoint, beside `out`.

        Returns:
            What it was trained on (queries, pairs, steps), what was lost and gained (loss, its floor and what guessing
            gives; nDCG@10 of re-ranked dev candidates by step), seconds.
        """
        from rankdistill.teachers.cross_encoder_training import fine_tune

        if self.training is None:
            raise UsageError("this cross-encoder has no `train` settings", where="teacher.train")
        out = Path(out)
        work = out.with_name(f".{out.name}.training")
        report = fine_tune(self, self.training, collection, candidates, work, seed=seed, split=split, dev=dev)
        out.mkdir(parents=True, exist_ok=True)
        for item in sorted((work / "model").iterdir()):
            os.replace(item, out / item.name)
        shutil.rmtree(work)
        self.use_trained(out)
        return report
