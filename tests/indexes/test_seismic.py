"""Seismic against exact search, at the presets that are shipped and where it has to be exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sparse_encoders import WordCounts, random_texts, sparse_specification

from rankdistill.errors import RankdistillError
from rankdistill.indexes import seismic
from rankdistill.indexes.base import Hits
from rankdistill.indexes.sparse import SparseEngine, SparseIndex, build_sparse_index
from rankdistill.indexes.sparse_vectors import encode_document_terms

if TYPE_CHECKING:
    from rankdistill.collections import Collection

pytest.importorskip("seismic", reason="needs the extra sparse")
QUERIES = random_texts(40, seed=9, longest=8)


def recall(exact: list[Hits], found: list[Hits], k: int) -> float:
    shares = [len({*one.rows[:k]} & {*two.rows[:k]}) / len(one.rows[:k]) for one, two in zip(exact, found, strict=True)]
    return float(np.mean(shares))


@pytest.fixture
def collection(make_collection: Any) -> Collection:
    made: Collection = make_collection(["unknown", *random_texts(200), "unknown too", *random_texts(100, seed=1)])
    return made


def test_with_loose_settings_it_is_exact_up_to_half_precision(collection: Collection, tmp_path: Path) -> None:
    encoder = WordCounts()
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    specification = sparse_specification(
        {"name": "loose", "type": "seismic", "summary_energy": 1, "query_cut": 40, "heap_factor": 0.01}
    )
    index = build_sparse_index(encoder, collection, vectors, specification, tmp_path / "s")
    exact = SparseIndex.open(vectors)
    queries = encoder.encode_queries(QUERIES)
    for one, two in zip(exact.search(queries, 1000), index.search(queries, 1000), strict=True):
        assert sorted(one.rows) == sorted(two.rows)  # empty documents, rows 0 and 201, move no other row
        scores = dict(zip(one.rows.tolist(), one.scores.tolist(), strict=True))
        np.testing.assert_allclose(two.scores, [scores[row] for row in two.rows], rtol=2e-3)
        pairs = list(zip((-two.scores).tolist(), two.rows.tolist(), strict=True))
        assert pairs == sorted(pairs)  # best first, ties by row
    assert index.counts["indexed"] == 300 and index.counts["empty_documents"] == 2


def test_queries_without_a_term_and_few_hits(collection: Collection, tmp_path: Path) -> None:
    encoder = WordCounts()
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    index = build_sparse_index(encoder, collection, vectors, sparse_specification("seismic"), tmp_path / "s")
    found = SparseEngine(encoder, index, collection=collection).search(["nothing", "w3", ""], 7)
    assert [len(hits.rows) for hits in found] == [0, 7, 0]
    assert [len(hits.rows) for hits in index.search(encoder.encode_queries(["w3"]), 0)] == [0]


def test_recall_of_the_presets_on_real_texts(shared_data: Path, tmp_path: Path) -> None:
    """BM25 weights of words, 400 documents of NFCorpus."""
    from rankdistill.collections import open_collection
    from rankdistill.indexes.bm25 import BM25

    whole = open_collection(f"beir:{shared_data / 'beir' / 'nfcorpus'}")
    path = tmp_path / "part"
    path.mkdir()
    lines = [json.dumps({"_id": f"d{row}", "text": text}) for row, text in enumerate(whole.document_texts(range(400)))]
    (path / "corpus.jsonl").write_text("\n".join(lines))
    (path / "queries.jsonl").write_text('{"_id": "q", "text": "q"}')
    collection = open_collection(f"beir:{path}")
    BM25().build(collection, tmp_path / "bm25")
    encoder: Any = BM25.open(tmp_path / "bm25")
    queries = encoder.encode_queries(whole.query_texts(whole.query_ids("test")[:150]))
    queries = queries[np.flatnonzero(np.diff(queries.indptr))]
    encoder.terms = [f"t{number}" for number in range(queries.shape[1])]
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    exact = SparseIndex.open(vectors).search(queries, 10)
    sizes = []
    for preset, least in (("seismic", 0.94), ("seismic_fast", 0.82)):  # blocks are drawn at random
        index = build_sparse_index(encoder, collection, vectors, sparse_specification(preset), tmp_path / preset)
        found = recall(exact, index.search(queries, 10), 10)
        print(preset, found)
        assert found >= least, preset
        sizes.append(index.bytes)
    assert sizes[1] < 0.7 * sizes[0]


def test_neighbours_are_looked_at_too(collection: Collection, tmp_path: Path) -> None:
    encoder = WordCounts()
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    poor: dict[str, Any] = {"type": "seismic", "postings": 60, "summary_energy": 0.2, "query_cut": 1, "heap_factor": 1}
    queries = encoder.encode_queries(QUERIES)
    exact = SparseIndex.open(vectors).search(queries, 10)
    shares = []
    for neighbours in (0, 10):
        specification = sparse_specification({"name": f"n{neighbours}", **poor, "neighbours": neighbours})
        index = build_sparse_index(encoder, collection, vectors, specification, tmp_path / f"s{neighbours}")
        shares.append(recall(exact, index.search(queries, 10), 10))
    assert shares[1] > shares[0] + 0.05
    gaps = sparse_specification({"name": "gaps", **poor, "postings": 1, "neighbours": 20})
    with pytest.raises(RankdistillError, match="some documents have fewer than 20 neighbours"):
        build_sparse_index(encoder, collection, vectors, gaps, tmp_path / "gaps")


def test_plain_seismic_opens_the_file(collection: Collection, tmp_path: Path) -> None:
    import seismic as library

    encoder = WordCounts()
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    index = build_sparse_index(encoder, collection, vectors, sparse_specification("seismic"), tmp_path / "s")
    plain = library.SeismicIndex.load(str(index.path / seismic.FILE))
    query = encoder.encode_queries(["w1 w2 w3"])
    names = np.array([str(column) for column in query.indices], dtype=library.get_seismic_string())
    found = plain.search("q", names, query.data, 5, query_cut=20, heap_factor=0.5)
    (hits,) = index.search(query, 5)
    assert {doc_id for _, _, doc_id in found} == set(collection.doc_ids(hits.rows))
    assert json.loads((index.path / seismic.TERMS).read_text()) == encoder.terms


def test_large_vocabularies(make_collection: Any, tmp_path: Path) -> None:
    """More than 65,536 terms need the library's larger index: the smaller one takes 70,000 for 4,464."""
    from scipy import sparse

    class Large(WordCounts):
        terms = [f"x{number}" for number in range(66_040)]

        def __init__(self) -> None:
            self.small = WordCounts()
            self.fingerprint = "large"

        def encode_documents(self, texts: Any) -> Any:
            made = self.small.encode_documents(texts)
            return sparse.csr_matrix((made.data, made.indices + 66_000, made.indptr), (made.shape[0], 66_040))

        encode_queries = encode_documents

    collection, encoder = make_collection(random_texts(30)), Large()
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    index = build_sparse_index(encoder, collection, vectors, sparse_specification("seismic"), tmp_path / "s")
    queries = encoder.encode_queries(["w1 w2", "w39"])
    exact, found = SparseIndex.open(vectors).search(queries, 3), index.search(queries, 3)
    np.testing.assert_allclose([hits.scores[0] for hits in found], [hits.scores[0] for hits in exact], rtol=2e-3)


