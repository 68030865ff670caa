"""Fine-tuning a cross-encoder on labels and mined negatives; the checkpoint that ranks dev best is kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from sentence_transformers import CrossEncoder
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import TrainingArguments

from rankdistill.artifacts import write_atomically
from rankdistill.errors import RankdistillError
from rankdistill.losses.base import ListLoss
from rankdistill.losses.contrastive import LCE
from rankdistill.losses.divergence import ListNet
from rankdistill.losses.pairwise import LambdaLoss
from rankdistill.plain import Section
from rankdistill.progress import progress, say, warn
from rankdistill.sampling.base import generator
from rankdistill.students.base import set_dropout
from rankdistill.students.cross_encoder import PairModel, starting_cross_encoder
from rankdistill.students.token_batches import GradientCache, Precision, resolve_precision, training_attention
from rankdistill.teachers.base import Candidates, Dev
from rankdistill.training.dev import RerankPool
from rankdistill.training.loop import BEST, TrainingLoop, curve, loop_arguments

if TYPE_CHECKING:
    from rankdistill.collections import Collection

METRIC = "ndcg@10"
DEV = f"dev_{METRIC}"
AHEAD = 2  # batches that a loader may have read before a step begins


class CrossEncoderTraining(Section):
    """The keys of `teacher.train`."""

    start: Literal["encoder", "head"] = Field(
        "encoder",
        description="rank as the encoder does before the first step (see students/pair_encoder.py; an encoder that "
        "cannot be had that way falls back), or a new head on the first token, which starts at random",
    )
    loss: Literal["lce", "bce", "listnet", "lambda"] = Field(
        "lce",
        description="over a positive and its negatives: softmax cross-entropy to the labels' gains, binary "
        "cross-entropy (positives weighted by the number of negatives), ListNet, or LambdaLoss",
    )
    target_temperature: float = Field(
        0.2, gt=0, description="of listnet: the target is softmax(grade / this); at 1 a positive gets e times the rest"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training lists")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(1e-4, gt=0)
    head_learning_rate: float | None = Field(
        None, gt=0, description="of what is new (head, pooler, classifier); 10 times the encoder's by default"
    )
    gate_learning_rate: float = Field(1e-2, gt=0, description="of the gates between the sides, with start: encoder")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: int = Field(8, ge=1, description="lists a step: a positive and its negatives each")
    negatives: int = Field(3, ge=1, description="negatives a positive, one from each depth of the candidates")
    positives: int = Field(1, ge=1, description="labelled positives a query at most, each with its own negatives")
    refresh: bool = Field(
        False, description="halfway, score the candidates with the model as it is and draw negatives by its order"
    )
    negatives_below: float = Field(
        0.95, gt=0, le=1, description="at the refresh, only documents below this share of the positive's score"
    )
    queries: int | None = Field(None, ge=1, description="training queries at most, drawn by the seed")
    checkpoints: int = Field(
        4, ge=1, description="looks at dev, beside the one before the first step; the best is kept"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many looks at dev without a better one")
    dev_queries: int = Field(100, ge=0, description="dev queries that choose the checkpoint; 0 keeps the last one")
    dev_depth: int = Field(20, ge=2, description="of what the first source finds for them, as many are re-ranked")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="the encoder's own by default; 0 spares a CPU a third of each step"
    )
    max_length: int | None = Field(None, ge=8, description="tokens a pair in training; the teacher's own by default")
    precision: Precision = "auto"


class TrainingLists:
    """A list a positive: itself, and negatives of its query's candidates. Memory: ids of the candidates.

    What is drawn for a query depends on the seed and the query alone.

    Args:
        candidates: (query_id, doc_ids, _) a query.
    """

    def __init__(
        self,
        collection: Collection,
        candidates: Candidates,
        split: str,
        settings: CrossEncoderTraining,
        seed: int,
    ) -> None:
        self.collection, self.settings, self.seed = collection, settings, seed
        self.qrels = collection.qrels(split)
        self.candidates: dict[str, list[str]] = {}
        lists: list[tuple[int, str, str]] = []
        for query_id, doc_ids, _ in candidates:
            relevant = self._known(sorted(d for d, grade in self.qrels.get(query_id, {}).items() if grade > 0))
            self.candidates[query_id] = self._known(dict.fromkeys(doc_ids))
            mined = set(doc_ids)  # with max_positives the best ranked: labels of far ones are often noise
            relevant = [d for d in relevant if d in mined] or relevant
            place = self._hash(query_id)
            positives = [str(doc_id) for doc_id in np.random.default_rng(place).permutation(relevant)]
            positives = [doc_id for doc_id in positives if self._below(query_id, doc_id)][: settings.positives]
            lists += [(place, query_id, doc_id) for doc_id in positives]
        lists.sort()  # by the queries' own hashes: a random order that does not depend on that of the candidates
        if settings.queries is not None:
            allowed = set(list(dict.fromkeys(item[1] for item in lists))[: settings.queries])
            lists = [item for item in lists if item[1] in allowed]
        if not lists:
            raise RankdistillError(
                f"no query of split {split!r} has both a labelled positive and a candidate that is not one",
                fix="mine candidates for this split first, or choose another",
            )
        self.lists = [item[1:] for item in lists]
        self.candidates = {query_id: self.candidates[query_id] for query_id, _ in self.lists}

    def __len__(self) -> int:
        return len(self.lists)

    def _known(self, doc_ids: Iterable[str]) -> list[str]:
        """Those that the collection has."""
        doc_ids = list(doc_ids)
        return [d for d, row in zip(doc_ids, self.collection.doc_rows(doc_ids), strict=True) if row >= 0]

    def _hash(self, *parts: object) -> int:
        return int.from_bytes(hashlib.sha256("\0".join(map(str, (self.seed, *parts))).encode()).digest()[:8], "little")

    def grade(self, query_id: str, doc_id: str) -> int:
        return max(0, self.qrels.get(query_id, {}).get(doc_id, 0))

    def _below(self, query_id: str, positive: str) -> list[str]:
        """The candidates of a lower grade than the positive's, in order."""
        grade = self.grade(query_id, positive)
        return [doc_id for doc_id in self.candidates[query_id] if self.grade(query_id, doc_id) < grade]

    def draw(self, number: int, scores: dict[str, float] | None = None) -> list[str]:
        """The negatives of a list, one from each of so many equal parts of its candidates, best first.

        Args:
            scores: of the query's candidates and positives; given, they order the candidates, and none near the
                positive or above it is drawn: it may be relevant and unlabelled.
        """
        query_id, positive = self.lists[number]
        pool = self._below(query_id, positive)
        if scores is not None:
            best = scores[positive]
            most = best - (1 - self.settings.negatives_below) * abs(best)
            pool.sort(key=lambda doc_id: -scores[doc_id])
            count = min(self.settings.negatives, len(pool))
            pool = [doc_id for doc_id in pool if scores[doc_id] <= most] or pool[-count:]
        random = np.random.default_rng(self._hash(query_id, positive, scores is not None))
        parts = np.array_split(np.arange(len(pool)), min(self.settings.negatives, len(pool)))
        return [pool[random.choice(part)] for part in parts]


