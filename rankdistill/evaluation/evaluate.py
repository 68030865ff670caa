"""Evaluate systems on a collection: a TREC run file for each, metrics, per-query results, size and speed.

Files in the folder of an evaluation: `runs/SYSTEM.trec` (Parquet where ids hold white space), `results.json`,
`results.md`, `per_query.parquet` (columns system, query_id and one for each metric), `significance.json` (see
`rankdistill.evaluation.significance`), `cost.json` (see `rankdistill.evaluation.cost`), `extrapolation.json` (see
`rankdistill.evaluation.extrapolation`), and where a row is named `teacher` `fidelity.json` and `fidelity.parquet` (see
`rankdistill.evaluation.fidelity`). Runs are streamed to disk as they are made, and read one at a time.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from rankdistill.artifacts import disk_errors, write_atomically, write_json, write_table
from rankdistill.collections import Collection, open_collection
from rankdistill.collections.passages import best_passages, document_of
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.cost import Footprint, Step, encoders, engine_steps, measuring_environment
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
    load_references,
    locate,
    set_title,
)
from rankdistill.evaluation.tables import markdown
from rankdistill.indexes.mining import same_text
from rankdistill.progress import progress, warn
from rankdistill.runs import Ranking, Run, RunWriter, WhiteSpaceError, read_run, trec_order, write_trec

QUERY_BATCH = 256  # queries handed to a system at once
LISTS_AT_ONCE = 32  # queries handed to a teacher together
TEACHER = "teacher"  # the row that others' agreement is measured with


@runtime_checkable
class System(Protocol):
    """Anything that ranks documents for queries.

    Optional attributes: `bytes` (what is kept to search, on disk), `parameters`, `note` (shown below the table),
    `timed` (False: the ranking was made elsewhere, its speed is not measured), `part` (the queries it can rank, where
    they are not all: its row is of those, and not tested against others), and what `measure_costs` reads.
    """

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterable[Ranking]:
        """Rank at most `depth` documents for each query: (query id, document ids, scores), higher is better."""


class Searches(Protocol):
    """What `EngineSystem` needs of an engine (`rankdistill.indexes.Engine`)."""

    def search(self, queries: Sequence[str], k: int) -> Sequence[Any]:
        """For each query, an object with `rows` and `scores`."""


@dataclass
class EngineSystem(Footprint):
    """An engine that searches the collection's rows."""

    engine: Searches
    bytes: int | None = None
    note: str = ""

    def models(self) -> list[Any]:
        return encoders(self.engine)

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterator[Ranking]:
        for query_id, hits in zip(query_ids, self.engine.search(texts, depth), strict=True):
            yield query_id, collection.doc_ids(hits.rows), hits.scores

    def steps(self, depth: int) -> dict[str, Step]:
        return engine_steps(self.engine, depth)


class RerankList(NamedTuple):
    """What a teacher scores: the fields of `rankdistill.teachers.TextList`."""

    query_id: str
    query: str
    doc_ids: list[str]
    documents: list[str]
    collection: Any = None


@dataclass
class RerankSystem:
    """A teacher over a first stage: its top `depth` documents are scored again and put first.

    Documents below, and those the teacher has no score for, follow in the first stage's order, as they would be
    served: recall beyond `depth` is the first stage's.

    Args:
        scores: a teacher's `score`: lists in, (query id, document ids, scores) out, in any order, of any subset.
        base: the first stage's ranking, a run or the path of one.
        depth: documents scored for each query.
        timed, served: whether speed is measured while ranking; else how it is measured live, see `measure_costs`.
        part: the queries that there are scores for, where they are not all.
        first_stage_weight: the first stage's own score, times this, is added to each score.
    """

    scores: Callable[[Sequence[Any]], Iterable[tuple[str, Sequence[str], Any]]]
    base: Run | str | Path
    depth: int = 100
    bytes: int | None = None
    note: str = ""
    timed: bool = True
    served: Any = None
    part: set[str] | None = None
    first_stage_weight: float = 0.0
    lowest: dict[str, float] = field(default_factory=dict)  # of each query run so far: the teacher's least score

    def __post_init__(self) -> None:
        self._base = self.base if isinstance(self.base, Run) else read_run(self.base)
        self._row_of = {query_id: row for row, query_id in enumerate(self._base.query_ids)}

    def run(self, collection: Any, query_ids: Sequence[str], texts: Sequence[str], depth: int) -> Iterator[Ranking]:
        for start in range(0, len(query_ids), LISTS_AT_ONCE):
            part = slice(start, start + LISTS_AT_ONCE)
            lists = [self._list(collection, *query) for query in zip(query_ids[part], texts[part], strict=True)]
            scored = {query_id: (ids, scores) for query_id, ids, scores in self.scores([x for x in lists if x.doc_ids])}
            for item in lists:
                yield self._merge(item.query_id, *scored.get(item.query_id, ([], [])), depth)

    def _first(self, query_id: str, depth: int) -> list[str]:
        return list(self._first_scores(query_id, depth))

    def _first_scores(self, query_id: str, depth: int) -> dict[str, float]:
        """Document id → score of the first stage, best first."""
        row = self._row_of.get(query_id)
        if row is None:
            return {}
        start, end = self._base.offsets[row], self._base.offsets[row + 1]
        top = slice(start, min(end, start + depth))
        return dict(zip(self._base.doc_ids[top].to_pylist(), self._base.scores[top].tolist(), strict=True))

    def _list(self, collection: Any, query_id: str, query: str) -> RerankList:
        doc_ids = self._first(query_id, self.depth)
        rows = np.asarray(collection.doc_rows(doc_ids))
        known = [doc_id for doc_id, row in zip(doc_ids, rows, strict=True) if row >= 0]
        return RerankList(query_id, query, known, collection.document_texts(rows[rows >= 0]))

    def _merge(self, query_id: str, doc_ids: Sequence[str], scores: Any, depth: int) -> Ranking:
        scores = np.asarray(scores, np.float32)
        if self.first_stage_weight:
            first = self._first_scores(query_id, self.depth)
            scores = scores + np.float32(self.first_stage_weight) * np.array([first[x] for x in doc_ids], np.float32)
        finite = np.isfinite(scores)
        ids, scores = list(itertools.compress(doc_ids, finite)), scores[finite]
        if len(scores):
            self.lowest[query_id] = float(scores.min())
        order, scored = trec_order(scores, ids), set(ids)
        rest = [doc_id for doc_id in self._first(query_id, max(depth, self.depth)) if doc_id not in scored]
        below = scores_below(scores.min() if len(scores) else np.float32(0), len(rest))
        return query_id, ([ids[i] for i in order] + rest)[:depth], np.concatenate([scores[order], below])[:depth]


