"""What an evaluation found, and its tables; published figures stand apart, marked as published.

Each table is described here once, for text (`tables.py`) and for the report's page. Marks refer to the baseline, on
the page to the student; the line below says by which test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.collections import Collection
from rankdistill.evaluation.cost import measure_costs
from rankdistill.evaluation.extrapolation import Extrapolation
from rankdistill.evaluation.fidelity import Fidelity
from rankdistill.evaluation.metrics import Metrics
from rankdistill.evaluation.significance import Comparison, Significance, compare_values
from rankdistill.evaluation.tables import (
    Cell,
    Table,
    bytes_text,
    count_text,
    counted,
    figure_text,
    latency_text,
    make_table,
    number,
    p_text,
    plain_table,
    rate_text,
    signed,
)

CORRECTIONS = {"holm": "Holm", "tukey_hsd": "Tukey HSD"}
PAIR_ROWS = 30  # comparisons shown in a table; all are in significance.json
Columns = dict[str, Callable[[Any], Cell | str]]


@dataclass
class Row:
    """One system on one set."""

    system: str
    means: dict[str, float]
    notes: dict[str, Any]
    run: str  # the run file, relative to the evaluation's folder
    bytes: int | None = None
    queries_per_second: float | None = None
    parameters: int | None = None
    note: str = ""
    pairs_per_second: float | None = None  # of a system that reads query and document together
    intervals: dict[str, list[float]] = field(default_factory=dict)  # metric → 95% interval of the mean


@dataclass
class Evaluation:
    """The rows of one set.

    Attributes:
        significance: the comparisons of the rows, written to a file of its own.
        cost: what it costs to serve them (see `cost`), written to a file of its own; None where it was not asked for.
        per_query: system → metric → value of each of `query_ids`, of the rows that are compared; in a file of its own.
        fidelity: how far the rows rank as the one named `teacher`, where there is one; files of its own.
        extrapolation: the rows on queries near the training queries and far from them; files of its own.
        published: figures of others on this set, to be shown beside and never among the rows.
        environment: machine, threads, library versions; what the speeds were measured with.
    """

    name: str
    split: str
    collection: dict[str, str]
    metrics: list[str]
    depth: int
    relevance_level: int
    drop_self_hits: bool
    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)
    published: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None
    query_ids: list[str] = field(default_factory=list)
    per_query: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    significance: Significance | None = None
    cost: dict[str, Any] | None = None
    fidelity: Fidelity | None = None
    extrapolation: Extrapolation | None = None

    def __repr__(self) -> str:
        return plain_table(self)

    def __getitem__(self, system: str) -> Row:
        if (row := self.row(system)) is None:
            raise KeyError(system)
        return row

    def row(self, system: str | None) -> Row | None:
        return next((row for row in self.rows if row.system == system), None)

    @property
    def systems(self) -> list[str]:
        return [row.system for row in self.rows]

    @property
    def folder(self) -> Path:
        assert self.path is not None  # written, or read
        return self.path

    def tables(self, *, intervals: bool = False, short: bool = False) -> list[Table]:
        """`short`: the systems alone, without notes."""
        verdicts = [f"{self.metrics[0]}: {line}" for line in verdict([self])]
        notes = [] if short else row_notes(self)
        results = results_table(self, notes=[*verdicts, *notes, *legend(self.significance)])
        apart = [
            cost_table(self),
            agreement_table(self),
            *(extrapolation_table(entry, self.metrics[0], self.name) for entry in self.protocols),
            intervals_table(self) if intervals else None,
            published_table(self.name, self.metrics, self.published),
        ]
        return [results, *(table for table in apart if table is not None and not short)]

    @property
    def protocols(self) -> list[dict[str, Any]]:
        """How the queries were parted into interpolation and extrapolation, with the figures of the parts."""
        return [] if self.extrapolation is None else self.extrapolation.protocols

    @property
    def same_queries(self) -> list[dict[str, Any]]:
        """The teacher's time against others', on the same queries."""
        return (self.cost or {}).get("same_queries", [])

    @property
    def queries(self) -> int:
        return int(self.rows[0].notes.get("queries", 0)) if self.rows else 0

    def to_json(self) -> dict[str, Any]:
        """What `results.json` holds."""
        apart = ("path", "query_ids", "per_query", "significance", "cost", "fidelity", "extrapolation")
        values = {name: value for name, value in vars(self).items() if name not in apart}
        return values | {"rows": [asdict(row) for row in self.rows]}

    def compare_rows(self, **options: Any) -> None:
        """Fill in the rows' intervals and `significance` from `per_query`; options of `compare_values`."""
        missing = {row.system: row.notes["missing_queries"] for row in self.rows if row.notes["missing_queries"]}
        notes = {"missing_queries": missing} if missing else None
        self.significance = compare_values(self.per_query, notes=notes, **options)
        for row in self.rows:
            row.intervals = self.significance.intervals.get(row.system, {})

    def measure_cost(
        self, systems: Mapping[str, Any], collection: Collection, query_ids: Sequence[str], queries: int
    ) -> None:
        """Fill in `cost`, and in the rows what was first measured there: a teacher whose scores were looked up."""
        self.cost = measure_costs(
            systems, self.rows, collection, query_ids, depth=self.depth, metric=self.metrics[0], queries=queries
        )
        for row in self.rows:
            cost = self.cost["systems"][row.system]
            row.queries_per_second, row.pairs_per_second = cost["batch_queries_per_second"], cost["pairs_per_second"]
            row.bytes, row.parameters = cost["bytes"], cost["parameters"]


