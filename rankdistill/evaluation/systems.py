"""Systems: the rows of an evaluation's table. One ranks documents for queries, and says what it keeps to do so."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rankdistill.runs import Ranking, Run, read_run, trec_order

LISTS_AT_ONCE = 32  # queries handed to a teacher together

# What a step makes of the query texts and of what the step before it made.
Step = Callable[[Sequence[str], Any], Any]


class System(Protocol):
    """Anything that ranks documents for queries.

    Optional attributes: `bytes` (what is kept to search, on disk), `parameters`, `note` (shown below the table),
    `timed` (False: the ranking was made elsewhere, its speed is not measured), `part` (the queries it can rank, where
    they are not all: its row is of those, and not tested against others), and what `measure_costs` reads.
    """

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterable[Ranking]:
        """Rank at most `depth` documents for each query: (query id, document ids, scores), higher is better."""


def engine_steps(engine: Any, depth: int) -> dict[str, Step]:
    """How an engine answers: `encode`, then `search`; one step where it does not tell them apart (BM25)."""
    if hasattr(engine, "steps"):  # it knows a shorter way
        shorter: dict[str, Step] = engine.steps(depth)
        return shorter
    parts = encoder_and_index(engine)
    if parts is None:
        return {"search": lambda texts, _: engine.search(texts, depth)}
    encoder, index = parts
    return {
        "encode": lambda texts, _: encoder.encode_queries(texts),
        "search": lambda _, vectors: index.search(vectors, depth),
    }


def encoder_and_index(engine: Any) -> tuple[Any, Any] | None:
    """Of an engine that tells them apart."""
    encoder, index = getattr(engine, "encoder", None), getattr(engine, "index", None)
    return None if encoder is None or index is None else (encoder, index)


def encoders(engine: Any) -> list[Any]:
    """Those of an engine: none, one, or of a fused one several."""
    several: list[Any] | None = getattr(engine, "encoders", None)
    encoder = getattr(engine, "encoder", None)
    return several if several is not None else [] if encoder is None else [encoder]


def model_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, each tensor once; 0 for what is no torch module."""
    tensors = [*model.parameters(), *model.buffers()] if hasattr(model, "parameters") else []
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def model_parameters(model: Any) -> int | None:
    """Parameters of a torch module; 0 for an inference-free query side, which has a table alone; None for the rest."""
    if hasattr(model, "parameters"):
        return sum(parameter.numel() for parameter in model.parameters())
    return 0 if getattr(model, "inference_free", False) else None


class Footprint:
    """What a system keeps to search: `bytes` on disk, and in memory its models too."""

    bytes: int | None

    def models(self) -> list[Any]:
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int | None:
        return None if self.bytes is None else self.bytes + sum(map(model_bytes, self.models()))

    @property
    def parameters(self) -> int | None:
        counts = [count for model in self.models() if (count := model_parameters(model)) is not None]
        return sum(counts) if counts else None

    @property
    def device(self) -> Any:
        """The last model's that is not the processor."""
        devices = [model.device for model in self.models() if hasattr(model, "device")]
        return next((device for device in reversed(devices) if str(device) != "cpu"), "cpu")


@dataclass
class EngineSystem(Footprint):
    """An engine that searches the collection's rows: for each query, an object with `rows` and `scores`."""

    engine: Any
    bytes: int | None = None
    note: str = ""

    def models(self) -> list[Any]:
        return encoders(self.engine)

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterator[Ranking]:
        for query_id, hits in zip(query_ids, self.engine.search(texts, depth), strict=True):
            yield query_id, collection.doc_ids(hits.rows), hits.scores

    def steps(self, depth: int) -> dict[str, Step]:
        return engine_steps(self.engine, depth)


