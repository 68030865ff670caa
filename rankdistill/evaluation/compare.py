"""Compare runs made anywhere: TREC or Parquet files, folders of them, folders of evaluations.

Rules, beside those of `rankdistill.evaluation.metrics`:
- The queries are those of the judgments, the same for every run: one a run does not hold counts 0 for it. How many
  that are is said below the table, run by run, and so is how many queries of a run have no judgments.
- A run's name is its file's; those that clash are told apart by the folders they lie in.
- A judgment that is repeated counts once and is counted; two that contradict each other are an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankdistill.artifacts import check_file, file_digest, write_atomically
from rankdistill.collections import Collection, open_collection
from rankdistill.collections.text_files import data_files, grade, read_qrels, text_ids
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.evaluate import environment
from rankdistill.evaluation.metrics import DEFAULT_METRICS, Qrels, evaluate_run, parse_metric
from rankdistill.evaluation.results import Evaluation, Row, comparisons_table
from rankdistill.evaluation.significance import check_options
from rankdistill.evaluation.suites import set_title
from rankdistill.evaluation.tables import SIGNED, latex, markdown, plain_table, print_tables
from rankdistill.plain import shown_lines
from rankdistill.progress import progress, say, warn
from rankdistill.runs import Run, file_stem, read_run

RUN_FILES = (".trec", ".trec.gz", ".run", ".run.gz", ".parquet")
RESULTS = "results.json"
FORMS = ("text", "markdown", "latex", "json")


class _Source(NamedTuple):
    """A run to compare: its name, where it lies, and the evaluation it belongs to, if any."""

    name: str
    run: Run | Path
    folder: Path = Path()
    results: dict[str, Any] | None = None


def compare(
    runs: Sequence[Run | str | Path] | Mapping[str, Run | str | Path],
    qrels: Qrels | str | Path | None = None,
    *,
    collection: Collection | str | None = None,
    split: str | None = None,
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
    correction: str = "holm",
    alpha: float = 0.05,
    relevance_level: int | None = None,
    drop_self_hits: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure runs on the same judgments and test their differences.

    Args:
        runs: runs, run files, folders of run files, folders that `evaluate` wrote; or name → run.
        qrels: {query id: {doc id: judgment}}, or a file of judgments (TREC, BEIR, Parquet). With neither qrels nor a
            collection, the judgments of the evaluation the runs come from.
        collection, split: judgments of a collection instead (opened when it is a string); split `test` by default.
        metrics, relevance_level, drop_self_hits: default what the evaluation had, else the usual.
        baseline: compare every run with this one alone. Default all pairs; marks then refer to BM25 or the first.
        correction, alpha, seed: see `rankdistill.evaluation.significance`.

    Returns:
        The evaluation with its `significance`; nothing is written.

    Raises:
        UsageError: no judgments given, an unknown metric or baseline, evaluations of different sets.
        RankdistillError: a file cannot be read or does not fit the judgments.
    """
    sources = list(_sources(runs))
    if not sources:
        raise UsageError("there is no run to compare", fix="give run files, or the folder of an evaluation")
    names = _names(sources)
    check_options(names, baseline, correction)
    settings = _settings(sources)
    metrics = list(metrics or settings.get("metrics") or DEFAULT_METRICS)
    for metric in metrics:
        parse_metric(metric)
    level = int(settings.get("relevance_level", 1)) if relevance_level is None else relevance_level
    drop = bool(settings.get("drop_self_hits", False)) if drop_self_hits is None else drop_self_hits
    judged, split, of = _judgments(qrels, collection, split, settings)
    evaluation = Evaluation(
        name=of["name"],
        split=split,
        collection=of,
        metrics=metrics,
        depth=0,
        relevance_level=level,
        drop_self_hits=drop,
        rows=[],
        environment=environment(),
    )
    with progress("compare", len(sources), "runs") as bar:
        for name, source in zip(names, sources, strict=True):
            run = source.run if isinstance(source.run, Run) else read_run(source.run)
            measured = evaluate_run(run, judged, metrics, relevance_level=level, drop_self_hits=drop)
            evaluation.depth = max(evaluation.depth, int(np.diff(run.offsets).max(initial=0)))
            file = str(source.run) if isinstance(source.run, Path) else ""
            evaluation.rows.append(Row(name, measured.means, measured.notes, file))
            evaluation.per_query[name] = measured.per_query
            bar.advance()
    family = "all" if baseline is None else "baseline"
    evaluation.compare_rows(baseline=baseline, family=family, correction=correction, alpha=alpha, seed=seed)
    return evaluation


