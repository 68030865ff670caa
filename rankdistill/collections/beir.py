"""`beir:DIR`: a folder in the layout of BEIR (Thakur et al. 2021), plain or gzip.

corpus.jsonl    {"_id", "title" (optional), "text"}
queries.jsonl   {"_id", "text"}; a folder of documents alone has none, and no qrels
qrels/SPLIT.tsv query-id, corpus-id, score with or without a header; four TREC columns are read too
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rankdistill.artifacts import file_digest
from rankdistill.collections.collection import Collection
from rankdistill.collections.text_files import (
    data_files,
    existing_folder,
    identifier,
    plain_or_gzip,
    read_json_lines,
    read_qrels,
    refuse_one_split,
    stem,
    text_of,
)
from rankdistill.collections.writer import CollectionWriter, imported, stamps
from rankdistill.errors import RankdistillError


def open_source(argument: str, spec: str) -> Collection:
    folder = existing_folder(argument, "beir")
    corpus = _required(folder, "corpus.jsonl")
    queries, qrels = judgment_files(folder)
    files = stamps([corpus, *queries, *qrels])
    key = {
        "loader": "beir",
        "corpus": file_digest(corpus),
        "queries": file_digest(queries[0]) if queries else None,
        "qrels": {stem(path): file_digest(path) for path in qrels},
    }

    def load(writer: CollectionWriter) -> None:
        writer.root = str(folder)
        writer.take(writer.document, corpus, _documents(corpus))
        load_queries(writer, queries)
        for path in qrels:
            writer.take(partial(writer.judgment, stem(path)), path, read_qrels(path))

    return imported(key, load, name=folder.resolve().name, spec=spec, files=files)


def _documents(corpus: Path) -> Iterator[tuple[str, str, str, int]]:
    for line, record in read_json_lines(corpus):
        where = f"{corpus}:{line}"
        yield _id(record, where), text_of(record.get("title"), "title", where), _text(record, where), line


def judgment_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(queries.jsonl where there is one, qrels of all splits).

    Raises:
        RankdistillError: there are qrels without queries, or two of one split.
    """
    qrels = data_files(folder / "qrels", "*", (".tsv", ".tsv.gz"))
    refuse_one_split((stem(path), path) for path in qrels)
    queries = _required(folder, "queries.jsonl") if qrels else plain_or_gzip(folder, "queries.jsonl")
    return [queries] if queries else [], qrels


def load_queries(writer: CollectionWriter, files: list[Path]) -> None:
    for path in files:
        places = ((line, record, f"{path}:{line}") for line, record in read_json_lines(path))
        rows = ((_id(record, where), _text(record, where), line) for line, record, where in places)
        writer.take(writer.query, path, rows)


def _required(folder: Path, name: str) -> Path:
    if path := plain_or_gzip(folder, name):
        return path
    fix = "give the folder that holds corpus.jsonl, queries.jsonl and qrels/"
    raise RankdistillError(f"a BEIR folder needs {name} (or {name}.gz)", where=str(folder), fix=fix)


def _id(record: dict[str, object], where: str) -> str:
    return identifier(record.get("_id", record.get("id")), "_id", where)


def _text(record: dict[str, object], where: str) -> str:
    if "text" not in record:
        raise RankdistillError("the record has no 'text'", where=where)
    return text_of(record["text"], "text", where)
