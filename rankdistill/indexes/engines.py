"""Which vectors a student leaves of a collection, and which engine searches them: one a text, or one a token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankdistill.artifacts import Artifact, open_artifact
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.specification import any_specification

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.dense import DenseEngine
    from rankdistill.indexes.multi_vector import MultiVectorEngine
    from rankdistill.students.base import StudentModel
    from rankdistill.students.query_tower import QueryTowerModel

MULTI_VECTOR = "multi_vector"  # the type of student


def encode_collection(student: Any, collection: Collection, path: str | Path) -> Artifact:
    """A student's document vectors, encoded once; see `encode_documents` and `encode_document_tokens`."""
    from rankdistill.students.multi_vector import MultiVectorModel
    from rankdistill.students.query_tower import QueryTowerModel

    if isinstance(student, MultiVectorModel):
        from rankdistill.indexes.multi_vector import encode_document_tokens

        return encode_document_tokens(student, collection, path)
    from rankdistill.indexes.vectors import encode_documents

    if isinstance(student, QueryTowerModel):
        from rankdistill.indexes.sources import source_vectors

        if student.made_vectors is not None and (made := _made(student, collection)) is not None:
            return made
        mined = source_vectors(Path(path).parents[1] / "engines", student.document_fingerprint, collection)
        # One for all query encoders over these documents, and the one that was mined with where it is the same.
        path = mined if mined.is_dir() else Path(path).with_name(f"documents-{collection.name}")
    return encode_documents(student, collection, path)


def _made(student: QueryTowerModel, collection: Collection) -> Artifact | None:
    """Vectors that a query tower's document model made before; None where they are of another collection.

    Raises:
        RankdistillError: they are another model's.
    """
    assert student.made_vectors is not None
    artifact = open_artifact(student.made_vectors, "vectors")
    inputs = artifact.manifest["inputs"]
    if inputs.get("encoder") != student.document_fingerprint:
        raise RankdistillError(
            f"these vectors were made by another model ({inputs.get('encoder')}, not {student.document_fingerprint})",
            where=str(student.made_vectors),
            fix="name the model, lengths and precision that made them, or leave student.document_vectors out",
        )
    return artifact if inputs.get("collection") == collection.fingerprint else None


def prepare_student(student: StudentModel, collection: Collection, folder: Path) -> None:
    """Called once before a training: what a student keeps for it goes below `folder`.

    A query tower is given its documents' vectors, so that the document model does not run while it learns.
    """
    from rankdistill.indexes.vectors import open_vectors
    from rankdistill.students.query_tower import QueryTowerModel

    if isinstance(student, QueryTowerModel):
        vectors = encode_collection(student, collection, folder.parent / "vectors" / collection.name)
        student.use_vectors(open_vectors(vectors))
    student.prepare(collection, folder)


def exhaustive_engine(student: Any, vectors: Artifact) -> DenseEngine | MultiVectorEngine:
    """Exact search over a student's document vectors.

    Raises:
        RankdistillError: they are another student's.
    """
    from rankdistill.indexes.dense import DenseEngine
    from rankdistill.indexes.multi_vector import KIND, MultiVectorEngine

    return (MultiVectorEngine if vectors.kind == KIND else DenseEngine).over(student, vectors)


def index_files(student_type: str, specifications: Sequence[Any], where: str = "indexes") -> list[Any]:
    """The specifications that are built to a file of their own.

    Of a multi-vector student there are none: `flat` is its token vectors, which are searched as they are.

    Raises:
        UsageError: any other index of a multi-vector student.
    """
    if student_type != MULTI_VECTOR:
        return list(specifications)
    for given in specifications:
        specification = any_specification(given)
        if getattr(specification, "factory", "") != "Flat":
            raise UsageError(
                f"{specification.name} holds one vector a document; a multi_vector student has one a token",
                where=where,
                fix="indexes: [flat], which searches all token vectors, or []; or a dense student",
            )
    return []


def check_index(student_type: str, specification: Any) -> None:
    """Refuse an index file that a student cannot have.

    Raises:
        UsageError: any of a multi-vector student.
    """
    if not index_files(student_type, [specification]):
        raise UsageError(
            "a multi_vector student has no index file: its token vectors are searched as they are",
            where=str(specification),
            fix="`rankdistill search` and `evaluate` do so without an index",
        )
