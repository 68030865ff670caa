"""Ids are text: whole numbers that other programs wrote are taken as their digits and counted, the rest is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankdistill.errors import RankdistillError


def text_ids(ids: pa.Array, where: str) -> pa.Array:
    """Ids as large_string: text without white space around it, as collections have it; whole numbers in digits.

    Raises:
        RankdistillError: they are of another type (numbers that are not whole, truth values).
    """
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_floating(ids.type):
        try:  # pandas makes floats of whole numbers where a cell was empty
            ids = ids.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise RankdistillError(f"ids are numbers that are not whole: {error}", where=where) from None
    kind = pa.types
    if not any(check(ids.type) for check in (kind.is_integer, kind.is_string, kind.is_large_string, kind.is_binary)):
        raise RankdistillError(f"ids are {ids.type}, not text", where=where, fix="write ids as text or whole numbers")
    return pc.utf8_trim_whitespace(ids.cast(pa.large_string()))


def text_keys(given: Mapping[Any, Mapping[Any, Any]], where: str) -> tuple[Mapping[str, Mapping[str, Any]], int]:
    """A run or qrels whose ids are text, and how many ids were whole numbers and are taken as their digits.

    Raises:
        RankdistillError: an id is of another type, or two are the same as text.
    """
    if set(map(type, given)) <= {str} and all(set(map(type, documents)) <= {str} for documents in given.values()):
        return given, 0
    numeric = 0
    made: dict[str, dict[str, Any]] = {}
    for query_id, documents in given.items():
        inner = {_as_text(doc_id, where): value for doc_id, value in documents.items()}
        if len(inner) < len(documents) or _as_text(query_id, where) in made:
            raise RankdistillError(
                f"ids of query {query_id!r} are the same as text", where=where, fix="write every id as text"
            )
        made[_as_text(query_id, where)] = inner
        numeric += (not isinstance(query_id, str)) + sum(not isinstance(doc_id, str) for doc_id in documents)
    return made, numeric


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value))
    raise RankdistillError(
        f"the id {value!r} is a {type(value).__name__}, not text", where=where, fix="write ids as text"
    )


class IdCodes:
    """Ids as numbers: `codes` [N] are equal where the ids are; `falling` has those that fall as ids rise.

    Ids of at most 8 bytes are packed into a number each, which costs a tenth of looking them up in a hash table.

    Args:
        ids: large_string without nulls.
    """

    def __init__(self, ids: pa.Array) -> None:
        packed = _packed(ids)
        self._dictionary: pa.Array | None = None
        if packed is None:
            encoded = ids.dictionary_encode()
            packed, self._dictionary = encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary
        self.codes: np.ndarray = packed

    def repeated(self, queries: np.ndarray) -> np.ndarray:
        """Rows [n] whose id an earlier row of their query has, by query; `queries` [N] are rising numbers."""
        # Within a query this makes no two ids the same; that two queries meet is next to impossible, and harmless.
        keys = np.sort(self.codes.astype(np.uint64) ^ (queries.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
        if not (keys[1:] == keys[:-1]).any():
            return np.zeros(0, np.int64)
        order = np.lexsort((self.codes, queries))
        codes, queries = self.codes[order], queries[order]
        return np.asarray(order[1:][(codes[1:] == codes[:-1]) & (queries[1:] == queries[:-1])])

    def falling(self, rows: np.ndarray) -> np.ndarray:
        """Numbers [n] of the ids at rows [n] that fall as the ids' UTF-8 bytes rise."""
        if self._dictionary is None:
            return np.asarray(~self.codes[rows])
        distinct, at = np.unique(self.codes[rows], return_inverse=True)  # each distinct id is compared once
        falling = np.empty(len(distinct), np.int64)
        by_id = pc.array_sort_indices(self._dictionary.take(pa.array(distinct)), order="descending")
        falling[by_id.to_numpy()] = np.arange(len(distinct))
        return falling[at]


def _packed(ids: pa.Array) -> np.ndarray | None:
    """Ids as uint64 [N] that are equal and ordered as their bytes; None where one is empty, longer or holds a NUL."""
    offsets = np.frombuffer(ids.buffers()[1], np.int64, len(ids) + 1, ids.offset * 8) if len(ids) else np.zeros(1)
    lengths = np.diff(offsets)
    if not len(ids) or lengths.max() > 8 or not lengths.min():
        return None
    text = np.zeros(int(offsets[-1] - offsets[0]) + 8, np.uint8)
    text[:-8] = np.frombuffer(ids.buffers()[2], np.uint8, len(text) - 8, int(offsets[0]))
    if not text[:-8].all():
        return None
    # Eight bytes from each id's first on, the first one highest; then those beyond its end are taken off.
    words = np.ndarray((len(text) - 7,), ">u8", text, 0, (1,))[offsets[:-1] - offsets[0]].astype(np.uint64)
    beyond = (64 - 8 * lengths).astype(np.uint64)
    return np.asarray(words >> beyond << beyond)
