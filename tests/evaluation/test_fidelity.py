"""Fidelity: each figure against an independent implementation or a value worked out by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, pearsonr

from rankdistill.errors import RankdistillError
from rankdistill.evaluation.fidelity import (
    FILE,
    TABLE,
    Fidelity,
    kendall_tau_b,
    margin_correlation,
    measure_fidelity,
    rank_biased_overlap,
)
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.runs import Run, write_trec

# -- Kendall's tau ----------------------------------------------------------------------------------------------------


def test_tau_is_scipys_on_ragged_groups_with_ties() -> None:
    random = np.random.default_rng(5)
    lengths = np.concatenate([random.integers(2, 60, 300), [2, 400, 129]])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    # Few distinct values: many ties on both sides, and some lists tied throughout.
    left = random.integers(0, random.integers(1, 40, len(lengths)).repeat(lengths)).astype(float)
    right = np.round(left * random.choice([-1, 0, 1], len(left)) + random.normal(0, 5, len(left)))
    right[random.random(len(right)) < 0.1] = -np.inf
    finite = np.where(np.isinf(right), -1e9, right)
    expected = np.array([kendalltau(left[a:b], finite[a:b]).statistic for a, b in pairwise(offsets)])
    assert np.isnan(expected).sum() > 1
    np.testing.assert_allclose(kendall_tau_b(left, right, offsets), expected, atol=1e-12)
    short = kendall_tau_b(np.arange(3.0), np.arange(3.0), np.array([0, 0, 1, 3]))
    assert np.isnan(short[:2]).all() and short[2] == 1


# -- rank-biased overlap ----------------------------------------------------------------------------------------------


def slow_rbo(long: Sequence[str], short: Sequence[str], p: float) -> float:
    """Equation 32 of Webber et al. (2010), term by term, with sets."""
    longer, shorter = len(long), len(short)

    def overlap(depth: int) -> int:
        return len(set(long[:depth]) & set(short[:depth]))

    first = sum(overlap(d) / d * p**d for d in range(1, longer + 1))
    at_short, at_long = overlap(shorter), overlap(longer)
    second = sum(at_short * (d - shorter) / (shorter * d) * p**d for d in range(shorter + 1, longer + 1))
    return (1 - p) / p * (first + second) + ((at_long - at_short) / longer + at_short / shorter) * p**longer


def rbo(long: Sequence[str], short: Sequence[str], p: float) -> float:
    ranks = {document: rank for rank, document in enumerate(short, 1)}
    student = np.array([ranks.get(document, 0) for document in long])
    lengths = np.array([len(long)]), np.array([len(short)])
    return float(rank_biased_overlap(np.arange(1, len(long) + 1), student, np.zeros(len(long), int), *lengths, p)[0])


@given(
    st.permutations("abcdefghijklmno"),
    st.permutations("abcdefghijklmnopqrs"),
    st.integers(1, 15),
    st.integers(1, 15),
    st.floats(0.05, 0.99),
)
def test_rbo_is_the_definition(one: list[str], other: list[str], a: int, b: int, p: float) -> None:
    long, short = (one[:a], other[:b]) if a >= b else (other[:b], one[:a])
    value = rbo(long, short, p)
    assert value == pytest.approx(slow_rbo(long, short, p), abs=1e-12)
    assert -1e-12 <= value <= 1 + 1e-12


def test_rbo_of_many_queries_is_that_of_each() -> None:
    random = np.random.default_rng(3)
    pairs = []
    for _ in range(50):
        long = [str(d) for d in random.permutation(60)[: random.integers(1, 40)]]
        pairs.append((long, [str(d) for d in random.permutation(60)[: random.integers(1, len(long) + 1)]]))
    lengths = [np.array([len(pair[side]) for pair in pairs]) for side in (0, 1)]
    teacher = np.concatenate([np.arange(1, length + 1) for length in lengths[0]])
    student = np.array([short.index(d) + 1 if d in short else 0 for long, short in pairs for d in long])
    found = rank_biased_overlap(teacher, student, np.repeat(np.arange(50), lengths[0]), *lengths)
    np.testing.assert_allclose(found, [slow_rbo(long, short, 0.9) for long, short in pairs], atol=1e-12)


# -- margins ----------------------------------------------------------------------------------------------------------


def test_margin_correlation_is_that_of_all_pairs_formed_one_by_one() -> None:
    random = np.random.default_rng(8)
    lengths = np.array([5, 2, 12, 3, 1, 4])
    query = np.repeat(np.arange(len(lengths)), lengths)
    teacher = random.normal(0, 3, len(query)) + 100 * query  # a query's own level must not count
    student = 0.3 * teacher + random.normal(0, 1, len(query)) - 50 * query
    teacher[query == 5] = 0.1  # all equal: no margins
    values, pooled = margin_correlation(student, teacher, query, len(lengths))
    everything: list[tuple[float, float]] = []
    for number in range(len(lengths)):
        rows = np.flatnonzero(query == number)
        pairs = [(student[i] - student[j], teacher[i] - teacher[j]) for i in rows for j in rows if i != j]
        if lengths[number] < 3:
            assert np.isnan(values[number])
            continue
        everything += pairs
        if number == 5:
            assert np.isnan(values[number])
        else:
            assert values[number] == pytest.approx(pearsonr(*zip(*pairs, strict=True)).statistic, abs=1e-9)
    assert pooled == pytest.approx(pearsonr(*zip(*everything, strict=True)).statistic, abs=1e-9)


# -- runs -------------------------------------------------------------------------------------------------------------

TEACHER = Run.from_dict(
    {
        "q1": {"a": 9.0, "b": 7.0, "c": 5.0, "d": 3.0, "z1": 2.0, "z2": 1.0},  # z: below what it scored
        "q2": {"a": 4.0, "b": 3.5, "c": 1.0},
        "q3": {"a": 1.0, "b": 0.5},  # it scored nothing of q3
        "unjudged": {"a": 1.0},
    },
    "teacher",
)
STUDENT = Run.from_dict(
    {
        "q2": {"c": 3.0, "a": 2.0, "b": 1.0},
        "q1": {"b": 0.9, "z1": 0.8, "a": 0.7, "c": 0.1},
        "q3": {"b": 3.0},
    },
    "student",
)
QRELS = {"q1": {"a": 1, "d": 2, "c": 0, "z1": 1}, "q2": {"c": 1, "b": 1}, "q3": {"b": 1}, "q4": {"a": 1}}
LOWEST = {"q1": 3.0, "q2": 1.0}


@pytest.fixture
def measured() -> Fidelity:
    return measure_fidelity(TEACHER, {"student": STUDENT}, QRELS, metric="mrr@2", lowest=LOWEST)


def test_figures_of_a_case_worked_out_by_hand(measured: Fidelity) -> None:
    rows = {row["query_id"]: row for row in measured.table.to_pylist()}
    assert list(rows) == ["q1", "q2", "q3", "q4"] and measured.cutoff == 2 and measured.depth == 4
    # q1: the teacher's list is a b c d; the student has b a c, and d is below all.
    one = rows["q1"]
    assert one["kendall_tau"] == pytest.approx((5 - 1) / 6)
    assert one["overlap@2"] == 0.5  # b; z1 is the student's second
    assert one["margin_correlation"] == pytest.approx(pearsonr([0.7, 0.9, 0.1], [9, 7, 5]).statistic, abs=1e-6)
    assert one["rbo"] == pytest.approx(slow_rbo(["a", "b", "c", "d"], ["b", "z1", "a", "c"], 0.9))
    assert (one["teacher_metric"], one["student_metric"], one["difference"]) == (1.0, 0.5, -0.5)
    # Only the teacher has a among its first two, only the student z1, which the teacher has below its list.
    assert (one["lost"], one["lost_teacher_ranks"], one["lost_student_ranks"]) == (["a"], [1], [3])
    assert (one["won"], one["won_teacher_ranks"], one["won_student_ranks"]) == (["z1"], [5], [2])
    two = rows["q2"]
    assert two["kendall_tau"] == pytest.approx(-1 / 3) and two["overlap@2"] == 0.5
    assert (two["lost"], two["lost_student_ranks"], two["won"]) == (["b"], [3], ["c"])
    # q3 and q4: the teacher has no list; effectiveness is there all the same.
    for name in ("q3", "q4"):
        assert rows[name]["kendall_tau"] is None and rows[name]["rbo"] is None and rows[name]["overlap@2"] is None
    assert rows["q3"]["won"] == [] and rows["q3"]["difference"] == 0.5
    assert measured.notes["queries_without_teacher_list"] == 2
    summary = measured.systems["student"]
    assert summary["queries"] == 2 and summary["not_retrieved"] == pytest.approx(1 / 7)
    assert summary["kendall_tau"] == pytest.approx((4 / 6 - 1 / 3) / 2)
    assert summary["unscored@2"] == pytest.approx(0.25)  # z1, one of four
    assert (summary["lost"], summary["won"]) == (2, 2)
    assert (summary["teacher_better"], summary["student_better"], summary["equal"]) == (1, 2, 1)


def test_without_lowest_scores_the_whole_run_is_the_teachers() -> None:
    found = measure_fidelity(TEACHER, {"teacher again": TEACHER}, QRELS)
    assert found.depth == 6 and found.notes["queries_without_teacher_list"] == 1
    same = found.systems["teacher again"]
    assert (same["not_retrieved"], same["kendall_tau"], same["rbo"]) == pytest.approx((0.0, 1.0, 1.0))
    with pytest.raises(RankdistillError, match="no list"):
        measure_fidelity(Run.from_dict({"unjudged": {"a": 1.0}}), {"student": STUDENT}, QRELS)


def test_a_student_that_returns_nothing_for_a_query_agrees_with_nothing() -> None:
    """0, not left out."""
    other = Run.from_dict({"q1": STUDENT.to_dict()["q1"], "q2": {"nobody": 1.0}})
    found = measure_fidelity(TEACHER, {"student": other}, QRELS, lowest=LOWEST)
    row = found.table.to_pylist()[1]
    assert (row["kendall_tau"], row["overlap@10"], row["margin_correlation"], row["rbo"]) == (0.0, 0.0, None, 0.0)
    assert found.systems["student"]["all_tied"] == 1 and found.systems["student"]["without_margins"] == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_agreement_does_not_depend_on_scale_and_effectiveness_is_evaluate_runs(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = [f"d{n}" for n in range(30)]

    def ranking() -> dict[str, dict[str, float]]:
        return {
            f"q{q}": dict(zip(random.permutation(ids)[:20].tolist(), scores[:20].tolist(), strict=True))
            for q, scores in enumerate(random.permuted(np.tile(np.arange(64) / 64, (6, 1)), axis=1))  # scaled exactly
        }

    teacher, student = ranking(), ranking()
    qrels = {f"q{q}": {ids[n]: int(random.integers(0, 3)) for n in range(0, 30, 4)} for q in range(6)}
    scaled = {q: {d: 4 * s + 16 for d, s in documents.items()} for q, documents in student.items()}
    found = measure_fidelity(Run.from_dict(teacher), {"a": Run.from_dict(student), "b": Run.from_dict(scaled)}, qrels)
    a, b = found.systems["a"], found.systems["b"]
    assert {k: v for k, v in a.items() if v is not None} == pytest.approx(
        {k: v for k, v in b.items() if v is not None}, abs=1e-4
    )
    own = found.table.filter(np.array(found.table["system"].to_pylist()) == "a")["student_metric"].to_numpy()
    expected = evaluate_run(Run.from_dict(student), qrels, ["ndcg@10"]).per_query["ndcg@10"]
    np.testing.assert_allclose(own, expected)
    # tau by scipy over the teacher's list, what is missing tied below.
    for number in range(6):
        theirs = teacher[f"q{number}"]
        scores = [student[f"q{number}"].get(doc_id, -1.0) for doc_id in theirs]
        expected_tau = kendalltau(scores, list(theirs.values())).statistic
        assert found.table["kendall_tau"][number].as_py() == pytest.approx(expected_tau, abs=1e-6)


def test_files(measured: Fidelity, tmp_path: Path) -> None:
    measured.write(tmp_path)
    values = json.loads((tmp_path / FILE).read_text())
    assert values["teacher"] == "teacher" and values["systems"]["student"]["queries"] == 2
    table = pq.read_table(tmp_path / TABLE)
    names = "system query_id kendall_tau overlap@2 rbo margin_correlation student_metric teacher_metric difference lost"
    assert table.column_names[:10] == names.split() and table["lost"].to_pylist() == [["a"], ["b"], [], []]
    write_trec(STUDENT, tmp_path / "student.trec")
    from_file = measure_fidelity(TEACHER, {"student": tmp_path / "student.trec"}, QRELS, metric="mrr@2", lowest=LOWEST)
    assert from_file.systems == measured.systems


def test_seven_thousand_queries_of_a_thousand_documents_take_seconds() -> None:
    """Here with a twentieth of the queries: the time grows with their number."""
    random = np.random.default_rng(0)
    queries, depth = 350, 1000
    names, ids = [f"q{n}" for n in range(queries)], np.array([f"document-{n}" for n in range(3000)])
    offsets, scores = np.arange(queries + 1) * depth, np.tile(np.linspace(1, 0, depth), queries)
    drawn = [np.concatenate([random.permutation(ids)[:depth] for _ in names]).tolist() for _ in range(2)]
    teacher, student = (Run(names, offsets, doc_ids, scores) for doc_ids in drawn)
    qrels = {name: {"document-1": 1, "document-2": 1} for name in names}
    started = time.process_time()
    found = measure_fidelity(teacher, {"student": student}, qrels)
    seconds = time.process_time() - started
    assert seconds < 3 and abs(found.systems["student"]["kendall_tau"]) < 0.5, seconds
