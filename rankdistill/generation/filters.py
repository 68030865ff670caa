"""What is thrown away of generated queries, and why: small classes in a fixed order. Each sets `reason` of the drafts
that it drops and leaves the others; a draft has one reason, that of the first who dropped it.

A query that measures (its document is held out) is looked at for its form alone: what a retriever had to find before it
was kept would flatter that retriever.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rankdistill.collections.collection import GENERATED
from rankdistill.generation.base import Draft

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.base import Engine

# A letter of a script without spaces counts as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_]+")
# Words of one who talks about the passage, or to somebody, where a query should be.
META = re.compile(
    r"\b(this|the|that|following|above|given) (passage|text|article|document|paragraph|excerpt|abstract|author)s?\b"
    r"|\b(as an ai|language model)\b"
    r"|^(sure|certainly|of course|as requested|here (is|are)|(i'?m )?sorry|i can(not|')|i am (unable|not able))\b|:$",
    re.IGNORECASE,
)
LONG_COPY = 6  # words in the document's order that a person might type by chance
SAME = 0.8  # of the words of two queries: one is nearly the other
BATCH = 512


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def normalised(text: str) -> str:
    """Lower case, without punctuation and double spaces."""
    return " ".join(words(text))


def longest_run(query: Sequence[str], document: Sequence[str]) -> int:
    """The most words of a query that follow each other in a document too."""
    before, best = [0] * (len(query) + 1), 0
    for word in document:
        row = [0] * (len(query) + 1)
        for at, other in enumerate(query):
            if word == other:
                row[at + 1] = before[at] + 1
                best = max(best, row[at + 1])
        before = row
    return best


def judged_texts(collection: Collection) -> dict[str, str]:
    """Normalised text → text of the queries that measure: those of the collection's splits but train."""
    known = {}
    for split in collection.splits:
        if split != "train" and not split.startswith(GENERATED):
            known.update({normalised(text): text for text in collection.query_texts(collection.query_ids(split))})
    return known


class Filter(ABC):
    """Drops some drafts."""

    measuring: ClassVar[bool] = True  # it looks at drafts of held-out documents too

    @abstractmethod
    def drop(self, drafts: Sequence[Draft]) -> None:
        """Set `reason` of those to be dropped; none of them has one yet."""

    def __call__(self, drafts: Sequence[Draft]) -> None:
        left = [each for each in drafts if not each.reason and (self.measuring or each.part in ("", GENERATED))]
        if left:
            self.drop(left)


class Form(Filter):
    """A query of 3 to 32 words (`keywords` and titles: 2) that speaks of what the document speaks of, in its own words.

    A query that shares no word with its document is in another language, refuses, or obeys somebody.

    Args:
        texts: document id → its text.
        copies: the document's own words are welcome.
    """

    def __init__(self, texts: Mapping[str, str], copies: bool = False) -> None:
        self.texts, self.copies = texts, copies

    def drop(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            draft.reason = self._reason(draft)

    def _reason(self, draft: Draft) -> str:
        query, least = words(draft.text), 2 if draft.prompt in ("keywords", "title") else 3
        if not query:
            return "empty"
        if not self.copies and META.search(draft.text):
            return "about the passage"
        if not least <= len(query) <= 32:
            return "length"
        if self.copies:
            return ""
        document = words(self.texts[draft.doc_id])
        stems = {word[:5] for word in document if len(word) > 3 or not word.isascii()}
        if not any(word[:5] in stems for word in query if len(word) > 3 or not word.isascii()):
            return "unrelated"
        copied = len(query) >= LONG_COPY and longest_run(query, document) >= 0.9 * len(query)
        return "copied" if copied else ""


class Duplicates(Filter):
    """Queries of the same words are one query: of another document it is one more positive, of the same one it goes.

    A text that comes for many documents says nothing of any.

    Args:
        most: documents that one query may have.
    """

    def __init__(self, most: int = 5) -> None:
        self.most = most

    def drop(self, drafts: Sequence[Draft]) -> None:
        same: dict[frozenset[str], list[Draft]] = defaultdict(list)
        for draft in drafts:
            same[frozenset(words(draft.text))].append(draft)
        for group in same.values():
            documents: set[str] = set()
            many = len({draft.doc_id for draft in group}) > self.most
            for draft in group:
                draft.text = group[0].text
                draft.reason = "of many documents" if many else "duplicate" if draft.doc_id in documents else ""
                documents.add(draft.doc_id)


class Overlap(Filter):
    """No query that measures is learned from, nor one of nearly its words.

    Args:
        judged: texts of the dev and test queries.
    """

    def __init__(self, judged: Iterable[str]) -> None:
        self.sets = [frozenset(words(text)) for text in judged]
        self.holding: dict[str, list[int]] = defaultdict(list)
        for at, known in enumerate(self.sets):
            for word in known:
                self.holding[word].append(at)

    def drop(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            query = frozenset(words(draft.text))
            shared = Counter(at for word in query for at in self.holding.get(word, ()))
            if any(count >= SAME * len(query | self.sets[at]) for at, count in shared.items()):
                draft.reason = "a dev or test query"


class RoundTrip(Filter):
    """Promptagator's consistency filter: a search for the query finds its document again.

    Args:
        engines: name → what searches; one of them is enough.
        first: among so many results.
    """

    measuring = False

    def __init__(self, collection: Collection, engines: Mapping[str, Engine], first: int) -> None:
        self.collection, self.engines, self.first = collection, engines, first

    def drop(self, drafts: Sequence[Draft]) -> None:
        for start in range(0, len(drafts), BATCH):
            some = drafts[start : start + BATCH]
            rows = self.collection.doc_rows([draft.doc_id for draft in some])
            for name, engine in self.engines.items():
                for draft, row, hits in zip(some, rows, engine.search([d.text for d in some], self.first), strict=True):
                    at = np.flatnonzero(hits.rows == row)
                    draft.ranks[name] = int(at[0]) + 1 if len(at) else 0
            for draft in some:
                draft.reason = "" if any(draft.ranks.values()) else "not found again"


class Best(Filter):
    """The share with the highest values: a teacher's scores, or log-probabilities.

    Args:
        values: (drafts) → float [drafts]; NaN: not known, and kept.
    """

    measuring = False

    def __init__(self, reason: str, share: float, values: Any) -> None:
        self.reason, self.share, self.values = reason, share, values

    def drop(self, drafts: Sequence[Draft]) -> None:
        values = np.asarray(self.values(drafts), dtype=float)
        if np.isfinite(values).any():
            least = np.nanquantile(values, 1 - self.share)
            for draft, value in zip(drafts, values, strict=True):
                draft.reason = self.reason if value < least else ""
