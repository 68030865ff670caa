"""LambdaLoss against sentence-transformers' and against a loop, and LambdaRank as its special case."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from sentence_transformers.cross_encoder import losses as reference
from torch import Tensor, nn

from rankdistill.losses.lambda_loss import LambdaLoss
from rankdistill.losses.ranknet import RankNet


def batch(lists: int = 6, documents: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, documents, generator=random, dtype=torch.float64) * 3
    labels = torch.randint(0, 4, (lists, documents), generator=random)
    return student, teacher, labels, torch.ones(lists, documents, dtype=torch.bool)


class _Scored(nn.Module):
    """A cross-encoder that gives the scores it was made with: what the reference needs of a model."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores.flatten()

    def preprocess(self, pairs: list[Any], **_: Any) -> dict[str, Tensor]:
        return {"rows": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self.scores[features["rows"]]}


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("weighting", ["ndcg2", "ndcg2++"])
def test_it_equals_sentence_transformers(weighting: Literal["ndcg2", "ndcg2++"], k: int | None) -> None:
    student, _, labels, mask = batch()
    documents = [[str(row * 5 + column) for column in range(5)] for row in range(6)]
    scheme = reference.NDCGLoss2Scheme() if weighting == "ndcg2" else reference.NDCGLoss2PPScheme(mu=7.0)
    other = reference.LambdaLoss(_Scored(student), scheme, k=k, sigma=2.0)
    expected = other([["query"] * 6, documents], list(labels.float())).item()
    loss = LambdaLoss("labels", weighting, mu=7.0, k=k, temperature=0.5)
    assert loss(student, student * 0, labels, mask).item() == pytest.approx(expected, rel=1e-5)
    assert loss.needs_labels and not loss.needs_teacher


def slow(student: Tensor, teacher: Tensor, mask: Tensor, mu: float) -> float:
    """NDCG-Loss2++ with the gain 1 / (the teacher's rank), pair by pair, in Python's double precision."""
    total, pairs = 0.0, 0
    for s, t, m in zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True):
        here = [place for place, kept in enumerate(m) if kept]

        def ranks(scores: list[float], here: list[int] = here) -> dict[int, int]:
            return {i: rank for rank, i in enumerate(sorted(here, key=lambda i: (-scores[i], i)), start=1)}

        wanted, now = ranks(t), ranks(s)
        ideal = sum(1 / wanted[i] / math.log2(1 + wanted[i]) for i in here)
        for i in here:
            for j in here:
                if t[i] > t[j]:
                    gain = abs(1 / wanted[i] - 1 / wanted[j]) / ideal
                    apart = abs(now[i] - now[j])
                    bound = 1 / math.log2(1 + apart) - 1 / math.log2(2 + apart)
                    swap = abs(1 / math.log2(1 + now[i]) - 1 / math.log2(1 + now[j]))
                    total += gain * (mu * bound + swap) * math.log2(1 + math.exp(s[j] - s[i]))
                    pairs += 1
    return total / pairs


def test_gains_from_the_teachers_ranks_equal_the_definition() -> None:
    student, teacher, labels, mask = batch()
    teacher[2, 1] = teacher[2, 3]  # a tie is no pair
    mask[1, 3:] = False
    mask[3, :2] = False
    loss = LambdaLoss(mu=3.0)(student, teacher, labels, mask).item()
    assert loss == pytest.approx(slow(student, teacher, mask, 3.0), rel=1e-12)
    assert LambdaLoss().needs_teacher and not LambdaLoss().needs_labels


def test_without_ndcg2_it_is_lambdarank_up_to_the_mean() -> None:
    student, teacher, labels, mask = batch(lists=1)
    ours, _ = LambdaLoss(mu=0.0).terms(student, teacher, labels, mask)
    theirs, _ = RankNet("ndcg").terms(student, teacher, labels, mask)
    torch.testing.assert_close(ours * math.log(2), theirs)


def test_it_bounds_what_is_lost_in_ndcg() -> None:
    """The theorem behind it: the sum over pairs of NDCG-Loss2 is at least 1 - nDCG."""
    for seed in range(20):
        student, _, labels, mask = batch(seed=seed)
        sums, _ = LambdaLoss("labels", "ndcg2").terms(student, student, labels, mask)
        for loss, s, y in zip(sums.tolist(), student.tolist(), labels.tolist(), strict=True):
            found = sorted(range(5), key=lambda i: -s[i])
            dcg, ideal = (
                sum((2 ** y[i] - 1) / math.log2(2 + place) for place, i in enumerate(order))
                for order in (found, sorted(range(5), key=lambda i: -y[i]))
            )
            if ideal:
                assert loss >= 1 - dcg / ideal - 1e-12


def test_unjudged_documents_have_no_gain() -> None:
    student, teacher, labels, mask = batch()
    unjudged = torch.where(labels == 0, -1, labels)
    both = [LambdaLoss("labels")(student, teacher, one, mask).item() for one in (labels, unjudged)]
    assert both[0] == both[1] > 0
