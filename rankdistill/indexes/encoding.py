"""Texts encoded shard by shard into .npy files, resumable after kill -9: one vector a text, a token or a term.

A text has one entry in each file, or as many as it needs: then a further file holds the offsets at which a document's
entries begin. What grows: nothing in memory beyond one shard of text and vectors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, ArtifactWriter, obtain, write_atomically, written_whole
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import document_fingerprint, reserve
from rankdistill.progress import progress

LENGTHS = "lengths.bin"  # entries of each document, int32; gone when all are written
DONE = "shards.json"  # what is finished; written after its bytes are on disk


class Layout(NamedTuple):
    """What a file holds: the number format, and the shape of one entry."""

    format: np.dtype[Any]
    shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return self.format.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Texts(NamedTuple):
    """What is encoded."""

    side: str  # "documents" or "queries"
    total: int
    shards: Callable[[int], Iterator[tuple[int, list[str]]]]  # from a row on: (row of the first, texts)
    name_of: Callable[[int], str]  # of a row, for errors

    @classmethod
    def documents(cls, collection: Collection, shard_size: int) -> Texts:
        return cls(
            "documents",
            collection.document_count,
            lambda start: collection.iter_documents(batch_size=shard_size, start=start),
            lambda row: f"document {collection.doc_ids([row])[0]!r} of {collection.name}",
        )


# (row of the first text, texts) → (entries of each text, file → entries of all, one after the other)
Encode = Callable[[int, list[str]], tuple[NDArray[Any], Mapping[str, NDArray[Any]]]]


def encode_texts(
    path: str | Path,
    kind: str,
    texts: Texts,
    encoder: Any,
    collection: Collection,
    encode: Encode,
    layouts: Mapping[str, Layout],
    *,
    offsets: str | None = None,
    fingerprint: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    finish: Callable[[ArtifactWriter, int], None],
) -> Artifact:
    """The artifact of a side's texts at `path`. A finished shard is never encoded twice.

    Args:
        encoder: where it counts texts that it cut (`cut`), the artifact's counts say how many.
        layouts: file → what it holds.
        offsets: the file of offsets, int64 [texts + 1]; without it each text has one entry.
        finish: what is left to write and to count, given the entries of all texts.

    Raises:
        RankdistillError: there are no texts; the collection has changed while it was read; the disk is full.
    """
    if not texts.total:
        raise RankdistillError(f"there are no {texts.side} to encode", where=collection.name)
    counted, side = getattr(encoder, "cut", {}), {"documents": "document", "queries": "query"}[texts.side]

    def make(writer: ArtifactWriter) -> None:
        before = counted.get(side, 0)
        done = _write_shards(writer.path, texts, encode, layouts, offsets, lambda: counted.get(side, 0) - before)
        if done["rows"] != texts.total:
            what = f"{done['rows']} of {texts.total} {texts.side} were encoded: the collection has changed on disk"
            raise RankdistillError(what, where=collection.name)
        writer.counts[texts.side] = texts.total
        finish(writer, done["entries"])
        if counted:
            writer.counts["cut"] = done["cut"]

    made_by = document_fingerprint(encoder) if texts.side == "documents" else encoder.fingerprint
    return obtain(
        path,
        kind=kind,
        fingerprint=fingerprint,
        settings=settings,
        inputs={"encoder": made_by, "collection": collection.fingerprint, **(inputs or {})},
        make=make,
        resume=True,
    )


def _write_shards(
    folder: Path,
    texts: Texts,
    encode: Encode,
    layouts: Mapping[str, Layout],
    offsets: str | None,
    cut: Callable[[], int],
) -> dict[str, int]:
    """Encode what is not finished; the rows and entries of all, and how many texts were cut."""
    done_file = folder / DONE
    done = json.loads(done_file.read_text(encoding="utf-8")) if done_file.is_file() else {}
    if done.keys() != {"rows", "entries", "cut"}:
        done = {"rows": 0, "entries": 0, "cut": 0}
    if offsets and (folder / offsets).is_file():  # a kill came after everything was written
        (folder / LENGTHS).unlink(missing_ok=True)
        return done
    cut_before, streams = done["cut"], dict[str, BinaryIO]()
    files = {**layouts, LENGTHS: Layout(np.dtype("<i4"))} if offsets else layouts
    with ExitStack() as stack:
        for name, layout in files.items():
            (folder / name).touch()
            stream: BinaryIO = stack.enter_context(open(folder / name, "r+b"))
            streams[name] = stream
            start = 0 if name == LENGTHS else _header(stream, texts.total, layout)
            end = start + done["rows" if name == LENGTHS else "entries"] * layout.bytes
            stream.truncate(end)  # what a kill left beyond the last finished shard
            if not offsets:
                reserve(stream, start + texts.total * layout.bytes)
            stream.seek(end)
        with progress(f"encode {texts.side}", texts.total, "texts") as bar:
            bar.done = done["rows"]
            for first, shard in texts.shards(done["rows"]):
                lengths, arrays = encode(first, shard)
                if len(lengths) != len(shard):
                    raise RankdistillError(f"{len(lengths)} vectors came back for {len(shard)} texts")
                for name, stream in streams.items():
                    array = lengths if name == LENGTHS else arrays[name]
                    stream.write(np.ascontiguousarray(array, dtype=files[name].format).data)
                    stream.flush()
                    os.fsync(stream.fileno())
                entries = done["entries"] + int(lengths.sum())
                done = {"rows": first + len(shard), "entries": entries, "cut": cut_before + cut()}
                write_atomically(done_file, json.dumps(done))
                bar.advance(len(shard))
        for name, layout in layouts.items():
            _header(streams[name], done["entries"], layout)
    if offsets and done["rows"] == texts.total:
        ends = np.cumsum(np.fromfile(folder / LENGTHS, "<i4"), dtype=np.int64)
        with written_whole(folder / offsets) as temporary, open(temporary, "wb") as written:
            np.save(written, np.concatenate([[0], ends]).astype(np.int64), allow_pickle=False)
        (folder / LENGTHS).unlink()
    return done


def _header(stream: BinaryIO, entries: int, layout: Layout) -> int:
    """Write the header of a .npy at the start of a file; its length, which is the same for any number of entries."""
    stream.seek(0)
    shape, descr = (entries, *layout.shape), np.lib.format.dtype_to_descr(layout.format)
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.tell()
