"""A bi-encoder as teacher: cheap scores on every pair, and a member of ensembles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import UsageError
from rankdistill.indexes.vectors import VectorFolders, open_vectors
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision, resolve_precision
from rankdistill.teachers.base import PairTeacher, TextList, check_finite

if TYPE_CHECKING:
    import torch

    from rankdistill.collections import Collection
    from rankdistill.students.dense import DenseModel

KEPT_VECTORS = 200_000  # document vectors held in memory at most


@dataclass(eq=False)
class EncoderTeacher(PairTeacher):
    """What teachers that load an encoder have in common: where it runs, and what names it.

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
    score_kind = "similarity"
    similarity: Literal["auto", "dot", "cos"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept: dict[bytes, np.ndarray] = {}
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

    def load(self) -> DenseModel:
        """The model, loaded once."""
        if self._model is None:
            from rankdistill.students.dense import DenseStudent
            from rankdistill.students.sparse import is_sparse

            if is_sparse(resolve_model(self.model).path):
                raise UsageError(
                    f"{self.model!r} is a SparseEncoder", where="teacher.model", fix="type: sparse_encoder"
                )
            self._model = DenseStudent(
                self.model,
                similarity="keep" if self.similarity == "auto" else self.similarity,
                query_length=self.max_length,
                document_length=self.max_length,
                precision=self.precision,
            ).create(self.place)
        model: DenseModel = self._model
        return model

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] similarities of pairs [N, 2]; a text is encoded once while its vector is kept."""
        model = self.load()
        query_vectors, document_vectors = model.encode_queries(queries), self._documents(model, documents)
        scores = [
            np.einsum("nd,nd->n", query_vectors[part[:, 0]], document_vectors[part[:, 1]])
            for part in np.split(pairs, range(8192, len(pairs), 8192))
        ]
        return np.concatenate(scores) * np.float32(self.scale)

    def _documents(self, model: DenseModel, texts: Sequence[str]) -> np.ndarray:
        """Vectors of documents, which come again with other queries: kept by the text's hash."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = [place for place, key in enumerate(keys) if key not in self._kept]
        if len(self._kept) + len(new) > KEPT_VECTORS:
            self._kept, new = {}, list(range(len(texts)))
        vectors = model.encode_documents([texts[place] for place in new])
        self._kept.update((keys[place], vector) for place, vector in zip(new, vectors, strict=True))
        return np.stack([self._kept[key] for key in keys])
