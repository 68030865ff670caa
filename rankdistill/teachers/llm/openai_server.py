"""Any server that speaks OpenAI's chat protocol: hosted, vLLM, SGLang, llama.cpp, `transformers serve`."""

from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError, require
from rankdistill.students.models import resolve_model
from rankdistill.teachers.llm.answers import identifier_logits
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage, printable
from rankdistill.teachers.llm.chat import load_tokenizer, separators

HOSTED = "https://api.openai.com/v1"
HOSTED_KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 300.0  # seconds that a server may ask us to wait; longer is an error, not a sleep
LONGEST_PAUSE = 60.0  # seconds between two tries
AGAIN = (408, 409, 425, 429)  # and 500 and above: worth another try
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


class Refused(RankdistillError):
    """The server refuses a call as it is (400, 413, 422): for its prompt, or for settings that all calls share.

    Args:
        of_prompt: the server's words speak of the prompt.
    """

    def __init__(self, what: str, *, where: str, fix: str, of_prompt: bool) -> None:
        super().__init__(what, where=where, fix=fix)
        self.of_prompt = of_prompt


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

    def __init__(
        self,
        model: str,
        base_url: str = HOSTED,
        key: str | None = None,
        revision: str = "",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 0.5,
        logprobs: int = 20,
        prefill: Literal["none", "vllm", "last_message"] = "none",
        constraint: Literal["none", "vllm", "llama_cpp"] = "none",
        tokenizer: str | None = None,
        extra: dict[str, Any] | None = None,
        length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UsageError("the address of a server begins with http:// or https://", where="backend.base_url")
        if address.username or address.password or address.query:
            raise UsageError(
                "the server's address holds a user, a password or a query, which would be written to manifests",
                where="backend.base_url",
                fix="put the key into an environment variable and its name into `key`",
            )
        if key is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", key):
            # Not shown: it may be the key itself.
            raise UsageError(
                "`key` is the name of an environment variable, not the key",
                where="backend.key",
                fix=f"key: {HOSTED_KEY}",
            )
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("logprobs", logprobs, 1)):
            if value < least:
                raise UsageError(f"{name} is at least {least}", where=f"backend.{name}")
        if timeout <= 0 or backoff < 0:
            raise UsageError("timeout is above 0, backoff not below", where="backend.timeout, backend.backoff")
        self.model, self.base_url, self.key, self.revision = model, base_url, key, revision
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        self.logprobs, self.prefill, self.constraint = logprobs, prefill, constraint
        self.tokenizer, self.extra, self.length_key = tokenizer, dict(extra or {}), length_key
        self._answered = self._has_logprobs = False  # this server has given an answer, log-probabilities
        self._not_before = 0.0  # a rate limit holds for all calls, not for the one that met it
        self._jitter = random.Random()

    # -- what it is ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Of the model's name and revision and of what changes answers or prompts; the server's address does not."""
        tokenizer = resolve_model(self.tokenizer).revision if self.tokenizer is not None else None
        return fingerprint([self.answered_by(), tokenizer, self.logprobs])

    def answered_by(self) -> str:
        """Without what changes prompts alone: an answer stays paid for when only the tokenizer is another."""
        return fingerprint([self.type, self.model, self.revision, self.prefill, self.constraint, self.extra])

    def answer_key(self, request: Request) -> str:
        return request.key(
            fingerprint([self.answered_by(), self.logprobs]) if request.decoding == "first" else self.answered_by()
        )

    def describe(self) -> dict[str, Any]:
        """The settings; of the key the variable's name alone."""
        return {
            "type": self.type,
            "model": self.model,
            "revision": self.revision,
            "base_url": self.base_url,
            "key": self._variable,
            "prefill": self.prefill,
            "constraint": self.constraint,
            "logprobs": self.logprobs,
            "tokenizer": self.tokenizer,
            "extra": self.extra,
        }

    def check(self, decoding: str) -> None:
        """Refuse a decoding, and `constrained` where the recipe does not say how this server does it.

        Raises:
            UsageError: naming what works.
        """
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
        if self.tokenizer is None:
            return None
        return load_tokenizer(resolve_model(self.tokenizer).path)

    def count_text(self, texts: Sequence[str]) -> list[int]:
        if self._tokenizer is None:
            return super().count_text(texts)
        return (
            [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
        )

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
        return Usage(prompt, self._step_tokens(request) if request.decoding == "first" else request.max_tokens)

    def _step_tokens(self, request: Request) -> int:
        """Of a `first`: one, and those of the given beginning where the model has to say it itself."""
        return 1 if self.prefill != "none" or not request.before else 1 + len(request.before.strip()) + 1

    # -- asking -------------------------------------------------------------------------------------------------------

    @property
    def _variable(self) -> str | None:
        hosted = urlsplit(self.base_url).hostname == urlsplit(HOSTED).hostname
        return self.key or (HOSTED_KEY if hosted else None)

    def _secret(self) -> str:
        if self._variable is None:
            return "none"  # the client wants some text; no key of another service is sent
        secret = os.environ.get(self._variable, "").strip()
        if not secret:
            raise UsageError(
                f"the environment variable {self._variable} is not set",
                where="backend.key",
                fix=f"export {self._variable}=..., or name the variable that holds the key: key: NAME",
            )
        return secret

    @cached_property
    def _client(self) -> Any:
        openai = require("openai", extra="llm", why="a teacher behind an OpenAI-compatible server")
        return openai.OpenAI(api_key=self._secret(), base_url=self.base_url, timeout=self.timeout, max_retries=0)

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answer with `concurrency` calls at a time; what is under way when one fails is still handed on."""
        client = self._client
        results: SimpleQueue[tuple[int, Answer | BaseException]] = SimpleQueue()
        stop = threading.Event()
        source = iter(requests)
        failure: BaseException | None = None
        under_way, drawn_out = 0, False
        refusals: list[tuple[int, Refused]] = []  # of prompts, or of settings: not known before one is answered

        def work(number: int, request: Request) -> None:
            try:
                results.put((number, self._answer(client, request, stop)))
            except BaseException as error:
                results.put((number, error))

        try:
            while True:
                while failure is None and not drawn_out and under_way < self.concurrency and len(refusals) < TRIED:
                    item = next(source, None)
                    if item is None:
                        drawn_out = True
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
                    failure = failure or result
                    stop.set()  # no more tries
                else:
                    self._answered = True
                    yield number, result
                if refusals and (self._answered or refusals[0][1].of_prompt):
                    yield from ((number, Answer("", refused=refusal.what)) for number, refusal in refusals)
                    refusals.clear()
            if failure is not None or refusals:
                raise failure or refusals[0][1]
        finally:
            stop.set()

    def _check_request(self, request: Request) -> None:
        self.check(request.decoding)
        if request.decoding == "generate":
            return
        names = sorted(request.identifiers)
        for one, other in pairwise(names):
            if other.startswith(one):
                raise UsageError(
                    f"one step cannot tell {one!r} from {other!r} on a server whose tokens are not known",
                    where=f"teacher.decoding: {request.decoding}",
                    fix="a prompt with letters as identifiers, or decoding: generate",
                )

    def _answer(self, client: Any, request: Request, stop: threading.Event) -> Answer:
        started = time.monotonic()
        if request.decoding == "constrained":
            answer = self._one_by_one(client, request, stop)
        else:
            reply = self._call(client, self._body(request), stop)
            answer = self._first(request, reply) if request.decoding == "first" else self._text(request, reply)
        return replace(answer, seconds=time.monotonic() - started)

    def _body(self, request: Request) -> dict[str, Any]:
        """The keys of one call."""
        messages = [dict(message) for message in request.messages]
        more = {key: value for key, value in self.extra.items() if value is not None}
        if request.before and self.prefill != "none":
            messages.append({"role": "assistant", "content": request.before})
            if self.prefill == "vllm":
                more |= {"continue_final_message": True, "add_generation_prompt": False}
        body: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": request.temperature}
        body[self.length_key] = self._step_tokens(request) if request.decoding == "first" else request.max_tokens
        if request.temperature > 0:
            body["seed"] = request.seed
        if request.decoding == "first":
            body |= {"logprobs": True, "top_logprobs": self.logprobs}
        if more:
            body["extra_body"] = more
        return {key: value for key, value in body.items() if self.extra.get(key, value) is not None}

    def _text(self, request: Request, reply: Reply) -> Answer:
        text = reply.text
        # The answer is what follows the given beginning, whether the server repeats it, was given it or neither.
        if request.before and text.lstrip().startswith(request.before.strip()):
            text = text.lstrip()[len(request.before.strip()) :]
        return Answer(text, usage=self._usage(request, reply), finished=reply.finished)

    def _first(self, request: Request, reply: Reply) -> Answer:
        """Log-probabilities of the identifiers at the step behind the given beginning."""
        self._has_logprobs |= bool(reply.steps)
        if not self._has_logprobs:
            raise UsageError(
                "the server reports no log-probabilities, which decoding: first reads",
                where=f"backend: {self.model} at {self.base_url}",
                fix="decoding: generate works with any server; constrained with `constraint: vllm` or `llama_cpp`",
            )
        wanted = request.before.strip() if self.prefill == "none" else ""
        said = ""
        found: Sequence[tuple[str, float]] = ()
        for token, tokens in reply.steps:
            if said.strip() == wanted:
                found = tokens
            said += token
            if said.strip() != wanted and found:
                break
        # -9999 is how some servers write minus infinity.
        values = [(token, logarithm) for token, logarithm in found if -9000 < logarithm < math.inf]
        logits = identifier_logits(values, request.identifiers)
        best = max(logits, key=lambda name: logits[name], default="")
        return Answer(best, logits, self._usage(request, reply))

    def _one_by_one(self, client: Any, request: Request, stop: threading.Event) -> Answer:
        """One identifier after the other, of those that are left; the last one needs no call."""
        left = list(request.identifiers)
        separator, end = separators(request.before)
        given: list[str] = []
        usage = Usage(calls=0)
        while len(left) > 1:
            said = request.before + "".join(f"{name}{separator}" for name in given)
            step = replace(request, before=said, max_tokens=STEP_TOKENS)
            body = self._body(step)
            if self.constraint == "vllm":
                held: dict[str, Any] = {"structured_outputs": {"choice": left}}
            else:
                held = {"grammar": "root ::= " + " | ".join(json.dumps(name) for name in left)}
            body["extra_body"] = {**body.get("extra_body", {}), **held}
            reply = self._call(client, body, stop)
            name = self._text(step, reply).text.strip()
            if name not in left:
                raise RankdistillError(
                    f"the server answered {name[:40]!r} where it was held to {', '.join(left)}",
                    where=f"backend.constraint: {self.constraint}",
                    fix="this server does not honour that constraint: another `constraint`, or decoding: generate",
                )
            left.remove(name)
            given.append(name)
            paid = self._usage(step, reply)
            usage = Usage(
                usage.prompt + paid.prompt,
                usage.answer + paid.answer,
                usage.cached + paid.cached,
                usage.estimated or paid.estimated,
                usage.calls + 1,
            )
        return Answer(separator.join([*given, *left]) + end, usage=usage)

    def _usage(self, request: Request, reply: Reply) -> Usage:
        if reply.usage is None:
            return Usage(self.count_tokens(request), self.count_text([reply.text])[0], estimated=True)
        return Usage(*reply.usage)

    # -- one call -----------------------------------------------------------------------------------------------------

    def _call(self, client: Any, body: dict[str, Any], stop: threading.Event) -> Reply:
        """One call, tried again within bounds.

        Raises:
            RankdistillError: the last failure, without the key; `UsageError` where a setting is wrong.
        """
        import openai

        failure = ""
        for attempt in range(self.retries + 1):
            wait = self._not_before - time.monotonic()
            if wait > 0 and stop.wait(wait):
                break
            asked: float | None = None
            try:
                # The bytes: anything may be sent with status 200, which the client's own types would take as it comes.
                return read_reply(client.chat.completions.with_raw_response.create(**body).content)
            except Unreadable as error:
                failure = self._clean(str(error))
                if error.said and OF_PROMPT.search(failure):
                    raise self._refused(failure) from None
            except openai.APIStatusError as error:
                failure = f"the server answered {error.status_code}: {self._said(error)}"
                self._refuse(error, failure)
                asked = _retry_after(error.response.headers)
            except openai.APITimeoutError:
                failure = f"the server did not answer within {self.timeout:g} seconds"
            except openai.APIConnectionError as error:
                failure = self._clean(f"the server cannot be reached: {error.__cause__ or error}")
            except (openai.APIResponseValidationError, ValueError, RecursionError) as error:
                failure = self._clean(f"the server's answer cannot be read: {error}")
            if asked is not None and asked > LONGEST_WAIT:
                failure += f" (try again in {asked:.0f} seconds)"
                break
            if attempt < self.retries:
                pause = min(LONGEST_PAUSE, self.backoff * 2.0**attempt) * self._jitter.uniform(0.5, 1.0)
                if asked is not None:
                    self._not_before = max(self._not_before, time.monotonic() + asked)
                    pause *= 0.1  # not all at the same moment
                if stop.wait(pause):
                    break
        tries = attempt + 1
        raise RankdistillError(
            f"{failure or 'another call failed'} ({tries} {'try' if tries == 1 else 'tries'})",
            where=f"backend: {self.model} at {self.base_url}",
            fix="; ".join(self._fixes(failure))
            or "answers so far are kept: run the same command again; `timeout`, `retries`, `backoff` and `concurrency` "
            "of the backend may help",
        )

    def _fixes(self, failure: str) -> list[str]:
        """What to do about each key of a call that a server's words name."""
        sent = [key for key, value in self.extra.items() if value is not None]
        own = {rf"{re.escape(key)}\b": f"extra of the backend without {key}" for key in sent}
        return [fix for words, fix in {**SETTINGS, **own}.items() if re.search(rf"\b({words})", failure, re.I)]

    def _refuse(self, error: Any, failure: str) -> None:
        """Raise what another try would not mend."""
        where = f"backend: {self.model} at {self.base_url}"
        refused = error.status_code in (400, 413, 422)
        if refused or (error.status_code == 403 and OF_PROMPT.search(failure)):
            raise self._refused(failure + self._code(error)) from None
        if error.status_code in (401, 403):
            name = self._variable
            fix = f"look at the environment variable {name}" if name else "name the variable with the key: key: NAME"
            raise RankdistillError(failure, where=where, fix=fix) from None
        quota = error.status_code == 429 and "insufficient_quota" in str(error.body)
        if quota or (error.status_code < 500 and error.status_code not in AGAIN):
            fix = "look at the account" if quota else "look at the backend's model, base_url, prefill and extra"
            raise RankdistillError(failure, where=where, fix=fix) from None

    def _refused(self, failure: str) -> Refused:
        fixes = self._fixes(failure)
        return Refused(
            failure,
            where=f"backend: {self.model} at {self.base_url}",
            fix="; ".join(fixes) or "look at the backend's model, base_url, prefill and extra",
            of_prompt=not fixes and bool(OF_PROMPT.search(failure)),
        )

    def _code(self, error: Any) -> str:
        """What the server calls the fault, where its words do not hold it: "content_filter"."""
        body = error.body if isinstance(error.body, dict) else {}
        names = [name for name in (body.get("code"), body.get("param")) if isinstance(name, str) and name]
        return f" ({', '.join(self._clean(name) for name in names)})" if names else ""

    def _said(self, error: Any) -> str:
        body = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body
        return self._clean(str(body or error.message or "nothing"))

    def _clean(self, text: str) -> str:
        """A server's words in one short line, without the key."""
        secret = os.environ.get(self._variable or "", "").strip()
        if len(secret) > 3:
            text = text.replace(secret, "***")
        return printable(re.sub(r"(?i)bearer\s+\S+", "Bearer ***", text), 300)


class Unreadable(ValueError):
    """A body with status 200 that is no chat completion: worth another try. `said`: the server calls it an error."""

    def __init__(self, what: str, said: bool = False) -> None:
        super().__init__(what)
        self.said = said


@dataclass(frozen=True)
class Reply:
    """What of a chat completion is read.

    Args:
        text: the answer, without what a model thought before it where the server tells the two apart.
        finished: False where the answer was cut at its longest.
        steps: (token, the likeliest tokens of its step and their log-probabilities) as far as they were reported.
        usage: tokens of prompt, of answer, and of the prompt from the cache; None where the server does not say.
    """

    text: str
    finished: bool
    steps: tuple[tuple[str, list[tuple[str, float]]], ...]
    usage: tuple[int, int, int] | None


def read_reply(content: bytes) -> Reply:
    """A chat completion out of whatever a server sent.

    Raises:
        Unreadable: it is none; with the server's words.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        words = re.sub(r"<[^>]*>", " ", content[:4000].decode(errors="replace"))
        raise Unreadable(f"the server's answer is no JSON: {' '.join(words.split())[:200] or 'nothing'}") from None
    body = body if isinstance(body, dict) else {"": body}
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    text = _content(message.get("content")) if isinstance(message, dict) else None
    if text is None or (not text and body.get("error")):
        said = body.get("error") or body.get("message") or body.get("detail")
        if isinstance(said, dict):
            code = said.get("code") or said.get("type")
            said = f"{said.get('message') or said}{f' ({code})' if code else ''}"
        if said:
            raise Unreadable(f"the server's answer is an error: {said}", said=True)
        raise Unreadable(f"the server's answer is no chat completion: {json.dumps(body)[:200]}")
    logprobs = choice.get("logprobs")
    steps = logprobs.get("content") if isinstance(logprobs, dict) else None
    return Reply(
        text,
        finished=choice.get("finish_reason") != "length",
        steps=tuple(_step(step) for step in steps if isinstance(step, dict)) if isinstance(steps, list) else (),
        usage=_tokens(body.get("usage")),
    )


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


def _step(step: dict[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    top = step.get("top_logprobs")
    entries = [*(top if isinstance(top, list) else []), step]
    return step["token"] if isinstance(step.get("token"), str) else "", [
        (entry["token"], float(entry["logprob"]))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("token"), str) and _is_number(entry.get("logprob"))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _tokens(usage: Any) -> tuple[int, int, int] | None:
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    counts = [
        usage.get("prompt_tokens"),
        usage.get("completion_tokens", 0),
        details.get("cached_tokens") if isinstance(details, dict) else 0,
    ]
    prompt, answer, cached = (int(n) if _is_number(n) and 0 <= n < 2**40 else None for n in counts)
    return None if prompt is None else (prompt, answer or 0, min(cached or 0, prompt))


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks us to wait, from `Retry-After` (seconds or a date) or `retry-after-ms`."""
    from email.utils import parsedate_to_datetime

    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None
