"""The rows of a run's table, where the student has one vector a token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.evaluate import evaluate_systems
from rankdistill.evaluation.suites import load_suite
from rankdistill.indexes.mining import Source
from rankdistill.recipe import build, load_recipe
from rankdistill.runs import read_run
from rankdistill.stages import Workspace
from rankdistill.table_rows import open_bm25


@pytest.fixture(scope="module")
def values(tiny_recipe: Callable[..., dict[str, Any]], tiny_encoder: Path) -> dict[str, Any]:
    lengths = {"model": str(tiny_encoder), "query_length": 16, "document_length": 24, "precision": "fp32"}
    settings = {**lengths, "dropout": 0.0}
    return tiny_recipe(
        candidates={"sources": [{"type": "bm25"}]},
        student={"type": "multi_vector", "dimension": 16, "scale": 3.0, "storage": "fp32", **settings},
        baselines={"dense": {"student": {"type": "dense", **settings}}},
        training={"steps": 2, "checkpoints": 1},
        evaluation={"extrapolation": None},
    )


@pytest.fixture(scope="module")
def done(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("colbert")
    workspace = Workspace(folder / "run", load_recipe(values), folder / "store")
    workspace.run()
    return workspace


def test_a_multi_vector_student_is_searched_in_full_and_over_bm25(done: Workspace, tmp_path: Path) -> None:
    suite = load_suite("collection").model_copy(update={"rerank": True, "rerank_depth": 5})
    rows = done.systems(suite, done.collection, "test")
    expected = {"BM25", "student, untrained", "student, dense", "student, distilled", "teacher"}
    expected |= {f"{row}, re-ranking BM25@5" for row in expected - {"BM25", "teacher"}}
    expected.add(f"encoder: {done.recipe.student.settings()['model']}")  # what one could have used untrained
    assert set(rows) == expected  # `flat` is the student's own row
    collection, student = done.collection, done.student()
    texts = collection.query_texts(["q-iron"])
    scores = student.similarities(texts, collection.document_texts(np.arange(collection.document_count)))[0]
    ((_, doc_ids, found),) = rows["student, distilled"].run(collection, ["q-iron"], texts, 32)
    assert len(doc_ids) == 32
    np.testing.assert_allclose(found, scores[collection.doc_rows(doc_ids)], atol=1e-5)
    ((_, base, _),) = rows["BM25"].run(collection, ["q-iron"], texts, 32)
    ((_, reranked, _),) = rows["student, distilled, re-ranking BM25@5"].run(collection, ["q-iron"], texts, 32)
    top = base[:5]
    assert reranked[: len(top)] == sorted(top, key=lambda doc_id: -scores[collection.doc_rows([doc_id])[0]])
    assert reranked[len(top) :] == base[5:]


def test_its_row_has_size_speed_and_latency(done: Workspace) -> None:
    folder = done.path / "evaluation" / "collection"
    (results,) = folder.rglob("*/results.json")
    row = next(one for one in json.loads(results.read_text())["rows"] if one["system"] == "student, distilled")
    tokens = np.load(done.path / "vectors" / f"student-{done.collection.name}" / "tokens.npy")
    assert row["bytes"] == tokens.nbytes + 33 * 8 and row["queries_per_second"] > 0
    assert len(read_run(results.parent / row["run"])) > 0
    cost = json.loads((results.parent / "cost.json").read_text())["systems"]["student, distilled"]
    assert cost["encode_ms"] and cost["search_ms"] and cost["memory_bytes"] > row["bytes"]


def test_it_is_searched_with_text(done: Workspace) -> None:
    hits = done.engine().search(["which metal rusts in water"], 5)[0]
    assert len(hits.rows) == 5 and (np.diff(hits.scores) <= 0).all()


def test_the_search_page_shows_it(done: Workspace) -> None:
    from rankdistill.cli.serve import search_page

    page = search_page(done)
    assert [column.name for column in page.columns] == ["BM25", "student"]
    found = page.columns[1].search("which metal rusts", 3, {})[0]
    assert len(found.rows) == 3


def test_an_index_it_cannot_have_is_refused_before_anything_is_done(values: dict[str, Any], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run", load_recipe(values, ["indexes=[flat, ivf_pq]"]), tmp_path / "store")
    with pytest.raises(UsageError, match=r"ivf_pq holds one vector a document(?s:.*)\[flat\]"):
        workspace.run()
    assert not (workspace.path / "candidates").exists()


def test_an_index_file_of_it_is_refused(done: Workspace) -> None:
    for specification in ("flat", "ivf_pq"):
        with pytest.raises(RankdistillError, match=r"searched as they are|one a token"):
            done.index(specification)


def test_lucene_s_bm25_is_a_row_of_its_own_or_the_row(done: Workspace, tmp_path: Path) -> None:
    collection = done.collection
    suite = load_suite("collection").model_copy(update={"systems": ["bm25", "lucene_bm25"]})
    rows = done.systems(suite, collection, "test")
    assert set(rows) == {"BM25", "BM25, Lucene"} and all(row.bytes for row in rows.values())
    texts = collection.query_texts(["q-iron"])
    found = {name: next(iter(row.run(collection, ["q-iron"], texts, 5)))[1][0] for name, row in rows.items()}
    assert found == {"BM25": "d-iron", "BM25, Lucene": "d-iron"}
    mined = build("source", {"type": "lucene_bm25"}).open(collection, tmp_path)
    assert open_bm25(done, [Source(mined)], collection) is mined


@pytest.mark.parametrize("known", [0, 1])
def test_a_teacher_without_scores_has_no_row_and_one_of_some_queries_has_theirs(
    values: dict[str, Any], done: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], known: int
) -> None:
    """The first stage's figure under the teacher's name would be a figure of something else."""
    test = done.collection.query_ids("test")
    everything = done.collection.doc_ids(range(done.collection.document_count))
    asked = [*done.collection.query_ids("train"), *test[:known]]
    lines = [f"{query}\t{doc}\t{at}\n" for query in asked for at, doc in enumerate(everything)]
    (tmp_path / "scores.tsv").write_text("".join(lines))
    own = {"teacher": {"type": "recorded", "file": str(tmp_path / "scores.tsv")}, "baselines": {}}
    workspace = Workspace(tmp_path / "run", load_recipe({**values, **own}), tmp_path / "store")
    workspace.mine()
    suite = load_suite("collection").model_copy(update={"systems": ["bm25", "teacher"], "rerank_depth": 32})
    rows = workspace.systems(suite, workspace.collection, "test")
    if not known:
        assert set(rows) == {"BM25"}
        assert "no row for the teacher" in capsys.readouterr().err
        return
    name = f"teacher, on 1 of {len(test)} queries"
    assert set(rows) == {"BM25", name}
    found = evaluate_systems(rows, workspace.collection, "test", ["ndcg@10"], 32, tmp_path / "out")
    run = read_run(tmp_path / "out" / found[name].run)
    assert run.query_ids == test[:1] and found[name].notes["queries"] == 1
    assert "it has scores for" in found[name].note and not found[name].intervals
    assert name not in found.significance.systems and "BM25" in found.significance.systems
    assert name in repr(found)


def test_dense_sources_of_one_encoder_share_vectors_and_have_a_row_each(
    values: dict[str, Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    """The encoder has 64 positions: 128 tokens of a document (the default) are as 64; a query's length makes no vector
    of a document another, and the row of the untouched encoder, under another name, reads them too."""
    (tmp_path / "link").symlink_to(tiny_encoder)
    lengths: list[dict[str, Any]] = [{}, {"query_length": 32}, {"document_length": 999}, {"query_length": 4}]
    lengths += [{"document_length": 16}, {"index": "flat"}]
    dense = {"type": "dense", "model": str(tiny_encoder), "quota": 1}
    student = {"type": "static", "model": str(tmp_path / "link"), "precision": "auto"}
    recipe = load_recipe(
        {**values, "student": student, "candidates": {"depth": 6, "sources": [{**dense, **one} for one in lengths]}}
        | {"baselines": {"whole": {"student": {"type": "dense", "model": str(tmp_path / "link"), "query_length": 9}}}}
    )
    workspace = Workspace(tmp_path / "run", recipe, tmp_path / "store")
    suite = load_suite("collection").model_copy(update={"systems": ["sources", "encoder"]})
    rows = workspace.systems(suite, workspace.collection, "test")
    named = f"first stage: {tiny_encoder}, index None, query_length {{}}, document_length {{}}"
    expected = {named.format(32, 128), named.format(4, 128), named.format(32, 16), f"encoder: {tmp_path / 'link'}"}
    assert set(rows) == expected | {named.replace("None", "flat").format(32, 128)}
    assert len(list((workspace.path / "engines").glob("vectors-*/documents.npy"))) == 2
    whole = build("student", recipe.baseline("whole").student.settings()).create()
    assert workspace.vectors("whole", whole, workspace.collection).path.parent.name == "engines"
    assert not (workspace.path / "vectors").exists()
