"""Sparse students from the command line: index, search, evaluate; the inference-free query path without torch."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forked import ROOT, ran, run

from rankdistill.evaluation.suites import load_suite
from rankdistill.indexes.sparse import SparseEngine
from rankdistill.recipe import load_recipe
from rankdistill.runs import read_run
from rankdistill.stages import Workspace

QUERY = "which metal rusts in water"
HEAVY = ("torch", "transformers", "sentence_transformers")

# Runs the command line and says on the error stream which heavy modules were imported on the way.
PROGRAM = f"""
import sys
from rankdistill.cli.main import main
sys.argv = ["rankdistill", *sys.argv[1:]]
try:
    main()
except SystemExit as ending:
    code = ending.code
print("heavy:", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
raise SystemExit(code)
"""


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Callable[..., dict[str, Any]], tiny_encoder: Path) -> Callable[..., dict[str, Any]]:
    lengths = {"model": str(tiny_encoder), "query_length": 16, "document_length": 24, "precision": "fp32"}
    return lambda kind, *indexes: tiny_recipe(
        candidates={"sources": [{"type": "bm25"}]},
        student={"type": kind, **lengths},
        training={"steps": 2, "checkpoints": 1},
        indexes=list(indexes),
        evaluation={"extrapolation": None},
    )


@pytest.fixture(scope="module")
def run_of(
    recipe: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Workspace]:
    @functools.cache
    def made(kind: str) -> Workspace:
        folder = tmp_path_factory.mktemp(kind)
        workspace = Workspace(folder / "run", load_recipe(recipe(kind, "flat", "seismic", "ciff")), folder / "store")
        workspace.run()
        return workspace

    return made


@pytest.fixture(scope="module", params=["splade", "inference_free"])
def sparse_run(request: pytest.FixtureRequest, run_of: Callable[[str], Workspace]) -> Workspace:
    return run_of(request.param)


@pytest.fixture(scope="module")
def inference_free(run_of: Callable[[str], Workspace]) -> Workspace:
    return run_of("inference_free")


def plain(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_its_rows_are_measured(sparse_run: Workspace) -> None:
    (results,) = (sparse_run.path / "evaluation" / "collection").rglob("*/results.json")
    rows = {row["system"]: row for row in json.loads(results.read_text())["rows"]}
    # An export is files for other software: it has no row.
    encoder = f"encoder: {sparse_run.recipe.student.settings()['model']}"
    assert set(rows) == {"BM25", encoder, "student, untrained", "student, distilled", "student, seismic", "teacher"}
    seismic = sparse_run.index_file("seismic")
    assert rows["student, seismic"]["bytes"] == (seismic / "index.index.seismic").stat().st_size
    assert (sparse_run.index_file("ciff") / "manifest.json").is_file()
    postings = sparse_run.path / "vectors" / f"student-{sparse_run.collection.name}"
    assert rows["student, distilled"]["bytes"] == sum(
        np.load(postings / f"by_term.{name}.npy").nbytes for name in ("weights", "documents", "indptr")
    )
    assert len(read_run(results.parent / rows["student, distilled"]["run"])) > 0
    cost = json.loads((results.parent / "cost.json").read_text())["systems"]
    free = sparse_run.recipe.student.type == "inference_free"
    for name in ("student, distilled", "student, seismic"):
        assert cost[name]["encode_ms"] and cost[name]["search_ms"]
        assert (cost[name]["parameters"] == 0) == free
        assert ("no model runs at query time" in rows[name]["note"]) == free


def test_exact_search_is_the_students_own_product(sparse_run: Workspace) -> None:
    collection, student = sparse_run.collection, sparse_run.student()
    engine = sparse_run.engine()
    assert isinstance(engine, SparseEngine)
    scores = student.similarities([QUERY], collection.document_texts(range(collection.document_count)))[0]
    (hits,) = engine.search([QUERY], 20)
    np.testing.assert_allclose(hits.scores, scores[hits.rows], rtol=1e-4)
    assert hits.rows.tolist() == sorted(np.flatnonzero(scores > 0), key=lambda row: -scores[row])[:20]
    (approximate,) = sparse_run.engine(sparse_run.index_file("seismic")).search([QUERY], 5)
    np.testing.assert_allclose(approximate.scores, scores[approximate.rows], rtol=5e-3)


def test_it_re_ranks_and_serves(sparse_run: Workspace) -> None:
    from rankdistill.cli.serve import search_page

    suite = load_suite("collection").model_copy(update={"rerank": True, "rerank_depth": 5, "systems": ["student"]})
    rows = sparse_run.systems(suite, sparse_run.collection, "test")
    ((_, doc_ids, scores),) = rows["student, distilled, re-ranking BM25@5"].run(
        sparse_run.collection, ["q-iron"], ["metal that rusts"], 5
    )
    assert doc_ids and (np.diff(scores) <= 0).all()
    page = search_page(sparse_run)
    assert [column.name for column in page.columns] == ["BM25", "student", "student, seismic"]


def test_the_inference_free_query_path_imports_no_torch(inference_free: Workspace) -> None:
    expected = inference_free.engine().search([QUERY], 3)[0]
    ids = inference_free.collection.doc_ids(expected.rows)
    for more in ([], ["--index", inference_free.index_file("seismic")]):
        done = plain("search", inference_free.path, QUERY, "-k", 3, "--json", *more)
        assert done.returncode == 0, done.stderr
        assert [hit["doc_id"] for hit in json.loads(done.stdout)] == ids
        assert "heavy: []" in done.stderr


def test_without_its_vectors_the_documents_are_encoded_first(inference_free: Workspace, tmp_path: Path) -> None:
    """... by the student's encoder; the next search is without torch again."""
    folder = tmp_path / "run"
    shutil.copytree(inference_free.path, folder)
    shutil.rmtree(folder / "vectors")
    hits = Workspace(folder).engine().search([QUERY], 3)[0]
    assert hits.rows.tolist() == inference_free.engine().search([QUERY], 3)[0].rows.tolist()
    assert "heavy: []" in plain("search", folder, QUERY).stderr


def test_a_query_of_unknown_words_finds_nothing_and_says_so(inference_free: Workspace) -> None:
    done = plain("search", inference_free.path, "☃ ☃", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert "have no term with a weight" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "RUN", QUERY, "--memory-map"], "--memory-map is for FAISS indexes"),
        (["index", "RUN", "--spec", "seismic", "--sweep"], "--sweep is for FAISS indexes"),
        (["index", "RUN", "--spec", "seismic", "--target-recall", "0.9"], "--target-recall is for FAISS indexes"),
        (["index", "RUN"], "there is no file to make"),
        (["index", "RUN", "--spec", "hnsw"], "hnsw is an index of dense vectors"),
        (["quantize", "RUN"], "distill_pq is an index of dense vectors"),
    ],
)
def test_what_is_for_faiss_alone_is_refused(
    inference_free: Workspace, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [str(inference_free.path) if one == "RUN" else one for one in arguments]
    ending = run(*given, folder=tmp_path)
    assert ending.code == 2 and message in ending.err


def test_an_index_is_made_elsewhere_and_of_another_collection(inference_free: Workspace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "qrels").mkdir(parents=True)
    (other / "corpus.jsonl").write_text("".join(f'{{"_id": "o{row}", "text": "metal {row}"}}\n' for row in range(4)))
    (other / "queries.jsonl").write_text('{"_id": "q", "text": "metal"}\n')
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\to1\t1\n")
    out = tmp_path / "made"
    ending = ran(
        "index", inference_free.path, "--spec", "seismic_fast", "--collection", f"beir:{other}", "--out", out, "--json",
        folder=tmp_path,
    )  # fmt: skip
    (manifest,) = json.loads(ending.out)
    assert manifest["settings"]["name"] == "seismic_fast" and manifest["counts"]["documents"] == 4
    ending = run("search", inference_free.path, QUERY, "--index", out, folder=tmp_path)
    assert ending.code == 1 and "another collection" in ending.err


@pytest.mark.parametrize(
    ("kind", "index", "message"),
    [("splade", "hnsw", "an index of dense vectors"), ("dense", "seismic", "an index of term weights")],
)
def test_indexes_that_do_not_fit_are_refused_before_training(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, kind: str, index: str, message: str
) -> None:
    (file := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(kind, index)))
    ending = run("run", file, "--out", tmp_path / "run", folder=tmp_path)
    assert ending.code == 2 and message in ending.err
    assert not (tmp_path / "run" / "student").exists()
