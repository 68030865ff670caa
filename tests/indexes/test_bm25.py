from __future__ import annotations

import math
import re
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes import bm25, postings
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.mining import Source, mine

if TYPE_CHECKING:
    from rankdistill.collections import Collection

WORDS = [f"word{number}" for number in range(60)]


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


def slow_bm25(texts: list[str], query: str, k1: float, b: float) -> np.ndarray:
    """Lucene's BM25, term by term in double precision."""
    documents = [re.findall(r"\w\w+", text.lower()) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(texts))
    for term in re.findall(r"\w\w+", query.lower()):
        holding = sum(term in document for document in documents)
        for row, document in enumerate(documents):
            tf = document.count(term)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            scores[row] += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
    return scores


@pytest.fixture
def texts() -> list[str]:
    return random_texts(300)


@pytest.fixture
def collection(make_collection: Any, texts: list[str]) -> Collection:
    return make_collection(texts)


def test_scores_equal_an_independent_bm25(collection: Collection, texts: list[str], tmp_path: Path) -> None:
    BM25(k1=1.3, b=0.6, language="none").build(collection, tmp_path / "bm25")
    engine = BM25.open(tmp_path / "bm25")
    queries = ["word1 word2 word3", "word7", "word5 word5 word9", "Word11, WORD12!"]
    for query, hits in zip(queries, engine.search(queries, 300), strict=True):
        expected = slow_bm25(texts, query, 1.3, 0.6)
        assert len(hits.rows) == (expected > 0).sum()
        np.testing.assert_allclose(hits.scores, expected[hits.rows], rtol=1e-5)
        assert (np.diff(hits.scores) <= 0).all()
        top = engine.search([query], 10)[0]
        np.testing.assert_array_equal(top.rows, hits.rows[:10])


def test_plain_bm25s_opens_the_files_and_gives_the_same_scores(collection: Collection, tmp_path: Path) -> None:
    import bm25s

    BM25(language="none").build(collection, tmp_path / "bm25")
    theirs = bm25s.BM25.load(tmp_path / "bm25", mmap=True)
    hits = BM25.open(tmp_path / "bm25").search(["word3 word4"], 300)[0]
    scores = theirs.get_scores(["word3", "word4"])
    np.testing.assert_allclose(hits.scores, scores[hits.rows], rtol=1e-6)
    assert len(hits.rows) == (scores > 0).sum()
    built_by_bm25s = bm25s.BM25(k1=0.9, b=0.4)
    built_by_bm25s.index(
        bm25s.tokenize(collection.document_texts(range(300)), stopwords=None, show_progress=False), show_progress=False
    )
    np.testing.assert_allclose(scores, built_by_bm25s.get_scores(["word3", "word4"]), rtol=1e-5)


def test_ties_go_by_row_also_at_the_cut(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["other text", *["same words here"] * 50, "words"])
    BM25().build(collection, tmp_path / "bm25")
    engine = BM25.open(tmp_path / "bm25")
    hits = engine.search(["same words"], 7)[0]
    np.testing.assert_array_equal(hits.rows, np.arange(1, 8))


def test_without_a_common_word_there_are_no_hits(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["", "the of and", "iron rusts", "!!"])
    BM25().build(collection, tmp_path / "bm25")
    engine = BM25.open(tmp_path / "bm25")
    for hits in engine.search(["", "zebra", "the of", "?!"], 10):
        assert len(hits.rows) == len(hits.scores) == 0
    np.testing.assert_array_equal(engine.search(["rust"], 10)[0].rows, [2])
    assert engine.search([], 10) == []
    assert len(engine.search(["iron"], 0)[0].rows) == 0


