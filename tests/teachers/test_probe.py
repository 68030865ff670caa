from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankdistill.errors import UsageError
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.runs import Run
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.bi_encoder import BiEncoderTeacher
from rankdistill.teachers.probe import METRIC, probe
from rankdistill.teachers.recorded import RecordedTeacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def candidates_of(collection: Collection, first: bool) -> list[tuple[str, list[str], np.ndarray]]:
    """A first stage that has each positive first, or last."""
    qrels = collection.qrels("train")
    lists = []
    for query_id in collection.query_ids("train"):
        (positive,) = qrels[query_id]
        others = [doc_id for doc_id in collection.doc_ids(range(12)) if doc_id != positive]
        lists.append((query_id, [positive, *others] if first else [*others, positive], np.zeros(12)))
    return lists


def test_its_figures_are_those_of_an_evaluation(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    teacher = BiEncoderTeacher(str(tiny_encoder), precision="fp32", device="cpu")
    candidates, store = candidates_of(tiny_collection, first=True), ScoreStore(tmp_path)
    (found,) = probe({"encoder": teacher}, tiny_collection, candidates, 100, store)
    scores = store.folder(teacher.fingerprint(), tiny_collection.fingerprint, teacher.score_kind)
    run = {
        query_id: dict(zip(doc_ids, scores.scores_of(query_id, doc_ids).tolist(), strict=True))
        for query_id, doc_ids, _ in candidates
    }
    expected = evaluate_run(Run.from_dict(run), tiny_collection.qrels("train"), [METRIC])
    assert found.value == pytest.approx(expected.means[METRIC]) and found.first == 1.0
    assert found.queries == len(candidates) and found.pairs == sum(len(item[1]) for item in candidates)
    assert found.low is not None and found.high is not None and found.high < 0 and "no better" in found.verdict
    assert found.pairs_per_second is not None and "pairs/s" in str(found)
    # What was scored is kept: the whole job pays for the rest alone.
    (again,) = probe({"encoder": teacher}, tiny_collection, candidates, 100, store)
    assert again.pairs_per_second is None and again.value == found.value


def test_several_teachers_are_ranked_and_a_better_one_passes(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    lines = [
        f"{query_id}\t{doc_id}\t{float(doc_id in tiny_collection.qrels('train')[query_id])}\n"
        for query_id, doc_ids, _ in candidates_of(tiny_collection, first=False)
        for doc_id in doc_ids
    ]
    (tmp_path / "perfect.tsv").write_text("".join(lines), encoding="utf-8")
    perfect = RecordedTeacher(str(tmp_path / "perfect.tsv"))
    teachers = {"weak": BiEncoderTeacher(str(tiny_encoder), device="cpu"), "perfect": perfect}
    found = probe(teachers, tiny_collection, candidates_of(tiny_collection, False), 8, ScoreStore(tmp_path / "store"))
    assert found[0].teacher == "perfect" and found[1].teacher == "weak"
    assert found[0].value == 1.0 and found[0].first == 0.0 and found[0].queries == 8
    assert found[0].significant and not found[0].verdict and found[0].pairs_per_second is None


def test_dev_and_test_queries_are_never_asked(tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path) -> None:
    ids = tiny_collection.doc_ids(range(4))
    candidates = [(query_id, ids, np.zeros(4)) for query_id in tiny_collection.query_ids("dev")]
    with pytest.raises(UsageError, match="'train'"):
        probe({"a": BiEncoderTeacher(str(tiny_encoder))}, tiny_collection, candidates, 5, ScoreStore(tmp_path))
