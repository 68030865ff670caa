"""Fidelity: how far a student ranks as its teacher does. It is not effectiveness, and is shown beside it.

The teacher's list of a query is what the teacher scored (the documents it re-ranked); every figure is for one query,
then averaged. Student and teacher are read from their runs, nothing is encoded again. The rules:

- `kendall_tau`: tau-b over the teacher's list, ties handled. Documents of the list that the student did not retrieve
  are tied below all it did (their share is `not_retrieved`). A query where one side ties the whole list counts 0.
- `overlap@k`: share of the teacher's first k documents that are among the student's first k.
- `rbo`: rank-biased overlap, extrapolated (RBO_ext, equation 32 of Webber, Moffat and Zobel 2010), p = .9, of the
  teacher's list and as many of the student's documents.
- `margin_correlation`: Pearson correlation of the margins s_i − s_j and t_i − t_j over all pairs of documents of the
  list that both scored, which is the correlation of the two scores themselves. At least three such documents whose
  scores are not all equal; other queries have none and are left out of the mean (`without_margins`).
  `margin_correlation_pooled` is the same over the pairs of all queries together: scales must agree across queries too.
- `unscored@k`: share of the student's first k documents that the teacher never scored. What is outside the teacher's
  list counts as disagreement in overlap@k and rbo, though the teacher said nothing about it.

Where the student fails its teacher: relevant documents among the teacher's first k and not among the student's (lost),
and the reverse (won), with both ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rankdistill.artifacts import write_json, write_table
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.metrics import Qrels, evaluate_run, parse_metric
from rankdistill.evaluation.significance import SAME
from rankdistill.runs import Run, positions, read_run

FILE, TABLE = "fidelity.json", "fidelity.parquet"
PERSISTENCE = 0.9  # of RBO: the first ten ranks hold 86 % of the weight
CUTOFF = 10  # of the overlap where the metric has none

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Fidelity:
    """Agreement of systems with a teacher.

    Attributes:
        depth: length of the longest of the teacher's lists.
        cutoff: the k of `overlap@k`, `unscored@k`, lost and won.
        systems: system → mean figures and counts.
        table: one row a system and query of the qrels, null where there is no figure, and for the rank of a document
            that was not retrieved.
    """

    teacher: str
    metric: str
    depth: int
    cutoff: int
    systems: dict[str, dict[str, Any]]
    table: pa.Table
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "table"}

    def write(self, folder: Path) -> None:
        """`fidelity.json` and `fidelity.parquet`."""
        write_table(folder / TABLE, self.table)
        write_json(folder / FILE, self.to_json())


def measure_fidelity(
    teacher: Run | str | Path,
    students: Mapping[str, Run | str | Path],
    qrels: Qrels,
    *,
    name: str = "teacher",
    metric: str = "ndcg@10",
    relevance_level: int = 1,
    lowest: Mapping[str, float] | None = None,
    values: Mapping[str, Floats] | None = None,
) -> Fidelity:
    """Compare the rankings of students (name → run) with a teacher's, by the rules of this module's docstring.

    Memory: the teacher's run and one student's at a time.

    Args:
        name: of the teacher, also in `values`.
        metric: the effectiveness shown beside agreement; its cutoff is the k of overlap, lost and won (10 without one).
        lowest: query id → least score the teacher gave; documents of its run below it only fill it up and are not in
            its list, nor has a query without one a list. Without this the whole run is the teacher's.
        values: name → the metric of each query [queries of the qrels]; computed here unless given.

    Raises:
        RankdistillError: the teacher has no list for any query of the qrels.
    """
    query_ids = list(qrels)

    def effectiveness(system: str, run: Run) -> Floats:
        if values is not None and system in values:
            return np.asarray(values[system], np.float64)
        return evaluate_run(run, qrels, [metric], relevance_level=relevance_level).per_query[metric]

    run = lists = (teacher if isinstance(teacher, Run) else read_run(teacher, name)).for_queries(query_ids)
    if lowest is not None:
        least = np.array([lowest.get(query_id, np.inf) for query_id in query_ids], np.float32)
        lists = run.keep(run.scores >= least[run.query_rows])
    if not len(lists.scores):
        raise RankdistillError("the teacher has no list for any judged query", where=run.name)
    relevant = [
        (row, doc_id)
        for row, documents in enumerate(qrels.values())
        for doc_id, grade in documents.items()
        if grade >= relevance_level
    ]
    relevant_query = np.array([row for row, _ in relevant], np.int64)
    relevant_ids = pa.array([doc_id for _, doc_id in relevant], pa.large_string())
    numbered = pc.unique(pa.concat_arrays([lists.doc_ids, relevant_ids]))
    list_keys = _keys(lists.query_rows, lists.doc_ids, numbered)
    relevant_keys = _keys(relevant_query, relevant_ids, numbered)

    cutoff = parse_metric(metric).cutoff or CUTOFF
    teacher_values = effectiveness(name, run)
    teacher_ranks, _ = _look_up(relevant_keys, run, numbered)
    systems: dict[str, dict[str, Any]] = {}
    tables = []
    for system, source in students.items():
        ranking = source if isinstance(source, Run) else read_run(source, system)
        student_values = effectiveness(system, ranking)
        ranking = ranking.for_queries(query_ids)
        columns, summary = _agreement(lists, *_look_up(list_keys, ranking, numbered), np.diff(ranking.offsets), cutoff)
        student_ranks, _ = _look_up(relevant_keys, ranking, numbered)
        changes = _changes(len(qrels), relevant_query, relevant_ids, teacher_ranks, student_ranks, cutoff)
        difference = student_values - teacher_values
        systems[system] = summary | {
            "student_better": int(np.count_nonzero(difference > SAME)),
            "equal": int(np.count_nonzero(np.abs(difference) <= SAME)),
            "teacher_better": int(np.count_nonzero(difference < -SAME)),
            "won": len(changes["won"].values),
            "lost": len(changes["lost"].values),
        }
        of_queries = {
            "system": [system] * len(query_ids),
            "query_id": query_ids,
            **{key: pa.array(column, from_pandas=True) for key, column in columns.items()},
            "student_metric": student_values,
            "teacher_metric": teacher_values,
            "difference": difference,
            **changes,
        }
        tables.append(pa.table(of_queries))
    counts = np.diff(lists.offsets)
    notes = {
        "queries": len(query_ids),
        "queries_without_teacher_list": int(np.count_nonzero(counts == 0)),
        "rbo_persistence": PERSISTENCE,
        "documents_a_list": float(counts[counts > 0].mean()),
    }
    table = pa.concat_tables(tables) if tables else pa.table({})
    return Fidelity(name, metric, int(counts.max()), cutoff, systems, table, notes)


def _keys(query: NDArray[Any], doc_ids: pa.Array, numbered: pa.Array) -> Ints:
    """A number for each pair of query and document; negative where the document is not numbered."""
    documents = positions(doc_ids, numbered)
    return np.where(documents < 0, -1, query.astype(np.int64) * len(numbered) + documents)


def _look_up(keys: Ints, run: Run, numbered: pa.Array) -> tuple[Ints, Floats]:
    """(ranks, scores) of pairs in a run; rank 0 and score −inf where it was not retrieved."""
    at = positions(keys, _keys(run.query_rows, run.doc_ids, numbered))
    return np.append(run.ranks, 0)[at], np.append(run.scores.astype(np.float64), -np.inf)[at]


def _agreement(
    lists: Run, rank: Ints, score: Floats, retrieved: Ints, cutoff: int
) -> tuple[dict[str, Floats], dict[str, Any]]:
    """The figures of each query, NaN where there are none, and their means; rank and score are the student's."""
    query, lengths = lists.query_rows, np.diff(lists.offsets)
    shared, listed = rank > 0, lengths > 0
    tau = kendall_tau_b(lists.scores, score, lists.offsets)
    all_tied = (lengths > 1) & np.isnan(tau)
    tau[all_tied] = 0.0

    def count(rows: NDArray[np.bool_]) -> Ints:
        return np.bincount(query[rows], minlength=len(lengths))

    student_first = shared & (rank <= cutoff)
    scored = _divide(count(student_first), np.minimum(retrieved, cutoff))
    margins, pooled = margin_correlation(
        score[shared], lists.scores[shared].astype(np.float64), query[shared], len(lengths)
    )
    columns = {
        "kendall_tau": tau,
        f"overlap@{cutoff}": _divide(count(student_first & (lists.ranks <= cutoff)), np.minimum(lengths, cutoff)),
        "rbo": rank_biased_overlap(lists.ranks, rank, query, lengths, np.minimum(retrieved, lengths)),
        "margin_correlation": margins,
    }
    summary = {name: _mean(values) for name, values in columns.items()} | {
        "margin_correlation_pooled": None if np.isnan(pooled) else pooled,
        "queries": int(np.count_nonzero(listed)),
        "not_retrieved": float(1 - shared.mean()),
        f"unscored@{cutoff}": _mean(np.where(listed, 1 - scored, np.nan)),
        "all_tied": int(np.count_nonzero(all_tied)),
        "without_margins": int(np.count_nonzero(listed & np.isnan(margins))),
    }
    return columns, summary


