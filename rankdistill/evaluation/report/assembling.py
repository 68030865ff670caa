"""`report`: one HTML file that shows a run, to be opened from disk, mailed or printed. It fetches nothing.

What is read: the recipe, an evaluation's folder (`results.json`, `per_query.parquet`, `runs/`, and where they are there
`significance.json`, `fidelity.json`, `extrapolation.json`, `cost.json`), logs and manifests of the students, and the
collection for the texts. What is missing is said on the page.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from rankdistill import __version__
from rankdistill.artifacts import check_file, disk_errors, write_atomically
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.report import making, sections
from rankdistill.evaluation.report.data import RunData, read_run_data
from rankdistill.evaluation.report.findings import metric_name
from rankdistill.evaluation.report.html import Content, Markup, join, page, tag
from rankdistill.evaluation.report.queries import Queries, collect_queries
from rankdistill.evaluation.results import SIGNED
from rankdistill.evaluation.results import latex as latex_tables
from rankdistill.evaluation.results import markdown as markdown_tables

FILE = "report.html"
LINKS = (
    ("summary", "In short"),
    ("results", "Results"),
    ("trade-off", "Cost against quality"),
    ("queries", "Queries"),
    ("training", "Training"),
    ("fidelity", "Agreement"),
    ("generalisation", "Generalisation"),
    ("cost", "Cost"),
    ("method", "Recipe"),
    ("paste", "Tables"),
    ("missing", "Left out"),
)


def report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    suite: str | None = None,
    markdown: str | Path | None = None,
    latex: str | Path | None = None,
) -> Path:
    """Write the report of an evaluated run.

    Args:
        run: its folder.
        out: the HTML file; default `report.html` in the run's folder.
        suite: which of its evaluations; default the recipe's suite, else the one written last.
        markdown, latex: also write the tables to these files.

    Returns:
        the HTML file.

    Raises:
        RankdistillError: this is no run, it has not been evaluated, or the file cannot be written.
        UsageError: the run has no evaluation of that name.
    """
    data = read_run_data(run, suite)
    path = Path(out) if out is not None else Path(run) / FILE
    if path.is_dir():
        raise RankdistillError("this is a folder", where=str(path), fix=f"name a file: --out {path / FILE}")
    marks = ("<!doctype html", SIGNED["markdown"].strip(), SIGNED["latex"].strip())
    for target, mark in zip((path, markdown, latex), marks, strict=True):
        if target is not None:
            check_file(target, mark=mark)
    found = [collect_queries(data, one) for one in data.sets]
    tables = markdown_tables(data.suite), latex_tables(data.suite)
    text = _page(data, found, *tables)
    for target, content in (
        (path, text),
        (markdown, tables[0] + SIGNED["markdown"]),
        (latex, tables[1] + SIGNED["latex"]),
    ):
        if target is not None:
            with disk_errors(target):
                write_atomically(target, content)
    return path


def _page(run: RunData, found: Sequence[Queries | None], markdown: str, latex: str) -> str:
    recipe_text = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    several = len(run.sets) > 1
    notes = [
        f"{one.name}: {note}" if several else note
        for one, of in zip(run.sets, found, strict=True)
        for note in (of.notes if of is not None else [])
    ]
    main: list[Content] = [
        sections.summary(run),
        sections.results(run),
        sections.trade_off(run),
        sections.queries(run, found),
        making.training(run),
        sections.fidelity(run),
        sections.extrapolation(run),
        sections.cost(run),
        making.method(run, recipe_text),
        sections.paste(markdown, latex),
        sections.left_out(run, notes),
    ]
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        tag("a", {"class": "skip", "href": "#summary"}, "Skip to the report"),
        _header(run, made),
        tag("main", None, main),
        tag("footer", None, f"Written by rankdistill {__version__} on {made}. This file fetches nothing."),
        tag("div", {"id": "hint", "role": "status", "hidden": True}),
    ]
    data = {
        "names": {name: metric_name(name) for name in run.suite.metrics},
        "sets": [of.data if of is not None else None for of in found],
    }
    return page(
        f"{run.name}: distillation report",
        body,
        styles=["base.css", "report.css"],
        scripts=["base.js", "report.js"],
        data={"report-data": data},
    )


def _header(run: RunData, made: str) -> Markup:
    chooser: Content = None
    if len(run.sets) > 1:
        options = [tag("option", {"value": at}, one.name) for at, one in enumerate(run.sets)]
        chooser = tag("label", {"class": "set-choice"}, "Set ", tag("select", {"id": "set-choice"}, options))
    described = str(run.recipe.get("description") or "").strip().split("\n")[0]
    head = tag(
        "header",
        None,
        tag(
            "div",
            {"class": "bar"},
            tag(
                "div",
                {"class": "title"},
                tag("p", {"class": "eyebrow"}, "Distillation report"),
                tag("h1", None, run.name),
            ),
            tag("button", {"type": "button", "id": "theme", "class": "quiet"}, "Theme: system"),
        ),
        tag("p", {"class": "described"}, described) if described else None,
        tag("p", {"class": "made"}, f"Suite {run.suite.suite} · {made}"),
    )
    links = tag("div", {"class": "links"}, [tag("a", {"href": f"#{name}"}, text) for name, text in LINKS])
    return join(head, tag("nav", {"aria-label": "Sections"}, links, chooser))
