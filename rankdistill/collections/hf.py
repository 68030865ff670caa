"""`hf:NAME`: a retrieval data set of the Hugging Face hub, or a local folder of parquet files in the same form.

On the hub, the layout that BEIR and MTEB use: configurations `corpus` and `queries`, and judgments either in a
configuration `qrels` or `default` of the same repository (mteb/nfcorpus) or in a repository `NAME-qrels`
(BeIR/nfcorpus). In a folder: corpus*.parquet, queries*.parquet and qrels/SPLIT*.parquet (corpus/*.parquet,
queries/*.parquet and qrels/SPLIT/*.parquet are read too). Judgments without a column of relevance name relevant pairs:
each counts 1.

A hub name is pinned to the revision it has when opened. Where the hub cannot be reached, a collection that was
imported before is opened at the revision it had; any other is a quick, clear error.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rankdistill.artifacts import cache_dir, file_digest, fingerprint, write_atomically
from rankdistill.collections.collection import Collection
from rankdistill.collections.text_files import VALUE_NAME, data_files, grade, identifier, text_of
from rankdistill.collections.writer import CollectionWriter, Stamps, imported, stamps
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import say

SCHEMA = 1
ROWS = 1024  # of a Parquet file held at a time
SECONDS = 5.0  # the hub answers within this, or counts as unreachable
DOCUMENT_ID = ("_id", "id", "doc_id", "docid", "corpus-id", "corpus_id", "pid")
QUERY_ID = ("_id", "id", "query_id", "query-id", "qid")
DOCUMENT_TEXT, QUERY_TEXT = ("text", "contents", "content", "body", "passage"), ("text", "query")
JUDGED = (("query-id", "query_id", "qid"), ("corpus-id", "corpus_id", "doc_id", "docid", "pid"))
PARQUET = (".parquet",)
RELEVANCE = ("score", "relevance", "label")


class _Part(NamedTuple):
    """A table of records."""

    label: str
    rows: Callable[[], Iterator[dict[str, Any]]]


class _Layout(NamedTuple):
    corpus: list[_Part]
    queries: list[_Part]
    qrels: list[tuple[str, _Part]]  # split, judgments


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a local Parquet file; nested columns (vectors, lists) are not read.

    Raises:
        RankdistillError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = [
                field.name
                for field in file.schema_arrow
                if not pa.types.is_nested(field.type) or VALUE_NAME.fullmatch(field.name.lower())
            ]
            for batch in file.iter_batches(ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        what = f"the Parquet file is damaged ({str(error).splitlines()[0]})"
        raise RankdistillError(what, where=str(path), fix="fetch it again") from None


def _file(path: Path) -> _Part:
    return _Part(str(path), lambda: parquet_rows(path))


def open_source(argument: str, spec: str) -> Collection:
    folder = Path(argument).expanduser()
    if folder.is_dir():
        key, layout, files = _local(folder)
        name = folder.resolve().name
        return imported(key, lambda writer: _load(writer, layout), name=name, spec=spec, files=files)
    if argument.startswith(("/", ".", "~")):
        raise RankdistillError("there is no such folder", where=str(folder), fix="give hf:NAME or hf:FOLDER")
    key, name = _hub_key(argument, spec), argument.replace("/", "-")
    return imported(key, lambda writer: _load(writer, _hub_layout(key, spec)), name=name, spec=spec)


def _load(writer: CollectionWriter, layout: _Layout) -> None:
    parts: list[tuple[Callable[..., None], Callable[[dict[str, Any], str], tuple[Any, ...]], _Part]] = [
        *((writer.document, _document, part) for part in layout.corpus),
        *((writer.query, _query, part) for part in layout.queries),
        *((partial(writer.judgment, split), _judgment, part) for split, part in layout.qrels),
    ]
    for add, read, part in parts:
        places = ((number, f"{part.label}, row {number}", row) for number, row in enumerate(part.rows(), 1))
        writer.take(add, part.label, ((*read(row, where), number) for number, where, row in places))


def _document(row: dict[str, Any], where: str) -> tuple[str, str, str]:
    title, text = text_of(row.get("title"), "title", where), text_of(_field(row, DOCUMENT_TEXT, where), "text", where)
    return identifier(_field(row, DOCUMENT_ID, where), "_id", where), title, text


def _query(row: dict[str, Any], where: str) -> tuple[str, str]:
    text = text_of(_field(row, QUERY_TEXT, where), "text", where)
    return identifier(_field(row, QUERY_ID, where), "_id", where), text


def _judgment(row: dict[str, Any], where: str) -> tuple[str, str, int]:
    query_id, doc_id = (identifier(_field(row, names, where), names[0], where) for names in JUDGED)
    # NanoBEIR has no such column: it lists relevant pairs alone.
    named = (name for name in row if VALUE_NAME.fullmatch(name.lower()))
    relevance = next((row[name] for name in (*RELEVANCE, *named) if name in row), 1)
    return query_id, doc_id, grade(relevance, where)


def _field(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise RankdistillError(f"there is no column {' or '.join(names)} among {', '.join(row)}", where=where)


# A local folder


def _local(folder: Path) -> tuple[dict[str, Any], _Layout, Stamps]:
    def parts(name: str) -> list[Path]:
        return [*data_files(folder, f"{name}*", PARQUET), *data_files(folder / name, "*", PARQUET)]

    corpus, queries = parts("corpus"), parts("queries")
    for name, paths in (("corpus", corpus), ("queries", queries)):
        if not paths and (name == "corpus" or (folder / "qrels").is_dir()):
            what = f"a folder of parquet files needs {name}*.parquet or {name}/*.parquet"
            fix = "beside corpus and queries, judgments go to qrels/SPLIT.parquet"
            raise RankdistillError(what, where=str(folder), fix=fix)
    qrels: list[tuple[str, Path]] = []
    judged = [path for path in (folder / "qrels").glob("*") if path.is_dir() and path.name[0] != "."]
    for path in sorted(file for place in (folder / "qrels", *judged) for file in data_files(place, "*", PARQUET)):
        name = path.stem if path.parent.name == "qrels" else path.parent.name
        qrels.append((re.sub(r"-\d+-of-\d+$", "", name), path))
    files = stamps([*corpus, *queries, *(path for _, path in qrels)])
    key = {
        "loader": "hf",
        "schema": SCHEMA,
        "corpus": [file_digest(path) for path in corpus],
        "queries": [file_digest(path) for path in queries],
        "qrels": [[split, file_digest(path)] for split, path in qrels],
    }
    judgments = [(split, _file(path)) for split, path in qrels]
    return key, _Layout(list(map(_file, corpus)), list(map(_file, queries)), judgments), files


# The hub


def _hub_key(name: str, spec: str) -> dict[str, Any]:
    """The revisions of the data set (and of NAME-qrels), from the hub or as they were at the last opening."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    remembered = cache_dir() / "collections" / f"hub-{fingerprint(name)}.json"
    api = HfApi()
    try:
        revisions = {name: api.dataset_info(name, timeout=SECONDS).sha}
        with contextlib.suppress(RepositoryNotFoundError):
            revisions[f"{name}-qrels"] = api.dataset_info(f"{name}-qrels", timeout=SECONDS).sha
    except RepositoryNotFoundError:
        fix = "check the name; for a gated data set set HF_TOKEN"
        raise UsageError(f"the hub has no data set {name!r}, or it needs a token", where=spec, fix=fix) from None
    except ValueError as error:  # HFValidationError: not a possible name
        raise UsageError(f"{name!r} cannot be a data set of the hub: {error}", where=spec) from None
    except Exception as error:  # the client under huggingface_hub, and with it its errors, differ between versions
        if remembered.is_file():
            say(f"the hub cannot be reached; {name} is opened as it was last")
            key: dict[str, Any] = json.loads(remembered.read_text(encoding="utf-8"))
            return key
        raise RankdistillError(
            f"the hub cannot be reached ({type(error).__name__}) and {name!r} was never imported here",
            where=spec,
            fix="connect to the network, or give a local folder: hf:FOLDER or beir:FOLDER",
        ) from error
    key = {"loader": "hf", "schema": SCHEMA, "revisions": revisions}
    write_atomically(remembered, json.dumps(key))
    return key


