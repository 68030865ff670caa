"""Arrow tables that are written as a stream and read at random, and the id → row index beside them.

Nothing here holds a whole column in memory: a table is an Arrow IPC file of small record batches, read through a
memory map; ids are found by a 64-bit hash in a sorted array on disk and compared with the real id before they count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rankdistill.artifacts import disk_errors
from rankdistill.errors import RankdistillError

Rows = npt.NDArray[np.int64]

BATCH_ROWS = 4096
BATCH_CHARACTERS = 16 << 20  # a batch of very long texts is closed early: memory stays small, offsets stay 32 bit
BUCKETS = 16  # ids are sorted in this many parts, so sorting holds a sixteenth of the hashes in memory


def id_hash(identifier: str) -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def id_hashes(identifiers: Iterable[str]) -> npt.NDArray[np.uint64]:
    return np.fromiter((id_hash(identifier) for identifier in identifiers), dtype=np.uint64)


class TableWriter:
    """Writes rows into an Arrow IPC file batch by batch; `close` makes it durable."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema, self.rows = path, schema, 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(path, "wb")  # noqa: SIM115 - closed by close or abandon
        self._writer = pa.ipc.new_file(self._stream, schema)
        self._columns: list[list[Any]] = [[] for _ in schema]
        self._characters = 0

    def add(self, *values: Any) -> None:
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
            if isinstance(value, str):
                self._characters += len(value)
        self.rows += 1
        if len(self._columns[0]) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Append a batch of the same schema as it is."""
        self._flush()
        if batch.num_rows:
            self._writer.write_batch(batch)
            self.rows += batch.num_rows

    def _flush(self) -> None:
        if not self._columns[0]:
            return
        arrays = [pa.array(values, type=field.type) for values, field in zip(self._columns, self.schema, strict=True)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self._columns = [[] for _ in self.schema]
        self._characters = 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        """Close the file without finishing it (the folder is about to be removed)."""
        self._stream.close()


# What Arrow and NumPy raise over damaged files; a .npy's header is Python's syntax.
DAMAGE = (
    *(pa.ArrowException, OSError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(SyntaxError, TokenError),
)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a damaged file of the cache raises into an error that says how to be rid of it."""
    try:
        yield
    except DAMAGE as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise RankdistillError(
            f"a file of the cache is missing or damaged ({reason})",
            where=str(path),
            fix=f"delete {path if path.is_dir() else path.parent} and run the same command again",
        ) from error


