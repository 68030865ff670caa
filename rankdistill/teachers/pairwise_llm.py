"""A language model that prefers one of two passages, as teacher (pairwise ranking prompting, Qin et al. 2024,
arXiv:2306.17563).

Models favour a place in the prompt, so each pair is shown in both orders: each is a vote. Votes that disagree make a
tie, and are counted. All pairs of the first k cost k(k-1) prompts a query; sliding passes about 2kn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rankdistill.errors import UsageError
from rankdistill.scores.rank_scores import plackett_luce, rank_scores
from rankdistill.scores.store import ScoreKind
from rankdistill.teachers.base import TextList, check_finite
from rankdistill.teachers.llm.answers import read_answer
from rankdistill.teachers.llm.asking import AskingTeacher
from rankdistill.teachers.llm.base import Answer, Request
from rankdistill.teachers.llm.prompts import Prompt, fit_passages, load_prompt

Pair = tuple[int, int]  # two passages of a list, in the order shown


class PairwiseTeacher(AskingTeacher):
    """A language model asked which of two passages answers the query better, in both orders.

    A document's score depends on the list it is in (see `reads_lists`). Documents with the same text are compared once
    and share a score. A document of which no answer could be read gets none.

    Args:
        prompt: a template of kind pairwise: a file, or a shipped name.
        pairs: all: every pair of the list's first `top` documents, the others get no score; passes: neighbours are
            compared from the end of the list to its beginning and swapped where both orders say so, `top` times, after
            which the first `top` stand in their places. Prompts a query: top (top - 1); at most top (2n - top - 1).
        top: see `pairs`.
        signal: wins: the share of votes, a missing one counting half; bradley_terry: log-strengths fitted to the votes
            (both with pairs: all); rank: 1 / r in the order that passes leave.
        decoding: first: the larger of the two letters' logits; generate: the letter that is written.
        queries_at_once: lists that are asked together.
        budget: the most that may be spent: 500calls, 200000tokens, or money such as 3.50. A dry run with passes counts
            the first of them alone: which neighbours the next one has depends on the answers.
    """

    type = "pairwise_llm"
    reads_lists = True

    def __init__(
        self,
        backend: dict[str, Any],
        prompt: str = "pairwise",
        pairs: Literal["all", "passes"] = "all",
        top: int = 10,
        signal: Literal["wins", "bradley_terry", "rank"] = "wins",
        decoding: Literal["first", "generate"] = "first",
        passage_tokens: int = 200,
        queries_at_once: int = 16,
        budget: str | float | None = None,
        prices: dict[str, float] | None = None,
    ) -> None:
        super().__init__(backend, budget, prices)
        self.prompt: Prompt = load_prompt(prompt, "pairwise")
        self.pairs: Literal["all", "passes"] = pairs
        self.top, self.passage_tokens, self.queries_at_once = top, passage_tokens, queries_at_once
        self.signal: Literal["wins", "bradley_terry", "rank"] = signal
        self.decoding: Literal["first", "generate"] = decoding
        self.score_kind: ScoreKind = "logit" if signal == "bradley_terry" else "rank"
        least = {"top": 2 if pairs == "all" else 1, "passage_tokens": 1, "queries_at_once": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise UsageError(f"{getattr(self, name)} is too few", where=f"teacher.{name}", fix=f"at least {number}")
        if (signal == "rank") != (pairs == "passes"):
            fix = "signal: rank" if pairs == "passes" else "signal: wins or bradley_terry"
            raise UsageError(f"pairs: {pairs} does not give signal: {signal}", where="teacher.signal", fix=fix)
        if len(self.prompt.names(2)) != 2:
            raise UsageError("a pairwise prompt has two identifiers", where="teacher.prompt")
        self.asking.backend.check(decoding)
        self._counts: Counter[str] = Counter()

    def _settings(self) -> dict[str, Any]:
        names = ("type", "pairs", "top", "signal", "decoding", "passage_tokens")
        return {**{name: getattr(self, name) for name in names}, "prompt": self.prompt.fingerprint()}

    def describe(self) -> dict[str, Any]:
        return {**self._settings(), "prompt": self.prompt.model_dump(), "backend": self.asking.backend.describe()}

    def score(self, lists: Sequence[TextList]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Scores of each list as it is ready, which need not be in the order given.

        Raises:
            BudgetReached: the lists that were ready have been yielded; the answers of the others are kept.
        """
        for start in range(0, len(lists), self.queries_at_once):
            jobs = [_Job(self, item) for item in lists[start : start + self.queries_at_once] if item.doc_ids]
            for job in jobs:
                if job.done:
                    yield from job.result()
            while any(not job.done for job in jobs):
                asked = [(job, pair) for job in jobs for pair in job.open]
                requests = ((at, job.request(pair)) for at, (job, pair) in enumerate(asked))
                for number, answer in self.asking.ask(requests):
                    job, pair = asked[number]
                    job.take(pair, *self._winner(job.request(pair), answer))
                    if job.done:
                        yield from job.result()

    def _winner(self, request: Request, answer: Answer) -> tuple[int | None, bool]:
        """0 or 1, the place of the passage preferred, None where the answer says neither; whether it could be read."""
        reading = read_answer(answer, request, self.prompt)
        self.asking.see(answer, reading.readable)
        if not reading.readable:
            return None, False
        if reading.logits is not None:
            first, second = np.where(np.isnan(reading.logits), -np.inf, reading.logits)
            return (None if first == second else int(second > first)), True
        return reading.order[0], True

    # -- what was counted ---------------------------------------------------------------------------------------------

    def take_report(self) -> dict[str, Any]:
        counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        """How often the two orders of a pair disagreed, and how often the passage shown first won."""
        counts = Counter(report)
        if not counts["pairs"]:
            return []
        decided = max(counts["answers"] - counts["undecided"], 1)
        lines = [
            f"{counts['pairs']:,} pairs in both orders, which disagreed on {counts['disagreed']:,} "
            f"({counts['disagreed'] / counts['pairs']:.0%})",
            f"the passage shown first won {counts['first_shown'] / decided:.0%} of the answers: without position bias "
            "50% where each pair is decided alike in both orders",
        ]
        if counts["undecided"]:
            lines.append(f"{counts['undecided']:,} answers preferred neither passage, or could not be read")
        if counts["passages_cut"]:
            lines.append(f"{counts['passages_cut']:,} passages were cut to their token budget")
        if counts["below_top"]:
            lines.append(f"{counts['below_top']:,} documents stand below the first ones and have no score")
        return lines


