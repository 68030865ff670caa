"""Cross-encoder teachers: any sequence-classification ranker, or one fine-tuned from an encoder within the run.

How they score: `students/cross_encoder.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.cross_encoder import PairModel, open_cross_encoder
from rankdistill.students.loading import is_cross_encoder
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision, resolve_precision
from rankdistill.teachers.base import Candidates, Dev, PairTeacher
from rankdistill.teachers.cross_encoder_training import CrossEncoderTraining, fine_tune

if TYPE_CHECKING:
    from rankdistill.collections import Collection


class CrossEncoderTeacher(PairTeacher):
    """A cross-encoder that reads query and document together; its raw logit is the score.

    Pairs are cut exactly as `CrossEncoder.predict` cuts them (longest first, at `max_length`) as long as the query
    stays within `query_length`. A longer query is cut to `query_length` tokens before, so that room is left for the
    document; how many were cut is said once.

    Args:
        model: a cross-encoder's folder or hub name; with `train`, the encoder it is fine-tuned from.
        max_length: tokens a pair; the model's own limit by default.
        query_length: tokens a query; unlimited (the longest-first rule alone) by default.
        precision: auto, fp32, bf16 or fp16; auto is bf16 where the device's hardware has it.
        token_budget: padded tokens a batch; 2,048 on a CPU and 65,536 on a GPU by default.
        device: cpu, cuda, cuda:1 ...; a GPU if there is one by default.
        train: fine-tune first, see CrossEncoderTraining.
    """

    type = "cross_encoder"
    score_kind = "logit"

    def __init__(
        self,
        model: str,
        max_length: int | None = None,
        query_length: int | None = None,
        precision: Precision = "auto",
        token_budget: int | None = None,
        device: str | None = None,
        train: CrossEncoderTraining | None = None,
    ) -> None:
        self.model, self.max_length, self.query_length = model, max_length, query_length
        self.precision: Precision = precision
        self.token_budget, self.device = token_budget, device
        self.training = CrossEncoderTraining.model_validate(train) if train is not None else None
        self._folder: Path | None = None
        self._model: PairModel | None = None

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def needs_training(self) -> bool:
        return self.training is not None and self._folder is None

    @property
    def judged_depth(self) -> int:
        return self.training.dev_depth if self.training is not None and self.training.dev_queries else 0

    def training_inputs(self) -> dict[str, Any]:
        return {"model": resolve_model(self.model).revision}

    def use_trained(self, folder: Path) -> None:
        self._folder, self._model = Path(folder), None

    def _source(self) -> tuple[Path, str]:
        if self.needs_training:
            raise RankdistillError("this cross-encoder must be trained before it teaches", fix="call train() first")
        source = resolve_model(str(self._folder) if self._folder else self.model)
        return source.path, source.revision

    def fingerprint(self) -> str:
        return fingerprint({**self._settings(), "revision": self._source()[1]})

    def describe(self) -> dict[str, Any]:
        training = self.training.model_dump() if self.training else None
        return {**self._settings(), "model": self.model, "train": training}

    def _settings(self) -> dict[str, Any]:
        names = {name: getattr(self, name) for name in ("type", "max_length", "query_length")}
        return {**names, "precision": resolve_precision(resolve_device(self.device), self.precision)}

    def load(self) -> PairModel:
        """The model, loaded once."""
        if self._model is None:
            folder, _ = self._source()
            if not is_cross_encoder(folder):
                raise RankdistillError(
                    "this model is an encoder, not a cross-encoder: it has no scoring head",
                    where=str(folder),
                    fix="give `train` settings to fine-tune a cross-encoder from it, or use type: bi_encoder",
                )
            model = open_cross_encoder(folder, self.max_length, resolve_device(self.device))
            self._model = PairModel(
                model, self.precision, token_budget=self.token_budget, query_length=self.query_length
            ).freeze()
        return self._model

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] logits of pairs [N, 2]; see PairTeacher."""
        return self.load().score_pairs(queries, documents, pairs)

    def take_report(self) -> dict[str, Any]:
        """How many queries were cut."""
        return self._model.take_cut() if self._model is not None else {}

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        collection: Collection,
        candidates: Candidates,
        out: Path,
        seed: int,
        split: str = "train",
        dev: Dev | None = None,
    ) -> dict[str, Any]:
        """Fine-tune `model` on labels and mined negatives, and use the result from now on.

        Each of a query's positives makes a list of its own, with negatives from its candidates (those of a lower
        grade; their gain is in the target of `lce`), one from each depth. With `start: head` an ordinary CrossEncoder
        is saved; with `start: encoder` one that `CrossEncoder(out, trust_remote_code=True)` loads where this package
        is installed. Either has the identity as its activation, so that `predict` gives the raw logit. A killed
        training goes on from its last checkpoint, beside `out`.
        """
        if self.training is None:
            raise UsageError("this cross-encoder has no `train` settings", where="teacher.train")
        out = Path(out)
        work = out.with_name(f".{out.name}.training")
        report = fine_tune(
            resolve_model(self.model).path,
            self.training,
            collection,
            candidates,
            work,
            split,
            dev,
            seed=seed,
            max_length=self.max_length,
            device=resolve_device(self.device),
        )
        out.mkdir(parents=True, exist_ok=True)
        for item in sorted((work / "model").iterdir()):
            os.replace(item, out / item.name)
        shutil.rmtree(work)
        self.use_trained(out)
        return report
