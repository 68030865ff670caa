"""From vectors to a FAISS index whose codebooks were learned: start, train, encode, export.

The artifact beside the index (kind "quantizer") holds `quantizer.safetensors` (rotation, query map, centroids,
codebooks), `codes.npy` uint8 [n, M], `lists.npy` int64 [n] and `log.jsonl`; codes and lists are read memory-mapped. The
index file is FAISS's own: a transform for queries, then IndexPQ, IndexIVFPQ or their fast-scan forms.

What grows: in memory the queries (at most `queries.most` of each kind but the given ones), one step's documents and one
block; the index itself while it is written (up to three times its bytes where there are lists, which double as they
fill); 16 bytes a document where there are lists. On disk M bytes a document, and 4 · top bytes a query meanwhile.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rankdistill.artifacts import Artifact, ArtifactWriter, file_digest, fingerprint, locked, obtain
from rankdistill.collections import Collection
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import DocumentIds, Vectors, allocate_array
from rankdistill.indexes.building import check_unit_length, checked_rows, refuse_zeros, train_index
from rankdistill.indexes.dense import ExactIndex
from rankdistill.indexes.faiss_assembly import IndexParts, add_codes, assemble_index, parts_of
from rankdistill.indexes.faiss_index import (
    FaissIndex,
    apply_search,
    check_out_file,
    faiss_metric,
    manifest_if_whole,
    publish_index,
)
from rankdistill.indexes.foreign_vectors import Ids, open_foreign_vectors
from rankdistill.indexes.specification import QuantizerSpecification
from rankdistill.progress import progress, say, warn
from rankdistill.quantization.batches import BEST, Queries, Sampler, TeacherScores, content_digest
from rankdistill.quantization.quantizer import VectorQuantizer, query_transform
from rankdistill.quantization.queries import collection_queries
from rankdistill.quantization.training import CHECKPOINT, CODES, LISTS, LIVE, LOG, WEIGHTS, QuantizerTraining
from rankdistill.runs import iter_run
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import StudentModel, to_device

KIND = "quantizer"
ENCODER = "query_encoder"
BLOCK = 65_536


def quantize(
    documents: Vectors,
    doc_ids: Iterable[str],
    queries: Queries | None,
    specification: QuantizerSpecification,
    out_file: str | Path,
    *,
    vectors_fingerprint: str = "",
    queries_fingerprint: str = "",
    student_fingerprint: str = "",
    collection_fingerprint: str = "",
    similarity: Literal["dot", "cos"] | None = None,
    student: StudentModel | None = None,
    open_student: Callable[[Path], StudentModel] | None = None,
    device: str | torch.device | None = None,
) -> FaissIndex:
    """Learn a product-quantised index over document vectors [n, dimension] that ranks as the vectors do.

    A killed training goes on from its last checkpoint and ends with the same codebooks (on the same machine); an index
    of the same specification over the same vectors and queries is kept.

    Args:
        documents: float32, memory-mapped or not.
        doc_ids: one id a vector, in row order.
        queries: what to learn from; the documents themselves unless given.
        vectors_fingerprint: of the document vectors, queries_fingerprint of the queries: what decides the result.
        similarity: of the student; `cos` promises vectors of length one and is checked.
        student: whose query encoder is trained along (`query: encoder`); `open_student` opens it where it was saved.
        device: where codebooks learn, by the rule of devices.py; FAISS, which they start from, stays on the CPU.

    Raises:
        UsageError: a specification that cannot be met.
        RankdistillError: vectors as `build_index` refuses them; a loss that stops being a number; a full disk.
    """
    out_file, place = Path(out_file), resolve_device(device)
    if documents.ndim != 2 or not len(documents):
        raise RankdistillError(f"there is nothing to quantise: vectors of shape {list(documents.shape)}")
    _check(specification, student, int(documents.shape[1]))
    values = {
        "specification": specification.model_dump(
            mode="json", exclude={"name", "description", "search", "refine", "checkpoint_every"}
        ),
        "vectors": vectors_fingerprint or content_digest(documents),
        "queries": queries_fingerprint or (queries.digest() if queries is not None else ""),
        "student": student_fingerprint if specification.query == "encoder" else "",
    }
    check_out_file(out_file)
    with locked(out_file):
        trained = _train(documents, queries or Queries(), specification, out_file, values, similarity, student, place)
        doc_ids = Ids.of(doc_ids)
        key = fingerprint([values, specification.refine, specification.search.model_dump(), doc_ids.digest()])
        if manifest_if_whole(out_file).get("fingerprint") == key:
            return FaissIndex.open(out_file)
        started = time.time()
        index = _export(trained, documents, specification)
        encoder = trained.path / ENCODER
        if encoder.is_dir() and open_student is not None:
            student_fingerprint = open_student(encoder).fingerprint  # queries of another student are refused
        return publish_index(
            index,
            doc_ids,
            out_file,
            specification=specification.started(documents.shape[1]),
            manifest={
                "fingerprint": key,
                "student_fingerprint": student_fingerprint,
                "collection_fingerprint": collection_fingerprint,
                "vectors_fingerprint": vectors_fingerprint,
                "similarity": similarity,
                "quantizer": specification.model_dump(mode="json"),
                "query_encoder": f"{trained.path.name}/{ENCODER}" if encoder.is_dir() else None,
                **{key: trained.manifest[key] for key in ("factory", "trained_on", "agreement", "zero_vectors")},
                "device": trained.manifest.get("device") or "cpu",
                "training_seconds": trained.manifest["seconds"],
                "seconds": round(time.time() - started, 3),
            },
        )


def quantize_student(
    student: StudentModel,
    collection: Collection,
    vectors: Artifact | str | Path,
    specification: QuantizerSpecification,
    out_file: str | Path,
    *,
    query_ids: Sequence[str] | None = None,
    lists: ScoredLists | None = None,
    open_student: Callable[[Path], StudentModel] | None = None,
) -> FaissIndex:
    """`quantize` for a student's vectors of a collection (see `encode_documents`), from whose queries it learns.

    Args:
        query_ids, lists: see `collection_queries`.
    """
    exact = ExactIndex.open(vectors)
    exact.check(student, collection)
    queries, made_from = collection_queries(student, collection, specification, query_ids=query_ids, lists=lists)
    return quantize(
        exact.vectors,
        DocumentIds(collection),
        queries,
        specification,
        out_file,
        vectors_fingerprint=exact.fingerprint,
        queries_fingerprint=made_from,
        student_fingerprint=student.fingerprint,
        collection_fingerprint=collection.fingerprint,
        similarity=student.similarity,
        student=student,
        open_student=open_student,
    )


def quantize_files(
    documents: str | Path,
    queries: str | Path | None,
    specification: QuantizerSpecification,
    out_file: str | Path,
    *,
    ids: str | Path | None = None,
    scores: str | Path | None = None,
) -> FaissIndex:
    """`quantize` for vectors made elsewhere, by any model: .npy or Parquet (see indexes/foreign_vectors.py).

    Args:
        queries: of the training queries; documents serve as queries without one.
        ids: of a .npy's rows.
        scores: a teacher's scores as a run, for `relevance: scores`; documents and queries by the ids of the vectors.
    """
    out_file = Path(out_file)
    folder = out_file.with_name(f"{out_file.name}.vectors")
    held = open_foreign_vectors(documents, folder, side="documents", ids=ids)
    asked = open_foreign_vectors(queries, folder, side="queries") if queries is not None else None
    if asked is not None and asked.dimension != held.dimension:
        raise RankdistillError(
            f"queries of {asked.dimension} dimensions, documents of {held.dimension}", where=str(queries)
        )
    teacher = None
    if specification.relevance == "scores":
        if scores is None or asked is None:
            raise UsageError("relevance: scores needs --scores and --queries", fix="or relevance: vectors")
        teacher = recorded_scores(scores, list(asked.ids), list(held.ids))
    # A cosine model's vectors have length one; what is not is compared by plain inner product.
    return quantize(
        held.vectors,
        held.ids,
        Queries(given=None if asked is None else np.array(asked.vectors), teacher=teacher),
        specification,
        out_file,
        vectors_fingerprint=held.fingerprint,
        queries_fingerprint=fingerprint(
            [asked.fingerprint if asked is not None else None, file_digest(scores) if scores is not None else None]
        ),
        similarity="cos" if held.unit_length else "dot",
    )


def recorded_scores(file: str | Path, query_ids: Sequence[str], doc_ids: Sequence[str]) -> TeacherScores:
    """A run's scores by the rows of queries and documents; what neither knows is left out and counted."""
    query_row = {query_id: row for row, query_id in enumerate(query_ids)}
    doc_row = {doc_id: row for row, doc_id in enumerate(doc_ids)}
    queries, rows, values, dropped, missing = [], [], [], 0, 0
    for query_id, names, scores in iter_run(Path(file)):
        known = np.array([doc_row.get(name, -1) for name in names], np.int32)
        if query_id not in query_row or (known >= 0).sum() < 2:
            dropped += 1
            continue
        missing += int((known < 0).sum())
        queries.append(query_row[query_id])
        rows.append(known[known >= 0])
        values.append(np.asarray(scores, np.float32)[known >= 0])
    if not queries:
        raise RankdistillError(
            "no query of these scores has two documents among the vectors", where=str(file), fix="the same ids in both"
        )
    if dropped:
        warn(f"{dropped} queries of {file} have no vector, or fewer than two scored documents with one: left out")
    if missing:
        warn(f"{missing} scored documents of {file} have no vector: left out of their lists")
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in rows])]).astype(np.int64)
    flat = np.concatenate(rows)
    return TeacherScores(np.array(queries), offsets, flat, np.concatenate(values), np.full(len(flat), -1, np.int32))


