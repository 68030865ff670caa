"""The queries of a report: how each system did on each, and the documents that made the difference.

Bounded: every query has a line (up to `MOST_QUERIES` a set), documents are embedded for the queries that student and
teacher treat most differently. What was left out is counted and said on the page.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from rankdistill.collections import Collection, open_collection
from rankdistill.collections.passages import document_of
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.report.data import TEACHER, RunData
from rankdistill.evaluation.results import Evaluation
from rankdistill.runs import Run, iter_run, read_run

MOST_QUERIES = 2000  # lines of a set
MOST_VALUES = 400_000  # figures on a page: with many sets each has fewer lines
OPENED = 50  # queries of a set with documents, for student and teacher
OPENED_BESIDE = 8  # more of them for the student and each other system
OPENED_ON_PAGE = 300
TOP = 10  # documents shown of a system
TITLE, TEXT, QUERY_TEXT = 160, 320, 400  # characters of a document's title and text, of a query
SCORES = 1500  # pairs drawn, of all sets; at least SCORES_OF_SET of each
SCORES_OF_SET = 150
FIDELITY = 4  # measures of agreement a line carries at most


class Queries:
    """What the page's table of queries is made of, for a set whose values of each query are there.

    Attributes:
        data: as `report.js` reads it.
        scores: (line, document, student's score, teacher's score), each score less its query's mean.
        scored: pairs that both scored, of which `scores` are drawn.
        correlation: of the two scores, over all of those pairs.
        notes: what was left out.
    """

    def __init__(self, run: RunData, test_set: Evaluation) -> None:
        self.run, self.set = run, test_set
        self.notes: list[str] = []
        self.scores: list[tuple[int, str, float, float]] = []
        self.scored = 0
        self.correlation: float | None = None
        self.systems = [name for name in test_set.systems if name in test_set.per_query]
        self.a, self.b = self._default_pair()
        rows = self._kept_rows()
        self.ids = [test_set.query_ids[row] for row in rows]
        self.collection = self._collection()
        runs = {name: ranking for name in self.systems if (ranking := self._ranking(name)) is not None}
        lines = {at: self.ids[at] for at in self._opened(rows)}
        values = test_set.per_query
        self.data: dict[str, Any] = {
            "name": test_set.name,
            "metrics": list(values[self.a]),
            "systems": self.systems,
            "pair": [self.systems.index(self.a), self.systems.index(self.b)],
            "queries": list(zip(self.ids, self._query_texts(), strict=True)),
            "values": [[_numbers(column[rows]) for column in values[name].values()] for name in self.systems],
            "fidelity": self._fidelity(),
            "level": test_set.relevance_level,
            **self._documents(lines, runs),
        }
        if len(lines) < len(test_set.query_ids):
            self.notes.append(
                f"Documents are embedded for {len(lines)} of {len(test_set.query_ids):,} queries: those that differ "
                f"most between “{self.a}” and “{self.b}”, and a few of other pairs. The whole rankings lie in "
                f"{test_set.folder.name}/runs."
            )
        if TEACHER in runs and run.student in runs:
            self._score(runs[run.student], runs[TEACHER])

    def _default_pair(self) -> tuple[str, str]:
        """(student, teacher), or what comes nearest."""
        a = self.run.student if self.run.student in self.systems else self.systems[0]
        others = [name for name in self.systems if name != a] or [str(a)]
        kinds = {self.run.kind(name): name for name in reversed(others)}
        known = (kinds[kind] for kind in ("teacher", "baseline", "untrained", "bm25") if kind in kinds)
        return str(a), next(known, others[0])

    def _collection(self) -> Collection | None:
        """The texts, if they are still what was evaluated."""
        known = self.set.collection
        try:
            collection = open_collection(str(known["spec"]))
        except (RankdistillError, OSError, KeyError) as error:
            what = error.what if isinstance(error, RankdistillError) else str(error)
            self.notes.append(f"The texts are not shown: the collection cannot be opened ({what}).")
            return None
        if collection.fingerprint != known.get("fingerprint"):
            self.notes.append("The texts are not shown: the collection has changed since the evaluation.")
            return None
        return collection

    def _kept_rows(self) -> list[int]:
        """Rows of the queries that get a line: all, or those that differ most."""
        count = len(self.set.query_ids)
        share = MOST_VALUES // max(1, len(self.run.sets) * len(self.systems) * len(self.set.metrics))
        most = max(OPENED, min(MOST_QUERIES, share))
        if count <= most:
            return list(range(count))
        said = f"The table has the {most:,} of {count:,} queries that differ most between “{self.a}” and “{self.b}”."
        self.notes.append(said)
        return sorted(self._most_different(self.b, slice(None))[:most])

    def _most_different(self, other: str, rows: list[int] | slice) -> list[int]:
        """Positions in `rows`, the greatest difference first; 0 where one system has no value."""
        nothing, values = np.zeros(len(self.set.query_ids)), self.set.per_query
        ours, theirs = (values.get(name, {}).get(self.run.metric, nothing)[rows] for name in (self.a, other))
        order: list[int] = np.argsort(-np.abs(np.nan_to_num(ours - theirs)), kind="stable").tolist()
        return order

    def _opened(self, rows: list[int]) -> list[int]:
        """Lines (positions in `rows`) that carry documents."""
        most = min(OPENED, max(5, OPENED_ON_PAGE // len(self.run.sets)))
        chosen: set[int] = set()
        for name in {self.b, *self.systems} - {self.a} or {self.b}:
            chosen.update(self._most_different(name, rows)[: most if name == self.b else min(OPENED_BESIDE, most // 5)])
        return sorted(chosen)

    def _query_texts(self) -> list[str]:
        if self.collection is None:
            return [""] * len(self.ids)
        there = self.collection.has_queries(self.ids)
        known = list(itertools.compress(self.ids, there))
        texts = dict(zip(known, self.collection.query_texts(known), strict=True))
        return [_cut(texts.get(query_id, ""), QUERY_TEXT) for query_id in self.ids]

    def _fidelity(self) -> dict[str, list[Any]]:
        """Measure → for each system a value a query, or null; the four most telling measures."""
        table = pa.table({}) if self.set.fidelity is None else self.set.fidelity.table
        first = ("kendall", "overlap", "rbo", "margin")
        apart = ("student_metric", "teacher_metric", "difference")
        names = [each.name for each in table.schema if pa.types.is_floating(each.type) and each.name not in apart]
        keys = [table[name].to_pylist() for name in ("system", "query_id")] if names else [[], []]
        measured = {}
        for name in sorted(names, key=lambda name: (not name.startswith(first), name))[:FIDELITY]:
            values = dict(zip(zip(*keys, strict=True), table[name].to_pylist(), strict=True))
            measured[name] = [
                _numbers([values.get((system, query_id)) for query_id in self.ids]) if system in keys[0] else None
                for system in self.systems
            ]
        return measured

    def _ranking(self, name: str) -> Run | None:
        """A system's first documents; all of its ranking where its scores are wanted."""
        row = self.set.row(name)
        path = (self.set.folder / (row.run if row else "")).resolve()
        if not path.is_relative_to(self.set.folder.resolve()) or not path.is_file():
            self.notes.append(f"The ranking of “{name}” is not there.")
            return None
        try:
            ranking = read_run(path, name)
        except RankdistillError as error:
            self.notes.append(f"The ranking of “{name}” cannot be read: {error.what}.")
            return None
        return ranking if name in (TEACHER, self.run.student) else ranking.first(TOP)

    def _documents(self, lines: dict[int, str], runs: dict[str, Run]) -> dict[str, Any]:
        """The first documents of every system for some queries (line → id), with labels and the beginning of each text:
        `top`, line → system → numbers of documents, `labels`, line → how many are relevant and those of what is shown,
        and `docs`, (id, title, beginning of the text) of each number."""
        collection = self.collection
        qrels = collection.found_qrels(self.set.split) if collection is not None else {}
        number_of: dict[str, int] = {}
        top: dict[int, dict[int, list[int]]] = {line: {} for line in lines}
        line_of = {query_id: line for line, query_id in lines.items()}
        for name, ranking in runs.items():
            for query_id, doc_ids, _ in ranking.first(TOP):
                if query_id in line_of:
                    numbers = [number_of.setdefault(str(doc_id), len(number_of)) for doc_id in doc_ids]
                    top[line_of[query_id]][self.systems.index(name)] = numbers
        labels = {}
        for line, query_id in lines.items():
            judged = qrels.get(query_id, {})
            shown = {number for numbers in top[line].values() for number in numbers}
            labels[line] = {
                "relevant": sum(label >= self.set.relevance_level for label in judged.values()),
                "of": {number_of[doc_id]: label for doc_id, label in judged.items() if number_of.get(doc_id) in shown},
            }
        doc_ids = list(number_of)
        rows = np.asarray(collection.doc_rows(doc_ids) if collection and doc_ids else [-1] * len(doc_ids), np.int64)
        found = iter(collection.documents(rows[rows >= 0]) if collection and doc_ids else ())
        docs = []
        for doc_id, row in zip(doc_ids, rows.tolist(), strict=True):
            title, text = next(found)[-2:] if row >= 0 else ("", "")
            docs.append((doc_id, _cut(title, TITLE), _cut(text.removeprefix(title).lstrip(), TEXT)))
        return {"top": top, "labels": labels, "docs": docs}

    def _score(self, student: Run, teacher: Run) -> None:
        """Scores of the pairs that the teacher was asked for and the student retrieved, less their query's mean."""
        asked, line_of = self._asked(), {query_id: line for line, query_id in enumerate(self.ids)}
        if not asked:
            self.notes.append("Which pairs the teacher scored is not on disk: scores are not drawn.")
            return
        theirs, pairs = {q: dict(zip(ids, scores, strict=True)) for q, ids, scores in teacher if q in asked}, []
        for query_id, ids, scores in student:
            known = theirs.get(query_id, {})
            both = [at for at, doc_id in enumerate(ids) if doc_id in known and doc_id in asked[query_id]]
            if len(both) < 2 or query_id not in line_of:
                continue
            values = np.array([(float(scores[at]), float(known[ids[at]])) for at in both])
            values -= values.mean(axis=0)
            line = line_of[query_id]
            pairs += [(line, str(ids[at]), *pair) for at, pair in zip(both, values.tolist(), strict=True)]
        self.scored = len(pairs)
        if len(pairs) < 3:
            return
        columns = np.array([pair[2:] for pair in pairs])
        if (columns.std(axis=0) > 0).all():
            self.correlation = float(np.corrcoef(columns.T)[0, 1])
        most = max(SCORES_OF_SET, SCORES // len(self.run.sets))
        drawn = np.random.default_rng(0).permutation(len(pairs))[:most]
        self.scores = [pairs[row] for row in sorted(drawn.tolist())]

    def _asked(self) -> dict[str, set[str]]:
        """Query → documents that the teacher scored for it: the rest of its ranking only follows in another's order."""
        candidates = self.run.folder / "candidates" / f"{self.set.collection.get('name')}-{self.set.split}"
        path = candidates / "candidates.parquet"
        try:
            lists = iter_run(path) if path.is_file() else ()
            return {query_id: {*doc_ids, *map(document_of, doc_ids)} for query_id, doc_ids, _ in lists}
        except RankdistillError:
            return {}


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most].rstrip() + "…"


def _numbers(column: Any) -> list[float | None]:
    return [round(value, 4) if np.isfinite(value) else None for value in np.array(column, np.float64).tolist()]
