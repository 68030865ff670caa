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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.plain import Section
from rankdistill.progress import warn
from rankdistill.students.loading import UNBOUNDED, is_cross_encoder, load_cross_encoder
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision, TokenBudget, autocast, resolve_precision, token_budget_batches
from rankdistill.teachers.base import PairTeacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

    from rankdistill.collections import Collection

PAD_MULTIPLE = 8  # rows are padded to multiples of this many tokens: full tiles for AMX and tensor cores


class CrossEncoderTraining(Section):
    """How a cross-encoder is fine-tuned before it teaches."""

    loss: Literal["bce", "listnet", "lambda"] = Field(
        "bce", description="binary cross-entropy (positives weighted by the number of negatives), or over whole lists"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training lists")
    steps: int | None = Field(None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(1e-4, gt=0)
    head_learning_rate: float | None = Field(
        None, gt=0, description="of the new scoring head (pooler and classifier); 10 times the encoder's by default"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    batch_size: int = Field(32, ge=1, description="pairs a step (bce) or lists a step (listnet, lambda)")
    negatives: int = Field(3, ge=1, description="negatives a positive, drawn from the candidates")
    positives: int = Field(1, ge=1, description="labelled positives a query at most, each with its own negatives")
    queries: int | None = Field(None, ge=1, description="training queries at most, drawn by the seed")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="the encoder's own by default; 0 spares a CPU a third of each step"
    )
    max_length: int | None = Field(None, ge=8, description="tokens a pair in training; the teacher's own by default")
    precision: Precision = "auto"


class PairJoiner(NamedTuple):
    """How a tokenizer joins two token sequences: [prefix] query [middle] document [suffix], and its token types."""

    prefix: list[int]
    middle: list[int]
    suffix: list[int]
    query_type: int
    document_type: int
    prefix_types: list[int]
    middle_types: list[int]
    suffix_types: list[int]

    @property
    def special(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)


def longest_first(query: np.ndarray, document: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths kept of each pair under the `longest_first` rule of the tokenizers library.

    The longer side gives way first; when both are longer than half the room, each gets half (the longer side, or the
    document when equal, the odd token).

    Args:
        query: int64 [N], tokens of each query.
        document: int64 [N], tokens of each document.
        room: tokens a pair may have without special tokens.
    """
    swap = query > document
    shorter, longer = np.where(swap, document, query), np.where(swap, query, document)
    cut = shorter + longer > room
    first = shorter.copy()
    second = np.where(shorter > room, shorter, np.maximum(shorter, room - shorter))
    both = first + second > room
    first = np.where(both, room // 2, first)
    second = np.where(both, room // 2 + room % 2, second)
    first, second = np.where(cut, first, shorter), np.where(cut, second, longer)
    return np.where(swap, second, first), np.where(swap, first, second)


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
            model = load_cross_encoder(folder, self.device, self.max_length)
            if model.num_labels != 1:
                raise RankdistillError(
                    f"this model gives {model.num_labels} numbers a pair, a teacher gives one", where=str(folder)
                )
            model.eval()
            # The head in float32: near 6, bf16 has only steps of 0.03. It is one row a pair, so it costs nothing.
            body = getattr(model.model, "base_model_prefix", "")
            has_head = _keep_head_in_float32(model, body)
            # The body's weights are converted once; autocast, which converts activations again and again, took a fifth
            # longer here. It remains the way for models without a separable head.
            self._formats = resolve_precision(self.device, self.precision)
            if has_head and self._formats != "fp32":
                getattr(model.model, body).to(torch.bfloat16 if self._formats == "bf16" else torch.float16)
                self._formats = "fp32"
            self._model = model
            self._joiner = None
            if _plain_pairs(model):
                self._tokenizer = _bare_tokenizer(model.tokenizer, self.limit)
                self._joiner = _learn_joiner(model.tokenizer)
        return self._model

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
        import torch

        room = self.limit - joiner.special
        query_tokens, document_tokens = self._tokenise(queries), self._tokenise(documents)
        threshold = self.query_length or room // 2
        cut = sum(len(tokens) > threshold for tokens in query_tokens)
        if self.query_length:
            query_tokens = [tokens[: self.query_length] for tokens in query_tokens]
        self._count_cut(cut, threshold)
        query_lengths = np.array([len(tokens) for tokens in query_tokens], dtype=np.int64)
        document_lengths = np.array([len(tokens) for tokens in document_tokens], dtype=np.int64)
        kept_query, kept_document = longest_first(query_lengths[pairs[:, 0]], document_lengths[pairs[:, 1]], room)
        lengths = kept_query + kept_document + joiner.special
        prefix, middle, suffix = (np.array(ids, np.int64) for ids in (joiner.prefix, joiner.middle, joiner.suffix))
        types = [np.array(ids, np.int64) for ids in (joiner.prefix_types, joiner.middle_types, joiner.suffix_types)]
        tokenizer = self.load().tokenizer
        wants = set(tokenizer.model_input_names)
        padding = int(tokenizer.pad_token_id)
        padding_type = int(getattr(tokenizer, "pad_token_type_id", 0) or 0)
        for batch in token_budget_batches(lengths, self.budget.tokens, multiple_of=PAD_MULTIPLE):
            longest = int(lengths[batch[0]])
            width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(self.limit, longest))
            ids = np.full((len(batch), width), padding, dtype=np.int64)
            kinds = np.full((len(batch), width), padding_type, dtype=np.int64)
            for row, at in enumerate(batch):
                query_row, document_row = pairs[at]
                q, d = int(kept_query[at]), int(kept_document[at])
                start, between = len(prefix), len(prefix) + q
                document, end = between + len(middle), between + len(middle) + d
                line = ids[row]
                line[:start] = prefix
                line[start:between] = query_tokens[query_row][:q]
                line[between:document] = middle
                line[document:end] = document_tokens[document_row][:d]
                line[end : end + len(suffix)] = suffix
                if "token_type_ids" in wants:
                    kind = kinds[row]
                    kind[:start], kind[between:document], kind[end : end + len(suffix)] = types
                    kind[start:between], kind[document:end] = joiner.query_type, joiner.document_type
            features = {"input_ids": torch.from_numpy(ids)}
            if "attention_mask" in wants:
                features["attention_mask"] = torch.from_numpy(
                    (np.arange(width)[None, :] < lengths[batch][:, None]).astype(np.int64)
                )
            if "token_type_ids" in wants:
                features["token_type_ids"] = torch.from_numpy(kinds)
            yield batch, features

    def _tokenise(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids without special tokens, int32 a text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

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
    ) -> dict[str, Any]:
        """Fine-tune `model` on labels and mined negatives, and use the result from now on.

        Positives are the split's documents judged relevant; negatives are drawn from the query's candidates that are
        not. What is saved is an ordinary CrossEncoder with one label, whose saved activation is the identity
        (`activation_fn` in config_sentence_transformers.json), so that `CrossEncoder(out).predict` gives the raw logit
        too. A killed training goes on from its last checkpoint, beside `out`.

        Returns:
            What it was trained on: queries, pairs, steps, seconds, last loss.
        """
        from rankdistill.teachers.cross_encoder_training import fine_tune

        if self.training is None:
            raise UsageError("this cross-encoder has no `train` settings", where="teacher.train")
        out = Path(out)
        work = out.with_name(f".{out.name}.training")
        report = fine_tune(
            resolve_model(self.model_name).path,
            self.training,
            collection,
            candidates,
            work,
            seed=seed,
            split=split,
            max_length=self.training.max_length or self.max_length,
            scoring_length=self.max_length,
            device=self.device,
        )
        out.mkdir(parents=True, exist_ok=True)
        for item in sorted((work / "model").iterdir()):
            os.replace(item, out / item.name)
        shutil.rmtree(work)
        self.use_trained(out)
        return report


def _keep_head_in_float32(model: CrossEncoder, body: str) -> bool:
    """Make the weights float32, and have the layers after the encoder take float32 from it in whatever format it gives.

    False, and nothing is changed, where there is no such layer; a language model's vocabulary is none.
    (sentence-transformers' `set_keep_in_fp32_modules` is experimental, new in 6.2, and leaves norms between the
    layers in the format they were stored in.)
    """
    from torch import nn

    if not body or not hasattr(model.model, body):
        return False
    encoder = set(getattr(model.model, body).modules())
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in encoder and module.out_features <= 4096
    ]
    if layers:
        model.float()
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    return bool(layers)


def _plain_pairs(model: CrossEncoder) -> bool:
    """Whether pairs may be joined from token ids: a fast tokenizer that pads and cuts on the right, no template."""
    tokenizer = model.tokenizer
    return bool(
        getattr(tokenizer, "is_fast", False)
        and tokenizer.padding_side == "right"
        and tokenizer.truncation_side == "right"
        and tokenizer.pad_token_id is not None
        and not getattr(tokenizer, "chat_template", None)
        and len(model) == 1
        and _learn_joiner(tokenizer) is not None
    )


def _bare_tokenizer(tokenizer: Any, limit: int) -> Any:
    """The fast tokenizer underneath, cutting single texts at the pair limit (no more can ever be used)."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_padding()
    bare.enable_truncation(limit)
    return bare


def _learn_joiner(tokenizer: Any) -> PairJoiner | None:
    """Read the layout of a pair off the tokenizer's own output; None when it does not have the usual form."""
    found: list[PairJoiner] = []
    for query, document in (("what is this", "a longer text that answers it"), ("is", "no")):
        q = tokenizer(query, add_special_tokens=False)["input_ids"]
        d = tokenizer(document, add_special_tokens=False)["input_ids"]
        pair = tokenizer(query, document, return_token_type_ids=True)
        ids, types = list(pair["input_ids"]), list(pair.get("token_type_ids") or [0] * len(pair["input_ids"]))
        sides = pair.sequence_ids(0)
        if 0 not in sides or 1 not in sides:
            return None
        start, document_start = sides.index(0), sides.index(1)
        end, document_end = start + len(q), document_start + len(d)
        if ids[start:end] != q or ids[document_start:document_end] != d or start > document_start:
            return None
        found.append(
            PairJoiner(
                ids[:start],
                ids[end:document_start],
                ids[document_end:],
                types[start],
                types[document_start],
                types[:start],
                types[end:document_start],
                types[document_end:],
            )
        )
    return found[0] if found[0] == found[1] else None
