"""`report`: one HTML file that shows a run, to be opened from disk, mailed or printed. It fetches nothing.

`data` reads a run's folder, `findings` says in words what the figures mean, `figures` and `queries` give what is shown,
and the template `page/report.html`, which escapes every text, puts it together. The page carries its style and scripts
with a Content-Security-Policy that names their hashes: nothing else runs, and nothing is fetched.
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
from rankdistill.evaluation.report import charts, data, figures, findings
from rankdistill.evaluation.report.queries import Queries
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
    of_run = data.read_run_data(run, suite)
    path = Path(run) / "report.html" if out is None else Path(out)
    pasted = {name: write(of_run.suite) for name, write in LANGUAGES.items()}
    # Each file may replace only one that begins, or ends, as it does.
    files = [(path, "<!doctype html", "")]
    for target, name in ((markdown, "Markdown"), (latex, "LaTeX")):
        signed = SIGNED[name.lower()]
        files += [(Path(target), signed.strip(), pasted[name] + signed)] if target is not None else []
    for target, mark, _ in files:
        check_file(target, mark=mark)
    for target, _, text in files:
        with disk_errors(target):
            write_atomically(target, text or _page(of_run, pasted))
    return path


def _page(run: data.RunData, pasted: dict[str, str]) -> str:
    queries = [Queries(run, test_set) if test_set.per_query else None for test_set in run.sets]
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
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    return environment.get_template("report.html").render(
        run=run,
        queries=queries,
        left_out=[*run.missing, *notes],
        pasted=pasted,
        recipe_text=(run.folder / "recipe.yaml").read_text(encoding="utf-8"),
        embedded={
            "names": {name: findings.metric_name(name) for name in run.suite.metrics},
            "sets": [None if of_set is None else of_set.data for of_set in queries],
        },
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        scripts=scripts,
        hashes={"style": _hash(style), "script": " ".join(map(_hash, scripts))},
        charts=charts,
        data=data,
        figures=figures,
        findings=findings,
        results=results,
    )


def _asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy: the hash of an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
