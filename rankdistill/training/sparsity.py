"""A watch over a sparse student in training: it may collapse, and hours later only an empty index would tell.

Three ways, all seen within the first hundreds of steps: texts without any term (λ too large; dead terms have no
gradient and do not come back), texts that all have the same terms, and vectors that stay dense (λ too small).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rankdistill.errors import RankdistillError
from rankdistill.losses.base import Loss
from rankdistill.losses.regularisers import Sparsity
from rankdistill.losses.schedules import Ramp
from rankdistill.progress import warn

WINDOW = 20  # batches whose mean is judged
LOOKED = 10  # batches between two looks: each waits for the device
MOST_EMPTY = 0.5  # of the texts of a side
MOST_COMMON = 0.95  # of a document's terms in nearly every document of the batch
MOST_DENSE = 0.25  # of the vocabulary active in a document, once the regularisers count in full
EARLY = 100  # steps after which a dense student is warned of


class SparsityWatch:
    """Reads the figures of each batch (`StudentModel.statistics`) and stops a training that is lost.

    Args:
        losses: of the training; their ramps say from when on a student should be sparse.
        steps: optimiser steps of the training.
        terms: of the vocabulary.
    """

    def __init__(self, losses: Iterable[Loss], steps: int, terms: int) -> None:
        ends = [_end(loss, steps) for loss in losses if isinstance(loss, Sparsity)]
        self.pressed_from = max([EARLY, *ends])
        self.regularised, self.terms = bool(ends), terms
        self.seen: dict[str, deque[Tensor]] = {}
        self.means: dict[str, float] = {}  # of the last batches; there are none before there are enough
        self.batches = 0
        self.warned = False

    def see(self, step: int, figures: Mapping[str, Tensor]) -> None:
        """
        Raises:
            RankdistillError: the student has collapsed; says how.
        """
        for name, value in figures.items():
            self.seen.setdefault(name, deque(maxlen=WINDOW)).append(value)
        self.batches += 1
        if self.batches % LOOKED:
            return
        full = {name: torch.stack([*seen]).mean() for name, seen in self.seen.items() if len(seen) == WINDOW}
        self.means = dict(zip(full, torch.stack([*full.values()]).tolist())) if full else {}
        for side, texts in (("document", "documents"), ("query", "queries")):
            if (empty := self._mean(f"empty/{side}")) > MOST_EMPTY:
                raise RankdistillError(
                    f"the student has collapsed: {empty:.0%} of the {texts} have no term left, the mean of {WINDOW} "
                    "batches",
                    where=f"step {step}",
                    fix=f"a smaller weight of the {side} regulariser, a longer ramp, or a target for a controller",
                )
        if step < EARLY:
            return
        if (common := self._mean("common_terms/document")) > MOST_COMMON:
            raise RankdistillError(
                f"the student has collapsed: {common:.0%} of a document's terms are in nearly every document",
                where=f"step {step}",
                fix="a lower training.learning_rate, or the regulariser df_flops, which presses on such terms",
            )
        active = self._mean("active_terms/document")
        if active <= MOST_DENSE * self.terms:
            return
        told = f"documents have {active:,.0f} active terms of {self.terms:,}"
        if step >= self.pressed_from and self.regularised:
            raise RankdistillError(
                f"the student stays dense: {told}",
                where=f"step {step}",
                fix="a larger weight of the document regulariser, or a target for a controller",
            )
        if not self.warned:
            self.warned = True
            warn(f"step {step}: {told}" + ("" if self.regularised else ", and no regulariser makes them fewer"))

    def _mean(self, name: str) -> float:
        return self.means.get(name, 0.0)


def _end(loss: Sparsity, steps: int) -> float:
    """The step from which a regulariser counts in full."""
    if isinstance(loss.weight, (int, float)):
        return 0.0
    ramp = Ramp.model_validate(loss.weight)
    delay = ramp.delay * steps if ramp.delay < 1 else ramp.delay
    return delay + (ramp.over * steps if ramp.over <= 1 else ramp.over)
