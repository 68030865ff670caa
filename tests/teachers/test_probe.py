from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankdistill.collections.storage import id_hash
from rankdistill.errors import UsageError
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.recipe import build
from rankdistill.runs import Run
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers import probe as probing
from rankdistill.teachers.encoders import BiEncoderTeacher
from rankdistill.teachers.probe import METRIC, first_orders, probe, probe_long
from rankdistill.teachers.recorded import RecordedTeacher
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.bm25 import BM25


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
    candidates, qrels = candidates_of(tiny_collection, first=False), tiny_collection.qrels("train")
    lines = [f"{q}\t{doc_id}\t{float(doc_id in qrels[q])}\n" for q, doc_ids, _ in candidates for doc_id in doc_ids]
    (tmp_path / "perfect.tsv").write_text("".join(lines), encoding="utf-8")
    perfect = RecordedTeacher(str(tmp_path / "perfect.tsv"))
    teachers = {"weak": BiEncoderTeacher(str(tiny_encoder), device="cpu"), "perfect": perfect}
    best, weak = probe(teachers, tiny_collection, candidates, 8, ScoreStore(tmp_path / "store"))
    assert (best.teacher, best.value, best.first, best.queries, weak.teacher) == ("perfect", 1.0, 0.0, 8, "weak")
    assert best.significant and not best.verdict and best.pairs_per_second is None


def test_dev_and_test_queries_are_never_asked(tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path) -> None:
    ids = tiny_collection.doc_ids(range(4))
    candidates = [(query_id, ids, np.zeros(4)) for query_id in tiny_collection.query_ids("dev")]
    with pytest.raises(UsageError, match="'train'"):
        probe({"a": BiEncoderTeacher(str(tiny_encoder))}, tiny_collection, candidates, 5, ScoreStore(tmp_path))


# -- by itself, before a long scoring ---------------------------------------------------------------------------------


@pytest.fixture
def bm25(tiny_collection: Collection, tmp_path: Path) -> BM25:
    from rankdistill.indexes.bm25 import BM25

    BM25().build(tiny_collection, tmp_path / "bm25")
    return BM25.open(tmp_path / "bm25")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of nine queries is long enough."""
    monkeypatch.setattr(probing, "COUNT", 4)
    monkeypatch.setattr(probing, "SHARE", 0.5)
    monkeypatch.setattr(probing, "LONG", 0.0)


def test_a_first_stage_s_order_of_a_list_is_that_of_its_search(tiny_collection: Collection, bm25: BM25) -> None:
    """Not that of the list, which has the positive first."""
    for query_id, doc_ids, scores in candidates_of(tiny_collection, first=True):
        (order,) = first_orders(bm25, tiny_collection, [(query_id, doc_ids, scores)]).values()
        (hits,) = bm25.search(tiny_collection.query_texts([query_id]), tiny_collection.document_count)
        found = [doc_id for doc_id in tiny_collection.doc_ids(hits.rows) if doc_id in doc_ids]
        assert order[: len(found)] == found and sorted(order) == sorted(doc_ids)


@pytest.mark.usefixtures("small")
def test_a_long_scoring_is_probed_once_and_nothing_is_scored_twice(
    tiny_encoder: Path,
    tiny_collection: Collection,
    bm25: BM25,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, store = BiEncoderTeacher(str(tiny_encoder), precision="fp32", device="cpu"), ScoreStore(tmp_path / "store")
    candidates = candidates_of(tiny_collection, first=True)
    job = (tiny_collection, lambda: candidates, [one for one, _, _ in candidates], bm25)
    pairs = sum(len(doc_ids) for _, doc_ids, _ in candidates)
    with monkeypatch.context() as patch:
        patch.setattr(probing, "LONG", 1e9)
        assert probe_long({"it": teacher}, *job, ScoreStore(tmp_path / "other")) == []
        patch.setattr(probing, "COUNT", 5)  # more than half of the queries: too small a job
        assert probe_long({"it": teacher}, *job, store) == []
    assert "probe" not in capsys.readouterr().err
    (found,) = probe_long({"it": teacher}, *job, store)
    said = capsys.readouterr().err
    assert f"probe: it: ndcg@10 {found.value:.3f}, its first stage {found.first:.3f}" in said
    assert found.queries == 4 and found.pairs == pairs and found.first > found.value + 0.3
    assert "warning: it ranks no better than its first stage" in said or "may be chance" in said
    scores = score_candidates(teacher, tiny_collection, candidates, store)
    chosen = sorted(candidates, key=lambda item: id_hash(item[0]))[:4]
    assert scores.reused == sum(len(doc_ids) for _, doc_ids, _ in chosen)
    assert probe_long({"it": teacher}, *job, store) == []  # all is scored


@pytest.mark.usefixtures("small")
def test_a_language_model_s_answers_to_a_probe_are_those_of_the_job(
    tiny_causal_lm: Path, tiny_collection: Collection, bm25: BM25, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listwise: its scores belong to the whole job's lists, and its answers are found again."""
    monkeypatch.setattr(probing, "LONG", 1e9)  # a language model is probed however quick
    settings = {
        "type": "listwise",
        "backend": {"type": "transformers", "model": str(tiny_causal_lm), "precision": "fp32", "device": "cpu"},
        "decoding": "first",
        "signal": "logits",
        "window": 4,
        "step": 2,
        "passage_tokens": 4,
        "prices": {"prompt": 1e6, "answer": 1e6},
    }
    candidates = [(one, doc_ids[:4], scores) for one, doc_ids, scores in candidates_of(tiny_collection, first=True)]
    ids, store = [one for one, _, _ in candidates], ScoreStore(tmp_path / "store")
    teacher = build("teacher", settings)
    (found,) = probe_long({"it": teacher}, tiny_collection, lambda: candidates, ids, bm25, store)
    assert teacher.asking.budget.spent.calls == 4
    assert found.calls == pytest.approx(len(ids)) and found.money > 0 and "calls and" in str(found)
    score_candidates(teacher, tiny_collection, candidates, store)
    assert teacher.asking.budget.spent.calls == len(ids)
    assert probe_long({"it": build("teacher", settings)}, tiny_collection, lambda: candidates, ids, bm25, store) == []
