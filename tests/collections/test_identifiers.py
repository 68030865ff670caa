"""Ids are text: whole numbers are taken as their digits, the rest is refused."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rankdistill.collections.identifiers import text_ids, text_keys
from rankdistill.errors import RankdistillError


def test_whole_numbers_become_their_digits_and_the_rest_is_refused() -> None:
    assert text_ids(pa.array([1, 20]), "here").to_pylist() == ["1", "20"]
    assert text_keys({1: {"a": 0.5}}, "here") == ({"1": {"a": 0.5}}, 1)
    with pytest.raises(RankdistillError, match="is a bool, not text"):
        text_keys({"q": {True: 1.0}}, "here")
