"""The training stream: batch number i, with each distinct document once.

The stream is a pure function of the batch number, so data-loader workers, processes and resuming change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from rankdistill.errors import RankdistillError
from rankdistill.progress import warn
from rankdistill.sampling.base import BatchSampler, DocumentSampler, generator
from rankdistill.students.base import Features, StudentModel, cut, split_by_length
from rankdistill.students.cross_encoder import PairModel

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists
    from rankdistill.training.batch_teacher import BatchTeacher


# Numbers of a list's documents, as a batch has them.
KINDS: dict[str, Any] = {"rows": np.int64, "teacher_scores": np.float32, "relevance": np.int32, "mask": bool}
KINDS["disagreement"] = np.float32


class BatchStream(Dataset[dict[str, Any]]):
    """Batches of scored lists, tokenised.

    Args:
        student: tokenises.
        batches, documents: choose which queries share a batch, and the documents of each list.
        seed: of all choices.
        length: batches in the whole training, over all epochs.
        token_budget: padded tokens a part of the batch's documents.
        members: numbers of the lists that are trained on; all unless given.
        batch_teacher: a model that scores the whole batch, where a loss asks for one.
        document_length: tokens of a document, where fewer than the student's own are enough to learn from.
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
        members: NDArray[np.int64] | None = None,
        batch_teacher: BatchTeacher | None = None,
        document_length: int | None = None,
    ) -> None:
        self.document_length = document_length
        self.lists, self.collection, self.student = lists, collection, student
        self.batches, self.documents = batches, documents
        self.seed, self.length, self.token_budget = seed, length, token_budget
        self.members = np.arange(len(lists)) if members is None else members
        self.batch_teacher = batch_teacher
        self._epochs: dict[int, NDArray[np.int64]] = {}
        self._starts = [0]

    def __len__(self) -> int:
        return self.length

    def locate(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """(epoch, list numbers) of a batch."""
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return epoch, self.members[self._epoch(epoch)[number - self._starts[epoch]]]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs = {epoch: self.batches.epoch(len(self.members), self.seed, epoch)}
        return self._epochs[epoch]

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < self.length:
            raise IndexError(number)
        epoch, members = self.locate(number)
        queries, batch = self._lists(members, epoch)
        rows, mask = batch.pop("rows").numpy(), batch["mask"].numpy()
        texts = self.collection.query_texts(queries)
        rows = np.where(mask, rows, rows[:, :1])  # padding points at a document that is there anyway
        distinct, index, documents = self._documents(members, texts, rows)
        parts = split_by_length(documents, self.token_budget)
        order = np.concatenate([places for places, _ in parts])
        batch |= {
            "queries": self.student.preprocess(texts, "query"),
            "documents": [part for _, part in parts],
            "rows": torch.from_numpy(distinct[order]),
            "index": torch.from_numpy(order.argsort()[index.reshape(rows.shape)]),
        }
        if self.batch_teacher is not None:
            batch["teacher_features"] = self.batch_teacher.features(queries, texts, distinct[order])
        return batch

    def _documents(
        self, members: NDArray[np.int64], queries: list[str], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Features]:
        """What is embedded, each once (distinct documents, or of a student that reads pairs each list's own): its
        numbers, over all lists; which one each place of `rows` has; its features."""
        if not isinstance(self.student, PairModel):
            distinct, index = np.unique(rows, return_inverse=True)
            features = cut(self.student.preprocess_documents(self.collection, distinct), self.document_length)
            return distinct, index, features
        count = self.collection.document_count
        distinct, first, index = np.unique(members[:, None] * count + rows, return_index=True, return_inverse=True)
        documents, column = np.unique(distinct % count, return_inverse=True)
        pairs = np.stack([first // rows.shape[1], column], axis=1)
        texts = self.collection.document_texts(documents)
        return distinct, index, self.student.preprocess_pairs(queries, texts, pairs, self.document_length)

    def _lists(self, members: NDArray[np.int64], epoch: int) -> tuple[list[str], dict[str, Any]]:
        """Query ids, and [lists, documents] tensors of the chosen documents, padded to the longest list."""
        queries: list[str] = []
        chosen: dict[str, list[Tensor]] = {}
        for member in members.tolist():
            query_id, rows, scores, relevance = self.lists[member]
            places = self.documents.choose(scores, relevance, generator(self.seed, epoch, member))
            values = {"rows": rows, "teacher_scores": scores, "relevance": relevance, "mask": np.ones(len(rows), bool)}
            if (disagreement := self.lists.disagreement_of(member)) is not None:
                values["disagreement"] = disagreement
            queries.append(query_id)
            for name, value in values.items():
                chosen.setdefault(name, []).append(torch.from_numpy(value[places].astype(KINDS[name])))
        return queries, {
            name: pad_sequence(values, batch_first=True, padding_value=-1 if name == "relevance" else 0)
            for name, values in chosen.items()
        }


def usable_lists(lists: ScoredLists, documents: DocumentSampler) -> NDArray[np.int64]:
    """Numbers of the lists that a document sampler can draw from, at least one; how many were dropped is said."""
    if type(documents).usable is DocumentSampler.usable:
        return np.arange(len(lists))
    kept = [number for number in range(len(lists)) if documents.usable(*lists[number][2:])]
    if len(kept) < len(lists):
        warn(f"{len(lists) - len(kept):,} of {len(lists):,} lists have not what {documents.type} needs and are dropped")
    if not kept:
        raise RankdistillError(
            f"no list has what the sampler {documents.type} needs",
            where="training.lists",
            fix="set candidates.include_positives: true and a greater candidates.depth, or lists: random_documents",
        )
    return np.array(kept, dtype=np.int64)


def whole(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The collate function of a loader whose items are batches already."""
    return items[0]
