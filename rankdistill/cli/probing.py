"""`score --probe`: what teachers are worth on labelled training queries, before a long scoring is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankdistill.artifacts import open_artifact
from rankdistill.errors import UsageError

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.store import ScoreStore


def probe_teachers(
    settings: Sequence[str],
    budget: str | None,
    collection: Collection,
    candidates: Path,
    count: int,
    store: ScoreStore,
) -> None:
    """Print the teachers, best first, and what is to be said against them.

    Raises:
        UsageError: the candidates have their positives first, so that their order is no first stage's.
    """
    from rankdistill.cli.spending import limited
    from rankdistill.progress import warn
    from rankdistill.recipe import build
    from rankdistill.runs import iter_run
    from rankdistill.teachers.probe import named, probe

    file = candidates
    if candidates.is_dir():
        artifact = open_artifact(candidates, "candidates")
        if artifact.manifest["settings"].get("include_positives"):
            raise UsageError(
                "these candidates have the labelled positives first: their order is not that of a first stage",
                where=str(candidates),
                fix="`rankdistill mine ... --no-positives` for the probe, or a run file",
            )
        file = candidates / "candidates.parquet"
    teachers = named(limited(build("teacher", text, "--teacher"), budget) for text in settings)
    found = probe(teachers, collection, iter_run(file), count, store)
    for one in found:
        print(one)
    for one in found:
        if one.verdict:
            warn(one.verdict)
