"""Which vectors a student leaves of a collection, and which engine searches them: one a text, or one a token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankdistill.artifacts import Artifact
from rankdistill.errors import UsageError
from rankdistill.indexes.specification import any_specification

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.dense import DenseEngine
    from rankdistill.indexes.multi_vector import MultiVectorEngine

MULTI_VECTOR = "multi_vector"  # the type of student


def encode_collection(student: Any, collection: Collection, path: str | Path) -> Artifact:
    """A student's document vectors, encoded once; see `encode_documents` and `encode_document_tokens`."""
    from rankdistill.students.multi_vector import MultiVectorModel

    if isinstance(student, MultiVectorModel):
        from rankdistill.indexes.multi_vector import encode_document_tokens

        return encode_document_tokens(student, collection, path)
    from rankdistill.indexes.vectors import encode_documents

    return encode_documents(student, collection, path)


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
