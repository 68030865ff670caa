"""Effectiveness of a run against qrels, as trec_eval defines it.

Metrics are computed in columns, all queries at once. Names are ranx's: `ndcg@10`, `recall@100`, `mrr@10`, `map`,
`precision@5`, `hit_rate@1`, `rbp.80`, with `-l2` to count as relevant from level 2 on. The tests hold every metric
against pytrec_eval or ranx; ranx itself compiles for 17 s in a fresh environment and orders ties arbitrarily.

The rules, where implementations differ:
- Order: score descending, then document id descending (trec_eval).
- Mean over every query of the qrels: one the run does not hold counts 0 (trec_eval -c), and so does one
  without a relevant document. Queries of the run without judgments are left out. All are counted in `Metrics.notes`.
- A document without a judgment is not relevant. Negative judgments are not relevant and gain nothing.
- nDCG's gain is the judgment itself (linear, Järvelin and Kekäläinen); `ndcg_burges` has 2^rel − 1.
- `relevance_level` makes binary metrics count from that level on and leaves graded ones alone, as in trec_eval.
- MAP@k and recall@k divide by all relevant documents, precision@k by k.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rankdistill.collections.text_files import text_keys
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.runs import Run, positions, ranks_within, read_run

DEFAULT_METRICS = ("ndcg@10", "recall@100", "mrr@10", "map")
METRICS = {  # name → what it is
    "ndcg": "discounted cumulative gain, of that of the ideal order",
    "recall": "share of the relevant documents that are found",
    "mrr": "1 / rank of the first relevant document",
    "map": "average precision",
    "precision": "share of the documents found that are relevant",
    "hit_rate": "1 where a relevant document is found",
    "judged": "share of the documents found that have a judgment",
    "hits": "relevant documents found",
    "f1": "harmonic mean of precision and recall",
    "r-precision": "precision at as many documents as are relevant",
    "dcg": "Σ relevance / log2(rank + 1)",
    "dcg_burges": "Σ (2^relevance − 1) / log2(rank + 1)",
    "ndcg_burges": "dcg_burges, of that of the ideal order",
    "bpref": "share of the pairs of relevant and judged not relevant documents in the right order",
    "rbp": "rank-biased precision; `rbp.80` has the persistence .8",
}
NOTES = {  # what is said of a count that is not 0
    "missing_queries": "{:,} queries without a retrieved document count 0",
    "queries_without_relevant": "{:,} queries without a relevant document count 0",
    "ignored_queries": "{:,} queries of the run have no judgments and are left out",
    "tied_share": "{:.1%} of scores tied (order: document id descending)",
    "self_hits_dropped": "{:,} self hits dropped",
    "self_documents": "{:,} queries are documents of the collection and are not left out (drop_self_hits)",
    "rank_contradictions": "{:,} queries whose ranks contradict their scores (scores decide)",
    "numeric_ids": "{:,} ids were numbers and are taken as text",
}
GRADED = ("ndcg", "dcg", "dcg_burges", "ndcg_burges", "rbp")
UNJUDGED = np.iinfo(np.int32).min

Qrels = Mapping[str, Mapping[str, int]]


class Metric(NamedTuple):
    """A parsed metric name: `recall@100-l2` is recall, cutoff 100 (0: none), level 2 (0: not given)."""

    name: str
    base: str
    cutoff: int = 0
    level: int = 0
    persistence: float = 0.0


def parse_metric(name: str) -> Metric:
    """Parse a metric as ranx names it.

    Raises:
        UsageError: there is no such metric; the nearest name is offered.
    """
    match = re.fullmatch(r"([a-z][a-z_-]*?|f1)(?:@([1-9]\d*)|\.(\d+))?(?:-l(\d+))?", name)
    base = match[1] if match else name.split("@")[0]
    if match and base == "rbp" and (digits := match[3] or match[2]):
        return Metric(name, base, level=int(match[4] or 0), persistence=float(f"0.{digits}"))
    if base == "rbp":
        raise UsageError("rbp needs its persistence", where=f"metrics: {name}", fix="write rbp.80 or rbp.95")
    if match and base in METRICS and not match[3]:
        return Metric(name, base, int(match[2] or 0), int(match[4] or 0))
    nearest = difflib.get_close_matches(base, METRICS, 1)
    raise UsageError(
        f"there is no metric {name!r}",
        where="metrics",
        fix=(f"did you mean {nearest[0]}{name[len(base) :]}? " if nearest and nearest[0] != base else "")
        + f"metrics are {', '.join(METRICS)}, with @k for a cutoff and -l2 for a relevance level",
    )


@dataclass
class Metrics:
    """What `evaluate_run` found.

    Attributes:
        means: metric → mean over all queries of the qrels.
        query_ids: the queries of the qrels, in their order.
        per_query: metric → float64 [queries].
        notes: what decides how far the means can be trusted, as counts and shares: `queries`, `judged@10` (share of the
            first ten documents that have a judgment) and those of NOTES.
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
        said = [f"{self.notes['queries']:,} queries", f"judged@10 {self.notes['judged@10']:.1%}"]
        return ", ".join(said + [text.format(self.notes[key]) for key, text in NOTES.items() if self.notes.get(key)])


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
    ignored = len(set(run.query_ids) - qrels.keys())
    if ignored and ignored == len(run):
        raise RankdistillError(
            f"none of the run's {ignored:,} queries has judgments",
            where=f"{run.name}: query {run.query_ids[0]!r}; judgments: query {next(iter(qrels))!r}",
            fix="evaluate the run on the collection and split it was made for",
        )
    ranked = run.for_queries(list(qrels))
    tied, itself = ranked.tied, ranked.self_hits if drop_self_hits else np.zeros(len(ranked.scores), bool)
    if itself.any():
        ranked, tied = ranked.keep(~itself), tied[~itself]
    joined = _join(ranked, qrels)
    per_query = {metric.name: _values(metric, joined, relevance_level) for metric in parsed}
    shown = joined.rank <= 10
    notes = {
        "queries": len(qrels),
        "missing_queries": int(np.count_nonzero(joined.retrieved == 0)),
        "queries_without_relevant": int(np.count_nonzero(joined.relevant(relevance_level) == 0)),
        "ignored_queries": ignored,
        "judged@10": float((joined.relevance[shown] > UNJUDGED).mean()) if shown.any() else 0.0,
        "tied_share": float(tied.mean()) if len(tied) else 0.0,
        "self_hits_dropped": int(np.count_nonzero(itself)),
        **run.notes,
    }
    if numeric:
        notes["numeric_ids"] = notes.get("numeric_ids", 0) + numeric
    means = {metric: float(values.mean()) for metric, values in per_query.items()}
    return Metrics(run.name, means, list(qrels), per_query, notes)


