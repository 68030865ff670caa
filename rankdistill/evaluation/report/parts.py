"""Parts that the sections of a report are put together from: tables that sort, figures, notes, marks of systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

from rankdistill.evaluation.report import charts
from rankdistill.evaluation.report.data import RunData, SetData
from rankdistill.evaluation.report.html import Content, Markup, join, tag

Cell = tuple[Content, str | float | None]  # what is shown, what is sorted by
Header = tuple[Content, bool]  # its name, and whether the column holds numbers

WORDS = 40  # characters from which a cell may be broken into lines
SHAPES = {
    "student": "circle",
    "index": "hexagon",
    "teacher": "diamond",
    "bm25": "triangle",
    "first-stage": "wedge",
    "untrained": "ring",
    "baseline": "square",
    "other": "cross",
}


def section(name: str, title: str, *content: Content, lead: Content = None) -> Markup:
    head = tag("h2", {"id": f"{name}-title"}, title)
    intro = tag("p", {"class": "lead"}, lead) if lead else None
    return tag("section", {"id": name, "aria-labelledby": f"{name}-title"}, head, intro, *content)


def absent(text: str) -> Markup:
    return tag("p", {"class": "absent"}, text)


def figure(drawing: Markup, caption: Content) -> Markup:
    return tag("figure", None, drawing, tag("figcaption", None, caption))


def bullets(items: Sequence[Content], style: str = "notes") -> Markup | None:
    return tag("ul", {"class": style}, [tag("li", None, item) for item in items]) if items else None


def details(summary: Content, *content: Content, opened: bool = False, name: str | None = None) -> Markup:
    return tag("details", {"open": opened, "id": name}, tag("summary", None, summary), *content)


def chip(run: RunData, system: str) -> Markup:
    """The mark of a system's kind: the same in tables and charts."""
    kind = run.kind(system)
    drawn = charts.mark(kind, SHAPES[kind])
    return tag("svg", {"class": "chip", "viewBox": "-8 -8 16 16", "aria-hidden": "true"}, drawn)


def grid(
    header: Sequence[Header],
    rows: Sequence[Sequence[Cell]],
    label: str,
    *,
    sortable: bool = True,
    classes: Sequence[str] = (),
) -> Markup:
    """A table in a box that scrolls by itself.

    Args:
        header: (name, is it a number?).
        rows: cells as (content, value to sort by); the first cell heads the row.
        label: what the table is, read aloud.
        classes: of the rows.
    """
    heads = []
    for column, (name, numeric) in enumerate(header):
        style = "number" if numeric else None
        shown = tag("button", {"type": "button", "data-column": column}, name) if sortable else name
        heads.append(tag("th", {"scope": "col", "class": style, "aria-sort": "none" if sortable else None}, shown))
    body = []
    for place, row in enumerate(rows):
        cells = []
        for column, (content, value) in enumerate(row):
            long = isinstance(content, str) and len(content) > WORDS
            style = "number" if header[column][1] else "words" if long else None
            attributes = {"class": style, "data-value": value if sortable else None}
            if column == 0:
                cells.append(tag("th", {"scope": "row", **attributes}, content))
            else:
                cells.append(tag("td", attributes, content))
        body.append(tag("tr", {"class": classes[place] if classes else None}, cells))
    made = tag(
        "table",
        {"class": "sortable" if sortable else None},
        tag("caption", {"class": "unseen"}, label),
        tag("thead", None, tag("tr", None, heads)),
        tag("tbody", None, body),
    )
    return tag("div", {"class": "scroller", "tabindex": 0, "role": "region", "aria-label": label}, made)


def per_set(run: RunData, make: Callable[[SetData], Content]) -> Markup:
    """The same for each set; the page shows one at a time where there are several."""
    parts = []
    for at, one in enumerate(run.sets):
        head = tag("h3", {"class": "set-name"}, one.name) if len(run.sets) > 1 else None
        parts.append(tag("div", {"class": "of-set", "data-set": at}, head, make(one)))
    return join(parts)


def copy_button(target: str) -> Markup:
    """Copies the text of an element."""
    return tag("button", {"type": "button", "class": "copy", "data-copy": target}, "Copy")


def is_number(value: object) -> TypeGuard[float]:
    """A finite or infinite number; no NaN, no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def plain(value: object) -> str:
    """A value of a file in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
