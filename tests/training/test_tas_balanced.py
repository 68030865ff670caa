"""TAS-Balanced and dual supervision in a training: one stream whatever the processes, exact after a stop, a batch
teacher's vectors alike live or from disk, and clear words where something is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from trainings import logged

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.training.batches import BatchStream, usable_lists
from rankdistill.training.trainer import train_student

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists

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


@pytest.fixture
def train(lists: ScoredLists, tiny_collection: Collection, make_recipe: Callable[..., Recipe]) -> Train:
    def run(out: Path, *, on: ScoredLists = lists, **changes: Any) -> Artifact:
        return train_student(make_recipe(**changes), on, tiny_collection, None, out)

    return run


@pytest.fixture
def make_stream(
    lists: ScoredLists,
    tiny_collection: Collection,
    tiny_encoder: Path,
    tas_balanced: dict[str, Any],
    tmp_path: Path,
) -> Callable[..., BatchStream]:
    student = build("student", {"type": "dense", "model": str(tiny_encoder), "similarity": "dot"}).create("cpu").eval()

    def make(size: int = 2, seed: int = 1, length: int = 20) -> BatchStream:
        batches = build("sampler", {**tas_balanced["batches"], "size": size})
        documents = build("sampler", tas_balanced["lists"])
        members = usable_lists(lists, documents)
        batches.prepare(lists, members, tiny_collection, tmp_path)
        return BatchStream(lists, tiny_collection, student, batches, documents, seed, length, 4096, members)

    return make


# -- the stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_no_query_comes_twice_in_an_epoch_whatever_the_processes(
    make_stream: Callable[..., BatchStream], lists: ScoredLists, processes: int
) -> None:
    """Process r of W has the batches i·W + r, each from a stream of its own: together they are the one stream."""
    streams = [make_stream() for _ in range(processes)]
    by_epoch: dict[int, list[int]] = {}
    for number in range(18):
        epoch, members = streams[number % processes].locate(number)
        by_epoch.setdefault(epoch, []).extend(members.tolist())
    for used in by_epoch.values():
        assert len(set(used)) == len(used)
    assert all(len(by_epoch[epoch]) == len(lists) // 2 * 2 for epoch in sorted(by_epoch)[:-1])


# -- training ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("part", ["batches", "lists"])
def test_each_sampler_works_alone(train: Train, tas_balanced: dict[str, Any], part: str, tmp_path: Path) -> None:
    artifact = train(tmp_path / "student", **{part: tas_balanced[part]}, steps=2)
    assert np.isfinite(logged(artifact)).all() and len(logged(artifact)) == 2
    assert (tmp_path / "prepared" / "topics").exists() == (part == "batches")


def test_lists_with_fewer_than_two_pairs_are_dropped_and_counted(
    train: Train,
    tas_balanced: dict[str, Any],
    tiny_collection: Collection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rankdistill.scores.lists import build_lists

    qrels = tiny_collection.qrels("train")
    others = tiny_collection.doc_ids(range(6))
    candidates = []
    for number, (query_id, relevant) in enumerate(qrels.items()):
        doc_ids = [*relevant, *(doc_id for doc_id in others if doc_id not in relevant)]
        candidates.append((query_id, doc_ids[: 2 if number < 3 else 5], np.zeros(5)))
    lists = build_lists(candidates, lambda q, d: np.arange(len(d)) + 0.5, tiny_collection, "train", tmp_path / "lists")
    artifact = train(tmp_path / "student", on=lists, **tas_balanced, steps=2)
    assert artifact.manifest["counts"]["lists"] == len(lists) - 3
    assert f"3 of {len(lists)} lists" in capsys.readouterr().err
    none = build_lists(
        [(query_id, doc_ids[:2], zeros) for query_id, doc_ids, zeros in candidates],
        lambda q, d: np.arange(len(d)) + 0.5,
        tiny_collection,
        "train",
        tmp_path / "none",
    )
    with pytest.raises(RankdistillError, match="balanced_pairs") as caught:
        train(tmp_path / "nothing", on=none, **tas_balanced)
    assert "depth" in str(caught.value)


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
