"""What a training step of the quantiser sees: some queries, and the documents they are asked to rank.

A batch is a function of (seed, step) alone, so a resumed training sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Rows, Vectors, allocate_array
from rankdistill.indexes.faiss_assembly import Metric
from rankdistill.indexes.faiss_index import faiss_metric
from rankdistill.indexes.specification import QuantizerSpecification, SampledDocuments
from rankdistill.indexes.vectors import check_vectors
from rankdistill.progress import progress
from rankdistill.quantization.quantizer import similarity
from rankdistill.sampling.base import generator

DOCUMENTS_AT_ONCE = 65_536
QUERIES_AT_ONCE = 2_048
SPREAD_QUERIES = 1_000
BEST = "best.npy"
LEAST = 1e-6  # spread, where all scores are the same


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

    def digest(self) -> str:
        """Of all that training reads of them."""
        arrays: list[NDArray[Any] | None] = [self.given, self.pseudo]
        if self.teacher is not None:
            teacher = self.teacher
            arrays += [teacher.queries, teacher.offsets, teacher.rows, teacher.scores, teacher.relevance]
        positives = None if self.positives is None else [np.asarray(rows).tolist() for rows in self.positives]
        digests = [None if array is None else content_digest(array) for array in arrays]
        return fingerprint([digests, positives, self.given_texts, self.pseudo_texts])


def content_digest(array: NDArray[Any]) -> str:
    """Of an array's shape and bytes, read block by block."""
    digest = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=16)
    for start in range(0, len(array), DOCUMENTS_AT_ONCE):
        digest.update(np.ascontiguousarray(array[start : start + DOCUMENTS_AT_ONCE]).data)
    return digest.hexdigest()


class Batch(NamedTuple):
    queries: Tensor  # [B, dimension] vectors
    numbers: Rows  # [B], rows of the pool of queries
    rows: Rows  # [U] documents that take part
    places: Tensor | None  # [B, D] places in `rows`; none: each query sees all of them
    labels: Tensor  # [B, D or U]
    teacher: Tensor | None  # [B, D] recorded scores; none: those of the vectors
    mask: Tensor  # [B, D or U]

    def to(self, device: torch.device) -> Batch:
        tensors = {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}
        return self._replace(**{name: part.to(device) for name, part in tensors.items()})  # type: ignore[arg-type]


