"""What a report shows, read from a run's folder. A piece that is not there is noted in `missing`, never an error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankdistill.artifacts import Artifact
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.extrapolation import Extrapolation
from rankdistill.evaluation.fidelity import Fidelity
from rankdistill.evaluation.results import Evaluation, Row, SuiteEvaluation, agreement_table
from rankdistill.evaluation.significance import Significance
from rankdistill.evaluation.tables import is_number
from rankdistill.recipe import Recipe, check_values, read_yaml
from rankdistill.students.provenance import check_student

T = TypeVar("T")
TEACHER, BM25 = "teacher", "BM25"
AGAIN = "rankdistill evaluate {}, then report"


@dataclass
class SetData:
    """One set of the suite with what was measured on each of its queries.

    Attributes:
        query_ids: rows of `per_query`: system → metric → float64 [queries], NaN where a query has no value.
        fidelity_queries: system → measure → query → value.
    """

    evaluation: Evaluation
    folder: Path
    query_ids: list[str] = field(default_factory=list)
    per_query: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    fidelity_queries: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def systems(self) -> list[str]:
        return [row.system for row in self.evaluation.rows]

    @property
    def same_queries(self) -> list[dict[str, Any]]:
        """The teacher's time against others', on the same queries."""
        return (self.evaluation.cost or {}).get("same_queries", [])

    def row(self, system: str | None) -> Row | None:
        return next((row for row in self.evaluation.rows if row.system == system), None)


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
        values = {
            float(entry["step"]): float(entry[key])
            for entry in self.log
            if is_number(entry.get(key)) and np.isfinite(entry[key])
        }
        steps = sorted(values)
        return steps, [values[step] for step in steps]


@dataclass
class RunData:
    """A run as the report shows it."""

    folder: Path
    recipe: dict[str, Any]
    suite: SuiteEvaluation
    sets: list[SetData]
    students: list[StudentData]
    times: dict[str, float]
    manifests: dict[str, dict[str, Any]]
    missing: list[str]

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
        if system is None:
            return None
        if len(self.sets) == 1:
            row = self.sets[0].row(system)
            return None if row is None else row.means.get(self.metric)
        return self.suite.macro.get(system, {}).get(self.metric)


def read_run_data(folder: str | Path, suite: str | None = None) -> RunData:
    """Read everything a run left that a report can show.

    Args:
        folder: of the run.
        suite: the name of an evaluation; default the recipe's, else the one written last.

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
    chosen = _chosen(folder, values, suite, missing)
    evaluated = _suite(chosen)
    sets = [_set(chosen, test_set, missing) for test_set in evaluated.sets]
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
    return RunData(folder, dict(values), evaluated, sets, students, times, manifests, missing)


def _chosen(folder: Path, recipe: Mapping[str, Any], suite: str | None, missing: list[str]) -> Path:
    there = {path.parent.name: path for path in sorted((folder / "evaluation").glob("*/results.json"))}
    if not there:
        raise RankdistillError("the run has not been evaluated", where=str(folder), fix=AGAIN.format(folder))
    name = Path(suite or str((recipe.get("evaluation") or {}).get("suite", ""))).stem
    if name not in there:
        if suite is not None:
            raise UsageError(f"the run has no evaluation {name!r}", where=str(folder), fix=f"it has {', '.join(there)}")
        name = max(there, key=lambda each: there[each].stat().st_mtime)
    others = [each for each in there if each != name]
    if others:
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


def _columns(path: Path) -> dict[str, list[Any]]:
    """Of a table of systems and queries."""
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    if not {"system", "query_id"} <= columns.keys():
        raise ValueError("it has no columns system and query_id")
    return columns


def _log(path: Path) -> list[dict[str, Any]]:
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def _known(model: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has fields for: files of other versions may hold more."""
    names = {each.name for each in fields(model)}
    return {name: value for name, value in values.items() if name in names}


def _suite(folder: Path) -> SuiteEvaluation:
    path = folder / "results.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sets = []
        for each in values["sets"]:
            rows = [Row(**_known(Row, row)) for row in each["rows"]]
            sets.append(Evaluation(**{**_known(Evaluation, each), "rows": rows}))
        return SuiteEvaluation(**{**_known(SuiteEvaluation, values), "sets": sets, "path": folder})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankdistillError(
            f"the results cannot be read: {error!r}", where=str(path), fix="evaluate the run again"
        ) from None


def _fill(evaluation: Evaluation, name: str, make: Callable[[dict[str, Any]], Any], path: Path) -> bool:
    """What was measured apart goes into the evaluation; what makes no table cannot be read."""
    setattr(evaluation, name, make(_object(path)))
    evaluation.tables()
    agreement_table(evaluation, page=True)
    return True


def _set(suite: Path, evaluation: Evaluation, missing: list[str]) -> SetData:
    of = evaluation.name
    test_set = SetData(evaluation, suite / re.sub(r"[^\w.+-]+", "-", of))  # as `evaluate_suite` names it
    file = test_set.folder / "per_query.parquet"
    columns = _read(file, missing, f"{of}: the values of each query", _columns) or {}
    test_set.query_ids = list(dict.fromkeys(columns.get("query_id", [])))
    row_of = {query_id: row for row, query_id in enumerate(test_set.query_ids)}
    for metric in (name for name in evaluation.metrics if name in columns):
        for system, query_id, value in zip(columns["system"], columns["query_id"], columns[metric], strict=True):
            of_system = test_set.per_query.setdefault(system, {})
            if metric not in of_system:
                of_system[metric] = np.full(len(row_of), np.nan)
            of_system[metric][row_of[query_id]] = np.nan if value is None else value
    nothing = pa.table({})
    parts: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
        ("significance", Significance.from_json, "significance and intervals"),
        ("fidelity", lambda of: Fidelity(**_known(Fidelity, of), table=nothing), "agreement with the teacher"),
        ("extrapolation", lambda of: Extrapolation(of["protocols"], nothing), "interpolation against extrapolation"),
        ("cost", dict, "latency of single queries, memory (cost)"),
    ]
    for name, make, what in parts:
        file = test_set.folder / f"{name}.json"
        if not _read(file, missing, f"{of}: {what}", partial(_fill, evaluation, name, make)):
            setattr(evaluation, name, None)
    if evaluation.fidelity is not None:
        file = test_set.folder / "fidelity.parquet"
        columns = _read(file, missing, f"{of}: the agreement of each query", _columns) or {}
        for name in columns.keys() - {"system", "query_id", "student_metric", "teacher_metric", "difference"}:
            for system, query_id, value in zip(columns["system"], columns["query_id"], columns[name], strict=True):
                if is_number(value) and np.isfinite(value):
                    test_set.fidelity_queries.setdefault(system, {}).setdefault(name, {})[query_id] = float(value)
    return test_set


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
