from __future__ import annotations

import numpy as np
import pytest

from rankdistill.errors import UsageError
from rankdistill.students.token_batches import token_budget_batches


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("max_rows", [None, 5])
def test_batches_hold_every_text_once_within_the_budget_longest_first(multiple: int, max_rows: int | None) -> None:
    lengths = np.random.default_rng(0).integers(0, 300, 500)
    batches = token_budget_batches(lengths, 2000, max_rows, multiple)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    widths = [int(-(-lengths[batch].max() // multiple) * multiple) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(width * len(batch) <= 2000 for width, batch in zip(widths, batches, strict=True))
    assert max_rows is None or max(map(len, batches)) <= max_rows
    padded = sum(width * len(batch) for width, batch in zip(widths, batches, strict=True))
    assert padded < 1.1 * lengths.sum()


def test_a_text_longer_than_the_budget_is_alone() -> None:
    assert [batch.tolist() for batch in token_budget_batches(np.array([5, 500, 5]), 10)] == [[1], [0, 2]]
    assert token_budget_batches(np.array([], dtype=int), 10) == []
    with pytest.raises(UsageError):
        token_budget_batches(np.array([1]), 0)
