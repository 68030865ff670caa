"""What a training step of the quantiser sees: some queries, and the documents they are asked to rank.

A batch is a function of (seed, step) alone, so a resumed training sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.assembly import Metric
from rankdistill.indexes.base import Rows, Vectors, allocate_array
from rankdistill.indexes.specification import QuantizerSpecification
from rankdistill.progress import progress
from rankdistill.quantization.quantizer import similarity
from rankdistill.sampling.base import generator

DOCUMENTS_AT_ONCE = 65_536
QUERIES_AT_ONCE = 2_048
SPREAD_QUERIES = 1_000


@dataclass
class TeacherScores:
    """A teacher's scored lists for some of the given queries, by row: everything ragged, `offsets` [lists + 1]."""

    queries: Rows  # [lists], rows of the given queries
    offsets: Rows
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]
    relevance: NDArray[np.int32]


@dataclass
class Queries:
    """Query vectors by where they come from; `positives` names each given query's labelled documents, where known."""

    given: Vectors | None = None
    pseudo: Vectors | None = None
    positives: Sequence[Rows] | None = None
    teacher: TeacherScores | None = None
    given_texts: list[str] | None = None  # for a query encoder that is trained along
    pseudo_texts: list[str] | None = None


class Batch(NamedTuple):
    queries: Tensor  # [B, dimension] vectors
    numbers: Rows  # [B], rows of the pool of queries
    rows: Rows  # [U] documents that take part
    places: Tensor | None  # [B, D] places in `rows`; none: each query sees all of them
    labels: Tensor  # [B, D or U]
    teacher: Tensor | None  # [B, D] recorded scores; none: those of the vectors
    mask: Tensor  # [B, D or U]