@dataclass
class SuiteEvaluation:
    """All sets of a suite.

    Attributes:
        macro: system → metric → mean over the sets (a group of sets counts as one); only of systems that were measured
            on every set found.
        missing: sets that were not evaluated, with the reason.
        students: name → fingerprint of the trained students that were measured.
    """

    suite: str
    metrics: list[str]
    sets: list[Evaluation]
    missing: list[dict[str, str]]
    macro: dict[str, dict[str, float]] = field(default_factory=dict)
    macro_sets: int = 0
    published: list[dict[str, Any]] = field(default_factory=list)
    students: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def __repr__(self) -> str:
        return plain_table(self)

    def tables(self, *, intervals: bool = False, short: bool = False) -> list[Table]:
        """Of every set, then the average; `short`: of each set the systems alone, without notes."""
        parts = [table for of_set in self.sets for table in of_set.tables(intervals=intervals, short=short)]
        if len(self.sets) > 1:
            published = published_table(f"{self.suite}, average", self.metrics, self.published)
            parts += [macro_table(self), *([published] if published else [])]
        if self.missing:
            columns: Columns = {"set": lambda entry: entry["set"], "reason": lambda entry: entry["reason"]}
            parts.append(make_table(f"{self.suite}: sets not evaluated", self.missing, columns))
        return parts

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name not in ("path", "sets")}
        return values | {"sets": [evaluated.to_json() for evaluated in self.sets]}


# -- the verdict -------------------------------------------------------------------------------------------------------

# The first words about a student: is it better or worse than what one could have used without training it? That is the
# encoder it was made from, whole and untouched, the first stage and BM25. Told from chance by the corrected
# randomisation test of the evaluation (significance.py); where none was made, that is said too.
STUDENTS = ("student, distilled", "student")
UNTRAINED, BM25, ENCODER, FIRST_STAGE = "student, untrained", "BM25", "encoder: ", "first stage: "
# How each outcome is said, the worst news first.
WORDS = {
    "worse": "significantly worse than",
    "below": "below, though not tested against,",
    "better": "significantly better than",
    "above": "above, though not tested against,",
    "alike": "not distinguishable from",
}


def reference_rows(names: Sequence[str]) -> list[str]:
    """Rows that a student is held against: what could be used without training it, the encoders first."""
    encoders = [name for name in names if name.startswith((ENCODER, FIRST_STAGE))]
    return encoders + [name for name in (UNTRAINED, BM25) if name in names]


