"""Student and losses as one module: a batch of scored lists in, a loss and its parts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rankdistill.losses.base import BatchLoss, ListLoss, Loss, Regulariser, VectorLoss
from rankdistill.losses.checks import check_scale
from rankdistill.losses.weighting.base import Weighting
from rankdistill.students.base import Features, Side, StudentModel
from rankdistill.students.token_batches import GradientCache, training_attention
from rankdistill.training.processes import Batch, whole_batch

if TYPE_CHECKING:
    from rankdistill.training.batch_teacher import BatchTeacher


class Distiller(nn.Module):
    """The weighted sum of losses over a batch.

    Under several processes each embeds its own share of the batch, and all compute the losses of the whole one, so that
    N processes with batches of B do what one does with batches of N · B.

    Args:
        student: learns.
        losses: name (for the log) → loss.
        weighting: what each list counts in the losses over lists; all alike unless given.
        batch_teacher: scores the whole batch for the losses that ask; it is no part of this module's state.
        gradient_cache, token_budget: whether a batch comes in parts, and how large those are: see `GradientCache`.
    """

    def __init__(
        self,
        student: StudentModel,
        losses: dict[str, Loss],
        weighting: Weighting | None = None,
        batch_teacher: BatchTeacher | None = None,
        gradient_cache: bool = False,
        token_budget: int = 4096,
    ) -> None:
        super().__init__()
        self.student = student
        self.losses = nn.ModuleDict(losses)
        self.weighting = weighting
        self.cache = GradientCache(gradient_cache, token_budget)
        self._batch_teacher = [batch_teacher]  # in a list: its weights are not saved with the student's
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None  # the last batch's scores, for `check_scale`

    def _losses(self) -> dict[str, Loss]:
        return cast("dict[str, Loss]", dict(self.losses.items()))

    def at_step(self, step: int, steps: int) -> None:
        """How many of the training's optimiser steps are done."""
        for scheduled in (*self._losses().values(), *([self.weighting] if self.weighting is not None else [])):
            scheduled.at_step(step, steps)

    def forward(
        self,
        queries: Features,
        documents: list[Features],
        teacher_features: dict[str, Any] | None = None,
        **lists: Tensor,
    ) -> dict[str, Any]:
        """See training/batches.py for the batch.

        Returns `loss`, each part before its weight under its name, and `figures`: what else belongs in the log.
        """
        batch = Batch(self._embed([queries], "query"), self._embed(documents, "document"), **lists)
        teacher = self._batch_teacher[0]
        if teacher is not None:
            assert teacher_features is not None
            batch.teacher_queries, batch.teacher_documents = teacher.embed(teacher_features)
        batch = whole_batch(batch)
        with torch.autocast(batch.queries.device.type, enabled=False):  # scores and losses in float32
            parts = self._parts(batch)
        total = batch.queries.new_zeros((), dtype=torch.float32)
        figures = self.student.statistics(batch.queries.detach(), batch.documents.detach())
        for name, loss in self._losses().items():
            strength = loss.strength()
            total = total + strength * parts[name]
            if isinstance(loss, Regulariser):
                figures[f"weight/{name}"] = total.new_tensor(strength)
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}, "figures": figures}

    def use_less_memory(self, error: RuntimeError, batch: dict[str, Any]) -> None:
        """See `GradientCache.shrink`."""
        fix = "training.gradient_cache: true, a smaller training.token_budget, fewer lists a batch"
        fix += " (training.batches.size) with training.accumulation, or shorter documents"
        self.cache.shrink(error, [batch["queries"], *batch["documents"]], self.student.device, fix)

    def check_scale(self) -> None:
        """Warn where the last batch's scores of student and teacher do not fit each other and the losses."""
        assert self._seen is not None
        student_scores, teacher_scores, mask = self._seen
        scale = getattr(self.student, "scale", torch.tensor(1.0))
        check_scale(
            student_scores,
            teacher_scores,
            self._losses(),
            self.student.similarity,
            mask=mask,
            scale=float(scale.detach()),
            learn_scale=scale.requires_grad,
        )

    def _embed(self, parts: Sequence[Features], side: Side) -> Tensor:
        def embed(part: Features) -> Tensor:
            with training_attention(part):
                return self.student.embed(part, side)

        return self.student.join(self.cache.run(embed, parts)).float()

    def _parts(self, batch: Batch) -> dict[str, Tensor]:
        """Each loss of the batch, before its weight."""
        every = teacher_every = None
        if any(isinstance(loss, BatchLoss) for loss in self.losses.values()):
            every = self.student.score_all(batch.queries, batch.documents)
            scores = every.gather(1, batch.index)
            teacher = self._batch_teacher[0]
            if teacher is not None and teacher.documents:
                with torch.no_grad():
                    teacher_every = teacher.score_all(batch.teacher_queries, batch.teacher_documents)
        else:
            scores = self.student.score_lists(batch.queries, batch.documents, batch.index)
        lists = (batch.teacher_scores, batch.relevance, batch.mask)
        weights = None
        if self.weighting is not None:
            weights = self.weighting(scores.detach(), *lists, batch.disagreement)
        self._seen = (scores.detach(), batch.teacher_scores, batch.mask)
        parts: dict[str, Tensor] = {}
        for name, loss in self._losses().items():
            if isinstance(loss, ListLoss):
                parts[name] = loss(scores, *lists, weights)
            elif isinstance(loss, BatchLoss):
                parts[name] = loss(every, teacher_every, batch.index, batch.relevance, batch.mask)
            elif isinstance(loss, Regulariser):
                parts[name] = loss(batch.queries if loss.side == "query" else batch.documents)
            else:
                assert isinstance(loss, VectorLoss)
                sides = {
                    "query": (batch.queries, batch.teacher_queries),
                    "document": (batch.documents, batch.teacher_documents),
                }
                parts[name] = torch.stack([loss(*sides[side]) for side in loss.sides]).mean()
        return parts
