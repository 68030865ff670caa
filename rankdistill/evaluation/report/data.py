"""What a report shows, read from a run's folder. A piece that is not there is noted in `missing`, never an error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rankdistill.artifacts import Artifact
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.results import Evaluation, Row, SuiteEvaluation
from rankdistill.evaluation.significance import Significance
from rankdistill.recipe import Recipe, check_values, read_yaml
from rankdistill.students.provenance import check_student

TEACHER = "teacher"
BM25 = "BM25"


@dataclass
class PerQuery:
    """The values of each query: `values[system][metric]` is float64 [queries], NaN where it has none."""

    query_ids: list[str]
    values: dict[str, dict[str, np.ndarray]]

    def mean_of(self, system: str, metric: str) -> np.ndarray | None:
        found = self.values.get(system, {}).get(metric)
        return None if found is None or np.isnan(found).any() else found


@dataclass
class SetData:
    """One set of the suite with everything measured on it."""

    evaluation: Evaluation
    folder: Path
    per_query: PerQuery | None = None
    significance: dict[str, Any] | None = None
    fidelity: dict[str, Any] | None = None
    fidelity_queries: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # system → measure → query
    extrapolation: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.evaluation.name

    @property
    def systems(self) -> list[str]:
        return [row.system for row in self.evaluation.rows]

    def row(self, system: str) -> Row | None:
        return next((row for row in self.evaluation.rows if row.system == system), None)

    def cost_of(self, system: str) -> dict[str, Any]:
        found = ((self.cost or {}).get("systems") or {}).get(system)
        return found if isinstance(found, dict) else {}


@dataclass
class StudentData:
    """One trained student: its log and its manifest."""

    name: str
    log: list[dict[str, Any]]
    manifest: dict[str, Any]


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
        return kind_of(system, self.recipe)

    @property
    def student(self) -> str | None:
        """The row of the student itself."""
        names = [name for one in self.sets for name in one.systems]
        return next((name for name in names if self.kind(name) == "student"), None)


def kind_of(system: str, recipe: Mapping[str, Any]) -> str:
    """What a row of the table is: student, teacher, bm25, first-stage, untrained, baseline, index or other."""
    if system == TEACHER:
        return "teacher"
    if system == BM25:
        return "bm25"
    if system.startswith(("first stage", "encoder: ")):
        return "first-stage"
    head, _, tail = system.partition(", ")
    if head != "student":
        return "other"
    if tail in (recipe.get("baselines") or {}):
        return "baseline"
    return {"": "student", "distilled": "student", "untrained": "untrained"}.get(tail, "index")


def read_run_data(folder: str | Path, suite: str | None = None) -> RunData:
    """Read everything a run left that a report can show.

    Args:
        folder: of the run.
        suite: the name of an evaluation; default the recipe's, else the one written last.

    Raises:
        RankdistillError: this is no run, or it has not been evaluated.
        UsageError: it has no evaluation of that name.
    """
    folder = Path(folder)
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise RankdistillError("this is no run", where=str(folder), fix="give the folder that `rankdistill run` wrote")
    recipe = read_yaml(saved)
    missing: list[str] = []
    chosen = _chosen(folder, recipe, suite, missing)
    evaluated = _suite(chosen)
    sets = [_set(chosen, one, missing) for one in evaluated.sets]
    _check_students(folder, recipe, evaluated)
    trained = [_student(name, path, missing) for name, path in _student_folders(folder, recipe)]
    students = [one for one in trained if one is not None]
    times = _json(folder / "times.json", missing, "how long the stages took (times.json)") or {}
    manifests = {
        str(path.parent.relative_to(folder)): found
        for path in sorted([*folder.glob("*/manifest.json"), *folder.glob("*/*/manifest.json")])
        if (found := _json(path, missing, f"{path.relative_to(folder)}"))
    }
    missing += [f"the set {entry['set']} was not evaluated: {entry['reason']}" for entry in evaluated.missing]
    return RunData(folder, dict(recipe), evaluated, sets, students, times, manifests, missing)


def _check_students(folder: Path, values: Mapping[str, Any], evaluated: SuiteEvaluation) -> None:
    """Refuse a page that shows students under a recipe, or figures of students, that are not theirs."""
    recipe = check_values(Recipe, values, str(folder / "recipe.yaml"))
    for name, path in _student_folders(folder, values):
        manifest = _json(path / "manifest.json", [], "")  # what is absent or damaged is noted elsewhere
        if manifest is None or "fingerprint" not in manifest:
            continue
        student = Artifact(path, manifest)
        check_student(student, recipe if name == "student" else recipe.baseline(name), folder)
        if evaluated.students.get(name, student.fingerprint) != student.fingerprint:
            raise RankdistillError(
                f"the student {name!r} was trained again after this evaluation",
                where=str(evaluated.path),
                fix=f"rankdistill evaluate {folder}, then report",
            )


def _chosen(folder: Path, recipe: Mapping[str, Any], suite: str | None, missing: list[str]) -> Path:
    found = {path.parent.name: path for path in sorted((folder / "evaluation").glob("*/results.json"))}
    if not found:
        raise RankdistillError(
            "the run has not been evaluated", where=str(folder), fix=f"rankdistill evaluate {folder}, then report"
        )
    own = Path(str((recipe.get("evaluation") or {}).get("suite", ""))).stem
    if suite is not None:
        name = Path(suite).stem
        if name not in found:
            raise UsageError(f"the run has no evaluation {name!r}", where=str(folder), fix=f"it has {', '.join(found)}")
    else:
        name = own if own in found else max(found, key=lambda one: found[one].stat().st_mtime)
    others = [one for one in found if one != name]
    if others:
        missing.append(
            f"this page shows the evaluation {name}; the run also has {', '.join(others)} (--suite {others[0]})"
        )
    return found[name].parent


def _json(path: Path, missing: list[str], what: str) -> dict[str, Any] | None:
    """A JSON object; None, with a note, when it is absent or damaged."""
    if not path.is_file():
        missing.append(f"{what} is not there")
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        missing.append(f"{what} cannot be read: {error}")
        return None
    return found


def _known(model: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataclass has fields for: files of other versions may hold more."""
    names = {one.name for one in fields(model)}
    return {name: value for name, value in values.items() if name in names}