def outcomes(evaluation: Evaluation) -> dict[str, tuple[str, float, float]]:
    """Reference → (a key of WORDS, the student's mean, its own mean) in the first metric; {} without a student."""
    metric = evaluation.metrics[0]
    means = {row.system: row.means[metric] for row in evaluation.rows if row.means.get(metric) is not None}
    student = next((name for name in STUDENTS if name in means), None)
    against: dict[str, tuple[str, float, float]] = {}
    for name in reference_rows(list(means)) if student else []:
        ours, theirs = means[str(student)], means[name]
        tested = evaluation.significance.find(str(student), name, metric) if evaluation.significance else None
        if tested is None:
            kind = "below" if ours < theirs else "above" if ours > theirs else "alike"
        else:
            kind = "alike" if not tested.significant else "worse" if tested.difference < 0 else "better"
        against[name] = (kind, ours, theirs)
    return against


def verdict(evaluations: Sequence[Evaluation]) -> list[str]:
    """One sentence an outcome, the worst first; over several sets, on how many of them."""
    every: dict[str, list[tuple[str, float, float]]] = {}
    for evaluation in evaluations:
        for name, outcome in outcomes(evaluation).items():
            every.setdefault(name, []).append(outcome)
    sentences = []
    for kind, words in WORDS.items():
        parts = []
        for name, known in every.items():
            hits = [(ours, theirs) for key, ours, theirs in known if key == kind]
            if hits:
                figures = "{:.4f} against {:.4f}".format(*hits[0])
                parts.append(
                    f"“{name}” ({figures if len(evaluations) == 1 else f'on {len(hits)} of {len(known)} sets'})"
                )
        if parts:
            sentences.append(f"The student is {words} {', '.join(parts)}.")
    return sentences


# -- tables ------------------------------------------------------------------------------------------------------------


def results_table(
    evaluation: Evaluation, against: str | None = None, notes: Sequence[str] = (), page: bool = False
) -> Table:
    """The rows' means, sizes and speeds.

    Args:
        against: the system that marks refer to; default the baseline.
        page: with the latency of a query, which the text has in the table of costs.
    """
    tests, rows = evaluation.significance, evaluation.rows
    most = max((row.notes.get("queries", 0) for row in rows), default=0)
    whole = [row for row in rows if row.notes.get("queries", 0) == most]  # a row of some of the queries is no best one

    # As printed: what looks equal is equally bold.
    best = {name: max((figure_text(row.means.get(name)) for row in whole), default="") for name in evaluation.metrics}

    def figure(metric: str, row: Row) -> Cell:
        text = figure_text(row.means.get(metric))
        strong = len(rows) > 1 and row in whole and text == best[metric]
        sign = tests.mark(row.system, metric, against) if tests is not None else 0
        return number(row.means.get(metric), below=figure_text(row.intervals.get(metric)), sign=sign, strong=strong)

    columns: Columns = {
        "system": lambda row: row.system,
        **{metric: partial(figure, metric) for metric in evaluation.metrics},
        "size": lambda row: number(row.bytes, bytes_text),
        "queries/s": lambda row: number(row.queries_per_second, rate_text),
        "pairs/s": lambda row: number(row.pairs_per_second, rate_text),
    }
    if page:
        columns["ms a query"] = lambda row: number(latency(evaluation, row.system), latency_text)
    split = f"{evaluation.split}, " if evaluation.split else ""
    title = f"{evaluation.name} ({split}{evaluation.queries:,} queries, depth {evaluation.depth:,})"
    return make_table(title, rows, columns, notes)


def latency(evaluation: Evaluation, system: str, step: str = "total", level: str = "p50") -> float | None:
    """Milliseconds of a single query; None where it was not measured."""
    of_system = (evaluation.cost or {"systems": {}})["systems"].get(system, {})
    return (of_system.get(f"{step}_ms") or {}).get(level)


