"""The pairwise teacher, over an engine that knows each passage's merit and over a real small model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_server import Engine

from rankdistill.errors import UsageError
from rankdistill.recipe import build
from rankdistill.teachers.base import TextList
from rankdistill.teachers.llm.base import Answer, Request, Usage
from rankdistill.teachers.pairwise_llm import PairwiseTeacher


class Judge(Engine):
    """Prefers the passage of greater planted merit; what lies within `unsure` of the other loses to the first shown.

    Args:
        says: what it writes whatever it is asked; "nothing": no logits.
        silent: of the worst passage.
    """

    def __init__(self, unsure: int = 0, says: str = "", silent: bool = False) -> None:
        super().__init__(self.say, f"judge{unsure}{says}")
        self.unsure, self.answer_of_all, self.silent = unsure, says, silent
        self.pairs: list[tuple[int, int]] = []

    def say(self, request: Request) -> Answer:
        text = request.messages[-1]["content"]
        first, second = map(int, re.findall(r"^Passage [AB]: .*merit(\d+)", text, re.MULTILINE))
        self.pairs.append((first, second))
        if self.silent and 1 in (first, second):
            return Answer("", {}, refused="no" if first == 1 else "")
        best = "A" if first - second >= (0 if abs(first - second) > self.unsure else -self.unsure) else "B"
        if request.decoding == "generate":
            return Answer(self.answer_of_all or best, None, Usage(10, 1))
        logits = {"A": float(best == "A"), "B": float(best == "B")}
        return Answer(best, {} if self.answer_of_all else logits, Usage(10, 1))


def make(engine: Judge | None = None, **settings: Any) -> tuple[PairwiseTeacher, Judge]:
    backend = {"type": "transformers", "model": "none"}
    teacher = build("teacher", {"type": "pairwise_llm", "backend": backend, **settings})
    teacher.asking.backend = engine or Judge()
    return teacher, teacher.asking.backend


def planted(merits: list[int], query_id: str = "q") -> TextList:
    return TextList(query_id, "a query", [f"d{m}" for m in merits], [f"text merit{m}" for m in merits])


def scored(teacher: PairwiseTeacher, item: TextList, store: Path) -> dict[str, float]:
    teacher.asking.begin(store)
    ((_, doc_ids, scores),) = teacher.score([item])
    return dict(zip(doc_ids, scores.tolist(), strict=True))


def test_all_pairs_in_both_orders(tmp_path: Path) -> None:
    teacher, engine = make(top=4)
    shares = {"d8": 1, "d5": 2 / 3, "d3": 1 / 3, "d1": 0}  # of the votes; d9 is below the top
    assert scored(teacher, planted([3, 8, 1, 5, 9]), tmp_path) == pytest.approx(shares)
    assert sorted(engine.pairs) == sorted((a, b) for a in (1, 3, 5, 8) for b in (1, 3, 5, 8) if a != b)
    report = teacher.take_report()
    assert (report["pairs"], report.get("disagreed", 0), report["below_top"]) == (6, 0, 1)
    assert report["first_shown"] == 6, "half of the answers: the place does not matter"


def test_orders_that_disagree_are_ties_and_counted(tmp_path: Path) -> None:
    teacher, _ = make(Judge(unsure=1), top=3)
    assert scored(teacher, planted([1, 2, 9]), tmp_path) == pytest.approx({"d1": 0.25, "d2": 0.25, "d9": 1.0})
    report = teacher.take_report()
    assert (report["pairs"], report["disagreed"]) == (3, 1)
    assert "disagreed on 1 (33%)" in teacher.report_lines(report)[0]


def test_bradley_terry_is_the_maximum_of_its_likelihood(tmp_path: Path) -> None:
    from scipy.optimize import minimize

    teacher, _ = make(Judge(unsure=1), top=4, signal="bradley_terry")
    merits = [1, 2, 3, 9]
    scores = scored(teacher, planted(merits), tmp_path)

    def loss(s: np.ndarray) -> float:
        total = 0.05 * float(s @ s)
        for i, a in enumerate(merits):
            for j, b in enumerate(merits):
                if i < j:
                    share = 0.5 if b - a <= 1 else 0.0  # of the votes that the lower one gets
                    margin = s[i] - s[j]
                    total += 2 * (share * np.log1p(np.exp(-margin)) + (1 - share) * np.log1p(np.exp(margin)))
        return total

    expected = minimize(loss, np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose([scores[f"d{m}"] for m in merits], expected - expected.mean(), atol=1e-3)


@pytest.mark.parametrize("decoding", ["first", "generate"])
@pytest.mark.parametrize("top", [3, 20])
def test_passes_bring_the_best_to_the_front(tmp_path: Path, decoding: Any, top: int) -> None:
    teacher, engine = make(pairs="passes", signal="rank", top=top, decoding=decoding)
    scores = scored(teacher, planted([4, 1, 7, 3, 9, 2, 8, 5]), tmp_path)
    assert sorted(scores, key=lambda d: -scores[d])[:top] == ["d9", "d8", "d7", "d5", "d4", "d3", "d2", "d1"][:top]
    assert sorted(scores.values(), reverse=True) == pytest.approx([1 / r for r in range(1, 9)])
    assert len(engine.pairs) == len(set(engine.pairs)), "no pair is asked again"
    assert top == 20 or len(engine.pairs) <= 3 * (2 * 8 - 3 - 1)


@pytest.mark.parametrize(("says", "decoding"), [("Sorry, I cannot say.", "generate"), ("nothing", "first")])
@pytest.mark.parametrize("settings", [{"top": 3}, {"pairs": "passes", "signal": "rank"}, {"signal": "bradley_terry"}])
def test_answers_that_say_nothing_give_no_score(
    tmp_path: Path, says: str, decoding: Any, settings: dict[str, Any]
) -> None:
    teacher, _ = make(Judge(says=says), decoding=decoding, **settings)
    teacher.asking.begin(tmp_path)
    assert list(teacher.score([planted([1, 5, 9])])) == [] and teacher.take_report() == {}
    assert teacher.asking.health.unread == (4 if settings.get("pairs") == "passes" else 6)


def test_a_document_of_which_nothing_was_said_has_no_score(tmp_path: Path) -> None:
    teacher, _ = make(Judge(silent=True))
    assert scored(teacher, planted([1, 5, 9]), tmp_path) == {"d5": 0.25, "d9": 0.75}


@pytest.mark.parametrize("settings", [{}, {"signal": "bradley_terry"}, {"pairs": "passes", "signal": "rank"}])
def test_short_lists_and_repeated_texts(tmp_path: Path, settings: dict[str, Any]) -> None:
    teacher, engine = make(**settings)
    assert list(teacher.score([planted([])])) == []
    assert len(scored(teacher, planted([4]), tmp_path)) == 1 and engine.pairs == []
    item = TextList("q", "a query", ["a", "b", "c"], ["merit2", "merit5", "merit2"])
    scores = scored(teacher, item, tmp_path)
    assert scores["a"] == scores["c"] < scores["b"] and len(engine.pairs) == 2, "one pair of distinct texts"


def test_a_dry_run_counts_the_calls(tmp_path: Path) -> None:
    teacher, engine = make(top=4)
    teacher.asking.begin(tmp_path)
    estimate = teacher.asking.dry_run()
    list(teacher.score([planted([1, 2, 3, 4, 5], "a"), planted([6, 7], "b")]))
    assert (estimate.most.calls, engine.pairs) == (4 * 3 + 2, [])


def test_settings() -> None:
    for settings, message in (
        ({"pairs": "passes"}, "does not give signal: wins"),
        ({"signal": "rank"}, "does not give signal: rank"),
        ({"top": 1}, "greater than or equal to 2"),
        ({"prompt": "pointwise"}, "pointwise, not pairwise"),
    ):
        with pytest.raises(UsageError, match=message):
            make(**settings)
    assert make()[0].score_kind == "rank"
    assert make(signal="bradley_terry")[0].score_kind == "logit"
    prints = {make(**s)[0].fingerprint() for s in ({}, {"top": 5}, {"decoding": "generate"}, {"budget": "3calls"})}
    assert len(prints) == 3, "a budget decides no score"
