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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import say, warn

MANIFEST = "manifest.json"
CLAIM = ".rankdistill"  # in a folder of ours that has no manifest
CLAIMED = "The files here are written by rankdistill, and replaced when it runs again.\n"
LITTER = re.compile(r"\.DS_Store$|\._|\.nfs|Thumbs\.db$|\..*\.(lock|tmp)$")  # of file systems and of killed processes
MOVE = "write to another place, or move it"
SCHEMA_VERSION = 1
# Kind → number of what this version makes of the same settings and inputs: raised when a stage's results change, so
# that neither its older artifacts nor what was made of them is taken for new.
SCHEMAS: dict[str, int] = {}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: the user's limit on a file's size
FAISS_BUILDS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11", "faiss")  # old ones; the last: conda's
# A place that cannot be written to: read-only, below a file or /proc, a folder where a file is meant.
NO_PLACE = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
FINGERPRINTED = re.compile(r"[0-9a-f]{16}(-\d+)?")
MARKED = 1 << 14  # bytes at either end of a file, among which is who wrote it
SMALL = 1 << 20  # bytes of a file that is hashed faster than a remembered digest is found
LOOKED_AT = 64 << 20  # ... of one whose content is compared with the manifest each time its artifact is used
DECIDING = ("torch", "transformers", "sentence-transformers", "tokenizers", "bm25s", "PyStemmer", "pyserini")
LIBRARIES = ("rankdistill", *DECIDING, *FAISS_BUILDS, "pyseismic-lsr")