def agreement_table(evaluation: Evaluation, page: bool = False) -> Table | None:
    """`page`: with the headline metric and the measures that seldom tell more."""
    fidelity = evaluation.fidelity
    if fidelity is None:
        return None
    cutoff, counts = fidelity.cutoff, fidelity.notes
    overlap, unscored = f"overlap@{cutoff}", f"unscored@{cutoff}"

    def measure(key: str, text: Callable[[Any], str] = figure_text) -> Callable[[str], Cell]:
        return lambda system: number(fidelity.systems[system][key], text)

    def together(*keys: str) -> Callable[[str], Cell]:
        return lambda system: counted([fidelity.systems[system][key] for key in keys])

    def mean(system: str) -> Cell:
        row = evaluation.row(system)
        return number(row.means.get(evaluation.metrics[0]) if row else None)

    columns: Columns = {
        "system": lambda system: system,
        **({evaluation.metrics[0]: mean} if page else {}),
        "Kendall τ": measure("kendall_tau"),
        overlap: measure(overlap),
        "RBO": measure("rbo"),
        "margins r": measure("margin_correlation"),
        **({"margins r, pooled": measure("margin_correlation_pooled")} if page else {}),
        unscored: measure(unscored, "{:.1%}".format),
        **({"not retrieved": measure("not_retrieved", "{:.1%}".format)} if page else {}),
        "win/tie/loss": together("student_better", "equal", "teacher_better"),
        "won/lost": together("won", "lost"),
    }
    queries = counts["queries"] - counts["queries_without_teacher_list"]
    title = f"{evaluation.name}: agreement with the teacher ({queries:,} queries, at most {fidelity.depth:,} documents)"
    notes = [
        "agreement is not effectiveness: Kendall τ-b over the documents that the teacher scored, RBO with "
        f"p = {counts['rbo_persistence']:g}, Pearson's r of the margins between scores within a query",
        f"{unscored}: share of the first {cutoff} that the teacher never scored; win/tie/loss against it: "
        f"queries, by {fidelity.metric}; won/lost: relevant documents that only one has among its first {cutoff}",
        f"the teacher scored {counts['documents_a_list']:.3g} documents a query",
    ]
    if unlisted := counts["queries_without_teacher_list"]:
        notes.append(f"{unlisted:,} more queries are left out: the teacher scored none of their documents")
    return make_table(title, list(fidelity.systems), columns, notes)


def extrapolation_table(protocol: Mapping[str, Any], metric: str, name: str) -> Table:
    """One metric on queries near the training queries and far from them, from an entry of `extrapolation.json`."""
    parts, overlap, reference = protocol["parts"], protocol["relevant_overlap"], protocol["reference"]

    def mean(part: str, system: str) -> Cell:
        ends = parts[part]["intervals"][system][metric]
        return number(parts[part]["systems"][system].get(metric), below=figure_text(ends))

    def gap(key: str, system: str) -> Cell:
        known = protocol[key].get(system, {}).get(metric)
        if known is None:
            return Cell("")
        return Cell(f"{signed(known[0])} ({signed(known[1], 3)} to {signed(known[2], 3)})", known[0])

    columns: Columns = {
        "system": lambda system: system,
        **{part: partial(mean, part) for part in parts},
        "gap": partial(gap, "gap"),
        f"gap beyond {reference}'s": partial(gap, "gap_beyond"),
    }
    counts = ", ".join(f"{part['queries']:,} {name}" for name, part in parts.items())
    if protocol["neither"]:
        counts += f", {protocol['neither']:,} neither (held out, but too near to a training query)"
    how = f"left-out clusters, {protocol['folds']} folds" if "folds" in protocol else "nearest training query"
    if "bucket" in protocol:
        how = f"cluster {protocol['bucket']} of {protocol['buckets']} left out"
    trained = protocol["training_queries"]  # of folds, each one's
    trained = ", ".join(f"{count:,}" for count in (trained if isinstance(trained, list) else [trained]))

    def seen(part: str) -> str:
        known = overlap[part]
        passages = f" ({known['seen_passages']:,} of {known['passages']:,} passages)" if "passages" in known else ""
        return f"{known['pair_share'] or 0:.1%} in {part}{passages}"

    notes = [
        f"{counts} queries; no query of extrapolation has one of the {trained} training queries at a cosine above "
        f"{protocol['bound']:.3f} ({protocol['encoder']})",
        "gap: interpolation − extrapolation with its 95% interval; "
        + (
            "of the same queries, paired"
            if protocol["paired"]
            else "the parts hold different queries: what tells is the gap beyond that of a system without training"
        ),
        f"of what is relevant, {', '.join(map(seen, parts))} is relevant to a training query too",
    ]
    title = f"{name}: interpolation and extrapolation ({how}), {metric}"
    return make_table(title, list(protocol["gap"]), columns, notes)


