"""Vectors of any model, from .npy and Parquet: the same rows, ids and fingerprint; what is wrong is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.foreign_vectors import BLOCK, open_foreign_vectors

COUNT, DIMENSION = BLOCK + 5, 4
VECTORS = np.random.default_rng(0).normal(size=(COUNT, DIMENSION)).astype(np.float16)
IDS = [f"d {row}" for row in range(COUNT)]


def parquet(path: Path, vectors: Any = VECTORS, ids: Any = IDS, column: str = "doc_id", kind: Any = None) -> Path:
    kind = kind or pa.list_(pa.float32())
    rows = pa.array(vectors.tolist() if isinstance(vectors, np.ndarray) else vectors, kind)
    pq.write_table(pa.table({column: ids, "vector": rows}), path, row_group_size=3000)
    return path


def write(folder: Path, form: str) -> Path:
    """The same vectors and ids in one of the forms they may come in."""
    if form == "fixed":
        return parquet(folder / "fixed.parquet", kind=pa.list_(pa.float64(), DIMENSION))
    if form == "list":
        return parquet(folder / "list.parquet", kind=pa.large_list(pa.float32()))
    if form == "folder":
        (folder / "parts").mkdir()
        parquet(folder / "parts" / "b.parquet", VECTORS[100:], IDS[100:])
        return parquet(folder / "parts" / "a.parquet", VECTORS[:100], IDS[:100]).parent
    path = folder / "vectors.npy"
    np.save(path, np.asfortranarray(VECTORS, np.float32) if form == "fortran" else VECTORS.astype(form))
    pq.write_table(pa.table({"doc_id": IDS}), f"{path}.ids.parquet")
    return path


@pytest.mark.parametrize("form", ["float16", "float32", "float64", ">f4", "fortran", "fixed", "list", "folder"])
def test_every_form_gives_the_same_vectors_ids_and_fingerprint(form: str, tmp_path: Path) -> None:
    opened = open_foreign_vectors(write(tmp_path, form), tmp_path / "made")
    np.testing.assert_array_equal(opened.vectors, VECTORS.astype(np.float32))
    assert isinstance(opened.vectors, np.memmap) and opened.vectors.dtype == np.float32
    assert list(opened.ids) == IDS and opened.ids[5] == IDS[5]
    assert (opened.dimension, len(opened), opened.zero_rows, opened.unit_length) == (DIMENSION, COUNT, 0, False)
    plain = tmp_path / "plain.npy"
    np.save(plain, VECTORS.astype(np.float32))
    (tmp_path / "ids.txt").write_text("\n".join(IDS) + "\n")
    other = open_foreign_vectors(plain, tmp_path / "other", ids=tmp_path / "ids.txt")
    assert other.fingerprint == opened.fingerprint
    assert not list((tmp_path / "other").rglob("*.npy"))  # plain float32 is not copied
    assert open_foreign_vectors(plain, tmp_path / "numbered").ids[7] == "7"
    assert open_foreign_vectors(plain, tmp_path / "numbered").fingerprint != opened.fingerprint


def test_a_file_is_copied_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path, copy = parquet(tmp_path / "v.parquet"), tmp_path / "made" / "documents" / "vectors.npy"
    first = open_foreign_vectors(path, tmp_path / "made")
    stamp = copy.stat().st_mtime_ns
    assert open_foreign_vectors(path, tmp_path / "made").fingerprint == first.fingerprint
    assert copy.stat().st_mtime_ns == stamp
    parquet(path, -VECTORS)
    changed = open_foreign_vectors(path, tmp_path / "made")
    assert changed.fingerprint != first.fingerprint
    np.testing.assert_array_equal(changed.vectors, -VECTORS.astype(np.float32))
    copy.write_bytes(b"torn")
    assert open_foreign_vectors(path, tmp_path / "made").fingerprint == changed.fingerprint


def test_queries_have_query_ids_and_numbers_are_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "q.parquet", ids=list(range(COUNT)), column="query_id")
    assert open_foreign_vectors(path, tmp_path, side="queries").ids[3] == "3"
    with pytest.raises(RankdistillError, match="no column 'doc_id', only query_id, vector"):
        open_foreign_vectors(path, tmp_path)


def test_zero_and_unit_vectors_are_counted(tmp_path: Path) -> None:
    vectors = VECTORS.astype(np.float32) / np.linalg.norm(VECTORS.astype(np.float32), axis=1, keepdims=True)
    vectors[[3, BLOCK + 1]] = 0
    np.save(tmp_path / "v.npy", vectors)
    opened = open_foreign_vectors(tmp_path / "v.npy", tmp_path)
    assert opened.zero_rows == 2 and opened.unit_length


def changed(row: int, value: Any) -> list[Any]:
    rows: list[Any] = VECTORS.astype(float).tolist()
    rows[row] = value
    return rows


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (changed(4321, [1.0, 2.0]), IDS, r"a vector of 2 dimensions among others of 4\n.*row 4321"),
        (changed(17, None), IDS, r"a vector of 0 dimensions among others of 4\n.*row 17"),
        (changed(BLOCK + 1, [1, None, 1, 1]), IDS, f"row {BLOCK + 1}, id 'd {BLOCK + 1}'"),
        (changed(9, [1, 1e300, 1, 1]), IDS, "row 9, id 'd 9'"),
        (changed(0, None), IDS, "the first row has no vector"),
        (VECTORS, [*IDS[:-1], "d 0"], "1 ids come twice, the first is 'd 0'"),
        (VECTORS, [*IDS[:5], None, *IDS[6:]], "a vector without an id\n.*row 5"),
        (VECTORS, [*IDS[:5], " ", *IDS[6:]], "a vector without an id\n.*row 5"),
        (VECTORS, [1.5 * row for row in range(COUNT)], "ids of type double"),
        (VECTORS[:0], IDS[:0], "no vectors in this file"),
    ],
)
def test_bad_parquet_is_named_and_leaves_nothing(vectors: Any, ids: Any, message: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "v.parquet", vectors, ids, kind=pa.list_(pa.float64()))
    with pytest.raises(RankdistillError, match=message):
        open_foreign_vectors(path, tmp_path / "made")
    assert not [file for file in tmp_path.glob("made/*") if not file.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (VECTORS.astype(np.int8), "type int8"),
        (VECTORS.ravel()[: COUNT * DIMENSION], r"shape \[65556\]"),
        (VECTORS[:0], r"shape \[0, 4\]"),
        (np.array([{"a": 1}, None]), "no array of numbers"),
        (np.where(np.arange(COUNT)[:, None] == 5, np.inf, VECTORS), r"1 vectors hold NaN or infinity\n.*row 5, id '5'"),
        (b"\x93NUMPY", "no array of numbers"),
        (None, "no vectors here"),
    ],
)
def test_bad_arrays_are_named(array: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(RankdistillError, match=message):
        open_foreign_vectors(path, tmp_path / "made")


@pytest.mark.parametrize(
    ("ids", "message"),
    [(b"a\nb\n", f"{COUNT} vectors but 2 ids"), (None, "there are no ids here"), (b"\xff\xfe\n", "UTF-16")],
)
def test_bad_ids_are_named(ids: bytes | None, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    if ids is not None:
        (tmp_path / "ids.txt").write_bytes(ids)
    with pytest.raises(RankdistillError, match=message):
        open_foreign_vectors(tmp_path / "v.npy", tmp_path / "made", ids=tmp_path / "ids.txt")


def test_other_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, message: str, error: type[Exception] = RankdistillError, **more: Any) -> None:
        with pytest.raises(error, match=message):
            open_foreign_vectors(tmp_path / name, tmp_path / "made", **more)

    (tmp_path / "v.csv").write_text("1,2\n")
    refused("v.csv", "vectors come as .npy or Parquet", UsageError)
    (tmp_path / "v.parquet").write_text("no")
    refused("v.parquet", "no Parquet file")
    parquet(tmp_path / "v.parquet")
    refused("v.parquet", "holds its ids itself", UsageError, ids=tmp_path / "ids.txt")
    parquet(tmp_path / "w.parquet", [1.0] * COUNT, kind=pa.float64())
    refused("w.parquet", "first row has no vector")


def test_ids_that_are_no_text_are_named(tmp_path: Path) -> None:
    ids = pa.array([b"\xff", b"b"], pa.binary()).view(pa.string())
    vectors = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"doc_id": ids, "vector": vectors}), tmp_path / "v.parquet")
    with pytest.raises(RankdistillError, match=r"Parquet file is damaged(.|\n)*v\.parquet"):
        open_foreign_vectors(tmp_path / "v.parquet", tmp_path / "made")


def test_memory_does_not_grow_with_the_vectors(tmp_path: Path) -> None:
    """A float64 file of 150 MB is copied with less than half of that."""
    array = np.lib.format.open_memmap(tmp_path / "v.npy", mode="w+", dtype=np.float64, shape=(60_000, 320))
    array[:] = 1
    del array
    code = (
        "import sys, threading, time\n"
        "from rankdistill.indexes.foreign_vectors import open_foreign_vectors\n"
        "def anonymous():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "before, seen, running = anonymous(), [], [True]\n"
        "def watch():\n"
        "    while running:\n"
        "        seen.append(anonymous())\n"
        "        time.sleep(0.002)\n"
        "thread = threading.Thread(target=watch)\n"
        "thread.start()\n"
        "opened = open_foreign_vectors(sys.argv[1], sys.argv[2])\n"
        "running.clear()\n"
        "thread.join()\n"
        "print(len(opened), max(seen) - before)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "v.npy"), str(tmp_path / "made")],
        capture_output=True,
        text=True,
        check=True,
    )
    count, grown = map(int, process.stdout.split())
    assert count == 60_000 and grown < 75_000, grown
