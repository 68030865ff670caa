"""Encoders with a masked-language head: loading one, and giving one to an encoder that came without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers.base.modules import Transformer
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import quiet_transformers, warn


def load_masked_language(folder: Path, name: str) -> tuple[Transformer, bool]:
    """(the encoder with its head, whether the head was there); weights in float32, safetensors only.

    A head that is missing is made: its matrix is the encoder's word embeddings (tied, as BERT has it), its transform
    starts from the identity.

    Raises:
        UsageError: a kind of model that has no masked-language head, such as a decoder.
        RankdistillError: no model that transformers can load.
    """
    folder = transformer_folder(folder)
    options: dict[str, Any] = {"local_files_only": True}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), **options)
            if type(config) not in AutoModelForMaskedLM._model_mapping or getattr(config, "is_decoder", False):
                raise UsageError(
                    f"{name!r} is a {config.model_type} model, which has no masked-language head",
                    where="student.model",
                    fix="an encoder (BERT, RoBERTa, ModernBERT ...); decoder-only models are not supported here",
                )
            missing: list[str] = []
            if not any(one.endswith("ForMaskedLM") for one in config.architectures or []):
                found: Any = AutoModelForMaskedLM.from_pretrained(
                    str(folder), output_loading_info=True, use_safetensors=True, **options
                )
                missing = sorted(found[1]["missing_keys"])
            transformer = Transformer(
                str(folder),
                transformer_task="fill-mask",
                model_kwargs={"use_safetensors": True, "dtype": torch.float32, **options},
                config_kwargs=options,
                processor_kwargs=options,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RankdistillError(f"this is no model that transformers can load: {error}", where=str(folder)) from None
    if missing:
        start_head(transformer.model, missing)
        warn(
            f"{name} has no masked-language head; one tied to its word embeddings is made, whose transform knows"
            " nothing yet: training (or student.warm_up) has to teach it which terms a text is about"
        )
    return transformer, not missing


def transformer_folder(folder: Path) -> Path:
    """Where the transformer of a folder is: the folder itself, or what a sentence-transformers model names first."""
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    first = folder / str(modules[0].get("path", "")) if modules else folder
    return first if (first / "config.json").is_file() else folder


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of the head alone, without the tied word embeddings."""
    encoder = {id(parameter) for parameter in getattr(model, model.base_model_prefix).parameters()}
    return {name: one for name, one in model.named_parameters() if id(one) not in encoder}


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