class Examples(torch.utils.data.Dataset[tuple[str, list[str], list[int]]]):
    """The lists of a whole training in order, as texts and grades; a place says which list and which negatives."""

    def __init__(self, lists: TrainingLists, count: int, refreshed_from: int | None) -> None:
        self.lists, self.count, self.refreshed_from = lists, count, refreshed_from
        self.negatives = [lists.draw(number) for number in range(len(lists))]
        self.refreshed: list[list[str]] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[str, list[str], list[int]]:
        epoch, at = divmod(place, len(self.lists))
        number = int(generator(self.lists.seed, epoch).permutation(len(self.lists))[at])
        query_id, positive = self.lists.lists[number]
        late = self.refreshed_from is not None and place >= self.refreshed_from and self.refreshed is not None
        doc_ids = [positive, *(self.refreshed if late and self.refreshed else self.negatives)[number]]
        collection = self.lists.collection
        texts = collection.document_texts(collection.doc_rows(doc_ids))
        return collection.query_texts([query_id])[0], texts, [self.lists.grade(query_id, doc_id) for doc_id in doc_ids]


class Listwise(nn.Module):
    """Model and loss: a batch of lists in, a number out.

    Args:
        model: the cross-encoder.
        settings: name the loss.
    """

    def __init__(self, model: CrossEncoder, settings: CrossEncoderTraining) -> None:
        super().__init__()
        self.model, self.settings, self.cache = model, settings, GradientCache()
        self.over_lists: ListLoss | None = {
            "lce": LCE(),
            "listnet": ListNet(),
            "lambda": LambdaLoss(gain="labels"),
        }.get(settings.loss)

    def collate(self, items: Sequence[tuple[str, list[str], list[int]]]) -> dict[str, Any]:
        """Features of all pairs, and `grades` int64 [lists, documents], -1 where a shorter list has ended."""
        features = self.model.preprocess([(query, text) for query, texts, _ in items for text in texts])
        width = max(len(grades) for _, _, grades in items)
        padded = [grades + [-1] * (width - len(grades)) for _, _, grades in items]
        return {"features": dict(features), "grades": torch.tensor(padded)}

    def forward(self, features: dict[str, Any], grades: Tensor) -> Tensor:
        def compute(part: dict[str, Any]) -> Tensor:
            with training_attention(part):
                scores: Tensor = self.model(dict(part))["scores"].reshape(-1)
            return scores

        logits = torch.cat(self.cache.run(compute, [features])).float()
        with torch.autocast(logits.device.type, enabled=False):
            return self.loss(logits.new_zeros(grades.shape).masked_scatter(grades >= 0, logits), grades)

    def loss(self, scores: Tensor, grades: Tensor) -> Tensor:
        """Of scores [lists, documents]."""
        mask, settings = grades >= 0, self.settings
        if self.over_lists is not None:
            targets = grades.float() / settings.target_temperature  # read by listnet
            return self.over_lists(scores, targets, grades, mask)
        weight = scores.new_tensor(float(settings.negatives))
        return binary_cross_entropy_with_logits(scores[mask], (grades[mask] > 0).float(), pos_weight=weight)

    def bounds(self, grades: Tensor) -> tuple[float, float | None]:
        """The loss of equal scores, and the least there is of these lists where it is not simply 0."""
        floor = None
        if self.settings.loss in ("lce", "listnet"):
            mask = grades >= 0
            best = (
                LCE.targets(grades, mask).log()
                if self.settings.loss == "lce"
                else (grades.float() / self.settings.target_temperature)
            )
            floor = float(self.loss(best.clamp(min=-1e4), grades))
        return float(self.loss(torch.zeros(grades.shape), grades)), floor


