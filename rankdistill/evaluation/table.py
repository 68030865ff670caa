"""Tables of an evaluation: terminal, plain text, Markdown. Published figures stand apart, marked as published."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

from rankdistill.evaluation.metrics import Metrics

if TYPE_CHECKING:
    from rankdistill.evaluation.evaluate import Evaluation, Row, SuiteEvaluation


@dataclass
class Table:
    """Cells as text; the first column is left-aligned, the others right. `bold` holds (row, column)."""

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


def tables(evaluation: Evaluation | SuiteEvaluation) -> list[Table]:
    """The tables of an evaluation: measured, then published."""
    if not hasattr(evaluation, "sets"):  # by shape: to import the class from here would be a circle
        return _set_tables(evaluation)
    evaluation = cast("SuiteEvaluation", evaluation)
    made = [table for one in evaluation.sets for table in _set_tables(one)]
    if len(evaluation.sets) > 1:
        made.append(_macro_table(evaluation))
        made += _published(f"{evaluation.suite}, average", evaluation.metrics, evaluation.published)
    if evaluation.missing:
        rows = [[entry["set"], entry["reason"]] for entry in evaluation.missing]
        made.append(Table(f"{evaluation.suite}: sets not evaluated", ["set", "reason"], rows))
    return made


def _set_tables(evaluation: Evaluation) -> list[Table]:
    has_size = any(row.bytes is not None for row in evaluation.rows)
    has_rate = any(row.queries_per_second is not None for row in evaluation.rows)
    header = ["system", *evaluation.metrics] + ["size"] * has_size + ["queries/s"] * has_rate
    rows = [
        [row.system, *(figure_text(row.means[metric]) for metric in evaluation.metrics)]
        + [bytes_text(row.bytes)] * has_size
        + [rate_text(row.queries_per_second)] * has_rate
        for row in evaluation.rows
    ]
    queries = evaluation.rows[0].notes["queries"] if evaluation.rows else 0
    title = f"{evaluation.name} ({evaluation.split}, {queries:,} queries, depth {evaluation.depth:,})"
    return [
        Table(title, header, rows, _best(rows, len(evaluation.metrics)), _notes(evaluation)),
        *_published(evaluation.name, evaluation.metrics, evaluation.published),
    ]


def _best(rows: list[list[str]], metrics: int) -> set[tuple[int, int]]:
    """The greatest figures of each metric, as printed: what looks equal is equally bold."""
    bold: set[tuple[int, int]] = set()
    for column in range(1, metrics + 1):
        values = [row[column] for row in rows]
        bold |= {(row, column) for row, value in enumerate(values) if len(rows) > 1 and value == max(values)}
    return bold


def _notes(evaluation: Evaluation) -> list[str]:
    lines = [f"{row.system}: {_describe(row)}" for row in evaluation.rows]
    if evaluation.relevance_level > 1:
        lines.append(f"binary metrics count judgments from {evaluation.relevance_level} on")
    if any(row.queries_per_second is not None for row in evaluation.rows):
        threads, batch = evaluation.environment.get("threads"), evaluation.environment.get("query_batch")
        lines.append(f"queries/s: encoding and search together, batches of {batch}, up to {threads} threads")
    return lines


def _describe(row: Row) -> str:
    notes = Metrics(row.system, row.means, [], {}, row.notes).describe_notes()
    return f"{notes}; {row.note}" if row.note else notes


def _macro_table(suite: SuiteEvaluation) -> Table:
    rows = [[name, *(figure_text(means[metric]) for metric in suite.metrics)] for name, means in suite.macro.items()]
    below = [f"{len(suite.missing)} sets are missing from this average"] if suite.missing else []
    everywhere = set(suite.macro)
    elsewhere = sorted({row.system for one in suite.sets for row in one.rows} - everywhere)
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


def plain_table(evaluation: Evaluation | SuiteEvaluation, width: int | None = None) -> str:
    """Aligned plain text; where a table is wider than `width`, one block of lines for each row."""
    return "\n\n".join(_plain(table, width) for table in tables(evaluation))


def _plain(table: Table, width: int | None) -> str:
    widths = table.widths()
    lines = [table.title]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        label = max((len(name) for name in table.header[1:]), default=0)
        for row in table.rows:
            lines.append(row[0])
            lines += [
                f"  {name:<{label}}  {cell}" for name, cell in zip(table.header[1:], row[1:], strict=True) if cell
            ]
    else:
        for row in [table.header, *table.rows]:
            numbers = [_aligned(table.header[i], cell, widths[i]) for i, cell in enumerate(row)]
            lines.append("  ".join(numbers).rstrip())
    return "\n".join(lines + table.lines_below)


def _aligned(column: str, cell: str, width: int) -> str:
    return cell.ljust(width) if column in ("system", "set", "source", "reason") else cell.rjust(width)


def markdown(evaluation: Evaluation | SuiteEvaluation) -> str:
    """Markdown; the best figures are bold."""
    parts = []
    for table in tables(evaluation):
        left = ("system", "set", "source", "reason")
        lines = [f"### {table.title}", "", _markdown_row(table.header)]
        lines.append(_markdown_row([":---" if name in left else "---:" for name in table.header]))
        for number, row in enumerate(table.rows):
            cells = [_escape(cell) for cell in row]
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


def print_tables(
    evaluation: Evaluation | SuiteEvaluation, stream: TextIO | None = None, width: int | None = None
) -> None:
    """Print to a terminal through rich; elsewhere, or where it is too narrow, as plain text.

    Args:
        stream: default standard output.
        width: in columns; default the terminal's, without limit where there is none.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        print(plain_table(evaluation, width), file=stream)
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=stream, width=width)
    for table in tables(evaluation):
        if sum(table.widths()) + 3 * len(table.header) + 1 > console.width:
            print(_plain(table, console.width) + "\n", file=stream)
            continue
        # Text objects, not markup: a system's name may hold brackets.
        shown = RichTable(title=Text(table.title), title_justify="left")
        for name in table.header:
            shown.add_column(Text(name), justify="left" if name in ("system", "set", "source", "reason") else "right")
        for number, row in enumerate(table.rows):
            shown.add_row(*(Text(c, style="bold" if (number, i) in table.bold else "") for i, c in enumerate(row)))
        console.print(shown)
        for line in table.lines_below:
            console.print(Text(line, style="dim"))
