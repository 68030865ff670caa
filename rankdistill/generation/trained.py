"""A small causal language model that was fine-tuned to write queries (as docT5query, Nogueira and Lin 2019): on the
(document, query) pairs of any labelled collection, once, and used on others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.generation.asked import DOCUMENTS_AT_ONCE, Asked, AskingGenerator
from rankdistill.generation.base import Draft
from rankdistill.progress import quiet_transformers, say
from rankdistill.recipe import build
from rankdistill.sampling.base import generator as random_generator
from rankdistill.teachers.llm.local import TransformersBackend

if TYPE_CHECKING:
    from rankdistill.collections import Collection


class TrainedGenerator(AskingGenerator):
    """A language model in process, fine-tuned on labelled pairs before it writes; kept below the score store.

    Args:
        backend: type transformers, with the model to start from.
        collection: whose train queries and positives it learns from; any but the one that it will be measured on.
        pairs: of them, drawn by a seed.
        epochs: times each pair is seen.
        learning_rate: the highest, of AdamW.
        pairs_a_step: batch size of the training.
        per_document: queries written for each document; they differ by their seed.
    """

    type = "trained"

    def __init__(
        self,
        backend: dict[str, Any],
        collection: str,
        pairs: int = 2000,
        epochs: float = 1.0,
        learning_rate: float = 1e-4,
        pairs_a_step: int = 8,
        per_document: int = 3,
        **asking: Any,
    ) -> None:
        super().__init__(backend, **asking)
        if not isinstance(self.asking.backend, TransformersBackend):
            fix = "backend: {type: transformers, model: FOLDER}"
            raise UsageError("a model behind a server is not trained here", where="generator.backend", fix=fix)
        if min(pairs, pairs_a_step, per_document) < 1 or epochs <= 0 or learning_rate <= 0:
            raise UsageError(
                "pairs, epochs, learning_rate, pairs_a_step and per_document are above 0", where="generator"
            )
        self.backend, self.collection, self.pairs, self.epochs = backend, collection, pairs, epochs
        self.learning_rate, self.pairs_a_step, self.per_document = learning_rate, pairs_a_step, per_document
        (self.kind,) = list(self.prompt.kinds)[:1]
        self.examples = {self.kind: []}
        self.prompt = self.prompt.model_copy(update={"kinds": {self.kind: self.prompt.kinds[self.kind]}})

    def settings(self) -> dict[str, Any]:
        names = ("pairs", "epochs", "learning_rate", "pairs_a_step", "per_document")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}

    def prepare(self, collection: Collection, root: Path) -> None:
        """Train it, or find it trained, and ask it from now on."""
        start, labelled = self.asking.backend, open_collection(self.collection)
        assert isinstance(start, TransformersBackend)
        shown = ("prompt", "passage_tokens", "pairs", "epochs", "learning_rate", "pairs_a_step")
        values = {name: value for name, value in self.settings().items() if name in shown}
        print_ = fingerprint([self.type, values, start.fingerprint(), labelled.fingerprint])

        def make(writer: ArtifactWriter) -> None:
            pairs = training_pairs(labelled, self.pairs)
            tokens = [self._tokens(start, passage, query) for passage, query in pairs]
            writer.counts["pairs"] = len(pairs)
            writer.notes["loss"] = fine_tune(start, tokens, self, writer.path / "model")

        folder = root / "generators" / print_
        inputs = {"collection": labelled.fingerprint}
        obtain(folder, kind="generator", fingerprint=print_, settings=values, inputs=inputs, make=make, resume=True)
        self.asking.backend = build("backend", {**self.backend, "model": str(folder / "model")})

    def _tokens(self, start: TransformersBackend, passage: str, query: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, which are not learned, and of the query with its end."""
        chat = start.chat
        (text,) = self._fitted([passage])
        prompt = chat.tokens(chat.render(self.prompt.render(self.kind, text, []).messages))
        answer = chat.text_tokens(query if chat.template else f" {query}")[: self.max_tokens]
        return prompt, [*answer, int(chat.tokenizer.eos_token_id)]

    def asked(self, collection: Collection, rows: Sequence[int]) -> Iterator[list[Asked]]:
        for start in range(0, len(rows), DOCUMENTS_AT_ONCE):
            some = rows[start : start + DOCUMENTS_AT_ONCE]
            pairs = list(zip(collection.doc_ids(some), collection.document_texts(some), strict=True))
            seeds = range(self.per_document)
            yield [Asked(Draft("", doc_id, self.kind), text, seed=seed) for seed in seeds for doc_id, text in pairs]


