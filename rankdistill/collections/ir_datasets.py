"""`ir_datasets:NAME`: whatever the ir_datasets library knows (MacAvaney et al. 2021).

A name that carries judgments (beir/nfcorpus/test) gives one split, named by what the name adds to its corpus
(`test`; msmarco-passage/dev/small → `dev.small`; a corpus of its own, such as vaswani → `test`). A name without
(beir/nfcorpus) gives its children train, dev, validation and test that have judgments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ir_datasets

from rankdistill.collections.collection import Collection
from rankdistill.collections.writer import CollectionWriter, imported
from rankdistill.errors import RankdistillError, UsageError

SCHEMA = 1
CHILDREN = ("train", "dev", "validation", "valid", "test")
# An unreachable server is given up after this; the library's own waiting runs to a minute and a half for each mirror.
PATIENCE = {"IR_DATASETS_DL_TRIES": "2", "IR_DATASETS_DL_TIMEOUT": "8"}


def open_source(argument: str, spec: str) -> Collection:
    parts = split_datasets(argument, spec)
    key = {
        "loader": "ir_datasets",
        "schema": SCHEMA,
        "name": argument,
        "splits": sorted(parts),
        "library": ir_datasets.__version__,
    }

    def load(writer: CollectionWriter) -> None:
        with _clear_errors(argument, spec):
            documents = next(iter(parts.values())).docs_iter()
            writer.take(writer.document, argument, ((each.doc_id.strip(), *title_and_text(each)) for each in documents))
            for split, dataset in parts.items():
                source = f"{argument}/{split}" if _load(f"{argument}/{split}") is not None else argument
                queries = ((query.query_id.strip(), plain_text(query)) for query in dataset.queries_iter())
                writer.take(writer.query, source, queries)
                for qrel in dataset.qrels_iter():
                    writer.judgment(split, qrel.query_id.strip(), qrel.doc_id.strip(), int(qrel.relevance))

    return imported(key, load, name=argument.replace("/", "-"), spec=spec)


def split_datasets(name: str, spec: str) -> dict[str, Any]:
    """Split → the library's data set.

    Raises:
        UsageError: the library does not know the name, or has no judgments for it.
    """
    dataset = _load(name)
    if dataset is None:
        near = [known for known in ir_datasets.registry if known.startswith(name.split("/")[0] + "/")][:8]
        raise UsageError(
            f"ir_datasets has no data set {name!r}",
            where=spec,
            fix=f"known there: {', '.join(near)}" if near else "see https://ir-datasets.com",
        )
    if dataset.has_docs() and dataset.has_queries() and dataset.has_qrels():
        corpus = ir_datasets.docs_parent_id(name)
        split = name.removeprefix(corpus).strip("/").replace("/", ".") if name.startswith(corpus) else name
        return {split or "test": dataset}
    children = {child: _load(f"{name}/{child}") for child in CHILDREN}
    parts = {child: part for child, part in children.items() if part is not None and part.has_qrels()}
    if not parts or not dataset.has_docs():
        judged = [known for known in ir_datasets.registry if known.startswith(f"{name}/")]
        judged = [known for known in judged if ir_datasets.registry[known].has_qrels()][:12]
        raise UsageError(
            f"ir_datasets has no judgments for {name!r} itself",
            where=spec,
            fix=f"choose one of its parts: {', '.join(judged)}" if judged else "choose a data set with qrels",
        )
    return parts


def _load(name: str) -> Any:
    try:
        return ir_datasets.load(name)
    except KeyError:
        return None


def title_and_text(document: Any) -> tuple[str, str]:
    """Title and text where the record has both, else no title and what the library takes as its text."""
    if isinstance(getattr(document, "title", None), str) and isinstance(getattr(document, "text", None), str):
        return document.title, document.text
    return "", plain_text(document)


def plain_text(record: Any) -> str:
    if hasattr(record, "default_text"):
        return str(record.default_text())
    fields = [getattr(record, name) for name in record._fields if not name.endswith("_id")]
    return " ".join(value for value in fields if isinstance(value, str))


@contextmanager
def _clear_errors(name: str, spec: str) -> Iterator[None]:
    """Give up early where there is no network, and say what happened in one line."""
    import requests

    added = {key: value for key, value in PATIENCE.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    except requests.exceptions.RequestException as error:
        raise RankdistillError(
            f"ir_datasets does not hold {name!r} on this machine and its server cannot be reached "
            f"({type(error).__name__})",
            where=spec,
            fix="connect to the network, or put the files where `ir_datasets` looks ($IR_DATASETS_HOME)",
        ) from error
    except UnicodeDecodeError as error:
        raise RankdistillError(f"the data set is not UTF-8: {error}", where=spec) from error
    except (ValueError, EOFError) as error:
        raise RankdistillError(
            f"ir_datasets cannot read {name!r}: {error}", where=spec, fix="remove its damaged files and fetch it again"
        ) from error
    finally:
        for key in added:
            os.environ.pop(key, None)
