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
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainingArguments

from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError, require
from rankdistill.losses.pairwise import RankNet
from rankdistill.progress import quiet_transformers, say, warn
from rankdistill.runs import iter_run
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.loading import position_limit
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import GradientCache, resolve_precision
from rankdistill.teachers.listwise_settings import ListwiseTraining, Lora, orders_fingerprint
from rankdistill.teachers.llm.chat import Chat, load_tokenizer, separators
from rankdistill.teachers.llm.local import abilities, load_causal_lm
from rankdistill.teachers.llm.prompts import Prompt, fit_passages, load_prompt
from rankdistill.training.loop import TrainingLoop, loop_arguments

if TYPE_CHECKING:
    from rankdistill.collections import Collection

CHECKPOINTS = 4  # over a training
LONG = "word " * 4096  # a text longer than any budget


class Window(NamedTuple):
    """Passages as they are shown, and the teacher's score of each."""

    query: str
    passages: list[str]
    scores: np.ndarray  # float32 [passages]


def first_loss(
    logits: Tensor,
    answers: Tensor,
    lengths: Tensor,
    identifiers: Tensor,
    teacher_scores: Tensor,
    mask: Tensor,
    ranking: RankNet,
) -> tuple[Tensor, Tensor]:
    """The two parts of FIRST's loss.

    Args:
        logits: [windows, n + 1, vocabulary], of the last n + 1 places; what is said at a place follows the one before.
        answers: [windows, n], int: each answer's tokens, padded on the left.
        lengths: [windows], int: tokens of each answer.
        identifiers: [windows, passages], int: the token of each passage's identifier, in the order shown.
        teacher_scores: [windows, passages], float32; only their order counts.
        mask: [windows, passages], bool: False pads windows of unequal length.
        ranking: RankNet with weighting `rank`: a weighted mean over pairs, so that its weight means the same for any
            window.

    Returns:
        Cross-entropy of the answers' tokens (mean over all of them), and RankNet on the identifiers' logits where the
        first one is due; scalars.
    """
    logits = logits.float()
    width = answers.shape[1]
    places = torch.arange(width, device=answers.device)
    said = places[None, :] >= width - lengths[:, None]
    text = functional.cross_entropy(logits[:, :-1][said], answers[said])
    due = logits[torch.arange(len(logits), device=logits.device), width - lengths]
    scores = due.gather(1, identifiers)
    labels = torch.full_like(identifiers, -1)
    return text, ranking(scores, teacher_scores.detach(), labels, mask)


