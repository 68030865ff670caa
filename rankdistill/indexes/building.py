"""Building an index from vectors: training on a sample, filling by shards, joining what was built apart.

What grows: the index itself is held in memory (`bytes` says how much); vectors are read in shards.

Shards may be built on several machines or days. The first one trains, the others take its training (`trained_by`), so
that a codeword means the same in all of them. The merged file is the one that building over all vectors with that
training would have written, byte for byte as far as the last bit of a rotated vector does not depend on how many are
rotated at once (codes do not, the factors of RaBitQ do).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import fingerprint, locked
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.faiss_assembly import add_codes, parts_of
from rankdistill.indexes.faiss_index import (
    FaissIndex,
    apply_search,
    check_out_file,
    faiss_metric,
    ids_file,
    manifest_if_whole,
    parts,
    publish_index,
    read_faiss,
    reason_of,
    set_parameter,
    sign_bits,
    transforms,
)
from rankdistill.indexes.foreign_vectors import Ids, check_distinct
from rankdistill.indexes.specification import IndexSpecification, vectors_needed
from rankdistill.indexes.vectors import check_vectors, row_hashes
from rankdistill.progress import progress, warn

SHARD = 65_536  # vectors copied into memory at a time
ZERO_SHARE = 0.01  # more zero vectors than this is a broken student, fewer are empty texts
MINIMUM_SAMPLE = 65_536  # training vectors, if there are as many, unless the specification says otherwise


def build_index(
    vectors: NDArray[np.float32],
    doc_ids: Iterable[str],
    specification: IndexSpecification,
    out_file: str | Path,
    *,
    student_fingerprint: str = "",
    collection_fingerprint: str = "",
    vectors_fingerprint: str = "",
    similarity: Literal["dot", "cos"] | None = None,
    device: Literal["cpu", "gpu"] = "cpu",
    trained_by: FaissIndex | None = None,
) -> FaissIndex:
    """Train, fill and write an index over float32 vectors [n, dimension] (memory-mapped or not).

    Args:
        doc_ids: one id a vector, in row order.
        vectors_fingerprint: when given, an index of the same specification over the same vectors and ids is kept.
        similarity: of the student; `cos` promises vectors of length one and is checked.
        device: where FAISS works, which has GPUs in its own GPU build only: `--device`, which is torch's, does not ask.
        trained_by: take rotation, lists and codebooks from this index, so that `merge_indexes` can join the two.

    Raises:
        RankdistillError: too few (different) vectors to train, a factory string FAISS cannot hold, NaN, too many zero
            vectors, another number of ids than vectors, no GPU, a full disk.
    """
    out_file, started = Path(out_file), time.time()
    if vectors.ndim != 2 or not len(vectors):
        raise RankdistillError(f"there is nothing to index: vectors of shape {list(vectors.shape)}")
    doc_ids = Ids.of(doc_ids)
    settings = specification.model_dump(exclude={"name", "description"})
    inputs = ["faiss", settings, vectors_fingerprint, doc_ids.digest()]
    key = fingerprint(inputs if trained_by is None else [*inputs, trained_by.fingerprint])
    check_out_file(out_file)
    with locked(out_file):
        if vectors_fingerprint and manifest_if_whole(out_file).get("fingerprint") == key:
            return FaissIndex.open(out_file)
        for leftover in out_file.parent.glob(f".{out_file.name}.*.tmp"):
            leftover.unlink()
        zeros = look_through(vectors, specification.name, similarity)
        index, notes = _fill(vectors, specification, device, trained_by)
        return publish_index(
            index,
            doc_ids,
            out_file,
            specification=specification,
            manifest={
                "fingerprint": key,
                "student_fingerprint": student_fingerprint,
                "collection_fingerprint": collection_fingerprint,
                "vectors_fingerprint": vectors_fingerprint,
                "similarity": similarity,
                "trained_by": trained_by.fingerprint if trained_by is not None else None,
                **notes,
                "zero_vectors": zeros,
                "device": device,
                "seconds": round(time.time() - started, 3),
            },
        )


def look_through(vectors: NDArray[np.float32], where: str, similarity: str | None) -> int:
    """Look at all vectors before anything is made of them; how many are zero, which match nothing.

    Raises:
        RankdistillError: NaN or infinity; more than 1% zero (a few are empty texts, many a broken student); of `cos`,
            another length than one.
    """
    zeros: list[int] = []
    for start in range(0, len(vectors), SHARD):
        shard = np.asarray(vectors[start : start + SHARD], np.float32)
        check_vectors(shard, vectors.shape[1], lambda row: f"row {row}", start)
        zeros += (start + np.flatnonzero(~shard.any(axis=1))).tolist()
        lengths = np.linalg.norm(shard, axis=1)
        bad = np.flatnonzero((np.abs(lengths - 1) > 1e-2) & (lengths > 0))
        if similarity == "cos" and len(bad):
            what = f"a vector of length {lengths[bad[0]]:.4g} from a student that scores by cosine"
            fix = "normalise the vectors, or encode them with the student itself"
            raise RankdistillError(what, where=f"{where}: row {start + bad[0]}", fix=fix)
    if len(zeros) > ZERO_SHARE * len(vectors):
        fix = "the student gives most texts no vector: look at its training log and at the collection's empty texts"
        what = f"{len(zeros)} of {len(vectors)} vectors are zero"
        raise RankdistillError(what, where=f"{where}, first: row {zeros[0]}", fix=fix)
    if zeros:
        warn(f"{len(zeros)} vectors are zero (first: row {zeros[0]}): empty texts? They are kept and match nothing.")
    return len(zeros)


def _fill(
    vectors: NDArray[np.float32], specification: IndexSpecification, device: str, trained_by: FaissIndex | None
) -> tuple[Any, dict[str, Any]]:
    """A trained index that holds all vectors, and what to note in the manifest."""
    import faiss

    if trained_by is None:
        index, notes = train_index(vectors, specification, device=device)
    else:
        notes = {"factory": str(trained_by.manifest["factory"]), "trained_on": 0}
        index = _moved(_trained_like(trained_by, specification, vectors.shape[1]), device, specification.name)
    with progress(f"index {specification.name}", len(vectors), "vectors") as bar:
        for start in range(0, len(vectors), SHARD):
            shard = _rows(vectors, slice(start, start + SHARD), specification.binary)
            index.add(shard)
            bar.advance(len(shard))
    if device == "gpu":
        index = faiss.index_gpu_to_cpu(index)
    apply_search(index, specification.search, f"{specification.name}: {notes['factory']}")
    return index, notes


def _rows(vectors: NDArray[np.float32], rows: Any, binary: bool) -> NDArray[Any]:
    """Vectors as FAISS takes them."""
    part = np.ascontiguousarray(vectors[rows], dtype=np.float32)
    return sign_bits(part) if binary else part


def _moved(index: Any, device: str, where: str) -> Any:
    """The index where it shall work."""
    import faiss

    if device != "gpu":
        return index
    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        fix = "device: cpu, or pip uninstall faiss-cpu && pip install 'rankdistill[gpu]'"
        raise RankdistillError("a GPU was asked for, but this FAISS sees none", where=where, fix=fix)
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        what = f"FAISS has no such index on a GPU: {reason_of(error)}"
        raise RankdistillError(what, where=where, fix="device: cpu") from None


def train_index(
    vectors: NDArray[np.float32], specification: IndexSpecification, *, by_residual: bool = True, device: str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """FAISS's trained, empty index of a specification, and what to note in a manifest; raises as `build_index` does.

    Args:
        by_residual: an `IVF,PQ` learns its codewords from what is left after the list's centroid (the factory string of
            fast-scan says it itself: fsr, fs).
    """
    import faiss

    count, dimension = vectors.shape
    factory = specification.resolve(count, dimension)
    where, needed = f"{specification.name}: {factory}", vectors_needed(factory)
    if count < needed:
        fix = "an index that needs no training (flat, hnsw), or fewer lists or bits"
        raise RankdistillError(f"{count} vectors cannot train {needed} lists or codewords", where=where, fix=fix)
    index = _untrained(specification, factory, dimension, where)
    for part in parts(index):
        if isinstance(part, faiss.IndexIVFPQ):
            part.by_residual = by_residual
    index = _moved(index, device, where)
    sample = 0 if index.is_trained else _train(index, vectors, specification, needed, where)
    return index, {"factory": factory, "trained_on": sample}


def _train(index: Any, vectors: NDArray[np.float32], specification: IndexSpecification, needed: int, where: str) -> int:
    """Train on a sample; its size."""
    count, dimension = vectors.shape
    size = min(count, specification.training_sample or max(MINIMUM_SAMPLE, 256 * needed))
    if size < needed:
        what = f"training_sample {size} is smaller than the {needed} lists or codewords"
        raise UsageError(what, where=specification.name)
    drawn = np.random.default_rng(specification.seed).choice(count, size, replace=False) if size < count else None
    sample = _rows(vectors, slice(None) if drawn is None else np.sort(drawn), specification.binary)
    if needed > 1 and (distinct := len(np.unique(row_hashes(sample)))) < needed:
        what = f"only {distinct} of {size} vectors are different: they cannot train {needed} lists or codewords"
        fix = "do most texts share one vector? look at the student; else fewer lists or bits"
        raise RankdistillError(what, where=where, fix=fix)
    if (held := _fit_rotations(index, specification.seed)) and size < dimension:  # FAISS writes past its memory
        what = f"{size} vectors cannot train a rotation of {dimension} dimensions"
        fix = "rotation: none, an index without OPQ, or more documents"
        raise RankdistillError(what, where=where, fix=fix)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise RankdistillError(f"FAISS cannot train on {size} vectors: {reason_of(error)}", where=where) from None
    finally:
        for rotation, _ in held:
            rotation.pq = None  # FAISS only points to it
    return size


def _untrained(specification: IndexSpecification, factory: str, dimension: int, where: str) -> Any:
    import faiss

    index: Any
    try:
        if specification.binary:
            index = faiss.index_binary_factory(dimension, factory)
        else:
            index = faiss.index_factory(dimension, factory, faiss_metric(specification.metric))
    except RuntimeError as error:
        what, fix = f"FAISS does not know this index: {reason_of(error)}", "see FAISS's wiki, 'The index factory'"
        raise UsageError(what, where=where, fix=fix) from None
    for part in parts(index):
        if hasattr(part, "do_polysemous_training"):
            # 1.5 s a subspace for an order of codewords that only the polysemous filter uses, which ruins recall.
            part.do_polysemous_training = False
        for owner in (part, getattr(part, "pq", part)):
            if hasattr(owner, "cp"):
                owner.cp.seed = specification.seed
                owner.cp.min_points_per_centroid = 1  # what is too few is our error, not one line a subspace
    for name, value in specification.build.items():
        set_parameter(index, name, value, where)
    return index


def _trained_like(trained_by: FaissIndex, specification: IndexSpecification, dimension: int) -> Any:
    """Another index's training, empty."""
    learned = trained_by.manifest.get("quantizer") or {}
    if learned and (learned["query"] != "frozen" or learned["overlap"] > 1 or learned["codes"] != "nearest"):
        what = (
            f"FAISS cannot choose the codes of {trained_by.name}: they were learned together with a map of the queries"
        )
        fix = "rankdistill quantize over all documents, or shards learned with query: frozen and overlap: 1"
        raise RankdistillError(what, where=str(trained_by.path), fix=fix)
    apart = {"name", "description", "search", "seed", "training_sample"}
    ours, theirs = (each.model_dump(exclude=apart) for each in (specification, trained_by.specification))
    if ours != theirs or trained_by.dimension != dimension:
        made = f"{trained_by.manifest.get('factory')} over {trained_by.dimension} dimensions"
        what = f"an index of {made} cannot train {specification.factory} over {dimension}"
        fix = "the same specification and the same student for all shards"
        raise RankdistillError(what, where=str(trained_by.path), fix=fix)
    index = read_faiss(trained_by.path, specification.binary)
    index.reset()
    return index


