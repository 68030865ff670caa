"""Hybrid rows of an evaluation: what fusion makes of systems that have rows of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankdistill.errors import UsageError
from rankdistill.evaluation.evaluate import EngineSystem
from rankdistill.evaluation.fusion import FusedEngine
from rankdistill.evaluation.suites import FusedRow
from rankdistill.progress import warn
from rankdistill.recipe import nearest

# What a suite may call a row whose name depends on the recipe; a run need not have it.
ALIASES = ("bm25", "student", "untrained", "first_stage")


def _fused(members: Mapping[str, EngineSystem], row: FusedRow) -> EngineSystem:
    """Engines that rows of their own are measured with, as one."""
    engines: dict[str, Any] = {name: system.engine for name, system in members.items()}
    engine = FusedEngine(engines, row, row.depth)
    sizes = [system.bytes for system in members.values() if system.bytes is not None]
    note = engine.name + (f"; the first {row.depth} of each" if row.depth else "")
    note += "; the weights are the suite's, nothing was fitted here" if row.weights else ""
    return EngineSystem(engine, sum(sizes) if len(sizes) == len(members) else None, note)


def fused_rows(
    fusion: list[FusedRow], rows: Mapping[str, Any], open_run: Callable[[Path], EngineSystem]
) -> dict[str, EngineSystem]:
    """A suite's fused rows. One whose `bm25`, `student` ... the table has no row for is left out, with a warning.

    Args:
        rows: row → system.
        open_run: the student of another run's folder, over the same collection.

    Raises:
        UsageError: a member that is neither a row nor a run, is no search, or is meant twice; a name that is taken.
    """
    fused: dict[str, EngineSystem] = {}
    for row in fusion:
        where = f"fusion: {row.name}"
        if row.name in rows:
            raise UsageError("there is a row of this name", where=where, fix="another name")
        meant = {member: _row_of(member, rows, where) for member in row.members}
        known = {member: name for member, name in meant.items() if name is not None}
        if lacking := ", ".join(meant.keys() - known.keys()):
            warn(f"{row.name} is left out: this table has no row for {lacking}")
            continue
        if len(set(known.values())) < len(known):
            raise UsageError("two members are the same row", where=where, fix="a weight for one of them")
        members = {name: rows[name] if name in rows else open_run(Path(member)) for member, name in known.items()}
        for name, system in members.items():
            if not isinstance(system, EngineSystem):
                raise UsageError(f"the row {name!r} is no search", where=where, fix="fuse what it re-ranks")
        fused[row.name] = _fused(members, row)
    return fused


def _row_of(member: str, rows: Mapping[str, Any], where: str) -> str | None:
    """The row that a suite means, or the folder of a run; None for an alias that the table has no row for."""
    meant = {
        "bm25": ["BM25"],
        "student": ["student", "student, distilled"],
        "first_stage": [row for row in rows if row.startswith("first stage: ")],
    }.get(member, [member, f"student, {member}"])
    for row in (member, *meant):
        if row in rows:
            return row
    if member in ALIASES:
        return None
    if Path(member).is_dir():
        return member
    known = nearest(member, [*rows, *ALIASES])
    raise UsageError(f"{member!r} is neither a row of this table nor the folder of a run", where=where, fix=known)
