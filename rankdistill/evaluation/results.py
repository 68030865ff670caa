"""What an evaluation found, and its tables: terminal, plain text, Markdown, LaTeX.

Published figures stand apart, marked as published.

A figure that differs significantly from the baseline's carries a mark: ▲ better, ▼ worse; the line below says by which
test. Markdown also has the 95% intervals.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np

from rankdistill.evaluation.cost import measure_costs
from rankdistill.evaluation.extrapolation import Extrapolation
from rankdistill.evaluation.fidelity import Fidelity
from rankdistill.evaluation.metrics import Metrics
from rankdistill.evaluation.significance import Significance, compare_values
from rankdistill.plain import shown

if TYPE_CHECKING:
    from rankdistill.collections import Collection

LEFT = ("system", "set", "source", "reason", "metric", "against", "front", "index", "settings")  # columns of words
MARKS = {1: "▲", -1: "▼", 0: ""}
LATEX_MARKS = {"▲": r"$^{\dagger}$", "▼": r"$^{\ddagger}$"}
CORRECTIONS = {"holm": "Holm", "tukey_hsd": "Tukey HSD"}
PAIR_ROWS = 30  # comparisons shown in a table; all are in significance.json


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
    significance: Significance | None = None
    cost: dict[str, Any] | None = None
    fidelity: Fidelity | None = None
    extrapolation: Extrapolation | None = None

    def __repr__(self) -> str:
        return plain_table(self)

    def __getitem__(self, system: str) -> Row:
        for row in self.rows:
            if row.system == system:
                return row
        raise KeyError(system)

    def to_json(self) -> dict[str, Any]:
        """What `results.json` holds."""
        apart = ("path", "significance", "cost", "fidelity", "extrapolation")
        values = {name: value for name, value in vars(self).items() if name not in apart}
        return values | {"rows": [asdict(row) for row in self.rows]}

    def compare_rows(
        self,
        values: Mapping[str, Mapping[str, np.ndarray]],
        *,
        baseline: str | None = None,
        family: Literal["all", "baseline"] = "all",
        correction: str = "holm",
        alpha: float = 0.05,
        seed: int = 0,
    ) -> None:
        """Fill in the rows' intervals and `significance` from system → metric → value of each query."""
        missing = {row.system: row.notes["missing_queries"] for row in self.rows if row.notes["missing_queries"]}
        self.significance = compare_values(
            values,
            baseline=baseline,
            family=family,
            correction=correction,
            alpha=alpha,
            seed=seed,
            notes={"missing_queries": missing} if missing else None,
        )
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
            row.queries_per_second = cost["batch_queries_per_second"]
            row.bytes, row.parameters = cost["bytes"], cost["parameters"]
            row.pairs_per_second = cost["pairs_per_second"]


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
        try:
            tested = evaluation.significance.of(str(student), name, metric) if evaluation.significance else None
        except KeyError:
            tested = None
        if tested is None:
            kind = "below" if ours < theirs else "above" if ours > theirs else "alike"
        else:
            kind = "alike" if not tested.significant else "worse" if tested.difference < 0 else "better"
        against[name] = (kind, ours, theirs)
    return against


def verdict(evaluations: Sequence[Evaluation]) -> list[str]:
    """One sentence an outcome, the worst first; over several sets, on how many of them."""
    every = [outcomes(evaluation) for evaluation in evaluations]
    sentences = []
    for kind, words in WORDS.items():
        parts = []
        for name in dict.fromkeys(name for of_set in every for name in of_set):
            known = [of_set[name] for of_set in every if name in of_set]
            hits = [outcome for outcome in known if outcome[0] == kind]
            if hits and len(every) == 1:
                parts.append(f"“{name}” ({hits[0][1]:.4f} against {hits[0][2]:.4f})")
            elif hits:
                parts.append(f"“{name}” (on {len(hits)} of {len(known)} sets)")
        if parts:
            sentences.append(f"The student is {words} {', '.join(parts)}.")
    return sentences


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Cells as text; columns of words are left-aligned, the others right. `bold` holds (row, column)."""

    title: str
    header: list[str]
    rows: list[list[str]]
    bold: set[tuple[int, int]] = field(default_factory=set)
    lines_below: list[str] = field(default_factory=list)

    def widths(self) -> list[int]:
        return [max(len(line[column]) for line in [self.header, *self.rows]) for column in range(len(self.header))]


def bytes_text(count: int | None) -> str:
    """`1.5 MB` (1 MB = 10^6 bytes); empty when unknown."""
    if count is None:
        return ""
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.3g} {('kB', 'MB', 'GB', 'TB')[unit - 1]}"


def rate_text(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def figure_text(value: float | Sequence[float] | None) -> str:
    """A figure to four digits; a range as least–greatest; empty when there is none."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.4f}"
    return "–".join(f"{part:.3f}" for part in value)


