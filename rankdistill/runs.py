"""Runs: ranked (query, document, rank, score), in the TREC sense; read, held, streamed and written.

One order everywhere, trec_eval's: score descending, then document id descending by its UTF-8 bytes. Scores are
float32, as they are in trec_eval, so what ties there ties here. A `rank` column in a foreign file never decides
the order; queries whose ranks contradict their scores are counted in `Run.notes`. Ids are text: whole numbers are
taken as their digits, and counted there too (`numeric_ids`).
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from rankdistill.artifacts import written_whole
from rankdistill.collections.text_files import (
    LONGEST_LINE,
    is_header,
    long_line,
    open_text,
    text_ids,
    text_keys,
    to_number,
)
from rankdistill.errors import RankdistillError

SCHEMA = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])
TREC_COLUMNS = ("query_id", "q0", "doc_id", "rank", "score", "tag")
ONE_LINE = "keep one line for each document of a query"
TREC_FIX = "a line of a TREC run is: query_id Q0 doc_id rank score tag"
ROW_GROUP = 1 << 16  # rows buffered before a row group is written
ROWS_AT_ONCE = 1 << 17  # rows checked and sorted together: their ids' hash table fits a processor's cache
BLOCK = 1 << 24  # bytes of a text file parsed at once

Ranking = tuple[str, list[str], np.ndarray]


class WhiteSpaceError(RankdistillError):
    """An id that a TREC file cannot carry."""


def trec_order(scores: np.ndarray, doc_ids: Sequence[str]) -> np.ndarray:
    """Positions of one query's documents, all different, in trec_eval's order."""
    scores = np.asarray(scores, np.float32)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    if len(ranked) < 2 or not (ranked[1:] == ranked[:-1]).any():
        return order
    # Python compares strings by code point, which is the order of their UTF-8 bytes.
    by_id = sorted(range(len(doc_ids)), key=doc_ids.__getitem__, reverse=True)
    return np.asarray(by_id)[np.argsort(-scores[by_id], kind="stable")]


def checked_scores(scores: Any, where: str, name_of: Callable[[int], str] | None = None) -> np.ndarray:
    """Scores as float32 [n], or an error where one is NaN, infinite or too large; `name_of` a row says which."""
    raw = np.asarray(scores)
    with np.errstate(over="ignore"):
        checked = raw.astype(np.float32, copy=False)
    if not np.isfinite(checked).all():
        first = int(np.flatnonzero(~np.isfinite(checked))[0])
        raise RankdistillError(
            f"a score is not a finite float32 number: {raw[first]}",
            where=where if name_of is None else f"{where}, {name_of(first)}",
            fix="write the run again without NaN, infinite or larger scores",
        )
    return checked


def positions(values: Any, among: Any) -> np.ndarray:
    """Where each value stands among others, -1 where it does not: int64 [n]. Numbers or ids, NumPy or Arrow arrays."""
    arrays = (part if isinstance(part, pa.Array) else pa.array(part) for part in (values, among))
    return pc.index_in(*arrays).fill_null(-1).to_numpy().astype(np.int64)


def ranks_within(counts: np.ndarray) -> np.ndarray:
    """1, 2, ... within each of consecutive groups of these sizes: int64 [sum of the counts]."""
    return np.arange(1, counts.sum() + 1) - np.repeat(np.cumsum(counts) - counts, counts)


def file_stem(path: Path) -> str:
    """How the run in a file is called."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


