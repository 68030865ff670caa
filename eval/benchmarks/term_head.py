"""A sparse encoder's head, forward and backward: students/term_head.py beside SpladePooling over all logits.

Random token vectors and a vocabulary matrix of BERT's size, the bias such that a given number of terms is active. Each
figure is of a process of its own: CPU seconds on one thread (best of two), and peak resident memory less what it was
before. The gradient's size is compared, so that both do the same work.

    python eval/benchmarks/term_head.py
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling

from rankdistill.artifacts import write_atomically
from rankdistill.students.term_head import pool_terms

TEXTS, TOKENS, WIDTH, TERMS = 64, 128, 384, 30_522
CASES = [("fp32", "max", 150), ("bf16", "max", 150), ("bf16", "max", 15_000), ("bf16", "sum", 150)]


def child(ours: bool, number: str, pooling: Any, active: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(TEXTS, TOKENS, WIDTH, requires_grad=True)
    matrix = (torch.randn(TERMS, WIDTH) * 0.05).requires_grad_()
    mask = torch.ones(TEXTS, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        best = (hidden[:2] @ matrix[:4000].T).amax(dim=1).flatten()
        bias = torch.full((TERMS,), -float(best.quantile(1 - active / TERMS)), requires_grad=True)
    pooled = SpladePooling(pooling)
    before, seconds = peak(), []
    for _ in range(2):
        for one in (hidden, matrix, bias):
            one.grad = None
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=number == "bf16"):
            if ours:
                made = pool_terms(hidden, mask, matrix, bias, pooling)
            else:
                logits = torch.nn.functional.linear(hidden, matrix, bias)
                made = pooled({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"].float()
        made.mean(dim=0).square().sum().backward()
        seconds.append(time.process_time() - started)
    assert hidden.grad is not None
    found = {"seconds": min(seconds), "gigabytes": peak() - before, "gradient": float(hidden.grad.norm())}
    return found | {"active": float((made > 0).sum(dim=1).float().mean())}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "term_head.md")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        ours, number, pooling, active = options.child
        print(json.dumps(child(ours == "1", number, pooling, int(active))))
        return
    lines = [
        "# The head of a sparse encoder",
        "",
        f"`python eval/benchmarks/term_head.py`; one thread, {platform.machine()}, torch {torch.__version__}; {TEXTS} "
        f"texts of {TOKENS} tokens, width {WIDTH}, {TERMS:,} terms. Forward and backward of head and pooling alone, "
        "CPU seconds; beside it sentence-transformers' SpladePooling over the logits of all tokens.",
        "",
        "| | pooling | terms active | here, s | SpladePooling, s | × | here, GB | SpladePooling, GB | gradient off |",
        "|:---|:---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for number, pooling, active in CASES:
        made = []
        for ours in ("1", "0"):
            command = [sys.executable, __file__, "--child", ours, number, pooling, str(active)]
            made.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        one, other = made
        cells = [number, pooling, f"{one['active']:,.0f}", f"{one['seconds']:.2f}", f"{other['seconds']:.2f}"]
        cells += [f"{other['seconds'] / one['seconds']:.1f}", f"{one['gigabytes']:.2f}", f"{other['gigabytes']:.2f}"]
        cells.append(f"{abs(one['gradient'] / other['gradient'] - 1):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    write_atomically(options.out, "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