def tables(evaluation: Evaluation | SuiteEvaluation, *, intervals: bool = False, short: bool = False) -> list[Table]:
    """The tables of an evaluation; `short`: of each set the systems alone, without notes."""
    if isinstance(evaluation, Evaluation):
        return _set_tables(evaluation, intervals, short)
    parts = [table for of_set in evaluation.sets for table in _set_tables(of_set, intervals, short)]
    if len(evaluation.sets) > 1:
        parts.append(_macro_table(evaluation))
        parts += _published(f"{evaluation.suite}, average", evaluation.metrics, evaluation.published)
    if evaluation.missing:
        rows = [[entry["set"], entry["reason"]] for entry in evaluation.missing]
        parts.append(Table(f"{evaluation.suite}: sets not evaluated", ["set", "reason"], rows))
    return parts


def _set_tables(evaluation: Evaluation, intervals: bool, short: bool = False) -> list[Table]:
    measured = {
        title: (name, text)
        for title, name, text in (
            ("size", "bytes", bytes_text),
            ("queries/s", "queries_per_second", rate_text),
            ("pairs/s", "pairs_per_second", rate_text),
        )
        if any(getattr(row, name) is not None for row in evaluation.rows)
    }
    header = ["system", *evaluation.metrics, *measured]
    rows = [
        [row.system, *(figure_text(row.means[metric]) for metric in evaluation.metrics)]
        + [text(getattr(row, name)) for name, text in measured.values()]
        for row in evaluation.rows
    ]
    most = max((row.notes["queries"] for row in evaluation.rows), default=0)
    whole = [row.notes["queries"] == most for row in evaluation.rows]  # a row of some of the queries is no best one
    bold = _best(
        [cells if of_all else [""] * len(cells) for cells, of_all in zip(rows, whole)], len(evaluation.metrics)
    )
    below = [f"{evaluation.metrics[0]}: {line}" for line in verdict([evaluation])]
    below += [] if short else _notes(evaluation)
    if evaluation.significance is not None:
        _add_marks(rows, evaluation.metrics, evaluation.significance)
        below += legend(evaluation.significance)
    queries = evaluation.rows[0].notes["queries"] if evaluation.rows else 0
    split = f"{evaluation.split}, " if evaluation.split else ""
    title = f"{evaluation.name} ({split}{queries:,} queries, depth {evaluation.depth:,})"
    table = Table(title, header, rows, bold, below)
    if short:
        return [table]
    return [
        table,
        *_cost(evaluation),
        *_agreement(evaluation),
        *_extrapolation(evaluation),
        *(_intervals(evaluation) if intervals else []),
        *_published(evaluation.name, evaluation.metrics, evaluation.published),
    ]


def _agreement(evaluation: Evaluation) -> list[Table]:
    fidelity = evaluation.fidelity
    if fidelity is None:
        return []
    overlap, unscored = f"overlap@{fidelity.cutoff}", f"unscored@{fidelity.cutoff}"
    shown = {"Kendall τ": "kendall_tau", overlap: overlap, "RBO": "rbo", "margins r": "margin_correlation"}
    rows = [
        [
            *(system, *(figure_text(values[key]) for key in shown.values()), f"{values[unscored]:.1%}"),
            f"{values['student_better']:,}/{values['equal']:,}/{values['teacher_better']:,}",
            f"{values['won']:,}/{values['lost']:,}",
        ]
        for system, values in fidelity.systems.items()
    ]
    queries = fidelity.notes["queries"] - fidelity.notes["queries_without_teacher_list"]
    title = f"{evaluation.name}: agreement with the teacher ({queries:,} queries, at most {fidelity.depth:,} documents)"
    below = [
        "agreement is not effectiveness: Kendall τ-b over the documents that the teacher scored, RBO with p = .9, "
        "Pearson's r of the margins between scores within a query",
        f"{unscored}: share of the first {fidelity.cutoff} that the teacher never scored; win/tie/loss against it: "
        f"queries, by {fidelity.metric}; won/lost: relevant documents that only one has among its first "
        f"{fidelity.cutoff}",
    ]
    header = ["system", *shown, unscored, "win/tie/loss", "won/lost"]
    return [Table(title, header, rows, set(), below)]


