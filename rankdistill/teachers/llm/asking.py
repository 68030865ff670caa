"""The one way in which teachers ask language models: cached answers first, each new one kept before it is used.

A teacher says what it asks of one list and what it makes of the answers (`AskingTeacher._talk`). The lists' requests
are asked together, in rounds, within a budget; in a dry run they are counted instead of made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError
from rankdistill.plain import shown
from rankdistill.progress import say, warn
from rankdistill.recipe import build
from rankdistill.teachers.base import Scored, Teacher, TextList, added, check_finite
from rankdistill.teachers.llm.answers import Reading, read_answer
from rankdistill.teachers.llm.base import Answer, Backend, Request
from rankdistill.teachers.llm.budget import Budget, BudgetReached, Estimate, Prices
from rankdistill.teachers.llm.cache import AnswerCache, answers_root
from rankdistill.teachers.llm.prompts import Kind, fit_passages, load_prompt

MANY = 8  # answers that tell nothing, before a job may stop for them
# Requests that are asked together, then their readings in the same order (None: the budget did not hold it); at the
# end the documents and scores, or None where there are none.
Talk = Generator[list[Request], list[Reading | None], tuple[list[str], np.ndarray] | None]
Answering = Callable[[Iterable[tuple[int, Request]]], Iterator[tuple[int, Answer]]]


def ask(
    backend: Backend,
    requests: Iterable[tuple[int, Request]],
    cache: AnswerCache,
    budget: Budget,
    answering: Answering | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Answer numbered requests, in any order, each once: first those in the cache, then the others, paid.

    A new answer is in the cache before it is handed on; a refusal is handed on and not kept. The requests of one call
    are held in memory, so ask by chunks. The same prompt twice is paid for once.

    Args:
        requests: (number, request); the numbers are the caller's and distinct.
        budget: counts what is spent, and its limit is kept.
        answering: in the backend's place: a dry run's.

    Raises:
        BudgetReached: the limit does not hold the next call; the calls under way have been answered, kept and
            handed on before.
        UsageError: the engine does not honour a request's decoding; nothing was paid for.
        RankdistillError: the engine failed, or the disk is full; answers that came before are kept.
    """
    numbers: dict[str, list[int]] = {}  # key → who asked
    missing: list[tuple[str, Request]] = []
    for number, request in requests:
        key = backend.answer_key(request)
        if (known := cache.find(key)) is not None:
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
    under_way: set[int] = set()
    met: list[tuple[str, Answer]] = []  # another process has paid meanwhile

    def affordable() -> Iterator[tuple[int, Request]]:
        nonlocal position
        while position < len(missing):
            at = position
            key, request = missing[at]
            known = cache.find(key)
            if known is None and budget.limit is not None and not budget.reserve(at, backend.longest(request)):
                return
            position += 1
            if known is None:
                under_way.add(at)
                yield at, request
            else:
                budget.reused += 1
                met.append((key, known))

    try:
        while position < len(missing):
            begun = position
            for at, answer in (answering or backend.answer)(affordable()):
                if at not in under_way:
                    raise RankdistillError(f"the backend {backend.type} answered what it was not asked, or twice")
                under_way.discard(at)
                key = missing[at][0]
                if not answer.refused:
                    cache.add(key, answer)
                budget.pay(at, answer.usage)
                yield from ((number, answer) for number in numbers[key])
            yield from ((number, answer) for key, answer in met for number in numbers[key])
            met.clear()
            if under_way:
                raise RankdistillError(f"the backend {backend.type} left {len(under_way)} requests without an answer")
            # At the limit the calls under way have come in. They may have freed what was set aside for longer
            # answers, so the rest is tried once more.
            budget.release()
            if position == begun:
                raise budget.reached()
    finally:
        budget.release()
        cache.close()


