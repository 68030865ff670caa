"""Shards built apart, on several machines or days, joined into one index file.

The first shard trains (`build_index`), the others take its training (`build_index(..., trained_by=first)`), so that a
codeword means the same in all of them. The merged file is the one that building over all vectors with that training
would have written, byte for byte as far as the last bit of a rotated vector does not depend on how many are rotated at
once (codes do not, the factors of RaBitQ do). In memory: the merged index and one shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from rankdistill.artifacts import fingerprint, locked
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.faiss_assembly import add_codes, parts_of
from rankdistill.indexes.faiss_index import (
    FaissIndex,
    apply_search,
    check_out_file,
    ids_file,
    parts,
    publish_index,
    read_faiss,
    reason_of,
)
from rankdistill.progress import progress


def merge_indexes(files: Sequence[str | Path], out_file: str | Path, *, collection_fingerprint: str = "") -> FaissIndex:
    """Join index files into one: the vectors of the first, then those of the second …, ids likewise.

    Args:
        files: shards, in the order in which their documents stand in the collection.
        collection_fingerprint: of the whole collection, so that searching another one is refused.

    Raises:
        UsageError: no files; the result would replace one of them.
        RankdistillError: shards of another specification, student or training; a document in two shards; a type of
            index that cannot be joined (HNSW).
    """
    out_file = Path(out_file)
    if not files:
        raise UsageError("there are no indexes to merge")
    if out_file.resolve() in {Path(file).resolve() for file in files}:
        raise UsageError("the merged index would replace one of its shards", where=str(out_file), fix="another --out")
    shards = [FaissIndex.open(file, memory_map=True) for file in files]
    check_out_file(out_file)
    first = shards[0]
    for shard in shards[1:]:
        _check_alike(first, shard)
    _check_ids(shards)
    binary = first.specification.binary
    merged = _emptied(read_faiss(first.path, binary))
    trained = _digest(merged, first)
    with locked(out_file):
        with progress("merge", sum(shard.document_count for shard in shards), "vectors") as bar:
            for shard in shards:
                if shard is not first and _digest(_emptied(read_faiss(shard.path, binary)), first) != trained:
                    raise RankdistillError(
                        f"this shard was trained apart from {first.path}: its codes mean something else",
                        where=str(shard.path),
                        fix="build it again with trained_by=the first shard",
                    )
                part = read_faiss(shard.path, binary)
                count = part.ntotal
                try:
                    _move(merged, part)
                except RuntimeError as error:
                    raise RankdistillError(
                        f"FAISS cannot join indexes of {shard.manifest.get('factory')}: {reason_of(error)}",
                        where=str(shard.path),
                        fix="build the index over all vectors at once",
                    ) from None
                bar.advance(count)
        return publish_index(
            merged,
            _ids(shards),
            out_file,
            specification=first.specification,
            manifest={
                "fingerprint": fingerprint(["merged", [shard.fingerprint for shard in shards]]),
                "student_fingerprint": first.manifest.get("student_fingerprint", ""),
                "collection_fingerprint": collection_fingerprint,
                "vectors_fingerprint": fingerprint([shard.manifest.get("vectors_fingerprint") for shard in shards]),
                "similarity": first.manifest.get("similarity"),
                "factory": first.manifest.get("factory"),
                "trained_on": first.manifest.get("trained_on"),
                "merged_from": [shard.fingerprint for shard in shards],
            },
        )


def _check_alike(first: FaissIndex, shard: FaissIndex) -> None:
    described = [
        {
            "dimension": one.dimension,
            "factory": one.manifest.get("factory"),
            "student": one.manifest.get("student_fingerprint"),
            "similarity": one.manifest.get("similarity"),
            **one.specification.model_dump(include={"metric", "binary", "refine"}),
        }
        for one in (first, shard)
    ]
    for name, value in described[0].items():
        if described[1][name] != value:
            raise RankdistillError(
                f"these shards do not belong together: {name} is {value!r} in the first, {described[1][name]!r} here",
                where=f"{first.path}, {shard.path}",
                fix="build all shards with one specification and one student, the later ones trained_by the first",
            )


def _check_ids(shards: Sequence[FaissIndex]) -> None:
    """A document that is in two shards would be found twice."""
    ids = pq.read_table([ids_file(shard.path) for shard in shards], schema=None)["doc_id"]
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids.combine_chunks())
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    raise RankdistillError(
        f"{len(twice)} document ids come twice, the first is {twice[0].as_py()!r}",
        where=", ".join(str(shard.path) for shard in shards),
        fix="give each document to one shard",
    )


def _ids(shards: Sequence[FaissIndex]) -> Iterator[str]:
    for shard in shards:
        for batch in pq.ParquetFile(ids_file(shard.path)).iter_batches(columns=["doc_id"]):
            yield from batch["doc_id"].to_pylist()


def _emptied(index: Any) -> Any:
    index.reset()
    for part in parts(index):
        if hasattr(part, "ntotal2"):
            part.ntotal2 = 0  # fast-scan: FAISS forgets it
    return index


def _digest(empty: Any, settings_of: FaissIndex) -> str:
    """Of everything an empty index holds: its rotation, lists and codebooks, searched in one way."""
    import faiss

    apply_search(empty, settings_of.specification.search, str(settings_of.path))
    serialize: Any = faiss.serialize_index_binary if settings_of.specification.binary else faiss.serialize_index
    return hashlib.blake2b(serialize(empty).tobytes()).hexdigest()


def _move(merged: Any, part: Any) -> None:
    """Append what `part` holds to `merged`, stage by stage: FAISS's own merge_from does not know them all."""
    import faiss

    into: Any
    source: Any
    if isinstance(merged, faiss.IndexBinary):
        into, source = faiss.downcast_IndexBinary(merged), faiss.downcast_IndexBinary(part)
        if isinstance(into, faiss.IndexBinaryFlat):
            into.add(faiss.vector_to_array(source.xb).reshape(source.ntotal, -1))
            return
    else:
        into, source = faiss.downcast_index(merged), faiss.downcast_index(part)
    if isinstance(into, faiss.IndexRefine):
        _move(into.base_index, source.base_index)
        _move(into.refine_index, source.refine_index)
        into.ntotal += source.ntotal
    elif isinstance(into, faiss.IndexPreTransform):
        _move(into.index, source.index)
        into.ntotal += source.ntotal
    elif isinstance(into, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan):
        held = parts_of(source)
        add_codes(into, held.assignments, held.codes)
    else:
        into.merge_from(source, into.ntotal if isinstance(into, faiss.IndexIVF | faiss.IndexBinaryIVF) else 0)
