"""A collection's vectors: encoded shard by shard into one memory-mapped file, resumable after kill -9.

What grows: nothing in memory beyond one shard of text and vectors; on disk 4 · dimension bytes a document.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import (
    Artifact,
    disk_errors,
    find_artifact,
    fingerprint,
    locked,
    open_artifact,
    write_artifact,
    write_atomically,
)
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import Encoder, Vectors, allocate_array, document_fingerprint
from rankdistill.progress import progress, say
from rankdistill.students.token_batches import resolve_precision

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DOCUMENTS, QUERIES, QUERY_IDS = "documents.npy", "queries.npy", "query_ids.parquet"
DONE = "shards.json"  # rows finished so far; written after their bytes are on disk
SHARD = 4096


def encode_documents(
    encoder: Encoder, collection: Collection, path: str | Path, *, shard_size: int = SHARD
) -> Artifact:
    """Encode every document into `path`/documents.npy, float32 [documents, dimension], in row order.

    A finished shard is never encoded twice: after a kill at any moment the same call goes on with the next one.

    Raises:
        RankdistillError: the encoder returns NaN, infinite or wrongly shaped vectors; the disk is full.
    """

    def shards(start: int) -> Iterator[tuple[int, list[str]]]:
        return collection.iter_documents(batch_size=shard_size, start=start)

    def name_of(row: int) -> str:
        return f"document {collection.doc_ids([row])[0]!r} of {collection.name}"

    return _encode(
        Path(path),
        DOCUMENTS,
        encoder,
        encoder.encode_documents,
        collection,
        collection.document_count,
        shards,
        name_of,
        {"side": "documents"},
    )


def encode_queries(
    encoder: Encoder,
    collection: Collection,
    path: str | Path,
    *,
    split: str | None = None,
    query_ids: Sequence[str] | None = None,
    shard_size: int = SHARD,
) -> Artifact:
    """Encode a split's queries (all without one) into `path`/queries.npy, their ids beside it in query_ids.parquet.

    Args:
        query_ids: encode these instead, in this order.

    Raises:
        RankdistillError: as for documents.
    """
    ids = collection.query_ids(split) if query_ids is None else list(query_ids)
    chosen = {} if query_ids is None else {"query_ids": fingerprint(ids)}

    def shards(start: int) -> Iterator[tuple[int, list[str]]]:
        for first in range(start, len(ids), shard_size):
            yield first, collection.query_texts(ids[first : first + shard_size])

    def write_ids(folder: Path) -> None:
        pq.write_table(pa.table({"query_id": pa.array(ids, pa.string())}), folder / QUERY_IDS)

    return _encode(
        Path(path),
        QUERIES,
        encoder,
        encoder.encode_queries,
        collection,
        len(ids),
        shards,
        lambda row: f"query {ids[row]!r} of {collection.name}",
        {"side": "queries", "split": split, **chosen},
        write_ids,
    )


class VectorFolders(NamedTuple):
    """Where document vectors are written, and the folders (pattern below a folder) in which some may lie already."""

    new: Path
    made: Sequence[tuple[Path, str]] = ()

    def find(self, encoder: Encoder, collection: Collection) -> Path | None:
        """Where an encoder's document vectors of a collection lie."""
        wanted = vectors_fingerprint(encoder, collection.fingerprint)
        places = (place for folder, pattern in self.made for place in sorted(folder.glob(pattern)))
        return next((place for place in places if find_artifact(place, "vectors", wanted) is not None), None)


def vectors_fingerprint(encoder: Encoder, collection_fingerprint: str) -> str:
    """Of an encoder's document vectors of a collection."""
    return fingerprint(["vectors", {"side": "documents"}, document_fingerprint(encoder), collection_fingerprint])


def open_vectors(artifact: Artifact | str | Path) -> np.memmap[Any, np.dtype[np.float32]]:
    """The float32 [n, dimension] array of a vectors artifact, memory-mapped.

    Raises:
        RankdistillError: it is not one, or its file is damaged.
    """
    if not isinstance(artifact, Artifact):
        artifact = open_artifact(artifact, "vectors")
    path = artifact.path / str(artifact.manifest["file"])
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RankdistillError(f"the vectors cannot be read: {error}", where=str(path)) from None
    assert isinstance(array, np.memmap)
    return array


