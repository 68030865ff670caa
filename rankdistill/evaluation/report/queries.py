"""The queries of a report: how each system did on each, and the documents that made the difference.

Bounded: every query has a line (up to `MOST_QUERIES` a set), documents are embedded for the queries that student and
teacher treat most differently. What was left out is counted and said on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankdistill.errors import RankdistillError
from rankdistill.evaluation.report.data import TEACHER, RunData, SetData
from rankdistill.runs import Run, iter_run, read_run

if TYPE_CHECKING:
    from rankdistill.collections import Collection

MOST_QUERIES = 2000  # lines of a set
MOST_VALUES = 400_000  # figures on a page: with many sets each has fewer lines
OPENED = 50  # queries of a set with documents, for student and teacher
OPENED_BESIDE = 8  # more of them for the student and each other system
OPENED_ON_PAGE = 300
TOP = 10  # documents shown of a system
TEXT = 320  # characters of a document
QUERY_TEXT = 400  # characters of a query
SCORES = 1500  # pairs drawn, of all sets; at least SCORES_OF_SET of each
SCORES_OF_SET = 150
FIDELITY = 4  # measures of agreement a line carries at most


@dataclass
class Queries:
    """What the page's table of queries is made of.

    Attributes:
        data: as `report.js` reads it.
        texts: row in `data` → the query's text.
        scores: (query row, document, student's score, teacher's score), each less its query's mean.
        scored: pairs that both scored, of which `scores` are drawn.
        notes: what was left out.
    """

    data: dict[str, Any]
    scores: list[tuple[int, str, float, float]] = field(default_factory=list)
    scored: int = 0
    correlation: float | None = None
    notes: list[str] = field(default_factory=list)


def collect_queries(run: RunData, one: SetData) -> Queries | None:
    """The queries of a set; None without the values of each query."""
    if one.per_query is None or not one.per_query.values:
        return None
    notes: list[str] = []
    collection = _collection(one, notes)
    systems = [name for name in one.systems if name in one.per_query.values]
    a, b = default_pair(run, systems)
    rows = _kept_rows(run, one, a, b, len(systems), notes)
    query_ids = [one.per_query.query_ids[row] for row in rows]
    opened = _opened(run, one, systems, a, b, rows)
    texts = _query_texts(collection, query_ids)
    qrels = collection.qrels(one.evaluation.split, missing=True) if collection is not None else {}
    data: dict[str, Any] = {
        "name": one.name,
        "metrics": list(one.per_query.values[a]),
        "systems": systems,
        "pair": [systems.index(a), systems.index(b)],
        "queries": [[query_id, text] for query_id, text in zip(query_ids, texts, strict=True)],
        "values": [[_numbers(column, rows) for column in one.per_query.values[name].values()] for name in systems],
        "fidelity": _fidelity(one, systems, query_ids),
        "level": one.evaluation.relevance_level,
        "top": {},
        "labels": {},
        "docs": [],
    }
    result = Queries(data, notes=notes)
    runs = _read_runs(one, systems, {TEACHER, str(run.student)}, notes)
    _documents(data, runs, [query_ids[at] for at in opened], opened, collection, qrels)
    if len(opened) < len(one.per_query.query_ids):
        notes.append(
            f"Documents are embedded for {len(opened)} of {len(one.per_query.query_ids):,} queries: those that differ "
            f"most between “{a}” and “{b}”, and a few of other pairs. The whole rankings lie in {one.folder.name}/runs."
        )
    if TEACHER in runs and run.student in runs:
        _scores(result, run, one, runs[str(run.student)], runs[TEACHER], {q: n for n, q in enumerate(query_ids)})
    return result


def default_pair(run: RunData, systems: Sequence[str]) -> tuple[str, str]:
    """(student, teacher), or what comes nearest."""
    a = run.student if run.student is not None and run.student in systems else systems[0]
    others = [name for name in systems if name != a] or [a]
    kinds = {run.kind(name): name for name in reversed(others)}
    b = next((kinds[kind] for kind in ("teacher", "baseline", "untrained", "bm25") if kind in kinds), others[0])
    return a, b


def _collection(one: SetData, notes: list[str]) -> Collection | None:
    """The texts, if they are still what was evaluated."""
    from rankdistill.collections import open_collection

    known = one.evaluation.collection
    try:
        found = open_collection(str(known["spec"]))
    except (RankdistillError, OSError, KeyError) as error:
        what = error.what if isinstance(error, RankdistillError) else str(error)
        notes.append(f"The texts are not shown: the collection cannot be opened ({what}).")
        return None
    if found.fingerprint != known.get("fingerprint"):
        notes.append("The texts are not shown: the collection has changed since the evaluation.")
        return None
    return found


def _kept_rows(run: RunData, one: SetData, a: str, b: str, systems: int, notes: list[str]) -> list[int]:
    """Rows of the queries that get a line: all, or those that differ most."""
    assert one.per_query is not None
    count = len(one.per_query.query_ids)
    share = MOST_VALUES // max(1, len(run.sets) * systems * len(one.evaluation.metrics))
    most = max(OPENED, min(MOST_QUERIES, share))
    if count <= most:
        return list(range(count))
    gaps = _gap(one, a, b, run.metric)
    notes.append(f"The table has the {most:,} of {count:,} queries that differ most between “{a}” and “{b}”.")
    return sorted(np.argsort(-np.abs(gaps), kind="stable")[:most].tolist())


def _gap(one: SetData, a: str, b: str, metric: str) -> np.ndarray:
    """a − b of each query, 0 where one has no value."""
    assert one.per_query is not None
    values = one.per_query.values
    nothing = np.zeros(len(one.per_query.query_ids))
    gap = values.get(a, {}).get(metric, nothing) - values.get(b, {}).get(metric, nothing)
    return np.nan_to_num(gap)


def _opened(run: RunData, one: SetData, systems: Sequence[str], a: str, b: str, rows: Sequence[int]) -> list[int]:
    """Lines (positions in `rows`) that carry documents."""
    most = min(OPENED, max(5, OPENED_ON_PAGE // len(run.sets)))
    chosen: set[int] = set()
    for name in [b, *(name for name in systems if name not in (a, b))]:
        gaps = np.abs(_gap(one, a, name, run.metric)[list(rows)])
        count = most if name == b else min(OPENED_BESIDE, most // 5)
        chosen.update(np.argsort(-gaps, kind="stable")[:count].tolist())
    return sorted(chosen)


def _query_texts(collection: Collection | None, query_ids: list[str]) -> list[str]:
    if collection is None:
        return [""] * len(query_ids)
    known = collection.has_queries(query_ids)
    found = iter(collection.query_texts([one for one, there in zip(query_ids, known, strict=True) if there]))
    return [_cut(next(found), QUERY_TEXT) if there else "" for there in known]


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most].rstrip() + "…"


def _numbers(column: np.ndarray, rows: Sequence[int]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in column[list(rows)]]


def _fidelity(one: SetData, systems: Sequence[str], query_ids: Sequence[str]) -> dict[str, list[Any]]:
    """Measure → for each system a value a query, or null; the four most telling measures."""
    wanted = [name for of in one.fidelity_queries.values() for name in of]
    order = sorted(
        dict.fromkeys(wanted), key=lambda name: (not name.startswith(("kendall", "overlap", "rbo", "margin")), name)
    )
    return {
        name: [
            [None if (v := of.get(query_id)) is None else round(v, 3) for query_id in query_ids] if of else None
            for of in (one.fidelity_queries.get(system, {}).get(name, {}) for system in systems)
        ]
        for name in order[:FIDELITY]
    }


def _read_runs(one: SetData, systems: Sequence[str], whole_ones: set[str], notes: list[str]) -> dict[str, Run]:
    """The first documents of every system's ranking; all of it of those whose scores are wanted."""
    found = {}
    for name in systems:
        row = one.row(name)
        assert row is not None
        path = (one.folder / row.run).resolve()
        if not path.is_relative_to(one.folder.resolve()) or not path.is_file():
            notes.append(f"The ranking of “{name}” is not there.")
            continue
        try:
            whole = read_run(path, name)
        except RankdistillError as error:
            notes.append(f"The ranking of “{name}” cannot be read: {error.what}.")
            continue
        found[name] = whole if name in whole_ones else whole.first(TOP)
    return found


