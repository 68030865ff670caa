"""The training stream: batch number i, with each distinct document once.

The stream is a pure function of the batch number, so data-loader workers, processes and resuming change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from rankdistill.sampling.base import BatchSampler, DocumentSampler, generator
from rankdistill.students.base import Features, StudentModel, split_by_length

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists


class BatchStream(Dataset[dict[str, Any]]):
    """Batches of scored lists, tokenised.

    Args:
        lists: the scored lists.
        collection: where the texts are.
        student: tokenises.
        batches: chooses which queries share a batch.
        documents: chooses the documents of each list.
        seed: of all choices.
        length: batches in the whole training, over all epochs.
        token_budget: padded tokens a part of the batch's documents.
    """

    def __init__(
        self,
        lists: ScoredLists,
        collection: Collection,
        student: StudentModel,
        batches: BatchSampler,
        documents: DocumentSampler,
        seed: int,
        length: int,
        token_budget: int,
    ) -> None:
        self.lists, self.collection, self.student = lists, collection, student
        self.batches, self.documents = batches, documents
        self.seed, self.length, self.token_budget = seed, length, token_budget
        self._epochs: dict[int, NDArray[np.int64]] = {}
        self._starts = [0]

    def __len__(self) -> int:
        return self.length

    def locate(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """(epoch, list numbers) of a batch."""
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return epoch, self._epoch(epoch)[number - self._starts[epoch]]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs = {epoch: self.batches.epoch(len(self.lists), self.seed, epoch)}
        return self._epochs[epoch]

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.length:
            raise IndexError(number)
        epoch, members = self.locate(number)
        chosen = [self._documents(int(member), epoch) for member in members]
        width = max(len(rows) for _, rows, _, _ in chosen)
        shape = (len(chosen), width)
        rows = np.zeros(shape, dtype=np.int64)
        teacher = np.zeros(shape, dtype=np.float32)
        relevance = np.full(shape, -1, dtype=np.int32)
        mask = np.zeros(shape, dtype=bool)
        for place, (_, list_rows, scores, labels) in enumerate(chosen):
            count = len(list_rows)
            rows[place, :count], teacher[place, :count] = list_rows, scores
            relevance[place, :count], mask[place, :count] = labels, True
        rows[~mask] = rows[0, 0]  # padding points at a document that is there anyway
        distinct, index = np.unique(rows, return_inverse=True)
        parts, order = self._parts(distinct)
        place_of = np.empty(len(distinct), dtype=np.int64)
        place_of[order] = np.arange(len(distinct))
        queries = self.collection.query_texts([query_id for query_id, _, _, _ in chosen])
        return {
            "queries": self.student.preprocess(queries, "query"),
            "documents": parts,
            "index": torch.from_numpy(place_of[index.reshape(shape)]),
            "teacher_scores": torch.from_numpy(teacher),
            "relevance": torch.from_numpy(relevance),
            "mask": torch.from_numpy(mask),
        }

    def _documents(
        self, member: int, epoch: int
    ) -> tuple[str, NDArray[np.int64], NDArray[np.float32], NDArray[np.int32]]:
        query_id, rows, scores, relevance = self.lists.list(member)
        chosen = self.documents.choose(scores, relevance, generator(self.seed, epoch, member))
        return query_id, rows[chosen].astype(np.int64), scores[chosen], relevance[chosen]

    def _parts(self, rows: NDArray[np.int64]) -> tuple[list[Features], NDArray[np.int64]]:
        """Preprocessed documents in parts of like length, and the order of `rows` over the parts."""
        features = self.student.preprocess(self.collection.document_texts(rows), "document")
        parts = split_by_length(features, self.token_budget)
        return [part for _, part in parts], np.concatenate([places for places, _ in parts])


def whole(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The collate function of a loader whose items are batches already."""
    return items[0]