def dev_pool(collection: Collection, dev: Dev, queries: int, depth: int) -> RerankPool:
    """Candidates of so many labelled dev queries that a model re-ranks."""
    qrels = collection.qrels(dev.split)
    judged = [item for item in dev.candidates if any(grade > 0 for grade in qrels.get(item[0], {}).values())]
    some = judged[:: max(1, -(-len(judged) // queries))]  # spread evenly: files are often sorted by topic
    query_ids, lists = [query_id for query_id, _ in some], [doc_ids for _, doc_ids in some]
    return RerankPool(collection, dev.split, query_ids, lists, depth, METRIC)


class PairTrainer(TrainingLoop):
    """Minimises `Listwise`; judged by dev candidates that it re-ranks.

    Args:
        scoring_length: tokens a pair in the model that is kept.
        negatives: a file of those drawn anew, with which a resumed training goes on.
        refresh_at: the step at which they are drawn, by the model's own scores.
    """

    def __init__(
        self,
        learner: Listwise,
        args: TrainingArguments,
        examples: Examples,
        dev: RerankPool | None,
        scoring_length: int | None,
        negatives: Path,
        refresh_at: int | None,
    ) -> None:
        super().__init__(learner, args, examples, learner.collate, "training the cross-encoder")
        self.dev, self.settings = dev, learner.settings
        rate = self.settings.head_learning_rate or 10 * self.settings.learning_rate
        self.ranker = PairModel(learner.model, rates=(self.settings.gate_learning_rate, rate))
        self.metric = DEV if dev is not None else ""
        self.scoring_length, self.examples = scoring_length, examples
        self.negatives, self.refresh_at = negatives, refresh_at
        if negatives.is_file():
            examples.refreshed = json.loads(negatives.read_text(encoding="utf-8"))

    def rates(self) -> dict[nn.Parameter, float]:
        """What is new has further to go than an encoder that is nearly right."""
        return self.ranker.learning_rates()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        return model(**inputs)

    def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
        fix = "a smaller teacher.train.max_length, or teacher.train.precision: bf16"
        self.learner.cache.shrink(error, [inputs["features"]], self.ranker.model.device, fix)

    def judge(self) -> dict[str, float]:
        assert self.dev is not None
        return {DEV: self.dev.measure(self._pairs(self.dev.queries, self.dev.documents, self.dev.pairs))}

    def save_best(self, folder: Path) -> None:
        self.ranker.save(folder, self.scoring_length)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = super().evaluate()
        values, patience = list(self.looks().values()), self.settings.patience
        if patience and len(values) > patience and max(values[-patience:]) <= max(values[:-patience]):
            self.control.should_training_stop = True
        return metrics

    def remember(self) -> None:
        """Before a step: draw the negatives anew where it is the one."""
        if self.state.global_step == self.refresh_at and self.examples.refreshed is None:
            lists = self.examples.lists
            scores = self._scores(lists)
            self.examples.refreshed = [lists.draw(at, scores[query_id]) for at, (query_id, _) in enumerate(lists.lists)]
            write_atomically(self.negatives, json.dumps(self.examples.refreshed))

    def _scores(self, lists: TrainingLists) -> dict[str, dict[str, float]]:
        """query id → document id → score, of each query's candidates and positives."""
        documents = {query_id: dict.fromkeys(doc_ids) for query_id, doc_ids in lists.candidates.items()}
        for query_id, positive in lists.lists:
            documents[query_id][positive] = None
        scored: dict[str, dict[str, float]] = {query_id: {} for query_id in documents}
        ids, collection = list(documents), lists.collection
        with progress("scoring candidates for new negatives", len(ids), "queries") as bar:
            for start in range(0, len(ids), 64):
                block = ids[start : start + 64]
                pairs = [(at, doc_id) for at, query_id in enumerate(block) for doc_id in documents[query_id]]
                rows, places = np.unique(collection.doc_rows([doc_id for _, doc_id in pairs]), return_inverse=True)
                places = np.stack([[at for at, _ in pairs], places.ravel()], axis=1)
                scores = self._pairs(collection.query_texts(block), collection.document_texts(rows), places)
                for (at, doc_id), score in zip(pairs, scores.tolist(), strict=True):
                    scored[block[at]][doc_id] = score
                bar.advance(len(block))
        return scored

    def _pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """Scores of pairs; an error where one is no number: the training has diverged."""
        scores = self.ranker.score_pairs(queries, documents, pairs)
        if not np.isfinite(scores).all():
            raise diverged()
        return scores


def fine_tune(
    start: Path,
    settings: CrossEncoderTraining,
    collection: Collection,
    candidates: Candidates,
    work: Path,
    split: str,
    dev: Dev | None,
    *,
    seed: int,
    max_length: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """Train and save `work`/model; see CrossEncoderTeacher.train.

    Args:
        start: folder of the encoder.
        max_length: tokens a pair when it teaches.
    """
    started = time.monotonic()
    lists = TrainingLists(collection, candidates, split, settings, seed)
    steps = settings.steps or max(1, round(settings.epochs * -(-len(lists) // settings.batch_size)))
    halfway = steps // 2 if settings.refresh and steps > 2 * AHEAD else None
    refreshed_from = None if halfway is None else (halfway + AHEAD) * settings.batch_size
    examples = Examples(lists, steps * settings.batch_size, refreshed_from)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)  # a new head starts at random
    model = starting_cross_encoder(start, settings.start, settings.max_length or max_length, device)
    if settings.dropout is not None:
        set_dropout(model[0].model, settings.dropout)
    learner = Listwise(model, settings)
    judge = (
        dev_pool(collection, dev, settings.dev_queries, settings.dev_depth) if dev and settings.dev_queries else None
    )
    precision = resolve_precision(device, settings.precision)
    arguments = loop_arguments(
        work / "trainer",
        steps,
        device,
        precision,
        warmup=settings.warmup,
        checkpoints=settings.checkpoints,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        logging_steps=max(1, steps // 20),
        seed=seed,
    )
    trainer = PairTrainer(learner, arguments, examples, judge, max_length, work / "negatives.json", halfway)
    trainer.run()
    losses = list(curve(trainer.state.log_history, "loss").values())
    if not np.isfinite(losses).all() or any(not bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        raise diverged()
    best = work / "trainer" / BEST
    if judge is None or not best.is_dir():
        trainer.keep_best()
    shutil.rmtree(work / "model", ignore_errors=True)
    best.rename(work / "model")
    return {
        "queries": len(lists.candidates),
        "pairs": sum(1 + len(negatives) for negatives in examples.negatives),
        "steps": trainer.state.global_step,
        "precision": precision,
        **_course(learner, examples, losses, trainer.looks(), judge),
        "seconds": round(time.monotonic() - started, 1),
    }


def _course(
    learner: Listwise, examples: Examples, losses: list[float], looks: dict[int, float], judge: RerankPool | None
) -> dict[str, Any]:
    """What the training came to, said and returned."""
    shown = [examples[place][2] for place in range(min(1000, len(examples)))]
    width = max(map(len, shown))
    guess, floor = learner.bounds(torch.tensor([grades + [-1] * (width - len(grades)) for grades in shown]))
    report: dict[str, Any] = {"loss": losses[-1] if losses else None, "loss_of_guessing": round(guess, 4)}
    least = "" if floor is None else f", and the least there is {floor:.3f}"
    if floor is not None:
        report["least_loss"] = round(floor, 4)
    if losses:
        say(f"teach: loss {losses[0]:.3f} → {losses[-1]:.3f} (guessing gives {guess:.3f}{least})")
    if looks and judge is not None:
        best = max(looks, key=lambda step: looks[step])
        as_found = judge.measure(-np.arange(len(judge.pairs), dtype=float))  # in the candidates' own order
        report |= {"dev": looks, "dev_candidates": round(as_found, 4), "best_step": best}
        say(
            f"teach: {METRIC} over dev candidates {looks[min(looks)]:.3f} before, {looks[best]:.3f} at step {best}, "
            f"which is kept; in the candidates' own order {report['dev_candidates']:.3f}"
        )
        if best == min(looks):
            warn("training made this teacher no better: it ranks as it did before the first step")
    return report


def diverged() -> RankdistillError:
    return RankdistillError(
        "training the cross-encoder diverged (its loss or its weights are no numbers)",
        fix="lower teacher.train.learning_rate, or train with precision: fp32",
    )
