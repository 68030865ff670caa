"""What a student was trained under, so that it is not shown as another recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankdistill.artifacts import Artifact, file_digest
from rankdistill.errors import RankdistillError
from rankdistill.recipe import Recipe, code_of
from rankdistill.students.models import resolve_model

MODELS = ("model", "document_model", "query_model")
FILES = ("file", "idf", "orders", "unlabelled", "examples")
# Where and how fast something is computed, and how it is told; the student is the same.
DECIDES_NOTHING = {"device", "log_every", "loader_processes", "agreement_queries"}
ELSEWHERE = DECIDES_NOTHING | {
    "base_url", "concurrency", "timeout", "retries", "backoff", "budget", "prices", "queries_at_once", "batch_size",
    "token_budget", "api_key_env", "document_vectors",
}  # fmt: skip


def with_revisions(values: Any, *, strict: bool = True) -> Any:
    """Settings with every model below them replaced by the digest of its files (None where it is not there, unless that
    is an error, `strict`), and every file by that of its bytes; beside the type of a method of another package stands
    the digest of the file that the method is written in."""
    if isinstance(values, Mapping):
        named = {key: _revision(key, value, strict) for key, value in values.items()}
        code = code_of(named["type"]) if isinstance(named.get("type"), str) else None
        return {**named, "code": file_digest(code)} if code else named
    return [with_revisions(value, strict=strict) for value in values] if isinstance(values, list) else values


def _revision(key: str, value: Any, strict: bool) -> Any:
    if not isinstance(value, str) or not value:
        return with_revisions(value, strict=strict)
    if key in MODELS:
        try:
            return resolve_model(value).revision
        except RankdistillError:
            if strict:
                raise
            return None
    if key in FILES and Path(value).expanduser().is_file():
        return file_digest(Path(value).expanduser())
    return value


def deciding(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides its student: no paths, but digests of what lies there (None where nothing does)."""
    values = recipe.resolved()
    sections = {key: _kept(values[key]) for key in ("seed", "generate", "candidates", "teacher", "student", "training")}
    return dict(with_revisions(sections, strict=False))


def _kept(values: Any) -> Any:
    """Without what is ELSEWHERE; a path that leads to no file any more is None, and not compared."""
    if isinstance(values, Mapping):
        kept = {key: value for key, value in values.items() if key not in ELSEWHERE}
        return {key: None if key in FILES and _is_gone(value) else _kept(value) for key, value in kept.items()}
    return [_kept(value) for value in values] if isinstance(values, list) else values


def _is_gone(path: Any) -> bool:
    return isinstance(path, str) and "/" in path and not Path(path).expanduser().is_file()


def check_student(artifact: Artifact, recipe: Recipe, run: Path) -> None:
    """Refuse a trained student that another recipe made than the one of its run."""
    trained_under = artifact.manifest.get("recipe")
    changed = _difference(trained_under, deciding(recipe)) if trained_under is not None else None
    if changed is not None:
        where, before, now = changed
        raise RankdistillError(
            f"trained under other settings than the run's recipe has: {where} was {before}, it is {now}",
            where=str(artifact.path),
            fix=f"rankdistill run {run / 'recipe.yaml'} --out {run} trains it anew; or run with the old settings",
        )


def _difference(before: Any, now: Any, way: str = "") -> tuple[str, Any, Any] | None:
    """The first key that both have with another value. None is a model or file that was not there to be looked at."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [(key, before[key], now[key]) for key in before if key in now]  # another version may have more
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(before, now, strict=True))]
    else:
        unknown = way.rpartition(".")[2] in (*MODELS, *FILES) and None in (before, now)
        return None if before == now or unknown else (way, before, now)
    below = (_difference(old, new, f"{way}.{key}" if way else str(key)) for key, old, new in pairs)
    return next((difference for difference in below if difference), None)