class _Job:
    """One list: its distinct texts, the votes so far, and which pairs are to be shown next."""

    def __init__(self, teacher: PairwiseTeacher, item: TextList) -> None:
        self.teacher, self.item = teacher, item
        texts: dict[str, int] = {}
        self.documents = {d: texts.setdefault(text, len(texts)) for d, text in zip(item.doc_ids, item.documents)}
        count, delimiters = teacher.asking.backend.count_text, teacher.prompt.delimiters
        kept = list(texts)[: teacher.top] if teacher.pairs == "all" else list(texts)
        self.count = len(kept)
        self.passages, cut = fit_passages(kept, teacher.passage_tokens, count, delimiters)
        (self.query,), _ = fit_passages([item.query], teacher.passage_tokens, count, delimiters)
        self.documents = {doc_id: at for doc_id, at in self.documents.items() if at < self.count}
        self.counts = Counter(passages_cut=cut)  # handed on with the scores: a list without them is asked again
        self.counts["below_top"] += len(set(item.doc_ids)) - len(self.documents)
        self.known: set[int] = set()  # documents of which an answer could be read
        self.votes: dict[Pair, int | None] = {}  # (shown first, shown second) → the place of the winner
        self.open: dict[Pair, None] = {}
        self.ranking = list(range(self.count))
        self._steps = self._comparisons()
        self.done = False
        self._go_on()

    def _comparisons(self) -> Iterator[list[Pair]]:
        """The pairs that are asked together, one order of each."""
        if self.teacher.pairs == "all":
            if self.count > 1:
                yield [(a, b) for a in range(self.count) for b in range(a + 1, self.count)]
            return
        for top in range(min(self.teacher.top, self.count - 1)):
            for at in range(self.count - 2, top - 1, -1):
                upper, lower = self.ranking[at : at + 2]
                yield [(upper, lower)]
                if self.better(lower, upper) == 1.0:
                    self.ranking[at : at + 2] = lower, upper

    def better(self, a: int, b: int) -> float:
        """The share of the votes of a pair that a got; one that preferred neither counts half."""
        winners = (self.votes[a, b], self.votes[b, a])
        return sum(0.5 if winner is None else float(winner == place) for place, winner in enumerate(winners)) / 2

    def _go_on(self) -> None:
        """Open the next pairs that were not compared yet."""
        for pairs in self._steps:
            self.open = dict.fromkeys(shown for a, b in pairs for shown in ((a, b), (b, a)) if shown not in self.votes)
            if self.open:
                return
        self.done = True

    def request(self, pair: Pair) -> Request:
        passages = [self.passages[at] for at in pair]
        return self.teacher.prompt.render(self.query, passages, decoding=self.teacher.decoding)

    def take(self, pair: Pair, winner: int | None, readable: bool) -> None:
        self.votes[pair] = winner
        del self.open[pair]
        self.known.update(pair if readable else ())
        self.counts["answers"] += 1
        self.counts["undecided"] += winner is None
        self.counts["first_shown"] += winner == 0
        if pair[::-1] in self.votes:
            self.counts["pairs"] += 1
            # The same place twice is one passage once and the other the other time.
            self.counts["disagreed"] += winner is not None and winner == self.votes[pair[::-1]]
        if not self.open:
            self._go_on()

    def result(self) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """The list's scores, of the documents of which something is known."""
        doc_ids = [doc_id for doc_id, at in self.documents.items() if at in self.known or not self.votes]
        if not doc_ids:
            return
        self.teacher._counts.update(self.counts)
        signal = self.teacher.signal
        if signal == "rank":
            scores = np.empty(self.count)
            scores[self.ranking] = rank_scores(self.count)
        elif signal == "bradley_terry":
            # Plackett-Luce of orders of two is Bradley-Terry.
            orders = [(pair[winner], pair[1 - winner]) for pair, winner in self.votes.items() if winner is not None]
            scores = plackett_luce(orders, self.count)
        else:
            others = max(self.count - 1, 1)
            scores = np.array(
                [sum(self.better(a, b) for b in range(self.count) if b != a) / others for a in range(self.count)]
            )
        values = scores[[self.documents[doc_id] for doc_id in doc_ids]].astype(np.float32)
        check_finite(self.item.query_id, doc_ids, values, self.teacher.type)
        yield self.item.query_id, doc_ids, values
