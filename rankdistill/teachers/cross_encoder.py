"""Cross-encoder teachers: any sequence-classification ranker, or one fine-tuned from an encoder within the run.

Scoring is fast because nothing is done twice: each query and each document is tokenised once a chunk and pairs are
joined from token ids, batches are cut by tokens after sorting by true token length, the body runs in bf16 where the
device gains from it while the last layer and the score stay in float32, and results leave the device once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.plain import Section
from rankdistill.progress import warn
from rankdistill.students.loading import UNBOUNDED, is_cross_encoder, load_cross_encoder
from rankdistill.students.models import resolve_model
from rankdistill.students.pairs import (
    PAD_MULTIPLE,
    PairJoiner,
    bare_tokenizer,
    learn_joiner,
    longest_first,
    padding_of,
    token_ids,
)
from rankdistill.students.token_batches import Precision, TokenBudget, autocast, resolve_precision, token_budget_batches
from rankdistill.teachers.base import Dev, PairTeacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

    from rankdistill.collections import Collection


class CrossEncoderTraining(Section):
    """How a cross-encoder is fine-tuned before it teaches."""

    start: Literal["encoder", "head"] = Field(
        "encoder",
        description="rank as the encoder does before the first step (see students/pair_encoder.py; an encoder that "
        "cannot be had that way falls back), or a new head on the first token, which starts at random",
    )
    loss: Literal["lce", "bce", "listnet", "lambda"] = Field(
        "lce",
        description="over a positive and its negatives: softmax cross-entropy to the labels' gains, binary "
        "cross-entropy (positives weighted by the number of negatives), ListNet, or LambdaLoss",
    )
    target_temperature: float = Field(
        0.2, gt=0, description="of listnet: the target is softmax(grade / this); at 1 a positive gets e times the rest"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training lists")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(1e-4, gt=0)
    head_learning_rate: float | None = Field(
        None, gt=0, description="of what is new (head, pooler, classifier); 10 times the encoder's by default"
    )
    gate_learning_rate: float = Field(1e-2, gt=0, description="of the gates between the sides, with start: encoder")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: int = Field(8, ge=1, description="lists a step: a positive and its negatives each")
    negatives: int = Field(3, ge=1, description="negatives a positive, one from each depth of the candidates")
    positives: int = Field(1, ge=1, description="labelled positives a query at most, each with its own negatives")
    refresh: bool = Field(
        False, description="halfway, score the candidates with the model as it is and draw negatives by its order"
    )
    negatives_below: float = Field(
        0.95, gt=0, le=1, description="at the refresh, only documents below this share of the positive's score"
    )
    queries: int | None = Field(None, ge=1, description="training queries at most, drawn by the seed")
    checkpoints: int = Field(
        4, ge=1, description="looks at dev, beside the one before the first step; the best is kept"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many looks at dev without a better one")
    dev_queries: int = Field(100, ge=0, description="dev queries that choose the checkpoint; 0 keeps the last one")
    dev_depth: int = Field(20, ge=2, description="of their candidates, as many are re-ranked")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="the encoder's own by default; 0 spares a CPU a third of each step"
    )
    max_length: int | None = Field(None, ge=8, description="tokens a pair in training; the teacher's own by default")
    precision: Precision = "auto"


class CrossEncoderTeacher(PairTeacher):
    """A cross-encoder that reads query and document together; its raw logit is the score.

    Pairs are cut exactly as `CrossEncoder.predict` cuts them (longest first, at `max_length`) as long as the query
    stays within `query_length`. A longer query is cut to `query_length` tokens before, so that room is left for the
    document; how many were cut is said once.

    Args:
        model: a cross-encoder's folder or hub name; with `train`, the encoder it is fine-tuned from.
        max_length: tokens a pair; the model's own limit by default.
        query_length: tokens a query; unlimited (the longest-first rule alone) by default.
        precision: auto, fp32, bf16 or fp16; auto is bf16 where the device's hardware has it.
        token_budget: padded tokens a batch; 2,048 on a CPU and 65,536 on a GPU by default.
        device: cpu, cuda, cuda:1 ...; a GPU if there is one by default.
        train: fine-tune first, see CrossEncoderTraining.
    """

    type = "cross_encoder"
    score_kind = "logit"

    def __init__(
        self,
        model: str,
        max_length: int | None = None,
        query_length: int | None = None,
        precision: Precision = "auto",
        token_budget: int | None = None,
        device: str | None = None,
        train: CrossEncoderTraining | None = None,
    ) -> None:
        self.model_name, self.max_length, self.query_length = model, max_length, query_length
        self.precision: Precision = precision
        self.token_budget, self._device_name = token_budget, device
        self.training = CrossEncoderTraining.model_validate(train) if train is not None else None
        self.cut_queries = 0  # distinct queries cut so far, each counted once a chunk
        self._reported = 0
        self._warned = False
        self._folder: Path | None = None
        self._model: CrossEncoder | None = None
        self._joiner: PairJoiner | None = None
        self._tokenizer: Any = None
        self._formats: Precision = "fp32"  # what autocast does on top of the weights' own format

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def needs_training(self) -> bool:
        return self.training is not None and self._folder is None

    def training_inputs(self) -> dict[str, Any]:
        return {"model": resolve_model(self.model_name).revision}

    def use_trained(self, folder: Path) -> None:
        self._folder, self._model = Path(folder), None

    def _source(self) -> tuple[Path, str]:
        if self.needs_training:
            raise RankdistillError("this cross-encoder must be trained before it teaches", fix="call train() first")
        source = resolve_model(str(self._folder) if self._folder else self.model_name)
        return source.path, source.revision

    def fingerprint(self) -> str:
        device = self.device
        return fingerprint(
            {
                "type": self.type,
                "revision": self._source()[1],
                "max_length": self.max_length,
                "query_length": self.query_length,
                "precision": resolve_precision(device, self.precision),
            }
        )

    def describe(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "model": self.model_name,
            "max_length": self.max_length,
            "query_length": self.query_length,
            "precision": resolve_precision(self.device, self.precision),
            "train": self.training.model_dump() if self.training else None,
        }

    @property
    def device(self) -> torch.device:
        return resolve_device(self._device_name)

    def load(self) -> CrossEncoder:
        """The model, loaded once.

        Raises:
            RankdistillError: it is no cross-encoder with one score a pair.
        """
        import torch

        if self._model is None:
            folder, _ = self._source()
            if not is_cross_encoder(folder):
                raise RankdistillError(
                    "this model is an encoder, not a cross-encoder: it has no scoring head",
                    where=str(folder),
                    fix="give `train` settings to fine-tune a cross-encoder from it, or use type: bi_encoder",
                )
            from rankdistill.students.pair_encoder import open_pair_encoder

            model = open_pair_encoder(folder, self.max_length, str(self.device))
            model = model or load_cross_encoder(folder, self.device, self.max_length)
            if model.num_labels != 1:
                raise RankdistillError(
                    f"this model gives {model.num_labels} numbers a pair, a teacher gives one", where=str(folder)
                )
            self._take(model.eval())
            # The head in float32: near 6, bf16 has only steps of 0.03. It is one row a pair, so it costs nothing.
            body = _body(model)
            # The body's weights are converted once; autocast, which converts activations again and again, took a fifth
            # longer here. It remains the way for models without a separable head.
            if body is not None and self._formats != "fp32":
                body.to(torch.bfloat16 if self._formats == "bf16" else torch.float16)
                self._formats = "fp32"
        assert self._model is not None
        return self._model

    def _take(self, model: CrossEncoder) -> None:
        self._model, self._joiner = model, _joiner(model)
        self._formats = resolve_precision(self.device, self.precision)
        if self._joiner is not None:
            self._tokenizer = bare_tokenizer(model.tokenizer, self.limit)

    def over(self, model: CrossEncoder) -> CrossEncoderTeacher:
        """A teacher that scores with a model in training, as it is at the time."""
        teacher = CrossEncoderTeacher(
            self.model_name, self.max_length, self.query_length, self.precision, self.token_budget, self._device_name
        )
        teacher._take(model)
        return teacher

    @property
    def limit(self) -> int:
        """Tokens a pair."""
        model = self._model or self.load()
        return min(int(model.max_seq_length or UNBOUNDED), UNBOUNDED)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] logits of pairs [N, 2]; see PairTeacher."""
        import torch

        from rankdistill.students.base import in_parts, to_device

        model = self.load()
        scores = np.empty(len(pairs), dtype=np.float32)
        if not len(pairs):
            return scores
        if self._joiner is None:
            batches = self._plain_batches(model, queries, documents, pairs)
        else:
            batches = self._joined_batches(self._joiner, queries, documents, pairs)
        device = self.device
        order: list[np.ndarray] = []
        logits: list[torch.Tensor] = []

        def logits_of(features: dict[str, Any]) -> torch.Tensor:
            return model(to_device(features, device))["scores"].float().reshape(-1)

        with torch.inference_mode(), autocast(device, self._formats):
            for positions, found in in_parts(batches, self.budget, logits_of):
                logits.append(found)
                order.append(positions)
            scores[np.concatenate(order)] = torch.cat(logits).cpu().numpy()  # the only wait for the device
        return scores

    @cached_property
    def budget(self) -> TokenBudget:
        budget = TokenBudget(self.device, 2048)  # a core's caches hold a few thousand tokens' activations
        budget.tokens = self.token_budget or budget.tokens
        return budget

    def _joined_batches(
        self, joiner: PairJoiner, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Batches from texts tokenised once each."""

        room = self.limit - joiner.special
        if room < 2:
            raise UsageError(
                f"{self.limit} tokens leave no room for a query and a document beside {joiner.special} that frame them",
                where="teacher.max_length",
                fix=f"at least {joiner.special + 2}",
            )
        query_tokens, document_tokens = (token_ids(self._tokenizer, texts) for texts in (queries, documents))
        threshold = self.query_length or room // 2
        cut = sum(len(tokens) > threshold for tokens in query_tokens)
        if self.query_length:
            query_tokens = [tokens[: self.query_length] for tokens in query_tokens]
        self._count_cut(cut, threshold)
        query_lengths = np.array([len(tokens) for tokens in query_tokens], dtype=np.int64)
        document_lengths = np.array([len(tokens) for tokens in document_tokens], dtype=np.int64)
        kept_query, kept_document = longest_first(query_lengths[pairs[:, 0]], document_lengths[pairs[:, 1]], room)
        lengths = kept_query + kept_document + joiner.special
        tokenizer = self.load().tokenizer
        wants = {"input_ids", *tokenizer.model_input_names, *(["token_type_ids"] if joiner.two_sided else [])}
        padding = padding_of(tokenizer)
        for batch in token_budget_batches(lengths, self.budget.tokens, multiple_of=PAD_MULTIPLE):
            sides = [
                (query_tokens[pairs[at, 0]][: kept_query[at]], document_tokens[pairs[at, 1]][: kept_document[at]])
                for at in batch
            ]
            features = joiner.join(sides, padding, self.limit)
            yield batch, {name: value for name, value in features.items() if name in wants}

    def _plain_batches(
        self, model: CrossEncoder, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Batches by the model's own preprocessing (chat templates, slow tokenizers, padding on the left)."""
        if self.query_length:
            raise UsageError("query_length is not supported for this model's tokenizer", where="teacher.query_length")
        words = [len(text) for text in queries], [len(text) for text in documents]
        # About four characters a token; enough to sort by and to keep batches near the budget.
        lengths = np.array([min((words[0][q] + words[1][d]) // 4 + 8, self.limit) for q, d in pairs])
        for batch in token_budget_batches(lengths, self.budget.tokens):
            texts = [(queries[q], documents[d]) for q, d in pairs[batch]]
            yield batch, dict(model.preprocess(texts))

    def _count_cut(self, cut: int, threshold: int) -> None:
        self.cut_queries += cut
        if cut and not self._warned:
            self._warned = True
            warn(
                f"{cut} of the first queries have more than {threshold} tokens and are cut "
                f"(pairs hold {self.limit} tokens); later ones are counted silently"
            )

    def take_report(self) -> dict[str, Any]:
        """How many queries were cut."""
        cut, self._reported = self.cut_queries - self._reported, self.cut_queries
        return {"cut_query": cut} if cut else {}

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        collection: Collection,
        candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
        out: Path,
        seed: int,
        split: str = "train",
        dev: Dev | None = None,
    ) -> dict[str, Any]:
        """Fine-tune `model` on labels and mined negatives, and use the result from now on.

        Each of a query's positives makes a list of its own, with negatives from its candidates (those of a lower
        grade; their gain is in the target of `lce`), one from each depth. With `start: head` an ordinary CrossEncoder
        is saved; with `start: encoder` one that `CrossEncoder(out, trust_remote_code=True)` loads where this package
        is installed. Either has the identity as its activation, so that `predict` gives the raw logit. A killed
        training goes on from its last checkpoint, beside `out`.

        Returns:
            What it was trained on (queries, pairs, steps), what was lost and gained (loss, its floor and what guessing
            gives; nDCG@10 of re-ranked dev candidates by step), seconds.
        """
        from rankdistill.teachers.cross_encoder_training import fine_tune

        if self.training is None:
            raise UsageError("this cross-encoder has no `train` settings", where="teacher.train")
        out = Path(out)
        work = out.with_name(f".{out.name}.training")
        report = fine_tune(self, self.training, collection, candidates, work, seed=seed, split=split, dev=dev)
        out.mkdir(parents=True, exist_ok=True)
        for item in sorted((work / "model").iterdir()):
            os.replace(item, out / item.name)
        shutil.rmtree(work)
        self.use_trained(out)
        return report


def _body(model: CrossEncoder) -> Any:
    """The encoder, whose weights may change their format, after the weights are made float32 and the layers after it
    take float32 from it in whatever format it gives.

    None, and nothing is changed, where there is no such layer; a language model's vocabulary is none.
    (sentence-transformers' `set_keep_in_fp32_modules` is experimental, new in 6.2, and leaves norms between the
    layers in the format they were stored in.)
    """
    from torch import nn

    from rankdistill.students.pair_encoder import PairEncoder

    if isinstance(model[0], PairEncoder):
        return model[0].float().model  # it gives its own head float32
    body = getattr(model.model, "base_model_prefix", "")
    if not body or not hasattr(model.model, body):
        return None
    encoder = getattr(model.model, body)
    inner = set(encoder.modules())
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in inner and module.out_features <= 4096
    ]
    if layers:
        model.float()
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    return encoder if layers else None


def _joiner(model: CrossEncoder) -> PairJoiner | None:
    """How pairs are joined from token ids: by a fast tokenizer that pads and cuts on the right, with no template."""
    tokenizer = model.tokenizer
    plain = (
        getattr(tokenizer, "is_fast", False)
        and tokenizer.padding_side == "right"
        and tokenizer.truncation_side == "right"
        and tokenizer.pad_token_id is not None
        and not getattr(tokenizer, "chat_template", None)
        and len(model) == 1
    )
    return getattr(model[0], "joiner", None) or learn_joiner(tokenizer) if plain else None
