"""Arrow tables that are written as a stream and read at random, and the id → row index beside them.

Nothing here holds a whole column in memory: a table is an Arrow IPC file of small record batches, read through a
memory map; ids are found by a 64-bit hash in a sorted array on disk and compared with the real id before they count.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rankdistill.artifacts import disk_errors
from rankdistill.errors import RankdistillError

Rows = npt.NDArray[np.int64]

BATCH_ROWS = 4096
BATCH_CHARACTERS = 16 << 20  # a batch of very long texts is closed early: memory stays small, offsets stay 32 bit


def id_hash(identifier: str) -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


class Column(AbstractContextManager["Column"]):
    """An .npy file of numbers, or of rows of them, that grows: its header is written last, when the length is known."""

    def __init__(self, path: Path, dtype: type[np.generic], *row: int) -> None:
        self.dtype, self.row, self.length = np.dtype(dtype), row, 0
        self._stream = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._header()

    def _header(self) -> None:
        # numpy pads the header so that the first dimension may grow in place.
        self._stream.seek(0)
        description = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length, *self.row)}
        np.lib.format.write_array_header_1_0(self._stream, description)

    def append(self, values: npt.NDArray[Any]) -> None:
        # A stream, not a memory map: a full disk is an error here, where a mapped page would end the process.
        self._stream.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._header()
        self._stream.close()


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
        if batch.num_rows:
            self._writer.write_batch(batch)

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
        self.starts: Rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)

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
        places = np.asarray(rows, dtype=np.int64)
        if not len(places):
            return []
        if places.min() < 0 or places.max() >= len(self):
            wrong = int(places.min()) if places.min() < 0 else int(places.max())
            raise IndexError(f"row {wrong} is not among the {len(self)} rows")
        number = self.schema.get_field_index(column)
        batch_of = np.searchsorted(self.starts, places, side="right") - 1
        order = np.argsort(batch_of, kind="stable")
        values: list[Any] = [None] * len(places)
        for group in np.split(order, np.flatnonzero(np.diff(batch_of[order])) + 1):
            batch = int(batch_of[group[0]])
            local = pa.array(places[group] - self.starts[batch])
            taken = self.batch(batch).column(number).take(local).to_pylist()
            for place, value in zip(group.tolist(), taken, strict=True):
                values[place] = value
        return values


class IdIndexWriter:
    """Collects the hashes of ids; `repeats` finds ids that come twice; `publish` writes the sorted index.

    Memory: 16 bytes an id, 40 while they are sorted.
    """

    def __init__(self) -> None:
        self._hashes, self.lines = array("Q"), array("q")

    def add(self, identifier: str, line: int) -> None:
        self._hashes.append(id_hash(identifier))
        self.lines.append(line)

    def repeats(self, table: Table, column: str) -> Iterator[tuple[str, int, int]]:
        """(id, its first row, another row of it) of the ids that come twice in `table`'s `column`, in order."""
        hashes = np.array(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        rows = np.sort(order[np.union1d(equal, equal + 1)])
        first: dict[str, int] = {}
        for identifier, row in zip(table.take(column, rows), rows.tolist(), strict=True):
            if first.setdefault(identifier, row) != row:
                yield identifier, first[identifier], row

    def publish(self, folder: Path, name: str, dropped: Rows) -> None:
        """Write `<name>.hashes.npy` (sorted) and `<name>.rows.npy`; `dropped` rows are taken out."""
        hashes = np.delete(np.array(self._hashes, np.uint64), dropped)
        order = np.argsort(hashes, kind="stable")
        for part, dtype, values in (("hashes", np.uint64, hashes[order]), ("rows", np.int64, order)):
            with Column(folder / f"{name}.{part}.npy", dtype) as column:
                column.append(values)


class IdIndex:
    """Finds the row of an id: binary search for its hash on disk, then the real id is compared."""

    def __init__(self, folder: Path, name: str, table: Table, column: str) -> None:
        self._table, self._column = table, column
        self._hashes, self._rows = (self._load(folder / f"{name}.{part}.npy") for part in ("hashes", "rows"))
        if not len(self._hashes) == len(self._rows) == len(table):
            with readable(folder):
                raise ValueError(f"{name}.hashes.npy does not fit {name}.arrow")

    def _load(self, path: Path) -> Any:
        with readable(path):  # an empty array cannot be mapped
            return np.load(path, mmap_mode="r" if len(self._table) else None, allow_pickle=False)

    def lookup(self, identifiers: Sequence[str]) -> Rows:
        """int64 rows, -1 where an id is unknown."""
        result = np.full(len(identifiers), -1, np.int64)
        if not len(identifiers) or not len(self._hashes):
            return result
        hashes = np.fromiter(map(id_hash, identifiers), np.uint64)
        at = np.searchsorted(self._hashes, hashes)
        open_ = np.arange(len(identifiers))
        while True:
            open_ = open_[at[open_] < len(self._hashes)]
            open_ = open_[self._hashes[at[open_]] == hashes[open_]]
            if not len(open_):
                return result
            rows = self._rows[at[open_]]
            if rows.min() < 0 or rows.max() >= len(self._table):
                with readable(self._table.path):
                    raise ValueError("the index of ids names rows that are not there")
            names = self._table.take(self._column, rows)
            same = np.array([identifiers[i] == name for i, name in zip(open_, names, strict=True)])
            result[open_[same]] = rows[same]
            open_ = open_[~same]  # another id with the same hash: look at the next one
            at[open_] += 1
