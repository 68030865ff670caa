"""Asking: cached answers first, every new one on disk before it is handed on, whatever happens to the process."""

from __future__ import annotations

import json
import resource
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from llm_server import completion, serving

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.teachers.llm.asking import ask
from rankdistill.teachers.llm.base import Answer, Backend, Decoding, Request, Usage
from rankdistill.teachers.llm.budget import Budget
from rankdistill.teachers.llm.cache import FILE, AnswerCache
from rankdistill.teachers.llm.openai_server import OpenAIBackend


def request(text: str, decoding: Decoding = "generate", **settings: Any) -> Request:
    return Request(({"role": "user", "content": text},), ("1", "2"), decoding, **settings)


def requests(count: int) -> list[tuple[int, Request]]:
    return [(number, request(f"prompt {number}")) for number in range(count)]


def echo(body: dict[str, Any], _: int) -> dict[str, Any]:
    return completion(body["messages"][-1]["content"].upper(), body)


class Shout(Backend):
    """An engine of two lines: says it louder, and counts how often it was asked."""

    type = "shout"
    decodings = frozenset({"generate"})

    def __init__(self, name: str = "one", change: Callable[[int, str], Answer] | None = None) -> None:
        self.name, self.asked = name, 0
        self.change = change or (lambda number, text: Answer(text.upper(), usage=Usage(len(text), 3, 1)))

    def fingerprint(self) -> str:
        return self.name

    def describe(self) -> dict[str, Any]:
        return {}

    def count_tokens(self, request: Request) -> int:
        return len(request.messages[0]["content"])

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        for number, one in requests:
            self.asked += 1
            yield number, self.change(number, one.messages[0]["content"])


def texts(found: Iterable[tuple[int, Answer]]) -> dict[int, str]:
    listed = [(number, answer.text) for number, answer in found]
    assert len(dict(listed)) == len(listed), "a number was answered twice"
    return dict(listed)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    given = Answer(
        '"half a pair \ud83d, a line\nand \u2028 more',
        {"A": -0.1234567890123456, "B": -7e-17},
        Usage(5, 6, 2, 1, 3),
    )
    cache = AnswerCache(tmp_path / "cache")
    cache.add("k", given)
    assert cache.find("k") == given == AnswerCache(tmp_path / "cache").find("k")
    assert cache.find("other") is None


def test_cached_answers_come_first_and_cost_nothing(tmp_path: Path) -> None:
    backend, budget = Shout(), Budget()
    first = texts(ask(backend, requests(3), AnswerCache(tmp_path), budget))
    assert first == {n: f"PROMPT {n}" for n in range(3)} and backend.asked == 3
    # In another order, with new ones between, and one prompt asked for twice.
    mixed = [(10, request("prompt 7")), (11, request("prompt 2")), (12, request("prompt 7")), (13, request("prompt 0"))]
    again = Budget()
    found = list(ask(backend, mixed, AnswerCache(tmp_path), again))
    assert [number for number, _ in found] == [11, 13, 10, 12] and backend.asked == 4
    assert (again.spent.calls, again.reused) == (1, 2)
    assert again.spent.prompt == len("prompt 7") and again.spent.cached == 1


def test_whatever_changes_an_answer_is_another_record(tmp_path: Path) -> None:
    one = request("a passage")
    changed = [
        request("a passage."),
        request("a passage", max_tokens=255),
        request("a passage", temperature=0.5),
        request("a passage", temperature=0.5, seed=1),
        request("a passage", before="["),
        Request(one.messages, ("1", "2", "3")),
    ]
    for decoding in ("first", "constrained"):
        changed.append(request("a passage", decoding=decoding))
    assert len({item.key("engine") for item in [one, *changed]} | {one.key("another")}) == len(changed) + 2
    backend = Shout("two")
    cache = AnswerCache(tmp_path)
    for engine in (Shout(), backend):
        assert texts(ask(engine, [(0, one)], cache, Budget()))
    assert backend.asked == 1, "an answer of another engine was taken"


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
    list(ask(Shout(), requests(3), AnswerCache(tmp_path), Budget()))
    with closing(sqlite3.connect(tmp_path / FILE)) as table, table:
        ((key, record),) = table.execute("SELECT * FROM answers LIMIT 1")
        if isinstance(change, dict):
            change = json.dumps({**json.loads(record), **change})
        elif isinstance(change, str):
            change = change.encode("utf-8", "surrogatepass")
        table.execute("UPDATE answers SET record = ? WHERE key = ?", (change, key))
    backend = Shout()
    for asked in (1, 0):
        assert texts(ask(backend, requests(3), AnswerCache(tmp_path), Budget())) == {n: f"PROMPT {n}" for n in range(3)}
        assert backend.asked == 1 and ("is asked again" in capsys.readouterr().err) == asked


