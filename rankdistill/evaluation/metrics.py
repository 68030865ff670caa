"""Effectiveness of a run against qrels, as trec_eval defines it.

The standard metrics (nDCG, recall, precision, MRR, MAP, hit rate, judged) are computed here in columns, so that a first
evaluation starts at once: ranx compiles for 17 s in a fresh environment. Every other metric ranx knows is computed by
ranx, by its name, on the same order of documents. Names are ranx's: `ndcg@10`, `recall@100`, `mrr@10`, `map`,
`precision@5`, `hit_rate@1`, with `-l2` to count as relevant from level 2 on.

The rules, where implementations differ:
- Order: score descending, then document id descending (trec_eval; ranx keeps an arbitrary order of ties).
- Mean over every query of the qrels: one the run does not hold counts 0 (trec_eval -c), and so does one
  without a relevant document. Queries of the run without judgments are left out. All are counted in `Metrics.notes`.
- A document without a judgment is not relevant. Negative judgments are not relevant and gain nothing.
- nDCG's gain is the judgment itself (linear, Järvelin and Kekäläinen); `ndcg_burges` (through ranx) has 2^rel − 1.
- `relevance_level` makes binary metrics count from that level on and leaves nDCG alone, as in trec_eval.
- MAP@k and recall@k divide by all relevant documents, precision@k by k.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankdistill.collections.identifiers import text_keys
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import say
from rankdistill.runs import Run, read_run

DEFAULT_METRICS = ("ndcg@10", "recall@100", "mrr@10", "map")
STANDARD = ("ndcg", "recall", "mrr", "map", "precision", "hit_rate", "judged")
RANX = ("hits", "f1", "r-precision", "dcg", "dcg_burges", "ndcg_burges", "bpref", "rbp")
GRADED = ("ndcg", "dcg", "dcg_burges", "ndcg_burges", "rbp")
UNJUDGED = np.iinfo(np.int32).min

Qrels = Mapping[str, Mapping[str, int]]


class Metric(NamedTuple):
    """A parsed metric name: `recall@100-l2` is recall, cutoff 100 (0: none), level 2 (0: not given)."""

    name: str
    base: str
    cutoff: int
    level: int


def parse_metric(name: str) -> Metric:
    """Parse a metric as ranx names it.

    Raises:
        UsageError: there is no such metric; the nearest name is offered.
    """
    match = re.fullmatch(r"([a-z][a-z_-]*?|f1)(?:@([1-9]\d*)|\.(\d+))?(?:-l(\d+))?", name)
    base = match[1] if match else name.split("@")[0]
    known = STANDARD + RANX
    if match and base in known and ((base == "rbp") == bool(match[3]) or (base == "rbp" and match[2])):
        return Metric(name, base, int(match[2] or 0), int(match[4] or 0))
    if base == "rbp":
        raise UsageError("rbp needs its persistence", where=f"metrics: {name}", fix="write rbp.80 or rbp.95")
    nearest = difflib.get_close_matches(base, known, 1)
    raise UsageError(
        f"there is no metric {name!r}",
        where="metrics",
        fix=(f"did you mean {nearest[0]}{name[len(base) :]}? " if nearest and nearest[0] != base else "")
        + f"metrics are {', '.join(known)}, with @k for a cutoff and -l2 for a relevance level",
    )


@dataclass
class Metrics:
    """What `evaluate_run` found.

    Attributes:
        name: of the run.
        means: metric → mean over all queries of the qrels.
        query_ids: the queries of the qrels, in their order.
        per_query: metric → float64 [queries].
        notes: what decides how far the means can be trusted, as counts and shares:
            queries, missing_queries (count 0), queries_without_relevant (count 0), ignored_queries (not in the
            qrels, left out), judged@10 (share of the first ten documents that have a judgment), tied_share (scores that
            equal another of the query, so that ids decide), self_hits_dropped, rank_contradictions, undefined,
            numeric_ids (of the run or the qrels, taken as text).
    """

    name: str
    means: dict[str, float]
    query_ids: list[str]
    per_query: dict[str, np.ndarray]
    notes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        means = ", ".join(f"{metric} {value:.4f}" for metric, value in self.means.items())
        return f"Metrics({self.name}: {means}; {self.describe_notes()})"

    def describe_notes(self) -> str:
        """The notes in words; counts that are 0 are left out."""
        words = {
            "missing_queries": "{:,} queries without a retrieved document count 0",
            "queries_without_relevant": "{:,} queries without a relevant document count 0",
            "ignored_queries": "{:,} queries of the run have no judgments and are left out",
            "tied_share": "{:.1%} of scores tied (order: document id descending)",
            "self_hits_dropped": "{:,} self hits dropped",
            "self_documents": "{:,} queries are documents of the collection and are not left out (drop_self_hits)",
            "rank_contradictions": "{:,} queries whose ranks contradict their scores (scores decide)",
            "undefined": "{:,} undefined values count 0",
            "numeric_ids": "{:,} ids were numbers and are taken as text",
        }
        said = [f"{self.notes['queries']:,} queries", f"judged@10 {self.notes['judged@10']:.1%}"]
        return ", ".join(said + [text.format(self.notes[key]) for key, text in words.items() if self.notes.get(key)])

    def to_table(self) -> pa.Table:
        """Columns query_id and one for each metric."""
        return pa.table({"query_id": pa.array(self.query_ids, pa.string()), **self.per_query})


def evaluate_run(
    run: Run | str | Path,
    qrels: Qrels,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    relevance_level: int = 1,
    drop_self_hits: bool = False,
) -> Metrics:
    """Evaluate a run, by the rules of this module's docstring.

    Args:
        run: a run or the path of one.
        qrels: {query id: {doc id: judgment}}.
        metrics: names as ranx has them.
        relevance_level: least judgment that binary metrics count as relevant (TREC DL: 2).
        drop_self_hits: leave out documents whose id is the query's (ArguAna), and count them.

    Raises:
        UsageError: an unknown metric.
        RankdistillError: no judged query at all, or none of the run's queries is judged.
    """
    run = run if isinstance(run, Run) else read_run(run)
    parsed = [parse_metric(metric) for metric in metrics]
    if relevance_level < 1:
        raise UsageError(f"relevance_level is {relevance_level}, but must be at least 1", where="relevance_level")
    if not qrels:
        raise RankdistillError("there are no judgments to evaluate with", where=run.name)
    qrels, numeric = text_keys(qrels, "judgments")
    ranked = _rank(run, qrels, drop_self_hits)
    per_query: dict[str, np.ndarray] = {}
    undefined = 0
    through_ranx = [metric for metric in parsed if metric.base in RANX]
    for metric in parsed:
        if metric.base in STANDARD:
            per_query[metric.name] = _standard(metric, ranked, relevance_level)
    if through_ranx:
        for name, values in _through_ranx(through_ranx, ranked, relevance_level).items():
            undefined += int(np.count_nonzero(~np.isfinite(values)))
            per_query[name] = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    per_query = {metric: per_query[metric] for metric in metrics}
    best = ranked.ideal_of(1)
    notes = {
        "queries": ranked.queries,
        "missing_queries": int(np.count_nonzero(ranked.retrieved == 0)),
        "queries_without_relevant": int(np.count_nonzero(best < relevance_level)),
        "ignored_queries": ranked.ignored,
        "judged@10": _judged_share(ranked, 10),
        "tied_share": ranked.tied_share,
        "self_hits_dropped": ranked.self_hits,
        "undefined": undefined,
        **run.notes,
    }
    if numeric:
        notes["numeric_ids"] = notes.get("numeric_ids", 0) + numeric
    return Metrics(
        run.name,
        {metric: float(values.mean()) for metric, values in per_query.items()},
        list(qrels),
        per_query,
        notes,
    )


@dataclass
class _Ranked:
    """Run and qrels joined; rows ordered by query of the qrels, then rank."""

    queries: int
    query: np.ndarray  # int64 [N], row → query of the qrels
    rank: np.ndarray  # int64 [N], from 1
    relevance: np.ndarray  # int32 [N], UNJUDGED where there is no judgment
    document: np.ndarray  # int64 [N], number of the document among the judged ones, -1 for others
    retrieved: np.ndarray  # int64 [queries]
    judged_query: np.ndarray  # int64 [J], judgments sorted by query, then relevance descending
    judged_rank: np.ndarray  # int64 [J], from 1 within a query
    judged: np.ndarray  # int64 [J], relevance
    judged_document: np.ndarray  # int64 [J]
    ignored: int
    self_hits: int
    tied_share: float

    def ideal_of(self, rank: int) -> np.ndarray:
        """The relevance at a rank of the ideal order, UNJUDGED where there are fewer judgments: int64 [queries]."""
        ideal = np.full(self.queries, UNJUDGED, np.int64)
        at = self.judged_rank == rank
        ideal[self.judged_query[at]] = self.judged[at]
        return ideal

    def sums(self, values: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Sum of values [M] over rows `where` [M] for each query: float64 [queries]."""
        return np.bincount(self.query[where], values, self.queries)

    def relevant(self, level: int) -> np.ndarray:
        """Number of judgments at or above the level: int64 [queries]."""
        return np.bincount(self.judged_query[self.judged >= level], minlength=self.queries)