class Sampler:
    """Draws batches of queries and of documents [n, dimension]; `work` is for the teacher's best of each query.

    A UsageError where there is nothing to learn from: no queries of the kinds asked for, no labels where they are.
    """

    def __init__(self, documents: Vectors, queries: Queries, specification: QuantizerSpecification, work: Path) -> None:
        self.documents, self.queries, self.specification = documents, queries, specification
        self.seed, self.metric = specification.seed, specification.metric
        vectors, kinds = self._pool()
        held = min(specification.held_out, len(vectors) // 5)
        self.held_out = np.sort(generator(self.seed, 11).choice(len(vectors), held, replace=False)).astype(np.int64)
        self.vectors = torch.from_numpy(vectors)
        trained = np.setdiff1d(np.arange(len(vectors)), self.held_out)
        trained = trained[np.isin(trained, self._learnable(len(vectors)))]
        # Kinds of queries that are left after that, each with its share.
        self.kinds = [(trained[(trained >= start) & (trained < end)], share) for start, end, share in kinds]
        self.kinds = [(rows, share) for rows, share in self.kinds if len(rows)]
        if not self.kinds:
            raise _no_query()
        self.top: NDArray[np.int32] | None = None
        if specification.documents.top and specification.relevance == "vectors":
            count, read = len(documents), documents.__getitem__
            top = min(specification.documents.top, count)
            self.top = best_documents(vectors, count, read, top, self.metric, work / BEST)

    def _learnable(self, pool: int) -> Rows:
        """Numbers of the queries of the pool that a teacher's list or a label is there for, where that is asked for."""
        queries, learnable = self.queries, np.arange(pool)
        self.lists: dict[int, int] = {}
        if self.specification.relevance == "scores":
            if queries.teacher is None or not len(queries.teacher.queries):
                raise UsageError("relevance: scores needs a teacher's scored lists", fix="relevance: vectors")
            self.lists = {int(query): number for number, query in enumerate(queries.teacher.queries)}
            learnable = np.array(list(self.lists))
        if self.specification.documents.labelled:
            if queries.positives is None:
                raise UsageError("documents.labelled needs judgments, and there are none", fix="labelled: false")
            given = 0 if queries.given is None else len(queries.given)
            if len(queries.positives) != given:
                what = f"labels of {len(queries.positives)} queries, vectors of {given}"
                raise UsageError(what, where="queries", fix="one entry, maybe empty, for each given query")
            # Rows of the given queries, which are the pool's first ones where they take part at all.
            labelled = [number for number, rows in enumerate(queries.positives) if len(rows)]
            learnable = np.intersect1d(learnable, labelled if self.specification.queries.given > 0 else [])
        return learnable

    def _pool(self) -> tuple[Vectors, list[tuple[int, int, float]]]:
        """All queries in one array, given ones first; and (first, last + 1, share) of each kind."""
        queries, spec, shares = self.queries, self.specification, self.specification.queries
        # Only the given ones have a recorded teacher; a query encoder reads texts, which document vectors lack.
        recorded, reads = spec.relevance == "scores", spec.query == "encoder"
        sources = (
            ("given query", queries.given, shares.given, queries.given_texts),
            ("pseudo-query", queries.pseudo, 0 if recorded else shares.pseudo, queries.pseudo_texts),
            ("document", self.documents, 0 if recorded or reads else shares.documents, None),
        )
        parts: list[Vectors] = []
        kinds: list[tuple[int, int, float]] = []
        self.texts: list[str] = []
        start = 0
        for number, (name, vectors, share, texts) in enumerate(sources):
            if vectors is None or not share or not len(vectors):
                continue
            # Given ones stay whole and in order: positives and scored lists name them by row.
            if number and len(vectors) > shares.most:
                rows = np.sort(generator(self.seed, 12, number).choice(len(vectors), shares.most, replace=False))
                vectors, texts = vectors[rows], texts and [texts[row] for row in rows]
            part = np.array(vectors, np.float32)
            check_vectors(part, self.documents.shape[1], partial("{}: row {}".format, name))
            if reads and (texts is None or len(texts) != len(part)):
                what = f"query: encoder reads texts, and a {name} has none"
                raise UsageError(what, where="queries", fix="query: linear")
            parts.append(part[np.linalg.norm(part, axis=1) > 0] if name == "document" else part)
            self.texts += texts or []
            kinds.append((start, start + len(parts[-1]), share))
            start += len(parts[-1])
        if not start:
            raise _no_query()
        return np.concatenate(parts), kinds

    def spread(self) -> float:
        """Mean over queries of the standard deviation of the similarities of the documents that the teacher ranks."""
        numbers = generator(self.seed, 13).permutation(len(self.vectors))[:SPREAD_QUERIES]
        if self.specification.relevance == "scores":
            teacher, slices = self._recorded_lists()
            lists = [(int(query), teacher.rows[part]) for query, part in zip(teacher.queries, slices)]
        elif self.top is not None:
            lists = [(int(number), self.top[number]) for number in numbers]
        else:
            rows = np.sort(generator(self.seed, 14).permutation(len(self.documents))[:1024])
            return max(float(self.similarities(self.vectors[numbers], rows).std(dim=1, correction=0).mean()), LEAST)
        deviations = [
            float(self.similarities(self.vectors[[number]], np.asarray(rows, np.int64)).std(correction=0))
            for number, rows in lists
        ]
        return max(float(np.mean(deviations)), LEAST)

    def teacher_spread(self) -> float:
        """The same of the teacher's own scores: recorded ones have a scale of their own."""
        if self.specification.relevance == "vectors":
            return self.spread()
        teacher, slices = self._recorded_lists()
        return max(float(np.mean([teacher.scores[part].std() for part in slices])), LEAST)

    def _recorded_lists(self) -> tuple[TeacherScores, list[slice]]:
        """The teacher's scores, and where its first lists lie."""
        teacher = self.queries.teacher
        assert teacher is not None
        return teacher, [slice(*ends) for ends in pairwise(teacher.offsets[: SPREAD_QUERIES + 1].tolist())]

    def similarities(self, queries: Tensor, rows: Rows) -> Tensor:
        """[queries, rows] teacher's similarities, those of the vectors themselves."""
        return similarity(queries, self.document_vectors(rows).to(queries.device), self.metric)

    def document_vectors(self, rows: Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.documents[rows], dtype=np.float32))

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        spec, random = self.specification, generator(self.seed, 15, step)
        shares = np.array([share for _, share in self.kinds])
        counts = random.multinomial(spec.batch, shares / shares.sum())
        numbers = np.concatenate(
            [random.choice(rows, min(n, len(rows)), replace=False) for (rows, _), n in zip(self.kinds, counts)]
        )
        return self._recorded(numbers) if spec.relevance == "scores" else self._from_vectors(numbers, random)

    def _recorded(self, numbers: Rows) -> Batch:
        """The teacher's own lists, nothing added: other documents have no score."""
        teacher = self.queries.teacher
        assert teacher is not None
        lists = [self.lists[int(number)] for number in numbers]
        slices = [slice(int(teacher.offsets[i]), int(teacher.offsets[i + 1])) for i in lists]
        rows, places = np.unique(np.concatenate([teacher.rows[part] for part in slices]), return_inverse=True)
        shape = (len(lists), max(part.stop - part.start for part in slices))
        index, labels = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        scores, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
        start = 0
        for number, part in enumerate(slices):
            here = slice(part.stop - part.start)
            # A labelled positive first, as the losses that need one expect.
            order = np.argsort(-(teacher.relevance[part] > 0).astype(int), kind="stable")
            index[number, here] = places[start : start + here.stop][order]
            labels[number, here], scores[number, here] = teacher.relevance[part][order], teacher.scores[part][order]
            mask[number, here] = True
            start += here.stop
        tensors = [torch.from_numpy(array) for array in (index, labels, scores, mask)]
        return Batch(self.vectors[numbers], numbers, rows.astype(np.int64), *tensors)

    def _from_vectors(self, numbers: Rows, random: np.random.Generator) -> Batch:
        spec, judged = self.specification.documents, self.queries.positives or []
        best = np.empty((len(numbers), 0), np.int64) if self.top is None else np.asarray(self.top[numbers], np.int64)
        positives = np.empty(0, np.int64)
        if spec.labelled:
            positives = np.array([random.choice(judged[int(number)]) for number in numbers], np.int64)
        drawn = random.choice(len(self.documents), min(spec.random, len(self.documents)), replace=False)
        needed = np.unique(positives)
        rows = np.unique(np.concatenate([best.ravel(), positives, drawn]))
        if len(rows) > spec.limit:
            others = np.setdiff1d(rows, needed)
            kept = random.choice(others, max(0, spec.limit - len(needed)), replace=False)
            rows = np.unique(np.concatenate([needed, kept]))
        if len(rows) < 2:
            raise RankdistillError("a list of fewer than two documents", where="documents", fix="documents.top: 200")
        queries = self.vectors[numbers]
        if spec.in_batch and spec.list_size is None and not spec.labelled:  # each query sees all of them
            shape = (len(numbers), len(rows))
            return Batch(queries, numbers, rows, None, torch.full(shape, -1), None, torch.ones(shape, dtype=torch.bool))
        index = self._index(rows, best, positives, drawn, spec, random)
        mask, index = index >= 0, np.maximum(index, 0)
        labels = np.full(index.shape, -1, np.int64)
        for place, number in enumerate(numbers if spec.labelled else ()):
            labels[place][np.isin(rows[index[place]], judged[int(number)]) & mask[place]] = 1
        places, labelled, masked = (torch.from_numpy(array) for array in (index, labels, mask))
        return Batch(queries, numbers, rows, places, labelled, None, masked)

    @staticmethod
    def _index(
        rows: Rows, best: Rows, positives: Rows, drawn: Rows, spec: SampledDocuments, random: np.random.Generator
    ) -> Rows:
        """Places in `rows` for each query, [B, D], -1 where a list is shorter; its positive first."""
        lists = []
        for number in range(len(best)):
            if spec.in_batch:
                places = random.permutation(len(rows)) if spec.list_size else np.arange(len(rows))
            else:
                wide = np.union1d(best[number], drawn)
                places = random.permutation(np.searchsorted(rows, wide[np.isin(wide, rows)]))
            if len(positives):
                first = np.searchsorted(rows, positives[number])
                places = np.concatenate([[first], places[places != first]])
            lists.append(places[: spec.list_size])
        index = np.full((len(lists), max(map(len, lists))), -1, np.int64)
        for number, places in enumerate(lists):
            index[number, : len(places)] = places
        return index


