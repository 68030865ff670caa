"""Asking: what the cache and the budget promise, whatever engines, servers, disks and other processes do."""

from __future__ import annotations

import json
import random
import resource
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forked
from llm_server import Engine, completion, serving

from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.llm.asking import ask
from rankdistill.teachers.llm.base import Answer, Decoding, Request, Usage
from rankdistill.teachers.llm.budget import Budget, BudgetReached, Limit, Prices
from rankdistill.teachers.llm.cache import FILE, AnswerCache
from rankdistill.teachers.llm.openai_server import OpenAIBackend
from rankdistill.teachers.scoring import dry_run, score_candidates


def request(text: str, decoding: Decoding = "generate", **settings: Any) -> Request:
    return Request(({"role": "user", "content": text},), ("1", "2"), decoding, **settings)


def requests(count: int) -> list[tuple[int, Request]]:
    return [(number, request(f"prompt {number}")) for number in range(count)]


def slowly(seconds: float) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    def respond(body: dict[str, Any], _: int) -> dict[str, Any]:
        time.sleep(seconds)
        return completion(body["messages"][-1]["content"].upper(), body)

    return respond


class Shout(Engine):
    """Says it louder, one at a time; or what `change` makes of a prompt."""

    decodings = frozenset({"generate"})

    def __init__(self, name: str = "one", change: Callable[[str], Answer] | None = None) -> None:
        self.change = change or (lambda text: Answer(text.upper(), usage=Usage(len(text), 3, 1)))
        super().__init__(lambda request: self.change(request.messages[0]["content"]), name)

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        for item in requests:
            yield from super().answer([item])


def texts(answers: Iterable[tuple[int, Answer]]) -> dict[int, str]:
    listed = [(number, answer.text) for number, answer in answers]
    assert len(dict(listed)) == len(listed), "a number was answered twice"
    return dict(listed)


def paid(cache: Path, engine: Engine, count: int) -> dict[int, str]:
    return texts(ask(engine, requests(count), AnswerCache(cache), Budget()))


LOUD = {number: f"PROMPT {number}" for number in range(40)}


# -- the cache --------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    logits = {"A": -0.1234567890123456, "B": -7e-17}
    answer = Answer('"half a pair \ud83d, a line\nand \u2028 more', logits, Usage(5, 6, 2, 1, 3))
    cache = AnswerCache(tmp_path / "cache")
    cache.add("k", answer)
    assert cache.find("k") == answer == AnswerCache(tmp_path / "cache").find("k")
    assert cache.find("other") is None


def test_cached_answers_come_first_and_cost_nothing(tmp_path: Path) -> None:
    engine = Shout()
    assert paid(tmp_path, engine, 3) == dict(list(LOUD.items())[:3]) and len(engine.asked) == 3
    # In another order, with new ones between, and one prompt asked for twice.
    mixed = [(10, request("prompt 7")), (11, request("prompt 2")), (12, request("prompt 7")), (13, request("prompt 0"))]
    again = Budget("9calls")
    numbers = [number for number, _ in ask(engine, mixed, AnswerCache(tmp_path), again)]
    assert numbers == [11, 13, 10, 12] and len(engine.asked) == 4
    assert (again.spent.calls, again.reused, again.spent.prompt, again.spent.cached) == (1, 2, len("prompt 7"), 1)
    assert "1 calls" in again.line() and "(11% of the budget of 9 calls); 2 answers from the cache" in again.line()


def test_whatever_changes_an_answer_is_another_record(tmp_path: Path) -> None:
    plain = request("a passage")
    changed = [
        request("a passage."),
        request("a passage", max_tokens=255),
        request("a passage", temperature=0.5),
        request("a passage", temperature=0.5, seed=1),
        request("a passage", before="["),
        Request(plain.messages, ("1", "2", "3")),
        request("a passage", "first"),
        request("a passage", "constrained"),
    ]
    assert len({item.key("engine") for item in [plain, *changed]} | {plain.key("another")}) == len(changed) + 2
    engines = Shout(), Shout("two")
    for engine in engines:
        assert paid(tmp_path, engine, 1) and len(engine.asked) == 1, "an answer of another engine was taken"