def _fit_rotations(index: Any, seed: int) -> list[tuple[Any, Any]]:
    """Let OPQ learn its rotation for codewords of the index's own bits; its codebooks are to be held meanwhile.

    FAISS takes 8 bits whatever follows: for 32 subspaces of 4 bits on NFCorpus a squared error of .296 instead of .219,
    and of the first ten .570 instead of .639, after five times the training.
    """
    import faiss

    bits = [int(part.pq.nbits) for part in parts(index) if hasattr(part, "pq")]
    rotations: list[tuple[Any, Any]] = []
    for rotation in transforms(index) if bits else ():
        if isinstance(rotation, faiss.OPQMatrix):
            codebooks = faiss.ProductQuantizer(rotation.d_out, rotation.M, bits[0])
            codebooks.cp.seed, codebooks.cp.min_points_per_centroid = seed, 1
            rotation.pq = codebooks
            rotations.append((rotation, codebooks))
    return rotations


# -- joining what was built apart -------------------------------------------------------------------------------------


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
    first, *others = shards = [FaissIndex.open(file, memory_map=True) for file in files]
    check_out_file(out_file)
    for shard in others:
        _check_alike(first, shard)
    ids_files, where = [ids_file(shard.path) for shard in shards], ", ".join(str(shard.path) for shard in shards)
    check_distinct(pq.read_table(ids_files)["doc_id"], "document ids", where, "give each document to one shard")
    merged = _emptied(first)
    trained = _digest(merged, first)
    with locked(out_file), progress("merge", sum(shard.document_count for shard in shards), "vectors") as bar:
        for shard in shards:
            if shard is not first and _digest(_emptied(shard), first) != trained:
                what = f"this shard was trained apart from {first.path}: its codes mean something else"
                fix = "build it again with trained_by=the first shard"
                raise RankdistillError(what, where=str(shard.path), fix=fix)
            try:
                _move(merged, read_faiss(shard.path, first.specification.binary))
            except RuntimeError as error:
                what = f"FAISS cannot join indexes of {shard.manifest.get('factory')}: {reason_of(error)}"
                fix = "build the index over all vectors at once"
                raise RankdistillError(what, where=str(shard.path), fix=fix) from None
            bar.advance(shard.document_count)
        kept = ("student_fingerprint", "similarity", "factory", "trained_on")
        ids = (
            name for file in ids_files for part in pq.ParquetFile(file).iter_batches() for name in part[0].to_pylist()
        )
        return publish_index(
            merged,
            ids,
            out_file,
            specification=first.specification,
            manifest={
                "fingerprint": fingerprint(["merged", [shard.fingerprint for shard in shards]]),
                "collection_fingerprint": collection_fingerprint,
                "vectors_fingerprint": fingerprint([shard.manifest.get("vectors_fingerprint") for shard in shards]),
                **{key: first.manifest.get(key) for key in kept},
                "merged_from": [shard.fingerprint for shard in shards],
            },
        )


def _check_alike(first: FaissIndex, shard: FaissIndex) -> None:
    for name, value in _description(first).items():
        if (other := _description(shard)[name]) != value:
            what = f"these shards do not belong together: {name} is {value!r} in the first, {other!r} here"
            fix = "build all shards with one specification and one student, the later ones trained_by the first"
            raise RankdistillError(what, where=f"{first.path}, {shard.path}", fix=fix)


def _description(shard: FaissIndex) -> dict[str, Any]:
    named = {"factory": "factory", "student": "student_fingerprint", "similarity": "similarity"}
    described = {name: shard.manifest.get(key) for name, key in named.items()}
    settings = shard.specification.model_dump(include={"metric", "binary", "refine"})
    return {"dimension": shard.dimension, **described, **settings}


def _emptied(shard: FaissIndex) -> Any:
    """The training of a shard, read from its file."""
    index = read_faiss(shard.path, shard.specification.binary)
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
