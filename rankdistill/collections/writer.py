"""Import of a collection into the cache: a stream of records in, an artifact of Arrow files out.

Files of the artifact (kind "collection"):
    documents.arrow   doc_id, title, text
    queries.arrow     query_id, text
    qrels/SPLIT.arrow query_id, doc_id, relevance (int32), query_row, doc_row (int64; -1: not in the collection);
                      sorted by query row
    {documents,queries}.{hashes,rows}.npy   the id → row index
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rankdistill.artifacts import ArtifactWriter, cache_dir, find_artifact, fingerprint, obtain
from rankdistill.collections.collection import Collection
from rankdistill.collections.storage import IdIndex, IdIndexWriter, Table, TableWriter
from rankdistill.errors import RankdistillError
from rankdistill.plain import file_name
from rankdistill.progress import progress, warn

SCHEMA = 1  # part of a collection's fingerprint: teacher scores are kept under it, so a change loses what was paid for
READING = 2  # of the files above and of how sources are read; a change has every collection imported again
STRING, INT64 = pa.string(), pa.int64()
DOCUMENTS = pa.schema([("doc_id", STRING), ("title", STRING), ("text", STRING)])
QUERIES = pa.schema([("query_id", STRING), ("text", STRING)])
RAW_QRELS = pa.schema([("query_id", STRING), ("doc_id", STRING), ("relevance", pa.int32()), ("line", INT64)])
QRELS = pa.schema(
    [("query_id", STRING), ("doc_id", STRING), ("relevance", pa.int32()), ("query_row", INT64), ("doc_row", INT64)]
)

# What to do about an id that comes twice: "refuse" it; "across files": the same record in another file is one record;
# "same": the same record anywhere is one record.
Repeats = Literal["refuse", "across files", "same"]


class _Sources:
    """Where the rows of a table came from."""

    def __init__(self) -> None:
        self._starts: list[tuple[int, str]] = []

    def note(self, row: int, source: str) -> None:
        if not self._starts or self._starts[-1][1] != source:
            self._starts.append((row, source))

    def __getitem__(self, row: int) -> str:
        return next(name for first, name in reversed(self._starts) if first <= row)


class _Records:
    """One table being imported: rows, the id index, where rows came from, lengths, empty texts.

    Memory: 4 bytes a row beside the index's.
    """

    def __init__(self, folder: Path, name: str, what: str, schema: pa.Schema) -> None:
        self.folder, self.name, self.what = folder, name, what
        self.writer = TableWriter(folder / f"{name}.arrow", schema)
        self.index, self.sources = IdIndexWriter(), _Sources()
        self._words = array("I")  # of each row
        self.lengths = np.zeros(0, np.int64)  # the same, once repeated rows are gone
        self.empty = ""  # how many rows have no text, and the first

    def add(self, source: str, line: int, identifier: str, *texts: str) -> None:
        self.sources.note(self.writer.rows, source)
        self._words.append(sum(len(text.split()) for text in texts))
        self.writer.add(identifier, *texts)
        self.index.add(identifier, line)

    def finish(self, repeats: Repeats, place: Callable[[str, int], str]) -> None:
        """Close the file, settle repeated ids, write the index; `place` says a source and line to people."""
        self.writer.close()
        table, schema = Table(self.writer.path), self.writer.schema
        keep = np.ones(len(table), bool)
        for identifier, *pair in self.index.repeats(table, schema.names[0]):
            first, second = (self.sources[row] for row in pair)
            equal = all(len(set(table.take(name, pair))) == 1 for name in schema.names)
            if not equal or repeats == "refuse" or (repeats == "across files" and first == second):
                raise RankdistillError(
                    f"the {self.what} id {identifier!r} occurs twice" + ("" if equal else " with different text"),
                    where=" and ".join(_at(self.sources[row], self.index.lines[row]) for row in pair),
                    fix="ids must be unique: remove or rename one of the two",
                )
            keep[pair[1]] = False
        words = np.array(self._words, np.int64)
        self.lengths, empty = words[keep], np.flatnonzero(keep & (words == 0)).tolist()
        if empty:
            at, (identifier,) = empty[0], table.take(schema.names[0], empty[:1])
            first = place(self.sources[at], self.index.lines[at])
            self.empty = f"{len(empty):,} {self.name} have no text (first: {identifier!r} at {first})"
        if not keep.all():
            self._rewrite(table, keep)
        self.index.publish(self.folder, self.name, np.flatnonzero(~keep))

    def _rewrite(self, table: Table, keep: np.ndarray) -> None:
        """The table with the rows marked in `keep` alone."""
        writer = TableWriter(self.folder / f".{self.name}.arrow", self.writer.schema)
        for start, batch in zip(table.starts.tolist(), table.batches, strict=False):
            writer.add_batch(batch.filter(pa.array(keep[start : start + batch.num_rows])))
        writer.close()
        writer.path.replace(self.writer.path)

    def words(self) -> dict[str, int]:
        """Median, 95th percentile and maximum of the lengths in words."""
        if not len(self.lengths):
            return {"p50": 0, "p95": 0, "max": 0}
        p50, p95 = np.quantile(self.lengths, [0.5, 0.95], method="inverted_cdf")
        return {"p50": int(p50), "p95": int(p95), "max": int(self.lengths.max())}


def _at(source: str, line: int) -> str:
    return f"{source}:{line}" if line else source


class CollectionWriter:
    """Takes a collection record by record; `source` names where the next records come from (a file, a data set).

    `root` is cut from sources in `problems`, which stay with the collection when its folder moves.

    Memory does not grow with the texts. Judgments cost about 30 bytes each while their split is sorted.

    Args:
        folder: where the files go.
        label: of the progress line.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label, self.source, self.root = folder, label, label, ""
        self.document_repeats: Repeats = "refuse"
        self.query_repeats: Repeats = "across files"
        self._documents = _Records(folder, "documents", "document", DOCUMENTS)
        self._queries = _Records(folder, "queries", "query", QUERIES)
        self._judgments: dict[str, TableWriter] = {}
        self._judgment_sources: dict[str, _Sources] = {}
        self._mended = 0
        self.problems: list[str] = []
        self.splits: list[str] = []
        self.notes: dict[str, Any] = {}  # further ones, for the manifest
        self._progress = progress(f"import {label}", None, "records")
        self._bar = self._progress.__enter__()

    def take(self, add: Callable[..., None], source: object, rows: Iterable[Iterable[Any]]) -> None:
        """`add` (`document`, `query`, `judgment` of a split) each of the rows, which come from that source."""
        self.source = str(source)
        for row in rows:
            add(*row)

    def document(self, doc_id: str, title: str, text: str, line: int = 0) -> None:
        self._documents.add(self.source, line, self._id(doc_id, line), self._clean(title), self._clean(text))
        self._bar.advance()

    def query(self, query_id: str, text: str, line: int = 0) -> None:
        self._queries.add(self.source, line, self._id(query_id, line), self._clean(text))
        self._bar.advance()

    def judgment(self, split: str, query_id: str, doc_id: str, relevance: int, line: int = 0) -> None:
        if split not in self._judgments:
            if not split or split.startswith(".") or "/" in split:
                raise RankdistillError(f"{split!r} cannot be the name of a split", where=self.source)
            self._judgments[split] = TableWriter(self.folder / "qrels" / f".{split}.raw", RAW_QRELS)
            self._judgment_sources[split] = _Sources()
        table = self._judgments[split]
        self._judgment_sources[split].note(table.rows, self.source)
        table.add(self._id(query_id, line), self._id(doc_id, line), relevance, line)
        self._bar.advance()

    def _clean(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair: legal in JSON, not in UTF-8
            self._mended += 1
            return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        return text

    def _id(self, identifier: str, line: int) -> str:
        try:
            identifier.encode()
        except UnicodeEncodeError:
            what = f"the id {identifier!r} holds half a surrogate pair"
            raise RankdistillError(what, where=_at(self.source, line)) from None
        return identifier

    def finish(self) -> dict[str, int]:
        """Complete the files; the counts. `problems`, `splits` and `words()` are known then.

        Raises:
            RankdistillError: an id occurs twice, or there are no documents.
        """
        if not self._documents.writer.rows:
            raise RankdistillError("the collection has no documents", where=self.source)
        self._documents.finish(self.document_repeats, self._place)
        self._queries.finish(self.query_repeats, self._place)
        self.problems += [records.empty for records in (self._documents, self._queries) if records.empty]
        if self._mended:
            self.problems.append(f"{self._mended:,} texts held half a surrogate pair, replaced by U+FFFD")
        documents, queries = (Table(records.writer.path) for records in (self._documents, self._queries))
        document_index = IdIndex(self.folder, "documents", documents, "doc_id")
        query_index = IdIndex(self.folder, "queries", queries, "query_id")
        kept = sum(self._settle(split, query_index, document_index) for split in self._judgments)
        if not self.splits:
            self.problems.append("there are no judgments of documents and queries that are here")
        return {"documents": len(documents), "queries": len(queries), "judgments": kept}

    def words(self) -> dict[str, dict[str, int]]:
        return {"documents": self._documents.words(), "queries": self._queries.words()}

    def _settle(self, split: str, query_index: IdIndex, document_index: IdIndex) -> int:
        """Resolve the ids of a split's judgments, sort them by query; how many are of known documents."""
        raw_writer = self._judgments[split]
        raw_writer.close()
        raw = Table(raw_writer.path)
        rows = [
            (query_index.lookup(batch["query_id"].to_pylist()), document_index.lookup(batch["doc_id"].to_pylist()))
            for batch in raw.batches
        ]
        query_rows = np.concatenate([part[0] for part in rows])
        doc_rows = np.concatenate([part[1] for part in rows])
        no_query, no_document = query_rows < 0, (query_rows >= 0) & (doc_rows < 0)
        self._report(split, raw, no_query, "query_id", "queries")
        self._report(split, raw, no_document, "doc_id", "documents")
        known, place = (query_rows >= 0) & (doc_rows >= 0), np.arange(len(raw))
        pairs = np.where(known, query_rows << 32 | doc_rows, -1 - place)  # unknown ones all differ
        _, last, of = np.unique(pairs[::-1], return_index=True, return_inverse=True)
        counting = len(raw) - 1 - last[of][::-1]  # where the last judgment of the same pair stands
        grades = np.concatenate([batch["relevance"].to_numpy() for batch in raw.batches])
        other = grades != grades[counting]
        self._report(split, raw, other, "doc_id", "", "are repeated with another relevance; the last one counts")
        repeated = counting != place
        keep = np.flatnonzero((query_rows >= 0) & ~repeated)
        keep = keep[np.argsort(query_rows[keep], kind="stable")]  # by query; within a query as in the file
        writer = TableWriter(self.folder / "qrels" / f"{split}.arrow", QRELS)
        for start in range(0, len(keep), 1 << 16):
            part = keep[start : start + (1 << 16)]
            columns = [raw.take(name, part) for name in ("query_id", "doc_id", "relevance")]
            for values in zip(*columns, query_rows[part].tolist(), doc_rows[part].tolist(), strict=True):
                writer.add(*values)
        writer.close()
        raw_writer.path.unlink()
        judged = int((known & ~repeated).sum())
        if judged:
            self.splits.append(split)
        else:
            writer.path.unlink()
        return judged

    def _report(self, split: str, raw: Table, where: np.ndarray, column: str, noun: str, what: str = "") -> None:
        """Add one line to `problems` about the judgments marked in `where`."""
        count = int(where.sum())
        if not count:
            return
        row = int(np.argmax(where))
        place = self._place(self._judgment_sources[split][row], raw.take("line", [row])[0])
        what = what or f"name {noun} that are not in the collection; they are left out"
        self.problems.append(
            f"{split}: {count:,} of {len(raw):,} judgments {what} (first: {raw.take(column, [row])[0]!r} at {place})"
        )

    def _place(self, source: str, line: int) -> str:
        return _at(source.removeprefix(self.root).lstrip("/"), line)

    def close(self) -> None:
        self._progress.__exit__(None, None, None)
        for writer in (self._documents.writer, self._queries.writer, *self._judgments.values()):
            writer.abandon()


Stamps = dict[Path, tuple[int, ...]]


def stamps(paths: Iterable[Path]) -> Stamps:
    """What changes when a file does, though it be put back: taken before its digest, compared when it was read."""
    stats = {path: path.stat() for path in paths}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats.items()}


