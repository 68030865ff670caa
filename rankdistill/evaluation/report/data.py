"""What a report shows, read from a run's folder. A piece that is not there is noted in `missing`, never an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankdistill.artifacts import Artifact
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.extrapolation import Extrapolation
from rankdistill.evaluation.fidelity import Fidelity
from rankdistill.evaluation.results import Columns, Evaluation, Row, SuiteEvaluation, agreement_table
from rankdistill.evaluation.significance import Significance
from rankdistill.evaluation.suites import folder_name
from rankdistill.evaluation.tables import Cell, Table, is_number, make_table, number
from rankdistill.recipe import Recipe, check_values, read_yaml
from rankdistill.students.provenance import check_student

T = TypeVar("T")
TEACHER, BM25 = "teacher", "BM25"
AGAIN = "rankdistill evaluate {}, then report"


@dataclass
class StudentData:
    """One trained student: its log and its manifest."""

    name: str
    log: list[dict[str, Any]]
    manifest: dict[str, Any]

    @property
    def dev(self) -> dict[float, float]:
        """Step → dev metric."""
        return {float(step): float(value) for step, value in (self.manifest.get("dev") or {}).items()}

    @property
    def kept_step(self) -> float | None:
        return max(self.dev, key=lambda step: (self.dev[step], -step), default=None)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key of the log; of a step logged twice (after a restart) the later value counts."""
        known = [entry for entry in self.log if is_number(entry.get(key)) and np.isfinite(entry[key])]
        values = {float(entry["step"]): float(entry[key]) for entry in known}
        return sorted(values), [values[step] for step in sorted(values)]


@dataclass
class RunData:
    """A run as the report shows it."""

    folder: Path
    recipe: dict[str, Any]
    suite: SuiteEvaluation
    students: list[StudentData] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def sets(self) -> list[Evaluation]:
        return self.suite.sets

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.name)

    @property
    def metric(self) -> str:
        """The first metric of the suite: the one that headlines and plots speak of."""
        return self.suite.metrics[0]

    def kind(self, system: str) -> str:
        """What a row of the table is: student, teacher, bm25, first-stage, untrained, baseline, index or other."""
        if system in (TEACHER, BM25):
            return system.lower()
        if system.startswith(("first stage", "encoder: ")):
            return "first-stage"
        head, _, tail = system.partition(", ")
        if head != "student":
            return "other"
        if tail in (self.recipe.get("baselines") or {}):
            return "baseline"
        return {"": "student", "distilled": "student", "untrained": "untrained"}.get(tail, "index")

    def of_kind(self, kind: str) -> str | None:
        """The first system of a kind."""
        return next((name for test_set in self.sets for name in test_set.systems if self.kind(name) == kind), None)

    @property
    def student(self) -> str | None:
        return self.of_kind("student")

    def quality(self, system: str | None) -> float | None:
        """The headline figure of a system: of the one set, or the macro average over all."""
        if len(self.sets) == 1:
            row = self.sets[0].row(system)
            return None if row is None else row.means.get(self.metric)
        return self.suite.macro.get(str(system), {}).get(self.metric)


def read_run_data(folder: str | Path, suite: str | None = None) -> RunData:
    """Read everything a run left that a report can show; `suite`: default the recipe's, else the one written last.

    Raises:
        RankdistillError: this is no run, it has not been evaluated, or its students are not its recipe's or those that
            were evaluated.
        UsageError: it has no evaluation of that name.
    """
    folder = Path(folder)
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise RankdistillError("this is no run", where=str(folder), fix="give the folder that `rankdistill run` wrote")
    values = read_yaml(saved)
    missing: list[str] = []
    evaluated = _suite(_chosen(folder, values, suite, missing))
    for test_set in evaluated.sets:
        _fill(test_set, missing)
    recipe = check_values(Recipe, values, str(saved))
    names = ["student", *recipe.baselines]
    students = [each for name in names if (each := _student(folder, name, recipe, evaluated, missing)) is not None]
    times = _read(folder / "times.json", missing, "how long the stages took (times.json)", _object) or {}
    manifests = {
        str(path.parent.relative_to(folder)): manifest
        for path in sorted([*folder.glob("*/manifest.json"), *folder.glob("*/*/manifest.json")])
        if (manifest := _read(path, missing, f"{path.relative_to(folder)}", _object))
    }
    missing += [f"the set {entry['set']} was not evaluated: {entry['reason']}" for entry in evaluated.missing]
    return RunData(folder, dict(values), evaluated, students, times, manifests, missing)


def _chosen(folder: Path, recipe: Mapping[str, Any], suite: str | None, missing: list[str]) -> Path:
    there = {path.parent.name: path for path in sorted((folder / "evaluation").glob("*/results.json"))}
    if not there:
        raise RankdistillError("the run has not been evaluated", where=str(folder), fix=AGAIN.format(folder))
    name = Path(suite or str((recipe.get("evaluation") or {}).get("suite", ""))).stem
    if name not in there:
        if suite is not None:
            raise UsageError(f"the run has no evaluation {name!r}", where=str(folder), fix=f"it has {', '.join(there)}")
        name = max(there, key=lambda each: there[each].stat().st_mtime)
    if others := [each for each in there if each != name]:
        missing.append(
            f"this page shows the evaluation {name}; the run also has {', '.join(others)} (--suite {others[0]})"
        )
    return there[name].parent


def _read(path: Path, missing: list[str], what: str, parse: Callable[[Path], T]) -> T | None:
    """What a file holds; None, with a note, where it is absent or damaged."""
    if not path.is_file():
        missing.append(f"{what} is not there")
        return None
    try:
        return parse(path)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # Arrow's are of these too
        said = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        missing.append(f"{what} cannot be read: {said}")
        return None


