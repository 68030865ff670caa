"""Fusion: one ranking made of several (dense, sparse, BM25), for runs made anywhere and for engines that search live.

The formulas are those of ranx (tests hold them against it), in a few lines of numpy because ranx compiles for 27 s in a
fresh environment and 6 s in every other. Departures, each where a document that a member lacks would be treated better
than one it found, or no worse:

- min-max of scores that are all equal is 1 (ranx: 0, as if the member had not found them);
- under z-scores, and raw scores below 0, a lacking document gets the member's lowest value (ranx: 0, a z-score's mean).

Ranks are those of a member's own order, in which ties are decided by row (engines) or as trec_eval does (runs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rankdistill.artifacts import fingerprint
from rankdistill.errors import UsageError
from rankdistill.evaluation.cost import Step
from rankdistill.indexes.base import Engine, Hits, ranked
from rankdistill.plain import Section
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
        if self.weights is not None and not (
            all(0 <= weight < float("inf") for weight in self.weights) and any(self.weights)
        ):
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
        weights = self._weights(len(members))
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

    def _weights(self, members: int) -> list[float]:
        if self.weights is not None and len(self.weights) != members:
            raise UsageError(f"{len(self.weights)} weights for {members} rankings", where="weights", fix="one for each")
        return self.weights or [1.0] * members


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
    given = {"method": method, "weights": None if weights is None else list(weights)}
    fusion = checked(
        given | ({} if k is None else {"k": k}) | ({"normalisation": normalisation} if normalisation else {})
    )
    if not runs:
        raise UsageError("there is nothing to fuse", fix="give at least one run")
    opened = [one if isinstance(one, Run) else read_run(one) for one in runs]
    opened = opened if depth is None else [one.first(depth) for one in opened]
    where = [{query: row for row, query in enumerate(one.query_ids)} for one in opened]
    query_ids = list(dict.fromkeys(query for one in opened for query in one.query_ids))
    doc_ids: list[str] = []
    scores: list[NDArray[np.float32]] = []
    for query in query_ids:
        codes: dict[str, int] = {}
        members = []
        for one, rows in zip(opened, where, strict=True):
            row = rows.get(query)
            start, end = (one.offsets[row], one.offsets[row + 1]) if row is not None else (0, 0)
            ids = one.doc_ids[start:end].to_pylist()
            found = np.fromiter((codes.setdefault(doc_id, len(codes)) for doc_id in ids), np.int64, len(ids))
            members.append((found, one.scores[start:end]))
        documents, fused = fusion.scores(members)
        known = list(codes)
        doc_ids += [known[document] for document in documents]
        scores.append(fused)
    offsets = np.cumsum([0, *map(len, scores)])
    result = Run(query_ids, offsets, doc_ids, np.concatenate([*scores, np.empty(0, np.float32)]), name)
    return result if depth is None else result.first(depth)


def checked(settings: Mapping[str, Any]) -> Fusion:
    """`Fusion` from keys.

    Raises:
        UsageError: an unknown key or a wrong value.
    """
    from pydantic import ValidationError

    try:
        return Fusion.model_validate(dict(settings))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "fusion"
        raise UsageError(problem["msg"].removeprefix("Value error, "), where=where) from None


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
        made: Any = None
        for step in self.steps(k).values():
            made = step(queries, made)
        found: list[Hits] = made
        return found

    def steps(self, k: int) -> dict[str, Step]:
        """For `measure_costs`: `encode` where a member encodes, `search`, `fuse`."""
        depth = self.depth or k

        def encode(texts: Sequence[str], _: Any) -> dict[int, Any]:
            return {id(encoder): encoder.encode_queries(texts) for encoder in self.encoders}

        def search(texts: Sequence[str], vectors: Any) -> list[Any]:
            found = []
            for member in self.members.values():
                parts = _parts(member)
                found.append(
                    member.search(texts, depth) if parts is None else parts[1].search(vectors[id(parts[0])], depth)
                )
            return found

        def fuse_hits(_: Sequence[str], found: list[Any]) -> list[Hits]:
            return [
                ranked(*self.fusion.scores([(hits.rows, hits.scores) for hits in of_query]), k)
                for of_query in zip(*found, strict=True)
            ]

        steps: dict[str, Step] = {"search": search, "fuse": fuse_hits}
        return {"encode": encode, **steps} if self.encoders else steps

    @property
    def encoders(self) -> list[Any]:
        """Of the members, each once."""
        found = [parts[0] for member in self.members.values() if (parts := _parts(member)) is not None]
        return list({id(encoder): encoder for encoder in found}.values())


def _parts(engine: Any) -> tuple[Any, Any] | None:
    """An engine's encoder and index, where it tells them apart (as `cost.engine_steps`)."""
    encoder, index = getattr(engine, "encoder", None), getattr(engine, "index", None)
    return None if encoder is None or index is None else (encoder, index)
