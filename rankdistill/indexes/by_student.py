"""Which vectors a student leaves of a collection, and which engine searches them: one a text, one a token, or terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankdistill.artifacts import Artifact, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes import multi_vector, sparse, sparse_vectors
from rankdistill.indexes.dense import DenseEngine
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.sparse_specification import SparseSpecification
from rankdistill.indexes.specification import AnySpecification, any_specification
from rankdistill.indexes.vectors import VectorFolders, encode_documents, open_vectors

if TYPE_CHECKING:  # these load torch
    from rankdistill.students.base import StudentModel
    from rankdistill.students.query_tower import QueryTowerModel

# Types of student
MULTI_VECTOR = "multi_vector"
INFERENCE_FREE = "inference_free"
SPARSE_STUDENTS = ("splade", INFERENCE_FREE)
CROSS_ENCODER = "cross_encoder"


def check_vectors(student: Any) -> None:
    """Refuse a student that has none: it reads query and document together."""
    if student.reads_pairs:
        raise UsageError(
            "a cross_encoder student has no vectors to search: it re-ranks what a first stage found",
            fix="`rankdistill evaluate` measures it so; as teacher: {type: cross_encoder, model: RUN/student/model} it "
            "teaches a student that searches",
        )


def encode_collection(
    student: Any, collection: Collection, path: str | Path, folders: VectorFolders | None = None
) -> Artifact:
    """A student's document vectors, encoded once; see `encode_documents` and its like for tokens and terms.

    Args:
        folders: where vectors that a dense student's equal may lie already.
    """
    if hasattr(student, "terms"):
        return sparse_vectors.encode_document_terms(student, collection, path)
    from rankdistill.students.multi_vector import MultiVectorModel
    from rankdistill.students.query_tower import QueryTowerModel

    if isinstance(student, MultiVectorModel):
        return multi_vector.encode_document_tokens(student, collection, path)
    if isinstance(student, QueryTowerModel):
        if student.made_vectors is not None and (vectors := _made(student, collection)) is not None:
            return vectors
        path = Path(path).with_name(f"documents-{collection.name}")  # one for all query encoders over these documents
    return encode_documents(student, collection, (folders and folders.find(student, collection)) or path)


def _made(student: QueryTowerModel, collection: Collection) -> Artifact | None:
    """Vectors that a query tower's document model made before; None where they are of another collection."""
    assert student.made_vectors is not None
    artifact = open_artifact(student.made_vectors, "vectors")
    inputs = artifact.manifest["inputs"]
    if inputs.get("encoder") != student.document_fingerprint:
        made_by = f"({inputs.get('encoder')}, not {student.document_fingerprint})"
        fix = "name the model, lengths and precision that made them, or leave student.document_vectors out"
        where = str(student.made_vectors)
        raise RankdistillError(f"these vectors were made by another model {made_by}", where=where, fix=fix)
    return artifact if inputs.get("collection") == collection.fingerprint else None


def prepare_student(
    student: StudentModel, collection: Collection, folder: Path, folders: VectorFolders | None = None
) -> None:
    """Called once before a training: what a student keeps for it goes below `folder`, its vectors to `folders`.

    A query tower is given its documents' vectors, so that the document model does not run while it learns.
    """
    from rankdistill.students.query_tower import QueryTowerModel

    if isinstance(student, QueryTowerModel):
        place = (folders.new if folders else folder / "vectors") / collection.name
        vectors = encode_collection(student, collection, place, folders)
        student.use_vectors(open_vectors(vectors))
    student.prepare(collection, folder)


def exhaustive_engine(
    student: Any, vectors: Artifact
) -> DenseEngine | multi_vector.MultiVectorEngine | sparse.SparseEngine:
    """Exact search over a student's document vectors; an error where they are another student's."""
    if vectors.kind == sparse_vectors.KIND:
        return sparse.SparseEngine.over(query_encoder(student), vectors)
    return (multi_vector.MultiVectorEngine if vectors.kind == multi_vector.KIND else DenseEngine).over(student, vectors)