def show(evaluation: Evaluation, form: str = "text", out: str | Path | None = None) -> None:
    """Print a comparison, or write it to a file, as text, markdown, latex or json (every pair on every metric)."""
    if form not in FORMS:
        raise UsageError(f"there is no format {form!r}", where="format", fix=f"choose {', '.join(FORMS)}")
    significance = evaluation.significance
    tables = evaluation.tables(intervals=form != "latex")
    if significance is not None and significance.comparisons:
        tables.append(comparisons_table(significance, f"{evaluation.name}: pairs of runs"))
    if form == "json":
        values = evaluation.to_json() | {"significance": significance.to_json() if significance else None}
        text = json.dumps(values, indent=2) + "\n"
    else:
        text = plain_table(tables) + "\n" if form == "text" else (markdown if form == "markdown" else latex)(tables)
    if out is not None:
        reads = [evaluation.collection["spec"], *(row.run for row in evaluation.rows)]
        check_file(out, reads=reads, mark=SIGNED.get(form, '{\n  "name"').strip())
        write_atomically(out, text + SIGNED.get(form, ""))
        say(f"written to {out}")
    elif form == "text":
        print_tables(tables)
    else:
        print(shown_lines(text), end="")


# -- which runs -------------------------------------------------------------------------------------------------------


def _sources(runs: Sequence[Run | str | Path] | Mapping[str, Run | str | Path]) -> Iterator[_Source]:
    if isinstance(runs, Mapping):
        for name, run in runs.items():
            yield _Source(name, run if isinstance(run, Run) else Path(run))
        return
    for run in [runs] if isinstance(runs, str | Path | Run) else runs:
        if isinstance(run, Run):
            yield _Source(run.name, run)
        elif (path := Path(run)).is_dir():
            yield from _folder(path)
        else:
            yield _Source(file_stem(path), path, path.parent)


def _folder(folder: Path) -> Iterator[_Source]:
    """The runs of an evaluation, which may lie deeper (a suite's folder, a run's), or every run file in a folder."""
    evaluations = [path for path in sorted(folder.rglob(RESULTS)) if (path.parent / "runs").is_dir()]
    if len(evaluations) > 1:
        raise UsageError(
            f"the folder holds {len(evaluations)} evaluated sets",
            where=str(folder),
            fix="give one of them: " + ", ".join(str(path.parent) for path in evaluations[:5]),
        )
    files = data_files(folder, "*", RUN_FILES)
    if not evaluations and not files:
        raise UsageError(
            "the folder holds neither an evaluation nor run files",
            where=str(folder),
            fix=f"the names of run files end in {', '.join(RUN_FILES)}",
        )
    if not evaluations:
        yield from (_Source(file_stem(path), path, folder) for path in files)
        return
    file = evaluations[0]
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        rows = [(str(row["system"]), file.parent / str(row["run"])) for row in results["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankdistillError(
            f"this is no evaluation ({type(error).__name__}: {error})",
            where=str(file),
            fix="evaluate again, or give the run files themselves",
        ) from None
    for system, path in rows:
        if not path.resolve().is_relative_to(file.parent.resolve()):
            raise RankdistillError(f"the run of {system!r} lies outside the evaluation", where=str(file))
        yield _Source(system, path, file.parent, results)


def _names(sources: Sequence[_Source]) -> list[str]:
    """Different names; those that clash get the parts of their folders that differ."""
    names = [source.name for source in sources]
    for name in {name for name in names if names.count(name) > 1}:
        clashing = [number for number, source in enumerate(sources) if source.name == name]
        paths = [sources[number].folder.resolve().parts for number in clashing]
        endings = [path[_shared(paths) :][::-1] for path in paths]
        for number, ending in zip(clashing, endings, strict=True):
            names[number] = "/".join([*ending[_shared(endings) :][::-1], name])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"two runs are called {twice!r}",
            where=", ".join(str(source.run) for source, name in zip(sources, names, strict=True) if name == twice),
            fix="give each run once, or rename a file",
        )
    return names


