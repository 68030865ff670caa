"""The student's query vectors beside a teacher's, for a small query encoder that searches the teacher's index."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from rankdistill.errors import RankdistillError
from rankdistill.losses.base import QueryLoss
from rankdistill.losses.schedules import Schedule


class QueryMSE(QueryLoss):
    """mean (q_s - q_t)^2 + cosine * (1 - cos(q_s, q_t)), mean over queries (ScalingNote, Huang et al. 2024,
    arXiv:2411.15766); no documents, no labels. 0 for a perfect student.

    The first mean is over dimensions too: for unit vectors of d dimensions it is 2 / d of what the cosine gives.

    Args:
        cosine: share of the cosine's part.
        weight: share in a sum of losses.
    """

    type = "query_mse"
    needs_teacher = False

    def __init__(self, cosine: Schedule = 1.0, weight: Schedule = 1.0) -> None:
        super().__init__(weight)
        self.cosine = cosine

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise RankdistillError(
                f"the student's query vectors have {student.shape[-1]} dimensions, the teacher's {teacher.shape[-1]}",
                where="training.losses: query_mse",
                fix="give the student a projection to the teacher's width",
            )
        square = (student - teacher).square().mean()
        # 1 - cos as half the squared distance of the unit vectors: exactly 0 where they are equal.
        apart = functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)
        return square + self.now(self.cosine) * apart.square().sum(dim=-1).mean() / 2
