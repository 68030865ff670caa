"""What language models cost: prices, a limit in calls, tokens or money, and what was spent of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.plain import Section
from rankdistill.progress import Progress
from rankdistill.recipe import check_values
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage

FORM = "500calls, 200000tokens, or an amount of money such as 3.50"


class BudgetReached(RankdistillError):
    """The limit is reached; what was paid for is kept and the same command goes on from there."""


class Prices(Section):
    """Money for a million tokens, in any one currency."""

    prompt: float = Field(ge=0, description="of the prompt")
    answer: float = Field(ge=0, description="of the answer")
    cached: float | None = Field(
        None, ge=0, description="of the part of a prompt that the engine had in its cache; the prompt's unless given"
    )

    def cost(self, usage: Usage) -> float:
        """Money for one call, or for several."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = usage.prompt - usage.cached
        return (fresh * self.prompt + usage.cached * cached + usage.answer * self.answer) / 1e6


@dataclass(frozen=True)
class Limit:
    """So many calls, tokens (of prompts and answers together) or so much money."""

    amount: float
    unit: str  # calls, tokens, money

    @classmethod
    def read(cls, text: str | float) -> Limit:
        """From `500calls`, `200000tokens`, `3.50`."""
        parts = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*(calls?|tokens?|)\s*", str(text))
        amount = float(re.sub("[_,]", "", parts[1])) if parts else 0.0
        unit = {"c": "calls", "t": "tokens"}.get(parts[2][:1] if parts else "", "money")
        if amount <= 0 or (unit != "money" and amount != int(amount)):
            raise UsageError(f"{text!r} is no budget", where="budget", fix=f"give {FORM}")
        return cls(amount, unit)

    def __str__(self) -> str:
        return f"{self.amount:,.2f}" if self.unit == "money" else f"{int(self.amount):,} {self.unit}"


class Budget:
    """What one process may spend on a teacher, and what it has spent.

    A call begins only if its prompt and its longest answer still fit, beside the calls that are under way; so the
    limit is not passed, as far as the engine counts tokens as `count_tokens` does.
    """

    def __init__(self, limit: str | float | None = None, prices: Prices | Mapping[str, Any] | None = None) -> None:
        self.prices = check_values(Prices, prices, "prices") if prices is not None else None
        self.spent = Usage(calls=0)
        self.reused = 0  # answers that were paid for earlier
        self._reserved: dict[int, float] = {}
        self._bar: Progress | None = None
        self.set_limit(limit)

    def set_limit(self, limit: str | float | None) -> None:
        """Change the limit; one in money needs prices."""
        self.limit = Limit.read(limit) if limit is not None else None
        if self.limit is not None and self.limit.unit == "money" and self.prices is None:
            raise UsageError(
                "a budget in money needs prices",
                where="budget",
                fix="give the teacher prices: {prompt: 0.15, answer: 0.60} (for a million tokens), "
                "or a budget in calls or tokens",
            )

    def money(self, usage: Usage) -> float:
        return self.prices.cost(usage) if self.prices else 0.0

    def of(self, usage: Usage) -> float:
        """Usage in the limit's unit."""
        assert self.limit is not None
        tokens = usage.prompt + usage.answer
        return {"calls": usage.calls, "tokens": tokens, "money": self.money(usage)}[self.limit.unit]

    def reserve(self, number: int, most: Usage) -> bool:
        """Set aside what call `number` may cost; False where that no longer fits."""
        assert self.limit is not None
        cost = self.of(most)
        if self.of(self.spent) + sum(self._reserved.values()) + cost > self.limit.amount * (1 + 1e-12):
            return False
        self._reserved[number] = cost
        return True

    def pay(self, number: int, usage: Usage) -> None:
        """Count an answer that has come."""
        self._reserved.pop(number, None)
        self.spent += usage
        self._bar = self._bar or Progress("asking", None, "answers")
        self._bar.advance(1, note=self.line())

    def release(self) -> None:
        """No call is under way any more."""
        self._reserved.clear()

    def bill(self, usage: Usage) -> str:
        """For a person: "9 calls, 27,000 prompt and 360 answer tokens, 0.0043 in money"."""
        text = f"{usage.calls:,} calls, {usage.prompt:,} prompt and {usage.answer:,} answer tokens"
        if usage.cached:
            text += f" ({usage.cached:,} of the prompts' from the engine's cache)"
        if usage.estimated:
            text += f", {usage.estimated:,} calls' tokens estimated"
        return f"{text}, {self.money(usage):,.4f} in money" if self.prices else text

    def line(self) -> str:
        """What was spent, of how much: one line for a person."""
        text = self.bill(self.spent)
        if self.limit is not None:
            text += f" ({self.of(self.spent) / self.limit.amount:.0%} of the budget of {self.limit})"
        return f"{text}; {self.reused:,} answers from the cache" if self.reused else text

    def reached(self) -> BudgetReached:
        """The error that ends the work."""
        return BudgetReached(
            f"the budget of {self.limit} does not hold the next call; spent: {self.line()}",
            fix="everything paid for is kept: run the same command again, with a new or larger --budget (or the "
            "teacher's `budget`), and it goes on from here",
        )


class Estimate(Budget):
    """What a job would cost: a budget without a limit that a dry run spends from, and the answers that it is given.

    They keep the order in which the passages stand. Where later prompts depend on earlier answers (sliding windows),
    as many windows are counted, with passages in their first order: the number of calls is exact, the tokens are those
    of these passages.
    """

    def __init__(self, budget: Budget) -> None:
        super().__init__(None, budget.prices)
        self.budget = budget
        self.most = Usage(calls=0)  # with answers as long as they may be; `spent`: as long as an order without faults
        self.pairs = 0  # that the store lacks
        self.unkept: dict[str, Answer] = {}

    def pay(self, number: int, usage: Usage) -> None:
        self.spent += usage

    def answer(self, backend: Backend, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answers as `Backend.answer` gives them, without the engine."""
        for number, request in requests:
            answer, longest = _unchanged(request), backend.longest(request)
            self.most += longest
            length = min(longest.answer, backend.count_text([answer.text])[0])
            yield number, replace(answer, usage=replace(longest, answer=length))

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.pairs:,} pairs to score", f"expected: {self.bill(self.spent)}"]
        if self.most.answer != self.spent.answer:
            lines.append(f"at most:  {self.bill(self.most)}")
        if self.reused:
            lines.append(f"{self.reused:,} answers are in the cache and cost nothing")
        limit = self.budget.limit
        if limit is not None:
            fits = self.budget.of(self.most) <= limit.amount
            lines.append(f"the budget of {limit} {'holds that' if fits else 'may not hold that'}")
        return lines


def _unchanged(request: Request) -> Answer:
    """The answer that leaves the passages in their order."""
    names = request.identifiers
    if not names:
        return Answer("a query of some eight words as they are")
    if request.decoding == "first":
        return Answer(names[0], {name: -float(place) for place, name in enumerate(names)})
    if all(name.isdigit() or (len(name) <= 2 and name.isupper()) for name in names):
        return Answer(" > ".join(f"[{name}]" for name in names).removeprefix(request.before))
    return Answer(names[0])
