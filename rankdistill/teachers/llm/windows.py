"""Sliding windows: how a list longer than a prompt is ordered (RankGPT, Sun et al. 2023, arXiv:2304.09542).

The windows go from the end of the list to its beginning. Each is put in order, and its best documents lie in the next
one too, so that a good document travels to the front however deep it began.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import TypeVar

from rankdistill.errors import UsageError

T = TypeVar("T")


def windows(count: int, size: int, step: int, passes: int = 1) -> list[tuple[int, int]]:
    """Ranges [start, end) of a list of `count`, in the order in which they are asked.

    100 documents, size 20 and step 10 are 9 windows a pass. Each window holds `size` documents (or all, where there
    are fewer), the last one of a pass too: it reaches further back where `count` is not a multiple of `step`. A list
    that fits one window is one window a pass; none of no documents, and none of a single one, which needs no asking.

    Raises:
        UsageError: a size below 2, a step above the size (documents would be left out) or below 1, no pass.
    """
    if size < 2:
        raise UsageError(f"a window of {size} documents orders nothing", where="teacher.window", fix="at least 2")
    if not 1 <= step <= size:
        raise UsageError(
            f"a step of {step} does not fit a window of {size}", where="teacher.step", fix=f"1 to {size}, half is usual"
        )
    if passes < 1:
        raise UsageError(f"{passes} passes", where="teacher.passes", fix="at least 1")
    if count < 2:
        return []
    width = min(size, count)
    starts = [*range(count - width, 0, -step), 0]
    return [(start, start + width) for start in starts] * passes


def reorder(order: MutableSequence[T], start: int, permutation: Sequence[int]) -> None:
    """Put the window that begins at `start` in the order of `permutation` (places within the window, best first)."""
    window = order[start : start + len(permutation)]
    order[start : start + len(permutation)] = [window[place] for place in permutation]