def _shared(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts all paths begin with."""
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))


def _settings(sources: Sequence[_Source]) -> dict[str, Any]:
    """What the evaluations among the runs agree on."""
    evaluated = [(source.folder, source.results) for source in sources if source.results is not None]
    keys = [
        (results.get("collection", {}).get("fingerprint"), results.get("split"), results.get("relevance_level"))
        for _, results in evaluated
    ]
    for (folder, _), key in zip(evaluated, keys, strict=True):
        if key != keys[0]:
            raise UsageError(
                "these evaluations are of different sets",
                where=f"{evaluated[0][0]} and {folder}",
                fix="compare runs on the same collection, split and relevance level",
            )
    return evaluated[0][1] if evaluated else {}


# -- judgments --------------------------------------------------------------------------------------------------------


def _judgments(
    qrels: Qrels | str | Path | None, collection: Collection | str | None, split: str | None, settings: dict[str, Any]
) -> tuple[Qrels, str, dict[str, str]]:
    """The judgments, their split, and whose they are: name, spec, fingerprint."""
    if qrels is not None and collection is not None:
        raise UsageError("both judgments and a collection are given", fix="give one of them")
    if isinstance(qrels, str | Path):
        path = Path(qrels)
        return read_judgments(path), "", {"name": path.name, "spec": str(path), "fingerprint": file_digest(path)}
    if qrels is not None:
        return qrels, "", {"name": "judgments", "spec": "", "fingerprint": ""}
    recorded = settings.get("collection", {}) if collection is None else {}
    source = collection or recorded.get("spec")
    if not source:
        raise UsageError(
            "there is nothing to judge the runs with",
            fix="give --qrels FILE, or --collection COLLECTION with --split, or the folder of an evaluation",
        )
    collection = open_collection(source) if isinstance(source, str) else source
    if recorded and collection.fingerprint != recorded.get("fingerprint"):
        raise RankdistillError(
            "the collection has changed since these runs were evaluated",
            where=collection.spec,
            fix="evaluate again, or give --collection to use it as it is now",
        )
    split = split or (str(settings["split"]) if recorded else "test")
    if split not in collection.splits:
        raise UsageError(
            f"the collection has no judgments for the split {split!r}",
            where=collection.spec,
            fix=f"splits: {', '.join(collection.splits) or 'none'}",
        )
    of = {"name": set_title(collection.name, split), "spec": collection.spec, "fingerprint": collection.fingerprint}
    return collection.found_qrels(split), split, of


def read_judgments(path: str | Path) -> dict[str, dict[str, int]]:
    """Judgments from a file: TREC (`query 0 document relevance`), BEIR (three columns), or Parquet (query_id, doc_id,
    relevance), told by its first bytes; gzip too. {query id: {doc id: relevance}}, queries in the file's order.

    Raises:
        RankdistillError: the file is unreadable or empty, or judges a document twice and differently.
    """
    path = Path(path)
    if not path.is_file():
        raise RankdistillError("there is no such file of judgments", where=str(path))
    with open(path, "rb") as stream:
        rows = _parquet_rows(path) if stream.read(4) == b"PAR1" else _text_rows(path)
    qrels: dict[str, dict[str, int]] = {}
    repeated = 0
    for query_id, doc_id, relevance, where in rows:
        judged = qrels.setdefault(query_id, {})
        repeated += doc_id in judged
        if (before := judged.setdefault(doc_id, relevance)) != relevance:
            raise RankdistillError(
                f"document {doc_id!r} is judged {before} and {relevance} for query {query_id!r}",
                where=where,
                fix="keep one judgment of each pair",
            )
    if not qrels:
        raise RankdistillError("the file holds no judgments", where=str(path))
    if repeated:
        warn(f"{path}: {repeated:,} judgments are repeated and count once")
    return qrels


def _text_rows(path: Path) -> Iterator[tuple[str, str, int, str]]:
    for judgment in read_qrels(path):
        yield judgment.query_id, judgment.doc_id, judgment.relevance, f"{path}:{judgment.line}"


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, int, str]]:
    columns = ["query_id", "doc_id", "relevance"]
    try:
        table = pq.read_table(path)
        if missing := ", ".join(sorted(set(columns) - set(table.column_names))):
            has = ", ".join(table.column_names)
            raise RankdistillError(f"the judgments have no column {missing} (they have {has})", where=str(path))
        if any(table[name].null_count for name in columns[:2]):
            raise RankdistillError("the judgments have empty cells", where=str(path))
        ids = [text_ids(table[name].combine_chunks(), str(path)).to_pylist() for name in columns[:2]]
    except (pa.ArrowException, OSError) as error:
        raise RankdistillError(f"the Parquet judgments cannot be read: {error}", where=str(path)) from None
    for row, (query_id, doc_id, level) in enumerate(zip(*ids, table["relevance"].to_pylist(), strict=True), 1):
        where = f"{path}, row {row}"
        yield query_id, doc_id, grade(level, where), where