@dataclass
class StudentReranking(Footprint):
    """The first stage's top `depth` documents ordered by a student, those below in the first stage's order.

    No document is encoded: their vectors are there already, and only the query's is made.

    Args:
        first: the engine of the first stage.
        student: an engine over the vectors of the same collection, all of them: `DenseEngine.over`,
            `MultiVectorEngine.over` or `SparseEngine.over`.
        depth: documents re-ranked for each query, whatever depth is asked for.
    """

    first: Any
    student: Any
    depth: int = 100

    def __post_init__(self) -> None:
        self.note = f"the student re-ranks the first {self.depth} of {self.first.name}"
        first = getattr(self.first, "bytes", None)
        self.bytes = None if first is None else int(first) + int(self.student.index.bytes)

    def models(self) -> list[Any]:
        return encoders(self.student)

    def steps(self, depth: int) -> dict[str, Step]:
        return {**engine_steps(self.first, max(depth, self.depth)), "rerank": self._rerank}

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterator[Ranking]:
        found = self.first.search(texts, max(depth, self.depth))
        for query_id, (rows, scores) in zip(query_ids, self._rerank(texts, found), strict=True):
            yield query_id, collection.doc_ids(rows[:depth]), scores[:depth]

    def _rerank(self, texts: Sequence[str], found: Sequence[Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(rows, falling scores) of each query."""
        merged = []
        for vector, hits in zip(self.student.encoder.encode_queries(texts), found, strict=True):
            top, rest = hits.rows[: self.depth], hits.rows[self.depth :]
            scores = self.student.index.scores(vector, top)
            order = np.argsort(-scores, kind="stable")
            merged.append((np.concatenate([top[order], rest]), _followed(scores[order], len(rest))))
        return merged


class RerankList(NamedTuple):
    """What a teacher scores: the fields of `rankdistill.teachers.TextList`."""

    query_id: str
    query: str
    doc_ids: list[str]
    documents: list[str]
    collection: Any = None


@dataclass
class RerankSystem:
    """A teacher over a first stage: its top `depth` documents are scored again and put first.

    Documents below, and those the teacher has no score for, follow in the first stage's order, as they would be
    served: recall beyond `depth` is the first stage's.

    Args:
        scores: a teacher's `score`: lists in, (query id, document ids, scores) out, in any order, of any subset.
        base: the first stage's ranking, a run or the path of one.
        depth: documents scored for each query.
        timed, served: whether speed is measured while ranking; else how it is measured live, see `measure_costs`.
        part: the queries that there are scores for, where they are not all.
        first_stage_weight: the first stage's own score, times this, is added to each score.
    """

    scores: Callable[[Sequence[Any]], Iterable[tuple[str, Sequence[str], Any]]]
    base: Run | str | Path
    depth: int = 100
    bytes: int | None = None
    note: str = ""
    timed: bool = True
    served: Any = None
    part: set[str] | None = None
    first_stage_weight: float = 0.0
    lowest: dict[str, float] = field(default_factory=dict)  # of each query run so far: the teacher's least score

    def __post_init__(self) -> None:
        self._base = self.base if isinstance(self.base, Run) else read_run(self.base)
        self._row_of = {query_id: row for row, query_id in enumerate(self._base.query_ids)}

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterator[Ranking]:
        for start in range(0, len(query_ids), LISTS_AT_ONCE):
            part = slice(start, start + LISTS_AT_ONCE)
            lists = [self._list(collection, *query) for query in zip(query_ids[part], texts[part], strict=True)]
            scored = {query_id: (ids, scores) for query_id, ids, scores in self.scores([x for x in lists if x.doc_ids])}
            for item in lists:
                yield self._merge(item.query_id, *scored.get(item.query_id, ([], [])), depth)

    def _first(self, query_id: str, depth: int) -> dict[str, float]:
        """Document id → score of the first stage, best first."""
        row = self._row_of.get(query_id)
        if row is None:
            return {}
        start, end = self._base.offsets[row], self._base.offsets[row + 1]
        top = slice(start, min(end, start + depth))
        return dict(zip(self._base.doc_ids[top].to_pylist(), self._base.scores[top].tolist(), strict=True))

    def _list(self, collection: Any, query_id: str, query: str) -> RerankList:
        doc_ids = list(self._first(query_id, self.depth))
        rows = np.asarray(collection.doc_rows(doc_ids))
        known = list(itertools.compress(doc_ids, rows >= 0))
        return RerankList(query_id, query, known, collection.document_texts(rows[rows >= 0]))

    def _merge(self, query_id: str, doc_ids: Sequence[str], scores: Any, depth: int) -> Ranking:
        scores, first = np.asarray(scores, np.float32), self._first(query_id, max(depth, self.depth))
        if self.first_stage_weight:
            scores = scores + np.float32(self.first_stage_weight) * np.array([first[x] for x in doc_ids], np.float32)
        finite = np.isfinite(scores)
        ids, scores = list(itertools.compress(doc_ids, finite)), scores[finite]
        if len(scores):
            self.lowest[query_id] = float(scores.min())
        order, scored = trec_order(scores, ids), set(ids)
        rest = [doc_id for doc_id in first if doc_id not in scored]
        return query_id, ([ids[i] for i in order] + rest)[:depth], _followed(scores[order], len(rest))[:depth]


def _followed(scores: np.ndarray, count: int) -> np.ndarray:
    """Scores, best first, and below them falling float32 ones for `count` documents that follow the re-ranked ones."""
    lowest = scores[-1] if len(scores) else np.float32(0)
    # Steps as wide as float32 keeps apart at this size, so that the rest neither ties nor reorders.
    step = max(np.float32(1.0), np.spacing(np.abs(lowest)) * 2)
    return np.concatenate([scores, np.asarray(lowest - step * np.arange(1, count + 1, dtype=np.float32), np.float32)])


@dataclass
class Reranking(Footprint):
    """How a teacher is served: a first stage, then the teacher over what it found. For `measure_costs` alone.

    Args:
        engine: the first stage.
        score: (query, document ids, document texts) → scores, computed now.
        teachers: gives what is in memory beside the first stage's index and encoder; asked after the first query.
        depth: documents re-ranked for each query, whatever depth is asked for.
    """

    engine: Any
    collection: Any
    score: Callable[[str, list[str], list[str]], Any]
    teachers: Callable[[], Sequence[Any]]
    depth: int
    rates: list[float] = field(default_factory=list)  # pairs a second, of each query so far

    def __post_init__(self) -> None:
        # The first stage's index is what is kept to search; the texts that the teacher reads come on top.
        self.bytes = getattr(getattr(self.engine, "index", self.engine), "bytes", None)

    def models(self) -> list[Any]:
        return [*encoders(self.engine), *self.teachers()]

    def steps(self, depth: int) -> dict[str, Step]:
        return {**engine_steps(self.engine, self.depth), "rerank": self._rerank}

    def _rerank(self, texts: Sequence[str], found: Sequence[Any]) -> list[Any]:
        scored = []
        for text, hits in zip(texts, found, strict=True):
            documents = self.collection.document_texts(hits.rows)
            started = time.perf_counter()
            scored.append(self.score(text, self.collection.doc_ids(hits.rows), documents))
            self.rates.append(len(documents) / (time.perf_counter() - started))
        return scored

    @property
    def pairs_per_second(self) -> float | None:
        """The median: the first query loads the models."""
        return round(float(np.median(self.rates)), 1) if self.rates else None
