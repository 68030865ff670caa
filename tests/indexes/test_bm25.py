from __future__ import annotations

import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.indexes import bm25
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.mining import Source, mine

if TYPE_CHECKING:
    from rankdistill.collections import Collection

WORDS = [f"word{number}" for number in range(60)]


@pytest.fixture
def collection(make_collection: Any) -> Collection:
    rng = np.random.default_rng(0)
    return make_collection([" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(300)])  # type: ignore[no-any-return]


def test_plain_bm25s_opens_the_files_and_gives_the_same_scores(collection: Collection, tmp_path: Path) -> None:
    import bm25s

    BM25(language="none").build(collection, tmp_path / "bm25")
    theirs = bm25s.BM25.load(tmp_path / "bm25", mmap=True)
    hits = BM25.open(tmp_path / "bm25").search(["word3 word4"], 300)[0]
    scores = theirs.get_scores(["word3", "word4"])
    np.testing.assert_allclose(hits.scores, scores[hits.rows], rtol=1e-6)
    assert len(hits.rows) == (scores > 0).sum()
    built_by_bm25s = bm25s.BM25(k1=0.9, b=0.4)
    tokens = bm25s.tokenize(collection.document_texts(range(300)), stopwords=None, show_progress=False)
    built_by_bm25s.index(tokens, show_progress=False)
    np.testing.assert_allclose(scores, built_by_bm25s.get_scores(["word3", "word4"]), rtol=1e-5)


def test_sorting_in_small_parts_makes_the_same_files(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BM25().build(collection, tmp_path / "whole")
    monkeypatch.setattr(bm25, "POSTINGS_AT_ONCE", 37)
    BM25().build(collection, tmp_path / "parts")
    for name in (bm25.DATA, bm25.INDICES, bm25.INDPTR):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not list(tmp_path.glob("**/*.raw"))


def test_stemming_and_stop_words_follow_the_language(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["Die Häuser der Stadt", "Ein Baum"])
    BM25(language="german").build(collection, tmp_path / "bm25")
    engine = BM25.open(tmp_path / "bm25")
    assert engine.language == "german"
    np.testing.assert_array_equal(engine.search(["Haus"], 5)[0].rows, [0])
    assert len(engine.search(["der die"], 5)[0].rows) == 0


def test_all_marks_of_unicode_are_looked_for() -> None:
    assert not {n for n in range(sys.maxunicode) if unicodedata.category(chr(n))[0] == "M"} - set(bm25.MARKS)


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
    assert [each.rows.tolist() for each in hits] == [[row] for row in range(len(queries))]


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
