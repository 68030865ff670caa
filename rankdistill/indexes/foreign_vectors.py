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
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import ArtifactWriter, file_digest, fingerprint, obtain
from rankdistill.collections.storage import DAMAGE
from rankdistill.collections.text_files import DOCUMENT_NAMES, QUERY_NAMES, data_files, read_lines
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import allocate_array
from rankdistill.indexes.vectors import check_vectors
from rankdistill.progress import progress

BLOCK = 16_384  # vectors in memory at a time
COPY = "vectors.npy"
VECTOR_COLUMN = "vector"
ID_COLUMNS = {"documents": "doc_id", "queries": "query_id"}
PARQUET = (".parquet", ".pq")
Side = Literal["documents", "queries"]


class Ids:
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
        for value in self:
            digest.update(value.encode() + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> str:
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
        folder: where the artifact goes of what was found out, and of the copy; the same file is looked through once.
        ids: ids of a .npy's rows, in its order.

    Raises:
        UsageError: a file that is neither .npy nor Parquet; ids given for Parquet, which has its own.
        RankdistillError: no such file; another shape, type or column than in the table above; NaN or infinity; rows of
            different length; another number of ids than vectors; an id that is missing or comes twice.
    """
    path, column = Path(path), ID_COLUMNS[side]
    if not path.exists():
        raise RankdistillError("there are no vectors here", where=str(path))
    if path.suffix == ".npy":
        stored, files = _open_npy(path), [path]
        known = _ids_beside(path, ids, column, len(stored))
        plain = stored.dtype == np.float32 and stored.flags.c_contiguous and stored.dtype.isnative
        source: NDArray[Any] | list[Path] = stored
    else:
        files = [path] if path.is_file() else data_files(path, "*", PARQUET)
        if not files or any(file.suffix not in PARQUET for file in files):
            raise UsageError("vectors come as .npy or Parquet", where=str(path), fix="np.save(FILE, vectors)")
        if ids is not None:
            raise UsageError(f"a Parquet file holds its ids itself, in the column {column}", where=str(path))
        known, plain, source = _ids_of_parquet(files, column), False, files
    if not len(known):
        raise RankdistillError("there are no vectors in this file", where=str(path))
    digests = [file_digest(file) for file in files]

    def make(writer: ArtifactWriter) -> None:
        writer.notes.update(_look_through(source, None if plain else writer.path / COPY, known, path))
        if digests != [file_digest(file) for file in files]:
            raise RankdistillError("the vectors changed while they were read", where=str(path), fix="run it again")

    artifact = obtain(
        Path(folder) / side,
        kind="foreign_vectors",
        fingerprint=fingerprint(["foreign_vectors", digests, plain]),
        settings={"side": side},
        inputs={},
        make=make,
    )
    notes = artifact.manifest
    vectors = np.load(path if plain else artifact.path / COPY, mmap_mode="r", allow_pickle=False)
    key = fingerprint([notes["vectors"], known.digest()])
    return ForeignVectors(path, known, vectors, key, int(notes["zero_rows"]), bool(notes["unit_length"]))


def _open_npy(path: Path) -> NDArray[Any]:
    where = str(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        raise RankdistillError(f"this is no array of numbers: {error}", where=where) from None
    if array.ndim != 2 or 0 in array.shape:
        what = f"an array of shape {list(array.shape)} where [vectors, dimension] was expected"
        raise RankdistillError(what, where=where)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        what = f"vectors of type {array.dtype} where float16, float32 or float64 was expected"
        raise RankdistillError(what, where=where, fix="quantised vectors must be turned back to floats first")
    return array


def _ids_beside(path: Path, ids: str | Path | None, column: str, count: int) -> Ids:
    file = Path(f"{path}.ids.parquet") if ids is None else Path(ids)
    if not file.is_file():
        if ids is None:
            return Ids(None, count)
        raise RankdistillError("there are no ids here", where=str(file))
    if file.suffix in PARQUET:
        known = _ids_of_parquet([file], column)
    else:
        lines = [line.strip() for _, line in read_lines(file)]
        if len(lines) == count + 1 and re.sub("[^a-z]", "", lines[0].lower()) in QUERY_NAMES | DOCUMENT_NAMES:
            del lines[0]  # a header
        known = _checked_ids(pa.chunked_array([pa.array(lines, pa.string())]), [file])
    if len(known) != count:
        what, fix = f"{count} vectors but {len(known)} ids", "one id for each row of the vectors, in their order"
        raise RankdistillError(what, where=f"{path}, {file}", fix=fix)
    return known


def _batches(file: Path, column: str, size: int = BLOCK) -> Iterator[pa.Array]:
    """A column of a Parquet file; an error where there is none, or the file is damaged."""
    try:
        opened = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise RankdistillError(f"this is no Parquet file: {error}", where=str(file)) from None
    if column not in (names := opened.schema_arrow.names):
        what, fix = f"there is no column {column!r}, only {', '.join(names)}", f"name the column {column}"
        raise RankdistillError(what, where=str(file), fix=fix)
    try:
        for batch in opened.iter_batches(batch_size=size, columns=[column]):
            batch.validate(full=True)  # offsets that lead elsewhere would be followed, and ids may not be UTF-8
            yield batch[column]
    except (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise RankdistillError(f"the Parquet file is damaged: {error}", where=str(file), fix="fetch it again") from None


def _ids_of_parquet(files: Sequence[Path], column: str) -> Ids:
    chunks: list[pa.Array] = []
    for file in files:
        for ids in _batches(file, column):
            kinds = pa.types.is_integer, pa.types.is_string, pa.types.is_large_string
            if not any(of_kind(ids.type) for of_kind in kinds):
                what = f"ids of type {ids.type} where text or whole numbers were expected"
                raise RankdistillError(what, where=f"{file}: {column}")
            chunks.append(ids.cast(pa.string()))
    return _checked_ids(pa.chunked_array(chunks, pa.string()), files)


def _checked_ids(values: pa.ChunkedArray, files: Sequence[Path]) -> Ids:
    where = ", ".join(map(str, files[:3]))
    empty = pc.or_kleene(pc.is_null(values), pc.equal(pc.utf8_trim_whitespace(values), ""))
    row = pc.index(empty, True).as_py()
    if row >= 0:
        raise RankdistillError("a vector without an id", where=f"{where}: row {row}")
    check_distinct(values, "ids", where)
    return Ids(values, len(values))


def check_distinct(ids: pa.ChunkedArray, what: str, where: str, fix: str | None = None) -> None:
    """Refuse ids of which one comes twice."""
    if pc.count_distinct(ids).as_py() != len(ids):
        counts = pc.value_counts(ids.combine_chunks())
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        problem = f"{len(twice)} {what} come twice, the first is {twice[0].as_py()!r}"
        raise RankdistillError(problem, where=where, fix=fix)


def _look_through(source: NDArray[Any] | list[Path], copy: Path | None, ids: Ids, path: Path) -> dict[str, Any]:
    """One pass over all vectors: checked, hashed, and written to `copy` if there is to be one."""
    dimension = source.shape[1] if isinstance(source, np.ndarray) else _dimension(source)
    digest = hashlib.blake2b(f"{len(ids)} {dimension}".encode(), digest_size=16)
    zero_rows, unit_length, first = 0, True, 0
    target = None if copy is None else allocate_array(copy, (len(ids), dimension), np.float32)
    with progress(f"read {path.name}", len(ids), "vectors") as bar:
        for block in _blocks(source, dimension):
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused as such
                rows = np.ascontiguousarray(block, dtype=np.float32)
            check_vectors(rows, dimension, lambda row: f"{path}: row {row}, id {ids[row]!r}", first)
            digest.update(rows.data)
            lengths = np.linalg.norm(rows, axis=1)
            zero_rows += int((lengths == 0).sum())
            unit_length &= not ((np.abs(lengths - 1) > 1e-2) & (lengths > 0)).any()
            if target is not None:
                target[first : first + len(rows)] = rows
            first += len(rows)
            bar.advance(len(rows))
    if target is not None:
        target.flush()
    return {"vectors": digest.hexdigest(), "zero_rows": zero_rows, "unit_length": bool(unit_length)}


def _dimension(files: Sequence[Path]) -> int:
    for file in files:
        for column in _batches(file, VECTOR_COLUMN, 1):
            first = column[0].as_py()
            if isinstance(first, list) and first:
                return len(first)
            raise RankdistillError("the first row has no vector", where=f"{file}: row 0")
    raise RankdistillError("there are no vectors in these files", where=", ".join(map(str, files[:3])))


def _blocks(source: NDArray[Any] | list[Path], dimension: int) -> Iterator[NDArray[Any]]:
    if isinstance(source, np.ndarray):
        for start in range(0, len(source), BLOCK):
            yield source[start : start + BLOCK]
        return
    for file in source:
        row = 0
        for column in _batches(file, VECTOR_COLUMN):
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
        what = f"a vector of {lengths[wrong[0]]} dimensions among others of {dimension}"
        raise RankdistillError(what, where=f"{file}: row {first_row + wrong[0]}")
    # A missing number inside a vector becomes NaN, which is refused where the row has a name.
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), dimension)
