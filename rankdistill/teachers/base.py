"""What every teacher is: settings in, scores of candidate lists out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from rankdistill.errors import RankdistillError
from rankdistill.scores.store import ScoreKind

if TYPE_CHECKING:
    from rankdistill.collections import Collection

Candidates = Iterable[tuple[str, Sequence[str], np.ndarray]]  # (query_id, doc_ids, _) a query, each query once
Scored = Iterator[tuple[str, list[str], np.ndarray]]  # (query_id, doc_ids, scores float32 [len(doc_ids)]) a list


class TextList(NamedTuple):
    """One query and the documents to be scored against it."""

    query_id: str
    query: str
    doc_ids: list[str]
    documents: list[str]
    collection: Collection | None = None  # whose documents they are, where they are a collection's


class Dev(NamedTuple):
    """What a training is judged by: candidates of dev queries and the split that labels them."""

    candidates: list[tuple[str, list[str]]]
    split: str


class Teacher(ABC):
    """Scores candidate lists. A dataclass: its fields are the recipe's keys. Making one loads nothing."""

    type: ClassVar[str]
    score_kind: ScoreKind
    live: ClassVar[bool] = True  # scores are computed here and now; a recorded teacher's speed says nothing
    reads_lists: ClassVar[bool] = False  # a document's score depends on its list: lists are scored whole, or not at all

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides the scores (weights, lengths, number format), of no path and no time."""

    def prepare(self, collection: Collection, folder: Path) -> None:  # noqa: B027
        """Told before it scores which collection the documents are of; what is worth keeping goes below `folder`."""

    @abstractmethod
    def score(self, lists: Sequence[TextList]) -> Scored:
        """Score a chunk of lists, in order (one that asks a language model: as they are ready).

        Higher is more relevant. Documents that it has no score for may be left out.
        """

    @property
    def needs_training(self) -> bool:
        """Whether `train` must come first."""
        return False

    @property
    def judged_depth(self) -> int:
        """Documents of each dev query that `train` re-ranks to judge itself; 0: it looks at none."""
        return 0

    def training_inputs(self) -> dict[str, Any]:
        """What `train` starts from beside the candidates, as fingerprints; they replace the settings of their names."""
        return {}

    def train(
        self,
        collection: Collection,
        candidates: Candidates,
        out: Path,
        seed: int,
        split: str = "train",
        dev: Dev | None = None,
    ) -> dict[str, Any]:
        """Fine-tune on a split's labels and the candidates, save the best by `dev` below `out`, use it from now on."""
        raise RankdistillError(f"a teacher of type {self.type!r} is not trained")

    def use_trained(self, folder: Path) -> None:
        """Take what an earlier `train` saved."""
        raise RankdistillError(f"a teacher of type {self.type!r} is not trained")

    def describe(self) -> dict[str, Any]:
        """The settings, for manifests: a dataclass's fields."""
        return {"type": self.type, **(asdict(self) if is_dataclass(self) else {})}

    def take_report(self) -> dict[str, Any]:
        """What was counted while scoring since this was last called: nested mappings of numbers and lists of numbers,
        which `added` sums up."""
        return {}

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        """A report for a person."""
        return []


class PairTeacher(Teacher):
    """A teacher whose score of a document does not depend on the rest of the list."""

    @abstractmethod
    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N], the scores of pairs of distinct texts.

        Args:
            pairs: int64 [N, 2], row numbers in `queries` and `documents`; no pair twice.
        """

    def score(self, lists: Sequence[TextList]) -> Scored:
        """Score each distinct (query text, document text) of the chunk once."""
        query_rows: dict[str, int] = {}
        document_rows: dict[str, int] = {}
        keys = [
            (query_rows.setdefault(item.query, len(query_rows)), document_rows.setdefault(text, len(document_rows)))
            for item in lists
            for text in item.documents
        ]
        if not keys:
            return
        pairs, inverse = np.unique(np.array(keys, dtype=np.int64), axis=0, return_inverse=True)
        scores = self.score_pairs(list(query_rows), list(document_rows), pairs)[inverse.reshape(-1)]
        parts = np.split(scores, np.cumsum([len(item.doc_ids) for item in lists])[:-1])
        for item, part in zip(lists, parts, strict=True):
            if item.doc_ids:
                check_finite(item.query_id, item.doc_ids, part, self.type)
                yield item.query_id, item.doc_ids, part


def check_finite(query_id: str, doc_ids: Sequence[str], scores: np.ndarray, teacher: str) -> None:
    """Refuse NaN and infinity where they arise, naming the first such pair."""
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise RankdistillError(
            f"the {teacher} teacher gave the score {scores[bad]}",
            where=f"query {query_id!r}, document {doc_ids[bad]!r}",
            fix="score with precision: fp32; if it stays, the model's weights are broken",
        )


def added(a: Any, b: Any) -> Any:
    """The sum of two reports; what only one has stays, of lists of different lengths the longer's end too."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {**a, **{name: added(a[name], b[name]) if name in a else b[name] for name in b}}
    if isinstance(a, list) and isinstance(b, list):
        return [added(*pair) for pair in zip(a, b)] + a[len(b) :] + b[len(a) :]
    return a + b
