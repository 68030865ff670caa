"""TAS-Balanced and dual supervision in a training: one stream whatever the processes, exact after a stop, a batch
teacher's vectors alike live or from disk, and clear words where something is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from trainings import logged

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.students.multi_vector import MultiVectorStudent
from rankdistill.training.batch_teacher import BatchTeacher

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection

Train = Callable[..., "Artifact"]


@pytest.fixture
def tas_balanced(tiny_encoder: Path) -> dict[str, Any]:
    """Keys of `training`: batches of 3 from two clusters, 3 documents a list."""
    return {
        "batches": {"type": "topic_batches", "size": 3, "clusters": 2, "model": str(tiny_encoder)},
        "lists": {"type": "balanced_pairs", "size": 3},
    }


@pytest.fixture
def dual(tas_balanced: dict[str, Any], tiny_encoder: Path) -> dict[str, Any]:
    """... and a batch teacher: the encoder everything starts from, with cosines."""
    teacher = {"type": "dense", "model": str(tiny_encoder), "similarity": "cos", "precision": "fp32"}
    return {
        **tas_balanced,
        "losses": [{"type": "margin_mse"}, {"type": "in_batch_margin_mse"}],
        "batch_teacher": teacher,
    }


@pytest.mark.parametrize(
    ("teacher", "tolerance"),
    [({"similarity": "cos"}, 1e-5), ({"type": "multi_vector", "dimension": 16}, 5e-3)],  # on disk: float32, float16
    ids=["dense", "multi_vector"],
)
def test_precomputed_vectors_teach_what_the_live_teacher_does(
    train: Train, dual: dict[str, Any], tmp_path: Path, teacher: dict[str, Any], tolerance: float
) -> None:
    shared = {key: dual["batch_teacher"][key] for key in ("type", "model", "precision")}
    dual["batch_teacher"] = {**shared, **teacher}
    live, kept = (
        train(tmp_path / vectors / "student", **dual, batch_teacher_vectors=vectors, student={"dropout": 0.0})
        for vectors in ("live", "precomputed")
    )
    for name in ("loss", "loss/in_batch_margin_mse"):
        assert logged(live, name) == pytest.approx(logged(kept, name), rel=tolerance)
    assert not (tmp_path / "live" / "prepared" / "batch-teacher").exists()
    assert (tmp_path / "precomputed" / "prepared" / "batch-teacher" / "manifest.json").is_file()
    # The sum is that of the parts, in the published proportion.
    parts = [logged(kept, f"loss/{name}") for name in ("margin_mse", "in_batch_margin_mse")]
    assert logged(kept) == pytest.approx((np.array(parts[0]) + 0.75 * np.array(parts[1])).tolist(), rel=1e-4)


def test_the_batch_teachers_own_student_has_no_in_batch_loss(
    train: Train, dual: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    """The student starts as the batch teacher itself, without dropout: the first step finds nothing to correct."""
    student = {"similarity": "cos", "dropout": 0.0}
    artifact = train(tmp_path / "student", student=student, **dual, steps=2)
    first, second = logged(artifact, "loss/in_batch_margin_mse")
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-4  # the pair's teacher has moved it by then


def test_lists_with_fewer_than_two_pairs_are_dropped_and_counted(
    train: Train,
    tas_balanced: dict[str, Any],
    tiny_collection: Collection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    qrels, others = tiny_collection.qrels("train"), tiny_collection.doc_ids(range(6))

    def lists_of(name: str, short: int) -> ScoredLists:
        """So many with a pair alone, the others with four."""
        candidates = [
            (query_id, list(dict.fromkeys([*relevant, *others]))[: 2 if number < short else 5], np.zeros(5))
            for number, (query_id, relevant) in enumerate(qrels.items())
        ]
        scores = lambda _, doc_ids: np.arange(len(doc_ids)) + 0.5  # noqa: E731
        return build_lists(candidates, scores, tiny_collection, "train", tmp_path / name)

    lists = lists_of("some", 3)
    artifact = train(tmp_path / "student", on=lists, **tas_balanced, steps=2)
    assert artifact.manifest["counts"]["lists"] == len(lists) - 3
    assert f"3 of {len(lists)} lists" in capsys.readouterr().err
    with pytest.raises(RankdistillError, match=r"balanced_pairs[\s\S]*depth"):
        train(tmp_path / "nothing", on=lists_of("none", len(lists)), **tas_balanced)


def test_a_loss_over_the_batch_without_a_batch_teacher_is_refused(
    train: Train, dual: dict[str, Any], tmp_path: Path
) -> None:
    without = {key: value for key, value in dual.items() if key != "batch_teacher"}
    with pytest.raises(UsageError, match="in_batch_margin_mse") as caught:
        train(tmp_path / "student", **without)
    assert "training.batch_teacher" in str(caught.value)
    assert not list(tmp_path.iterdir())  # before anything is paid for
    with pytest.raises(UsageError, match="no loss reads the batch teacher"):
        train(tmp_path / "student", **{**dual, "losses": [{"type": "margin_mse"}]})


def test_a_multi_vector_teachers_scores_of_a_batch_are_the_plain_librarys(
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
