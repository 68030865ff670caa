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
from typing import TYPE_CHECKING, Any

from rankdistill.artifacts import Artifact, find_artifact, fingerprint, locked, open_artifact, write_artifact
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes import jvm
from rankdistill.indexes.base import Hits, no_hits
from rankdistill.indexes.lucene import CONTENTS, LuceneReader, LuceneWriter, java_text, search_all
from rankdistill.indexes.sources import BM25Source
from rankdistill.progress import progress

if TYPE_CHECKING:
    from rankdistill.collections import Collection

KIND = "lucene_bm25"
FILES = "index"  # Lucene's files, in a folder of their own

# Lucene's analyzers by Snowball's names of languages; `none`: lower-cased words as they are
ANALYZERS = {
    "arabic": "ar.ArabicAnalyzer",
    "armenian": "hy.ArmenianAnalyzer",
    "bengali": "bn.BengaliAnalyzer",
    "basque": "eu.BasqueAnalyzer",
    "catalan": "ca.CatalanAnalyzer",
    "chinese": "cjk.CJKAnalyzer",
    "danish": "da.DanishAnalyzer",
    "dutch": "nl.DutchAnalyzer",
    "estonian": "et.EstonianAnalyzer",
    "finnish": "fi.FinnishAnalyzer",
    "french": "fr.FrenchAnalyzer",
    "german": "de.GermanAnalyzer",
    "greek": "el.GreekAnalyzer",
    "hindi": "hi.HindiAnalyzer",
    "hungarian": "hu.HungarianAnalyzer",
    "indonesian": "id.IndonesianAnalyzer",
    "irish": "ga.IrishAnalyzer",
    "italian": "it.ItalianAnalyzer",
    "japanese": "cjk.CJKAnalyzer",
    "korean": "cjk.CJKAnalyzer",
    "lithuanian": "lt.LithuanianAnalyzer",
    "norwegian": "no.NorwegianAnalyzer",
    "persian": "fa.PersianAnalyzer",
    "portuguese": "pt.PortugueseAnalyzer",
    "romanian": "ro.RomanianAnalyzer",
    "russian": "ru.RussianAnalyzer",
    "serbian": "sr.SerbianAnalyzer",
    "spanish": "es.SpanishAnalyzer",
    "swedish": "sv.SwedishAnalyzer",
    "thai": "th.ThaiAnalyzer",
    "turkish": "tr.TurkishAnalyzer",
}


