"""BM25 over an embedded index: bm25s's tokens, formula and files, built and searched in bounded memory.

Score (Lucene's variant, as in bm25s), summed over the terms of a query:
    ln(1 + (N - df + 0.5) / (df + 0.5)) · tf / (tf + k1 · (1 - b + b · length / mean length))
Source: Lù, "BM25S: orders of magnitude faster lexical search via eager sparse scoring", arXiv 2407.03618.

bm25s indexes a list of Python lists and breaks ties by chance. So postings are streamed to disk and sorted there, and
queries are multiplied with the memory-mapped postings (postings.py). `bm25s.BM25.load(path, mmap=True)` opens them.

What grows while indexing: the vocabulary (some 300 bytes a distinct word) and 4 bytes a document; on disk 16 bytes a
posting meanwhile, 8 after.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import MANIFEST, Artifact, fingerprint, obtain, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Hits
from rankdistill.indexes.postings import POSTINGS_AT_ONCE, Postings, Triples, open_csr, write_postings
from rankdistill.progress import progress, warn

# bm25s's file names
DATA, INDICES, INDPTR = "data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy"
TOKENS = 2  # of the way texts become terms, here and in Lucene; a change makes every index stale
MARKS = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))  # all of Unicode's that are marks lie here
# Han and Hiragana are written without spaces: a character is a term, as in Lucene's StandardTokenizer (UAX 29).
IDEOGRAPH = "\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LONG_TERM = 15  # characters: where half of a collection's terms have as many, they are clauses
# Thai, Lao, Tibetan, Burmese and Khmer are written without spaces too, and no rule of characters parts their words.
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]")
VOCABULARY, PARAMETERS = "vocab.index.json", "params.index.json"


class LexicalEngine(ABC):
    """An engine that ranks by BM25: `build` an index, then `open` it.

    Args:
        k1: how soon further occurrences of a term stop counting.
        b: how much long documents are marked down, 0 to 1.
        language: stop words and stemmer: "english", "german", "french" … or "none" for neither.
        threads: for searching; 0 = all.
    """

    kind: ClassVar[str]
    name: str

    def __init__(self, k1: float = 0.9, b: float = 0.4, language: str = "english", threads: int = 0) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise UsageError(f"k1 should be at least 0 and b between 0 and 1, not {k1} and {b}", where=self.kind)
        self.k1, self.b, self.language, self.threads = float(k1), float(b), language, threads
        self.artifact: Artifact | None = None  # the opened index

    @property
    def settings(self) -> dict[str, Any]:
        return {"k1": self.k1, "b": self.b, "language": self.language}

    @property
    def opened(self) -> Artifact:
        if self.artifact is None:
            fix = f"build(collection, path), then {type(self).__name__}.open(path)"
            raise RankdistillError("this BM25 has no index yet", fix=fix)
        return self.artifact

    @property
    def path(self) -> Path | None:
        return self.artifact.path if self.artifact is not None else None

    @property
    def fingerprint(self) -> str:
        """Of the opened index."""
        return self.opened.fingerprint

    @property
    def document_count(self) -> int:
        return int(self.opened.counts["documents"])

    def fingerprint_for(self, collection: Collection) -> str:
        return fingerprint([self.kind, TOKENS, self.settings, collection.fingerprint])

    def __repr__(self) -> str:
        opened = f", {self.document_count} documents" if self.artifact else ""
        return f"{type(self).__name__}(k1={self.k1}, b={self.b}, language={self.language!r}{opened})"

    def build(self, collection: Collection, path: str | Path) -> Artifact:
        """Index a collection's documents (title and text); an index of the same settings and content is kept."""
        return obtain(
            path,
            kind=self.kind,
            fingerprint=self.fingerprint_for(collection),
            settings=self.settings,
            inputs={"collection": collection.fingerprint},
            make=lambda writer: writer.counts.update(self._write(collection, writer.path)),
        )

    @classmethod
    def open(cls, path: str | Path, threads: int = 0) -> Self:
        """Open a built index, memory-mapped."""
        artifact = open_artifact(path, cls.kind)
        engine = cls(**artifact.manifest["settings"], threads=threads)
        engine._read(artifact)
        engine.artifact = artifact
        return engine

    @property
    def bytes(self) -> int:
        """Of the opened index's files."""
        if self.artifact is None:
            return 0
        files = (path for path in self.artifact.path.rglob("*") if path.is_file() and path.name != MANIFEST)
        return sum(path.stat().st_size for path in files)

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The `k` best documents of each query; documents that share no term with it are not hits."""

    @abstractmethod
    def _write(self, collection: Collection, folder: Path) -> dict[str, Any]:
        """Write the index; its counts."""

    @abstractmethod
    def _read(self, artifact: Artifact) -> None: ...


def no_words(collection: Collection) -> RankdistillError:
    fix = "check the collection, or the language"
    return RankdistillError("no document holds a word to index", where=collection.name, fix=fix)


class BM25(LexicalEngine):
    """BM25 over bm25s's files; `language` is one of Snowball's names."""

    kind = name = "bm25"

    # -- building -----------------------------------------------------------------------------------------------------

    def _write(self, collection: Collection, folder: Path) -> dict[str, Any]:
        tokenizer = _tokenizer(self.language)
        lengths: list[NDArray[np.int32]] = []
        frequencies = np.zeros(1024, np.int64)  # documents a term occurs in; doubled as the vocabulary grows
        raw = folder / "postings.raw"
        with open(raw, "wb") as stream, progress("BM25", collection.document_count, "documents") as bar:
            for first_row, texts in collection.iter_documents(batch_size=1024):
                tokens = [np.asarray(ids, np.int64) for ids in _tokens(tokenizer, texts, learn=True)]
                lengths.append(np.fromiter((len(ids) for ids in tokens), np.int32, len(tokens)))
                rows = np.repeat(np.arange(first_row, first_row + len(texts)), lengths[-1])
                pairs, counts = np.unique(rows << 32 | np.concatenate(tokens), return_counts=True)
                terms = pairs & 0xFFFFFFFF
                while terms.max(initial=0) >= len(frequencies):
                    frequencies = np.concatenate([frequencies, np.zeros_like(frequencies)])
                np.add.at(frequencies, terms, 1)
                np.stack([terms, pairs >> 32, counts], axis=1).astype(np.int32).tofile(stream)
                bar.advance(len(texts))
        vocabulary = _vocabulary(tokenizer)
        document_lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int32)
        frequencies = frequencies[: len(vocabulary)]
        if not frequencies.sum():
            raise no_words(collection)
        self._sort_postings(raw, folder, frequencies, document_lengths)
        raw.unlink()
        _warn_of_clauses(vocabulary, frequencies, collection.name)
        (folder / VOCABULARY).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        documents = len(document_lengths)
        parameters = {"k1": self.k1, "b": self.b, "delta": 0.5, "method": "lucene", "idf_method": "lucene"}
        parameters |= {"dtype": "float32", "int_dtype": "int32", "num_docs": documents, "backend": "numpy"}
        (folder / PARAMETERS).write_text(json.dumps(parameters), encoding="utf-8")
        return {
            "documents": documents,
            "terms": len(vocabulary),
            "postings": int(frequencies.sum()),
            "empty_documents": int((document_lengths == 0).sum()),
            "mean_length": float(document_lengths.mean()),
        }

    def _sort_postings(
        self, raw: Path, folder: Path, frequencies: NDArray[np.int64], lengths: NDArray[np.int32]
    ) -> None:
        """The raw postings (by document), weighted, in bm25s's column-wise arrays (by term, then document)."""
        idf, norm = bm25_factors(frequencies, lengths, self.k1, self.b)
        postings = np.memmap(raw, np.int32, "r").reshape(-1, 3)

        def weighted() -> Iterator[Triples]:
            for start in range(0, len(postings), POSTINGS_AT_ONCE):
                terms, rows, counts = np.asarray(postings[start : start + POSTINGS_AT_ONCE]).T
                yield terms, rows, idf[terms] * counts / (counts + norm[rows])

        write_postings(folder, (DATA, INDICES, INDPTR), frequencies, weighted())

    # -- searching ----------------------------------------------------------------------------------------------------

    def _read(self, artifact: Artifact) -> None:
        try:
            matrix = open_csr(artifact.path, (DATA, INDICES, INDPTR), int(artifact.counts["documents"]))
            vocabulary = json.loads((artifact.path / VOCABULARY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RankdistillError(f"the BM25 index cannot be read: {error}", where=str(artifact.path)) from None
        self._postings = Postings(matrix, self.threads)
        self._tokenizer = _tokenizer(self.language, vocabulary)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        assert self.opened
        return self._postings.search(self.encode_queries(queries), k)

    def encode_documents(self, texts: Sequence[str]) -> Any:
        """csr_matrix [texts, terms]: weights of any texts, by the statistics of the collection that is indexed.

        The product with `encode_queries` is the score that a search gives, to documents without a common term too.
        """
        mean_length = float(self.opened.counts["mean_length"])
        frequencies = np.diff(self._postings.matrix.indptr)
        vectors = self.encode_queries(texts)
        lengths = np.asarray(vectors.sum(axis=1), np.float64).ravel()
        idf, norm = bm25_factors(frequencies, lengths, self.k1, self.b, self.document_count, mean_length)
        counts = vectors.data.astype(np.float64)
        rows = np.repeat(norm, np.diff(vectors.indptr))
        vectors.data = (idf[vectors.indices] * counts / (counts + rows)).astype(np.float32)
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> Any:
        """csr_matrix [texts, terms]: how often each term of the index occurs."""
        from scipy import sparse

        assert self.opened
        terms = self._postings.terms
        if not texts:
            return sparse.csr_matrix((0, terms), dtype=np.float32)
        tokens = [np.asarray(ids, np.int64) for ids in _tokens(self._tokenizer, texts, learn=False)]
        ends = np.cumsum([0, *map(len, tokens)])
        counts = sparse.csr_matrix((np.ones(ends[-1], np.float32), np.concatenate(tokens), ends), (len(texts), terms))
        counts.sum_duplicates()
        return counts


def bm25_factors(
    frequencies: NDArray[np.int64],
    lengths: NDArray[Any],
    k1: float,
    b: float,
    documents: int | None = None,
    mean_length: float | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """([terms] idf, [documents] what is added to tf below the fraction): a weight is idf · tf / (tf + norm).

    Args:
        frequencies: documents a term occurs in.
        lengths: terms a document.
        documents, mean_length: of the collection, where `lengths` are those of other texts.
    """
    documents = len(lengths) if documents is None else documents
    mean_length = float(lengths.mean()) if mean_length is None else mean_length
    idf = np.log(1 + (documents - frequencies + 0.5) / (frequencies + 0.5))
    return idf, k1 * (1 - b + b * lengths / mean_length)


def _tokenizer(language: str, vocabulary: dict[str, int] | None = None) -> Any:
    """bm25s's tokenizer with the language's stop words and Snowball stemmer."""
    from bm25s.tokenization import Tokenizer

    stemmer = None
    if language != "none":
        try:
            import Stemmer
        except ModuleNotFoundError:
            what = f"BM25 in {language} needs the stemmer PyStemmer, which is not installed"
            raise RankdistillError(what, fix="pip install PyStemmer, or language: none") from None
        if language not in (known := Stemmer.algorithms()):
            fix = f"one of: none, {', '.join(sorted(known))}"
            raise UsageError(f"there is no stemmer for the language {language!r}", where="bm25.language", fix=fix)
        stemmer = Stemmer.Stemmer(language)
    try:
        tokenizer = Tokenizer(splitter=_splitter(), stopwords=language if stemmer else None, stemmer=stemmer)
    except ValueError:  # a stemmer, but no list of stop words
        tokenizer = Tokenizer(splitter=_splitter(), stopwords=None, stemmer=stemmer)
    _vocabulary(tokenizer).update(vocabulary or {})
    return tokenizer


@cache
def _splitter() -> Callable[[str], list[str]]:
    """bm25s's terms, two word characters or more, but with the marks that belong to them (vowel signs of Indic and Thai
    script, accents that have no composed form, joiners), and ideographs one by one."""
    marks = (code for code in MARKS if unicodedata.category(chr(code))[0] == "M")
    runs = [[code for _, code in run] for _, run in groupby(enumerate(marks), lambda pair: pair[1] - pair[0])]
    word = r"\w\u200c\u200d" + "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
    return re.compile(f"[{IDEOGRAPH}]|(?:(?![{IDEOGRAPH}])[{word}]){{2,}}").findall


def _warn_of_clauses(vocabulary: dict[str, int], frequencies: NDArray[np.int64], name: str) -> None:
    long = [term for term in vocabulary if len(term) >= LONG_TERM or (len(term) > 5 and UNSPACED.search(term))]
    share = frequencies[[vocabulary[term] for term in long]].sum() / frequencies.sum() if long else 0
    if share > 0.5:
        warn(
            f"BM25 of {name}: most terms are whole clauses, such as {long[0][:40]!r}: no spaces set words apart, so "
            "queries will find little. Use the source lucene_bm25 with the language (thai, chinese, japanese ...)"
        )


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizer.word_to_id if tokenizer.stemmer is None else tokenizer.stem_to_sid
    return vocabulary


def _tokens(tokenizer: Any, texts: Sequence[str], learn: bool) -> Iterator[list[int]]:
    # Composed, so that é in one letter or in two is one term; lower case first, since İ comes apart there.
    texts = [unicodedata.normalize("NFC", text.lower()) for text in texts]
    # allow_empty=False: otherwise an empty query would match every empty document on a token "".
    ids: Iterator[list[int]] = tokenizer.streaming_tokenize(texts, update_vocab=learn, allow_empty=False)
    return ids
