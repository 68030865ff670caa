from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rankdistill.errors import RankdistillError
from rankdistill.indexes import lucene
from rankdistill.indexes.base import Hits, ranked
from rankdistill.indexes.impacts import fit_quantiser
from rankdistill.indexes.lucene_impact import FILES, LuceneImpactIndex, build, open_index
from rankdistill.indexes.sparse import SparseEngine, build_sparse_index
from rankdistill.indexes.sparse_specification import LuceneImpactSpecification
from rankdistill.indexes.sparse_vectors import encode_document_terms
from rankdistill.students.token_weights import TokenWeights

TERMS = [f"t{number}" for number in range(200)]


def random_vectors(rows: int, terms: int = 200, held: int = 20, seed: int = 0) -> sparse.csr_matrix:
    """Weights like a student's: ln(1 + x), most of them small."""
    rng = np.random.default_rng(seed)
    vectors = sparse.random(rows, terms, held / terms, random_state=seed, format="csr", dtype=np.float32)
    vectors.data = np.log1p(rng.exponential(1.0, vectors.nnz)).astype(np.float32) + np.float32(1e-4)
    vectors.sort_indices()
    return vectors


def made(
    vectors: sparse.csr_matrix, folder: Path, terms: list[str] = TERMS, **settings: Any
) -> tuple[LuceneImpactIndex, dict[str, Any]]:
    folder.mkdir(parents=True)
    specification = LuceneImpactSpecification(name="lucene_impact", **settings)
    counts = build(specification, vectors, [f"d{row}" for row in range(vectors.shape[0])], terms, folder)
    return open_index(folder), counts


def best(queries: Any, documents: Any, k: int) -> list[Hits]:
    product = (queries @ documents.T).tocsr()
    return [ranked(product[row].indices, product[row].data, k) for row in range(product.shape[0])]


def quantised_product(vectors: Any, queries: Any, k: int, **settings: Any) -> list[Hits]:
    """What the index should find, by scipy in whole numbers; a query's weights in 8 bits."""
    quantise, _ = fit_quantiser(LuceneImpactSpecification(name="x", **settings), vectors)
    documents = sparse.csr_matrix(
        (quantise(vectors.data).astype(float), vectors.indices, vectors.indptr), vectors.shape
    )
    units = 255 / queries.max(axis=1).toarray().astype(np.float64)
    whole = sparse.csr_matrix(queries.astype(np.float64).multiply(units)).rint()
    whole.eliminate_zeros()
    hits = best(whole, documents, k)
    return [Hits(rows, scores * (quantise.step / unit)) for (rows, scores), unit in zip(hits, units[:, 0], strict=True)]


def test_scores_equal_the_quantised_product_and_ranks_those_of_the_exact_one(tmp_path: Path) -> None:
    vectors, queries = random_vectors(3000), random_vectors(50, held=8, seed=1)
    index, counts = made(vectors, tmp_path / "index")
    assert counts["clipped_weights"] == 0 and counts["maximum_weight"] == pytest.approx(vectors.data.max())
    assert counts["bytes"] == index.bytes > 10_000
    exact, overlap = best(queries, vectors, 10), []
    for hits, expected, ideal in zip(
        index.search(queries, 10), quantised_product(vectors, queries, 10), exact, strict=True
    ):
        np.testing.assert_array_equal(hits.rows, expected.rows)
        np.testing.assert_allclose(hits.scores, expected.scores, rtol=1e-6)
        np.testing.assert_allclose(hits.scores, ideal.scores, rtol=0.03)
        overlap.append(len(set(hits.rows) & set(ideal.rows)) / 10)
    assert np.mean(overlap) >= 0.97
    for bits, least, most in ((12, 47, 50), (2, 0, 24)):
        other, _ = made(vectors, tmp_path / str(bits), bits=bits, query_bits=bits)
        pairs = zip(other.search(queries, 10), exact, strict=True)
        assert least <= sum(set(hits.rows) == set(ideal.rows) for hits, ideal in pairs) <= most


def test_ties_go_by_row_and_unknown_queries_find_nothing(tmp_path: Path) -> None:
    vectors = sparse.csr_matrix(np.array([[0, 1, 0], *[[2, 0, 0]] * 30, [0, 0, 0]], np.float32))
    index, counts = made(vectors, tmp_path / "index", ["a", "b", "never"])
    assert counts["documents_without_terms"] == 1
    queries = sparse.csr_matrix(np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 3, 0]], np.float32))
    for k in (1, 7, 32, 10**6):
        tied, empty, unseen, last = index.search(queries, k)
        np.testing.assert_array_equal(tied.rows, np.arange(1, 1 + min(k, 30)))
        np.testing.assert_allclose(tied.scores, 2, rtol=1e-6)
        assert len(empty.rows) == len(unseen.rows) == 0
        assert last.rows.tolist() == [0] and last.scores[0] == pytest.approx(3, rel=0.01)
    assert [len(hits.rows) for hits in index.search(queries, 0)] == [0, 0, 0, 0]


AWKWARD = [*'+-&!(){}[]^"~*?:\\/. ', "AND", "OR", "NOT", "TO", "&&", "||", "a b", "\u3000", "\n", "\t", "##a", "u0041"]
AWKWARD += ["\\u0041", "a^2", "12", "-1", "🦑", "🦑🦑x", "é", "Ａ", "▁the", "Ġthe", "[CLS]", "x" * 300, "a,b", "|", ""]