class LuceneBM25:
    """An engine that ranks by Lucene's BM25.

    Args:
        k1: how soon further occurrences of a term stop counting.
        b: how much long documents are marked down, 0 to 1.
        language: which of Lucene's analyzers: "english" (Anserini's), "german", "french" … or "none" for words as
            they are.
        threads: for searching; 0 = all.
    """

    name = "BM25, Lucene"

    def __init__(self, k1: float = 0.9, b: float = 0.4, language: str = "english", threads: int = 0) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise UsageError(f"k1 should be at least 0 and b between 0 and 1, not {k1} and {b}", where=KIND)
        if language not in ("english", "none", *ANALYZERS):
            raise UsageError(
                f"Lucene has no analyzer for the language {language!r}",
                where=f"{KIND}.language",
                fix=f"one of: none, english, {', '.join(ANALYZERS)}",
            )
        self.k1, self.b, self.language, self.threads = float(k1), float(b), language, threads
        self.path: Path | None = None  # of the opened index
        self.document_count = 0
        self._fingerprint = ""
        self._reader: LuceneReader | None = None
        self._queries: Any = None
        self._analyzer: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"k1": self.k1, "b": self.b, "language": self.language}

    @property
    def fingerprint(self) -> str:
        """Of the opened index."""
        if self.path is None:
            raise _unopened()
        return self._fingerprint

    def fingerprint_for(self, collection: Collection) -> str:
        return fingerprint([KIND, 2, self.settings, collection.fingerprint])

    @property
    def bytes(self) -> int:
        """Size of the opened index: Lucene's files, document ids among them."""
        return self._reader.bytes if self._reader is not None else 0

    def __repr__(self) -> str:
        opened = f", {self.document_count} documents" if self.path else ""
        return f"LuceneBM25(k1={self.k1}, b={self.b}, language={self.language!r}{opened})"

    def build(self, collection: Collection, path: str | Path) -> Artifact:
        """Index a collection's documents (title and text); an index of the same settings and content is kept.

        Raises:
            RankdistillError: the extra `lucene` or a fit Java is missing; no document holds a word; the disk is full.
        """
        path = Path(path)
        wanted = self.fingerprint_for(collection)
        with locked(path):
            found = find_artifact(path, KIND, wanted)
            if found is not None:
                return found
            jvm.start()
            inputs = {"collection": collection.fingerprint}
            with write_artifact(path, kind=KIND, fingerprint=wanted, settings=self.settings, inputs=inputs) as writer:
                self._write(collection, writer.path / FILES)
                writer.counts.update(self._counts(writer.path / FILES, collection))
            return open_artifact(path, KIND)

    def _write(self, collection: Collection, folder: Path) -> None:
        folder.mkdir()
        writer = LuceneWriter(folder, self._analysis(), self._similarity())
        try:
            with progress("BM25 in Lucene", collection.document_count, "documents") as bar:
                for first, texts in collection.iter_documents():
                    ids = collection.doc_ids(range(first, first + len(texts)))
                    for doc_id, text in zip(ids, texts, strict=True):
                        writer.add(doc_id, unicodedata.normalize("NFC", text))
                    bar.advance(len(texts))
        except BaseException:
            writer.abandon()
            raise
        writer.finish()

    def _counts(self, folder: Path, collection: Collection) -> dict[str, Any]:
        reader = LuceneReader(folder, self._similarity(), collection.document_count)
        filled = int(reader.reader.getDocCount(CONTENTS))
        words = int(reader.reader.getSumTotalTermFreq(CONTENTS))
        reader.reader.close()
        if not filled:
            raise RankdistillError(
                "no document holds a word to index", where=collection.name, fix="check the collection, or the language"
            )
        return {
            "documents": collection.document_count,
            "empty_documents": collection.document_count - filled,
            "mean_length": words / filled,
            "bytes": reader.bytes,
        }

    @classmethod
    def open(cls, path: str | Path, threads: int = 0) -> LuceneBM25:
        """Open a built index, memory-mapped by Lucene.

        Raises:
            RankdistillError: there is no whole index at `path`; the extra `lucene` or a fit Java is missing.
        """
        artifact = open_artifact(path, KIND)
        jvm.start()
        engine = cls(**artifact.manifest["settings"], threads=threads)
        engine.document_count = int(artifact.counts["documents"])
        engine._reader = LuceneReader(artifact.path / FILES, engine._similarity(), engine.document_count)
        engine._queries = jvm.load("io.anserini.search.query.BagOfWordsQueryGenerator")()
        engine._analyzer = engine._analysis()
        engine.path = artifact.path
        engine._fingerprint = artifact.fingerprint
        return engine

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The `k` best documents of each query; documents that share no term with it are not hits.

        A query is a bag of words: no character of it is an operator.
        """
        if self._reader is None:
            raise _unopened()
        if k < 1:
            return [no_hits() for _ in queries]
        reader, build, analyzer = self._reader, self._queries.buildQuery, self._analyzer
        k = min(k, max(1, self.document_count))

        def one(text: str) -> Hits:
            return reader.hits(build(CONTENTS, analyzer, java_text(unicodedata.normalize("NFC", text))), k)

        with jvm.calls(str(self.path)):
            return search_all(one, queries, self.threads)

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


def _unopened() -> RankdistillError:
    return RankdistillError("this BM25 has no index yet", fix="build(collection, path), then LuceneBM25.open(path)")
