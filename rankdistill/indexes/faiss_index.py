"""Index specifications and FAISS indexes: built from memory-mapped vectors, opened by plain `faiss.read_index`.

On disk: X (FAISS's own file), X.ids.parquet (doc_id of each row) and X.json (the manifest: specification, fingerprints
of student, collection and vectors, dimension, counts). The manifest is removed first and written last, so files of
which a kill left only some are never taken for a whole index.

What grows while building: the index itself is held in memory (`bytes` says how much); vectors are read in shards.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from rankdistill.artifacts import disk_errors, fingerprint, library_versions, locked, write_atomically
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Encoder, Hits, Vectors, no_hits, ranked
from rankdistill.indexes.vectors import check_vectors
from rankdistill.progress import progress, warn
from rankdistill.recipe import check_values, find_declaration, read_yaml, shipped

SHARD = 65_536  # vectors copied into memory at a time
QUERIES_AT_ONCE = 1024
ZERO_SHARE = 0.01  # more zero vectors than this is a broken student, fewer are empty texts
MINIMUM_SAMPLE = 65_536  # training vectors, if there are as many, unless the specification says otherwise
# Our names of search settings → FAISS's. Set one by one: ParameterSpace.initialize would also touch polysemous `ht`.
SEARCH_SETTINGS = {"nprobe": "nprobe", "efSearch": "efSearch", "k_factor": "k_factor_rf", "max_codes": "max_codes"}


class SearchSettings(BaseModel):
    """How an index is searched; stored in the file where FAISS does, so that plain FAISS searches alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    nprobe: int | None = Field(default=None, ge=1, description="lists visited (IVF)")
    efSearch: int | None = Field(default=None, ge=1, description="breadth of the graph search (HNSW)")
    k_factor: float | None = Field(default=None, ge=1, description="refine: hits re-scored for each one returned")
    max_codes: int | None = Field(default=None, ge=1, description="codes visited at most (IVF)")
    rescore: int | None = Field(default=None, ge=1, description="binary: hits re-scored for each one returned")


