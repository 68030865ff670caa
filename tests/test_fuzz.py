"""A short fuzz of what reads what people and other programs write; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

import time

import pytest
from fuzz import attempt, load_targets

SECONDS = 2.0  # a target; the seeds are the same in each run, and a fast machine gets further
INPUTS = 300


@pytest.mark.parametrize("name", sorted(load_targets()))
def test_what_is_fed_is_taken_or_refused_with_words(name: str) -> None:
    attempt(name, 0)  # imports
    end = time.process_time() + SECONDS
    for seed in range(INPUTS):
        wrong = attempt(name, seed)
        assert wrong is None, f"python -m tests.fuzz --only {name} --seed {seed}\n{wrong}"
        if time.process_time() > end:
            break
