"""Calibrating the members of an ensemble on the labels of the training queries, once, as an artifact.

Kind "calibration": `calibration.json` holds each member's map and what was measured of it. Of the training candidates
each member scores what the store lacks; labels of dev and test queries are never read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.progress import say
from rankdistill.scores.calibration import calibrate, calibrator_from
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.teachers.ensemble import EnsembleTeacher

FILE = "calibration.json"
Lists = Callable[[], Iterable[tuple[str, Sequence[str], np.ndarray]]]


def calibrate_ensemble(
    ensemble: EnsembleTeacher,
    collection: Collection,
    candidates: Lists,
    query_ids: Sequence[str],
    out: str | Path,
    store: ScoreStore | None = None,
    *,
    inputs: dict[str, str] | None = None,
    split: str = "train",
) -> None:
    """Fit each member's scores of the candidates to the split's labels; the ensemble can be used from then on.

    Args:
        candidates: called once a member: the training candidates, (query_id, doc_ids, _) a query.
        query_ids: the training queries; labels of others are not read.
        inputs: the candidates' fingerprint.
    """
    settings = {
        "method": ensemble.calibration,
        "members": [member.fingerprint() for member in ensemble.teachers],
        "queries": fingerprint(list(query_ids)),
        "split": split,
    }
    inputs = {"collection": collection.fingerprint, **(inputs or {})}

    def make(writer: ArtifactWriter) -> None:
        judged = collection.qrels(split)
        qrels = {query_id: judged[query_id] for query_id in query_ids if query_id in judged}
        maps = []
        for member in ensemble.teachers:
            scores = score_candidates(member, collection, candidates(), store)
            pairs = ((query_id, ids, scores.scores_of(query_id, ids)) for query_id, ids, _ in candidates())
            calibration = calibrate(pairs, qrels, member.score_kind, ensemble.calibration)
            say(f"calibration of {member.type}: {str(calibration).splitlines()[1]}")
            maps.append({"teacher": member.type, **calibration.to_json()})
        (writer.path / FILE).write_text(json.dumps(maps, indent=2) + "\n", encoding="utf-8")
        writer.counts = {"teachers": len(maps), "pairs": sum(each["pairs"] for each in maps)}

    key = fingerprint(["calibration", settings, inputs])
    artifact = obtain(out, kind="calibration", fingerprint=key, settings=settings, inputs=inputs, make=make)
    values = json.loads((artifact.path / FILE).read_text(encoding="utf-8"))
    ensemble.calibrators = [calibrator_from(each["calibrator"]) for each in values]
