"""Vectors made elsewhere, by any model: .npy or Parquet in, float32 rows on disk and their ids out.

| file    | vectors                                            | ids                                             |
|---------|----------------------------------------------------|-------------------------------------------------|
| .npy    | [n, dimension], float16, float32 or float64        | `ids`: Parquet or text, one a line; else        |
|         |                                                    | FILE.ids.parquet if it is there; else 0, 1, 2 … |
| Parquet | column `vector`: list or fixed-size list of floats | column doc_id or query_id, text or whole number |

A Parquet file, or a folder of them (in the order of their names), and every .npy that is not plain float32 is copied
once, block by block, to a float32 .npy. What grows: nothing in memory beyond one block and the ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import disk_errors, file_digest, fingerprint, locked, write_atomically
from rankdistill.collections.storage import DAMAGE
from rankdistill.collections.text_files import DOCUMENT_NAMES, QUERY_NAMES, data_files, read_lines
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import allocate_array
from rankdistill.indexes.vectors import check_vectors
from rankdistill.progress import progress

BLOCK = 16_384  # vectors in memory at a time
VECTOR_COLUMN = "vector"
ID_COLUMNS = {"documents": "doc_id", "queries": "query_id"}
Side = Literal["documents", "queries"]


class Ids(Sequence[str]):
    """Ids by row, as Arrow holds them (a Python list takes five times as much); row numbers where there are none."""

    def __init__(self, values: pa.ChunkedArray | None, count: int) -> None:
        self._values, self._count = values, count

    @classmethod
    def of(cls, ids: Iterable[str]) -> Ids:
        """Ids from anywhere, read once."""
        remaining = iter(ids)
        chunks = list(iter(lambda: pa.array(islice(remaining, BLOCK), pa.string()), pa.array([], pa.string())))
        values = pa.chunked_array(chunks, pa.string())
        return cls(values, len(values))

    def digest(self) -> str:
        """Of the ids in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for one in self:
            digest.update(one.encode() + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(self._count))]
        row = row + self._count if row < 0 else row
        if not 0 <= row < self._count:
            raise IndexError(row)
        return str(row) if self._values is None else str(self._values[row].as_py())

    def __iter__(self) -> Iterator[str]:
        if self._values is None:
            yield from map(str, range(self._count))
            return
        for chunk in self._values.chunks:
            for start in range(0, len(chunk), BLOCK):
                yield from chunk[start : start + BLOCK].to_pylist()


@dataclass(frozen=True)
class ForeignVectors:
    """Vectors [n, dimension], float32 and memory-mapped, and the id of each row."""

    path: Path
    ids: Ids
    vectors: NDArray[np.float32]
    fingerprint: str  # of vectors and ids, whatever file they came in
    zero_rows: int  # vectors of nothing but zeros: kept, they match nothing
    unit_length: bool  # every vector but the zero ones has length one, to 1%

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"ForeignVectors({self.path.name}: {len(self)} × {self.dimension}, {self.fingerprint})"


def open_foreign_vectors(
    path: str | Path, folder: str | Path, *, side: Side = "documents", ids: str | Path | None = None
) -> ForeignVectors:
    """Check a file of vectors, copy it to float32 where it is not, and open it memory-mapped.

    Args:
        folder: where the copy goes ({side}.npy), and what was found out ({side}.json); the same file is looked through
            once.
        ids: ids of a .npy's rows, in its order.

    Raises:
        UsageError: a file that is neither .npy nor Parquet; ids given for Parquet, which has its own.
        RankdistillError: no such file; another shape, type or column than in the table above; NaN or infinity; rows of
            different length; another number of ids than vectors; an id that is missing or comes twice.
    """
    path, folder = Path(path), Path(folder)
    if not path.exists():
        raise RankdistillError("there are no vectors here", where=str(path))
    column = ID_COLUMNS[side]
    if path.suffix == ".npy":
        stored = _open_npy(path)
        known = _ids_beside(path, ids, column, len(stored))
        digest = file_digest(path)
        plain = stored.dtype == np.float32 and stored.flags.c_contiguous and stored.dtype.isnative
        source: NDArray[Any] | list[Path] = stored
    else:
        files = [path] if path.is_file() else data_files(path, "*", (".parquet", ".pq"))
        if not files or any(file.suffix not in {".parquet", ".pq"} for file in files):
            raise UsageError("vectors come as .npy or Parquet", where=str(path), fix="np.save(FILE, vectors)")
        if ids is not None:
            raise UsageError(f"a Parquet file holds its ids itself, in the column {column}", where=str(path))
        known = _ids_of_parquet(files, column)
        digest = _digest_of_files(files)
        plain, source = False, files
    if not len(known):
        raise RankdistillError("there are no vectors in this file", where=str(path))
    record_file, copy = folder / f"{side}.json", folder / f"{side}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(copy):
        record = _record(record_file, digest, None if plain else copy)
        if not record:
            record = {"source": digest, **_look_through(source, copy if not plain else None, known, path)}
            if digest != (file_digest(path) if isinstance(source, np.ndarray) else _digest_of_files(source)):
                raise RankdistillError("the vectors changed while they were read", where=str(path), fix="run it again")
            write_atomically(record_file, json.dumps(record, indent=2) + "\n")
    vectors = np.load(path if plain else copy, mmap_mode="r", allow_pickle=False)
    made = fingerprint([record["vectors"], known.digest()])
    return ForeignVectors(path, known, vectors, made, int(record["zero_rows"]), bool(record["unit_length"]))


