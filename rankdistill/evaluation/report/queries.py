"""The queries of a report: how each system did on each, and the documents that made the difference.

Bounded: every query has a line (up to `MOST_QUERIES` a set), documents are embedded for the queries that student and
teacher treat most differently. What was left out is counted and said on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class Queries:
    """What the page's table of queries is made of.

    Attributes:
        data: as `report.js` reads it.
        scores: (line, document, student's score, teacher's score), each score less its query's mean.
        scored: pairs that both scored, of which `scores` are drawn.
        correlation: of the two scores, over all of those pairs.
        notes: what was left out.
    """

    data: dict[str, Any]
    scores: list[tuple[int, str, float, float]] = field(default_factory=list)
    scored: int = 0
    correlation: float | None = None
    notes: list[str] = field(default_factory=list)


def collect_queries(run: RunData, test_set: Evaluation) -> Queries | None:
    """The queries of a set; None without the values of each query."""
    if not test_set.per_query:
        return None
    notes: list[str] = []
    systems = [name for name in test_set.systems if name in test_set.per_query]
    a, b = _default_pair(run, systems)
    rows = _kept_rows(run, test_set, a, b, len(systems), notes)
    query_ids = [test_set.query_ids[row] for row in rows]
    collection = _collection(test_set, notes)
    runs = _read_runs(test_set, systems, (TEACHER, run.student), notes)
    lines = {at: query_ids[at] for at in _opened(run, test_set, systems, a, b, rows)}
    data: dict[str, Any] = {
        "name": test_set.name,
        "metrics": list(test_set.per_query[a]),
        "systems": systems,
        "pair": [systems.index(a), systems.index(b)],
        "queries": list(zip(query_ids, _query_texts(collection, query_ids), strict=True)),
        "values": [[_numbers(column[rows]) for column in test_set.per_query[name].values()] for name in systems],
        "fidelity": _fidelity(test_set, systems, query_ids),
        "level": test_set.relevance_level,
        **_documents(test_set, lines, [runs.get(name) for name in systems], collection),
    }
    if len(lines) < len(test_set.query_ids):
        notes.append(
            f"Documents are embedded for {len(lines)} of {len(test_set.query_ids):,} queries: those that differ "
            f"most between “{a}” and “{b}”, and a few of other pairs. The whole rankings lie in "
            f"{test_set.folder.name}/runs."
        )
    result = Queries(data, notes=notes)
    if TEACHER in runs and run.student in runs:
        _scores(result, run, test_set, runs[run.student], runs[TEACHER], {q: n for n, q in enumerate(query_ids)})
    return result


def _default_pair(run: RunData, systems: Sequence[str]) -> tuple[str, str]:
    """(student, teacher), or what comes nearest."""
    a = run.student if run.student is not None and run.student in systems else systems[0]
    others = [name for name in systems if name != a] or [a]
    kinds = {run.kind(name): name for name in reversed(others)}
    b = next((kinds[kind] for kind in ("teacher", "baseline", "untrained", "bm25") if kind in kinds), others[0])
    return a, b


def _collection(test_set: Evaluation, notes: list[str]) -> Collection | None:
    """The texts, if they are still what was evaluated."""
    known = test_set.collection
    try:
        collection = open_collection(str(known["spec"]))
    except (RankdistillError, OSError, KeyError) as error:
        what = error.what if isinstance(error, RankdistillError) else str(error)
        notes.append(f"The texts are not shown: the collection cannot be opened ({what}).")
        return None
    if collection.fingerprint != known.get("fingerprint"):
        notes.append("The texts are not shown: the collection has changed since the evaluation.")
        return None
    return collection


def _kept_rows(run: RunData, test_set: Evaluation, a: str, b: str, systems: int, notes: list[str]) -> list[int]:
    """Rows of the queries that get a line: all, or those that differ most."""
    count = len(test_set.query_ids)
    share = MOST_VALUES // max(1, len(run.sets) * systems * len(test_set.metrics))
    most = max(OPENED, min(MOST_QUERIES, share))
    if count <= most:
        return list(range(count))
    notes.append(f"The table has the {most:,} of {count:,} queries that differ most between “{a}” and “{b}”.")
    return sorted(_most_different(test_set, a, b, run.metric)[:most].tolist())


def _most_different(
    test_set: Evaluation, a: str, b: str, metric: str, rows: list[int] | slice = slice(None)
) -> np.ndarray:
    """Positions in `rows`, the greatest difference first; 0 where one system has no value."""
    nothing = np.zeros(len(test_set.query_ids))
    ours, theirs = (test_set.per_query.get(name, {}).get(metric, nothing)[rows] for name in (a, b))
    return np.argsort(-np.abs(np.nan_to_num(ours - theirs)), kind="stable")


def _opened(run: RunData, test_set: Evaluation, systems: Sequence[str], a: str, b: str, rows: list[int]) -> list[int]:
    """Lines (positions in `rows`) that carry documents."""
    most = min(OPENED, max(5, OPENED_ON_PAGE // len(run.sets)))
    chosen: set[int] = set()
    for name in {b, *systems} - {a} or {b}:
        count = most if name == b else min(OPENED_BESIDE, most // 5)
        chosen.update(_most_different(test_set, a, name, run.metric, rows)[:count].tolist())
    return sorted(chosen)


def _query_texts(collection: Collection | None, query_ids: list[str]) -> list[str]:
    if collection is None:
        return [""] * len(query_ids)
    known = collection.has_queries(query_ids)
    texts = iter(collection.query_texts([query_id for query_id, there in zip(query_ids, known, strict=True) if there]))
    return [_cut(next(texts), QUERY_TEXT) if there else "" for there in known]


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most].rstrip() + "…"


def _numbers(column: Any) -> list[float | None]:
    return [round(value, 4) if np.isfinite(value) else None for value in np.array(column, np.float64).tolist()]


def _fidelity(test_set: Evaluation, systems: Sequence[str], query_ids: Sequence[str]) -> dict[str, list[Any]]:
    """Measure → for each system a value a query, or null; the four most telling measures."""
    table = pa.table({}) if test_set.fidelity is None else test_set.fidelity.table
    first = ("kendall", "overlap", "rbo", "margin")
    apart = ("student_metric", "teacher_metric", "difference")
    names = [each.name for each in table.schema if pa.types.is_floating(each.type) and each.name not in apart]
    keys = [table[name].to_pylist() for name in ("system", "query_id")] if names else [[], []]
    measured = {}
    for name in sorted(names, key=lambda name: (not name.startswith(first), name))[:FIDELITY]:
        values = dict(zip(zip(*keys, strict=True), table[name].to_pylist(), strict=True))
        measured[name] = [
            _numbers([values.get((system, query_id)) for query_id in query_ids]) if system in keys[0] else None
            for system in systems
        ]
    return measured


def _read_runs(
    test_set: Evaluation, systems: Sequence[str], whole: Sequence[str | None], notes: list[str]
) -> dict[str, Run]:
    """The first documents of every system's ranking; all of it of those whose scores are wanted."""
    runs = {}
    for name in systems:
        row = test_set.row(name)
        path = (test_set.folder / (row.run if row else "")).resolve()
        if not path.is_relative_to(test_set.folder.resolve()) or not path.is_file():
            notes.append(f"The ranking of “{name}” is not there.")
            continue
        try:
            ranking = read_run(path, name)
        except RankdistillError as error:
            notes.append(f"The ranking of “{name}” cannot be read: {error.what}.")
            continue
        runs[name] = ranking if name in whole else ranking.first(TOP)
    return runs


