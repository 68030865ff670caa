"""What the Lucene engines share: writing an index in row order, and searching one with few crossings into Java.

A document's number in Lucene is its row in the collection: one thread writes, segments are merged in their order alone
and end as one. So hits need no look-up, and Lucene's rule for ties (smaller number first) is this package's.

Each call from Python into Java takes microseconds, as long as a search of a small index. A search crosses three times:
a text becomes a query, the query finds hits, the hits come back as one line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from rankdistill.errors import RankdistillError
from rankdistill.indexes import jvm
from rankdistill.indexes.base import Hits, available_threads, no_hits

CONTENTS, ID = "contents", "id"  # Anserini's names of the fields
BUFFER_MEGABYTES = 64  # of documents in the JVM's memory, before they are written
QUERIES_A_THREAD = 32
FROM_BYTES = "([BLjava/lang/String;)V"
HITS = '"scoreDocs":['


def java_text(text: str) -> Any:
    """A text as pyjnius passes it on whole: itself, or a string of Java's; half a surrogate pair becomes "?".

    pyjnius (1.9) counts characters where Java counts units of 16 bits: of a text with n characters beyond U+FFFF the
    last n are cut off.
    """
    if text.isascii() or max(text) < "\ud800":
        return text
    return jvm.load("java.lang.String")(text.encode("utf-8", "replace"), "UTF-8", signature=FROM_BYTES)


class LuceneWriter:
    """A block that writes documents (id, text) in row order, as Anserini lays them out, so that pyserini opens it.

    Args:
        folder: a new one.
        analyzer, similarity: Java objects.
    """

    def __init__(self, folder: Path, analyzer: Any, similarity: Any) -> None:
        import jnius

        def lucene(name: str) -> Any:
            return jvm.load(f"org.apache.lucene.{name}")

        folder.mkdir()
        self.folder = folder
        with jvm.calls(folder):
            settings = lucene("index.IndexWriterConfig")(analyzer)
            settings.setSimilarity(similarity)
            settings.setMergePolicy(lucene("index.LogDocMergePolicy")())  # keeps the order of rows
            settings.setRAMBufferSizeMB(float(BUFFER_MEGABYTES))
            self._directory = _open_directory(folder)
            self._writer = lucene("index.IndexWriter")(self._directory, settings)
            kind = lucene("document.FieldType")()
            kind.setIndexOptions(lucene("index.IndexOptions").DOCS_AND_FREQS)
            kind.freeze()
            nothing = jnius.cast("java.lang.CharSequence", jvm.load("java.lang.String")(""))
            # One document and its fields, filled again and again: fewer crossings.
            self._id = lucene("document.StringField")(ID, "", lucene("document.Field$Store").YES)
            self._sort_id = lucene("document.BinaryDocValuesField")(ID, lucene("util.BytesRef")(b""))
            self._contents = lucene("document.Field")(CONTENTS, nothing, kind)
            self._document = lucene("document.Document")()
            for field in (self._id, self._sort_id, self._contents):
                self._document.add(field)

    def add(self, doc_id: str, text: str) -> None:
        """The next row; also a text without a word has one."""
        self._id.setStringValue(java_text(doc_id))
        self._sort_id.setBytesValue(doc_id.encode("utf-8", "replace"))
        self._contents.setStringValue(java_text(text))
        with jvm.calls(f"{self.folder}: document {doc_id}"):
            self._writer.addDocument(self._document)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:  # what fails on the way of letting go of the files is not told
            with suppress(RankdistillError), jvm.calls(self.folder):
                self._writer.rollback()
                self._directory.close()
            return
        with jvm.calls(self.folder):
            self._writer.forceMerge(1)
            self._writer.close()
            self._directory.close()
        (self.folder / "write.lock").unlink(missing_ok=True)


class LuceneReader:
    """An opened index of so many documents.

    Raises:
        RankdistillError: there is no index, it is damaged, or holds another number of documents.
    """

    def __init__(self, folder: Path, similarity: Any, documents: int) -> None:
        if not any(folder.glob("segments_*")):
            raise RankdistillError("there are no files of a Lucene index here", where=str(folder), fix="build it again")
        with jvm.calls(folder):
            self.reader = jvm.load("org.apache.lucene.index.DirectoryReader").open(_open_directory(folder))
            self._searcher = jvm.load("org.apache.lucene.search.IndexSearcher")(
                self.reader, signature="(Lorg/apache/lucene/index/IndexReader;)V"
            )
            self._searcher.setSimilarity(similarity)
            self._searcher.setQueryCache(None)  # it holds queries that do not score
            self._searcher.setMaxClauseCount(2**31 - 1)  # of the whole JVM; else a query of 1,025 terms is refused
            self._writer, self._row, self._score = _json_writer()
            held = int(self.reader.maxDoc())
        if held != documents:
            what = f"the Lucene index holds {held:,} documents and its manifest says {documents:,}"
            raise RankdistillError(what, where=str(folder), fix="build it again")
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())

    def hits(self, query: Any, k: int) -> Hits:
        """The `k` best documents of a Java query, ties by row."""
        text = self._writer.writeValueAsString(self._searcher.search(query, k))
        start = text.index(HITS) + len(HITS)
        if text[start] == "]":
            return no_hits()
        numbers = text[start : text.index("]]", start)].replace("[", "").replace("]", "")
        hits: Any = np.fromstring(numbers, np.float64, sep=",").reshape(-1, 3)
        return Hits(hits[:, self._row].astype(np.int64), hits[:, self._score].astype(np.float32))


def _json_writer() -> tuple[Any, int, int]:
    """(what writes hits as `"scoreDocs":[[…, …, …], …]`, which of the three numbers is the row, which the score)."""
    writer = jvm.load("com.fasterxml.jackson.databind.ObjectMapper")()
    example = jvm.load("org.apache.lucene.search.ScoreDoc")(7, 0.5, 3)
    array = jvm.load("com.fasterxml.jackson.annotation.JsonFormat$Shape").ARRAY
    settings = jvm.load("com.fasterxml.jackson.annotation.JsonFormat$Value").forShape(array)
    writer.configOverride(example.getClass()).setFormat(settings)
    numbers = json.loads(writer.writeValueAsString(example))
    return writer, numbers.index(7), numbers.index(0.5)


def search_all(search_one: Callable[[Any], Hits], queries: Sequence[Any], threads: int = 0) -> list[Hits]:
    """`search_one` of each query, in several threads where there are many."""
    workers = min(threads or available_threads(), len(queries) // QUERIES_A_THREAD)
    if workers <= 1:
        return [search_one(query) for query in queries]

    def part(number: int) -> list[Hits]:
        with jvm.calls("a search"):
            return [search_one(query) for query in queries[number::workers]]

    hits: list[Hits] = [no_hits()] * len(queries)
    with ThreadPoolExecutor(workers) as pool:
        for number, some in enumerate(pool.map(part, range(workers))):
            hits[number::workers] = some
    return hits


def _open_directory(folder: Path) -> Any:
    path = jvm.load("java.nio.file.Paths").get(java_text(str(folder.resolve())))
    return jvm.load("org.apache.lucene.store.FSDirectory").open(path)
