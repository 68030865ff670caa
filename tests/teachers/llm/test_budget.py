"""Budgets: what they mean, that they hold, and that a dry run says what the job then costs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.collections import Collection
from rankdistill.errors import UsageError
from rankdistill.recipe import build
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.llm.asking import ask
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage
from rankdistill.teachers.llm.budget import Budget, BudgetReached, Limit, Prices
from rankdistill.teachers.llm.cache import AnswerCache
from rankdistill.teachers.scoring import dry_run, score_candidates


class Chance(Backend):
    """Answers of random length, up to the longest; `ahead` requests are drawn before the first is answered."""

    type = "chance"
    decodings = frozenset({"generate", "first"})

    def __init__(self, seed: int, ahead: int) -> None:
        self.chance, self.ahead, self.asked = random.Random(seed), ahead, 0

    def fingerprint(self) -> str:
        return "chance"

    def describe(self) -> dict[str, Any]:
        return {}

    def count_tokens(self, request: Request) -> int:
        return len(request.messages[0]["content"])

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        held: list[tuple[int, Request]] = []
        source = iter(requests)
        while True:
            while len(held) < self.ahead and (item := next(source, None)) is not None:
                held.append(item)
            if not held:
                return
            number, one = held.pop(self.chance.randrange(len(held)))
            self.asked += 1
            answer = self.chance.randint(1, one.max_tokens) if one.decoding == "generate" else 1
            yield number, Answer("x", {"1": 0.0}, Usage(self.count_tokens(one), answer))


def prompts(count: int, seed: int = 0) -> list[tuple[int, Request]]:
    chance = random.Random(seed)
    return [
        (n, Request(({"role": "user", "content": f"{n} " + "w" * chance.randint(1, 90)},), ("1",), max_tokens=40))
        for n in range(count)
    ]


# -- what is given ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("500calls", 500, "calls"),
        ("1 call", 1, "calls"),
        ("200000tokens", 200_000, "tokens"),
        ("200,000 tokens", 200_000, "tokens"),
        ("2_000tokens", 2000, "tokens"),
        ("3.50", 3.5, "money"),
        (3.5, 3.5, "money"),
        (2, 2, "money"),
    ],
)
def test_limits_are_read(text: str | float, amount: float, unit: str) -> None:
    assert Limit.read(text) == Limit(amount, unit)


@pytest.mark.parametrize("text", ["", "calls", "0calls", "-5calls", "1.5calls", "3 euros", "5k", "nan", "inf", 0, -1.0])
def test_other_limits_are_refused(text: str | float) -> None:
    with pytest.raises(UsageError, match="is no budget"):
        Limit.read(text)


def test_prices() -> None:
    prices = Prices.model_validate({"prompt": 0.5, "answer": 2, "cached": 0.1})
    assert prices.cost(Usage(1_000_000, 100_000, 400_000)) == pytest.approx(0.6 * 0.5 + 0.4 * 0.1 + 0.1 * 2)
    # Without a price of their own, cached tokens cost what others cost.
    assert Prices.model_validate({"prompt": 0.5, "answer": 2}).cost(Usage(1_000_000, 0, 400_000)) == pytest.approx(0.5)
    for table, message in (
        ({"prompt": 1}, "answer: field required"),
        ({"prompt": 1, "answer": 1, "cahced": 1}, "unknown key 'cahced'"),
        ({"prompt": -1, "answer": 1}, "greater than or equal to 0"),
        ({"prompt": float("nan"), "answer": 1}, "finite number"),
    ):
        with pytest.raises(UsageError, match=message):
            Budget(prices=table)


def test_money_needs_prices() -> None:
    with pytest.raises(UsageError, match="needs prices"):
        Budget("3.50")
    assert Budget("3.50", {"prompt": 1.0, "answer": 2.0}).limit == Limit(3.5, "money")


# -- what is spent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["17calls", "1500tokens", "0.002"])
@pytest.mark.parametrize("ahead", [1, 4, 50])
def test_a_budget_is_not_passed_and_nothing_paid_is_lost(limit: str, ahead: int, tmp_path: Path) -> None:
    """Whatever answers cost and however many calls are under way; every run with the budget gets further."""
    prices = {"prompt": 1.0, "answer": 3.0}
    asked, answered, rounds = prompts(60), 0, 0
    while answered < 60:
        backend, budget = Chance(rounds, ahead), Budget(limit, prices)
        assert budget.limit is not None
        handed_on = []
        try:
            for number, _ in ask(backend, asked, AnswerCache(tmp_path), budget):
                handed_on.append(number)
        except BudgetReached as error:
            assert error.exit_code == 1 and "goes on from here" in str(error.fix)
            assert "budget" in error.what and f"{budget.spent.calls:,} calls" in error.what
            # Stopped no earlier than it had to: the longest call would not have fitted.
            rest = budget.limit.amount - budget.of(budget.spent)
            assert rest < {"calls": 1, "tokens": 140, "money": 140 * 3e-6}[budget.limit.unit]
        assert 0 < budget.of(budget.spent) <= budget.limit.amount
        assert len(handed_on) == budget.spent.calls + budget.reused == len(set(handed_on))
        assert budget.reused == answered and backend.asked == budget.spent.calls
        answered += backend.asked
        rounds += 1
    assert rounds > 2 and answered == 60


def test_a_call_that_no_budget_holds_is_not_made(tmp_path: Path) -> None:
    backend = Chance(0, 4)
    with pytest.raises(BudgetReached):
        list(ask(backend, prompts(3), AnswerCache(tmp_path), Budget("5tokens")))
    assert backend.asked == 0


def test_the_line_says_what_and_how_much_of_it(tmp_path: Path) -> None:
    budget = Budget("100calls", {"prompt": 10.0, "answer": 20.0})
    list(ask(Chance(0, 1), prompts(25), AnswerCache(tmp_path), budget))
    line = budget.line()
    assert "25 calls" in line and "(25% of the budget of 100 calls)" in line
    money = (budget.spent.prompt * 10 + budget.spent.answer * 20) / 1e6
    assert f"{money:,.4f} in money" in line
    again = Budget()
    list(ask(Chance(0, 1), prompts(25), AnswerCache(tmp_path), again))
    assert "0 calls" in again.line() and "25 answers from the cache" in again.line()


# -- before it is spent -----------------------------------------------------------------------------------------------


def teacher(model: Path, **settings: Any) -> Any:
    backend = {"type": "transformers", "model": str(model), "precision": "fp32"}
    return build("teacher", {"type": "listwise", "backend": backend, "passage_tokens": 30, **settings})


def candidates(collection: Collection, depth: int, queries: int) -> list[tuple[str, list[str], np.ndarray]]:
    doc_ids = [document.doc_id for document in collection.documents(np.arange(collection.document_count))]
    chance = random.Random(depth)
    return [
        (query_id, chance.sample(doc_ids, depth), np.zeros(depth, np.float32))
        for query_id in collection.query_ids("train")[:queries]
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("decoding", ["first", "constrained"])
def test_a_dry_run_says_what_one_window_a_list_costs_exactly(
    decoding: str, tiny_causal_lm: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    lists = candidates(tiny_collection, 6, 4)
    settings = {"decoding": decoding, "window": 8, "step": 4, "prices": {"prompt": 1.0, "answer": 4.0}}
    store = ScoreStore(tmp_path)
    estimate = dry_run(teacher(tiny_causal_lm, **settings), tiny_collection, lists, store)
    assert snapshot(tmp_path) == {}, "a dry run leaves nothing behind"
    paying = teacher(tiny_causal_lm, **settings)
    score_candidates(paying, tiny_collection, lists, store)
    spent = paying.asking.budget.spent
    assert estimate.spent.calls == spent.calls == 4 and estimate.pairs == 24
    assert estimate.spent.prompt == spent.prompt > 100
    assert estimate.most.answer >= spent.answer and estimate.money(estimate.most) >= estimate.money(spent)
    if decoding == "first":
        assert estimate.spent.answer == spent.answer and estimate.money(estimate.spent) == pytest.approx(
            paying.asking.budget.money(spent)
        )
    else:
        assert estimate.spent.answer == pytest.approx(spent.answer, rel=0.2)
    # What is in the store costs nothing any more, and is left as it is.
    before = snapshot(tmp_path)
    again = dry_run(teacher(tiny_causal_lm, **settings), tiny_collection, lists, store)
    assert (again.spent.calls, again.pairs) == (0, 0) and snapshot(tmp_path) == before


def test_a_dry_run_over_sliding_windows_counts_every_call(
    tiny_causal_lm: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    """Later prompts depend on earlier answers: the calls are exact, the tokens those of the passages as they stood."""
    lists = candidates(tiny_collection, 14, 3)
    settings = {"decoding": "first", "window": 6, "step": 3, "orders": ["given", "reversed"]}
    store = ScoreStore(tmp_path)
    estimate = dry_run(teacher(tiny_causal_lm, **settings), tiny_collection, lists, store)
    # A budget that ends half way, then the rest: the cache's part of the work is not counted again.
    paying = teacher(tiny_causal_lm, **settings, budget="9calls")
    with pytest.raises(BudgetReached):
        score_candidates(paying, tiny_collection, lists, store)
    assert paying.asking.budget.spent.calls == 9
    rest = dry_run(teacher(tiny_causal_lm, **settings), tiny_collection, lists, store)
    assert rest.spent.calls == estimate.spent.calls - 9 and rest.reused == 9
    last = teacher(tiny_causal_lm, **settings)
    score_candidates(last, tiny_collection, lists, store)
    spent = last.asking.budget.spent
    assert spent.calls == rest.spent.calls and last.asking.budget.reused == 9
    assert spent.prompt == pytest.approx(rest.spent.prompt, rel=0.1)
    assert "may not hold" in "\n".join(dry_run(paying, tiny_collection, lists, ScoreStore(tmp_path / "new")).lines())
