"""Several teachers as one, as data: each scores into the store by itself, their scores are combined when read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.errors import UsageError
from rankdistill.progress import say
from rankdistill.recipe import build
from rankdistill.scores.calibration import Calibrator, Method, calibrate, calibrator_from
from rankdistill.scores.ensemble import Aggregation, Ensemble, Missing, Normalisation, ScoreSource
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import Candidates, Teacher, TextList
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection

FILE = "calibration.json"


@dataclass(eq=False)
class EnsembleTeacher:
    """A combination of teachers' scores; see scores/ensemble.py for the rules.

    Args:
        members: the teachers, each with its `type` and keys.
        normalisation: of each member's scores within a query; `calibrated`: each member's scores as probabilities of
            relevance, fitted on the labels of the training queries.
        aggregation: of the members' normalised scores of a document.
        weights: of the members, for the weighted mean.
        temperature: of the softmax normalisation.
        scale: the combined score is multiplied by this (a margin loss reads its size).
        missing: what happens to a document that a member has no score for.
        calibration: how `calibrated` scores are fitted: `platt` keeps each member's order, `isotonic` takes any rising
            shape and ties documents.
    """

    type = "ensemble"
    members: list[dict[str, Any]]
    normalisation: Normalisation = "z_score"
    aggregation: Aggregation = "mean"
    weights: list[float] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    scale: float = 1.0
    missing: Missing = "average"
    calibration: Method = "platt"

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError("an ensemble needs at least one member", where="teacher.members")
        self.teachers: list[Teacher] = [
            build("teacher", member, f"teacher.members.{number}") for number, member in enumerate(self.members)
        ]
        if any(isinstance(teacher, EnsembleTeacher) for teacher in self.teachers):
            raise UsageError("an ensemble within an ensemble", where="teacher.members", fix="list all members in one")
        self.calibrators: list[Calibrator] | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must come first."""
        return self.normalisation == "calibrated" and self.calibrators is None

    def fingerprint(self) -> str:
        self._refuse_uncalibrated()  # calibration decides the scores
        rules = [self.normalisation, self.aggregation, self.weights, self.temperature, self.scale, self.missing]
        maps = [asdict(calibrator) for calibrator in self.calibrators or ()]
        # Lists made of an ensemble hold its members' disagreement.
        return fingerprint([[teacher.fingerprint() for teacher in self.teachers], rules, maps, "disagreement"])

    def prepare(self, collection: Collection, folder: Path) -> None:
        """As `Teacher.prepare`, of each member."""
        for teacher in self.teachers:
            teacher.prepare(collection, folder)

    def calibrate(
        self,
        collection: Collection,
        candidates: Callable[[], Candidates],
        query_ids: Sequence[str],
        out: str | Path,
        store: ScoreStore | None = None,
        *,
        inputs: dict[str, str] | None = None,
        split: str = "train",
    ) -> None:
        """Fit each member's scores to the split's labels, once, as an artifact (kind "calibration": `calibration.json`
        holds each member's map and what was measured of it).

        Args:
            candidates: called once a member: the training candidates, of which it scores what the store lacks.
            query_ids: the training queries; labels of others are not read.
            inputs: the candidates' fingerprint.
        """
        settings = {
            "method": self.calibration,
            "members": [member.fingerprint() for member in self.teachers],
            "queries": fingerprint(list(query_ids)),
            "split": split,
        }
        inputs = {"collection": collection.fingerprint, **(inputs or {})}

        def make(writer: ArtifactWriter) -> None:
            judged = collection.qrels(split)
            qrels = {query_id: judged[query_id] for query_id in query_ids if query_id in judged}
            maps = []
            for member in self.teachers:
                scores = score_candidates(member, collection, candidates(), store)
                pairs = ((query_id, ids, scores.scores_of(query_id, ids)) for query_id, ids, _ in candidates())
                calibration = calibrate(pairs, qrels, member.score_kind, self.calibration)
                say(f"calibration of {member.type}: {str(calibration).splitlines()[1]}")
                maps.append({"teacher": member.type, **calibration.to_json()})
            (writer.path / FILE).write_text(json.dumps(maps, indent=2) + "\n", encoding="utf-8")
            writer.counts = {"teachers": len(maps), "pairs": sum(each["pairs"] for each in maps)}

        key = fingerprint(["calibration", settings, inputs])
        artifact = obtain(out, kind="calibration", fingerprint=key, settings=settings, inputs=inputs, make=make)
        values = json.loads((artifact.path / FILE).read_text(encoding="utf-8"))
        self.calibrators = [calibrator_from(each["calibrator"]) for each in values]

    def combine(self, scores: Sequence[ScoreSource]) -> Ensemble:
        """The members' scores, in the order of `teachers`, as one source."""
        self._refuse_uncalibrated()
        return Ensemble(
            scores,
            self.normalisation,
            self.aggregation,
            self.weights,
            self.temperature,
            self.missing,
            scale=self.scale,
            calibrators=self.calibrators,
            names=[f"{number} ({teacher.type})" for number, teacher in enumerate(self.teachers)],
        )

    def _refuse_uncalibrated(self) -> None:
        if self.needs_calibration:
            raise UsageError(
                "the members of this ensemble are not calibrated yet",
                where="teacher.normalisation: calibrated",
                fix="run it as a recipe's teacher, or call its `calibrate` first",
            )


def score_list(teacher: Teacher | EnsembleTeacher, item: TextList) -> np.ndarray:
    """Score one list now, past the store: float32 [len(item.doc_ids)], NaN where the teacher has no score."""
    if isinstance(teacher, EnsembleTeacher):
        source: ScoreSource = teacher.combine([_ListScores(member, item) for member in teacher.teachers])
    else:
        source = _ListScores(teacher, item)
    return source.scores_of(item.query_id, item.doc_ids)


class _ListScores:
    """A teacher's scores of one list, as the combination of several reads them."""

    def __init__(self, teacher: Teacher, item: TextList) -> None:
        self._scores: dict[str, float] = {}
        for _, doc_ids, scores in teacher.score([item]):
            self._scores.update(zip(doc_ids, scores.tolist(), strict=True))

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.array([self._scores.get(doc_id, np.nan) for doc_id in doc_ids], dtype=np.float32)