class Run:
    """A run in columns: queries in file order, documents of a query in trec_eval's order.

    Args:
        query_ids: Q ids, all different.
        offsets: int64 [Q+1]; the documents of query i are rows offsets[i]:offsets[i+1].
        doc_ids: [N] ids, a list or an Arrow array.
        scores: [N]; held as float32.
        name: how tables call it.
        notes: what was noticed when it was read (`rank_contradictions`: queries whose ranks contradict their scores;
            `numeric_ids`: ids that were numbers and are taken as text).

    Raises:
        RankdistillError: a duplicate query, a document twice in a query, or a score that is not finite.
    """

    def __init__(
        self,
        query_ids: Sequence[str],
        offsets: np.ndarray,
        doc_ids: Sequence[str] | pa.Array,
        scores: np.ndarray,
        name: str = "run",
        notes: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.notes = dict(notes or {})
        self.query_ids = list(query_ids)
        self.offsets = np.asarray(offsets, np.int64)
        ids = doc_ids if isinstance(doc_ids, pa.Array) else pa.array(doc_ids, pa.large_string())
        self.doc_ids: pa.Array = ids if ids.type == pa.large_string() else ids.cast(pa.large_string())
        self.scores = np.asarray(scores)
        counts = np.diff(self.offsets)
        whole = len(self.offsets) == len(self.query_ids) + 1 and self.offsets[0] == 0 and bool((counts >= 0).all())
        if not whole or not len(self.doc_ids) == len(self.scores) == self.offsets[-1]:
            raise ValueError("offsets, doc_ids and scores do not fit together")
        if len(set(self.query_ids)) < len(self.query_ids):
            raise RankdistillError("a query is listed twice in the run", where=name)
        self.scores = checked_scores(self.scores, name)
        self._put_in_order()

    @classmethod
    def from_dict(cls, run: Mapping[str, Mapping[str, float]], name: str = "run") -> Run:
        """From {query id: {doc id: score}}."""
        run, numeric = text_keys(run, name)
        offsets = np.cumsum([0, *(len(documents) for documents in run.values())], dtype=np.int64)
        doc_ids = list(chain.from_iterable(run.values()))
        scores = np.fromiter(
            chain.from_iterable(documents.values() for documents in run.values()), np.float64, len(doc_ids)
        )
        return cls(list(run), offsets, doc_ids, scores, name, {"numeric_ids": numeric} if numeric else None)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """{query id: {doc id: score}}, as ranx and pytrec_eval take it."""
        return {query_id: dict(zip(ids, scores.tolist(), strict=True)) for query_id, ids, scores in self}

    def __iter__(self) -> Iterator[Ranking]:
        for row, query_id in enumerate(self.query_ids):
            start, end = self.offsets[row], self.offsets[row + 1]
            yield query_id, self.doc_ids[start:end].to_pylist(), self.scores[start:end]

    def __len__(self) -> int:
        return len(self.query_ids)

    def __repr__(self) -> str:
        rows = len(self.scores)
        tied = f", {self.tied.mean():.1%} of scores tied" if rows and self.tied.any() else ""
        return f"Run({self.name}: {len(self):,} queries, {rows:,} documents{tied})"

    @property
    def query_rows(self) -> np.ndarray:
        """int32 [N]: to which query a row belongs."""
        return np.repeat(np.arange(len(self.query_ids), dtype=np.int32), np.diff(self.offsets))

    @property
    def tied(self) -> np.ndarray:
        """bool [N]: the score equals that of another document of the query, so that ids decide the order."""
        scores, queries = self.scores, self.query_rows
        same = (scores[1:] == scores[:-1]) & (queries[1:] == queries[:-1])
        tied = np.zeros(len(scores), bool)
        tied[1:] |= same
        tied[:-1] |= same
        return tied

    @property
    def ranks(self) -> np.ndarray:
        """int64 [N], from 1."""
        return ranks_within(np.diff(self.offsets))

    @property
    def self_hits(self) -> np.ndarray:
        """bool [N]: the document's id is the query's."""
        return positions(self.doc_ids, pa.array(self.query_ids, pa.large_string())) == self.query_rows

    def first(self, depth: int) -> Run:
        """The run cut to the first `depth` documents of each query."""
        return self if np.diff(self.offsets).max(initial=0) <= depth else self.keep(self.ranks <= depth)

    def keep(self, rows: np.ndarray) -> Run:
        """The run with the documents where `rows` [N] is true; a query that keeps none stays."""
        offsets = np.concatenate([[0], np.cumsum(rows)])[self.offsets]
        return self._part(self.query_ids, offsets, np.flatnonzero(rows))

    def for_queries(self, query_ids: Sequence[str]) -> Run:
        """The run of these queries, in this order; one that it does not hold has no documents."""
        if self.query_ids == query_ids:
            return self
        row_of = {query_id: row for row, query_id in enumerate(self.query_ids)}
        rows = np.array([row_of.get(query_id, len(self)) for query_id in query_ids], np.int64)
        starts, counts = np.append(self.offsets, self.offsets[-1])[rows], np.append(np.diff(self.offsets), 0)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return self._part(list(query_ids), offsets, np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts))

    def _part(self, query_ids: list[str], offsets: np.ndarray, rows: np.ndarray) -> Run:
        """Some rows of this run, which are checked and in order."""
        part = copy(self)
        part.query_ids, part.offsets, part.notes = query_ids, offsets, dict(self.notes)
        part.doc_ids, part.scores = self.doc_ids.take(pa.array(rows)), self.scores[rows]
        return part

    def parts(self) -> Iterator[tuple[int, int]]:
        """Ranges of whole queries, of about ROWS_AT_ONCE rows and at least one query."""
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.offsets, self.offsets[first] + ROWS_AT_ONCE, "right")) - 1
            last = min(max(last, first + 1), len(self))
            yield first, last
            first = last

    def _put_in_order(self) -> None:
        """Check that no document is twice in a query, and sort rows where they are not in trec_eval's order."""
        orders: list[np.ndarray] = []
        twice = 0
        repeated: tuple[str, str] | None = None
        for first, last in self.parts():
            start, end = int(self.offsets[first]), int(self.offsets[last])
            queries = np.repeat(np.arange(last - first), np.diff(self.offsets[first : last + 1]))
            ids, scores = self.doc_ids[start:end], self.scores[start:end]
            pairs = queries << 32 | ids.dictionary_encode().indices.to_numpy()
            if not np.diff(np.sort(pairs)).all():
                again = np.setdiff1d(np.arange(len(pairs)), np.unique(pairs, return_index=True)[1])
                repeated = repeated or (self.query_ids[first + queries[again[0]]], ids[int(again[0])].as_py())
                twice += len(again)
            order = np.arange(len(scores))
            if not ((scores[1:] < scores[:-1]) | (queries[1:] > queries[:-1])).all():
                # Arrow compares strings by their UTF-8 bytes.
                table = pa.table({"query": queries, "score": scores, "id": ids})
                keys = [("query", "ascending"), ("score", "descending"), ("id", "descending")]
                order = pc.sort_indices(table, keys).to_numpy().astype(np.int64)
            orders.append(order + start)
        if repeated is not None:
            what = f"document {repeated[1]!r} is listed more than once for query {repeated[0]!r}"
            what += f" ({twice} duplicates in all)" if twice > 1 else ""
            raise RankdistillError(what, where=self.name, fix=ONE_LINE)
        order = np.concatenate([np.zeros(0, np.int64), *orders])
        if (order[1:] < order[:-1]).any():
            self.scores = self.scores[order]
            self.doc_ids = self.doc_ids.take(pa.array(order))


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a whole run: TREC text (also gzip) or Parquet, told apart by content. Rows of one query may lie apart.

    Raises:
        RankdistillError: it is unreadable; the file and line (or row) are named.
    """
    path = Path(path)
    numbers: dict[str, int] = {}  # of the queries, as they come
    queries, doc_ids, scores, ranks = [], [], [], []
    notes: dict[str, int] = {}
    for batch in _batches(path):
        encoded = batch["query_id"].dictionary_encode()
        of_batch = [numbers.setdefault(query_id, len(numbers)) for query_id in encoded.dictionary.to_pylist()]
        queries.append(np.array(of_batch, np.int32)[encoded.indices.to_numpy()])
        doc_ids.append(batch["doc_id"])
        scores.append(batch["score"].to_numpy())
        ranks.append(batch["rank"].to_numpy())
        if batch.get("numeric_ids"):
            notes["numeric_ids"] = notes.get("numeric_ids", 0) + batch["numeric_ids"]
    query_ids, name = list(numbers), name or file_stem(path)
    if not queries:
        return Run([], np.zeros(1), [], np.zeros(0, np.float32), name)
    query_rows, score, rank = np.concatenate(queries), np.concatenate(scores), np.concatenate(ranks)
    ids = pa.chunked_array(doc_ids, pa.large_string()).combine_chunks()
    del queries, doc_ids, scores, ranks
    if (query_rows[1:] < query_rows[:-1]).any():
        order = np.argsort(query_rows, kind="stable")
        query_rows, score, rank, ids = query_rows[order], score[order], rank[order], ids.take(pa.array(order))
    contradicting = (score[1:] > score[:-1]) & (rank[1:] > rank[:-1])
    contradicting |= (score[1:] < score[:-1]) & (rank[1:] < rank[:-1])
    contradicting &= query_rows[1:] == query_rows[:-1]
    if contradicting.any():
        notes["rank_contradictions"] = len(np.unique(query_rows[1:][contradicting]))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(query_rows, minlength=len(query_ids)))])
    del query_rows, rank, contradicting
    try:
        return Run(query_ids, offsets, ids, score, name, notes)
    except RankdistillError as error:
        raise RankdistillError(error.what, where=str(path), fix=error.fix) from None


def iter_run(path: str | Path) -> Iterator[Ranking]:
    """Stream a run by query, in the file's order of queries; documents in trec_eval's order.

    Memory is that of one query and one block of the file, and the ids of the queries seen.

    Raises:
        RankdistillError: as `read_run`, and when a query's rows do not lie together.
    """
    path = Path(path)
    seen: set[str] = set()
    current: str | None = None
    doc_ids: list[str] = []
    scores: list[np.ndarray] = []
    for batch in _batches(path):
        encoded = pc.run_end_encode(batch["query_id"])
        batch_scores, start = batch["score"].to_numpy(), 0
        for query_id, end in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
            if query_id != current:
                if current is not None:
                    yield _ranking(current, doc_ids, scores, path)
                if query_id in seen:
                    fix = "sort the file by query, or read it whole with read_run"
                    what = f"the rows of query {query_id!r} do not lie together"
                    raise RankdistillError(what, where=str(path), fix=fix)
                seen.add(query_id)
                current, doc_ids, scores = query_id, [], []
            doc_ids += batch["doc_id"][start:end].to_pylist()
            scores.append(batch_scores[start:end])
            start = end
    if current is not None:
        yield _ranking(current, doc_ids, scores, path)


def _ranking(query_id: str, doc_ids: list[str], parts: list[np.ndarray], path: Path) -> Ranking:
    scores = np.concatenate(parts)
    _refuse_repeated(query_id, doc_ids, str(path))
    order = trec_order(scores, doc_ids)
    return query_id, [doc_ids[i] for i in order], scores[order]


def _refuse_repeated(query_id: str, doc_ids: Sequence[str], where: str) -> None:
    if len(set(doc_ids)) < len(doc_ids):
        repeated = next(doc_id for doc_id, count in Counter(doc_ids).items() if count > 1)
        what = f"document {repeated!r} is listed more than once for query {query_id!r}"
        raise RankdistillError(what, where=where, fix=ONE_LINE)


Batch = dict[str, Any]  # Arrow arrays by column; `numeric_ids`: how many ids were numbers


def _batches(path: Path) -> Iterator[Batch]:
    """Blocks of a run file with checked columns: query_id, doc_id (large_string), rank (int64), score (float32)."""
    if not path.is_file():
        raise RankdistillError("there is no such run file", where=str(path))
    with open(path, "rb") as stream:
        magic = stream.read(4)
    return _parquet_batches(path) if magic == b"PAR1" else _trec_batches(path)


def _parquet_batches(path: Path) -> Iterator[Batch]:
    first_row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if missing := {"query_id", "doc_id", "score"} - set(names):
                what = f"the run has no column {', '.join(sorted(missing))} (it has {', '.join(names)})"
                raise RankdistillError(what, where=str(path))
            columns = [name for name in SCHEMA.names if name in names]
            for table in file.iter_batches(ROW_GROUP, columns=columns):
                if any(table[name].null_count for name in ("query_id", "doc_id", "score")):
                    raise RankdistillError("the run has empty cells", where=f"{path}, rows from {first_row + 1}")

                def name_of(row: int, table: pa.RecordBatch = table) -> str:
                    return f"query {table['query_id'][row].as_py()!r}, document {table['doc_id'][row].as_py()!r}"

                score = checked_scores(table["score"].to_numpy(zero_copy_only=False), str(path), name_of)
                # The rank decides nothing: one that is no whole number is not compared with the score.
                ranked = "rank" in columns and not table["rank"].null_count and pa.types.is_integer(table["rank"].type)
                rank = table["rank"].cast(pa.int64()) if ranked else pa.array(np.zeros(table.num_rows, np.int64))
                yield {
                    "query_id": text_ids(table["query_id"], f"{path}, column query_id"),
                    "doc_id": text_ids(table["doc_id"], f"{path}, column doc_id"),
                    "rank": rank,
                    "score": pa.array(score),
                    "numeric_ids": sum(
                        table.num_rows for name in ("query_id", "doc_id") if pa.types.is_primitive(table[name].type)
                    ),
                }
                first_row += table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise RankdistillError(f"the Parquet run cannot be read: {error}", where=str(path)) from None


def _trec_batches(path: Path) -> Iterator[Batch]:
    """Blocks of whole lines, parsed by Arrow; a block Arrow does not take is parsed line by line, naming errors."""
    first_line, rest, delimiter = 1, b"", None
    with open_text(path) as stream:
        while True:
            try:
                block = stream.read(BLOCK)
            except (EOFError, OSError, zlib.error) as error:
                at = f"{path}, after line {first_line + rest.count(10) - 1}"
                raise RankdistillError(f"the compressed run is damaged or cut short: {error}", where=at) from None
            if first_line == 1 and not rest:
                block = block.removeprefix(b"\xef\xbb\xbf")
            lines = rest + block
            if block:
                end = lines.rfind(b"\n") + 1
                lines, rest = lines[:end], lines[end:]
                if len(rest) > LONGEST_LINE:
                    raise long_line(f"{path}, after line {first_line + lines.count(10) - 1}")
            if lines:
                delimiter = delimiter or ("\t" if b"\t" in lines.split(b"\n", 1)[0] else " ")
                batch = _parse_quickly(lines, delimiter) or _parse_carefully(lines, path, first_line)
                if len(batch["score"]):
                    yield batch
                first_line += lines.count(b"\n")
            if not block:
                return


def _parse_quickly(lines: bytes, delimiter: str) -> Batch | None:
    """Arrow's parser, for lines with exactly one delimiter between columns; None when anything is unusual."""
    if not _evenly_spaced(lines, delimiter.encode()):
        return None
    types = dict.fromkeys(TREC_COLUMNS, pa.large_string()) | {"rank": pa.int64(), "score": pa.float64()}
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(lines),
            pa.csv.ReadOptions(column_names=list(TREC_COLUMNS), use_threads=False, block_size=2 * BLOCK),
            pa.csv.ParseOptions(delimiter=delimiter, quote_char=False, ignore_empty_lines=True),
            pa.csv.ConvertOptions(
                column_types=types,
                include_columns=["query_id", "doc_id", "rank", "score"],
                null_values=[],
                strings_can_be_null=False,
            ),
        ).combine_chunks()
    except pa.ArrowException:
        return None
    if not table.num_rows:
        return None
    columns = {name: table[name].chunk(0) for name in table.column_names}
    with np.errstate(over="ignore"):
        score = columns["score"].to_numpy(zero_copy_only=False).astype(np.float32)
    if columns["score"].null_count or columns["rank"].null_count or not np.isfinite(score).all():
        return None
    return {name: columns[name] for name in ("query_id", "doc_id", "rank")} | {"score": pa.array(score)}


