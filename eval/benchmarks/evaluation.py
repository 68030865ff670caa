"""Evaluating large runs: seconds and peak memory of rankdistill and of pytrec_eval, and the first call of a process.

Each contestant runs in a process of its own, in turns; the clock starts when its libraries are imported. Runs are made
here: QUERIES x 1,000 documents drawn from 8.8 million ids, scores with two decimals (some tie), judgments as sparse as
MS MARCO's. The values of every query are compared.

    python eval/benchmarks/evaluation.py [--queries 1000 7000] [--rounds 3] [--out eval/results/evaluation.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rankdistill.artifacts import write_atomically
from rankdistill.evaluation.compare import read_judgments
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.runs import Run, read_run, write_trec

DEPTH, DOCUMENTS = 1000, 8_841_823
METRICS = {"ndcg@10": "ndcg_cut_10", "recall@100": "recall_100", "mrr": "recip_rank", "map": "map"}
FIRST_CALL = {
    "rankdistill, standard metrics": (
        "from rankdistill import evaluate_run, Run; "
        "evaluate_run(Run.from_dict({'q': {'a': 1.0, 'b': 0.5}}), {'q': {'b': 1}}, ['ndcg@10', 'recall@100', 'map'])"
    ),
    "ranx": (
        "from ranx import Qrels, Run, evaluate; "
        "evaluate(Qrels({'q': {'b': 1}}), Run({'q': {'a': 1.0, 'b': 0.5}}), ['ndcg@10', 'recall@100', 'map'])"
    ),
}


def make(folder: Path, queries: int) -> None:
    """`run.trec` and `qrels.txt`: one or two judged documents a query, most of them retrieved."""
    random = np.random.default_rng(queries)
    ids = np.concatenate([random.choice(DOCUMENTS, DEPTH, replace=False) for _ in range(queries)])
    scores = np.round(random.gumbel(20, 4, (queries, DEPTH)), 2)
    names = [str(1_000_000 + query) for query in range(queries)]
    run = Run(names, np.arange(queries + 1) * DEPTH, [str(i) for i in ids], scores.ravel(), "synthetic")
    write_trec(run, folder / "run.trec")
    with open(folder / "qrels.txt", "w") as stream:
        for query_id, doc_ids, _ in run:
            places = random.geometric(0.02, size=1 + (random.random() < 0.06))
            found = {doc_ids[place] if place < DEPTH else f"missing-{query_id}" for place in places}
            stream.writelines(f"{query_id} 0 {doc_id} 1\n" for doc_id in sorted(found))


def ours_from_a_file(folder: Path, qrels: dict[str, dict[str, int]]) -> Callable[[], Any]:
    return lambda: evaluate_run(read_run(folder / "run.trec"), qrels, list(METRICS)).per_query


def theirs_from_a_file(folder: Path, qrels: dict[str, dict[str, int]]) -> Callable[[], Any]:
    import pytrec_eval

    def evaluate() -> Any:
        with open(folder / "run.trec") as stream:
            run = pytrec_eval.parse_run(stream)
        found = pytrec_eval.RelevanceEvaluator(qrels, set(METRICS.values())).evaluate(run)
        return {ours: [found[query][name] for query in qrels] for ours, name in METRICS.items()}

    return evaluate


def ours_from_a_dictionary(folder: Path, qrels: dict[str, dict[str, int]]) -> Callable[[], Any]:
    run = read_run(folder / "run.trec").to_dict()
    return lambda: evaluate_run(Run.from_dict(run), qrels, list(METRICS)).per_query


def theirs_from_a_dictionary(folder: Path, qrels: dict[str, dict[str, int]]) -> Callable[[], Any]:
    import pytrec_eval

    run = read_run(folder / "run.trec").to_dict()

    def evaluate() -> Any:
        found = pytrec_eval.RelevanceEvaluator(qrels, set(METRICS.values())).evaluate(run)
        return {ours: [found[query][name] for query in qrels] for ours, name in METRICS.items()}

    return evaluate


CONTESTANTS = {
    "rankdistill, TREC file": ours_from_a_file,
    "pytrec_eval, TREC file": theirs_from_a_file,
    "rankdistill, dictionary": ours_from_a_dictionary,
    "pytrec_eval, dictionary": theirs_from_a_dictionary,
}


def compete(name: str, folder: Path) -> None:
    """One contestant, in this process: its figures to standard output, its values to a file."""
    work = CONTESTANTS[name](folder, read_judgments(folder / "qrels.txt"))
    began, cpu = time.perf_counter(), time.process_time()
    values = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    np.save(folder / f"{'ours' if name.startswith('rankdistill') else 'theirs'}.npy", [values[m] for m in METRICS])
    # Not ru_maxrss: a child inherits its parent's.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps([seconds, cpu, int(peak.split()[1]) / 1024]))


def first_call(code: str, numba_cache: str | None = None) -> float:
    """Seconds of a fresh process."""
    environment = dict(os.environ) | ({"NUMBA_CACHE_DIR": numba_cache} if numba_cache else {})
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    return time.perf_counter() - began


def measured(queries: int, rounds: int) -> list[str]:
    """Rows of the table for one size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, queries)
        bytes_ = (folder / "run.trec").stat().st_size
        found: dict[str, list[list[float]]] = {contestant: [] for contestant in CONTESTANTS}
        for number in range(rounds):
            names = list(CONTESTANTS)
            for contestant in names[number % len(names) :] + names[: number % len(names)]:
                command = [sys.executable, __file__, "--contestant", contestant, "--folder", name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[contestant].append(json.loads(done.stdout))
            print(f"{queries:,} queries: round {number + 1} of {rounds} done", file=sys.stderr)
        difference = float(np.abs(np.load(folder / "ours.npy") - np.load(folder / "theirs.npy")).max())
    rows = []
    for contestant, figures in found.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*figures, strict=True))
        rows.append(f"| {queries:,} x {DEPTH:,} ({bytes_ / 1e6:.0f} MB) | {contestant} | {seconds:.1f} | "
                    f"{min(f[0] for f in figures):.1f} | {cpu:.1f} | {peak:,.0f} | {difference:.0e} |")  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[1000, 7000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="eval/results/evaluation.md")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        compete(options.contestant, options.folder)
        return
    load = os.getloadavg()[0]
    rows = [row for queries in options.queries for row in measured(queries, options.rounds)]
    with tempfile.TemporaryDirectory() as cache:
        compiled = first_call(FIRST_CALL["ranx"], cache)
        cached = statistics.median(first_call(FIRST_CALL["ranx"], cache) for _ in range(3))
    own = statistics.median(first_call(FIRST_CALL["rankdistill, standard metrics"]) for _ in range(3))
    lines = [
        "# Evaluation of large runs",
        "",
        f"`python {' '.join(sys.argv)}` on {platform.machine()}, {len(os.sched_getaffinity(0))} cores (load {load:.1f} "
        f"at the start), Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}. "
        f"{', '.join(METRICS)}; medians of {options.rounds} rounds, in turns, each in a process of its own.",
        "",
        "| run | | s | fastest, s | CPU s | peak, MiB | largest difference of a query's value |",
        "|---|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "A dictionary is the form in which pytrec_eval holds a run: with it there is nothing to read, and the peak is "
        "the dictionary's.",
        "",
        "| first evaluation of a fresh process, libraries imported in it | s |",
        "|---|---:|",
        f"| rankdistill, standard metrics | {own:.1f} |",
        f"| ranx, nothing compiled yet | {compiled:.1f} |",
        f"| ranx, compiled before | {cached:.1f} |",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    write_atomically(options.out, text)


if __name__ == "__main__":
    main()