@dataclass
class Health:
    """How many answers told something. A job most of whose answers tell nothing stops: its scores would be few, and
    what is wrong with one answer is wrong with the next."""

    nothing: str = "name no passage"  # what an answer that tells nothing does
    earlier: int = 0  # lists that had scores before; they speak for the settings
    read: int = 0
    unread: int = 0
    cut: int = 0  # of the unread answers, those that ended at their longest
    refused: int = 0
    fresh: int = 0  # refusals and unread answers that did not come from the cache
    words: str = ""  # of the first refusal, or else of the first answer that was not read

    def see(self, answer: Answer, readable: bool) -> None:
        """Count an answer; an error where `MANY` new ones told nothing, and they are the most."""
        if readable:
            self.read += 1
            return
        if answer.refused and not self.refused:
            self.words = answer.refused
        elif not answer.refused and not self.unread + self.refused:
            self.words = shown(" ".join(answer.text.split())) or "nothing"
        self.refused += bool(answer.refused)
        self.unread += not answer.refused
        self.cut += not answer.refused and not answer.finished
        self.fresh += not answer.kept
        if self.fresh >= MANY and self.fresh > self.earlier + self.read:
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
            f"{self.unread:,} of {total:,} answers {self.nothing}{longest} (the first: {self.words})",
            where="the language model's answers",
            fix="a larger max_tokens: a model that reasons spends them before it answers (or switch that off, backend: "
            "{extra: ...})"
            if self.cut or self.words == "nothing"
            else "a prompt, a prefill or a decoding that this model follows; of one that reasons, a larger max_tokens",
        )