class Windows:
    """Training examples: item i is a window of an order, drawn and shuffled by the seed and i alone.

    Args:
        orders: (query, texts, scores) a query, the scores falling.
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
        text = self.chat.render(request.messages, request.before)
        names = request.identifiers
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
        rows = [self.example(window) for window in windows]
        width = max(len(ids) + len(answer) for ids, answer, _ in rows)
        longest, passages = max(len(answer) for _, answer, _ in rows), max(len(names) for _, _, names in rows)
        padding = int(self.chat.tokenizer.pad_token_id or 0)
        batch = {
            "input_ids": torch.full((len(rows), width), padding),
            "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
            "answers": torch.full((len(rows), longest), padding),
            "lengths": torch.tensor([len(answer) for _, answer, _ in rows]),
            "identifiers": torch.zeros(len(rows), passages, dtype=torch.long),
            "teacher_scores": torch.zeros(len(rows), passages),
            "mask": torch.zeros(len(rows), passages, dtype=torch.bool),
        }
        for row, ((ids, answer, names), window) in enumerate(zip(rows, windows, strict=True)):
            batch["input_ids"][row, width - len(ids) - len(answer) :] = torch.tensor(ids + answer)
            batch["attention_mask"][row, width - len(ids) - len(answer) :] = 1
            batch["answers"][row, longest - len(answer) :] = torch.tensor(answer)
            batch["identifiers"][row, : len(names)] = torch.tensor(names)
            batch["teacher_scores"][row, : len(names)] = torch.from_numpy(window.scores.astype(np.float32))
            batch["mask"][row, : len(names)] = True
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# Orders


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


def _choose(
    collection: Collection, settings: ListwiseTraining, seed: int
) -> tuple[list[Callable[[], Window]], dict[str, int]]:
    """How to make each order's texts, in an order that depends on the seed and the queries alone."""
    orders: list[tuple[bytes, str, list[int], np.ndarray]] = []
    counts = {"orders": 0, "unknown_documents": 0, "short_orders": 0, "unknown_queries": 0}
    for query_id, doc_ids, scores in read_orders(settings.orders, collection):
        doc_ids, scores = doc_ids[: settings.depth], scores[: settings.depth]
        rows = np.asarray(collection.doc_rows(doc_ids))
        known = rows >= 0
        counts["unknown_documents"] += int((~known).sum())
        if not collection.has_queries([query_id])[0]:
            counts["unknown_queries"] += 1
        elif known.sum() < 2:
            counts["short_orders"] += 1
        else:
            place = hashlib.sha256(f"{seed}\0{query_id}".encode()).digest()
            orders.append((place, query_id, rows[known].tolist(), scores[known]))
    orders = sorted(orders, key=lambda item: item[:2])[: settings.queries]
    counts |= {"orders": len(orders), "longest": max((len(item[2]) for item in orders), default=0)}
    for name, text in (
        ("unknown_documents", "documents are not in the collection and were left out"),
        ("unknown_queries", "queries are not in the collection and were left out"),
        ("short_orders", "orders of fewer than two documents were left out"),
    ):
        if counts[name]:
            warn(f"{counts[name]:,} {text}")
    if not orders:
        raise RankdistillError("no order of two documents is left", where=settings.orders)

    def maker(query_id: str, rows: list[int], scores: np.ndarray) -> Callable[[], Window]:
        return lambda: Window(collection.query_texts([query_id])[0], collection.document_texts(rows), scores)

    return [maker(*item[1:]) for item in orders], counts


