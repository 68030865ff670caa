"""A student over a first stage: its vectors order what the first stage found, as papers on distillation report it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankdistill.evaluation.cost import Footprint, Step, encoders, engine_steps
from rankdistill.evaluation.evaluate import scores_below
from rankdistill.runs import Ranking


@dataclass
class StudentReranking(Footprint):
    """A system: the first stage's top `depth` documents ordered by the student, those below in the first stage's order.

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
        """For `measure_costs`."""
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
            below = scores_below(scores.min() if len(scores) else np.float32(0), len(rest))
            merged.append((np.concatenate([top[order], rest]), np.concatenate([scores[order], below])))
        return merged
