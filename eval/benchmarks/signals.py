"""Which teacher's signal teaches best? Dense students learn from real runs and listwise LLM orders of TREC DL 2019.

    python eval/benchmarks/signals.py --data PATH/msmarco-dl19 --work WORK --train --out eval/results/signals.md

The folder holds `collection.tsv`, `queries.tsv` and `qrels.txt` (NIST's judgments), `runs/` of retrievers with their
scores and `listwise-runs/` re-ranked by language models. Each student starts from the same encoder, learns from one
signal on the queries of four folds and is measured on the fifth, so that each query is measured once, by a student that
never saw it. What was measured is in WORK, a line a training: a run that was stopped goes on. `--out` writes all of it.

What is the same for all: encoder, seed, steps, learning rate, batches, and (`--lists pool`) the very documents of each
batch. Only the teacher's scores differ:

- lists: `pool`, the union of every run's first 20 documents; a document that a signal's run does not hold gets its
  lowest score, which bounds what it would have been given. `own`: the first 100 of the signal's own run, nothing else.
- losses: `order`, RankNet weighted by the teacher's ranks: reads the order alone, so it serves all signals; `scores`,
  KL to z-scored scores, where the signal has scores that mean something.
- labels: InfoNCE with a judgment of 2 or 3 as positive (judgments of the training folds), and NIST's grades as order.

Measured: nDCG@10 of the union of every run's first 20 documents for the query, ordered by the student; the untrained
one also searches the whole collection. Judgments of documents that are not in the collection count in the ideal order,
as they do for the runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.artifacts import fingerprint, write_atomically
from rankdistill.collections import Collection, open_collection
from rankdistill.evaluation.cost import measuring_environment
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import Comparison, compare_values
from rankdistill.progress import set_quiet
from rankdistill.recipe import build, check_recipe
from rankdistill.runs import Run, read_run
from rankdistill.scores.ensemble import combine, normalise
from rankdistill.scores.lists import build_lists
from rankdistill.scores.rank_scores import mean_rank_scores, plackett_luce
from rankdistill.training.trainer import train_student

Scores = Mapping[str, Mapping[str, float]]  # query → document → score

METRIC = "ndcg@10"
FOLDS = 5
POOL = 20  # first documents of each run in a training list
DEPTH = 100  # documents a run holds
RETRIEVERS = {"BM25": "bm25", "TAS-B": "tas-b", "SPLADE++": "splade-pp-ed", "RepLLaMA": "repllama"}
REPEATS = [f"gpt-3.5-turbo.bm25.repeat{number}" for number in range(1, 6)]
ENSEMBLE = ("TAS-B", "SPLADE++", "RepLLaMA")
UNTRAINED, INFONCE, GRADES = "untrained", "labels, InfoNCE", "labels, grades as order"
STUDENT = {"type": "dense", "layers": [0, 2, 5], "query_length": 32, "document_length": 96, "dropout": 0.0}
TRAINING: dict[str, Any] = {
    "batches": {"type": "random_batches", "size": 2},
    "lists": {"type": "random_documents", "size": 8},
    "epochs": 4,
    "learning_rate": 3.0e-4,
    "checkpoints": 1,
    "agreement_queries": 0,
}
LOSSES = {
    "order": {"type": "ranknet", "weighting": "rank"},
    "scores": {"type": "kl", "temperature": 1.0, "teacher_temperature": 0.5},
    "labels": {"type": "infonce"},
}


class Signals:
    """The folder's runs as teachers' scores."""

    def __init__(self, data: Path) -> None:
        paths = [path for folder in ("runs", "listwise-runs") for path in sorted((data / folder).glob("*.trec"))]
        self.runs: dict[str, Scores] = {path.stem: read_run(path).first(DEPTH).to_dict() for path in paths}
        self.pool: dict[str, list[str]] = {}
        for query_id in self.runs["bm25"]:
            found = [list(run.get(query_id, {})) for run in self.runs.values()]
            self.pool[query_id] = sorted({doc_id for ids in found for doc_id in ids[:POOL]})

    @cached_property
    def by_name(self) -> dict[str, tuple[bool, Scores]]:
        """name → (whether its scores mean more than their order, its scores, best first)."""
        scored = {name: (True, self.runs[stem]) for name, stem in RETRIEVERS.items()}
        return {
            "BM25": scored["BM25"],
            "GPT-3.5 over BM25, once": (False, fused([self.runs[REPEATS[0]]])),
            "GPT-3.5 over BM25, five repeats fused": (False, fused([self.runs[one] for one in REPEATS])),
            "RankVicuna over TAS-B": (False, fused([self.runs["rank-vicuna-7b.tas-b"]])),
            **{name: scored[name] for name in ENSEMBLE},
            f"ensemble of {', '.join(ENSEMBLE)}": (True, ensemble([scored[name][1] for name in ENSEMBLE])),
        }


def fused(runs: list[Scores]) -> Scores:
    """Orders as scores: 1 / rank of one, Plackett-Luce strengths of several."""
    scores = {}
    for query_id in runs[0]:
        doc_ids = sorted({doc_id for run in runs for doc_id in run[query_id]})
        number = {doc_id: place for place, doc_id in enumerate(doc_ids)}
        orders = [[number[doc_id] for doc_id in run[query_id]] for run in runs]
        values = plackett_luce(orders, len(doc_ids)) if len(runs) > 1 else mean_rank_scores(orders, len(doc_ids))
        scores[query_id] = falling(doc_ids, values)
    return scores


def falling(doc_ids: list[str], scores: np.ndarray) -> dict[str, float]:
    return {doc_ids[place]: float(scores[place]) for place in np.argsort(-scores, kind="stable")}


def ensemble(runs: list[Scores]) -> Scores:
    """Mean of min-max normalised scores over the documents that any of them has; a run's absent ones get its lowest."""
    scores = {}
    for query_id in runs[0]:
        doc_ids = sorted({doc_id for run in runs for doc_id in run[query_id]})
        rows = np.array([lowest_where_absent(run[query_id], doc_ids) for run in runs])
        scores[query_id] = falling(doc_ids, combine(rows, "min_max", "mean"))
    return scores


