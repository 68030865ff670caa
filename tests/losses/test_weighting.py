"""Weights of lists: their defining order, their mean, what has no weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankdistill.errors import RankdistillError
from rankdistill.losses.divergence import KLDivergence
from rankdistill.losses.schedules import Ramp
from rankdistill.losses.weighting.base import Agreement, Confidence, Difficulty, Weighting
from rankdistill.recipe import build, method_names

WEIGHTINGS: dict[str, Weighting] = {
    "entropy": Difficulty(),
    "loss": Difficulty("loss", temperature=2.0),
    "confidence": Confidence(temperature=2.0),
    "margin": Confidence("margin", power=2.0),
    "agreement": Agreement(2.0),
}


def batch(lists: int = 6, documents: int = 5, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, lists, documents, generator=random) * 3
    return {
        "student_scores": student,
        "teacher_scores": teacher,
        "labels": torch.full((lists, documents), -1),
        "mask": torch.ones(lists, documents, dtype=torch.bool),
        "disagreement": torch.rand(lists, documents, generator=random),
    }


def test_recipes_know_them() -> None:
    assert set(method_names("weighting")) == {"difficulty", "confidence", "agreement"}
    made = build("weighting", {"type": "difficulty", "power": {"start": -1.0, "end": 1.0}})
    made.at_step(75, 100)
    assert made.now(made.power) == 0.5


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_have_mean_one_and_no_gradient(name: str) -> None:
    values = batch()
    values["student_scores"].requires_grad_()
    weights = WEIGHTINGS[name](**values)
    assert weights.shape == (6,) and not weights.requires_grad and (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-5)
    assert weights.max() - weights.min() > 0.05
    filler = {"labels": 1, "mask": 0, "disagreement": 1e6, "student_scores": 1e4, "teacher_scores": 1e4}
    wide = {
        key: torch.cat([value, torch.full((6, 3), filler[key]).to(value.dtype)], dim=1) for key, value in values.items()
    }
    torch.testing.assert_close(WEIGHTINGS[name](**wide), weights)  # padding changes none


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_lists_alike_have_weights_alike_and_nothing_to_weigh_is_no_nan(name: str) -> None:
    values = {key: value[:1].expand(6, 5) for key, value in batch().items()}
    torch.testing.assert_close(WEIGHTINGS[name](**values), torch.ones(6))
    for key, value in (("student_scores", 2.0), ("teacher_scores", 2.0), ("disagreement", 0.0)):
        values[key] = torch.full((6, 5), value)
    torch.testing.assert_close(WEIGHTINGS[name](**values), torch.ones(6))
    one = {key: value[:, :1] for key, value in batch().items()}
    assert WEIGHTINGS[name](**one).isfinite().all()


def test_the_student_weighs_what_it_is_unsure_of() -> None:
    values = batch(lists=3, documents=4)
    values["student_scores"] = torch.tensor([[9.0, 0, 0, 0], [2.0, 0, 0, 0], [0.0, 0, 0, 0]])
    sure, half, unsure = Difficulty()(**values).tolist()
    assert sure < half < unsure
    # Exactly: the entropy, here of the even list log 4.
    entropy = torch.distributions.Categorical(logits=values["student_scores"]).entropy()
    torch.testing.assert_close(Difficulty()(**values), (entropy / entropy.mean()))
    # Long lists are no harder than short ones.
    values["student_scores"] = torch.zeros(3, 4)
    values["mask"][0, 2:] = False
    torch.testing.assert_close(Difficulty()(**values), torch.ones(3))


def test_what_is_learnt_recedes() -> None:
    values = batch()
    before = Difficulty("loss")(**values)
    hardest = int(before.argmax())
    assert before[hardest] > 1
    values["student_scores"][hardest] = values["teacher_scores"][hardest]
    after = Difficulty("loss")(**values)
    assert after[hardest] == after.min() < 0.05
    # The loss it weighs by is the KL divergence.
    rest = (values["labels"], values["mask"])
    losses, _ = KLDivergence().terms(values["student_scores"], values["teacher_scores"], *rest)
    torch.testing.assert_close(after, losses.clamp(min=1e-3) / losses.clamp(min=1e-3).mean())


def test_a_power_below_zero_puts_easy_lists_first() -> None:
    values = batch()
    curriculum = Difficulty("loss", power=Ramp(start=-1.0, end=1.0))
    curriculum.at_step(0, 10)
    easy = curriculum(**values)
    curriculum.at_step(10, 10)
    hard = curriculum(**values)
    assert easy.argsort().tolist() == hard.argsort(descending=True).tolist()
    curriculum.at_step(5, 10)
    torch.testing.assert_close(curriculum(**values), torch.ones(6))


@pytest.mark.parametrize("by", ["entropy", "margin"])
def test_a_sure_teacher_counts_more(by: Any) -> None:
    values = batch(lists=3, documents=4)
    values["teacher_scores"] = torch.tensor([[9.0, 0, 0, 0], [2.0, 0, 0, 0], [1.0, 1, 1, 1]])
    sure, half, unsure = Confidence(by)(**values).tolist()
    assert sure > half > unsure == pytest.approx(0.0, abs=1e-6)
    if by == "margin":
        best = values["teacher_scores"].softmax(1).sort(dim=1, descending=True).values
        expected = best[:, 0] - best[:, 1]
        torch.testing.assert_close(Confidence(by)(**values), expected / expected.mean())


def test_lists_that_teachers_agree_on_count_more() -> None:
    values = batch(lists=3, documents=2)
    values["disagreement"] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    weights = Agreement(1.0)(**values)
    expected = torch.tensor([0.0, -1.0, -2.0]).exp()
    torch.testing.assert_close(weights, expected / expected.mean())
    # In another unit they are the same; what is not known is the mean one.
    unknown = float("nan")
    for other in (values["disagreement"] * 100, torch.tensor([[0.0, unknown], [unknown, unknown], [2.0, 2.0]])):
        torch.testing.assert_close(Agreement(1.0)(**{**values, "disagreement": other}), weights)


def test_lists_without_that_column_are_refused() -> None:
    values: dict[str, Any] = {**batch(), "disagreement": None}
    with pytest.raises(RankdistillError, match="disagree") as error:
        Agreement()(**values)
    assert "ensemble" in str(error.value) and Agreement.needs_disagreement