def query_encoder_folder(index: FaissIndex) -> Path | None:
    """The query encoder that was trained along with an index, if there is one."""
    named = index.manifest.get("query_encoder")
    return index.path.with_name(str(named).split("/")[0]) / ENCODER if named else None


def _check(specification: QuantizerSpecification, student: StudentModel | None, dimension: int) -> None:
    """Refuse a specification whose parts do not go together."""
    spec, subspaces = specification, specification.started(dimension).subspaces
    l2, overlap = spec.metric == "l2", spec.overlap > 1
    apart = spec.lists or spec.codes != "nearest" or spec.rotation == "learned" or l2
    for wrong, what, fix in (
        (
            spec.fast_scan and spec.bits != 4,
            f"a fast-scan index holds 4-bit codes, not {spec.bits}-bit ones",
            "bits: 4",
        ),
        (
            l2 and spec.query == "linear",
            "a query map needs inner products: distances compare with the documents' own space",
            "query: frozen",
        ),
        (
            spec.query == "encoder" and student is None,
            "query: encoder trains a run's student along, and there are only vectors here",
            "query: linear, or give a run",
        ),
        (l2 and spec.query == "encoder", "query: encoder needs inner products", "metric: inner_product"),
        (
            overlap and apart,
            "overlapping subspaces go with inner products, without lists, codes other than the nearest, and a learned"
            " rotation",
            "overlap: 1, or lists: 0, codes: nearest, rotation: opq, metric: inner_product",
        ),
        (
            spec.codes == "frozen" and spec.rotation == "learned",
            "frozen codes do not follow a learned rotation",
            "rotation: opq",
        ),
        (
            overlap and isinstance(subspaces, int) and spec.overlap > subspaces,
            f"overlap: {spec.overlap} of {subspaces} subspaces would cover a dimension twice",
            f"overlap: {subspaces}, or less",
        ),
    ):
        if wrong:
            raise UsageError(what, where=f"index specification {spec.name}", fix=fix)


