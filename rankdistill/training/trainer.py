"""Training a student: a subclass of the transformers Trainer, its log, its dev metric, its checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as distributed
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from rankdistill.artifacts import (
    SCHEMAS,
    Artifact,
    ArtifactWriter,
    fingerprint,
    open_artifact,
    partial_folder,
    write_artifact,
)
from rankdistill.devices import place_training, resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.indexes.by_student import prepare_student
from rankdistill.indexes.vectors import VectorFolders
from rankdistill.losses.base import ListLoss, Loss, Regulariser, VectorLoss
from rankdistill.progress import Progress, launched, say, warn
from rankdistill.recipe import Recipe, Training, build
from rankdistill.runs import Run
from rankdistill.sampling.base import generator
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import Student, StudentModel, to_device
from rankdistill.students.dense import ALIGNED
from rankdistill.students.less_memory import StepAgain
from rankdistill.students.models import SETTINGS_FILE, resolve_model
from rankdistill.students.provenance import DECIDES_NOTHING, deciding, with_revisions
from rankdistill.students.sparse import SparseModel
from rankdistill.students.token_batches import autocast, resolve_precision
from rankdistill.training.batch_teacher import BatchTeacher
from rankdistill.training.batches import BatchStream, usable_lists, whole
from rankdistill.training.card import model_card
from rankdistill.training.checkpoints import SafeCheckpoints, last_checkpoint
from rankdistill.training.diagnostics import AGREEMENT, Agreement, last_alarm, teacher_judgments
from rankdistill.training.distiller import Distiller
from rankdistill.training.mixing import copy_of, mixes
from rankdistill.training.sparsity import SparsityWatch

if TYPE_CHECKING:
    from rankdistill.collections import Collection

LOG = "log.jsonl"
MODEL = "model"
BEST = "best"
MOST_OVERFLOWS = 5  # batches in a row, in fp16


@dataclass
class DevPool:
    """Dev queries and a pool of documents they are searched in: quick enough to ask several times in a training.

    The pool holds the dev queries' relevant documents and candidates, as far as its size allows, then random documents;
    a metric over it is not the metric over the collection and serves to compare checkpoints only.
    """

    query_ids: list[str]
    queries: list[str]
    doc_ids: list[str]
    documents: list[str]
    qrels: dict[str, dict[str, int]]
    metric: str
    rows: NDArray[np.int64]  # of the documents
    judge: str = "labels"

    @classmethod
    def build(
        cls,
        collection: Collection,
        split: str | ScoredLists,
        query_ids: Sequence[str],
        candidates: Sequence[Sequence[str]],
        size: int,
        seed: int,
        metric: str,
    ) -> DevPool:
        """A pool judged by a split's labels, or, where there are none, by the teacher's lists of dev queries."""
        judged = collection.qrels(split) if isinstance(split, str) else teacher_judgments(split, collection)
        qrels = {query_id: judged[query_id] for query_id in query_ids if query_id in judged}
        relevant = [[doc_id for doc_id, grade in judgments.items() if grade > 0] for judgments in qrels.values()]
        # The first of every query, then the second, so that a pool cut to size is as fair to each.
        turns = itertools.zip_longest(*relevant, *candidates)
        wanted = [doc_id for turn in turns for doc_id in turn if doc_id is not None]
        rows = collection.doc_rows(list(dict.fromkeys(wanted))[:size])
        if len(rows) < min(size, collection.document_count):
            more = generator(seed, 1).permutation(collection.document_count)
            rows = np.concatenate([rows, more[~np.isin(more, rows)][: size - len(rows)]])
        rows = np.sort(rows)
        kept = list(qrels)
        return cls(
            kept,
            collection.query_texts(kept),
            collection.doc_ids(rows),
            collection.document_texts(rows),
            qrels,
            metric,
            rows,
            "labels" if isinstance(split, str) else "the teacher's order",
        )

    def __str__(self) -> str:
        judged = "" if self.judge == "labels" else f", judged by {self.judge}"
        return f"{self.metric} over a pool of {len(self.doc_ids)} documents, {len(self.query_ids)} queries{judged}"

    def evaluate(self, student: StudentModel) -> float:
        scores = student.pool_similarities(self.queries, self.documents, self.rows)
        depth = min(100, scores.shape[1])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        run = Run(
            self.query_ids,
            np.arange(len(best) + 1) * depth,
            [self.doc_ids[column] for column in best.ravel()],
            np.take_along_axis(scores, best, axis=1).ravel(),
        )
        return float(evaluate_run(run, self.qrels, [self.metric]).means[self.metric])


@dataclass
class RerankPool(DevPool):
    """Dev queries with the first candidates of each, which a student that reads pairs re-ranks; no other is read."""

    pairs: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))  # [N, 2]: query, document

    @classmethod
    def over(
        cls,
        collection: Collection,
        split: str | ScoredLists,
        query_ids: Sequence[str],
        candidates: Sequence[Sequence[str]],
        depth: int,
        metric: str,
    ) -> RerankPool:
        """Judged as `build` has it; `depth` of each query's candidates are re-ranked."""
        judged = collection.qrels(split) if isinstance(split, str) else teacher_judgments(split, collection)
        firsts = {one: list(dict.fromkeys(ids))[:depth] for one, ids in zip(query_ids, candidates) if one in judged}
        kept = list(firsts)
        owners = np.repeat(np.arange(len(kept)), [len(ids) for ids in firsts.values()])
        found = collection.doc_rows(list(itertools.chain.from_iterable(firsts.values())))
        owners, found = owners[found >= 0], found[found >= 0]
        rows, column = np.unique(found, return_inverse=True)
        return cls(
            kept,
            collection.query_texts(kept),
            collection.doc_ids(rows),
            collection.document_texts(rows),
            {query_id: judged[query_id] for query_id in kept},
            metric,
            rows,
            "labels" if isinstance(split, str) else "the teacher's order",
            np.stack([owners, column.ravel()], axis=1),
        )

    def __str__(self) -> str:
        return super().__str__().replace("over a pool of", "of re-ranked candidates,")

    def evaluate(self, student: StudentModel) -> float:
        return self.measure(student.pair_scores(self.queries, self.documents, self.rows, self.pairs))

    def measure(self, scores: NDArray[Any]) -> float:
        """Of scores [N] of the pairs."""
        ranked: dict[str, dict[str, float]] = {query_id: {} for query_id in self.query_ids}
        for (query, document), score in zip(self.pairs.tolist(), scores.tolist(), strict=True):
            ranked[self.query_ids[query]][self.doc_ids[document]] = score
        return float(evaluate_run(Run.from_dict(ranked), self.qrels, [self.metric]).means[self.metric])


