from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes import lucene
from rankdistill.indexes.lucene import java_text
from rankdistill.indexes.lucene_bm25 import FILES, LuceneBM25
from rankdistill.recipe import build

if TYPE_CHECKING:
    from rankdistill.collections import Collection

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number}" for number in range(60)]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 400 words: Lucene keeps lengths above 39 inexactly."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 400))) for _ in range(count)]


def kept_length(length: int) -> int:
    """What Lucene's byte keeps of a document's length (SmallFloat: exact below 40, above in 4 bits)."""
    if length < 40:
        return length
    rest = length - 24
    shift = max(0, rest.bit_length() - 4)
    return 24 + (rest >> shift << shift)


def slow_bm25(texts: list[str], query: str, k1: float, b: float) -> np.ndarray:
    """Lucene's BM25, term by term in double precision, over lengths as Lucene keeps them."""
    documents = [re.findall(r"\w+", text.lower()) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(texts))
    for term in re.findall(r"\w+", query.lower()):
        holding = sum(term in document for document in documents)
        for row, document in enumerate(documents):
            tf = document.count(term)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            scores[row] += idf * tf / (tf + k1 * (1 - b + b * kept_length(len(document)) / mean))
    return scores


def opened(collection: Collection, path: Path, **settings: Any) -> LuceneBM25:
    LuceneBM25(**settings).build(collection, path)
    return LuceneBM25.open(path)


def test_scores_equal_an_independent_bm25_with_lucenes_lengths(make_collection: Any, tmp_path: Path) -> None:
    texts = random_texts(300)
    engine = opened(make_collection(texts), tmp_path / "bm25", k1=1.3, b=0.6, language="none")
    queries = ["word1 word2 word3", "word7", "word5 word5 word9", "Word11, WORD12!"]
    for query, hits in zip(queries, engine.search(queries, 300), strict=True):
        expected = slow_bm25(texts, query, 1.3, 0.6)
        assert len(hits.rows) == (expected > 0).sum()
        np.testing.assert_allclose(hits.scores, expected[hits.rows], rtol=1e-5)
        assert (np.diff(hits.scores) <= 0).all()
        np.testing.assert_array_equal(engine.search([query], 10)[0].rows, hits.rows[:10])
    # Lengths as they are would not do: that is what sets these scores apart from bm25.py's.
    assert not np.allclose(
        engine.search(["word7"], 300)[0].scores,
        np.sort([s for s in _with_exact_lengths(texts, "word7") if s > 0])[::-1],
        rtol=1e-3,
    )


def _with_exact_lengths(texts: list[str], query: str) -> np.ndarray:
    kept = globals()["kept_length"]
    globals()["kept_length"] = int
    try:
        return slow_bm25(texts, query, 1.3, 0.6)
    finally:
        globals()["kept_length"] = kept


def test_ties_go_by_row_also_at_the_cut(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["other text", *["same words here"] * 50, "words"])
    engine = opened(collection, tmp_path / "bm25")
    for k in (1, 7, 50, 52, 10**9):
        hits = engine.search(["same"], k)[0]
        np.testing.assert_array_equal(hits.rows, np.arange(1, 1 + min(k, 50)))
    assert len(engine.search(["same"], 0)[0].rows) == 0


def test_plain_pyserini_opens_it_and_finds_the_same(
    plain_pyserini: Any, tiny_collection: Collection, tmp_path: Path
) -> None:
    engine = opened(tiny_collection, tmp_path / "bm25")
    searcher = plain_pyserini.LuceneSearcher(str(tmp_path / "bm25" / FILES))
    searcher.set_bm25(0.9, 0.4)
    queries = tiny_collection.query_texts(tiny_collection.query_ids())
    for query, hits in zip(queries, engine.search(queries, 10), strict=True):
        theirs = searcher.search(query, 10)
        found = dict(zip(tiny_collection.doc_ids(hits.rows), hits.scores.tolist(), strict=True))
        assert found == {hit.docid: pytest.approx(hit.score, abs=1e-4) for hit in theirs}  # theirs are rounded
    # Anserini's own analysis: Porter's stems, and its stop words.
    np.testing.assert_array_equal(engine.search(["the metals"], 99)[0].rows, engine.search(["metal"], 99)[0].rows)


def test_no_character_of_a_query_is_an_operator(make_collection: Any, tmp_path: Path) -> None:
    engine = opened(make_collection(["alpha beta", "alpha", "gamma"]), tmp_path / "bm25")
    for query in (
        "alpha AND NOT beta",
        "-beta +alpha",
        'alpha^0 "beta alpha"~2',
        "contents: alpha OR [a TO z]",
        "al\\pha alpha*",
    ):
        assert 0 in engine.search([query], 5)[0].rows and 2 not in engine.search([query], 5)[0].rows
    for query in ("", "  ", "?!*", "the of", "\0", "\ud800", "unknown"):
        assert len(engine.search([query], 5)[0].rows) == 0
    many = " ".join(f"x{number}" for number in range(3000)) + " gamma"
    np.testing.assert_array_equal(engine.search([many], 5)[0].rows, [2])


def test_long_and_foreign_texts_are_indexed_whole(make_collection: Any, tmp_path: Path) -> None:
    texts = ["filler " * 200_000 + "ending", "🦑" * 40 + " squid last", "", "x" * 70_000 + " tail", "\ud83d broken"]
    engine = opened(make_collection(texts), tmp_path / "bm25")
    for row, word in ((0, "ending"), (1, "last"), (1, "🦑"), (3, "tail"), (4, "broken")):
        assert row in engine.search([word], 5)[0].rows
    text = java_text("a🦑b\ud800")
    assert (text.length(), text.codePointCount(0, 5)) == (5, 4)