def query_encoder(student: Any) -> Any:
    """What encodes a student's queries when it is served: itself, or an inference-free one's table of token weights."""
    return getattr(student, "token_weights", None) or student


def query_side(
    student_type: str, model: Path, index: str | Path | None, collection: Collection, vectors: Path
) -> Any | None:
    """The query side of an inference-free student as it lies on disk; nothing here imports torch.

    Args:
        model: folder of the saved student.
        index: what shall be searched, the vectors themselves without one.
        vectors: where the document vectors are.

    Returns:
        None for another type of student, and where the documents must be encoded first.
    """
    if student_type != INFERENCE_FREE:
        return None
    from rankdistill.students.token_weights import TokenWeights

    weights = TokenWeights.open(model)
    there = index is not None or sparse_vectors.find_sparse_vectors(weights, collection, vectors) is not None
    return weights if there else None


def open_index(path: str | Path, *, memory_map: bool = False) -> FaissIndex | sparse.BuiltSparseIndex:
    """A FAISS file, or the folder of a sparse student's index, which cannot be memory-mapped."""
    if Path(path).is_dir():
        if memory_map:
            what = "only a FAISS file can be left on disk; a sparse student's index has its own way of being read"
            raise UsageError(what, where=str(path), fix="leave out --memory-map")
        return sparse.open_sparse_index(path)
    return FaissIndex.open(path, memory_map=memory_map)


def index_files(student_type: str, declared: Sequence[Any], where: str = "indexes") -> list[AnySpecification]:
    """The specifications, read, of the indexes that are built to a file, or folder, of their own.

    `flat` of a multi-vector or sparse student is none: its vectors are searched as they are. A cross-encoder has
    nothing to search.

    Raises:
        UsageError: any other index of a multi-vector student or a cross-encoder, one of dense vectors for a sparse
            student, or of term weights for another.
    """
    whole = student_type in (MULTI_VECTOR, CROSS_ENCODER, *SPARSE_STUDENTS)  # searched without a file, if at all
    files = []
    for specification in map(any_specification, declared):
        if whole and getattr(specification, "factory", "") == "Flat":
            continue
        if refusal := _refusal(student_type, isinstance(specification, SparseSpecification)):
            what, fix = refusal
            raise UsageError(f"{specification.name} {what}", where=where, fix=fix)
        files.append(specification)
    return files


def _refusal(student_type: str, sparse: bool) -> tuple[str, str] | None:
    """Why a student cannot have an index of a kind, and what it can have; none where it can."""
    if student_type == CROSS_ENCODER:
        what = "is an index, and a cross_encoder student re-ranks: it has no vectors"
        return what, "indexes: [], or a student that searches, which this one can teach"
    if student_type == MULTI_VECTOR:
        what = "holds one vector a document; a multi_vector student has one a token"
        return what, "indexes: [flat], which searches all token vectors, or []; or a dense student"
    if student_type in SPARSE_STUDENTS and not sparse:
        what = f"is an index of dense vectors; a {student_type} student has term weights"
        return what, "flat (exact search), seismic, lucene_impact, or an export: opensearch, elasticsearch, ciff"
    if student_type not in SPARSE_STUDENTS and sparse:
        what = f"is an index of term weights; a {student_type} student has none"
        return what, f"an index of dense vectors, such as flat; or student.type: {' or '.join(SPARSE_STUDENTS)}"
    return None


def check_index(student_type: str, specification: AnySpecification) -> None:
    """Refuse an index file that a student cannot have, exact search of one without a file too."""
    if index_files(student_type, [specification]):
        return
    what = f"exact search of a {student_type} student reads its vectors: there is no file to make"
    fix: str | None = "search without --index; or --spec seismic, lucene_impact, opensearch, elasticsearch, ciff"
    if student_type == CROSS_ENCODER:
        what, fix = "a cross_encoder student has no index: it re-ranks", None
    elif student_type == MULTI_VECTOR:
        what = "a multi_vector student has no index file: its token vectors are searched as they are"
        fix = "`rankdistill search` and `evaluate` do so without an index"
    raise UsageError(what, where=specification.name, fix=fix)
