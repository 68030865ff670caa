"""Sparse students: a weight for each term of the vocabulary, compared by dot product, as a SparseEncoder (SPLADE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_matrix, vstack
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from tokenizers import Tokenizer
from torch import Tensor, nn

from rankdistill.artifacts import file_digest, fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import say
from rankdistill.students.base import Device, EncoderModel, EncoderStudent, Features, Side, evaluating, to_device
from rankdistill.students.loading import UNBOUNDED, load_model
from rankdistill.students.masked_language import WarmUp, head_inputs, load_masked_language, warm_up
from rankdistill.students.models import resolve_model, saved_settings, says
from rankdistill.students.term_head import pool_terms
from rankdistill.students.token_weights import TokenWeights, collection_idf, read_idf, sparse_fingerprints

if TYPE_CHECKING:
    from rankdistill.collections import Collection

NO_WARM_UP = WarmUp()
COLLECTION, KEEP = "collection", "keep"  # where a table of query weights comes from
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


class SparseModel(EncoderModel):
    """A SparseEncoder as a student; embeddings while training are dense, [texts, vocabulary], at least 0.

    Args:
        source: what names weights and lengths of (the query side, the document side), for the fingerprints; or None.
        most: side → how many of a text's largest weights are kept when it is encoded; 0 for all.
        start: what `prepare` has still to do.
    """

    sparse = True
    idf_learning_rate: float | None = None

    def __init__(
        self, model: SparseEncoder, maker: Any, scale: float, source: Any, most: dict[str, int], start: Start | None
    ) -> None:
        super().__init__(model, maker, scale)
        self.similarity = "dot"
        self.most_terms = {"query": 0, "document": 0, **most}
        self.start = start
        self._routes = {side: route(model, side) for side in ("query", "document")}
        self.dimension, queries = (_width(self._routes[side]) for side in ("document", "query"))
        if queries != self.dimension:
            raise RankdistillError(
                f"the query side has {queries:,} terms and the document side {self.dimension:,}",
                fix="two encoders of one vocabulary",
            )
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

    @property
    def static(self) -> SparseStaticEmbedding | None:
        """The table of query weights of an inference-free student."""
        first, *rest = self._routes["query"]
        return first if isinstance(first, SparseStaticEmbedding) and not rest else None

    @property
    def inference_free(self) -> bool:
        return self.static is not None

    @property
    def terms(self) -> list[str]:
        """The vocabulary, by id; "" where the tokenizer has no token of an id."""
        terms = [""] * self.dimension
        tokenizer: Any = self._routes["document"][0].tokenizer
        for token, number in tokenizer.get_vocab().items():
            if number < len(terms):
                terms[number] = token
        return terms

    @property
    def token_weights(self) -> TokenWeights | None:
        """The query side of an inference-free student as it is now, without torch."""
        static = self.static
        if static is None:
            return None
        if self._query_tokenizer is None:
            self._query_tokenizer = backend(static.tokenizer)
        table, prompt = static.weight.detach().float().cpu().numpy(), self.model.prompts.get("query") or ""
        names, longest = (self.fingerprint, self.document_fingerprint), min(int(static.max_seq_length), UNBOUNDED)
        weights = TokenWeights(self._query_tokenizer, table, *names, prompt, longest, self.most_terms["query"])
        weights.cut = self.cut  # one count, whichever of the two encodes
        return weights

    def prepare(self, collection: Collection, folder: Path) -> None:
        """Warm new heads up on the collection and fill the table of query weights, where that is due; done once."""
        start, self.start = self.start, None
        if start is None:
            return
        warm_ups = [
            warm_up(transformer, start.warm_up, new_head, source, collection, folder, self.precision)
            for transformer, new_head, source in start.encoders
        ]
        idf, static = "", self.static
        if start.idf and static is not None:
            table, idf = collection_idf(collection, backend(static.tokenizer), self.dimension, folder)
            table[special_tokens(static.tokenizer, self.dimension)] = 0
            table[table < start.least] = 0
            with torch.no_grad():
                static.weight.copy_(torch.from_numpy(table))
        self._name(warm_ups, idf)

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """That of the table of query weights, where it is trained: they are thousands of times as large as others."""
        static, rate = self.static, self.idf_learning_rate
        return {static.weight: rate} if static is not None and rate is not None and static.weight.requires_grad else {}

    def _check_table(self) -> None:
        if self.start is not None and self.start.idf:
            raise RankdistillError(
                "the query weights of this student come from a collection, which it has not seen",
                fix="model.prepare(collection, folder) first, or student.idf: a file",
            )

    def idf(self, collection: Collection, folder: Path) -> NDArray[np.float32]:
        """[vocabulary] inverse document frequency of each term in a collection; kept below `folder`."""
        tokenizer = backend(self._routes["document"][0].tokenizer)
        return np.asarray(collection_idf(collection, tokenizer, self.dimension, folder)[0], np.float32)

    def embed(self, features: Features, side: Side) -> Tensor:
        if side == "query":
            self._check_table()
        head = self._heads[side]
        if head is not None:
            return head(features)
        weights: Tensor = self.model(dict(features), task=side)["sentence_embedding"].float()
        # Weights that training drove below 0 count as 0 wherever vectors are made for use.
        return weights if self.training else weights.clamp(min=0)

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        # All pairs, then the lists' own: the documents' vectors are too wide to be repeated for each list.
        return self.score_all(queries, documents).gather(1, index)

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

    def _encode(self, texts: Sequence[str], side: Side) -> csr_matrix:
        """[texts, vocabulary] float32; sorted indices, weights above 0 only."""
        if side == "query":
            self._check_table()
            if (weights := self.token_weights) is not None:
                return weights.encode_queries(texts)
        parts, places = [csr_matrix((0, self.dimension), dtype=np.float32)], [np.empty(0, np.int64)]

        def take(rows: NDArray[np.int64], embeddings: Tensor) -> None:
            parts.append(active_terms(embeddings, self.most_terms[side]))
            places.append(rows)

        self.embed_all(texts, side, take)
        vectors: csr_matrix = vstack(parts, format="csr", dtype=np.float32)[np.argsort(np.concatenate(places))]
        vectors.sort_indices()
        return vectors

    def save(self, folder: Path) -> None:
        """As the base class does; query weights below 0 are saved as 0."""
        static = self.static
        if static is not None:
            trained, static.weight.data = static.weight.data, static.weight.data.clamp(min=0)
        try:
            super().save(folder)
        finally:
            if static is not None:
                static.weight.data = trained

    def settings(self, folder: Path) -> dict[str, Any]:
        whole, documents = sparse_fingerprints(folder, [self.precision, self.most_terms])
        return {
            "type": "inference_free" if self.inference_free else "splade",
            **super().settings(folder),
            "terms": self.most_terms,
            "precision": self.precision,
            "fingerprint": whole,
            "document_fingerprint": documents,
        }


def _pooled(transformer: Any, pooling: Any, features: Features) -> Tensor:
    """Term weights [texts, vocabulary], float32: a side's encoder, head and pooling in little memory."""
    hidden, decoder = head_inputs(transformer, features)
    how = (pooling.pooling_strategy, pooling.activation_function)
    return pool_terms(hidden, features["attention_mask"], decoder.weight, decoder.bias, *how)


