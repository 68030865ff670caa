"""Seismic against exact search, at the presets that are shipped and where it has to be exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse
from sparse_encoders import WordCounts, random_texts, sparse_specification

from rankdistill.errors import RankdistillError
from rankdistill.indexes import seismic
from rankdistill.indexes.base import Hits
from rankdistill.indexes.sparse import BuiltSparseIndex, SparseEngine, SparseIndex, build_sparse_index
from rankdistill.indexes.sparse_vectors import encode_document_terms

if TYPE_CHECKING:
    from rankdistill.collections import Collection

pytest.importorskip("seismic", reason="needs the extra sparse")
QUERIES = random_texts(40, seed=9, longest=8)


def recall(exact: list[Hits], found: list[Hits], k: int) -> float:
    pairs = zip(exact, found, strict=True)
    return float(
        np.mean([len({*first.rows[:k]} & {*second.rows[:k]}) / len(first.rows[:k]) for first, second in pairs])
    )


class Built:
    """A collection's vectors, and indexes of them below a folder."""

    def __init__(self, collection: Collection, folder: Path, encoder: Any = None) -> None:
        self.collection, self.folder, self.encoder = collection, folder, encoder or WordCounts()
        self.vectors = encode_document_terms(self.encoder, collection, folder / "vectors")
        self.exact = SparseIndex.open(self.vectors)

    def index(self, source: str | dict[str, Any] = "seismic", name: str = "index") -> BuiltSparseIndex:
        specification = sparse_specification(source if isinstance(source, str) else {"type": "seismic", **source})
        return build_sparse_index(self.encoder, self.collection, self.vectors, specification, self.folder / name)


@pytest.fixture
def built(make_collection: Any, tmp_path: Path) -> Built:
    """Empty documents are in rows 0 and 201."""
    texts = ["unknown", *random_texts(200), "unknown too", *random_texts(100, seed=1)]
    return Built(make_collection(texts), tmp_path)


def test_with_loose_settings_it_is_exact_up_to_half_precision(built: Built) -> None:
    index = built.index({"name": "loose", "summary_energy": 1, "query_cut": 40, "heap_factor": 0.01})
    queries = built.encoder.encode_queries(QUERIES)
    for exact, ours in zip(built.exact.search(queries, 1000), index.search(queries, 1000), strict=True):
        assert sorted(exact.rows) == sorted(ours.rows)  # empty documents move no other row
        scores = dict(zip(exact.rows.tolist(), exact.scores.tolist(), strict=True))
        np.testing.assert_allclose(ours.scores, [scores[row] for row in ours.rows], rtol=2e-3)
        pairs = list(zip((-ours.scores).tolist(), ours.rows.tolist(), strict=True))
        assert pairs == sorted(pairs)  # best first, ties by row
    assert index.counts["indexed"] == 300 and index.counts["empty_documents"] == 2


def test_queries_without_a_term_and_few_hits(built: Built) -> None:
    index = built.index()
    hits = SparseEngine(built.encoder, index, collection=built.collection).search(["nothing", "w3", ""], 7)
    assert [len(each.rows) for each in hits] == [0, 7, 0]
    assert [len(each.rows) for each in index.search(built.encoder.encode_queries(["w3"]), 0)] == [0]


def test_recall_of_the_presets_on_real_texts(shared_data: Path, make_collection: Any, tmp_path: Path) -> None:
    """BM25 weights of words, 400 documents of NFCorpus."""
    from rankdistill.collections import open_collection
    from rankdistill.indexes.bm25 import BM25

    whole = open_collection(f"beir:{shared_data / 'beir' / 'nfcorpus'}")
    collection = make_collection(whole.document_texts(range(400)))
    BM25().build(collection, tmp_path / "bm25")
    encoder: Any = BM25.open(tmp_path / "bm25")
    queries = encoder.encode_queries(whole.query_texts(whole.query_ids("test")[:150]))
    queries = queries[np.flatnonzero(np.diff(queries.indptr))]
    encoder.terms = [f"t{number}" for number in range(queries.shape[1])]
    built, sizes = Built(collection, tmp_path, encoder), []
    for preset, least in (("seismic", 0.94), ("seismic_fast", 0.82)):  # blocks are drawn at random
        index = built.index(preset, preset)
        assert recall(built.exact.search(queries, 10), index.search(queries, 10), 10) >= least, preset
        sizes.append(index.bytes)
    assert sizes[1] < 0.7 * sizes[0]


def test_neighbours_are_looked_at_too(built: Built) -> None:
    poor: dict[str, Any] = {"postings": 60, "summary_energy": 0.2, "query_cut": 1, "heap_factor": 1}
    queries = built.encoder.encode_queries(QUERIES)
    exact = built.exact.search(queries, 10)
    few, many = (
        recall(exact, built.index({"name": f"n{n}", **poor, "neighbours": n}, f"n{n}").search(queries, 10), 10)
        for n in (0, 10)
    )
    assert many > few + 0.05
    with pytest.raises(RankdistillError, match="some documents have fewer than 20 neighbours"):
        built.index({"name": "gaps", **poor, "postings": 1, "neighbours": 20}, "gaps")


def test_plain_seismic_opens_the_file(built: Built) -> None:
    import seismic as library

    index = built.index()
    plain = library.SeismicIndex.load(str(index.path / seismic.FILE))
    query = built.encoder.encode_queries(["w1 w2 w3"])
    names = np.array([str(column) for column in query.indices], dtype=library.get_seismic_string())
    theirs = plain.search("q", names, query.data, 5, query_cut=20, heap_factor=0.5)
    (hits,) = index.search(query, 5)
    assert {doc_id for _, _, doc_id in theirs} == set(built.collection.doc_ids(hits.rows))
    assert json.loads((index.path / seismic.TERMS).read_text()) == built.encoder.terms


def test_large_vocabularies(make_collection: Any, tmp_path: Path) -> None:
    """More than 65,536 terms need the library's larger index: the smaller one takes 70,000 for 4,464."""

    class Large(WordCounts):
        def __init__(self) -> None:
            super().__init__()
            self.terms, self.fingerprint = [f"x{number}" for number in range(66_040)], "large"

        def _encode(self, texts: Any) -> Any:
            small = WordCounts()._encode(texts)
            return sparse.csr_matrix((small.data, small.indices + 66_000, small.indptr), (small.shape[0], 66_040))

    built = Built(make_collection(random_texts(30)), tmp_path, Large())
    queries = built.encoder.encode_queries(["w1 w2", "w39"])
    exact, ours = ([hits.scores[0] for hits in index.search(queries, 3)] for index in (built.exact, built.index()))
    np.testing.assert_allclose(ours, exact, rtol=2e-3)


def test_weights_beyond_half_precision_are_refused(make_collection: Any, tmp_path: Path) -> None:
    encoder = WordCounts()
    encoder.weights[3] = 70_000
    with pytest.raises(RankdistillError, match="70000 is above what Seismic stores"):
        Built(make_collection(["w1", "w3"]), tmp_path, encoder).index()
    assert not (tmp_path / "index").exists()


def test_damaged_files_are_refused(built: Built) -> None:
    index = built.index()
    query, file = built.encoder.encode_queries(["w1"]), index.path / seismic.FILE
    whole = file.read_bytes()
    for content, message in ((whole[:-9], "its size"), (bytes(len(whole)), "cannot be read"), (None, "No such file")):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(RankdistillError, match=message):
            index.search(query, 5)
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
