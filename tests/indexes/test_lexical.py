"""What both BM25 engines promise: Lucene's formula, ties by row, one build for its settings, errors that teach."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes import lucene, postings
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.lucene_bm25 import LuceneBM25

WORDS = [f"word{number}" for number in range(60)]
BOTH = pytest.mark.parametrize("engine", [BM25, LuceneBM25])


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 400 words: Lucene keeps lengths above 39 inexactly."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 400))) for _ in range(count)]


def kept_length(length: int) -> int:
    """What Lucene's byte keeps of a document's length (SmallFloat: exact below 40, above in 4 bits)."""
    if length < 40:
        return length
    shift = max(0, (length - 24).bit_length() - 4)
    return 24 + ((length - 24) >> shift << shift)


def slow_bm25(texts: list[str], query: str, k1: float, b: float, kept: Any = int) -> np.ndarray:
    """Lucene's BM25, term by term in double precision, over lengths as `kept` keeps them."""
    documents = [re.findall(r"\w\w+", text.lower()) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(texts))
    for term in re.findall(r"\w\w+", query.lower()):
        holding = sum(term in document for document in documents)
        for row, document in enumerate(documents):
            tf = document.count(term)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            scores[row] += idf * tf / (tf + k1 * (1 - b + b * kept(len(document)) / mean))
    return scores


def opened(engine: Any, collection: Any, path: Path, threads: int = 0, **settings: Any) -> Any:
    engine(**settings).build(collection, path)
    return engine.open(path, threads)


@BOTH
def test_scores_equal_an_independent_bm25(engine: Any, make_collection: Any, tmp_path: Path) -> None:
    texts = random_texts(200)
    built = opened(engine, make_collection(texts), tmp_path / "bm25", k1=1.3, b=0.6, language="none")
    ours, other = (int, kept_length) if engine is BM25 else (kept_length, int)
    queries = ["word1 word2 word3", "word7", "word5 word5 word9", "Word11, WORD12!"]
    for query, hits in zip(queries, built.search(queries, 300), strict=True):
        expected = slow_bm25(texts, query, 1.3, 0.6, ours)
        assert len(hits.rows) == (expected > 0).sum()
        np.testing.assert_allclose(hits.scores, expected[hits.rows], rtol=1e-5)
        assert (np.diff(hits.scores) <= 0).all()
        # The lengths are what sets the two apart.
        assert not np.allclose(hits.scores, slow_bm25(texts, query, 1.3, 0.6, other)[hits.rows], rtol=1e-3)
        np.testing.assert_array_equal(built.search([query], 10)[0].rows, hits.rows[:10])


@BOTH
def test_ties_go_by_row_also_at_the_cut(engine: Any, make_collection: Any, tmp_path: Path) -> None:
    built = opened(engine, make_collection(["other text", *["same words here"] * 50, "words"]), tmp_path / "bm25")
    for k in (0, 1, 7, 50, 52, 10**9):
        np.testing.assert_array_equal(built.search(["same"], k)[0].rows, np.arange(1, 1 + min(k, 50)))


@BOTH
def test_without_a_common_word_there_are_no_hits(engine: Any, make_collection: Any, tmp_path: Path) -> None:
    built = opened(engine, make_collection(["", "the of and", "iron rusts", "!!"]), tmp_path / "bm25")
    for hits in built.search(["", "zebra", "the of", "?!"], 10):
        assert len(hits.rows) == len(hits.scores) == 0
    np.testing.assert_array_equal(built.search(["rust"], 10)[0].rows, [2])
    assert built.search([], 10) == []


@BOTH
def test_hits_do_not_depend_on_batches_or_threads(
    engine: Any, make_collection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = opened(engine, make_collection(random_texts(150)), tmp_path / "bm25", threads=1)
    queries = [f"word{number % 60} word{number % 7} word{number % 11}" for number in range(80)]
    together, alone = built.search(queries, 20), [built.search([query], 20)[0] for query in queries]
    monkeypatch.setattr(postings, "POSTINGS_A_BLOCK", 500)
    monkeypatch.setattr(lucene, "QUERIES_A_THREAD", 4)
    threaded = engine.open(tmp_path / "bm25", threads=3).search(queries, 20)
    for first, *others in zip(together, threaded, alone, strict=True):
        for other in others:
            np.testing.assert_array_equal(first.rows, other.rows)
            np.testing.assert_array_equal(first.scores, other.scores)


@BOTH
def test_an_index_is_built_once_for_its_settings(engine: Any, make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["one text", "another", ""])
    first = engine().build(collection, tmp_path / "bm25")
    assert first.counts["documents"] == 3 and first.counts["empty_documents"] == 1
    files = {path: path.stat().st_mtime_ns for path in first.path.rglob("*") if path.is_file()}
    assert engine.open(tmp_path / "bm25").bytes > 100
    assert engine().build(collection, tmp_path / "bm25").fingerprint == first.fingerprint
    assert files == {path: path.stat().st_mtime_ns for path in first.path.rglob("*") if path.is_file()}
    assert engine(k1=2.0).build(collection, tmp_path / "bm25").fingerprint != first.fingerprint
    assert engine.open(tmp_path / "bm25").k1 == 2.0


@BOTH
def test_errors_say_what_to_do(engine: Any, make_collection: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no (stemmer|analyzer) for the language 'klingon'"):
        engine(language="klingon").build(make_collection(["words"]), tmp_path / "klingon")
    with pytest.raises(UsageError, match="b between 0 and 1"):
        engine(b=1.5)
    with pytest.raises(RankdistillError, match="no index yet"):
        engine().search(["word1"], 5)
    with pytest.raises(RankdistillError, match=f"there is no {engine.kind} here"):
        engine.open(tmp_path / "nowhere")
    with pytest.raises(RankdistillError, match="no document holds a word"):
        engine().build(make_collection(["", "the"]), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    artifact = engine().build(make_collection(["words"]), tmp_path / "bm25")
    next(path for name in artifact.manifest["files"] if (path := artifact.path / name)).write_bytes(b"damaged")
    with pytest.raises(RankdistillError, match=f"{engine.kind} artifact is damaged"):
        engine.open(tmp_path / "bm25")


@pytest.mark.parametrize(
    ("engine", "published", "margin"),
    [
        (BM25, {"ndcg_cut_10": 0.321}, 4e-3),
        # Anserini's regression "beir-v1.0.0-nfcorpus-flat" (ties by id, here by row)
        (LuceneBM25, {"ndcg_cut_10": 0.3218, "recall_100": 0.2457, "recall_1000": 0.3704}, 3e-4),
    ],
)
def test_nfcorpus_gives_the_published_figures(
    engine: Any, published: dict[str, float], margin: float, shared_data: Path, tmp_path: Path
) -> None:
    import pytrec_eval

    from rankdistill.collections import open_collection

    collection = open_collection(f"beir:{shared_data / 'beir' / 'nfcorpus'}")
    ids = collection.query_ids("test")
    hits = opened(engine, collection, tmp_path / "bm25").search(collection.query_texts(ids), 1000)
    run = {
        # trec_eval would order ties anew, so ranks are given for scores.
        query_id: {doc_id: 1.0 / rank for rank, doc_id in enumerate(collection.doc_ids(found.rows), 1)}
        for query_id, found in zip(ids, hits, strict=True)
    }
    measured = pytrec_eval.RelevanceEvaluator(collection.qrels("test"), set(published)).evaluate(run)
    means = {metric: sum(query[metric] for query in measured.values()) / len(ids) for metric in published}
    assert means == pytest.approx(published, abs=margin)