# ---------------------------------------------------------------------------------------------------------------------
# Training


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

    `out` is then an ordinary causal language model (safetensors, tokenizer, chat template): give it to a backend, or
    serve it. A killed training goes on from its last checkpoint, beside `out`.

    Args:
        model: the folder or hub name to start from.
        settings: `orders` names the teacher's.
        prompt: template, window, passage_tokens: as the teacher will ask.

    Raises:
        UsageError: the identifiers are no single tokens, or a window is longer than the model's context.
        RankdistillError: no order is left, the training diverged, or `peft` is missing where `lora` is asked for.
    """
    settings = settings if isinstance(settings, ListwiseTraining) else ListwiseTraining.model_validate(settings)
    if not settings.ranking_weight and not settings.text_weight:
        raise UsageError("both losses have a weight of 0", where="train", fix="ranking_weight or text_weight above 0")
    orders_fingerprint(settings.orders)  # refuses what is not there before a model is loaded
    started, start, out = time.monotonic(), resolve_model(str(model)).path, Path(out)
    place = resolve_device(device)
    precision = resolve_precision(place, settings.precision)
    chat = Chat(load_tokenizer(start), chat_template, template_options)
    torch.manual_seed(seed)  # adapters start at random
    # Adapters leave the weights as they are, so those may be in half precision; all weights are trained in float32.
    causal_lm = load_causal_lm(start, precision if settings.lora else "fp32").to(place)
    template = prompt if isinstance(prompt, Prompt) else load_prompt(prompt, "listwise")
    collate = Collator(chat, template, passage_tokens, position_limit(causal_lm))
    orders, counts = _choose(collection, settings, seed)
    widest = min(window, counts["longest"])
    collate.example(Window(LONG[:200], [LONG] * widest, np.arange(widest, dtype=np.float32)))  # now, not at step 9,000
    a_step = settings.batch_size * settings.accumulation
    steps = settings.steps or max(1, math.ceil(settings.epochs * len(orders) / a_step))
    examples = Windows(orders, steps * a_step, window, seed)
    say(f"training a listwise ranker: {len(orders):,} orders, {steps:,} steps of {a_step} windows, {precision}")
    if settings.lora:
        causal_lm = _adapted(causal_lm, settings.lora)
    causal_lm.config.use_cache = False
    work = out.with_name(f".{out.name}.training")
    arguments = loop_arguments(
        work,
        steps,
        place,
        precision,
        warmup=settings.warmup,
        checkpoints=CHECKPOINTS,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        neftune_noise_alpha=settings.noise or None,
        gradient_checkpointing=settings.gradient_checkpointing,
        logging_steps=max(1, steps // 20),
        seed=seed,
    )
    trainer = FirstTrainer(causal_lm, arguments, examples, collate, settings)
    trainer.run()
    if any(not bool(torch.isfinite(weight).all()) for weight in causal_lm.parameters()):
        raise RankdistillError(
            "training the listwise ranker diverged",
            fix="lower teacher.train.learning_rate, or train with precision: fp32",
        )
    if settings.lora:
        causal_lm = causal_lm.merge_and_unload()
    _save(causal_lm, chat, start, out)
    shutil.rmtree(work, ignore_errors=True)
    text, ranks = np.mean(trainer.recent, axis=0) if trainer.recent else (math.nan, math.nan)
    losses = {"text_loss": round(float(text), 4), "ranking_loss": round(float(ranks), 4)}
    seconds = round(time.monotonic() - started, 1)
    return {**counts, "steps": steps, "precision": precision, **losses, "seconds": seconds}


class FirstTrainer(TrainingLoop):
    """Minimises FIRST's loss over `Windows`; `recent` holds both parts of the last 20 steps' batches."""

    def __init__(
        self, model: Any, args: TrainingArguments, examples: Windows, collate: Collator, settings: ListwiseTraining
    ) -> None:
        super().__init__(model, args, examples, collate, "training the listwise ranker")
        self.settings, self.known = settings, abilities(model)
        self.cache, self.ranking = GradientCache(), RankNet(weighting="rank")
        self.recent: list[tuple[float, float]] = []

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        inputs = dict(inputs)
        texts = {"input_ids": inputs.pop("input_ids"), "attention_mask": inputs.pop("attention_mask")}
        if self.known.position_ids:
            texts["position_ids"] = (texts["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        kept = inputs["answers"].shape[1] + 1
        whole: dict[str, Any] = {"logits_to_keep": kept} if self.known.logits_to_keep else {}
        logits = self.cache.run(lambda part: model(**part, **whole).logits[:, -kept:], [texts])
        text, ranks = first_loss(torch.cat(logits), **inputs, ranking=self.ranking)
        self.recent.append((float(text.detach()), float(ranks.detach())))
        del self.recent[: -20 * self.settings.accumulation]
        return self.settings.text_weight * text + self.settings.ranking_weight * ranks

    def remember(self) -> None:
        self.before = list(self.recent)

    def restore(self) -> None:
        self.recent = list(self.before)

    def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
        fix = "teacher.train.gradient_checkpointing: true, a smaller window or passage_tokens, or adapters (lora)"
        self.cache.shrink(error, [inputs], self.args.device, fix)


def _adapted(model: Any, lora: Lora) -> Any:
    peft = require("peft", extra="llm", why="training adapters (train.lora)")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.layers
    )
    return peft.get_peft_model(model, config)


def _save(model: Any, chat: Chat, start: Path, out: Path) -> None:
    """An ordinary causal language model, its weights in the format that they came in."""
    config = json.loads((start / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    model.config.use_cache = True
    with quiet_transformers():
        model.to(getattr(torch, name, torch.float32)).save_pretrained(str(out))
        chat.tokenizer.save_pretrained(str(out))
