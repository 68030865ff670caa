"""A frozen model that scores every query with every document of a batch: the teacher of in-batch losses.

Any student model can be it (a multi-vector model, a dense bi-encoder). It runs live in each step, or its embeddings of
all texts of the training lists are made once and read from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.collections.storage import Column
from rankdistill.indexes.by_student import prepare_student
from rankdistill.indexes.vectors import VectorFolders
from rankdistill.progress import progress
from rankdistill.students.base import Side, StudentModel, split_by_length, to_device
from rankdistill.students.multi_vector import MultiVectorModel
from rankdistill.students.token_batches import autocast
from rankdistill.students.token_vectors import TokenVectors

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists

CHUNK = 2048  # texts embedded and written together


class BatchTeacher:
    """Scores a whole batch.

    Args:
        model: the frozen model.
        vectors: `live`: texts are embedded in each step; `precomputed`: once, by `prepare`. Token vectors
            (multi-vector models) are kept in float16, others in float32.
        documents: embed documents too; losses on query vectors read none.
    """

    def __init__(
        self,
        model: StudentModel,
        collection: Collection,
        vectors: Literal["live", "precomputed"] = "precomputed",
        documents: bool = True,
    ) -> None:
        self.documents = documents
        self.model, self.collection, self.vectors = model.eval().requires_grad_(False), collection, vectors
        self._queries: _Embeddings | None = None
        self._documents: _Embeddings | None = None
        self._query_rows: dict[str, int] = {}
        self._document_rows = np.zeros(0, dtype=np.int64)

    def prepare(self, lists: ScoredLists, folder: Path, encoded: VectorFolders | None = None) -> None:
        """Embed the lists' queries, and documents where they are read, unless that is done (the model's vectors of the
        collection may lie in `encoded`) or the teacher runs live."""
        prepare_student(self.model, self.collection, folder, encoded)
        if self.vectors == "live":
            return
        path = folder / "batch-teacher"
        there = encoded.find(self.model, self.collection) if encoded and self.documents else None
        write_documents = self.documents and there is None
        settings = {"model": self.model.fingerprint, "precision": self.model.precision, "documents": write_documents}
        inputs = {"lists": lists.fingerprint}
        query_ids = lists.query_ids
        if self.documents:
            used = np.unique(lists.doc_rows) if there is None else np.arange(self.collection.document_count)
            self._document_rows = used.astype(np.int64)

        def make(writer: ArtifactWriter) -> None:
            self._write(writer.path / "queries", "query", self.collection.query_texts(query_ids))
            if write_documents:
                self._write(writer.path / "documents", "document", self._document_rows)
            writer.counts = {"queries": len(query_ids), "documents": len(self._document_rows)}

        print_ = fingerprint(["batch-teacher", settings, inputs])
        obtain(path, kind="batch-teacher", fingerprint=print_, settings=settings, inputs=inputs, make=make)
        self._query_rows = {query_id: row for row, query_id in enumerate(query_ids)}
        self._queries = _Embeddings(path / "queries")
        self._documents = _Embeddings((there or path) / "documents") if self.documents else None

    def features(self, query_ids: Sequence[str], queries: Sequence[str], rows: NDArray[np.int64]) -> dict[str, Any]:
        """What `embed` needs of a batch: called where batches are made, which may be another process."""
        if self._queries is not None:
            read = {"queries": self._queries.read(np.array([self._query_rows[query_id] for query_id in query_ids]))}
            if self._documents is not None:
                read["documents"] = self._documents.read(np.searchsorted(self._document_rows, rows))
            return read
        features: dict[str, Any] = {"queries": self.model.preprocess(queries, "query"), "live": True}
        if self.documents:
            texts = self.model.preprocess_documents(self.collection, rows)
            features["documents"] = split_by_length(texts, self.model.budget.tokens)
        return features

    def embed(self, features: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Embeddings of a batch's queries and of its documents (where they are read), in the order of `rows`; no
        gradient."""
        if "live" not in features:
            documents = features["documents"].float() if self.documents else None
            return features["queries"].float(), documents
        device = self.model.device
        # The precision the student's own encoder has in inference, not that of the training around it.
        with torch.no_grad(), autocast(device, self.model.precision):
            queries = self.model.embed(to_device(features["queries"], device), "query")
            if not self.documents:
                return queries.float(), None
            places, embedded = zip(*self.model.embed_parts(features["documents"], "document"), strict=True)
            order = torch.from_numpy(np.argsort(np.concatenate(places))).to(device)
            return queries.float(), self.model.join(embedded)[order].float()

    def score_all(self, queries: Tensor | None, documents: Tensor | None) -> Tensor:
        """[queries, documents] scores."""
        assert queries is not None and documents is not None
        return self.model.score_all(queries, documents)

    def _write(self, stem: Path, side: Side, texts: Sequence[str] | NDArray[np.int64]) -> None:
        """`STEM.npy` [rows, dimension] and, for token vectors, `STEM.offsets.npy`."""
        ragged, offsets = isinstance(self.model, MultiVectorModel), [0]
        column = Column(Path(f"{stem}.npy"), np.float16 if ragged else np.float32, self.model.dimension)
        with column, progress(f"batch teacher: {side}s", len(texts), "texts") as bar:
            for at in range(0, len(texts), CHUNK):
                for array in self._chunk(texts[at : at + CHUNK], side):
                    column.append(np.atleast_2d(array))
                    offsets.append(column.length)
                bar.advance(len(offsets) - 1 - at)
        if ragged:
            np.save(f"{stem}.offsets.npy", offsets)

    def _chunk(self, texts: Any, side: Side) -> list[NDArray[np.float32]]:
        """One array a text: [dimension], or [tokens, dimension] without the rows that pad."""
        features = (
            self.model.preprocess(texts, "query")
            if side == "query"
            else self.model.preprocess_documents(self.collection, texts)
        )
        arrays: list[Any] = [None] * len(texts)
        with torch.no_grad(), autocast(self.model.device, self.model.precision):
            parts = split_by_length(features, self.model.budget.tokens)
            for rows, embedded in self.model.embed_parts(parts, side):
                for row, array in zip(rows.tolist(), embedded.float().cpu().numpy(), strict=True):
                    arrays[row] = array if array.ndim == 1 else array[np.abs(array).sum(axis=1) > 0]
        return arrays


class _Embeddings:
    """Embeddings of texts on disk, memory-mapped."""

    def __init__(self, stem: Path) -> None:
        self.values = np.load(f"{stem}.npy", mmap_mode="r", allow_pickle=False)
        offsets = Path(f"{stem}.offsets.npy")
        self.offsets = np.load(offsets, allow_pickle=False) if offsets.is_file() else None

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """[texts, dimension], or [texts, tokens, dimension] padded with zero rows."""
        if self.offsets is None:
            return torch.from_numpy(np.array(self.values[rows]))
        return torch.from_numpy(TokenVectors(self.values, self.offsets).take(rows).padded())
