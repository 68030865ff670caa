"""A look at the first batch: each misfit is told with its cause, its number and its fix; what fits is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankdistill.losses.base import Loss
from rankdistill.losses.checks import check_scale
from rankdistill.losses.contrastive import InfoNCE
from rankdistill.losses.divergence import TAID, KLDivergence, ListNet
from rankdistill.losses.margin_mse import MarginMSE, PointwiseMSE
from rankdistill.losses.pairwise import RankNet
from rankdistill.losses.plackett_luce import PLD
from rankdistill.losses.schedules import Ramp
from rankdistill.losses.transport import Sinkhorn


def scores(low: float, high: float, seed: int = 0) -> Tensor:
    """16 lists of 8, each from low to high."""
    values = torch.rand(16, 8, generator=torch.Generator().manual_seed(seed))
    values = (values - values.amin(1, keepdim=True)) / (values.amax(1, keepdim=True) - values.amin(1, keepdim=True))
    return low + (high - low) * values


def told(
    student: Tensor, teacher: Tensor, loss: Loss, similarity: str = "dot", scale: float = 1.0, learn: bool = False
) -> str:
    losses = {"one": loss}
    return "\n".join(check_scale(student, teacher, losses, similarity, scale=scale, learn_scale=learn))


LOGITS, DOTS, COSINES, PROBABILITIES = scores(-9, 7), scores(60, 80, 1), scores(0.1, 0.7, 2), scores(0.01, 0.98, 3)


def test_what_fits_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    for loss in (MarginMSE(), PointwiseMSE(), KLDivergence(), ListNet(), TAID(), Sinkhorn(), RankNet(), PLD()):
        assert told(DOTS, LOGITS, loss) == ""
        assert told(COSINES * 20, LOGITS, loss, "cos", 20.0) == ""
    assert told(COSINES, COSINES.flip(0), MarginMSE(), "cos") == ""  # cosines from cosines
    assert told(COSINES * 20, PROBABILITIES, KLDivergence(1.0, 0.1), "cos", 20.0) == ""
    assert capsys.readouterr().err == ""


def test_a_cosine_student_that_cannot_reach_the_margins_is_told_its_scale(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(COSINES, LOGITS, MarginMSE(), "cos")
    assert "margins go up to 16" in text and "reaches 2 at most" in text
    assert "student.scale to 16" in text and "learn_scale" in text and "similarity: dot" in text
    assert f"warning: {text}\n" == capsys.readouterr().err
    assert told(COSINES * 20, LOGITS, MarginMSE(), "cos", 20.0) == ""
    assert told(COSINES * 2, LOGITS, MarginMSE(), "cos", 2.0, learn=True) == ""


def test_probabilities_under_a_margin_loss_of_a_dot_product_student() -> None:
    for loss in (MarginMSE(), MarginMSE("all_pairs"), PointwiseMSE()):
        text = told(DOTS, PROBABILITIES, loss)
        assert "between 0.01 and 0.98 (probabilities?)" in text and "logits" in text
        assert "by about 21" in text  # 20 / 0.97
        assert told(DOTS, LOGITS, loss) == ""
    assert "(cosines?)" in told(DOTS, PROBABILITIES - 0.5, MarginMSE())


def test_a_student_of_tiny_scores_under_a_margin_loss() -> None:
    """Normalised vectors compared by dot product: nothing says `cos`, the scores do."""
    text = told(COSINES, LOGITS, MarginMSE(), "dot")
    assert "spans 16" in text and "student.scale to about 27 times" in text  # 16 / 0.6


def test_probabilities_under_a_softmax_are_flat() -> None:
    for loss in (KLDivergence(), TAID(), Sinkhorn()):
        text = told(COSINES * 20, scores(0.5, 0.9), loss, "cos", 20.0)
        assert "is flat" in text and "(probabilities?)" in text and "teacher_temperature to about 0.08" in text
    assert "set temperature to about 0.08" in told(COSINES * 20, scores(0.5, 0.9), ListNet(), "cos", 20.0)


def test_a_temperature_so_small_that_float32_underflows() -> None:
    for loss in (KLDivergence(1.0, 0.1), ListNet(0.1), PLD(teacher_temperature=0.1)):
        text = told(DOTS, LOGITS, loss)
        assert "160 times" in text and "temperature to about 1.6" in text
    # Also where a ramp ends there.
    assert "160 times" in told(DOTS, LOGITS, KLDivergence(1.0, Ramp(start=1.0, end=0.1)))
    assert told(DOTS, LOGITS, KLDivergence(1.0, 0.2)) == ""


def test_one_side_normalised_and_the_other_not() -> None:
    text = told(COSINES * 1.0, LOGITS, KLDivergence(), "cos")
    assert "reaches 2 at most" in text and "student.scale to 16" in text
    assert "one softmax is sharp where the other is flat" in told(COSINES, LOGITS, KLDivergence(), "dot")
    assert "one softmax is sharp" in told(DOTS * 10, LOGITS, KLDivergence(), "dot")


def test_teachers_that_say_nothing_are_told() -> None:
    teacher = LOGITS.clone()
    teacher[:10] = 3.0
    text = told(DOTS, teacher, RankNet())
    assert "alike in 62% of the first batch's lists" in text
    assert "100%" in told(DOTS, torch.full((16, 8), 2.0), MarginMSE())


def test_what_no_loss_reads_is_not_looked_at() -> None:
    assert told(COSINES, LOGITS * 1000, InfoNCE(), "cos") == ""
    assert "margins" not in told(COSINES, LOGITS * 1000, RankNet(), "cos")
    assert check_scale(COSINES[:, :1], LOGITS[:, :1], {"one": MarginMSE()}, "cos") == []  # lists of one document


def test_padding_is_not_looked_at() -> None:
    mask = torch.ones(16, 10, dtype=torch.bool)
    mask[:, 8:] = False
    student, teacher = (torch.cat([one, torch.full((16, 2), 1e6)], dim=1) for one in (DOTS, LOGITS))
    losses: dict[str, Loss] = {"margin_mse": MarginMSE(), "kl": KLDivergence()}
    assert check_scale(student, teacher, losses, "dot", mask=mask) == []