@torch.no_grad()
def _term_head(modules: Sequence[Any]) -> Callable[[Features], Tensor] | None:
    """A side in little memory, where that gives what its modules give; None for a model of another shape.

    Tried on a text: some heads do more after their last map (scale the logits, or cap them).
    """
    if not is_splade(modules):
        return None
    transformer, pooling = modules
    transformer.unpad_inputs = False  # texts are sorted by length here; packed ones have no mask
    decoder = transformer.model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        return None
    with evaluating(transformer):
        features = to_device(transformer.preprocess(["a b", "a"]), decoder.weight.device)
        hidden, _ = head_inputs(transformer, features)
        logits = transformer(dict(features))[transformer.module_output_name]
    same = hidden.shape[-1] == decoder.in_features and torch.allclose(decoder(hidden), logits, rtol=1e-3, atol=1e-3)
    return partial(_pooled, transformer, pooling) if same else None


def active_terms(embeddings: Tensor, most: int = 0) -> csr_matrix:
    """The weights above 0 of [texts, vocabulary] as a sparse matrix; the `most` largest of each text, unless 0."""
    if most and most < embeddings.shape[1]:
        largest = embeddings.topk(most, dim=1)
        embeddings = torch.zeros_like(embeddings).scatter_(1, largest.indices, largest.values)
    active = embeddings.float().clamp(min=0).to_sparse()
    values = active.values().cpu().numpy()
    if not np.isfinite(values).all():
        raise RankdistillError("a text's term weights are not finite", fix="student.precision: fp32, or another model")
    return csr_matrix((values, tuple(active.indices().cpu().numpy())), shape=tuple(embeddings.shape))


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
    if is_splade(modules):
        return int(modules[0].model.get_output_embeddings().weight.shape[0])
    return int(modules[-1].get_embedding_dimension())


def backend(tokenizer: Any) -> Tokenizer:
    """A copy of the fast tokenizer underneath."""
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def special_tokens(tokenizer: Any, size: int) -> list[int]:
    """Ids of tokens that are no words: separators, padding, masks, the unknown one."""
    return sorted(number for number in set(tokenizer.all_special_ids) if number < size)


