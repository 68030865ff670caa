"""Bodies of language model servers, and kept answers: see fuzz.py."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import damaged, target
from llm_server import Body, Engine, Server, by_number, completion, step

from rankdistill.teachers.base import TextList
from rankdistill.teachers.listwise import ListwiseTeacher
from rankdistill.teachers.llm.asking import AskingTeacher, ask
from rankdistill.teachers.llm.base import Answer, Request, Usage
from rankdistill.teachers.llm.budget import Budget
from rankdistill.teachers.llm.cache import FILE, AnswerCache
from rankdistill.teachers.llm.openai_server import OpenAIBackend
from rankdistill.teachers.pairwise_llm import PairwiseTeacher
from rankdistill.teachers.pointwise_llm import PointwiseTeacher

# What stands where something else was: other types, edges of numbers, parts, refusals, half a pair.
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, 10**400, float("nan"), float("inf"), -9999.0, "", "x", "[2] > [1]", "length",
    "content_filter", "\ud800", "\x1b[31m", "a" * 5000, [], [None], {}, {"text": "[1]"}, [[]], [{"type": "text"}],
    [{"type": "thinking", "thinking": "[1]"}, {"type": "text", "text": "[2] > [1]"}], {"message": "no", "code": 7},
)  # fmt: skip
TEACHERS: dict[str, tuple[type[AskingTeacher], dict[str, Any]]] = {
    "listwise": (ListwiseTeacher, {"window": 2, "step": 1}),
    "first": (ListwiseTeacher, {"decoding": "first", "signal": "logits", "window": 2, "step": 1}),
    "orders": (ListwiseTeacher, {"orders": ["given", "reversed"], "signal": "plackett_luce", "confidence": True}),
    "pairwise": (PairwiseTeacher, {}),
    "passes": (PairwiseTeacher, {"pairs": "passes", "signal": "rank", "decoding": "generate"}),
    "pointwise": (PointwiseTeacher, {}),
}
ITEM = TextList("q", "which", ["a", "b", "c"], ["text 1", "text 3", "text 2"])


@lru_cache(maxsize=1)
def connection() -> tuple[Server, OpenAIBackend]:
    """One server and one client for all inputs."""
    server = Server()
    return server, OpenAIBackend("m", server.url, retries=0)


def good(body: Body, kind: str) -> Body:
    if kind in ("listwise", "first", "orders"):
        return by_number(body)
    name, other = ("yes", "no") if kind == "pointwise" else ("A", "B")
    opening = [step("[", {"[": -0.1})] if body.get("logprobs") else None
    return completion(name, body, opening and [step(name, {name: -0.5, other: -1.0})])


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all that a body holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in list(items) for place in ((value, key), *places(inner))]


def spoilt(body: Body, rng: random.Random) -> Any:
    body = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(places(body) or [({}, "x")])
        way = rng.randrange(5)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice(("error", "message", "refusal", "reasoning_content"))] = rng.choice(JUNK)
        else:
            holder[key] = rng.choice(JUNK)
    content = json.dumps(body).encode()
    if rng.random() < 0.2:
        content = damaged(content, rng)
    status = rng.choice((200,) * 8 + (400, 422, 500))
    return (
        status,
        {"Content-Type": rng.choice(("application/json", "text/html", "application/json; charset=x"))},
        content,
    )


@target
def llm_body(rng: random.Random, folder: Path) -> None:
    """Some of a server's bodies are spoilt: finite scores, or none and that is counted, or an error with words."""
    server, connected = connection()
    kind = rng.choice(sorted(TEACHERS))
    share = rng.choice((0.2, 0.5, 1.0))

    def respond(body: Body, _: int) -> Any:
        return spoilt(good(body, kind), rng) if rng.random() < share else good(body, kind)

    make, settings = TEACHERS[kind]
    backend = {"type": "openai", "model": "m", "base_url": server.url, "retries": 0, "concurrency": 1}
    teacher = make(backend, **settings)
    vars(teacher.asking.backend)["_client"] = connected._client
    server.respond = respond
    teacher.asking.begin(folder)
    scored = list(teacher.score([ITEM]))
    for query_id, doc_ids, scores in scored:
        assert query_id == "q" and doc_ids and set(doc_ids) <= set(ITEM.doc_ids)
        assert len(scores) == len(doc_ids) and np.isfinite(scores).all()
    if not scored or len(scored[0][1]) < 3:
        assert teacher.asking.health.unread + teacher.asking.health.refused
    for line in [*teacher.asking.health.lines(), teacher.asking.budget.line()]:
        line.encode()


@target
def kept_answers(rng: random.Random, folder: Path) -> None:
    """A damaged file of answers gives what was written, or the answer is asked again, or it is refused with words."""

    engine = Engine(lambda request: Answer("text", {"A": -1.0}, Usage(7, 1)))
    asked = [(number, Request(({"role": "user", "content": str(number)},), ("A", "B"))) for number in range(3)]
    list(ask(engine, asked, AnswerCache(folder), Budget()))
    if rng.random() < 0.5:
        with closing(sqlite3.connect(folder / FILE)) as table, table:
            ((name, text),) = table.execute("SELECT * FROM answers LIMIT 1")
            record = json.loads(text)
            holder, key = rng.choice([place for place in places(record) if place != (record, "text")])
            holder[key] = rng.choice(JUNK)
            table.execute("UPDATE answers SET record = ? WHERE key = ?", (json.dumps(record), name))
    else:
        (folder / FILE).write_bytes(damaged((folder / FILE).read_bytes(), rng))
    answers = dict(ask(engine, asked, AnswerCache(folder), Budget()))
    assert sorted(answers) == [0, 1, 2] and all(isinstance(answer.text, str) for answer in answers.values())
    json.dumps([answer.logits for answer in answers.values()], allow_nan=False)
