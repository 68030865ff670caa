"""The one way in which teachers ask language models: cached answers first, each new one kept before it is used.

A teacher keeps an `Asking` (engine, cache and budget as the recipe gives them) and calls `ask` with the requests of
a chunk, or of one round of windows; see `AskingTeacher`. In a dry run the same calls are counted instead of made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError
from rankdistill.recipe import build
from rankdistill.teachers.base import Teacher
from rankdistill.teachers.llm.base import Answer, Backend, Request, printable
from rankdistill.teachers.llm.budget import Budget, Spending
from rankdistill.teachers.llm.cache import AnswerCache, answers_root

MANY = 8  # answers that tell nothing, before a job may stop for them


def ask(
    backend: Backend, requests: Iterable[tuple[int, Request]], cache: AnswerCache, budget: Budget
) -> Iterator[tuple[int, Answer]]:
    """Answer numbered requests, in any order, each once: first those in the cache, then the others, paid.

    A new answer is in the cache before it is handed on; a refusal is handed on and not kept. The requests of one call
    are held in memory, so ask by chunks. The same prompt twice is paid for once.

    Args:
        requests: (number, request); the numbers are the caller's and distinct.
        budget: counts what is spent, and its limit is kept.

    Raises:
        BudgetReached: the limit does not hold the next call; the calls under way have been answered, kept and
            handed on before.
        UsageError: the engine does not honour a request's decoding; nothing was paid for.
        RankdistillError: the engine failed, or the disk is full; answers that came before are kept.
    """
    cache.refresh()
    numbers: dict[str, list[int]] = {}  # key → who asked
    missing: list[tuple[str, Request]] = []
    for number, request in requests:
        key = backend.answer_key(request)
        known = cache.find(key)
        if known is not None:
            budget.reused += 1
            yield number, known
        elif key in numbers:
            numbers[key].append(number)
        else:
            numbers[key] = [number]
            missing.append((key, request))
    for decoding in sorted({request.decoding for _, request in missing}):
        backend.check(decoding)
    position = 0
    reached = False
    under_way: set[int] = set()
    met: list[tuple[str, Answer]] = []  # another process has paid meanwhile

    def affordable() -> Iterator[tuple[int, Request]]:
        nonlocal position, reached
        reached = False
        while position < len(missing):
            at = position
            key, request = missing[at]
            known = cache.find(key)
            if known is not None:
                budget.reused += 1
                met.append((key, known))
                position += 1
            else:
                if budget.limit is not None and not budget.reserve(at, backend.longest(request)):
                    reached = True
                    return
                under_way.add(at)
                position += 1
                yield at, request

    try:
        while position < len(missing):
            begun = position
            # At the limit the calls under way still come in; they may free what was set aside for longer answers, so
            # the rest is tried once more.
            with closing(_closable(backend.answer(affordable()))) as answers:
                for at, answer in answers:
                    if at not in under_way:
                        raise RankdistillError(f"the backend {backend.type} answered what it was not asked, or twice")
                    under_way.discard(at)
                    key = missing[at][0]
                    if not answer.refused:
                        cache.add(key, answer)
                    budget.pay(at, answer.usage)
                    for number in numbers[key]:
                        yield number, answer
            for key, answer in met:
                for number in numbers[key]:
                    yield number, answer
            met.clear()
            budget.release()
            if under_way:
                raise RankdistillError(f"the backend {backend.type} left {len(under_way)} requests without an answer")
            if reached and position == begun:
                raise budget.reached()
    finally:
        budget.release()
        cache.close()


def _closable(answers: Iterator[tuple[int, Answer]]) -> Any:
    """A generator as it is; anything else made one, so that it can be closed when the asker leaves early."""
    return answers if hasattr(answers, "close") else (item for item in answers)


class Estimate:
    """What a job would cost: filled by a dry run.

    The answers of a dry run keep the order in which the passages stand. Where later prompts depend on earlier answers
    (sliding windows), the estimate therefore counts as many windows with passages in their first order: the number of
    calls is exact, the tokens are those of these passages.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.expected = Spending()  # answers as long as an order without faults
        self.most = Spending()  # answers as long as they may be
        self.reused = 0
        self.pairs = 0  # that the store lacks
        self._seen: set[str] = set()

    def ask(
        self, backend: Backend, requests: Iterable[tuple[int, Request]], cache: AnswerCache
    ) -> Iterator[tuple[int, Answer]]:
        """Count requests instead of making them; those in the cache are answered from it and cost nothing."""
        checked: set[str] = set()
        for number, request in requests:
            key = backend.answer_key(request)
            known = cache.find(key)
            if known is not None:
                self.reused += 1
                yield number, known
                continue
            if request.decoding not in checked:
                backend.check(request.decoding)
                checked.add(request.decoding)
            answer = _unchanged(request)
            if key not in self._seen:
                self._seen.add(key)
                longest = backend.longest(request)
                expected = min(longest.answer, backend.count_text([answer.text])[0])
                self.expected.add(replace(longest, answer=expected), self.budget.prices)
                self.most.add(longest, self.budget.prices)
            yield number, answer

    def lines(self) -> list[str]:
        """For a person."""
        priced = self.budget.prices is not None
        lines = [f"{self.pairs:,} pairs to score", f"expected: {self.expected.line(priced)}"]
        if self.most.answer != self.expected.answer:
            lines.append(f"at most:  {self.most.line(priced)}")
        if self.reused:
            lines.append(f"{self.reused:,} answers are in the cache and cost nothing")
        limit = self.budget.limit
        if limit is not None:
            fits = self.most.of(limit.unit) <= limit.amount
            lines.append(f"the budget of {limit} {'holds that' if fits else 'may not hold that'}")
        return lines

    def to_json(self) -> dict[str, Any]:
        limit = self.budget.limit
        return {
            "pairs": self.pairs,
            "expected": vars(self.expected),
            "most": vars(self.most),
            "cached_answers": self.reused,
            "budget": None if limit is None else {"amount": limit.amount, "unit": limit.unit},
        }