def imported(
    key: Mapping[str, Any],
    load: Callable[[CollectionWriter], None],
    *,
    name: str,
    spec: str,
    files: Stamps | None = None,
) -> Collection:
    """The collection of that key: from the cache, or imported into it once.

    Args:
        key: what decides the content (digests of the source files, a revision, versions); becomes the fingerprint.
        load: writes the records; called only when the cache does not hold the collection.
        name: what to call it; folders of runs are called after it.
        spec: what the user asked for.
        files: `stamps` of the source files from before their digests were taken.

    Raises:
        RankdistillError: a file changed while it was read: its digest is not of what was read.
    """
    mark, name = fingerprint(["collection", SCHEMA, key]), file_name(name)
    folder = cache_dir() / "collections" / f"{mark}-{READING}"
    problems: list[str] = []

    def make(artifact: ArtifactWriter) -> None:
        writer = CollectionWriter(artifact.path, name)
        try:
            load(writer)
            for path, stamp in (files or {}).items():
                if not path.exists() or stamps([path])[path] != stamp:
                    what = "the file changed while it was read"
                    raise RankdistillError(what, where=str(path), fix="run the same command again")
            artifact.counts.update(writer.finish())
            artifact.notes.update(splits=writer.splits, problems=writer.problems, words=writer.words(), **writer.notes)
        finally:
            writer.close()
        problems.extend(writer.problems)

    artifact = find_artifact(folder, "collection", mark)  # first without the lock: a cache may be read-only
    artifact = artifact or obtain(folder, kind="collection", fingerprint=mark, settings=dict(key), make=make)
    for problem in problems:
        warn(f"collection {name}: {problem}")
    return Collection(artifact, name, spec)
