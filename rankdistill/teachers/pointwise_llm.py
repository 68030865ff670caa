"""A language model that judges one passage at a time, as teacher: the logit of "yes" less that of "no".

The cheapest of the three ways to ask (one prompt a document, one token an answer, no document depends on another), and
usually the weakest: the model never sees what the others have to offer (Zhuang et al. 2024, arXiv:2310.14122).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.store import ScoreKind
from rankdistill.teachers.base import TextList, check_finite
from rankdistill.teachers.llm.asking import AskingTeacher
from rankdistill.teachers.llm.base import Answer, Request
from rankdistill.teachers.llm.budget import BudgetReached
from rankdistill.teachers.llm.prompts import Prompt, fit_passages, load_prompt

LEAST = -20.0  # log-probability that a word is taken to have where the reported one leaves it next to nothing


class PointwiseTeacher(AskingTeacher):
    """A language model asked of each passage whether it answers the query; score = logit(yes) - logit(no).

    A document's score does not depend on its list, so only pairs that the store lacks are asked for. A server that
    reports only the likeliest words may leave out one of the two: it gets all the probability that the other leaves,
    but not more than the other has (which bounds it from above), and is counted; a document for which both are absent
    gets no score, which is said.

    Args:
        prompt: a template of kind pointwise: a file, or a shipped name. The first of its identifiers says yes.
    """

    type = "pointwise_llm"
    score_kind: ScoreKind = "logit"

    def __init__(
        self,
        backend: dict[str, Any],
        prompt: str = "pointwise",
        passage_tokens: int = 200,
        budget: str | float | None = None,
        prices: dict[str, float] | None = None,
    ) -> None:
        super().__init__(backend, budget, prices)
        self.prompt: Prompt = load_prompt(prompt, "pointwise")
        if len(self.prompt.names(1)) != 2:
            raise UsageError(
                f"a pointwise prompt is answered by two words, not {len(self.prompt.names(1))}",
                where="teacher.prompt",
                fix='identifiers: ["yes", "no"]',
            )
        if passage_tokens < 1:
            raise UsageError(f"{passage_tokens} is too few", where="teacher.passage_tokens", fix="at least 1")
        self.passage_tokens = passage_tokens
        self.asking.backend.check("first")
        self._counts: Counter[str] = Counter()

    def _settings(self) -> dict[str, Any]:
        return {"type": self.type, "prompt": self.prompt.fingerprint(), "passage_tokens": self.passage_tokens}

    def describe(self) -> dict[str, Any]:
        return {**self._settings(), "prompt": self.prompt.model_dump(), "backend": self.asking.backend.describe()}

    def score(self, lists: Sequence[TextList]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Scores of each list, in order; the prompts of all of them are asked together.

        Raises:
            BudgetReached: after what was paid for has been yielded.
        """
        scores = [np.full(len(item.doc_ids), np.nan, dtype=np.float32) for item in lists]
        places = [(row, column) for row, item in enumerate(lists) for column in range(len(item.doc_ids))]
        reached: BudgetReached | None = None
        try:
            for number, answer in self.asking.ask(enumerate(self._requests(lists))):
                row, column = places[number]
                scores[row][column] = self._read(answer)
        except BudgetReached as error:
            reached = error
        for item, values in zip(lists, scores, strict=True):
            known = np.flatnonzero(~np.isnan(values))
            if len(known):
                doc_ids = [item.doc_ids[at] for at in known]
                check_finite(item.query_id, doc_ids, values[known], self.type)
                yield item.query_id, doc_ids, values[known]
        if reached is not None:
            raise reached

    def _requests(self, lists: Sequence[TextList]) -> Iterator[Request]:
        count, delimiters = self.asking.backend.count_text, self.prompt.delimiters
        for item in lists:
            (query,), _ = fit_passages([item.query], self.passage_tokens, count, delimiters)
            passages, cut = fit_passages(item.documents, self.passage_tokens, count, delimiters)
            self._counts["passages"] += len(passages)
            self._counts["passages_cut"] += cut
            for passage in passages:
                yield self.prompt.render(query, [passage], decoding="first")

    def _read(self, answer: Answer) -> float:
        """logit(yes) - logit(no); NaN where neither was reported."""
        logits = {} if answer.refused else answer.logits
        if logits is None:
            raise RankdistillError(
                "the backend gave no logits of the identifiers", fix="a server with logprobs, or type: pairwise_llm"
            )
        yes, no = (logits.get(name, np.nan) for name in self.prompt.names(1))
        known = not (np.isnan(yes) and np.isnan(no))
        self.asking.see(answer, known)
        if not known:
            return np.nan
        if np.isnan(yes) or np.isnan(no):
            self._counts["one_absent"] += 1
        if np.isnan(yes):
            yes = left_by(no)
        elif np.isnan(no):
            no = left_by(yes)
        return float(yes - no)

    # -- what was counted ---------------------------------------------------------------------------------------------

    def take_report(self) -> dict[str, Any]:
        counts, self._counts = self._counts, Counter()
        return {name: count for name, count in counts.items() if count}

    def report_lines(self, report: dict[str, Any]) -> list[str]:
        texts = {
            "passages_cut": "passages were cut to their token budget",
            "one_absent": "answers reported one of the two words: the other is bounded by it",
        }
        return [f"{report[name]:,} {text}" for name, text in texts.items() if report.get(name)]


def left_by(logarithm: float) -> float:
    """The greatest log-probability of a word that was not reported beside one that was: what that one leaves."""
    rest = -np.expm1(min(logarithm, 0.0))
    return float(min(logarithm, max(np.log(rest), LEAST) if rest > 0 else LEAST))
