"""A language model that prefers one of two passages, as teacher (pairwise ranking prompting, Qin et al. 2024,
arXiv:2306.17563).

Models favour a place in the prompt, so each pair is shown in both orders: each is a vote. Votes that disagree make a
tie, and are counted. All pairs of the first k cost k(k-1) prompts a query; sliding passes about 2kn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from rankdistill.errors import UsageError
from rankdistill.scores.rank_scores import plackett_luce, rank_scores
from rankdistill.scores.store import ScoreKind
from rankdistill.teachers.base import TextList
from rankdistill.teachers.llm.answers import Reading
from rankdistill.teachers.llm.asking import AskingTeacher, Talk, numbered

Pair = tuple[int, int]  # two passages of a list, in the order shown
Votes = dict[Pair, int | None]  # → the place of the winner; None where the answer prefers neither, or cannot be read


@dataclass(eq=False)
class PairwiseTeacher(AskingTeacher):
    """A language model asked which of two passages answers the query better, in both orders.

    A document's score depends on the list it is in (see `reads_lists`). Documents with the same text are compared once
    and share a score. A document of which no answer could be read gets none. A dry run with `pairs: passes` counts the
    first pass alone: which neighbours the next one has depends on the answers.

    Args:
        prompt: a template of kind pairwise: a file, or a shipped name.
        pairs: all: every pair of the list's first `top` documents, the others get no score; passes: neighbours are
            compared from the end of the list to its beginning and swapped where both orders say so, `top` times, after
            which the first `top` stand in their places. Prompts a query: top (top - 1); at most top (2n - top - 1).
        top: see `pairs`.
        signal: wins: the share of votes, a missing one counting half; bradley_terry: log-strengths fitted to the votes
            (both with pairs: all); rank: 1 / r in the order that passes leave.
        decoding: first: the larger of the two letters' logits; generate: the letter that is written.
    """

    type = "pairwise_llm"
    kind = "pairwise"
    reads_lists = True
    counted = {
        "undecided": "answers preferred neither passage, or could not be read",
        "passages_cut": "passages were cut to their token budget",
        "below_top": "documents stand below the first ones and have no score",
    }

    prompt: str = "pairwise"
    pairs: Literal["all", "passes"] = "all"
    top: int = 10
    signal: Literal["wins", "bradley_terry", "rank"] = "wins"
    decoding: Literal["first", "generate"] = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.score_kind: ScoreKind = "logit" if self.signal == "bradley_terry" else "rank"
        if (self.signal == "rank") != (self.pairs == "passes"):
            fix = "signal: rank" if self.pairs == "passes" else "signal: wins or bradley_terry"
            what = f"pairs: {self.pairs} does not give signal: {self.signal}"
            raise UsageError(what, where="teacher.signal", fix=fix)
        if len(self.template.names(2)) != 2:
            raise UsageError("a pairwise prompt has two identifiers", where="teacher.prompt")

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("pairs", "top", "signal", "decoding", "passage_tokens")}

    def _talk(self, item: TextList) -> Talk:
        texts, places = numbered(item)
        kept = texts[: self.top] if self.pairs == "all" else texts
        passages, cut = self._fitted(kept)
        (query,), _ = self._fitted([item.query])
        votes: Votes = {}
        known: set[int] = set()  # passages of which an answer could be read
        ranking = list(range(len(kept)))
        for pairs in self._comparisons(ranking, votes):
            readings = yield [
                self.template.render(query, [passages[at] for at in pair], decoding=self.decoding) for pair in pairs
            ]
            for pair, reading in zip(pairs, readings, strict=True):
                votes[pair] = winner(reading)
                known.update(pair if reading is not None and reading.readable else ())
        doc_ids = [doc_id for doc_id, at in places.items() if at in known or (not votes and at < len(kept))]
        if not doc_ids:
            return None
        first_shown, undecided = (sum(vote == place for vote in votes.values()) for place in (0, None))
        self._count(
            +Counter(
                passages_cut=cut,
                below_top=sum(at >= len(kept) for at in places.values()),
                answers=len(votes),
                undecided=undecided,
                first_shown=first_shown,
                pairs=len(votes) // 2,
                # The same place twice is one passage once and the other the other time.
                disagreed=sum(vote is not None and vote == votes[b, a] for (a, b), vote in votes.items()) // 2,
            )
        )
        scores = self._scores(ranking, votes)
        return doc_ids, scores[[places[doc_id] for doc_id in doc_ids]]

    def _comparisons(self, ranking: list[int], votes: Votes) -> Iterator[list[Pair]]:
        """The pairs that are asked together, in both orders, none twice; `passes` reorder the ranking on the way."""
        count = len(ranking)
        if self.pairs == "all":
            if count > 1:
                yield [shown for a, b in combinations(range(count), 2) for shown in ((a, b), (b, a))]
            return
        for top in range(min(self.top, count - 1)):
            for at in range(count - 2, top - 1, -1):
                upper, lower = ranking[at : at + 2]
                if (upper, lower) not in votes:
                    yield [(upper, lower), (lower, upper)]
                if share(votes, lower, upper) == 1.0:
                    ranking[at : at + 2] = lower, upper

    def _scores(self, ranking: list[int], votes: Votes) -> np.ndarray:
        """float64 [passages]"""
        count = len(ranking)
        if self.signal == "rank":
            scores = np.empty(count)
            scores[ranking] = rank_scores(count)
            return scores
        if self.signal == "bradley_terry":  # Plackett-Luce of orders of two
            return plackett_luce([(pair[w], pair[1 - w]) for pair, w in votes.items() if w is not None], count)
        wins = [sum(share(votes, a, b) for b in range(count) if b != a) for a in range(count)]
        return np.array(wins) / max(count - 1, 1)

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        """How often the two orders of a pair disagreed, and how often the passage shown first won."""
        counts = Counter(report)
        if not counts["pairs"]:
            return []
        decided = max(counts["answers"] - counts["undecided"], 1)
        return [
            f"{counts['pairs']:,} pairs in both orders, which disagreed on {counts['disagreed']:,} "
            f"({counts['disagreed'] / counts['pairs']:.0%})",
            f"the passage shown first won {counts['first_shown'] / decided:.0%} of the answers: without position bias "
            "50% where each pair is decided alike in both orders",
            *super().report_lines(report),
        ]


def winner(reading: Reading | None) -> int | None:
    """0 or 1, the place of the passage preferred; None where the answer says neither."""
    if reading is None or not reading.readable:
        return None
    if reading.logits is None:
        return reading.order[0]
    first, second = np.where(np.isnan(reading.logits), -np.inf, reading.logits)
    return None if first == second else int(second > first)


def share(votes: Votes, a: int, b: int) -> float:
    """Of the two votes of a pair, what a got; one that preferred neither counts half."""
    winners = (votes[a, b], votes[b, a])
    return sum(0.5 if vote is None else float(vote == place) for place, vote in enumerate(winners)) / 2