def legend(significance: Significance | None) -> list[str]:
    """What the marks mean: [] where nothing was compared."""
    if significance is None or not significance.comparisons:
        return []
    if significance.queries < 2:
        return ["one query: no test, no interval"]
    pairs = "all pairs" if significance.family == "all" else "the pairs with it"
    return [
        f"▲ ▼ better or worse than {significance.baseline}: randomisation test, p < {significance.alpha:g} after "
        f"{CORRECTIONS[significance.correction]} over {pairs} on a metric"
    ]


def intervals_table(evaluation: Evaluation) -> Table | None:
    if not any(row.intervals for row in evaluation.rows):
        return None

    def interval(metric: str, row: Row) -> Cell:
        return number(row.intervals.get(metric), lambda ends: f"{ends[0]:.4f} to {ends[1]:.4f}")

    intervals = {metric: partial(interval, metric) for metric in evaluation.metrics}
    title = f"{evaluation.name}: 95% intervals of the means (BCa bootstrap over queries)"
    return make_table(title, evaluation.rows, {"system": lambda row: row.system, **intervals})


def cost_table(evaluation: Evaluation) -> Table | None:
    """What serving costs: one query at a time, bytes, memory; None where it was not measured."""
    cost = evaluation.cost
    if cost is None:
        return None
    systems: dict[str, dict[str, Any]] = cost["systems"]

    def step(name: str, system: str) -> Cell:
        known = [latency(evaluation, system, name, level) for level in ("p50", "p95", "p99")]
        rest = " / ".join(latency_text(value) for value in known[1:] if value is not None)
        return number(known[0], latency_text, below=rest)

    def whole(level: str, system: str) -> Cell:
        return number(latency(evaluation, system, level=level), latency_text)

    columns: Columns = {
        "system": lambda system: system,
        **{f"{name} ms": partial(step, name) for name in ("encode", "search", "rerank", "fuse")},
        **{f"{level} ms": partial(whole, level) for level in ("p50", "p95", "p99")},
        "bytes/doc": lambda system: number(systems[system]["bytes_a_document"], "{:,.0f}".format),
        "memory": lambda system: number(systems[system]["memory_bytes"], bytes_text),
        "parameters": lambda system: number(systems[system]["parameters"], count_text),
        "front": lambda system: ", ".join(axis for axis, front in cost["pareto"].items() if system in front),
    }
    environment = cost["environment"]
    counts = sorted({costs["queries_measured"] for costs in systems.values()} - {0})
    queries = " to ".join(str(count) for count in counts[:: max(1, len(counts) - 1)]) or "no"
    notes = [
        f"one query at a time, warmed up, {queries} queries, depth {cost['depth']:,}; {environment['machine']}, "
        f"{environment['device']}, {environment['threads']} threads; a step's figure is its median",
        f"front: no system is at least as good in {cost['metric']} and as cheap in latency (p50), in bytes, and better "
        "in one; memory: index and weights",
    ]
    if (environment["load"] or 0) > environment["cores"] + 0.5:
        load = f"load {environment['load']} on {environment['cores']} cores"
        notes.append(f"the machine was busy ({load}): alone on it, systems are faster")
    for same in cost["same_queries"]:
        ratios = same["teacher_takes_times"].items()
        times = ", ".join(f"{ratio:,.{0 if ratio >= 10 else 1}f}× {name}" for name, ratio in ratios)
        mean = latency_text(same["mean_ms"][same["teacher"]])
        notes.append(f"{same['teacher']}: {mean} ms a query, on the same {same['queries']} queries as long as {times}")
    return make_table(f"{evaluation.name}: what serving costs", list(systems), columns, notes)