def _evenly_spaced(lines: bytes, delimiter: bytes) -> bool:
    """No white space but single delimiters between columns (line ends may be CRLF); no blank lines."""
    text = np.frombuffer(lines.replace(b"\r\n", b"\n") if b"\r" in lines else lines, np.uint8)
    space = text <= 32
    single = not (space[0] or (space[1:] & space[:-1]).any())
    return single and np.count_nonzero(space) == np.count_nonzero((text == delimiter[0]) | (text == 10))


def _parse_carefully(lines: bytes, path: Path, first_line: int) -> Batch:
    """Any ASCII white space between columns; every fault is named by file and line."""
    query_ids, doc_ids, ranks, scores = [], [], [], []
    for number, line in enumerate(lines.split(b"\n"), first_line):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}:{number}"
        if len(fields) != 6:
            raise RankdistillError(f"{len(fields)} columns instead of 6", where=where, fix=TREC_FIX)
        if number == 1 and is_header(line.decode(errors="replace").split(), 4):
            continue
        try:
            query_id, doc_id = fields[0].decode(), fields[2].decode()
        except UnicodeDecodeError as error:
            raise RankdistillError(f"not UTF-8: {error}", where=where, fix="convert the file to UTF-8") from None
        try:
            score = to_number(fields[4].decode(errors="replace"))
        except ValueError:
            what = f"the score is not a number: {fields[4].decode(errors='replace')!r}"
            raise RankdistillError(what, where=where, fix=TREC_FIX) from None
        query_ids.append(query_id)
        doc_ids.append(doc_id)
        scores.append(checked_scores([score], where)[0])
        # The rank decides nothing; one that is no number is trec_eval's concern as little as ours.
        ranks.append(int(fields[3]) if fields[3].isdigit() and len(fields[3]) < 18 else 0)
    return {
        "query_id": pa.array(query_ids, pa.large_string()),
        "doc_id": pa.array(doc_ids, pa.large_string()),
        "rank": pa.array(ranks, pa.int64()),
        "score": pa.array(scores, pa.float32()),
    }


