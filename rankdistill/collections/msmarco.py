"""`msmarco:DIR`: a folder in the form of MS MARCO passages (Nguyen et al. 2016), plain or gzip.

    collection.tsv          document id, text
    *queries*.tsv           query id, text; all of them (a query may be in several files with the same text)
    *qrels*.tsv, *qrels*.txt   TREC form, four tab columns, or three; the file name says the split:
                            qrels.train.tsv → train, qrels.dev.small.tsv → dev.small, qrels.txt → test

A folder without collection.tsv but with triples by text is a collection too: its documents are the distinct passages,
its queries the distinct queries, each named by a hash of its text (`text_id`), and the positives are the judgments
of split train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rankdistill.artifacts import file_digest
from rankdistill.collections.collection import Collection
from rankdistill.collections.text_files import (
    data_files,
    existing_folder,
    is_header,
    plain_or_gzip,
    read_lines,
    read_pairs,
    read_qrels,
    refuse_one_split,
    skip_header,
    stem,
)
from rankdistill.collections.writer import CollectionWriter, imported, stamps
from rankdistill.errors import RankdistillError

TSV = (".tsv", ".tsv.gz")
REMEMBERED = 1 << 18  # hashes of recent texts; only saves disk during import, repeats are settled there


def open_source(argument: str, spec: str) -> Collection:
    folder = existing_folder(argument, "msmarco")
    name = folder.resolve().name
    corpus = plain_or_gzip(folder, "collection.tsv")
    if corpus is None:
        return _from_triples(folder, name, spec)
    queries = [path for path in data_files(folder, "*queries*", TSV) if "qrels" not in path.name]
    if not queries:
        raise RankdistillError("there is no queries*.tsv", where=str(folder), fix="its lines are `id<tab>text`")
    splits = {path: split_name(path) for path in data_files(folder, "*qrels*", (*TSV, ".txt", ".txt.gz"))}
    refuse_one_split((split, path) for path, split in splits.items())
    stamped = stamps([corpus, *queries, *splits])
    key = {
        "loader": "msmarco",
        "collection": file_digest(corpus),
        "queries": [file_digest(path) for path in queries],
        "qrels": {split: file_digest(path) for path, split in splits.items()},
    }

    def load(writer: CollectionWriter) -> None:
        writer.root = str(folder)
        writer.take(writer.document, corpus, ((doc_id, "", text, line) for doc_id, text, line in read_pairs(corpus)))
        for path in queries:
            writer.take(writer.query, path, read_pairs(path))
        for path, split in splits.items():
            writer.take(partial(writer.judgment, split), path, read_qrels(path))

    return imported(key, load, name=name, spec=spec, files=stamped)


def split_name(path: Path) -> str:
    """The split a qrels file defines: its name without `qrels` (qrels.dev.small.tsv → dev.small, qrels.txt → test)."""
    before, _, after = stem(path).partition("qrels")
    return "-".join(part for part in (before.strip("._-"), after.strip("._-")) if part) or "test"


def text_id(text: str) -> str:
    """The id of a text that has none: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _from_triples(folder: Path, name: str, spec: str) -> Collection:
    files = data_files(folder, "*triples*", TSV)
    if not files:
        raise RankdistillError(
            "there is neither collection.tsv nor a triples*.tsv by text",
            where=str(folder),
            fix="an MS MARCO folder holds collection.tsv, queries*.tsv and qrels*",
        )
    for path in files:
        _, fields = next(_triple_lines(path), (0, [""]))
        if all(field.isdigit() for field in fields):
            what = "the triples name ids, so their texts are needed: collection.tsv is missing"
            raise RankdistillError(what, where=str(path))
    stamped = stamps(files)
    key = {"loader": "msmarco-triples", "triples": [file_digest(path) for path in files]}

    def load(writer: CollectionWriter) -> None:
        writer.root = str(folder)
        writer.document_repeats = writer.query_repeats = "same"
        recent: set[str] = set()
        for path in files:
            writer.source = str(path)
            for line, (query, *passages) in _triple_lines(path):
                if len(recent) > REMEMBERED:
                    recent.clear()
                query_id, *passage_ids = text_id(query), *map(text_id, passages)
                if f"q{query_id}" not in recent:
                    writer.query(query_id, query, line)
                for passage_id, passage in zip(passage_ids, passages, strict=True):
                    if passage_id not in recent:
                        writer.document(passage_id, "", passage, line)
                if f"{query_id} {passage_ids[0]}" not in recent:
                    writer.judgment("train", query_id, passage_ids[0], 1, line)
                recent.update((f"q{query_id}", *passage_ids, f"{query_id} {passage_ids[0]}"))

    return imported(key, load, name=name, spec=spec, files=stamped)


def _triple_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    for line, text in skip_header(read_lines(path), lambda text: is_header(text.split("\t"))):
        fields = text.split("\t")
        if len(fields) != 3 or not all(field.strip() for field in fields):
            what = f"expected three columns (query, positive, negative), found {len(fields)}: {text[:80]!r}"
            raise RankdistillError(what, where=f"{path}:{line}")
        yield line, fields
