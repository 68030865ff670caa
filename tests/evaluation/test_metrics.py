"""Metrics agree with pytrec_eval on everything, with ranx where nothing ties, and with known figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.metrics import evaluate_run, parse_metric
from rankdistill.runs import Run

TREC_EVAL = {
    "ndcg": "ndcg",
    "ndcg@10": "ndcg_cut_10",
    "ndcg@3": "ndcg_cut_3",
    "recall@10": "recall_10",
    "recall@2": "recall_2",
    "map": "map",
    "map@5": "map_cut_5",
    "precision@5": "P_5",
    "precision": "set_P",
    "recall": "set_recall",
    "hit_rate@3": "success_3",
    "mrr": "recip_rank",
    "r-precision": "Rprec",
    "bpref": "bpref",
}
MEASURES = {
    "ndcg", "ndcg_cut.10,3", "recall.10,2", "map", "map_cut.5", "P.5", "set_P", "set_recall", "success.3", "recip_rank",
    "Rprec", "bpref",
}  # fmt: skip

Judgments = dict[str, dict[str, int]]
Scores = dict[str, dict[str, float]]


def random_case(random: np.random.Generator, ties: bool = True) -> tuple[Scores, Judgments]:
    """A run and qrels with missing queries on both sides, graded and negative judgments, unjudged documents."""
    pool = [f"d{number}" for number in range(30)] + ["é", "Z", "\U0001f600", "￮", "d 1"]
    run: Scores = {}
    qrels: Judgments = {}
    for query in range(int(random.integers(1, 12))):
        judged = random.permutation(pool)[: random.integers(1, 12)]
        retrieved = random.permutation(pool)[: random.integers(1, 25)]
        levels = random.integers(-1, 4, len(judged)) if random.random() < 0.8 else np.zeros(len(judged), int)
        levels[0] = max(levels[0], 0)  # pytrec_eval writes beyond its arrays where all of a query's are negative
        scores = random.integers(-2, 3, len(retrieved)) if ties else random.permutation(len(retrieved)) - 3.5
        if random.random() < 0.85:
            qrels[f"q{query}"] = {str(doc): int(level) for doc, level in zip(judged, levels, strict=True)}
        if random.random() < 0.85:
            scale = random.choice([1.0, 1e-9, 1e9, 0.1])
            run[f"q{query}"] = {str(doc): float(s * scale) for doc, s in zip(retrieved, scores, strict=True)}
    return run, qrels


def comparable(run: Scores, qrels: Judgments) -> bool:
    return bool(qrels) and (not run or bool(run.keys() & qrels.keys()))


@pytest.mark.parametrize("level", [1, 2])
def test_every_value_is_trec_evals_on_random_runs(level: int) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    random, compared = np.random.default_rng(level), 0
    while compared < 500:
        run, qrels = random_case(random)
        if not comparable(run, qrels):
            continue
        compared += 1
        found = evaluate_run(Run.from_dict(run), qrels, list(TREC_EVAL), relevance_level=level)
        theirs = pytrec_eval.RelevanceEvaluator(qrels, MEASURES, relevance_level=level).evaluate(run)
        assert found.query_ids == list(qrels)
        for ours, name in TREC_EVAL.items():
            expected = [theirs.get(query_id, {}).get(name, 0.0) for query_id in qrels]
            np.testing.assert_allclose(found.per_query[ours], expected, atol=1e-12, err_msg=f"{ours} {run} {qrels}")
            assert found.means[ours] == pytest.approx(np.mean(expected))


BY_RANX = """
answer = []
for run, qrels, names in asked:
    answer.append([])
    for name in names:  # one by one: ranx keeps two cutoffs of a metric under one name
        found = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), [name], return_mean=False)
        found = found[name] if isinstance(found, dict) else found
        answer[-1].append(dict(zip(sorted(qrels), found.tolist())))  # ranx sorts queries
