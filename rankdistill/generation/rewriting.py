"""Rewriting of training queries in context (CAR, Anand et al. 2023, arXiv:2308.16753): a language model that sees the
relevant document writes what the user meant. It is used in training alone; test queries stay as they were typed.

The danger is a leak: a rewrite that quotes the document makes training easy and teaches nothing. So what the passage's
own words do to the queries is counted, and said where they double.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankdistill.errors import UsageError
from rankdistill.generation.asked import DOCUMENTS_AT_ONCE, Asked, AskingGenerator
from rankdistill.generation.base import Draft
from rankdistill.generation.filters import BATCH, META, Filter, longest_run, normalised, words
from rankdistill.progress import warn
from rankdistill.teachers.llm.prompts import escaped

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.base import Engine

FEW = 4  # content words, of more than three letters, of an ambiguous query
LONGEST = 24
LONGEST_COPY = 8
DEPTH = 100  # of the search that a rewrite must not make worse


class RewritingGenerator(AskingGenerator):
    """Training queries written again, with their best labelled document as context.

    Args:
        queries: which: `ambiguous`, those of at most four words of more than three letters, or `all`.
        mix: learn from the original beside its rewrite, or (false) from the rewrite in its place.
        most: queries at most, the first of the train split.
    """

    type = "rewriting"
    rewrites = True

    def __init__(
        self,
        backend: dict[str, Any],
        prompt: str = "rewriting",
        queries: Literal["ambiguous", "all"] = "ambiguous",
        mix: bool = True,
        most: int | None = None,
        temperature: float = 0.0,
        **asking: Any,
    ) -> None:
        super().__init__(backend, prompt, temperature=temperature, **asking)
        self.queries, self.mix, self.most = queries, mix, most
        (self.kind,) = list(self.prompt.kinds)[:1]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "queries": self.queries, "mix": self.mix, "most": self.most}

    def asked(self, collection: Collection, rows: Sequence[int]) -> Iterator[list[Asked]]:
        """Training queries of the collection's own; `rows` are not looked at."""
        if "train" not in collection.splits:
            fix = "a collection with labelled queries, or a generator of type few_shot"
            raise UsageError("there are no training queries to rewrite", where=collection.spec, fix=fix)
        qrels, (training, _) = collection.qrels("train"), collection.training_splits()
        texts = dict(zip(training, collection.query_texts(training), strict=True))
        chosen = [i for i, text in texts.items() if self.queries == "all" or is_ambiguous(text)][: self.most]
        for start in range(0, len(chosen), DOCUMENTS_AT_ONCE):
            chunk = []
            for query_id in chosen[start : start + DOCUMENTS_AT_ONCE]:
                best = max(qrels[query_id], key=lambda doc_id: qrels[query_id][doc_id])
                if qrels[query_id][best] > 0:
                    (passage,) = collection.document_texts(collection.doc_rows([best]))
                    draft = Draft("", best, self.kind, original_id=query_id)
                    chunk.append(Asked(draft, passage, escaped(texts[query_id])))
            yield chunk


def is_ambiguous(query: str) -> bool:
    return sum(len(word) > 3 for word in words(query)) <= FEW


class Rewritten(Filter):
    """A rewrite says what its original says, names and numbers included, and quotes no document.

    Args:
        texts: document id → its text.
        originals: query id → its text.
    """

    def __init__(self, texts: Mapping[str, str], originals: Mapping[str, str]) -> None:
        self.texts, self.originals = texts, originals

    def drop(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            draft.reason = self._reason(draft, self.originals[draft.original_id])

    def _reason(self, draft: Draft, original: str) -> str:
        rewrite, typed = words(draft.text), original.split()
        kept = [word for at, word in enumerate(typed) if any(map(str.isdigit, word)) or (at and word[:1].isupper())]
        checks = {
            "empty": not rewrite,
            "about the passage": bool(META.search(draft.text)),
            "length": len(rewrite) > LONGEST,
            "unchanged": normalised(draft.text) == normalised(original),
            "copied": longest_run(rewrite, words(self.texts[draft.doc_id])) > LONGEST_COPY,
            "loses a name or a number": not set(words(" ".join(kept))) <= set(rewrite),
        }
        return next((reason for reason, holds in checks.items() if holds), "")


class NoWorse(Filter):
    """A search finds the document by the rewrite at least as high as by the original."""

    def __init__(self, collection: Collection, engine: Engine, originals: Mapping[str, str]) -> None:
        self.collection, self.engine, self.originals = collection, engine, originals

    def drop(self, drafts: Sequence[Draft]) -> None:
        for start in range(0, len(drafts), BATCH):
            some = drafts[start : start + BATCH]
            rows = self.collection.doc_rows([draft.doc_id for draft in some])
            before = self._ranks([self.originals[draft.original_id] for draft in some], rows)
            after = self._ranks([draft.text for draft in some], rows)
            for draft, old, new in zip(some, before, after, strict=True):
                draft.ranks |= {"original": old % (DEPTH + 1), "rewrite": new % (DEPTH + 1)}
                draft.reason = "found lower" if new > old else ""

    def _ranks(self, queries: Sequence[str], rows: Any) -> list[int]:
        found = (np.flatnonzero(hits.rows == row) for hits, row in zip(self.engine.search(queries, DEPTH), rows))
        return [int(at[0]) + 1 if len(at) else DEPTH + 1 for at in found]


def leak(drafts: Sequence[Draft], texts: Mapping[str, str], originals: Mapping[str, str]) -> dict[str, float]:
    """The mean number of words that a query shares with its document, before and after rewriting; said where it
    doubles."""
    counts = [
        [len(set(words(text)) & set(words(texts[draft.doc_id]))) for text in (originals[draft.original_id], draft.text)]
        for draft in drafts
    ]
    before, after = (round(float(mean), 2) for mean in np.mean(counts or [[0, 0]], axis=0))
    if after >= 2 * before and after > 0:
        warn(
            f"generate: rewritten queries share {after:.1f} words with their documents, the originals {before:.1f}: "
            "they may give the answer away; training looks easy then and test does not move"
        )
    return {"before": before, "after": after}


def relabelled(collection: Collection, rows: Sequence[Mapping[str, Any]], mix: bool) -> Collection:
    """The collection with a training split of original queries and rewrites, which have their originals' labels."""
    qrels, (training, dev) = collection.qrels("train"), collection.training_splits()
    kept = [row for row in rows if row["kept"]]
    replaced = set() if mix else {row["original_id"] for row in kept}
    labels: dict[str, dict[str, int]] = {i: dict(qrels[i]) for i in training if i not in replaced}
    for row in kept:
        labels[row["query_id"]] = {**labels.get(row["query_id"], {}), **qrels[row["original_id"]]}
    held = {i: qrels[i] for i in dev if i in qrels}  # where there is no dev split of its own
    return collection.with_labels(
        {row["query_id"]: row["text"] for row in kept}, {"generated": labels, "generated-dev": held}
    )
