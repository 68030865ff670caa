"""Where text and judgments come from: each loader streams its source into one cached form, opened as a `Collection`.

documents:PATH · beir:DIR · msmarco:DIR · ir_datasets:NAME · hf:NAME · python-docs[:public]
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
    "documents": "documents",
    "beir": "beir",
    "msmarco": "msmarco",
    "ir_datasets": "ir_datasets",
    "hf": "hf",
    "python-docs": "python_docs",
}
FORMS = "a folder or file, beir:DIR, msmarco:DIR, ir_datasets:NAME, hf:NAME or python-docs[:public]"


def open_collection(spec: str | Collection) -> Collection:
    """Open a collection; the first time it is imported into the cache, later only its fingerprint is checked.

    Args:
        spec: `documents:PATH`, `beir:DIR`, `msmarco:DIR`, `ir_datasets:NAME`, `hf:NAME`, `python-docs` or
            `python-docs:public`; a path alone is taken for what lies there.

    Raises:
        UsageError: the form is none of these.
        RankdistillError: the source is missing, damaged or malformed (file and line are named).
    """
    if isinstance(spec, Collection):
        return spec
    loader, _, argument = spec.partition(":")
    if loader not in LOADERS:
        argument, path = spec, Path(spec).expanduser()
        settings = Path(spec.rpartition("?")[0] or spec).expanduser()
        if not path.exists() and not settings.exists():
            near = difflib.get_close_matches(loader, LOADERS, n=1)
            fix = f"did you mean {near[0]!r}? write {FORMS}" if near else f"write {FORMS}"
            raise UsageError(f"{spec!r} is not a collection", where="collection", fix=fix)
        loader = _format_of(path)
        spec = f"{loader}:{argument}"
    if not argument and loader != "python-docs":
        raise UsageError(f"{loader}: what comes after the colon is missing", where="collection", fix=f"write {FORMS}")
    module = importlib.import_module(f"rankdistill.collections.{LOADERS[loader]}")
    collection: Collection = module.open_source(argument, spec)
    return collection


def _format_of(path: Path) -> str:
    """What lies there; anything that is not laid out as a collection is documents."""
    known = {
        "beir": ("corpus.jsonl", "corpus.jsonl.gz"),
        "msmarco": ("collection.tsv", "collection.tsv.gz", "*triples*.tsv", "*triples*.tsv.gz"),
        "hf": ("corpus*.parquet", "corpus/*.parquet"),
    }
    found = (name for name, patterns in known.items() if any(any(path.glob(pattern)) for pattern in patterns))
    return next(found, "documents")