class Sampler:
    """Draws batches.

    Args:
        documents: [n, dimension], may be memory-mapped.
        work: folder for the teacher's best documents of each query.

    Raises:
        UsageError: nothing to learn from: no queries of the kinds asked for, or no labels where labels are asked for.
    """

    def __init__(self, documents: Vectors, queries: Queries, specification: QuantizerSpecification, work: Path) -> None:
        self.documents, self.specification, self.seed = documents, specification, specification.seed
        self.metric: Metric = specification.metric
        self.queries = queries
        vectors, self.bounds = self._pool(queries)
        random = generator(self.seed, 11)
        held = min(specification.held_out, len(vectors) // 5)
        self.held_out = np.sort(random.choice(len(vectors), held, replace=False)).astype(np.int64)
        self.vectors = torch.from_numpy(vectors)
        trained = np.setdiff1d(np.arange(len(vectors)), self.held_out)
        self.lists: dict[int, int] = {}
        wanted = specification.documents
        if specification.relevance == "scores":
            if queries.teacher is None or not len(queries.teacher.queries):
                raise UsageError("relevance: scores needs a teacher's scored lists", fix="relevance: vectors")
            self.lists = {int(query): number for number, query in enumerate(queries.teacher.queries)}
            trained = np.array([number for number in trained if int(number) in self.lists], np.int64)
        if wanted.labelled:
            if queries.positives is None:
                raise UsageError("documents.labelled needs judgments, and there are none", fix="labelled: false")
            known = {number for number, rows in enumerate(queries.positives) if len(rows)}
            trained = np.array([number for number in trained if int(number) in known], np.int64)
        # Kinds of queries that are left after that, each with its share.
        self.kinds = [
            (trained[(trained >= start) & (trained < end)], share) for start, end, share in self.bounds if share
        ]
        self.kinds = [(rows, share) for rows, share in self.kinds if len(rows)]
        if not self.kinds:
            raise UsageError(
                "there is no query to learn from", where="queries", fix="give query vectors, or queries.documents: 1"
            )
        self.top: NDArray[np.int32] | None = None
        if wanted.top and specification.relevance == "vectors":
            self.top = best_documents(vectors, documents, min(wanted.top, len(documents)), self.metric, work)

    def _pool(self, queries: Queries) -> tuple[Vectors, list[tuple[int, int, float]]]:
        """All queries in one array, given ones first; and (first, last + 1, share) of each kind."""
        shares = self.specification.queries
        parts: list[Vectors] = []
        bounds: list[tuple[int, int, float]] = []
        start = 0
        # Only the given ones have a recorded teacher; a query encoder reads texts, which document vectors lack.
        recorded = self.specification.relevance == "scores"
        from_documents = not recorded and self.specification.query != "encoder"
        kinds = (
            (queries.given, shares.given, queries.given_texts),
            (queries.pseudo, 0.0 if recorded else shares.pseudo, queries.pseudo_texts),
            (self.documents, shares.documents if from_documents else 0.0, None),
        )
        self.texts: list[str] = []
        for number, (vectors, share, texts) in enumerate(kinds):
            if vectors is None or not share or not len(vectors):
                continue
            # Given ones stay whole and in order: positives and scored lists name them by row.
            if number and len(vectors) > shares.most:
                chosen = generator(self.seed, 12, number).choice(len(vectors), shares.most, replace=False)
                vectors = vectors[np.sort(chosen)]
                texts = [texts[row] for row in np.sort(chosen)] if texts is not None else None
            part = np.array(vectors, np.float32)
            part = part[np.linalg.norm(part, axis=1) > 0] if number == 2 else part
            parts.append(part)
            self.texts += texts or []
            bounds.append((start, start + len(part), share))
            start += len(part)
        if not start:
            raise UsageError(
                "there is no query to learn from", where="queries", fix="give query vectors, or queries.documents: 1"
            )
        return np.concatenate(parts), bounds

    def spread(self) -> float:
        """Mean over queries of the standard deviation of the teacher's scores among its best documents."""
        numbers = generator(self.seed, 13).permutation(len(self.vectors))[:SPREAD_QUERIES]
        if self.specification.relevance == "scores":
            teacher = self.queries.teacher
            assert teacher is not None
            deviations = [
                float(teacher.scores[teacher.offsets[i] : teacher.offsets[i + 1]].std())
                for i in range(min(len(teacher.queries), SPREAD_QUERIES))
            ]
        elif self.top is not None:
            deviations = [
                float(self.similarities(self.vectors[[number]], np.asarray(self.top[number], np.int64)).std())
                for number in numbers
            ]
        else:
            rows = generator(self.seed, 14).permutation(len(self.documents))[:1024]
            deviations = self.similarities(self.vectors[numbers], np.sort(rows)).std(dim=1).tolist()
        return max(float(np.mean(deviations)), 1e-6)

    def similarities(self, queries: Tensor, rows: Rows) -> Tensor:
        """[queries, rows] teacher's similarities, those of the vectors themselves."""
        return similarity(queries, self.document_vectors(rows), self.metric)

    def document_vectors(self, rows: Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.documents[rows], dtype=np.float32))

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        spec, wanted = self.specification, self.specification.documents
        random = generator(self.seed, 15, step)
        shares = np.array([share for _, share in self.kinds])
        counts = random.multinomial(spec.batch, shares / shares.sum())
        numbers = np.concatenate(
            [random.choice(rows, min(n, len(rows)), replace=False) for (rows, _), n in zip(self.kinds, counts)]
        )
        return self._recorded(numbers) if spec.relevance == "scores" else self._from_vectors(numbers, wanted, random)

    def _recorded(self, numbers: Rows) -> Batch:
        """The teacher's own lists, nothing added: other documents have no score."""
        teacher = self.queries.teacher
        assert teacher is not None
        lists = [self.lists[int(number)] for number in numbers]
        slices = [slice(int(teacher.offsets[i]), int(teacher.offsets[i + 1])) for i in lists]
        longest = max(part.stop - part.start for part in slices)
        rows, places = np.unique(np.concatenate([teacher.rows[part] for part in slices]), return_inverse=True)
        shape = (len(lists), longest)
        index, labels = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        scores, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
        start = 0
        for number, part in enumerate(slices):
            size = part.stop - part.start
            # A labelled positive first, as the losses that need one expect.
            order = np.argsort(-(teacher.relevance[part] > 0).astype(int), kind="stable")
            index[number, :size] = places[start : start + size][order]
            labels[number, :size] = teacher.relevance[part][order]
            scores[number, :size] = teacher.scores[part][order]
            mask[number, :size] = True
            start += size
        tensors = [torch.from_numpy(array) for array in (index, labels, scores, mask)]
        return Batch(self.vectors[numbers], numbers, rows.astype(np.int64), *tensors)

    def _from_vectors(self, numbers: Rows, wanted: Any, random: np.random.Generator) -> Batch:
        own = np.asarray(self.top[numbers], np.int64) if self.top is not None else np.empty((len(numbers), 0), np.int64)
        positives = np.empty(0, np.int64)
        if wanted.labelled:
            assert self.queries.positives is not None
            positives = np.array([random.choice(self.queries.positives[int(number)]) for number in numbers], np.int64)
        drawn = random.choice(len(self.documents), min(wanted.random, len(self.documents)), replace=False)
        needed = np.unique(positives)
        rows = np.unique(np.concatenate([own.ravel(), positives, drawn]))
        if len(rows) > wanted.limit:
            others = np.setdiff1d(rows, needed)
            kept = random.choice(others, max(0, wanted.limit - len(needed)), replace=False)
            rows = np.unique(np.concatenate([needed, kept]))
        if len(rows) < 2:
            raise RankdistillError("a list of fewer than two documents", where="documents", fix="documents.top: 200")
        index = self._index(rows, own, positives, wanted, random)
        shape = (len(numbers), len(rows) if index is None else index.shape[1])
        labels = np.full(shape, -1, np.int64)
        mask = np.ones(shape, bool)
        if wanted.labelled:
            assert index is not None and self.queries.positives is not None
            for place, number in enumerate(numbers):
                labels[place][np.isin(rows[index[place]], self.queries.positives[int(number)])] = 1
        if index is not None and not wanted.in_batch:
            mask = index >= 0
            index = np.maximum(index, 0)
        tensor = None if index is None else torch.from_numpy(index)
        return Batch(
            self.vectors[numbers], numbers, rows, tensor, torch.from_numpy(labels), None, torch.from_numpy(mask)
        )

    @staticmethod
    def _index(rows: Rows, own: Rows, positives: Rows, wanted: Any, random: np.random.Generator) -> Rows | None:
        """Places in `rows` for each query, [B, D], -1 where a list is shorter; None: all of them."""
        everything = wanted.in_batch and wanted.list_size is None and not len(positives)
        if everything:
            return None
        lists = []
        for number in range(len(own)):
            if wanted.in_batch:
                places = random.permutation(len(rows)) if wanted.list_size else np.arange(len(rows))
            else:
                places = np.searchsorted(rows, own[number])
                found = rows[np.minimum(places, len(rows) - 1)] == own[number]
                places = random.permutation(places[found])
            if len(positives):
                first = np.searchsorted(rows, positives[number])
                places = np.concatenate([[first], places[places != first]])
            lists.append(places[: wanted.list_size])
        longest = max(len(places) for places in lists)
        index = np.full((len(lists), longest), -1, np.int64)
        for number, places in enumerate(lists):
            index[number, : len(places)] = places
        return index


def best_documents(queries: Vectors, documents: Vectors, count: int, metric: Metric, work: Path) -> NDArray[np.int32]:
    """The `count` best documents of each query by exact search: int32 [queries, count], a memory-mapped file in `work`.

    Memory: a block of documents and a block of queries.
    """
    import faiss

    path, kind = work / "best.npy", faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2
    best = allocate_array(path, (len(queries), count), np.int32)
    with progress("teacher's best documents", len(queries), "queries") as bar:
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            block = np.ascontiguousarray(queries[first : first + QUERIES_AT_ONCE])
            heap = faiss.ResultHeap(len(block), count, keep_max=metric == "inner_product")
            for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
                part = np.ascontiguousarray(documents[start : start + DOCUMENTS_AT_ONCE], dtype=np.float32)
                scores, rows = faiss.knn(block, part, min(count, len(part)), metric=kind)
                heap.add_result(D=scores, I=rows + start)
            heap.finalize()
            best[first : first + len(block)] = heap.I
            bar.advance(len(block))
    best.flush()
    return best
