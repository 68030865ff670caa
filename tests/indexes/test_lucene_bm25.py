from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.indexes.lucene import java_text
from rankdistill.indexes.lucene_bm25 import FILES, LuceneBM25
from rankdistill.recipe import build

if TYPE_CHECKING:
    from rankdistill.collections import Collection

ROOT = Path(__file__).parents[2]


def opened(collection: Collection, path: Path, **settings: Any) -> LuceneBM25:
    LuceneBM25(**settings).build(collection, path)
    return LuceneBM25.open(path)


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


def test_a_recipe_mines_from_it(make_collection: Any, tmp_path: Path) -> None:
    collection = make_collection(["Die Häuser der Stadt", "Ein Baum"])
    source = build("source", {"type": "lucene_bm25", "language": "german", "quota": 3})
    engine = source.open(collection, tmp_path)
    np.testing.assert_array_equal(engine.search(["Haus"], 5)[0].rows, [0])
    assert len(engine.search(["der die"], 5)[0].rows) == 0
    assert source.open(collection, tmp_path).fingerprint == engine.fingerprint and source.quota == 3


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


def test_chinese_is_found_and_text_is_composed(make_collection: Any, tmp_path: Path) -> None:
    engine = LuceneBM25(language="chinese")
    engine.build(make_collection(["北京是中国的首都", "cafe\u0301 noir", "上海"]), tmp_path / "zh")
    hits = LuceneBM25.open(tmp_path / "zh").search(["首都", "caf\u00e9"], 3)
    assert [found.rows.tolist() for found in hits] == [[0], [1]]
