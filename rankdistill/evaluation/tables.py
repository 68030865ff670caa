"""Tables: described once, as columns of cells, and written as plain text, Markdown, LaTeX, on a terminal and on a page.

The best figures are bold. A figure that differs significantly from its reference's carries a mark: ▲ better, ▼ worse.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TextIO, TypeGuard, TypeVar

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from rankdistill.plain import shown

T = TypeVar("T")
MARKS = {1: "▲", -1: "▼", 0: ""}


class Cell(NamedTuple):
    """What a cell shows.

    Attributes:
        value: what the page sorts by; a column in which one has a number is one of numbers.
        below: in small letters below the text; on the page alone.
        sign: 1 or -1 where it is significantly better or worse than the table's reference.
    """

    text: str
    value: float | str | None = None
    below: str = ""
    sign: int = 0
    strong: bool = False
    code: bool = False


@dataclass
class Table:
    """Rows of cells; the first column heads a row. `notes` are said below."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def is_numeric(self, column: int) -> bool:
        return any(is_number(row[column].value) for row in self.rows)

    def texts(self) -> list[list[str]]:
        """The cells with their marks, padded so that figures stay under each other."""
        widths = [max((len(MARKS[row[at].sign]) for row in self.rows), default=0) for at in range(len(self.header))]
        return [
            [cell.text + MARKS[cell.sign].ljust(width) for cell, width in zip(row, widths, strict=True)]
            for row in self.rows
        ]

    def widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.header, *self.texts(), strict=True)]


def make_table(
    title: str, rows: Iterable[T], columns: Mapping[str, Callable[[T], Cell | str]], notes: Iterable[str] = ()
) -> Table:
    """A table of `columns`, name → the cell of a row, without those in which nothing stands; a text sorts as itself."""
    cells = [
        [cell if isinstance(cell := make(row), Cell) else Cell(cell, cell) for make in columns.values()] for row in rows
    ]
    filled = [at for at in range(len(columns)) if not at or any(line[at].text for line in cells)]
    names = list(columns)
    return Table(title, [names[at] for at in filled], [[line[at] for at in filled] for line in cells], list(notes))


# -- figures as text --------------------------------------------------------------------------------------------------


def is_number(value: object) -> TypeGuard[float]:
    """A finite or infinite number; no NaN, no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def number(value: Any, text: Callable[[Any], str] | None = None, **more: Any) -> Cell:
    """A figure, by default to four digits (a range as least–greatest); an empty cell where there is none."""
    least = value[0] if isinstance(value, list | tuple) else value
    return Cell((text or figure_text)(value), least, **more) if is_number(least) else Cell("")


def figure_text(value: float | Sequence[float] | None) -> str:
    """A figure to four digits; a range as least–greatest; empty when there is none."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return f"{value:.4f}"
    return "–".join(f"{part:.3f}" for part in value)


def counted(counts: Sequence[int]) -> Cell:
    """`3/1/2`, sorted by the first."""
    return Cell("/".join(f"{count:,}" for count in counts), counts[0])


def signed(value: float, decimals: int = 4) -> str:
    """With a plus or a minus; what rounds to nothing has neither."""
    text = f"{abs(value):.{decimals}f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def bytes_text(count: int | None) -> str:
    """`1.5 MB` (1 MB = 10^6 bytes); empty when unknown."""
    if count is None:
        return ""
    size, unit = float(count), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.3g} {('kB', 'MB', 'GB', 'TB')[unit - 1]}"


def rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def latency_text(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def count_text(count: int) -> str:
    """`22.7 M`."""
    return f"{count:,}" if count < 10_000 else f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"


def p_text(p: float) -> str:
    return "<.0001" if p < 0.0001 else f"{p:.4f}".removeprefix("0") if p < 0.99995 else "1"


# -- forms ------------------------------------------------------------------------------------------------------------


class HasTables(Protocol):
    """An evaluation, a suite's, a sweep."""

    def tables(self, *, intervals: bool = False) -> list[Table]:
        """Of all that was found."""


def _tables(source: HasTables | Sequence[Table], intervals: bool = False) -> Sequence[Table]:
    return source if isinstance(source, Sequence) else source.tables(intervals=intervals)


def plain_table(source: HasTables | Sequence[Table], width: int | None = None) -> str:
    """Aligned plain text; where a table is wider than `width`, one block of lines for each row."""
    return "\n\n".join(_plain(table, width) for table in _tables(source))


def _plain(table: Table, width: int | None) -> str:
    widths, texts, lines = table.widths(), table.texts(), [table.title]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        label = max((len(name) for name in table.header[1:]), default=0)
        for row in texts:
            named = zip(table.header[1:], row[1:], strict=True)
            lines += [row[0], *(f"  {name:<{label}}  {cell}".rstrip() for name, cell in named if cell.strip())]
    else:
        sides = [">" if table.is_numeric(at) else "<" for at in range(len(widths))]
        for row in [table.header, *texts]:
            cells = (f"{cell:{side}{wide}}" for cell, side, wide in zip(row, sides, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
    return "\n".join(lines + table.notes)


def _stressed(table: Table, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    """Escaped cells; `bold` is how the best figures are written."""
    rows = zip(table.rows, table.texts(), strict=True)
    return [
        [(bold if cell.strong else "{}").format(escape(text.rstrip())) for cell, text in zip(cells, texts, strict=True)]
        for cells, texts in rows
    ]


def markdown(source: HasTables | Sequence[Table]) -> str:
    """Markdown, with the 95% intervals."""
    parts = []
    for table in _tables(source, intervals=True):
        rule = ["---:" if table.is_numeric(at) else ":---" for at in range(len(table.header))]
        rows = [table.header, rule, *_stressed(table, _escape, "**{}**")]
        lines = [f"### {table.title}", "", *(f"| {' | '.join(row)} |" for row in rows)]
        lines += ["", *(f"- {_escape(note)}" for note in table.notes)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    for mark in ("\\", "|", "<", "*", "_", "`"):
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text.replace("\n", " ")


def latex(source: HasTables | Sequence[Table]) -> str:
    """LaTeX tables to paste into a paper (needs the booktabs package).

    Notes become comments; what the marks mean is said in the caption.
    """
    return "\n".join(map(_latex, _tables(source)))


def _latex(table: Table) -> str:
    # The legend's marks are spelt out: "▲ ▼ better or worse than ..."
    marks = [note.replace("▲ ▼ better or worse", "▲ better, ▼ worse", 1) for note in table.notes if note[0] == "▲"]
    kinds = "".join("r" if table.is_numeric(at) else "l" for at in range(len(table.header)))
    header, *rows = [
        " & ".join(row) + r" \\" for row in [map(_tex, table.header), *_stressed(table, _tex, r"\textbf{{{}}}")]
    ]
    return "\n".join(
        [
            *("% \\usepackage{booktabs}", *(f"% {' '.join(note.split())}" for note in table.notes)),
            *(r"\begin{table}", r"\centering", rf"\caption{{{_tex('. '.join([table.title, *marks]))}.}}"),
            *(rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", header, r"\midrule", *rows, r"\bottomrule"),
            *(r"\end{tabular}", r"\end{table}", ""),
        ]
    )


TEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "–": "--", "−": "$-$", "×": r"$\times$", "\n": " ", "▲": r"$^{\dagger}$", "▼": r"$^{\ddagger}$",
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

    def clean(*texts: str) -> list[str]:
        return [shown(text, len(text)) for text in texts]

    rows = [[cell._replace(text=shown(cell.text, len(cell.text))) for cell in row] for row in table.rows]
    return Table(clean(table.title)[0], clean(*table.header), rows, clean(*table.notes))


def print_tables(source: HasTables | Sequence[Table], stream: TextIO | None = None, width: int | None = None) -> None:
    """Print to a terminal through rich; elsewhere, or where it is too narrow for `width` columns, as plain text."""
    stream = stream or sys.stdout
    tables = [_clean(table) for table in _tables(source)]
    if not stream.isatty():
        print(plain_table(tables, width), file=stream)
        return
    console = Console(file=stream, width=width)
    for table in tables:
        if sum(table.widths()) + 3 * len(table.header) + 1 > console.width:
            print(_plain(table, console.width) + "\n", file=stream)
            continue
        # Text objects, not markup: a system's name may hold brackets.
        grid = RichTable(title=Text(table.title), title_justify="left")
        for at, name in enumerate(table.header):
            grid.add_column(Text(name), justify="right" if table.is_numeric(at) else "left")
        for row, texts in zip(table.rows, table.texts(), strict=True):
            grid.add_row(*(Text(t, style="bold" if c.strong else "") for c, t in zip(row, texts, strict=True)))
        console.print(grid)
        for note in table.notes:
            console.print(Text(note, style="dim"))