def _rank(run: Run, qrels: Qrels, drop_self_hits: bool) -> _Ranked:
    """Join a run with qrels, in columns: nothing is held as a Python object for a row of the run."""
    row_of = {query_id: row for row, query_id in enumerate(qrels)}
    judged_query = np.repeat(np.arange(len(qrels)), [len(documents) for documents in qrels.values()])
    judged = np.array([level for documents in qrels.values() for level in documents.values()], np.int64)
    encoded = pa.array(
        [doc_id for documents in qrels.values() for doc_id in documents], pa.large_string()
    ).dictionary_encode()
    judged_document = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)

    query_of = np.array([row_of.get(query_id, -1) for query_id in run.query_ids], np.int64)
    ignored = int(np.count_nonzero(query_of < 0))
    if ignored and ignored == len(run):
        raise RankdistillError(
            f"none of the run's {ignored:,} queries has judgments",
            where=f"{run.name}: query {run.query_ids[0]!r}; judgments: query {next(iter(qrels))!r}",
            fix="evaluate the run on the collection and split it was made for",
        )
    query = np.repeat(query_of, np.diff(run.offsets))
    keep = query >= 0
    self_hits = 0
    if drop_self_hits:
        itself = run.self_hits
        self_hits = int(np.count_nonzero(itself & keep))
        keep &= ~itself
    document = pc.index_in(run.doc_ids, value_set=encoded.dictionary).fill_null(-1).to_numpy().astype(np.int64)
    tied = run.tied
    if not keep.all():
        query, document, tied = query[keep], document[keep], tied[keep]
    if (np.diff(query) < 0).any():
        order = np.argsort(query, kind="stable")
        query, document = query[order], document[order]
    retrieved = np.bincount(query, minlength=len(qrels))
    rank = np.arange(1, len(query) + 1) - np.repeat(np.cumsum(retrieved) - retrieved, retrieved)

    documents = max(len(encoded.dictionary), 1)
    keys = judged_query * documents + judged_document
    order = np.argsort(keys)
    relevance = np.full(len(query), UNJUDGED, np.int32)
    known = np.flatnonzero(document >= 0)
    if len(keys) and len(known):
        wanted = query[known] * documents + document[known]
        at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
        hit = keys[order[at]] == wanted
        relevance[known[hit]] = judged[order[at[hit]]]
    ideal = np.lexsort((-judged, judged_query))
    counts = np.bincount(judged_query, minlength=len(qrels))
    return _Ranked(
        queries=len(qrels),
        query=query,
        rank=rank,
        relevance=relevance,
        document=document,
        retrieved=retrieved,
        judged_query=judged_query[ideal],
        judged_rank=np.arange(1, len(judged) + 1) - np.repeat(np.cumsum(counts) - counts, counts),
        judged=judged[ideal],
        judged_document=judged_document[ideal],
        ignored=ignored,
        self_hits=self_hits,
        tied_share=float(tied.mean()) if len(tied) else 0.0,
    )


