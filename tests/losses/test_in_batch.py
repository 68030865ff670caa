"""The in-batch term of dual supervision against its definition, document by document, and its traps."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from rankdistill.losses.in_batch import InBatchMarginMSE


class Batch:
    """5 lists of up to 4 documents: shared ones, unequal lengths, one list without a positive."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.index = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 0], [6, 1, 7, 0], [8, 9, 10, 0], [11, 12, 4, 13]])
        self.mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
        self.labels = torch.where(self.mask, torch.tensor([2, -1, 0, 1]), -1)
        self.labels[3, 0] = 0
        self.student = torch.randn(5, 14, generator=random, dtype=dtype) * 3
        self.teacher = torch.randn(5, 14, generator=random, dtype=dtype) * 5

    def loss(self, student: Tensor | None = None, teacher: Tensor | None = None) -> Tensor:
        student = self.student if student is None else student
        teacher = self.teacher if teacher is None else teacher
        return InBatchMarginMSE()(student, teacher, self.index, self.labels, self.mask)


def slow(batch: Batch) -> float:
    """Every i, j and document of j, in Python's double precision."""
    s, t = batch.student.tolist(), batch.teacher.tolist()
    lists = [
        [column for column, kept in zip(columns, mask, strict=True) if kept]
        for columns, mask in zip(batch.index.tolist(), batch.mask.tolist(), strict=True)
    ]
    positive = [bool(labels[0] > 0) for labels in batch.labels.tolist()]
    against_positives, against_negatives = [], []
    for i, own in enumerate(lists):
        if not positive[i]:
            continue
        for j, other in enumerate(lists):
            for place, column in enumerate(other):
                if i == j or column in own:
                    continue
                error = ((s[i][own[0]] - s[i][column]) - (t[i][own[0]] - t[i][column])) ** 2
                (against_positives if place == 0 and positive[j] else against_negatives).append(error)
    return 0.5 * sum(sum(errors) / len(errors) if errors else 0.0 for errors in (against_positives, against_negatives))


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_the_definition(seed: int) -> None:
    batch = Batch(seed=seed)
    assert batch.loss().item() == pytest.approx(slow(batch), rel=1e-12)


def test_of_pairs_it_is_the_formula_of_the_paper() -> None:
    """One positive and one negative a query, no document shared: two means over all i and j != i."""
    random = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 12, generator=random, dtype=torch.float64) for _ in range(2))
    index, labels = torch.arange(12).view(6, 2), torch.tensor([[1, 0]] * 6)
    loss = InBatchMarginMSE()(student, teacher, index, labels, torch.ones(6, 2, dtype=torch.bool))
    wanted = 0.0
    for side in (0, 1):
        s, t = student[:, side::2], teacher[:, side::2]
        margins = [(student[:, ::2].diagonal()[:, None] - s), (teacher[:, ::2].diagonal()[:, None] - t)]
        others = ~torch.eye(6, dtype=torch.bool)
        wanted += 0.5 * torch.nn.functional.mse_loss(margins[0][others], margins[1][others]).item()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)


def test_gradients() -> None:
    batch = Batch()
    assert torch.autograd.gradcheck(batch.loss, batch.student.requires_grad_())


def test_a_perfect_student_has_no_loss() -> None:
    batch = Batch(torch.float32)
    student = batch.teacher.clone().requires_grad_()
    loss = batch.loss(student)
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_it_does_not_see_a_shift_within_a_query_and_sees_the_scale() -> None:
    batch = Batch()
    before = batch.loss().item()
    shift = torch.arange(5, dtype=torch.float64)[:, None] * 10 - 20
    assert batch.loss(teacher=batch.teacher + shift).item() == pytest.approx(before, rel=1e-12)
    assert batch.loss(student=batch.student + shift).item() == pytest.approx(before, rel=1e-12)
    assert batch.loss(teacher=batch.teacher * 2).item() != pytest.approx(before, rel=0.01)


