"""Scores made elsewhere: readers of the formats they are published in.

| format  | a line |
|---|---|
| tsv     | query_id, doc_id, score; a header is one whose last column says so |
| triples | score⁺, score⁻, query_id, id⁺, id⁻ (the published Margin-MSE files) |
| trec    | a TREC run: its score is the teacher's |
| jsonl   | query, pos, neg, pos_scores, neg_scores (sentence-transformers and BGE), by id or by text |
| parquet | query_id, doc_id, score: what `rankdistill score --out` wrote, with its fingerprints |

Text files may be gzipped. A line that cannot be read, and a NaN or infinite score, is an error naming file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from rankdistill.collections.text_files import (
    identifier,
    is_header,
    odd_columns,
    read_json_lines,
    read_lines,
    split_columns,
    to_number,
)
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.runs import iter_run
from rankdistill.scores.store import read_part

Format = Literal["auto", "tsv", "triples", "trec", "jsonl", "parquet"]
FORMATS = get_args(Format)[1:]  # without auto
FLOAT32 = float(np.finfo(np.float32).max)


class ForeignScore(NamedTuple):
    """One recorded score; `query` and `document` are ids, or texts where `by_text` says so."""

    query: str
    document: str
    score: float
    by_text: bool = False


def iter_foreign(
    path: str | Path, format: Format = "auto", collection_fingerprint: str | None = None
) -> Iterator[ForeignScore]:
    """Stream the scores of a file, in its order; memory does not grow with it.

    Raises:
        RankdistillError: a bad line (file and line named), or a file that carries another collection's fingerprint.
    """
    path = Path(path)
    if not path.is_file():
        raise RankdistillError("there is no score file here", where=str(path))
    kind = detect_format(path) if format == "auto" else format
    if kind == "trec":
        for query_id, doc_ids, scores in iter_run(path):
            for doc_id, score in zip(doc_ids, scores.tolist(), strict=True):
                yield ForeignScore(query_id, doc_id, score)
    elif kind == "parquet":
        own = {"collection": collection_fingerprint} if collection_fingerprint else None
        table = read_part(path, own, fix="give a Parquet file with the columns query_id, doc_id and score")
        for batch in table.to_batches(max_chunksize=65_536):
            columns = batch.to_pydict()
            for values in zip(columns["query_id"], columns["doc_id"], columns["score"], strict=True):
                yield ForeignScore(*values)
    elif kind in _READERS:
        for where, recorded in _READERS[kind](path):
            for item in recorded:
                if not abs(item.score) <= FLOAT32:
                    what = f"the score {item.score} of document {item.document!r} is not finite as a float32 number"
                    raise _bad(kind, what, where)
                yield item
    else:
        raise UsageError(f"unknown format of scores {kind!r}", fix=", ".join(FORMATS))


_SHAPES = {
    "tsv": "a line is: query_id TAB doc_id TAB score",
    "triples": "a line is: positive_score TAB negative_score TAB query_id TAB positive_id TAB negative_id",
    "jsonl": 'a line is: {"query": ..., "pos": [...], "neg": [...], "pos_scores": [...], "neg_scores": [...]}',
}


Scores = Iterator[tuple[str, list[ForeignScore]]]  # where, the scores there


def detect_format(path: Path) -> Format:
    """The format by content: Parquet's magic bytes, a brace, or the columns of the first line."""
    with open(path, "rb") as stream:
        if stream.read(4) == b"PAR1":
            return "parquet"
    line = next((line for _, line in read_lines(path)), "")
    if line.lstrip().startswith("{"):
        return "jsonl"
    fields = split_columns(line)
    if len(fields) == 6:
        return "trec"
    if len(fields) == 5 and (is_header(fields, 0) or None not in map(_number, fields[:2])):
        return "triples"
    if len(fields) == 3:
        return "tsv"
    raise RankdistillError(
        f"the format of this score file cannot be told: its first line has {len(fields)} fields",
        where=f"{path}:1",
        fix=odd_columns(fields) or f"name it: {', '.join(FORMATS)}",
    )


def _number(text: str) -> float | None:
    try:
        return to_number(text)
    except ValueError:
        return None


def _bad(kind: str, what: str, where: str, fix: str | None = None) -> RankdistillError:
    return RankdistillError(f"bad line: {what}", where=where, fix=fix or _SHAPES[kind])


def _columns(path: Path, kind: str, count: int, value: int) -> Iterator[tuple[str, list[str]]]:
    """(where, fields) of each line but a header; `value`: the column of a score."""
    for number, line in read_lines(path):
        fields, where = split_columns(line), f"{path}:{number}"
        if len(fields) != count:
            raise _bad(kind, f"{len(fields)} fields instead of {count}", where, odd_columns(fields))
        if not all(fields):
            raise _bad(kind, "an empty field", where)
        if number > 1 or not is_header(fields, value):
            yield where, fields


def _tsv(path: Path) -> Scores:
    for where, (query_id, doc_id, score) in _columns(path, "tsv", 3, -1):
        yield where, [_scored("tsv", where, query_id, doc_id, score)]


def _triples(path: Path) -> Scores:
    for where, (first, second, query_id, positive, negative) in _columns(path, "triples", 5, 0):
        pairs = ((positive, first), (negative, second))
        yield where, [_scored("triples", where, query_id, *pair) for pair in pairs]


def _scored(kind: str, where: str, query_id: str, doc_id: str, score: str) -> ForeignScore:
    if (number := _number(score)) is None:
        raise _bad(kind, f"{score!r} is not a score", where)
    return ForeignScore(query_id, doc_id, number)


def _jsonl(path: Path) -> Scores:
    for number, record in read_json_lines(path):
        where = f"{path}:{number}"
        try:
            yield where, _record(record, where)
        except (ValueError, OverflowError) as error:
            raise _bad("jsonl", str(error), where) from None


def _record(record: dict[str, Any], where: str) -> list[ForeignScore]:
    named = "query_id" in record
    query = identifier(record["query_id"], "query_id", where) if named else _text(record.get("query"))
    if not query:
        raise ValueError("no query")
    recorded = []
    for side in ("pos", "neg"):
        by_id = f"{side}_ids" in record
        documents = record.get(f"{side}_ids", record.get(side, []))
        scores = record.get(f"{side}_scores", [])
        documents = [documents] if isinstance(documents, str | int) else documents
        scores = [scores] if isinstance(scores, int | float) else scores
        if not isinstance(documents, list) or not isinstance(scores, list):
            raise ValueError(f"{side} or {side}_scores is not a list")
        if len(documents) != len(scores):
            raise ValueError(f"{len(documents)} {side} but {len(scores)} {side}_scores")
        for document, score in zip(documents, scores, strict=True):
            document = identifier(document, f"{side}_ids", where) if by_id else _text(document)
            if document is None or isinstance(score, bool) or not isinstance(score, int | float):
                raise ValueError(f"{side} must hold strings and {side}_scores numbers, not {score!r}")
            recorded.append(ForeignScore(query, document, float(score), by_text=not (by_id and named)))
    if not recorded:
        raise ValueError("no scores")
    return recorded


def _text(value: Any) -> str | None:
    """A text, or an id that stands where a text may: whole numbers in digits."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


_READERS: dict[str, Callable[[Path], Scores]] = {"tsv": _tsv, "triples": _triples, "jsonl": _jsonl}
