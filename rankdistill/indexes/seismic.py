"""Seismic: approximate search over blocked inverted lists with summaries, in memory (extra `sparse`).

Bruch, Nardini, Rulli, Venturini: "Efficient Inverted Indexes for Approximate Retrieval over Learned Sparse
Representations", SIGIR 2024, arXiv:2404.18812. Builds of the same vectors find the same, though their bytes differ.

The file opens with plain `seismic.SeismicIndex.load` (`SeismicIndexLV` for more than 65,536 terms): document ids are
the collection's, term 42 is "42", and terms.json names the terms. Weights are stored in half precision.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import MANIFEST
from rankdistill.errors import RankdistillError, require
from rankdistill.indexes.base import Hits, available_threads, no_hits, ranked
from rankdistill.indexes.sparse_specification import SeismicSpecification

PREFIX, SUFFIX = "index", ".index.seismic"  # the library adds the second
FILE = PREFIX + SUFFIX
ROWS = "rows.npy"  # row of each indexed document, where empty ones are left out
TERMS = "terms.json"
SHORT_TERMS = 1 << 16  # vocabularies up to this fit the 16 bits of its smaller index
MOST = float(np.finfo(np.float16).max)
DOCUMENTS_AT_ONCE = 65_536


def build(
    specification: SeismicSpecification, vectors: Any, doc_ids: Sequence[str], terms: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Write the index of csr_matrix [documents, vocabulary] into `folder`; what to count in its manifest.

    Memory: the vectors (4 to 6 bytes a posting), and the index.

    Raises:
        RankdistillError: Seismic is not installed; a weight is above half precision's range (65,504); documents have
            fewer neighbours than asked for.
    """
    kinds = _kinds(vectors.shape[1])
    filled = np.flatnonzero(np.diff(vectors.indptr))
    with _silent():
        dataset = kinds("SeismicDataset")(dim=vectors.shape[1])
        for start in range(0, vectors.shape[0], DOCUMENTS_AT_ONCE):
            part = vectors[start : start + DOCUMENTS_AT_ONCE]
            if (highest := part.data.max(initial=0)) > MOST:
                what = f"a weight of {highest:g} is above what Seismic stores (half precision, {MOST:,.0f})"
                raise RankdistillError(what, fix="train with the model's own log(1 + relu), or scale the weights")
            ids = list(doc_ids[start : start + DOCUMENTS_AT_ONCE])
            dataset.add_documents_by_id(ids, part.indices.astype(np.int64), part.data, part.indptr.astype(np.int64))
        index = kinds("SeismicIndex").build_from_dataset(
            dataset,
            n_postings=specification.postings,
            centroid_fraction=specification.centroid_fraction,
            min_cluster_size=specification.minimum_block,
            summary_energy=specification.summary_energy,
            nknn=specification.neighbours,
            num_threads=available_threads(),
        )
        index.save(str(folder / PREFIX))
        if specification.neighbours:
            _check_neighbours(kinds("SeismicIndexRaw").load(str(folder / FILE)), specification, vectors)
    if len(filled) < vectors.shape[0]:
        np.save(folder / ROWS, filled.astype(np.int64), allow_pickle=False)
    (folder / TERMS).write_text(json.dumps(list(terms), ensure_ascii=False), encoding="utf-8")
    return {"bytes": (folder / FILE).stat().st_size, "indexed": len(filled)}


def open_index(folder: Path) -> SeismicSearch:
    """Read an index into memory.

    Raises:
        RankdistillError: Seismic is not installed; the file is missing, damaged or not the one its manifest describes.
    """
    require("seismic", extra="sparse", why="a Seismic index")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    counts, specification = manifest["counts"], SeismicSpecification.model_validate(manifest["settings"])
    try:
        if (folder / FILE).stat().st_size != counts["bytes"]:
            raise ValueError("its size is not the one it was written with")
        # The same file without ids and strings: components and rows as numbers, a third faster a query.
        index = _kinds(counts["dimension"])("SeismicIndexRaw").load(str(folder / FILE))
        rows = np.load(folder / ROWS, allow_pickle=False) if counts["indexed"] < counts["documents"] else None
        sizes = (index.len, index.dim, len(rows) if rows is not None else index.len)
        if sizes != (counts["indexed"], counts["dimension"], counts["indexed"]):
            raise ValueError("it is not the index that its manifest describes")
    except (OSError, ValueError) as error:
        what = f"the Seismic index cannot be read: {error}"
        raise RankdistillError(what, where=str(folder / FILE), fix="build it again") from None
    return SeismicSearch(index, specification, rows, int(counts["bytes"]))


def _kinds(terms: int) -> Callable[[str], Any]:
    """The library's classes by name, for a vocabulary of that size."""
    library = require("seismic", extra="sparse", why="a Seismic index")
    return lambda name: getattr(library, name if terms <= SHORT_TERMS else f"{name}LV")


class SeismicSearch:
    """An opened index; approximate: `query_cut` terms choose blocks, `heap_factor` skips the less promising ones."""

    def __init__(
        self, index: Any, specification: SeismicSpecification, rows: NDArray[np.int64] | None, size: int
    ) -> None:
        self.index, self.specification, self.bytes, self._rows = index, specification, size, rows
        self._neighbours = min(specification.neighbours, int(index.knn_len))

    def search(self, queries: Any, k: int) -> list[Hits]:
        """At most `k` hits for each row of a csr_matrix [queries, vocabulary], best first, ties by row."""
        settings = self.specification
        columns = queries.indices.astype(np.int32, copy=False)
        weights = queries.data.astype(np.float32, copy=False)
        hits = []
        for start, end in pairwise(queries.indptr.tolist()):
            if start == end or k < 1:
                hits.append(no_hits())
                continue
            try:
                pairs = self.index.search(
                    columns[start:end],
                    weights[start:end],
                    k,
                    settings.query_cut,
                    settings.heap_factor,
                    self._neighbours,
                    True,
                )
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # how a fault in Rust arrives here
                    raise
                raise RankdistillError(f"Seismic failed: {error}", fix="build the index again") from None
            scores, rows = np.array([score for score, _ in pairs], np.float32), np.array([row for _, row in pairs], int)
            hits.append(ranked(rows if self._rows is None else self._rows[rows], scores, k))
        return hits


def _check_neighbours(index: Any, specification: SeismicSpecification, vectors: Any) -> None:
    """Refuse a graph with gaps: the library ends in a panic when a hit has fewer neighbours than it looks at."""
    search = SeismicSearch(index, specification, None, 0)
    for start in range(0, vectors.shape[0], DOCUMENTS_AT_ONCE):
        try:
            search.search(vectors[start : start + DOCUMENTS_AT_ONCE], 1)
        except RankdistillError:
            what = f"some documents have fewer than {specification.neighbours} neighbours"
            fix = "fewer, or 0; or more postings, so that more are found"
            raise RankdistillError(what, where=f"{specification.name}: neighbours", fix=fix) from None


@contextmanager
def _silent() -> Iterator[None]:
    """The library prints to standard output, which is for results, and panics to the other: both go nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    try:
        with open(os.devnull, "wb") as nowhere:
            for stream in kept:
                os.dup2(nowhere.fileno(), stream)
        yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
