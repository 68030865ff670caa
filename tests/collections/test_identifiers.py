"""Ids as numbers: equal where ids are, ordered as their bytes, whatever their length."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rankdistill.collections.identifiers import IdCodes, text_ids, text_keys
from rankdistill.errors import RankdistillError


def random_ids(random: np.random.Generator, count: int, longest: int, alphabet: str) -> list[str]:
    lengths = random.integers(1, longest + 1, count)
    return ["".join(random.choice(list(alphabet), length)) for length in lengths]


@pytest.mark.parametrize("longest", [1, 4, 8, 9, 20])
@pytest.mark.parametrize("alphabet", ["ab", "019", "aé", "x\U0001f600", "a\x01", "a\x00"])
def test_codes_are_equal_and_ordered_as_the_bytes_are(longest: int, alphabet: str) -> None:
    random = np.random.default_rng(longest)
    ids = random_ids(random, 300, longest, alphabet)
    array = pa.array(["before", *ids], pa.large_string())[1:]  # a slice does not begin at its buffer's first byte
    codes = IdCodes(array)
    rows = random.permutation(300)[:200]
    falling = codes.falling(rows).tolist()
    text = [ids[row].encode() for row in rows]
    for a, b in zip(range(0, 200, 2), range(1, 200, 2), strict=True):
        assert (falling[a] > falling[b]) == (text[a] < text[b])
        assert (codes.codes[rows[a]] == codes.codes[rows[b]]) == (text[a] == text[b])


@pytest.mark.parametrize("longest", [3, 12])
def test_repeated_ids_of_a_query_are_found_and_no_others(longest: int) -> None:
    random = np.random.default_rng(longest)
    for _ in range(50):
        ids = random_ids(random, 40, longest, "abcdefgh")
        queries = np.sort(random.integers(0, 8, 40)).astype(np.int32)
        seen: set[tuple[int, str]] = set()
        expected = sum((int(q), i) in seen or bool(seen.add((int(q), i))) for q, i in zip(queries, ids, strict=True))
        again = IdCodes(pa.array(ids, pa.large_string())).repeated(queries)
        assert len(again) == expected
        for row in again:
            earlier = [ids[other] for other in range(40) if other != row and queries[other] == queries[row]]
            assert ids[row] in earlier


def test_empty_ids_and_no_ids() -> None:
    assert IdCodes(pa.array([], pa.large_string())).codes.tolist() == []
    codes = IdCodes(pa.array(["", "a"], pa.large_string())).falling(np.array([0, 1]))
    assert codes[0] > codes[1]


def test_whole_numbers_become_their_digits_and_the_rest_is_refused() -> None:
    assert text_ids(pa.array([1, 20]), "here").to_pylist() == ["1", "20"]
    assert text_keys({1: {"a": 0.5}}, "here") == ({"1": {"a": 0.5}}, 1)
    with pytest.raises(RankdistillError, match="is a bool, not text"):
        text_keys({"q": {True: 1.0}}, "here")