def quantizer_folder(out_file: Path) -> Path:
    """Where the trained quantiser of an index file lies."""
    return out_file.with_name(f"{out_file.name}.quantizer")


def _train(
    documents: Vectors,
    queries: Queries,
    specification: QuantizerSpecification,
    out_file: Path,
    values: dict[str, Any],
    similarity: str | None,
    student: StudentModel | None,
    device: torch.device,
) -> Artifact:
    spec, count = specification, len(documents)

    def make(writer: ArtifactWriter) -> None:
        zeros: list[int] = []
        for start in range(0, count, BLOCK):
            zeros += checked_rows(documents, np.arange(start, min(start + BLOCK, count)), False)[1]
        refuse_zeros(zeros, count, spec.name)
        if similarity == "cos":
            check_unit_length(documents)
        writer.device, work = str(device), writer.path
        start_file = work / "start.safetensors"
        parts, notes = _start(documents, spec, start_file)
        torch.manual_seed(spec.seed)
        quantizer = VectorQuantizer(
            parts,
            learn_rotation=spec.rotation == "learned",
            learn_query_map=spec.query == "linear",
            softness=spec.softness if spec.codes == "straight_through" else None,
        ).to(device)
        agreement: dict[str, float] = {}
        codes: NDArray[np.uint8] | None = None
        overlapping = spec.overlap > 1 and spec.steps > 0
        if spec.codes == "frozen" or overlapping:
            codes = _encode_all(documents, quantizer, work)
        if overlapping:
            quantizer = VectorQuantizer(parts, learn_query_map=spec.query == "linear", overlap=spec.overlap).to(device)
        if spec.steps:
            sampler = Sampler(documents, queries, spec, work)
            # A copy learns: the caller's student goes on to encode documents, and queries for other indexes.
            learning = copy.deepcopy(student) if spec.query == "encoder" else None
            encoder = None if learning is None else (learning, _query_encoding(learning))
            training = QuantizerTraining(quantizer, sampler, spec, documents, work, codes=codes, query_encoder=encoder)
            training.run()
            if training.initial is not None and training.final is not None:
                agreement = {"start": training.initial, "end": training.final, "queries": float(len(sampler.held_out))}
            if agreement and agreement["end"] < agreement["start"]:
                warn(
                    f"{spec.name}: training lowered the agreement with exact search from"
                    f" {training.initial:.3f} to {training.final:.3f} of the first ten"
                )
            if learning is not None:
                learning.save(work / ENCODER)
        if codes is None or (quantizer.centroids is not None and not quantizer.by_residual):
            _encode_all(documents, quantizer, work, keep_codes=codes is not None)
        save_file({name: value.cpu().contiguous() for name, value in quantizer.state_dict().items()}, work / WEIGHTS)
        writer.counts = {"documents": count, "dimension": int(documents.shape[1]), "steps": spec.steps}
        writer.notes = {**notes, "agreement": agreement, "zero_vectors": len(zeros), "log": LOG}
        for leftover in (BEST, LIVE, start_file.name):
            (work / leftover).unlink(missing_ok=True)
        for folder in work.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(folder, ignore_errors=True)

    return obtain(
        quantizer_folder(out_file),
        kind=KIND,
        fingerprint=fingerprint(values),
        settings=values,
        inputs={"vectors": values["vectors"]},
        make=make,
        resume=True,
    )


