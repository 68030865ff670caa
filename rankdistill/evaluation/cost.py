"""What it costs to serve a system: latency step by step, bytes, memory, parameters; and which systems are worth it.

Latency is one query at a time, after a warm-up, over the same queries in the same order for every system; a slow one (a
teacher that re-ranks) stops when its seconds are spent, and the others are compared with it on the queries it got to.
Throughput in batches is measured while rankings are made (`Row.queries_per_second`) and only repeated here.

Written to `cost.json` in the folder of an evaluation.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rankdistill.artifacts import library_versions
from rankdistill.devices import synchronise
from rankdistill.indexes.base import available_threads
from rankdistill.progress import progress

WARM_UP = 3  # queries answered before the clock runs; fewer where one takes a second
LEAST_QUERIES = 3  # measured however slow a system is
MOST_SECONDS = 3.0  # of measured latency a system
WARM_UP_SECONDS = 1.0
PERCENTILES = (50, 95, 99)
SEED = 42

Name = TypeVar("Name", str, int)
# What a step makes of the query texts and of what the step before it made.
Step = Callable[[Sequence[str], Any], Any]


def engine_steps(engine: Any, depth: int) -> dict[str, Step]:
    """How an engine answers: `encode`, then `search`; one step where it does not tell them apart (BM25)."""
    if hasattr(engine, "steps"):  # it knows a shorter way
        own: dict[str, Step] = engine.steps(depth)
        return own
    parts = encoder_and_index(engine)
    if parts is None:
        return {"search": lambda texts, _: engine.search(texts, depth)}
    encoder, index = parts
    return {
        "encode": lambda texts, _: encoder.encode_queries(texts),
        "search": lambda _, vectors: index.search(vectors, depth),
    }


def encoder_and_index(engine: Any) -> tuple[Any, Any] | None:
    """Of an engine that tells them apart."""
    encoder, index = getattr(engine, "encoder", None), getattr(engine, "index", None)
    return None if encoder is None or index is None else (encoder, index)


class Footprint:
    """What a system keeps to search: `bytes` on disk, and in memory its models too."""

    bytes: int | None

    def models(self) -> list[Any]:
        raise NotImplementedError

    @property
    def memory_bytes(self) -> int | None:
        return None if self.bytes is None else self.bytes + sum(map(model_bytes, self.models()))

    @property
    def parameters(self) -> int | None:
        counts = [count for model in self.models() if (count := model_parameters(model)) is not None]
        return sum(counts) if counts else None

    @property
    def device(self) -> Any:
        """The last model's that is not the processor."""
        devices = [model.device for model in self.models() if hasattr(model, "device")]
        return next((device for device in reversed(devices) if str(device) != "cpu"), "cpu")


def encoders(engine: Any) -> list[Any]:
    """Those of an engine: none, one, or of a fused one several."""
    several: list[Any] | None = getattr(engine, "encoders", None)
    encoder = getattr(engine, "encoder", None)
    return several if several is not None else [] if encoder is None else [encoder]


@dataclass
class Reranking(Footprint):
    """How a teacher is served: a first stage, then the teacher over what it found. For `measure_costs`.

    Args:
        engine: the first stage.
        score: (query, document ids, document texts) → scores, computed now.
        teachers: gives what is in memory beside the first stage's index and encoder; asked after the first query.
        depth: documents re-ranked for each query, whatever depth is asked for.
    """

    engine: Any
    collection: Any
    score: Callable[[str, list[str], list[str]], Any]
    teachers: Callable[[], Sequence[Any]]
    depth: int
    rates: list[float] = field(default_factory=list)  # pairs a second, of each query so far

    def __post_init__(self) -> None:
        # The first stage's index is what is kept to search; the texts that the teacher reads come on top.
        self.bytes = getattr(getattr(self.engine, "index", self.engine), "bytes", None)

    def models(self) -> list[Any]:
        return [*encoders(self.engine), *self.teachers()]

    def steps(self, depth: int) -> dict[str, Step]:
        return {**engine_steps(self.engine, self.depth), "rerank": self._rerank}

    def _rerank(self, texts: Sequence[str], found: Sequence[Any]) -> list[Any]:
        scored = []
        for text, hits in zip(texts, found, strict=True):
            documents = self.collection.document_texts(hits.rows)
            started = time.perf_counter()
            scored.append(self.score(text, self.collection.doc_ids(hits.rows), documents))
            self.rates.append(len(documents) / (time.perf_counter() - started))
        return scored

    def pairs_per_second(self) -> float:
        """The median: the first query loads the models."""
        return round(float(np.median(self.rates)), 1)


