"""Several teachers as one, as data: each scores into the store by itself, their scores are combined when read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rankdistill.artifacts import fingerprint
from rankdistill.errors import UsageError
from rankdistill.recipe import build
from rankdistill.scores.calibration import Calibrator, Method
from rankdistill.scores.ensemble import Aggregation, Ensemble, Missing, Normalisation, ScoreSource
from rankdistill.teachers.base import Teacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection


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
        """Whether the members' calibrations must be fitted first (see teachers/calibrating.py)."""
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
                fix="run it as a recipe's teacher, or call calibrate_ensemble first",
            )
