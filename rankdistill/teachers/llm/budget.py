"""What language models cost: prices, a limit in calls, tokens or money, and what was spent of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import Progress
from rankdistill.recipe import nearest
from rankdistill.teachers.llm.base import Usage

FORM = "500calls, 200000tokens, or an amount of money such as 3.50"


class BudgetReached(RankdistillError):
    """The limit is reached; what was paid for is kept and the same command goes on from there."""


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens, in any one currency.

    Args:
        prompt: of the prompt.
        answer: of the answer.
        cached: of the part of a prompt that the engine had in its cache; the prompt's price unless given.
    """

    prompt: float
    answer: float
    cached: float | None = None

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Prices:
        """From a recipe's `prices`.

        Raises:
            UsageError: an unknown key, a missing one, or a price that is no amount.
        """
        known = ("prompt", "answer", "cached")
        for name, value in table.items():
            if name not in known:
                raise UsageError(f"unknown price {name!r}", where=f"prices.{name}", fix=nearest(name, known))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise UsageError(f"{value!r} is no price", where=f"prices.{name}", fix="money for a million tokens")
        for name in known[:2]:
            if name not in table:
                raise UsageError(
                    f"the price of the {name} is missing", where="prices", fix="money for a million tokens"
                )
        return cls(**{name: float(value) for name, value in table.items()})

    def cost(self, usage: Usage) -> float:
        """Money for one call."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = max(usage.prompt - usage.cached, 0)
        return (fresh * self.prompt + usage.cached * cached + usage.answer * self.answer) / 1e6


@dataclass(frozen=True)
class Limit:
    """So many calls, tokens (of prompts and answers together) or so much money."""

    amount: float
    unit: str  # calls, tokens, money

    @classmethod
    def read(cls, text: str | float) -> Limit:
        """From `500calls`, `200000tokens`, `3.50`.

        Raises:
            UsageError: anything else.
        """
        found = re.fullmatch(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*(calls?|tokens?|)\s*", str(text))
        if found is None:
            raise UsageError(f"{text!r} is no budget", where="budget", fix=f"give {FORM}")
        amount = float(re.sub("[_,]", "", found[1]))
        unit = {"c": "calls", "t": "tokens", "": "money"}[found[2][:1]]
        if amount <= 0 or (unit != "money" and amount != int(amount)):
            raise UsageError(f"{text!r} is no budget", where="budget", fix=f"give {FORM}")
        return cls(amount, unit)

    def __str__(self) -> str:
        return f"{self.amount:,.2f}" if self.unit == "money" else f"{int(self.amount):,} {self.unit}"


@dataclass
class Spending:
    """Calls and tokens, counted."""

    calls: int = 0
    prompt: int = 0
    answer: int = 0
    cached: int = 0
    money: float = 0.0
    estimated: int = 0  # calls whose tokens the engine did not tell

    def add(self, usage: Usage, prices: Prices | None) -> None:
        self.calls += usage.calls
        self.prompt += usage.prompt
        self.answer += usage.answer
        self.cached += usage.cached
        self.estimated += usage.estimated
        self.money += prices.cost(usage) if prices else 0.0

    def of(self, unit: str) -> float:
        """What was spent in a limit's unit."""
        return {"calls": self.calls, "tokens": self.prompt + self.answer, "money": self.money}[unit]

    def line(self, priced: bool) -> str:
        """For a person: "9 calls, 27,000 + 360 tokens, 0.0043 money"."""
        text = f"{self.calls:,} calls, {self.prompt:,} prompt and {self.answer:,} answer tokens"
        if self.cached:
            text += f" ({self.cached:,} of the prompts' from the engine's cache)"
        if self.estimated:
            text += f", {self.estimated:,} calls' tokens estimated"
        return f"{text}, {self.money:,.4f} in money" if priced else text


class Budget:
    """What one process may spend on a teacher, and what it has spent.

    A call begins only if its prompt and its longest answer still fit, beside the calls that are under way; so the
    limit is not passed, as far as the engine counts tokens as `count_tokens` does.

    Args:
        limit: `500calls`, `200000tokens`, `3.50`; None spends without a limit.
        prices: money for a million tokens: prompt, answer and, if it differs, cached.
    """

    def __init__(self, limit: str | float | None = None, prices: Mapping[str, Any] | None = None) -> None:
        self.prices = Prices.read(prices) if prices is not None else None
        self.limit: Limit | None = None
        self.spent = Spending()
        self.reused = 0  # answers that were paid for earlier
        self._reserved: dict[int, float] = {}
        self._bar: Progress | None = None
        self.set_limit(limit)

    def set_limit(self, limit: str | float | None) -> None:
        """Change the limit.

        Raises:
            UsageError: not a budget, or one in money where there are no prices.
        """
        self.limit = Limit.read(limit) if limit is not None else None
        if self.limit is not None and self.limit.unit == "money" and self.prices is None:
            raise UsageError(
                "a budget in money needs prices",
                where="budget",
                fix="give the teacher prices: {prompt: 0.15, answer: 0.60} (for a million tokens), "
                "or a budget in calls or tokens",
            )

    def reserve(self, number: int, most: Usage) -> bool:
        """Set aside what call `number` may cost; False where that no longer fits."""
        if self.limit is None:
            return True
        cost = Spending()
        cost.add(most, self.prices)
        wanted = cost.of(self.limit.unit)
        if self.spent.of(self.limit.unit) + sum(self._reserved.values()) + wanted > self.limit.amount * (1 + 1e-12):
            return False
        self._reserved[number] = wanted
        return True

    def pay(self, number: int, usage: Usage) -> None:
        """Count an answer that has come."""
        self._reserved.pop(number, None)
        self.spent.add(usage, self.prices)
        self._bar = self._bar or Progress("asking", None, "answers")
        self._bar.advance(1, note=self.line())

    def release(self) -> None:
        """No call is under way any more."""
        self._reserved.clear()

    def line(self) -> str:
        """What was spent, of how much: one line for a person."""
        text = self.spent.line(self.prices is not None)
        if self.limit is not None:
            share = self.spent.of(self.limit.unit) / self.limit.amount
            text += f" ({share:.0%} of the budget of {self.limit})"
        return f"{text}; {self.reused:,} answers from the cache" if self.reused else text

    def reached(self) -> BudgetReached:
        """The error that ends the work."""
        return BudgetReached(
            f"the budget of {self.limit} does not hold the next call; spent: {self.line()}",
            fix="everything paid for is kept: run the same command again, with a new or larger --budget (or the "
            "teacher's `budget`), and it goes on from here",
        )
