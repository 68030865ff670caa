"""`score --budget` and `score --dry-run`: what language models may cost, and what they would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rankdistill.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from rankdistill.collections import Collection
    from rankdistill.scores.store import ScoreStore
    from rankdistill.teachers.base import Teacher


def limited(teacher: Teacher, budget: str | None) -> Teacher:
    """The teacher, held to a budget instead of its recipe's.

    Raises:
        UsageError: not a budget, or a teacher that asks no language model.
    """
    from rankdistill.teachers.llm.asking import AskingTeacher

    if budget is None:
        return teacher
    if not isinstance(teacher, AskingTeacher):
        raise UsageError(
            f"a teacher of type {teacher.type!r} asks no language model: there is nothing to limit",
            where="--budget",
            fix="leave it out",
        )
    try:
        teacher.asking.budget.set_limit(budget)
    except UsageError as error:
        raise UsageError(error.what, where="--budget", fix=error.fix) from None
    return teacher


def print_estimate(
    teacher: Teacher,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore,
) -> None:
    """What scoring these candidates would cost; nothing is asked and nothing is kept."""
    from rankdistill.teachers.llm.asking import AskingTeacher
    from rankdistill.teachers.scoring import dry_run, missing_pairs

    if isinstance(teacher, AskingTeacher):
        print("\n".join(dry_run(teacher, collection, candidates, store).lines()))
    else:
        pairs = missing_pairs(teacher, collection, candidates, store)
        print(f"{pairs:,} pairs to score; a teacher of type {teacher.type!r} asks no language model")
