"""The client of OpenAI-compatible servers, against a real HTTP server that misbehaves, and `transformers serve`."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llm_server import Body, Server, completion, failure, serving, step

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.teachers.llm.asking import ask
from rankdistill.teachers.llm.base import Answer, Decoding, Request, Usage
from rankdistill.teachers.llm.budget import Budget
from rankdistill.teachers.llm.cache import AnswerCache
from rankdistill.teachers.llm.openai_server import OpenAIBackend, Reply, read_reply

LETTERS = ("A", "B", "C", "D")
SECRET = "sk-test-3f9c1d77aa"


def request(text: str = "rank these", decoding: Decoding = "generate", **settings: Any) -> Request:
    return Request(
        ({"role": "system", "content": "be brief"}, {"role": "user", "content": text}),
        settings.pop("identifiers", LETTERS),
        decoding,
        **settings,
    )


def backend(server: Server, **settings: Any) -> OpenAIBackend:
    return OpenAIBackend("m", server.url, **{"backoff": 0.01, "timeout": 5.0, **settings})


def answer(engine: OpenAIBackend, one: Request) -> Answer:
    ((_, found),) = engine.answer([(0, one)])
    return found


def fixed(text: str, **settings: Any) -> Callable[[Body, int], Body]:
    return lambda body, _: completion(text, body, **settings)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no response: the client's own."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


# -- what is sent and read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "asked", "sent"),
    [
        (
            {"extra": {"seed": None, "temperature": None, "user": "me"}},
            {"temperature": 0.7},
            {"max_tokens": 256, "user": "me"},
        ),
        ({}, {"temperature": 0.7, "seed": 11}, {"max_tokens": 256, "temperature": 0.7, "seed": 11}),
        ({}, {"stop": "\n", "log_probability": True, "max_tokens": 33},
         {"max_tokens": 33, "temperature": 0.0, "stop": ["\n"], "logprobs": True}),
        (
            {"extra": {"chat_template_kwargs": {"think": False}}, "length_key": "max_completion_tokens"},
            {"max_tokens": 5},
            {"max_completion_tokens": 5, "temperature": 0.0, "chat_template_kwargs": {"think": False}},
        ),
    ],
)  # fmt: skip
def test_the_keys_of_a_call(settings: dict[str, Any], asked: dict[str, Any], sent: dict[str, Any]) -> None:
    with serving(fixed("x")) as server:
        answer(backend(server, **settings), request(**asked))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "rank these"}]
    assert server.bodies == [{"model": "m", "messages": messages, **sent}]


@pytest.mark.parametrize("prefill", ["none", "vllm", "last_message"])
def test_first_reads_the_step_behind_the_given_beginning(prefill: str) -> None:
    top = {" B": -0.5, "B": -1.5, "A": -1.0, "x": -0.2, "C": -9999.0}
    opening = [step("[", {"[": -0.1, "A": -0.3})] if prefill == "none" else []
    with serving(fixed("", logprobs=[*opening, step("x", top), step("]", {"D": -0.1})])) as server:
        found = answer(backend(server, prefill=prefill), request(decoding="first", before="["))
    # The larger of " B" and "B"; C is minus infinity, D was not reported.
    assert found.logits == {"B": -0.5, "A": -1.0} and found.text == "B"
    body = server.bodies[0]
    assert body["logprobs"] is True and body["top_logprobs"] == 20
    if prefill == "none":
        assert body["messages"][-1]["role"] == "user" and body["max_tokens"] >= 2
    else:
        assert body["messages"][-1] == {"role": "assistant", "content": "["} and body["max_tokens"] == 1
        assert body.get("continue_final_message") == (True if prefill == "vllm" else None)
        assert body.get("add_generation_prompt") == (False if prefill == "vllm" else None)


def test_first_where_a_step_does_not_tell() -> None:
    asked = request(decoding="first", before="[")
    otherwise = [step("Sure", {"Sure": -0.1, "A": -0.2}), step(",", {"B": -0.2})]
    with serving(fixed("Sure,", logprobs=otherwise)) as server:
        assert answer(backend(server), asked).logits == {}
    with serving(fixed("A")) as server, pytest.raises(UsageError, match="no log-probabilities") as caught:
        answer(backend(server), asked)
    assert "decoding: generate works" in str(caught.value.fix)
    told_once = iter([[step("A", {"A": -1.0})], None])
    with serving(lambda body, _: completion("A", body, logprobs=next(told_once))) as server:
        engine = backend(server)
        assert answer(engine, request("first", decoding="first")).logits == {"A": -1.0}
        assert answer(engine, request("second", decoding="first")).logits == {}
    numbers = tuple(str(number) for number in range(1, 21))
    with serving(fixed("1")) as server, pytest.raises(UsageError, match="cannot tell '1' from '10'"):
        answer(backend(server), request(decoding="first", identifiers=numbers))
    assert server.bodies == []


@pytest.mark.parametrize("constraint", ["vllm", "llama_cpp"])
def test_constrained_asks_for_one_identifier_after_the_other(constraint: str) -> None:
    def last(body: Body, _: int) -> Body:
        # Held to the words given, the server answers with the last of them.
        if constraint == "vllm":
            words = body["structured_outputs"]["choice"]
        else:
            words = re.findall(r'"(\w+)"', body["grammar"])
        return completion(words[-1], body)

    with serving(last) as server:
        engine = backend(server, constraint=constraint, prefill="vllm" if constraint == "vllm" else "last_message")
        one = request(decoding="constrained", before="[")
        found = answer(engine, one)
    assert found.text == "D] > [C] > [B] > [A]"
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["[", "[D] > [", "[D] > [C] > ["]
    assert found.usage.calls == 3 and found.usage.answer == 3
    assert engine.longest(one).calls == 3


def test_constrained_needs_to_be_told_how_and_a_server_that_ignores_it_is_found_out() -> None:
    nowhere = "http://127.0.0.1:9/v1"
    with pytest.raises(UsageError, match="nothing says how this server is held"):
        OpenAIBackend("m", nowhere).check("constrained")
    with pytest.raises(UsageError, match="needs `prefill`"):
        OpenAIBackend("m", nowhere, constraint="vllm").check("constrained")
    with serving(fixed("Sure! A")) as server:
        engine = backend(server, constraint="vllm", prefill="vllm")
        with pytest.raises(RankdistillError, match="where it was held to A, B, C, D"):
            answer(engine, request(decoding="constrained", before="["))


# -- a server that misbehaves -----------------------------------------------------------------------------------------


def stall(body: Body, _: int) -> None:
    time.sleep(1.0)


FAULTS: dict[str, Callable[[Body, int], Any]] = {
    "fails": lambda *_: failure(500, "oops"),
    "is overloaded": lambda *_: failure(503),
    "cuts the connection": lambda *_: None,
    "sends half a text": lambda *_: (200, {}, b'{"choices": [{"mess'),
    "sends no choices": lambda *_: (200, {}, b'{"object": "chat.completion", "choices": []}'),
    "sends a page": lambda *_: (200, {"Content-Type": "text/html"}, b"<html>busy</html>"),
    "sends nothing": lambda *_: (200, {}, b""),
    "is busy": lambda *_: failure(429, "slow down", {"Retry-After": "0"}),
    "stalls": stall,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_client_survives_a_server_that(fault: str, tmp_path: Path) -> None:
    """Every third call goes wrong, the first two of them: all prompts are answered, each paid once."""

    def respond(body: Body, number: int) -> Any:
        return FAULTS[fault](body, number) if number < 2 or number % 3 == 0 else completion("fine", body)

    with serving(respond) as server:
        engine = backend(server, timeout=0.2 if fault == "stalls" else 5.0, concurrency=2, retries=12)
        budget = Budget()
        asked = [(number, request(f"prompt {number}")) for number in range(5)]
        found = dict(ask(engine, asked, AnswerCache(tmp_path), budget))
        assert {number: one.text for number, one in found.items()} == dict.fromkeys(range(5), "fine")
        assert budget.spent.calls == 5 < len(server.bodies)


@pytest.mark.parametrize("fault", ["fails", "cuts the connection", "sends a page", "sends half a text", "is busy"])
def test_retries_are_bounded(fault: str) -> None:
    with serving(FAULTS[fault]) as server:
        started = time.monotonic()
        with pytest.raises(RankdistillError, match=r"\(3 tries\)") as caught:
            answer(backend(server, retries=2), request())
        assert len(server.bodies) == 3 and time.monotonic() - started < 5
    assert caught.value.exit_code == 1 and "answers so far are kept" in str(caught.value.fix)


def test_pauses_grow_or_are_those_that_the_server_asks_for() -> None:
    with serving(FAULTS["fails"]) as server, pytest.raises(RankdistillError):
        answer(backend(server, retries=3, backoff=0.08), request())
    pauses = [after - before for before, after in zip(server.times, server.times[1:])]
    for pause, least in zip(pauses, (0.08, 0.16, 0.32), strict=True):
        assert 0.75 * least <= pause < least + 1
    waits = iter([failure(429, "slow", {"Retry-After": "0.6"}), failure(429, "tomorrow", {"Retry-After": "86400"})])
    with serving(lambda *_: next(waits)) as server:
        with pytest.raises(RankdistillError, match=r"tomorrow.*86400 seconds"):  # beyond reason: an error at once
            answer(backend(server), request())
        assert len(server.times) == 2 and 0.6 <= server.times[1] - server.times[0] < 3


@pytest.mark.parametrize(
    ("status", "message", "fix"),
    [
        (400, "no such thing", "model, base_url, prefill and extra"),
        (400, "Unsupported value: 'temperature' does not support 0.0", "extra: {temperature: 1}"),
        (400, "'max_tokens' is not supported, use 'max_completion_tokens'", "length_key"),
        (400, "unknown parameter: 'seed'", "extra: {seed: null}"),
        (400, "seed: Extra inputs are not permitted", "extra: {seed: null}"),
        (400, "Unknown parameter: 'top_logprobs'", "decoding: generate"),
        (400, "System role not supported", "without `system`"),
        (422, "chat_template_kwargs is not a parameter here", "extra of the backend without chat_template_kwargs"),
        (200, "'temperature' is not supported with this model", "{temperature: null}"),
        (401, "who are you", "name the variable"),
        (404, "no such model", "model, base_url"),
        (422, "unexpected field", "extra"),
        (429, "insufficient_quota", "account"),
    ],
)
def test_what_another_try_would_not_mend_is_not_tried_again(status: int, message: str, fix: str) -> None:
    with serving(lambda *_: failure(status, message)) as server:
        extra = {"chat_template_kwargs": {"enable_thinking": False}}
        with pytest.raises(RankdistillError, match=message) as caught:
            answer(backend(server, extra=extra, retries=3 * (status != 200)), request())
        assert len(server.bodies) == 1 and fix in str(caught.value.fix)


def test_no_server_at_all() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(RankdistillError, match="cannot be reached"):
        answer(OpenAIBackend("m", url, retries=1), request())


def test_answers_under_way_are_handed_on_when_one_fails() -> None:
    gate = threading.Event()

    def respond(body: Body, _: int) -> Any:
        if body["messages"][-1]["content"] == "bad":
            gate.set()
            return failure(404, "no such model")
        gate.wait(5)
        time.sleep(0.1)
        return completion("good", body)

    asked = [(0, request("good one")), (1, request("bad")), (2, request("good two")), (3, request("never asked"))]
    got = []
    with serving(respond) as server, pytest.raises(RankdistillError, match="no such model"):
        for number, _ in backend(server, concurrency=3).answer(asked):
            got.append(number)
    assert sorted(got) == [0, 2] and len(server.bodies) == 3


# -- a prompt that is refused -----------------------------------------------------------------------------------------


def refusing(words: str, status: int = 400) -> Callable[[Body, int], Any]:
    return lambda body, _: (
        failure(status, words) if "bad" in body["messages"][-1]["content"] else completion("good", body)
    )


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "The response was filtered due to the prompt triggering content management policy (content_filter)"),
        (403, "Your input was flagged by moderation"),
        (400, "This model's maximum context length is 8192 tokens"),
        (400, "something else, about this prompt alone"),
        (422, "no reason"),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_refused_prompt_is_handed_on_and_the_others_go_on(
    status: int, words: str, concurrency: int, tmp_path: Path
) -> None:
    asked = [(0, request("bad")), *((number, request(f"prompt {number}")) for number in range(1, 5))]
    with serving(refusing(words, status)) as server:
        cache = AnswerCache(tmp_path)
        found = dict(ask(backend(server, concurrency=concurrency), asked, cache, Budget("10calls")))
        assert {number for number, one in found.items() if one.refused} == {0} and words in found[0].refused
        assert all(found[number].text == "good" for number in range(1, 5))
        assert len(cache) == 4, "a refusal is no answer: it is asked again"


def test_settings_that_no_prompt_passes_with_are_an_error_after_three() -> None:
    with serving(refusing("unknown field")) as server, pytest.raises(RankdistillError, match="unknown field"):
        list(backend(server, concurrency=1).answer((number, request(f"bad {number}")) for number in range(99)))
    assert len(server.bodies) == 3


def test_a_refusal_in_a_body_with_status_200() -> None:
    blocked = {"error": {"message": "blocked by content policy", "code": "content_filter"}}
    with serving(lambda *_: blocked) as server:
        assert "content_filter" in answer(backend(server), request()).refused and len(server.bodies) == 1


# -- bodies of any shape ----------------------------------------------------------------------------------------------


def says(content: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content}}


def told(*steps: Any) -> dict[str, Any]:
    return {"logprobs": {"content": steps}}


CACHED = {"prompt_tokens": 50, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 40}}
THOUGHT = [{"type": "thinking", "thinking": "A?"}, {"type": "text", "text": "[2] > [1]"}]


@pytest.mark.parametrize(
    ("choice", "usage", "expected"),
    [
        ({"finish_reason": "length"}, CACHED, {"finished": False, "usage": (50, 3, 40)}),
        *(({}, usage, {"usage": None}) for usage in (3, [], {}, {"prompt_tokens": "7"}, {"prompt_tokens": -1})),
        (says(THOUGHT), CACHED, {"text": "[2] > [1]"}),
        (says([{"type": "text", "text": "[2]"}, {"type": "output_text", "text": " > [1]"}]), 0, {"text": "[2] > [1]"}),
        (says(["[2] >", " [1]"]), 0, {"text": "[2] > [1]"}),
        (says({"type": "text", "text": "[2]"}), 0, {"text": "[2]"}),
        (says([{"type": "reasoning", "text": "[1]"}, {"type": "text", "text": None}]), 0, {"text": ""}),
        (says([]), 0, {"text": ""}),
        (says(None), 0, {"text": ""}),
        (told({"token": "A", "logprob": -0.5, "top_logprobs": None}), 0, {"steps": (("A", [("A", -0.5)]),)}),
        (told({"token": "A", "logprob": None, "top_logprobs": [{"token": "B", "logprob": -1}]}), 0,
         {"steps": (("A", [("B", -1.0)]),)}),
        (told({"token": None, "logprob": -1, "top_logprobs": [None, 3, {"token": "C"}]}), 0, {"steps": (("", []),)}),
        (told(None, {"token": "A", "logprob": -0.25}), 0, {"steps": (("", []), ("A", [("A", -0.25)]))}),
        (told({"token": "A", "logprob": float("nan"), "top_logprobs": "no"}), 0, {"steps": (("A", []),)}),
        ({"logprobs": {"content": None}}, 0, {}),
        ({"logprobs": None}, 0, {}),
        ({"logprobs": "no"}, 0, {}),
    ],
)  # fmt: skip
def test_what_is_read_of_a_reply(choice: dict[str, Any], usage: Any, expected: dict[str, Any]) -> None:
    """Parts of other shapes count as absent."""
    body = completion("x", {"model": "m", "messages": []}) | ({"usage": usage} if usage != 0 else {})
    body["choices"][0] |= choice
    plain = Reply("x", True, (), (50, 3, 40) if usage == CACHED else (0, 1, 0))
    assert read_reply(json.dumps(body).encode()) == replace(plain, **expected)


def test_tokens_that_are_not_told_are_estimated() -> None:
    with serving(lambda body, _: completion("yes and no", body) | {"usage": None}) as server:
        engine = backend(server)
        usage = answer(engine, request("word " * 50)).usage
    assert usage == Usage(engine.count_tokens(request("word " * 50)), 3, estimated=1) and usage.prompt > 50


@pytest.mark.parametrize(
    "body",
    [
        b"null", b"3", b'"text"', b"[[]]", b'{"choices": null}', b'{"choices": {"0": 1}}', b'{"choices": [null]}',
        b'{"choices": ["x"]}', b'{"choices": [{"message": "x"}]}', b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": [[1]]}}]}', b"[" * 100_000, b"\xff\xfe\x00", b"1" * 5000,
    ],
)  # fmt: skip
def test_a_body_of_another_shape_is_tried_again(body: bytes) -> None:
    with serving(lambda sent, number: (200, {}, body) if number == 0 else completion("fine", sent)) as server:
        assert answer(backend(server), request()).text == "fine"
    with serving(lambda *_: (200, {}, body)) as server, pytest.raises(RankdistillError, match=r"\(2 tries\)") as caught:
        answer(backend(server, retries=1), request())
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "the model is loading", "code": 503}}', "the model is loading (503)"),
        (b'{"error": "out of credit"}', "out of credit"),
        (b'{"detail": "not found here"}', "not found here"),
        (b"<html><body><h1>Sign in to the proxy</h1></body></html>", "Sign in to the proxy"),
        (b'{"error": {"message": "half a pair \\ud800 \\u001b[31m"}}', "half a pair \ufffd \ufffd[31m"),
    ],
)
def test_the_servers_words_are_in_the_error(body: bytes, words: str) -> None:
    with serving(lambda *_: (200, {}, body)) as server, pytest.raises(RankdistillError) as caught:
        answer(backend(server, retries=0), request())
    assert words in caught.value.what
    caught.value.what.encode("utf-8")


# -- what answers and scores are kept by ------------------------------------------------------------------------------


def test_what_decides_scores_and_what_decides_answers(tmp_path: Path) -> None:
    from causal_lm import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "one")
    make_tokenizer("other words here").save_pretrained(tmp_path / "two")

    def of(**settings: Any) -> OpenAIBackend:
        return OpenAIBackend(**{"model": "m", "base_url": "http://a/v1", **settings})

    same = [of(), of(base_url="http://b/v1"), of(key="K"), of(concurrency=2), of(timeout=1.0), of(retries=0)]
    few, one, two = of(logprobs=2), of(tokenizer=str(tmp_path / "one")), of(tokenizer=str(tmp_path / "two"))
    other = [of(model="n"), of(revision="2026"), of(prefill="vllm"), of(constraint="vllm"), of(extra={"top_p": 0.5})]
    prints = [engine.fingerprint() for engine in (same[0], few, one, two, *other)]
    assert len({engine.fingerprint() for engine in same}) == 1 and len(set(prints)) == len(prints)
    text, first = request(), request(decoding="first")
    # A tokenizer cuts passages, which stand in the prompt; logprobs are asked for in one step alone.
    assert len({engine.answer_key(text) for engine in (same[0], few, one, two)}) == 1
    assert same[0].answer_key(first) == one.answer_key(first) != few.answer_key(first)


# -- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    errors = []

    def respond(body: Body, number: int) -> Any:
        if number == 0:
            return completion("fine", body)
        # Servers do repeat what they were sent.
        return failure(401 if number == 1 else 500, f"bad key {SECRET}; you sent Authorization: Bearer {SECRET}")

    with serving(respond) as server:
        engine = backend(server, key="MY_KEY", retries=1)
        cache = AnswerCache(tmp_path / engine.fingerprint())
        list(ask(engine, [(0, request("one"))], cache, Budget()))
        assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
        for text in ("two", "three"):
            with pytest.raises(RankdistillError) as caught:
                list(ask(engine, [(0, request(text))], cache, Budget()))
            errors.append(caught.value)
    assert "MY_KEY" in str(errors[0].fix) and "bad key ***" in errors[0].what
    assert engine.describe()["key"] == "MY_KEY"
    written = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    chained = [str(link) for error in errors for link in (error, error.__cause__, error.__dict__)]
    output = capsys.readouterr()
    logged = [record.getMessage() for record in caplog.records]
    everything = [*written, *chained, engine.fingerprint(), json.dumps(engine.describe()), output.out, output.err]
    assert written and not [text for text in [*everything, *logged] if SECRET in text]
    monkeypatch.setenv("MY_KEY", "another")
    assert backend(server, key="MY_KEY").fingerprint() == engine.fingerprint()


def test_another_server_is_not_sent_the_hosted_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(fixed("x")) as server:
        answer(backend(server), request())
        assert SECRET not in json.dumps(server.headers)
        answer(backend(server, key="OPENAI_API_KEY"), request())
        assert SECRET in server.headers[-1]["authorization"]


def test_a_missing_variable_and_a_key_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        answer(OpenAIBackend("gpt"), request())
    for settings, word in (
        ({"key": SECRET}, "not the key"),
        ({"base_url": f"https://user:{SECRET}@host/v1"}, "password"),
        ({"base_url": f"https://host/v1?key={SECRET}"}, "query"),
    ):
        with pytest.raises(UsageError, match=word) as caught:
            OpenAIBackend("gpt", **settings)  # type: ignore[arg-type]
        assert SECRET not in str(caught.value)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_recipe_finds_it_and_names_wrong_keys() -> None:
    settings = {"type": "openai", "model": "m", "base_url": "http://localhost:1/v1"}
    assert isinstance(build("backend", settings), OpenAIBackend)
    for wrong, message in (
        ({"api_key": "x"}, "unknown key 'api_key'"),
        ({"concurrency": 0}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"),
        ({"base_url": "localhost:8000"}, "begins with http"),
    ):
        with pytest.raises(UsageError, match=message):
            build("backend", {**settings, **wrong})


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises((RankdistillError, ModuleNotFoundError)) as caught:
        answer(OpenAIBackend("m", "http://127.0.0.1:9/v1"), request())
    assert "rankdistill[llm]" in str(caught.value)


def test_tokens_are_counted_by_the_models_tokenizer(tiny_causal_lm: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
    engine = OpenAIBackend("m", "http://127.0.0.1:9/v1", tokenizer=str(tiny_causal_lm))
    one = request("which metal is a document")
    expected = tokenizer.apply_chat_template(list(one.messages), add_generation_prompt=True, return_dict=True)
    assert engine.count_tokens(one) == len(expected["input_ids"])
    assert engine.count_text(["which metal", ""]) == [len(tokenizer("which metal")["input_ids"]), 0]


# -- transformers serve -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_server(tiny_causal_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with a small model made here, on a free port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1800):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(log.read_text())
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_transformers_serve_answers_as_the_model_does(
    transformers_server: str, tiny_causal_lm: Path, tmp_path: Path
) -> None:
    """Greedy answers through the server are those of the same model in this process."""
    local = build("backend", {"type": "transformers", "model": str(tiny_causal_lm), "precision": "fp32"})
    engine = OpenAIBackend(
        str(tiny_causal_lm), transformers_server, concurrency=2, tokenizer=str(tiny_causal_lm), timeout=60.0
    )
    asked = [(n, request(f"rank the passage about {word}", max_tokens=12)) for n, word in enumerate(("gas", "tree"))]
    served = dict(ask(engine, asked, AnswerCache(tmp_path), Budget()))
    expected = dict(local.answer(asked))
    for number, one in asked:
        assert served[number].text == expected[number].text and served[number].text
        assert served[number].usage.prompt == expected[number].usage.prompt == engine.count_tokens(one)
        assert served[number].finished == expected[number].finished


def test_what_transformers_serve_does_not_do_is_said(transformers_server: str, tiny_causal_lm: Path) -> None:
    engine = OpenAIBackend(str(tiny_causal_lm), transformers_server, timeout=60.0)
    with pytest.raises(UsageError, match="no log-probabilities"):
        answer(engine, request(decoding="first", before="["))
    engine = OpenAIBackend(str(tiny_causal_lm), transformers_server, prefill="vllm", timeout=60.0)
    with pytest.raises(RankdistillError, match=r"answered 422: .*continue_final_message"):
        answer(engine, request(before="["))