def _unchanged(request: Request) -> Answer:
    """The answer that leaves the passages in their order."""
    names = request.identifiers
    if request.decoding == "first":
        return Answer(names[0] if names else "", {name: -float(place) for place, name in enumerate(names)})
    if names and all(name.isdigit() or (len(name) <= 2 and name.isupper()) for name in names):
        text = " > ".join(f"[{name}]" for name in names)
        return Answer(text.removeprefix(request.before))
    return Answer(names[0] if names else "")


@dataclass
class Health:
    """How many answers told something. A job most of whose answers tell nothing stops: its scores would be few, and
    what is wrong with one answer is wrong with the next.

    Args:
        earlier: lists that had scores before; they speak for the settings.
        cut: of the unread answers, those that ended at their longest.
        fresh: refusals and unread answers that did not come from the cache.
        words: of the first refusal, or else of the first answer that was not read.
    """

    earlier: int = 0
    read: int = 0
    unread: int = 0
    cut: int = 0
    refused: int = 0
    fresh: int = 0
    words: str = ""

    def see(self, answer: Answer, readable: bool) -> None:
        """Count an answer.

        Raises:
            RankdistillError: `MANY` new ones told nothing, and they are the most.
        """
        if readable:
            self.read += 1
            return
        if answer.refused and not self.refused:
            self.words = answer.refused
        elif not answer.refused and not self.unread + self.refused:
            self.words = printable(answer.text, 80) or "nothing"
        self.refused += bool(answer.refused)
        self.unread += not answer.refused
        self.cut += not answer.refused and not answer.finished
        self.fresh += not answer.kept
        if self.fresh >= MANY and self.fresh > self.earlier + self.read:
            raise self.failure()

    def finish(self) -> None:
        """The job is done.

        Raises:
            RankdistillError: the most of its answers told nothing.
        """
        if self.refused + self.unread > self.earlier + self.read:
            raise self.failure()

    def lines(self) -> list[str]:
        """For a person, also where little is asked to be said."""
        lines = []
        if self.refused:
            lines.append(f"{self.refused:,} prompts were refused and are asked again next time: {self.words}")
        if self.unread:
            longest = f", {self.cut:,} of them cut at max_tokens" if self.cut else ""
            lines.append(f"{self.unread:,} answers could not be read{longest}: what has none that can gets no score")
        return lines

    def failure(self) -> RankdistillError:
        """The error that ends the job."""
        total = self.read + self.unread + self.refused
        if self.refused > self.unread:
            return RankdistillError(
                f"{self.refused:,} of {total:,} prompts were refused: {self.words}",
                fix="look at what the server says; scores so far are kept, and what was refused is asked again",
            )
        longest = f", {self.cut:,} were cut at max_tokens" if self.cut else ""
        return RankdistillError(
            f"{self.unread:,} of {total:,} answers name no passage{longest} (the first: {self.words})",
            where="the language model's answers",
            fix="a larger max_tokens: a model that reasons spends them before it answers (or switch that off, backend: "
            "{extra: ...})"
            if self.cut or self.words == "nothing"
            else "a prompt, a prefill or a decoding that this model follows; of one that reasons, a larger max_tokens",
        )


