"""What the search page shows: one query, several systems side by side, and where each puts the documents of the others.

A column is an engine; the last one may be a teacher that re-ranks what the engines found, on demand and few documents,
because it is slow. `SearchPage.search` answers with plain values for JSON; `page_server` puts them on a local address.
Document texts are data: they leave here as strings and the page sets them as text, never as markup.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from rankdistill.collections import Collection
from rankdistill.collections.collection import GENERATED, GENERATED_TEST
from rankdistill.collections.passages import best_passages, document_of
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.systems import RerankList, encoder_and_index
from rankdistill.runs import Run

LONGEST_QUERY = 1000  # characters
MOST_DOCUMENTS = 50  # a column
FOLLOWED = 100  # ranks searched in every column, so that a move is known beyond the documents shown
TEACHER_DEPTH = 30  # documents a teacher re-ranks
LONGEST_TEXT = 2000  # characters of a document that are sent
MOST_EXAMPLES = 200  # judged queries to pick from
WARM_UP = 8  # queries searched before the first that is asked
TEACHER = "teacher"
ALL_COLUMNS = "all"  # what the teacher re-ranks: the first of every column in turn
METRIC = "ndcg@10"


Times = dict[str, float]  # milliseconds of each step
Encoded = dict[int, tuple[Any, Times]]  # of each encoder: its vector [1, dimension] of a query


@dataclass
class Column:
    """A system that searches: `search(queries, k)`; one made of an `encoder` and an `index` is timed in two parts.

    Args:
        bytes: what is kept to search, on disk.
        note: shown with the name.
        kind: bm25, student, index or another word; a page may colour by it.
    """

    name: str
    engine: Any
    bytes: int | None = None
    note: str = ""
    kind: str = ""
    key: str = ""

    def search(self, query: str, k: int, encoded: Encoded) -> tuple[Any, Times]:
        """Hits (rows and scores, best first); columns of one student share its vector and time."""
        parts = encoder_and_index(self.engine)
        if parts is None:
            return _timed("search_ms", lambda: self.engine.search([query], k)[0])
        encoder, index = parts
        if id(encoder) not in encoded:
            encoded[id(encoder)] = _timed("encode_ms", lambda: encoder.encode_queries([query]))
        vectors, encoding = encoded[id(encoder)]
        hits, searching = _timed("search_ms", lambda: index.search(vectors, k)[0])
        return hits, encoding | searching


@dataclass
class Reranker:
    """A teacher: scores of one list, float [documents], NaN where it has none; higher is better."""

    scores: Callable[[RerankList], Any]
    depth: int = TEACHER_DEPTH
    note: str = ""


@dataclass
class _Ranking:
    """What one column found, with ranks from 1 of all rows it followed."""

    rows: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    times: Times = field(default_factory=dict)
    note: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        self.rank_of = {row: rank for rank, row in enumerate(self.rows, 1)}


class SearchPage:
    """The columns over one collection.

    Not for several threads at once (encoders are not): whoever serves it lets one search through at a time.
    In memory: texts and labels of the queries that are offered as examples (of test, dev, or any split but train).

    Args:
        columns: systems, left to right; the first is the one that moves are counted against.
        depth: documents a column shows unless asked for another number.
        no_teacher: why there is none, shown in its place.

    Raises:
        UsageError: no column, or a depth outside 1 to MOST_DOCUMENTS.
    """

    def __init__(
        self,
        collection: Collection,
        columns: Sequence[Column],
        teacher: Reranker | None = None,
        *,
        name: str = "",
        depth: int = 10,
        no_teacher: str = "",
    ) -> None:
        if not columns:
            raise UsageError("a search page needs at least one system")
        self.collection, self.columns, self.teacher = collection, list(columns), teacher
        self.name, self.no_teacher, self.depth = name, no_teacher, _count(depth, "--depth")
        taken = {TEACHER, ALL_COLUMNS}
        for column in self.columns:
            column.key = _key(column.name, taken)
            taken.add(column.key)
        # Training queries may be half a million.
        splits = [name for name in collection.splits if name not in ("train", GENERATED)]
        self.split = next((name for name in ("test", "dev", GENERATED_TEST, *splits) if name in splits), "")
        self.qrels = collection.found_qrels(self.split) if self.split else {}
        ids = list(self.qrels)[::-1]  # of queries with one text, the first stays
        texts = map(_plain, collection.query_texts(ids) if ids else [])
        self._query_ids = dict(reversed(dict(zip(texts, ids, strict=True)).items()))
        # The first calls of every engine load and compile (encoders for each length): not what a query costs.
        for query in [*list(self._query_ids)[:WARM_UP], "warm up"]:
            encoded: Encoded = {}
            rankings = [self._rank(column, query[:LONGEST_QUERY], encoded, {}) for column in self.columns]
        if self.teacher is not None:
            self._rerank(query, None, rankings)  # what fails is shown with the first query

    def about(self) -> dict[str, Any]:
        """What there is to search, with what, and example queries (evenly spaced over the split)."""
        texts = [text for text in self._query_ids if 0 < len(text) <= LONGEST_QUERY]
        step = max(1, -(-len(texts) // MOST_EXAMPLES))
        return {
            "name": self.name,
            "collection": {"name": self.collection.name, "documents": self.collection.document_count},
            "columns": [
                {name: getattr(column, name) for name in ("key", "name", "kind", "note", "bytes")}
                for column in self.columns
            ],
            "teacher": {"depth": self.teacher.depth, "note": self.teacher.note} if self.teacher else None,
            "no_teacher": self.no_teacher,
            "depth": self.depth,
            "limits": {"query": LONGEST_QUERY, "k": MOST_DOCUMENTS, "followed": FOLLOWED},
            "split": self.split,
            "judged_queries": len(self._query_ids),
            "examples": [{"query_id": self._query_ids[text], "text": text} for text in texts[::step]],
        }

    def search(self, query: str, k: int | None = None, teacher: str | None = None) -> dict[str, Any]:
        """Search with every column.

        Args:
            k: documents a column shows, 1 to MOST_DOCUMENTS; the page's depth unless given.
            teacher: ask the teacher too: to re-rank the first of this column (by key), or of `all` columns in turn.

        Returns:
            query, k, judged (the query's labels, None for one that is not judged), columns and documents: doc id →
            title, text, relevance and the rank in each column (None: not within the FOLLOWED first; for the teacher,
            not among the re-ranked).

        Raises:
            UsageError: an empty or too long query, a wrong k, no such column to re-rank, no teacher.
        """
        query = clean_query(query)
        k = self.depth if k is None else _count(k, "k")
        keys = [column.key for column in self.columns]
        if teacher is not None and self.teacher is None:
            raise UsageError("this page has no teacher", where="teacher", fix=self.no_teacher or "leave it out")
        if teacher is not None and teacher not in (ALL_COLUMNS, *keys):
            raise UsageError(
                f"there is no column {teacher!r}", where="teacher", fix=f"one of: {', '.join([ALL_COLUMNS, *keys])}"
            )
        query_id = self._query_ids.get(query)
        encoded: Encoded = {}
        shown_at: dict[str, int] = {}
        rankings = {column.key: self._rank(column, query, encoded, shown_at) for column in self.columns}
        if teacher is not None:
            base = rankings.values() if teacher == ALL_COLUMNS else [rankings[teacher]]
            rankings[TEACHER] = self._rerank(query, query_id, list(base))
        shown = list(dict.fromkeys(row for ranking in rankings.values() for row in ranking.rows[:k]))
        ids = dict(zip(shown, self.collection.found_ids(shown), strict=True)) if shown else {}
        documents = zip(ids.items(), self.collection.documents(shown) if shown else [], strict=True)
        labels = self.qrels.get(str(query_id), {})
        return {
            "query": query,
            "k": k,
            "judged": self._judged(query_id),
            "columns": [self._column(key, ranking, ids, k, query_id) for key, ranking in rankings.items()],
            "documents": {
                doc_id: {
                    "title": document.title[:LONGEST_TEXT],
                    "text": document.text[:LONGEST_TEXT],
                    "characters": len(document.text),
                    "relevance": labels.get(doc_id),
                    "ranks": {key: ranking.rank_of.get(row) for key, ranking in rankings.items()},
                }
                for (row, doc_id), document in documents
            },
        }

    def _rank(self, column: Column, query: str, encoded: Encoded, shown_at: dict[str, int]) -> _Ranking:
        """`shown_at`: document → the row that all columns show of it, the best passage of the first that finds it."""
        try:
            hits, times = column.search(query, self.collection.reach(FOLLOWED), encoded)
        except RankdistillError as error:  # one column that fails leaves the others
            return _Ranking(error=error.what)
        rows, scores = [int(row) for row in hits.rows], [float(score) for score in hits.scores]
        if self.collection.passages:
            ids = self.collection.doc_ids(rows)
            best = best_passages(ids)[:FOLLOWED]
            rows = [shown_at.setdefault(document_of(ids[at]), rows[at]) for at in best]
            scores = [scores[at] for at in best]
        return _Ranking(rows, scores, times)

    def _rerank(self, query: str, query_id: str | None, base: list[_Ranking]) -> _Ranking:
        assert self.teacher is not None
        rows = in_turn([ranking.rows for ranking in base], self.teacher.depth)
        if not rows:
            return _Ranking(note="nothing to re-rank")
        item = RerankList(query_id or "", query, self.collection.doc_ids(rows), self.collection.document_texts(rows))
        ask = self.teacher.scores
        try:
            scores, times = _timed("teacher_ms", lambda: np.asarray(ask(item), np.float64))
        except RankdistillError as error:
            return _Ranking(error=error.what)
        known = np.flatnonzero(np.isfinite(scores))
        # Stable: of equal scores the document that the first stage had higher.
        order = known[np.argsort(-scores[known], kind="stable")].tolist()
        note = f"{len(rows)} documents re-ranked"
        if len(known) < len(rows):
            note = f"scores of {len(known)} of {len(rows)} documents" if len(known) else "no score for this query"
        return _Ranking([rows[at] for at in order], scores[order].tolist(), times, note)

    def _column(self, key: str, ranking: _Ranking, ids: dict[int, str], k: int, query_id: str | None) -> dict[str, Any]:
        first = [
            {"doc_id": ids[row], "rank": ranking.rank_of[row], "score": round(score, 4)}
            for row, score in zip(ranking.rows[:k], ranking.scores, strict=False)
        ]
        return {
            "key": key,
            "hits": first,
            "found": len(ranking.rows),
            "times": {name: round(value, 3) for name, value in ranking.times.items()},
            METRIC: self._measure(ranking, query_id),
            "note": ranking.note,
            "error": ranking.error,
        }

    def _measure(self, ranking: _Ranking, query_id: str | None) -> float | None:
        """nDCG@10 of the order that is shown (which decides among equal scores, unlike in a run file)."""
        if query_id is None or ranking.error:
            return None
        if not ranking.rows:
            return 0.0
        ids = self.collection.found_ids(ranking.rows[:10])
        run = Run.from_dict({query_id: {doc_id: -float(rank) for rank, doc_id in enumerate(ids)}})
        return round(evaluate_run(run, {query_id: self.qrels[query_id]}, [METRIC]).means[METRIC], 4)

    def _judged(self, query_id: str | None) -> dict[str, Any] | None:
        if query_id is None:
            return None
        labels = self.qrels[query_id]
        relevant = [doc_id for doc_id, relevance in labels.items() if relevance > 0]
        missing = int((np.asarray(self.collection.doc_rows(relevant)) < 0).sum()) if relevant else 0
        return {
            "query_id": query_id,
            "split": self.split,
            "judged": len(labels),
            "relevant": len(relevant),
            "relevant_missing": missing,  # judged relevant, but not in the collection: cannot be found
        }


def clean_query(text: str) -> str:
    """A query as it is searched: control characters and broken code points as spaces, white space folded.

    Raises:
        UsageError: nothing is left, or it is longer than LONGEST_QUERY characters.
    """
    if len(text) > 20 * LONGEST_QUERY:
        raise UsageError(f"the query is longer than {LONGEST_QUERY:,} characters", where="q", fix="shorten it")
    text = _plain(text)
    if not text:
        raise UsageError("the query is empty", where="q", fix="type some words")
    if len(text) > LONGEST_QUERY:
        raise UsageError(
            f"the query has {len(text):,} characters, more than {LONGEST_QUERY:,}", where="q", fix="shorten it"
        )
    return text


def _plain(text: str) -> str:
    return " ".join("".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text).split())


def in_turn(lists: Sequence[Sequence[int]], count: int) -> list[int]:
    """The first `count` distinct values: the first of each list, then the second of each, and so on."""
    in_order = [value for place in zip_longest(*lists) for value in place if value is not None]
    return list(dict.fromkeys(in_order))[:count]


def _count(value: int, where: str) -> int:
    if not 1 <= value <= MOST_DOCUMENTS:
        raise UsageError(f"{value} documents a column", where=where, fix=f"between 1 and {MOST_DOCUMENTS}")
    return value


def _key(name: str, taken: set[str]) -> str:
    """A short key for addresses: letters, digits and dashes, different from those taken."""
    stem = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-") or "column"
    return next(key for key in (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3))) if key not in taken)


def _timed(step: str, work: Callable[[], Any]) -> tuple[Any, Times]:
    started = time.perf_counter()
    return work(), {step: (time.perf_counter() - started) * 1000}
