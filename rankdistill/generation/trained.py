"""A small causal language model that was fine-tuned to write queries (as docT5query, Nogueira and Lin 2019): on the
(document, query) pairs of any labelled collection, once, and used on others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.generation.asked import DOCUMENTS_AT_ONCE, Asked, AskingGenerator
from rankdistill.generation.base import Draft
from rankdistill.progress import say
from rankdistill.recipe import build
from rankdistill.sampling.base import generator as random_generator
from rankdistill.teachers.llm.local import TransformersBackend

if TYPE_CHECKING:
    from torch import Tensor

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
    from rankdistill.students.token_batches import resolve_precision
    from rankdistill.teachers.llm import training
    from rankdistill.teachers.llm.local import load_causal_lm

    def loss(logits: Tensor, answers: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        value = training.text_loss(logits, answers, lengths)
        return value, [value]

    steps = max(1, math.ceil(settings.epochs * len(tokens) / settings.pairs_a_step))
    count = steps * settings.pairs_a_step
    laps = range(math.ceil(count / len(tokens)))
    drawn = np.concatenate([random_generator(0, 18, lap).permutation(len(tokens)) for lap in laps])[:count]
    say(f"training a generator of queries: {len(tokens):,} pairs, {steps:,} steps")
    mean, *_ = training.fine_tune(
        load_causal_lm(start.source.path, "fp32").to(start.place),
        start.chat,
        [tokens[place] for place in drawn],
        partial(training.padded, padding=int(start.chat.tokenizer.pad_token_id or 0)),
        loss,
        out,
        title="training the generator",
        steps=steps,
        precision=resolve_precision(start.place, start.precision),
        fixes=("a smaller passage_tokens or pairs_a_step", "a lower generator.learning_rate"),
        per_device_train_batch_size=settings.pairs_a_step,
        learning_rate=settings.learning_rate,
        seed=0,
    )
    return mean