def _extrapolation(evaluation: Evaluation) -> list[Table]:
    if evaluation.extrapolation is None:
        return []
    metric = evaluation.metrics[0]
    return [extrapolation_table(entry, metric, evaluation.name) for entry in evaluation.extrapolation.protocols]


def extrapolation_table(protocol: Mapping[str, Any], metric: str, name: str) -> Table:
    """One metric on queries near the training queries and far from them, from an entry of `extrapolation.json`."""
    parts, overlap = protocol["parts"], protocol["relevant_overlap"]
    header, rows = ["system", *parts, "gap"], []
    reference = protocol["reference"]
    for system, gaps in protocol["gap"].items():
        means = [figure_text(part["systems"][system].get(metric)) for part in parts.values()]
        rows.append([system, *means, _gap_text(gaps[metric])])
        if reference is not None:
            rows[-1].append(_gap_text(protocol["gap_beyond"].get(system, {}).get(metric)))
    if reference is not None:
        header.append(f"gap beyond {reference}'s")
    counts = ", ".join(f"{part['queries']:,} {name}" for name, part in parts.items())
    if protocol["neither"]:
        counts += f", {protocol['neither']:,} neither"
    how = f"left-out clusters, {protocol['folds']} folds" if "folds" in protocol else "nearest training query"
    if "bucket" in protocol:
        how = f"cluster {protocol['bucket']} of {protocol['buckets']} left out"
    below = [
        f"{counts} queries; no query of extrapolation has a training query at a cosine above {protocol['bound']:.3f} "
        f"({protocol['encoder']})",
        "gap: interpolation − extrapolation with its 95% interval; "
        + (
            "of the same queries, paired"
            if protocol["paired"]
            else "the parts hold different queries: what tells is the gap beyond that of a system without training"
        ),
        "of what is relevant, "
        + ", ".join(f"{overlap[part]['pair_share'] or 0:.1%} in {part}" for part in parts)
        + " is relevant to a training query too",
    ]
    return Table(f"{name}: interpolation and extrapolation ({how}), {metric}", header, rows, set(), below)


def _gap_text(gap: Sequence[float] | None) -> str:
    return "" if gap is None else f"{gap[0]:+.4f} ({gap[1]:+.3f} to {gap[2]:+.3f})"


def _best(rows: list[list[str]], metrics: int) -> set[tuple[int, int]]:
    """The greatest figures of each metric, as printed: what looks equal is equally bold."""
    bold: set[tuple[int, int]] = set()
    for column in range(1, metrics + 1):
        values = [row[column] for row in rows]
        bold |= {(row, column) for row, value in enumerate(values) if len(rows) > 1 and value == max(values)}
    return bold


def _add_marks(rows: list[list[str]], metrics: Sequence[str], significance: Significance) -> None:
    for column, metric in enumerate(metrics, 1):
        marks = [MARKS[significance.mark(row[0], metric)] for row in rows]
        width = max(map(len, marks), default=0)
        for row, mark in zip(rows, marks, strict=True):
            row[column] += mark.ljust(width)  # figures stay under each other


def legend(significance: Significance) -> list[str]:
    """What the marks mean: [] where nothing was compared."""
    if not significance.comparisons:
        return []
    if significance.queries < 2:
        return ["one query: no test, no interval"]
    pairs = "all pairs" if significance.family == "all" else "the pairs with it"
    return [
        f"▲ ▼ better or worse than {significance.baseline}: randomisation test, p < {significance.alpha:g} after "
        f"{CORRECTIONS[significance.correction]} over {pairs} on a metric"
    ]


