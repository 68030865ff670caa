"""Operating points of an index: how good and how fast it is at each search setting, and which setting to serve with.

Settings are tried on a clone of the index, one by one and by their names, so the caller's index stays as it was; the
clone takes as much memory. FAISS's own `ParameterSpace` is not asked: its `explore` leaves an index at the last trial,
and its `initialize` also tunes polysemous `ht`, which ruins recall.

Queries come from the dev split, else from train, else from the documents themselves; never from test, on which the
chosen setting will be measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, locked
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.cost import measuring_environment, pareto_front, percentiles
from rankdistill.evaluation.metrics import Qrels, evaluate_run, parse_metric
from rankdistill.evaluation.tables import Cell, Table, latency_text, make_table, number, plain_table, rate_text
from rankdistill.indexes.base import Encoder, Hits, Vectors
from rankdistill.indexes.dense import ExactIndex
from rankdistill.indexes.faiss_index import FaissIndex, parts, publish_index
from rankdistill.indexes.vectors import open_vectors
from rankdistill.progress import progress
from rankdistill.runs import Run

MOST_QUERIES = 500
MOST_FACTOR = 64  # hits re-scored for each one returned
MOST_BREADTH = 1024  # of a graph search
SINGLE_QUERIES, SINGLE_SECONDS = 50, 1.0  # timed one by one
BATCH_SECONDS, BATCH_RUNS = 0.2, 5  # a batch is timed again until this long, at most so often; the shortest counts
WHOLE = ("nprobe", "efSearch")  # settings between whose tried values a smaller one may do


@dataclass(frozen=True)
class OperatingPoint:
    """One index at one setting.

    Attributes:
        recall: share of exact search's `k` best that are among the `k` found, mean over the queries.
        metrics: against judgments; empty without them.
        queries_per_second: all queries in one call.
        single_ms: one query at a time, p50, p95 and p99.
    """

    index: str
    settings: dict[str, float]
    recall: float
    metrics: dict[str, float]
    queries_per_second: float
    single_ms: dict[str, float]
    bytes_a_document: float

    def is_below(self, other: OperatingPoint) -> bool:
        """Whether no setting of the same index is higher, and one is lower."""
        alike = self.index == other.index and self.settings.keys() == other.settings.keys()
        return (
            alike and self.settings != other.settings and all(v <= other.settings[n] for n, v in self.settings.items())
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items()) or "–"


@dataclass
class Sweep:
    """What a sweep tried.

    Attributes:
        k: documents of which recall counts.
        queries: how many, and `origin` which.
        quality: what the front maximises: the first metric, or recall where nothing is judged.
        without_settings: names of indexes that have nothing to set.
        chosen: index → the setting that a target recall asked for.
    """

    points: list[OperatingPoint]
    k: int
    depth: int
    queries: int
    quality: str
    origin: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    without_settings: list[str] = field(default_factory=list)
    chosen: dict[str, OperatingPoint] = field(default_factory=dict)

    @property
    def front(self) -> list[OperatingPoint]:
        """The points that none beats in quality, queries a second (in a batch) and bytes a document."""
        values = {
            at: {
                "quality": point.metrics.get(self.quality, point.recall),
                "rate": point.queries_per_second,
                "bytes": point.bytes_a_document,
            }
            for at, point in enumerate(self.points)
        }
        return [self.points[at] for at in pareto_front(values, maximise=["quality", "rate"], minimise=["bytes"])]

    def reaching(self, recall: float) -> OperatingPoint:
        """The cheapest point with at least this recall.

        Of two points of which one has no setting higher than the other, the lower is the cheaper; where settings cannot
        be compared like that (more lists, fewer hits re-scored), the faster one.

        Raises:
            RankdistillError: no setting tried reaches it; the best is named.
        """
        good = [point for point in self.points if point.recall >= recall]
        if not good:
            best = max(self.points, key=lambda point: point.recall)
            raise RankdistillError(
                f"no setting reaches recall@{self.k} {recall:g}: the best is {best.recall:.4f}"
                + (f" with {best}" if best.settings else ", and this index has nothing to set"),
                where=best.index,
                fix="a lower target, or an index that keeps more bytes (a refine stage, sq8, hnsw, flat)",
            )
        lowest = [point for point in good if not any(other.is_below(point) for other in good)]
        return max(lowest, key=lambda point: point.queries_per_second)

    def to_json(self) -> dict[str, Any]:
        front = {id(point) for point in self.front}
        values = asdict(self)
        values["points"] = [{**asdict(point), "front": id(point) in front} for point in self.points]
        return values

    def tables(self, *, intervals: bool = False) -> list[Table]:
        """The front as a table, most quality first."""
        front, environment = self.front, self.environment

        def mean(metric: str) -> Callable[[OperatingPoint], Cell]:
            return lambda point: number(point.metrics.get(metric))

        columns: dict[str, Callable[[OperatingPoint], Cell | str]] = {
            "index": lambda point: point.index,
            "settings": str,
            f"recall@{self.k}": lambda point: number(point.recall),
            **{metric: mean(metric) for metric in self.points[0].metrics},
            "queries/s": lambda point: number(point.queries_per_second, rate_text),
            "one query ms": lambda point: number(point.single_ms["p50"], latency_text),
            "bytes/doc": lambda point: number(point.bytes_a_document, "{:,.1f}".format),
        }
        notes = [
            f"{len(front)} of {len(self.points)} settings tried: none of the others is as good in {self.quality}, as "
            "fast in a batch and as small",
            f"recall: of exact search over the float vectors; {self.queries} queries ({self.origin or 'as given'})",
            f"search alone, the queries encoded before; depth {self.depth}",
            f"queries/s: all in one call, {environment.get('threads')} threads, {environment.get('machine')}",
        ]
        if self.without_settings:
            notes.append(f"{', '.join(self.without_settings)}: no search setting, so one point")
        return [make_table("operating points: the Pareto front", front, columns, notes)]

    def __repr__(self) -> str:
        return plain_table(self)


# -- sweeping ---------------------------------------------------------------------------------------------------------


def search_grid(index: FaissIndex, depth: int) -> dict[str, list[int]]:
    """What can be set on an index → the values to try: powers of two and both ends; {} where there is nothing to set.

    A graph search is never narrower than `depth`, the documents asked for, and no more is re-scored than there is.
    """
    count = index.document_count
    factors = _powers(1, max(1, min(MOST_FACTOR, count // max(1, depth))))
    grid: dict[str, list[int]] = {}
    for part in parts(index.index):
        if hasattr(part, "nprobe"):
            grid["nprobe"] = _powers(1, int(part.nlist))
        if hasattr(part, "hnsw"):
            grid["efSearch"] = _powers(min(depth, count), max(depth, min(MOST_BREADTH, count)))
        if hasattr(part, "k_factor"):
            grid["k_factor"] = factors
    if index.specification.binary:
        grid["rescore"] = factors
    return grid


def _powers(least: int, most: int) -> list[int]:
    """Both ends and the powers of two between them."""
    between = [1 << power for power in range(1, most.bit_length() + 1) if least < 1 << power < most]
    return sorted({least, *between, most})


def sweep(
    index: FaissIndex,
    queries: Vectors,
    exact: Sequence[Hits] | NDArray[Any],
    *,
    k: int = 10,
    query_ids: Sequence[str] | None = None,
    qrels: Qrels | None = None,
    metrics: Sequence[str] = ("ndcg@10",),
    grid: Mapping[str, Sequence[float]] | None = None,
    origin: str = "",
    target_recall: float | None = None,
) -> Sweep:
    """Search with every combination of settings and measure quality and speed. `index` itself is not touched.

    Args:
        queries: vectors float32 [n, dimension].
        exact: what exact search finds: hits of each query, or rows [n, at least k]. Where hits go deeper than `k`,
            documents that tie with the k-th are as good as it.
        k: documents of which recall counts.
        query_ids: of the queries, where they are judged.
        qrels: query id → document id → relevance; ids are the index's (`FaissIndex.doc_ids`).
        metrics: against the qrels.
        grid: setting → values; default `search_grid`. A setting that is not in it keeps the index's own value.
        origin: which queries these are, for the table.
        target_recall: above 0, at most 1: `chosen` gets the cheapest setting that reaches it. The gap between it and
            the next lower one tried is halved down to a sixteenth.

    Raises:
        UsageError: an unknown metric or setting; not as many exact results, or ids, as queries.
        RankdistillError: no setting reaches the target; the best is named.
    """
    if target_recall is not None and not 0 < target_recall <= 1:
        raise UsageError(f"a recall of {target_recall:g} cannot be aimed at", fix="above 0, at most 1, e.g. 0.95")
    if k < 1:
        raise UsageError(f"recall of the {k} best documents cannot be counted", fix="k of at least 1")
    if not len(queries) or len(exact) != len(queries):
        raise UsageError(f"{len(queries)} queries and {len(exact)} exact results", fix="one result for each query")
    ids, judged = list(query_ids or ()), {}
    if qrels:
        if len(ids) != len(queries):
            raise UsageError("judged queries need their ids", fix="query_ids: one for each query")
        judged = {query_id: qrels[query_id] for query_id in ids if query_id in qrels}
        if not judged:
            raise UsageError("none of the queries is judged", where=f"query {ids[0]!r}")
    metrics = list(metrics) if judged else []
    depth = max([k, *(parse_metric(metric).cutoff or k for metric in metrics)])
    trial, vectors = index.clone(), np.ascontiguousarray(queries, np.float32)
    expected = [_expected(hits, k) for hits in exact]
    alone = [vectors[row : row + 1] for row in range(min(len(vectors), SINGLE_QUERIES))]

    def measure(settings: Mapping[str, float]) -> OperatingPoint:
        trial.set_search(**settings)
        results = trial.search(vectors, depth)
        recall = [
            min(int(np.isin(hits.rows[:k], rows).sum()), size) / size
            for hits, (rows, size) in zip(results, expected, strict=True)
            if size
        ]
        means: dict[str, float] = {}
        if metrics:
            scored = ((trial.doc_ids(hits.rows), hits.scores.tolist()) for hits in results)
            ranking = {query_id: dict(zip(*found, strict=True)) for query_id, found in zip(ids, scored, strict=True)}
            means = evaluate_run(Run.from_dict(ranking), judged, metrics).means
        batch = min(_seconds(trial, [vectors] * BATCH_RUNS, depth, BATCH_SECONDS))
        return OperatingPoint(
            index=trial.name,
            settings=dict(settings),
            recall=float(np.mean(recall)) if recall else 0.0,
            metrics=means,
            queries_per_second=len(vectors) / batch,
            single_ms=percentiles([1000 * seconds for seconds in _seconds(trial, alone, depth, SINGLE_SECONDS)]),
            bytes_a_document=trial.bytes_per_document,
        )

    grid = search_grid(trial, depth) if grid is None else grid
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    points = []
    with progress(f"sweep {index.name}", len(combinations), "settings") as bar:
        for settings in combinations:
            points.append(measure(settings))
            bar.advance()
    swept = Sweep(
        points=points,
        k=k,
        depth=depth,
        queries=len(vectors),
        quality=metrics[0] if metrics else f"recall@{k}",
        origin=origin,
        environment={**measuring_environment(), "device": "cpu"},
        without_settings=[] if grid else [index.name],
    )
    if target_recall is not None:
        swept.chosen[index.name] = _cheapest(swept, target_recall, measure)
    return swept


def _seconds(index: FaissIndex, batches: Sequence[Vectors], depth: int, most: float) -> list[float]:
    """What each search took, until `most` seconds are spent."""
    times: list[float] = []
    for vectors in batches:
        started = time.perf_counter()
        index.search(vectors, depth)
        times.append(time.perf_counter() - started)
        if sum(times) > most:
            break
    return times


def _expected(exact: Hits | NDArray[Any], k: int) -> tuple[NDArray[np.int64], int]:
    """Rows that count as found, and how many there are to find."""
    if not isinstance(exact, Hits):
        rows = np.asarray(exact, np.int64)[:k]
        return rows[rows >= 0], int((rows >= 0).sum())
    size = min(k, len(exact.rows))
    if not size:
        return exact.rows, 0
    last = float(exact.scores[size - 1])
    ties = exact.scores >= last - 1e-6 * max(1.0, abs(last))
    return exact.rows[ties], size


def _cheapest(swept: Sweep, target: float, measure: Callable[[Mapping[str, float]], OperatingPoint]) -> OperatingPoint:
    """The cheapest point that reaches a recall, between the settings tried too; what is tried on the way is added."""
    chosen = swept.reaching(target)
    for name in WHOLE:
        if name not in chosen.settings:
            continue
        tried = sorted({int(point.settings[name]) for point in swept.points})
        low = max((value for value in tried if value < chosen.settings[name]), default=None)
        while low is not None and (high := int(chosen.settings[name])) - low > max(1, high // 16):
            middle = (low + high) // 2
            point = measure({**chosen.settings, name: middle})
            swept.points.append(point)
            if point.recall >= target:
                chosen = point
            else:
                low = middle
    return chosen


# -- a student's index ------------------------------------------------------------------------------------------------


def save_settings(index: FaissIndex, settings: Mapping[str, float], tuned: Mapping[str, Any]) -> FaissIndex:
    """Write an index again with other search settings, and in its manifest what they were chosen for.

    FAISS keeps nprobe, efSearch and the refine factor in its file, so plain FAISS searches with them too; what it does
    not keep (max_codes, rescore) is set from the manifest when the index is opened here.
    """
    if "fingerprint" not in index.manifest:
        raise UsageError("an index made elsewhere is not rewritten", where=str(index.path), fix="set it with FAISS")
    index.set_search(**settings)
    values = index.specification.model_dump()
    specification = index.specification.model_validate({**values, "search": {**values["search"], **settings}})
    manifest = {name: value for name, value in index.manifest.items() if name != "specification"}
    manifest["tuned"] = dict(tuned)
    count, step = index.document_count, 65_536
    ids = (doc_id for at in range(0, count, step) for doc_id in index.doc_ids(range(at, min(at + step, count))))
    with locked(index.path):
        return publish_index(index.index, ids, index.path, specification=specification, manifest=manifest)


class TuningQueries(NamedTuple):
    """Queries to choose a setting with."""

    ids: list[str]
    texts: list[str]
    qrels: Qrels | None
    origin: str


def tuning_queries(collection: Collection, *, seed: int = 42, most: int = MOST_QUERIES) -> TuningQueries:
    """Dev queries (the held-out part of train where there is no dev split), else train, else the documents' own words.

    The words of a document are its title, or its first words where it has none; they are not judged.
    """
    generator = np.random.default_rng(seed)

    def drawn(count: int) -> list[int]:
        rows = np.arange(count)
        return (rows if count <= most else np.sort(generator.choice(count, most, replace=False))).tolist()

    for split in ("dev", "train"):
        try:
            ids = collection.training_splits(seed=seed)[1] if split == "dev" else collection.query_ids("train")
        except RankdistillError:
            continue
        if ids:
            ids = [ids[row] for row in drawn(len(ids))]
            held_out = split == "dev" and set(ids) <= set(collection.query_ids("train"))
            judged = collection.qrels("train" if held_out else split, missing=True)
            origin = "held out of train" if held_out else split
            return TuningQueries(ids, collection.query_texts(ids), {i: judged[i] for i in ids if i in judged}, origin)
    words = [
        (document.title or document.text).split()[:16] for document in collection.documents(drawn(len(collection)))
    ]
    texts = [" ".join(first) for first in words if first]
    if not texts:
        raise RankdistillError("there are no queries, and the documents drawn are empty", where=collection.name)
    names = [f"document {n}" for n in range(len(texts))]
    return TuningQueries(names, texts, None, "titles or first words of documents")


def sweep_student(
    student: Encoder,
    indexes: Sequence[FaissIndex],
    vectors: Artifact,
    collection: Collection,
    *,
    k: int = 10,
    target_recall: float | None = None,
    seed: int = 42,
) -> Sweep:
    """Sweep a student's indexes over a collection, with queries of it; with a target, also choose and save a setting.

    Args:
        vectors: the student's document vectors: exact search over them is the reference.
        target_recall: each index gets the cheapest setting that reaches this recall@k, written into its file.

    Raises:
        RankdistillError: a target that an index cannot reach: it is left as it was.
    """
    if not indexes:
        raise UsageError("there is no index to sweep", fix="give one: --spec ivf_pq")
    tuning = tuning_queries(collection, seed=seed)
    encoded = student.encode_queries(tuning.texts)
    array = open_vectors(vectors)
    judged: dict[str, Any] = {"query_ids": tuning.ids, "qrels": tuning.qrels} if tuning.qrels else {}
    sweeps: list[Sweep] = []
    for index in indexes:
        index.check(student, collection)
        reference = ExactIndex(array, vectors.fingerprint, metric=index.specification.metric)
        exact = reference.search(encoded, 2 * k)  # deeper than k: what ties with the last is as good
        swept = sweep(index, encoded, exact, k=k, origin=tuning.origin, target_recall=target_recall, **judged)
        point = swept.chosen.get(index.name)
        if point is not None and point.settings:
            about = {"target_recall": target_recall, "k": k, "queries": len(encoded), "origin": tuning.origin}
            save_settings(index, point.settings, {**about, **asdict(point)})
        sweeps.append(swept)
    whole, *others = sweeps
    for swept in others:
        whole.points += swept.points
        whole.without_settings += swept.without_settings
        whole.chosen |= swept.chosen
    return whole