def test_hits_do_not_depend_on_batches_or_threads(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BM25(language="none").build(collection, tmp_path / "bm25")
    queries = random_texts(150, seed=1)
    together = BM25.open(tmp_path / "bm25", threads=1).search(queries, 20)
    monkeypatch.setattr(postings, "POSTINGS_A_BLOCK", 500)
    threaded = BM25.open(tmp_path / "bm25", threads=3).search(queries, 20)
    engine = BM25.open(tmp_path / "bm25")
    alone = [engine.search([query], 20)[0] for query in queries]
    for first, second, third in zip(together, threaded, alone, strict=True):
        for other in (second, third):
            np.testing.assert_array_equal(first.rows, other.rows)
            np.testing.assert_array_equal(first.scores, other.scores)


def test_sorting_in_small_parts_makes_the_same_files(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BM25().build(collection, tmp_path / "whole")
    monkeypatch.setattr(bm25, "POSTINGS_AT_ONCE", 37)
    BM25().build(collection, tmp_path / "parts")
    for name in (bm25.DATA, bm25.INDICES, bm25.INDPTR):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not list(tmp_path.glob("**/*.raw"))


def test_an_index_is_built_once_for_its_settings(collection: Collection, tmp_path: Path) -> None:
    first = BM25().build(collection, tmp_path / "bm25")
    stamp = (first.path / bm25.DATA).stat().st_mtime_ns
    assert BM25().build(collection, tmp_path / "bm25").fingerprint == first.fingerprint
    assert (first.path / bm25.DATA).stat().st_mtime_ns == stamp
    other = BM25(k1=2.0).build(collection, tmp_path / "bm25")
    assert other.fingerprint != first.fingerprint
    assert BM25.open(tmp_path / "bm25").k1 == 2.0


def test_stemming_and_stop_words_follow_the_language(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["Die Häuser der Stadt", "Ein Baum"])
    BM25(language="german").build(collection, tmp_path / "bm25")
    engine = BM25.open(tmp_path / "bm25")
    assert engine.language == "german"
    np.testing.assert_array_equal(engine.search(["Haus"], 5)[0].rows, [0])
    assert len(engine.search(["der die"], 5)[0].rows) == 0


def test_errors_say_what_to_do(make_collection: Any, collection: Collection, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stemmer for the language 'klingon'"):
        BM25(language="klingon").build(collection, tmp_path / "bm25")
    with pytest.raises(RankdistillError, match="no index yet"):
        BM25().search(["word1"], 5)
    with pytest.raises(RankdistillError, match="there is no bm25 here"):
        BM25.open(tmp_path / "nowhere")
    with pytest.raises(RankdistillError, match="no document holds a word"):
        BM25().build(make_collection(["", "the"]), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    with pytest.raises(UsageError, match="b between 0 and 1"):
        BM25(b=1.5)
    BM25().build(collection, tmp_path / "bm25")
    (tmp_path / "bm25" / bm25.DATA).write_bytes(b"\x93NUMPY")
    with pytest.raises(RankdistillError, match="bm25 artifact is damaged"):
        BM25.open(tmp_path / "bm25")


def test_all_marks_of_unicode_are_looked_for() -> None:
    assert not {n for n in range(sys.maxunicode) if unicodedata.category(chr(n))[0] == "M"} - set(bm25.MARKS)


def test_nfcorpus_reaches_the_published_quality(shared_data: Path, tmp_path: Path) -> None:
    import pytrec_eval

    from rankdistill.collections import open_collection

    collection = open_collection(f"beir:{shared_data / 'beir' / 'nfcorpus'}")
    BM25().build(collection, tmp_path / "bm25")
    ids = collection.query_ids("test")
    hits = BM25.open(tmp_path / "bm25").search(collection.query_texts(ids), 100)
    run = {
        query_id: dict(zip(collection.doc_ids(found.rows), found.scores.tolist(), strict=True))
        for query_id, found in zip(ids, hits, strict=True)
    }
    measured = pytrec_eval.RelevanceEvaluator(collection.qrels("test"), {"ndcg_cut_10"}).evaluate(run)
    assert 0.317 <= sum(query["ndcg_cut_10"] for query in measured.values()) / len(ids) <= 0.325


@pytest.mark.parametrize(
    ("language", "texts", "queries"),
    [
        (
            "none",
            ["北京是中国的首都", "上海是最大的城市", "长城在北方", "我喜欢喝茶"],
            ["首都", "城市", "长城", "喝茶"],
        ),
        ("hindi", ["दिल्ली भारत की राजधानी है", "मुंबई सबसे बड़ा शहर है", "गंगा एक नदी है"], ["राजधानी", "शहर", "नदी"]),
        ("none", ["நதி நீளமானது", "மலை உயரமானது", "கடல் ஆழமானது"], ["நதி", "மலை", "கடல்"]),
        ("none", ["cafe\u0301 noir", "the\u0301 vert", "eau"], ["caf\u00e9", "th\u00e9", "EAU"]),
        ("none", ["caf\u00e9 noir", "th\u00e9 vert", "İstanbul"], ["CAFE\u0301", "the\u0301", "İstanbul"]),
    ],
)
def test_marks_belong_to_words_and_ideographs_are_words(
    make_collection: Any, tmp_path: Path, language: str, texts: list[str], queries: list[str]
) -> None:
    BM25(language=language).build(make_collection(texts), tmp_path / "bm25")
    hits = BM25.open(tmp_path / "bm25").search(queries, 1)
    assert [found.rows.tolist() for found in hits] == [[row] for row in range(len(queries))]


def test_clauses_that_are_terms_are_warned_of(
    make_collection: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BM25().build(make_collection(["ฉันชอบดื่มชาในตอนเช้า", "กรุงเทพเป็นเมืองหลวงของไทย"]), tmp_path / "th")
    assert "most terms are whole clauses" in (said := capsys.readouterr().err) and "lucene_bm25" in said
    BM25(language="german").build(
        make_collection(["Donaudampfschifffahrt ist ein Wort unter vielen kurzen"]), tmp_path / "de"
    )
    assert "clauses" not in capsys.readouterr().err


def test_a_source_that_finds_nothing_is_named(
    make_collection: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection = make_collection(["one word", "two words"], ["words", "nothing", "of it"])
    BM25().build(collection, tmp_path / "bm25")
    mine(collection, [Source(BM25.open(tmp_path / "bm25"))], tmp_path / "mined")
    assert "bm25 finds nothing for 2 of 3 queries" in capsys.readouterr().err
