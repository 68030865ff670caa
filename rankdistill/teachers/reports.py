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


def added(one: Any, other: Any) -> Any:
    """The sum of two reports; what only one has stays, of lists of different lengths the longer's end too."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = dict.fromkeys([*one, *other])
        return {n: added(one[n], other[n]) if n in one and n in other else one.get(n, other.get(n)) for n in names}
    if isinstance(one, list) and isinstance(other, list):
        long, short = (one, other) if len(one) >= len(other) else (other, one)
        return [added(a, b) for a, b in zip(long, short, strict=False)] + long[len(short) :]
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return one + other
    raise TypeError(f"cannot add {one!r} and {other!r}")


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a folder of scores; empty if it has none.

    Raises:
        RankdistillError: it is damaged.
    """
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
