"""Fusion: one ranking made of several (dense, sparse, BM25), for runs made anywhere and for engines that search live.

The formulas are those of ranx (tests hold them against it), in a few lines of numpy because ranx compiles for 27 s in a
fresh environment and 6 s in every other. Departures, each where a document that a member lacks would be treated better
than one it found, or no worse:

- min-max of scores that are all equal is 1 (ranx: 0, as if the member had not found them);
- under z-scores, and raw scores below 0, a lacking document gets the member's lowest value (ranx: 0, a z-score's mean).

Ranks are those of a member's own order, in which ties are decided by row (engines) or as trec_eval does (runs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rankdistill.artifacts import fingerprint
from rankdistill.errors import UsageError
from rankdistill.evaluation.systems import EngineSystem, Step, encoder_and_index
from rankdistill.indexes.base import Engine, Hits, ranked
from rankdistill.plain import Section
from rankdistill.progress import warn
from rankdistill.recipe import check_values, nearest
from rankdistill.runs import Run, read_run


class Fusion(Section):
    """How rankings become one."""

    method: Literal["rrf", "weighted_sum"] = Field(
        "rrf",
        description="rrf: the sum of weight / (k + rank) (Cormack et al. 2009); weighted_sum: of weight × normalised"
        " score.",
    )
    k: float = Field(60, ge=0, description="rrf: how little the first ranks stand out.")
    normalisation: Literal["min_max", "z_score", "none"] = Field(
        "min_max", description="weighted_sum: of each member's scores, query by query."
    )
    weights: list[float] | None = Field(None, description="One a member, not negative; all 1 unless given.")

    @model_validator(mode="after")
    def _consistent(self) -> Fusion:
        unused = {"rrf": "normalisation", "weighted_sum": "k"}[self.method]
        if unused in self.model_fields_set:
            raise ValueError(f"{unused} has no meaning with method: {self.method}")
        weights = [1.0] if self.weights is None else self.weights
        if not (all(0 <= weight < float("inf") for weight in weights) and any(weights)):
            raise ValueError("weights are finite, not negative and not all 0")
        return self

    def describe(self, names: Sequence[str]) -> str:
        """Of what and how: for the notes below a table."""
        how = f"reciprocal rank fusion (k = {self.k:g})"
        if self.method == "weighted_sum":
            scores = {"min_max": "min-max scores", "z_score": "z-scores", "none": "scores as they are"}
            how = f"weighted sum of {scores[self.normalisation]}"
        weighted = f", weights {', '.join(f'{weight:g}' for weight in self.weights)}" if self.weights else ""
        return f"{how} of {', '.join(names)}{weighted}"

    def scores(self, members: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """One query's documents of all members, each once, and their fused scores (unordered).

        Args:
            members: (documents [n], scores [n]) of each, best first; documents as numbers, none twice in a member. A
                member may have none.
        """
        weights = self.weights or [1.0] * len(members)
        if len(weights) != len(members):
            what = f"{len(weights)} weights for {len(members)} rankings"
            raise UsageError(what, where="weights", fix="one for each")
        documents, places = np.unique(np.concatenate([found for found, _ in members]), return_inverse=True)
        total, start = np.zeros(len(documents)), 0
        for weight, (found, scores) in zip(weights, members, strict=True):
            if not len(found):
                continue
            values, lacking = self._values(np.asarray(scores, np.float64))
            part = np.full(len(documents), lacking)
            part[places[start : start + len(found)]] = values
            total += weight * part
            start += len(found)
        return documents, total.astype(np.float32)

    def _values(self, scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """What a member gives its documents, and those it lacks."""
        if self.method == "rrf":
            return 1 / (self.k + np.arange(1, len(scores) + 1)), 0.0
        if self.normalisation == "none":
            return scores, min(0.0, float(scores.min()))
        if self.normalisation == "min_max":
            span = scores.max() - scores.min()
            return ((scores - scores.min()) / span if span > 0 else np.ones(len(scores))), 0.0
        values = (scores - scores.mean()) / max(float(scores.std()), 1e-9)
        return values, float(values.min())


def fuse(
    runs: Sequence[Run | str | Path],
    method: Literal["rrf", "weighted_sum"] = "rrf",
    *,
    weights: Sequence[float] | None = None,
    k: float | None = None,
    normalisation: Literal["min_max", "z_score", "none"] | None = None,
    depth: int | None = None,
    name: str = "fused",
) -> Run:
    """Fuse runs, or run files, query by query.

    A query that a run lacks, or has no document for, is fused from the others.

    Args:
        method: `rrf`, the sum of weight / (k + rank), or `weighted_sum` of weight × normalised score.
        weights: one a run, not negative; all 1 unless given.
        k: of rrf; default 60.
        normalisation: of a weighted sum; default `min_max`.
        depth: documents of each run that are fused, and of the result; all unless given.

    Raises:
        UsageError: no run, a wrong weight, a setting that the method has not.
        RankdistillError: a run file cannot be read.
    """
    given = {"method": method, "weights": weights and list(weights), "k": k, "normalisation": normalisation}
    fusion = check_values(Fusion, {key: value for key, value in given.items() if value is not None}, "fusion")
    if not runs:
        raise UsageError("there is nothing to fuse", fix="give at least one run")
    opened = [run if isinstance(run, Run) else read_run(run) for run in runs]
    opened = opened if depth is None else [run.first(depth) for run in opened]
    query_ids = list(dict.fromkeys(query for run in opened for query in run.query_ids))
    doc_ids: list[str] = []
    scores: list[NDArray[np.float32]] = []
    for rankings in zip(*(run.for_queries(query_ids) for run in opened), strict=True):
        numbers: dict[str, int] = {}
        members = []
        for _, ids, member_scores in rankings:
            documents = np.fromiter((numbers.setdefault(doc_id, len(numbers)) for doc_id in ids), np.int64, len(ids))
            members.append((documents, member_scores))
        documents, fused = fusion.scores(members)
        known = list(numbers)
        doc_ids += [known[document] for document in documents]
        scores.append(fused)
    offsets = np.cumsum([0, *map(len, scores)])
    result = Run(query_ids, offsets, doc_ids, np.concatenate([*scores, np.empty(0, np.float32)]), name)
    return result if depth is None else result.first(depth)


@dataclass
class FusedEngine:
    """Engines over one collection that answer as one.

    Args:
        members: name → engine; one encoder of several members encodes a query once.
        depth: documents of each member that are fused; as many as are asked for unless given.
    """

    members: Mapping[str, Engine]
    fusion: Fusion = field(default_factory=Fusion)
    depth: int | None = None

    @property
    def name(self) -> str:
        return self.fusion.describe(list(self.members))

    @property
    def fingerprint(self) -> str:
        members = [member.fingerprint for member in self.members.values()]
        settings = self.fusion.model_dump(include=set(Fusion.model_fields))
        return fingerprint(["fusion", settings, self.depth, members])

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most `k` hits for each query; ties by row."""
        return self._fuse(self._search(queries, self._encode(queries), k), k)

    def steps(self, k: int) -> dict[str, Step]:
        """For `measure_costs`: `encode` where a member encodes, `search`, `fuse`."""
        steps: dict[str, Step] = {
            "encode": lambda texts, _: self._encode(texts),
            "search": lambda texts, vectors: self._search(texts, vectors, k),
            "fuse": lambda _, hits: self._fuse(hits, k),
        }
        return steps if self.encoders else {name: steps[name] for name in ("search", "fuse")}

    def _encode(self, texts: Sequence[str]) -> dict[int, Any]:
        return {id(encoder): encoder.encode_queries(texts) for encoder in self.encoders}

    def _search(self, texts: Sequence[str], vectors: Any, k: int) -> list[Any]:
        hits, depth = [], self.depth or k
        for member in self.members.values():
            parts = encoder_and_index(member)
            hits.append(member.search(texts, depth) if parts is None else parts[1].search(vectors[id(parts[0])], depth))
        return hits

    def _fuse(self, hits: list[Any], k: int) -> list[Hits]:
        return [
            ranked(*self.fusion.scores([(found.rows, found.scores) for found in of_query]), k)
            for of_query in zip(*hits, strict=True)
        ]

    @property
    def encoders(self) -> list[Any]:
        """Of the members, each once."""
        parts = [encoder_and_index(member) for member in self.members.values()]
        return list({id(part[0]): part[0] for part in parts if part is not None}.values())


