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
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import write_atomically
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.metrics import Qrels, evaluate_run, parse_metric
from rankdistill.evaluation.significance import SAME
from rankdistill.runs import Run, read_run

FILE, TABLE = "fidelity.json", "fidelity.parquet"
PERSISTENCE = 0.9  # of RBO: the first ten ranks hold 86 % of the weight
CUTOFF = 10  # of the overlap where the metric has none
BLOCK = 128  # rows compared at once when inversions are counted
ABOVE = np.triu(np.ones((BLOCK, BLOCK), bool), 1)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class Fidelity:
    """Agreement of systems with a teacher.

    Attributes:
        depth: length of the longest of the teacher's lists.
        cutoff: the k of `overlap@k`, `unscored@k`, lost and won.
        systems: system → mean figures and counts.
        table: one row a system and query of the qrels: system, query_id, the figures, student_metric, teacher_metric,
            difference (student − teacher), and lists: lost, lost_teacher_ranks, lost_student_ranks, won and the same.
            Null where there is no figure, and for the rank of a document that was not retrieved.
    """

    teacher: str
    metric: str
    depth: int
    cutoff: int
    systems: dict[str, dict[str, Any]]
    table: pa.Table
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher,
            "metric": self.metric,
            "depth": self.depth,
            "cutoff": self.cutoff,
            "systems": self.systems,
            "notes": self.notes,
        }

    def write(self, folder: Path) -> None:
        """`fidelity.json` and `fidelity.parquet`."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd")
        write_atomically(folder / TABLE, sink.getvalue().to_pybytes())
        write_atomically(folder / FILE, json.dumps(self.to_json(), indent=2) + "\n")


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
    """Compare the rankings of students with a teacher's, by the rules of this module's docstring.

    Memory: the teacher's run and one student's at a time. Time: n²/2 comparisons of small integers for a list of n.

    Args:
        teacher: its run.
        students: name → run.
        qrels: the queries compared, and what is relevant.
        name: of the teacher, also in `values`.
        metric: the effectiveness shown beside agreement; its cutoff is the k of overlap, lost and won (10 without one).
        relevance_level: least judgment that makes a document lost or won.
        lowest: query id → least score the teacher gave; documents of its run below it only fill it up and are not in
            its list, nor has a query without one a list. Without this the whole run is the teacher's.
        values: name → the metric of each query [queries of the qrels]; computed here unless given.

    Raises:
        RankdistillError: the teacher has no list for any query of the qrels.
    """
    run = teacher if isinstance(teacher, Run) else read_run(teacher, name)
    query_ids = list(qrels)
    lists = _TeacherLists.of(run, query_ids, lowest)
    if not len(lists.key):
        raise RankdistillError("the teacher has no list for any judged query", where=run.name)
    cutoff = parse_metric(metric).cutoff or CUTOFF
    relevant = _Relevant.of(qrels, relevance_level)
    dictionary = pc.unique(pa.concat_arrays([lists.doc_ids, relevant.doc_ids]))
    lists.locate(dictionary)
    relevant.locate(dictionary)

    def of(one: str, ranking: Run) -> Floats:
        if values is not None and one in values:
            return np.asarray(values[one], np.float64)
        return evaluate_run(ranking, qrels, [metric], relevance_level=relevance_level).per_query[metric]

    teacher_values = of(name, run)
    teacher_found = _Found.of(run, query_ids, dictionary)
    teacher_ranks, _ = teacher_found.look_up(relevant.key)
    systems: dict[str, dict[str, Any]] = {}
    tables = []
    for system, given in students.items():
        ranking = given if isinstance(given, Run) else read_run(given, system)
        found = _Found.of(ranking, query_ids, dictionary)
        own = of(system, ranking)
        ranks, _ = found.look_up(relevant.key)
        columns, summary = _agreement(lists, found, cutoff)
        changes = _changes(relevant, teacher_ranks, ranks, cutoff)
        difference = own - teacher_values
        systems[system] = summary | {
            "student_better": int(np.count_nonzero(difference > SAME)),
            "equal": int(np.count_nonzero(np.abs(difference) <= SAME)),
            "teacher_better": int(np.count_nonzero(difference < -SAME)),
            "won": len(changes["won"].values),
            "lost": len(changes["lost"].values),
        }
        tables.append(
            pa.table(
                {
                    "system": pa.array([system] * len(query_ids), pa.string()),
                    "query_id": pa.array(query_ids, pa.string()),
                    **{key: pa.array(column, from_pandas=True) for key, column in columns.items()},
                    "student_metric": own,
                    "teacher_metric": teacher_values,
                    "difference": difference,
                    **changes,
                }
            )
        )
    counts = np.diff(lists.offsets)
    notes = {
        "queries": len(query_ids),
        "queries_without_teacher_list": int(np.count_nonzero(counts == 0)),
        "rbo_persistence": PERSISTENCE,
        "documents_a_list": float(counts[counts > 0].mean()),
    }
    table = pa.concat_tables(tables) if tables else pa.table({})
    return Fidelity(name, metric, int(counts.max()), cutoff, systems, table, notes)


@dataclass
class _TeacherLists:
    """The teacher's lists by query of the qrels; rows [N] in the teacher's order."""

    offsets: Ints  # [queries + 1]
    doc_ids: pa.Array
    rank: Ints
    score: Floats
    key: Ints

    @classmethod
    def of(cls, run: Run, query_ids: Sequence[str], lowest: Mapping[str, float] | None) -> _TeacherLists:
        row_of = {query_id: row for row, query_id in enumerate(run.query_ids)}
        rows = []
        for query_id in query_ids:
            row = row_of.get(query_id, -1)
            start, end = (int(run.offsets[row]), int(run.offsets[row + 1])) if row >= 0 else (0, 0)
            if lowest is not None and end > start:
                least = np.float32(lowest.get(query_id, np.inf))
                end = start + int(np.count_nonzero(run.scores[start:end] >= least))
            rows.append(np.arange(start, end))
        counts = np.array([len(one) for one in rows], np.int64)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        taken = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        rank = np.arange(1, len(taken) + 1) - np.repeat(offsets[:-1], counts)
        return cls(offsets, run.doc_ids.take(pa.array(taken)), rank, run.scores[taken].astype(np.float64), taken)

    @property
    def query(self) -> Ints:
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def locate(self, dictionary: pa.Array) -> None:
        self.key = _keys(self.query, self.doc_ids, dictionary)


@dataclass
class _Relevant:
    """The relevant pairs of the qrels, ordered by query."""

    queries: int
    query: Ints
    doc_ids: pa.Array
    key: Ints

    @classmethod
    def of(cls, qrels: Qrels, level: int) -> _Relevant:
        pairs = [
            (row, doc_id)
            for row, documents in enumerate(qrels.values())
            for doc_id, grade in documents.items()
            if grade >= level
        ]
        query = np.array([row for row, _ in pairs], np.int64)
        return cls(len(qrels), query, pa.array([doc_id for _, doc_id in pairs], pa.large_string()), query)

    def locate(self, dictionary: pa.Array) -> None:
        self.key = _keys(self.query, self.doc_ids, dictionary)


@dataclass
class _Found:
    """What a run retrieved, to be looked up by pair; and how much for each query."""

    key: Ints  # sorted
    rank: Ints
    score: Floats
    retrieved: Ints  # [queries]

    @classmethod
    def of(cls, run: Run, query_ids: Sequence[str], dictionary: pa.Array) -> _Found:
        number = {query_id: row for row, query_id in enumerate(query_ids)}
        query_of = np.array([number.get(query_id, -1) for query_id in run.query_ids], np.int64)
        counts = np.diff(run.offsets)
        query = np.repeat(query_of, counts)
        code = pc.index_in(run.doc_ids, value_set=dictionary).fill_null(-1).to_numpy().astype(np.int64)
        rows = np.flatnonzero((query >= 0) & (code >= 0))
        rank = rows - np.repeat(run.offsets[:-1], counts)[rows] + 1
        key = query[rows] * len(dictionary) + code[rows]
        order = np.argsort(key)
        retrieved = np.zeros(len(query_ids), np.int64)
        retrieved[query_of[query_of >= 0]] = counts[query_of >= 0]
        return cls(key[order], rank[order], run.scores[rows[order]].astype(np.float64), retrieved)

    def look_up(self, key: Ints) -> tuple[Ints, Floats]:
        """(ranks, scores) of pairs; rank 0 and score −inf where it was not retrieved."""
        rank, score = np.zeros(len(key), np.int64), np.full(len(key), -np.inf)
        if len(self.key):
            at = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
            hit = self.key[at] == key
            rank[hit], score[hit] = self.rank[at[hit]], self.score[at[hit]]
        return rank, score


def _keys(query: Ints, doc_ids: pa.Array, dictionary: pa.Array) -> Ints:
    code = pc.index_in(doc_ids, value_set=dictionary).to_numpy().astype(np.int64)
    return np.asarray(query * len(dictionary) + code)


def _agreement(lists: _TeacherLists, found: _Found, cutoff: int) -> tuple[dict[str, Floats], dict[str, Any]]:
    """The figures of each query, NaN where there are none, and their means."""
    queries, lengths, query = len(lists.offsets) - 1, np.diff(lists.offsets), lists.query
    rank, score = found.look_up(lists.key)
    retrieved = rank > 0
    listed = lengths > 0

    tau = kendall_tau_b(lists.score, score, lists.offsets)
    undefined = listed & (lengths > 1) & np.isnan(tau)
    tau[undefined] = 0.0

    def count(rows: NDArray[np.bool_]) -> Ints:
        return np.bincount(query[rows], minlength=queries)

    shared = count((lists.rank <= cutoff) & retrieved & (rank <= cutoff))
    overlap = _divide(shared, np.minimum(lengths, cutoff))
    scored = _divide(count(retrieved & (rank <= cutoff)), np.minimum(found.retrieved, cutoff))
    both = np.flatnonzero(retrieved)
    margins, pooled = margin_correlation(score[both], lists.score[both], query[both], queries)
    columns = {
        "kendall_tau": tau,
        f"overlap@{cutoff}": np.where(listed, overlap, np.nan),
        "rbo": rank_biased_overlap(lists.rank, rank, query, lengths, np.minimum(found.retrieved, lengths)),
        "margin_correlation": margins,
    }
    summary = {name: _mean(values) for name, values in columns.items()} | {
        "margin_correlation_pooled": None if np.isnan(pooled) else pooled,
        "queries": int(np.count_nonzero(listed)),
        "not_retrieved": float(np.count_nonzero(~retrieved) / max(len(rank), 1)),
        f"unscored@{cutoff}": _mean(np.where(listed, 1 - scored, np.nan)),
        "all_tied": int(np.count_nonzero(undefined)),
        "without_margins": int(np.count_nonzero(listed & np.isnan(margins))),
    }
    return columns, summary


def _divide(numerator: Ints, denominator: Ints) -> Floats:
    values = np.full(len(numerator), np.nan)
    np.divide(numerator, denominator, out=values, where=denominator > 0)
    return values


def _mean(values: Floats) -> float | None:
    return float(np.nanmean(values)) if not np.isnan(values).all() else None


def kendall_tau_b(left: Floats, right: Floats, offsets: Ints) -> Floats:
    """Kendall's tau-b of each group: float64 [groups], NaN where a group has one element or one side is all tied.

    Args:
        left, right: [N] scores, −inf allowed.
        offsets: [groups + 1]; group g is rows offsets[g]:offsets[g + 1].
    """
    groups, lengths = len(offsets) - 1, np.diff(offsets)
    group = np.repeat(np.arange(groups), lengths)
    if not len(group):
        return np.full(groups, np.nan)
    by_right = np.lexsort((right, group))
    new = _changed(group[by_right]) | _changed(right[by_right])
    dense = np.empty(len(group), np.int32)
    dense[by_right] = np.cumsum(new)
    order = np.lexsort((dense, left, group))
    new_left = _changed(group) | _changed(left[order])
    right_ties, left_ties = _tied_pairs(new, group, groups), _tied_pairs(new_left, group, groups)
    both_ties = _tied_pairs(new_left | _changed(dense[order]), group, groups)
    # Sorted by left, then right: a pair is discordant if the right ones stand the wrong way round.
    codes = dense[order] - dense[by_right][np.minimum(offsets[:-1], len(group) - 1)][group]
    if int(lengths.max()) < np.iinfo(np.int16).max:
        codes = codes.astype(np.int16)
    discordant = np.array([inversions(codes[a:b]) for a, b in itertools.pairwise(offsets)], np.float64)
    pairs = lengths * (lengths - 1) / 2
    values = np.full(groups, np.nan)
    scale = np.sqrt((pairs - left_ties) * (pairs - right_ties))
    np.divide(pairs - left_ties - right_ties + both_ties - 2 * discordant, scale, out=values, where=scale > 0)
    return values


def _changed(values: NDArray[Any]) -> NDArray[np.bool_]:
    """bool [N]: differs from the one before; the first does."""
    return np.concatenate([[True], values[1:] != values[:-1]])


def _tied_pairs(new: NDArray[np.bool_], group: Ints, groups: int) -> Floats:
    """Pairs of equal elements in each group, from where a run of equal ones begins."""
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(new)))
    return np.asarray(np.bincount(group[starts], sizes * (sizes - 1) / 2, groups), np.float64)


def inversions(values: NDArray[Any]) -> int:
    """Pairs i < j with values[i] > values[j]. Quadratic, in blocks small enough for the processor's cache."""
    total = 0
    for start in range(0, len(values), BLOCK):
        block, rest = values[start : start + BLOCK, None], values[start + BLOCK :]
        total += int(np.count_nonzero((block > block.T) & ABOVE[: len(block), : len(block)]))
        if len(rest):
            total += int(np.count_nonzero(block > rest))
    return total