"""


def test_ranx_agrees_where_nothing_ties(ranx: Callable[[str, Any], Any]) -> None:
    random, asked = np.random.default_rng(5), []
    names = ["ndcg@10", "recall@10", "mrr@10", "map@10", "f1@5", "f1", "hits@7", "dcg@5", "dcg_burges",
             "ndcg_burges@10", "rbp.80", "recall@10-l2", "ndcg@10-l2", "map@10-l2", "f1@5-l2"]  # fmt: skip
    for _ in range(20):
        run, qrels = random_case(random, ties=False)
        run = {query: run[query] for query in run if query in qrels and max(qrels[query].values()) > 0}
        qrels = {query: {doc: max(level, 0) for doc, level in qrels[query].items()} for query in run}
        asked += [(run, qrels, names)] if run else []
    for (run, qrels, _), answer in zip(asked, ranx(BY_RANX, asked), strict=True):
        found = evaluate_run(Run.from_dict(run), qrels, names)
        for name, expected in zip(names, answer, strict=True):
            ours = dict(zip(found.query_ids, found.per_query[name].tolist(), strict=True))
            assert ours == pytest.approx(expected, rel=1e-7), name


def test_every_negative_judgment_is_as_minus_one() -> None:
    random = np.random.default_rng(8)
    for _ in range(50):
        run, qrels = random_case(random)
        if comparable(run, qrels):
            lower = {q: {doc: -9 if level < 0 else level for doc, level in docs.items()} for q, docs in qrels.items()}
            found = evaluate_run(Run.from_dict(run), lower, list(TREC_EVAL))
            assert found.means == evaluate_run(Run.from_dict(run), qrels, list(TREC_EVAL)).means


def test_notes_count_what_was_decided() -> None:
    run = Run.from_dict(
        {"q1": {"q1": 9.0, "a": 2.0, "b": 2.0, "c": 1.0}, "q2": {"a": 1.0}, "unjudged query": {"a": 1.0}}, "mine"
    )
    qrels = {"q1": {"a": 1, "b": 0}, "q2": {"a": 0}, "q3": {"a": 1}}
    found = evaluate_run(run, qrels, ["mrr@10"], drop_self_hits=True)
    assert found.per_query["mrr@10"].tolist() == [0.5, 0.0, 0.0]
    assert found.means["mrr@10"] == pytest.approx(0.5 / 3)
    assert found.notes == {
        "queries": 3, "missing_queries": 1, "queries_without_relevant": 1, "ignored_queries": 1, "judged@10": 0.75,
        "tied_share": 0.5, "self_hits_dropped": 1,
    }  # fmt: skip
    assert "1 self hits dropped" in repr(found) and "mine: mrr@10 0.1667" in repr(found)
    assert evaluate_run(run, qrels, ["mrr@10"]).per_query["mrr@10"][0] == pytest.approx(1 / 3)


def test_an_empty_run_counts_zero_and_a_foreign_one_is_refused() -> None:
    empty = evaluate_run(Run.from_dict({}), {"q": {"a": 1}}, ["ndcg@10", "map"])
    assert empty.means == {"ndcg@10": 0.0, "map": 0.0} and empty.notes["missing_queries"] == 1
    qrels: Judgments
    for qrels, words in (({"q1": {"a": 1}}, "none of the run's 1 queries"), ({}, "no judgments")):
        with pytest.raises(RankdistillError, match=words):
            evaluate_run(Run.from_dict({"1": {"a": 1.0}}), qrels)


@pytest.mark.parametrize(("name", "nearest"), [("ndgc@10", "ndcg@10"), ("recal@5", "recall@5"), ("rbp", "rbp.80")])
def test_an_unknown_metric_offers_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=nearest.replace(".", r"\.")):
        parse_metric(name)
    for wrong in ("ndcg@0", "ndcg@x", "", "ndcg@10@5"):
        with pytest.raises(UsageError):
            parse_metric(wrong)


def test_a_large_run_is_fast_and_small_and_loads_nothing_heavy() -> None:
    """2.8 million rows: a fifth of the time and memory allowed for 7,000 queries × 1,000 documents would be 8 s."""
    code = """
import json, sys, time
import numpy as np, pyarrow as pa
from rankdistill.runs import Run
from rankdistill.evaluation.metrics import evaluate_run
random, queries, depth = np.random.default_rng(0), 2800, 1000
rows = np.concatenate([random.choice(100_000, depth, replace=False) for _ in range(queries)])
ids = pa.array(np.char.add("d", np.arange(100_000).astype(str)).tolist(), pa.large_string()).take(pa.array(rows))
scores = -np.tile(np.arange(depth) // 3, queries).astype(np.float32)
qrels = {f"q{q}": {f"d{d}": 1 for d in rows[q * depth : q * depth + 30 : 10]} for q in range(queries)}
started = time.perf_counter()
run = Run([f"q{q}" for q in range(queries)], np.arange(queries + 1) * depth, ids, scores)
evaluate_run(run, qrels)
seconds = time.perf_counter() - started
# Not ru_maxrss: a child inherits its parent's, and the parent here is the whole test suite.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]) / 1024, sorted({"ranx", "numba", "torch"} & set(sys.modules))]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes, heavy = json.loads(out.stdout)
    assert seconds < 20 and megabytes < 1024 and heavy == []