def _start(documents: Vectors, specification: QuantizerSpecification, file: Path) -> tuple[IndexParts, dict[str, Any]]:
    """FAISS's trained parts; kept in a file, so that a resumed training starts from the very same."""
    started = specification.started(documents.shape[1])
    if not file.is_file():
        say(f"{specification.name}: FAISS trains {started.resolve(*documents.shape)}, which learning starts from")
        index, notes = train_index(
            documents, started.model_copy(update={"refine": None}), by_residual=specification.residual
        )
        parts = parts_of(index)
        held = {"codebooks": parts.codebooks, "rotation": parts.rotation, "centroids": parts.centroids}
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in held.items() if array is not None}
        new = file.with_suffix(".new")
        save_file(tensors, new, metadata={key: str(value) for key, value in notes.items()})
        new.rename(file)
    with safe_open(file, "np") as stream:
        arrays, kept = {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata()  # noqa: SIM118
    parts = IndexParts(
        arrays.get("rotation"),
        arrays.get("centroids"),
        arrays["codebooks"],
        specification.metric,
        specification.residual and bool(specification.lists),
        specification.fast_scan,
    )
    return parts, {"factory": started.resolve(*documents.shape), "trained_on": int(kept["trained_on"])}


def _encode_all(
    documents: Vectors, quantizer: VectorQuantizer, work: Path, *, keep_codes: bool = False
) -> NDArray[np.uint8]:
    """Write lists and codes of all documents by the codebooks as they are now; the codes, memory-mapped."""
    codes: Any = (
        np.load(work / CODES, mmap_mode="r", allow_pickle=False)
        if keep_codes
        else allocate_array(work / CODES, (len(documents), quantizer.subspaces), np.uint8)
    )
    lists = allocate_array(work / LISTS, (len(documents),), np.int64) if quantizer.centroids is not None else None
    with progress("encode documents to codes", len(documents), "vectors") as bar:
        for start in range(0, len(documents), BLOCK):
            block = np.asarray(documents[start : start + BLOCK], np.float32)
            block_lists, block_codes = quantizer.encode(block)
            if not keep_codes:
                codes[start : start + len(block)] = block_codes
            if lists is not None:
                lists[start : start + len(block)] = block_lists
            bar.advance(len(block))
    for array in (lists, None if keep_codes else codes):
        if array is not None:
            array.flush()
    return codes


def _export(trained: Artifact, documents: Vectors, specification: QuantizerSpecification) -> Any:
    """The FAISS index of a trained quantiser and its codes."""
    import faiss

    tensors = load_file(trained.path / WEIGHTS)
    codes = np.load(trained.path / CODES, mmap_mode="r", allow_pickle=False)
    lists_file = trained.path / LISTS
    lists = np.load(lists_file, mmap_mode="r", allow_pickle=False) if lists_file.is_file() else None
    plain = specification.rotation == "none" and not {"query_map", "columns"} & tensors.keys()
    transform = query_transform(
        tensors["rotation0"], tensors.get("skew"), tensors.get("query_map"), tensors.get("columns")
    )
    index = assemble_index(
        rotation=None if plain else transform.contiguous().numpy(),
        centroids=tensors["centroids.weight"].numpy() if "centroids.weight" in tensors else None,
        codebooks=tensors["codebooks"].numpy(),
        metric=specification.metric,
        by_residual=specification.residual,
        fast_scan=specification.fast_scan,
    )
    add_codes(index, lists, codes)
    if specification.refine:
        # The second stage compares the query itself with the documents themselves.
        second: Any = faiss.index_factory(documents.shape[1], specification.refine, faiss_metric(specification.metric))
        if not second.is_trained:
            second.train(np.ascontiguousarray(documents[:BLOCK], dtype=np.float32))
        for start in range(0, len(documents), BLOCK):
            second.add(np.ascontiguousarray(documents[start : start + BLOCK], dtype=np.float32))
        outer: Any = faiss.IndexRefine(index, second)
        for part in (index, second):
            part.this.disown()
        outer.own_fields = outer.own_refine_index = True
        outer.ntotal = index.ntotal
        index = outer
    apply_search(index, specification.search, specification.name)
    return index


def _query_encoding(student: StudentModel) -> Any:
    """Texts → query vectors [n, dimension], with gradients while the quantiser trains."""

    def run(texts: list[str]) -> torch.Tensor:
        return student.embed(to_device(student.preprocess(texts, "query"), student.device), "query").float()

    return run