def test_no_character_of_a_term_is_an_operator(tmp_path: Path) -> None:
    vectors = sparse.identity(len(AWKWARD), np.float32, format="csr")
    index, _ = made(vectors, tmp_path / "index", AWKWARD)
    for row, hits in enumerate(index.search(vectors, 5)):
        assert hits.rows.tolist() == [row], AWKWARD[row]
    everything = sparse.csr_matrix(np.ones((1, len(AWKWARD)), np.float32))
    assert index.search(everything, 99)[0].rows.tolist() == list(range(len(AWKWARD)))


def test_many_terms_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lucene, "QUERIES_A_THREAD", 3)
    vectors = random_vectors(12, terms=3000, held=1500)
    index, _ = made(vectors, tmp_path / "index", [f"t{number}" for number in range(3000)])
    threaded = index.search(vectors, 5)
    for row, hits in enumerate(threaded):
        alone = index.search(vectors[row], 5)[0]
        np.testing.assert_array_equal(hits.rows, alone.rows)
        np.testing.assert_array_equal(hits.scores, alone.scores)
        assert hits.rows[0] == row


def test_plain_pyserini_opens_it_and_finds_the_same(plain_pyserini: Any, tmp_path: Path) -> None:
    vectors, queries = random_vectors(300), random_vectors(5, held=8, seed=1)
    index, _ = made(vectors, tmp_path / "index")

    class Encoder:
        def encode(self, row: int) -> dict[str, int]:
            query = queries[row]
            whole = np.rint(query.data * 255 / query.data.max()).astype(int)
            return {TERMS[column]: int(weight) for column, weight in zip(query.indices, whole, strict=True)}

    searcher = plain_pyserini.LuceneImpactSearcher(str(tmp_path / "index" / FILES), Encoder())
    assert searcher.num_docs == 300
    for row, hits in enumerate(index.search(queries, 10)):
        theirs = {hit.docid: hit.score for hit in searcher.search(row, 10)}
        scores = hits.scores * (255 / queries[row].data.max() / index.step)
        assert theirs == pytest.approx({f"d{d}": score for d, score in zip(hits.rows, scores, strict=True)}, rel=1e-5)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["same"] * 200, "two of the vocabulary's 200 terms are 'same'"),
        (["a\x01b", *TERMS[1:]], "cannot hold the term"),
        (["é" * 17_000, *TERMS[1:]], "cannot hold the term"),
        (TERMS[:100], "20 document ids and 100 terms for vectors of 20 documents and 200 terms"),
    ],
)
def test_terms_that_lucene_cannot_hold_are_refused(terms: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match=message):
        made(random_vectors(20), tmp_path / "index", terms)


def test_weights_above_the_maximum_are_clipped_or_refused(tmp_path: Path) -> None:
    vectors, queries = random_vectors(20), random_vectors(3, seed=1)
    with pytest.raises(RankdistillError, match=r"above the maximum of 0\.5"):
        made(vectors, tmp_path / "above", maximum=0.5, above="error")
    index, counts = made(vectors, tmp_path / "clipped", maximum=0.5)
    assert counts["clipped_weights"] == (vectors.data > 0.5).sum() > 0
    for hits, expected in zip(
        index.search(queries, 5), quantised_product(vectors, queries, 5, maximum=0.5), strict=True
    ):
        np.testing.assert_array_equal(hits.rows, expected.rows)
    heavy = sparse.csr_matrix(np.full((1, 40_000), 2.0, np.float32))
    with pytest.raises(RankdistillError, match="add up to more than Lucene counts"):
        made(heavy, tmp_path / "heavy", [f"t{number}" for number in range(40_000)], bits=16)
    with pytest.raises(RankdistillError, match="cannot be read"):
        open_index(tmp_path / "nowhere")
    for path in (tmp_path / "clipped" / FILES).glob("segments_*"):
        path.unlink()
    with pytest.raises(RankdistillError, match="no files of a Lucene index"):
        open_index(tmp_path / "clipped")


def test_one_query_goes_the_short_way_and_finds_the_same(make_collection: Any, tmp_path: Path) -> None:
    """Text in, hits out: a single query without an array in between, several with one."""
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(["[UNK]", *TERMS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).uniform(0.1, 3, len(TERMS) + 1).astype(np.float32)
    weights[0] = 0
    rng = np.random.default_rng(1)
    collection = make_collection([" ".join(rng.choice(TERMS, 12)) for _ in range(80)])

    class Student(TokenWeights):
        def encode_documents(self, texts: Sequence[str]) -> Any:
            return self.encode_queries(texts)

    student = Student(tokenizer, weights, "student", "documents")
    vectors = encode_document_terms(student, collection, tmp_path / "vectors")
    specification = LuceneImpactSpecification(name="lucene_impact")
    index = build_sparse_index(student, collection, vectors, specification, tmp_path / "lucene")
    engine = SparseEngine(student, index, collection=collection)
    texts = [" ".join(rng.choice(TERMS, 4)) for _ in range(20)]
    together = engine.search(texts, 5)
    steps = engine.steps(5)
    for text, hits in zip(texts, together, strict=True):
        for alone in (engine.search([text], 5), steps["search"]([text], steps["encode"]([text], None))):
            np.testing.assert_array_equal(alone[0].rows, hits.rows)
            np.testing.assert_array_equal(alone[0].scores, hits.scores)
    assert len(engine.search(["unknown words"], 5)[0].rows) == 0
    with ThreadPoolExecutor(2) as pool:  # threads of somebody else's
        for hits, (alone,) in zip(together, pool.map(lambda text: engine.search([text], 5), texts), strict=True):
            np.testing.assert_array_equal(alone.rows, hits.rows)
