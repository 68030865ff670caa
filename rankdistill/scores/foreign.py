"""Scores made elsewhere: readers of the formats they are published in.

| format  | a line |
|---|---|
| tsv     | query_id, doc_id, score (a header line is allowed) |
| triples | score⁺, score⁻, query_id, id⁺, id⁻ (the published Margin-MSE files) |
| trec    | a TREC run: its score is the teacher's |
| jsonl   | query, pos, neg, pos_scores, neg_scores (sentence-transformers and BGE), by id or by text |
| parquet | query_id, doc_id, score: what `rankdistill score --out` wrote, with its fingerprints |

Text files may be gzipped. A line that cannot be read, and a NaN or infinite score, is an error naming file and line.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.runs import iter_run
from rankdistill.scores.store import read_part

Format = Literal["auto", "tsv", "triples", "trec", "jsonl", "parquet"]
FORMATS = ("tsv", "triples", "trec", "jsonl", "parquet")


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
        table = read_part(path, {"collection": collection_fingerprint} if collection_fingerprint else None)
        for batch in table.to_batches(max_chunksize=65_536):
            columns = batch.to_pydict()
            for values in zip(columns["query_id"], columns["doc_id"], columns["score"], strict=True):
                yield ForeignScore(*values)
    else:
        parsers: dict[str, Callable[[str, bool], list[ForeignScore]]] = {
            "tsv": _tsv,
            "triples": _triples,
            "jsonl": _jsonl,
        }
        if kind not in parsers:
            raise UsageError(f"unknown format of scores {kind!r}", fix=", ".join(FORMATS))
        for number, line in _lines(path):
            if not line.strip():
                continue
            try:
                found = parsers[kind](line, number == 1)
                for item in found:
                    if not math.isfinite(item.score):
                        raise ValueError(f"the score {item.score} of document {item.document[:60]!r} is not finite")
            except ValueError as error:
                raise RankdistillError(f"bad line: {error}", where=f"{path}:{number}", fix=_SHAPES[kind]) from None
            yield from found


_SHAPES = {
    "tsv": "a line is: query_id TAB doc_id TAB score",
    "triples": "a line is: positive_score TAB negative_score TAB query_id TAB positive_id TAB negative_id",
    "jsonl": 'a line is: {"query": ..., "pos": [...], "neg": [...], "pos_scores": [...], "neg_scores": [...]}',
}


def detect_format(path: Path) -> Format:
    """The format by content: Parquet's magic bytes, a brace, or the columns of the first line."""
    with open(path, "rb") as stream:
        if stream.read(4) == b"PAR1":
            return "parquet"
    line = next((line for _, line in _lines(path) if line.strip()), "")
    if line.lstrip().startswith("{"):
        return "jsonl"
    fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
    if len(fields) == 6:
        return "trec"
    if len(fields) == 5 and _is_number(fields[0]) and _is_number(fields[1]):
        return "triples"
    if len(fields) == 3:
        return "tsv"
    raise RankdistillError(
        f"the format of this score file cannot be told: its first line has {len(fields)} fields",
        where=f"{path}:1",
        fix=f"name it: {', '.join(FORMATS)}",
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as probe:
        zipped = probe.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise RankdistillError(
                        f"not UTF-8: byte {raw[error.start]:#04x}", where=f"{path}:{number}", fix="convert it to UTF-8"
                    ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RankdistillError(
            f"the gzip file is damaged or cut short: {error}", where=f"{path}:{number + 1}", fix="fetch it again"
        ) from None


def _fields(line: str, count: int) -> list[str]:
    text = line.rstrip("\r\n")
    fields = text.split("\t") if "\t" in text else text.split()
    if len(fields) != count:
        raise ValueError(f"{len(fields)} fields instead of {count}")
    if not all(fields):
        raise ValueError("an empty field")
    return fields


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a score") from None


def _tsv(line: str, first: bool) -> list[ForeignScore]:
    query_id, doc_id, score = _fields(line, 3)
    if first and not _is_number(score):
        return []  # a header
    return [ForeignScore(query_id, doc_id, _number(score))]


def _triples(line: str, first: bool) -> list[ForeignScore]:
    positive_score, negative_score, query_id, positive, negative = _fields(line, 5)
    return [
        ForeignScore(query_id, positive, _number(positive_score)),
        ForeignScore(query_id, negative, _number(negative_score)),
    ]


def _jsonl(line: str, first: bool) -> list[ForeignScore]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    query = record.get("query_id", record.get("query"))
    if not isinstance(query, str):
        raise ValueError("no query")
    found = []
    for side in ("pos", "neg"):
        by_id = f"{side}_ids" in record
        documents = record.get(f"{side}_ids", record.get(side, []))
        scores = record.get(f"{side}_scores", [])
        documents = [documents] if isinstance(documents, str) else documents
        scores = [scores] if isinstance(scores, (int, float)) else scores
        if not isinstance(documents, list) or not isinstance(scores, list):
            raise ValueError(f"{side} or {side}_scores is not a list")
        if len(documents) != len(scores):
            raise ValueError(f"{len(documents)} {side} but {len(scores)} {side}_scores")
        for document, score in zip(documents, scores, strict=True):
            if not isinstance(document, str) or isinstance(score, bool) or not isinstance(score, (int, float)):
                raise ValueError(f"{side} must hold strings and {side}_scores numbers, not {document!r}: {score!r}")
            found.append(ForeignScore(query, document, float(score), by_text=not (by_id and "query_id" in record)))
    if not found:
        raise ValueError("no scores")
    return found