def model_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, each tensor once; 0 for what is no torch module."""
    if not hasattr(model, "parameters"):
        return 0
    held = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def model_parameters(model: Any) -> int | None:
    """Parameters of a torch module; 0 for an inference-free query side, which has a table alone; None for the rest."""
    if hasattr(model, "parameters"):
        return sum(parameter.numel() for parameter in model.parameters())
    return 0 if getattr(model, "inference_free", False) else None


def measure_costs(
    systems: Mapping[str, Any],
    rows: Iterable[Any],
    collection: Any,
    query_ids: Sequence[str],
    *,
    depth: int,
    metric: str,
    queries: int = 100,
    seconds: float = MOST_SECONDS,
) -> dict[str, Any]:
    """The cost of each system, and the Pareto fronts of `metric` against latency and against bytes.

    A system is measured when it has `steps(depth)`, the names and functions of what is done to a query, or `served`, an
    object that has (a teacher whose scores were looked up, see `Reranking`). `memory_bytes`, `parameters` and `device`
    are optional. A ready run has none of these, and no figures here.

    Args:
        rows: the measured rows (`evaluate.Row`): quality, bytes and queries a second are taken from them.
        query_ids: of the split; as many of them as `queries` are drawn, the same for every system.
        depth: documents asked for, as when the quality was measured: a deeper search is slower and finds more.
        seconds: measured at most for one system, as long as it answered LEAST_QUERIES.

    Returns:
        what is written to cost.json; milliseconds, bytes; None where something was not measured.
    """
    order = np.random.default_rng(SEED).permutation(len(query_ids))
    drawn = [query_ids[row] for row in order[: queries + WARM_UP]]
    texts = collection.query_texts(drawn)
    measured, others = texts[:queries], texts[queries:] or texts
    documents = getattr(collection, "document_count", None)
    costs: dict[str, dict[str, Any]] = {}
    totals: dict[str, np.ndarray] = {}
    rerankers: list[str] = []
    devices: set[str] = set()
    with progress("measure latency", len(systems), "systems") as bar:
        for row in rows:
            system = getattr(systems[row.system], "served", None) or systems[row.system]
            steps = system.steps(depth) if hasattr(system, "steps") else {}
            times = _latencies(steps, measured, others, seconds) if steps else {}
            total = np.sum(list(times.values()), axis=0) if times else None
            rate = row.queries_per_second
            if rate is None and total is not None:
                rate = round(1000 / max(float(total.mean()), 1e-6), 4)  # a re-ranker's batch is one query's documents
            size = row.bytes if row.bytes is not None else getattr(system, "bytes", None)
            costs[row.system] = {
                "encode_ms": None,
                "search_ms": None,
                **{f"{name}_ms": percentiles(values) for name, values in times.items()},
                "total_ms": percentiles(total) if total is not None else None,
                "queries_measured": len(total) if total is not None else 0,
                "batch_queries_per_second": rate,
                "bytes": size,
                "bytes_a_document": round(size / documents, 2) if size is not None and documents else None,
                "memory_bytes": getattr(system, "memory_bytes", None),
                "parameters": getattr(system, "parameters", None),
                "pairs_per_second": system.pairs_per_second() if isinstance(system, Reranking) and times else None,
                "quality": row.means.get(metric),
            }
            if total is not None:
                totals[row.system] = total
                devices.add(device_name(getattr(system, "device", "cpu")))
            if "rerank" in steps:
                rerankers.append(row.system)
            bar.advance()
    points = {
        name: {
            "quality": cost["quality"],
            "latency": cost["total_ms"]["p50"] if cost["total_ms"] else None,
            "bytes": cost["bytes"],
        }
        for name, cost in costs.items()
    }
    return {
        "environment": {**measuring_environment(), "device": ", ".join(sorted(devices)) or "cpu"},
        "metric": metric,
        "depth": depth,
        "systems": costs,
        "pareto": {axis: pareto_front(points, maximise=["quality"], minimise=[axis]) for axis in ("latency", "bytes")},
        "same_queries": [_on_the_same_queries(name, totals) for name in rerankers],
    }


def percentiles(milliseconds: Any) -> dict[str, float]:
    """{"p50": …, "p95": …, "p99": …}, interpolated between measurements."""
    values = np.percentile(np.asarray(milliseconds), PERCENTILES)
    return {f"p{level}": round(float(value), 4) for level, value in zip(PERCENTILES, values, strict=True)}


def _latencies(
    steps: Mapping[str, Step], texts: Sequence[str], others: Sequence[str], seconds: float
) -> dict[str, np.ndarray]:
    """step → milliseconds of each query [as many as the seconds allowed], one query at a time."""
    times: list[list[float]] = []
    started = time.perf_counter()
    for text in others[:WARM_UP]:
        _answer(steps, [text])
        if time.perf_counter() - started > WARM_UP_SECONDS:
            break
    started = time.perf_counter()
    for text in texts:
        times.append(_answer(steps, [text]))
        if len(times) >= LEAST_QUERIES and time.perf_counter() - started > seconds:
            break
    return {name: np.array(column) * 1000 for name, column in zip(steps, zip(*times, strict=True), strict=True)}


def _answer(steps: Mapping[str, Step], texts: Sequence[str]) -> list[float]:
    """Seconds of each step."""
    made: Any = None
    clock = [time.perf_counter()]
    for step in steps.values():
        made = step(texts, made)
        synchronise()
        clock.append(time.perf_counter())
    return [after - before for before, after in pairwise(clock)]


def _on_the_same_queries(teacher: str, totals: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean milliseconds of every system on the queries that the teacher got to, and how many times as long it took."""
    count = len(totals[teacher])
    means = {name: float(total[:count].mean()) for name, total in totals.items() if len(total) >= count}
    return {
        "teacher": teacher,
        "queries": count,
        "mean_ms": {name: round(mean, 4) for name, mean in means.items()},
        "teacher_takes_times": {
            name: round(means[teacher] / mean, 2) for name, mean in means.items() if name != teacher
        },
    }


