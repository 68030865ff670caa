"""Cost of serving: what is timed is what was done, bytes are counted, fronts hold what nothing dominates."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdistill.evaluation.cost import LEAST_QUERIES, measure_costs, pareto_front
from rankdistill.evaluation.results import Row
from rankdistill.evaluation.systems import EngineSystem, model_bytes, model_parameters
from rankdistill.stages import Workspace

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


class Texts:
    document_count = 50

    def query_texts(self, ids: Sequence[str]) -> list[str]:
        return [f"text of {query_id}" for query_id in ids]


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
    return measure_costs(systems, rows, Texts(), QUERIES, depth=7, metric="ndcg@10", **options)


def test_encoding_and_search_are_timed_apart() -> None:
    engine = Waits()
    found = costs({"waits": EngineSystem(engine, bytes=5000)}, [row("waits", 0.3, 5000, 42.0)], queries=20)  # type: ignore[arg-type]
    one = found["systems"]["waits"]
    assert 4 <= one["encode_ms"]["p50"] < 400 and 1 <= one["search_ms"]["p50"] < 400
    assert one["total_ms"]["p50"] >= 5 and one["total_ms"]["p50"] <= one["total_ms"]["p95"] <= one["total_ms"]["p99"]
    assert (one["queries_measured"], one["bytes"], one["bytes_a_document"]) == (20, 5000, 100.0)
    assert one["batch_queries_per_second"] == 42.0  # measured with the rankings, not again
    assert engine.depths == {7}
    environment = found["environment"]
    assert environment["threads"] >= 1 and environment["machine"] and environment["device"] == "cpu"


def test_warm_up_queries_are_others_than_the_measured() -> None:
    engine = Waits(0, 0)
    costs({"waits": EngineSystem(engine)}, [row("waits", 0.3)], queries=20)  # type: ignore[arg-type]
    warm, measured = engine.asked[:-20], engine.asked[-20:]
    assert warm and len(set(measured)) == 20 and not set(warm) & set(measured)


def test_every_system_gets_the_same_queries_in_the_same_order() -> None:
    first, second = Waits(0, 0), Waits(0, 0)
    rows = [row("first", 0.3), row("second", 0.2)]
    costs({"first": EngineSystem(first), "second": EngineSystem(second)}, rows, queries=10)  # type: ignore[arg-type]
    assert first.asked == second.asked


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
    systems = {"teacher": Slow(), "student": EngineSystem(Waits(0.002, 0)), "given": object()}  # type: ignore[arg-type]
    rows = [row("teacher", 0.5), row("student", 0.4, 5, 99.0), row("given", 0.6)]
    started = time.perf_counter()
    found = costs(systems, rows, queries=40, seconds=0.1)
    assert time.perf_counter() - started < 10
    teacher = found["systems"]["teacher"]
    assert LEAST_QUERIES <= teacher["queries_measured"] < 10 and teacher["rerank_ms"]["p50"] >= 50
    assert 1 < teacher["batch_queries_per_second"] <= 20  # not measured with the rankings: from the live queries
    assert (teacher["bytes"], teacher["memory_bytes"], teacher["parameters"]) == (10, 38, 7)
    (same,) = found["same_queries"]
    assert same["queries"] == teacher["queries_measured"] and set(same["mean_ms"]) == {"teacher", "student"}
    assert same["teacher_takes_times"]["student"] == pytest.approx(
        same["mean_ms"]["teacher"] / same["mean_ms"]["student"], rel=0.01
    )
    assert same["teacher_takes_times"]["student"] > 1
    assert found["systems"]["given"]["total_ms"] is None and found["systems"]["given"]["queries_measured"] == 0
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
    rows = {one["system"]: one for one in results["rows"]}
    assert set(cost["systems"]) == set(rows) and {"BM25", "student, sq8", "teacher"} <= set(rows)
    for name, one in cost["systems"].items():
        assert one["total_ms"]["p50"] > 0 and one["search_ms"]["p99"] > 0 and one["queries_measured"] >= 2
        assert one["batch_queries_per_second"] == rows[name]["queries_per_second"] > 0
        assert one["bytes"] == rows[name]["bytes"] > 0 and one["memory_bytes"] >= one["bytes"]
        assert one["quality"] == rows[name]["means"][cost["metric"]]
        assert ("rerank_ms" in one) == (name == "teacher")
    flat, sq8 = cost["systems"]["student, flat"], cost["systems"]["student, sq8"]
    assert flat["bytes"] > sq8["bytes"] == (run / "indexes/sq8.faiss").stat().st_size
    assert flat["parameters"] == sq8["parameters"] > 0 and cost["systems"]["BM25"]["parameters"] is None
    assert flat["memory_bytes"] - flat["bytes"] == sq8["memory_bytes"] - sq8["bytes"] >= 4 * flat["parameters"]
    for axis, name in product(("latency", "bytes"), rows):
        size = {n: (o["total_ms"]["p50"] if axis == "latency" else o["bytes"]) for n, o in cost["systems"].items()}
        better = [
            other
            for other in rows
            if dominates(
                [cost["systems"][other]["quality"], -size[other]], [cost["systems"][name]["quality"], -size[name]]
            )
        ]
        assert (name in cost["pareto"][axis]) == (not better)
    assert cost["same_queries"][0]["teacher"] == "teacher"


def test_the_table_shows_it_and_says_how_it_was_measured(run: Path) -> None:
    text = next(run.glob("evaluation/collection/results.md")).read_text()
    assert "what serving costs" in text and "| encode ms | search ms | rerank ms |" in text
    assert "one query at a time, warmed up" in text and "threads" in text and "teacher: " in text


def test_latency_can_be_switched_off(run: Path, tmp_path: Path) -> None:
    workspace = Workspace(run, store=run.parent / "store")
    workspace.recipe = workspace.recipe.model_copy(
        update={"evaluation": workspace.recipe.evaluation.model_copy(update={"latency_queries": 0})}
    )
    found = workspace.evaluate(out=tmp_path / "out")
    assert not list(tmp_path.glob("out/*/cost.json")) and found.sets[0].cost is None
    assert found.sets[0]["teacher"].queries_per_second is None and found.sets[0]["BM25"].queries_per_second
