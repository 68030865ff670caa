"""The student's vectors beside a teacher's: of queries alone (a small encoder that searches the teacher's index), or of
queries and documents (a student that starts where its teacher stands)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal

from rankdistill.errors import RankdistillError
from rankdistill.losses.base import VectorLoss
from rankdistill.losses.schedules import Schedule


@dataclass(eq=False)
class QueryMSE(VectorLoss):
    """mean (q_s - q_t)^2 + cosine * (1 - cos(q_s, q_t)), mean over queries (ScalingNote, Huang et al. 2024,
    arXiv:2411.15766); no documents, no labels. 0 for a perfect student.

    The first mean is over dimensions too: for unit vectors of d dimensions it is 2 / d of what the cosine gives.

    Args:
        cosine: share of the cosine's part.
    """

    type = "query_mse"
    sides = ("query",)
    cosine: Schedule = 1.0

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_widths(self.type, student, teacher)
        return (student - teacher).square().mean() + self.now(self.cosine) * _apart(student, teacher)


@dataclass(eq=False)
class VectorMSE(VectorLoss):
    """|v_s - v_t|^2 + cosine * (1 - cos(v_s, v_t)), mean over texts, of queries and of documents (EmbedDistill, Kim et
    al. 2023, arXiv:2301.12005; LEAF, Vujanic and Rueckstiess 2025, arXiv:2509.12539); no labels. 0 for a perfect
    student.

    A student of another width than its teacher is compared through a linear map that is trained along and left behind.
    It stays orthogonal: where the student is narrower, it has its vectors' inner products on both sides of the map.

    Args:
        cosine: share of the cosine's part.
    """

    type = "vector_mse"
    sides = ("query", "document")
    cosine: Schedule = 1.0

    def __post_init__(self) -> None:
        self.projection: nn.Module = nn.Identity()

    def fit(self, student: int, teacher: int) -> None:
        if student != teacher:
            self.projection = orthogonal(nn.Linear(student, teacher, bias=False))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student = self.projection(student)
        _check_widths(self.type, student, teacher)
        square = (student - teacher).square().sum(dim=-1).mean()
        return square + self.now(self.cosine) * _apart(student, teacher)


def _check_widths(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim != 2:
        raise RankdistillError(
            f"the student's vectors have {student.shape[-1]} dimensions, the teacher's {teacher.shape[-1]}"
            if student.ndim == 2
            else "the student has one vector a token, and this loss compares one a text",
            where=f"training.losses: {name}",
            fix="give the student a projection to the teacher's width, or take a loss over lists",
        )


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos, as half the squared distance of the unit vectors: exactly 0 where they are equal."""
    apart = functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)
    return apart.square().sum(dim=-1).mean() / 2
