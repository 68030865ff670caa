"""Building an index from vectors: training on a sample, filling by shards, refusing what would not work.

What grows: the index itself is held in memory (`bytes` says how much); vectors are read in shards.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import fingerprint, locked
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.faiss_index import (
    FaissIndex,
    apply_search,
    check_out_file,
    manifest_if_whole,
    parts,
    publish_index,
    read_faiss,
    reason_of,
    set_parameter,
    sign_bits,
)
from rankdistill.indexes.foreign_vectors import Ids
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
        trained_by: take rotation, lists and codebooks from this index instead of training, so that `merge_indexes` can
            join what was built apart.

    Raises:
        RankdistillError: too few (different) vectors to train, a factory string FAISS cannot hold, NaN, too many zero
            vectors, another number of ids than vectors, no GPU, a full disk.
    """
    out_file = Path(out_file)
    started = time.time()
    if vectors.ndim != 2 or not len(vectors):
        raise RankdistillError(f"there is nothing to index: vectors of shape {list(vectors.shape)}")
    doc_ids = Ids.of(doc_ids)
    settings = specification.model_dump(exclude={"name", "description"})
    decided = ["faiss", settings, vectors_fingerprint, doc_ids.digest()]
    wanted = fingerprint(decided if trained_by is None else [*decided, trained_by.fingerprint])
    check_out_file(out_file)
    with locked(out_file):
        if vectors_fingerprint and manifest_if_whole(out_file).get("fingerprint") == wanted:
            return FaissIndex.open(out_file)
        for leftover in out_file.parent.glob(f".{out_file.name}.*.tmp"):
            leftover.unlink()
        if similarity == "cos":
            check_unit_length(vectors)
        index, notes = _fill(vectors, specification, device, trained_by)
        return publish_index(
            index,
            doc_ids,
            out_file,
            specification=specification,
            manifest={
                "fingerprint": wanted,
                "student_fingerprint": student_fingerprint,
                "collection_fingerprint": collection_fingerprint,
                "vectors_fingerprint": vectors_fingerprint,
                "similarity": similarity,
                "trained_by": trained_by.fingerprint if trained_by is not None else None,
                **notes,
                "device": device,
                "seconds": round(time.time() - started, 3),
            },
        )


def _fill(
    vectors: NDArray[np.float32], specification: IndexSpecification, device: str, trained_by: FaissIndex | None
) -> tuple[Any, dict[str, Any]]:
    """A trained index that holds all vectors, and what to note in the manifest."""
    import faiss

    count, dimension = vectors.shape
    factory = specification.resolve(count, dimension) if trained_by is None else str(trained_by.manifest["factory"])
    where, needed, sample = f"{specification.name}: {factory}", vectors_needed(factory), 0
    if trained_by is not None:
        index = _trained_like(trained_by, specification, dimension)
    else:
        _check_enough(count, needed, where)
        index = _untrained(specification, factory, dimension, where)
    if device == "gpu" and not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        raise RankdistillError(
            "a GPU was asked for, but this FAISS sees none",
            where=where,
            fix="device: cpu, or pip uninstall faiss-cpu && pip install 'rankdistill[gpu]'",
        )
    if device == "gpu":
        try:
            index = faiss.index_cpu_to_all_gpus(index)
        except RuntimeError as error:
            raise RankdistillError(
                f"FAISS has no such index on a GPU: {reason_of(error)}", where=where, fix="device: cpu"
            ) from None
    if not index.is_trained:
        sample = _train(index, vectors, specification, needed, where)
    zeros: list[int] = []
    with progress(f"index {specification.name}", count, "vectors") as bar:
        for start in range(0, count, SHARD):
            shard, zero = checked_rows(vectors, np.arange(start, min(start + SHARD, count)), specification.binary)
            zeros += zero
            index.add(shard)
            bar.advance(len(shard))
    if device == "gpu":
        index = faiss.index_gpu_to_cpu(index)
    refuse_zeros(zeros, count, where)
    apply_search(index, specification.search, where)
    return index, {"factory": factory, "trained_on": sample, "zero_vectors": len(zeros)}


