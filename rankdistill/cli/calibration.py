"""`rankdistill score ... --calibrate`: how well a teacher's scores say what is relevant, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankdistill.errors import RankdistillError

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.calibration import Calibration
    from rankdistill.scores.store import TeacherScores


def calibrate_scores(
    scores: TeacherScores, collection: Collection, method: Any, out: Path | None = None
) -> Calibration:
    """Fit a teacher's scores in the store to the labels of the training queries, and print error and tables.

    Dev queries are left out, also those that are held out of the train split; `out` gets calibrated probabilities of
    all scores of the folder.

    Raises:
        RankdistillError: no train split, or no labelled pair among the scores.
    """
    from rankdistill.scores.calibration import calibrate

    if "train" not in collection.splits:
        raise RankdistillError(
            "calibration needs labels of training queries, and there is no train split",
            where=collection.spec,
            fix="leave --calibrate out; labels of dev and test stay for measuring",
        )
    judged = collection.qrels("train")
    training, _ = collection.training_splits()
    qrels = {query_id: judged[query_id] for query_id in training if query_id in judged}
    found = calibrate(scores, qrels, scores.score_kind, method)
    print(found)
    if out is not None:
        scores.export(out, found.calibrator)
    return found
