"""Evaluate systems on a collection: a TREC run file for each, metrics, per-query results, size and speed.

Files in the folder of an evaluation: `runs/SYSTEM.trec` (Parquet where ids hold white space), `results.json`,
`results.md`, `per_query.parquet` (columns system, query_id and one for each metric), `significance.json` (see
`rankdistill.evaluation.significance`), `cost.json` (see `rankdistill.evaluation.cost`), `extrapolation.json` (see
`rankdistill.evaluation.extrapolation`), and where a row is named `teacher` `fidelity.json` and `fidelity.parquet` (see
`rankdistill.evaluation.fidelity`). Runs are streamed to disk as they are made, and read one at a time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rankdistill.artifacts import disk_errors, write_atomically, write_json, write_table
from rankdistill.collections import Collection, open_collection
from rankdistill.collections.passages import best_passages, document_of
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.cost import measuring_environment
from rankdistill.evaluation.extrapolation import QuerySplit, measure_split
from rankdistill.evaluation.fidelity import measure_fidelity
from rankdistill.evaluation.metrics import DEFAULT_METRICS, evaluate_run, parse_metric
from rankdistill.evaluation.results import Evaluation, Row, SuiteEvaluation
from rankdistill.evaluation.significance import check_options
from rankdistill.evaluation.suites import (
    SYNTHETIC,
    EvaluationSet,
    Missing,
    Suite,
    folder_name,
    load_references,
    locate,
    set_title,
)
from rankdistill.evaluation.systems import System
from rankdistill.evaluation.tables import markdown
from rankdistill.indexes.mining import same_text
from rankdistill.progress import progress, warn
from rankdistill.runs import Ranking, Run, RunWriter, WhiteSpaceError, read_run, write_trec

QUERY_BATCH = 256  # queries handed to a system at once
TEACHER = "teacher"  # the row that others' agreement is measured with


Systems = Mapping[str, System | Run | str | Path]


def evaluate_systems(
    systems: Systems,
    collection: Collection,
    split: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    depth: int = 1000,
    out: str | Path = "evaluation",
    *,
    relevance_level: int = 1,
    drop_self_hits: bool = False,
    name: str | None = None,
    baseline: str | None = None,
    correction: str = "holm",
    alpha: float = 0.05,
    seed: int = 0,
    latency_queries: int = 0,
    split_by: QuerySplit | None = None,
) -> Evaluation:
    """Run every system on the split's queries and measure it.

    Args:
        systems: name → system, or a ready run or run file.
        metrics: names as ranx has them.
        depth: documents retrieved for each query; one more is asked for where self hits are dropped.
        out: the folder that is written.
        relevance_level: least judgment that binary metrics count as relevant.
        name: of the set; default the collection's. Published figures are looked up by it.
        baseline: the row that marks of significance refer to; default BM25, else the first.
        correction, alpha, seed: of the tests, see `rankdistill.evaluation.significance`.
        latency_queries: queries whose latency is measured one by one, a few seconds a system; 0 measures none.
        split_by: how the queries are parted into interpolation and extrapolation.

    Raises:
        UsageError: an unknown metric, baseline or correction.
        RankdistillError: no judged queries, or a system's ranking is not one (duplicate documents, NaN).
    """
    out = Path(out)
    for metric in metrics:
        parse_metric(metric)
    check_options(list(systems), baseline, correction)  # before hours of searching
    qrels = collection.found_qrels(split)  # as trec_eval: what the collection lacks was not found
    query_ids = collection.query_ids(split)
    if not query_ids:
        raise RankdistillError(f"the split {split!r} has no judged queries", where=collection.spec)
    itself = 0 if drop_self_hits else _own_documents(collection, query_ids)
    if itself:
        warn(
            f"{itself:,} of {len(query_ids):,} queries are documents of {collection.name} (same id, same text) and are "
            "found first: with drop_self_hits: true in the suite they are left out"
        )
    set_name = name or collection.name
    evaluation = Evaluation(
        name=set_name,
        split=split,
        collection={"name": collection.name, "spec": collection.spec, "fingerprint": collection.fingerprint},
        metrics=list(metrics),
        depth=depth,
        relevance_level=relevance_level,
        drop_self_hits=drop_self_hits,
        rows=[],
        environment=environment(),
        published=[figure.model_dump() for figure in load_references(set_name)],
        path=out,
        query_ids=list(qrels),
    )
    for (system_name, system), file_name in zip(systems.items(), _file_names(systems), strict=True):
        part = getattr(system, "part", None)
        ids = query_ids if part is None else [query_id for query_id in query_ids if query_id in part]
        file = out / "runs" / file_name
        run, dropped, rate = _run(system, system_name, collection, ids, depth, drop_self_hits, file)
        judged = qrels if part is None else {query_id: qrels[query_id] for query_id in ids}
        measured = evaluate_run(run, judged, metrics, relevance_level=relevance_level)
        row = Row(
            system=system_name,
            means=measured.means,
            notes=measured.notes | {"self_hits_dropped": dropped, "self_documents": itself},
            run=_as_trec(run, file).relative_to(out).as_posix(),
            bytes=getattr(system, "bytes", None),
            queries_per_second=rate,
            parameters=getattr(system, "parameters", None),
            note=getattr(system, "note", ""),
        )
        evaluation.rows.append(row)
        if part is None:
            evaluation.per_query[system_name] = measured.per_query
    evaluation.compare_rows(baseline=baseline, correction=correction, alpha=alpha, seed=seed)
    if split_by is not None:
        evaluation.extrapolation = measure_split(split_by, evaluation.per_query, qrels, relevance_level)
    if TEACHER in systems and len(evaluation.rows) > 1:
        lowest = getattr(systems[TEACHER], "lowest", None)
        if lowest is not None and not lowest.keys() & qrels.keys():
            warn("the teacher has no score for any query here: agreement with it is not measured")
        else:
            runs: dict[str, Run | str | Path] = {row.system: out / row.run for row in evaluation.rows}
            evaluation.fidelity = measure_fidelity(
                runs.pop(TEACHER),
                runs,
                qrels,
                name=TEACHER,
                metric=metrics[0],
                relevance_level=relevance_level,
                lowest=lowest,
                values={system: by_metric[metrics[0]] for system, by_metric in evaluation.per_query.items()},
            )
    if latency_queries:
        evaluation.measure_cost(systems, collection, query_ids, latency_queries)
    _write(evaluation, out)
    return evaluation


def _own_documents(collection: Collection, query_ids: list[str]) -> int:
    """How many queries are documents of the collection: of the same id and the same text (see `mining`)."""
    if not hasattr(collection, "documents"):  # judgments alone
        return 0
    rows = np.asarray(collection.doc_rows(query_ids))
    at = np.flatnonzero(rows >= 0)
    documents, texts = collection.documents(rows[at]), collection.query_texts([query_ids[place] for place in at])
    return sum(same_text(text, document) for text, document in zip(texts, documents, strict=True))


def _run(
    system: System | Run | str | Path,
    name: str,
    collection: Collection,
    query_ids: list[str],
    depth: int,
    drop_self_hits: bool,
    file: Path,
) -> tuple[Run, int, float | None]:
    """A system's run, without self hits where asked for; how many those were; queries a second where it is timed.

    What searches is written to `file` first. Its own work is timed in batches, after one query that warms it up. A
    ready run keeps its queries without judgments, so that they are counted.
    """
    passages = bool(getattr(collection, "passages", None))
    if isinstance(system, Run | str | Path):
        run = copy(system) if isinstance(system, Run) else read_run(system)
        run = _written(map(_of_documents, run), file, name) if passages else run
        run = run.first(depth + drop_self_hits)
        itself = run.self_hits if drop_self_hits else np.zeros(len(run.scores), bool)
        run = run.keep(~itself).first(depth)
        run.name = name
        return run, int(np.count_nonzero(itself)), None
    timed, seconds, dropped = getattr(system, "timed", True), 0.0, 0
    batch = QUERY_BATCH if timed else max(len(query_ids), 1)  # what was made elsewhere is gone through once
    asked = collection.reach(depth + drop_self_hits) if passages else depth + drop_self_hits
    if timed:
        list(system.run(collection, query_ids[:1], collection.query_texts(query_ids[:1]), depth))
    with progress(f"evaluate {name}", len(query_ids), "queries") as bar, RunWriter(file) as writer:
        for start in range(0, len(query_ids), batch):
            ids = query_ids[start : start + batch]
            texts = collection.query_texts(ids)
            started = time.perf_counter()
            rankings = system.run(collection, ids, texts, asked)
            rankings = list(rankings) if timed else rankings
            seconds += time.perf_counter() - started
            for query_id, doc_ids, scores in map(_of_documents, rankings) if passages else rankings:
                if drop_self_hits and query_id in doc_ids:
                    dropped += 1
                    at = doc_ids.index(query_id)
                    doc_ids, scores = doc_ids[:at] + doc_ids[at + 1 :], np.delete(scores, at)
                writer.add(query_id, doc_ids[:depth], scores[:depth])
                bar.advance()
    return read_run(file, name), dropped, len(query_ids) / seconds if timed and seconds else None


def _of_documents(ranking: Ranking) -> Ranking:
    """A ranking of passages, best first, as one of documents by their best passage."""
    query_id, ids, scores = ranking
    best = best_passages(ids)
    return query_id, [document_of(ids[at]) for at in best], np.asarray(scores)[best]


def _written(rankings: Iterable[Ranking], file: Path, name: str) -> Run:
    with RunWriter(file) as writer:
        for ranking in rankings:
            writer.add(*ranking)
    return read_run(file, name)


def _as_trec(run: Run, file: Path) -> Path:
    """Write a run as a TREC file in place of a Parquet one, except where an id cannot be written in it."""
    trec = file.with_suffix(".trec")
    try:
        write_trec(run, trec)
    except WhiteSpaceError as error:
        warn(f"{error.what}: {file} stays Parquet")
        if not file.is_file():
            _written(run, file, run.name)
        return file
    file.unlink(missing_ok=True)
    return trec


def _file_names(names: Iterable[str]) -> list[str]:
    """Of each system a file name; different for different systems, also where capitals do not tell files apart."""
    files: list[str] = []
    for name in names:
        stem = folder_name(name).strip("-.") or "system"
        taken = {file.lower() for file in files}
        endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        files.append(next(file for end in endings if (file := f"{stem}{end}.parquet").lower() not in taken))
    return files


def environment() -> dict[str, Any]:
    """What the speeds of rows were measured with; the load, which is another each time, is told with the latencies."""
    measured = measuring_environment()
    return {"query_batch": QUERY_BATCH, **{name: measured[name] for name in ("machine", "threads", "libraries")}}


def _write(evaluation: Evaluation, out: Path) -> None:
    ids = evaluation.query_ids
    per_query = [
        pa.table({"system": [system] * len(ids), "query_id": ids, **values})
        for system, values in evaluation.per_query.items()
    ]
    if per_query:
        write_table(out / "per_query.parquet", pa.concat_tables(per_query))
    if evaluation.significance is not None:
        write_json(out / "significance.json", evaluation.significance.to_json())
    if evaluation.cost is not None:
        write_json(out / "cost.json", evaluation.cost)
    for measured in (evaluation.fidelity, evaluation.extrapolation):
        if measured is not None:
            measured.write(out)
    write_json(out / "results.json", evaluation.to_json())
    write_atomically(out / "results.md", markdown(evaluation))


def evaluate_suite(
    suite: Suite,
    systems_for: Callable[[Any, EvaluationSet, str], Systems],
    out: str | Path,
    *,
    split_for: Callable[[Any, str], QuerySplit | None] = lambda collection, split: None,
    own: Collection | None = None,
    local: str | Path | None = None,
    fetch: bool = True,
    opener: Callable[[str], Any] = open_collection,
    students: Mapping[str, str] | None = None,
) -> SuiteEvaluation:
    """Evaluate every set of a suite that can be found; the others are listed as missing with the reason.

    That the run's own collection has no judgments is no failure: nothing is measured then, and the result says so.

    Args:
        systems_for: (collection, set, split) → the systems to run on it; called once for each set found.
        split_for: (collection, split) → how its queries are parted into interpolation and extrapolation.
        out: each set is written to `out/SET`, the whole to `out/results.json` and `out/results.md`.
        own, local, fetch, opener: where sets are found, see `suites.locate`.
        students: name → fingerprint of the trained students that the systems are made of.

    Raises:
        RankdistillError: no set of the suite was found.
    """
    out = Path(out)
    evaluations: list[Evaluation] = []
    missing: list[dict[str, str]] = []
    groups: dict[str, str] = {}
    unjudged = False
    for entry in suite.sets:
        located = locate(entry, own=own, local=Path(local) if local else None, fetch=fetch, opener=opener)
        if isinstance(located, Missing):
            warn(f"{entry.name} is not evaluated: {located.reason}")
            missing.append({"set": entry.name, "reason": located.reason})
            unjudged = unjudged or located.unjudged
            continue
        collection, split = located
        name = set_title(collection.name if entry.collection == "own" else entry.name, split)
        folder = out / folder_name(name)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        evaluations.append(
            evaluate_systems(
                systems_for(collection, entry, split),
                collection,
                split,
                suite.metrics,
                suite.depth,
                folder,
                relevance_level=entry.relevance_level,
                drop_self_hits=entry.drop_self_hits,
                name=name,
                baseline=suite.baseline,
                correction=suite.correction,
                alpha=suite.alpha,
                latency_queries=suite.latency_queries,
                split_by=split_for(collection, split),
            )
        )
        if split not in SYNTHETIC:  # never averaged with judged sets
            groups[name] = entry.group or entry.name
    if not evaluations and not unjudged:
        reasons = "; ".join(f"{absent['set']}: {absent['reason']}" for absent in missing)
        raise RankdistillError(
            f"no set of the suite {suite.name} could be found: {reasons}",
            fix="give a folder of sets in BEIR layout (--local DIR), or connect to the network",
        )
    result = SuiteEvaluation(suite.name, list(suite.metrics), evaluations, missing, path=out)
    result.students = dict(students or {})
    result.macro = macro_average([each for each in evaluations if each.name in groups], groups)
    result.macro_sets = len(set(groups.values()))
    if not missing:
        result.published = [figure.model_dump() for figure in load_references(f"macro:{suite.name}")]
    write_json(out / "results.json", result.to_json())
    write_atomically(out / "results.md", markdown(result))
    return result


def macro_average(evaluations: Sequence[Evaluation], groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """system → metric → mean over groups of the mean within a group; systems measured on every set only."""
    macro: dict[str, dict[str, float]] = {}
    for system in (row.system for row in evaluations[0].rows) if evaluations else ():
        if any(system not in {row.system for row in measured.rows} for measured in evaluations):
            continue
        macro[system] = {}
        for metric in evaluations[0].metrics:
            of_group: dict[str, list[float]] = {}
            for measured in evaluations:
                of_group.setdefault(groups[measured.name], []).append(measured[system].means[metric])
            macro[system][metric] = float(np.mean([np.mean(values) for values in of_group.values()]))
    return macro