def lowest_where_absent(scores: Mapping[str, float], doc_ids: list[str]) -> list[float]:
    lowest = min(scores.values())
    return [scores.get(doc_id, lowest) for doc_id in doc_ids]


def with_splits(data: Path, work: Path) -> Collection:
    """The collection with two more splits: `positive` (judgments of 2 and 3) and `unlabelled` (which says nothing).

    Lists of the second have no label, so that no sampler or loss can read one.
    """
    folder = work / "collection"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("collection.tsv", "queries.tsv", "qrels.txt"):
        if not (folder / name).exists():
            (folder / name).symlink_to((data / name).resolve())
    positive, unlabelled = [], {}
    for line in (data / "qrels.txt").read_text().splitlines():
        query_id, _, doc_id, grade = line.split()
        unlabelled[query_id] = f"{query_id} 0 {doc_id} 0"
        if int(grade) >= 2:
            positive.append(f"{query_id} 0 {doc_id} 1")
    write_atomically(folder / "qrels.positive.txt", "\n".join(positive) + "\n")
    write_atomically(folder / "qrels.unlabelled.txt", "\n".join(unlabelled.values()) + "\n")
    return open_collection(f"msmarco:{folder}")


class Benchmark:
    """The trainings, one after the other; each leaves a line in `rows.jsonl`."""

    def __init__(self, data: Path, work: Path) -> None:
        self.work = work
        self.signals = Signals(data)
        self.collection = with_splits(data, work)
        self.qrels = self.collection.qrels("test", missing=True)
        self.grades = self.collection.qrels("test")
        self.path = work / "rows.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}
        self.student = build("student", STUDENT, "student")
        self._vectors: np.ndarray | None = None

    def folds(self) -> list[list[str]]:
        """The queries of each fold, the same for every signal and seed."""
        ids = sorted(self.qrels)
        order = np.random.default_rng(2019).permutation(len(ids))
        return [sorted(ids[place] for place in part) for part in np.array_split(order, FOLDS)]

    def measure(self, signal: str, loss: str, lists: str, fold: int, seed: int) -> None:
        """One training and its measurement, unless it is there already."""
        what = {"signal": signal, "loss": loss, "lists": lists, "fold": fold, "seed": seed}
        key = fingerprint([what, STUDENT, None if signal == UNTRAINED else TRAINING, POOL])
        if key in self.rows:
            return
        held_out = self.folds()[fold]
        began = time.perf_counter()
        folder = self.work / "trainings" / key
        if signal == UNTRAINED:
            model = self.student.create()
        else:
            self._train(what, held_out, folder)
            model = self.student.open(folder / "student" / "model")
        row: dict[str, Any] = {"key": key, **what, "training_seconds": time.perf_counter() - began}
        runs = {"pool": self._order(model, held_out)}
        if signal == UNTRAINED:
            runs["full"] = self._search(model, held_out)
        for name, run in runs.items():
            found = evaluate_run(run, {query_id: self.qrels[query_id] for query_id in held_out}, [METRIC])
            row[name] = dict(zip(found.query_ids, found.per_query[METRIC].tolist(), strict=True))
            row[f"{name}_judged"] = found.notes["judged@10"]
        row["seconds"] = time.perf_counter() - began
        shutil.rmtree(folder, ignore_errors=True)
        with open(self.path, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        self.rows[key] = row
        mean = statistics.mean(row["pool"].values())
        print(f"{signal} ({loss}, {lists}), fold {fold}, seed {seed}: {mean:.4f}, {row['seconds']:.0f} s", flush=True)

    def _train(self, what: dict[str, Any], held_out: list[str], folder: Path) -> None:
        recipe = check_recipe(
            {
                "name": what["signal"],
                "seed": 100 * what["seed"] + what["fold"],
                "collection": self.collection.spec,
                "student": STUDENT,
                "training": {**TRAINING, "losses": [LOSSES[what["loss"]]]},
            }
        )
        training = [query_id for query_id in sorted(self.qrels) if query_id not in held_out]
        split = "positive" if what["loss"] == "labels" else "unlabelled"
        inputs = {"signal": fingerprint([what, POOL, DEPTH])}
        lists = build_lists(
            self._candidates(what, training),
            lambda query_id, doc_ids: self._teach(what, query_id, list(doc_ids)),
            self.collection,
            split,
            folder / "lists",
            inputs=inputs,
        )
        train_student(recipe, lists, self.collection, None, folder / "student", inputs=inputs)

    def _candidates(self, what: dict[str, Any], query_ids: list[str]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        for query_id in query_ids:
            own = what["lists"] == "own"
            ids = (
                list(self.signals.by_name[what["signal"]][1][query_id])[:DEPTH] if own else self.signals.pool[query_id]
            )
            yield query_id, ids, np.zeros(len(ids), np.float32)

    def _teach(self, what: dict[str, Any], query_id: str, doc_ids: list[str]) -> np.ndarray:
        """What the student is told: float32 [documents]."""
        if what["signal"] == INFONCE:
            return np.zeros(len(doc_ids), np.float32)  # reads labels alone
        if what["signal"] == GRADES:
            judged = self.grades[query_id]
            return np.array([judged.get(doc_id, 0) for doc_id in doc_ids], np.float32)
        scores = np.array(lowest_where_absent(self.signals.by_name[what["signal"]][1][query_id], doc_ids))
        return (
            normalise(scores, "z_score").astype(np.float32) if what["loss"] == "scores" else scores.astype(np.float32)
        )

    def _order(self, model: Any, query_ids: list[str]) -> Run:
        """The pool of each query, ordered by the student."""
        found = {}
        for query_id, vector in zip(
            query_ids, model.encode_queries(self.collection.query_texts(query_ids)), strict=True
        ):
            doc_ids = self.signals.pool[query_id]
            vectors = model.encode_documents(self.collection.document_texts(self.collection.doc_rows(doc_ids)))
            found[query_id] = dict(zip(doc_ids, (vectors @ vector).tolist(), strict=True))
        return Run.from_dict(found)

    def _search(self, model: Any, query_ids: list[str]) -> Run:
        """The student's first 100 of the whole collection."""
        if self._vectors is None:  # of the untrained student, the only one that searches
            parts = [model.encode_documents(texts) for _, texts in self.collection.iter_documents(2048)]
            self._vectors = np.concatenate(parts)
        scores = model.encode_queries(self.collection.query_texts(query_ids)) @ self._vectors.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        ids = self.collection.doc_ids(np.arange(len(self.collection)))
        return Run.from_dict(
            {
                query_id: {ids[row]: float(scores[place, row]) for row in best[place]}
                for place, query_id in enumerate(query_ids)
            }
        )

    @cached_property
    def settings(self) -> dict[str, list[tuple[str, str, str]]]:
        """table → (signal, loss, lists) of its students."""
        names = list(self.signals.by_name)
        return {
            "pool": [*((name, "order", "pool") for name in (*names, GRADES)), (INFONCE, "labels", "pool")],
            "own": [(name, "order", "own") for name in names],
            "scores": [(name, "scores", "pool") for name in names if self.signals.by_name[name][0]],
        }

    def jobs(self, seeds: int) -> list[tuple[str, str, str, int, int]]:
        """(signal, loss, lists, fold, seed): the first table's first, fold by fold, so that less is a table too.

        Seeds count from 1: with seed 0 the settings were chosen.
        """
        untrained = (UNTRAINED, "order", "pool")
        found = [(*untrained, fold, 0) for fold in range(FOLDS)]
        for seed in range(1, seeds + 1):
            for table in self.settings.values() if seed == 1 else [self.settings["pool"]]:
                found += [(*one, fold, seed) for fold in range(FOLDS) for one in table]
        return found

    def queries(self, table: str) -> list[str]:
        """The queries of the folds that are finished for every student of a table: what it is made of."""
        done = {(row["signal"], row["loss"], row["lists"], row["fold"]) for row in self.rows.values() if row["seed"]}
        finished = [fold for fold in range(FOLDS) if all((*one, fold) in done for one in self.settings[table])]
        return sorted(query_id for fold in finished for query_id in self.folds()[fold])

    def values(self, what: tuple[str, str, str], queries: list[str], measured: str = "pool") -> np.ndarray:
        """nDCG@10 of these queries, the mean over the seeds that are there; NaN where there is none."""
        of_query: dict[str, list[float]] = {}
        for row in self.rows.values():
            if (row["signal"], row["loss"], row["lists"]) == what and (row["seed"] or what[0] == UNTRAINED):
                for query_id, value in row.get(measured, {}).items():
                    of_query.setdefault(query_id, []).append(value)
        return np.array([np.mean(of_query.get(query_id, [np.nan])) for query_id in queries])

    def own(self, name: str, queries: list[str]) -> float:
        """nDCG@10 of the teacher itself."""
        qrels = {query_id: self.qrels[query_id] for query_id in queries}
        scores = self.signals.by_name[name][1]
        run = Run.from_dict({query_id: scores[query_id] for query_id in queries})
        return float(evaluate_run(run, qrels, [METRIC]).means[METRIC])


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(bench: Benchmark) -> str:
    """All that was measured, as Markdown."""
    titles = {
        "pool": "Same documents for all, loss that reads the order (RankNet weighted by rank)",
        "own": "Each signal's own first 100 documents, loss that reads the order",
        "scores": "Same documents, loss that reads the scores (KL to z-scored scores)",
    }
    sections = [introduction(bench)]
    for name, title in titles.items():
        sections += [f"## {title}", table(bench, name)]
    everything = sorted(bench.qrels)
    whole = bench.values((UNTRAINED, "order", "pool"), everything, "full").mean()
    part = bench.values((UNTRAINED, "order", "pool"), everything).mean()
    sections += [
        "## The whole collection",
        f"The untrained student searching all {len(bench.collection):,} passages: {whole:.4f}; ordering the documents "
        f"of each query alone, as in the tables: {part:.4f}.",
    ]
    return "\n\n".join(sections) + "\n"


def introduction(bench: Benchmark) -> str:
    environment: dict[str, Any] = measuring_environment()
    trained = [row["training_seconds"] for row in bench.rows.values() if row["signal"] != UNTRAINED]
    libraries = ", ".join(f"{name} {environment['libraries'][name]}" for name in ("torch", "sentence-transformers"))
    judged = [row["pool_judged"] for row in bench.rows.values()]
    lists = np.mean([len(ids) for ids in bench.signals.pool.values()])
    made = [
        "`python eval/benchmarks/signals.py --data DL19 --work WORK --train --out eval/results/signals.md` on",
        f"{environment['machine']}, {environment['cores']} cores shared with other work, Python",
        f"{platform.python_version()}, {libraries}. {len(trained)} trainings, {np.median(trained or [0]):.0f} s each",
        "(median, beside other work).",
    ]
    text = [
        "Student: all-MiniLM-L6-v2 cut to layers 0, 2 and 5, so that there is something to learn.",
        f"{FOLDS} folds over {len(bench.qrels)} queries, the same for all signals; each query is measured by a student",
        f"that was trained on the other folds (34 or 35 queries): {TRAINING['epochs']} epochs of",
        f"{TRAINING['lists']['size']} documents a list (of {lists:.0f} on average), learning rate",
        f"{TRAINING['learning_rate']:g}, the last step's weights, no dev set. These settings were chosen on one of the",
        "five folds with TAS-B as the teacher, in six tries with another seed: that teacher may have an advantage.",
        "Nothing outside a run is told to be relevant: of the common documents those that BM25 missed stand last for",
        "a re-ranking of BM25, however good they are, which the second table leaves out.",
        f"nDCG@10 by NIST's judgments over the first {POOL} of all {len(bench.signals.runs)} runs for a query",
        f"({lists:.0f} documents). Intervals: 95 %, BCa over queries; they hold for the draw of queries, not for that",
        f"of the training's random numbers. Judged among the first ten: {min(judged):.0%} to {max(judged):.0%} a fold;",
        "what is not judged counts as not relevant. TAS-B, SPLADE++ and RepLLaMA were themselves trained on MS MARCO.",
    ]
    head = "# Which signal teaches best: TREC DL 2019's runs and listwise orders"
    return f"{head}\n\n{' '.join(made)}\n\n{' '.join(text)}"


def table(bench: Benchmark, name: str) -> str:
    """A line a signal: the teacher, the student, and the student less the untrained one; then what differs."""
    queries = bench.queries(name)
    if not queries:
        return "Not measured yet."
    own_like = name != "pool" and set(queries) <= set(bench.queries("pool"))
    values = {UNTRAINED: {METRIC: bench.values((UNTRAINED, "order", "pool"), queries)}}
    values |= {one[0]: {METRIC: bench.values(one, queries)} for one in bench.settings[name]}
    against = compare_values(values, baseline=UNTRAINED, family="baseline")
    lines = [f"{len(queries)} of {len(bench.qrels)} queries.", ""]
    lines += [
        "| signal | teacher | student | less untrained | p (Holm) | better, worse |" + " less first table |" * own_like,
        "|:---|---:|---:|---:|---:|---:|" + "---:|" * own_like,
    ]
    for signal in sorted(values, key=lambda signal: -float(values[signal][METRIC].mean())):
        low, high = against.intervals[signal][METRIC]
        teacher = f"{bench.own(signal, queries):.4f}" if signal in bench.signals.by_name else ""
        cells = [signal, teacher, f"{values[signal][METRIC].mean():.4f} [{low:.3f}, {high:.3f}]"]
        if signal == UNTRAINED:
            cells += ["", "", ""]
        else:
            one = against.of(signal, UNTRAINED, METRIC)
            cells += [interval(one), shown(one.p_randomisation_corrected), f"{one.wins}, {one.losses}"]
        if own_like:
            like = bench.values((signal, "order", "pool"), queries)
            pair = {"a": values[signal], "b": {METRIC: like}}
            cells.append("" if signal == UNTRAINED else interval(compare_values(pair).of("a", "b", METRIC)))
        lines.append(f"| {' | '.join(cells)} |")
    del values[UNTRAINED]
    compared = compare_values(values).comparisons
    told = sorted((one for one in compared if one.significant), key=lambda one: -abs(one.difference))
    lines += [
        "",
        f"Of the {len(compared)} pairs of trained students {len(told)} differ significantly "
        "(randomisation test, p < .05 after Holm's correction over all of them)" + (":" if told else "."),
        "",
    ]
    for one in told:
        better, worse = (one.a, one.b) if one.difference > 0 else (one.b, one.a)
        lines.append(f"- {better} over {worse}: {abs(one.difference):.4f}, p {shown(one.p_randomisation_corrected)}")
    return "\n".join(lines).rstrip()


def shown(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "< .001"


def interval(one: Comparison) -> str:
    return f"{one.difference:+.4f} [{one.low:+.3f}, {one.high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder msmarco-dl19; nothing is measured without it")
    parser.add_argument("--work", type=Path, default=Path("runs/signals"), help="where what was measured is kept")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th training from the i-th, for n processes at once")
    parser.add_argument("--most", type=int, help="stop after so many trainings")
    parser.add_argument("--train", action="store_true", help="measure what is missing")
    parser.add_argument("--out", type=Path, help="write the tables")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: give the folder of the runs with --data")
        return
    set_quiet(True)
    bench = Benchmark(options.data, options.work)
    if options.train:
        part, parts = map(int, options.part.split("/"))
        for job in bench.jobs(options.seeds)[part - 1 :: parts][: options.most]:
            bench.measure(*job)
    if options.out:
        write_atomically(options.out, tables(bench))


if __name__ == "__main__":
    main()
