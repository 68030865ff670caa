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
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rankdistill.artifacts import library_versions
from rankdistill.devices import synchronise
from rankdistill.evaluation.systems import Step
from rankdistill.indexes.base import available_threads
from rankdistill.progress import progress

WARM_UP = 3  # queries answered before the clock runs; fewer where one takes a second
LEAST_QUERIES = 3  # measured however slow a system is
MOST_SECONDS = 3.0  # of measured latency a system
WARM_UP_SECONDS = 1.0
PERCENTILES = (50, 95, 99)
SEED = 42

Name = TypeVar("Name", str, int)


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
        query_ids: of the split; as many of them as `queries` are drawn, the same for every system.
        depth: documents asked for, as when the quality was measured: a deeper search is slower and finds more.
        seconds: measured at most for one system, as long as it answered LEAST_QUERIES.
    """
    order = np.random.default_rng(SEED).permutation(len(query_ids))
    texts = collection.query_texts([query_ids[row] for row in order[: queries + WARM_UP]])
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
            rate, size = row.queries_per_second, row.bytes
            if times:
                totals[row.system] = total = np.sum(list(times.values()), axis=0)
                devices.add(device_name(getattr(system, "device", "cpu")))
                if rate is None:  # a re-ranker's batch is one query's documents
                    rate = round(1000 / max(float(total.mean()), 1e-6), 4)
                if "rerank" in steps:
                    rerankers.append(row.system)
            size = getattr(system, "bytes", None) if size is None else size
            costs[row.system] = {
                "encode_ms": None,
                "search_ms": None,
                **{f"{name}_ms": percentiles(values) for name, values in times.items()},
                "total_ms": percentiles(total) if times else None,
                "queries_measured": len(total) if times else 0,
                "batch_queries_per_second": rate,
                "bytes": size,
                "bytes_a_document": round(size / documents, 2) if size is not None and documents else None,
                "memory_bytes": getattr(system, "memory_bytes", None),
                "parameters": getattr(system, "parameters", None),
                "pairs_per_second": getattr(system, "pairs_per_second", None),
                "quality": row.means.get(metric),
            }
            bar.advance()
    points = {
        name: {"quality": cost["quality"], "latency": (cost["total_ms"] or {}).get("p50"), "bytes": cost["bytes"]}
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

    def answer(text: str) -> list[float]:
        result: Any = None
        clock = [time.perf_counter()]
        for step in steps.values():
            result = step([text], result)
            synchronise()
            clock.append(time.perf_counter())
        return [1000 * (after - before) for before, after in pairwise(clock)]

    def answers(texts: Sequence[str], seconds: float, least: int) -> list[list[float]]:
        times, started = [], time.perf_counter()
        for text in texts:
            times.append(answer(text))
            if len(times) >= least and time.perf_counter() - started > seconds:
                break
        return times

    answers(others[:WARM_UP], WARM_UP_SECONDS, 1)
    return dict(zip(steps, np.array(answers(texts, seconds, LEAST_QUERIES)).T, strict=True))


def _on_the_same_queries(teacher: str, totals: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean milliseconds of every system on the queries that the teacher got to, and how many times as long it took."""
    count = len(totals[teacher])
    means = {name: float(total[:count].mean()) for name, total in totals.items() if len(total) >= count}
    return {
        "teacher": teacher,
        "queries": count,
        "mean_ms": {name: round(mean, 4) for name, mean in means.items()},
        "teacher_takes_times": {n: round(means[teacher] / mean, 2) for n, mean in means.items() if n != teacher},
    }


def pareto_front(
    points: Mapping[Name, Mapping[str, float | None]], *, maximise: Sequence[str] = (), minimise: Sequence[str] = ()
) -> list[Name]:
    """Names of the points that no other dominates: at least as good in every key and better in one.

    Equal points are on the front together, or not at all. A point that lacks a key (None or NaN) is left out.

    Args:
        points: name → key → value.
        maximise, minimise: keys of which more, or less, is better. Names come best first by these keys, ties by name.
    """
    signs = dict.fromkeys(maximise, -1.0) | dict.fromkeys(minimise, 1.0)  # less is better in every place
    lower: dict[Name, tuple[float, ...]] = {}
    for name, values in points.items():
        known = [math.nan if (value := values.get(key)) is None else value for key in signs]
        numbers = tuple(sign * value for sign, value in zip(signs.values(), known, strict=True))
        if not any(map(math.isnan, numbers)):
            lower[name] = numbers
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
