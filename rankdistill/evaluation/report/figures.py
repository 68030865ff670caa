"""The figures of a report: which charts are drawn of a run, with their captions; and what is said where one is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rankdistill.evaluation.report import charts
from rankdistill.evaluation.report.charts import Chart, Line, Point, Series
from rankdistill.evaluation.report.data import RunData
from rankdistill.evaluation.report.findings import metric_name, short
from rankdistill.evaluation.report.queries import Queries
from rankdistill.evaluation.results import Evaluation, latency
from rankdistill.evaluation.tables import bytes_text

LINES = ("student", "baseline", "teacher", "first-stage", "index", "bm25", "untrained", "other")


def intervals(run: RunData, test_set: Evaluation) -> Chart | None:
    metric, rows = metric_name(run.metric), []
    for row in test_set.rows:
        value, ends, kind = row.means.get(run.metric), row.intervals.get(run.metric), run.kind(row.system)
        if value is not None:
            hint = f"{row.system}: {value:.4f}" + (f" ({ends[0]:.4f}–{ends[1]:.4f})" if ends else "")
            rows.append(Line(short(row.system), [(value, kind, hint)], ends, f"whisker {kind}"))
    if all(row.ends is None for row in rows):
        return None
    caption = (
        "Intervals are of each mean alone. Systems share their queries, so that two overlapping intervals may still "
        "differ significantly: the tests of pairs decide."
    )
    return charts.by_system(rows, f"{metric} of each system with its 95\u00a0% interval", metric, caption)


def trade_offs(run: RunData, test_set: Evaluation) -> Iterator[Chart | str]:
    """Quality against latency and against size; in words why one is not drawn."""
    metric, rows = metric_name(run.metric), test_set.rows
    times = {row.system: latency(test_set, row.system) for row in rows}
    label = "ms a query, one at a time (median)"
    if not any(times.values()):
        label = "ms a query, in batches"
        times = {row.system: 1000 / row.queries_per_second for row in rows if row.queries_per_second}
    sizes: dict[str, Any] = {row.system: row.bytes for row in rows}
    axes: list[tuple[str, str, Mapping[str, float | None], Callable[[float], str], str]] = [
        ("latency", label, times, charts.number, " ms"),
        ("size", "bytes kept to search", sizes, lambda value: bytes_text(round(value)), ""),
    ]
    scores = {row.system: row.means[run.metric] for row in rows if run.metric in row.means}
    for word, axis, costs, text, unit in axes:
        known = {name: value for name in scores if (value := costs.get(name))}
        if len(known) < 2:
            yield f"Quality against {word} is not drawn: fewer than two systems have a {word}."
            continue
        points = []
        for name, value in known.items():
            hint = f"{name}: {metric} {scores[name]:.4f}, {text(value)}{unit}"
            points.append(Point(value, scores[name], short(name), run.kind(name), hint))
        without = ", ".join(name for name in scores if name not in known)
        caption = f"{metric} against {word}.{f' Without a {word}: {without}.' if without else ''}"
        yield charts.trade_off(points, f"{metric} against {word}", axis, metric, text, caption)


def clouds(run: RunData, of: Queries) -> Iterator[Chart]:
    """Teacher against student: each query a point, then the scores of the pairs that both scored."""
    data = of.data
    a, b = (data["systems"][at] for at in data["pair"])
    metric = run.metric if run.metric in data["metrics"] else data["metrics"][0]
    column = data["metrics"].index(metric)
    theirs, ours = (data["values"][data["systems"].index(name)][column] for name in (b, a))
    places: dict[tuple[float, float], list[int]] = {}
    for line, place in enumerate(zip(theirs, ours, strict=True)):
        if None not in place:
            places.setdefault(place, []).append(line)
    if not places:
        return
    texts = [text or query_id for query_id, text in data["queries"]]
    points = []
    for (x, y), at in places.items():
        more = f" and {len(at) - 1} more queries" if len(at) > 1 else ""
        points.append((x, y, f"{texts[at[0]]}{more}: {y:.3f} against {x:.3f}", str(at[0]), len(at)))
    better = sum(len(at) for (x, y), at in places.items() if y > x)
    worse = sum(len(at) for (x, y), at in places.items() if y < x)
    same = sum(map(len, places.values())) - better - worse
    described = f"{better} queries above the diagonal ({a} better), {worse} below, {same} on it."
    title = f"{metric_name(metric)} of each query"
    caption = f"{title}; larger points are several. {described} Choose a point to find it in the table."
    yield charts.cloud(points, f"{title}: {a} against {b}", (b, a), described, caption)
    if not of.scores:
        return
    specks = [
        (t, s, f"{texts[line]} · {doc_id}: {a} {s:+.3g}, {b} {t:+.3g}", "", 1) for line, doc_id, s, t in of.scores
    ]
    drawn = f"{len(specks):,} drawn at random of {of.scored:,}" if len(specks) < of.scored else f"all {of.scored:,}"
    text = (
        f"Scores of the pairs that the teacher re-ranked and the student retrieved ({drawn}), less each query’s mean."
    )
    text += "" if of.correlation is None else f" Correlation {of.correlation:.3f}."
    axes = f"{b}, score less its query’s mean", f"{a}, score less its query’s mean"
    yield charts.cloud(specks, f"Scores of the same pairs, {a} against {b}", axes, text, text, equal=False)


def curves(run: RunData) -> Iterator[Chart]:
    """The dev metric and agreement with the teacher of every student; then each one's loss, on a scale of its own."""
    keys = {key for each in run.students for entry in each.log for key in entry if key.startswith("dev_")}
    dev_metric = next((f": {m}" for each in run.students if (m := each.manifest.get("dev_metric"))), "")
    for key in sorted(keys, key=lambda key: (key.startswith("dev_agreement"), key)):
        series = []
        for at, each in enumerate(run.students):
            steps, values = each.curve(key)
            if steps:
                kept = each.kept_step if each.kept_step in steps else None
                series.append(Series(each.name, steps, values, _line_kind(at, each.name), kept))
        if series:
            name = key.removeprefix("dev_")
            title = "agreement with the teacher" if name == "agreement" else metric_name(name.replace("_", " "))
            caption = f"Dev {title}{'' if name.startswith('agreement') else dev_metric}."
            yield charts.lines(series, f"Dev {title} over training", "step", title, caption)
    for at, each in enumerate(run.students):
        parts = sorted({key for entry in each.log for key in entry if key.startswith("loss/")})
        series = []
        for row, key in enumerate(["loss", *parts] if len(parts) > 1 else ["loss"]):
            steps, values = each.curve(key)
            if len(steps) > 1:
                kind = _line_kind(at + row, each.name)
                series.append(Series(key.removeprefix("loss/"), steps, values, kind))
        if series:
            named = f" ({parts[0].removeprefix('loss/')})" if len(parts) == 1 else ""
            caption = f"Training loss of “{each.name}”{named}."
            yield charts.lines(series, f"Training loss, {each.name}", "step", "loss", caption)


def _line_kind(at: int, name: str) -> str:
    """Of the line of a student in a chart of several; a baseline never looks like the student, even alone."""
    return LINES[(at if at or name == "student" else 1) % len(LINES)]


def extrapolation(run: RunData, test_set: Evaluation, protocol: Mapping[str, Any], title: str) -> Chart | None:
    """Two values of each system: on queries near the training queries and far from them."""
    parts, metric, rows = protocol["parts"], metric_name(run.metric), []
    for name in test_set.systems:
        means = {part: of["systems"].get(name, {}).get(run.metric) for part, of in parts.items()}
        if None not in means.values():
            marks = [(value, part, f"{short(name)}, {part}: {value:.4f}") for part, value in means.items()]
            rows.append(Line(short(name), marks, list(means.values()), "way"))
    if not rows:
        return None
    return charts.by_system(rows, f"{metric}, {title}", metric, f"{metric} in the two parts.", legend=list(parts))
