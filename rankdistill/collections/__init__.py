"""Where text and judgments come from: each loader streams its source into one cached form, opened as a `Collection`.

beir:DIR · msmarco:DIR · ir_datasets:NAME · hf:NAME · python-docs[:public]
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from rankdistill.collections.collection import Collection, Document, Query
from rankdistill.errors import UsageError

__all__ = ["Collection", "Document", "Query", "open_collection"]

# Loader → its module, imported when asked for. Each has `open_source(argument, spec) -> Collection`.
LOADERS = {
    "beir": "beir",
    "msmarco": "msmarco",
    "ir_datasets": "ir_datasets",
    "hf": "hf",
    "python-docs": "python_docs",
}
FORMS = "beir:DIR, msmarco:DIR, ir_datasets:NAME, hf:NAME or python-docs[:public]"


def open_collection(spec: str | Collection) -> Collection:
    """Open a collection; the first time it is imported into the cache, later only its fingerprint is checked.

    Args:
        spec: `beir:DIR`, `msmarco:DIR`, `ir_datasets:NAME`, `hf:NAME`, `python-docs` or `python-docs:public`.

    Raises:
        UsageError: the form is none of these.
        RankdistillError: the source is missing, damaged or malformed (file and line are named).
    """
    if isinstance(spec, Collection):
        return spec
    loader, _, argument = spec.partition(":")
    if loader not in LOADERS:
        fix = f"write {FORMS}"
        near = difflib.get_close_matches(loader, LOADERS, n=1)
        if Path(spec).is_dir():
            fix = f"a folder needs its format before it: {_format_of(Path(spec))}:{spec}"
        elif near:
            fix = f"did you mean {near[0]!r}? {fix}"
        raise UsageError(f"{spec!r} is not a collection", where="collection", fix=fix)
    if not argument and loader != "python-docs":
        raise UsageError(f"{loader}: what comes after the colon is missing", where="collection", fix=f"write {FORMS}")
    module = importlib.import_module(f"rankdistill.collections.{LOADERS[loader]}")
    collection: Collection = module.open_source(argument, spec)
    return collection


def _format_of(folder: Path) -> str:
    return "msmarco" if (folder / "collection.tsv").exists() or (folder / "collection.tsv.gz").exists() else "beir"