def refuse_zeros(zeros: list[int], count: int, where: str) -> None:
    """Zero vectors match nothing: a few are empty texts, many a broken student.

    Raises:
        RankdistillError: more than 1% of the vectors.
    """
    if len(zeros) > ZERO_SHARE * count:
        raise RankdistillError(
            f"{len(zeros)} of {count} vectors are zero",
            where=f"{where}, first: row {zeros[0]}",
            fix="the student gives most texts no vector: look at its training log and at the collection's empty texts",
        )
    if zeros:
        warn(f"{len(zeros)} vectors are zero (first: row {zeros[0]}): empty texts? They are kept and match nothing.")


def train_index(
    vectors: NDArray[np.float32], specification: IndexSpecification, *, by_residual: bool = True
) -> tuple[Any, dict[str, Any]]:
    """FAISS's trained, empty index of a specification, and what to note in a manifest.

    Args:
        by_residual: an `IVF,PQ` learns its codewords from what is left after the list's centroid (the factory string of
            fast-scan says it itself: fsr, fs).

    Raises:
        RankdistillError: as `build_index` does.
    """
    import faiss

    count, dimension = vectors.shape
    factory = specification.resolve(count, dimension)
    where, needed = f"{specification.name}: {factory}", vectors_needed(factory)
    _check_enough(count, needed, where)
    index = _untrained(specification, factory, dimension, where)
    for part in parts(index):
        if isinstance(part, faiss.IndexIVFPQ):
            part.by_residual = by_residual
    sample = 0 if index.is_trained else _train(index, vectors, specification, needed, where)
    return index, {"factory": factory, "trained_on": sample}


def _check_enough(count: int, needed: int, where: str) -> None:
    if count < needed:
        raise RankdistillError(
            f"{count} vectors cannot train {needed} lists or codewords",
            where=where,
            fix="an index that needs no training (flat, hnsw), or fewer lists or bits",
        )


def _train(index: Any, vectors: NDArray[np.float32], specification: IndexSpecification, needed: int, where: str) -> int:
    """Train on a sample; its size."""
    rows = _sample_rows(len(vectors), needed, specification)
    sample = len(rows)
    shard, _ = checked_rows(vectors, rows, specification.binary)
    distinct = len(np.unique(row_hashes(shard))) if needed > 1 else sample
    if distinct < needed:
        raise RankdistillError(
            f"only {distinct} of {sample} vectors are different: they cannot train {needed} lists or codewords",
            where=where,
            fix="do most texts share one vector? look at the student; else fewer lists or bits",
        )
    if (held := _fit_rotations(index, specification.seed)) and sample < shard.shape[1]:
        raise RankdistillError(
            f"{sample} vectors cannot train a rotation of {shard.shape[1]} dimensions",  # FAISS writes past its memory
            where=where,
            fix="rotation: none, an index without OPQ, or more documents",
        )
    try:
        index.train(shard)
    except RuntimeError as error:
        raise RankdistillError(f"FAISS cannot train on {sample} vectors: {reason_of(error)}", where=where) from None
    finally:
        for rotation, _ in held:
            rotation.pq = None  # FAISS only points to it
    return sample


def _untrained(specification: IndexSpecification, factory: str, dimension: int, where: str) -> Any:
    import faiss

    metric = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[specification.metric]
    index: Any
    try:
        if specification.binary:
            index = faiss.index_binary_factory(dimension, factory)
        else:
            index = faiss.index_factory(dimension, factory, metric)
    except RuntimeError as error:
        raise UsageError(
            f"FAISS does not know this index: {reason_of(error)}",
            where=where,
            fix="see FAISS's wiki, 'The index factory'",
        ) from None
    _prepare_training(index, specification.seed)
    for name, value in specification.build.items():
        set_parameter(index, name, value, where)
    return index