def check_vectors(vectors: NDArray[Any], dimension: int, name_of: Callable[[int], str], first_row: int = 0) -> None:
    """Refuse vectors of another dimension, NaN and infinity, naming the first bad one."""
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise RankdistillError(
            f"vectors of shape {list(vectors.shape)} where [n, {dimension}] was expected", where=name_of(first_row)
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise RankdistillError(
            f"{len(bad)} vectors hold NaN or infinity",
            where=f"first: {name_of(first_row + int(bad[0]))}",
            fix="the model has diverged, or overflows in this precision: use an earlier checkpoint, or fp32",
        )


def row_hashes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """A 64-bit hash of each row [n, d] by its bytes; two rows that differ collide in fewer than 1 of 10⁹ pairs."""
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    words = np.zeros((len(data), -(-data.shape[1] // 4) * 4), np.uint8)
    words[:, : data.shape[1]] = data
    # Multilinear hashing: Σ aᵢ·xᵢ mod 2⁶⁴ over 32-bit words x with random 64-bit a.
    factors = np.random.default_rng(0).integers(0, 2**63, words.shape[1] // 4, dtype=np.uint64) * 2 + 1
    hashes = np.zeros(len(words), np.uint64)
    for number, factor in enumerate(factors):
        hashes += words[:, 4 * number : 4 * number + 4].copy().view("<u4")[:, 0].astype(np.uint64) * factor
    return hashes


def _encode(
    path: Path,
    file: str,
    encoder: Encoder,
    encode: Callable[[Sequence[str]], Vectors],
    collection: Collection,
    count: int,
    shards: Callable[[int], Iterator[tuple[int, list[str]]]],
    name_of: Callable[[int], str],
    settings: dict[str, Any],
    finish: Callable[[Path], None] | None = None,
) -> Artifact:
    if not count:
        raise RankdistillError(f"there are no {settings['side']} to encode", where=collection.name)
    made_by = document_fingerprint(encoder) if settings["side"] == "documents" else encoder.fingerprint
    wanted = fingerprint(["vectors", settings, made_by, collection.fingerprint])
    with locked(path):
        found = find_artifact(path, "vectors", wanted)
        if found is not None:
            here = made_in(encoder)
            made = {key: str(found.manifest.get(key, value)) for key, value in here.items()}
            if made != here:
                there, now = (" on ".join(one.values()) for one in (made, here))
                say(f"{path.name}: vectors made in {there} are used; here they would be made in {now}")
            return found
        with write_artifact(
            path,
            kind="vectors",
            fingerprint=wanted,
            settings=settings,
            inputs={"encoder": made_by, "collection": collection.fingerprint},
            resume=True,
        ) as writer:
            target, done_file = writer.path / file, writer.path / DONE
            done, cut = _done(done_file)
            counted = getattr(encoder, "cut", {})  # texts that were longer than the encoder reads
            side = "document" if settings["side"] == "documents" else "query"
            before = counted.get(side, 0) - cut
            if not done:
                allocate_array(target, (count, encoder.dimension), np.float32).flush()
            offset = target.stat().st_size - count * encoder.dimension * 4
            with open(target, "r+b") as stream, progress(f"encode {settings['side']}", count, "texts") as bar:
                bar.done = done
                for first_row, texts in shards(done):
                    vectors = np.ascontiguousarray(encode(texts), dtype=np.float32)
                    check_vectors(vectors, encoder.dimension, name_of, first_row)
                    if len(vectors) != len(texts):
                        raise RankdistillError(f"{len(vectors)} vectors came back for {len(texts)} texts")
                    stream.seek(offset + first_row * encoder.dimension * 4)
                    stream.write(vectors.data)
                    stream.flush()
                    os.fsync(stream.fileno())
                    done = first_row + len(texts)
                    write_atomically(done_file, json.dumps({"rows": done, "cut": counted.get(side, 0) - before}))
                    bar.advance(len(texts))
            if done != count:
                raise RankdistillError(
                    f"{done} of {count} {settings['side']} were encoded: the collection has changed on disk",
                    where=collection.name,
                )
            if finish is not None:
                with disk_errors(writer.path):
                    finish(writer.path)
            writer.counts.update({settings["side"]: count, "dimension": encoder.dimension})
            if counted:
                writer.counts["cut"] = counted[side] - before
            writer.notes.update({"file": file, "similarity": encoder.similarity, **made_in(encoder)})
        return open_artifact(path, "vectors")


def made_in(encoder: Any) -> dict[str, str]:
    """The number format and the kind of device that an encoder computes with, where it says: they change the last
    digits of vectors, and so are no part of the fingerprint."""
    if not (hasattr(encoder, "precision") and hasattr(encoder, "device")):
        return {}
    return {"precision": resolve_precision(encoder.device, encoder.precision), "device": encoder.device.type}


def _done(done_file: Path) -> tuple[int, int]:
    """(rows finished so far, how many of them were cut)."""
    done = json.loads(done_file.read_text(encoding="utf-8")) if done_file.is_file() else {}
    return int(done.get("rows", 0)), int(done.get("cut", 0))