def _divide(numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
    """Quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if not np.isnan(values).all() else None


def kendall_tau_b(left: NDArray[Any], right: NDArray[Any], offsets: Ints) -> Floats:
    """Kendall's tau-b of each group: float64 [groups], NaN where a group has one element or one side is all tied.

    Scores are [N], −inf allowed; group g is rows offsets[g]:offsets[g + 1].
    """
    from scipy.stats import kendalltau

    groups = (slice(start, end) for start, end in itertools.pairwise(offsets))
    taus = [kendalltau(left[g], right[g]).statistic if g.stop - g.start > 1 else np.nan for g in groups]
    return np.array(taus, np.float64)


def rank_biased_overlap(
    teacher: Ints, student: Ints, query: NDArray[Any], longer: Ints, shorter: Ints, p: float = PERSISTENCE
) -> Floats:
    """RBO_ext of two rankings without ties for each query: float64 [queries], NaN where the longer one is empty.

    Args:
        teacher: [N] ranks from 1 of all documents of the longer ranking.
        student: [N] their ranks in the other one, 0 where they are not in it.
        query: [N] to which query a document belongs.
        longer, shorter: [queries] lengths; the other ranking is cut to `shorter`, which is at most `longer`.
    """
    depths = np.arange(1, int(longer.max(initial=0)) + 1)
    over = np.concatenate([[0.0], np.cumsum(p**depths / depths)])  # Σ p^d / d
    plain = np.concatenate([[0.0], np.cumsum(p**depths)])
    known = np.flatnonzero((student > 0) & (student <= shorter[query]))
    # A shared document counts from the depth where both rankings have it.
    depth, of = np.maximum(teacher, student)[known], query[known]
    agreement = np.bincount(of, over[longer[of]] - over[depth - 1], len(longer))
    whole = np.bincount(of, minlength=len(longer))
    until = np.bincount(of[depth <= shorter[of]], minlength=len(longer))
    share = np.nan_to_num(_divide(until, shorter))
    beyond = plain[longer] - plain[shorter] - shorter * (over[longer] - over[shorter])
    return (1 - p) / p * (agreement + share * beyond) + (_divide(whole - until, longer) + share) * p**longer


def margin_correlation(student: Floats, teacher: Floats, query: NDArray[Any], queries: int) -> tuple[Floats, float]:
    """Pearson correlation of pairwise margins: of each query (float64 [queries], NaN where undefined) and over all.

    The margins of all ordered pairs of a query have mean 0, and their products sum to 2n times those of the centred
    scores; so the pairs need not be formed.
    """
    counts = np.bincount(query, minlength=queries)

    def centred(scores: Floats) -> Floats:
        # From the first score of the query on: equal scores become 0 exactly.
        first = np.zeros(queries)
        first[query[::-1]] = scores[::-1]
        shifted = scores - first[query]
        return shifted - (np.bincount(query, shifted, queries) / np.maximum(counts, 1))[query]

    ours, theirs = centred(student), centred(teacher)
    enough = counts >= 3
    product, left, right = (
        np.where(enough, np.bincount(query, values, queries), 0) for values in (ours * theirs, ours**2, theirs**2)
    )
    correlation = _divide(product, np.sqrt(left * right))
    scale = np.sqrt((counts * left).sum() * (counts * right).sum())
    return np.clip(correlation, -1, 1), float((counts * product).sum() / scale) if scale > 0 else float("nan")


def _changes(
    queries: int, query: Ints, doc_ids: pa.Array, teacher: Ints, student: Ints, cutoff: int
) -> dict[str, pa.Array]:
    """Relevant documents that only one of the two has among its first k: list columns by query."""
    ranks = {"teacher": teacher, "student": student}
    first = {side: (rank > 0) & (rank <= cutoff) for side, rank in ranks.items()}
    columns: dict[str, pa.Array] = {}
    for name, mine, other in (("lost", "teacher", "student"), ("won", "student", "teacher")):
        rows = np.flatnonzero(first[mine] & ~first[other])
        rows = rows[np.lexsort((ranks[mine][rows], query[rows]))]
        counts = np.bincount(query[rows], minlength=queries)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        columns[name] = pa.ListArray.from_arrays(offsets, doc_ids.take(pa.array(rows)).cast(pa.string()))
        for side, rank in ranks.items():
            listed = pa.array(rank[rows], pa.int32(), mask=rank[rows] == 0)
            columns[f"{name}_{side}_ranks"] = pa.ListArray.from_arrays(offsets, listed)
    return columns
