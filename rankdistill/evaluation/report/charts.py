"""Charts as elements of SVG, which the page's template writes out: a title and a description that are read aloud, and
the colours of the page by class, so that one drawing serves light, dark and paper.

Sizes are those of the drawing (viewBox); the page scales it. A mark has a shape of its own beside its colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rankdistill.evaluation.cost import pareto_front

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46
LABELS = 150  # for the names beside a chart of systems
CHARACTER = 6.3  # width of a character of a label
SHAPES = {
    "student": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
    "index": "M0,-6L5.2,-3V3L0,6L-5.2,3V-3Z",
    "teacher": "M0,-6.4L6.4,0L0,6.4L-6.4,0Z",
    "bm25": "M0,-6L5.8,4.6H-5.8Z",
    "first-stage": "M0,6L5.8,-4.6H-5.8Z",
    "untrained": "M-5.4,0a5.4,5.4 0 1,0 10.8,0a5.4,5.4 0 1,0 -10.8,0ZM-2.6,0a2.6,2.6 0 1,1 5.2,0a2.6,2.6 0 1,1 -5.2,0Z",
    "baseline": "M-4.6,-4.6h9.2v9.2h-9.2Z",
    "other": "M-5.6,-2h3.6v-3.6h4v3.6h3.6v4h-3.6v3.6h-4v-3.6h-3.6Z",
}
Element = tuple[str, dict[str, Any], str]  # its name, attributes and text


class Point(NamedTuple):
    """A mark: where, what it is called, the kind of system it stands for, what a pointer over it shows."""

    x: float
    y: float
    label: str
    kind: str
    hint: str = ""


class Series(NamedTuple):
    """A line: points in order of x; `marked` is the x of the one to stress."""

    label: str
    xs: list[float]
    ys: list[float]
    kind: str
    marked: float | None = None


class Line(NamedTuple):
    """A row of a chart of systems: marks at (value, kind, hint), and a line of class `style` between two values."""

    label: str
    marks: list[tuple[float, str, str]]
    ends: Sequence[float] | None
    style: str


@dataclass
class Chart:
    """A drawing of WIDTH × height, with its caption, and the lines it has where there are several."""

    title: str
    description: str
    parts: list[Element]
    height: int = HEIGHT
    width: int = WIDTH
    caption: str = ""
    lines: Sequence[Series] = ()


@dataclass
class Axis:
    """From data to drawing."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def text(self, value: float) -> str:
        """A tick, with as many decimals as the step has, so that ticks stand under each other."""
        step = min((b - a for a, b in itertools.pairwise(self.ticks)), default=1.0)
        decimals = next((count for count in range(6) if abs(round(step, count) - step) < step * 1e-6), 6)
        return f"{value:.{decimals}f}" if decimals and abs(value) < 1000 and not self.log else number(value)


def _axis(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.04) -> Axis:
    low, high = min(values), max(values)
    margin = (high - low) * pad
    ticks = _log_ticks(low, high) if log else _nice_ticks(low - margin if low else 0.0, high + margin)
    return Axis(ticks[0], ticks[-1], start, end, ticks, log)


def _nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, about five."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    places = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [round(place * step, 12) for place in places]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten around [low, high]; powers alone where that is many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max((tick for tick in ticks if tick <= low * 0.9999), default=ticks[0])
    end = min((tick for tick in ticks if tick >= high * 1.0001), default=ticks[-1])
    return [tick for tick in ticks if start <= tick <= end]


