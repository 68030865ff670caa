"""Dev queries that choose a checkpoint: quick enough to be asked several times in a training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.runs import Run
from rankdistill.sampling.base import generator
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import StudentModel
from rankdistill.training.diagnostics import teacher_judgments

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DEPTH = 100  # of a ranking that is measured


class DevPool:
    """Dev queries and a pool of documents that they are searched in.

    A metric over the pool is not the metric over the collection: it serves to compare checkpoints only.

    Args:
        judge: a split, whose labels judge; or the teacher's lists of the dev queries, where there are none.
        query_ids: those without a judgment are left out.
        rows: of the documents.
    """

    def __init__(
        self,
        collection: Collection,
        judge: str | ScoredLists,
        query_ids: Sequence[str],
        rows: NDArray[np.int64],
        metric: str,
    ) -> None:
        self.qrels, self.metric, self.rows = judgments(collection, judge, query_ids), metric, rows
        self.query_ids = list(self.qrels)
        self.queries = collection.query_texts(self.query_ids)
        self.doc_ids, self.documents = collection.doc_ids(rows), collection.document_texts(rows)
        self.judged_by = "" if isinstance(judge, str) else ", judged by the teacher's order"

    @classmethod
    def build(
        cls,
        collection: Collection,
        judge: str | ScoredLists,
        query_ids: Sequence[str],
        candidates: Sequence[Sequence[str]],
        size: int,
        seed: int,
        metric: str,
    ) -> DevPool:
        """The relevant documents and the candidates, as far as the size allows, then random documents."""
        qrels = judgments(collection, judge, query_ids).values()
        relevant = [[doc_id for doc_id, grade in judged.items() if grade > 0] for judged in qrels]
        # The first of every query, then the second, so that a pool cut to size is as fair to each.
        turns = itertools.zip_longest(*relevant, *candidates)
        doc_ids = [doc_id for turn in turns for doc_id in turn if doc_id is not None]
        rows = collection.doc_rows(list(dict.fromkeys(doc_ids))[:size])
        if len(rows) < min(size, collection.document_count):
            more = generator(seed, 1).permutation(collection.document_count)
            rows = np.concatenate([rows, more[~np.isin(more, rows)][: size - len(rows)]])
        return cls(collection, judge, query_ids, np.sort(rows), metric)

    def __str__(self) -> str:
        documents = f"a pool of {len(self.doc_ids)} documents"
        return f"{self.metric} over {documents}, {len(self.query_ids)} queries{self.judged_by}"

    def evaluate(self, student: StudentModel) -> float:
        scores = student.pool_similarities(self.queries, self.documents, self.rows)
        depth = min(DEPTH, scores.shape[1])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        return self._metric_of(
            Run(
                self.query_ids,
                np.arange(len(best) + 1) * depth,
                [self.doc_ids[column] for column in best.ravel()],
                np.take_along_axis(scores, best, axis=1).ravel(),
            )
        )

    def _metric_of(self, run: Run) -> float:
        return float(evaluate_run(run, self.qrels, [self.metric]).means[self.metric])


class RerankPool(DevPool):
    """Dev queries with the first candidates of each, which a student that reads pairs re-ranks; no other is read.

    Args:
        candidates: document ids of each query; `depth` of them are re-ranked.
    """

    def __init__(
        self,
        collection: Collection,
        judge: str | ScoredLists,
        query_ids: Sequence[str],
        candidates: Sequence[Sequence[str]],
        depth: int,
        metric: str,
    ) -> None:
        qrels = judgments(collection, judge, query_ids)
        firsts = [list(dict.fromkeys(ids))[:depth] for query_id, ids in zip(query_ids, candidates) if query_id in qrels]
        owners = np.repeat(np.arange(len(firsts)), [len(ids) for ids in firsts])
        rows = collection.doc_rows(list(itertools.chain.from_iterable(firsts)))
        distinct, column = np.unique(rows[rows >= 0], return_inverse=True)
        self.pairs = np.stack([owners[rows >= 0], column.ravel()], axis=1)  # [N, 2]: query, document
        super().__init__(collection, judge, query_ids, distinct, metric)

    def __str__(self) -> str:
        return super().__str__().replace("over a pool of", "of re-ranked candidates,")

    def evaluate(self, student: StudentModel) -> float:
        return self.measure(student.pair_scores(self.queries, self.documents, self.rows, self.pairs))

    def measure(self, scores: NDArray[Any]) -> float:
        """Of scores [N] of the pairs."""
        ranked: dict[str, dict[str, float]] = {query_id: {} for query_id in self.query_ids}
        for (query, document), score in zip(self.pairs.tolist(), scores.tolist(), strict=True):
            ranked[self.query_ids[query]][self.doc_ids[document]] = score
        return self._metric_of(Run.from_dict(ranked))


def judgments(collection: Collection, judge: str | ScoredLists, query_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """query id → document id → grade, of those of the queries that are judged, in their order."""
    judged = collection.qrels(judge) if isinstance(judge, str) else teacher_judgments(judge, collection)
    return {query_id: judged[query_id] for query_id in query_ids if query_id in judged}
