"""Encoders with a masked-language head: loading one, giving one to an encoder that came without, and warming it up.

A new head starts from the identity and says by its biases alone which terms a document has: each term's bias takes its
mean largest logit over documents off, then all move together until a document has a wanted number of terms. Measured on
Cranfield (all-MiniLM-L6-v2, its head made here, 75 test queries, no training): nDCG@10 .29 with one common shift and
.33 with this, both at 256 terms a document; before, every document has nearly every term. A head fitted to reproduce
each token (.25) was no better start, and 100 steps of masked-language training of the head (.32) gained nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.plain import Section
from rankdistill.progress import progress, warn
from rankdistill.students.base import Features, to_device
from rankdistill.students.loading import SAFE, opening
from rankdistill.students.models import read_json
from rankdistill.students.term_head import largest_logits
from rankdistill.students.token_batches import GradientCache, Precision, autocast, free_memory

if TYPE_CHECKING:
    from rankdistill.collections import Collection

NEW_HEAD_TERMS = 256  # of a document, where the head was made here
WEIGHTS = "model.safetensors"
NEVER = -100.0  # bias of tokens that are no words


class WarmUp(Section):
    """What a sparse student's head learns from a collection's texts before any training."""

    steps: int = Field(0, ge=0, description="of masked-language training; 0: none")
    learning_rate: float = Field(5e-4, gt=0)
    batch: int = Field(32, ge=1, description="documents a step")
    mask: float = Field(
        0.15, gt=0, lt=1, description="share of tokens to predict; of these 80 % are masked, 10 % another"
    )
    encoder: bool = Field(False, description="train the encoder too, not the head alone")
    terms: int | None = Field(
        None,
        ge=0,
        description="a document's mean active terms to begin with; 256 where the head was made here; 0: as it is",
    )
    documents: int = Field(256, ge=1, description="that `terms` is measured on")
    seed: int = 0


def load_masked_language(folder: Path, name: str) -> tuple[Transformer, bool]:
    """(the encoder with its head, whether the head was there); weights in float32, safetensors only.

    A head that is missing is made: its matrix is the encoder's word embeddings (tied, as BERT has it), its transform
    starts from the identity. A kind of model that has no such head, as a decoder, is refused."""
    folder = transformer_folder(folder)
    missing: list[str] = []
    with opening(folder, "transformers"):
        config = AutoConfig.from_pretrained(str(folder), **SAFE)
        if type(config) not in AutoModelForMaskedLM._model_mapping or getattr(config, "is_decoder", False):
            raise UsageError(
                f"{name!r} is a {config.model_type} model, which has no masked-language head",
                where="student.model",
                fix="an encoder (BERT, RoBERTa, ModernBERT ...); decoder-only models are not supported here",
            )
        if not any(name.endswith("ForMaskedLM") for name in config.architectures or []):
            loaded: Any = AutoModelForMaskedLM.from_pretrained(
                str(folder), output_loading_info=True, use_safetensors=True, **SAFE
            )
            missing = sorted(loaded[1]["missing_keys"])
        transformer = Transformer(
            str(folder),
            transformer_task="fill-mask",
            model_kwargs={"use_safetensors": True, "dtype": torch.float32, **SAFE},
            config_kwargs=SAFE,
            processor_kwargs=SAFE,
        )
    if missing:
        start_head(transformer.model, missing)
        warn(
            f"{name} has no masked-language head; one tied to its word embeddings is made, whose transform knows"
            " nothing yet: training has to teach it which terms a text is about"
        )
    return transformer, not missing


def transformer_folder(folder: Path) -> Path:
    """Where the transformer of a folder is: the folder itself, or what a sentence-transformers model names first."""
    path = folder / "modules.json"
    modules = read_json(path, list) if path.is_file() else []
    first = folder / str(modules[0].get("path", "")) if modules else folder
    return first if (first / "config.json").is_file() else folder


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of the head alone, without the tied word embeddings."""
    encoder = {id(parameter) for parameter in getattr(model, model.base_model_prefix).parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in encoder}


@torch.no_grad()
def start_head(model: nn.Module, missing: list[str]) -> None:
    """Square maps that were not in the checkpoint start from the identity; biases from 0."""
    for name, parameter in head_parameters(model).items():
        if name not in missing:
            continue
        if parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]:
            nn.init.eye_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def head_inputs(transformer: Transformer, features: Features) -> tuple[Tensor, Any]:
    """[texts, tokens, width] what the last map of the head is applied to, and that map: the logits of all tokens are
    never held (students/term_head.py)."""
    decoder: Any = transformer.model.get_output_embeddings()
    decoder.forward = lambda hidden: hidden  # for this pass: what would have gone in comes out
    try:
        hidden: Tensor = transformer(dict(features))[transformer.module_output_name]
    finally:
        del decoder.forward
    return hidden, decoder


def warm_up(
    transformer: Transformer,
    settings: WarmUp,
    new_head: bool,
    source: Any,
    collection: Collection,
    folder: Path,
    precision: Precision = "auto",
) -> str:
    """Warm a head up on a collection's documents, or read what was made of it before; returns a fingerprint.

    An artifact below `folder`; one that is interrupted begins again. Random numbers of the caller stay as they are, so
    that a training goes the same way whether it was made now or before. `source` names the weights to begin with.
    """
    terms = settings.terms if settings.terms is not None else NEW_HEAD_TERMS if new_head else 0
    if not settings.steps and not terms:
        return ""
    values = {**settings.model_dump(), "terms": terms, "start": source}
    inputs = {"collection": collection.fingerprint}
    print_ = fingerprint(["warm_up", values, inputs])
    path = folder / f"warm-up-{print_}"
    model: Any = transformer.model

    def make(writer: ArtifactWriter) -> None:
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        training = transformer.training
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            if settings.steps:
                writer.counts["loss"] = _learn_masked(transformer, settings, collection, precision)
            if terms:
                writer.counts["terms"] = _set_biases(transformer, settings, terms, collection, precision)
        changed = {name: value for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        save_file({name: value.detach().contiguous() for name, value in changed.items()}, writer.path / WEIGHTS)
        transformer.train(training)

    obtain(path, kind="warm_up", fingerprint=print_, settings=values, inputs=inputs, make=make)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path / WEIGHTS).items():
            parameters[name].copy_(value)
    return print_


