"""Exact sparse search is the product with every document; indexes know whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse
from sparse_encoders import WORDS, WordCounts, random_texts, sparse_specification

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import DocumentIds
from rankdistill.indexes.by_student import check_index, exhaustive_engine, index_files, open_index, query_encoder
from rankdistill.indexes.sparse import (
    BuiltSparseIndex,
    SparseEngine,
    SparseIndex,
    build_sparse_index,
    open_sparse_index,
)
from rankdistill.indexes.sparse_vectors import encode_document_terms
from rankdistill.indexes.specification import any_specification

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection

QUERIES = ["w1 w2 w3", "w7 w7", "w20 w5 w11 w0 nothing", "w39"]


@pytest.fixture
def collection(make_collection: Any) -> Collection:
    return make_collection([*random_texts(150), "no known word", *random_texts(150)])  # type: ignore[no-any-return]


@pytest.fixture
def vectors(collection: Collection, tmp_path: Path) -> Artifact:
    return encode_document_terms(WordCounts(), collection, tmp_path / "vectors")


def test_exact_search_is_the_product_with_every_document(collection: Collection, vectors: Artifact) -> None:
    encoder = WordCounts()
    engine = exhaustive_engine(encoder, vectors)
    assert isinstance(engine, SparseEngine) and engine.encoder is encoder
    documents = encoder.encode_queries(collection.document_texts(range(301))).toarray().astype(np.float64)
    queries = encoder.encode_queries(QUERIES).toarray().astype(np.float64)
    for k in (1, 10, 500):
        for query, hits in zip(queries, engine.search(QUERIES, k), strict=True):
            scores = documents @ query
            expected = sorted(np.flatnonzero(scores > 0), key=lambda row: (-np.float32(scores[row]), row))[:k]
            np.testing.assert_allclose(hits.scores, scores[hits.rows], rtol=1e-5)
            # Each text is there twice, so every hit ties with another: the lower row is first.
            assert hits.rows.tolist() == [int(row) for row in expected]
            assert 150 not in hits.rows  # an empty document is never a hit


def test_scores_of_rows_are_those_of_the_search(vectors: Artifact) -> None:
    index, encoder = SparseIndex.open(vectors), WordCounts()
    for query in encoder.encode_queries(QUERIES):  # as a re-ranker goes over them
        (hits,) = index.search(query, 30)
        np.testing.assert_allclose(index.scores(query, hits.rows), hits.scores, rtol=1e-6)
    assert index.scores(query, np.array([150, 0]))[0] == 0
    assert index.scores(query, np.empty(0, np.int64)).shape == (0,)


def test_queries_without_a_term_have_no_hits_and_are_named(
    vectors: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = SparseEngine.over(WordCounts(), vectors)
    found = engine.search(["w1", "all unknown", ""], 5)
    assert [len(hits.rows) for hits in found] == [5, 0, 0]
    assert "2 of 3 queries have no term with a weight" in (said := capsys.readouterr().err) and "all unknown" in said
    assert engine.search([], 5) == []
    assert len(engine.search(["w1"], 0)[0].rows) == 0


def test_another_vocabulary_is_refused_and_weights_that_are_no_numbers(vectors: Artifact) -> None:
    renamed = WordCounts(name="x")
    renamed.fingerprint = WordCounts().fingerprint
    with pytest.raises(RankdistillError, match="not those of this student's vocabulary of 40"):
        SparseEngine.over(renamed, vectors)
    index = SparseIndex.open(vectors)
    with pytest.raises(RankdistillError, match="queries over 41 terms, an index of 40"):
        index.search(sparse.csr_matrix((1, WORDS + 1), dtype=np.float32), 5)
    diverged = WordCounts().encode_queries(QUERIES)
    diverged.data[diverged.indptr[2]] = np.nan
    with pytest.raises(RankdistillError, match="NaN or infinity") as error:
        index.search(diverged, 5)
    assert "query 2" in str(error.value)


def test_an_index_is_built_once_and_checked(
    collection: Collection, vectors: Artifact, tmp_path: Path, make_collection: Any
) -> None:
    encoder, specification = WordCounts(), sparse_specification("seismic")
    out = tmp_path / "indexes" / "seismic"
    index = build_sparse_index(encoder, collection, vectors, specification, out)
    assert (index.name, index.type, index.path, index.document_count) == ("seismic", "seismic", out, 301)
    assert index.bytes == (out / "index.index.seismic").stat().st_size
    assert "301 documents" in repr(index)
    before = (out / "manifest.json").stat().st_mtime_ns
    again = build_sparse_index(encoder, collection, vectors, specification, out)
    assert again.fingerprint == index.fingerprint and (out / "manifest.json").stat().st_mtime_ns == before
    opened = open_index(out)
    assert isinstance(opened, BuiltSparseIndex) and opened.specification == specification
    with pytest.raises(RankdistillError, match="another student"):
        SparseEngine(WordCounts(seed=1), opened)
    with pytest.raises(RankdistillError, match="another collection"):
        opened.check(collection=make_collection(["w1"]))
    with pytest.raises(RankdistillError, match="another student"):
        build_sparse_index(WordCounts(seed=1), collection, vectors, specification, tmp_path / "other")
    with pytest.raises(UsageError, match="only a FAISS file"):
        open_index(out, memory_map=True)
    with pytest.raises(RankdistillError, match="no sparse_index here"):
        open_sparse_index(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a folder; there is a file here"):
        build_sparse_index(encoder, collection, vectors, specification, tmp_path / "file")
    for folder in (tmp_path, vectors.path):  # it would be replaced whole
        with pytest.raises(UsageError, match="something else than an index"):
            build_sparse_index(encoder, collection, vectors, specification, folder)
    assert (tmp_path / "file").exists() and (vectors.path / "terms.npy").exists()
    (tmp_path / "empty").mkdir()
    build_sparse_index(encoder, collection, vectors, specification, tmp_path / "empty")
    other = sparse_specification({"name": "other", "type": "seismic", "query_cut": 3})
    assert build_sparse_index(encoder, collection, vectors, other, out).name == "other"  # another of its kind


@pytest.mark.parametrize(
    ("student", "declared", "files"),
    [
        ("splade", ["flat", "seismic", "seismic_fast", "ciff"], ["seismic", "seismic_fast", "ciff"]),
        ("inference_free", ["flat", "lucene_impact"], ["lucene_impact"]),
        ("dense", ["flat", "ivf_pq"], ["flat", "ivf_pq"]),
        ("query_tower", ["flat", "hnsw"], ["flat", "hnsw"]),
        ("static", ["flat"], ["flat"]),
        ("multi_vector", ["flat"], []),
        ("multi_vector", [], []),
        ("cross_encoder", ["flat"], []),
        ("inference_free", ["seismic", "hnsw"], "hnsw is an index of dense vectors"),
        ("splade", ["distill_pq"], "distill_pq is an index of dense vectors"),
        ("dense", ["flat", "seismic"], "seismic is an index of term weights"),
        ("multi_vector", ["flat", "ivf_pq"], r"one a token(?s:.*)\[flat\]"),
        ("multi_vector", ["distill_pq"], "one a token"),
        ("multi_vector", ["seismic"], "one a token"),
        ("cross_encoder", ["seismic"], "re-ranks: it has no vectors"),
    ],
)
def test_each_student_has_its_own_indexes(student: str, declared: list[str], files: list[str] | str) -> None:
    if isinstance(files, list):
        assert [specification.name for specification in index_files(student, declared)] == files
        return
    with pytest.raises(UsageError, match=files):
        index_files(student, declared)
    with pytest.raises(UsageError, match=files):
        check_index(student, any_specification(declared[-1]))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("splade", "there is no file to make"),
        ("multi_vector", "searched as they are"),
        ("cross_encoder", "has no index: it re-ranks"),
    ],
)
def test_exact_search_has_no_file(student: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_index(student, any_specification("flat"))
    check_index("dense", any_specification("flat"))


def test_document_ids_are_a_sequence(collection: Collection) -> None:
    ids = DocumentIds(collection)
    assert len(ids) == 301 and ids[0] == "d0" and ids[-1] == "d300" and ids[3:6] == ["d3", "d4", "d5"]
    assert list(ids) == [f"d{row}" for row in range(301)]
    with pytest.raises(IndexError):
        ids[301]


def test_what_serves_a_students_queries() -> None:
    encoder: Any = WordCounts()
    for table, expected in ((None, encoder), (served := WordCounts(), served)):
        assert query_encoder(encoder) is encoder
        encoder.token_weights = table
        assert query_encoder(encoder) is expected
        encoder.token_weights = None
