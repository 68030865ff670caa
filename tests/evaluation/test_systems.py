"""A student over a first stage: the top is in the student's order, the rest in the first stage's, nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankdistill.collections import Collection
from rankdistill.evaluation.systems import StudentReranking
from rankdistill.indexes.base import Hits
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.dense import ExactIndex

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


def test_it_has_a_size_steps_and_a_note_and_finds_nothing_where_the_first_stage_does(
    tiny_collection: Collection, engines: Engines
) -> None:
    system = StudentReranking(*engines, 3)
    assert system.bytes == engines[0].bytes + engines[1].index.bytes and "first 3 of bm25" in system.note
    assert set(system.steps(10)) == {"search", "rerank"}
    ((_, none, _),) = system.run(tiny_collection, ["q"], ["zzz"], 100)
    assert none == []