class IndexSpecification(BaseModel):
    """One index a student can be exported to; a YAML file in indexes/."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["faiss"] = Field(default="faiss")
    name: str
    description: str = ""
    factory: str = Field(description="FAISS factory string; {lists}, {subspaces} and {dimension} are filled in")
    metric: Literal["inner_product", "l2"] = "inner_product"
    lists: int | Literal["auto"] = Field(default="auto", description="auto: 4·√N, at most N/39")
    subspaces: int | Literal["auto"] = Field(
        default="auto", description="codes a document of PQ; auto: the largest divisor of the dimension up to an eighth"
    )
    binary: bool = Field(default=False, description="sign bits, Hamming distance; opens with faiss.read_index_binary")
    refine: str | None = Field(default=None, description="second stage that re-scores: Flat, SQ8, SQfp16 …")
    build: dict[str, int] = Field(default_factory=dict, description="efConstruction, …")
    training_sample: int | None = Field(
        default=None, ge=1, description="vectors to train on; unless given 256 a list, at least 65536"
    )
    seed: int = 42
    search: SearchSettings = SearchSettings()

    def resolve(self, count: int, dimension: int) -> str:
        """The factory string for `count` vectors of `dimension`.

        Raises:
            RankdistillError: the dimension is not divisible by the number of subspaces (or by 8 when binary).
        """
        lists = self.lists
        if lists == "auto":
            lists = max(1, min(round(4 * math.sqrt(count)), count // 39))
        subspaces = self.subspaces
        if subspaces == "auto":
            subspaces = max(m for m in range(1, max(1, dimension // 8) + 1) if dimension % m == 0)
        try:
            text = self.factory.format(lists=lists, subspaces=subspaces, dimension=dimension)
        except (KeyError, IndexError, ValueError) as error:
            raise UsageError(
                f"{error} cannot be filled in", where=f"{self.name}: factory", fix="{lists}, {subspaces}, {dimension}"
            ) from None
        if self.refine:
            text += f",Refine({self.refine})"
        if self.binary and dimension % 8:
            raise RankdistillError(f"the dimension {dimension} is not divisible by 8", where=f"{self.name}: binary")
        return text


def load_specification(source: str | Path | dict[str, Any] | IndexSpecification) -> IndexSpecification:
    """A specification from a YAML file, a shipped name ("ivf_pq") or a mapping.

    Raises:
        UsageError: no such file or name, an unknown key, a value of the wrong type.
    """
    if isinstance(source, IndexSpecification):
        return source
    if isinstance(source, dict):
        return check_values(IndexSpecification, source, "index specification")
    path = find_declaration("indexes", str(source))
    return check_values(IndexSpecification, {"name": path.stem, **read_yaml(path)}, str(path))


def shipped_specifications() -> dict[str, IndexSpecification]:
    return {name: load_specification(path) for name, path in shipped("indexes").items()}


# ---------------------------------------------------------------------------------------------------------------------
# Building


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
) -> FaissIndex:
    """Train, fill and write an index over float32 vectors [n, dimension] (memory-mapped or not).

    Args:
        doc_ids: one id a vector, in row order; streamed.
        vectors_fingerprint: when given, an index of the same specification over the same vectors is kept.
        similarity: of the student; `cos` promises vectors of length one and is checked.

    Raises:
        RankdistillError: too few vectors to train, a factory string FAISS cannot hold, NaN, too many zero vectors,
            another number of ids than vectors, no GPU, a full disk.
    """
    out_file = Path(out_file)
    started = time.time()
    if vectors.ndim != 2 or not len(vectors):
        raise RankdistillError(f"there is nothing to index: vectors of shape {list(vectors.shape)}")
    wanted = fingerprint(["faiss", specification.model_dump(exclude={"name", "description"}), vectors_fingerprint])
    with locked(out_file):
        if vectors_fingerprint and _manifest_if_whole(out_file).get("fingerprint") == wanted:
            return FaissIndex.open(out_file)
        for leftover in out_file.parent.glob(f".{out_file.name}.*.tmp"):
            leftover.unlink()
        if similarity == "cos":
            _check_unit_length(vectors)
        index, notes = _fill(vectors, specification, device)
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
                **notes,
                "device": device,
                "seconds": round(time.time() - started, 3),
            },
        )


def publish_index(
    index: Any, doc_ids: Iterable[str], out_file: Path, *, specification: IndexSpecification, manifest: dict[str, Any]
) -> FaissIndex:
    """Write a filled FAISS index, its ids and its manifest so that a kill leaves nothing taken for whole.

    Raises:
        RankdistillError: not as many ids as vectors; a full disk.
    """
    import faiss

    out_file.parent.mkdir(parents=True, exist_ok=True)
    temporary, temporary_ids = (_temporary(path) for path in (out_file, ids_file(out_file)))
    try:
        with disk_errors(out_file):
            written = _write_ids(doc_ids, temporary_ids)
            if written != index.ntotal:
                raise RankdistillError(
                    f"{index.ntotal} vectors but {written} document ids",
                    where=str(out_file),
                    fix="give the ids of the very collection the vectors were encoded from, in its order",
                )
            write = faiss.write_index_binary if specification.binary else faiss.write_index
            try:
                write(index, str(temporary))
            except RuntimeError as error:
                if "No space left" in str(error) or "write error" in str(error):
                    raise OSError(28, str(error)) from error
                raise RankdistillError(f"FAISS cannot write the index: {_reason(error)}", where=str(out_file)) from None
            _sync(temporary)
            sizes = {"bytes": temporary.stat().st_size, "ids_bytes": temporary_ids.stat().st_size}
            manifest_file(out_file).unlink(missing_ok=True)
            os.replace(temporary, out_file)
            os.replace(temporary_ids, ids_file(out_file))
            whole = {
                "kind": "faiss_index",
                "specification": specification.model_dump(mode="json"),
                **manifest,
                "dimension": index.d,
                "documents": index.ntotal,
                **sizes,
                "threads": faiss.omp_get_max_threads(),
                "libraries": library_versions(),
            }
            write_atomically(manifest_file(out_file), json.dumps(whole, indent=2) + "\n")
    finally:
        temporary.unlink(missing_ok=True)
        temporary_ids.unlink(missing_ok=True)
    return FaissIndex(out_file, index, whole)


def _fill(vectors: NDArray[np.float32], specification: IndexSpecification, device: str) -> tuple[Any, dict[str, Any]]:
    """A trained index that holds all vectors, and what to note in the manifest."""
    import faiss

    count, dimension = vectors.shape
    factory = specification.resolve(count, dimension)
    where = f"{specification.name}: {factory}"
    if device == "gpu" and not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        raise RankdistillError(
            "a GPU was asked for, but this FAISS sees none",
            where=where,
            fix="device: cpu, or pip uninstall faiss-cpu && pip install 'rankdistill[gpu]'",
        )
    needed = _vectors_needed(factory)
    if count < needed:
        raise RankdistillError(
            f"{count} vectors cannot train {needed} lists or codewords",
            where=where,
            fix="an index that needs no training (flat, hnsw), or fewer lists or bits",
        )
    metric = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[specification.metric]
    index: Any
    try:
        if specification.binary:
            index = faiss.index_binary_factory(dimension, factory)
        else:
            index = faiss.index_factory(dimension, factory, metric)
    except RuntimeError as error:
        reason = _reason(error)
        if "multiple of the number of subquantizers" in reason or "d % M" in reason:
            raise RankdistillError(
                f"the dimension {dimension} is not divisible by the number of subspaces",
                where=where,
                fix="subspaces: auto, or a divisor of the dimension",
            ) from None
        raise UsageError(
            f"FAISS does not know this index: {reason}", where=where, fix="see FAISS's wiki, 'The index factory'"
        ) from None
    _prepare_training(index, specification.seed)
    for name, value in specification.build.items():
        _set_parameter(index, name, value, where)
    sample = 0
    if not index.is_trained:
        rows = _sample_rows(count, needed, specification)
        sample = len(rows)
        shard, _ = _checked(vectors, rows, specification.binary)
        try:
            if device == "gpu":
                index = faiss.index_cpu_to_all_gpus(index)
            index.train(shard)
        except RuntimeError as error:
            raise RankdistillError(f"FAISS cannot train on {sample} vectors: {_reason(error)}", where=where) from None
    zeros: list[int] = []
    with progress(f"index {specification.name}", count, "vectors") as bar:
        for start in range(0, count, SHARD):
            shard, zero = _checked(vectors, np.arange(start, min(start + SHARD, count)), specification.binary)
            zeros += zero
            index.add(shard)
            bar.advance(len(shard))
    if device == "gpu":
        index = faiss.index_gpu_to_cpu(index)
    if len(zeros) > ZERO_SHARE * count:
        raise RankdistillError(
            f"{len(zeros)} of {count} vectors are zero",
            where=f"{where}, first: row {zeros[0]}",
            fix="the student gives most texts no vector: look at its training log and at the collection's empty texts",
        )
    if zeros:
        warn(f"{len(zeros)} vectors are zero (first: row {zeros[0]}): empty texts? They are kept and match nothing.")
    apply_search(index, specification.search, where)
    return index, {"factory": factory, "trained_on": sample, "zero_vectors": len(zeros)}


def _checked(vectors: NDArray[np.float32], rows: NDArray[np.int64], binary: bool) -> tuple[NDArray[Any], list[int]]:
    """Rows as FAISS takes them, NaN refused; and which of them are zero."""
    contiguous = len(rows) == rows[-1] - rows[0] + 1
    part = np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1] if contiguous else vectors[rows], dtype=np.float32)
    check_vectors(part, vectors.shape[1], lambda row: f"row {rows[row]}")
    zero = rows[~part.any(axis=1)].tolist()
    return (sign_bits(part) if binary else part), zero


def sign_bits(vectors: Vectors) -> NDArray[np.uint8]:
    """[n, d] float → [n, d/8] bytes: bit i is set where component i is positive."""
    return np.packbits(vectors > 0, axis=1)


def _check_unit_length(vectors: NDArray[np.float32]) -> None:
    for start in range(0, len(vectors), SHARD):
        lengths = np.linalg.norm(vectors[start : start + SHARD], axis=1)
        bad = np.flatnonzero((np.abs(lengths - 1) > 1e-2) & (lengths > 0))
        if len(bad):
            raise RankdistillError(
                f"a vector of length {lengths[bad[0]]:.4g} from a student that scores by cosine",
                where=f"row {start + bad[0]}",
                fix="normalise the vectors, or encode them with the student itself",
            )


def _vectors_needed(factory: str) -> int:
    """Training vectors without which FAISS cannot run k-means for this factory string."""
    lists = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    codewords = [1 << int(bits or 8) for bits in re.findall(r"(?<![A-Z])PQ\d+(?:x(\d+))?", factory)]
    return max([1, *lists, *codewords])


def _sample_rows(count: int, needed: int, specification: IndexSpecification) -> NDArray[np.int64]:
    size = min(count, specification.training_sample or max(MINIMUM_SAMPLE, 256 * needed))
    if size < needed:
        raise UsageError(
            f"training_sample {size} is smaller than the {needed} lists or codewords", where=specification.name
        )
    if size == count:
        return np.arange(count)
    return np.sort(np.random.default_rng(specification.seed).choice(count, size, replace=False))


def _prepare_training(index: Any, seed: int) -> None:
    for part in parts(index):
        if hasattr(part, "do_polysemous_training"):
            # 1.5 s a subspace for an order of codewords that only the polysemous filter uses, which ruins recall.
            part.do_polysemous_training = False
        for owner in (part, getattr(part, "pq", part)):
            if hasattr(owner, "cp"):
                owner.cp.seed = seed
                owner.cp.min_points_per_centroid = 1  # what is too few is our error, not one line a subspace


def parts(index: Any) -> Iterator[Any]:
    """The index and every index inside it, each as its own class."""
    import faiss

    binary = isinstance(index, faiss.IndexBinary)
    index = faiss.downcast_IndexBinary(index) if binary else faiss.downcast_index(index)
    yield index
    for name in ("index", "base_index", "refine_index"):
        inner = getattr(index, name, None)
        if isinstance(inner, faiss.Index | faiss.IndexBinary):
            yield from parts(inner)


def apply_search(index: Any, settings: SearchSettings, where: str = "index") -> None:
    """Set search settings on an index in memory.

    Raises:
        UsageError: the index has no such setting.
    """
    for name, value in settings.model_dump(exclude={"rescore"}, exclude_none=True).items():
        _set_parameter(index, SEARCH_SETTINGS[name], value, where)


def _set_parameter(index: Any, name: str, value: float, where: str) -> None:
    import faiss

    if isinstance(index, faiss.IndexBinary):
        for part in parts(index):
            for owner in (part, getattr(part, "hnsw", None)):
                if hasattr(owner, name):
                    setattr(owner, name, value)
                    return
        raise UsageError(f"this index has no setting {name!r}", where=where)
    try:
        faiss.ParameterSpace().set_index_parameter(index, name, value)
    except RuntimeError:
        raise UsageError(f"this index has no setting {name!r}", where=where) from None


def _reason(error: BaseException) -> str:
    """FAISS's message without its C++ signature."""
    text = str(error)
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: ", "", text, flags=re.DOTALL).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def ids_file(path: str | Path) -> Path:
    return Path(f"{path}.ids.parquet")


