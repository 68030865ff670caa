"""Training a student: its losses over its stream of batches, watched, judged on dev, and published as an artifact."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed
from torch import nn
from transformers import TrainingArguments, set_seed

from rankdistill.artifacts import (
    SCHEMAS,
    Artifact,
    ArtifactWriter,
    find_artifact,
    fingerprint,
    obtain,
    open_artifact,
    partial_folder,
)
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.by_student import prepare_student
from rankdistill.indexes.vectors import VectorFolders
from rankdistill.losses.base import ListLoss, Loss, Regulariser, VectorLoss
from rankdistill.losses.weighting.base import Weighting
from rankdistill.progress import launched, say, warn
from rankdistill.recipe import Recipe, Training, build
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import Student, StudentModel, to_device
from rankdistill.students.dense import ALIGNED
from rankdistill.students.models import SETTINGS_FILE, resolve_model
from rankdistill.students.provenance import DECIDES_NOTHING, deciding, with_revisions
from rankdistill.students.sparse import SparseModel
from rankdistill.students.token_batches import autocast, resolve_precision
from rankdistill.training.batch_teacher import BatchTeacher
from rankdistill.training.batches import BatchStream, usable_lists, whole
from rankdistill.training.card import model_card
from rankdistill.training.checkpoints import copy_of, last_checkpoint, mixes
from rankdistill.training.dev import AGREEMENT, Agreement, DevPool, last_alarm
from rankdistill.training.distiller import Distiller
from rankdistill.training.loop import BEST, TrainingLoop, curve, loop_arguments
from rankdistill.training.sparsity import SparsityWatch

if TYPE_CHECKING:
    from rankdistill.collections import Collection

MODEL = "model"
MOST_OVERFLOWS = 5  # batches in a row, in fp16


class StudentTrainer(TrainingLoop):
    """Minimises a `Distiller` over a `BatchStream`; keeps the student that is best on a `DevPool`.

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
        super().__init__(distiller, args, stream, whole, "train")
        self.dev, self.agreement, self.watch = dev, agreement, watch
        self.metric = f"dev_{dev.metric}" if dev is not None else ""
        self.warned = self.checked = False
        self.overflows = 0  # batches in a row whose loss is not finite
        self.part_sums: dict[str, torch.Tensor] = {}  # on the device: a transfer a part would be a wait a part
        self.part_count = 0
        self.course = self._course()  # before this step

    @property
    def student(self) -> StudentModel:
        student: StudentModel = self.learner.student
        return student

    def rates(self) -> dict[nn.Parameter, float]:
        return self.student.learning_rates()

    def remember(self) -> None:
        self.learner.at_step(self.state.global_step, self.state.max_steps)
        self.course = self._course()

    def restore(self) -> None:
        buffers, self.part_sums, self.part_count = self.course
        for module, known in buffers.items():
            module._buffers.update(known)
        self.course = self._course()  # those are in use now

    def _course(self) -> tuple[dict[nn.Module, dict[str, Any]], dict[str, torch.Tensor], int]:
        """Copies of what losses and weighting keep of the course (some is not there before the first batch), and of the
        log's sums."""
        parts = [part for part in (self.learner.losses, self.learner.weighting) if part is not None]
        copies = {
            module: {name: None if value is None else value.clone() for name, value in module._buffers.items()}
            for part in parts
            for module in part.modules()
        }
        return copies, dict(self.part_sums), self.part_count

    def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
        self.learner.use_less_memory(error, inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        if not self.checked:
            self.checked = True
            if self.state.global_step == 0:
                self.learner.check_scale()
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

    def judge(self) -> dict[str, float]:
        assert self.dev is not None
        metrics = {self.metric: self.dev.evaluate(self.student)}
        if self.agreement is not None and math.isfinite(agreement := self.agreement.evaluate(self.student)):
            metrics[AGREEMENT] = agreement
        return metrics

    def save_best(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.student.save(folder)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = super().evaluate()
        # Once a process: a person may want to stop here.
        alarm = last_alarm(self.state.log_history, self.metric) if metrics and not self.warned else None
        if alarm is not None:
            warn(str(alarm))
            self.warned = True
        return metrics


def train_student(
    recipe: Recipe,
    lists: ScoredLists,
    collection: Collection,
    dev: DevPool | None,
    out: Path,
    *,
    inputs: dict[str, str] | None = None,
    agreement: Agreement | None = None,
    prepared: Path | None = None,
) -> Artifact:
    """Train the recipe's student on scored lists and save the best checkpoint by the dev metric.

    What is there already is not trained again; an interrupted training goes on from its last checkpoint, exactly. The
    artifact holds `model/` (loads in plain sentence-transformers, with a model card), `log.jsonl`, and the manifest:
    the dev curve, that of `agreement` (the teacher's lists of dev queries), and `teacher_hacking` where it rang.

    Args:
        inputs: what else decides the student, beside the lists: its name → a fingerprint.
        prepared: folder for what is made once and serves several trainings (clusters of queries, a batch teacher's
            embeddings); beside `out` unless given.

    Raises:
        RankdistillError: no list has what the losses need, or the loss stops being a number.
    """
    losses_and_weighting(recipe.training, lists)  # refused before anything is paid for
    prepared = prepared or out.parent / "prepared"

    def make(writer: ArtifactWriter) -> None:
        fit_student(recipe, lists, collection, dev, writer, prepared, agreement=agreement)

    return obtain_student(out, recipe, {"lists": lists.fingerprint, **(inputs or {})}, make)


def obtain_student(
    out: Path, recipe: Recipe, inputs: dict[str, str], make: Callable[[ArtifactWriter], None]
) -> Artifact:
    """As `obtain`, of a training that several processes may share: the first of them writes and publishes."""
    values = training_fingerprint_values(recipe, inputs)
    print_ = fingerprint(values)
    rank, processes = launched()
    trained = False
    if processes > 1:
        training_arguments(recipe, 1, out)  # this makes the group of processes

    def together(writer: ArtifactWriter) -> None:
        nonlocal trained
        trained = True
        if processes > 1:
            distributed.barrier()  # the first one has made the folder ...
        make(writer)

    if rank == 0:
        obtain(out, kind="student", fingerprint=print_, settings=values, inputs=inputs, make=together, resume=True)
    elif find_artifact(out, "student", print_) is None:
        together(ArtifactWriter(partial_folder(out, print_)))
    if trained and processes > 1:
        distributed.barrier()  # ... and has published it
    return open_artifact(out, "student")


def fit_student(
    recipe: Recipe,
    lists: ScoredLists,
    collection: Collection,
    dev: DevPool | None,
    writer: ArtifactWriter,
    prepared: Path,
    *,
    agreement: Agreement | None = None,
    start: Path | None = None,
    encoded: VectorFolders | None = None,
) -> None:
    """What `train_student` does, into an artifact's unfinished folder.

    Args:
        start: folder of the warmed-up model to start from; the settings make it unless given.
        encoded: where vectors of the collection may lie already, and go.
    """
    settings, work = recipe.training, writer.path
    losses, weighting = losses_and_weighting(settings, lists)
    set_seed(recipe.seed)
    device = resolve_device(recipe.student_device)
    maker: Student = build("student", recipe.student.settings(), "student")
    student = maker.create(device) if start is None else maker.open(start, device)
    prepare_student(student, collection, prepared, encoded)
    prepare_losses(losses, student, collection, prepared)
    teacher = None
    if settings.batch_teacher is not None:
        teacher = _batch_teacher(settings, losses, student, collection)
        teacher.prepare(lists, prepared, encoded)
        for loss in losses.values():
            if isinstance(loss, VectorLoss):
                loss.fit(student.dimension, teacher.model.dimension)
    documents, batches = (build("sampler", method.settings()) for method in (settings.lists, settings.batches))
    members = usable_lists(lists, documents)
    batches.prepare(lists, members, collection, prepared)
    share = settings.accumulation * launched()[1]  # batches a step
    steps = settings.steps
    if steps is None:
        per_epoch = max(1, len(batches.epoch(len(members), recipe.seed, 0)))
        steps = max(1, math.ceil(settings.epochs * per_epoch / share))
    seed, length, budget = recipe.seed, steps * share, settings.token_budget
    stream = BatchStream(
        lists, collection, student, batches, documents, seed, length, budget, members, teacher, settings.document_length
    )
    distiller = Distiller(student, losses, weighting, teacher, settings.gradient_cache, budget)
    watch = SparsityWatch(losses.values(), steps, student.dimension) if student.sparse else None
    trainer = StudentTrainer(distiller, stream, dev, training_arguments(recipe, steps, work), agreement, watch)
    origin = copy_of(student) if settings.average > 1 or settings.interpolate else None
    if settings.fit_scale and last_checkpoint(work) is None:
        fit_scale(student.eval(), stream)
    if steps:
        trainer.run()
    else:  # a warmed-up start, judged and published
        trainer.evaluate()
    if trainer.args.should_save:  # the first process writes
        if origin is not None:
            writer.notes["mixes"] = _mix(trainer, settings, origin)
        _finish(trainer, recipe, writer)
        writer.counts = {"lists": len(members), "steps": steps, "documents_a_list": stream.documents.size}
        card = model_card(recipe, collection, writer.counts, writer.notes)
        (work / MODEL / "README.md").write_text(card, encoding="utf-8")


def _batch_teacher(
    settings: Training, losses: dict[str, Loss], student: StudentModel, collection: Collection
) -> BatchTeacher:
    """The model that scores whole batches; a student of this program as its own run opens it."""
    assert settings.batch_teacher is not None
    values = settings.batch_teacher.settings()
    maker: Student = build("student", values, "training.batch_teacher")
    folder = resolve_model(values["model"]).path
    trained_here = (folder / SETTINGS_FILE).is_file()
    model = maker.open(folder, student.device) if trained_here else maker.create(student.device)
    readers = [loss for loss in losses.values() if loss.needs_batch_teacher]
    documents = any(not isinstance(loss, VectorLoss) or "document" in loss.sides for loss in readers)
    return BatchTeacher(model, collection, settings.batch_teacher_vectors, documents=documents)


def fit_scale(student: StudentModel, stream: BatchStream, batches: int = 2) -> None:
    """Set the student's factor on scores to what makes its margins those of the teacher, by least squares over the
    first batches: a loss on margins is about order from the first step then, and not about scale."""
    scale = getattr(student, "scale", None)
    if not isinstance(scale, torch.nn.Parameter):
        raise UsageError("this student has no factor on its scores", where="training.fit_scale", fix="leave it out")
    products = squares = 0.0
    with torch.no_grad(), autocast(student.device, student.precision):
        for number in range(min(batches, len(stream))):
            batch = stream[number]
            queries = student.embed(to_device(batch["queries"], student.device), "query")
            parts = [student.embed(to_device(part, student.device), "document") for part in batch["documents"]]
            index = batch["index"].to(student.device)
            scored = student.score_lists(queries.float(), student.join(parts).float(), index)
            mask = batch["mask"]
            x, y = (
                (scores - (scores * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True))[mask]
                for scores in (scored.cpu().double(), batch["teacher_scores"].double())
            )
            products, squares = products + float(x @ y), squares + float(x @ x)
        if products <= 0:
            warn(f"the student orders documents against its teacher: its scale stays {scale.item():.3g}")
            return
        scale.mul_(products / squares)
    say(f"scale: {scale.item():.3g} makes the student's margins as wide as the teacher's")


def _mix(trainer: StudentTrainer, settings: Training, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of the trained weights → dev metric; the best is kept in `best` where it beats every checkpoint."""
    values: dict[str, float] = {}
    best = trainer.best_so_far()
    if trainer.dev is None and settings.interpolate:
        warn("there are no dev queries to choose a mix with the start by: the trained weights are kept")
    shares = settings.interpolate if trainer.dev else []
    for share in mixes(trainer.student, start, Path(trainer.args.output_dir), settings.average, shares):
        if trainer.dev is not None:
            values[f"{share:g}"] = value = trainer.dev.evaluate(trainer.student)
            if value > best:
                best = value
                trainer.keep_best()
    return values


def _finish(trainer: StudentTrainer, recipe: Recipe, writer: ArtifactWriter) -> None:
    """The best student as `model/`, the notes of the manifest; leftovers of the training go."""
    student, dev, history = trainer.student, trainer.dev, trainer.state.log_history
    best, final = writer.path / BEST, writer.path / MODEL
    shutil.rmtree(final, ignore_errors=True)
    if dev is not None and best.is_dir():
        shutil.copytree(best, final)
    else:
        trainer.save_best(final)
    writer.notes |= {
        # The last one logged: the Trainer's own mean forgets the steps before a resumption.
        "loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "dev": trainer.looks(),
        "dev_metric": str(dev) if dev else None,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "precision": resolve_precision(student.device, recipe.training.precision),
        "recipe": deciding(recipe),
    }
    if trainer.agreement is not None and dev is not None:
        writer.notes[AGREEMENT] = curve(history, AGREEMENT)
        alarm = last_alarm(history, trainer.metric)
        if alarm is not None:
            writer.notes["teacher_hacking"] = asdict(alarm)
    writer.device = str(student.device)
    for leftover in [best, *writer.path.glob("checkpoint-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def losses_and_weighting(settings: Training, lists: ScoredLists) -> tuple[dict[str, Loss], Weighting | None]:
    """What a recipe trains with; refused where the lists or the recipe lack what a loss or the weighting needs."""
    losses = build_losses(settings)
    asking = [name for name, loss in losses.items() if loss.needs_batch_teacher]
    if asking and settings.batch_teacher is None:
        raise UsageError(
            f"the loss {asking[0]} compares with a teacher that scores the whole batch, and the recipe names none",
            where="training.losses",
            fix="training.batch_teacher: {type: dense, model: NAME} (or type: multi_vector)",
        )
    if settings.batch_teacher is not None and not asking:
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
    weighting: Weighting | None = build("weighting", settings.weighting.settings()) if settings.weighting else None
    if weighting is not None and weighting.needs_disagreement and lists.disagreement_of(0) is None:
        raise RankdistillError(
            f"the weighting {weighting.type} needs several teachers and these lists come from one",
            where="training.weighting",
            fix="a teacher of type ensemble, or another weighting",
        )
    return losses, weighting


def build_losses(settings: Training) -> dict[str, Loss]:
    """name in the log → loss: its type (and side), numbered where it is there twice."""
    losses: dict[str, Loss] = {}
    for number, method in enumerate(settings.losses):
        loss: Loss = build("loss", method.settings())
        name = str(loss.type)  # the class's: a place (my_package.losses:MyLoss) is no name of a module
        key = f"{name}_{loss.side}" if isinstance(loss, Regulariser) else name
        losses[key if key not in losses else f"{key}_{number}"] = loss
    return losses


def prepare_losses(losses: dict[str, Loss], student: StudentModel, collection: Collection, folder: Path) -> None:
    """Give the regularisers what they need of the collection; refuse a loss that reads what this student has not:
    vectors, term weights, or weights of queries that learn."""
    for name, loss in losses.items():
        if student.reads_pairs and not isinstance(loss, ListLoss):
            raise UsageError(
                f"{name} reads vectors or a whole batch, and a cross_encoder student scores its lists' pairs alone",
                where="training.losses",
                fix="a loss over lists: margin_mse, kl, listnet, ranknet, lambda_loss, lce ...",
            )
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
    rank, processes = launched()
    return loop_arguments(
        folder,
        steps,
        device,
        resolve_precision(device, settings.precision),
        warmup=settings.warmup,
        checkpoints=settings.checkpoints,
        per_device_train_batch_size=1,  # an item of the stream is a batch
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_schedule(settings),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_gradient_norm,
        logging_steps=settings.log_every,
        save_total_limit=max(2, settings.average),
        dataloader_num_workers=settings.loader_processes,
        dataloader_pin_memory=False,
        report_to=["tensorboard"] if rank == 0 and find_spec("tensorboard") else "none",
        ddp_backend="gloo" if device.type == "cpu" and processes > 1 else None,
        ddp_find_unused_parameters=True,  # encoders carry heads that no loss reads
        seed=recipe.seed,
    )
