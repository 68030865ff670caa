"""A Lucene index of a sparse student's term weights: whole numbers ("impacts") in place of term frequencies.

Laid out as Anserini lays out an impact index (ImpactSimilarity: a document's score is Σ query weight × impact), so
that plain pyserini opens it: `LuceneImpactSearcher(folder, encoder)`, whose encoder gives token → whole number.

A query's weights are whole numbers too, in steps of its highest; below half a step they count as 0. A hit's score is
brought back to the scale of the student's inner product. Sums stay exact up to 2^24; ties go by row.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.artifacts import write_atomically
from rankdistill.errors import RankdistillError
from rankdistill.indexes import jvm
from rankdistill.indexes.base import Hits, no_hits
from rankdistill.indexes.impacts import fit_quantiser, term_names
from rankdistill.indexes.lucene import CONTENTS, LuceneReader, LuceneWriter, java_text, search_all
from rankdistill.indexes.sparse_specification import LuceneImpactSpecification
from rankdistill.progress import progress

FILES = "index"  # Lucene's files, in a folder of their own
TERMS = "terms.json"
ABOUT = "lucene_impact.json"
IMPACT, NEXT = "\x01", "\x02"  # stand between a term and its impact, and between terms
OPERATORS = ("AND", "OR", "NOT", "TO")  # words of Lucene's query language
LONGEST_TERM = 32_766  # bytes in UTF-8, Lucene's limit
LARGEST_SUM = 2**31 - 1  # of a document's impacts: Lucene counts them as its length
ROWS_AT_ONCE = 4096


def build(
    specification: LuceneImpactSpecification, vectors: Any, doc_ids: Sequence[str], terms: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write the index of csr_matrix [documents, vocabulary] into a folder; what to count in its manifest.

    Raises:
        RankdistillError: the extra `lucene` or a fit Java is missing; a weight above the maximum that the specification
            refuses; two terms of one name, or one that Lucene cannot hold; a document whose impacts exceed 2^31.
    """
    names = _lucene_names(terms, specification.name)
    if (len(doc_ids), len(names)) != vectors.shape:
        rows, columns = vectors.shape
        here = f"{len(doc_ids):,} document ids and {len(names):,} terms"
        what = f"{here} for vectors of {rows:,} documents and {columns:,} terms"
        raise RankdistillError(what, where=specification.name)
    quantiser, counts = fit_quantiser(specification, vectors)
    jvm.start()
    similarity = jvm.load("io.anserini.search.similarity.ImpactSimilarity")()
    empty = 0
    with (
        LuceneWriter(folder / FILES, _analyzer(), similarity) as writer,
        progress("impacts in Lucene", vectors.shape[0], "documents") as bar,
    ):
        for start in range(0, vectors.shape[0], ROWS_AT_ONCE):
            part = vectors[start : start + ROWS_AT_ONCE]
            impacts, columns, ends = quantiser(part.data).tolist(), part.indices.tolist(), part.indptr.tolist()
            for doc_id, (first, last) in zip(doc_ids[start : start + ROWS_AT_ONCE], pairwise(ends), strict=True):
                empty += first == last
                if sum(impacts[first:last]) > LARGEST_SUM:
                    raise RankdistillError(
                        f"the impacts of document {doc_id!r} add up to more than Lucene counts (2^31)",
                        where=specification.name,
                        fix=f"fewer bits than {specification.bits}",
                    )
                pairs = zip(columns[first:last], impacts[first:last], strict=True)
                writer.add(doc_id, NEXT.join([f"{names[column]}{IMPACT}{impact}" for column, impact in pairs]))
            bar.advance(part.shape[0])
    write_atomically(folder / TERMS, json.dumps(names, ensure_ascii=False))
    about = {"documents": vectors.shape[0], "step": quantiser.step, "query_bits": specification.query_bits}
    write_atomically(folder / ABOUT, json.dumps(about) + "\n")
    size = sum(path.stat().st_size for path in (folder / FILES).iterdir())
    return {**counts, "documents_without_terms": empty, "bytes": size}