# -- rows of a suite ---------------------------------------------------------------------------------------------------

# What a suite may call a row whose name depends on the recipe; a run need not have it.
ALIASES = ("bm25", "student", "untrained", "first_stage")


class FusedRow(Fusion):
    """A row made of others: their rankings fused."""

    name: str
    members: list[str] = Field(
        min_length=2,
        description="Rows of the table by their names or as bm25, student, untrained, first_stage (the first dense"
        " source), the name of a baseline or index; or the folder of another run, for its student.",
    )
    depth: int | None = Field(None, ge=1, description="Documents of each that are fused; default the suite's depth.")

    @model_validator(mode="after")
    def _fits(self) -> FusedRow:
        if len(set(self.members)) < len(self.members):
            raise ValueError("a member is named twice: give it a weight instead")
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.weights)} weights for {len(self.members)} members")
        return self

    def system(self, members: Mapping[str, EngineSystem]) -> EngineSystem:
        """The row, of those that it fuses."""
        engine = FusedEngine({name: system.engine for name, system in members.items()}, self, self.depth)
        sizes = [system.bytes for system in members.values() if system.bytes is not None]
        note = engine.name + (f"; the first {self.depth} of each" if self.depth else "")
        note += "; the weights are the suite's, nothing was fitted here" if self.weights else ""
        return EngineSystem(engine, sum(sizes) if len(sizes) == len(members) else None, note)


def fused_rows(
    fusion: list[FusedRow], rows: Mapping[str, Any], open_run: Callable[[Path], EngineSystem]
) -> dict[str, EngineSystem]:
    """A suite's fused rows. One whose `bm25`, `student` ... the table has no row for is left out, with a warning.

    `open_run` gives the student of another run's folder, over the same collection. UsageError: a member that is neither
    a row nor a run, is no search, or is meant twice; a name that is taken.
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
        fused[row.name] = row.system(members)
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