def number(value: float) -> str:
    """A number for people: 1,234, 12.3, 0.1234; powers of thousand as k, M, G."""
    for unit, name, least in ((1e12, "T", 1e12), (1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if abs(value) >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# -- elements ---------------------------------------------------------------------------------------------------------


def _element(name: str, style: str, text: str = "", **attributes: Any) -> Element:
    """`text_anchor` is written text-anchor; what is None or "" is left out."""
    known = {key.replace("_", "-"): value for key, value in attributes.items() if value not in (None, "")}
    return name, {"class": style, **known}, text


def mark(kind: str, x: float = 0, y: float = 0, hint: str = "") -> Element:
    """The mark of a kind of system: the same in tables and charts."""
    shape = SHAPES.get(kind, SHAPES["student"])
    return _element("path", f"mark {kind}", d=shape, transform=f"translate({x:g},{y:g})", data_hint=hint)


def _text(style: str, x: float, y: float, text: str, anchor: str = "middle", **more: Any) -> Element:
    return _element("text", style, text, x=x, y=y, text_anchor=anchor, **more)


def _line(style: str, x1: float, x2: float, y1: float, y2: float) -> Element:
    return _element("line", style, x1=x1, x2=x2, y1=y1, y2=y2)


def _across(
    x: Axis, name: str, height: int, top: int = TOP, text: Callable[[float], str] | None = None
) -> list[Element]:
    """The grid, ticks and name of an axis from left to right."""
    bottom = height - BOTTOM
    parts = [_line("grid", x(tick), x(tick), top, bottom) for tick in x.ticks]
    parts += [_text("tick", x(tick), bottom + 17, (text or x.text)(tick)) for tick in x.ticks]
    return [*parts, _text("axis", (x.start + x.end) / 2, height - 8, name)]


def _upwards(y: Axis, name: str) -> list[Element]:
    parts = [_line("grid", LEFT, WIDTH - RIGHT, y(tick), y(tick)) for tick in y.ticks]
    parts += [_text("tick", LEFT - 7, y(tick) + 4, y.text(tick), "end") for tick in y.ticks]
    turned = f"translate(11,{(y.start + y.end) / 2:.0f}) rotate(-90)"
    return [*parts, _element("text", "axis", name, text_anchor="middle", transform=turned)]


# -- charts -----------------------------------------------------------------------------------------------------------


def trade_off(
    points: Sequence[Point], title: str, x_label: str, y_label: str, text: Callable[[float], str], caption: str
) -> Chart:
    """Quality (up) against a cost (right, logarithmic); the front is joined by steps."""
    x = _axis([point.x for point in points], LEFT, WIDTH - RIGHT, log=True)
    y = _axis([point.y for point in points], HEIGHT - BOTTOM, TOP, pad=0.12)
    values = {row: {"quality": point.y, "cost": point.x} for row, point in enumerate(points)}
    on_front = [points[row] for row in pareto_front(values, maximise=["quality"], minimise=["cost"])]
    front = sorted(on_front, key=lambda point: (point.x, point.y))
    way = f"M{x(front[0].x):g},{y(front[0].y):g}"
    way += "".join(f"H{x(point.x):g}V{y(point.y):g}" for point in front[1:])
    described = "; ".join(f"{point.label}: {text(point.x)}, {point.y:.4f}" for point in points)
    parts = [
        *_upwards(y, y_label),
        *_across(x, x_label, HEIGHT, text=text),
        _element("path", "front", d=f"{way}H{WIDTH - RIGHT}"),
        # The student last: an exact index of it has the very same place.
        *(mark(p.kind, x(p.x), y(p.y), p.hint) for p in sorted(points, key=lambda p: p.kind == "student")),
        *_labels([(x(p.x), y(p.y), p.label, p in front) for p in points]),
    ]
    described = f"Front: {', '.join(point.label for point in front)}. {described}."
    return Chart(title, described, parts, caption=caption)


def _labels(marks: Sequence[tuple[float, float, str, bool]]) -> list[Element]:
    """A name beside each mark (x, y, name, on the front?) where there is room; else none (the table has it)."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _, _ in marks]
    parts = []
    for row, (x, y, label, on_front) in enumerate(marks):
        width = len(label) * CHARACTER
        right, left, above, below = (10, 4, "start"), (-10, 4, "end"), (0, -11, "middle"), (0, 20, "middle")
        higher, lower = [(9, -9, "start"), (-9, -9, "end")], [(9, 17, "start"), (-9, 17, "end")]
        places = [right, left, above, below, *higher, *lower]
        if on_front:  # the line of the front leaves a mark to the right and comes from below
            places = [*higher, above, left, *lower, below, right]
        for right_by, down_by, anchor in places:
            start = x + right_by - {"start": 0, "end": width, "middle": width / 2}[anchor]
            box = (start, y + down_by - 10, start + width, y + down_by + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= TOP - 6
            if inside and not any(_overlap(box, other) for at, other in enumerate(taken) if at != row):
                taken.append(box)
                parts.append(_text("label", x + right_by, y + down_by, label, anchor))
                break
    return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def lines(series: Sequence[Series], title: str, x_label: str, y_label: str, caption: str) -> Chart:
    """Lines over steps; the stressed point of a line has a ring and its name."""
    height = 260
    steps = [step for each in series for step in each.xs]
    x = _axis(steps, LEFT, WIDTH - RIGHT, pad=0.0)
    x.low, x.high = min(steps), max(max(steps), min(steps) + 1)
    x.ticks = [tick for tick in x.ticks if x.low <= tick <= x.high]
    y = _axis([value for each in series for value in each.ys], height - BOTTOM, TOP, pad=0.08)
    parts = [*_upwards(y, y_label), *_across(x, x_label, height)]
    described = []
    for each in series:
        places = list(zip(each.xs, each.ys, strict=True))
        way = " ".join(f"{x(step):g},{y(value):g}" for step, value in places)
        parts.append(_element("polyline", f"curve {each.kind}", points=way))
        for step, value in places:
            best = step == each.marked
            style = "best" if best else "" if len(places) <= 40 else "faint"
            hint = f"{each.label}, step {step:,.0f}: {number(value)}{' (kept)' if best else ''}"
            style = f"dot {each.kind} {style}".strip()
            parts.append(_element("circle", style, cx=x(step), cy=y(value), r=6 if best else 3, data_hint=hint))
        kept = "" if each.marked is None else f", kept: step {each.marked:,.0f}"
        described.append(f"{each.label} from {number(each.ys[0])} to {number(each.ys[-1])}{kept}")
    return Chart(title, "; ".join(described), parts, height, caption=caption, lines=series)


def cloud(
    points: Sequence[tuple[float, float, str, str, int]],
    title: str,
    names: tuple[str, str],
    description: str,
    caption: str,
    *,
    equal: bool = True,
) -> Chart:
    """Many small marks (x, y, hint, key, how many: its area) over two named axes, with the diagonal where both have one
    scale."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    pad = 0.0 if equal else 0.04
    x = _axis(xs + ys if equal else xs, LEFT, WIDTH - RIGHT, pad=pad)
    y = _axis(xs + ys if equal else ys, HEIGHT - BOTTOM, TOP, pad=pad)
    parts = [*_upwards(y, names[1]), *_across(x, names[0], HEIGHT)]
    if equal:
        parts.append(_line("diagonal", x(x.low), x(x.high), y(y.low), y(y.high)))
    for a, b, hint, key, count in points:
        side = "even" if not equal or a == b else "above" if b > a else "below"
        radius = round(min(13.0, 3.4 * count**0.5), 1)
        parts.append(_element("circle", f"speck {side}", cx=x(a), cy=y(b), r=radius, data_hint=hint, data_query=key))
    return Chart(title, description, parts, caption=caption)


def by_system(rows: Sequence[Line], title: str, x_label: str, caption: str, legend: Sequence[str] = ()) -> Chart:
    """One line a system, described by the hints of its marks. `legend`: kinds of marks that are named above."""
    top = 8 + 20 * bool(legend)
    height = 27 * len(rows) + top + BOTTOM
    values = [value for row in rows for value in [*(value for value, _, _ in row.marks), *(row.ends or ())]]
    x = _axis(values, LABELS, WIDTH - RIGHT, pad=0.0)
    parts = _across(x, x_label, height, top)
    for column, kind in enumerate(legend):
        left = LABELS + column * 130
        parts += [mark(kind, left + 5, 10), _text("label", left + 16, 14, kind, "start")]
    most = int((LABELS - 12) / CHARACTER)
    for row, line in enumerate(rows):
        at = top + 27 * row + 13
        label = line.label if len(line.label) <= most else line.label[: most - 1].rstrip() + "…"
        parts.append(_text("label", LABELS - 12, at + 4, label, "end"))
        if line.ends:
            parts.append(_line(line.style, x(line.ends[0]), x(line.ends[1]), at, at))
        parts += [mark(kind, x(value), at, hint) for value, kind, hint in line.marks]
    described = "; ".join(hint for row in rows for _, _, hint in row.marks)
    return Chart(title, described, parts, height, caption=caption)
