"""Inference-free sparse students: a query is its tokens and their weights; only documents go through an encoder."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

from rankdistill.artifacts import file_digest
from rankdistill.errors import UsageError
from rankdistill.progress import say
from rankdistill.students.base import Device
from rankdistill.students.models import resolve_model
from rankdistill.students.sparse import SparseModel, SparseStudent, Start, is_sparse, load_sparse, route, special_tokens
from rankdistill.students.token_weights import read_idf

COLLECTION, KEEP = "collection", "keep"


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
