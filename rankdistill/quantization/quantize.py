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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from rankdistill.artifacts import Artifact, ArtifactWriter, file_digest, fingerprint, locked, obtain
from rankdistill.collections import Collection
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import DocumentIds, Vectors, allocate_array
from rankdistill.indexes.building import look_through, train_index
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
from rankdistill.quantization.training import CHECKPOINT, CODES, LISTS, LIVE, LOG, WEIGHTS, QuantizerTraining
from rankdistill.runs import iter_run
from rankdistill.sampling.base import generator
from rankdistill.sampling.training_queries import pseudo_queries
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import StudentModel

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
    if specification.query == "encoder" and student is None:
        what = "query: encoder trains a run's student along, and there are only vectors here"
        raise UsageError(what, where=f"index specification {specification.name}", fix="query: linear, or give a run")
    started = specification.started(int(documents.shape[1]))
    if specification.overlap > 1 and specification.overlap > int(started.subspaces):
        what = f"overlap: {specification.overlap} of {started.subspaces} subspaces would cover a dimension twice"
        where = f"index specification {specification.name}"
        raise UsageError(what, where=where, fix=f"overlap: {started.subspaces}, or less")
    apart = {"name", "description", "search", "refine", "checkpoint_every"}
    values: dict[str, Any] = {
        "specification": specification.model_dump(mode="json", exclude=apart),
        "vectors": vectors_fingerprint or content_digest(documents),
        "queries": queries_fingerprint or (queries.digest() if queries is not None else ""),
        "student": student_fingerprint if specification.query == "encoder" else "",
    }
    check_out_file(out_file)
    with locked(out_file):
        trained = obtain(
            quantizer_folder(out_file),
            kind=KIND,
            fingerprint=fingerprint(values),
            settings=values,
            inputs={"vectors": values["vectors"]},
            make=partial(_train, documents, queries or Queries(), specification, similarity, student, place),
            resume=True,
        )
        doc_ids = Ids.of(doc_ids)
        key = fingerprint([values, specification.refine, specification.search.model_dump(), doc_ids.digest()])
        if manifest_if_whole(out_file).get("fingerprint") == key:
            return FaissIndex.open(out_file)
        begun = time.time()
        index = _export(trained, documents, specification)
        encoder = trained.path / ENCODER
        if encoder.is_dir() and open_student is not None:
            student_fingerprint = open_student(encoder).fingerprint  # queries of another student are refused
        return publish_index(
            index,
            doc_ids,
            out_file,
            specification=started,
            manifest={
                "fingerprint": key,
                "student_fingerprint": student_fingerprint,
                "collection_fingerprint": collection_fingerprint,
                "vectors_fingerprint": vectors_fingerprint,
                "similarity": similarity,
                "quantizer": specification.model_dump(mode="json"),
                "query_encoder": f"{trained.path.name}/{ENCODER}" if encoder.is_dir() else None,
                **{name: trained.manifest[name] for name in ("factory", "trained_on", "agreement", "zero_vectors")},
                "device": trained.manifest.get("device") or "cpu",
                "training_seconds": trained.manifest["seconds"],
                "seconds": round(time.time() - begun, 3),
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


def collection_queries(
    student: StudentModel,
    collection: Collection,
    specification: QuantizerSpecification,
    *,
    query_ids: Sequence[str] | None = None,
    lists: ScoredLists | None = None,
) -> tuple[Queries, str]:
    """The queries a specification asks for, encoded by the student, and a fingerprint of all that decides them.

    They are training queries, never those of dev and test, and pseudo-queries made from documents. Judgments are read
    only where the specification asks for labels.

    Args:
        query_ids: training queries to use; those of the training split, if there is one, unless given.
        lists: the teacher's scored lists, for `relevance: scores`; their queries are the given ones.
    """
    split = collection.training_split
    recorded = specification.relevance == "scores" and lists is not None
    if lists is not None and recorded:
        query_ids = lists.query_ids
    elif query_ids is None:
        query_ids = collection.query_ids(split) if split else []
    shares = specification.queries
    ids = list(query_ids) if shares.given or recorded else []
    if not recorded and len(ids) > shares.most:
        chosen = generator(specification.seed, 21).choice(len(ids), shares.most, replace=False)
        ids = [ids[row] for row in np.sort(chosen)]
    texts = collection.query_texts(ids) if ids else []
    pseudo: list[str] = []
    if shares.pseudo and not recorded:
        count = min(shares.most, collection.document_count)
        rows = np.sort(generator(specification.seed, 22).choice(collection.document_count, count, replace=False))
        pseudo = [text for text in pseudo_queries(collection, rows) if text]
    positives = None
    if specification.documents.labelled:
        judged = collection.qrels(split) if split else {}
        relevant = [[name for name, grade in judged.get(query_id, {}).items() if grade > 0] for query_id in ids]
        positives = [collection.doc_rows(names) for names in relevant]
    teacher = None
    if lists is not None and recorded:
        teacher = TeacherScores(np.arange(len(lists)), lists.offsets, lists.doc_rows, lists.scores, lists.relevance)
    queries = Queries(
        given=student.encode_queries(texts) if texts else None,
        pseudo=student.encode_queries(pseudo) if pseudo else None,
        positives=positives,
        teacher=teacher,
        given_texts=list(texts) or None,
        pseudo_texts=pseudo or None,
    )
    labels = [rows.tolist() for rows in positives] if positives is not None else None
    made_from = [student.fingerprint, collection.fingerprint, ids, len(pseudo), labels]
    return queries, fingerprint(["queries", *made_from, lists.fingerprint if recorded and lists else None])


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
    folder = Path(f"{out_file}.vectors")
    held = open_foreign_vectors(documents, folder, side="documents", ids=ids)
    asked = open_foreign_vectors(queries, folder, side="queries") if queries is not None else None
    if asked is not None and asked.dimension != held.dimension:
        what = f"queries of {asked.dimension} dimensions, documents of {held.dimension}"
        raise RankdistillError(what, where=str(queries))
    teacher = None
    if specification.relevance == "scores":
        if scores is None or asked is None:
            raise UsageError("relevance: scores needs --scores and --queries", fix="or relevance: vectors")
        teacher = recorded_scores(scores, list(asked.ids), list(held.ids))
    made_from = [asked.fingerprint if asked is not None else None, file_digest(scores) if scores is not None else None]
    return quantize(
        held.vectors,
        held.ids,
        Queries(given=None if asked is None else np.array(asked.vectors), teacher=teacher),
        specification,
        out_file,
        vectors_fingerprint=held.fingerprint,
        queries_fingerprint=fingerprint(made_from),
        # A cosine model's vectors have length one; what is not is compared by plain inner product.
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
        what = "no query of these scores has two documents among the vectors"
        raise RankdistillError(what, where=str(file), fix="the same ids in both")
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


def quantizer_folder(out_file: Path) -> Path:
    """Where the trained quantiser of an index file lies."""
    return out_file.with_name(f"{out_file.name}.quantizer")


def _train(
    documents: Vectors,
    queries: Queries,
    spec: QuantizerSpecification,
    similarity: str | None,
    student: StudentModel | None,
    device: torch.device,
    writer: ArtifactWriter,
) -> None:
    writer.device, work = str(device), writer.path
    zeros = look_through(documents, spec.name, similarity)
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
        training = QuantizerTraining(quantizer, sampler, spec, documents, work, codes=codes, student=learning)
        before, after = training.run()
        if before is not None and after is not None:
            agreement = {"start": before, "end": after, "queries": float(len(sampler.held_out))}
            if after < before:
                shares = f"from {before:.3f} to {after:.3f} of the first ten"
                warn(f"{spec.name}: training lowered the agreement with exact search {shares}")
        if learning is not None:
            learning.save(work / ENCODER)
    if codes is None or (quantizer.centroids is not None and not quantizer.by_residual):
        _encode_all(documents, quantizer, work, keep_codes=codes is not None)
    save_file({name: value.cpu().contiguous() for name, value in quantizer.state_dict().items()}, work / WEIGHTS)
    writer.counts = {"documents": len(documents), "dimension": int(documents.shape[1]), "steps": spec.steps}
    writer.notes = {**notes, "agreement": agreement, "zero_vectors": zeros, "log": LOG}
    for leftover in (BEST, LIVE, start_file.name):
        (work / leftover).unlink(missing_ok=True)
    for folder in work.glob(f"{CHECKPOINT}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _start(documents: Vectors, specification: QuantizerSpecification, file: Path) -> tuple[IndexParts, dict[str, Any]]:
    """FAISS's trained parts; kept in a file, so that a resumed training starts from the very same."""
    started = specification.started(documents.shape[1])
    factory = started.resolve(*documents.shape)
    if not file.is_file():
        say(f"{specification.name}: FAISS trains {factory}, which learning starts from")
        plain = started.model_copy(update={"refine": None})
        index, notes = train_index(documents, plain, by_residual=specification.residual)
        held = vars(parts_of(index))
        arrays = {name: held[name] for name in ("codebooks", "rotation", "centroids") if held[name] is not None}
        new = file.with_suffix(".new")
        save_arrays(
            {name: np.array(array) for name, array in arrays.items()}, new, {"trained_on": str(notes["trained_on"])}
        )
        new.rename(file)
    with safe_open(file, "np") as stream:
        kept = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        notes = {"factory": factory, "trained_on": int(stream.metadata()["trained_on"])}
    parts = IndexParts(
        kept.get("rotation"),
        kept.get("centroids"),
        kept["codebooks"],
        specification.metric,
        specification.residual and bool(specification.lists),
        specification.fast_scan,
    )
    return parts, notes


def _encode_all(
    documents: Vectors, quantizer: VectorQuantizer, work: Path, *, keep_codes: bool = False
) -> NDArray[np.uint8]:
    """Write lists and codes of all documents by the codebooks as they are now; the codes, memory-mapped."""
    count, lists = len(documents), None
    if keep_codes:
        codes: np.memmap[Any, np.dtype[np.uint8]] = np.load(work / CODES, mmap_mode="r", allow_pickle=False)
    else:
        codes = allocate_array(work / CODES, (count, quantizer.subspaces), np.uint8)
    if quantizer.centroids is not None:
        lists = allocate_array(work / LISTS, (count,), np.int64)
    with progress("encode documents to codes", count, "vectors") as bar:
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            block_lists, block_codes = quantizer.encode(np.asarray(documents[part], np.float32))
            if not keep_codes:
                codes[part] = block_codes
            if lists is not None:
                lists[part] = block_lists
            bar.advance(len(block_codes))
    codes.flush()
    if lists is not None:
        lists.flush()
    return codes


def _export(trained: Artifact, documents: Vectors, specification: QuantizerSpecification) -> Any:
    """The FAISS index of a trained quantiser and its codes."""
    import faiss

    tensors = load_file(trained.path / WEIGHTS)
    codes = np.load(trained.path / CODES, mmap_mode="r", allow_pickle=False)
    file = trained.path / LISTS
    lists = np.load(file, mmap_mode="r", allow_pickle=False) if file.is_file() else None
    plain = specification.rotation == "none" and not {"query_map", "columns"} & tensors.keys()
    transform = query_transform(tensors["rotation0"], *map(tensors.get, ("skew", "query_map", "columns")))
    parts = IndexParts(
        None if plain else transform.contiguous().numpy(),
        tensors["centroids.weight"].numpy() if "centroids.weight" in tensors else None,
        tensors["codebooks"].numpy(),
        specification.metric,
        specification.residual,
        specification.fast_scan,
    )
    index = assemble_index(parts)
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