def _standard(metric: Metric, ranked: _Ranked, relevance_level: int) -> np.ndarray:
    """One standard metric: float64 [queries]."""
    base, cutoff = metric.base, metric.cutoff
    level = metric.level or relevance_level
    if base == "ndcg":
        # trec_eval's nDCG knows no level; a level asked for in the name drops the gains below it.
        least = max(metric.level, 1)
        return _divide(_dcg(ranked, least, cutoff), _ideal_dcg(ranked, least, cutoff))
    if base == "judged":
        return _divide(
            _count(ranked, ranked.relevance > UNJUDGED, cutoff),
            np.minimum(ranked.retrieved, cutoff) if cutoff else ranked.retrieved,
        )
    hits = ranked.relevance >= level
    if cutoff:
        hits &= ranked.rank <= cutoff
    at = np.flatnonzero(hits)
    found = ranked.sums(np.ones(len(at)), at)
    if base == "recall":
        return _divide(found, ranked.relevant(level))
    if base == "precision":
        return found / cutoff if cutoff else _divide(found, ranked.retrieved)
    if base == "hit_rate":
        return (found > 0).astype(np.float64)
    queries = ranked.query[at]
    # The how-manieth relevant document of its query a hit is, from 1.
    counts = found.astype(np.int64)
    nth = np.arange(1, len(at) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
    if base == "mrr":
        first = at[nth == 1]
        values = np.zeros(ranked.queries)
        values[ranked.query[first]] = 1 / ranked.rank[first]
        return values
    precision = np.bincount(queries, nth / ranked.rank[at], ranked.queries)
    return _divide(precision, ranked.relevant(level))


def _dcg(ranked: _Ranked, least: int, cutoff: int) -> np.ndarray:
    gains = ranked.relevance >= least
    if cutoff:
        gains &= ranked.rank <= cutoff
    at = np.flatnonzero(gains)
    return ranked.sums(ranked.relevance[at] / np.log2(ranked.rank[at] + 1), at)


def _ideal_dcg(ranked: _Ranked, least: int, cutoff: int) -> np.ndarray:
    gains = ranked.judged >= least
    if cutoff:
        gains &= ranked.judged_rank <= cutoff
    ideal = ranked.judged[gains] / np.log2(ranked.judged_rank[gains] + 1)
    return np.bincount(ranked.judged_query[gains], ideal, ranked.queries)


def _count(ranked: _Ranked, rows: np.ndarray, cutoff: int) -> np.ndarray:
    at = np.flatnonzero(rows & (ranked.rank <= cutoff) if cutoff else rows)
    return ranked.sums(np.ones(len(at)), at)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, 0 where the denominator is 0."""
    values = np.zeros(len(numerator))
    np.divide(numerator, denominator, out=values, where=denominator > 0)
    return values


def _judged_share(ranked: _Ranked, cutoff: int) -> float:
    """Share of all retrieved documents within the cutoff that have a judgment."""
    shown = ranked.rank <= cutoff
    return float((ranked.relevance[shown] > UNJUDGED).mean()) if shown.any() else 0.0


def _through_ranx(metrics: Sequence[Metric], ranked: _Ranked, relevance_level: int) -> dict[str, np.ndarray]:
    """Metrics computed by ranx on numbered documents in trec_eval's order.

    ranx's own conversion orders ties arbitrarily and hashes ids into float64, where two may meet; its metrics take
    [n, 2] arrays of document number and score, which are handed over in the right order with distinct numbers.
    """
    say("ranx compiles a metric on its first use: about 20 s once, then 2 s")
    ranx = importlib.import_module("ranx.meta.evaluate")
    typed_list = importlib.import_module("numba.typed").List
    best = ranked.ideal_of(1)
    judgments, documents, rows = typed_list(), typed_list(), []
    judged_at = np.searchsorted(ranked.judged_query, np.arange(ranked.queries + 1))
    run_at = np.searchsorted(ranked.query, np.arange(ranked.queries + 1))
    # A document without any judgment needs a number of its own in its query, different from all judged ones.
    number = np.where(ranked.document >= 0, ranked.document, -ranked.rank).astype(np.float64)
    for query in range(ranked.queries):
        mine, theirs = slice(run_at[query], run_at[query + 1]), slice(judged_at[query], judged_at[query + 1])
        # ranx divides by zero where a query has no relevant or no retrieved document: those count 0.
        if best[query] >= 1 and run_at[query] < run_at[query + 1]:
            judgments.append(
                np.column_stack([ranked.judged_document[theirs], ranked.judged[theirs]]).astype(np.float64)
            )
            documents.append(np.column_stack([number[mine], -ranked.rank[mine].astype(np.float64)]))
            rows.append(query)
    results: dict[str, np.ndarray] = {}
    for metric in metrics:
        results[metric.name] = np.zeros(ranked.queries)
        if not rows:
            continue
        levelled = relevance_level > 1 and not metric.level and metric.base not in GRADED
        asked = f"{metric.name}-l{relevance_level}" if levelled else metric.name
        # Not ranx.evaluate: asked for one metric with a cutoff, it looks for its result under the name without.
        base, cutoff, level = ranx.extract_metric_and_params(asked)
        results[metric.name][rows] = ranx.metric_switch(base)(judgments, documents, cutoff, level)
    return results