def _no_query() -> UsageError:
    fix = "give query vectors, or queries.documents: 1"
    return UsageError("there is no query to learn from", where="queries", fix=fix)


def best_documents(
    queries: Vectors, documents: int, read: Callable[[slice], Any], count: int, metric: Metric, file: Path
) -> NDArray[np.int32]:
    """The `count` best documents of each query by exact search: int32 [queries, count], a memory-mapped file.

    Memory: a block of documents and a block of queries.

    Args:
        read: a slice of so many `documents` → vectors [n, dimension].
    """
    import faiss

    best = allocate_array(file, (len(queries), count), np.int32)
    with progress("teacher's best documents", len(queries), "queries") as bar:
        for first in range(0, len(queries), QUERIES_AT_ONCE):
            block = np.ascontiguousarray(queries[first : first + QUERIES_AT_ONCE])
            heap = faiss.ResultHeap(len(block), count, keep_max=metric == "inner_product")
            for start in range(0, documents, DOCUMENTS_AT_ONCE):
                part = np.ascontiguousarray(read(slice(start, start + DOCUMENTS_AT_ONCE)), dtype=np.float32)
                scores, rows = faiss.knn(block, part, min(count, len(part)), metric=faiss_metric(metric))
                heap.add_result(D=scores, I=rows + start)
            heap.finalize()
            best[first : first + len(block)] = heap.I
            bar.advance(len(block))
    best.flush()
    return best