def _object(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    return values


def _table(path: Path) -> pa.Table:
    table = pq.read_table(path)
    if not {"system", "query_id"} <= set(table.column_names):
        raise ValueError("it has no columns system and query_id")
    return table


def _log(path: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def _known(model: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has fields for: files of other versions may hold more."""
    return {each.name: values[each.name] for each in fields(model) if each.name in values}


def _suite(folder: Path) -> SuiteEvaluation:
    path = folder / "results.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sets = []
        for each in values["sets"]:
            rows = [Row(**_known(Row, row)) for row in each["rows"]]
            place = folder / folder_name(each["name"])
            sets.append(Evaluation(**{**_known(Evaluation, each), "rows": rows, "path": place}))
        return SuiteEvaluation(**{**_known(SuiteEvaluation, values), "sets": sets, "path": folder})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankdistillError(
            f"the results cannot be read: {error!r}", where=str(path), fix="evaluate the run again"
        ) from None


def _fill(of: Evaluation, missing: list[str]) -> None:
    """What was measured apart goes into the evaluation; what makes no table cannot be read."""
    folder, nothing = of.folder, pa.table({})
    table = _read(folder / "per_query.parquet", missing, f"{of.name}: the values of each query", _table) or nothing
    columns = table.to_pydict()
    of.query_ids = list(dict.fromkeys(columns.get("query_id", [])))
    row_of = {query_id: row for row, query_id in enumerate(of.query_ids)}
    for metric in (name for name in of.metrics if name in columns):
        for system, query_id, value in zip(columns["system"], columns["query_id"], columns[metric], strict=True):
            values = of.per_query.setdefault(system, {}).setdefault(metric, np.full(len(row_of), np.nan))
            values[row_of[query_id]] = np.nan if value is None else value
    parts: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
        "significance": (Significance.from_json, "significance and intervals"),
        "fidelity": (lambda found: Fidelity(**_known(Fidelity, found), table=nothing), "agreement with the teacher"),
        "extrapolation": (
            lambda found: Extrapolation(found["protocols"], nothing),
            "interpolation against extrapolation",
        ),
        "cost": (dict, "latency of single queries, memory (cost)"),
    }
    for name, (make, what) in parts.items():

        def parse(path: Path, name: str = name, make: Callable[[dict[str, Any]], Any] = make) -> bool:
            setattr(of, name, make(_object(path)))
            of.tables()
            agreement_table(of, page=True)
            return True

        if not _read(folder / f"{name}.json", missing, f"{of.name}: {what}", parse):
            setattr(of, name, None)
    if of.fidelity is not None:
        file = folder / "fidelity.parquet"
        of.fidelity.table = _read(file, missing, f"{of.name}: the agreement of each query", _table) or nothing


def _student(
    folder: Path, name: str, recipe: Recipe, evaluated: SuiteEvaluation, missing: list[str]
) -> StudentData | None:
    """A student, refused where it is not the recipe's or not the one that the figures are of."""
    path = folder / "student" if name == "student" else folder / "baselines" / name
    manifest = _read(path / "manifest.json", missing, f"{name}: the manifest of its training", _object)
    if not manifest:
        return None
    if "fingerprint" in manifest:
        student = Artifact(path, manifest)
        check_student(student, recipe if name == "student" else recipe.baseline(name), folder)
        if evaluated.students.get(name, student.fingerprint) != student.fingerprint:
            raise RankdistillError(
                f"the student {name!r} was trained again after this evaluation",
                where=str(evaluated.path),
                fix=AGAIN.format(folder),
            )
    log = _read(path / "log.jsonl", missing, f"{name}: the log of its training", _log)
    return StudentData(name, log or [], manifest)


# -- the tables that a report alone has -------------------------------------------------------------------------------


def students_table(run: RunData) -> Table:
    def count(key: str) -> Callable[[StudentData], Cell]:
        return lambda student: number((student.manifest.get("counts") or {}).get(key), "{:,.0f}".format)

    columns: Columns = {
        "student": lambda student: student.name,
        "kept step": lambda student: number(student.kept_step, "{:,.0f}".format),
        "of": count("steps"),
        "best on dev": lambda student: number(max(student.dev.values(), default=None)),
        "lists": count("lists"),
        "documents a list": count("documents_a_list"),
        "seconds": lambda student: number(student.manifest.get("seconds"), "{:,.0f}".format),
        "precision": lambda student: str(student.manifest.get("precision") or ""),
    }
    return make_table("Students trained in this run", run.students, columns)


def environment_table(run: RunData) -> Table:
    rows: dict[tuple[str, str], None] = {}
    for name, value in (item for test_set in run.sets for item in test_set.environment.items()):
        versions = value if isinstance(value, dict) else {name.replace("_", " "): value}
        rows.update({(str(what), str(version)): None for what, version in versions.items()})
    columns: Columns = {"what": lambda row: row[0], "version or value": lambda row: row[1]}
    return make_table("Environment of the evaluation", rows, columns)


def artifacts_table(run: RunData) -> Table:
    def counts(values: Mapping[str, Any]) -> str:
        known = {key.replace("_", " "): value for key, value in (values.get("counts") or {}).items()}
        return ", ".join(f"{key} {value:{'.3g' if isinstance(value, float) else ''}}" for key, value in known.items())

    columns: Columns = {
        "folder": lambda item: Cell(item[0], item[0], code=True),
        "kind": lambda item: str(item[1].get("kind") or ""),
        "fingerprint": lambda item: Cell(str(item[1].get("fingerprint") or ""), code=True),
        "seconds": lambda item: number(item[1].get("seconds"), "{:,.1f}".format),
        "device": lambda item: str(item[1].get("device") or ""),
        "counts": lambda item: counts(item[1]),
    }
    return make_table("Artifacts", run.manifests.items(), columns)
