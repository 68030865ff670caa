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

# Free text; one step, the logits of the identifiers; text made of identifiers alone, each once.
Decoding = Literal["generate", "first", "constrained"]


@dataclass(frozen=True)
class Request:
    """One prompt."""

    messages: tuple[dict[str, str], ...]  # each {"role", "content"}; the engine applies the model's chat template
    identifiers: tuple[str, ...]  # what may be answered, in the order of the passages ("1", "2" ...; "yes", "no")
    decoding: Decoding = "generate"
    before: str = ""  # text that the answer begins with, already given ("[" before an identifier)
    max_tokens: int = 256  # of the answer
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0  # of the sampling, where the temperature is above 0
    stop: str = ""  # the answer ends before this text, where it has begun
    log_probability: bool = False  # ask for it where telling costs the engine something

    def key(self, backend: str) -> str:
        """Names the answer: a hash of everything above and of the engine's fingerprint. What came later, and is not
        used, does not count: answers that were kept before stay valid."""
        values = asdict(self)
        values = {name: value for name, value in values.items() if value or name not in ("stop", "log_probability")}
        text = json.dumps([backend, values], sort_keys=True, ensure_ascii=False)
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
    """What came back."""

    text: str  # for `first` the best identifier
    logits: dict[str, float] | None = None  # of the one step (`first`): identifier → logit or log-probability, if told
    usage: Usage = field(default_factory=Usage)
    finished: bool = True  # False where the answer was cut at `max_tokens`
    refused: str = ""  # the engine's words where it refused this prompt (a content filter): none is kept
    log_probability: float | None = None  # mean over the answer's tokens, of the model without temperature, if told
    kept: bool = field(default=False, compare=False)  # from the cache: it costs nothing now


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
        """Refuse what this engine does not honour."""
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