def manifest_file(path: str | Path) -> Path:
    return Path(f"{path}.json")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _write_ids(doc_ids: Iterable[str], path: Path) -> int:
    schema = pa.schema([("doc_id", pa.string())])
    remaining, written = iter(doc_ids), 0
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(remaining, SHARD)):
            writer.write_table(pa.table({"doc_id": batch}, schema))
            written += len(batch)
    _sync(path)
    return written


def _manifest_if_whole(path: Path) -> dict[str, Any]:
    """The manifest, or nothing when the files are not all there and of the size it names."""
    try:
        manifest = json.loads(manifest_file(path).read_text())
        sizes = path.stat().st_size, ids_file(path).stat().st_size
        whole = sizes == (manifest["bytes"], manifest["ids_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return manifest if whole else {}


# ---------------------------------------------------------------------------------------------------------------------
# Searching


class FaissIndex:
    """A FAISS index with the ids of its rows.

    `FaissIndex.open(path)` reads what `build_index` wrote; `index` is the plain FAISS object.
    """

    def __init__(self, path: Path, index: Any, manifest: dict[str, Any]) -> None:
        self.path, self.index, self.manifest = path, index, manifest
        self.specification = IndexSpecification.model_validate(manifest["specification"])
        self._search = self.specification.search
        self._ids: pa.ChunkedArray | None = None
        self._bits: NDArray[np.uint8] | None = None

    @classmethod
    def open(cls, path: str | Path, *, memory_map: bool = False) -> FaissIndex:
        """Open an index file with its ids and manifest.

        Args:
            memory_map: leave codes and inverted lists on disk until they are touched.

        Raises:
            RankdistillError: there is none, it was not finished, or it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise RankdistillError(
                "there is no index here", where=str(path), fix="rankdistill index STUDENT --out FILE"
            )
        if not manifest_file(path).is_file():
            raise RankdistillError(
                "this index has no manifest: it was not finished, or was not written by rankdistill",
                where=str(manifest_file(path)),
                fix="build it again, or open a foreign file with FaissIndex.foreign(path)",
            )
        manifest = _manifest_if_whole(path)
        if not manifest:
            raise RankdistillError(
                "the index or its ids are truncated, or do not belong together", where=str(path), fix="build it again"
            )
        index = cls(path, read_faiss(path, bool(manifest["specification"]["binary"]), memory_map), manifest)
        if index.document_count != manifest["documents"] or index.dimension != manifest["dimension"]:
            raise RankdistillError("the index is not the one its manifest describes", where=str(path))
        return index

    @classmethod
    def foreign(cls, path: str | Path, *, binary: bool = False, memory_map: bool = False) -> FaissIndex:
        """Open somebody else's FAISS file; its ids must be the row numbers of the collection.

        Raises:
            RankdistillError: FAISS cannot read it.
        """
        import faiss

        index = read_faiss(Path(path), binary, memory_map)
        metric = "l2" if not binary and index.metric_type == faiss.METRIC_L2 else "inner_product"
        specification = {"name": Path(path).name, "factory": "foreign", "metric": metric, "binary": binary}
        return cls(Path(path), index, {"specification": specification, "documents": index.ntotal, "dimension": index.d})

    @property
    def name(self) -> str:
        return self.specification.name

    @property
    def fingerprint(self) -> str:
        return str(self.manifest.get("fingerprint") or fingerprint([str(self.path), self.bytes]))

    @property
    def dimension(self) -> int:
        return int(self.index.d)

    @property
    def document_count(self) -> int:
        return int(self.index.ntotal)

    @property
    def bytes(self) -> int:
        """Size of the index file (ids apart)."""
        return self.path.stat().st_size

    @property
    def bytes_per_document(self) -> float:
        return self.bytes / max(1, self.document_count)

    @property
    def threads(self) -> int:
        """Threads FAISS searches with; `faiss.omp_set_num_threads` changes them."""
        import faiss

        return int(faiss.omp_get_max_threads())

    def __repr__(self) -> str:
        return (
            f"FaissIndex({self.name}: {self.manifest.get('factory', '')}, {self.document_count} × {self.dimension}, "
            f"{self.bytes_per_document:.1f} bytes a document)"
        )

    def check(self, encoder: Encoder | None = None, collection: Any = None) -> None:
        """Refuse a student or a collection this index was not made from.

        Raises:
            RankdistillError: the dimension or a fingerprint differs.
        """
        made_by, made_from = self.manifest.get("student_fingerprint"), self.manifest.get("collection_fingerprint")
        rebuild = "build the index again with this student: rankdistill index"
        if encoder is not None and encoder.dimension != self.dimension:
            raise RankdistillError(
                f"the index holds vectors of {self.dimension} dimensions, the student makes {encoder.dimension}",
                where=str(self.path),
                fix=rebuild,
            )
        if encoder is not None and made_by and made_by != encoder.fingerprint:
            raise RankdistillError(
                f"this index belongs to another student ({made_by}, not {encoder.fingerprint})",
                where=str(self.path),
                fix=rebuild,
            )
        if collection is not None and made_from and made_from != collection.fingerprint:
            raise RankdistillError(
                f"this index is over another collection ({made_from}, not {collection.fingerprint})",
                where=str(self.path),
                fix=f"build the index again over {collection.name}",
            )

    def doc_ids(self, rows: Iterable[int]) -> list[str]:
        """Ids of rows.

        Raises:
            RankdistillError: a foreign index, whose ids are not known.
        """
        if self._ids is None:
            try:
                self._ids = pq.read_table(ids_file(self.path))["doc_id"].combine_chunks()
            except (OSError, pa.ArrowException, KeyError) as error:
                raise RankdistillError(f"the ids cannot be read: {error}", where=str(ids_file(self.path))) from None
        taken: list[str] = self._ids.take(pa.array(list(rows), pa.int64())).to_pylist()
        return taken

    def set_search(self, **settings: Any) -> None:
        """Change search settings in memory (nprobe, efSearch, k_factor, max_codes, rescore); the file keeps its own.

        Raises:
            UsageError: an unknown setting, or one this index lacks.
        """
        self._search = check_values(SearchSettings, {**self._search.model_dump(), **settings}, "search")
        apply_search(self.index, SearchSettings(**settings), str(self.path))

    def search(self, vectors: Vectors, k: int) -> list[Hits]:
        """At most `k` hits for each query vector [n, dimension].

        Scores: inner product; minus the squared distance for l2; for binary dimension - 2 · Hamming distance, or the
        float query's product with the document's signs when re-scored.

        Raises:
            RankdistillError: NaN or another dimension.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_vectors(vectors, self.dimension, lambda row: f"query vector {row} for {self.path}")
        k = min(k, self.document_count)
        if k < 1:
            return [no_hits() for _ in vectors]
        hits: list[Hits] = []
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            block = vectors[start : start + QUERIES_AT_ONCE]
            if self.specification.binary:
                hits += self._search_binary(block, k)
                continue
            scores, rows = self.index.search(block, k)
            if self.specification.metric == "l2":
                scores = -scores
            hits += [ranked(rows[i], scores[i], k) for i in range(len(block))]
        return hits

    def _search_binary(self, vectors: Vectors, k: int) -> list[Hits]:
        depth = min(self.document_count, k * (self._search.rescore or 1))
        distances, rows = self.index.search(sign_bits(vectors), depth)
        if not self._search.rescore:
            scores = (self.dimension - 2 * distances).astype(np.float32)
            return [ranked(rows[i], scores[i], k) for i in range(len(vectors))]
        hits = []
        for query, found in zip(vectors, rows, strict=True):
            found = found[found >= 0]
            signs = np.unpackbits(self._codes(found), axis=1).astype(np.float32) * 2 - 1
            hits.append(ranked(found, signs @ query, k))
        return hits

    def _codes(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Sign bits of rows, [n, dimension/8]."""
        import faiss

        if self._bits is None:
            inner = list(parts(self.index))[-1]
            storage = faiss.downcast_IndexBinary(inner.storage) if hasattr(inner, "storage") else inner
            if not hasattr(storage, "xb"):
                if hasattr(storage, "make_direct_map"):
                    storage.make_direct_map()
                return np.stack([storage.reconstruct(int(row)) for row in rows])
            # A view into FAISS's own memory: alive as long as self.index.
            flat = faiss.rev_swig_ptr(storage.xb.data(), self.document_count * self.dimension // 8)
            self._bits = flat.reshape(self.document_count, -1)
        return self._bits[rows]


def read_faiss(path: Path, binary: bool, memory_map: bool = False) -> Any:
    """Read a FAISS file.

    Raises:
        RankdistillError: it is truncated, damaged, or of the other kind (binary or not).
    """
    import faiss

    flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
    try:
        return faiss.read_index_binary(str(path), flags) if binary else faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        raise RankdistillError(
            f"FAISS cannot read this index: {_reason(error)}", where=str(path), fix="build it again"
        ) from None