def _hub_layout(key: dict[str, Any], spec: str) -> _Layout:
    import datasets

    (name, revision), *others = key["revisions"].items()

    def parts(repository: str, config: str, revision: str) -> list[tuple[str, _Part]]:
        def part(split: str) -> _Part:
            options = {"path": repository, "name": config, "split": split, "revision": revision}
            return _Part(f"{repository} {config}/{split}", lambda: iter(datasets.load_dataset(**options)))

        return [
            (split, part(split)) for split in datasets.get_dataset_split_names(repository, config, revision=revision)
        ]

    configs = datasets.get_dataset_config_names(name, revision=revision)
    if not {"corpus", "queries"} <= set(configs):
        raise UsageError(
            f"{name!r} is not laid out for retrieval: its configurations are {', '.join(configs)}",
            where=spec,
            fix="configurations 'corpus' and 'queries' are needed",
        )
    judged = next((config for config in ("qrels", "default") if config in configs), None)
    qrels = parts(name, judged, revision) if judged else []
    for repository, sha in [] if judged else others:
        for config in datasets.get_dataset_config_names(repository, revision=sha):
            qrels += parts(repository, config, sha)
    corpus, queries = ([part for _, part in parts(name, config, revision)] for config in ("corpus", "queries"))
    return _Layout(corpus, queries, qrels)