def cache_dir() -> Path:
    """The cache folder: `$RANKDISTILL_CACHE`, else `$XDG_CACHE_HOME/rankdistill`, else `~/.cache/rankdistill`."""
    chosen = os.environ.get("RANKDISTILL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankdistill"


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that depend on the JSON value alone (key order does not matter), and where it is a list
    that begins with a kind of artifact, on that kind's number in SCHEMAS.

    Raises:
        RankdistillError: it is no JSON value.
    """
    kind = value[0] if isinstance(value, list) and value and isinstance(value[0], str) else ""
    versions = [SCHEMA_VERSION, *([SCHEMAS[kind]] if kind in SCHEMAS else [])]
    try:
        text = json.dumps([*versions, value], sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # `str` of an object would tell its address
        raise RankdistillError(f"settings that are no plain values have no fingerprint: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes; a large file's is remembered in the cache folder by all that changes with the file.

    The modification time can be put back (`touch -r`, `cp -p`); the time of the last change of any kind cannot.
    """
    path = Path(path).resolve()
    stat = path.stat()
    stamp = [str(path).encode(errors="surrogateescape").hex(), stat.st_size, stat.st_ino, stat.st_dev]
    remembered = cache_dir() / "digests" / fingerprint([*stamp, stat.st_mtime_ns, stat.st_ctime_ns])
    # A file changed twice within the clock's tick would keep its stamp: only files at rest are remembered.
    at_rest = stat.st_size > SMALL and time.time() - max(stat.st_mtime, stat.st_ctime) > 2
    if at_rest:
        with suppress(OSError, UnicodeDecodeError):
            known = remembered.read_text(encoding="utf-8")
            if re.fullmatch("[0-9a-f]{64}", known):  # not what a power cut leaves
                return known
    digest = _digest(path)
    if at_rest:
        with suppress(OSError, RankdistillError):  # a cache that cannot be written costs time, no more
            write_atomically(remembered, digest)
    return digest


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
        if isinstance(error, OSError) and number in NO_PLACE:
            where = str(path) if error.filename is None else os.fsdecode(error.filename)
            fix = "give another folder or file to write to"
            raise RankdistillError(f"cannot write: {error.strerror}", where=where, fix=fix) from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        RankdistillError: there cannot be one (/proc says that it does not exist).
    """
    with disk_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise OSError(errno.EACCES, "no folder can be made here", str(path)) from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; durable when it returns."""
    with written_whole(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A block that writes a file under another name; at its end, unless it fails, that takes its place, durable."""
    path = Path(path)
    with disk_errors(path):
        make_folder(path.parent)
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "there is a folder or a device here", str(path))
        temporary = temporary_file(path)
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_file(path: Path) -> Path:
    """What this process calls a file while it writes it; see `remove_leftovers`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_file(path: Path) -> None:
    """Have a file on the disk for good, or an error."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def write_json(path: str | Path, values: Any) -> None:
    """`write_atomically` of a value as JSON that a person can read."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def write_table(path: str | Path, table: Any) -> None:
    """`write_atomically` of a pyarrow table as Parquet."""
    import pyarrow.parquet as pq

    with written_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


@contextmanager
def locked(path: str | Path, busy: str = "") -> Iterator[None]:
    """Hold an exclusive lock named after `path` (a second process waits; the lock dies with its process).

    Args:
        busy: what to say where another process has it.
    """
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    with disk_errors(lock):
        make_folder(lock.parent)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy:
                say(busy)
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


def open_artifact(path: str | Path | Artifact, kind: str | None = None) -> Artifact:
    """Open a finished artifact; one that is open already is looked at no further.

    Raises:
        RankdistillError: there is none, its manifest is unreadable, it is of another kind, or a file of it is not what
            was written.
    """
    if isinstance(path, Artifact):
        return path
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        fix = "give the folder that holds manifest.json"
        raise RankdistillError(f"there is no {kind or 'artifact'} here", where=str(path), fix=fix)
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not {"kind", "fingerprint"} <= manifest.keys():
            raise ValueError("kind or fingerprint is missing")
    except (ValueError, RecursionError) as error:
        fix = f"delete {path} and run the same command again"
        raise RankdistillError(f"the manifest cannot be read: {error}", where=str(manifest_path), fix=fix) from None
    if kind is not None and manifest["kind"] != kind:
        raise RankdistillError(f"this is a {manifest['kind']} artifact, not {kind}", where=str(path))
    artifact = Artifact(path, manifest)
    if (damage := damaged_file(artifact)) is not None:
        raise RankdistillError(
            f"a file of this {artifact.kind} artifact is damaged: it is not what was written",
            where=str(path / damage),
            fix=f"delete {path} and run the same command again, which makes it anew",
        )
    return artifact


def damaged_file(artifact: Artifact, *, thorough: bool = False) -> str | None:
    """The first file of an artifact that is not what its manifest says was written; None where all are.

    Args:
        thorough: read large files too, and trust no remembered digest (for what changed on the disk by itself).
    """
    for name, (size, digest) in dict(artifact.manifest.get("files", {})).items():
        path = artifact.path / name
        try:
            if path.stat().st_size != size:
                return str(name)
            if thorough or size <= LOOKED_AT:
                now = _digest(path) if thorough else file_digest(path)
                if now != digest:
                    return str(name)
        except OSError:
            return str(name)
    return None


def find_artifact(path: str | Path, kind: str, fingerprint: str) -> Artifact | None:
    """The artifact at `path` if it is whole, of that kind and has that fingerprint; else None."""
    if not (Path(path) / MANIFEST).is_file():
        return None
    try:
        artifact = open_artifact(path)
    except RankdistillError as error:
        warn(f"{error.what} ({error.where}); it is made again")
        return None
    if (artifact.kind, artifact.fingerprint) != (kind, fingerprint):
        return None
    then, here = artifact.manifest.get("libraries", {}), library_versions()
    for name in DECIDING:
        before, now = str(then.get(name, "")), here.get(name, "")
        if before and now and before.split(".")[0] != now.split(".")[0]:
            _tell_once(f"{kind}: made with {name} {before}, here is {now}, which may make it otherwise; it is kept")
    return artifact


_tell_once = cache(say)


def check_place(path: str | Path) -> None:
    """Refuse a place for an artifact where something lies that rankdistill did not write: it would be deleted.

    Raises:
        UsageError: there is a file, or a folder that holds something and no manifest of ours, or a file not in it.
    """
    path = Path(path)
    while True:
        before = _identity(path)
        try:
            return _refuse_foreign(path)
        except (UsageError, FileNotFoundError):
            if _identity(path) == before:
                raise
            # Another process was publishing there, and this has looked at two folders as if they were one.


def _identity(path: Path) -> tuple[int, ...] | None:
    """Tells a folder from the one that is published in its place."""
    try:
        stat = os.lstat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def _refuse_foreign(path: Path) -> None:
    _check_inside(path)
    if cache_dir() in path.parents and FINGERPRINTED.fullmatch(path.name):
        return  # the cache is ours, whatever damage has left of a manifest
    if path.is_dir():
        if not _ours(path) and not all(CLAIM in inner.name for inner in path.iterdir()):
            raise UsageError("there is a folder here that rankdistill did not write", where=str(path), fix=MOVE)
    elif os.path.lexists(path):
        raise UsageError("there is a file here that rankdistill did not write", where=str(path), fix=MOVE)


def _check_inside(folder: Path) -> None:
    """Refuse to delete an artifact, or a sealed folder, with a file in it that is none of those that were written."""
    known: Any = None
    with suppress(ValueError):  # a damaged claim
        known = _sealed(folder) if (folder / CLAIM).is_file() else _manifest(folder).get("files")
    for path in sorted(folder.rglob("*")) if isinstance(known, dict) else ():
        name = path.relative_to(folder).as_posix()
        written = name in known or name in (MANIFEST, CLAIM) or LITTER.match(path.name)
        if not written and (path.is_symlink() or not path.is_dir()):
            what = f"there is a file in this {folder.name} that rankdistill did not write, and it would be deleted"
            raise UsageError(what, where=str(path), fix="move it to another place")


@contextmanager
def claim_folder(path: str | Path) -> Iterator[None]:
    """Take a new or empty folder for files that are no artifact, or one that was taken before; what is written in
    this block is sealed at its end: the folder's claim then holds the digest of each file (see `sealed_artifact`).

    Raises:
        UsageError: something lies there that rankdistill did not write.
    """
    path = Path(path)
    if not (path / CLAIM).is_file():
        check_place(path)
    write_atomically(path / CLAIM, CLAIMED)
    since = (path / CLAIM).stat().st_mtime_ns  # by the file system's own clock
    yield
    files = {name: stamp for name, stamp in _settled(path).items() if (path / name).stat().st_mtime_ns >= since}
    files.pop(CLAIM, None)
    write_atomically(path / CLAIM, f"{CLAIMED}{json.dumps(files, indent=1)}\n")


def _sealed(folder: Path) -> dict[str, Any] | None:
    """name → (bytes, SHA-256) of the files of a claimed folder; None where they are being written, or were not."""
    text = (folder / CLAIM).read_text(encoding="utf-8").removeprefix(CLAIMED)
    return dict(json.loads(text)) if text else None


def sealed_artifact(claim: Path) -> Artifact:
    """What a claim says of its folder, for `damaged_file`.

    Raises:
        ValueError: the claim is damaged.
    """
    return Artifact(claim.parent, {"files": _sealed(claim.parent) or {}})


def _ours(folder: Path) -> bool:
    """Whether a folder's manifest is one that `write_artifact` wrote, or the remains of one."""
    return {"kind", "fingerprint", "schema", "libraries"} <= _manifest(folder).keys()


def _manifest(folder: Path) -> dict[str, Any]:
    """What lies there as a manifest; of a damaged one that was ours its keys alone."""
    try:
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except OSError:
        return {}
    except (ValueError, RecursionError):
        ours = b'"fingerprint": "' in content
        return dict.fromkeys(("kind", "fingerprint", "schema", "libraries")) if ours else {}
    return manifest if isinstance(manifest, dict) else {}


def check_file(
    path: str | Path, ours: bool = False, reads: Iterable[str | Path | None] = (), mark: str = "rankdistill"
) -> None:
    """Refuse to write a file over one that rankdistill did not write, or that it is to read.

    Args:
        ours: known to be, by what lies beside it; else its first and last kilobytes have to name rankdistill.
        reads: what the same command reads.
        mark: what stands there too in a file of this kind: a report is not written over a recipe.

    Raises:
        UsageError: there is a folder, a device, a file of another origin or kind, or one of an artifact.
    """
    path = Path(path)
    if any(_ours(folder) or (folder / CLAIM).is_file() for folder in path.absolute().parents):
        raise UsageError("this would change what rankdistill has written there, and reads", where=str(path), fix=MOVE)
    if path.is_file() and any(file and Path(file).is_file() and path.samefile(file) for file in reads):
        raise UsageError("this file is one of those that are read", where=str(path), fix=MOVE)
    if path.is_dir():
        what = "there is a folder here, and a file is to be written"
        raise UsageError(what, where=str(path), fix="name a file in it")
    if path.exists() and not path.is_file():  # renaming onto /dev/null would put a file in its place
        raise UsageError("this is no file but a device or a pipe", where=str(path), fix="name a file to write to")
    if not path.is_file() or ours or path.stat().st_size == 0:
        return
    with open(path, "rb") as stream:
        head = stream.read(MARKED)
        stream.seek(max(0, path.stat().st_size - MARKED))
        ends = head + stream.read(MARKED)
    if b"rankdistill" not in ends:
        raise UsageError("there is a file here that rankdistill did not write", where=str(path), fix=MOVE)
    if mark.encode() not in ends:
        raise UsageError("there is a file of another kind here", where=str(path), fix=MOVE)


@cache
def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
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
        path: the final folder; an artifact that is there is replaced when the new one is complete.
        fingerprint: of the content; the hidden folder carries it, so leftovers of other settings are never resumed.
        settings: the resolved part of the recipe.
        inputs: name → fingerprint of each input.
        resume: keep the hidden folder on failure and hand it out again next time (for work that saves parts).
            Without it a failed attempt leaves nothing behind.

    The caller holds `locked(path)` when several processes may write the same artifact.

    Raises:
        UsageError: something lies at `path` that rankdistill did not write.
    """
    path = Path(path)
    partial = partial_folder(path, fingerprint)
    started = time.time()
    with disk_errors(path):
        check_place(path)
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        make_folder(partial)
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
                "files": _settled(partial),
            }
            write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")
            _publish(partial, path)
        except BaseException:
            if not resume or not any(partial.glob("*")):  # published already, it is gone
                shutil.rmtree(partial, ignore_errors=True)
            raise


def obtain(
    path: str | Path,
    *,
    kind: str,
    fingerprint: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    make: Callable[[ArtifactWriter], object],
    resume: bool = False,
) -> Artifact:
    """The artifact at `path`: what is there with this fingerprint, else made now. A process that asks for it meanwhile
    waits.

    Args:
        make: writes the files below its writer's `path` and fills `counts` and `notes`; it must not ask for the same
            place. For the rest see `write_artifact`.

    Raises:
        UsageError: something lies at `path` that rankdistill did not write.
    """
    with locked(path):
        if artifact := find_artifact(path, kind, fingerprint):
            return artifact
        writing = write_artifact(
            path, kind=kind, fingerprint=fingerprint, settings=settings, inputs=inputs, resume=resume
        )
        with writing as writer:
            make(writer)
        return open_artifact(path, kind)


def _settled(folder: Path) -> dict[str, tuple[int, str]]:
    """name → (bytes, SHA-256) of each file of a finished folder, all of them and their folders on the disk for good."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = (path.stat().st_size, _digest(path))
        _sync(path)
    return files


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk, where it can."""
    with suppress(OSError):  # some network file systems sync no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; an older artifact there is moved aside first and removed after."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    check_place(path)  # as it is by now
    _sync(partial)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    _sync(path.parent)
    # What a kill in this function left, and leftovers of other settings' attempts, are worth nothing now.
    leftovers = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.(old|partial)")
    for entry in path.parent.iterdir():
        if leftovers.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def remove_artifacts(folder: Path) -> None:
    """Delete an artifact, or the artifacts in a folder of them; whatever else lies there stays.

    Raises:
        UsageError: a file in one of them is none of ours.
    """
    for path in [folder, *(folder.iterdir() if folder.is_dir() else ())]:
        if path.is_dir() and not path.is_symlink() and (_ours(path) or (path / CLAIM).is_file()):
            _check_inside(path)
            shutil.rmtree(path)
    with suppress(OSError):
        folder.rmdir()  # where nothing else is in it


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left below a folder: their process is gone, and nothing writes."""
    for path in folder.rglob(".*.tmp"):
        number = re.fullmatch(r"\..+\.(\d+)(\.\w+)?\.tmp", path.name)
        with suppress(OSError):
            if number and not _runs(int(number[1])) and time.time() - path.stat().st_mtime > 10:
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
