"""Exports for OpenSearch and Elasticsearch: what is parsed back is what was written, and Lucene scores it alike."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse
from sparse_encoders import WordCounts, random_texts

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import DocumentIds
from rankdistill.indexes.search_servers import (
    HEAVIEST,
    build,
    feature_names,
    index_body,
    query_body,
    rounded_weights,
)
from rankdistill.indexes.sparse import build_sparse_index, searched_here
from rankdistill.indexes.sparse_specification import ElasticsearchSpecification, OpenSearchSpecification
from rankdistill.indexes.sparse_vectors import encode_document_terms
from rankdistill.indexes.specification import any_specification

if TYPE_CHECKING:
    from rankdistill.collections import Collection

OPENSEARCH = OpenSearchSpecification(name="opensearch", texts=False)
ELASTICSEARCH = ElasticsearchSpecification(name="elasticsearch", texts=False)
TERMS = [".", "..", "__", "it", "3.5", '"', "\\", "naïve", "東", " ", "", "##s", "it", *(f"t{n}" for n in range(60))]


def random_vectors(documents: int, terms: int, seed: int = 0, density: float = 0.1) -> Any:
    vectors = sparse.random(documents, terms, density, "csr", np.float32, np.random.default_rng(seed))
    vectors.data = (vectors.data * 3 + 0.01).astype(np.float32)
    vectors.sort_indices()
    return vectors


def rounded(vectors: Any) -> Any:
    return sparse.csr_matrix((rounded_weights(vectors.data), vectors.indices, vectors.indptr), vectors.shape)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: servers refuse others."""
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def read_back(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Ids and documents of the bulk files, as strictly as a server reads them."""
    ids, documents = [], []
    for path in sorted(folder.glob("bulk-*")):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        *lines, last = content.decode().split("\n")
        assert last == "" and len(lines) % 2 == 0
        for action, document in zip(lines[::2], lines[1::2], strict=True):
            read = json.loads(action, object_pairs_hook=once)
            assert list(read) == ["index"] and list(read["index"]) == ["_id"]
            ids.append(read["index"]["_id"])
            documents.append(json.loads(document, object_pairs_hook=once, parse_constant=pytest.fail))
    return ids, documents


def as_matrix(documents: list[dict[str, Any]], names: list[str]) -> Any:
    columns = {name: column for column, name in enumerate(names)}
    entries = [
        (row, columns[name], value) for row, read in enumerate(documents) for name, value in read["terms"].items()
    ]
    rows, column, values = zip(*entries, strict=True)
    return sparse.csr_matrix((np.array(values, np.float32), (rows, column)), (len(documents), len(names)))


@pytest.mark.parametrize("specification", [OPENSEARCH, ELASTICSEARCH])
def test_what_is_read_back_is_what_was_written_up_to_rounding(specification: Any, tmp_path: Path) -> None:
    vectors = random_vectors(300, len(TERMS))
    vectors.data[-4:] = 1e-40, 1e-30, 1e37, 60_000  # the first is below the smallest normal number
    ids = [f'doc {n} é"' for n in range(300)]
    small = specification.model_copy(update={"file_megabytes": 0.004})
    counts = build(small, vectors, ids, TERMS, tmp_path)
    found, documents = read_back(tmp_path)
    assert found == ids
    read = as_matrix(documents, json.loads((tmp_path / "terms.json").read_text()))
    assert (read != rounded(vectors)).nnz == 0 and read.nnz == vectors.nnz - 1
    assert counts["vanishing_weights"] == 1
    sizes = [path.stat().st_size for path in tmp_path.glob("bulk-*.ndjson")]
    assert counts["files"] == len(sizes) > 5 and max(sizes) <= 4000 and counts["bytes"] == sum(sizes)


def test_weights_are_rounded_to_what_lucene_keeps() -> None:
    """The nearest number of 9 significant bits."""
    weights = np.random.default_rng(1).gamma(1, 2, 5000).astype(np.float32)
    kept = rounded_weights(weights)
    step = 2.0 ** (np.floor(np.log2(weights.astype(np.float64))) - 8)
    assert kept.tolist() == (np.round(weights / step) * step).tolist()
    assert np.abs(kept / weights - 1).max() <= 1 / 512 and (kept.view(np.uint32) & 0x7FFF == 0).all()
    odd = np.array([3.4028235e38, 1.1754944e-38, 1.1754942e-38, 0.0], np.float32)
    assert np.isfinite(rounded_weights(odd)).all() and rounded_weights(odd).astype(bool).tolist() == [1, 1, 0, 0]


def test_names_have_no_dot_and_are_all_different() -> None:
    names, renamed = feature_names(TERMS)
    assert len(set(names)) == len(TERMS) and not any("." in name or not name.strip() for name in names)
    assert names[:13] == ["___", "____", "__", "it", "3__5", '"', "\\", "naïve", "東", "_", "_____", "##s", "it_"]
    assert renamed == 6 and feature_names(["a", "b"]) == (["a", "b"], 0)


def test_empty_documents_and_texts_are_sent_along(tiny_collection: Collection, tmp_path: Path) -> None:
    vectors = random_vectors(tiny_collection.document_count, 20)
    vectors.data[vectors.indptr[3] : vectors.indptr[4]] = 0
    vectors.eliminate_zeros()
    specification = ElasticsearchSpecification(name="e", field="weights", gzip=True)
    build(specification, vectors, DocumentIds(tiny_collection), TERMS[:20], tmp_path)
    found, documents = read_back(tmp_path)
    rows = range(tiny_collection.document_count)
    assert found == tiny_collection.doc_ids(rows) and documents[3]["weights"] == {}
    for document, read in zip(tiny_collection.documents(rows), documents, strict=True):
        assert (read["title"], read["text"]) == (document.title, document.text)
    mapping = json.loads((tmp_path / "index.json").read_text())["mappings"]["properties"]
    assert mapping == {"weights": {"type": "sparse_vector"}, "title": {"type": "text"}, "text": {"type": "text"}}
    assert all(read.keys() == mapping.keys() for read in documents)
    howto = (tmp_path / "HOWTO.txt").read_text()
    assert "Content-Encoding: gzip" in howto and "bulk-*.ndjson.gz" in howto
    for name in re.findall(r"[\w-]+\.json", howto):
        assert (tmp_path / name).is_file(), name


def test_what_no_server_takes_is_refused(tmp_path: Path) -> None:
    for doc_id in ("", "é" * 257):
        with pytest.raises(RankdistillError, match="which OpenSearch and Elasticsearch refuse"):
            build(OPENSEARCH, random_vectors(2, 5), ["é" * 256, doc_id], TERMS[:5], tmp_path)
    with pytest.raises(UsageError, match="no texts to send along"):
        build(OpenSearchSpecification(name="o"), random_vectors(2, 5), ["a", "b"], TERMS[:5], tmp_path)


@pytest.mark.parametrize("name", ["opensearch", "elasticsearch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("index=Upper", "index"),
        ("index=_own", "index"),
        ("field=a.b", "field"),
        ("field=text", "title and text are fields of their own"),
        ("field_type=dense_vector", "field_type"),
        ("file_megabytes=200", "file_megabytes"),
    ],
)
def test_settings_that_a_server_refuses_are_refused(name: str, change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        any_specification(name, [change])


def test_queries() -> None:
    weights = {"a": 100.0, "b__": 1.0}
    neural = query_body(OPENSEARCH, weights, 5)
    assert neural["size"] == 5 and neural["_source"] == {"excludes": ["terms"]}
    assert neural["query"]["neural_sparse"]["terms"]["query_tokens"] == {"a": HEAVIEST, "b__": HEAVIEST / 100}
    vector = query_body(ELASTICSEARCH, weights)["query"]["sparse_vector"]
    assert vector == {"field": "terms", "query_vector": weights, "prune": False}
    old = ElasticsearchSpecification(name="old", field_type="rank_features", texts=False)
    assert index_body(old)["mappings"]["properties"] == {"terms": {"type": "rank_features"}}
    expected = [
        {"rank_feature": {"field": f"terms.{name}", "linear": {}, "boost": weight}} for name, weight in weights.items()
    ]
    for body in (query_body(old, weights), query_body(OPENSEARCH, weights, clauses=True)):
        assert body["query"]["bool"]["should"] == expected
    with pytest.raises(UsageError, match="no rank_feature clauses"):
        query_body(ELASTICSEARCH, weights, clauses=True)


def test_a_collection_without_a_single_weight_has_no_example(tmp_path: Path) -> None:
    build(OPENSEARCH, sparse.csr_matrix((2, 5), dtype=np.float32), ["a", "b"], TERMS[:5], tmp_path)
    assert not (tmp_path / "query.json").exists() and len(read_back(tmp_path)[0]) == 2


# -- on real Lucene ---------------------------------------------------------------------------------------------------


class LuceneIndex:
    """An index of FeatureFields in memory, as both servers keep them: documents added from the bulk files."""

    def __init__(self, ids: list[str], documents: list[dict[str, Any]]) -> None:
        from rankdistill.indexes import jvm

        jvm.start()
        from jnius import cast

        directory = self.load("store.ByteBuffersDirectory")()
        config = self.load("index.IndexWriterConfig")(self.load("analysis.core.KeywordAnalyzer")())
        writer = self.load("index.IndexWriter")(directory, config)
        self.field = self.load("document.FeatureField")
        for read in documents:
            document = self.load("document.Document")()
            for name, value in read["terms"].items():
                document.add(self.field("terms", name, value))
            writer.addDocument(document)
        writer.close()
        reader = cast("org.apache.lucene.index.IndexReader", self.load("index.DirectoryReader").open(directory))
        self.searcher, self.ids = self.load("search.IndexSearcher")(reader), ids

    @staticmethod
    def load(name: str) -> Any:
        from rankdistill.indexes import jvm

        return jvm.load(f"org.apache.lucene.{name}")

    def search(self, query: dict[str, Any]) -> dict[str, float]:
        """The hits of a query body's clauses, made into the Lucene queries that the servers make of them."""
        builder = self.load("search.BooleanQuery$Builder")()
        if "neural_sparse" in query:
            tokens = query["neural_sparse"]["terms"]["query_tokens"]
            clauses = [self.field.newLinearQuery("terms", name, weight) for name, weight in tokens.items()]
        else:
            features = [clause["rank_feature"] for clause in query["bool"]["should"]]
            boosted = self.load("search.BoostQuery")
            clauses = [
                boosted(self.field.newLinearQuery("terms", each["field"].removeprefix("terms."), 1.0), each["boost"])
                for each in features
            ]
        for clause in clauses:
            builder.add(clause, self.load("search.BooleanClause$Occur").SHOULD)
        return {self.ids[hit.doc]: hit.score for hit in self.searcher.search(builder.build(), 1000).scoreDocs}


@pytest.mark.skipif(importlib.util.find_spec("pyserini") is None, reason="needs the extra lucene")
def test_lucene_scores_are_the_inner_products(tmp_path: Path) -> None:
    vectors = random_vectors(80, len(TERMS), seed=3, density=0.2)
    ids = [f"d{n}" for n in range(80)]
    build(OPENSEARCH, vectors, ids, TERMS, tmp_path)
    index = LuceneIndex(*read_back(tmp_path))
    names = json.loads((tmp_path / "terms.json").read_text())
    queries = random_vectors(6, len(TERMS), seed=4, density=0.2)
    queries.data[:20] *= 40  # beyond Lucene's largest weight of a query
    for query in queries:
        weights = {names[term]: float(weight) for term, weight in zip(query.indices, query.data, strict=True)}
        exact, unrounded = ((held @ query.T).toarray()[:, 0] for held in (rounded(vectors), vectors))
        for clauses in (False, True):
            scale = 1 if clauses else min(1.0, HEAVIEST / max(weights.values()))
            found = index.search(query_body(OPENSEARCH, weights, clauses=clauses)["query"])
            rows = {doc_id: ids.index(doc_id) for doc_id in found}
            assert set(rows.values()) == set(np.flatnonzero(exact).tolist())
            # Of the numbers kept there is no other error than float32's.
            assert found == pytest.approx({doc_id: exact[row] * scale for doc_id, row in rows.items()}, rel=1e-5)
            assert found == pytest.approx({doc_id: unrounded[row] * scale for doc_id, row in rows.items()}, rel=1 / 512)
    # The query to try finds what is written beside it.
    expected = {hit["_id"]: hit["_score"] for hit in json.loads((tmp_path / "expected.json").read_text())}
    for file in ("query.json", "query_rank_feature.json"):
        found = index.search(json.loads((tmp_path / file).read_text())["query"])
        assert len(expected) == 10 and max(expected.values()) == pytest.approx(max(found.values()), rel=1e-5)
        assert {doc_id: found[doc_id] for doc_id in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["opensearch", "elasticsearch"])
def test_an_index_of_a_student_is_exported_and_not_searched_here(
    name: str, make_collection: Any, tmp_path: Path
) -> None:
    """Through the one way that builds every index of a sparse student: ids, texts and counts arrive."""
    texts, encoder = random_texts(50), WordCounts()
    collection: Any = make_collection(texts)
    vectors = encode_document_terms(encoder, collection, tmp_path / "vectors")
    specification: Any = any_specification(name)
    index = build_sparse_index(encoder, collection, vectors, specification, tmp_path / name)
    ids, documents = read_back(index.path)
    assert ids == collection.doc_ids(range(50)) and [read["text"] for read in documents] == texts
    assert (as_matrix(documents, encoder.terms) != rounded(encoder.encode_documents(texts))).nnz == 0
    assert index.counts["renamed_terms"] == index.counts["vanishing_weights"] == 0 and index.counts["files"] == 1
    assert index.bytes > 0 and not searched_here(index.specification)
    with pytest.raises(UsageError, match="for other software; they are not searched here"):
        index.search(encoder.encode_queries(["w1"]), 3)
