"""Cost of serving: what is timed is what was done, bytes are counted, fronts hold what nothing dominates."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdistill.evaluation.cost import LEAST_QUERIES, measure_costs, pareto_front
from rankdistill.evaluation.results import Row
from rankdistill.evaluation.systems import EngineSystem, model_bytes, model_parameters

# -- Pareto fronts ----------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.none(), st.just(float("nan")), st.integers(0, 4).map(float))  # few values: many ties
POINTS = st.dictionaries(
    st.integers(0, 40).map("s{}".format), st.fixed_dictionaries({"q": VALUES, "r": VALUES, "ms": VALUES, "b": VALUES})
)
AXES = [(["q"], ["ms"]), (["q"], ["b"]), (["q", "r"], ["ms", "b"]), (["q"], []), ([], ["b"])]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@settings(max_examples=150, deadline=None)
@given(points=POINTS, axes=st.sampled_from(AXES))
def test_the_front_is_what_brute_force_finds(
    points: dict[str, dict[str, float | None]], axes: tuple[list[str], list[str]]
) -> None:
    more, less = axes
    known = {
        name: [float(values[key]) for key in more] + [-float(values[key]) for key in less]  # type: ignore[arg-type]
        for name, values in points.items()
        if all(values[key] is not None and values[key] == values[key] for key in more + less)
    }
    expected = {name for name in known if not any(dominates(other, known[name]) for other in known.values())}
    front = pareto_front(points, maximise=more, minimise=less)
    assert set(front) == expected and len(front) == len(expected)


def test_equal_points_are_on_the_front_together_and_it_is_ordered() -> None:
    points = {
        "slow": {"q": 0.5, "ms": 9.0},
        "twin b": {"q": 0.4, "ms": 2.0},
        "twin a": {"q": 0.4, "ms": 2.0},
        "worse": {"q": 0.4, "ms": 2.1},
        "fast": {"q": 0.1, "ms": 1.0},
        "a ready run": {"q": 0.9, "ms": None},
    }
    assert pareto_front(points, maximise=["q"], minimise=["ms"]) == ["slow", "twin a", "twin b", "fast"]
    assert pareto_front({}, maximise=["q"]) == []


# -- measuring --------------------------------------------------------------------------------------------------------


class Waits:
    """Encodes in 4 ms and searches in 1 ms, whatever the query; remembers what it was asked."""

    def __init__(self, encode: float = 0.004, search: float = 0.001) -> None:
        self.encoder = self.index = self
        self.waits = encode, search
        self.asked: list[str] = []
        self.depths: set[int] = set()
        self.device = "cpu"

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        time.sleep(self.waits[0])
        return np.ones((len(texts), 2), np.float32)

    def search(self, vectors: np.ndarray, k: int) -> list[Any]:
        self.depths.add(k)
        time.sleep(self.waits[1])
        return [None] * len(vectors)


def row(name: str, quality: float, size: int | None = None, rate: float | None = None) -> Row:
    return Row(name, {"ndcg@10": quality}, {}, f"runs/{name}.trec", size, rate)


QUERIES = [f"q{number}" for number in range(60)]


def costs(systems: dict[str, Any], rows: list[Row], **options: Any) -> dict[str, Any]:
    texts = SimpleNamespace(document_count=50, query_texts=lambda ids: [f"text of {query_id}" for query_id in ids])
    return measure_costs(systems, rows, texts, QUERIES, depth=7, metric="ndcg@10", **options)


def test_encoding_and_search_are_timed_apart_on_the_same_queries_for_all() -> None:
    """The warm-up's queries are others than those that are measured."""
    engine, other = Waits(), Waits(0, 0)
    systems: dict[str, Any] = {"waits": EngineSystem(engine, bytes=5000), "other": EngineSystem(other)}
    found = costs(systems, [row("waits", 0.3, 5000, 42.0), row("other", 0.2)], queries=20)
    cost = found["systems"]["waits"]
    assert 4 <= cost["encode_ms"]["p50"] < 400 and 1 <= cost["search_ms"]["p50"] < 400
    assert 5 <= cost["total_ms"]["p50"] <= cost["total_ms"]["p95"] <= cost["total_ms"]["p99"]
    assert (cost["queries_measured"], cost["bytes"], cost["bytes_a_document"]) == (20, 5000, 100.0)
    assert cost["batch_queries_per_second"] == 42.0  # measured with the rankings, not again
    assert engine.depths == {7} and engine.asked == other.asked
    environment = found["environment"]
    assert environment["threads"] >= 1 and environment["machine"] and environment["device"] == "cpu"
    warm, measured = engine.asked[:-20], engine.asked[-20:]
    assert warm and len(set(measured)) == 20 and not set(warm) & set(measured)