@pytest.mark.parametrize(
    "change",
    [
        {"text": 5}, {"text": None}, {"usage": None}, {"usage": {"prompt": "x"}}, {"usage": {"prompt": -1}},
        {"logits": 3}, {"logits": {"A": "x"}}, {"logits": {"A": None}}, {"logits": {"A": float("nan")}},
        {"logits": {"A": 10**400}}, "[" * 3000, "#" * 90, "\ud800", None, 7,
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_asked_again_and_said(
    change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paid(tmp_path, Shout(), 3)
    with closing(sqlite3.connect(tmp_path / FILE)) as table, table:
        ((key, record),) = table.execute("SELECT * FROM answers LIMIT 1")
        if isinstance(change, dict):
            change = json.dumps({**json.loads(record), **change})
        elif isinstance(change, str):
            change = change.encode("utf-8", "surrogatepass")
        table.execute("UPDATE answers SET record = ? WHERE key = ?", (change, key))
    engine = Shout()
    for asked in (1, 0):
        assert paid(tmp_path, engine, 3) == dict(list(LOUD.items())[:3])
        assert len(engine.asked) == 1 and ("is asked again" in capsys.readouterr().err) == asked


def test_a_file_that_a_kill_left_before_its_table_is_used_and_a_damaged_one_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()  # sqlite makes the file, then the table
    cache = AnswerCache(tmp_path)
    assert len(cache) == 0 and cache.find("k") is None
    cache.add("k", Answer("1"))
    assert len(AnswerCache(tmp_path)) == 1
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(RankdistillError, match="cannot be read: file is not a database") as caught:
        paid(tmp_path, Shout(), 3)
    assert "move this file away" in str(caught.value.fix) and FILE in str(caught.value.where)


def test_answers_that_an_earlier_version_kept_are_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line each, as it wrote them; the last one cut by a kill, one damaged."""
    usage = {"prompt": 8, "answer": 3, "cached": 1, "estimated": False, "calls": 1}
    old = {"logits": {"1": -0.5}, "usage": usage, "seconds": 0.25, "finished": True}
    lines = [
        json.dumps({"key": request.key("one"), "text": f"old \ud83d {number}", **old})
        for number, request in requests(4)
    ]
    lines[1] = "#" * len(lines[1])
    segment = tmp_path / "segment-00000000001-7-abc.jsonl"
    segment.write_text("\n".join(lines)[:-9])
    engine = Shout()
    for _ in range(2):
        answers = dict(ask(engine, requests(4), AnswerCache(tmp_path), Budget()))
        assert len(engine.asked) == 2 and answers[1].text == "PROMPT 1" and answers[3].text == "PROMPT 3"
        assert answers[2] == Answer("old \ud83d 2", {"1": -0.5}, Usage(8, 3, 1))
    assert capsys.readouterr().err.count("is asked again") == 1
    # The earlier version has gone on meanwhile.
    new = request("new").key("one")
    segment.write_text("\n".join([*lines, lines[0].replace(requests(1)[0][1].key("one"), new)]) + "\n")
    assert AnswerCache(tmp_path).find(new) and len(AnswerCache(tmp_path)) == 5


# -- engines ----------------------------------------------------------------------------------------------------------


def given(*answered: int) -> type[Engine]:
    """An engine that draws all requests and answers these numbers."""

    class Wrong(Shout):
        def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
            list(requests)
            yield from ((number, Answer("")) for number in answered)

    return Wrong


def falls_over(text: str) -> Answer:
    if text == "prompt 4":
        raise RankdistillError("the engine fell over")
    return Answer(text)


@pytest.mark.parametrize(
    ("engine", "message", "kept"),
    [
        (given(0)(), "left 2 requests without an answer", 1),
        (given(0, 0)(), "not asked, or twice", 1),
        (Shout(change=lambda _: Answer("1", {"1": float("nan"), "2": 0.0})), "no numbers", 0),
        (Shout(change=falls_over), "fell over", 4),
    ],
    ids=["loses", "repeats", "no number", "fails"],
)
def test_an_engine_that_does_wrong_is_an_error_after_what_it_did_right(
    engine: Engine, message: str, kept: int, tmp_path: Path
) -> None:
    with pytest.raises(RankdistillError, match=message):
        paid(tmp_path, engine, 9 if kept == 4 else 3)
    assert len(AnswerCache(tmp_path)) == kept


def test_a_decoding_that_the_engine_lacks_is_refused_before_anything_is_paid(tmp_path: Path) -> None:
    engine = Shout()
    with pytest.raises(UsageError, match="does not do decoding: first"):
        list(ask(engine, [*requests(2), (2, request("x", "first"))], AnswerCache(tmp_path), Budget()))
    assert engine.asked == []


def test_leaving_early_keeps_what_has_come_and_asks_no_more(tmp_path: Path) -> None:
    engine = Shout()
    asking = ask(engine, requests(100), AnswerCache(tmp_path), Budget())
    for _ in range(3):
        next(asking)
    asking.close()  # type: ignore[attr-defined]
    assert len(engine.asked) == 3 == len(AnswerCache(tmp_path))


# -- processes, two that live (one that is killed: tests/cli/test_score_budget.py) ------------------------------------


def ask_server(url: str, cache: str) -> None:
    """What a process of its own does: ask, and print what came."""
    backend = OpenAIBackend("m", url, concurrency=2)
    print(json.dumps(texts(ask(backend, requests(40), AnswerCache(cache), Budget()))))


def test_two_processes_on_one_cache(tmp_path: Path) -> None:
    with serving(slowly(0.005)) as server:
        job = (ask_server, server.url, str(tmp_path / "cache"))
        for process in [Forked(*job, folder=tmp_path / f"out-{number}") for number in range(2)]:
            ending = process.wait()
            assert ending.code == 0, ending.err
            assert json.loads(ending.out) == {str(number): LOUD[number] for number in range(40)}
    assert len(AnswerCache(tmp_path / "cache")) == 40


def test_what_another_process_has_paid_is_taken(tmp_path: Path) -> None:
    """Answers that come into the cache while we ask are found, not paid."""

    def change(text: str) -> Answer:
        if text == "prompt 0":  # meanwhile, elsewhere
            paid(tmp_path, Shout(), 5)
        return Answer(text.upper())

    engine, budget = Shout(change=change), Budget()
    assert len(texts(ask(engine, requests(5), AnswerCache(tmp_path), budget))) == 5
    assert len(engine.asked) == 1 and budget.reused == 4


def ask_on_a_full_disk(cache: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, resource.RLIM_INFINITY))
    engine, handed_on = Shout(), []
    try:
        for number, _ in ask(engine, requests(50), AnswerCache(cache), Budget()):
            handed_on.append(number)
    except RankdistillError as error:
        print(json.dumps([handed_on, len(engine.asked), error.what, error.fix]))


def test_a_disk_that_takes_nothing_more_says_so_and_keeps_what_was_handed_on(tmp_path: Path) -> None:
    ending = Forked(ask_on_a_full_disk, str(tmp_path / "cache"), folder=tmp_path / "out").wait()
    assert ending.code == 0, ending.err
    handed_on, asked, what, fix = json.loads(ending.out)
    assert "cannot be written: disk" in what and "free some space" in fix and handed_on
    assert asked == len(handed_on) + 1  # none is asked whose answer could not be kept
    engine = Shout()
    assert len(paid(tmp_path / "cache", engine, 50)) == 50
    assert len(engine.asked) == 50 - len(handed_on)
    (tmp_path / "file").write_text("")
    with pytest.raises((RankdistillError, OSError)):
        paid(tmp_path / "file" / "cache", Shout(), 1)


def test_the_server_is_asked_no_faster_than_its_limit(tmp_path: Path) -> None:
    with serving(slowly(0.02)) as server:
        backend = OpenAIBackend("m", server.url, concurrency=3)
        assert len(texts(ask(backend, requests(12), AnswerCache(tmp_path), Budget()))) == 12
        assert server.most_at_once == 3


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("500calls", Limit(500, "calls")), ("1 call", Limit(1, "calls")), ("200000tokens", Limit(200_000, "tokens")),
        ("200,000 tokens", Limit(200_000, "tokens")), ("2_000tokens", Limit(2000, "tokens")),
        ("3.50", Limit(3.5, "money")), (3.5, Limit(3.5, "money")), (2, Limit(2, "money")),
        *((text, None) for text in ("", "calls", "0calls", "-5calls", "1.5calls", "3 euros", "5k", "nan", 0, -1.0)),
    ],
)  # fmt: skip
def test_limits_are_read_or_refused(text: str | float, limit: Limit | None) -> None:
    if limit is not None:
        assert Limit.read(text) == limit
        return
    with pytest.raises(UsageError, match="is no budget"):
        Limit.read(text)


def test_prices() -> None:
    prices = Prices.model_validate({"prompt": 0.5, "answer": 2, "cached": 0.1})
    assert prices.cost(Usage(1_000_000, 100_000, 400_000)) == pytest.approx(0.6 * 0.5 + 0.4 * 0.1 + 0.1 * 2)
    # Without a price of their own, cached tokens cost what others cost.
    assert Prices.model_validate({"prompt": 0.5, "answer": 2}).cost(Usage(1_000_000, 0, 400_000)) == pytest.approx(0.5)
    for table, message in (
        ({"prompt": 1}, "answer: field required"),
        ({"prompt": 1, "answer": 1, "cahced": 1}, "unknown key 'cahced'"),
        ({"prompt": -1, "answer": 1}, "greater than or equal to 0"),
        ({"prompt": float("nan"), "answer": 1}, "finite number"),
    ):
        with pytest.raises(UsageError, match=message):
            Budget(prices=table)
    with pytest.raises(UsageError, match="needs prices"):
        Budget("3.50")
    assert Budget("3.50", {"prompt": 1.0, "answer": 2.0}).limit == Limit(3.5, "money")


class Chance(Engine):
    """Answers of random length, up to the longest; `ahead` requests are drawn before the first is answered."""

    def __init__(self, seed: int, ahead: int) -> None:
        super().__init__(self.say, "chance")
        self.chance, self.ahead = random.Random(seed), ahead

    def count_tokens(self, request: Request) -> int:
        return len(request.messages[0]["content"])

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        held: list[tuple[int, Request]] = []
        source = iter(requests)
        while True:
            while len(held) < self.ahead and (item := next(source, None)) is not None:
                held.append(item)
            if not held:
                return
            number, request = held.pop(self.chance.randrange(len(held)))
            self.asked.append(request)
            length = self.chance.randint(1, request.max_tokens)
            yield number, Answer("x", {"1": 0.0}, Usage(self.count_tokens(request), length))


def prompts(count: int) -> list[tuple[int, Request]]:
    chance = random.Random(0)
    return [(n, request(f"{n} " + "w" * chance.randint(1, 90), max_tokens=40)) for n in range(count)]


@pytest.mark.parametrize("limit", ["17calls", "1500tokens", "0.002"])
@pytest.mark.parametrize("ahead", [1, 4, 50])
def test_a_budget_is_not_passed_and_nothing_paid_is_lost(limit: str, ahead: int, tmp_path: Path) -> None:
    """Whatever answers cost and however many calls are under way; every run with the budget gets further."""
    asked, answered, rounds = prompts(60), 0, 0
    while answered < 60:
        engine, budget = Chance(rounds, ahead), Budget(limit, {"prompt": 1.0, "answer": 3.0})
        assert budget.limit is not None
        handed_on = []
        try:
            for number, _ in ask(engine, asked, AnswerCache(tmp_path), budget):
                handed_on.append(number)
        except BudgetReached as error:
            assert error.exit_code == 1 and "goes on from here" in str(error.fix)
            assert "budget" in error.what and f"{budget.spent.calls:,} calls" in error.what
            # Stopped no earlier than it had to: the longest call would not have fitted.
            rest = budget.limit.amount - budget.of(budget.spent)
            assert rest < {"calls": 1, "tokens": 140, "money": 140 * 3e-6}[budget.limit.unit]
        assert 0 < budget.of(budget.spent) <= budget.limit.amount
        assert f"{(budget.spent.prompt + 3 * budget.spent.answer) / 1e6:,.4f} in money" in budget.line()
        assert len(handed_on) == budget.spent.calls + budget.reused == len(set(handed_on))
        assert budget.reused == answered and len(engine.asked) == budget.spent.calls
        answered += len(engine.asked)
        rounds += 1
    assert rounds > 2 and answered == 60


def test_a_call_that_no_budget_holds_is_not_made(tmp_path: Path) -> None:
    engine = Chance(0, 4)
    with pytest.raises(BudgetReached):
        list(ask(engine, prompts(3), AnswerCache(tmp_path), Budget("5tokens")))
    assert engine.asked == []


# -- before it is spent (windows that depend on answers: tests/cli/test_score_budget.py) ------------------------------


def teacher(model: Path, **settings: Any) -> Any:
    backend = {"type": "transformers", "model": str(model), "precision": "fp32"}
    return build("teacher", {"type": "listwise", "backend": backend, "passage_tokens": 30, **settings})


def candidates(collection: Collection, depth: int, queries: int) -> list[tuple[str, list[str], np.ndarray]]:
    doc_ids, chance = collection.doc_ids(range(collection.document_count)), random.Random(depth)
    ids = collection.query_ids("train")[:queries]
    return [(query_id, chance.sample(doc_ids, depth), np.zeros(depth, np.float32)) for query_id in ids]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("decoding", ["first", "constrained"])
def test_a_dry_run_says_what_one_window_a_list_costs_exactly(
    decoding: str, tiny_causal_lm: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    lists, store = candidates(tiny_collection, 6, 4), ScoreStore(tmp_path)
    settings = {"decoding": decoding, "window": 8, "step": 4, "prices": {"prompt": 1.0, "answer": 4.0}}
    estimate = dry_run(teacher(tiny_causal_lm, **settings), tiny_collection, lists, store)
    assert snapshot(tmp_path) == {}, "a dry run leaves nothing behind"
    paying = teacher(tiny_causal_lm, **settings)
    score_candidates(paying, tiny_collection, lists, store)
    spent = paying.asking.budget.spent
    assert estimate.spent.calls == spent.calls == 4 and estimate.pairs == 24
    assert estimate.spent.prompt == spent.prompt > 100
    assert estimate.most.answer >= spent.answer and estimate.money(estimate.most) >= estimate.money(spent)
    assert estimate.spent.answer == pytest.approx(spent.answer, rel=0.2 * (decoding != "first"))
    # What is in the store costs nothing any more, and is left as it is.
    before = snapshot(tmp_path)
    again = dry_run(teacher(tiny_causal_lm, **settings), tiny_collection, lists, store)
    assert (again.spent.calls, again.pairs) == (0, 0) and snapshot(tmp_path) == before
