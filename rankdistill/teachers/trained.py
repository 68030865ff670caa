"""A teacher that is trained within a run, as an artifact: found again, or made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankdistill.artifacts import Artifact, ArtifactWriter, fingerprint, obtain
from rankdistill.devices import unplaced
from rankdistill.indexes.mining import FILE
from rankdistill.progress import say
from rankdistill.runs import iter_run
from rankdistill.teachers.base import Dev, Teacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def train_teacher(
    teacher: Teacher,
    settings: Mapping[str, Any],
    collection: Collection,
    candidates: Artifact,
    dev: tuple[Artifact, str] | None,
    path: Path,
    seed: int,
    split: str = "train",
) -> None:
    """Train it on the training candidates, judged by those of dev, and let it use the result; or what is there already.

    Args:
        settings: the recipe's, of this teacher.
        split: whose labels it is trained on.
        dev: what it is judged by, if anything: candidates of dev queries, and the split whose labels they have.
    """
    values = {**unplaced(settings), **teacher.training_inputs(), "seed": seed}
    inputs = {"candidates": candidates.fingerprint, **({"dev": dev[0].fingerprint} if dev else {})}

    def make(writer: ArtifactWriter) -> None:
        say(f"teach: training {settings['type']}")
        judged = Dev([(query_id, ids) for query_id, ids, _ in iter_run(dev[0].path / FILE)], dev[1]) if dev else None
        pairs = iter_run(candidates.path / FILE)
        writer.counts = teacher.train(collection, pairs, writer.path / "model", seed, split, judged)

    print_ = fingerprint([values, inputs])
    obtain(path, kind="teacher", fingerprint=print_, settings=values, inputs=inputs, make=make, resume=True)
    teacher.use_trained(path / "model")
