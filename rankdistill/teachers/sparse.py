"""Teachers whose vectors are term weights: BM25 and any SparseEncoder. Beside a dense one: an ensemble of kinds."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.bm25 import BM25
from rankdistill.students.models import resolve_model
from rankdistill.teachers.base import PairTeacher
from rankdistill.teachers.bi_encoder import EncoderTeacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.students.sparse import SparseModel

KEPT_POSTINGS = 20_000_000  # term weights of documents held in memory at most: 160 MB
POSTINGS_AT_ONCE = 4_000_000  # multiplied at a time


class TermWeightTeacher(PairTeacher):
    """The score of a pair is the product of its two vectors of term weights: 0 where no term is common."""

    score_kind = "similarity"
    scale: float
    _kept_postings = 0

    @cached_property
    def _kept(self) -> dict[bytes, tuple[np.ndarray, np.ndarray]]:
        return {}

    @abstractmethod
    def encoder(self) -> BM25 | SparseModel:
        """What makes the vectors: csr_matrix [texts, terms], of queries and of documents."""

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] products of pairs [N, 2]; a document is encoded once while its vector is kept."""
        encoder = self.encoder()
        query_vectors = encoder.encode_queries(queries)
        document_vectors = self._documents(encoder, documents, query_vectors.shape[1])
        postings = np.cumsum(np.diff(document_vectors.indptr)[pairs[:, 1]])
        cuts = np.searchsorted(postings, np.arange(POSTINGS_AT_ONCE, postings[-1], POSTINGS_AT_ONCE))
        products = [
            np.asarray(query_vectors[part[:, 0]].multiply(document_vectors[part[:, 1]]).sum(axis=1)).ravel()
            for part in np.split(pairs, cuts)
        ]
        return np.concatenate(products).astype(np.float32) * np.float32(self.scale)

    def _documents(self, encoder: BM25 | SparseModel, texts: Sequence[str], terms: int) -> Any:
        """csr_matrix [texts, terms]: documents come again with other queries, so they are kept by their texts' hash."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        encoded = encoder.encode_documents([texts[place] for place in new])
        vectors = {key: self._kept[key] for key in keys if key in self._kept}
        for number, place in enumerate(new):
            row = slice(encoded.indptr[number], encoded.indptr[number + 1])
            vectors[keys[place]] = encoded.indices[row], encoded.data[row]
        if self._kept_postings + encoded.nnz > KEPT_POSTINGS:
            self._kept, self._kept_postings = {}, 0
        if encoded.nnz <= KEPT_POSTINGS:
            self._kept.update((keys[place], vectors[keys[place]]) for place in new)
            self._kept_postings += encoded.nnz
        rows = [vectors[key] for key in keys]
        columns, weights = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
        offsets = np.cumsum([0, *(len(columns) for columns, _ in rows)])
        return sparse.csr_matrix((weights, columns, offsets), shape=(len(texts), terms))


@dataclass(eq=False)
class BM25Teacher(TermWeightTeacher):
    """BM25 by the statistics of the collection that is scored, over its texts: a lexical teacher without a model.

    Args:
        k1: how soon further occurrences of a term stop counting.
        b: how much long documents are marked down, 0 to 1.
        language: stop words and stemmer (Snowball's names), or "none".
        scale: the score is multiplied by this.
    """

    type = "bm25"
    k1: float = 0.9
    b: float = 0.4
    language: str = "english"
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.engine = BM25(k1=self.k1, b=self.b, language=self.language)

    def fingerprint(self) -> str:
        return fingerprint(self.describe())  # the store is keyed by the collection, whose statistics decide too

    def describe(self) -> dict[str, Any]:
        return super().describe() | self.engine.settings  # k1 and b as floats

    def prepare(self, collection: Collection, folder: Path) -> None:
        """Index the collection, or open the index that is there."""
        path = folder / f"bm25-{self.engine.fingerprint_for(collection)}"
        if self.engine.path != path:
            self.engine.build(collection, path)
            self.engine = BM25.open(path)
            self._kept, self._kept_postings = {}, 0  # weights by another collection's statistics

    def encoder(self) -> BM25:
        if self.engine.path is None:
            raise RankdistillError(
                "this BM25 teacher knows no collection yet", fix="teacher.prepare(collection, folder) before it scores"
            )
        return self.engine


class SparseEncoderTeacher(TermWeightTeacher, EncoderTeacher):
    """Any SparseEncoder of sentence-transformers (SPLADE, inference-free): a product of term weights. `model` may be
    the `student/model` of a sparse run too."""

    type = "sparse_encoder"

    def load(self) -> SparseModel:
        """The model, loaded once."""
        if self._model is None:
            from rankdistill.students.sparse import SpladeStudent, is_sparse

            folder = resolve_model(self.model).path
            if not is_sparse(folder):
                raise UsageError(f"{self.model!r} is no SparseEncoder", where="teacher.model", fix="type: bi_encoder")
            self._model = SpladeStudent(precision=self.precision).open(folder, self.place)
            if self.max_length is not None:
                _cut(self._model, self.max_length)
        model: SparseModel = self._model
        return model

    def encoder(self) -> SparseModel:
        return self.load()


def _cut(model: SparseModel, most: int) -> None:
    """Cut the texts of each encoder in a model to so many tokens; an inference-free query side has none."""
    from sentence_transformers.base.modules import Transformer

    for module in model.modules():
        if isinstance(module, Transformer):
            for side in ("query_length", "document_length"):
                lengths = (most, getattr(module, side), module.max_seq_length)
                setattr(module, side, min(length for length in lengths if length))