def test_own_and_padded_documents_have_no_say() -> None:
    """Scores of a query's own negatives, of what stands in padding, and of lists without a positive, change nothing."""
    batch = Batch()
    batch.student.requires_grad_()
    batch.loss().backward()
    assert batch.student.grad is not None
    seen = batch.student.grad != 0
    assert not seen[0, 1:4].any()  # own negatives; 1 is a negative of list 2 too
    assert not seen[1, 5] and seen[1, 0]  # column 0 stands in list 1's padding: it is list 0's document all the same
    assert not seen[3].any()  # no positive, no i ...
    assert seen[[0, 1, 2, 4]][:, 8:11].all()  # ... but its documents are the others' negatives


def test_a_document_shared_as_positive_is_no_negative_of_itself() -> None:
    """Two queries with the same positive and the same negative: nothing is left to compare."""
    index, labels = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 0], [1, 0]])
    student = torch.randn(2, 2, requires_grad=True)
    loss = InBatchMarginMSE()(student, torch.zeros(2, 2), index, labels, torch.ones(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("what", ["one list", "no positives", "all padding"])
def test_nothing_to_learn_is_zero_with_a_gradient(what: str) -> None:
    lists = 1 if what == "one list" else 3
    index = torch.arange(lists * 2).view(lists, 2)
    labels = torch.tensor([[1, 0]] * lists) if what != "no positives" else torch.zeros(lists, 2, dtype=torch.int64)
    mask = torch.full((lists, 2), what != "all padding")
    student = torch.randn(lists, lists * 2, requires_grad=True)
    loss = InBatchMarginMSE()(student, torch.zeros_like(student), index, labels, mask)
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_the_order_of_lists_and_columns_does_not_matter() -> None:
    batch = Batch()
    before = batch.loss().item()
    random = torch.Generator().manual_seed(5)
    rows, columns = torch.randperm(5, generator=random), torch.randperm(14, generator=random)
    batch.student, batch.teacher = batch.student[rows][:, columns], batch.teacher[rows][:, columns]
    batch.index = columns.argsort()[batch.index[rows]]
    batch.labels, batch.mask = batch.labels[rows], batch.mask[rows]
    assert batch.loss().item() == pytest.approx(before, rel=1e-12)


def test_its_share_is_the_published_one() -> None:
    loss = InBatchMarginMSE()
    assert loss.weight == 0.75 and loss.needs_batch_teacher and loss.needs_labels


def learned_agreement(shuffled: bool) -> float:
    """Kendall's tau with a planted teacher over documents never seen, after learning from in-batch margins alone."""
    random = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(400, 8, generator=random) for _ in range(2))
    truth = torch.randn(8, 8, generator=random)
    student = torch.nn.Parameter(torch.randn(8, 8, generator=random) * 0.1)
    optimiser = torch.optim.Adam([student], lr=0.03)
    labels, mask = torch.tensor([[1, 0]] * 16), torch.ones(16, 2, dtype=torch.bool)
    for _ in range(250):
        rows, columns = (torch.randperm(300, generator=random)[:count] for count in (16, 32))
        teacher = queries[rows] @ truth @ documents[columns].T
        if shuffled:
            teacher = teacher.flatten()[torch.randperm(teacher.numel(), generator=random)].view_as(teacher)
        scores = queries[rows] @ student @ documents[columns].T
        loss = InBatchMarginMSE()(scores, teacher, torch.arange(32).view(16, 2), labels, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        left, right = (queries[300:] @ matrix @ documents[300:].T for matrix in (student, truth))
    return float(sum(kendalltau(a, b).statistic for a, b in zip(left, right, strict=True)) / len(left))


def test_a_student_learns_the_batch_teachers_order() -> None:
    assert learned_agreement(shuffled=False) > 0.9
    assert learned_agreement(shuffled=True) < 0.4
