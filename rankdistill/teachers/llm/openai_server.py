"""Any server that speaks OpenAI's chat protocol: hosted, vLLM, SGLang, llama.cpp, `transformers serve`."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError, require
from rankdistill.plain import shown
from rankdistill.students.models import resolve_model
from rankdistill.teachers.llm.answers import identifier_logits
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage
from rankdistill.teachers.llm.chat import load_tokenizer, separators

HOSTED = "https://api.openai.com/v1"
HOSTED_KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 120.0  # seconds that a server may ask for; more is an error at once
LONGEST_PAUSE = 60.0  # seconds between two tries, where the server names no time
UNREADABLE = "unreadable"  # a response's extension: what is wrong with a body that came with status 200
STEP_TOKENS = 8  # of one identifier
TRIED = 3  # prompts that are refused before any is answered: then it is taken for the settings
OF_PROMPT = re.compile(
    r"content[ _-]?(filter|policy|management)|content_filtered|moderation|flagged|safety|guardrail|usage polic"
    r"|context[ _]length|context window|too long|too large|maximum context|prompt.{0,20}(block|reject)",
    re.IGNORECASE,
)
# A server's words about a key of the call → what to do about it.
SETTINGS = {
    "temperature": "this model takes its own temperature only: temperature: 1 of a listwise teacher, or of the backend "
    "extra: {temperature: 1}, or {temperature: null}, which leaves it out",
    r"seed\b": "extra: {seed: null} of the backend, which leaves it out",
    "max_tokens|max_completion_tokens": "length_key of the backend: max_completion_tokens (or max_tokens), and "
    "max_tokens of the teacher",
    "(top_)?logprobs": "a smaller `logprobs` of the backend, or decoding: generate",
    "continue_final_message|add_generation_prompt|prefill": "another `prefill` of the backend, or none",
    "structured_outputs|guided|grammar": "another `constraint` of the backend, or decoding: generate",
    "system (role|message)|role.{0,9}system": "a prompt file of your own without `system`",
}
LOOK = "look at the backend's model, base_url, prefill and extra"
# `constraint` → the keys of a call that hold the answer to one of these words.
HELD_TO: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "vllm": lambda words: {"structured_outputs": {"choice": words}},
    # Its likeliest token may begin with a space, as in process.
    "llama_cpp": lambda words: {"grammar": f'root ::= " "? ({" | ".join(map(json.dumps, words))})'},
}


class Refused(RankdistillError):
    """The server refuses a call as it is (400, 413, 422): for its prompt, where its words speak of one, or for settings
    that all calls share."""

    of_prompt = False


@dataclass(eq=False)
class OpenAIBackend(Backend):
    """A server that speaks OpenAI's chat protocol.

    A prompt's beginning of the answer ("[") is put into the server's mouth with `prefill`. Without it `first` reads
    the probabilities behind that text in the answer's first tokens, and of a model that begins otherwise there are
    none. `constrained` asks for one identifier after the other out of those that are left, one call each.

    Args:
        model: the name by which the server knows the model.
        base_url: the server's address, up to and with `/v1`.
        key: the *name* of the environment variable that holds the key; OPENAI_API_KEY for api.openai.com, and none
            for another server. A key itself stands in no recipe, manifest, message or log.
        revision: anything that tells two models of one name apart (a date, a commit): part of what answers are kept by.
        concurrency: calls at the same time.
        timeout: seconds without a byte from the server until a try is given up.
        retries: tries after the first, where the server fails, stalls, answers in pieces or is busy (429).
        backoff: seconds before the first retry; doubled each time, with jitter, unless the server names a time.
        logprobs: how many probabilities of a step to ask for (servers limit it, most to 20).
        prefill: how the server is made to go on from a given beginning: `vllm` (also SGLang: continue_final_message),
            `last_message` (llama.cpp: a last message by the assistant is gone on from), `none`.
        constraint: how the server is held to given words: `vllm` (structured_outputs), `llama_cpp` (a grammar), `none`.
        tokenizer: folder or hub name of the model's tokenizer, to count tokens; estimated without it.
        extra: more keys for the body of each call, e.g. {chat_template_kwargs: {enable_thinking: false}}; a key that is
            null is left out of it, where a server does not take it: {seed: null}.
        length_key: what the server calls the limit of an answer's tokens.
    """

    type: ClassVar[str] = "openai"
    decodings = frozenset({"generate", "first", "constrained"})

    model: str
    base_url: str = HOSTED
    key: str | None = None
    revision: str = ""
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 0.5
    logprobs: int = 20
    prefill: Literal["none", "vllm", "last_message"] = "none"
    constraint: Literal["none", "vllm", "llama_cpp"] = "none"
    tokenizer: str | None = None
    extra: dict[str, Any] | None = None
    length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UsageError("the address of a server begins with http:// or https://", where="backend.base_url")
        if address.username or address.password or address.query:
            raise UsageError(
                "the server's address holds a user, a password or a query, which would be written to manifests",
                where="backend.base_url",
                fix="put the key into an environment variable and its name into `key`",
            )
        if self.key is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", self.key):
            # Not shown: it may be the key itself.
            raise UsageError(
                "`key` is the name of an environment variable, not the key",
                where="backend.key",
                fix=f"key: {HOSTED_KEY}",
            )
        self.extra = dict(self.extra or {})
        self._sent = {name: value for name, value in self.extra.items() if value is not None}
        self._answered = self._has_logprobs = False  # this server has given an answer, log-probabilities
        self._failed = False  # a call has: those under way come in, but are not made again

    # -- what it is ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Of the model's name and revision and of what changes answers or prompts; the server's address does not."""
        tokenizer = resolve_model(self.tokenizer).revision if self.tokenizer is not None else None
        return fingerprint([self.answered_by(), tokenizer, self.logprobs])

    def answered_by(self) -> str:
        """Without what changes prompts alone: an answer stays paid for when only the tokenizer is another."""
        return fingerprint([self.type, self.model, self.revision, self.prefill, self.constraint, self.extra])

    def answer_key(self, request: Request) -> str:
        by = self.answered_by()
        return request.key(fingerprint([by, self.logprobs]) if request.decoding == "first" else by)

    def describe(self) -> dict[str, Any]:
        """The settings; of the key the variable's name alone."""
        names = ("type", "model", "revision", "base_url", "prefill", "constraint", "logprobs", "tokenizer", "extra")
        return {**{name: getattr(self, name) for name in names}, "key": self._variable}

    def check(self, decoding: str) -> None:
        """`constrained` needs the recipe to say how this server does it."""
        super().check(decoding)
        if decoding == "constrained" and self.constraint == "none":
            raise UsageError(
                "nothing says how this server is held to given words, so decoding: constrained cannot be done",
                where="backend.constraint",
                fix="constraint: vllm (structured outputs) or llama_cpp (grammar); or decoding: generate or first",
            )
        if decoding == "constrained" and self.prefill == "none":
            raise UsageError(
                "decoding: constrained goes on from the identifiers given so far, so this server needs `prefill`",
                where="backend.prefill",
                fix="prefill: vllm, or last_message for llama.cpp",
            )

    # -- tokens -------------------------------------------------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(resolve_model(self.tokenizer).path) if self.tokenizer is not None else None

    def count_text(self, texts: Sequence[str]) -> list[int]:
        if self._tokenizer is None or not texts:
            return super().count_text(texts)
        return [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def count_tokens(self, request: Request) -> int:
        """Tokens of the prompt: by the tokenizer and its chat template, else four characters a token."""
        if self._tokenizer is not None and getattr(self._tokenizer, "chat_template", None):
            messages = [dict(message) for message in request.messages]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.count_text([text + request.before])[0]
        contents = [message["content"] for message in request.messages] + [request.before]
        return sum(self.count_text(contents)) + 4 * len(request.messages)

    def longest(self, request: Request) -> Usage:
        prompt, steps = self.count_tokens(request), len(request.identifiers)
        if request.decoding == "constrained":
            calls = max(steps - 1, 0)
            given = 4 * steps * calls // 2  # what was answered is part of the next prompt
            return Usage(prompt * calls + given, STEP_TOKENS * calls, calls=calls)
        return Usage(prompt, self._most_tokens(request))

    def _most_tokens(self, request: Request) -> int:
        """Of an answer; of a `first` one, and those of the given beginning where the model has to say it itself."""
        if request.decoding != "first":
            return request.max_tokens
        return 1 if self.prefill != "none" or not request.before else 1 + len(request.before.strip()) + 1

    # -- asking -------------------------------------------------------------------------------------------------------

    @property
    def _variable(self) -> str | None:
        hosted = urlsplit(self.base_url).hostname == urlsplit(HOSTED).hostname
        return self.key or (HOSTED_KEY if hosted else None)

    @property
    def _secret(self) -> str:
        return os.environ.get(self._variable or "", "").strip()

    @cached_property
    def _client(self) -> Any:
        openai: Any = require("openai", extra="llm", why="a teacher behind an OpenAI-compatible server")
        if self._variable is not None and not self._secret:
            raise UsageError(
                f"the environment variable {self._variable} is not set",
                where="backend.key",
                fix=f"export {self._variable}=..., or name the variable that holds the key: key: NAME",
            )
        return openai.OpenAI(
            api_key=self._secret or "none",  # the client wants some text; no key of another service is sent
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._look]}),
        )

    def _look(self, response: Any) -> None:
        """Tell the client, which retries by a response's status and headers, what it would not see."""
        response.read()
        hopeless = response.status_code == 429 and b"insufficient_quota" in response.content
        with suppress(ValueError):  # none, or a date, at which newer clients look themselves
            hopeless |= float(response.headers.get("retry-after", "")) > LONGEST_WAIT
        if response.status_code == 200:
            try:
                read_reply(response.content)
            except Unreadable as error:  # anything may be sent with status 200
                response.extensions[UNREADABLE] = error
                response.status_code = 502
                hopeless = error.said and bool(OF_PROMPT.search(str(error)))
        if hopeless or self._failed:
            response.headers["x-should-retry"] = "false"
        elif response.status_code != 200 and "retry-after" not in response.headers:
            pause = min(LONGEST_PAUSE, self.backoff * 2.0 ** (tries_of(response.request) - 1))
            response.headers["retry-after-ms"] = f"{1000 * pause * random.uniform(0.75, 1):.0f}"

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answer with `concurrency` calls at a time; what is under way when one fails is still handed on."""
        client = self._client
        results: SimpleQueue[tuple[int, Answer | BaseException]] = SimpleQueue()
        source: Iterator[tuple[int, Request]] | None = iter(requests)
        failure: BaseException | None = None
        self._failed = False
        under_way = 0
        refusals: list[tuple[int, Refused]] = []  # of prompts, or of settings: not known before one is answered

        def work(number: int, request: Request) -> None:
            try:
                results.put((number, self._answer(client, request)))
            except BaseException as error:
                results.put((number, error))

        while True:
            while source and failure is None and under_way < self.concurrency and len(refusals) < TRIED:
                item = next(source, None)
                if item is None:
                    source = None
                else:
                    self._check_request(item[1])
                    # Daemons: Ctrl-C does not wait for a server that stalls.
                    threading.Thread(target=work, args=item, daemon=True).start()
                    under_way += 1
            if not under_way:
                break
            number, result = results.get()
            under_way -= 1
            if isinstance(result, Refused):
                refusals.append((number, result))
            elif isinstance(result, BaseException):
                failure, self._failed = failure or result, True
            else:
                self._answered = True
                yield number, result
            if refusals and (self._answered or refusals[0][1].of_prompt):
                yield from ((number, Answer("", refused=refusal.what)) for number, refusal in refusals)
                refusals.clear()
        if failure is not None or refusals:
            raise failure or refusals[0][1]

    def _check_request(self, request: Request) -> None:
        self.check(request.decoding)
        names = sorted(request.identifiers) if request.decoding != "generate" else []
        for name, following in pairwise(names):
            if following.startswith(name):
                raise UsageError(
                    f"one step cannot tell {name!r} from {following!r} on a server whose tokens are not known",
                    where=f"teacher.decoding: {request.decoding}",
                    fix="a prompt with letters as identifiers, or decoding: generate",
                )

    def _answer(self, client: Any, request: Request) -> Answer:
        if request.decoding == "constrained":
            return self._one_by_one(client, request)
        reply = self._call(client, request)
        return self._first(request, reply) if request.decoding == "first" else self._text(request, reply)

    def _text(self, request: Request, reply: Reply) -> Answer:
        text = reply.text
        # The answer is what follows the given beginning, whether the server repeats it, was given it or neither.
        if request.before and text.lstrip().startswith(request.before.strip()):
            text = text.lstrip()[len(request.before.strip()) :]
        told = [values[-1][1] for _, values in reply.steps if values]  # the last is that of the token itself
        mean = max(sum(told) / len(told), -9999.0) if told else None
        return Answer(text, usage=self._usage(request, reply), finished=reply.finished, log_probability=mean)

    def _first(self, request: Request, reply: Reply) -> Answer:
        """Log-probabilities of the identifiers at the step behind the given beginning."""
        self._has_logprobs |= bool(reply.steps)
        if not self._has_logprobs:
            raise UsageError(
                "the server reports no log-probabilities, which decoding: first reads",
                where=self._where,
                fix="decoding: generate works with any server; constrained with `constraint: vllm` or `llama_cpp`",
            )
        opening = request.before.strip() if self.prefill == "none" else ""
        said = ""
        likeliest: Sequence[tuple[str, float]] = ()
        for token, tokens in reply.steps:
            if said.strip() == opening:
                likeliest = tokens
            said += token
            if said.strip() != opening and likeliest:
                break
        # -9999 is how some servers write minus infinity.
        values = [(token, logarithm) for token, logarithm in likeliest if logarithm > -9000]
        logits = identifier_logits(values, request.identifiers)
        best = max(logits, key=lambda name: logits[name], default="")
        return Answer(best, logits, self._usage(request, reply))

    def _one_by_one(self, client: Any, request: Request) -> Answer:
        """One identifier after the other, of those that are left; the last one needs no call."""
        left = list(request.identifiers)
        separator, end = separators(request.before)
        given: list[str] = []
        usage = Usage(calls=0)
        while len(left) > 1:
            said = request.before + "".join(f"{name}{separator}" for name in given)
            step = replace(request, before=said, max_tokens=STEP_TOKENS)
            reply = self._call(client, step, HELD_TO[self.constraint](left))
            name = self._text(step, reply).text.strip()
            if name not in left:
                raise RankdistillError(
                    f"the server answered {name[:40]!r} where it was held to {', '.join(left)}",
                    where=f"backend.constraint: {self.constraint}",
                    fix="this server does not honour that constraint: another `constraint`, or decoding: generate",
                )
            left.remove(name)
            given.append(name)
            usage += self._usage(step, reply)
        return Answer(separator.join([*given, *left]) + end, usage=usage)

    def _usage(self, request: Request, reply: Reply) -> Usage:
        if reply.usage is None:
            return Usage(self.count_tokens(request), self.count_text([reply.text])[0], estimated=1)
        return Usage(*reply.usage)

    # -- one call -----------------------------------------------------------------------------------------------------

    def _call(self, client: Any, request: Request, more: dict[str, Any] | None = None) -> Reply:
        """One call, which the client tries again within bounds; the error is the last failure, without the key."""
        import openai

        messages = [dict(message) for message in request.messages]
        more = {**self._sent, **(more or {})}
        if request.before and self.prefill != "none":
            messages.append({"role": "assistant", "content": request.before})
            if self.prefill == "vllm":
                more |= {"continue_final_message": True, "add_generation_prompt": False}
        one_step = request.decoding == "first"
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": request.temperature,
            self.length_key: self._most_tokens(request),
            "seed": request.seed if request.temperature > 0 else None,
            "stop": [request.stop] if request.stop else None,
            "logprobs": True if one_step or request.log_probability else None,
            "top_logprobs": self.logprobs if one_step else None,
            "extra_body": more or None,
        }
        left_out = (self.extra or {}).keys() - self._sent.keys()
        body = {name: value for name, value in body.items() if value is not None and name not in left_out}
        try:
            return read_reply(client.chat.completions.with_raw_response.create(**body).content)
        except openai.APIConnectionError as error:
            stalled = isinstance(error, openai.APITimeoutError)
            said = f"the server did not answer within {self.timeout:g} seconds" if stalled else ""
            failure = self._failure(said or f"the server cannot be reached: {error.__cause__ or error}", error.request)
        except openai.APIStatusError as error:
            unreadable = error.response.extensions.get(UNREADABLE)
            said = str(unreadable or f"the server answered {error.status_code}: {_words(error)}")
            failure = self._failure(said, error.request, error.response, unreadable)
        raise failure from None

    def _failure(
        self, said: str, request: Any, response: Any = None, unreadable: Unreadable | None = None
    ) -> RankdistillError:
        """The error of a call's last try.

        Args:
            said: what happened, in the server's words.
            response: None where none came.
        """
        status = response.status_code if response is not None else 0
        said = self._clean(said)
        of_prompt = bool(OF_PROMPT.search(said))
        extra = {rf"{re.escape(name)}\b": f"extra of the backend without {name}" for name in self._sent}
        fixes = [fix for words, fix in {**SETTINGS, **extra}.items() if re.search(rf"\b({words})", said, re.I)]
        if status in (400, 413, 422) or (of_prompt and (status == 403 or (unreadable and unreadable.said))):
            refused = Refused(said, where=self._where, fix="; ".join(fixes) or LOOK)
            refused.of_prompt = of_prompt and not fixes
            return refused
        fix = LOOK
        if status in (401, 403):
            name = self._variable
            fix = f"look at the environment variable {name}" if name else "name the variable with the key: key: NAME"
        elif status == 429 and b"insufficient_quota" in response.content:
            fix = "look at the account"
        elif status in (0, 408, 409, 429) or status >= 500:
            wait, tries = response.headers.get("retry-after") if status else None, tries_of(request)
            said += f" (try again in {wait} seconds)" if wait else ""
            said += f" ({tries} {'try' if tries == 1 else 'tries'})"
            fix = "; ".join(fixes) or (
                "answers so far are kept: run the same command again; `timeout`, `retries`, `backoff` and "
                "`concurrency` of the backend may help"
            )
        return RankdistillError(said, where=self._where, fix=fix)

    @property
    def _where(self) -> str:
        return f"backend: {self.model} at {self.base_url}"

    def _clean(self, text: str) -> str:
        """A server's words in one short line, without the key."""
        if len(self._secret) > 3:
            text = text.replace(self._secret, "***")
        return shown(" ".join(re.sub(r"(?i)bearer\s+\S+", "Bearer ***", text).split()), 300)