class Asking:
    """A teacher's language model as its recipe gives it: engine, cache of answers, budget.

    Args:
        backend: the engine's `type` and keys.
        budget: `500calls`, `200000tokens`, `3.50`; None for no limit.
        prices: money for a million tokens: prompt, answer, cached.
    """

    def __init__(
        self,
        backend: Mapping[str, Any],
        budget: str | float | None = None,
        prices: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend: Backend = build("backend", backend, "teacher.backend")
        self.budget = Budget(budget, prices)
        self.estimate: Estimate | None = None
        self.health = Health()
        self._root = answers_root()

    def use_store(self, root: str | Path) -> None:
        """Keep answers below this score store's root from now on."""
        if self._root != answers_root(root):
            self._root = answers_root(root)
            self.__dict__.pop("cache", None)

    def use_backend(self, backend: Mapping[str, Any]) -> None:
        """Ask this engine from now on."""
        self.backend = build("backend", backend, "teacher.backend")
        self.__dict__.pop("cache", None)

    @cached_property
    def cache(self) -> AnswerCache:
        return AnswerCache(self._root / self.backend.answered_by())

    def see(self, answer: Answer, readable: bool) -> None:
        """Told by the teacher of each answer whether it could read it.

        Raises:
            RankdistillError: most answers cannot be read; see `Health`.
        """
        if self.estimate is None:
            self.health.see(answer, readable)

    def dry_run(self) -> Estimate:
        """From now on count and ask nothing."""
        self.estimate = Estimate(self.budget)
        return self.estimate

    def ask(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answer numbered requests, in any order, each once; see `ask`."""
        if self.estimate is not None:
            return self.estimate.ask(self.backend, requests, self.cache)
        return ask(self.backend, requests, self.cache, self.budget)


class AskingTeacher(Teacher):
    """A teacher that asks a language model through `self.asking.ask(requests)`.

    A subclass has a `type`, and a constructor that names `backend`, `budget` and `prices` among its own keys and hands
    them to this one. `self.asking.backend` counts tokens (`count_text`) and refuses decodings (`check`).

    Args:
        backend: the engine: its `type` (transformers, openai) and keys.
        passage_tokens: passages are cut to so many tokens, and so is a query.
        budget: the most that may be spent: 500calls, 200000tokens, or money such as 3.50.
        prices: money for a million tokens, {prompt: 0.15, answer: 0.60}.
    """

    live: ClassVar[bool] = False  # answers come from the cache where they can: a clock would measure that

    def __init__(
        self,
        backend: dict[str, Any],
        budget: str | float | None = None,
        prices: dict[str, float] | None = None,
    ) -> None:
        self.asking = Asking(backend, budget, prices)

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What decides the scores beside the engine, budget and prices."""

    def fingerprint(self) -> str:
        return fingerprint({**self._settings(), "backend": self.asking.backend.fingerprint()})