def _intervals(evaluation: Evaluation) -> list[Table]:
    rows = [
        [row.system, *(_interval(row.intervals.get(metric)) for metric in evaluation.metrics)]
        for row in evaluation.rows
    ]
    if not any(row.intervals for row in evaluation.rows):
        return []
    title = f"{evaluation.name}: 95% intervals of the means (BCa bootstrap over queries)"
    return [Table(title, ["system", *evaluation.metrics], rows)]


def _cost(evaluation: Evaluation) -> list[Table]:
    """What serving costs: one query at a time, bytes, memory; [] where it was not measured."""
    cost = evaluation.cost
    if cost is None:
        return []
    systems: dict[str, dict[str, Any]] = cost["systems"]
    known = ("encode", "search", "rerank", "fuse")
    steps = [name for name in known if any(costs.get(f"{name}_ms") for costs in systems.values())]
    header = ["system", *(f"{name} ms" for name in steps), "p50 ms", "p95 ms", "p99 ms"]
    header += ["bytes/doc", "memory", "parameters", "front"]
    rows = []
    for name, costs in systems.items():
        total = costs["total_ms"] or {}
        fronts = [axis for axis, front in cost["pareto"].items() if name in front]
        cells = [name, *(latency_text((costs.get(f"{step}_ms") or {}).get("p50")) for step in steps)]
        cells += [latency_text(total.get(level)) for level in ("p50", "p95", "p99")]
        cells += ["" if costs["bytes_a_document"] is None else f"{costs['bytes_a_document']:,.0f}"]
        cells += [bytes_text(costs["memory_bytes"]), count_text(costs["parameters"]), ", ".join(fronts)]
        rows.append(cells)
    environment = cost["environment"]
    counts = sorted({costs["queries_measured"] for costs in systems.values()} - {0})
    measured = " to ".join(str(count) for count in counts[:: max(1, len(counts) - 1)]) or "no"
    below = [
        f"one query at a time, warmed up, {measured} queries, depth {cost['depth']:,}; {environment['machine']}, "
        f"{environment['device']}, {environment['threads']} threads; a step's figure is its median",
        f"front: no system is at least as good in {cost['metric']} and as cheap in latency (p50), in bytes, and better "
        "in one; memory: index and weights",
    ]
    if (environment["load"] or 0) > environment["cores"] + 0.5:
        load = f"load {environment['load']} on {environment['cores']} cores"
        below.append(f"the machine was busy ({load}): alone on it, systems are faster")
    for same in cost["same_queries"]:
        ratios = same["teacher_takes_times"].items()
        times = ", ".join(f"{ratio:,.{0 if ratio >= 10 else 1}f}× {name}" for name, ratio in ratios)
        mean = latency_text(same["mean_ms"][same["teacher"]])
        below.append(f"{same['teacher']}: {mean} ms a query, on the same {same['queries']} queries as long as {times}")
    return [Table(f"{evaluation.name}: what serving costs", header, rows, set(), below)]