def _digest_of_files(files: Sequence[Path]) -> str:
    return fingerprint([file_digest(file) for file in files])


def _open_npy(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        raise RankdistillError(f"this is no array of numbers: {error}", where=str(path)) from None
    if array.ndim != 2 or 0 in array.shape:
        raise RankdistillError(
            f"an array of shape {list(array.shape)} where [vectors, dimension] was expected", where=str(path)
        )
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise RankdistillError(
            f"vectors of type {array.dtype} where float16, float32 or float64 was expected",
            where=str(path),
            fix="quantised vectors must be turned back to floats first",
        )
    return array


def _ids_beside(path: Path, given: str | Path | None, column: str, count: int) -> Ids:
    beside = Path(f"{path}.ids.parquet")
    file = Path(given) if given is not None else beside if beside.is_file() else None
    if file is None:
        return Ids(None, count)
    if not file.is_file():
        raise RankdistillError("there are no ids here", where=str(file))
    if file.suffix in {".parquet", ".pq"}:
        found = _ids_of_parquet([file], column)
    else:
        lines = [line.strip() for _, line in read_lines(file)]
        if len(lines) == count + 1 and re.sub("[^a-z]", "", lines[0].lower()) in QUERY_NAMES | DOCUMENT_NAMES:
            del lines[0]  # a header
        found = _checked_ids(pa.chunked_array([pa.array(lines, pa.string())]), [file])
    if len(found) != count:
        raise RankdistillError(
            f"{count} vectors but {len(found)} ids",
            where=f"{path}, {file}",
            fix="one id for each row of the vectors, in their order",
        )
    return found


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise RankdistillError(f"the Parquet file is damaged: {error}", where=str(file), fix="fetch it again") from None


def _vector_batches(file: Path, size: int) -> Iterator[pa.Array]:
    with _whole(file):
        for batch in _open_parquet(file, [VECTOR_COLUMN]).iter_batches(batch_size=size, columns=[VECTOR_COLUMN]):
            batch.validate(full=True)  # offsets that lead elsewhere would be followed
            yield batch[VECTOR_COLUMN]


def _open_parquet(file: Path, columns: Sequence[str]) -> pq.ParquetFile:
    try:
        opened = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise RankdistillError(f"this is no Parquet file: {error}", where=str(file)) from None
    missing = [name for name in columns if name not in opened.schema_arrow.names]
    if missing:
        raise RankdistillError(
            f"there is no column {missing[0]!r}, only {', '.join(opened.schema_arrow.names)}",
            where=str(file),
            fix="name the columns " + " and ".join(columns),
        )
    return opened


def _ids_of_parquet(files: Sequence[Path], column: str) -> Ids:
    chunks: list[pa.Array] = []
    for file in files:
        with _whole(file):
            found = _open_parquet(file, [column]).read(columns=[column])[column]
            found.validate(full=True)  # ids that are not UTF-8
        if len(found) and not (
            pa.types.is_integer(found.type) or pa.types.is_string(found.type) or pa.types.is_large_string(found.type)
        ):
            raise RankdistillError(
                f"ids of type {found.type} where text or whole numbers were expected", where=f"{file}: {column}"
            )
        chunks += found.cast(pa.string()).chunks
    return _checked_ids(pa.chunked_array(chunks, pa.string()), files)


def _checked_ids(values: pa.ChunkedArray, files: Sequence[Path]) -> Ids:
    where = ", ".join(map(str, files[:3]))
    empty = pc.or_kleene(pc.is_null(values), pc.equal(pc.utf8_trim_whitespace(values), ""))
    row = pc.index(empty, True).as_py()
    if row >= 0:
        raise RankdistillError("a vector without an id", where=f"{where}: row {row}")
    if pc.count_distinct(values).as_py() != len(values):
        counts = pc.value_counts(values)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        raise RankdistillError(f"{len(twice)} ids come twice, the first is {twice[0].as_py()!r}", where=where)
    return Ids(values, len(values))


def _record(file: Path, digest: str, copy: Path | None) -> dict[str, Any]:
    """What was found out about this very file before, if its copy is whole."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        whole = record["source"] == digest and (copy is None or copy.stat().st_size == record["copy_bytes"])
        whole = whole and {"vectors", "zero_rows", "unit_length"} <= record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return record if whole else {}


def _look_through(source: NDArray[Any] | list[Path], copy: Path | None, ids: Ids, path: Path) -> dict[str, Any]:
    """One pass over all vectors: checked, hashed, and written to `copy` if there is to be one."""
    dimension = source.shape[1] if isinstance(source, np.ndarray) else _dimension(source)
    digest = hashlib.blake2b(f"{len(ids)} {dimension}".encode(), digest_size=16)
    zero_rows, unit_length, done = 0, True, 0
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.tmp") if copy is not None else None
    try:
        with disk_errors(path if copy is None else copy), progress(f"read {path.name}", len(ids), "vectors") as bar:
            target = None if partial is None else allocate_array(partial, (len(ids), dimension), np.float32)
            for block in _blocks(source, dimension, path):
                with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused as such
                    rows = np.ascontiguousarray(block, dtype=np.float32)
                first = done
                check_vectors(rows, dimension, lambda row: f"{path}: row {row}, id {ids[row]!r}", first)
                digest.update(rows.data)
                lengths = np.linalg.norm(rows, axis=1)
                zero_rows += int((lengths == 0).sum())
                unit_length &= not ((np.abs(lengths - 1) > 1e-2) & (lengths > 0)).any()
                if target is not None:
                    target[first : first + len(rows)] = rows
                done = first + len(rows)
                bar.advance(len(rows))
            if target is not None and partial is not None and copy is not None:
                target.flush()
                del target
                os.replace(partial, copy)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    found = {"vectors": digest.hexdigest(), "zero_rows": zero_rows, "unit_length": unit_length}
    return found if copy is None else {**found, "copy_bytes": copy.stat().st_size}


def _dimension(files: Sequence[Path]) -> int:
    for file in files:
        for column in _vector_batches(file, 1):
            first = column[0].as_py()
            if isinstance(first, list) and first:
                return len(first)
            raise RankdistillError("the first row has no vector", where=f"{file}: row 0")
    raise RankdistillError("there are no vectors in these files", where=", ".join(map(str, files[:3])))


def _blocks(source: NDArray[Any] | list[Path], dimension: int, path: Path) -> Iterator[NDArray[Any]]:
    if isinstance(source, np.ndarray):
        for start in range(0, len(source), BLOCK):
            yield source[start : start + BLOCK]
        return
    for file in source:
        row = 0
        for column in _vector_batches(file, BLOCK):
            yield _rows_of(column, dimension, file, row)
            row += len(column)


def _rows_of(column: pa.Array, dimension: int, file: Path, first_row: int) -> NDArray[Any]:
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise RankdistillError(f"vectors of type {kind} where a list of floats was expected", where=str(file))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != dimension)
    if len(wrong):
        raise RankdistillError(
            f"a vector of {lengths[wrong[0]]} dimensions among others of {dimension}",
            where=f"{file}: row {first_row + wrong[0]}",
        )
    # A missing number inside a vector becomes NaN, which is refused where the row has a name.
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), dimension)
