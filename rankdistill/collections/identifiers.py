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
