from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.indexes import dense
from rankdistill.indexes.dense import DenseEngine, ExactIndex, export_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.specification import load_specification
from rankdistill.indexes.vectors import encode_documents

TEXTS = [f"word{row % 50} word{row % 7} word{row}" for row in range(200)]


def test_exact_search_equals_brute_force_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (500, 8)).astype(np.float32)  # whole numbers: many exact ties
    queries = rng.integers(-2, 3, (30, 8)).astype(np.float32)
    products = queries @ vectors.T
    for block in (10_000, 64):
        monkeypatch.setattr(dense, "BLOCK", block)
        for row, hits in enumerate(ExactIndex(vectors, "v").search(queries, 500)):
            expected = np.argsort(-products[row], kind="stable")
            np.testing.assert_array_equal(hits.rows, expected)
            np.testing.assert_array_equal(hits.scores, products[row, expected])
        for row, hits in enumerate(ExactIndex(vectors, "v").search(queries, 20)):
            np.testing.assert_array_equal(hits.scores, -np.sort(-products[row])[:20])


def test_text_in_hits_out_with_and_without_a_file(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    collection = make_collection(TEXTS)
    vectors = encode_documents(word_encoder, collection, tmp_path / "v")
    exact = DenseEngine.over(word_encoder, vectors)
    index = export_index(word_encoder, collection, vectors, load_specification("flat"), tmp_path / "x.faiss")
    filed = DenseEngine(word_encoder, FaissIndex.open(tmp_path / "x.faiss"), collection=collection)
    queries = ["word3 word103", "word9", "word150 word3"]
    for query, first, second in zip(queries, exact.search(queries, 5), filed.search(queries, 5), strict=True):
        np.testing.assert_array_equal(first.rows, second.rows)
        best = collection.document_texts(first.rows[:1])[0]
        assert set(query.split()) & set(best.split())
    assert index.doc_ids([0, 199]) == ["d0", "d199"]
    assert exact.search([], 5) == []
    assert exact.fingerprint != filed.fingerprint


def test_vectors_and_indexes_of_another_student_are_refused(
    make_collection: Any, word_encoder: Any, tmp_path: Path
) -> None:
    """By the check that the exact indexes of all kinds of vectors have."""
    collection, flat = make_collection(TEXTS), load_specification("flat")
    vectors = encode_documents(word_encoder, collection, tmp_path / "v")
    export_index(word_encoder, collection, vectors, flat, tmp_path / "x.faiss")
    other = type(word_encoder)(seed=1)
    for index in (ExactIndex.open(vectors), FaissIndex.open(tmp_path / "x.faiss")):
        with pytest.raises(RankdistillError, match="another student"):
            DenseEngine(other, index)
    wide = type(word_encoder)(dimension=32)
    wide.fingerprint = word_encoder.fingerprint
    with pytest.raises(RankdistillError, match="vectors of 16 dimensions, a student of 32"):
        DenseEngine.over(wide, vectors)
    with pytest.raises(RankdistillError, match="another collection"):
        export_index(word_encoder, make_collection(["a"]), vectors, flat, tmp_path / "y.faiss")