@dataclass
class _Joined:
    """Run and qrels joined: N documents by query of the qrels, then rank; J judgments by query, best first."""

    retrieved: np.ndarray  # int64 [queries]
    query: np.ndarray  # [N], document → query of the qrels
    rank: np.ndarray  # int64 [N], from 1
    relevance: np.ndarray  # int32 [N], UNJUDGED where there is no judgment
    judged_query: np.ndarray  # int64 [J]
    judged_rank: np.ndarray  # int64 [J], in the ideal order
    judged: np.ndarray  # int64 [J], relevance

    def sums(self, rows: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Of each query the sum of `values` [N], or the number, of the documents where `rows` [N] is true."""
        weights = None if values is None else values[rows]
        return np.bincount(self.query[rows], weights, len(self.retrieved)).astype(np.float64)

    def relevant(self, level: int, below: float = np.inf) -> np.ndarray:
        """Of each query the number of judgments from the level on (and below another)."""
        rows = (self.judged >= level) & (self.judged < below)
        return np.bincount(self.judged_query[rows], minlength=len(self.retrieved))


def _join(run: Run, qrels: Qrels) -> _Joined:
    """In columns: nothing is held as a Python object for a row of the run, which is of the queries of the qrels."""
    counts = np.array([len(documents) for documents in qrels.values()], np.int64)
    judged_query = np.repeat(np.arange(len(counts)), counts)
    judged = np.array([level for documents in qrels.values() for level in documents.values()], np.int64)
    ids = pa.array([doc_id for documents in qrels.values() for doc_id in documents], pa.large_string())
    encoded = ids.dictionary_encode()
    keys = judged_query * len(encoded.dictionary) + encoded.indices.to_numpy(zero_copy_only=False)
    document = positions(run.doc_ids, encoded.dictionary)
    known = np.flatnonzero(document >= 0)
    at = positions(run.query_rows[known].astype(np.int64) * len(encoded.dictionary) + document[known], keys)
    relevance = np.full(len(document), UNJUDGED, np.int32)
    relevance[known] = np.append(judged, UNJUDGED)[at]
    ideal = np.lexsort((-judged, judged_query))
    retrieved = np.diff(run.offsets)
    return _Joined(
        retrieved, run.query_rows, run.ranks, relevance, judged_query[ideal], ranks_within(counts), judged[ideal]
    )


def _values(metric: Metric, joined: _Joined, relevance_level: int) -> np.ndarray:
    """A metric of each query: float64 [queries]."""
    base, cutoff, level = metric.base, metric.cutoff, metric.level or relevance_level
    if base in GRADED:
        # trec_eval's nDCG knows no level; a level asked for in the name drops the gains below it.
        gained = _gained(metric, joined, joined.query, joined.rank, joined.relevance)
        if not base.startswith("ndcg"):
            return gained
        return _divide(gained, _gained(metric, joined, joined.judged_query, joined.judged_rank, joined.judged))
    within = joined.rank <= cutoff if cutoff else np.ones(len(joined.rank), bool)
    hits = within & (joined.relevance >= level)
    found, relevant = joined.sums(hits), joined.relevant(level)
    if base == "hits":
        return found
    if base == "hit_rate":
        return (found > 0).astype(np.float64)
    if base == "judged":
        shown = np.minimum(joined.retrieved, cutoff) if cutoff else joined.retrieved
        return _divide(joined.sums(within & (joined.relevance > UNJUDGED)), shown)
    if base == "recall":
        return _divide(found, relevant)
    if base == "precision":
        return found / cutoff if cutoff else _divide(found, joined.retrieved)
    if base == "f1":  # of precision and recall, whose harmonic mean this is
        return _divide(2 * found, (cutoff or joined.retrieved) + relevant)
    if base == "r-precision":
        return _divide(joined.sums(hits & (joined.rank <= relevant[joined.query])), relevant)
    if base == "bpref":
        # Of the judged documents that are not relevant, how many of the query stand above each document.
        others = (joined.relevance >= 0) & (joined.relevance < level)
        before = np.cumsum(joined.sums(others)) - joined.sums(others)  # in earlier queries
        above = np.cumsum(others) - np.repeat(before, joined.retrieved)
        most = relevant[joined.query]
        among = np.minimum(most, joined.relevant(0, level)[joined.query])
        return _divide(joined.sums(hits, 1 - _divide(np.minimum(above, most), among)), relevant)
    # The how-manieth relevant document of its query a hit is, from 1.
    nth = np.zeros(len(hits))
    nth[hits] = ranks_within(found.astype(np.int64))
    if base == "mrr":
        return joined.sums(nth == 1, 1 / joined.rank)
    return _divide(joined.sums(hits, nth / joined.rank), relevant)


def _gained(metric: Metric, joined: _Joined, query: np.ndarray, rank: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Discounted gains of each query: float64 [queries]."""
    rows = relevance >= max(metric.level, 1)
    if metric.cutoff:
        rows &= rank <= metric.cutoff
    gain, rank = relevance[rows].astype(np.float64), rank[rows]
    if metric.base == "rbp":
        gain *= (1 - metric.persistence) * metric.persistence ** (rank - 1)
    else:
        gain = (2**gain - 1 if metric.base.endswith("burges") else gain) / np.log2(rank + 1)
    return np.bincount(query[rows], gain, len(joined.retrieved))


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