def open_index(folder: Path) -> LuceneImpactIndex:
    """Open what `build` wrote."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        terms = json.loads((folder / TERMS).read_text(encoding="utf-8"))
        documents, step, bits = int(about["documents"]), float(about["step"]), int(about["query_bits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankdistillError(f"the Lucene index cannot be read: {error}", where=str(folder)) from None
    jvm.start()
    reader = LuceneReader(folder / FILES, jvm.load("io.anserini.search.similarity.ImpactSimilarity")(), documents)
    return LuceneImpactIndex(folder, reader, terms, step, bits)


class LuceneImpactIndex:
    """An opened index; `terms` as they are in it, `step` the weight of an impact of 1."""

    def __init__(self, folder: Path, reader: LuceneReader, terms: Sequence[str], step: float, query_bits: int) -> None:
        self.folder, self.step, self.levels = folder, step, 2**query_bits - 1
        self.bytes = reader.bytes
        self._reader = reader
        self._terms = [_escaped(term) for term in terms]
        self._parsers = threading.local()  # one a thread: two must not share one

    def search(self, queries: Any, k: int) -> list[Hits]:
        """At most `k` hits for each row of a csr_matrix [queries, vocabulary], best first, ties by row."""
        ends, columns, weights = queries.indptr.tolist(), queries.indices.tolist(), queries.data.tolist()

        def search_one(row: int) -> Hits:
            part = slice(ends[row], ends[row + 1])
            return self._search(columns[part], weights[part], k)

        with jvm.calls(self.folder):
            return search_all(search_one, range(queries.shape[0]))

    def search_terms(self, columns: Sequence[int], weights: Sequence[float], k: int) -> Hits:
        """As `search`, of one query without an array: term ids, each once, and their weights."""
        with jvm.calls(self.folder):
            return self._search(columns, weights, k)

    def _search(self, columns: Sequence[int], weights: Sequence[float], k: int) -> Hits:
        highest = max(weights, default=0.0)
        if highest <= 0 or k < 1:
            return no_hits()
        unit = self.levels / highest
        terms = self._terms
        clauses = [
            f"{terms[column]}^{whole}"
            for column, weight in zip(columns, weights, strict=True)
            if (whole := round(weight * unit)) > 0
        ]
        if not hasattr(self._parsers, "parser"):
            keyword = jvm.load("org.apache.lucene.analysis.core.KeywordAnalyzer")()
            self._parsers.parser = jvm.load("org.apache.lucene.queryparser.classic.QueryParser")(CONTENTS, keyword)
        hits = self._reader.hits(self._parsers.parser.parse(java_text(" ".join(clauses))), k)
        return Hits(hits.rows, hits.scores * np.float32(self.step / unit))


def _lucene_names(terms: Sequence[str], where: str) -> list[str]:
    names = term_names(terms, where)
    for name in names:
        if IMPACT in name or NEXT in name or len(name.encode("utf-8", "surrogatepass")) > LONGEST_TERM:
            fix = f"terms of at most {LONGEST_TERM:,} bytes without the control characters 1 and 2"
            raise RankdistillError(f"Lucene cannot hold the term {name[:50]!r}", where=where, fix=fix)
    return names


def _escaped(term: str) -> str:
    """A term as Lucene's query parser takes it for nothing else: no character of it is an operator."""
    return f"\\{term}" if term in OPERATORS else re.sub(r"(\W)", r"\\\1", term)


def _analyzer() -> Any:
    """Of "term, impact, next …": each term once, its impact as its frequency."""
    builder = jvm.load("org.apache.lucene.analysis.custom.CustomAnalyzer").builder()
    for add, name, settings in (
        (builder.withTokenizer, "simplePatternSplit", {"pattern": NEXT}),
        (builder.addTokenFilter, "delimitedTermFrequency", {"delimiter": IMPACT}),
    ):
        values = jvm.load("java.util.HashMap")()
        for key, value in settings.items():
            values.put(key, value)
        add(name, values)
    return builder.build()
