"""What teachers count beside their scores (repaired answers, position bias): sums, kept beside the scores.

A report is nested mappings of numbers and lists of numbers; two reports are added place by place, so that what several
commands scored is counted together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankdistill.artifacts import locked, write_atomically
from rankdistill.errors import RankdistillError

FILE = "report.json"


def added(a: Any, b: Any) -> Any:
    """The sum of two reports; what only one has stays, of lists of different lengths the longer's end too."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {**a, **{name: added(a[name], b[name]) if name in a else b[name] for name in b}}
    if isinstance(a, list) and isinstance(b, list):
        return [added(*pair) for pair in zip(a, b)] + a[len(b) :] + b[len(a) :]
    return a + b


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a folder of scores; empty if it has none."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RankdistillError(
            f"the report cannot be read: {error}", where=str(path), fix="delete this file; the scores do not need it"
        ) from None
    return dict(report)


def keep_report(folder: str | Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the report of a folder of scores; returns the whole."""
    path = Path(folder) / FILE
    with locked(path):
        whole: dict[str, Any] = added(read_report(folder), report)
        write_atomically(path, json.dumps(whole, indent=2) + "\n")
    return whole
