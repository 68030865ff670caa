"""A student over a first stage: the top is in the student's order, the rest in the first stage's, nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankdistill.collections import Collection
from rankdistill.evaluation.evaluate import evaluate_systems
from rankdistill.evaluation.systems import StudentReranking
from rankdistill.indexes.base import Hits
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.dense import ExactIndex
from rankdistill.runs import read_run

DIMENSION = 8
Engines = tuple[BM25, Any]


class Encoder:
    """Vectors that depend on the text alone."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._vector(text) for text in texts], np.float32).reshape(-1, DIMENSION)

    def _vector(self, text: str) -> np.ndarray:
        return np.random.default_rng(sum(map(ord, text))).normal(size=DIMENSION)


@pytest.fixture
def engines(tiny_collection: Collection, tmp_path: Path) -> Engines:
    BM25().build(tiny_collection, tmp_path / "bm25")
    texts = tiny_collection.document_texts(np.arange(tiny_collection.document_count))
    student = SimpleNamespace(encoder=Encoder(), index=ExactIndex(Encoder().encode_queries(texts), "vectors"))
    return BM25.open(tmp_path / "bm25"), student


def test_the_top_is_the_students_and_the_rest_the_first_stages(tiny_collection: Collection, engines: Engines) -> None:
    first, student = engines
    query = "metal bird gas insect planet star"
    hits: Hits = first.search([query], 10)[0]
    assert len(hits.rows) > 5
    ((_, doc_ids, scores),) = StudentReranking(first, student, 4).run(tiny_collection, ["q"], [query], 10)
    vector = student.encoder.encode_queries([query])[0]
    by_student = sorted(hits.rows[:4].tolist(), key=lambda row: -float(student.index.vectors[row] @ vector))
    assert doc_ids == tiny_collection.doc_ids([*by_student, *hits.rows[4:].tolist()])
    assert (np.diff(scores) < 0).all() and len(scores) == len(doc_ids)
    ((_, short, _),) = StudentReranking(first, student, 4).run(tiny_collection, ["q"], [query], 2)
    assert short == doc_ids[:2]


def test_re_ranking_everything_found_ranks_as_exact_search_does(tiny_collection: Collection, engines: Engines) -> None:
    first, student = engines
    system = StudentReranking(first, student, 100)
    ((_, doc_ids, _), (_, none, _)) = system.run(tiny_collection, ["q", "r"], ["gas", "zzz"], 100)
    exact = student.index.search(student.encoder.encode_queries(["gas"]), tiny_collection.document_count)[0]
    found = set(doc_ids)
    assert doc_ids == [doc_id for doc_id in tiny_collection.doc_ids(exact.rows) if doc_id in found] and none == []


def test_it_is_a_row_with_size_speed_and_a_note(tiny_collection: Collection, engines: Engines, tmp_path: Path) -> None:
    first, student = engines
    system = StudentReranking(first, student, 3)
    found = evaluate_systems({"reranked": system}, tiny_collection, "test", ["recall@100"], 20, tmp_path / "out")
    row = found["reranked"]
    assert row.bytes == first.bytes + student.index.bytes and row.queries_per_second and "first 3 of bm25" in row.note
    base = evaluate_systems({"bm25": tmp_path / "out" / row.run}, tiny_collection, "test", ["recall@100"], 20,
                            tmp_path / "again")  # fmt: skip
    assert base["bm25"].means == row.means
    assert set(system.steps(10)) == {"search", "rerank"}
    assert len(read_run(tmp_path / "out" / row.run)) > 0