def test_a_file_that_a_kill_left_before_its_table_is_used(tmp_path: Path) -> None:
    """sqlite makes the file, then the table."""
    (tmp_path / FILE).touch()
    cache = AnswerCache(tmp_path)
    assert len(cache) == 0 and cache.find("k") is None
    cache.add("k", Answer("1"))
    assert len(AnswerCache(tmp_path)) == 1


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    list(ask(Shout(), requests(3), AnswerCache(tmp_path), Budget()))
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(RankdistillError, match="cannot be read: file is not a database") as caught:
        list(ask(Shout(), requests(3), AnswerCache(tmp_path), Budget()))
    assert "move this file away" in str(caught.value.fix) and FILE in str(caught.value.where)


def test_answers_that_an_earlier_version_kept_are_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line each, as it wrote them; the last one cut by a kill, one damaged."""
    usage = {"prompt": 8, "answer": 3, "cached": 1, "estimated": False, "calls": 1}
    lines = [
        json.dumps({"key": request.key("one"), "text": f"old \ud83d {number}", "logits": {"1": -0.5}, "usage": usage,
                    "seconds": 0.25, "finished": True})
        for number, request in requests(4)
    ]  # fmt: skip
    lines[1] = "#" * len(lines[1])
    segment = tmp_path / "segment-00000000001-7-abc.jsonl"
    segment.write_text("\n".join(lines)[:-9])
    backend = Shout()
    for asked in (2, 2):
        found = dict(ask(backend, requests(4), AnswerCache(tmp_path), Budget()))
        assert backend.asked == asked and found[1].text == "PROMPT 1" and found[3].text == "PROMPT 3"
        assert found[2] == Answer("old \ud83d 2", {"1": -0.5}, Usage(8, 3, 1))
    assert capsys.readouterr().err.count("is asked again") == 1
    # The earlier version has gone on meanwhile.
    segment.write_text(
        "\n".join([*lines, lines[0].replace(requests(1)[0][1].key("one"), request("new").key("one"))]) + "\n"
    )
    assert AnswerCache(tmp_path).find(request("new").key("one")) and len(AnswerCache(tmp_path)) == 5


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    backend = Shout(change=lambda *_: Answer("1", {"1": float("nan"), "2": 0.0}))
    cache = AnswerCache(tmp_path)
    with pytest.raises(RankdistillError, match="no numbers"):
        list(ask(backend, requests(1), cache, Budget()))
    assert len(AnswerCache(tmp_path)) == 0


# -- engines ----------------------------------------------------------------------------------------------------------


def test_a_decoding_that_the_engine_lacks_is_refused_before_anything_is_paid(tmp_path: Path) -> None:
    backend = Shout()
    with pytest.raises(UsageError, match="does not do decoding: first"):
        list(ask(backend, [*requests(2), (2, request("x", "first"))], AnswerCache(tmp_path), Budget()))
    assert backend.asked == 0


def test_an_engine_that_loses_or_repeats_answers_is_an_error(tmp_path: Path) -> None:
    class Lossy(Shout):
        def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
            first, *_ = list(requests)
            yield first[0], Answer("")

    class Twice(Shout):
        def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
            number = next(iter(requests))[0]
            yield number, Answer("")
            yield number, Answer("")

    with pytest.raises(RankdistillError, match="left 2 requests without an answer"):
        list(ask(Lossy(), requests(3), AnswerCache(tmp_path / "a"), Budget()))
    with pytest.raises(RankdistillError, match="not asked, or twice"):
        list(ask(Twice(), requests(3), AnswerCache(tmp_path / "b"), Budget()))


def test_leaving_early_keeps_what_has_come_and_asks_no_more(tmp_path: Path) -> None:
    backend = Shout()
    asking = ask(backend, requests(100), AnswerCache(tmp_path), Budget())
    for _ in range(3):
        next(asking)
    asking.close()  # type: ignore[attr-defined]
    assert backend.asked == 3 and len(AnswerCache(tmp_path)) == 3


def test_an_engine_that_fails_leaves_the_answers_before_it(tmp_path: Path) -> None:
    def change(number: int, text: str) -> Answer:
        if text == "prompt 4":
            raise RankdistillError("the engine fell over")
        return Answer(text)

    with pytest.raises(RankdistillError, match="fell over"):
        list(ask(Shout(change=change), requests(9), AnswerCache(tmp_path), Budget()))
    assert len(AnswerCache(tmp_path)) == 4


# -- processes --------------------------------------------------------------------------------------------------------


def ask_server(url: str, cache: str, count: int, concurrency: int = 4) -> None:
    """What a process of its own does: ask, and print what came."""
    backend = OpenAIBackend("m", url, concurrency=concurrency)
    budget = Budget()
    found = texts(ask(backend, requests(count), AnswerCache(cache), budget))
    print(json.dumps([found, budget.spent.calls, budget.reused]))


def test_killed_at_any_moment_no_prompt_is_paid_twice(tmp_path: Path) -> None:
    """kill -9 while answers come in: only calls that were under way are made again."""

    def slowly(body: dict[str, Any], number: int) -> dict[str, Any]:
        time.sleep(0.01)
        return echo(body, number)

    count, concurrency, kills = 60, 4, 0
    with serving(slowly) as server:
        while True:
            process = Forked(
                ask_server, server.url, str(tmp_path / "cache"), count, concurrency, folder=tmp_path / "out"
            )
            target = len(server.bodies) + 13
            while process.process.is_alive() and len(server.bodies) < target:
                time.sleep(0.002)
            if not process.process.is_alive():
                ending = process.wait()
                break
            process.kill()
            kills += 1
            assert kills < 20
        assert ending.code == 0, ending.err
        found, calls, reused = json.loads(ending.out)
        assert found == {str(n): f"PROMPT {n}" for n in range(count)}
        assert calls + reused == count and kills >= 2
        again = sum(times - 1 for times in server.asked().values())
        assert again <= kills * concurrency, f"{again} prompts paid again after {kills} kills"
        assert max(server.asked().values()) <= 1 + kills
        # Nothing is asked by a process that comes after.
        before = len(server.bodies)
        ending = Forked(ask_server, server.url, str(tmp_path / "cache"), count, folder=tmp_path / "out").wait()
        assert json.loads(ending.out)[1:] == [0, count] and len(server.bodies) == before


def test_two_processes_on_one_cache(tmp_path: Path) -> None:
    def slowly(body: dict[str, Any], number: int) -> dict[str, Any]:
        time.sleep(0.005)
        return echo(body, number)

    with serving(slowly) as server:
        both = [
            Forked(ask_server, server.url, str(tmp_path / "cache"), 40, 2, folder=tmp_path / f"out-{number}")
            for number in range(2)
        ]
        for process in both:
            ending = process.wait()
            assert ending.code == 0, ending.err
            assert json.loads(ending.out)[0] == {str(n): f"PROMPT {n}" for n in range(40)}
    assert len(AnswerCache(tmp_path / "cache")) == 40


def test_what_another_process_has_paid_is_taken(tmp_path: Path) -> None:
    """Answers that come into the cache while we ask are found, not paid."""
    mine = AnswerCache(tmp_path)

    def change(number: int, text: str) -> Answer:
        if text == "prompt 0":  # meanwhile, elsewhere
            list(ask(Shout(), requests(5), AnswerCache(tmp_path), Budget()))
        return Answer(text.upper())

    backend, budget = Shout(change=change), Budget()
    assert len(texts(ask(backend, requests(5), mine, budget))) == 5
    assert backend.asked == 1 and budget.reused == 4


def ask_on_a_full_disk(cache: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, resource.RLIM_INFINITY))
    backend = Shout()
    handed_on = []
    try:
        for number, _ in ask(backend, requests(50), AnswerCache(cache), Budget()):
            handed_on.append(number)
    except RankdistillError as error:
        print(json.dumps([handed_on, backend.asked, error.what, error.fix]))


def test_a_full_disk_says_so_and_keeps_what_was_handed_on(tmp_path: Path) -> None:
    ending = Forked(ask_on_a_full_disk, str(tmp_path / "cache"), folder=tmp_path / "out").wait()
    assert ending.code == 0, ending.err
    handed_on, asked, what, fix = json.loads(ending.out)
    assert "cannot be written: disk" in what and "free some space" in fix and handed_on
    assert asked == len(handed_on) + 1  # none is asked whose answer could not be kept
    backend = Shout()
    assert len(texts(ask(backend, requests(50), AnswerCache(tmp_path / "cache"), Budget()))) == 50
    assert backend.asked == 50 - len(handed_on)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((RankdistillError, OSError)):
        list(ask(Shout(), requests(1), AnswerCache(tmp_path / "file" / "cache"), Budget()))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_server_is_asked_no_faster_than_its_limit(tmp_path: Path) -> None:
    def slowly(body: dict[str, Any], number: int) -> dict[str, Any]:
        time.sleep(0.02)
        return echo(body, number)

    with serving(slowly) as server:
        backend = OpenAIBackend("m", server.url, concurrency=3)
        started = time.monotonic()
        assert len(texts(ask(backend, requests(12), AnswerCache(tmp_path), Budget()))) == 12
        assert server.most_at_once == 3
        assert time.monotonic() - started < 12 * 0.02 + 10