def latency_text(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def count_text(count: int | None) -> str:
    """`22.7 M`; empty when unknown."""
    if count is None:
        return ""
    return f"{count:,}" if count < 10_000 else f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"


def _interval(ends: Sequence[float | None] | None) -> str:
    return "" if not ends or None in ends else f"{ends[0]:.4f} to {ends[1]:.4f}"


def comparisons(significance: Significance, title: str) -> Table:
    """The tests of the pairs; where they are many and of all pairs, those of the first metric."""
    shown = significance.comparisons
    below: list[str] = []
    if significance.family == "all" and len(shown) > PAIR_ROWS and len(significance.metrics) > 1:
        shown = [pair for pair in shown if pair.metric == significance.metrics[0]]
        below.append(f"the same for {', '.join(significance.metrics[1:])}: in the JSON")
    if len(shown) > PAIR_ROWS:
        below.append(f"{len(shown) - PAIR_ROWS:,} more pairs: in the JSON")
        shown = shown[:PAIR_ROWS]
    # fmt: off
    header = ["metric", "system", "against", "difference", "95%", "d", "win/tie/loss", "t-test", "randomisation",
              "t corrected", "corrected"]
    # fmt: on
    rows = [
        [
            *(pair.metric, pair.a, pair.b, f"{pair.difference:+.4f}"),
            *("" if pair.low is None else f"{pair.low:+.4f} to {pair.high:+.4f}",),
            *("" if pair.effect_size is None else f"{pair.effect_size:+.2f}",),
            f"{pair.wins:,}/{pair.ties:,}/{pair.losses:,}",
            *(p_text(p) for p in (pair.p_t, pair.p_randomisation, pair.p_t_corrected)),
            p_text(pair.p_randomisation_corrected) + (" *" if pair.significant else "  "),
        ]
        for pair in shown
    ]
    below.insert(
        0,
        f"difference: system − the one against it, with its BCa bootstrap interval; d: Cohen's, paired; p-values of "
        f"{significance.permutations:,} permutations (exact where few queries differ); corrected: "
        f"{CORRECTIONS[significance.correction]}; * below {significance.alpha:g}",
    )
    return Table(title, header, rows, set(), below)


def p_text(p: float) -> str:
    return "<.0001" if p < 0.0001 else f"{p:.4f}".removeprefix("0") if p < 0.99995 else "1"


def _notes(evaluation: Evaluation) -> list[str]:
    lines = [f"{row.system}: {_describe(row)}" for row in evaluation.rows]
    if evaluation.relevance_level > 1:
        lines.append(f"binary metrics count judgments from {evaluation.relevance_level} on")
    if any(row.queries_per_second is not None for row in evaluation.rows):
        threads, batch = evaluation.environment.get("threads"), evaluation.environment.get("query_batch")
        lines.append(f"queries/s: encoding and search together, batches of {batch}, up to {threads} threads")
    if any(row.pairs_per_second is not None for row in evaluation.rows):
        lines.append("pairs/s: re-ranking alone, one query at a time")
    return lines


def _describe(row: Row) -> str:
    notes = Metrics(row.system, row.means, [], {}, row.notes).describe_notes()
    return f"{notes}; {row.note}" if row.note else notes


def _macro_table(suite: SuiteEvaluation) -> Table:
    rows = [[name, *(figure_text(means[metric]) for metric in suite.metrics)] for name, means in suite.macro.items()]
    below = [f"{len(suite.missing)} sets are missing from this average"] if suite.missing else []
    everywhere = set(suite.macro)
    elsewhere = sorted({row.system for of_set in suite.sets for row in of_set.rows} - everywhere)
    if elsewhere:
        below.append(f"not measured on every set, so not averaged: {', '.join(elsewhere)}")
    title = f"{suite.suite}: macro average over {suite.macro_sets} sets"
    return Table(title, ["system", *suite.metrics], rows, _best(rows, len(suite.metrics)), below)


def _published(name: str, metrics: Sequence[str], figures: Sequence[dict[str, Any]]) -> list[Table]:
    """Published figures that share a metric with the table above."""
    rows = [
        [
            f"{figure['system']} ({figure['note']})" if figure["note"] else figure["system"],
            *(figure_text(figure["metrics"].get(metric)) for metric in metrics),
            figure["source"],
        ]
        for figure in figures
        if set(figure["metrics"]) & set(metrics)
    ]
    if not rows:
        return []
    return [Table(f"{name}: published by others, not measured here", ["system", *metrics, "source"], rows)]


Shown = Evaluation | SuiteEvaluation | Sequence[Table]


def _tables_of(shown: Shown, intervals: bool = False) -> Sequence[Table]:
    return tables(shown, intervals=intervals) if isinstance(shown, Evaluation | SuiteEvaluation) else shown


def plain_table(evaluation: Shown, width: int | None = None) -> str:
    """Aligned plain text; where a table is wider than `width`, one block of lines for each row."""
    return "\n\n".join(_plain(table, width) for table in _tables_of(evaluation))


def _plain(table: Table, width: int | None) -> str:
    widths = table.widths()
    lines = [table.title]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        label = max((len(name) for name in table.header[1:]), default=0)
        for row in table.rows:
            lines.append(row[0])
            lines += [
                f"  {name:<{label}}  {cell}".rstrip()
                for name, cell in zip(table.header[1:], row[1:], strict=True)
                if cell.strip()
            ]
    else:
        for row in [table.header, *table.rows]:
            numbers = [_aligned(table.header[i], cell, widths[i]) for i, cell in enumerate(row)]
            lines.append("  ".join(numbers).rstrip())
    return "\n".join(lines + table.lines_below)


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.ljust(width) if column in LEFT else cell.rjust(width)


def markdown(evaluation: Shown) -> str:
    """Markdown; the best figures are bold."""
    parts = []
    for table in _tables_of(evaluation, intervals=True):
        lines = [f"### {table.title}", "", _markdown_row(table.header)]
        lines.append(_markdown_row([":---" if name in LEFT else "---:" for name in table.header]))
        for number, row in enumerate(table.rows):
            cells = [_escape(cell.rstrip()) for cell in row]
            lines.append(_markdown_row([f"**{c}**" if (number, i) in table.bold else c for i, c in enumerate(cells)]))
        lines += [""] + [f"- {_escape(line)}" for line in table.lines_below]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    for mark in ("\\", "|", "<", "*", "_", "`"):
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text.replace("\n", " ")


def latex(evaluation: Shown) -> str:
    """LaTeX tables to paste into a paper (needs the booktabs package); the best figures are bold.

    Notes become comments; what the marks mean is said in the caption.
    """
    return "\n".join(map(_latex, _tables_of(evaluation)))


def _latex(table: Table) -> str:
    marks = [line for line in table.lines_below if line.startswith("▲")]
    lines = ["% \\usepackage{booktabs}", *(f"% {' '.join(line.split())}" for line in table.lines_below)]
    lines += [r"\begin{table}", r"\centering"]
    # The legend's marks are spelt out: "▲ ▼ better or worse than ..."
    said = [line.replace("▲ ▼ better or worse", "▲ better, ▼ worse", 1) for line in marks]
    lines.append(rf"\caption{{{_tex('. '.join([table.title, *said]))}.}}")
    lines.append(rf"\begin{{tabular}}{{{''.join('l' if name in LEFT else 'r' for name in table.header)}}}")
    lines += [r"\toprule", _latex_row([_tex(name) for name in table.header]), r"\midrule"]
    for number, row in enumerate(table.rows):
        cells = [_tex(cell.rstrip()) for cell in row]
        lines.append(_latex_row([rf"\textbf{{{c}}}" if (number, i) in table.bold else c for i, c in enumerate(cells)]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


TEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "–": "--", "−": "$-$", "×": r"$\times$", "\n": " ", **LATEX_MARKS,
}  # fmt: skip


def _tex(text: str) -> str:
    """Text as LaTeX prints it: a system's name may hold anything."""
    return "".join(TEX.get(character, character) for character in text)


# Below what is written to a file of the user's choice: by it the file is known as ours, and may be written again.
SIGNED = {
    "markdown": "\n<!-- written by rankdistill -->\n",
    "latex": "\n% written by rankdistill\n",
    "text": "\nwritten by rankdistill\n",
}


def _clean(table: Table) -> Table:
    """Without control characters: names of runs, sets and collections are others' words."""
    header, *rows = ([shown(cell, len(cell)) for cell in row] for row in [table.header, *table.rows])
    below = [shown(line, len(line)) for line in table.lines_below]
    return replace(table, title=shown(table.title, len(table.title)), header=header, rows=rows, lines_below=below)


def print_tables(evaluation: Shown, stream: TextIO | None = None, width: int | None = None) -> None:
    """Print to a terminal through rich; elsewhere, or where it is too narrow for `width` columns, as plain text."""
    stream = stream or sys.stdout
    shown_tables = [_clean(table) for table in _tables_of(evaluation)]
    if not stream.isatty():
        print(plain_table(shown_tables, width), file=stream)
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream, width=width)
    for table in shown_tables:
        if sum(table.widths()) + 3 * len(table.header) + 1 > console.width:
            print(_plain(table, console.width) + "\n", file=stream)
            continue
        # Text objects, not markup: a system's name may hold brackets.
        grid = RichTable(title=Text(table.title), title_justify="left")
        for name in table.header:
            grid.add_column(Text(name), justify="left" if name in LEFT else "right")
        for number, row in enumerate(table.rows):
            grid.add_row(*(Text(c, style="bold" if (number, i) in table.bold else "") for i, c in enumerate(row)))
        console.print(grid)
        for line in table.lines_below:
            console.print(Text(line, style="dim"))
