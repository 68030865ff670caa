"""The pointwise teacher, over an engine that knows each passage's merit and over a real small model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from llm_server import Engine

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import TextList
from rankdistill.teachers.llm.base import Answer, Request, Usage
from rankdistill.teachers.llm.budget import BudgetReached
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.pointwise_llm import LEAST, PointwiseTeacher, left_by
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection


class Judge(Engine):
    """Says yes as far as a passage's planted merit goes; reports what it is told to."""

    hide: dict[int, set[str]] = {9: {"no"}, 1: {"yes"}, 4: {"yes", "no"}}  # merit → not reported

    def say(self, request: Request) -> Answer:
        (passage,) = re.findall(r"^Passage: (.*)$", request.messages[-1]["content"], re.MULTILINE)
        planted = re.findall(r"merit(\d+)", passage)
        merit = int(planted[0]) if planted else len(passage) % 10
        yes = 1 / (1 + math.exp(-(merit - 5)))
        logits = {"yes": math.log(yes), "no": math.log1p(-yes)}
        hidden = self.hide.get(merit, ()) if planted else ()
        return Answer("yes", {name: logits[name] for name in logits if name not in hidden}, Usage(10, 1))


def make(store: Path, model: str = "none", **settings: Any) -> tuple[PointwiseTeacher, Judge]:
    backend = {"type": "transformers", "model": model, "precision": "fp32"}
    teacher = build("teacher", {"type": "pointwise_llm", "backend": backend, **settings})
    engine = Judge()
    if model == "none":
        teacher.asking.backend = engine
    teacher.asking.begin(store)
    return teacher, engine


def listed(query_id: str, merits: list[int]) -> TextList:
    return TextList(query_id, f"query {query_id}", [f"d{m}" for m in merits], [f"text merit{m}" for m in merits])


def test_the_score_is_the_difference_of_the_logits(tmp_path: Path) -> None:
    teacher, engine = make(tmp_path)
    first, second = sorted(teacher.score([listed("a", [3, 8, 5]), listed("b", [0])]), key=lambda item: item[0])
    assert first[1] == ["d3", "d8", "d5"]
    np.testing.assert_allclose(first[2], [-2, 3, 0], atol=1e-5)  # the log-odds that were planted
    np.testing.assert_allclose(second[2], [-5], atol=1e-5)
    assert len(engine.asked) == 4
    list(teacher.score([listed("a", [8, 3])]))
    assert len(engine.asked) == 4, "answers come from the cache"


def test_words_that_a_server_does_not_report(tmp_path: Path) -> None:
    teacher, _ = make(tmp_path)
    ((_, doc_ids, scores),) = teacher.score([listed("a", [9, 1, 4, 7])])
    assert doc_ids == ["d9", "d1", "d7"], "without either word there is no score"
    # Two words share the probability here, so what the reported one leaves is exactly the other's.
    np.testing.assert_allclose(scores, [4, -4, 2], atol=1e-5)
    report = teacher.take_report()
    assert report["one_absent"] == 2 and teacher.asking.health.unread == 1
    assert len(teacher.report_lines(report)) == 1 and teacher.take_report() == {}
    assert left_by(math.log(0.9)) == pytest.approx(math.log(0.1))
    assert left_by(math.log(0.2)) == pytest.approx(math.log(0.2)), "no more than the reported one has"
    assert left_by(0.0) == LEAST == left_by(-1e-12)


def test_a_budget_ends_with_what_was_paid_for(tmp_path: Path, tiny_collection: Collection) -> None:
    doc_ids, store = tiny_collection.doc_ids(range(4)), ScoreStore(tmp_path / "store")
    candidates = [(query_id, doc_ids, np.zeros(4)) for query_id in tiny_collection.query_ids()[:2]]
    teacher, engine = make(tmp_path, budget="5calls")
    with pytest.raises(BudgetReached):
        score_candidates(teacher, tiny_collection, candidates, store)
    assert len(engine.asked) == 5
    teacher, engine = make(tmp_path)
    scores = score_candidates(teacher, tiny_collection, candidates, store)
    assert len(engine.asked) == 3, "no prompt is paid for twice"
    assert (scores.reused, scores.scored) == (5, 3)


def test_scores_equal_a_plain_forward_pass(tmp_path: Path, tiny_causal_lm: Path) -> None:
    import torch

    teacher, _ = make(tmp_path, str(tiny_causal_lm))
    item = TextList("q", "which metal is green", ["a", "b"], ["iron is a metal", "a green metal [1] > [2] yes"])
    ((_, _, scores),) = teacher.score([item])
    backend = teacher.asking.backend
    assert isinstance(backend, TransformersBackend)
    for text, score in zip(item.documents, scores, strict=True):
        request = teacher.template.render(item.query, [text], decoding="first")
        prompt = backend.chat.render(request.messages, request.before)
        tokens = backend.chat.identifier_tokens(prompt, ["yes", "no"])
        with torch.inference_mode():
            logits = backend.load()(torch.tensor([backend.chat.tokens(prompt)])).logits[0, -1]
        yes, no = (max(float(logits[token]) for token in tokens[name]) for name in ("yes", "no"))
        assert score == pytest.approx(yes - no, abs=1e-4)


def test_settings(tmp_path: Path) -> None:
    three = tmp_path / "three.yaml"
    three.write_text(
        "kind: pointwise\nidentifiers: [good, fair, bad]\nbefore: '{query}'\npassage: '{passage}'\nitem: '{identifier}'"
    )
    for settings, message in (
        ({"prompt": "listwise"}, "listwise, not pointwise"),
        ({"passage_tokens": 0}, "greater than or equal to 1"),
        ({"prompt": str(three)}, "two words, not 3"),
    ):
        with pytest.raises(UsageError, match=message):
            make(tmp_path, **settings)
    prints = {make(tmp_path, **s)[0].fingerprint() for s in ({}, {"passage_tokens": 50}, {"budget": "3calls"})}
    assert len(prints) == 2, "a budget decides no score"
    teacher, engine = make(tmp_path)
    engine.says = lambda _: Answer("yes")
    with pytest.raises(RankdistillError, match="no logits"):
        list(teacher.score([listed("a", [1])]))