class Table:
    """An Arrow IPC file through a memory map: pages come in when they are touched and can be given back.

    Raises:
        RankdistillError: it is damaged; a batch is looked through before it is first read, since a wrong offset in it
            would be read as an address.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.schema = reader.schema
            self._batches: list[pa.RecordBatch] = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._valid = np.zeros(len(self._batches), bool)
        self.starts: Rows = np.concatenate(
            [np.zeros(1, np.int64), np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)]
        )

    def batch(self, number: int) -> pa.RecordBatch:
        if not self._valid[number]:
            with readable(self.path):
                self._batches[number].validate(full=True)
            self._valid[number] = True
        return self._batches[number]

    @property
    def batches(self) -> Iterator[pa.RecordBatch]:
        return map(self.batch, range(len(self._batches)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, column: str, rows: Sequence[int] | Rows) -> list[Any]:
        """The values of a column at `rows` (any order, repeats allowed).

        Raises:
            IndexError: a row is negative or behind the end.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if not len(wanted):
            return []
        if wanted.min() < 0 or wanted.max() >= len(self):
            wrong = int(wanted.min()) if wanted.min() < 0 else int(wanted.max())
            raise IndexError(f"row {wrong} is not among the {len(self)} rows")
        place = self.schema.get_field_index(column)
        batch_of = np.searchsorted(self.starts, wanted, side="right") - 1
        order = np.argsort(batch_of, kind="stable")
        found: list[Any] = [None] * len(wanted)
        for group in np.split(order, np.flatnonzero(np.diff(batch_of[order])) + 1):
            batch = int(batch_of[group[0]])
            local = wanted[group] - self.starts[batch]
            values = self.batch(batch).column(place).take(pa.array(local)).to_pylist()
            for position, value in zip(group.tolist(), values, strict=True):
                found[position] = value
        return found

    def slices(self, start: int, stop: int, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, batch of at most `size` rows) from `start` to `stop`, in order."""
        batch = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, start + size, int(self.starts[batch + 1]))
            yield start, self.batch(batch).slice(start - int(self.starts[batch]), end - start)
            start = end
            batch += int(start >= self.starts[batch + 1])


class Repeat(NamedTuple):
    """The same id twice."""

    first_row: int
    first_line: int
    row: int
    line: int


class IdIndexWriter:
    """Collects id hashes on disk; `sort` finds repeated ids; `publish` writes the sorted index.

    Memory: the buffer while ids come in, a sixteenth of the ids (24 bytes each) while sorting.
    """

    RECORD = np.dtype([("hash", np.uint64), ("row", np.int64), ("line", np.int64)])

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.rows = folder, name, 0
        self._hashes: list[int] = []
        self._lines: list[int] = []
        self._flushed = 0
        folder.mkdir(parents=True, exist_ok=True)

    def _bucket(self, number: int) -> Path:
        return self.folder / f".{self.name}.{number}.bucket"

    def add(self, identifier: str, line: int) -> None:
        self._hashes.append(id_hash(identifier))
        self._lines.append(line)
        self.rows += 1
        if len(self._hashes) >= 1 << 16:
            self._flush()

    def _flush(self) -> None:
        records = np.empty(len(self._hashes), self.RECORD)
        records["hash"], records["line"] = self._hashes, self._lines
        records["row"] = np.arange(self._flushed, self.rows)
        bucket_of = records["hash"] >> np.uint64(60)
        for number in np.unique(bucket_of).tolist():
            with open(self._bucket(int(number)), "ab") as stream:
                stream.write(records[bucket_of == number].tobytes())
        self._flushed = self.rows
        self._hashes, self._lines = [], []

    def _buckets(self) -> Iterator[Path]:
        return filter(Path.exists, map(self._bucket, range(BUCKETS)))

    def sort(self, table: Table, column: str) -> list[Repeat]:
        """Sort the buckets; the repeated ids of `table`'s `column`, each against its first occurrence."""
        self._flush()
        repeats: list[Repeat] = []
        for path in self._buckets():
            records = np.fromfile(path, self.RECORD)
            records = records[np.argsort(records["hash"], kind="stable")]  # stable: rows stay ascending within a hash
            path.write_bytes(records.tobytes())
            equal = np.flatnonzero(records["hash"][1:] == records["hash"][:-1])
            if not len(equal):
                continue
            members = records[np.union1d(equal, equal + 1)]
            first: dict[str, tuple[int, int]] = {}
            current = None
            for identifier, record in zip(table.take(column, members["row"]), members.tolist(), strict=True):
                if record[0] != current:
                    first, current = {}, record[0]
                row, line = first.setdefault(identifier, (record[1], record[2]))
                if row != record[1]:
                    repeats.append(Repeat(row, line, record[1], record[2]))
        return sorted(repeats, key=lambda repeat: repeat.row)

    def publish(self, dropped: Rows) -> None:
        """Write `<name>.hashes.npy` (sorted) and `<name>.rows.npy`; `dropped` rows (sorted) are taken out."""
        count = self.rows - len(dropped)
        # Streams, not memory maps: a full disk is an error here, where a mapped page would end the process.
        with (
            _npy(self.folder / f"{self.name}.hashes.npy", np.dtype(np.uint64), count) as hashes,
            _npy(self.folder / f"{self.name}.rows.npy", np.dtype(np.int64), count) as rows,
        ):
            for path in self._buckets():
                records = np.fromfile(path, self.RECORD)
                path.unlink()
                if len(dropped):
                    records = records[~np.isin(records["row"], dropped)]
                    records["row"] -= np.searchsorted(dropped, records["row"])
                hashes.write(records["hash"].tobytes())
                rows.write(records["row"].tobytes())


@contextmanager
def _npy(path: Path, dtype: np.dtype[Any], count: int) -> Iterator[IO[bytes]]:
    """A .npy file of one dimension to write the bytes of `count` values into."""
    with open(path, "wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def _load(path: Path, mapped: bool) -> Any:
    with readable(path):
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


class IdIndex:
    """Finds the row of an id: binary search for its hash on disk, then the real id is compared."""

    def __init__(self, folder: Path, name: str, table: Table, column: str) -> None:
        self._table, self._column = table, column
        empty = len(table) == 0
        self._hashes, self._rows = (_load(folder / f"{name}.{part}.npy", not empty) for part in ("hashes", "rows"))
        if not len(self._hashes) == len(self._rows) == len(table):
            with readable(folder):
                raise ValueError(f"{name}.hashes.npy does not fit {name}.arrow")

    def lookup(self, identifiers: Sequence[str]) -> Rows:
        """int64 rows, -1 where an id is unknown."""
        found = np.full(len(identifiers), -1, np.int64)
        if not len(identifiers) or not len(self._hashes):
            return found
        hashes = id_hashes(identifiers)
        at = np.searchsorted(self._hashes, hashes)
        open_ = np.arange(len(identifiers))
        while True:
            open_ = open_[at[open_] < len(self._hashes)]
            open_ = open_[self._hashes[at[open_]] == hashes[open_]]
            if not len(open_):
                return found
            rows = self._rows[at[open_]]
            if rows.min() < 0 or rows.max() >= len(self._table):
                with readable(self._table.path):
                    raise ValueError("the index of ids names rows that are not there")
            same = np.array(
                [identifiers[i] == real for i, real in zip(open_, self._table.take(self._column, rows), strict=True)]
            )
            found[open_[same]] = rows[same]
            open_ = open_[~same]  # another id with the same hash: look at the next one
            at[open_] += 1