def test_threads_change_nothing(make_collection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(make_collection(random_texts(200)), tmp_path / "bm25")
    queries = [f"word{number} word{number % 7}" for number in range(60)]
    monkeypatch.setattr(lucene, "QUERIES_A_THREAD", 4)
    together = LuceneBM25.open(tmp_path / "bm25", threads=1).search(queries, 20)
    threaded = LuceneBM25.open(tmp_path / "bm25", threads=3).search(queries, 20)
    for first, second in zip(together, threaded, strict=True):
        np.testing.assert_array_equal(first.rows, second.rows)
        np.testing.assert_array_equal(first.scores, second.scores)


def test_an_index_is_built_once_for_its_settings(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["one text", "another", ""])
    first = LuceneBM25().build(collection, tmp_path / "bm25")
    assert first.counts["documents"] == 3 and first.counts["empty_documents"] == 1
    assert LuceneBM25.open(tmp_path / "bm25").bytes == first.counts["bytes"] > 500
    files = sorted((path.name, path.stat().st_mtime_ns) for path in (first.path / FILES).iterdir())
    assert LuceneBM25().build(collection, tmp_path / "bm25").fingerprint == first.fingerprint
    assert files == sorted((path.name, path.stat().st_mtime_ns) for path in (first.path / FILES).iterdir())
    assert LuceneBM25(k1=2.0).build(collection, tmp_path / "bm25").fingerprint != first.fingerprint
    assert LuceneBM25.open(tmp_path / "bm25").k1 == 2.0


def test_a_recipe_mines_from_it(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["Die Häuser der Stadt", "Ein Baum"])
    source = build("source", {"type": "lucene_bm25", "language": "german", "quota": 3})
    engine = source.open(collection, tmp_path)
    np.testing.assert_array_equal(engine.search(["Haus"], 5)[0].rows, [0])
    assert len(engine.search(["der die"], 5)[0].rows) == 0
    assert source.open(collection, tmp_path).fingerprint == engine.fingerprint and source.quota == 3


def test_errors_say_what_to_do(make_collection: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no analyzer for the language 'klingon'"):
        LuceneBM25(language="klingon")
    with pytest.raises(UsageError, match="b between 0 and 1"):
        LuceneBM25(b=1.5)
    with pytest.raises(RankdistillError, match="no index yet"):
        LuceneBM25().search(["word1"], 5)
    with pytest.raises(RankdistillError, match="there is no lucene_bm25 here"):
        LuceneBM25.open(tmp_path / "nowhere")
    with pytest.raises(RankdistillError, match="no document holds a word"):
        LuceneBM25().build(make_collection(["", "the"]), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    LuceneBM25().build(make_collection(["words"]), tmp_path / "bm25")
    for path in (tmp_path / "bm25" / FILES).glob("_*"):
        path.write_bytes(b"damaged")
    with pytest.raises(RankdistillError, match="lucene_bm25 artifact is damaged"):
        LuceneBM25.open(tmp_path / "bm25")
    for path in (tmp_path / "bm25" / FILES).iterdir():
        path.unlink()
    with pytest.raises(RankdistillError, match="lucene_bm25 artifact is damaged"):
        LuceneBM25.open(tmp_path / "bm25")


def test_searching_imports_no_model_library(make_collection: Any, tmp_path: Path) -> None:
    LuceneBM25().build(make_collection(["one text", "another"]), tmp_path / "bm25 ü")
    code = (
        "import sys\n"
        "from rankdistill.indexes.lucene_bm25 import LuceneBM25\n"
        f"print(sorted(LuceneBM25.open({str(tmp_path / 'bm25 ü')!r}).search(['another one'], 5)[0].rows.tolist()))\n"
        "print({'torch', 'transformers', 'pyserini', 'sentence_transformers'} & set(sys.modules))\n"
    )
    ending = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ending.stdout == "[0, 1]\nset()\n", ending.stderr


def test_nfcorpus_gives_the_published_figures(shared_data: Path, tmp_path: Path) -> None:
    """Anserini's regression "beir-v1.0.0-nfcorpus-flat" prints 0.3218, 0.2457 and 0.3704 (ties by id, here by row)."""
    import pytrec_eval

    from rankdistill.collections import open_collection

    collection = open_collection(f"beir:{shared_data / 'beir' / 'nfcorpus'}")
    engine = opened(collection, tmp_path / "bm25")
    ids = collection.query_ids("test")
    run = {
        # trec_eval would order ties anew, so ranks are given for scores.
        query_id: {doc_id: 1.0 / rank for rank, doc_id in enumerate(collection.doc_ids(found.rows), 1)}
        for query_id, found in zip(ids, engine.search(collection.query_texts(ids), 1000), strict=True)
    }
    published = {"ndcg_cut_10": 0.3218, "recall_100": 0.2457, "recall_1000": 0.3704}
    measured = pytrec_eval.RelevanceEvaluator(collection.qrels("test"), set(published)).evaluate(run)
    means = {metric: sum(query[metric] for query in measured.values()) / len(ids) for metric in published}
    assert means == pytest.approx(published, abs=3e-4)


def test_chinese_is_found_and_text_is_composed(make_collection: Any, tmp_path: Path) -> None:
    engine = LuceneBM25(language="chinese")
    engine.build(make_collection(["北京是中国的首都", "cafe\u0301 noir", "上海"]), tmp_path / "zh")
    hits = LuceneBM25.open(tmp_path / "zh").search(["首都", "caf\u00e9"], 3)
    assert [found.rows.tolist() for found in hits] == [[0], [1]]
