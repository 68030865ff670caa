"""Seconds, calls and tokens a query: one step (FIRST), constrained and generated orders of the same passages, each
passage alone (pointwise), and all pairs of the first ones in both orders (pairwise).

One model, one process: the decodings take turns on each query, so that a machine that slows down slows all of them.
Without --model a language model with random weights is made, which answers nonsense at the speed of a real one: its
end token's row of the last layer is 0, so that it never ends by itself, and free generation runs for exactly as many
tokens as the written order of the passages has. Writes a Markdown table.

    python eval/benchmarks/listwise.py --data FOLDER [--queries 8] [--window 20] [--out eval/results/listwise.md]

FOLDER holds `collection.tsv`, `queries.tsv` and `runs/bm25.trec` (TREC DL 2019): the passages are BM25's first ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankdistill.artifacts import library_versions, write_atomically
from rankdistill.progress import quiet_transformers
from rankdistill.runs import iter_run
from rankdistill.teachers.llm.base import Answer, Request
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.llm.prompts import fit_passages, load_prompt

PAIRED = 10  # first passages of which all pairs are shown
DATA = Path(__file__).parents[3] / "shared" / "data" / "msmarco-dl19"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def read_tsv(path: Path) -> dict[str, str]:
    return dict(line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())


def make_model(folder: Path, texts: list[str], hidden: int, layers: int) -> None:
    """A Llama with random weights and a byte-level BPE tokenizer of 8,192 pieces learned from the passages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *["yes", "no"] * 10_000], trainer)  # one token each, for pointwise prompts
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        model_max_length=8192,
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        max_position_embeddings=8192,
        initializer_range=0.05,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[fast.eos_token_id] = 0.0
    with quiet_transformers():
        model.save_pretrained(folder)
        fast.save_pretrained(folder)


def answers(backend: TransformersBackend, requests: list[Request]) -> list[Answer]:
    found = dict(backend.answer(enumerate(requests)))
    return [found[at] for at in range(len(requests))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--model", help="a causal language model; one with random weights is made without it")
    parser.add_argument("--hidden", type=int, default=512, help="of the model that is made")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--window", type=int, default=20, help="passages a prompt; at most 26")
    parser.add_argument("--passage-tokens", type=int, default=100)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="eval/results/listwise.md")
    options = parser.parse_args()
    if not options.data.is_dir():
        print("skipped: give a folder with collection.tsv, queries.tsv and runs/bm25.trec with --data")
        return
    texts, queries = read_tsv(options.data / "collection.tsv"), read_tsv(options.data / "queries.tsv")
    ranked = [
        (query_id, doc_ids[: options.window]) for query_id, doc_ids, _ in iter_run(options.data / "runs/bm25.trec")
    ]
    lists = [(queries[query_id], [texts[doc_id] for doc_id in doc_ids]) for query_id, doc_ids in ranked]
    with tempfile.TemporaryDirectory() as made:
        if not options.model:
            make_model(Path(made), list(texts.values()), options.hidden, options.layers)
        table = compare(options.model or made, lists[: options.queries + 1], options)
    print(table)
    write_atomically(options.out, table)