def _documents(
    data: dict[str, Any],
    runs: dict[str, Run],
    query_ids: Sequence[str],
    lines: Sequence[int],
    collection: Collection | None,
    qrels: dict[str, dict[str, int]],
) -> None:
    """The first documents of every system for some queries, with labels and the beginning of each text."""
    number_of: dict[str, int] = {}
    for system, name in enumerate(data["systems"]):
        if name not in runs:
            continue
        first = runs[name].first(TOP)
        row_of = {query_id: row for row, query_id in enumerate(first.query_ids)}
        for line, query_id in zip(lines, query_ids, strict=True):
            row = row_of.get(query_id)
            ids = first.doc_ids[first.offsets[row] : first.offsets[row + 1]].to_pylist() if row is not None else []
            numbers = [number_of.setdefault(doc_id, len(number_of)) for doc_id in ids]
            data["top"].setdefault(line, {})[system] = numbers
    for line, query_id in zip(lines, query_ids, strict=True):
        judged = qrels.get(query_id, {})
        shown = {number for numbers in data["top"].get(line, {}).values() for number in numbers}
        labels = {number_of[doc_id]: label for doc_id, label in judged.items() if number_of.get(doc_id) in shown}
        relevant = sum(label >= data["level"] for label in judged.values())
        data["labels"][line] = {"relevant": relevant, "of": labels}
    data["docs"] = _texts(list(number_of), collection)


