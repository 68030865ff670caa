"""The tables that a report alone has: students, environment, artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rankdistill.evaluation.report.data import RunData, StudentData
from rankdistill.evaluation.tables import Cell, Table, make_table, number


def students(run: RunData) -> Table:
    def count(key: str, student: StudentData) -> Cell:
        return number((student.manifest.get("counts") or {}).get(key), "{:,.0f}".format)

    columns: dict[str, Callable[[StudentData], Cell | str]] = {
        "student": lambda student: student.name,
        "kept step": lambda student: number(student.kept_step, "{:,.0f}".format),
        "of": partial(count, "steps"),
        "best on dev": lambda student: number(max(student.dev.values(), default=None)),
        "lists": partial(count, "lists"),
        "documents a list": partial(count, "documents_a_list"),
        "seconds": lambda student: number(student.manifest.get("seconds"), "{:,.0f}".format),
        "precision": lambda student: str(student.manifest.get("precision") or ""),
    }
    return make_table("Students trained in this run", run.students, columns)


def environment(run: RunData) -> Table:
    rows: dict[tuple[str, str], None] = {}
    for name, value in (item for test_set in run.sets for item in test_set.evaluation.environment.items()):
        versions = value if isinstance(value, dict) else {name.replace("_", " "): value}
        rows.update({(str(what), str(version)): None for what, version in versions.items()})
    columns: dict[str, Callable[[tuple[str, str]], str]] = {
        "what": lambda row: row[0],
        "version or value": lambda row: row[1],
    }
    return make_table("Environment of the evaluation", rows, columns)


def artifacts(run: RunData) -> Table:
    def counts(values: Mapping[str, Any]) -> str:
        known = {key.replace("_", " "): value for key, value in (values.get("counts") or {}).items()}
        return ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()
        )

    columns: dict[str, Callable[[Any], Cell | str]] = {
        "folder": lambda item: Cell(item[0], item[0], code=True),
        "kind": lambda item: str(item[1].get("kind") or ""),
        "fingerprint": lambda item: Cell(str(item[1].get("fingerprint") or ""), code=True),
        "seconds": lambda item: number(item[1].get("seconds"), "{:,.1f}".format),
        "device": lambda item: str(item[1].get("device") or ""),
        "counts": lambda item: counts(item[1]),
    }
    return make_table("Artifacts", run.manifests.items(), columns)