def compare(model: str, lists: list[tuple[str, list[str]]], options: argparse.Namespace) -> str:
    def backend(**settings: Any) -> TransformersBackend:
        made = TransformersBackend(model, precision=options.precision, device=options.device, **settings)
        made._model = shared.load() if shared else None  # the same weights for all
        return made

    shared: TransformersBackend | None = None
    shared = backend(batch_size=1)
    size = sum(weights.numel() for weights in shared.load().parameters())
    listwise, pointwise, pairwise = (load_prompt(name) for name in ("listwise_letters", "pointwise", "pairwise"))
    parted, alone = backend(batch_size=options.window, share_prefix=False), backend(batch_size=options.window)

    def window(query: str, passages: list[str], decoding: str, tokens: int | None = None) -> Request:
        request = listwise.render(query, passages, decoding=decoding, max_tokens=tokens)  # type: ignore[arg-type]
        return Request(**{**vars(request), "before": listwise.begins})

    names = ["first", "constrained", "generate", "pointwise, prefix shared", "pointwise, each prompt whole"]
    names.append(f"pairwise, all pairs of {PAIRED}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    used: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in names}
    for turn, (query, texts) in enumerate(lists):
        passages, _ = fit_passages(texts, options.passage_tokens, shared.count_text, listwise.delimiters)
        written = listwise.separator.join(f"[{name}]" for name in listwise.names(len(passages))).removeprefix("[")
        tokens = shared.count_text([written])[0]
        single = [pointwise.render(query, [text], decoding="first") for text in passages]
        pairs = [pairwise.render(query, [a, b], decoding="first") for a, b in permutations(passages[:PAIRED], 2)]
        work = {
            "first": (shared, [window(query, passages, "first")]),
            "constrained": (shared, [window(query, passages, "constrained")]),
            "generate": (shared, [window(query, passages, "generate", tokens)]),
            "pointwise, prefix shared": (alone, single),
            "pointwise, each prompt whole": (parted, single),
            names[-1]: (alone, pairs),
        }
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            engine, requests = work[name]
            began, busy = time.perf_counter(), time.process_time()
            found = answers(engine, requests)
            if turn:  # the first query warms up
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - busy)
                usages = [answer.usage for answer in found]
                prompt, answer, cached = (sum(getattr(u, n) for u in usages) for n in ("prompt", "answer", "cached"))
                used[name].append((len(requests), prompt, answer, cached))
        print(f"query {turn} of {len(lists) - 1} done", file=sys.stderr)
    return report(size, seconds, processor, used, lists, options)


def report(
    size: int,
    seconds: dict[str, list[float]],
    processor: dict[str, list[float]],
    used: dict[str, list[tuple[int, int, int, int]]],
    lists: list[tuple[str, list[str]]],
    options: argparse.Namespace,
) -> str:
    versions = library_versions()
    made = f"`{options.model}`" if options.model else "A Llama with random weights"
    free = (
        ""
        if options.model
        else (
            " Its end token's logit is 0, never the largest, so that free generation runs for `max_tokens`: the tokens "
            "of the order of all passages as text. What it writes is nonsense; what it costs is not."
        )
    )
    lines = [
        "# Decodings of a listwise language model",
        "",
        f"`python {' '.join(sys.argv)}` on {platform.processor() or platform.machine()}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {versions['torch']}, transformers {versions['transformers']}. "
        f"{made}, {size / 1e6:.1f} million parameters, precision {options.precision}.{free} {len(lists) - 1} queries "
        f"of TREC DL 2019, BM25's first {options.window} passages, cut to {options.passage_tokens} tokens; the "
        "decodings take turns on each query; medians, ratios to `generate` taken query by query. While it ran, "
        f"{os.getloadavg()[1]:.0f} programs shared the machine's {os.cpu_count()} cores: processor seconds are this "
        "one's alone.",
        "",
        "| | calls | seconds a query | against generate | range | processor seconds | against generate "
        "| prompt tokens | shared ones | answer tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    free_run, busy = np.array(seconds["generate"]), np.array(processor["generate"])
    for name, found in seconds.items():
        ratio = np.array(found) / free_run
        calls, prompt, answer, cached = (float(np.median(part)) for part in zip(*used[name], strict=True))
        lines.append(
            f"| {name} | {calls:.0f} | {np.median(found):.2f} | {np.median(ratio):.2f} "
            f"| {ratio.min():.2f} to {ratio.max():.2f} | {np.median(processor[name]):.2f} "
            f"| {np.median(np.array(processor[name]) / busy):.2f} | {prompt:,.0f} | {cached:,.0f} | {answer:,.0f} |"
        )
    one, order = (np.median(np.array(seconds[name]) / free_run) for name in ("first", "constrained"))
    prefix = np.array(seconds["pointwise, prefix shared"]) / np.array(seconds["pointwise, each prompt whole"])
    lines += [
        "",
        f"One step takes {1 - one:.0%} less time than generation, constrained decoding {1 - order:.0%} less: it asks "
        "the model only where there is a choice, so the separators cost no steps of their own. Pointwise prompts of "
        f"one query with their common beginning computed once: {np.median(prefix):.2f} of the time of whole prompts "
        f"({prefix.min():.2f} to {prefix.max():.2f}).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
