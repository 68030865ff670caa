"""What a language model is asked and what it answers, whichever engine runs it.

A `Request` is one prompt (a window of passages, a pair, or one passage) and how it is to be decoded; a `Backend` turns
requests into `Answer`s. What an engine cannot do it refuses before anything is paid for.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, ClassVar, Literal

from rankdistill.errors import UsageError

Decoding = Literal["generate", "first", "constrained"]


@dataclass(frozen=True)
class Request:
    """One prompt.

    Args:
        messages: chat messages, each {"role", "content"}; the engine applies the model's chat template.
        identifiers: what may be answered, in the order of the passages ("1", "2" ... or "A", "B" ...; "yes", "no").
        decoding: `generate`: free text; `first`: one step, the logits of the identifiers; `constrained`: text made of
            identifiers alone, each once.
        before: text that the answer begins with, already given ("[" before an identifier).
        max_tokens: of the answer.
        temperature: 0 is greedy.
        seed: of the sampling, where the temperature is above 0.
    """

    messages: tuple[dict[str, str], ...]
    identifiers: tuple[str, ...]
    decoding: Decoding = "generate"
    before: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def key(self, backend: str) -> str:
        """Names the answer: a hash of everything above and of the engine's fingerprint."""
        text = json.dumps([backend, asdict(self)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Usage:
    """Tokens of one call, as the engine counted them, or of several that were added."""

    prompt: int = 0
    answer: int = 0
    cached: int = 0  # of the prompt, read from the engine's cache
    estimated: int = 0  # calls whose tokens the engine did not tell
    calls: int = 1  # where one answer takes several

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text: the answer; for `first` the best identifier.
        logits: identifier → logit or log-probability of the one step (`first`); absent ones were not reported.
        finished: False where the answer was cut at `max_tokens`.
        refused: the engine's words where it refused this prompt (a content filter): no answer, and none is kept.
    """

    text: str
    logits: dict[str, float] | None = None
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    finished: bool = True
    refused: str = ""
    kept: bool = field(default=False, compare=False)  # from the cache: it costs nothing now


def printable(text: str, most: int) -> str:
    """Foreign words in one line that any terminal and any encoding takes: no control characters, no half pairs."""
    text = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[: most + 1])
    return text if len(text) <= most else text[:most] + " ..."


class Backend(ABC):
    """An engine that answers requests. The constructor stores settings and loads nothing."""

    type: ClassVar[str]
    decodings: ClassVar[frozenset[str]]  # which it honours

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what decides the answers (model revision, number format, template), of no key, path or address."""

    def answered_by(self) -> str:
        """A hash of what decides the answer to a given prompt; answers are kept in a folder of this name."""
        return self.fingerprint()

    def answer_key(self, request: Request) -> str:
        """Names the answer to a request; covers what decides it and nothing else, so that none is paid for twice."""
        return request.key(self.answered_by())

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings, for manifests; no keys."""

    @abstractmethod
    def count_tokens(self, request: Request) -> int:
        """Tokens of the prompt, without a call that costs; an estimate where the tokenizer is not known."""

    @abstractmethod
    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answer numbered requests, in any order, each once; requests are drawn only as fast as they can be worked on.

        A prompt that the engine refuses gets an answer that is `refused`; the others go on.

        Raises:
            RankdistillError: the engine cannot be reached or refuses, after bounded retries.
        """

    def check(self, decoding: str) -> None:
        """Refuse what this engine does not honour.

        Raises:
            UsageError: naming the decodings that it does.
        """
        if decoding not in self.decodings:
            raise UsageError(
                f"the backend {self.type} does not do decoding: {decoding}",
                where="teacher.decoding",
                fix=f"one of {', '.join(sorted(self.decodings))}",
            )

    def longest(self, request: Request) -> Usage:
        """The most tokens that answering may take; a call is made only if the budget holds them."""
        return Usage(self.count_tokens(request), 1 if request.decoding == "first" else request.max_tokens)

    def count_text(self, texts: Sequence[str]) -> list[int]:
        """Tokens of plain texts, to cut passages to a budget; four characters a token unless the engine says more."""
        return [len(text) // 4 + 1 for text in texts]
