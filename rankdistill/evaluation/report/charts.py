"""Charts as inline SVG: drawn once, in the colours of the page, with a title and a description that are read aloud.

Sizes are those of the drawing (viewBox); the page scales it. Colours come from the page's style by class, so that one
drawing serves light, dark and paper. A mark has a shape of its own beside its colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rankdistill.evaluation.cost import pareto_front
from rankdistill.evaluation.report.html import Attribute, Markup, join, tag

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46
CHARACTER = 6.3  # width of a character of a label
SHAPES = {
    "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
    "square": "M-4.6,-4.6h9.2v9.2h-9.2Z",
    "diamond": "M0,-6.4L6.4,0L0,6.4L-6.4,0Z",
    "triangle": "M0,-6L5.8,4.6H-5.8Z",
    "wedge": "M0,6L5.8,-4.6H-5.8Z",
    "cross": "M-5.6,-2h3.6v-3.6h4v3.6h3.6v4h-3.6v3.6h-4v-3.6h-3.6Z",
    "ring": "M-5.4,0a5.4,5.4 0 1,0 10.8,0a5.4,5.4 0 1,0 -10.8,0ZM-2.6,0a2.6,2.6 0 1,1 5.2,0a2.6,2.6 0 1,1 -5.2,0Z",
    "hexagon": "M0,-6L5.2,-3V3L0,6L-5.2,3V-3Z",
}


@dataclass
class Point:
    """A mark: where, what it is called, and the class (colour) and shape of its kind."""

    x: float
    y: float
    label: str
    kind: str = "other"
    shape: str = "circle"
    hint: str = ""


@dataclass
class Series:
    """A line: points in order of x; `marked` is the x of the one to stress."""

    label: str
    xs: list[float]
    ys: list[float]
    kind: str = "other"
    marked: float | None = None


@dataclass
class Axis:
    """From data to drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`, about `count` of them."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten around [low, high]; powers alone where that is many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max((tick for tick in ticks if tick <= low * 0.9999), default=ticks[0])
    end = min((tick for tick in ticks if tick >= high * 1.0001), default=ticks[-1])
    return [tick for tick in ticks if start <= tick <= end]


def number(value: float) -> str:
    """A number for people: 1,234, 12.3, 0.1234; powers of thousand as k, M, G."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g}{name}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _tick_text(ticks: Sequence[float]) -> Callable[[float], str]:
    """The ticks of an axis with as many decimals as their step has, so that they stand under each other."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = next((count for count in range(6) if abs(round(step, count) - step) < step * 1e-6), 6)
    return lambda value: f"{value:.{decimals}f}" if decimals and abs(value) < 1000 else number(value)


def _axis(values: Sequence[float], start: float, end: float, log: bool = False, pad: float = 0.04) -> Axis:
    low, high = min(values), max(values)
    if log:
        ticks = log_ticks(low, high)
    else:
        margin = (high - low) * pad
        ticks = nice_ticks(low - margin if low else 0.0, high + margin)
    return Axis(ticks[0], ticks[-1], start, end, log, ticks)


def _frame(
    x: Axis,
    y: Axis,
    x_label: str,
    y_label: str,
    text: Callable[[float], str] | None = None,
    height: int = HEIGHT,
) -> Markup:
    """Grid, ticks and the names of the axes."""
    of_x, of_y = text or (number if x.log else _tick_text(x.ticks)), _tick_text(y.ticks)
    bottom = height - BOTTOM
    parts = []
    for tick in y.ticks:
        at = y(tick)
        parts.append(tag("line", {"class": "grid", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": at, "y2": at}))
        parts.append(tag("text", {"class": "tick", "x": LEFT - 7, "y": at + 4, "text-anchor": "end"}, of_y(tick)))
    for tick in x.ticks:
        at = x(tick)
        parts.append(tag("line", {"class": "grid", "x1": at, "x2": at, "y1": TOP, "y2": bottom}))
        parts.append(tag("text", {"class": "tick", "x": at, "y": bottom + 17, "text-anchor": "middle"}, of_x(tick)))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", {"class": "axis", "x": middle, "y": height - 8, "text-anchor": "middle"}, x_label))
    at = (TOP + bottom) / 2
    turned = {"class": "axis", "text-anchor": "middle", "transform": f"translate(11,{at:.0f}) rotate(-90)"}
    return join(parts, tag("text", turned, y_label))


def _svg(title: str, description: str, *content: Markup, height: int = HEIGHT) -> Markup:
    return tag(
        "svg",
        {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "class": "chart"},
        tag("title", None, title),
        tag("desc", None, description),
        *content,
    )


def mark(kind: str, shape: str, x: float = 0, y: float = 0, hint: str = "", extra: str = "") -> Markup:
    """One mark of a kind, with what a pointer over it shows."""
    values = {
        "class": f"mark {kind} {extra}".strip(),
        "d": SHAPES.get(shape, SHAPES["circle"]),
        "transform": f"translate({x:g},{y:g})" if x or y else None,
        "data-hint": hint or None,
    }
    return tag("path", values)


def _placed_labels(points: Sequence[Point], x: Axis, y: Axis, front: Sequence[Point]) -> Markup:
    """A name beside each mark where there is room: right, left, above or below; else none (the table has it)."""
    taken = [(x(p.x) - 7, y(p.y) - 7, x(p.x) + 7, y(p.y) + 7) for p in points]
    parts = []
    for one in points:
        at_x, at_y, width = x(one.x), y(one.y), len(one.label) * CHARACTER
        places = [
            (at_x + 10, at_y + 4, "start"),
            (at_x - 10, at_y + 4, "end"),
            (at_x, at_y - 11, "middle"),
            (at_x, at_y + 20, "middle"),
            (at_x + 9, at_y - 9, "start"),
            (at_x - 9, at_y - 9, "end"),
            (at_x + 9, at_y + 17, "start"),
            (at_x - 9, at_y + 17, "end"),
        ]
        if one in front:  # the line of the front leaves a mark to the right and comes from below
            places = [*places[4:6], places[2], places[1], *places[6:], places[3], places[0]]
        for left, base, anchor in places:
            start = left - {"start": 0, "end": width, "middle": width / 2}[anchor]
            box = (start, base - 10, start + width, base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= TOP - 6
            own = (at_x - 7, at_y - 7, at_x + 7, at_y + 7)
            if inside and not any(_overlap(box, other) for other in taken if other != own):
                taken.append(box)
                values: dict[str, Attribute] = {"class": "label", "x": left, "y": base, "text-anchor": anchor}
                parts.append(tag("text", values, one.label))
                break
    return join(parts)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def trade_off(
    points: Sequence[Point],
    title: str,
    x_label: str,
    y_label: str,
    text: Callable[[float], str] = number,
) -> Markup:
    """Quality (up) against a cost (right, logarithmic); the front is joined by steps."""
    x = _axis([point.x for point in points], LEFT, WIDTH - RIGHT, log=True)
    y = _axis([point.y for point in points], HEIGHT - BOTTOM, TOP, pad=0.12)
    values = {str(row): {"quality": point.y, "cost": point.x} for row, point in enumerate(points)}
    on_front = pareto_front(values, maximise=["quality"], minimise=["cost"])
    front = sorted((points[int(row)] for row in on_front), key=lambda point: (point.x, point.y))
    way = f"M{x(front[0].x):g},{y(front[0].y):g}"
    for one in front[1:]:
        way += f"H{x(one.x):g}V{y(one.y):g}"
    described = "; ".join(f"{point.label}: {text(point.x)}, {point.y:.4f}" for point in points)
    return _svg(
        title,
        f"Front: {', '.join(point.label for point in front)}. {described}.",
        _frame(x, y, x_label, y_label, text),
        tag("path", {"class": "front", "d": f"{way}H{WIDTH - RIGHT}"}),
        # The student last: an exact index of it has the very same place.
        *(mark(p.kind, p.shape, x(p.x), y(p.y), p.hint) for p in sorted(points, key=lambda p: p.kind == "student")),
        _placed_labels(points, x, y, front),
    )


def lines(series: Sequence[Series], title: str, x_label: str, y_label: str, height: int = 260) -> Markup:
    """Lines over steps; the stressed point of a line has a ring and its name."""
    x = _axis([at for one in series for at in one.xs], LEFT, WIDTH - RIGHT, pad=0.0)
    x.low, x.high = min(at for one in series for at in one.xs), max(at for one in series for at in one.xs)
    if x.low == x.high:
        x.high = x.low + 1
    x.ticks = [tick for tick in x.ticks if x.low <= tick <= x.high]
    y = _axis([at for one in series for at in one.ys], height - BOTTOM, TOP, pad=0.08)
    parts = [_frame(x, y, x_label, y_label, height=height)]
    for one in series:
        places = [(x(a), y(b)) for a, b in zip(one.xs, one.ys, strict=True)]
        parts.append(
            tag("polyline", {"class": f"curve {one.kind}", "points": " ".join(f"{a:g},{b:g}" for a, b in places)})
        )
        few = len(one.xs) <= 40
        for (a, b), at, value in zip(places, one.xs, one.ys, strict=True):
            best = at == one.marked
            hint = f"{one.label}, step {at:,.0f}: {number(value)}{' (kept)' if best else ''}"
            parts.append(
                tag(
                    "circle",
                    {
                        "class": f"dot {one.kind}{' best' if best else ''}{'' if few or best else ' faint'}",
                        "cx": a,
                        "cy": b,
                        "r": 6 if best else 3,
                        "data-hint": hint,
                    },
                )
            )
    described = "; ".join(
        f"{one.label} from {number(one.ys[0])} to {number(one.ys[-1])}"
        + (f", kept: step {one.marked:,.0f}" if one.marked is not None else "")
        for one in series
    )
    return _svg(title, described, *parts, height=height)


def cloud(
    points: Sequence[tuple[float, float, str, str, int]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    equal: bool = True,
    description: str = "",
) -> Markup:
    """Many small marks (x, y, hint, key, how many: its area), with the diagonal where both axes have one scale."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    both = xs + ys if equal else None
    x = _axis(both or xs, LEFT, WIDTH - RIGHT, pad=0.0 if equal else 0.04)
    y = _axis(both or ys, HEIGHT - BOTTOM, TOP, pad=0.0 if equal else 0.04)
    parts = [_frame(x, y, x_label, y_label)]
    if equal:
        ends = {"x1": x(x.low), "y1": y(y.low), "x2": x(x.high), "y2": y(y.high)}
        parts.append(tag("line", {"class": "diagonal", **ends}))
    for a, b, hint, key, count in points:
        side = "even" if not equal or a == b else "above" if b > a else "below"
        values: dict[str, Attribute] = {
            "class": f"speck {side}",
            "cx": x(a),
            "cy": y(b),
            "r": round(min(13.0, 3.4 * count**0.5), 1),
        }
        parts.append(tag("circle", {**values, "data-hint": hint or None, "data-query": key or None}))
    return _svg(title, description, *parts)


def intervals(
    rows: Sequence[tuple[Point, float | None, float | None]], title: str, x_label: str, label_width: int = 150
) -> Markup:
    """One line a system: its mean and the interval around it."""
    height = 26 * len(rows) + 50
    values = [value for point, low, high in rows for value in (point.x, low, high) if value is not None]
    ticks = nice_ticks(min(values), max(values), 4)
    x = Axis(ticks[0], ticks[-1], label_width, WIDTH - RIGHT, False, ticks)
    parts = []
    for tick in ticks:
        at = x(tick)
        parts.append(tag("line", {"class": "grid", "x1": at, "x2": at, "y1": 8, "y2": height - 40}))
        parts.append(
            tag("text", {"class": "tick", "x": at, "y": height - 25, "text-anchor": "middle"}, _tick_text(ticks)(tick))
        )
    for row, (point, low, high) in enumerate(rows):
        at = 8 + 26 * row + 13
        label: dict[str, Attribute] = {"class": "label", "x": label_width - 12, "y": at + 4, "text-anchor": "end"}
        parts.append(tag("text", label, _short(point.label, int((label_width - 12) / CHARACTER))))
        if low is not None and high is not None:
            parts.append(
                tag("line", {"class": f"whisker {point.kind}", "x1": x(low), "x2": x(high), "y1": at, "y2": at})
            )
        parts.append(mark(point.kind, point.shape, x(point.x), at, point.hint))
    middle = (label_width + WIDTH - RIGHT) / 2
    parts.append(tag("text", {"class": "axis", "x": middle, "y": height - 6, "text-anchor": "middle"}, x_label))
    described = "; ".join(point.hint for point, _, _ in rows)
    return _svg(title, described, *parts, height=height)


def dumbbells(
    rows: Sequence[tuple[str, str, float, float]], title: str, x_label: str, names: tuple[str, str], width: int = 150
) -> Markup:
    """One line a system (label, kind, first, second): two values and the way between them."""
    height = 28 * len(rows) + 74
    ticks = nice_ticks(min(min(row[2:]) for row in rows), max(max(row[2:]) for row in rows), 4)
    x = Axis(ticks[0], ticks[-1], width, WIDTH - RIGHT, False, ticks)
    parts = []
    for column, (name, style) in enumerate(zip(names, ("first", "second"), strict=True)):
        left = width + column * 130
        parts.append(tag("circle", {"class": f"end {style}", "cx": left + 5, "cy": 10, "r": 5}))
        parts.append(tag("text", {"class": "label", "x": left + 16, "y": 14}, name))
    for tick in ticks:
        at = x(tick)
        parts.append(tag("line", {"class": "grid", "x1": at, "x2": at, "y1": 28, "y2": height - 40}))
        parts.append(
            tag("text", {"class": "tick", "x": at, "y": height - 25, "text-anchor": "middle"}, _tick_text(ticks)(tick))
        )
    for row, (label, _, first, second) in enumerate(rows):
        at = 28 + 28 * row + 14
        place: dict[str, Attribute] = {"class": "label", "x": width - 12, "y": at + 4, "text-anchor": "end"}
        parts.append(tag("text", place, _short(label, int((width - 12) / CHARACTER))))
        parts.append(tag("line", {"class": "way", "x1": x(first), "x2": x(second), "y1": at, "y2": at}))
        for value, name, style in ((first, names[0], "first"), (second, names[1], "second")):
            hint = f"{label}, {name}: {value:.4f}"
            parts.append(
                tag("circle", {"class": f"end {style}", "cx": x(value), "cy": at, "r": 5.5, "data-hint": hint})
            )
    middle = (width + WIDTH - RIGHT) / 2
    parts.append(tag("text", {"class": "axis", "x": middle, "y": height - 6, "text-anchor": "middle"}, x_label))
    described = "; ".join(f"{label}: {first:.4f} and {second:.4f}" for label, _, first, second in rows)
    return _svg(title, f"{names[0]} and {names[1]}. {described}", *parts, height=height)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
