"""Fine-tuning a cross-encoder with sentence-transformers' own trainer and losses."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rankdistill.devices import place_training
from rankdistill.errors import RankdistillError
from rankdistill.progress import progress, quiet_transformers
from rankdistill.students.token_batches import resolve_precision

if TYPE_CHECKING:
    import torch

    from rankdistill.collections import Collection
    from rankdistill.teachers.cross_encoder import CrossEncoderTraining

CHECKPOINTS = 4  # over a training


def choose_lists(
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    split: str,
    settings: CrossEncoderTraining,
    seed: int,
) -> list[tuple[str, str, list[str]]]:
    """(query_id, positive, negatives): what is drawn for a query depends on the seed and the query alone."""
    qrels = collection.qrels(split)
    chosen = []
    for query_id, doc_ids, _ in candidates:
        relevant = {doc_id for doc_id, relevance in qrels.get(query_id, {}).items() if relevance > 0}
        negatives = [doc_id for doc_id in dict.fromkeys(doc_ids) if doc_id not in relevant]
        known = sorted(relevant)
        known = [doc_id for doc_id, row in zip(known, collection.doc_rows(known), strict=True) if row >= 0]
        if not known or not negatives:
            continue
        own = int.from_bytes(hashlib.sha256(f"{seed}\0{query_id}".encode()).digest()[:8], "little")
        random = np.random.default_rng(own)
        for positive in random.permutation(known)[: settings.positives]:
            picked = random.permutation(len(negatives))[: settings.negatives]
            chosen.append((own, query_id, str(positive), [negatives[at] for at in picked]))
    # In the order of the queries' own hashes: a random order that does not depend on that of the candidates.
    chosen.sort(key=lambda item: item[:3])
    if settings.queries is not None:
        allowed = set(list(dict.fromkeys(item[1] for item in chosen))[: settings.queries])
        chosen = [item for item in chosen if item[1] in allowed]
    if not chosen:
        raise RankdistillError(
            f"no query of split {split!r} has both a labelled positive and a candidate that is not one",
            fix="mine candidates for this split first, or choose another",
        )
    return [item[1:] for item in chosen]


def _write_texts(
    collection: Collection, lists: Sequence[tuple[str, str, list[str]]], whole_lists: bool, path: Path
) -> Any:
    """The training texts as an Arrow file that the trainer maps: memory does not grow with the training set."""
    from datasets import Dataset

    label = pa.float32()
    fields = [("query", pa.string()), ("document", pa.string()), ("label", label)]
    if whole_lists:
        fields = [("query", pa.string()), ("documents", pa.list_(pa.string())), ("labels", pa.list_(label))]
    schema = pa.schema(fields)

    def rows(block: Sequence[tuple[str, str, list[str]]]) -> Iterator[tuple[Any, Any, Any]]:
        queries = collection.query_texts([query_id for query_id, _, _ in block])
        for query, (_, positive, negatives) in zip(queries, block, strict=True):
            numbers = collection.doc_rows([positive, *negatives])
            known = [int(row) for row in numbers if row >= 0]
            texts = collection.document_texts(known)
            labels = [1.0] + [0.0] * (len(texts) - 1)
            if whole_lists:
                yield query, texts, labels
            else:
                yield from ((query, text, value) for text, value in zip(texts, labels, strict=True))

    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        for start in range(0, len(lists), 512):
            columns = list(zip(*rows(lists[start : start + 512]), strict=True))
            arrays = [pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return Dataset.from_file(str(path))


def fine_tune(
    start: Path,
    settings: CrossEncoderTraining,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    work: Path,
    *,
    seed: int,
    split: str,
    max_length: int | None,
    scoring_length: int | None,
    device: torch.device,
) -> dict[str, Any]:
    """Train and save `work`/model; see CrossEncoderTeacher.train."""
    import torch
    from sentence_transformers.cross_encoder import (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from rankdistill.students.dense import set_dropout
    from rankdistill.students.loading import load_cross_encoder, position_limit
    from rankdistill.training.checkpoints import SafeCheckpoints, last_checkpoint

    started = time.monotonic()
    lists = choose_lists(collection, candidates, split, settings, seed)
    work.mkdir(parents=True, exist_ok=True)
    dataset = _write_texts(collection, lists, settings.loss != "bce", work / "texts.arrow")
    torch.manual_seed(seed)  # the scoring head starts at random
    model = load_cross_encoder(
        start / _transformer_folder(start), device, max_length, num_labels=1, activation_fn=torch.nn.Identity()
    )
    limit = position_limit(model.model)
    if settings.dropout is not None:
        set_dropout(model[0].model, settings.dropout)
    loss: torch.nn.Module
    if settings.loss == "bce":
        loss = losses.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(settings.negatives), device=device))
    elif settings.loss == "listnet":
        loss = losses.ListNetLoss(model)
    else:
        loss = losses.LambdaLoss(model)
    steps = settings.steps or max(1, round(settings.epochs * -(-len(dataset) // settings.batch_size)))
    precision = resolve_precision(device, settings.precision)
    head_rate = settings.head_learning_rate or 10 * settings.learning_rate
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(work / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        # The head starts at random under an encoder that is nearly right: it has further to go.
        learning_rate_mapping={r"(^|\.)(pooler|classifier|head)\.": head_rate},
        warmup_steps=round(settings.warmup * steps),
        lr_scheduler_type="linear",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=seed,
        save_strategy="steps",
        save_steps=max(1, steps // CHECKPOINTS),
        save_total_limit=1,
        eval_strategy="no",
        logging_strategy="steps",
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type != "cpu",
    )
    place_training(arguments, device)
    with progress("training the cross-encoder", steps, "steps") as bar:

        class ResumableTrainer(SafeCheckpoints, CrossEncoderTrainer):
            pass

        class Advance(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                bar.done = state.global_step

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                bar.advance()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    bar.note = f"loss {float(logs['loss']):.4f}"

        with quiet_transformers():
            trainer = ResumableTrainer(
                model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[Advance()]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            checkpoint = last_checkpoint(work / "trainer")
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not np.isfinite(result.training_loss) or any(
        not bool(torch.isfinite(weight).all()) for weight in model.parameters()
    ):
        raise RankdistillError(
            f"training the cross-encoder diverged (mean loss {result.training_loss})",
            fix="lower teacher.train.learning_rate, or train with precision: fp32",
        )
    if scoring_length is not None:
        model.max_seq_length = min(scoring_length, limit)
    with quiet_transformers():
        model.save_pretrained(str(work / "model"), create_model_card=False)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "queries": len({query_id for query_id, _, _ in lists}),
        "pairs": sum(1 + len(negatives) for _, _, negatives in lists),
        "steps": steps,
        "precision": precision,
        "loss": float(result.training_loss),
        "last_loss": float(logged[-1]) if logged else float(result.training_loss),
        "seconds": round(time.monotonic() - started, 1),
    }


def _transformer_folder(start: Path) -> str:
    """Where an encoder's transformer lies: a sentence-transformers folder may keep it in a sub-folder."""
    if (start / "config.json").is_file():
        return "."
    inner = sorted(path.parent for path in start.glob("*/config.json") if (path.parent / "model.safetensors").is_file())
    if not inner:
        raise RankdistillError("there is no transformer to start a cross-encoder from", where=str(start))
    return inner[0].name