class RunWriter(ExitStack):
    """Stream a run into a Parquet file, which appears under its name when the block ends without an exception.

    Columns: query_id, doc_id, rank (int32, from 1), score (float32). A row group ends with a query.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.queries = self.rows = 0
        self._seen: set[str] = set()
        self._writer: pq.ParquetWriter | None = None
        self._buffer: list[Ranking] = []
        self._flushed = 0  # rows

    def __enter__(self) -> Self:
        temporary = self.enter_context(written_whole(self.path))
        self._writer = self.enter_context(pq.ParquetWriter(temporary, SCHEMA, compression="zstd"))
        self.push(lambda kind, *_: None if kind else self._flush())
        return self

    def add(self, query_id: str, doc_ids: Sequence[str], scores: Any) -> None:
        """Write one query; documents are put in trec_eval's order.

        Raises:
            RankdistillError: the query was written before, a document is listed twice, a score is not finite.
        """
        if self._writer is None:
            raise ValueError("RunWriter is used as `with RunWriter(path) as writer:`")
        if query_id in self._seen:
            raise RankdistillError(f"query {query_id!r} is written twice", where=str(self.path))
        if len(doc_ids) != len(scores):
            raise ValueError(f"{len(doc_ids)} documents but {len(scores)} scores for query {query_id!r}")
        _refuse_repeated(query_id, doc_ids, str(self.path))
        self._seen.add(query_id)
        checked = checked_scores(scores, f"{self.path}, query {query_id!r}", doc_ids.__getitem__)
        order = trec_order(checked, doc_ids)
        self._buffer.append((query_id, [doc_ids[i] for i in order], checked[order]))
        self.queries += 1
        self.rows += len(order)
        if self.rows - self._flushed >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.rows > self._flushed and self._writer is not None:
            query_ids, doc_ids, scores = zip(*self._buffer, strict=True)
            counts = np.array([len(ids) for ids in doc_ids])
            columns = [
                pa.array(query_ids, pa.string()).take(pa.array(np.repeat(np.arange(len(counts)), counts))),
                pa.array(list(chain.from_iterable(doc_ids)), pa.string()),
                pa.array(ranks_within(counts), pa.int32()),
                pa.array(np.concatenate(scores)),
            ]
            self._writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=self.rows - self._flushed)
        self._buffer, self._flushed = [], self.rows


def write_trec(run: Run | Iterable[tuple[str, Sequence[str], Any]], path: str | Path, tag: str | None = None) -> None:
    """Write a TREC run file (gzip when the name ends in .gz), streaming; it appears when it is complete.

    Args:
        run: a run, or (query id, document ids, scores) one query at a time.
        tag: the last column; default the run's name.

    Raises:
        WhiteSpaceError: an id is empty or holds white space, which the format cannot carry.
    """
    path = Path(path)
    tag = tag if tag is not None else run.name if isinstance(run, Run) else path.stem
    tag = "_".join(tag.split()) or "run"
    with (
        written_whole(path) as temporary,
        gzip.open(temporary, "wb") if path.suffix == ".gz" else open(temporary, "wb") as stream,
    ):
        for block in _blocks(run, path):
            stream.write(_trec_lines(*block, tag, path))


def _blocks(
    run: Run | Iterable[tuple[str, Sequence[str], Any]], path: Path
) -> Iterator[tuple[list[str], np.ndarray, pa.Array, np.ndarray]]:
    """Some queries at a time, in trec_eval's order: query ids, documents of each, document ids, scores."""
    if not isinstance(run, Run):
        for query_id, ids, scores in run:
            checked = checked_scores(scores, f"{path}, query {query_id!r}", ids.__getitem__)
            order = trec_order(checked, ids)
            ordered = pa.array([ids[i] for i in order], pa.large_string())
            yield [query_id], np.array([len(order)]), ordered, checked[order]
        return
    for first, last in run.parts():
        start, end = run.offsets[first], run.offsets[last]
        counts = np.diff(run.offsets[first : last + 1])
        yield run.query_ids[first:last], counts, run.doc_ids[start:end], run.scores[start:end]


