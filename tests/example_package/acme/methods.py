"""One method of each kind that is written most often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankdistill.artifacts import fingerprint
from rankdistill.collections import Collection
from rankdistill.indexes.base import Engine
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.sources import CandidateSource
from rankdistill.losses.base import ListLoss
from rankdistill.students.dense import StaticStudent
from rankdistill.teachers.base import PairTeacher


class HuberMargins(ListLoss):
    """Huber loss of the margins between a list's first document and the others.

    Args:
        knee: margin error from which on the loss grows linearly.
        weight: share in a sum of losses.
    """

    type = "huber_margins"
    matches = "margins"

    def __init__(self, knee: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.knee = knee

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        error = (student[:, :1] - student) - (teacher[:, :1] - teacher)
        error = torch.where(mask, error, 0.0)
        terms = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.knee)
        return terms.sum(dim=1), mask.sum(dim=1)


class SharedWords(PairTeacher):
    """A document's score is how many of the query's words it has.

    Args:
        gain: of each word.
    """

    type = "shared_words"
    score_kind = "logit"

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def fingerprint(self) -> str:
        return fingerprint([self.type, self.gain])

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        words = [[set(text.lower().split()) for text in texts] for texts in (queries, documents)]
        return np.array([self.gain * len(words[0][q] & words[1][d]) for q, d in pairs], np.float32)


class PlainBM25(CandidateSource):
    """BM25 without stemming.

    Args:
        k1: how soon further occurrences of a term stop counting.
    """

    type = "plain_bm25"

    def __init__(self, k1: float = 0.9, **share: Any) -> None:
        super().__init__(**share)
        self.k1 = k1

    def open(self, collection: Collection, folder: Path) -> Engine:
        engine = BM25(k1=self.k1, language="none")
        path = folder / f"plain-{engine.fingerprint_for(collection)}"
        engine.build(collection, path)
        return BM25.open(path)


class SmallStatic(StaticStudent):
    """A static student of few dimensions.

    Args:
        model: whose word vectors it starts from.
        dimension: of its vectors.
    """

    type = "small_static"

    def __init__(self, model: str, dimension: int = 8) -> None:
        super().__init__(model, dimension=dimension)


class Unnamed(HuberMargins):
    """It has no type of its own."""


class Unfinished(ListLoss):
    """It lacks `terms`."""

    type = "unfinished"


class Untyped(ListLoss):
    """Nobody can check this setting."""

    type = "untyped"

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()

    def terms(self, *_: Any) -> Any: ...


LEARNING_RATE = 0.1
