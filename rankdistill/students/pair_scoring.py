"""Scoring (query, document) pairs with a cross-encoder, as a teacher and as a student that re-ranks.

It is fast because nothing is done twice: each query and each document is tokenised once a call and pairs are joined
from token ids, batches are cut by tokens after sorting by true token length, the body runs in bf16 where the device
gains from it while the last layer and the score stay in float32, and results leave the device once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankdistill.errors import UsageError
from rankdistill.progress import quiet_transformers, warn
from rankdistill.students.loading import UNBOUNDED, is_cross_encoder, load_cross_encoder, position_limit
from rankdistill.students.pairs import (
    PAD_MULTIPLE,
    PairJoiner,
    Sides,
    bare_tokenizer,
    learn_joiner,
    padding_of,
    token_ids,
)
from rankdistill.students.token_batches import Precision, TokenBudget, autocast, resolve_precision, token_budget_batches

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder
    from torch import nn

CPU_TOKENS = 2048  # padded tokens a batch: a core's caches hold a few thousand tokens' activations


class PairScorer:
    """A cross-encoder and how pairs come to it, as it is at the time: it may be in training.

    Args:
        model: the cross-encoder, with one score a pair.
        precision: what autocast does on top of the weights' own format.
        token_budget: padded tokens a batch; CPU_TOKENS, or what a GPU holds, unless given.
        query_length: tokens a query; the longest-first rule alone decides unless given.
    """

    def __init__(
        self,
        model: CrossEncoder,
        precision: Precision = "auto",
        token_budget: int | None = None,
        query_length: int | None = None,
    ) -> None:
        self.model, self.query_length = model, query_length
        self.formats: Precision = resolve_precision(model.device, precision)
        self.budget = TokenBudget(model.device, CPU_TOKENS)
        self.budget.tokens = token_budget or self.budget.tokens
        self.joiner = _joiner(model)
        self.tokenizer = bare_tokenizer(model.tokenizer, self.limit) if self.joiner is not None else None
        self.cut_queries = 0  # distinct queries cut so far, each counted once a call
        self._warned = False

    @property
    def limit(self) -> int:
        """Tokens a pair."""
        return min(int(self.model.max_seq_length or UNBOUNDED), UNBOUNDED)

    def freeze(self) -> PairScorer:
        """Convert the weights of a model that will not be trained, once; autocast, which converts activations again
        and again, took a fifth longer. It remains the way for models without a separable head."""
        import torch

        self.model.eval()
        # The head in float32: near 6, bf16 has only steps of 0.03. It is one row a pair, so it costs nothing.
        body = _body(self.model)
        if body is not None and self.formats != "fp32":
            body.to(torch.bfloat16 if self.formats == "bf16" else torch.float16)
            self.formats = "fp32"
        return self

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] logits.

        Args:
            pairs: int64 [N, 2], row numbers in `queries` and `documents`.
        """
        import torch

        from rankdistill.students.base import in_parts, to_device

        scores = np.empty(len(pairs), dtype=np.float32)
        if not len(pairs):
            return scores
        device = self.model.device
        order: list[np.ndarray] = []
        logits: list[torch.Tensor] = []

        def logits_of(features: dict[str, Any]) -> torch.Tensor:
            return self.model(to_device(features, device))["scores"].float().reshape(-1)

        with torch.inference_mode(), autocast(device, self.formats):
            for positions, scored in in_parts(self._batches(queries, documents, pairs), self.budget, logits_of):
                logits.append(scored)
                order.append(positions)
            scores[np.concatenate(order)] = torch.cat(logits).cpu().numpy()  # the only wait for the device
        return scores

    def features(
        self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray, document_length: int | None = None
    ) -> dict[str, torch.Tensor]:
        """All pairs as one padded batch.

        Args:
            document_length: tokens of a document at most, before the pair is cut.
        """
        if self.joiner is None:
            return dict(self.model.preprocess([(queries[q], documents[d]) for q, d in pairs]))
        sides, _ = self._sides(self.joiner, queries, documents, pairs, document_length)
        return self._join(self.joiner, sides)

    def _batches(
        self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        if self.joiner is None:
            yield from self._plain_batches(queries, documents, pairs)
            return
        sides, lengths = self._sides(self.joiner, queries, documents, pairs)
        for batch in token_budget_batches(lengths, self.budget.tokens, multiple_of=PAD_MULTIPLE):
            yield batch, self._join(self.joiner, [sides[at] for at in batch])

    def _sides(
        self,
        joiner: PairJoiner,
        queries: Sequence[str],
        documents: Sequence[str],
        pairs: np.ndarray,
        document_length: int | None = None,
    ) -> tuple[Sides, np.ndarray]:
        """See `PairJoiner.sides`; each text is tokenised once."""
        room = self.limit - joiner.special
        if room < 2:
            raise UsageError(
                f"{self.limit} tokens leave no room for a query and a document beside {joiner.special} that frame them",
                where="max_length",
                fix=f"at least {joiner.special + 2}",
            )
        query_tokens, document_tokens = (token_ids(self.tokenizer, texts) for texts in (queries, documents))
        threshold = self.query_length or room // 2
        self._count_cut(sum(len(tokens) > threshold for tokens in query_tokens), threshold)
        if self.query_length:
            query_tokens = [tokens[: self.query_length] for tokens in query_tokens]
        document_tokens = [tokens[:document_length] for tokens in document_tokens]
        return joiner.sides(query_tokens, document_tokens, pairs, self.limit)

    def _join(self, joiner: PairJoiner, sides: Sides) -> dict[str, torch.Tensor]:
        tokenizer = self.model.tokenizer
        wants = {"input_ids", *tokenizer.model_input_names, *(["token_type_ids"] if joiner.two_sided else [])}
        features = joiner.join(sides, padding_of(tokenizer), self.limit)
        return {name: value for name, value in features.items() if name in wants}

    def _plain_batches(
        self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Batches by the model's own preprocessing (chat templates, slow tokenizers, padding on the left)."""
        if self.query_length:
            raise UsageError("query_length is not supported for this model's tokenizer", where="teacher.query_length")
        words = [len(text) for text in queries], [len(text) for text in documents]
        # About four characters a token; enough to sort by and to keep batches near the budget.
        lengths = np.array([min((words[0][q] + words[1][d]) // 4 + 8, self.limit) for q, d in pairs])
        for batch in token_budget_batches(lengths, self.budget.tokens):
            yield batch, self.features(queries, documents, pairs[batch])

    def _count_cut(self, cut: int, threshold: int) -> None:
        self.cut_queries += cut
        if cut and not self._warned:
            self._warned = True
            warn(
                f"{cut} of the first queries have more than {threshold} tokens and are cut "
                f"(pairs hold {self.limit} tokens); later ones are counted silently"
            )


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


def open_cross_encoder(folder: Path, max_length: int | None, device: torch.device) -> CrossEncoder:
    """A cross-encoder of either kind, whole: one that compares two sides, or one with a head on its first token."""
    from rankdistill.students.pair_encoder import open_pair_encoder

    return open_pair_encoder(folder, max_length, str(device)) or load_cross_encoder(folder, device, max_length)


def starting_cross_encoder(
    folder: Path, start: Literal["encoder", "head"], max_length: int | None, device: torch.device
) -> CrossEncoder:
    """The cross-encoder before its first step: as it is, or made of an encoder.

    Args:
        start: of an encoder: rank as it does (see students/pair_encoder.py), or a new head, which starts at random.
    """
    from torch import nn

    from rankdistill.students.pair_encoder import encoder_folder, pair_encoder

    if is_cross_encoder(folder):
        return open_cross_encoder(folder, max_length, device)
    if start == "encoder":
        try:
            return pair_encoder(folder, max_length, str(device))
        except UsageError as error:
            warn(f"{error.what}: its training starts from a random head")
    return load_cross_encoder(encoder_folder(folder), device, max_length, num_labels=1, activation_fn=nn.Identity())


def save_cross_encoder(model: CrossEncoder, folder: Path, max_length: int | None = None) -> None:
    """Whole or not at all.

    Args:
        max_length: tokens a pair when it scores, where that is not what it was trained with.
    """
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    length = model.max_seq_length
    model.max_seq_length = min(max_length, position_limit(model.model)) if max_length else length
    with quiet_transformers():
        model.save_pretrained(str(new), create_model_card=False)
    model.max_seq_length = length
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def new_parts(model: CrossEncoder) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The gates between two sides, and what else an encoder had not: head, pooler, classifier."""
    parts = [(set(name.split(".")), parameter) for name, parameter in model.named_parameters()]
    gates = [parameter for names, parameter in parts if "gates" in names]
    # The pooler of an encoder's own that no score is read from gets no gradient at any rate.
    heads = [parameter for names, parameter in parts if names & {"pooler", "classifier", "head"}]
    return gates, heads
