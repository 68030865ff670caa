"""`search --fuse` and the suite `hybrid`, over a real run: fused by rank, as the members' own lists say."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from forked import ran

from rankdistill.evaluation.fusion import fuse
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.runs import read_run
from rankdistill.stages import Workspace

QUERY = "which metal rusts in water"


def by_rank(*members: list[str]) -> dict[str, float]:
    scores: dict[str, float] = defaultdict(float)
    for ids in members:
        for rank, doc_id in enumerate(ids, 1):
            scores[doc_id] += 1 / (60 + rank)
    return scores


def test_a_search_is_fused_with_bm25_and_with_another_run(finished: Path, tmp_path: Path) -> None:
    workspace = Workspace(finished)
    engines = (workspace.engine(), workspace.bm25())
    student, bm25 = (workspace.collection.doc_ids(one.search([QUERY], 100)[0].rows) for one in engines)
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    for options, members in (
        (["--fuse", "bm25"], [student, bm25]),
        (["--fuse", "bm25", "--fuse", other], [student, bm25, student]),
    ):
        ending = ran("search", finished, QUERY, "-k", "5", *options, "--json", folder=tmp_path)
        expected = by_rank(*members)
        found = json.loads(ending.out)
        assert [hit["score"] for hit in found] == sorted((round(s, 4) for s in expected.values()), reverse=True)[:5]
        assert all(hit["score"] == pytest.approx(expected[hit["doc_id"]], abs=1e-4) for hit in found)


def test_the_suite_hybrid_measures_every_fusion(finished: Path, tmp_path: Path) -> None:
    ending = ran("evaluate", finished, "--suite", "hybrid", "--out", tmp_path / "results", "--json", folder=tmp_path)
    (found,) = json.loads(ending.out)["sets"]
    rows = {row["system"]: row for row in found["rows"]}
    fused = {"BM25 + student", "BM25 + student (scores)", "first stage + student", "BM25 + first stage"}
    assert fused <= rows.keys() and "BM25 + first stage + student" in rows
    row = rows["BM25 + student"]
    assert row["note"] == "reciprocal rank fusion (k = 60) of BM25, student, distilled"
    assert row["bytes"] == rows["BM25"]["bytes"] + rows["student, distilled"]["bytes"]
    assert row["queries_per_second"] > 0 and row["intervals"]
    folder = tmp_path / "results" / found["name"]
    qrels = Workspace(finished).collection.qrels("test")
    for one in rows.values():
        again = evaluate_run(read_run(folder / one["run"]), qrels, found["metrics"])
        assert again.means == pytest.approx(one["means"])
    for name, options in {"BM25 + student": {}, "BM25 + student (scores)": {"method": "weighted_sum"}}.items():
        fused_runs = fuse([folder / rows[row]["run"] for row in ("BM25", "student, distilled")], **options)
        again = evaluate_run(fused_runs, qrels, found["metrics"])
        assert again.means == pytest.approx(rows[name]["means"], abs=1e-6)
    cost = json.loads((folder / "cost.json").read_text())["systems"]["BM25 + student"]
    parts = [cost[f"{step}_ms"]["p50"] for step in ("encode", "search", "fuse")]
    assert all(part > 0 for part in parts) and cost["total_ms"]["p50"] >= max(parts)


def test_a_suite_fuses_with_another_runs_student(finished: Path, tmp_path: Path) -> None:
    """The other run is a copy: fused with it, the student ranks as it does alone."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    suite = tmp_path / "mine.yaml"
    suite.write_text(
        "name: mine\nsets: [{name: own, collection: own}]\nmetrics: [ndcg@10]\nsystems: [student]\nlatency_queries: 0\n"
        f"fusion:\n  - {{name: twice, members: [student, {other}], weights: [0.5, 2]}}\n"
        "  - {name: lexical, members: [bm25, student]}\n"
    )
    ending = ran("evaluate", finished, "--suite", suite, "--out", tmp_path / "results", "--json", folder=tmp_path)
    assert "lexical is left out: this table has no row for bm25" in ending.err
    rows = {row["system"]: row for row in json.loads(ending.out)["sets"][0]["rows"]}
    assert rows.keys() == {"student, distilled", "twice"}
    assert rows["twice"]["means"] == rows["student, distilled"]["means"] and str(other) in rows["twice"]["note"]
    assert rows["twice"]["note"].endswith("weights 0.5, 2; the weights are the suite's, nothing was fitted here")
    assert not list((tmp_path / "results").rglob("cost.json"))  # latency_queries: 0