def _documents(
    test_set: Evaluation, lines: dict[int, str], runs: Sequence[Run | None], collection: Collection | None
) -> dict[str, Any]:
    """The first documents of every system for some queries (line → id), with labels and the beginning of each text.

    Returns:
        top: line → system → numbers of documents; labels: line → how many are relevant, and the labels of those shown;
        docs: (id, title, beginning of the text) of each number.
    """
    qrels = collection.found_qrels(test_set.split) if collection is not None else {}
    number_of: dict[str, int] = {}
    top: dict[int, dict[int, list[int]]] = {line: {} for line in lines}
    line_of = {query_id: line for line, query_id in lines.items()}
    for system, ranking in enumerate(runs):
        for query_id, doc_ids, _ in ranking.first(TOP) if ranking is not None else ():
            if query_id in line_of:
                numbers = [number_of.setdefault(str(doc_id), len(number_of)) for doc_id in doc_ids]
                top[line_of[query_id]][system] = numbers
    labels = {}
    for line, query_id in lines.items():
        judged = qrels.get(query_id, {})
        shown = {number for numbers in top[line].values() for number in numbers}
        labels[line] = {
            "relevant": sum(label >= test_set.relevance_level for label in judged.values()),
            "of": {number_of[doc_id]: label for doc_id, label in judged.items() if number_of.get(doc_id) in shown},
        }
    return {"top": top, "labels": labels, "docs": _texts(list(number_of), collection)}


