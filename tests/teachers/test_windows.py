from __future__ import annotations

import pytest

from rankdistill.errors import UsageError
from rankdistill.teachers.listwise import windows


def test_the_published_setting_takes_nine_calls() -> None:
    plan = windows(100, 20, 10)
    assert plan == [(start, start + 20) for start in range(80, -1, -10)]
    assert len(plan) == 9


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, []),
        (2, [(0, 2)]),
        (19, [(0, 19)]),  # n < window
        (20, [(0, 20)]),  # n = window
        (21, [(1, 21), (0, 20)]),
        (25, [(5, 25), (0, 20)]),  # n no multiple of the step: the last window is as wide as the others
        (34, [(14, 34), (4, 24), (0, 20)]),
    ],
)
def test_short_and_odd_lists(count: int, expected: list[tuple[int, int]]) -> None:
    assert windows(count, 20, 10) == expected
    assert windows(count, 20, 10, passes=3) == expected * 3


@pytest.mark.parametrize(
    ("count", "size", "step"), [(n, s, t) for n in (2, 7, 30) for s in (2, 5, 9) for t in (1, 2, 5)]
)
def test_every_document_is_seen_and_windows_go_to_the_front(count: int, size: int, step: int) -> None:
    if step > size:
        return
    plan = windows(count, size, step)
    assert set().union(*(range(*window) for window in plan)) == set(range(count))
    assert plan[0][1] == count and plan[-1][0] == 0
    assert all(end - start == min(size, count) for start, end in plan)
    assert [start for start, _ in plan] == sorted({start for start, _ in plan}, reverse=True)


@pytest.mark.parametrize(("size", "step", "passes"), [(1, 1, 1), (4, 0, 1), (4, 5, 1), (4, 2, 0)])
def test_windows_that_cannot_be_are_refused(size: int, step: int, passes: int) -> None:
    with pytest.raises(UsageError):
        windows(10, size, step, passes)
