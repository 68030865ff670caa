"""A language model that judges one passage at a time, as teacher: the logit of "yes" less that of "no".

The cheapest of the three ways to ask (one prompt a document, one token an answer, no document depends on another), and
usually the weakest: the model never sees what the others have to offer (Zhuang et al. 2024, arXiv:2310.14122).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankdistill.errors import UsageError
from rankdistill.teachers.base import TextList
from rankdistill.teachers.llm.asking import AskingTeacher, Talk

LEAST = -20.0  # log-probability that a word is taken to have where the reported one leaves it next to nothing


@dataclass(eq=False)
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
    kind = "pointwise"
    score_kind = "logit"
    counted = {
        "passages_cut": "passages were cut to their token budget",
        "one_absent": "answers reported one of the two words: the other is bounded by it",
    }

    prompt: str = "pointwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.template.names(1)) != 2:
            raise UsageError(
                f"a pointwise prompt is answered by two words, not {len(self.template.names(1))}",
                where="teacher.prompt",
                fix='identifiers: ["yes", "no"]',
            )

    def _settings(self) -> dict[str, Any]:
        return {"passage_tokens": self.passage_tokens}

    def _talk(self, item: TextList) -> Talk:
        (query,), _ = self._fitted([item.query])
        passages, cut = self._fitted(item.documents)
        readings = yield [self.template.render(query, [passage], decoding="first") for passage in passages]
        counts = Counter(passages=len(passages), passages_cut=cut)
        scores = {}
        for doc_id, reading in zip(item.doc_ids, readings, strict=True):
            if reading is not None and reading.readable and reading.logits is not None:
                yes, no = reading.logits
                counts["one_absent"] += np.isnan(yes) or np.isnan(no)
                scores[doc_id] = (left_by(no) if np.isnan(yes) else yes) - (left_by(yes) if np.isnan(no) else no)
        if not scores:
            return None
        self._count(+counts)
        return list(scores), np.array(list(scores.values()))


def left_by(logarithm: float) -> float:
    """The greatest log-probability of a word that was not reported beside one that was: what that one leaves."""
    rest = -np.expm1(min(logarithm, 0.0))
    return float(min(logarithm, max(np.log(rest), LEAST) if rest > 0 else LEAST))
