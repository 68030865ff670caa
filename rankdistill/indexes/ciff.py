"""Common Index File Format: a sparse student's inverted index in one file that other engines import.

Lin et al., "Supporting Interoperability Between Open-Source Search Engines with the Common Index File Format", SIGIR
2020, arXiv:2003.08276; read by PISA, Terrier, JASSv2, OldDog and others, written here through ciff-toolkit (extra
`ciff`). Term frequencies are impacts (see `impacts`), a document's length is their sum, terms are the vocabulary's
strings in the order of their UTF-8 bytes, documents are numbered by row. A score is the manifest's `step` times the sum
of query weight × impact; an engine that would score by BM25 has to be told not to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.errors import RankdistillError, require
from rankdistill.indexes.impacts import WEIGHTS_AT_ONCE, Quantiser, fit_quantiser, term_names
from rankdistill.indexes.sparse_specification import CiffSpecification
from rankdistill.progress import progress

FILE = "index.ciff"
EXTRA = "ciff"
VERSION = 1  # of the format
LARGEST_SUM = 2**31 - 1  # of a document's impacts: the format's int32


def build(
    specification: CiffSpecification, vectors: Any, doc_ids: Sequence[str], terms: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write the file of csr_matrix [documents, vocabulary]; what to count in its manifest.

    Memory: 6 bytes a posting, twice while they are put in order of terms.

    Raises:
        RankdistillError: ciff-toolkit is not installed; two terms are one string; a document's impacts exceed 2^31; a
            weight is above the specification's maximum, which says `above: error`.
    """
    messages = require("ciff_toolkit.ciff_pb2", extra=EXTRA, why="an export to CIFF")
    writing = require("ciff_toolkit.write", extra=EXTRA, why="an export to CIFF")
    names = term_names(terms, specification.name)
    quantiser, counts = fit_quantiser(specification, vectors)
    postings, lengths = _by_term(vectors, quantiser, doc_ids)
    filled = np.flatnonzero(np.diff(postings.indptr)).tolist()
    ordered = sorted(filled, key=lambda column: names[column].encode())
    total = int(lengths.sum())
    header = messages.Header(
        version=VERSION,
        num_postings_lists=len(ordered),
        num_docs=vectors.shape[0],
        total_postings_lists=len(ordered),
        total_docs=vectors.shape[0],
        total_terms_in_collection=total,
        average_doclength=total / max(1, vectors.shape[0]),
        description=f"rankdistill, impacts of {specification.bits} bits, step {quantiser.step:.9g}",
    )

    def lists() -> Iterator[Any]:
        with progress("postings lists of CIFF", len(ordered), "terms") as bar:
            for column in ordered:
                start, end = postings.indptr[column], postings.indptr[column + 1]
                impacts = postings.data[start:end].tolist()
                entry = messages.PostingsList(term=names[column], df=len(impacts), cf=sum(impacts))
                add = entry.postings.add
                for gap, impact in zip(np.diff(postings.indices[start:end], prepend=0).tolist(), impacts, strict=True):
                    add(docid=gap, tf=impact)
                yield entry
                bar.advance()

    with writing.CiffWriter(folder / FILE) as writer:
        writer.write_header(header)
        writer.write_postings_lists(lists())
        writer.write_documents(
            messages.DocRecord(docid=row, collection_docid=doc_id, doclength=int(lengths[row]))
            for row, doc_id in enumerate(doc_ids)
        )
    return {**counts, "terms": len(ordered), "bytes": (folder / FILE).stat().st_size}


def _by_term(vectors: Any, quantiser: Quantiser, doc_ids: Sequence[str]) -> tuple[Any, NDArray[np.int64]]:
    """csc_matrix [documents, vocabulary] of impacts, rows sorted, and the sum of each document's."""
    from scipy import sparse

    impacts = np.empty(vectors.nnz, np.uint16)
    for start in range(0, vectors.nnz, WEIGHTS_AT_ONCE):
        impacts[start : start + WEIGHTS_AT_ONCE] = quantiser(vectors.data[start : start + WEIGHTS_AT_ONCE])
    by_document = sparse.csr_matrix((impacts, vectors.indices, vectors.indptr), vectors.shape, copy=False)
    lengths = np.asarray(by_document.sum(axis=1, dtype=np.int64)).ravel()
    if lengths.max(initial=0) > LARGEST_SUM:
        what, where = "the impacts of a document add up to more than CIFF's 2^31", doc_ids[int(lengths.argmax())]
        raise RankdistillError(what, where=repr(where), fix="fewer bits, or a sparser student")
    by_term = by_document.tocsc()
    by_term.sort_indices()
    return by_term, lengths
