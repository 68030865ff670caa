"""A student's start: its vectors are brought near to a teacher's, on text without labels, before it learns from lists.

After EmbedDistill (Kim et al. 2023, arXiv:2301.12005) and "Well-Read Students Learn Better" (Turc et al. 2019,
arXiv:1908.08962). An encoder that lost layers is far from what it was; this gives most of it back at a low price, for
no document has to be scored. It is a training like any other, with `vector_mse` and a batch teacher, over lists of a
query and two documents that have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankdistill.artifacts import Artifact, ArtifactWriter, find_artifact, fingerprint, locked
from rankdistill.collections.collection import GENERATED_DEV, GENERATED_TEST
from rankdistill.errors import UsageError
from rankdistill.indexes.vectors import VectorFolders
from rankdistill.progress import say
from rankdistill.recipe import Alignment, Method, Recipe, check_method, check_recipe
from rankdistill.sampling.base import generator
from rankdistill.sampling.training_queries import pseudo_queries
from rankdistill.scores.lists import ScoredLists, build_lists, lists_fingerprint
from rankdistill.students.dense import ALIGNED
from rankdistill.training.trainer import fit_student, obtain_student, training_fingerprint_values

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DOCUMENTS = 2  # beside each query
WHERE = "student.warm_up"
SHAPES_NOTHING = {"scale": None, "learn_scale": False, "dropout": None, "warm_up": None}  # in a student's vectors


class WarmUpTraining:
    """The warm-up of a recipe's student.

    Args:
        recipe: whose `student.warm_up` is read; neither its seed nor its lists decide anything here, so that one
            warm-up serves all seeds and baselines.
        query_ids: queries that are read beside pseudo-queries made of documents.
        trained: settings of the run's trained student, for a recipe whose teacher that is.

    Raises:
        UsageError: the teacher is the student itself.
    """

    def __init__(
        self,
        recipe: Recipe,
        collection: Collection,
        query_ids: Sequence[str],
        trained: dict[str, Any] | None = None,
    ) -> None:
        student = recipe.student.settings()
        settings = Alignment.model_validate(student.pop("warm_up"))
        teacher = whole(student) if settings.teacher is None else trained
        if isinstance(settings.teacher, Method):
            teacher = settings.teacher.settings()
        assert teacher is not None
        if {**student, **SHAPES_NOTHING} == {**check_method("student", teacher, WHERE), **SHAPES_NOTHING}:
            raise UsageError(
                "the student is its own teacher: it starts where a warm-up would bring it",
                where=WHERE,
                fix="student.layers, a teacher to take after, or no warm-up",
            )
        training = {
            **settings.model_dump(mode="json", exclude={"teacher", "documents", "batch_size"}),
            **{key: getattr(recipe.training, key) for key in ("processes", "precision", "token_budget")},
            "losses": [{"type": "vector_mse"}],
            "batch_teacher": teacher,
            "batches": {"type": "random_batches", "size": settings.batch_size},
            "lists": {"type": "random_documents", "size": DOCUMENTS},
        }
        self.recipe = check_recipe(
            {"name": f"{recipe.name}: warm-up", "seed": 0, "collection": recipe.collection}
            | {"device": recipe.student_device, "student": student, "training": training},
            WHERE,
        )
        rows = generator(0, 3).permutation(collection.document_count)[: settings.documents]
        self.rows = rows.astype(np.int64)
        texts = [text for text in pseudo_queries(collection, np.sort(self.rows)) if text]
        self.collection = collection.with_queries(texts)
        measures = [split for split in (GENERATED_DEV, GENERATED_TEST) if split in collection.splits]
        held = {query_id for split in measures for query_id in collection.query_ids(split)}
        self.query_ids = [i for i in dict.fromkeys([*query_ids, *self.collection.further]) if i not in held]
        if settings.steps is not None:  # more are not read, and the teacher's vectors of them would be made for nothing
            some = generator(0, 4).permutation(len(self.query_ids))[: settings.steps * settings.batch_size]
            self.query_ids = [self.query_ids[place] for place in np.sort(some)]
        # What decides the lists: the documents follow from their number.
        self.inputs = {"queries": fingerprint(self.query_ids), "documents": str(len(rows))}
        self.lists = lists_fingerprint(self.collection, None, self.inputs)
        self.fingerprint = fingerprint(training_fingerprint_values(self.recipe, {"lists": self.lists}))

    def run(self, folder: Path, encoded: VectorFolders | None = None) -> Artifact:
        """The warmed student, trained below `folder` unless it is there; an interrupted training goes on exactly. The
        teacher's vectors of the collection may lie in `encoded` already."""
        prepared = folder / f"prepared-{self.fingerprint}"

        def make(writer: ArtifactWriter) -> None:
            say(f"warm-up: {len(self.query_ids):,} queries, {len(self.rows):,} documents")
            lists = self._lists(prepared / "lists")
            fit_student(self.recipe, lists, self.collection, None, writer, prepared, encoded=encoded)

        return obtain_student(folder / f"student-{self.fingerprint}", self.recipe, {"lists": self.lists}, make)

    def _lists(self, path: Path) -> ScoredLists:
        """Each query with the next two of the documents, in turn."""
        with locked(path):
            if find_artifact(path, "lists", self.lists) is None:
                build_lists(self._candidates(), None, self.collection, None, path, inputs=self.inputs)
            return ScoredLists.open(path, self.collection)

    def _candidates(self) -> Iterator[tuple[str, list[str], Any]]:
        for number, query_id in enumerate(self.query_ids):
            places = (np.arange(DOCUMENTS) + number * DOCUMENTS) % len(self.rows)
            yield query_id, self.collection.doc_ids(self.rows[places]), np.zeros(DOCUMENTS, np.float32)


def warm_up_of(
    recipe: Recipe,
    collection: Collection,
    query_ids: Callable[[], Sequence[str]],
    trained: Callable[[], dict[str, Any]] | None,
) -> WarmUpTraining | None:
    """The warm-up of a recipe's student, if it has one; `trained` trains the student that others may take after and
    gives its settings, and is None for that student itself."""
    student = recipe.student.settings()
    if recipe.student_kind not in ALIGNED or not student.get("warm_up"):
        return None
    after = student["warm_up"]["teacher"] == "student"
    if after and trained is None:
        raise UsageError(
            "a student cannot take after itself",
            where=f"{WHERE}.teacher: student",
            fix="give that to a baseline, or name another teacher",
        )
    return WarmUpTraining(recipe, collection, query_ids(), trained() if after and trained else None)


def whole(student: dict[str, Any]) -> dict[str, Any]:
    """The encoder that a student was cut from, as a student: all its layers, no dropout to speak of."""
    kept = ("model", "query_length", "document_length", "query_prompt", "document_prompt", "precision")
    return {"type": "dense", **{key: student[key] for key in kept if student.get(key) is not None}}