def is_sparse(folder: Path) -> bool:
    """Whether a folder holds a SparseEncoder."""
    return bool(says(folder, "config_sentence_transformers.json").get("model_type") == "SparseEncoder")


def load_sparse(folder: Path, device: Device = None) -> SparseEncoder:
    """A SparseEncoder's folder, weights in float32."""
    if not is_sparse(folder):
        raise RankdistillError("this is no SparseEncoder", where=str(folder), fix="train one: student.type: splade")
    return load_model(SparseEncoder, folder, device, model_kwargs={"dtype": torch.float32})


@dataclass(eq=False)
class SparseStudent(EncoderStudent):
    """What sparse students share: an encoder with a masked-language head, cut, pooled and opened again.

    Args:
        pooling: over the tokens of a text; `keep` is what the model came with, or max.
        activation: of a logit x: `relu` is log(1 + relu(x)), `log1p_relu` the logarithm of 1 + that, which flattens
            large weights; `keep` is what the model came with, or relu.
        query_terms: keep this many of a query's largest weights when it is encoded; 0 for all.
        document_terms: the same of a document.
        warm_up: what a head learns from the collection before any training; a new one starts with 256 terms a document.
    """

    pooling: Literal["keep", "max", "sum"] = "keep"
    activation: Literal["keep", "relu", "log1p_relu"] = "keep"
    scale: float = 1.0
    query_terms: int = 0
    document_terms: int = 0
    warm_up: WarmUp = NO_WARM_UP

    def __post_init__(self) -> None:
        self.warm_up = WarmUp.model_validate(self.warm_up)  # a recipe's is a mapping
        self.most_terms = {"query": self.query_terms, "document": self.document_terms}

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
        model = SparseModel(encoder, self, scale, None, most, None)
        settings = [self.precision, model.most_terms]
        model.fingerprint, model.document_fingerprint = sparse_fingerprints(folder, settings)
        return model

    def _encoder(self, name: str) -> tuple[list[Any], Any, bool]:
        """([transformer, pooling], what names them, whether the head is new), cut and set as the recipe says."""
        source = resolve_model(name)
        transformer: Any
        pooling: Any = SpladePooling()
        if is_sparse(source.path):
            modules = route(load_sparse(source.path, "cpu"), "document")
            if not is_splade(modules):
                raise UsageError(f"{name!r} is a SparseEncoder of another kind than SPLADE", where="student.model")
            (transformer, pooling), had_head = modules, True
        else:
            transformer, had_head = load_masked_language(source.path, name)
        self.cut(transformer)
        self.set_lengths(transformer, self.prompts)
        pooling = SpladePooling(
            pooling.pooling_strategy if self.pooling == "keep" else self.pooling,
            pooling.activation_function if self.activation == "keep" else self.activation,
            embedding_dimension=transformer.model.get_output_embeddings().weight.shape[0],
        )
        lengths = [transformer.query_length, transformer.document_length]
        named = [source.revision, self.layers, pooling.pooling_strategy, pooling.activation_function, lengths]
        return [transformer, pooling], named, not had_head

    def _model(
        self, modules: Sequence[nn.Module], source: tuple[Any, Any], start: Start, device: Device
    ) -> SparseModel:
        encoder = SparseEncoder(modules=list(modules), device=str(resolve_device(device)), similarity_fn_name="dot")
        self.set_prompts(encoder)
        return SparseModel(encoder, self, self.scale, source, self.most_terms, start)


@dataclass(eq=False)
class SpladeStudent(SparseStudent):
    """A weight for each term of the vocabulary, by a masked-language head over each token (SPLADE).

    After Formal et al. 2021 (arXiv:2107.05720, sum; arXiv:2109.10086, max).

    Args:
        model: folder, packaged encoder or hub name: a SPLADE model, a masked-language model, or any encoder, which
            then gets a head tied to its word embeddings.
        query_encoder: `shared`: one encoder for both sides; `separate`: queries have their own.
        query_model: what a separate query encoder starts from; the same as documents' unless given.
    """

    type = "splade"
    query_encoder: Literal["shared", "separate"] = "shared"
    query_model: str | None = None
    query_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.query_model is not None and self.query_encoder == "shared":
            raise UsageError(
                "a shared query encoder is the documents' own",
                where="student.query_model",
                fix="query_encoder: separate",
            )
        super().__post_init__()

    def create(self, device: Device = None) -> SparseModel:
        documents, named, new = self._encoder(self.model)
        modules, queries = documents, named
        start = Start(self.warm_up, [(documents[0], new, named)])
        if self.query_encoder == "separate":
            query_modules, queries, new = self._encoder(self.query_model or self.model)
            start.encoders.append((query_modules[0], new, queries))
            check_vocabularies(query_modules[0].tokenizer, documents[0].tokenizer)
            modules = [Router.for_query_document(query_modules, documents)]
        source = ([queries, self.prompts["query"]], [named, self.prompts["document"]])
        return self._model(modules, source, start, device)


