"""Hybrid rows of an evaluation: what fusion makes of systems that have rows of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankdistill.errors import UsageError
from rankdistill.evaluation.cost import Step, model_bytes, model_parameters
from rankdistill.evaluation.evaluate import EngineSystem
from rankdistill.evaluation.fusion import FusedEngine, Fusion
from rankdistill.evaluation.suites import FusedRow
from rankdistill.progress import warn
from rankdistill.recipe import nearest

# What a suite may call a row whose name depends on the recipe; a run need not have it.
ALIASES = ("bm25", "student", "untrained", "first_stage")


class FusedSystem(EngineSystem):
    """A row of an evaluation: engines that rows of their own are measured with, fused.

    Args:
        members: row → system.
        depth: documents of each that are fused; as many as are asked for unless given.
    """

    def __init__(self, members: Mapping[str, EngineSystem], fusion: Fusion, depth: int | None = None) -> None:
        engines: dict[str, Any] = {name: system.engine for name, system in members.items()}
        engine = FusedEngine(engines, fusion, depth)
        sizes = [system.bytes for system in members.values()]
        size = None if None in sizes else sum(one for one in sizes if one is not None)
        note = engine.name + (f"; the first {depth} of each" if depth else "")
        note += "; the weights are the suite's, nothing was fitted here" if fusion.weights else ""
        super().__init__(engine, size, note)
        self.fused = engine
        counts = [count for encoder in engine.encoders if (count := model_parameters(encoder)) is not None]
        self.parameters = sum(counts) if counts else None

    def steps(self, depth: int) -> dict[str, Step]:
        return self.fused.steps(depth)

    @property
    def memory_bytes(self) -> int | None:
        return None if self.bytes is None else self.bytes + sum(map(model_bytes, self.fused.encoders))

    @property
    def device(self) -> Any:
        devices = [encoder.device for encoder in self.fused.encoders if hasattr(encoder, "device")]
        return next((one for one in devices if str(one) != "cpu"), "cpu")


def fused_rows(
    fusion: list[FusedRow], rows: Mapping[str, Any], open_run: Callable[[Path], EngineSystem]
) -> dict[str, FusedSystem]:
    """A suite's fused rows. One whose `bm25`, `student` ... the table has no row for is left out, with a warning.

    Args:
        rows: row → system.
        open_run: the student of another run's folder, over the same collection.

    Raises:
        UsageError: a member that is neither a row nor a run, is no search, or is meant twice; a name that is taken.
    """
    made: dict[str, FusedSystem] = {}
    for one in fusion:
        where = f"fusion: {one.name}"
        if one.name in rows:
            raise UsageError("there is a row of this name", where=where, fix="another name")
        meant = {member: _row_of(member, rows, where) for member in one.members}
        found = {member: row for member, row in meant.items() if row is not None}
        if lacking := ", ".join(meant.keys() - found.keys()):
            warn(f"{one.name} is left out: this table has no row for {lacking}")
            continue
        if len(set(found.values())) < len(found):
            raise UsageError("two members are the same row", where=where, fix="a weight for one of them")
        members = {row: rows[row] if row in rows else open_run(Path(member)) for member, row in found.items()}
        for row, system in members.items():
            if not isinstance(system, EngineSystem):
                raise UsageError(f"the row {row!r} is no search", where=where, fix="fuse what it re-ranks")
        made[one.name] = FusedSystem(members, one, one.depth)
    return made


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