def comparisons_table(significance: Significance, title: str, student: str | None = None) -> Table:
    """The tests of the pairs; where they are many and of all pairs, those of the first metric.

    Args:
        student: those of this system alone, as its differences from the others, where it was compared.
    """
    pairs, notes = significance.comparisons, []
    if ours := [pair for pair in pairs if student in (pair.a, pair.b)]:
        pairs = [pair if pair.a == student else pair.turned() for pair in ours]
    elif len(pairs) > PAIR_ROWS:
        if significance.family == "all" and len(significance.metrics) > 1:
            pairs = [pair for pair in pairs if pair.metric == significance.metrics[0]]
            notes.append(f"the same for {', '.join(significance.metrics[1:])}: in the JSON")
        if len(pairs) > PAIR_ROWS:
            notes.append(f"{len(pairs) - PAIR_ROWS:,} more pairs: in the JSON")
            pairs = pairs[:PAIR_ROWS]

    def interval(pair: Comparison) -> Cell:
        return number([pair.low, pair.high], lambda ends: f"{signed(ends[0])} to {signed(ends[1])}")

    def corrected(p: float) -> str:
        return p_text(p) + (" *" if p < significance.alpha else "  ")

    columns: Columns = {
        "metric": lambda pair: pair.metric,
        "system": lambda pair: pair.a,
        "against": lambda pair: pair.b,
        "difference": lambda pair: number(pair.difference, signed),
        "95%": interval,
        "d": lambda pair: number(pair.effect_size, lambda value: signed(value, 2)),
        "win/tie/loss": lambda pair: counted([pair.wins, pair.ties, pair.losses]),
        "t-test": lambda pair: number(pair.p_t, p_text),
        "randomisation": lambda pair: number(pair.p_randomisation, p_text),
        "t corrected": lambda pair: number(pair.p_t_corrected, p_text),
        "corrected": lambda pair: number(pair.p_randomisation_corrected, corrected),
    }
    how = (
        f"difference: system − the one against it, with its BCa bootstrap interval; d: Cohen's, paired; p-values of "
        f"{significance.permutations:,} permutations (exact where few queries differ); corrected: "
        f"{CORRECTIONS[significance.correction]}; * below {significance.alpha:g}"
    )
    return make_table(title, pairs, columns, [how, *notes])


def row_notes(evaluation: Evaluation) -> list[str]:
    """How each row was counted."""
    lines = []
    for row in evaluation.rows:
        notes = Metrics(row.system, row.means, [], {}, row.notes).describe_notes()
        lines.append(f"{row.system}: {notes}" + (f"; {row.note}" if row.note else ""))
    if evaluation.relevance_level > 1:
        lines.append(f"binary metrics count judgments from {evaluation.relevance_level} on")
    if any(row.queries_per_second is not None for row in evaluation.rows):
        threads, batch = evaluation.environment.get("threads"), evaluation.environment.get("query_batch")
        lines.append(f"queries/s: encoding and search together, batches of {batch}, up to {threads} threads")
    if any(row.pairs_per_second is not None for row in evaluation.rows):
        lines.append("pairs/s: re-ranking alone, one query at a time")
    return lines


def macro_table(suite: SuiteEvaluation) -> Table:
    best = {m: max((figure_text(means[m]) for means in suite.macro.values()), default="") for m in suite.metrics}

    def figure(metric: str, system: str) -> Cell:
        value = suite.macro[system][metric]
        return number(value, strong=len(suite.macro) > 1 and figure_text(value) == best[metric])

    notes = [f"{len(suite.missing)} sets are missing from this average"] if suite.missing else []
    elsewhere = sorted({system for of_set in suite.sets for system in of_set.systems} - set(suite.macro))
    if elsewhere:
        notes.append(f"not measured on every set, so not averaged: {', '.join(elsewhere)}")
    columns: Columns = {"system": lambda system: system, **{m: partial(figure, m) for m in suite.metrics}}
    return make_table(f"{suite.suite}: macro average over {suite.macro_sets} sets", list(suite.macro), columns, notes)


def published_table(name: str, metrics: Sequence[str], figures: Sequence[dict[str, Any]]) -> Table | None:
    """Published figures that share a metric with the table above."""
    shared = [figure for figure in figures if set(figure["metrics"]) & set(metrics)]

    def mean(metric: str, row: dict[str, Any]) -> Cell:
        return number(row["metrics"].get(metric))

    columns: Columns = {
        "system": lambda row: f"{row['system']} ({row['note']})" if row["note"] else row["system"],
        **{metric: partial(mean, metric) for metric in metrics},
        "source": lambda row: row["source"],
    }
    return make_table(f"{name}: published by others, not measured here", shared, columns) if shared else None
