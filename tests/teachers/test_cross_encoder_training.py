from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from test_out_of_memory import memory_of

from rankdistill.errors import RankdistillError
from rankdistill.teachers.base import Dev
from rankdistill.teachers.cross_encoder import CrossEncoderTeacher
from rankdistill.teachers.cross_encoder_training import (
    CrossEncoderTraining,
    Listwise,
    PairTrainer,
    TrainingLists,
    dev_pool,
)
from rankdistill.training.dev import RerankPool

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def candidates_of(collection: Collection, split: str = "train") -> list[tuple[str, list[str], np.ndarray]]:
    everything = collection.doc_ids(range(collection.document_count))
    return [(query_id, everything, np.zeros(len(everything))) for query_id in collection.query_ids(split)]


def dev_of(collection: Collection) -> Dev:
    return Dev([(query_id, doc_ids) for query_id, doc_ids, _ in candidates_of(collection, "dev")], "dev")


def teacher_of(encoder: Path, **settings: Any) -> CrossEncoderTeacher:
    given = {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "checkpoints": 3, "dropout": 0.2, **settings}
    return CrossEncoderTeacher(str(encoder), precision="fp32", device="cpu", train=given)  # type: ignore[arg-type]


def lists_of(collection: Collection, grades: dict[str, int], **settings: Any) -> tuple[TrainingLists, dict[str, str]]:
    """One query whose documents have these grades, its candidates in this order; and the documents' names."""
    query_id = collection.query_ids("train")[0]
    known = dict(zip(grades, collection.doc_ids(range(len(grades))), strict=True))
    judged: Any = _Judged(collection, {query_id: {known[name]: grade for name, grade in grades.items()}})
    candidates = [(query_id, list(known.values()), np.zeros(0))]
    lists = TrainingLists(judged, candidates, "train", CrossEncoderTraining(**settings), 7)
    return lists, {doc_id: name for name, doc_id in known.items()}


class _Judged:
    """A collection with other labels."""

    def __init__(self, collection: Collection, qrels: dict[str, dict[str, int]]) -> None:
        self._collection, self._qrels = collection, qrels

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        return self._qrels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)


def test_each_positive_has_a_list_and_competes_with_lower_grades_only(tiny_collection: Collection) -> None:
    grades = {"best": 2, "good": 1, "bad": 0, "worse": 0, "other": 2}
    lists, names = lists_of(tiny_collection, grades, positives=9, negatives=9)
    drawn = {names[positive]: [names[d] for d in lists.draw(n)] for n, (_, positive) in enumerate(lists.lists)}
    lower = ["good", "bad", "worse"]
    assert drawn == {"best": lower, "good": ["bad", "worse"], "other": lower}
    assert len(lists_of(tiny_collection, grades, positives=2)[0]) == 2


def test_positives_are_those_that_mining_has_put_into_the_list(tiny_collection: Collection) -> None:
    query_id, ids = tiny_collection.query_ids("train")[0], tiny_collection.doc_ids(range(5))
    judged: Any = _Judged(tiny_collection, {query_id: dict.fromkeys(ids[:3], 1)})
    settings = CrossEncoderTraining(positives=9)
    for mined, expected in ((ids[1:], ids[1:3]), (ids[3:], ids[:3])):  # all, where none was
        lists = TrainingLists(judged, [(query_id, list(mined), np.zeros(0))], "train", settings, 7)
        assert sorted(positive for _, positive in lists.lists) == sorted(expected)


def test_negatives_come_from_every_depth_and_stay_below_the_positive(tiny_collection: Collection) -> None:
    grades = {"best": 1, **{f"n{number}": 0 for number in range(12)}}
    lists, names = lists_of(tiny_collection, grades, negatives=3)
    depths = [int(names[doc_id][1:]) for doc_id in lists.draw(0)]
    assert [depth // 4 for depth in depths] == [0, 1, 2]
    # By the model's scores, n11 leads; what is above .95 of the positive's 10 is left out.
    scores = {doc_id: 10.0 if name == "best" else float(name[1:]) for doc_id, name in names.items()}
    depths = [int(names[doc_id][1:]) for doc_id in lists.draw(0, scores)]
    assert depths[0] in (6, 7, 8, 9) and max(depths) <= 9 and depths == sorted(depths, reverse=True)
    # With negative scores too the bound is below the positive's.
    scores = {doc_id: score - 20 for doc_id, score in scores.items()}  # the positive has -10, the bound is -10.5
    assert max(int(names[doc_id][1:]) for doc_id in lists.draw(0, scores)) <= 9


def test_the_bounds_of_the_losses() -> None:
    """ListNet over labels at temperature 1 can hardly fall, whatever the model does: it has to be said."""
    grades = torch.tensor([[1, 0, 0, 0]] * 2)
    names: tuple[Any, ...] = ("lce", "listnet", "bce", "lambda")
    model: Any = torch.nn.Identity()
    learner = {name: Listwise(model, CrossEncoderTraining(loss=name, target_temperature=1.0)) for name in names}
    assert learner["lce"].bounds(grades) == pytest.approx((math.log(4), 0.0), abs=1e-6)
    guess, floor = learner["listnet"].bounds(grades)
    assert (guess, floor) == pytest.approx((1.3863, 1.2683), abs=1e-4)
    assert learner["bce"].bounds(grades)[1] is None and learner["lambda"].bounds(grades)[1] is None
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 5.0]])
    torch.testing.assert_close(
        learner["lce"].loss(scores, grades), torch.nn.functional.cross_entropy(scores, torch.tensor([0, 0]))
    )
    ragged = torch.tensor([[1, 0, 0, 0], [1, 0, -1, -1]])
    torch.testing.assert_close(
        learner["lce"].loss(scores, ragged),
        (torch.logsumexp(scores[0], 0) - 2.0 + torch.logsumexp(scores[1, :2], 0)) / 2,
    )