def _texts(collection: Collection, count: int, seed: int) -> Iterator[list[str]]:
    """Documents in a random order, so many at a time, again and again."""
    random = np.random.default_rng(seed)
    rows = np.empty(0, np.int64)
    while True:
        while len(rows) < count:
            rows = np.concatenate([rows, random.permutation(collection.document_count)])
        yield collection.document_texts(rows[:count])
        rows = rows[count:]


def _learn_masked(transformer: Transformer, settings: WarmUp, collection: Collection, precision: Precision) -> float:
    """Train on masked tokens (Devlin et al. 2019, arXiv:1810.04805); returns the last steps' mean loss."""
    model: Any = transformer.model
    tokenizer: Any = transformer.tokenizer
    learning = list(model.parameters() if settings.encoder else head_parameters(model).values())
    learned_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(learning, lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / max(1, settings.steps // 10)) * (1 - step / settings.steps)
    )
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    device = learning[0].device
    losses: list[float] = []
    cache = GradientCache()

    def compute(part: Features) -> Tensor:
        hidden, decoder = head_inputs(transformer, to_device(part, device))
        predicted: Tensor = decoder(hidden[part["chosen"].to(device)])
        return predicted

    transformer.train()
    stream = _texts(collection, settings.batch, settings.seed)
    with progress("warm-up", settings.steps, "steps") as bar:
        for _ in range(settings.steps):
            features = transformer.preprocess(next(stream), task="document")
            chosen, features["input_ids"], labels = mask_tokens(
                features["input_ids"], features["attention_mask"], special, tokenizer.mask_token_id, settings.mask
            )
            while len(labels):
                optimiser.zero_grad()
                try:
                    with autocast(device, precision):
                        logits = torch.cat(cache.run(compute, [{**features, "chosen": chosen}]))
                    loss = nn.functional.cross_entropy(logits.float(), labels.to(device))
                    loss.backward()
                    break
                except RuntimeError as error:
                    cache.shrink(error, [features], device, "a smaller student.warm_up.batch, or shorter documents")
                free_memory()
            if len(labels):
                nn.utils.clip_grad_norm_(learning, 1.0)
                optimiser.step()
                losses.append(loss.item())
            schedule.step()
            bar.advance(1, f"loss {losses[-1]:.3f}" if losses else "")
    model.zero_grad(set_to_none=True)
    for parameter, learned in learned_before.items():
        parameter.requires_grad_(learned)
    if losses and not np.isfinite(losses[-1]):
        raise RankdistillError(
            f"the warm-up's loss is {losses[-1]}", where="student.warm_up", fix="a lower learning_rate"
        )
    return round(float(np.mean(losses[-10:])), 4) if losses else 0.0


def mask_tokens(
    tokens: Tensor, attention: Tensor, special: Tensor, mask_token: int, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(places to predict, tokens to show, tokens to predict) of ids [texts, tokens]: of the places 80 % show the mask,
    10 % another token of the batch, 10 % their own. Special tokens and padding are never chosen."""
    words = attention.bool() & ~torch.isin(tokens, special)
    chosen = words & (torch.rand(tokens.shape) < share)
    shown, luck = tokens.clone(), torch.rand(tokens.shape)
    shown[chosen & (luck < 0.8)] = mask_token
    other = chosen & (luck >= 0.8) & (luck < 0.9)
    pool = tokens[words]
    if len(pool):
        shown[other] = pool[torch.randint(len(pool), (int(other.sum()),))]
    return chosen, shown, tokens[chosen]


@torch.no_grad()
def _set_biases(
    transformer: Transformer, settings: WarmUp, terms: int, collection: Collection, precision: Precision
) -> float:
    """Set the biases so that a document has `terms` terms on average; returns how many it has.

    Tokens that are no words are never terms. Memory: a weight for each of `documents` documents and each term.
    """
    tokenizer: Any = transformer.tokenizer
    device = next(transformer.parameters()).device
    transformer.eval()
    parts = []
    decoder: Any = transformer.model.get_output_embeddings()
    if decoder.bias is None:
        warn("student: this head has no biases, so its number of active terms is left as it is")
        return 0.0
    texts = next(_texts(collection, min(settings.documents, collection.document_count), settings.seed + 1))
    with autocast(device, precision):
        for start in range(0, len(texts), 32):
            features = to_device(transformer.preprocess(texts[start : start + 32], task="document"), device)
            hidden, _ = head_inputs(transformer, features)
            largest = largest_logits(hidden.float(), features["attention_mask"], decoder.weight, decoder.bias)
            parts.append(largest.float())
    logits = torch.cat(parts)
    mean = logits.mean(dim=0)
    logits -= mean
    special = sorted(set(tokenizer.all_special_ids))
    logits[:, special] = -torch.inf
    active = min(terms * len(logits), int(logits.isfinite().sum()) - 1)
    least = logits.flatten().topk(active + 1).values[-1]
    decoder.bias -= mean + least
    decoder.bias[special] = NEVER
    return round(float((logits > least).sum() / len(logits)), 1)
