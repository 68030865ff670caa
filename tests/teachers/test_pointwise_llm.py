"""The pointwise teacher, over an engine that knows each passage's merit and over a real small model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import check_method
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import TextList
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage
from rankdistill.teachers.llm.budget import BudgetReached
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.pointwise_llm import LEAST, PointwiseTeacher, left_by
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection


class Judge(Backend):
    """Says yes as far as a passage's planted merit goes; reports what it is told to."""

    type = "judge"
    decodings = frozenset({"first"})

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.hide: dict[int, set[str]] = {}  # merit → words that are not reported

    def fingerprint(self) -> str:
        return "judge"

    def describe(self) -> dict[str, Any]:
        return {"type": self.type}

    def count_tokens(self, request: Request) -> int:
        return 10

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        for number, request in reversed(list(requests)):
            text = request.messages[-1]["content"]
            self.asked.append(text)
            (passage,) = re.findall(r"^Passage: (.*)$", text, re.MULTILINE)
            planted = re.findall(r"merit(\d+)", passage)
            merit = int(planted[0]) if planted else len(passage) % 10
            yes = 1 / (1 + math.exp(-(merit - 5)))
            logits = {"yes": math.log(yes), "no": math.log1p(-yes)}
            logits = {name: value for name, value in logits.items() if name not in self.hide.get(merit, set())}
            yield number, Answer("yes", logits, Usage(10, 1))


def make(**settings: Any) -> tuple[PointwiseTeacher, Judge]:
    teacher = PointwiseTeacher({"type": "transformers", "model": "none"}, **settings)
    engine = Judge()
    teacher.asking.backend = engine
    return teacher, engine


def listed(query_id: str, merits: list[int]) -> TextList:
    return TextList(query_id, f"query {query_id}", [f"d{m}" for m in merits], [f"text merit{m}" for m in merits])


def test_the_score_is_the_difference_of_the_logits(tmp_path: Path) -> None:
    teacher, engine = make()
    teacher.asking.use_store(tmp_path)
    found = sorted(teacher.score([listed("a", [3, 9, 5]), listed("b", [0])]), key=lambda item: item[0])
    assert found[0][1] == ["d3", "d9", "d5"]
    np.testing.assert_allclose(found[0][2], [-2, 4, 0], atol=1e-5)  # the log-odds that were planted
    np.testing.assert_allclose(found[1][2], [-5], atol=1e-5)
    assert len(engine.asked) == 4
    list(teacher.score([listed("a", [9, 3])]))
    assert len(engine.asked) == 4, "answers come from the cache"


def test_words_that_a_server_does_not_report(tmp_path: Path) -> None:
    teacher, engine = make()
    teacher.asking.use_store(tmp_path)
    engine.hide = {9: {"no"}, 1: {"yes"}, 4: {"yes", "no"}}
    ((_, doc_ids, scores),) = teacher.score([listed("a", [9, 1, 4, 7])])
    assert doc_ids == ["d9", "d1", "d7"], "without either word there is no score"
    # Two words share the probability here, so what the reported one leaves is exactly the other's.
    np.testing.assert_allclose(scores, [4, -4, 2], atol=1e-5)
    report = teacher.take_report()
    assert report["one_absent"] == 2 and teacher.asking.health.unread == 1
    assert len(teacher.report_lines(report)) == 1
    assert teacher.take_report() == {}


def test_what_one_word_leaves() -> None:
    assert left_by(math.log(0.9)) == pytest.approx(math.log(0.1))
    assert left_by(math.log(0.2)) == pytest.approx(math.log(0.2)), "no more than the reported one has"
    assert left_by(0.0) == LEAST == left_by(-1e-12)


def test_a_budget_ends_with_what_was_paid_for(tmp_path: Path, tiny_collection: Collection) -> None:
    ids = tiny_collection.query_ids()[:2]
    doc_ids = tiny_collection.doc_ids(range(4))
    candidates = [(query_id, doc_ids, np.zeros(4)) for query_id in ids]

    store = ScoreStore(tmp_path / "store")
    teacher, engine = make(budget="5calls")
    with pytest.raises(BudgetReached):
        score_candidates(teacher, tiny_collection, candidates, store)
    assert len(engine.asked) == 5
    teacher, engine = make()
    scores = score_candidates(teacher, tiny_collection, candidates, store)
    assert len(engine.asked) == 3, "no prompt is paid for twice"
    assert (scores.reused, scores.scored) == (5, 3)


def test_scores_equal_a_plain_forward_pass(tmp_path: Path, tiny_causal_lm: Path) -> None:
    import torch

    teacher = PointwiseTeacher({"type": "transformers", "model": str(tiny_causal_lm), "precision": "fp32"})
    teacher.asking.use_store(tmp_path)
    item = TextList("q", "which metal is green", ["a", "b"], ["iron is a metal", "a green metal [1] > [2] yes"])
    ((_, _, scores),) = teacher.score([item])
    backend = teacher.asking.backend
    assert isinstance(backend, TransformersBackend)
    for text, score in zip(item.documents, scores, strict=True):
        request = teacher.prompt.render(item.query, [text], decoding="first")
        prompt = backend.chat.render(request.messages, request.before)
        tokens = backend.chat.identifier_tokens(prompt, ["yes", "no"])
        with torch.inference_mode():
            logits = backend.load()(torch.tensor([backend.chat.tokens(prompt)])).logits[0, -1]
        yes, no = (max(float(logits[token]) for token in tokens[name]) for name in ("yes", "no"))
        assert score == pytest.approx(yes - no, abs=1e-4)


def test_settings(tmp_path: Path) -> None:
    settings = check_method(
        "teacher", {"type": "pointwise_llm", "backend": {"type": "transformers", "model": "m"}}, "teacher"
    )
    assert settings["prompt"] == "pointwise"
    with pytest.raises(UsageError, match="listwise, not pointwise"):
        make(prompt="listwise")
    with pytest.raises(UsageError, match="too few"):
        make(passage_tokens=0)
    three = tmp_path / "three.yaml"
    three.write_text(
        "kind: pointwise\nidentifiers: [good, fair, bad]\nbefore: '{query}'\npassage: '{passage}'\nitem: '{identifier}'"
    )
    with pytest.raises(UsageError, match="two words, not 3"):
        make(prompt=str(three))
    prints = {make()[0].fingerprint(), make(passage_tokens=50)[0].fingerprint(), make(budget="3calls")[0].fingerprint()}
    assert len(prints) == 2, "a budget decides no score"
    teacher, engine = make()
    teacher.asking.use_store(tmp_path)
    engine.answer = lambda requests: ((number, Answer("yes")) for number, _ in requests)  # type: ignore[method-assign]
    with pytest.raises(RankdistillError, match="no logits"):
        list(teacher.score([listed("a", [1])]))