class Asking:
    """A teacher's language model as its recipe gives it: engine, cache of answers, budget.

    Args:
        nothing: what an answer that tells nothing does.
    """

    def __init__(
        self,
        backend: Mapping[str, Any],
        budget: str | float | None = None,
        prices: Prices | Mapping[str, Any] | None = None,
        nothing: str = Health.nothing,
    ) -> None:
        self.backend: Backend = build("backend", backend, "teacher.backend")
        self.budget, self.health = Budget(budget, prices), Health(nothing)
        self.estimate: Estimate | None = None
        self.root = answers_root()

    def begin(self, store: str | Path) -> None:
        """A job begins, whose answers are kept below this score store's root."""
        self.root, self.health = answers_root(store), Health(self.health.nothing)

    def finish(self, earlier: int = 0) -> None:
        """The job is done: say what it came to; an error where most of its answers told nothing."""
        for line in self.health.lines():
            warn(line)
        say(f"spent: {self.budget.line()}")
        if self.health.refused + self.health.unread > earlier + self.health.read:
            raise self.health.failure()

    def dry_run(self) -> Estimate:
        """From now on count and ask nothing."""
        self.estimate = Estimate(self.budget)
        return self.estimate

    def ask(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answer numbered requests, in any order, each once; see `ask`."""
        folder, dry = self.root / self.backend.answered_by(), self.estimate
        if dry is None:
            return ask(self.backend, requests, AnswerCache(folder), self.budget)
        return ask(self.backend, requests, AnswerCache(folder, dry.unkept), dry, partial(dry.answer, self.backend))

    def see(self, answer: Answer, readable: bool) -> None:
        """Count what an answer told, unless it was a dry run's; see `Health`."""
        if self.estimate is None:
            self.health.see(answer, readable)


@dataclass(eq=False)
class AskingTeacher(Teacher):
    """A teacher that asks a language model. A subclass has a `type`, the `kind` of its prompts and `_talk`.

    Args:
        backend: the engine: its `type` (transformers, openai) and keys.
        passage_tokens: passages are cut to so many tokens, and so is a query.
        queries_at_once: lists that are asked together.
        budget: the most that may be spent: 500calls, 200000tokens, or money such as 3.50.
        prices: money for a million tokens, {prompt: 0.15, answer: 0.60}.
    """

    live: ClassVar[bool] = False  # answers come from the cache where they can: a clock would measure that
    kind: ClassVar[Kind]
    counted: ClassVar[dict[str, str]] = {}  # name of a count in the report → what it counts

    backend: dict[str, Any]
    prompt: str
    _: KW_ONLY
    passage_tokens: int = 200
    queries_at_once: int = 16
    budget: str | float | None = None
    prices: Prices | None = None

    def __post_init__(self) -> None:
        self.asking = Asking(self.backend, self.budget, self.prices)
        self.template = load_prompt(self.prompt, self.kind)
        self._report: dict[str, Any] = {}
        self.asking.backend.check(getattr(self, "decoding", "first"))

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What decides the scores beside the engine and the prompt."""

    @abstractmethod
    def _talk(self, item: TextList) -> Talk:
        """What is asked of one list, in rounds, and the scores that it gets at the end."""

    def fingerprint(self) -> str:
        engine = {"prompt": self.template.fingerprint(), "backend": self.asking.backend.fingerprint()}
        return fingerprint({"type": self.type, **self._settings(), **engine})

    def describe(self) -> dict[str, Any]:
        engine = {"prompt": self.template.model_dump(), "backend": self.asking.backend.describe()}
        return {"type": self.type, **self._settings(), **engine}

    # -- asking -------------------------------------------------------------------------------------------------------

    def score(self, lists: Sequence[TextList]) -> Scored:
        """Scores of each list as it is ready, in any order; `BudgetReached` comes after what was ready."""
        for start in range(0, len(lists), self.queries_at_once):
            some = [item for item in lists[start : start + self.queries_at_once] if item.doc_ids]
            yield from self._score_together(some)

    def _score_together(self, lists: Sequence[TextList]) -> Scored:
        talks = [self._talk(item) for item in lists]
        asked: dict[int, list[Request]] = {}

        def go_on(at: int, readings: list[Reading | None] | None) -> Scored:
            try:
                asked[at] = talks[at].send(readings)  # type: ignore[arg-type]  # None begins
            except StopIteration as end:
                if end.value is not None:
                    doc_ids, scores = end.value
                    check_finite(lists[at].query_id, doc_ids, scores, self.type)
                    yield lists[at].query_id, doc_ids, scores.astype(np.float32)

        for at in range(len(talks)):
            yield from go_on(at, None)
        while asked:
            this_round, asked = asked, {}
            places = [(at, place) for at, requests in this_round.items() for place in range(len(requests))]
            readings: dict[int, list[Reading | None]] = {at: [None] * len(this_round[at]) for at in this_round}
            try:
                requests = ((number, this_round[at][place]) for number, (at, place) in enumerate(places))
                for number, answer in self.asking.ask(requests):
                    at, place = places[number]
                    reading = read_answer(answer, this_round[at][place], self.template)
                    self.asking.see(answer, reading.readable)
                    readings[at][place] = reading
                    if None not in readings[at]:
                        yield from go_on(at, readings.pop(at))
            except BudgetReached:
                for at in readings if not self.reads_lists else ():  # a list that is read whole is scored whole
                    yield from go_on(at, readings[at])
                raise

    def _fitted(self, texts: Iterable[str]) -> tuple[list[str], int]:
        """Texts escaped and cut to `passage_tokens`, and how many were cut."""
        return fit_passages(list(texts), self.passage_tokens, self.asking.backend.count_text, self.template.delimiters)

    # -- what was counted ---------------------------------------------------------------------------------------------

    def _count(self, report: Mapping[str, Any]) -> None:
        """Handed on with a list's scores: a list without them is asked again."""
        self._report = added(self._report, report)

    def take_report(self) -> dict[str, Any]:
        report, self._report = self._report, {}
        return report

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        return [f"{report[name]:,} {text}" for name, text in self.counted.items() if report.get(name)]


def numbered(item: TextList) -> tuple[list[str], dict[str, int]]:
    """(a list's distinct texts, document → place of its text): what comes twice is shown once."""
    texts: dict[str, int] = {}
    places = {d: texts.setdefault(text, len(texts)) for d, text in zip(item.doc_ids, item.documents, strict=True)}
    return list(texts), places
