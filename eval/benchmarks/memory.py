"""Peak memory of every stage at three corpus sizes, and what grows with the corpus.

The corpora are made from real text: each passage is a window of a real document with a tenth of its words exchanged
and, in three of ten passages, a word no other passage has (MS MARCO's vocabulary grows about as fast). There is one
query for every `--passages-a-query` passages, judged with one passage; half of them train, half test.

Each step runs in a process of its own, and what is measured already is kept with `--folder`: an interrupted benchmark
goes on. The parent samples /proc/PID/status: VmHWM is the peak of everything resident,
memory-mapped pages included, which the system takes back when it needs them; RssAnon is what the process itself
allocated. The slope is that of a straight line through the peaks of the three sizes, in MB for a million passages,
which is bytes a passage.

    python eval/benchmarks/memory.py [--collection beir:DIR] [--sizes 25000 100000 400000] [--folder KEPT]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from rankdistill.artifacts import library_versions, write_atomically
from rankdistill.collections import Collection, open_collection
from rankdistill.progress import set_quiet

WORDS, DIMENSION, SAMPLE_SECONDS = 60, 64, 0.01
DEPTH, TRAINING_STEPS, EVALUATION_DEPTH = 20, 10, 100
STUDENT = {"type": "static", "start": "words", "dimension": DIMENSION}

# ---------------------------------------------------------------------------------------------------------------------
# The corpora


def write_beir(source: Collection, folder: Path, size: int, passages_a_query: int) -> None:
    """A BEIR folder of `size` passages in the manner of `source`, streamed to disk."""
    chance = random.Random(size)
    real = [text.split() for _, texts in source.iter_documents() for text in texts]
    real = [words for words in real if len(words) > 10]
    pool = [word for words in real for word in words]
    (folder / "qrels").mkdir(parents=True)
    with ExitStack() as stack:

        def opened(name: str) -> IO[str]:
            return stack.enter_context(open(folder / name, "w"))

        corpus, queries = opened("corpus.jsonl"), opened("queries.jsonl")
        qrels = {split: opened(f"qrels/{split}.tsv") for split in ("train", "test")}
        for number in range(size):
            words = real[number % len(real)]
            start = chance.randrange(max(1, len(words) - WORDS))
            words = words[start : start + WORDS]
            for place in chance.sample(range(len(words)), len(words) // 10):
                words[place] = chance.choice(pool)
            if chance.random() < 0.3:
                words[chance.randrange(len(words))] = f"w{number:x}"
            corpus.write(json.dumps({"_id": f"passage-{number}", "title": "", "text": " ".join(words)}) + "\n")
            if number % passages_a_query == 0:
                query = " ".join(chance.sample(words, min(6, len(words))))
                queries.write(json.dumps({"_id": f"query-{number}", "text": query}) + "\n")
                split = "train" if number // passages_a_query % 2 else "test"
                qrels[split].write(f"query-{number}\tpassage-{number}\t1\n")


# ---------------------------------------------------------------------------------------------------------------------
# The steps; each reads what those before it left in `folder`


def student(folder: Path) -> Any:
    from rankdistill.recipe import build

    return build("student", STUDENT).open(folder.parent / "student", "cpu")


def bm25(folder: Path) -> Any:
    from rankdistill.indexes.bm25 import BM25

    return BM25.open(folder / "bm25")


def step_bm25(collection: Collection, folder: Path) -> None:
    from rankdistill.indexes.bm25 import BM25

    BM25().build(collection, folder / "bm25")


def step_encode(collection: Collection, folder: Path) -> None:
    from rankdistill.indexes.vectors import encode_documents

    encode_documents(student(folder), collection, folder / "vectors")


def step_mine(collection: Collection, folder: Path) -> None:
    from rankdistill.indexes.dense import DenseEngine
    from rankdistill.indexes.mining import Source, mine

    dense = DenseEngine.over(student(folder), folder / "vectors")
    sources = [Source(bm25(folder), DEPTH // 2), Source(dense, DEPTH // 2)]
    mine(collection, sources, folder / "candidates", depth=DEPTH, split="train")


def step_score(collection: Collection, folder: Path) -> None:
    from rankdistill.runs import iter_run
    from rankdistill.scores.store import ScoreStore
    from rankdistill.teachers.encoders import BiEncoderTeacher
    from rankdistill.teachers.scoring import score_candidates

    teacher = BiEncoderTeacher(str(folder.parent / "student"), precision="fp32", device="cpu")
    candidates = iter_run(folder / "candidates" / "candidates.parquet")
    score_candidates(teacher, collection, candidates, ScoreStore(folder / "scores"))


def step_lists(collection: Collection, folder: Path) -> None:
    from rankdistill.runs import iter_run
    from rankdistill.scores.lists import build_lists
    from rankdistill.scores.store import TeacherScores

    scores = TeacherScores(next((folder / "scores").glob("*/*/manifest.json")).parent)
    candidates = iter_run(folder / "candidates" / "candidates.parquet")
    build_lists(candidates, scores.scores_of, collection, "train", folder / "lists")


def step_train(collection: Collection, folder: Path) -> None:
    from rankdistill.recipe import check_recipe
    from rankdistill.scores.lists import ScoredLists
    from rankdistill.training.trainer import train_student

    recipe = {
        "collection": collection.spec,
        "student": STUDENT,
        "training": {"steps": TRAINING_STEPS, "device": "cpu", "batches": {"type": "random_batches", "size": 16}},
    }
    lists = ScoredLists.open(folder / "lists", collection)
    train_student(check_recipe(recipe), lists, collection, None, folder / "trained")


def step_index(collection: Collection, folder: Path, name: str) -> None:
    """Without the student, and so without torch: the vectors are all that is needed."""
    from rankdistill.indexes.base import DocumentIds
    from rankdistill.indexes.building import build_index
    from rankdistill.indexes.specification import load_specification
    from rankdistill.indexes.vectors import open_vectors

    vectors, ids = open_vectors(folder / "vectors"), DocumentIds(collection)
    build_index(vectors, ids, load_specification(name), folder / f"{name}.faiss", similarity="cos")


def step_evaluate(collection: Collection, folder: Path) -> None:
    from rankdistill.evaluation.evaluate import evaluate_systems
    from rankdistill.evaluation.systems import EngineSystem
    from rankdistill.indexes.dense import DenseEngine
    from rankdistill.indexes.faiss_index import FaissIndex

    dense = DenseEngine(student(folder), FaissIndex.open(folder / "ivf_pq.faiss"))
    systems = {"bm25": EngineSystem(bm25(folder)), "ivf_pq": EngineSystem(dense)}
    evaluate_systems(systems, collection, "test", depth=EVALUATION_DEPTH, out=folder / "evaluation")


class Step(NamedTuple):
    run: Callable[[Collection, Path], None]
    does: str
    grows: str


STEPS = {
    "import": Step(lambda c, f: None, "BEIR folder → cache", "sorting ids (a sixteenth at a time) and judgments"),
    "bm25": Step(step_bm25, "build the BM25 index", "vocabulary (300 bytes a distinct word), lengths"),
    "encode": Step(step_encode, f"static student, {DIMENSION} dimensions", "nothing"),
    "mine": Step(step_mine, f"BM25 and dense exact, depth {DEPTH}", "vocabulary, one row of sums a thread, query ids"),
    "score": Step(step_score, f"bi-encoder teacher, {DEPTH + 1} a query", "12 bytes a scored pair"),
    "lists": Step(step_lists, "join candidates, scores, labels", "12 bytes a scored pair, the split's labels"),
    "train": Step(step_train, f"static student, {TRAINING_STEPS} steps of 16 lists", "one offset a query"),
    "index flat": Step(
        lambda c, f: step_index(c, f, "flat"), "FAISS Flat", f"the index: {4 * DIMENSION} bytes a passage"
    ),
    "index sq8": Step(lambda c, f: step_index(c, f, "sq8"), "FAISS SQ8", f"the index: {DIMENSION} bytes a passage"),
    "index ivf_pq": Step(
        lambda c, f: step_index(c, f, "ivf_pq"), "FAISS IVF-PQ", "training sample (256 vectors a list), codes and ids"
    ),
    "evaluate": Step(
        step_evaluate, f"BM25 and IVF-PQ, depth {EVALUATION_DEPTH}", "vocabulary, the index, one system's run, labels"
    ),
}


NOTES = """\
Buffers of fixed size are what makes slopes over small corpora steep: building BM25 sorts 4 million postings at a time
(some 200 MB, full at about 130,000 passages); a BM25 search touches 8 million postings a thread at a time (64 MB); the
score store holds at most 65,536 unwritten pairs; vectors are indexed 65,536 at a time.
"""

# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Peak(NamedTuple):
    """MB (10⁶ bytes)."""

    resident: float
    allocated: float
    seconds: float  # of CPU time


def measured(command: list[str], environment: dict[str, str]) -> Peak:
    """Run a process and watch its memory from outside."""
    resident = allocated = 0
    with tempfile.TemporaryFile("w+") as output:
        # Our own argument list, no shell.
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        status = Path(f"/proc/{process.pid}/status")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            if "RssAnon" in fields:  # gone once the process has ended
                resident = max(resident, int(fields["VmHWM"].split()[0]))
                allocated = max(allocated, int(fields["RssAnon"].split()[0]))
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Peak(
        resident * 1024 / 1e6,
        allocated * 1024 / 1e6,
        (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime),
    )


def save_student(folder: Path) -> None:
    from rankdistill.recipe import build

    folder.mkdir(parents=True)
    build("student", STUDENT).create("cpu").save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="python-docs", help="where the real text comes from")
    parser.add_argument("--sizes", type=int, nargs="+", default=[25_000, 100_000, 400_000])
    parser.add_argument("--passages-a-query", type=int, default=100)
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="all of them unless given")
    parser.add_argument("--folder", type=Path, help="keep the corpora and indexes here")
    parser.add_argument("--out", default="eval/results/memory.md")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        set_quiet(True)
        step, folder = options.child[0], Path(options.child[1])
        STEPS[step].run(open_collection(f"beir:{folder / 'corpus'}"), folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        peaks = measure(options, options.folder or Path(temporary))
    text = report(options, peaks)
    print(text)
    write_atomically(options.out, text)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Peak]]:
    environment = {**os.environ, "RANKDISTILL_CACHE": str(folder / "cache")}
    if not (folder / "student").is_dir():
        save_student(folder / "student")
    peaks: dict[str, list[Peak]] = {step: [] for step in options.steps or STEPS}
    for size in options.sizes:
        place = folder / str(size)
        if not place.is_dir():
            write_beir(open_collection(options.collection), place / "corpus", size, options.passages_a_query)
        for step in peaks:
            kept = place / f"{step.replace(' ', '-')}.peak.json"
            if kept.is_file():
                peak = Peak(*json.loads(kept.read_text()))
            else:
                peak = measured([sys.executable, __file__, "--child", step, str(place)], environment)
                write_atomically(kept, json.dumps(peak))
            peaks[step].append(peak)
            shown = f"{size:>9,} {step:14} {peak.resident:8.0f} {peak.allocated:8.0f} MB {peak.seconds:6.1f} s"
            print(shown, file=sys.stderr)
    return peaks


def line(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """(MB for a million passages, MB for none): least squares."""
    if len(sizes) < 2:
        return float("nan"), float("nan")
    rise, start = np.polyfit(np.array(sizes) / 1e6, values, 1)
    return float(rise), float(start)


def report(options: argparse.Namespace, peaks: dict[str, list[Peak]]) -> str:
    versions = library_versions()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    command = f"python eval/benchmarks/memory.py --sizes {' '.join(map(str, options.sizes))}"
    sizes = options.sizes
    header = " | ".join(f"{size:,}" for size in sizes)
    lines = [
        "# Peak memory",
        "",
        f"`{command}` on {platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Python "
        f"{platform.python_version()}, torch {versions['torch']}, numpy {np.__version__}.",
        f"Passages of at most {WORDS} words, one query for every {options.passages_a_query} passages, half of them "
        "training and half test queries; each step in a process of its own.",
        "",
        "Peaks in MB: what the process allocated / all that was resident, memory-mapped file pages included (these the "
        "system can take back at any time). Slope: MB for a million passages and their queries (= bytes a passage) of "
        "what was allocated, by least squares, and over the last two sizes alone (fixed buffers fill up first). "
        "At zero: where the line begins, libraries included.",
        "",
        f"| step | what | {header} | at zero | slope | last slope | CPU s | what grows |",
        "|---|---|" + "---:|" * len(sizes) + "---:|---:|---:|---:|---|",
    ]
    for step, found in peaks.items():
        allocated = [peak.allocated for peak in found]
        cells = " | ".join(f"{peak.allocated:.0f} / {peak.resident:.0f}" for peak in found)
        rise, start = line(sizes, allocated)
        last, _ = line(sizes[-2:], allocated[-2:])
        lines.append(
            f"| {step} | {STEPS[step].does} | {cells} | {start:.0f} | {rise:.0f} | {last:.0f} "
            f"| {found[-1].seconds:.0f} | {STEPS[step].grows} |"
        )
    return "\n".join([*lines, "", NOTES])


if __name__ == "__main__":
    main()