def _trained_like(trained_by: FaissIndex, specification: IndexSpecification, dimension: int) -> Any:
    """Another index's training, empty."""
    learned = trained_by.manifest.get("quantizer") or {}
    if learned and (learned["query"] != "frozen" or learned["overlap"] > 1 or learned["codes"] not in ("nearest",)):
        raise RankdistillError(
            f"FAISS cannot choose the codes of {trained_by.name}: they were learned together with a map of the queries",
            where=str(trained_by.path),
            fix="rankdistill quantize over all documents, or shards learned with query: frozen and overlap: 1",
        )
    ours, theirs = (
        one.model_dump(exclude={"name", "description", "search", "seed", "training_sample"})
        for one in (specification, trained_by.specification)
    )
    if ours != theirs or trained_by.dimension != dimension:
        raise RankdistillError(
            f"an index of {trained_by.manifest.get('factory')} over {trained_by.dimension} dimensions cannot train"
            f" {specification.factory} over {dimension}",
            where=str(trained_by.path),
            fix="the same specification and the same student for all shards",
        )
    index = read_faiss(trained_by.path, specification.binary)
    index.reset()
    return index


def checked_rows(vectors: NDArray[np.float32], rows: NDArray[np.int64], binary: bool) -> tuple[NDArray[Any], list[int]]:
    """Rows as FAISS takes them, NaN refused; and which of them are zero."""
    contiguous = len(rows) == rows[-1] - rows[0] + 1
    part = np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1] if contiguous else vectors[rows], dtype=np.float32)
    check_vectors(part, vectors.shape[1], lambda row: f"row {rows[row]}")
    zero = rows[~part.any(axis=1)].tolist()
    return (sign_bits(part) if binary else part), zero


def check_unit_length(vectors: NDArray[np.float32]) -> None:
    for start in range(0, len(vectors), SHARD):
        lengths = np.linalg.norm(vectors[start : start + SHARD], axis=1)
        bad = np.flatnonzero((np.abs(lengths - 1) > 1e-2) & (lengths > 0))
        if len(bad):
            raise RankdistillError(
                f"a vector of length {lengths[bad[0]]:.4g} from a student that scores by cosine",
                where=f"row {start + bad[0]}",
                fix="normalise the vectors, or encode them with the student itself",
            )


def _sample_rows(count: int, needed: int, specification: IndexSpecification) -> NDArray[np.int64]:
    size = min(count, specification.training_sample or max(MINIMUM_SAMPLE, 256 * needed))
    if size < needed:
        raise UsageError(
            f"training_sample {size} is smaller than the {needed} lists or codewords", where=specification.name
        )
    if size == count:
        return np.arange(count)
    return np.sort(np.random.default_rng(specification.seed).choice(count, size, replace=False))


def _fit_rotations(index: Any, seed: int) -> list[tuple[Any, Any]]:
    """Let OPQ learn its rotation for codewords of the index's own bits.

    FAISS takes 8 bits whatever follows: for 32 subspaces of 4 bits on NFCorpus that left a squared error of .296
    instead of .219, and of the first ten .570 instead of .639, after five times the training. The codebooks
    come back too, to be held while FAISS points to them.
    """
    import faiss

    part: Any
    rotations: list[tuple[Any, Any]] = []
    bits = [int(part.pq.nbits) for part in parts(index) if hasattr(part, "pq")]
    for part in parts(index):
        if not bits or not isinstance(part, faiss.IndexPreTransform):
            continue
        chain: Any = part.chain
        for number in range(chain.size()):
            rotation: Any = faiss.downcast_VectorTransform(chain.at(number))
            if isinstance(rotation, faiss.OPQMatrix):
                codebooks = faiss.ProductQuantizer(rotation.d_out, rotation.M, bits[0])
                codebooks.cp.seed, codebooks.cp.min_points_per_centroid = seed, 1
                rotation.pq = codebooks
                rotations.append((rotation, codebooks))
    return rotations


def _prepare_training(index: Any, seed: int) -> None:
    for part in parts(index):
        if hasattr(part, "do_polysemous_training"):
            # 1.5 s a subspace for an order of codewords that only the polysemous filter uses, which ruins recall.
            part.do_polysemous_training = False
        for owner in (part, getattr(part, "pq", part)):
            if hasattr(owner, "cp"):
                owner.cp.seed = seed
                owner.cp.min_points_per_centroid = 1  # what is too few is our error, not one line a subspace