def check_vocabularies(queries: Any, documents: Any) -> None:
    """Two sides must mean the same term by the same number."""
    terms, other = queries.get_vocab(), documents.get_vocab()
    differing = sum(other.get(token) != number for token, number in terms.items()) + len(other.keys() - terms.keys())
    if differing:
        raise UsageError(
            f"the query encoder's vocabulary is another one: {differing:,} of {len(other):,} tokens differ",
            where="student.query_model",
            fix="two encoders of one tokenizer",
        )


@dataclass(eq=False)
class InferenceFreeStudent(SparseStudent):
    """Documents by a sparse encoder, queries by a table: no model runs while somebody waits.

    After Geng et al. 2024 (arXiv:2411.04403): a query is the set of its tokens, each weighed by its inverse document
    frequency; special and unknown tokens weigh nothing.

    Args:
        model: folder, packaged encoder or hub name, as for `splade`; of a sparse model its document side.
        idf: the table of query weights: `collection`: computed from the documents; `keep`: that of the model; or a JSON
            file, token → weight.
        train_idf: train the table along; a weight driven below 0 counts as 0 where vectors are made or saved.
        idf_learning_rate: of the table, whose weights are thousands of times as large as the encoder's.
        common: tokens that more than this share of the documents hold weigh nothing in a query, like stop words (read
            off their weight, which is -log(share)); 1 keeps all. Long posting lists are what a search spends its time
            on.
        query_length: tokens a query is cut to; the tokenizer's own limit if null (a long query costs next to nothing).
    """

    type = "inference_free"
    idf: str = COLLECTION
    train_idf: bool = False
    idf_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    common: Annotated[float, Field(gt=0, le=1)] = 1.0
    query_length: int | None = None

    def create(self, device: Device = None) -> SparseModel:
        documents, named, new = self._encoder(self.model)
        transformer: Any = documents[0]
        size = len(transformer.tokenizer.get_vocab())
        if transformer.model.get_output_embeddings().weight.shape[0] != size:
            # Vocabularies padded for speed: a term without a token is of no use to a query.
            transformer.model.resize_token_embeddings(size, mean_resizing=False)
            documents[1].embedding_dimension = size
            say(f"student: the vocabulary of {self.model} is cut to its tokenizer's {size:,} tokens")
        tokenizer: Any = deepcopy(transformer.tokenizer)
        if self.query_length:
            tokenizer.model_max_length = self.query_length
        weights, table = self._weights(tokenizer, size)
        least = -math.log(self.common)
        weights[weights < least] = 0
        static = SparseStaticEmbedding(tokenizer, weights, frozen=not self.train_idf)
        source = ([table, self.query_length, self.common], [named, self.document_prompt])
        start = Start(self.warm_up, [(transformer, new, named)], self.idf == COLLECTION, least)
        model = self._model([Router.for_query_document([static], documents)], source, start, device)
        model.idf_learning_rate = self.idf_learning_rate
        return model

    def open(self, folder: Path, device: Device = None) -> SparseModel:
        model = super().open(folder, device)
        if model.static is not None:
            model.static.weight.requires_grad_(self.train_idf)
        return model

    def _weights(self, tokenizer: Any, size: int) -> tuple[torch.Tensor, Any]:
        """([vocabulary] the table to start from, what names it)."""
        if self.idf == COLLECTION:
            return torch.ones(size), COLLECTION
        if self.idf == KEEP:
            return self._kept(size)
        path = Path(self.idf).expanduser()
        special = [tokenizer.convert_ids_to_tokens(number) for number in special_tokens(tokenizer, size)]
        table = read_idf(path, tokenizer.get_vocab(), size, special)
        return torch.from_numpy(table), file_digest(path)

    def _kept(self, size: int) -> tuple[torch.Tensor, Any]:
        source = resolve_model(self.model)
        first = route(load_sparse(source.path, "cpu"), "query")[0] if is_sparse(source.path) else None
        if not isinstance(first, SparseStaticEmbedding) or len(first.weight) != size:
            raise UsageError(
                f"{self.model!r} has no table of query weights to keep", where="student.idf", fix="idf: collection"
            )
        return first.weight.detach().clone(), source.revision
