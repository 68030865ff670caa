"""Fixtures of the quantisation tests; what they are made of is in planted.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from planted import Planted, planted


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On such small data threads only wait for each other."""
    import faiss
    import torch

    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="session")
def data() -> Planted:
    return planted()
