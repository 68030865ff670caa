"""Training a listwise ranker: a causal language model learns a teacher's orders (FIRST, Gangi Reddy et al. 2024,
arXiv:2406.15657).

Each step shows windows of passages, shuffled, as the teacher of type `listwise` will show them. The loss is that of
the whole answer as text, plus RankNet on the identifiers' logits where the answer's first identifier is due: those
logits are then an order of all passages after a single step (decoding: first).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from rankdistill.artifacts import file_digest, open_artifact
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.plain import Section
from rankdistill.progress import say, warn
from rankdistill.runs import iter_run
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.loading import position_limit
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision, resolve_precision
from rankdistill.teachers.llm.chat import Chat, load_tokenizer, separators
from rankdistill.teachers.llm.local import load_causal_lm
from rankdistill.teachers.llm.prompts import Prompt, fit_passages, load_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from rankdistill.collections import Collection
    from rankdistill.losses.pairwise import RankNet

LONG = "word " * 4096  # a text longer than any budget


class Lora(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2021); merged into the weights that are saved."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    layers: Literal["all-linear"] | list[str] = Field("all-linear", description="names of the layers that get one")


class ListwiseTraining(Section):
    """How a listwise ranker is trained; the defaults are FIRST's, but for the batch."""

    orders: str = Field(description="the teacher's orders: a run file, or a folder of scored lists")
    ranking_weight: float = Field(10.0, ge=0, description="of RankNet on the first identifiers' logits; 0: text alone")
    text_weight: float = Field(1.0, ge=0, description="of the answer's language model loss")
    depth: int | None = Field(None, ge=2, description="documents of each order that are used, from its beginning")
    queries: int | None = Field(None, ge=1, description="orders at most, drawn by the seed")
    epochs: float = Field(3.0, gt=0, description="passes over the orders; each draws and shuffles its windows anew")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(5e-6, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(4, ge=1, description="windows in one pass")
    accumulation: int = Field(8, ge=1, description="passes a step")
    noise: float = Field(5.0, ge=0, description="NEFTune: uniform noise on the input embeddings; 0: none")
    lora: Lora | None = Field(None, description="train adapters; null: all weights")
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    precision: Precision = "auto"


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def orders_fingerprint(orders: str | Path) -> str:
    """Of a run file's bytes, or of scored lists."""
    path = Path(orders).expanduser()
    if path.is_dir():
        return open_artifact(path, "lists").fingerprint
    if not path.is_file():
        raise UsageError("there are no orders here", where=str(orders), fix="a run file or a folder of scored lists")
    return file_digest(path)


def read_orders(orders: str | Path, collection: Collection) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """(query_id, doc_ids, scores float32 [n]) of a run or of scored lists, scores falling.

    Of a run, only the order is the teacher's: its scores are replaced by 0, -1, -2 ... (re-rankers deal out the first
    stage's scores anew). Of scored lists, documents of one score stay tied.
    """
    path = Path(orders).expanduser()
    if not path.is_dir():
        for query_id, doc_ids, scores in iter_run(path):
            yield query_id, list(doc_ids), -np.arange(len(scores), dtype=np.float32)
        return
    lists = ScoredLists.open(path, collection)
    for number in range(len(lists)):
        item = lists[number]
        best = np.argsort(-item.scores, kind="stable")
        yield item.query_id, collection.doc_ids(item.doc_rows[best]), np.asarray(item.scores[best], dtype=np.float32)


class Window(NamedTuple):
    """Passages as they are shown, and the teacher's score of each."""

    query: str
    passages: list[str]
    scores: np.ndarray  # float32 [passages]


class Windows:
    """Training examples: item i is a window of an order, drawn and shuffled by the seed and i alone.

    Args:
        orders: each makes an order's texts, the scores falling.
        count: how many items.
        size: passages a window; a longer order gives a sample of its documents.
    """

    def __init__(self, orders: Sequence[Callable[[], Window]], count: int, size: int, seed: int) -> None:
        self.orders, self.count, self.size, self.seed = orders, count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> Window:
        lap, place = divmod(item, len(self.orders))
        at = int(np.random.default_rng([self.seed, lap]).permutation(len(self.orders))[place])
        query, passages, scores = self.orders[at]()
        shown = np.random.default_rng([self.seed, lap, at, 1]).permutation(len(passages))[: self.size]
        return Window(query, [passages[row] for row in shown], scores[shown])


def _choose(
    collection: Collection, settings: ListwiseTraining, seed: int
) -> tuple[list[Callable[[], Window]], dict[str, int]]:
    """How to make each order's texts, in an order that depends on the seed and the queries alone; and counts."""
    orders: list[tuple[bytes, str, list[int], np.ndarray]] = []
    left_out = Counter(unknown_documents=0, short_orders=0, unknown_queries=0)
    for query_id, doc_ids, scores in read_orders(settings.orders, collection):
        rows = np.asarray(collection.doc_rows(doc_ids[: settings.depth]))
        known = rows >= 0
        left_out["unknown_documents"] += int((~known).sum())
        if not collection.has_queries([query_id])[0]:
            left_out["unknown_queries"] += 1
        elif known.sum() < 2:
            left_out["short_orders"] += 1
        else:
            place = hashlib.sha256(f"{seed}\0{query_id}".encode()).digest()
            orders.append((place, query_id, rows[known].tolist(), scores[: settings.depth][known]))
    orders = sorted(orders, key=lambda item: item[:2])[: settings.queries]
    for name, text in (
        ("unknown_documents", "documents are not in the collection and were left out"),
        ("unknown_queries", "queries are not in the collection and were left out"),
        ("short_orders", "orders of fewer than two documents were left out"),
    ):
        if left_out[name]:
            warn(f"{left_out[name]:,} {text}")
    if not orders:
        raise RankdistillError("no order of two documents is left", where=settings.orders)

    def maker(query_id: str, rows: list[int], scores: np.ndarray) -> Callable[[], Window]:
        return lambda: Window(collection.query_texts([query_id])[0], collection.document_texts(rows), scores)

    counts = {"orders": len(orders), **left_out, "longest": max(len(rows) for _, _, rows, _ in orders)}
    return [maker(*item[1:]) for item in orders], counts


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Collator:
    """Windows to one padded batch; what a prompt looks like is what the teacher will show.

    Args:
        context: tokens that the model holds.
    """

    def __init__(self, chat: Chat, prompt: Prompt, passage_tokens: int, context: int) -> None:
        self.chat, self.prompt, self.passage_tokens, self.context = chat, prompt, passage_tokens, context

    def example(self, window: Window) -> tuple[list[int], list[int], list[int]]:
        """Tokens of the prompt, of the answer with its end, and of each identifier in the order shown.

        Raises:
            UsageError: an identifier is no single token, or both are longer than the context.
        """
        passages, _ = fit_passages(window.passages, self.passage_tokens, self.chat.count, self.prompt.delimiters)
        (query,), _ = fit_passages([window.query], self.passage_tokens, self.chat.count, self.prompt.delimiters)
        request = self.prompt.render(query, passages, decoding="first")
        text, names = self.chat.render(request.messages, request.before), request.identifiers
        separator, end = separators(request.before)
        order = [names[at] for at in np.argsort(-window.scores, kind="stable")]
        singles = self.chat.identifier_tokens(text, names)
        between = self.chat.answer_tokens(text, names, separator)
        answer = [token for name in order[:-1] for token in between[name]]
        answer += self.chat.answer_tokens(text, order[-1:], end)[order[-1]]
        if self.chat.tokenizer.eos_token_id is not None:
            answer.append(int(self.chat.tokenizer.eos_token_id))
        ids = self.chat.tokens(text)
        if len(ids) + len(answer) > self.context:
            raise UsageError(
                f"a prompt of {len(ids):,} tokens and its answer of {len(answer):,} are more than the "
                f"{self.context:,} tokens that the model holds",
                where=f"a window of {len(names)} passages",
                fix="a smaller window or a smaller passage_tokens",
            )
        return ids, answer, [singles[name][0] for name in names]

    def __call__(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        import torch

        from rankdistill.teachers.llm.training import padded

        rows = [self.example(window) for window in windows]
        shape = len(rows), max(len(names) for _, _, names in rows)
        identifiers, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        scores = torch.zeros(shape)
        for row, ((_, _, names), window) in enumerate(zip(rows, windows, strict=True)):
            identifiers[row, : len(names)] = torch.tensor(names)
            scores[row, : len(names)] = torch.from_numpy(window.scores.astype(np.float32))
            mask[row, : len(names)] = True
        batch = padded([(ids, answer) for ids, answer, _ in rows], int(self.chat.tokenizer.pad_token_id or 0))
        return {**batch, "identifiers": identifiers, "teacher_scores": scores, "mask": mask}


def first_loss(
    logits: Tensor,
    answers: Tensor,
    lengths: Tensor,
    identifiers: Tensor,
    teacher_scores: Tensor,
    mask: Tensor,
    ranking: RankNet,
) -> tuple[Tensor, Tensor]:
    """The two parts of FIRST's loss, scalars: cross-entropy of the answers' tokens, and RankNet on the identifiers'
    logits where the first one is due.

    Args:
        logits: [windows, n + 1, vocabulary], of the last n + 1 places; what is said at a place follows the one before.
        answers: [windows, n], int: each answer's tokens, padded on the left.
        lengths: [windows], int: tokens of each answer.
        identifiers: [windows, passages], int: the token of each passage's identifier, in the order shown.
        teacher_scores: [windows, passages], float32; only their order counts.
        mask: [windows, passages], bool: False pads windows of unequal length.
        ranking: RankNet with weighting `rank`: a weighted mean over pairs, so that its weight means the same for any
            window.
    """
    import torch

    from rankdistill.teachers.llm.training import text_loss

    due = logits[torch.arange(len(logits), device=logits.device), answers.shape[1] - lengths]
    labels = torch.full_like(identifiers, -1)
    ranks = ranking(due.gather(1, identifiers), teacher_scores.detach(), labels, mask)
    return text_loss(logits, answers, lengths), ranks


def train_listwise(
    model: str | Path,
    collection: Collection,
    out: str | Path,
    settings: ListwiseTraining | Mapping[str, Any],
    *,
    prompt: str | Prompt = "listwise_letters",
    window: int = 20,
    passage_tokens: int = 200,
    chat_template: Literal["auto", "plain"] = "auto",
    template_options: Mapping[str, Any] | None = None,
    device: str | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Train a causal language model to put passages in a teacher's order; what it was trained on and came to.

    `out` is then an ordinary causal language model (safetensors, tokenizer, chat template), its weights in the format
    that they came in: give it to a backend, or serve it. A killed training goes on from its last checkpoint, beside
    `out`.

    Args:
        model: the folder or hub name to start from.
        settings: `orders` names the teacher's.
        prompt: template, window, passage_tokens: as the teacher will ask.

    Raises:
        UsageError: the identifiers are no single tokens, or a window is longer than the model's context.
        RankdistillError: no order is left, the training diverged, or `peft` is missing where `lora` is asked for.
    """
    import torch

    from rankdistill.losses.pairwise import RankNet
    from rankdistill.teachers.llm.training import fine_tune

    train = settings if isinstance(settings, ListwiseTraining) else ListwiseTraining.model_validate(settings)
    if not train.ranking_weight and not train.text_weight:
        raise UsageError("both losses have a weight of 0", where="train", fix="ranking_weight or text_weight above 0")
    orders_fingerprint(train.orders)  # refuses what is not there before a model is loaded
    started, start = time.monotonic(), resolve_model(str(model)).path
    place = resolve_device(device)
    precision = resolve_precision(place, train.precision)
    chat = Chat(load_tokenizer(start), chat_template, template_options)
    torch.manual_seed(seed)  # adapters start at random
    # Adapters leave the weights as they are, so those may be in half precision; all weights are trained in float32.
    causal_lm = load_causal_lm(start, precision if train.lora else "fp32").to(place)
    template = prompt if isinstance(prompt, Prompt) else load_prompt(prompt, "listwise")
    collate = Collator(chat, template, passage_tokens, position_limit(causal_lm))
    orders, counts = _choose(collection, train, seed)
    widest = min(window, counts["longest"])
    collate.example(Window(LONG[:200], [LONG] * widest, np.arange(widest, dtype=np.float32)))  # now, not at step 9,000
    a_step = train.batch_size * train.accumulation
    steps = train.steps or max(1, math.ceil(train.epochs * len(orders) / a_step))
    say(f"training a listwise ranker: {len(orders):,} orders, {steps:,} steps of {a_step} windows, {precision}")
    ranking = RankNet(weighting="rank")

    def loss(logits: Tensor, **inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        text, ranks = first_loss(logits, **inputs, ranking=ranking)
        return train.text_weight * text + train.ranking_weight * ranks, [text, ranks]

    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    text, ranks = fine_tune(
        causal_lm,
        chat,
        Windows(orders, steps * a_step, window, seed),
        collate,
        loss,
        Path(out),
        title="training the listwise ranker",
        steps=steps,
        precision=precision,
        fixes=(
            "teacher.train.gradient_checkpointing: true, a smaller window or passage_tokens, or adapters (lora)",
            "lower teacher.train.learning_rate, or train with precision: fp32",
        ),
        lora=train.lora,
        dtype=getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32),
        warmup=train.warmup,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        neftune_noise_alpha=train.noise or None,
        gradient_checkpointing=train.gradient_checkpointing,
        seed=seed,
    )
    losses = {"text_loss": text, "ranking_loss": ranks, "seconds": round(time.monotonic() - started, 1)}
    return {**counts, "steps": steps, "precision": precision, **losses}