def training_pairs(collection: Collection, most: int) -> list[tuple[str, str]]:
    """(text of the best labelled document, query) of train queries; those that are held out for dev are not among them.

    Raises:
        RankdistillError: no train query has a positive.
    """
    if "train" not in collection.splits:
        raise RankdistillError(
            "a generator is trained on labelled queries: there is no train split", where=collection.spec
        )
    training, qrels = collection.training_splits()[0], collection.qrels("train")
    chosen = random_generator(0, 17).permutation(len(training))[:most]
    ids = [training[place] for place in chosen if max(qrels.get(training[place], {"": 0}).values()) > 0]
    if not ids:
        raise RankdistillError("no train query has a relevant document", where=collection.spec)
    best = [max(qrels[query_id], key=lambda doc_id: qrels[query_id][doc_id]) for query_id in ids]
    texts = collection.document_texts(collection.doc_rows(best))
    return list(zip(texts, collection.query_texts(ids), strict=True))


def fine_tune(
    start: TransformersBackend, tokens: list[tuple[list[int], list[int]]], settings: TrainedGenerator, out: Path
) -> float:
    """Minimise the cross-entropy of the queries' tokens after their prompts; the mean loss of the last steps."""
    import torch
    from torch.nn import functional

    from rankdistill.students.token_batches import GradientCache, resolve_precision
    from rankdistill.teachers.llm.local import abilities, load_causal_lm
    from rankdistill.training.loop import TrainingLoop, loop_arguments

    class Writing(TrainingLoop):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            if known.position_ids:
                texts["position_ids"] = (texts["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            kept = int(inputs["learned"].sum(dim=1).max()) + 1
            logits = torch.cat(cache.run(lambda part: model(**part).logits[:, -kept:].float(), [texts]))
            learned = inputs["learned"][:, 1 - kept :]
            loss = functional.cross_entropy(logits[:, :-1][learned], texts["input_ids"][:, 1 - kept :][learned])
            recent.append(float(loss.detach()))
            return loss

        def use_less_memory(self, error: RuntimeError, inputs: dict[str, Any]) -> None:
            cache.shrink(error, [inputs], self.args.device, "a smaller passage_tokens or pairs_a_step")

    def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
        """Padded on the left, so that the queries end together."""
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), int(start.chat.tokenizer.pad_token_id or 0))
        mask, learned = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, width - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
            mask[row, width - len(prompt) - len(answer) :] = 1
            learned[row, width - len(answer) :] = True
        return {"input_ids": ids, "attention_mask": mask, "learned": learned}

    recent: list[float] = []
    cache = GradientCache()
    precision = resolve_precision(start.device, start.precision)
    model = load_causal_lm(start._source.path, "fp32").to(start.device)
    known = abilities(model)
    model.config.use_cache = False
    steps = max(1, math.ceil(settings.epochs * len(tokens) / settings.pairs_a_step))
    count = steps * settings.pairs_a_step
    laps = range(math.ceil(count / len(tokens)))
    drawn = np.concatenate([random_generator(0, 18, lap).permutation(len(tokens)) for lap in laps])[:count]
    data = [tokens[place] for place in drawn]
    say(f"training a generator of queries: {len(tokens):,} pairs, {steps:,} steps")
    work = out.with_name(f".{out.name}.training")
    arguments = loop_arguments(
        work,
        steps,
        start.device,
        precision,
        warmup=0.1,
        checkpoints=4,
        per_device_train_batch_size=settings.pairs_a_step,
        learning_rate=settings.learning_rate,
        logging_steps=max(1, steps // 20),
        seed=0,
    )
    Writing(model, arguments, data, collate, "training a generator").run()
    if any(not bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        raise RankdistillError("training the generator diverged", fix="a lower generator.learning_rate")
    model.config.use_cache = True
    with quiet_transformers():
        model.save_pretrained(str(out))
        start.chat.tokenizer.save_pretrained(str(out))
    shutil.rmtree(work, ignore_errors=True)
    return round(float(np.mean(recent[-20:])), 4) if recent else math.nan
