"""Student and losses as one module: a batch of scored lists in, a loss and its parts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankdistill.losses.base import ListLoss, Loss
from rankdistill.students.base import Features, StudentModel


class Distiller(nn.Module):
    """The weighted sum of losses over a batch; `losses` maps a name (for the log) to a loss."""

    def __init__(self, student: StudentModel, losses: dict[str, Loss]) -> None:
        super().__init__()
        self.student = student
        self.losses = nn.ModuleDict(losses)

    def forward(
        self,
        queries: Features,
        documents: list[Features],
        index: Tensor,
        teacher_scores: Tensor,
        relevance: Tensor,
        mask: Tensor,
    ) -> dict[str, Any]:
        """See training/batches.py for the batch; returns `loss` and each part before its weight, under its name."""
        query_embeddings = self.student.embed(queries, "query")
        document_embeddings = torch.cat([self.student.embed(part, "document") for part in documents])
        with torch.autocast(query_embeddings.device.type, enabled=False):  # scores and losses in float32
            student_scores = self.student.score_lists(query_embeddings.float(), document_embeddings.float(), index)
            parts: dict[str, Tensor] = {}
            total = student_scores.new_zeros(())
            for name, loss in self.losses.items():
                assert isinstance(loss, ListLoss)
                parts[name] = loss(student_scores, teacher_scores, relevance, mask)
                total = total + loss.now(loss.weight) * parts[name]
        return {"loss": total, **{name: part.detach() for name, part in parts.items()}}