def _suite(folder: Path) -> SuiteEvaluation:
    path = folder / "results.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        sets = []
        for one in values["sets"]:
            rows = [Row(**_known(Row, row)) for row in one["rows"]]
            sets.append(Evaluation(**{**_known(Evaluation, one), "rows": rows}))
        return SuiteEvaluation(**{**_known(SuiteEvaluation, values), "sets": sets, "path": folder})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankdistillError(
            f"the results cannot be read: {error!r}", where=str(path), fix="evaluate the run again"
        ) from None


def _set(suite: Path, evaluation: Evaluation, missing: list[str]) -> SetData:
    folder = suite / re.sub(r"[^\w.+-]+", "-", evaluation.name)  # as `evaluate_suite` names it
    one = SetData(evaluation, folder)
    of = evaluation.name
    one.per_query = _per_query(folder / "per_query.parquet", evaluation, missing)
    one.significance = _json(folder / "significance.json", missing, f"{of}: significance and intervals")
    one.fidelity = _json(folder / "fidelity.json", missing, f"{of}: agreement of student and teacher (fidelity)")
    one.extrapolation = _json(folder / "extrapolation.json", missing, f"{of}: interpolation against extrapolation")
    one.cost = _json(folder / "cost.json", missing, f"{of}: latency of single queries, memory (cost)")
    if one.significance is not None:
        try:
            evaluation.significance = Significance.from_json(one.significance)
        except (KeyError, TypeError) as error:
            missing.append(f"{of}: the tests of significance cannot be read: {error!r}")
    if one.fidelity is not None:
        one.fidelity_queries = _fidelity_queries(folder / "fidelity.parquet", missing, of)
    return one


def _table(path: Path, missing: list[str], what: str) -> dict[str, list[Any]] | None:
    if not path.is_file():
        missing.append(f"{what} is not there")
        return None
    try:
        columns = pq.read_table(path).to_pydict()
    except (OSError, ValueError) as error:  # Arrow's errors are of these two
        missing.append(f"{what} cannot be read: {error}")
        return None
    if not {"system", "query_id"} <= columns.keys():
        missing.append(f"{what} cannot be read: it has no columns system and query_id")
        return None
    return columns


def _per_query(path: Path, evaluation: Evaluation, missing: list[str]) -> PerQuery | None:
    columns = _table(path, missing, f"{evaluation.name}: the values of each query")
    if columns is None:
        return None
    query_ids = list(dict.fromkeys(columns["query_id"]))
    row_of = {query_id: row for row, query_id in enumerate(query_ids)}
    values: dict[str, dict[str, np.ndarray]] = {}
    for metric in (name for name in evaluation.metrics if name in columns):
        for system, query_id, value in zip(columns["system"], columns["query_id"], columns[metric], strict=True):
            of = values.setdefault(system, {})
            if metric not in of:
                of[metric] = np.full(len(query_ids), np.nan)
            of[metric][row_of[query_id]] = np.nan if value is None else value
    return PerQuery(query_ids, values)


def _fidelity_queries(path: Path, missing: list[str], of: str) -> dict[str, dict[str, dict[str, float]]]:
    columns = _table(path, missing, f"{of}: the agreement of each query")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in (columns or {}).keys() - {"system", "query_id", "student_metric", "teacher_metric", "difference"}:
        assert columns is not None
        for system, query_id, value in zip(columns["system"], columns["query_id"], columns[name], strict=True):
            if isinstance(value, int | float) and np.isfinite(value):
                found.setdefault(system, {}).setdefault(name, {})[query_id] = float(value)
    return found


def _student_folders(folder: Path, recipe: Mapping[str, Any]) -> list[tuple[str, Path]]:
    baselines = [(str(name), folder / "baselines" / str(name)) for name in recipe.get("baselines") or {}]
    return [("student", folder / "student"), *baselines]


def _student(name: str, path: Path, missing: list[str]) -> StudentData | None:
    manifest = _json(path / "manifest.json", missing, f"{name}: the manifest of its training")
    if manifest is None:
        return None
    log = []
    try:
        for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                log.append(entry)
    except (OSError, ValueError) as error:
        missing.append(f"{name}: the log of its training: {error}")
    return StudentData(name, log, manifest)


def curve(log: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a key of a training log; of a step logged twice (after a restart) the later value counts."""
    found = {
        float(entry["step"]): float(entry[key])
        for entry in log
        if isinstance(entry.get(key), int | float) and np.isfinite(entry[key])
    }
    steps = sorted(found)
    return steps, [found[step] for step in steps]
