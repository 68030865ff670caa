"""Teachers whose vectors are term weights: BM25 and any SparseEncoder. Beside a dense one: an ensemble of kinds."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.bm25 import BM25
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision
from rankdistill.teachers.base import PairTeacher
from rankdistill.teachers.bi_encoder import EncoderTeacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.students.sparse import SparseModel

KEPT_POSTINGS = 20_000_000  # term weights of documents held in memory at most: 160 MB
POSTINGS_AT_ONCE = 4_000_000  # multiplied at a time


class TermEncoder(Protocol):
    def encode_queries(self, texts: Sequence[str]) -> Any:
        """csr_matrix [texts, terms]"""

    def encode_documents(self, texts: Sequence[str]) -> Any:
        """csr_matrix [texts, terms]"""


class TermWeightTeacher(PairTeacher):
    """The score of a pair is the product of its two vectors of term weights: 0 where no term is common."""

    score_kind = "similarity"
    scale: float

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        self._kept_postings = 0

    @abstractmethod
    def encoder(self) -> TermEncoder:
        """What makes the vectors."""

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

    def _documents(self, encoder: TermEncoder, texts: Sequence[str], terms: int) -> Any:
        """csr_matrix [texts, terms]: documents come again with other queries, so they are kept by their texts' hash."""
        from scipy import sparse

        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        made = encoder.encode_documents([texts[place] for place in new])
        found = {key: self._kept[key] for key in keys if key in self._kept}
        for number, place in enumerate(new):
            row = slice(made.indptr[number], made.indptr[number + 1])
            found[keys[place]] = made.indices[row], made.data[row]
        if self._kept_postings + made.nnz > KEPT_POSTINGS:
            self._kept, self._kept_postings = {}, 0
        if made.nnz <= KEPT_POSTINGS:
            self._kept.update((keys[place], found[keys[place]]) for place in new)
            self._kept_postings += made.nnz
        rows = [found[key] for key in keys]
        columns, weights = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
        offsets = np.cumsum([0, *(len(columns) for columns, _ in rows)])
        return sparse.csr_matrix((weights, columns, offsets), shape=(len(texts), terms))


class BM25Teacher(TermWeightTeacher):
    """BM25 by the statistics of the collection that is scored, over its texts: a lexical teacher without a model.

    Args:
        k1: how soon further occurrences of a term stop counting.
        b: how much long documents are marked down, 0 to 1.
        language: stop words and stemmer (Snowball's names), or "none".
        scale: the score is multiplied by this.
    """

    type = "bm25"

    def __init__(self, k1: float = 0.9, b: float = 0.4, language: str = "english", scale: float = 1.0) -> None:
        super().__init__()
        self.engine, self.scale = BM25(k1=k1, b=b, language=language), scale

    def fingerprint(self) -> str:
        return fingerprint(self.describe())  # the store is keyed by the collection, whose statistics decide too

    def describe(self) -> dict[str, Any]:
        return {"type": self.type, **self.engine.settings, "scale": self.scale}

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
    """Any SparseEncoder of sentence-transformers (SPLADE, inference-free): a product of term weights.

    Args:
        model: a folder (`RUN/student/model` of a sparse student too) or a hub name.
        scale: the score is multiplied by this.
        max_length: tokens a text at most; the model's own limits by default.
        precision: auto, fp32, bf16 or fp16.
        device: cpu, cuda ...; a GPU if there is one by default.
    """

    type = "sparse_encoder"

    def __init__(
        self,
        model: str,
        scale: float = 1.0,
        max_length: int | None = None,
        precision: Precision = "auto",
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.model_name, self.scale, self.max_length = model, scale, max_length
        self.precision: Precision = precision
        self._device_name = device
        self._model: SparseModel | None = None

    def load(self) -> SparseModel:
        """The model, loaded once.

        Raises:
            UsageError: it is no SparseEncoder.
        """
        if self._model is None:
            from rankdistill.students.sparse import SpladeStudent, is_sparse

            folder = resolve_model(self.model_name).path
            if not is_sparse(folder):
                raise UsageError(
                    f"{self.model_name!r} is no SparseEncoder", where="teacher.model", fix="type: bi_encoder"
                )
            self._model = SpladeStudent(precision=self.precision).open(folder, self.device)
            if self.max_length is not None:
                _cut(self._model, self.max_length)
        return self._model

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