def _texts(doc_ids: list[str], collection: Collection | None) -> list[tuple[str, str, str]]:
    if collection is None or not doc_ids:
        return [(doc_id, "", "") for doc_id in doc_ids]
    rows = np.asarray(collection.doc_rows(doc_ids))
    there = [doc_id for doc_id, row in zip(doc_ids, rows, strict=True) if row >= 0]
    known = dict(zip(there, collection.documents(rows[rows >= 0]), strict=True))
    texts = []
    for doc_id in doc_ids:
        title, text = (known[doc_id].title, known[doc_id].text) if doc_id in known else ("", "")
        texts.append((doc_id, _cut(title, TITLE), _cut(text.removeprefix(title).lstrip(), TEXT)))
    return texts


def _scores(
    result: Queries, run: RunData, test_set: Evaluation, student: Run, teacher: Run, line_of: dict[str, int]
) -> None:
    """Scores of the pairs that the teacher was asked for and the student retrieved, less their query's mean."""
    asked = _asked(run, test_set)
    if not asked:
        result.notes.append("Which pairs the teacher scored is not on disk: scores are not drawn.")
        return
    theirs, pairs = {q: (ids, scores) for q, ids, scores in teacher if q in asked}, []
    for query_id, ids, scores in student:
        if query_id not in theirs or query_id not in line_of:
            continue
        known = dict(zip(*theirs[query_id], strict=True))
        both = [at for at, doc_id in enumerate(ids) if doc_id in known and doc_id in asked[query_id]]
        if len(both) < 2:
            continue
        values = np.array([(float(scores[at]), float(known[ids[at]])) for at in both])
        values -= values.mean(axis=0)
        pairs += [
            (line_of[query_id], str(ids[at]), *of_pair) for at, of_pair in zip(both, values.tolist(), strict=True)
        ]
    result.scored = len(pairs)
    if len(pairs) < 3:
        return
    columns = np.array([pair[2:] for pair in pairs])
    if (columns.std(axis=0) > 0).all():
        result.correlation = float(np.corrcoef(columns.T)[0, 1])
    most = max(SCORES_OF_SET, SCORES // len(run.sets))
    drawn = np.random.default_rng(0).permutation(len(pairs))[:most]
    result.scores = [pairs[row] for row in sorted(drawn.tolist())]


def _asked(run: RunData, test_set: Evaluation) -> dict[str, set[str]]:
    """Query → documents that the teacher scored for it: the rest of its ranking only follows in another's order."""
    of = test_set
    path = run.folder / "candidates" / f"{of.collection.get('name')}-{of.split}" / "candidates.parquet"
    try:
        lists = iter_run(path) if path.is_file() else ()
        return {query_id: {*doc_ids, *map(document_of, doc_ids)} for query_id, doc_ids, _ in lists}
    except RankdistillError:
        return {}
