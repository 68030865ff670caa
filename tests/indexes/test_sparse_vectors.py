"""Sparse document vectors on disk: what was encoded, by document and by term (kills, bad weights: test_encoding.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sparse_encoders import WordCounts, random_texts

from rankdistill.artifacts import MANIFEST
from rankdistill.errors import RankdistillError
from rankdistill.indexes import sparse_vectors
from rankdistill.indexes.by_student import encode_collection
from rankdistill.indexes.sparse_vectors import (
    checked_terms,
    encode_document_terms,
    find_sparse_vectors,
    open_postings,
    open_sparse_vectors,
)


def is_mapped(array: Any) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def test_the_files_hold_the_encoders_vectors(
    make_collection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_vectors, "POSTINGS_AT_ONCE", 17)  # sorted in many parts
    texts, encoder = random_texts(100), WordCounts()
    artifact = encode_document_terms(encoder, make_collection(texts), tmp_path / "v", shard_size=7)
    expected = encoder.encode_queries(texts).toarray()
    stored, by_term = open_sparse_vectors(artifact), open_postings(artifact).matrix
    assert is_mapped(stored.data) and is_mapped(stored.indices) and stored.data.dtype == np.float32
    assert np.load(artifact.path / "indptr.npy").dtype == np.int64
    assert np.load(artifact.path / "terms.npy").dtype == np.int32
    np.testing.assert_array_equal(stored.toarray(), expected)
    np.testing.assert_array_equal(by_term.toarray(), expected.T)
    assert by_term.has_sorted_indices and all((np.diff(by_term[term].indices) > 0).all() for term in range(40))
    assert artifact.counts == {"documents": 100, "dimension": 40, "postings": stored.nnz, "empty_documents": 0}
    assert artifact.manifest["inputs"]["encoder"] == encoder.fingerprint


def test_what_is_there_is_not_encoded_again(make_collection: Any, tmp_path: Path) -> None:
    collection, encoder = make_collection(random_texts(20)), WordCounts()
    assert find_sparse_vectors(encoder, collection, tmp_path / "v") is None
    artifact = encode_collection(encoder, collection, tmp_path / "v")
    assert artifact.kind == sparse_vectors.KIND
    assert encode_document_terms(encoder, collection, tmp_path / "v") == artifact
    assert find_sparse_vectors(encoder, collection, tmp_path / "v") == artifact
    assert encoder.encoded == 20
    assert find_sparse_vectors(WordCounts(seed=1), collection, tmp_path / "v") is None
    other: Any = WordCounts()  # the query side does not decide the vectors
    other.fingerprint, other.document_fingerprint = "with other query weights", encoder.fingerprint
    assert find_sparse_vectors(other, collection, tmp_path / "v") == artifact


def test_empty_documents_are_counted_and_said(
    make_collection: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = encode_document_terms(WordCounts(), make_collection(["w1", "unknown", "w2 w3", ""]), tmp_path / "v")
    assert artifact.counts["empty_documents"] == 2
    assert "2 of 4 documents came out empty" in (said := capsys.readouterr().err) and "'d1'" in said
    assert np.diff(open_sparse_vectors(artifact).indptr).tolist() == [1, 0, 2, 0]
    with pytest.raises(RankdistillError, match=r"every document .* came out empty"):
        encode_document_terms(WordCounts(), make_collection(["unknown", "words"]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_vectors_come_out_in_one_form() -> None:
    loose = sparse.csr_matrix((np.array([1.0, 0.0, 2.0, 3.0]), np.array([3, 1, 0, 3]), np.array([0, 4])), shape=(1, 5))
    vectors = checked_terms(loose, 5, str)
    assert vectors.indices.tolist() == [0, 3] and vectors.data.tolist() == [2.0, 4.0] and vectors.dtype == np.float32
    with pytest.raises(RankdistillError, match="over 5 terms where the vocabulary has 6"):
        checked_terms(loose, 6, str)


def test_damaged_files_are_refused(make_collection: Any, tmp_path: Path) -> None:
    artifact = encode_document_terms(WordCounts(), make_collection(random_texts(20)), tmp_path / "v")
    weights = artifact.path / "weights.npy"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(RankdistillError, match="cannot be read"):
        open_sparse_vectors(artifact)
    np.save(weights, np.ones(7, np.float32))
    with pytest.raises(RankdistillError, match="do not belong together"):
        open_sparse_vectors(artifact)
    (artifact.path / "by_term.indptr.npy").unlink()
    with pytest.raises(RankdistillError, match="cannot be read"):
        open_postings(artifact)
    (artifact.path / MANIFEST).unlink()
    with pytest.raises(RankdistillError, match="no sparse_vectors here"):
        open_sparse_vectors(artifact.path)