def test_weights_beyond_half_precision_are_refused(make_collection: Any, tmp_path: Path) -> None:
    encoder = WordCounts()
    encoder.weights[3] = 70_000
    collection = make_collection(["w1", "w3"])
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    with pytest.raises(RankdistillError, match="70000 is above what Seismic stores"):
        build_sparse_index(encoder, collection, vectors, sparse_specification("seismic"), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_damaged_files_are_refused(collection: Collection, tmp_path: Path) -> None:
    encoder = WordCounts()
    vectors = encode_document_terms(encoder, collection, tmp_path / "v")
    index = build_sparse_index(encoder, collection, vectors, sparse_specification("seismic"), tmp_path / "s")
    query = encoder.encode_queries(["w1"])
    file = index.path / seismic.FILE
    whole = file.read_bytes()
    for content, message in ((whole[:-9], "its size"), (bytes(len(whole)), "cannot be read"), (None, "No such file")):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(RankdistillError, match=message):
            type(index)(vectors.__class__(index.path, index.manifest)).search(query, 5)
    file.write_bytes(whole)
    (index.path / seismic.ROWS).unlink()
    with pytest.raises(RankdistillError, match="cannot be read"):
        index.search(query, 5)


def test_nothing_goes_to_standard_output(tmp_path: Path) -> None:
    """The library prints while it builds; standard output is for results."""
    program = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom scipy import sparse\n"
        "from rankdistill.indexes import seismic\nfrom rankdistill.indexes.specification import any_specification\n"
        "vectors = sparse.csr_matrix(np.eye(5, dtype=np.float32))\n"
        "seismic.build(any_specification('seismic'), vectors, list('abcde'), list('vwxyz'), Path(sys.argv[1]))\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "seismic", None)
    with pytest.raises(RankdistillError, match="not installed") as error:
        seismic.open_index(tmp_path)
    assert "rankdistill[sparse]" in str(error.value)