def rank_biased_overlap(
    teacher: Ints, student: Ints, query: Ints, longer: Ints, shorter: Ints, p: float = PERSISTENCE
) -> Floats:
    """RBO_ext of two rankings without ties for each query: float64 [queries], NaN where the longer one is empty.

    Webber, Moffat and Zobel, A similarity measure for indefinite rankings (2010), equation 32.

    Args:
        teacher: [N] ranks from 1 of all documents of the longer ranking.
        student: [N] their ranks in the other one, 0 where they are not in it.
        query: [N] to which query a document belongs.
        longer, shorter: [queries] lengths; the other ranking is cut to `shorter`, which is at most `longer`.
        p: persistence.
    """
    depths = np.arange(1, int(longer.max(initial=0)) + 1)
    over = np.concatenate([[0.0], np.cumsum(p**depths / depths)])  # Σ p^d / d
    plain = np.concatenate([[0.0], np.cumsum(p**depths)])
    known = np.flatnonzero((student > 0) & (student <= shorter[query]))
    # A shared document counts from the depth where both rankings have it.
    depth, of = np.maximum(teacher, student)[known], query[known]
    agreement = np.bincount(of, over[longer[of]] - over[depth - 1], len(longer))
    whole = np.bincount(of, minlength=len(longer)).astype(np.float64)
    until = np.bincount(of[depth <= shorter[of]], minlength=len(longer)).astype(np.float64)
    share = np.divide(until, shorter, out=np.zeros(len(longer)), where=shorter > 0)
    beyond = plain[longer] - plain[shorter] - shorter * (over[longer] - over[shorter])
    tail = np.divide(whole - until, longer, out=np.zeros(len(longer)), where=longer > 0) + share
    values = (1 - p) / p * (agreement + share * beyond) + tail * p**longer
    return np.where(longer > 0, values, np.nan)