# -- what is worth its cost -------------------------------------------------------------------------------------------


def pareto_front(
    points: Mapping[Name, Mapping[str, float | None]], *, maximise: Sequence[str] = (), minimise: Sequence[str] = ()
) -> list[Name]:
    """Names of the points that no other dominates: at least as good in every key and better in one.

    Equal points are on the front together, or not at all. A point that lacks a key (None or NaN) is left out.

    Args:
        points: name → key → value.
        maximise, minimise: keys of which more, or less, is better. Names come best first by these keys, ties by name.
    """
    lower: dict[Name, tuple[float, ...]] = {}  # what is maximised is turned round: less is better in every place
    for name, values in points.items():
        known = [values.get(key) for key in (*maximise, *minimise)]
        signs = [-1.0] * len(maximise) + [1.0] * len(minimise)
        numbers = [sign * value for sign, value in zip(signs, known, strict=True) if value is not None]
        if len(numbers) == len(known) and not any(map(math.isnan, numbers)):
            lower[name] = tuple(numbers)
    front: list[Name] = []
    # In this order a point can only be dominated by one before it, and then by one of the front.
    for name, mine in sorted(lower.items(), key=lambda item: (item[1], item[0])):
        others = (lower[other] for other in front if lower[other] != mine)
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in others):
            front.append(name)
    return front


# -- the machine ------------------------------------------------------------------------------------------------------


def measuring_environment() -> dict[str, Any]:
    """The machine, its processor, and the threads that libraries in use are set to."""
    threads: dict[str, int] = {}
    if "torch" in sys.modules:
        threads["torch"] = sys.modules["torch"].get_num_threads()
    if "faiss" in sys.modules:
        threads["faiss"] = sys.modules["faiss"].omp_get_max_threads()
    allowed = available_threads()
    return {
        "machine": processor(),
        "cores": allowed,
        "threads": max(threads.values(), default=int(os.environ.get("OMP_NUM_THREADS") or allowed)),
        "threads_of": threads,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # others' work slows what we time
        "libraries": library_versions(),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    kind = f"{platform.machine()} {platform.system()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return kind
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name} ({kind})" if name else kind


def device_name(device: Any) -> str:
    """`cpu`, or a GPU's name."""
    if not str(device).startswith("cuda"):
        return str(device)
    import torch

    return f"{device} ({torch.cuda.get_device_name(torch.device(str(device)))})"
