"""Contrastive losses on labels: the plain baseline that every distillation must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankdistill.losses.base import BatchLoss, ListLoss, comparable, log_softmax_where, sums_where
from rankdistill.losses.schedules import Temperature


@dataclass(eq=False)
class InfoNCE(ListLoss):
    """-log softmax of the positive among its list (van den Oord et al. 2018, arXiv:1807.03748); reads no teacher.

    The positive is the list's first document, which must be labelled relevant; other documents of the list that are
    labelled relevant are no negatives and are left out. A list without a negative counts nothing.

    Args:
        temperature: scores are divided by it.
    """

    type = "infonce"
    needs_labels = True
    needs_teacher = False
    temperature: Temperature = 1.0

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        competing = mask & (labels <= 0)
        competing[:, 0] = mask[:, 0]
        first = torch.zeros_like(labels[:, :1], dtype=torch.int64)
        return _against(student / self.now(self.temperature), first, competing, mask[:, 0] & (labels[:, 0] > 0))


def _against(logits: Tensor, positive: Tensor, competing: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax of the column `positive` [lists, 1] among those that compete, and whether a list counts: [lists]."""
    counted = (labelled & comparable(competing))[:, None]
    # A list that counts nothing must give no NaN.
    logits = logits.masked_fill(~competing, float("-inf")).masked_fill(~counted, 0.0)
    return sums_where(-logits.log_softmax(dim=1).gather(1, positive), counted)


class LCE(ListLoss):
    """Softmax cross-entropy to the labels' gains, the usual loss of re-rankers; reads no teacher.

    With one positive in a list this is localised contrastive estimation (Gao et al. 2021, arXiv:2101.08751): -log
    softmax of its score over itself and the mined negatives. Of grades, each document's share of the target is its
    gain, 2^grade - 1, by the list's sum. A list without a positive counts nothing.
    """

    type = "lce"
    needs_labels = True
    needs_teacher = False

    @staticmethod
    def targets(labels: Tensor, mask: Tensor) -> Tensor:
        """[lists, documents], each list's sum 1, or 0 where nothing is relevant."""
        gains = (labels.clamp(min=0).double().exp2() - 1).masked_fill(~mask, 0.0)
        return (gains / gains.sum(dim=1, keepdim=True).clamp(min=1.0)).float()

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        targets = self.targets(labels, mask)
        counted = (targets.sum(dim=1) > 0) & comparable(mask)
        entropy = -(targets * log_softmax_where(student, mask)).sum(dim=1, keepdim=True)
        return sums_where(entropy, counted[:, None])


@dataclass(eq=False)
class InBatchInfoNCE(BatchLoss):
    """-log softmax of the positive among all documents of the batch: the other queries' documents are negatives too
    (DPR, Karpukhin et al. 2020, arXiv:2004.04906); reads no teacher.

    The positive is the list's first document, which must be labelled relevant. Other documents that the query's own
    list labels relevant are no negatives, whichever lists they are in; a document of several lists counts once.

    Args:
        temperature: scores are divided by it.
    """

    type = "in_batch_infonce"
    needs_labels = True
    needs_teacher = False
    temperature: Temperature = 1.0

    def forward(self, student: Tensor, teacher: Tensor | None, index: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        relevant = torch.zeros_like(student).scatter_add_(1, index, (mask & (labels > 0)).to(student))
        competing = (relevant == 0).scatter(1, index[:, :1], True)
        logits = student / self.now(self.temperature)
        sums, counts = _against(logits, index[:, :1], competing, mask[:, 0] & (labels[:, 0] > 0))
        return sums.sum() / counts.sum().clamp(min=1.0)
