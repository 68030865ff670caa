"""Teachers that compare two vectors: a bi-encoder, any SparseEncoder, and BM25. Together: an ensemble of kinds."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.vectors import VectorFolders, open_vectors
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision, resolve_precision
from rankdistill.teachers.base import PairTeacher, TextList, check_finite

if TYPE_CHECKING:
    import torch

    from rankdistill.collections import Collection
    from rankdistill.students.dense import DenseModel
    from rankdistill.students.sparse import SparseModel

KEPT_NUMBERS = 40_000_000  # of documents' vectors that are held in memory at most: 160 MB
PAIRS_AT_ONCE = 1024  # multiplied
Row = tuple[np.ndarray, ...]  # (a dense vector,), or (its terms, their weights)


class VectorTeacher(PairTeacher):
    """The score of a pair is the product of its two vectors; of term weights 0 where no term is common."""

    score_kind = "similarity"
    scale: float
    _kept_numbers = 0

    @cached_property
    def _kept(self) -> dict[bytes, Row]:
        return {}

    @abstractmethod
    def encoder(self) -> DenseModel | SparseModel | BM25:
        """What makes the vectors of queries and of documents: float32 [texts, dimension], or csr_matrix."""

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        query_vectors: Any = self.encoder().encode_queries(queries)
        document_vectors = self._documents(documents, query_vectors)
        parts = np.split(pairs, range(PAIRS_AT_ONCE, len(pairs), PAIRS_AT_ONCE))
        products = [_products(query_vectors[part[:, 0]], document_vectors[part[:, 1]]) for part in parts]
        return np.concatenate(products).astype(np.float32) * np.float32(self.scale)

    def _documents(self, texts: Sequence[str], like: Any) -> Any:
        """Documents come again with other queries: their vectors are kept by their texts' hash."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        fresh = _rows(self.encoder().encode_documents([texts[place] for place in new]))
        vectors = {key: self._kept[key] for key in keys if key in self._kept}
        vectors.update(zip((keys[place] for place in new), fresh, strict=True))
        self._kept.update(vectors)
        self._kept_numbers += sum(part.size for row in fresh for part in row)
        if self._kept_numbers > KEPT_NUMBERS:
            self._forget()
        return _matrix([vectors[key] for key in keys], like)

    def _forget(self) -> None:
        self._kept.clear()
        self._kept_numbers = 0


def _products(queries: Any, documents: Any) -> np.ndarray:
    if sparse.issparse(queries):
        return np.asarray(queries.multiply(documents).sum(axis=1)).ravel()
    return np.einsum("nd,nd->n", queries, documents)


def _rows(vectors: Any) -> list[Row]:
    if sparse.issparse(vectors):
        return [(vectors.indices[start:end], vectors.data[start:end]) for start, end in pairwise(vectors.indptr)]
    return [(vector,) for vector in vectors]


def _matrix(rows: list[Row], like: Any) -> Any:
    """The rows as one matrix, of the kind and width of another."""
    if not sparse.issparse(like):
        return np.stack([row[0] for row in rows])
    columns, weights = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
    offsets = np.cumsum([0, *(len(row[0]) for row in rows)])
    return sparse.csr_matrix((weights, columns, offsets), shape=(len(rows), like.shape[1]))


@dataclass(eq=False)
class BM25Teacher(VectorTeacher):
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
            self._forget()  # weights by another collection's statistics

    def encoder(self) -> BM25:
        if self.engine.path is None:
            raise RankdistillError(
                "this BM25 teacher knows no collection yet", fix="teacher.prepare(collection, folder) before it scores"
            )
        return self.engine