def _texts(doc_ids: list[str], collection: Collection | None) -> list[list[str]]:
    """[id, title, beginning of the text] of each document."""
    if collection is None or not doc_ids:
        return [[doc_id, "", ""] for doc_id in doc_ids]
    rows = np.asarray(collection.doc_rows(doc_ids))
    known = iter(collection.documents(rows[rows >= 0]))
    found = []
    for doc_id, row in zip(doc_ids, rows, strict=True):
        document = next(known) if row >= 0 else None
        title, text = (document.title, document.text) if document else ("", "")
        found.append([doc_id, _cut(title, 160), _cut(text.removeprefix(title).lstrip(), TEXT)])
    return found


def _scores(result: Queries, run: RunData, one: SetData, student: Run, teacher: Run, line_of: dict[str, int]) -> None:
    """Scores of the pairs that the teacher was asked for and the student retrieved, less their query's mean."""
    asked = _asked(run, one)
    if not asked:
        result.notes.append("Which pairs the teacher scored is not on disk: scores are not drawn.")
        return
    theirs, pairs = {q: (ids, scores) for q, ids, scores in teacher if q in asked}, []
    for query_id, ids, scores in student:
        if query_id not in theirs or query_id not in line_of:
            continue
        known = dict(zip(*theirs[query_id], strict=True))
        both = [
            (doc_id, float(s), float(known[doc_id]))
            for doc_id, s in zip(ids, scores, strict=True)
            if doc_id in known and doc_id in asked[query_id]
        ]
        if len(both) < 2:
            continue
        mean_s, mean_t = (float(np.mean([pair[at] for pair in both])) for at in (1, 2))
        pairs += [(line_of[query_id], doc_id, s - mean_s, t - mean_t) for doc_id, s, t in both]
    result.scored = len(pairs)
    if len(pairs) < 3:
        return
    columns = np.array([pair[2:] for pair in pairs])
    if (columns.std(axis=0) > 0).all():
        result.correlation = float(np.corrcoef(columns.T)[0, 1])
    most = max(SCORES_OF_SET, SCORES // len(run.sets))
    drawn = np.random.default_rng(0).permutation(len(pairs))[:most]
    result.scores = [pairs[row] for row in sorted(drawn.tolist())]


def _asked(run: RunData, one: SetData) -> dict[str, set[str]]:
    """Query → documents that the teacher scored for it: the rest of its ranking only follows in another's order."""
    found: dict[str, set[str]] = {}
    of = one.evaluation
    path = Path(run.folder) / "candidates" / f"{of.collection.get('name')}-{of.split}" / "candidates.parquet"
    if path.is_file():
        try:
            for query_id, doc_ids, _ in iter_run(path):
                found[query_id] = set(doc_ids)
        except RankdistillError:
            return {}
    return found
