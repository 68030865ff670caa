"""`msmarco:DIR`: a folder in the form of MS MARCO passages (Nguyen et al. 2016), plain or gzip.

    collection.tsv          document id, text
    *queries*.tsv           query id, text; all of them (a query may be in several files with the same text)
    *qrels*.tsv, *qrels*.txt   TREC form, four tab columns, or three; the file name says the split:
                            qrels.train.tsv → train, qrels.dev.small.tsv → dev.small, qrels.txt → test
    triples*.tsv            query, positive, negative by id or by text: see `read_triples`

A folder without collection.tsv but with triples by text is a collection too: its documents are the distinct passages,
its queries the distinct queries, each named by a hash of its text (`text_id`), and the positives are the judgments
of split train.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rankdistill.artifacts import file_digest
from rankdistill.collections.collection import Collection
from rankdistill.collections.storage import Rows, id_hashes
from rankdistill.collections.text_files import (
    data_files,
    existing_folder,
    is_header,
    plain_or_gzip,
    read_lines,
    read_pairs,
    read_qrels,
    refuse_one_split,
    stem,
)
from rankdistill.collections.writer import CollectionWriter, imported, stamps
from rankdistill.errors import RankdistillError
from rankdistill.progress import warn

TSV = (".tsv", ".tsv.gz")
CHUNK = 4096  # triples resolved at once
REMEMBERED = 1 << 18  # hashes of recent texts; only saves disk during import, repeats are settled there


class Triple(NamedTuple):
    query_id: str
    positive_id: str
    negative_id: str


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
        writer.source = str(corpus)
        for line, doc_id, text in read_pairs(corpus):
            writer.document(doc_id, "", text, line)
        for path in queries:
            writer.source = str(path)
            for line, query_id, text in read_pairs(path):
                writer.query(query_id, text, line)
        for path, split in splits.items():
            writer.source = str(path)
            for judgment in read_qrels(path):
                writer.judgment(split, *judgment)

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
        for _, fields in _triple_lines(path):
            if all(field.isdigit() for field in fields):
                raise RankdistillError(
                    "the triples name ids, so their texts are needed: collection.tsv is missing", where=str(path)
                )
            break
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
    first = True
    for line, text in read_lines(path):
        fields = text.split("\t")
        header, first = first and is_header(fields), False
        if header:
            continue
        if len(fields) != 3 or not all(field.strip() for field in fields):
            raise RankdistillError(
                f"expected three columns (query, positive, negative), found {len(fields)}: {text[:80]!r}",
                where=f"{path}:{line}",
            )
        yield line, fields


def read_triples(path: str | Path, collection: Collection) -> Iterator[Triple]:
    """Training triples as ids of the collection, in file order, streaming.

    The form is known by the first line: by id when the collection knows its three ids, else by text. Triples by text
    are resolved to the ids of equal texts; that holds 16 bytes a document in memory, and the queries' texts. Triples
    with an id or text that the collection does not know are left out; a warning says how many.

    Args:
        path: three tab columns: query, positive, negative; plain or gzip.
        collection: that the ids or texts are of.

    Raises:
        RankdistillError: a line is malformed.
    """
    path = Path(path)
    lines = _triple_lines(path)
    first = next(lines, None)
    if first is None:
        return
    query, positive, negative = first[1]
    by_id = collection.has_queries([query])[0] or bool((collection.doc_rows([positive, negative]) >= 0).all())
    texts = None if by_id else _TextLookup(collection)
    unknown, total, example = 0, 0, ""
    stream = itertools.chain([first], lines)
    while chunk := list(itertools.islice(stream, CHUNK)):
        triples = [Triple(*fields) for _, fields in chunk]
        if texts is None:
            queries_known = collection.has_queries([triple.query_id for triple in triples])
            passages = [doc_id for triple in triples for doc_id in triple[1:]]
            passages_known = collection.doc_rows(passages).reshape(-1, 2).min(axis=1) >= 0
            known = [q and p for q, p in zip(queries_known, passages_known.tolist(), strict=True)]
        else:
            resolved = texts.resolve(triples)
            known = [triple is not None for triple in resolved]
            triples = [triple or original for triple, original in zip(resolved, triples, strict=True)]
        for (line, _), triple, is_known in zip(chunk, triples, known, strict=True):
            total += 1
            if is_known:
                yield triple
            else:
                unknown += 1
                example = example or f"{path}:{line}"
    if unknown:
        warn(
            f"{unknown:,} of {total:,} triples name what collection {collection.name} does not hold; "
            f"they are left out (first: {example})"
        )


class _TextLookup:
    """Finds queries and documents by their text."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.queries: dict[str, str] = {}
        for batch in collection.iter_queries():
            for query in batch:
                self.queries.setdefault(query.text.strip(), query.query_id)
        hashes = np.empty(collection.document_count, np.uint64)
        for first, texts in collection.iter_documents():
            hashes[first : first + len(texts)] = id_hashes(text.strip() for text in texts)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    def rows(self, texts: list[str]) -> Rows:
        """int64, -1 where no document has that text."""
        texts = [text.strip() for text in texts]
        wanted = id_hashes(texts)
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        rows = np.where(self.hashes[at] == wanted, self.order[at], -1).astype(np.int64)
        hit = np.flatnonzero(rows >= 0)
        for place, real in zip(hit, self.collection.document_texts(rows[hit]), strict=True):
            if real.strip() != texts[place]:
                rows[place] = -1
        return rows

    def resolve(self, triples: list[Triple]) -> list[Triple | None]:
        rows = self.rows([text for triple in triples for text in triple[1:]]).reshape(-1, 2)
        ids = self.collection.doc_ids(np.maximum(rows, 0).ravel())
        resolved: list[Triple | None] = []
        for place, triple in enumerate(triples):
            query_id = self.queries.get(triple.query_id.strip())
            known = query_id is not None and (rows[place] >= 0).all()
            resolved.append(Triple(query_id, ids[2 * place], ids[2 * place + 1]) if known and query_id else None)
        return resolved
