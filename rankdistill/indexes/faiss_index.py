"""FAISS indexes with the ids of their rows: on disk, in memory, searched. Plain `faiss.read_index` opens them.

On disk: X (FAISS's own file), X.ids.parquet (doc_id of each row) and X.json (the manifest: specification, fingerprints
of student, collection and vectors, dimension, counts). The manifest is removed first and written last, so files of
which a kill left only some are never taken for a whole index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import (
    LOOKED_AT,
    check_file,
    file_digest,
    fingerprint,
    library_versions,
    write_atomically,
    write_json,
    written_whole,
)
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Encoder, Hits, Vectors, check_inputs, no_hits, ranked
from rankdistill.indexes.specification import IndexSpecification, SearchSettings
from rankdistill.indexes.vectors import check_vectors, vectors_fingerprint
from rankdistill.progress import warn
from rankdistill.recipe import check_values

QUERIES_AT_ONCE = 1024
IDS_AT_ONCE = 65_536
# Our names of search settings → FAISS's. Set one by one: ParameterSpace.initialize would also touch polysemous `ht`.
SEARCH_SETTINGS = {"nprobe": "nprobe", "efSearch": "efSearch", "k_factor": "k_factor_rf", "max_codes": "max_codes"}

# -- files ------------------------------------------------------------------------------------------------------------


def ids_file(path: str | Path) -> Path:
    return Path(f"{path}.ids.parquet")


def manifest_file(path: str | Path) -> Path:
    return Path(f"{path}.json")


def check_out_file(path: str | Path) -> None:
    """Refuse to write an index, or what lies beside it, over a file that is none of ours; see `check_file`."""
    check_file(manifest_file(path), mark='"faiss_index"')
    for file in (Path(path), ids_file(path)):
        check_file(file, ours=manifest_file(path).is_file())


def _write_ids(doc_ids: Iterable[str], path: Path) -> int:
    schema = pa.schema([("doc_id", pa.string())])
    remaining, written = iter(doc_ids), 0
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(remaining, IDS_AT_ONCE)):
            writer.write_table(pa.table({"doc_id": batch}, schema))
            written += len(batch)
    return written


def manifest_if_whole(path: Path, *, thorough: bool = False) -> dict[str, Any]:
    """The manifest, or nothing when the files are not all there and, by size and digest, what was written.

    Args:
        thorough: read large files too.
    """
    try:
        manifest: dict[str, Any] = json.loads(manifest_file(path).read_text(encoding="utf-8"))
        sizes = path.stat().st_size, ids_file(path).stat().st_size
        whole = sizes == (manifest["bytes"], manifest["ids_bytes"])
        if whole and (thorough or sum(sizes) <= LOOKED_AT) and "sha256" in manifest:
            whole = manifest["sha256"] == _digests(path, ids_file(path))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return manifest if whole else {}


def damaged_index(manifest: Path) -> Path | None:
    """The index that a manifest `NAME.faiss.json` describes, every byte read, where it is not what was written."""
    path = manifest.with_suffix("")
    return None if manifest_if_whole(path, thorough=True) else path


def _digests(index: Path, ids: Path) -> list[str]:
    return [file_digest(index), file_digest(ids)]


def publish_index(
    index: Any, doc_ids: Iterable[str], out_file: Path, *, specification: IndexSpecification, manifest: dict[str, Any]
) -> FaissIndex:
    """Write a filled FAISS index, its ids and its manifest so that a kill leaves nothing taken for whole."""
    import faiss

    check_out_file(out_file)
    write = faiss.write_index_binary if specification.binary else faiss.write_index
    whole: dict[str, Any] = {"kind": "faiss_index", "libraries": library_versions()}
    with written_whole(ids_file(out_file)) as ids, written_whole(out_file) as file:
        if (written := _write_ids(doc_ids, ids)) != index.ntotal:
            fix = "give the ids of the very collection the vectors were encoded from, in its order"
            what = f"{index.ntotal} vectors but {written} document ids"
            raise RankdistillError(what, where=str(out_file), fix=fix)
        try:
            write(index, str(file))
        except RuntimeError as error:
            if "No space left" in str(error) or "write error" in str(error):
                raise OSError(28, str(error)) from error
            what = f"FAISS cannot write the index: {reason_of(error)}"
            raise RankdistillError(what, where=str(out_file)) from None
        held = {
            "bytes": file.stat().st_size,
            "ids_bytes": ids.stat().st_size,
            "sha256": _digests(file, ids),
            "threads": faiss.omp_get_max_threads(),
        }
        # Files without a manifest would be taken for a stranger's, by another process or after a kill.
        write_atomically(manifest_file(out_file), json.dumps(whole))
    described = {"dimension": index.d, "documents": index.ntotal}
    whole = {**whole, "specification": specification.model_dump(mode="json"), **manifest, **described, **held, **whole}
    write_json(manifest_file(out_file), whole)
    return FaissIndex(out_file, index, whole)


def read_faiss(path: Path, binary: bool, memory_map: bool = False) -> Any:
    """Read a FAISS file; an error where it is truncated, damaged, or of the other kind (binary or not)."""
    import faiss

    flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
    try:
        return faiss.read_index_binary(str(path), flags) if binary else faiss.read_index(str(path), flags)
    except (RuntimeError, MemoryError) as error:
        what = f"FAISS cannot read this index: {reason_of(error)}"
        raise RankdistillError(what, where=str(path), fix="build it again") from None


# -- searching --------------------------------------------------------------------------------------------------------


class FaissIndex:
    """A FAISS index with the ids of its rows; `index` is the plain FAISS object."""

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
            memory_map: leave codes and inverted lists on disk until they are touched (see `mappable`).

        Raises:
            RankdistillError: there is none, it was not finished, or it is damaged.
        """
        path = Path(path)
        if not path.is_file():
            fix = "rankdistill index STUDENT --out FILE"
            raise RankdistillError("there is no index here", where=str(path), fix=fix)
        if not manifest_file(path).is_file():
            what = "this index has no manifest: it was not finished, or was not written by rankdistill"
            fix = "build it again, or open a foreign file with FaissIndex.foreign(path)"
            raise RankdistillError(what, where=str(manifest_file(path)), fix=fix)
        manifest = manifest_if_whole(path)
        if not manifest:
            what = "the index was not finished, or it or its ids are damaged"
            raise RankdistillError(what, where=str(path), fix="build it again")
        try:
            binary = IndexSpecification.model_validate(manifest["specification"]).binary
            described = manifest["documents"], manifest["dimension"]
        except (KeyError, ValueError) as error:
            what = f"the index's manifest is damaged: {error!r:.200}"
            raise RankdistillError(what, where=str(manifest_file(path)), fix="build the index again") from None
        index = cls(path, read_faiss(path, binary, memory_map), manifest)
        if (index.document_count, index.dimension) != described:
            raise RankdistillError("the index is not the one its manifest describes", where=str(path))
        if index.specification.search.max_codes is not None:  # the only setting that FAISS's file does not hold
            index.set_search(max_codes=index.specification.search.max_codes)
        return index

    @classmethod
    def foreign(cls, path: str | Path, *, binary: bool = False, memory_map: bool = False) -> FaissIndex:
        """Open somebody else's FAISS file; its ids must be the row numbers of the collection."""
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
        built = str(self.manifest.get("fingerprint") or fingerprint(["foreign index", file_digest(self.path)]))
        # Tuned later: still made from the same, but it finds other documents.
        return fingerprint([built, self.specification.search.model_dump()]) if self.manifest.get("tuned") else built

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
    def mappable(self) -> bool:
        """Whether FAISS can leave the codes on disk; those of fast-scan are read into memory whole."""
        return not any("FastScan" in type(part).__name__ for part in parts(self.index))

    def __repr__(self) -> str:
        held = f"{self.manifest.get('factory', '')}, {self.document_count} × {self.dimension}"
        return f"FaissIndex({self.name}: {held}, {self.bytes_per_document:.1f} bytes a document)"

    def check(self, encoder: Encoder | None = None, collection: Any = None) -> None:
        """Refuse a student or a collection this index was not made from."""
        where, fix = str(self.path), "build the index again with this student: rankdistill index"
        names = {"encoder": "student_fingerprint", "collection": "collection_fingerprint"}
        inputs = {name: self.manifest.get(key) for name, key in names.items()}
        if encoder is not None and encoder.dimension != self.dimension:
            what = f"the index holds vectors of {self.dimension} dimensions, the student makes {encoder.dimension}"
            raise RankdistillError(what, where=where, fix=fix)
        check_inputs(inputs, encoder, collection, where, fix)
        if encoder is not None and not inputs["encoder"]:
            warn(f"{self.path} does not say which student made its vectors: its hits are right only if this one did")
        if collection is not None and not inputs["collection"] and self.document_count != collection.document_count:
            what = f"this index is over another collection ({self.document_count:,} documents)"
            raise RankdistillError(what, where=where, fix=f"build it again over {collection.name}")

    def check_documents(self, student: Encoder) -> None:
        """Refuse an index whose document vectors another student made; its own query encoder's would pass `check`."""
        vectors, collection = self.manifest.get("vectors_fingerprint"), self.manifest.get("collection_fingerprint")
        if vectors and collection and vectors != (expected := vectors_fingerprint(student, str(collection))):
            what = f"this index belongs to another student (its document vectors are {vectors}, not {expected})"
            fix = "build the index again with this student: rankdistill quantize"
            raise RankdistillError(what, where=str(self.path), fix=fix)

    def doc_ids(self, rows: Iterable[int]) -> list[str]:
        """Ids of rows; those of a foreign index are not known."""
        if self._ids is None:
            try:
                self._ids = pq.read_table(ids_file(self.path))["doc_id"].combine_chunks()
            except (OSError, pa.ArrowException, KeyError) as error:
                raise RankdistillError(f"the ids cannot be read: {error}", where=str(ids_file(self.path))) from None
        taken: list[str] = self._ids.take(pa.array(list(rows), pa.int64())).to_pylist()
        return taken

    def set_search(self, **settings: Any) -> None:
        """Change search settings in memory (nprobe, efSearch, k_factor, max_codes, rescore); the file keeps its own."""
        self._search = check_values(SearchSettings, {**self._search.model_dump(), **settings}, "search")
        apply_search(self.index, SearchSettings(**settings), str(self.path))

    def clone(self) -> FaissIndex:
        """A copy in memory with settings of its own; where FAISS cannot clone this type, read from its file again."""
        import faiss

        try:
            cloned: Any = getattr(faiss, "clone_binary_index" if self.specification.binary else "clone_index")
            copied = cloned(self.index)
        except RuntimeError:
            copied = read_faiss(self.path, self.specification.binary)
        copy = FaissIndex(self.path, copied, self.manifest)
        copy.set_search(**self._search.model_dump(exclude_none=True))
        return copy

    def search(self, vectors: Vectors, k: int) -> list[Hits]:
        """At most `k` hits for each query vector [n, dimension].

        Scores: inner product; minus the squared distance for l2; for binary dimension - 2 · Hamming distance, or the
        float query's product with the document's signs when re-scored.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_vectors(vectors, self.dimension, lambda row: f"query vector {row} for {self.path}")
        k = min(k, self.document_count)
        if k < 1:
            return [no_hits() for _ in vectors]
        find = self._find_binary if self.specification.binary else self._find
        return [
            ranked(rows, scores, k)
            for start in range(0, len(vectors), QUERIES_AT_ONCE)
            for rows, scores in find(vectors[start : start + QUERIES_AT_ONCE], k)
        ]

    def _find(self, vectors: Vectors, k: int) -> Iterable[tuple[NDArray[Any], NDArray[Any]]]:
        scores, rows = self.index.search(vectors, k)
        return zip(rows, -scores if self.specification.metric == "l2" else scores, strict=True)

    def _find_binary(self, vectors: Vectors, k: int) -> Iterable[tuple[NDArray[Any], NDArray[Any]]]:
        depth = min(self.document_count, k * (self._search.rescore or 1))
        distances, rows = self.index.search(sign_bits(vectors), depth)
        if not self._search.rescore:
            return zip(rows, (self.dimension - 2 * distances).astype(np.float32), strict=True)
        real = [near[near >= 0] for near in rows]
        signs = (np.unpackbits(self._codes(near), axis=1).astype(np.float32) * 2 - 1 for near in real)
        return zip(real, (sign @ query for sign, query in zip(signs, vectors, strict=True)), strict=True)

    def _codes(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Sign bits of rows, [n, dimension/8]."""
        import faiss

        if self._bits is None:
            inner = list(parts(self.index))[-1]
            storage: Any = faiss.downcast_IndexBinary(inner.storage) if hasattr(inner, "storage") else inner
            if not hasattr(storage, "xb"):
                storage.make_direct_map()
                return np.stack([storage.reconstruct(int(row)) for row in rows])
            # A view into FAISS's own memory: alive as long as self.index.
            flat = faiss.rev_swig_ptr(storage.xb.data(), self.document_count * self.dimension // 8)
            self._bits = flat.reshape(self.document_count, -1)
        return self._bits[rows]


def sign_bits(vectors: Vectors) -> NDArray[np.uint8]:
    """[n, d] float → [n, d/8] bytes: bit i is set where component i is positive."""
    return np.packbits(vectors > 0, axis=1)


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


def coded(index: Any) -> Any:
    """The innermost index that holds documents: the first stage of a refined one."""
    import faiss

    wrappers = faiss.IndexRefine | faiss.IndexPreTransform | faiss.IndexIDMap
    return next(part for part in parts(index) if not isinstance(part, wrappers))


def transforms(index: Any) -> list[Any]:
    """What is applied to a vector before the coded index sees it, in order, each as its own class."""
    import faiss

    chains: list[Any] = [part.chain for part in parts(index) if isinstance(part, faiss.IndexPreTransform)]
    return [faiss.downcast_VectorTransform(chain.at(number)) for chain in chains for number in range(chain.size())]


def each_list(ivf: Any) -> Iterator[tuple[int, NDArray[np.int64], Any]]:
    """(number, ids, pointer to the codes) of each list that holds something; the arrays die with the step."""
    import faiss

    invlists: Any = faiss.downcast_InvertedLists(ivf.invlists)
    for number in range(ivf.nlist):
        size = invlists.list_size(number)
        if size:
            ids, codes = invlists.get_ids(number), invlists.get_codes(number)
            try:
                yield number, faiss.rev_swig_ptr(ids, size), codes
            finally:
                invlists.release_ids(number, ids)
                invlists.release_codes(number, codes)


def faiss_metric(metric: str) -> int:
    import faiss

    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def apply_search(index: Any, settings: SearchSettings, where: str = "index") -> None:
    """Set search settings on an index in memory; a UsageError where it has no such setting."""
    for name, value in settings.model_dump(exclude={"rescore"}, exclude_none=True).items():
        if name == "nprobe":
            # FAISS looks at no more lists than there are, but its fast-scan with residuals and inner product then
            # scales its tables by the missing ones and finds next to nothing.
            value = min([value, *(part.nlist for part in parts(index) if hasattr(part, "nlist"))])
        set_parameter(index, SEARCH_SETTINGS[name], value, where)


def set_parameter(index: Any, name: str, value: float, where: str) -> None:
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


def reason_of(error: BaseException) -> str:
    """FAISS's message without its C++ signature."""
    text = str(error)
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: ", "", text, flags=re.DOTALL).strip()
