"""TAS-Balanced and dual supervision in a training: one stream whatever the processes, exact after a stop, a batch
teacher's vectors alike live or from disk, and clear words where something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.training.batches import BatchStream, usable_lists, whole
from rankdistill.training.trainer import LOG, LogFile, train_student

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


def losses(artifact: Artifact, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (artifact.path / LOG).read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def weights(artifact: Artifact) -> dict[str, np.ndarray]:
    return dict(load_file(artifact.path / "model" / "model.safetensors"))


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Two batches: queries, documents in order, and every number."""
    plain = ("index", "teacher_scores", "relevance", "mask", "rows")
    texts = [
        a["input_ids"].equal(b["input_ids"])
        for a, b in zip([left["queries"], *left["documents"]], [right["queries"], *right["documents"]], strict=True)
    ]
    return all(texts) and all(left[name].equal(right[name]) for name in plain)


# -- the stream -------------------------------------------------------------------------------------------------------


def test_the_stream_is_the_same_from_any_step_and_for_any_number_of_workers(
    make_stream: Callable[..., BatchStream],
) -> None:
    stream = make_stream()
    in_order = [stream[number] for number in range(len(stream))]
    # A resumed training makes its stream anew and begins in the middle.
    for start in (1, 7, 19):
        assert same(make_stream()[start], in_order[start])
    loader: Any = torch.utils.data.DataLoader(stream, batch_size=1, collate_fn=whole, num_workers=2)  # type: ignore[arg-type]
    assert all(map(same, loader, in_order))
    assert not same(make_stream(seed=2)[0], in_order[0])


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


def test_a_stopped_training_goes_on_exactly(
    train: Train, dual: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both samplers and the batch teacher: stopped at step 8, the weights are those of one not stopped."""
    through = train(tmp_path / "through" / "student", **dual)

    def on_step_end(self: LogFile, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LogFile, "on_step_end", on_step_end)
        train(tmp_path / "stopped" / "student", **dual)
    assert list((tmp_path / "stopped").glob(".student.*.partial/checkpoint-6"))
    stopped = train(tmp_path / "stopped" / "student", **dual)
    assert losses(stopped) == losses(through) and len(losses(through)) == 12
    left, right = weights(stopped), weights(through)
    assert left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


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
        assert losses(live, name) == pytest.approx(losses(kept, name), rel=tolerance)
    assert not (tmp_path / "live" / "prepared" / "batch-teacher").exists()
    assert (tmp_path / "precomputed" / "prepared" / "batch-teacher" / "manifest.json").is_file()
    # The sum is that of the parts, in the published proportion.
    parts = [losses(kept, f"loss/{name}") for name in ("margin_mse", "in_batch_margin_mse")]
    assert losses(kept) == pytest.approx((np.array(parts[0]) + 0.75 * np.array(parts[1])).tolist(), rel=1e-4)


def test_the_batch_teachers_own_student_has_no_in_batch_loss(
    train: Train, dual: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    """The student starts as the batch teacher itself, without dropout: the first step finds nothing to correct."""
    student = {"similarity": "cos", "dropout": 0.0}
    artifact = train(tmp_path / "student", student=student, **dual, steps=2)
    first, second = losses(artifact, "loss/in_batch_margin_mse")
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-4  # the pair's teacher has moved it by then


@pytest.mark.parametrize("part", ["batches", "lists"])
def test_each_sampler_works_alone(train: Train, tas_balanced: dict[str, Any], part: str, tmp_path: Path) -> None:
    artifact = train(tmp_path / "student", **{part: tas_balanced[part]}, steps=2)
    assert np.isfinite(losses(artifact)).all() and len(losses(artifact)) == 2
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