def margin_correlation(
    student: Floats, teacher: Floats, query: Ints, queries: int, least: int = 3
) -> tuple[Floats, float]:
    """Pearson correlation of pairwise margins: of each query (float64 [queries], NaN where undefined) and over all.

    The margins of all ordered pairs of a query have mean 0, and their products sum to 2n times those of the centred
    scores; so the pairs need not be formed.
    """
    counts = np.bincount(query, minlength=queries)
    centred = []
    for scores in (student, teacher):
        # From the first score of the query on: equal scores become 0 exactly.
        first = np.zeros(queries)
        first[query[::-1]] = scores[::-1]
        shifted = scores - first[query]
        means = np.bincount(query, shifted, queries) / np.maximum(counts, 1)
        centred.append(shifted - means[query])
    own, theirs = centred
    product, left, right = (
        np.bincount(query, values, queries) for values in (own * theirs, own * own, theirs * theirs)
    )
    defined = (counts >= least) & (left > 0) & (right > 0)
    values = np.full(queries, np.nan)
    np.divide(product, np.sqrt(left * right), out=values, where=defined)
    enough = counts >= least
    scale = float(np.sqrt((counts * left)[enough].sum() * (counts * right)[enough].sum()))
    pooled = float((counts * product)[enough].sum() / scale) if scale > 0 else float("nan")
    return np.clip(values, -1, 1), pooled


def _changes(relevant: _Relevant, teacher: Ints, student: Ints, cutoff: int) -> dict[str, pa.Array]:
    """Relevant documents that only one of the two has among its first k: list columns by query."""
    in_teacher, in_student = (teacher > 0) & (teacher <= cutoff), (student > 0) & (student <= cutoff)
    columns: dict[str, pa.Array] = {}
    for name, chosen in (("lost", in_teacher & ~in_student), ("won", in_student & ~in_teacher)):
        rows = np.flatnonzero(chosen)
        rows = rows[np.lexsort(((teacher if name == "lost" else student)[rows], relevant.query[rows]))]
        counts = np.bincount(relevant.query[rows], minlength=relevant.queries)
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        documents = relevant.doc_ids.take(pa.array(rows)).cast(pa.string())
        columns[name] = pa.ListArray.from_arrays(offsets, documents)
        for side, ranks in (("teacher", teacher), ("student", student)):
            given = pa.array(ranks[rows], pa.int32(), mask=ranks[rows] == 0)
            columns[f"{name}_{side}_ranks"] = pa.ListArray.from_arrays(offsets, given)
    return columns