def scores_below(lowest: np.float32, count: int) -> np.ndarray:
    """Falling float32 scores [count] below the lowest, for documents that follow the re-ranked ones."""
    # Steps as wide as float32 keeps apart at this size, so that the rest neither ties nor reorders.
    step = max(np.float32(1.0), np.spacing(np.abs(lowest)) * 2)
    return np.asarray(lowest - step * np.arange(1, count + 1, dtype=np.float32), np.float32)


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
        measured.notes |= {"self_hits_dropped": dropped, "self_documents": itself}
        evaluation.rows.append(
            Row(
                system=system_name,
                means=measured.means,
                notes=measured.notes,
                run=_as_trec(run, file).relative_to(out).as_posix(),
                bytes=getattr(system, "bytes", None),
                queries_per_second=rate,
                parameters=getattr(system, "parameters", None),
                note=getattr(system, "note", ""),
            )
        )
        if part is None:
            evaluation.per_query[system_name] = measured.per_query
    evaluation.compare_rows(baseline=baseline, correction=correction, alpha=alpha, seed=seed)
    if split_by is not None:
        evaluation.extrapolation = measure_split(split_by, evaluation.per_query, qrels, relevance_level)
    if TEACHER in systems and len(evaluation.rows) > 1:
        _measure_fidelity(evaluation, out, getattr(systems[TEACHER], "lowest", None), qrels)
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


def _measure_fidelity(evaluation: Evaluation, out: Path, lowest: Mapping[str, float] | None, qrels: Any) -> None:
    """Fill in the agreement of all rows with the teacher's, from the runs on disk."""
    if lowest is not None and not lowest.keys() & qrels.keys():
        warn("the teacher has no score for any query here: agreement with it is not measured")
        return
    metric = evaluation.metrics[0]
    runs: dict[str, Run | str | Path] = {row.system: out / row.run for row in evaluation.rows}
    evaluation.fidelity = measure_fidelity(
        runs.pop(TEACHER),
        runs,
        qrels,
        name=TEACHER,
        metric=metric,
        relevance_level=evaluation.relevance_level,
        lowest=lowest,
        values={system: by_metric[metric] for system, by_metric in evaluation.per_query.items()},
    )


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
        run = by_best_passages(run, file) if passages else run
        run = run.first(depth + drop_self_hits)
        itself = run.self_hits if drop_self_hits else np.zeros(len(run.scores), bool)
        run = run.keep(~itself).first(depth)
        run.name = name
        return run, int(np.count_nonzero(itself)), None
    timed, seconds, dropped = getattr(system, "timed", True), 0.0, 0
    batch = QUERY_BATCH if timed else max(len(query_ids), 1)  # what was made elsewhere is gone through once
    if timed:
        list(system.run(collection, query_ids[:1], collection.query_texts(query_ids[:1]), depth))
    with progress(f"evaluate {name}", len(query_ids), "queries") as bar, RunWriter(file) as writer:
        for start in range(0, len(query_ids), batch):
            ids = query_ids[start : start + batch]
            texts = collection.query_texts(ids)
            started = time.perf_counter()
            asked = depth + drop_self_hits
            rankings = system.run(collection, ids, texts, collection.reach(asked) if passages else asked)
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


def by_best_passages(run: Run, file: Path) -> Run:
    """The same of a run, written to `file`."""
    with RunWriter(file) as writer:
        for ranking in run:
            writer.add(*_of_documents(ranking))
    return read_run(file, run.name)


def _as_trec(run: Run, file: Path) -> Path:
    """Write a run as a TREC file in place of a Parquet one, except where an id cannot be written in it."""
    trec = file.with_suffix(".trec")
    try:
        write_trec(run, trec)
    except WhiteSpaceError as error:
        warn(f"{error.what}: {file} stays Parquet")
        if not file.is_file():
            with RunWriter(file) as writer:
                for ranking in run:
                    writer.add(*ranking)
        return file
    file.unlink(missing_ok=True)
    return trec


def _file_names(names: Iterable[str]) -> list[str]:
    """Of each system a file name: letters, digits, dots and dashes; different for different systems."""
    files: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "system"
        taken = {file.lower() for file in files}
        offered = (
            f"{stem}{ending}.parquet"
            for ending in itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        )
        files.append(next(file for file in offered if file.lower() not in taken))
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
        folder = out / re.sub(r"[^\w.+-]+", "-", name)
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