@dataclass(eq=False)
class EncoderTeacher(VectorTeacher):
    """A model of sentence-transformers.

    Args:
        model: a folder, a packaged encoder or a hub name.
        scale: the similarity is multiplied by this (a cosine of spread 0.2 is a faint signal for a margin loss).
        max_length: tokens a text; the model's own limit by default.
        precision: auto, fp32, bf16 or fp16.
        device: cpu, cuda ...; a GPU if there is one by default.
    """

    model: str
    _: KW_ONLY
    scale: float = 1.0
    max_length: int | None = None
    precision: Precision = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        self._model: Any = None

    @property
    def place(self) -> torch.device:
        return resolve_device(self.device)

    @abstractmethod
    def _open(self) -> Any: ...

    def load(self) -> Any:
        """The model, loaded once."""
        if self._model is None:
            self._model = self._open()
        return self._model

    def encoder(self) -> Any:
        return self.load()

    def fingerprint(self) -> str:
        settings = self.describe()
        del settings["model"]
        return fingerprint({**settings, "revision": resolve_model(self.model).revision})

    def take_report(self) -> dict[str, Any]:
        """How many texts were cut to the model's or the recipe's length."""
        return self._model.take_cut() if self._model is not None else {}

    def describe(self) -> dict[str, Any]:
        settings = {**super().describe(), "precision": resolve_precision(self.place, self.precision)}
        del settings["device"]
        return settings


@dataclass(eq=False)
class BiEncoderTeacher(EncoderTeacher):
    """Any sentence-transformers model; the score of a pair is a product of its two vectors.

    Args:
        similarity: cos, dot (of vectors before any normalisation), or auto: what the model's own configuration says
            (cos when it says nothing).
    """

    type = "bi_encoder"
    similarity: Literal["auto", "dot", "cos"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoded: VectorFolders | None = None  # where the model's vectors of a collection may lie already
        self._made: dict[str, np.ndarray | None] = {}  # a collection's fingerprint → its vectors in `encoded`

    def score(self, lists: Sequence[TextList]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        collection = lists[0].collection if lists else None
        vectors = self._vectors(collection) if collection is not None else None
        if collection is None or vectors is None:
            yield from super().score(lists)
            return
        for item, query in zip(lists, self.load().encode_queries([item.query for item in lists]), strict=True):
            scores = vectors[collection.doc_rows(item.doc_ids)] @ query * np.float32(self.scale)
            check_finite(item.query_id, item.doc_ids, scores, self.type)
            yield item.query_id, item.doc_ids, scores

    def _vectors(self, collection: Collection) -> np.ndarray | None:
        """What mining, for one, has encoded."""
        if self.encoded is not None and collection.fingerprint not in self._made:
            folder = self.encoded.find(self.load(), collection)
            self._made[collection.fingerprint] = open_vectors(folder) if folder else None
        return self._made.get(collection.fingerprint)

    def _open(self) -> DenseModel:
        from rankdistill.students.dense import DenseStudent
        from rankdistill.students.sparse import is_sparse

        if is_sparse(resolve_model(self.model).path):
            raise UsageError(f"{self.model!r} is a SparseEncoder", where="teacher.model", fix="type: sparse_encoder")
        return DenseStudent(
            self.model,
            similarity="keep" if self.similarity == "auto" else self.similarity,
            query_length=self.max_length,
            document_length=self.max_length,
            precision=self.precision,
        ).create(self.place)


class SparseEncoderTeacher(EncoderTeacher):
    """Any SparseEncoder of sentence-transformers (SPLADE, inference-free): a product of term weights. `model` may be
    the `student/model` of a sparse run too."""

    type = "sparse_encoder"

    def _open(self) -> SparseModel:
        from sentence_transformers.base.modules import Transformer

        from rankdistill.students.sparse import SpladeStudent, is_sparse

        folder = resolve_model(self.model).path
        if not is_sparse(folder):
            raise UsageError(f"{self.model!r} is no SparseEncoder", where="teacher.model", fix="type: bi_encoder")
        model = SpladeStudent(precision=self.precision).open(folder, self.place)
        for module in model.modules() if self.max_length is not None else ():
            if isinstance(module, Transformer):  # an inference-free query side has none
                for side in ("query_length", "document_length"):
                    lengths = (self.max_length, getattr(module, side), module.max_seq_length)
                    setattr(module, side, min(length for length in lengths if length))
        return model
