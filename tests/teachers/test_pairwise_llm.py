"""The pairwise teacher, over an engine that knows each passage's merit and over a real small model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import UsageError
from rankdistill.teachers.base import TextList
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage
from rankdistill.teachers.pairwise_llm import PairwiseTeacher


class Judge(Backend):
    """Prefers the passage of greater planted merit; what lies within `unsure` of the other loses to the first shown."""

    type = "judge"
    decodings = frozenset({"first", "generate"})

    def __init__(self, unsure: int = 0, says: str = "") -> None:
        self.unsure, self.says = unsure, says
        self.asked: list[tuple[int, int]] = []

    def fingerprint(self) -> str:
        return f"judge{self.unsure}{self.says}"

    def describe(self) -> dict[str, Any]:
        return {"type": self.type}

    def count_tokens(self, request: Request) -> int:
        return 10

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        for number, request in reversed(list(requests)):
            text = request.messages[-1]["content"]
            first, second = map(int, re.findall(r"^Passage [AB]: .*merit(\d+)", text, re.MULTILINE))
            self.asked.append((first, second))
            best = "A" if first - second >= (0 if abs(first - second) > self.unsure else -self.unsure) else "B"
            if request.decoding == "first":
                logits = {"A": float(best == "A"), "B": float(best == "B")}
                yield number, Answer(best, {} if self.says == "nothing" else logits, Usage(10, 1))
            else:
                yield number, Answer(self.says or best, None, Usage(10, 1))


def make(engine: Judge | None = None, **settings: Any) -> tuple[PairwiseTeacher, Judge]:
    teacher = PairwiseTeacher({"type": "transformers", "model": "none"}, **settings)
    engine = engine or Judge()
    teacher.asking.backend = engine
    return teacher, engine


def planted(merits: list[int], query_id: str = "q") -> TextList:
    return TextList(query_id, "a query", [f"d{m}" for m in merits], [f"text merit{m}" for m in merits])


def scored(teacher: PairwiseTeacher, item: TextList, store: Path) -> dict[str, float]:
    teacher.asking.use_store(store)
    ((_, doc_ids, scores),) = teacher.score([item])
    return dict(zip(doc_ids, scores.tolist(), strict=True))


def test_all_pairs_in_both_orders(tmp_path: Path) -> None:
    teacher, engine = make(top=4)
    found = scored(teacher, planted([3, 8, 1, 5, 9]), tmp_path)
    assert found == pytest.approx({"d8": 1, "d5": 2 / 3, "d3": 1 / 3, "d1": 0}), (
        "shares of the votes; d9 is below the top"
    )
    assert sorted(engine.asked) == sorted((a, b) for a in (1, 3, 5, 8) for b in (1, 3, 5, 8) if a != b)
    report = teacher.take_report()
    assert (report["pairs"], report.get("disagreed", 0), report["below_top"]) == (6, 0, 1)
    assert report["first_shown"] == 6, "half of the answers: the place does not matter"


def test_orders_that_disagree_are_ties_and_counted(tmp_path: Path) -> None:
    teacher, _ = make(Judge(unsure=1), top=3)
    found = scored(teacher, planted([1, 2, 9]), tmp_path)
    assert found == pytest.approx({"d1": 0.25, "d2": 0.25, "d9": 1.0})
    report = teacher.take_report()
    assert (report["pairs"], report["disagreed"]) == (3, 1)
    assert "disagreed on 1 (33%)" in teacher.report_lines(report)[0]


def test_bradley_terry_is_the_maximum_of_its_likelihood(tmp_path: Path) -> None:
    from scipy.optimize import minimize

    teacher, _ = make(Judge(unsure=1), top=4, signal="bradley_terry")
    merits = [1, 2, 3, 9]
    found = scored(teacher, planted(merits), tmp_path)

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
    np.testing.assert_allclose([found[f"d{m}"] for m in merits], expected - expected.mean(), atol=1e-3)


@pytest.mark.parametrize("decoding", ["first", "generate"])
def test_passes_bring_the_best_to_the_front(tmp_path: Path, decoding: Any) -> None:
    merits = [4, 1, 7, 3, 9, 2, 8, 5]
    teacher, engine = make(pairs="passes", signal="rank", top=3, decoding=decoding)
    found = scored(teacher, planted(merits), tmp_path)
    assert sorted(found, key=lambda d: -found[d])[:3] == ["d9", "d8", "d7"]
    assert len(found) == 8, "every document has a rank"
    assert sorted(found.values(), reverse=True) == pytest.approx([1 / r for r in range(1, 9)])
    assert len(engine.asked) <= 3 * (2 * 8 - 3 - 1)
    assert len(engine.asked) == len(set(engine.asked)), "no pair is asked again"


def test_passes_over_as_many_as_there_are_sort_the_list(tmp_path: Path) -> None:
    merits = [int(m) for m in np.random.default_rng(0).permutation(9)]
    teacher, _ = make(pairs="passes", signal="rank", top=20)
    found = scored(teacher, planted(merits), tmp_path)
    assert sorted(found, key=lambda d: -found[d]) == [f"d{m}" for m in range(8, -1, -1)]


@pytest.mark.parametrize(("says", "decoding"), [("Sorry, I cannot say.", "generate"), ("nothing", "first")])
@pytest.mark.parametrize("settings", [{"top": 3}, {"pairs": "passes", "signal": "rank"}, {"signal": "bradley_terry"}])
def test_answers_that_say_nothing_give_no_score(
    tmp_path: Path, says: str, decoding: Any, settings: dict[str, Any]
) -> None:
    teacher, _ = make(Judge(says=says), decoding=decoding, **settings)
    teacher.asking.use_store(tmp_path)
    assert list(teacher.score([planted([1, 5, 9])])) == [] and teacher.take_report() == {}
    assert teacher.asking.health.unread == 6 if settings.get("pairs") != "passes" else 4


def test_a_document_of_which_nothing_was_said_has_no_score(tmp_path: Path) -> None:
    class Silent(Judge):
        """Says nothing of the worst."""

        def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
            asked = list(requests)
            silent = {number for number, request in asked if "merit1" in request.messages[-1]["content"]}
            for number, answer in super().answer(asked):
                yield number, (Answer("", {}, refused="no" if number % 2 else "") if number in silent else answer)

    teacher, _ = make(Silent(), decoding="first")
    assert scored(teacher, planted([1, 5, 9]), tmp_path) == {"d5": 0.25, "d9": 0.75}


def test_short_lists_and_repeated_texts(tmp_path: Path) -> None:
    for settings in ({}, {"signal": "bradley_terry"}, {"pairs": "passes", "signal": "rank"}):
        teacher, engine = make(**settings)
        teacher.asking.use_store(tmp_path)
        assert list(teacher.score([planted([])])) == []
        assert len(scored(teacher, planted([4]), tmp_path)) == 1
        assert engine.asked == []
        item = TextList("q", "a query", ["a", "b", "c"], ["merit2", "merit5", "merit2"])
        found = scored(teacher, item, tmp_path)
        assert found["a"] == found["c"] < found["b"]
        assert len(engine.asked) in (0, 2), "one pair of distinct texts (cached after the first settings)"


def test_a_dry_run_counts_the_calls(tmp_path: Path) -> None:
    teacher, engine = make(top=4)
    teacher.asking.use_store(tmp_path)
    estimate = teacher.asking.dry_run()
    list(teacher.score([planted([1, 2, 3, 4, 5], "a"), planted([6, 7], "b")]))
    assert (estimate.most.calls, engine.asked) == (4 * 3 + 2, [])


def test_settings() -> None:
    for settings, message in (
        ({"pairs": "passes"}, "does not give signal: wins"),
        ({"signal": "rank"}, "does not give signal: rank"),
        ({"top": 1}, "too few"),
        ({"prompt": "pointwise"}, "pointwise, not pairwise"),
    ):
        with pytest.raises(UsageError, match=message):
            make(**settings)
    assert make()[0].score_kind == "rank"
    assert make(signal="bradley_terry")[0].score_kind == "logit"
    prints = {make(**s)[0].fingerprint() for s in ({}, {"top": 5}, {"decoding": "generate"}, {"budget": "3calls"})}
    assert len(prints) == 3, "a budget decides no score"