def tries_of(request: Any) -> int:
    """How often the client has made this request."""
    return int(request.headers.get("x-stainless-retry-count", 0)) + 1


def _words(error: Any) -> str:
    """What a server says of an error, and what it calls it: "content_filter"."""
    if not isinstance(error.body, dict):
        return str(error.body or error.message or "nothing")
    names = [name for key in ("code", "param") if isinstance(name := error.body.get(key), str) and name]
    words = error.body.get("message") or error.body.get("detail") or error.body
    return f"{words} ({', '.join(names)})" if names else str(words)


# ---------------------------------------------------------------------------------------------------------------------
# What a server sends


class Unreadable(ValueError):
    """A body with status 200 that is no chat completion: worth another try."""

    said = False  # the server calls it an error


@dataclass(frozen=True)
class Reply:
    """What of a chat completion is read."""

    text: str  # without what a model thought before it, where the server tells the two apart
    finished: bool  # False where the answer was cut at its longest
    steps: tuple[tuple[str, list[tuple[str, float]]], ...]  # token, likeliest tokens of its step, log-probabilities
    usage: tuple[int, int, int] | None  # tokens of prompt, of answer, and of the prompt from the cache


def read_reply(content: bytes) -> Reply:
    """A chat completion out of whatever a server sent, or `Unreadable` with the server's words."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        words = re.sub(r"<[^>]*>", " ", content[:4000].decode(errors="replace"))
        raise Unreadable(f"the server's answer is no JSON: {' '.join(words.split())[:200] or 'nothing'}") from None
    body = body if isinstance(body, dict) else {"": body}
    message = _at(body, dict, "choices", 0, "message")
    text = _content(message.get("content")) if message is not None else None
    if text is None or (not text and body.get("error")):
        said = body.get("error") or body.get("message") or body.get("detail")
        if isinstance(said, dict):
            code = said.get("code") or said.get("type")
            said = f"{said.get('message') or said}{f' ({code})' if code else ''}"
        what = f"an error: {said}" if said else f"no chat completion: {json.dumps(body)[:200]}"
        unreadable = Unreadable(f"the server's answer is {what}")
        unreadable.said = bool(said)
        raise unreadable
    return Reply(
        text,
        finished=_at(body, str, "choices", 0, "finish_reason") != "length",
        steps=tuple(map(_step, _at(body, list, "choices", 0, "logprobs", "content") or [])),
        usage=_tokens(body),
    )


def _at(value: Any, kind: Any, *keys: str | int) -> Any:
    """What stands there in a foreign body, or None where that is nothing, or of another kind."""
    for key in keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value if isinstance(value, kind) else None


def _content(content: Any) -> str | None:
    """A message's text: a string, or the text parts of a list (what a model thought is no part of its answer); None
    for what is neither."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            return None
        elif part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "".join(texts)


def _step(step: Any) -> tuple[str, list[tuple[str, float]]]:
    entries = [*(_at(step, list, "top_logprobs") or []), step]
    values = [(_at(entry, str, "token"), _at(entry, (int, float), "logprob")) for entry in entries]
    known = [(token, value) for token, value in values if token is not None and value is not None]
    return _at(step, str, "token") or "", [(token, float(value)) for token, value in known if abs(value) < 1e300]


def _tokens(body: Any) -> tuple[int, int, int] | None:
    """Of prompt, of answer, and of the prompt from the cache."""
    places = (("prompt_tokens",), ("completion_tokens",), ("prompt_tokens_details", "cached_tokens"))
    counts = [_at(body, (int, float), "usage", *place) for place in places]
    prompt, answer, cached = (int(count) if count is not None and 0 <= count < 2**40 else None for count in counts)
    return None if prompt is None else (prompt, answer or 0, min(cached or 0, prompt))
