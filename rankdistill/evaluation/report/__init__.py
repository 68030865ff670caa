"""`report`: one HTML file that shows a run, to be opened from disk, mailed or printed. It fetches nothing.

`data` reads a run's folder, `findings` says in words what the figures mean, `tables`, `figures` and `queries` give what
is shown, and the template `page/report.html` puts it together. What is missing is said on the page.

The template escapes every text. The page carries its style and scripts with a Content-Security-Policy that names their
hashes: nothing else runs, and nothing is fetched.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rankdistill import __version__
from rankdistill.artifacts import check_file, disk_errors, write_atomically
from rankdistill.evaluation import results
from rankdistill.evaluation.report import charts, figures, findings, tables
from rankdistill.evaluation.report.data import RunData, read_run_data
from rankdistill.evaluation.report.queries import collect_queries
from rankdistill.evaluation.tables import SIGNED, latex, markdown

__all__ = ["report"]

PAGE = Path(__file__).parents[1] / "page"  # shared with the search page
STYLES, SCRIPTS = ("base.css", "report.css"), ("base.js", "report.js")
LANGUAGES = {"Markdown": markdown, "LaTeX": latex}


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
        UsageError: the run has no evaluation of that name, or a file of another origin stands where one is to be.
    """
    data = read_run_data(run, suite)
    path = Path(run) / "report.html" if out is None else Path(out)
    marks = ("<!doctype html", SIGNED["markdown"].strip(), SIGNED["latex"].strip())
    targets = [
        (target, mark) for target, mark in zip((path, markdown, latex), marks, strict=True) if target is not None
    ]
    for target, mark in targets:
        check_file(target, mark=mark)
    pasted = {name: write(data.suite) for name, write in LANGUAGES.items()}
    texts = {marks[0]: _page(data, pasted)}
    texts |= {SIGNED[name.lower()].strip(): text + SIGNED[name.lower()] for name, text in pasted.items()}
    for target, mark in targets:
        with disk_errors(target):
            write_atomically(target, texts[mark])
    return path


def _page(run: RunData, pasted: dict[str, str]) -> str:
    queries = [collect_queries(run, test_set) for test_set in run.sets]
    notes = [
        f"{test_set.name}: {note}" if len(run.sets) > 1 else note
        for test_set, of_set in zip(run.sets, queries, strict=True)
        for note in (of_set.notes if of_set is not None else [])
    ]
    style = "\n".join(_asset(name) for name in STYLES)
    scripts = [_asset(name) for name in SCRIPTS]
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["metric_name"] = findings.metric_name
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "ensure_ascii": False,
        "separators": (",", ":"),
    }
    return environment.get_template("report.html").render(
        run=run,
        queries=queries,
        left_out=[*run.missing, *notes],
        pasted=pasted,
        recipe_text=(run.folder / "recipe.yaml").read_text(encoding="utf-8"),
        data={
            "names": {name: findings.metric_name(name) for name in run.suite.metrics},
            "sets": [None if of_set is None else of_set.data for of_set in queries],
        },
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        scripts=scripts,
        hashes={"style": _hash(style), "script": " ".join(map(_hash, scripts))},
        charts=charts,
        figures=figures,
        findings=findings,
        results=results,
        tables=tables,
    )


def _asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy: the hash of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
