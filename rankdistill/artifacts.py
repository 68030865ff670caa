"""An artifact: a directory with a manifest, published atomically.

A stage writes into a hidden folder beside the final name and the folder is renamed when it is
complete, so a half-written artifact is never taken for a whole one. The fingerprint in the manifest
is a hash of what decides the content (settings, inputs, schema version), never of paths or time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rankdistill.errors import RankdistillError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: the user's limit on a file's size
FAISS_BUILDS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss")  # old ones; the last: conda's
LIBRARIES = (
    "rankdistill",
    "torch",
    "transformers",
    "sentence-transformers",
    *FAISS_BUILDS,
    "bm25s",
    "pyserini",
    "pyseismic-lsr",
    "ranx",
)


def cache_dir() -> Path:
    """The cache folder: `$RANKDISTILL_CACHE`, else `$XDG_CACHE_HOME/rankdistill`, else `~/.cache/rankdistill`."""
    chosen = os.environ.get("RANKDISTILL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankdistill"


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that depend on the JSON value alone (key order does not matter)."""
    text = json.dumps([SCHEMA_VERSION, value], sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes; remembered in the cache folder by path, size and modification time."""
    path = Path(path).resolve()
    stat = path.stat()
    remembered = cache_dir() / "digests" / fingerprint([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    # A file changed twice within the clock's tick would keep its stamp: only files at rest are remembered.
    at_rest = time.time() - stat.st_mtime > 2
    if at_rest and remembered.exists():
        return remembered.read_text()
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if at_rest:
        write_atomically(remembered, digest)
    return digest


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says so, and that what was finished is kept."""
    try:
        yield
    except RankdistillError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # Libraries in C++ and Rust (FAISS, safetensors, Arrow) pass on the system's words, not always its number.
        if number in FULL or any(os.strerror(full) in str(error) for full in FULL):
            raise RankdistillError(
                f"the disk is full ({os.strerror(number or errno.ENOSPC).lower()})",
                where=str(path),
                fix="free some space and run the same command again: finished parts are kept",
            ) from error
        if isinstance(error, OSError) and number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise RankdistillError(f"cannot write: {error.strerror}", where=str(path)) from error
        raise


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; durable when it returns."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock named after `path` (a second process waits; the lock dies with its process)."""
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def counts(self) -> dict[str, Any]:
        return dict(self.manifest.get("counts", {}))

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={value}" for name, value in self.counts.items())
        return f"Artifact({self.kind} {self.fingerprint} at {self.path}: {counts})"


@dataclass
class ArtifactWriter:
    """What a stage writes into: files go below `path`, figures into `counts`, anything else into `notes`."""

    path: Path
    counts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"


def open_artifact(path: str | Path, kind: str | None = None) -> Artifact:
    """Open a finished artifact.

    Raises:
        RankdistillError: there is none, its manifest is unreadable, or it is of another kind.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise RankdistillError(
            f"there is no {kind or 'artifact'} here", where=str(path), fix="give the folder that holds manifest.json"
        )
    try:
        manifest = json.loads(manifest_path.read_text())
        if not isinstance(manifest, dict) or not {"kind", "fingerprint"} <= manifest.keys():
            raise ValueError("kind or fingerprint is missing")
    except ValueError as error:
        raise RankdistillError(f"the manifest cannot be read: {error}", where=str(manifest_path)) from None
    if kind is not None and manifest["kind"] != kind:
        raise RankdistillError(f"this is a {manifest['kind']} artifact, not {kind}", where=str(path))
    return Artifact(path, manifest)


def find_artifact(path: str | Path, kind: str, fingerprint: str) -> Artifact | None:
    """The artifact at `path` if it is whole, of that kind and has that fingerprint; else None."""
    if not (Path(path) / MANIFEST).is_file():
        return None
    artifact = open_artifact(path)
    return artifact if (artifact.kind, artifact.fingerprint) == (kind, fingerprint) else None


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def partial_folder(path: Path, fingerprint: str) -> Path:
    """Where an artifact is written until it is whole."""
    return path.with_name(f".{path.name}.{fingerprint}.partial")


@contextmanager
def write_artifact(
    path: str | Path,
    *,
    kind: str,
    fingerprint: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    resume: bool = False,
) -> Iterator[ArtifactWriter]:
    """Write an artifact and publish it when the block ends without an exception.

    Args:
        path: the final folder; what is there is replaced when the new one is complete.
        fingerprint: of the content; the hidden folder carries it, so leftovers of other settings are never resumed.
        settings: the resolved part of the recipe.
        inputs: name → fingerprint of each input.
        resume: keep the hidden folder on failure and hand it out again next time (for work that saves parts).
            Without it a failed attempt leaves nothing behind.

    The caller holds `locked(path)` when several processes may write the same artifact.
    """
    path = Path(path)
    partial = partial_folder(path, fingerprint)
    started = time.time()
    with disk_errors(path):
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        writer = ArtifactWriter(partial)
        try:
            yield writer
            manifest = {
                "kind": kind,
                "fingerprint": fingerprint,
                "schema": SCHEMA_VERSION,
                "settings": settings,
                "inputs": dict(inputs or {}),
                "counts": writer.counts,
                **writer.notes,
                "libraries": library_versions(),
                "device": writer.device,
                "seconds": round(time.time() - started, 3),
            }
            write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")
            _publish(partial, path)
        except BaseException:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _publish(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; an older artifact there is moved aside first and removed after."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    # What a kill in this function left, and leftovers of other settings' attempts, are worth nothing now.
    leftovers = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.(old|partial)")
    for entry in path.parent.iterdir():
        if leftovers.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