@pytest.mark.parametrize("refresh", [False, True])
def test_a_killed_training_goes_on_exactly(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: bool
) -> None:
    candidates, dev = candidates_of(tiny_collection), dev_of(tiny_collection)
    settings = {"refresh": refresh, "steps": 9}
    whole = teacher_of(tiny_encoder, **settings)
    report = whole.train(tiny_collection, candidates, tmp_path / "whole", seed=3, dev=dev)
    steps = 0
    original = PairTrainer.compute_loss

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PairTrainer, "compute_loss", killed)
    again = teacher_of(tiny_encoder, **settings)
    with pytest.raises(KeyboardInterrupt):
        again.train(tiny_collection, candidates, tmp_path / "again", seed=3, dev=dev)
    resumed = again.train(tiny_collection, candidates, tmp_path / "again", seed=3, dev=dev)
    assert steps == 9 + 3  # from step 6 on
    assert resumed["dev"] == report["dev"] and again.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("loss", ["lce", "bce"])
def test_a_batch_that_memory_does_not_hold_is_trained_in_smaller_parts(
    loss: str, tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the same weights, though lists are cut and a loss over the batch's pairs is no mean over parts."""
    candidates = candidates_of(tiny_collection)
    settings: dict[str, Any] = {"steps": 3, "dropout": 0.0, "loss": loss, "negatives": 3}
    plain, small = (teacher_of(tiny_encoder, **settings) for _ in range(2))
    expected = plain.train(tiny_collection, candidates, tmp_path / "plain", seed=3)
    with memory_of(100) as tried:
        found = small.train(tiny_collection, candidates, tmp_path / "small", seed=3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert max(tried) > 200 > 100 >= max(tried[-3:]) and capsys.readouterr().err.count("does not hold a batch") == 1
    learner = Listwise(plain.load().model, CrossEncoderTraining(**settings))
    batch = learner.collate([("iron", ["gold", "oak and bee", "sun"], [1, 0, 0]), ("bat", ["mars"], [1])])
    gradients = []
    for learner.cache.on in (False, True):
        learner.cache.tokens = 32
        learner.zero_grad()
        learner(**batch).backward()
        gradients.append([one.grad for one in learner.parameters() if one.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
    with memory_of(3), pytest.raises(RankdistillError, match=r"(?s)the memory does not hold a batch.*max_length"):
        teacher_of(tiny_encoder, **settings).train(tiny_collection, candidates, tmp_path / "none", seed=3)


def test_the_checkpoint_that_ranks_dev_best_is_kept(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a dev metric that falls after the second look, the teacher is what it was at that look."""
    candidates, dev = candidates_of(tiny_collection), dev_of(tiny_collection)
    real, scores = RerankPool.measure, []

    def falling(self: Any, found: np.ndarray) -> float:
        if found.dtype != np.float32:  # the candidates' own order
            return real(self, found)
        scores.append(found)
        return [0.2, 0.8, 0.5, 0.4][len(scores) - 1]

    monkeypatch.setattr(RerankPool, "measure", falling)
    teacher = teacher_of(tiny_encoder, patience=2)
    report = teacher.train(tiny_collection, candidates, tmp_path / "ce", seed=3, dev=dev)
    assert report["dev"] == {0: 0.2, 2: 0.8, 4: 0.5, 6: 0.4} and report["best_step"] == 2
    pool = dev_pool(tiny_collection, dev, 100, 20)
    found = teacher.score_pairs(pool.queries, pool.documents, pool.pairs)
    np.testing.assert_allclose(found, scores[1], rtol=2e-5)
    assert np.abs(scores[1] - scores[3]).max() > 1e-3
    scores.clear()
    stopped = teacher_of(tiny_encoder, patience=1).train(tiny_collection, candidates, tmp_path / "stop", 3, dev=dev)
    assert stopped["steps"] == 4


def test_training_that_gains_nothing_keeps_the_start_and_says_so(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teacher_of(tiny_encoder, steps=1, learning_rate=1e-9, head_learning_rate=1e-9, gate_learning_rate=1e-9)
    report = teacher.train(
        tiny_collection, candidates_of(tiny_collection), tmp_path / "ce", seed=3, dev=dev_of(tiny_collection)
    )
    assert report["best_step"] == 0
    said = capsys.readouterr()
    assert "no better" in said.err and "guessing gives 1.386" in said.err + said.out
    # What is kept ranks as the encoder does.
    from rankdistill.students.pair_encoder import pair_encoder

    pool = dev_pool(tiny_collection, dev_of(tiny_collection), 1, 5)
    found = teacher.score_pairs(pool.queries, pool.documents, pool.pairs)
    expected = pair_encoder(tiny_encoder, None, "cpu").predict([(pool.queries[0], text) for text in pool.documents])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_encoder_that_cannot_be_had_starts_from_a_head(
    tiny_encoder: Path,
    tiny_collection: Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rankdistill.errors import UsageError
    from rankdistill.students import cross_encoder

    def refused(*_: Any) -> Any:
        raise UsageError("this encoder's attention is not open to change")

    monkeypatch.setattr(cross_encoder, "pair_encoder", refused)
    teacher = teacher_of(tiny_encoder, steps=1)
    teacher.train(tiny_collection, candidates_of(tiny_collection), tmp_path / "ce", seed=3)
    assert "starts from a random head" in capsys.readouterr().err
    body: Any = teacher.load().model.model
    assert body.config.architectures == ["BertForSequenceClassification"]
