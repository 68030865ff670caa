"""Postings on disk: sorted term by term in bounded memory, searched in blocks of queries by scipy's sparse product.

BM25 and the exact index of a sparse student rank with it: a score is Σ over the terms of a query of its weight times
the document's. What grows: three arrays on disk, 8 bytes a posting and 8 a term; in memory one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.indexes.base import Hits, allocate_array, available_threads, no_hits, ranked

POSTINGS_AT_ONCE = 4_000_000  # sorted in memory at a time: about 150 MB
POSTINGS_A_BLOCK = 8_000_000  # touched by one block of queries: bounds the memory of a search
QUERIES_A_BLOCK = 64

# (data, indices, indptr): the file names of one set of postings
Names = tuple[str, str, str]
# Terms, rows and weights of some postings, in row order
Triples = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def write_postings(folder: Path, names: Names, frequencies: NDArray[np.int64], parts: Iterable[Triples]) -> None:
    """Counting sort of postings by row into arrays by term, then row: weights float32, rows int32, offsets int64.

    Args:
        frequencies: [terms] postings of each term.
        parts: all postings in row order, some POSTINGS_AT_ONCE in memory at a time.
    """
    total = int(frequencies.sum())
    indptr = np.zeros(len(frequencies) + 1, np.int64)
    np.cumsum(frequencies, out=indptr[1:])
    np.save(folder / names[2], indptr, allow_pickle=False)
    if not total:  # an empty file cannot be mapped
        np.save(folder / names[0], np.empty(0, np.float32), allow_pickle=False)
        np.save(folder / names[1], np.empty(0, np.int32), allow_pickle=False)
        return
    data = allocate_array(folder / names[0], (total,), np.float32)
    indices = allocate_array(folder / names[1], (total,), np.int32)
    heads = indptr[:-1].copy()  # where the next posting of each term goes
    for terms, rows, weights in parts:
        order = np.argsort(terms, kind="stable")
        terms = terms[order]
        distinct, first, size = np.unique(terms, return_index=True, return_counts=True)
        position = heads[terms] + np.arange(len(terms)) - np.repeat(first, size)
        data[position] = weights[order]
        indices[position] = rows[order]
        heads[distinct] += size
    data.flush()
    indices.flush()


def open_csr(folder: Path, names: Names, columns: int) -> Any:
    """Three arrays (weights, columns, offsets) as a scipy csr_matrix, memory-mapped; nothing but offsets is read.

    scipy wants one integer type: beyond 2^31 entries the columns are widened in memory.

    Raises:
        OSError, ValueError: a file is missing or damaged, or they do not belong together.
    """
    from scipy import sparse

    data, indices, indptr = (_map(folder / name) for name in names)
    indptr = np.asarray(indptr)
    if indptr.ndim != 1 or not len(indptr) or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{names[2]} holds no offsets")
    if data.shape != indices.shape or data.shape != (indptr[-1],):
        raise ValueError(f"{', '.join(names)} do not belong together")
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, columns), copy=False)
    matrix.has_sorted_indices = matrix.has_canonical_format = True  # as written; looking would read everything
    return matrix


def _map(path: Path) -> NDArray[Any]:
    try:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        mapped = np.load(path, allow_pickle=False)  # an array of length 0 cannot be mapped
        if mapped.size:
            raise
    return mapped


class Postings:
    """A csr_matrix [terms, documents] of weights that queries are multiplied with.

    Args:
        threads: for searching; 0 = all.
    """

    def __init__(self, matrix: Any, threads: int = 0) -> None:
        self.matrix, self.threads = matrix, threads
        self._offsets: NDArray[np.int64] = matrix.indptr.astype(np.int64)

    @property
    def terms(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def documents(self) -> int:
        return int(self.matrix.shape[1])

    def search(self, queries: Any, k: int) -> list[Hits]:
        """The `k` best documents for each row of a csr_matrix [queries, terms]; those that share no term are no hits.

        Every weight is above 0, so a document that shares a term with a query scores above 0.
        """
        count = queries.shape[0]
        if k < 1 or not count:
            return [no_hits() for _ in range(count)]
        if count == 1:
            return self._search_block(queries, k)
        blocks = list(self._blocks(queries))
        threads = min(self.threads or available_threads(), len(blocks))
        if threads <= 1:
            results = [self._search_block(queries[start:end], k) for start, end in blocks]
        else:
            with ThreadPoolExecutor(threads) as pool:  # scipy's product runs outside Python's lock
                results = list(pool.map(lambda block: self._search_block(queries[block[0] : block[1]], k), blocks))
        return [hits for block in results for hits in block]

    def _blocks(self, queries: Any) -> Iterator[tuple[int, int]]:
        lengths = self._offsets[queries.indices + 1] - self._offsets[queries.indices]
        before = np.concatenate([[0], np.cumsum(lengths)])
        touched = before[queries.indptr]  # postings of all queries before each one
        start, count = 0, queries.shape[0]
        for end in range(1, count):
            if end - start == QUERIES_A_BLOCK or touched[end + 1] - touched[start] > POSTINGS_A_BLOCK:
                yield start, end
                start = end
        yield start, count

    def _search_block(self, queries: Any, k: int) -> list[Hits]:
        product = queries @ self.matrix
        return [
            ranked(product.indices[start:end], product.data[start:end], k)
            for start, end in zip(product.indptr[:-1], product.indptr[1:], strict=True)
        ]