class StudentTrainer(StepAgain, SafeCheckpoints, Trainer):
    """Minimises a `Distiller` over a `BatchStream`; evaluates on a `DevPool` and keeps the best student.

    Agreement with the teacher is logged beside the dev metric, and chooses nothing.
    """

    def __init__(
        self,
        distiller: Distiller,
        stream: BatchStream,
        dev: DevPool | None,
        args: TrainingArguments,
        agreement: Agreement | None = None,
        watch: SparsityWatch | None = None,
    ) -> None:
        # The eval_dataset is only asked for by the base class: `evaluate` reads the dev pool.
        super().__init__(model=distiller, args=args, train_dataset=stream, eval_dataset=stream, data_collator=whole)
        self.dev, self.agreement, self.warned, self.checked = dev, agreement, False, False
        self.watch = watch
        self.overflows = 0  # batches in a row whose loss is not finite
        self.part_sums: dict[str, torch.Tensor] = {}  # on the device: a transfer a part would be a wait a part
        self.part_count = 0
        # Before this step.
        self.course: tuple[dict[nn.Module, dict[str, Any]], dict[str, torch.Tensor], int] = ({}, {}, 0)

    @property
    def student(self) -> StudentModel:
        distiller: Distiller = self.accelerator.unwrap_model(self.model)
        return distiller.student

    def create_optimizer(self, *model: Any) -> torch.optim.Optimizer:
        rates = self.student.learning_rates()
        return with_rates(super().create_optimizer(*model), rates)  # transformers 5.0 takes none

    def get_train_dataloader(self) -> DataLoader[Any]:
        stream: Any = self.train_dataset
        workers = self.args.dataloader_num_workers
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=1,
            collate_fn=whole,
            num_workers=workers,
            worker_init_fn=_tokenise_alone,
            multiprocessing_context="fork" if workers else None,  # they read what is open here, and touch no GPU
        )
        return self.accelerator.prepare(loader)

    def remember(self) -> None:
        distiller: Distiller = self.accelerator.unwrap_model(self.model)
        distiller.at_step(self.state.global_step, self.state.max_steps)
        self.course = (self._learned(), dict(self.part_sums), self.part_count)

    def restore(self) -> None:
        for module, known in self.course[0].items():
            module._buffers.update(known)
        self.part_sums, self.part_count = dict(self.course[1]), self.course[2]
        self.course = (self._learned(), *self.course[1:])  # those are in use now

    def _learned(self) -> dict[nn.Module, dict[str, torch.Tensor | None]]:
        """Copies of what losses and weighting keep of the course; some are not there before the first batch."""
        distiller: Distiller = self.accelerator.unwrap_model(self.model)
        parts = nn.ModuleList([distiller.losses, *([distiller.weighting] if distiller.weighting else [])])
        return {
            module: {name: None if one is None else one.clone() for name, one in module._buffers.items()}
            for part in parts
            for module in part.modules()
        }

    def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
        distiller: Distiller = self.accelerator.unwrap_model(self.model)
        distiller.use_less_memory(error, inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        distiller: Distiller = self.accelerator.unwrap_model(model)
        outputs = model(**inputs)
        if not self.checked:
            self.checked = True
            if self.state.global_step == 0:
                distiller.check_scale()
        loss, figures = outputs.pop("loss"), outputs.pop("figures")
        # fp16 may overflow in a batch, whose step the scaler then skips; a student that overflows always is lost.
        self.overflows = 0 if torch.isfinite(loss) else self.overflows + 1
        if self.overflows > (0 if self.accelerator.scaler is None else MOST_OVERFLOWS):
            raise RankdistillError(
                f"the loss is {loss.item()} at step {self.state.global_step}",
                fix="lower training.learning_rate, or set training.precision to bf16 or fp32",
            )
        for name, part in [*((f"loss/{name}", part) for name, part in outputs.items()), *figures.items()]:
            self.part_sums[name] = self.part_sums[name] + part if name in self.part_sums else part
        self.part_count += 1
        if self.watch is not None:
            self.watch.see(self.state.global_step, figures)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.part_count:
            sums = torch.stack([total.float() for total in self.part_sums.values()]).tolist()
            logs |= {name: total / self.part_count for name, total in zip(self.part_sums, sums, strict=True)}
            self.part_sums, self.part_count = {}, 0
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The dev metric; a student better than all before is kept in `best`."""
        metrics: dict[str, float] = {}
        if self.dev is not None and self.args.should_save and not self._evaluated():
            student = self.student
            value = self.dev.evaluate(student)
            metrics = {f"dev_{self.dev.metric}": value}
            if value > self.best_so_far():
                save_best(student, Path(self.args.output_dir) / BEST)
            if self.agreement is not None and math.isfinite(agreement := self.agreement.evaluate(student)):
                metrics[AGREEMENT] = agreement
            self.log(metrics)
            self._warn_of_hacking()
        # As the base class does; it takes the request to evaluate back, which else is served again at the end.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _warn_of_hacking(self) -> None:
        """Once a process: a person may want to stop here."""
        assert self.dev is not None
        alarm = None if self.warned else last_alarm(self.state.log_history, f"dev_{self.dev.metric}")
        if alarm is not None:
            warn(str(alarm))
            self.warned = True

    def _evaluated(self) -> bool:
        """Whether this step was evaluated before: a resumed run starts at one that was."""
        assert self.dev is not None
        key = f"dev_{self.dev.metric}"
        return any(key in entry and entry["step"] == self.state.global_step for entry in self.state.log_history)

    def best_so_far(self) -> float:
        key = f"dev_{self.dev.metric}" if self.dev is not None else ""
        return max((entry[key] for entry in self.state.log_history if key in entry), default=-math.inf)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return False  # `evaluate` keeps the best


def with_rates(optimizer: torch.optim.Optimizer, rates: dict[nn.Parameter, float]) -> torch.optim.Optimizer:
    """The optimiser with parameters that learn at rates of their own."""
    for group in list(optimizer.param_groups):
        for parameter in [one for one in group["params"] if one in rates]:
            group["params"] = [one for one in group["params"] if one is not parameter]
            optimizer.add_param_group({**group, "params": [parameter], "lr": rates[parameter]})
    return optimizer


def save_best(student: StudentModel, folder: Path) -> None:
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    student.save(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


class LogFile(TrainerCallback):
    """The training log as a plain file, one JSON object a line: step, loss, its parts, learning rate, dev metric."""

    def __init__(self, path: Path, total: int) -> None:
        self.path = path
        self.progress = Progress("train", total, "steps")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        lines = [json.dumps(entry) for entry in state.log_history]
        self.path.write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )  # what a resumed run goes on from
        self.progress.done = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(state.log_history[-1]) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = {key: value for entry in state.log_history[-4:] for key, value in entry.items()}
        note = ", ".join(f"{key} {shown[key]:.4f}" for key in shown if key == "loss" or key.startswith("dev_"))
        self.progress.advance(1, note)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.close()


def train_student(
    recipe: Recipe,
    lists: ScoredLists,
    collection: Collection,
    dev: DevPool | None,
    out: Path,
    *,
    name: str = "student",
    inputs: dict[str, str] | None = None,
    agreement: Agreement | None = None,
    prepared: Path | None = None,
    start: Path | None = None,
    encoded: VectorFolders | None = None,
) -> Artifact:
    """Train the recipe's student on scored lists and save the best checkpoint by the dev metric.

    Resumes an interrupted training from its last checkpoint, exactly. The artifact holds `model/` (loads in plain
    sentence-transformers, with a model card), `log.jsonl`, and the manifest: the dev curve, that of `agreement` (the
    teacher's lists of dev queries) where it is given, and `teacher_hacking` where the alarm rang.

    Args:
        prepared: folder for what is made once and serves several trainings (clusters of queries, a batch teacher's
            embeddings); beside `out` unless given.
        start: folder of the model to start from, which `inputs` names (a warmed-up one); else the settings make it.
        encoded: where vectors of the collection may lie already, and go.

    Raises:
        RankdistillError: no list has what the losses need, or the loss stops being a number.
    """
    settings = recipe.training
    losses = build_losses(settings)
    batch_teacher_settings = settings.batch_teacher.settings() if settings.batch_teacher else None
    check_lists(lists, losses, batch_teacher_settings is not None)
    weighting = build("weighting", settings.weighting.settings()) if settings.weighting else None
    if weighting is not None and weighting.needs_disagreement and lists.disagreement_of(0) is None:
        raise RankdistillError(
            f"the weighting {weighting.type} needs several teachers and these lists come from one",
            where="training.weighting",
            fix="a teacher of type ensemble, or another weighting",
        )
    values = training_fingerprint_values(recipe, {"lists": lists.fingerprint, **(inputs or {})})
    prepared = prepared or out.parent / "prepared"
    processes = launched()[1]
    device = resolve_device(recipe.student_device)
    if processes > 1:
        training_arguments(recipe, 1, out)  # this makes the group of processes
    with trained_together(out, fingerprint(values), values, inputs) as artifact:
        work = artifact.path
        set_seed(recipe.seed)
        maker: Student = build("student", recipe.student.settings(), "student")
        student = maker.create(device) if start is None else maker.open(start, device)
        if student.reads_pairs:
            check_pair_losses(losses)
        prepare_student(student, collection, prepared, encoded)
        prepare_regularisers(losses, student, collection, prepared)
        batch_teacher = None
        if batch_teacher_settings is not None:
            model = _batch_model(batch_teacher_settings, device)
            asking = [loss for loss in losses.values() if loss.needs_batch_teacher]
            read = any(not isinstance(loss, VectorLoss) or "document" in loss.sides for loss in asking)
            batch_teacher = BatchTeacher(model, collection, settings.batch_teacher_vectors, documents=read)
            batch_teacher.prepare(lists, prepared, encoded)
            for loss in asking:
                if isinstance(loss, VectorLoss):
                    loss.fit(student.dimension, model.dimension)
        documents = build("sampler", settings.lists.settings())
        members = usable_lists(lists, documents)
        batches = build("sampler", settings.batches.settings())
        batches.prepare(lists, members, collection, prepared)
        share = settings.accumulation * processes
        per_epoch = max(1, len(batches.epoch(len(members), recipe.seed, 0)))
        steps = settings.steps
        if steps is None:
            steps = max(1, math.ceil(settings.epochs * per_epoch / share))
        arguments = training_arguments(recipe, steps, work)
        stream = BatchStream(
            lists,
            collection,
            student,
            batches,
            documents,
            recipe.seed,
            steps * share,
            settings.token_budget,
            members,
            batch_teacher,
            settings.document_length,
        )
        distiller = Distiller(student, losses, weighting, batch_teacher, settings.gradient_cache, settings.token_budget)
        watch = SparsityWatch(losses.values(), steps, student.dimension) if student.sparse else None
        trainer = StudentTrainer(distiller, stream, dev, arguments, agreement, watch)
        trainer.remove_callback(_printer())
        if arguments.should_save:
            trainer.add_callback(LogFile(work / LOG, steps))
        origin = copy_of(student) if settings.average > 1 or settings.interpolate else None
        resume = last_checkpoint(work)
        if settings.fit_scale and resume is None:
            fit_scale(student.eval(), stream)
        if resume is not None:
            say(f"{name}: going on from {resume.name}")
        if steps:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        else:  # a warmed-up start, judged and published
            trainer.evaluate()
        if arguments.should_save:  # the first process writes
            if origin is not None:
                artifact.notes["mixes"] = _mix(trainer, settings, origin, work)
            _finish(trainer, recipe, artifact)
            artifact.counts = {"lists": len(members), "steps": steps, "documents_a_list": stream.documents.size}
            card = model_card(recipe, collection, artifact.counts, artifact.notes)
            (work / MODEL / "README.md").write_text(card, encoding="utf-8")
    return open_artifact(out, "student")


def _batch_model(settings: dict[str, Any], device: torch.device) -> StudentModel:
    """A batch teacher's model; a student of this program as its own run opens it."""
    maker: Student = build("student", settings, "training.batch_teacher")
    folder = resolve_model(settings["model"]).path
    return maker.open(folder, device) if (folder / SETTINGS_FILE).is_file() else maker.create(device)


def fit_scale(student: StudentModel, stream: BatchStream, batches: int = 2) -> None:
    """Set the student's factor on scores to what makes its margins those of the teacher, by least squares over the
    first batches: a loss on margins is about order from the first step then, and not about scale.

    Raises:
        UsageError: this student has no such factor.
    """
    scale = getattr(student, "scale", None)
    if not isinstance(scale, torch.nn.Parameter):
        raise UsageError("this student has no factor on its scores", where="training.fit_scale", fix="leave it out")
    products = squares = 0.0
    with torch.no_grad(), autocast(student.device, student.precision):
        for number in range(min(batches, len(stream))):
            batch = stream[number]
            queries = student.embed(to_device(batch["queries"], student.device), "query")
            parts = [student.embed(to_device(part, student.device), "document") for part in batch["documents"]]
            own = student.score_lists(queries.float(), student.join(parts).float(), batch["index"].to(student.device))
            mask = batch["mask"]
            x, y = (
                (scores - (scores * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True))[mask]
                for scores in (own.cpu().double(), batch["teacher_scores"].double())
            )
            products, squares = products + float(x @ y), squares + float(x @ x)
        if products <= 0:
            warn(f"the student orders documents against its teacher: its scale stays {scale.item():.3g}")
            return
        scale.mul_(products / squares)
    say(f"scale: {scale.item():.3g} makes the student's margins as wide as the teacher's")


def _mix(trainer: StudentTrainer, settings: Training, start: dict[str, torch.Tensor], work: Path) -> dict[str, float]:
    """Share of the trained weights → dev metric; the best is kept in `best` where it beats every checkpoint."""
    found: dict[str, float] = {}
    best = trainer.best_so_far()
    if trainer.dev is None and settings.interpolate:
        warn("there are no dev queries to choose a mix with the start by: the trained weights are kept")
    for share in mixes(trainer.student, start, work, settings.average, settings.interpolate if trainer.dev else []):
        if trainer.dev is not None:
            found[f"{share:g}"] = value = trainer.dev.evaluate(trainer.student)
            if value > best:
                best = value
                save_best(trainer.student, work / BEST)
    return found


def _finish(trainer: StudentTrainer, recipe: Recipe, artifact: ArtifactWriter) -> None:
    """The best student as `model/`, the notes of the manifest; leftovers of the training go."""
    student, dev, history = trainer.student, trainer.dev, trainer.state.log_history
    best, final = artifact.path / BEST, artifact.path / MODEL
    shutil.rmtree(final, ignore_errors=True)
    if dev is not None and best.is_dir():
        shutil.copytree(best, final)
    else:
        final.mkdir()
        student.save(final)
    artifact.notes |= {
        # The last one logged: the Trainer's own mean forgets the steps before a resumption.
        "loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "dev": curve(history, f"dev_{dev.metric}") if dev else {},
        "dev_metric": str(dev) if dev else None,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "precision": resolve_precision(student.device, recipe.training.precision),
        "recipe": deciding(recipe),
    }
    if trainer.agreement is not None and dev is not None:
        artifact.notes[AGREEMENT] = curve(history, AGREEMENT)
        alarm = last_alarm(history, f"dev_{dev.metric}")
        if alarm is not None:
            artifact.notes["teacher_hacking"] = alarm.to_json()
    artifact.device = str(student.device)
    for leftover in [best, *artifact.path.glob("checkpoint-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def trained_together(
    out: Path, print_: str, values: dict[str, Any], inputs: dict[str, str] | None
) -> Iterator[ArtifactWriter]:
    """The unfinished artifact that the first of the training's processes writes and publishes."""
    rank, processes = launched()
    if rank > 0:
        distributed.barrier()  # the first one has made the folder
        yield ArtifactWriter(partial_folder(out, print_))
        distributed.barrier()
        return
    with write_artifact(
        out, kind="student", fingerprint=print_, settings=values, inputs=inputs, resume=True
    ) as artifact:
        if processes > 1:
            distributed.barrier()
        yield artifact
    if processes > 1:
        distributed.barrier()


def build_losses(settings: Training) -> dict[str, Loss]:
    """name in the log → loss: its type (and side), numbered where it is there twice."""
    losses: dict[str, Loss] = {}
    for number, method in enumerate(settings.losses):
        loss: Loss = build("loss", method.settings())
        name = str(loss.type)  # the class's: a place (my_package.losses:MyLoss) is no name of a module
        key = f"{name}_{loss.side}" if isinstance(loss, Regulariser) else name
        losses[key if key not in losses else f"{key}_{number}"] = loss
    return losses


def prepare_regularisers(losses: dict[str, Loss], student: StudentModel, collection: Collection, folder: Path) -> None:
    """Give the regularisers what they need of the collection.

    Raises:
        UsageError: the student has no term weights, or those of the side are a fixed table.
    """
    for name, loss in losses.items():
        if not isinstance(loss, Regulariser):
            continue
        if not isinstance(student, SparseModel):
            raise UsageError(
                f"{name} is a penalty on term weights, which this student has none of",
                where="training.losses",
                fix="student.type: splade or inference_free, or leave it out",
            )
        if loss.side == "query" and student.static is not None and not student.static.weight.requires_grad:
            raise UsageError(
                f"{name} would press on query weights that are a fixed table",
                where="training.losses",
                fix="leave it out, or student.train_idf: true",
            )
        if loss.needs_idf:
            loss.use_idf(torch.from_numpy(student.idf(collection, folder)))


def check_pair_losses(losses: dict[str, Loss]) -> None:
    """Refuse, for a student that reads pairs, what reads vectors or scores across lists.

    Raises:
        UsageError: naming the loss.
    """
    for name, loss in losses.items():
        if not isinstance(loss, ListLoss):
            raise UsageError(
                f"{name} reads vectors or a whole batch, and a cross_encoder student scores its lists' pairs alone",
                where="training.losses",
                fix="a loss over lists: margin_mse, kl, listnet, ranknet, lambda_loss, lce ...",
            )


def curve(history: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """step → value of a figure of the log."""
    return {entry["step"]: entry[key] for entry in history if key in entry}


def training_fingerprint_values(recipe: Recipe, inputs: dict[str, str]) -> dict[str, Any]:
    """What decides a trained student: the weights it starts from (not where they lie), its lists and its dev set."""
    student = recipe.student.settings()
    if recipe.student_kind in ALIGNED:
        student.pop("warm_up", None)  # the start it gives is among the inputs
    student.pop("document_vectors", None)  # where they lie; the document model decides what they are
    training = recipe.training.model_dump(mode="json", exclude=DECIDES_NOTHING)
    training["schedule"] = _schedule(recipe.training)
    training["precision"] = resolve_precision(resolve_device(recipe.student_device), recipe.training.precision)
    schema = {"schema": SCHEMAS["student"]} if "student" in SCHEMAS else {}
    return {
        **schema,
        "seed": recipe.seed,
        "student": with_revisions(student),
        "training": with_revisions(training),
        **inputs,
    }


def _schedule(settings: Training) -> str:
    """transformers' name; its `constant` begins at the full rate whatever `warmup` says."""
    return "constant_with_warmup" if settings.schedule == "constant" and settings.warmup else settings.schedule


def training_arguments(recipe: Recipe, steps: int, folder: Path) -> TrainingArguments:
    settings, device = recipe.training, resolve_device(recipe.student_device)
    precision = resolve_precision(device, settings.precision)
    every = max(1, steps // settings.checkpoints)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the stream is a batch
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_schedule(settings),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        logging_steps=settings.log_every,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=max(2, settings.average),
        eval_on_start=True,
        dataloader_num_workers=settings.loader_processes,
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        report_to=_reporters() if launched()[0] == 0 else [],
        ddp_backend="gloo" if device.type == "cpu" and launched()[1] > 1 else None,
        ddp_find_unused_parameters=True,  # encoders carry heads that no loss reads
        disable_tqdm=True,
        seed=recipe.seed,
    )
    place_training(arguments, device)
    return arguments


def _tokenise_alone(_: int) -> None:
    """In a loader's process: the tokenizers' threads are not there after a fork, and it would wait for them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _reporters() -> list[str]:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return []
    return ["tensorboard"]


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def check_lists(lists: ScoredLists, losses: dict[str, Loss], batch_teacher: bool = False) -> None:
    """One look at the lists before anything is paid for.

    Raises:
        RankdistillError: there are none, or a loss needs labels and no list has a labelled positive first.
        UsageError: a loss needs a batch teacher and the recipe names none, or names one that no loss reads.
    """
    asking = [name for name, loss in losses.items() if loss.needs_batch_teacher]
    if asking and not batch_teacher:
        raise UsageError(
            f"the loss {asking[0]} compares with a teacher that scores the whole batch, and the recipe names none",
            where="training.losses",
            fix="training.batch_teacher: {type: dense, model: NAME} (or type: multi_vector)",
        )
    if batch_teacher and not asking:
        raise UsageError(
            "no loss reads the batch teacher",
            where="training.batch_teacher",
            fix="leave it out, or add a loss over the whole batch to training.losses",
        )
    if len(lists) == 0:
        raise RankdistillError(
            "there is no scored list to train on", fix="mine and score candidates for queries of the training split"
        )
    needing = [name for name, loss in losses.items() if loss.needs_labels]
    sample = range(0, len(lists), max(1, len(lists) // 1000))
    labelled = sum(bool((lists[number].relevance > 0).any()) for number in sample)
    if needing and labelled == 0:
        raise RankdistillError(
            f"the loss {needing[0]} needs a labelled positive in each list and no list has one",
            where="training.losses",
            fix="set candidates.include_positives: true, or a loss that needs none (margin_mse with pairs: all_pairs)",
        )
