"""A language model in one GGUF file (llama.cpp's format): its weights dequantised once, into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankdistill.artifacts import ArtifactWriter, cache_dir, file_digest, fingerprint, obtain
from rankdistill.errors import RankdistillError
from rankdistill.progress import say

ENDING = ".gguf"
SCHEMA = 1  # of the way the weights are written


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant by a file, or by a folder with one; None where there is none.

    Raises:
        RankdistillError: the folder has several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ENDING else None
    files = sorted(each for each in path.iterdir() if each.suffix.lower() == ENDING and each.name[0] != ".")
    if len(files) > 1:
        names = ", ".join(each.name for each in files[:5])
        raise RankdistillError(f"this folder has several GGUF files: {names}", where=str(path), fix="name one of them")
    return files[0] if files else None


def dequantised(path: Path) -> Path:
    """A folder that loads as any causal language model: the file's weights in float16, and its tokenizer.

    Raises:
        RankdistillError: the package gguf is missing, or the file cannot be read.
    """
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise RankdistillError("this is no GGUF file", where=str(path), fix="copy or download the model again")
    digest = file_digest(path)
    mark = fingerprint(["gguf", SCHEMA, digest])
    folder = cache_dir() / "models" / f"gguf-{mark}"
    settings = {"file": digest, "schema": SCHEMA}
    return obtain(folder, kind="model", fingerprint=mark, settings=settings, make=lambda to: _convert(path, to)).path


def _convert(path: Path, writer: ArtifactWriter) -> None:
    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError:
        fix = "pip install 'rankdistill[llm]'"
        raise RankdistillError(
            "the package gguf, which reads this file, is missing", where=str(path), fix=fix
        ) from None
    import torch
    import transformers

    say(f"{path.name} is dequantised once, into the cache")
    try:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        # Later ones leave the weights as they are packed, where they can, unless told otherwise.
        packing = getattr(transformers, "GgufConfig", None)
        options = {"quantization_config": packing(dequantize=True)} if packing else {}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(**source, **options, dtype=torch.float16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # whatever a damaged or unknown file makes of it
        what = f"the GGUF file cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        fix = "a whole file, of an architecture that transformers reads from GGUF"
        raise RankdistillError(what, where=str(path), fix=fix) from error
    # It is quantised no more, and would be refused when it is saved, or loaded again, as if it were.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(writer.path)
    tokenizer.save_pretrained(writer.path)
    writer.counts["parameters"] = sum(weights.numel() for weights in model.parameters())
