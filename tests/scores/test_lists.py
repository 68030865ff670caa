from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.scores.ensemble import Ensemble
from rankdistill.scores.lists import ScoredLists, build_lists, second_look
from rankdistill.scores.store import ScoreStore

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def build(collection: Collection, out: Path, given: dict[str, dict[str, float]]) -> ScoredLists:
    def scores(query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.array([given[query_id].get(doc_id, np.nan) for doc_id in doc_ids], dtype=np.float32)

    candidates = [(q, ["d-iron", "d-gold", "d-oak", "nowhere", "d-gold"], np.zeros(5)) for q in given]
    return build_lists(candidates, scores, collection, "train", out)


def test_lists_join_candidates_scores_and_labels(tiny_collection: Collection, tmp_path: Path) -> None:
    given = {
        "q-iron": {"d-iron": 3.0, "d-gold": -1.0, "nowhere": 9.0},
        "q-gold": {"d-iron": 1.0, "d-oak": 0.5},  # its positive has no score: dropped, not guessed
        "q-copper": {"d-oak": 1.0},  # one document is no list
    }
    lists = build(tiny_collection, tmp_path / "lists", given)
    assert lists.query_ids == ["q-iron", "q-gold"] and len(lists) == 2
    query_id, rows, scores, relevance = lists[0]
    assert query_id == "q-iron"
    assert tiny_collection.doc_ids(rows) == ["d-iron", "d-gold"]
    np.testing.assert_array_equal(scores, np.float32([3.0, -1.0]))
    np.testing.assert_array_equal(relevance, [1, -1])
    assert tiny_collection.doc_ids(lists[1].doc_rows) == ["d-iron", "d-oak"]
    assert (lists[1].relevance == -1).all()
    counts = lists.artifact.counts
    assert (counts["lists"], counts["documents"], counts["short_lists"]) == (2, 4, 1)
    assert (counts["unknown_documents"], counts["repeated_documents"]) == (3, 3)
    assert counts["positives_without_score"] == 1 and counts["lists_without_positive"] == 1
    assert [column.dtype for column in (lists.doc_rows, lists.scores, lists.offsets)] == ["int32", "float32", "int64"]
    assert isinstance(lists.scores, np.memmap)
    assert [item.query_id for item in lists] == ["q-iron", "q-gold"]


def unsealed(folder: Path) -> None:
    """Take the digests out of the manifest, as of lists that another program wrote."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))


def test_damaged_and_foreign_lists_are_refused(tiny_collection: Collection, tmp_path: Path) -> None:
    given = {"q-iron": {"d-iron": 3.0, "d-gold": -1.0}}
    out = tmp_path / "lists"
    build(tiny_collection, out, given)
    assert len(ScoredLists.open(out, tiny_collection)) == 1
    scores = np.load(out / "scores.npy")
    unsealed(out)
    np.save(out / "scores.npy", scores * np.nan)
    with pytest.raises(RankdistillError, match="q-iron"):
        ScoredLists.open(out)
    np.save(out / "scores.npy", scores[:1])
    with pytest.raises(RankdistillError, match="differ in length"):
        ScoredLists.open(out)
    with pytest.raises(RankdistillError, match="no list"):
        build(tiny_collection, tmp_path / "none", {"q-iron": {}})
    assert not (tmp_path / "none").exists()


def test_lists_come_from_the_store(tiny_collection: Collection, tmp_path: Path) -> None:
    with ScoreStore(tmp_path / "store").folder("t", tiny_collection.fingerprint, "logit") as scores:
        scores.add("q-iron", ["d-iron", "d-oak"], [2.0, 1.0])
    candidates = [("q-iron", ["d-oak", "d-iron"], np.zeros(2))]
    lists = build_lists(candidates, scores.scores_of, tiny_collection, "train", tmp_path / "l", inputs={"teacher": "t"})
    np.testing.assert_array_equal(lists[0].scores, np.float32([1.0, 2.0]))
    other = build_lists(candidates, scores.scores_of, tiny_collection, "train", tmp_path / "m", inputs={"teacher": "u"})
    assert lists.fingerprint != other.fingerprint


class Member:
    """One teacher's scores by document, the same for every query."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.array([self.scores.get(doc_id, np.nan) for doc_id in doc_ids], np.float32)


def test_lists_of_an_ensemble_hold_its_disagreement(
    tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Member({"d-iron": 0.0, "d-gold": 1.0, "d-oak": 0.5, "nowhere": 0.9})
    second = Member({"d-iron": 1.0, "d-gold": 0.0, "d-oak": 0.5, "d-bee": 0.2})
    ensemble = Ensemble([first, second], "none", names=["one", "two"])
    asked = ["d-iron", "nowhere", "d-whale", "d-gold", "d-oak", "d-bee"]
    candidates = [("q-iron", asked, np.zeros(6)), ("q-gold", asked[3:], np.zeros(3))]
    lists = build_lists(candidates, ensemble, tiny_collection, "train", tmp_path / "lists")
    np.testing.assert_allclose(lists.disagreement_of(0), [0.5, 0.5, 0.0, 0.0])  # what was left out has none either
    np.testing.assert_allclose(lists.disagreement_of(-1), [0.5, 0.0, 0.0])
    assert isinstance(lists.disagreement, np.memmap) and lists.disagreement.dtype == np.float32
    with pytest.raises(IndexError):
        lists.disagreement_of(2)
    assert "teacher one lacks" in capsys.readouterr().err
    # One teacher's lists have no such column.
    assert build_lists(candidates, first, tiny_collection, "train", tmp_path / "one").disagreement_of(0) is None
    assert not (tmp_path / "one" / "disagreement.npy").exists()

    values = np.load(tmp_path / "lists" / "disagreement.npy")
    unsealed(tmp_path / "lists")
    np.save(tmp_path / "lists" / "disagreement.npy", values * np.nan)
    with pytest.raises(RankdistillError, match="a disagreement is nan"):
        ScoredLists.open(tmp_path / "lists")
    unsealed(tmp_path / "lists")
    np.save(tmp_path / "lists" / "disagreement.npy", values[:2])
    with pytest.raises(RankdistillError, match="differ in length"):
        ScoredLists.open(tmp_path / "lists")


def test_lists_without_labels_or_without_a_teacher(tiny_collection: Collection, tmp_path: Path) -> None:
    candidates = [("q-iron", ["d-iron", "d-gold"], np.zeros(2))]
    member = Member({"d-iron": 2.0, "d-gold": 1.0})
    unlabelled = build_lists(candidates, member, tiny_collection, None, tmp_path / "unlabelled")
    assert unlabelled[0].relevance.tolist() == [-1, -1] and unlabelled[0].scores.tolist() == [2.0, 1.0]
    labels = build_lists(candidates, None, tiny_collection, "train", tmp_path / "labels")
    assert labels[0].relevance.tolist() == [1, -1] and labels[0].scores.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("below", "extra", "relevance", "left_out"),
    [
        (None, False, [1, -1, -1, -1, 0, -1], []),
        (0.95, False, [1, -1, -1, -1, 0, -1], [1, 2]),  # 10, and 9.6 > 9.5; a judged document stays, whatever its score
        (0.8, False, [1, -1, -1, -1, 0, -1], [1, 2, 3]),
        (0.95, True, [1, 1, -1, -1, 0, -1], [2]),
        (None, True, [1, 1, -1, -1, 0, -1], []),
    ],
)
def test_what_the_teacher_likes_as_much_as_the_positive_is_no_negative(
    below: float | None, extra: bool, relevance: list[int], left_out: list[int]
) -> None:
    scores = np.array([10.0, 10.0, 9.6, 9.0, 12.0, np.nan], np.float32)
    found, doubtful = second_look(scores, np.array([1, -1, -1, -1, 0, -1], np.int32), below, extra)
    assert found.tolist() == relevance and np.flatnonzero(doubtful).tolist() == left_out


def test_a_negative_score_is_lowered_too_and_a_list_without_a_positive_stays() -> None:
    scores, labels = np.array([-2.0, -2.05, -2.2], np.float32), np.array([1, -1, -1], np.int32)
    assert second_look(scores, labels, 0.95)[1].tolist() == [False, True, False]
    assert not second_look(scores, np.full(3, -1, np.int32), 0.5, True)[1].any()


def test_lists_leave_doubtful_negatives_out_and_count_them(tiny_collection: Collection, tmp_path: Path) -> None:
    candidates = [("q-iron", ["d-iron", "d-gold", "d-oak"], np.zeros(3))]
    member = Member({"d-iron": 2.0, "d-gold": 1.95, "d-oak": 1.0})
    lists = build_lists(candidates, member, tiny_collection, "train", tmp_path / "lists", negatives_below=0.95)
    assert lists[0].scores.tolist() == [2.0, 1.0] and lists.artifact.counts["doubtful_negatives"] == 1
