"""A multi-vector model in training: as the student, and as the teacher of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from trainings import logged

from rankdistill.students.multi_vector import MultiVectorStudent
from rankdistill.training.batch_teacher import BatchTeacher
from rankdistill.training.trainer import train_student

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists


@pytest.fixture
def recipe_of(make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """The recipe of the other trainings with a multi-vector student; keywords change its settings."""

    def make(student: dict[str, Any] | None = None, **training: Any) -> Recipe:
        return make_recipe({"type": "multi_vector", "scale": 2.0, "dropout": 0.0, **(student or {})}, **training)

    return make


def test_gradient_cache_gives_the_same_training(
    recipe_of: Callable[..., Recipe], lists: ScoredLists, tiny_collection: Collection, tmp_path: Path
) -> None:
    """Also where queries are expanded and embedded in parts."""
    student = {"query_expansion": True, "query_length": 12}
    curves = []
    for cached in (False, True):
        recipe = recipe_of(student, steps=3, checkpoints=1, gradient_cache=cached, token_budget=64)
        curves.append(logged(train_student(recipe, lists, tiny_collection, None, tmp_path / f"cached-{cached}")))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_its_scores_of_a_batch_are_the_plain_librarys(
    tiny_encoder: Path, lists: ScoredLists, tiny_collection: Collection, tmp_path: Path
) -> None:
    settings = {"precision": "fp32", "scale": 3.0, "query_expansion": True, "query_length": 12, "document_length": 24}
    model = MultiVectorStudent(str(tiny_encoder), **settings).create("cpu")
    model.save(tmp_path / "model")
    plain = MultiVectorEncoder(str(tmp_path / "model"), device="cpu", local_files_only=True)
    query_ids = lists.query_ids[:3]
    rows = np.unique(lists.doc_rows)[:7]
    queries, texts = tiny_collection.query_texts(query_ids), tiny_collection.document_texts(rows)
    expected = 3 * np.asarray(plain.similarity(plain.encode_query(queries), plain.encode_document(texts)))
    for vectors, tolerance in (("live", 1e-4), ("precomputed", 0.02)):  # the latter in float16
        teacher = BatchTeacher(model, tiny_collection, vectors)  # type: ignore[arg-type]
        teacher.prepare(lists, tmp_path / vectors)
        with torch.no_grad():
            scores = teacher.score_all(*teacher.embed(teacher.features(query_ids, queries, rows)))
        np.testing.assert_allclose(scores.numpy(), expected, atol=tolerance)
