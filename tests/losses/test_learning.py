"""Every loss teaches: on a planted problem a linear student comes to rank as its teacher, and as nobody else.

The teacher scores by a hidden matrix, t = q' M d; the student by its own, s = q' W d. The student is asked about
queries and documents that it has not seen. With the teacher's scores shuffled there is nothing to
learn about the order, and the student must not seem to have learnt it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from rankdistill.losses.base import BatchLoss, ListLoss, Loss, Regulariser, VectorLoss
from rankdistill.recipe import build, method_class, method_names

QUERIES, DOCUMENTS, WIDTH = 64, 8, 6
STEPS, RATE = 60, 0.05
LEARNT, GUESSED = 0.6, 0.3  # Kendall's tau with the teacher on what was not seen
# A regulariser teaches no order; tests/losses/test_regularisers.py.
TEACHING = [name for name in method_names("loss") if not issubclass(method_class("loss", name), Regulariser)]
# Few iterations of Sinkhorn's scaling are enough here; what else losses can be set to is in test_list_losses.py.
SETTINGS: list[dict[str, Any]] = [
    {"type": name, **({"iterations": 5} if name == "sinkhorn" else {})} for name in TEACHING
]


class Planted:
    """Queries, their lists and a hidden teacher."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99))
        self.queries = torch.randn(QUERIES, WIDTH, generator=random)
        self.documents = torch.randn(QUERIES, DOCUMENTS, WIDTH, generator=random)
        self.scores = torch.einsum("qd,qnd->qn", self.queries @ self.hidden, self.documents)

    def shuffle(self, seed: int = 5) -> None:
        """The scores go to other documents of any list (within a list its mean would teach `mse`); what scores a whole
        batch, and the teacher's vectors, come from another matrix."""
        random = torch.Generator().manual_seed(seed)
        self.scores = self.scores.flatten()[torch.randperm(self.scores.numel(), generator=random)].view_as(self.scores)
        self.hidden = self.hidden[torch.randperm(WIDTH, generator=random)].flip(1)


def best_first(data: Planted) -> tuple[Tensor, Tensor, Tensor]:
    """Documents, scores and labels, what the teacher likes best first and labelled; the next one relevant too."""
    order = data.scores.argsort(dim=1, descending=True)
    labels = torch.full((QUERIES, DOCUMENTS), -1)
    labels[:, 0] = 2
    documents = data.documents.gather(1, order[:, :, None].expand(-1, -1, WIDTH))
    return documents, data.scores.gather(1, order), labels


def train(loss: Loss, data: Planted) -> Tensor:
    """The student's matrix after some steps on all lists."""
    documents, scores, labels = best_first(data)
    mask = torch.ones_like(scores, dtype=torch.bool)
    index = torch.arange(QUERIES * DOCUMENTS).reshape(QUERIES, DOCUMENTS)
    # A batch teacher's scores of every query with every document; of each query's own, those of its list.
    every = data.queries @ data.hidden @ documents.flatten(0, 1).T
    every = every.scatter(1, index, scores)
    student = (torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1).requires_grad_()
    optimiser = torch.optim.Adam([student], lr=RATE)
    for step in range(STEPS):
        loss.at_step(step, STEPS)
        vectors = data.queries @ student
        if isinstance(loss, ListLoss):
            value = loss(torch.einsum("qd,qnd->qn", vectors, documents), scores, labels, mask)
        elif isinstance(loss, BatchLoss):
            value = loss(vectors @ documents.flatten(0, 1).T, every, index, labels, mask)
        else:
            assert isinstance(loss, VectorLoss)
            value = loss(vectors, data.queries @ data.hidden)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return student.detach()


def agreement(loss: Loss, shuffled: bool = False) -> float:
    """Mean Kendall's tau of the trained student with the true teacher, on other queries and documents."""
    data, unseen = Planted(0), Planted(1)
    if shuffled:
        data.shuffle()
    scores = torch.einsum("qd,qnd->qn", unseen.queries @ train(loss, data), unseen.documents)
    taus = [kendalltau(ours, theirs).statistic for ours, theirs in zip(scores, unseen.scores, strict=True)]
    return float(np.mean(taus))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["type"])
def test_a_student_learns_to_rank_as_its_teacher_and_from_a_shuffled_one_nothing(settings: dict[str, Any]) -> None:
    assert agreement(build("loss", settings)) > LEARNT
    assert abs(agreement(build("loss", settings), shuffled=True)) < GUESSED
