"""Array files in which each document has as many entries as it needs, written shard by shard, resumable after kill -9.

A .npy file for each array, all with the same number of entries, and the offsets at which a document's entries begin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import write_atomically
from rankdistill.errors import RankdistillError
from rankdistill.indexes.vectors import DONE
from rankdistill.progress import progress

if TYPE_CHECKING:
    from rankdistill.collections import Collection

LENGTHS = "lengths.bin"  # entries of each document, int32; gone when all are written

# The number format of an array and the shape of one entry
Layout = tuple[np.dtype[Any], tuple[int, ...]]


def write_ragged(
    folder: Path,
    layouts: Mapping[str, Layout],
    offsets: str,
    collection: Collection,
    encode: Callable[[int, list[str]], tuple[NDArray[Any], Mapping[str, NDArray[Any]]]],
    shard_size: int,
) -> int:
    """Encode every document and write its entries; the number of entries of all.

    All files only grow; what was written beyond the last finished shard is cut off before going on.

    Args:
        layouts: file → what it holds.
        offsets: file of the offsets, int64 [documents + 1].
        encode: (row of the first text, texts) → (entries of each text, file → entries of all, one after the other).

    Raises:
        RankdistillError: the collection has changed while it was read; the disk is full.
    """
    done_file = folder / DONE
    done = json.loads(done_file.read_text(encoding="utf-8")) if done_file.is_file() else {}
    if done.keys() != {"rows", "entries"}:
        done = {"rows": 0, "entries": 0}
    for name in (*layouts, LENGTHS):
        (folder / name).touch()
    streams: dict[str, BinaryIO] = {}
    try:
        for name in (*layouts, LENGTHS):
            streams[name] = open(folder / name, "r+b")  # noqa: SIM115  closed below, all of them
        for name, layout in layouts.items():
            start = _header(streams[name], 0, layout)
            streams[name].truncate(start + done["entries"] * _entry_bytes(layout))
        streams[LENGTHS].truncate(done["rows"] * 4)
        for stream in streams.values():
            stream.seek(0, os.SEEK_END)
        with progress("encode documents", collection.document_count, "texts") as bar:
            bar.done = done["rows"]
            for first, texts in collection.iter_documents(batch_size=shard_size, start=done["rows"]):
                lengths, arrays = encode(first, texts)
                if len(lengths) != len(texts):
                    raise RankdistillError(f"vectors of {len(lengths)} texts came back for {len(texts)}")
                for name, (kind, _) in layouts.items():
                    streams[name].write(np.ascontiguousarray(arrays[name], dtype=kind).data)
                streams[LENGTHS].write(np.ascontiguousarray(lengths, dtype="<i4").data)
                for stream in streams.values():
                    stream.flush()
                    os.fsync(stream.fileno())
                done = {"rows": first + len(texts), "entries": done["entries"] + int(lengths.sum())}
                write_atomically(done_file, json.dumps(done))
                bar.advance(len(texts))
        if done["rows"] != collection.document_count:
            raise RankdistillError(
                f"{done['rows']} of {collection.document_count} documents were encoded: the collection has changed on"
                " disk",
                where=collection.name,
            )
        for name, layout in layouts.items():
            _header(streams[name], done["entries"], layout)
    finally:
        for stream in streams.values():
            stream.close()
    ends = np.cumsum(np.fromfile(folder / LENGTHS, "<i4"), dtype=np.int64)
    np.save(folder / offsets, np.concatenate([[0], ends]).astype(np.int64), allow_pickle=False)
    (folder / LENGTHS).unlink()
    return int(done["entries"])


def _entry_bytes(layout: Layout) -> int:
    kind, shape = layout
    return kind.itemsize * int(np.prod(shape, dtype=np.int64))


def _header(stream: BinaryIO, entries: int, layout: Layout) -> int:
    """Write the header of a .npy at the start of a file; its length, which is the same for any number of entries."""
    stream.seek(0)
    values = {
        "descr": np.lib.format.dtype_to_descr(layout[0]),
        "fortran_order": False,
        "shape": (entries, *layout[1]),
    }
    np.lib.format.write_array_header_1_0(stream, values)
    return stream.tell()
