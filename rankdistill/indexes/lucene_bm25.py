"""BM25 in Lucene, through pyserini's jar (extra `lucene`): the figures that papers print as "BM25 (Anserini)".

Tokens, stop words and stemmer are Anserini's (Lucene's StandardTokenizer, its 33 English stop words, Porter), the
similarity is Lucene's BM25Similarity with Anserini's k1 = 0.9 and b = 0.4. Two things set it apart from bm25.py's:
tokens, and a document's length, which Lucene keeps in one byte (exact up to 39 words, in steps of an eighth to a
sixteenth of itself above).

The index opens with plain `pyserini.search.lucene.LuceneSearcher`; a document without a word, which Anserini leaves
out, is in it without changing a score.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankdistill.artifacts import Artifact
from rankdistill.collections import Collection
from rankdistill.errors import UsageError
from rankdistill.indexes import jvm
from rankdistill.indexes.base import Hits, no_hits
from rankdistill.indexes.bm25 import LexicalEngine, no_words
from rankdistill.indexes.lucene import CONTENTS, LuceneReader, LuceneWriter, java_text, search_all
from rankdistill.indexes.sources import BM25Source
from rankdistill.progress import progress

FILES = "index"  # Lucene's files, in a folder of their own

# Lucene's packages of analyzers by Snowball's names of languages; `none`: lower-cased words as they are
LANGUAGES = """
arabic ar, armenian hy, bengali bn, basque eu, catalan ca, chinese cjk, danish da, dutch nl, estonian et, finnish fi,
french fr, german de, greek el, hindi hi, hungarian hu, indonesian id, irish ga, italian it, japanese cjk, korean cjk,
lithuanian lt, norwegian no, persian fa, portuguese pt, romanian ro, russian ru, serbian sr, spanish es, swedish sv,
thai th, turkish tr
"""
ANALYZERS = {
    language: f"{code}.{'CJK' if code == 'cjk' else language.title()}Analyzer"
    for language, code in (pair.split() for pair in LANGUAGES.split(","))
}


class LuceneBM25(LexicalEngine):
    """BM25 in Lucene; `language` is one of ANALYZERS, "english" (Anserini's), or "none" for words as they are."""

    kind, name = "lucene_bm25", "BM25, Lucene"

    def __init__(self, k1: float = 0.9, b: float = 0.4, language: str = "english", threads: int = 0) -> None:
        super().__init__(k1, b, language, threads)
        if language not in ("english", "none", *ANALYZERS):
            fix = f"one of: none, english, {', '.join(ANALYZERS)}"
            what = f"Lucene has no analyzer for the language {language!r}"
            raise UsageError(what, where=f"{self.kind}.language", fix=fix)

    def _write(self, collection: Collection, folder: Path) -> dict[str, Any]:
        jvm.start()
        with (
            LuceneWriter(folder / FILES, self._analysis(), self._similarity()) as writer,
            progress("BM25 in Lucene", collection.document_count, "documents") as bar,
        ):
            for first, texts in collection.iter_documents():
                ids = collection.doc_ids(range(first, first + len(texts)))
                for doc_id, text in zip(ids, texts, strict=True):
                    writer.add(doc_id, unicodedata.normalize("NFC", text))
                bar.advance(len(texts))
        reader = LuceneReader(folder / FILES, self._similarity(), collection.document_count)
        filled = int(reader.reader.getDocCount(CONTENTS))
        words = int(reader.reader.getSumTotalTermFreq(CONTENTS))
        reader.reader.close()
        if not filled:
            raise no_words(collection)
        return {
            "documents": collection.document_count,
            "empty_documents": collection.document_count - filled,
            "mean_length": words / filled,
            "bytes": reader.bytes,
        }

    def _read(self, artifact: Artifact) -> None:
        jvm.start()
        self._reader = LuceneReader(artifact.path / FILES, self._similarity(), int(artifact.counts["documents"]))
        self._queries = jvm.load("io.anserini.search.query.BagOfWordsQueryGenerator")()
        self._analyzer = self._analysis()

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """As every lexical engine's. A query is a bag of words: no character of it is an operator."""
        where = str(self.opened.path)
        if k < 1:
            return [no_hits() for _ in queries]
        reader, build, analyzer = self._reader, self._queries.buildQuery, self._analyzer
        k = min(k, max(1, self.document_count))

        def search_one(text: str) -> Hits:
            return reader.hits(build(CONTENTS, analyzer, java_text(unicodedata.normalize("NFC", text))), k)

        with jvm.calls(where):
            return search_all(search_one, queries, self.threads)

    def _analysis(self) -> Any:
        if self.language == "english":
            return jvm.load("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
        if self.language == "none":
            return jvm.load("org.apache.lucene.analysis.standard.StandardAnalyzer")()
        return jvm.load(f"org.apache.lucene.analysis.{ANALYZERS[self.language]}")()

    def _similarity(self) -> Any:
        return jvm.load("org.apache.lucene.search.similarities.BM25Similarity")(self.k1, self.b)


class LuceneBM25Source(BM25Source):
    """BM25 in Lucene over the collection's texts (extra `lucene`).

    Args:
        language: which of Lucene's analyzers, or "none".
    """

    type = "lucene_bm25"
    engine_class = LuceneBM25