class Slow:
    """A teacher beside its looked-up row: `served` says how it is asked live."""

    def __init__(self) -> None:
        self.served = self
        self.bytes, self.parameters, self.memory_bytes, self.device = 10, 7, 38, "cpu"

    def steps(self, depth: int) -> dict[str, Any]:
        def rerank(texts: Sequence[str], found: Any) -> list[str]:
            time.sleep(0.05)
            return list(texts)

        return {"search": lambda texts, _: texts, "rerank": rerank}


def test_a_slow_teacher_stops_and_is_compared_on_the_queries_it_got_to() -> None:
    systems = {"teacher": Slow(), "student": EngineSystem(Waits(0.002, 0)), "given": object()}
    rows = [row("teacher", 0.5), row("student", 0.4, 5, 99.0), row("given", 0.6)]
    started = time.perf_counter()
    found = costs(systems, rows, queries=40, seconds=0.1)
    assert time.perf_counter() - started < 10
    teacher, given = found["systems"]["teacher"], found["systems"]["given"]
    assert LEAST_QUERIES <= teacher["queries_measured"] < 10 and teacher["rerank_ms"]["p50"] >= 50
    assert 1 < teacher["batch_queries_per_second"] <= 20  # not measured with the rankings: from the live queries
    assert (teacher["bytes"], teacher["memory_bytes"], teacher["parameters"]) == (10, 38, 7)
    (same,) = found["same_queries"]
    assert same["queries"] == teacher["queries_measured"] and set(same["mean_ms"]) == {"teacher", "student"}
    times = same["mean_ms"]["teacher"] / same["mean_ms"]["student"]
    assert same["teacher_takes_times"]["student"] == pytest.approx(times, rel=0.01) and times > 1
    assert given["total_ms"] is None and given["queries_measured"] == 0
    # The ready run has no latency and no bytes, so it is on neither front, good as it is.
    assert found["pareto"] == {"latency": ["teacher", "student"], "bytes": ["teacher", "student"]}
    json.dumps(found)


def test_shared_weights_are_counted_once_and_formats_told_apart() -> None:
    layer = torch.nn.Linear(10, 4, bias=False)
    tied = torch.nn.Sequential(layer, layer)
    assert (model_parameters(tied), model_bytes(tied)) == (40, 160)
    assert model_bytes(tied.bfloat16()) == 80
    assert (model_parameters(object()), model_bytes(None)) == (None, 0)


# -- a real run -------------------------------------------------------------------------------------------------------


def test_a_run_writes_the_cost_of_every_system(run: Path) -> None:
    (path,) = run.glob("evaluation/collection/*/cost.json")
    cost = json.loads(path.read_text())
    results = json.loads((path.parent / "results.json").read_text())
    rows = {row["system"]: row for row in results["rows"]}
    assert set(cost["systems"]) == set(rows) and {"BM25", "student, sq8", "teacher"} <= set(rows)
    for name, of in cost["systems"].items():
        assert of["total_ms"]["p50"] > 0 and of["search_ms"]["p99"] > 0 and of["queries_measured"] >= 2
        assert of["batch_queries_per_second"] == rows[name]["queries_per_second"] > 0
        assert of["bytes"] == rows[name]["bytes"] > 0 and of["memory_bytes"] >= of["bytes"]
        assert of["quality"] == rows[name]["means"][cost["metric"]]
        assert ("rerank_ms" in of) == (name == "teacher")
    flat, sq8 = cost["systems"]["student, flat"], cost["systems"]["student, sq8"]
    assert flat["bytes"] > sq8["bytes"] == (run / "indexes/sq8.faiss").stat().st_size
    assert flat["parameters"] == sq8["parameters"] > 0 and cost["systems"]["BM25"]["parameters"] is None
    assert flat["memory_bytes"] - flat["bytes"] == sq8["memory_bytes"] - sq8["bytes"] >= 4 * flat["parameters"]
    for axis in ("latency", "bytes"):
        size = {n: of["total_ms"]["p50"] if axis == "latency" else of["bytes"] for n, of in cost["systems"].items()}
        places = {name: [of["quality"], -size[name]] for name, of in cost["systems"].items()}
        front = {name for name in rows if not any(dominates(other, places[name]) for other in places.values())}
        assert set(cost["pareto"][axis]) == front
    assert cost["same_queries"][0]["teacher"] == "teacher"
    text = (path.parent / "results.md").read_text()
    assert "what serving costs" in text and "| encode ms | search ms | rerank ms |" in text
    assert "one query at a time, warmed up" in text and "threads" in text and "teacher: " in text
