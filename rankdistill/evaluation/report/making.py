"""The sections of a report on a run's making: learning curves, recipe, environment, artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankdistill.evaluation.report import charts
from rankdistill.evaluation.report.charts import Series
from rankdistill.evaluation.report.data import RunData, curve
from rankdistill.evaluation.report.findings import describe_model, hacking, metric_name
from rankdistill.evaluation.report.html import Content, Markup, join, tag
from rankdistill.evaluation.report.parts import (
    Cell,
    Header,
    absent,
    copy_button,
    details,
    figure,
    grid,
    is_number,
    plain,
    section,
)
from rankdistill.evaluation.results import figure_text

LINES = ("student", "baseline", "teacher", "first-stage", "index", "bm25", "untrained", "other")


def training(run: RunData) -> Markup:
    made: list[Content] = []
    alarms = [(one.name, hacking(one.manifest)) for one in run.students]
    made += [
        tag("p", {"class": "alarm", "role": "note"}, tag("b", None, f"Alarm, {name}: "), text)
        for name, text in alarms
        if text
    ]
    if not run.students:
        return section("training", "Training", absent("No log of a training is there."))
    drawn = [*_dev_charts(run), *_loss_charts(run)]
    if drawn:
        made.append(tag("div", {"class": "pair"}, drawn))
    made.append(_checkpoints(run))
    lead = "On dev queries only; the ringed point is the checkpoint that was kept."
    return section("training", "Learning curves", made, lead=lead)


def _best_step(manifest: Mapping[str, Any]) -> float | None:
    dev = {float(step): float(value) for step, value in (manifest.get("dev") or {}).items()}
    return max(dev, key=lambda step: (dev[step], -step)) if dev else None


def _line_kind(at: int, name: str = "student") -> str:
    """Of the line of a student in a chart of several; a baseline never looks like the student, even alone."""
    return LINES[(at if at or name == "student" else 1) % len(LINES)]


def _dev_charts(run: RunData) -> list[Markup]:
    """The dev metric, and agreement with the teacher, of every student."""
    keys = sorted({key for one in run.students for entry in one.log for key in entry if key.startswith("dev_")})
    keys = sorted(keys, key=lambda key: key.startswith("dev_agreement"))
    made = []
    for key in keys:
        series = []
        for at, one in enumerate(run.students):
            steps, values = curve(one.log, key)
            if steps:
                best = _best_step(one.manifest)
                marked = best if best in steps else None
                series.append(Series(one.name, steps, values, _line_kind(at, one.name), marked))
        if not series:
            continue
        name = key.removeprefix("dev_")
        title = "agreement with the teacher" if name == "agreement" else metric_name(name.replace("_", " "))
        of = next((str(one.manifest["dev_metric"]) for one in run.students if one.manifest.get("dev_metric")), "")
        caption = f"Dev {title}{f': {of}' if of and not name.startswith('agreement') else ''}."
        made.append(figure(charts.lines(series, f"Dev {title} over training", "step", title), _legend(caption, series)))
    if made and not any(key.startswith("dev_agreement") for key in keys):
        made.append(absent("Agreement with the teacher on dev was not logged in this run."))
    return made


def _loss_charts(run: RunData) -> list[Markup]:
    """The loss of each student and its parts; different losses have scales of their own."""
    made = []
    for at, one in enumerate(run.students):
        parts = sorted({key for entry in one.log for key in entry if key.startswith("loss/")})
        keys = ["loss", *parts] if len(parts) > 1 else ["loss"]
        series = []
        for number_, key in enumerate(keys):
            steps, values = curve(one.log, key)
            if len(steps) > 1:
                series.append(Series(key.removeprefix("loss/"), steps, values, _line_kind(at + number_, one.name)))
        if not series:
            continue
        named = f" ({parts[0].removeprefix('loss/')})" if len(parts) == 1 else ""
        caption = f"Training loss of “{one.name}”{named}."
        made.append(
            figure(charts.lines(series, f"Training loss, {one.name}", "step", "loss"), _legend(caption, series))
        )
    return made


def _legend(caption: str, series: Sequence[Series]) -> Content:
    if len(series) < 2:
        return caption
    keys = [
        tag(
            "span",
            {"class": "key"},
            tag(
                "svg",
                {"class": "chip", "viewBox": "0 0 20 16", "aria-hidden": "true"},
                tag("line", {"class": f"curve {one.kind}", "x1": 0, "x2": 20, "y1": 8, "y2": 8}),
            ),
            one.label,
        )
        for one in series
    ]
    return join(caption, " ", keys)


def _checkpoints(run: RunData) -> Markup:
    rows: list[list[Cell]] = []
    for one in run.students:
        best, manifest = _best_step(one.manifest), one.manifest
        dev = manifest.get("dev") or {}
        value = max(dev.values()) if dev else None
        counts, seconds = manifest.get("counts") or {}, manifest.get("seconds")
        steps = counts.get("steps")
        rows.append(
            [
                (one.name, one.name),
                ("" if best is None else f"{best:,.0f}", best),
                ("" if steps is None else f"{steps:,}", steps),
                (figure_text(value), value),
                (f"{counts['lists']:,}" if "lists" in counts else "", counts.get("lists")),
                (f"{counts['documents_a_list']:,}" if "documents_a_list" in counts else "", None),
                ("" if seconds is None else f"{seconds:,.0f}", seconds),
                (str(manifest.get("precision", "")), None),
            ]
        )
    header: list[Header] = [("student", False)]
    header += [(name, True) for name in ("kept step", "of", "best on dev", "lists", "documents a list", "seconds")]
    return grid([*header, ("precision", False)], rows, "Students trained in this run")


def method(run: RunData, recipe_text: str) -> Markup:
    recipe = run.recipe
    students = {name: describe_model({**(recipe.get("student") or {})}) for name in ("student",)}
    losses = [str(one.get("type")) for one in (recipe.get("training") or {}).get("losses") or []]
    facts: list[tuple[str, Content]] = [
        ("Recipe", run.name),
        ("Collection", tag("code", None, str(recipe.get("collection", "")))),
        ("Teacher", describe_model(recipe.get("teacher"))),
        ("Student", students["student"]),
        ("Losses", ", ".join(losses)),
        ("Baselines", ", ".join(recipe.get("baselines") or {}) or "none"),
        ("Indexes", ", ".join(str(one) for one in recipe.get("indexes") or []) or "none"),
        ("Seed", str(recipe.get("seed", ""))),
        ("Metrics", ", ".join(metric_name(name) for name in run.suite.metrics)),
    ]
    if run.times:
        total = sum(value for value in run.times.values() if is_number(value))
        parts = ", ".join(f"{name} {value:,.0f} s" for name, value in run.times.items() if is_number(value))
        facts.append(("Time", f"{parts}; {total / 60:,.1f} minutes in all"))
    shown = tag("dl", {"class": "facts"}, [(tag("dt", None, name), tag("dd", None, value)) for name, value in facts])
    return section(
        "method",
        "Recipe and environment",
        shown,
        details(
            "The resolved recipe, which reproduces the run",
            tag(
                "div",
                {"class": "copyable"},
                copy_button("recipe-text"),
                tag("pre", {"id": "recipe-text", "tabindex": 0}, recipe_text),
            ),
        ),
        details("Libraries and machine", _environment(run)),
        details("What each stage left on disk", _artifacts(run)),
    )


def _environment(run: RunData) -> Markup:
    seen: dict[tuple[str, str], None] = {}
    for one in run.sets:
        for name, value in one.evaluation.environment.items():
            if isinstance(value, dict):
                seen.update({(str(key), str(version)): None for key, version in value.items()})
            else:
                seen[(name.replace("_", " "), str(value))] = None
    rows: list[list[Cell]] = [[(name, None), (value, None)] for name, value in seen]
    return grid([("what", False), ("version or value", False)], rows, "Environment of the evaluation", sortable=False)


def _artifacts(run: RunData) -> Markup:
    rows: list[list[Cell]] = []
    for name, manifest in run.manifests.items():
        counts = ", ".join(f"{k.replace('_', ' ')} {plain(v)}" for k, v in (manifest.get("counts") or {}).items())
        seconds = manifest.get("seconds")
        rows.append(
            [
                (tag("code", None, name), name),
                (str(manifest.get("kind", "")), str(manifest.get("kind", ""))),
                (tag("code", None, str(manifest.get("fingerprint", ""))), None),
                (f"{seconds:,.1f}" if is_number(seconds) else "", seconds if is_number(seconds) else None),
                (str(manifest.get("device", "")), None),
                (counts, None),
            ]
        )
    header: list[Header] = [("folder", False), ("kind", False), ("fingerprint", False)]
    header += [("seconds", True), ("device", False), ("counts", False)]
    return grid(header, rows, "Artifacts")