def _trec_lines(
    query_ids: list[str], counts: np.ndarray, doc_ids: pa.Array, scores: np.ndarray, tag: str, path: Path
) -> memoryview:
    queries = pa.array(query_ids, pa.large_string())
    rows = np.repeat(np.arange(len(counts)), counts)
    for ids in (queries, doc_ids):
        unfit = pc.match_substring_regex(ids, r"^$|[\t-\r ]")
        if (at := pc.index(unfit, True).as_py()) >= 0:
            raise WhiteSpaceError(
                f"the id {ids[at].as_py()!r} is empty or holds white space, which a TREC run cannot carry",
                where=f"{path}, query {query_ids[at if ids is queries else rows[at]]!r}",
                fix="write the run as Parquet (RunWriter)",
            )
    # Arrow prints a float32 with the fewest digits that read back as the same float32.
    numbers = [pa.array(column).cast(pa.large_string()) for column in (ranks_within(counts), scores)]
    q0, last, space = (pa.scalar(text, pa.large_string()) for text in ("Q0", f"{tag}\n", " "))
    lines = pc.binary_join_element_wise(queries.take(pa.array(rows)), q0, doc_ids, *numbers, last, space)
    # The strings of an Arrow array lie one after the other: together they are the text.
    length = int(np.frombuffer(lines.buffers()[1], np.int64)[len(lines)]) if len(lines) else 0
    return memoryview(lines.buffers()[2] or b"")[:length]
