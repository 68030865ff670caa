"""What every engine that searches has in common, and the array files they share.

Rows, not ids: inside the package a document is its row number in the collection. An engine returns no row that is not
a document; the -1 with which FAISS pads short lists never leaves this layer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
Vectors = NDArray[np.float32]


class Hits(NamedTuple):
    """One query's result, best first; a higher score is always better, equal scores go by row."""

    rows: Rows  # [n] document rows, never negative
    scores: Scores  # [n]


class Engine(Protocol):
    """Text in, hits out."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of what decides the hits: settings, model, collection."""

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """At most `k` hits for each query; deterministic."""


class Encoder(Protocol):
    """What a dense student offers to the indexes; `cos` encoders return vectors of length one."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def similarity(self) -> Literal["dot", "cos"]: ...

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), dimension]"""

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), dimension]"""


def document_fingerprint(encoder: Any) -> str:
    """Of what makes an encoder's document vectors: its own, or that of the model whose documents it was trained for.

    An index belongs to whoever made its vectors; every query encoder trained for that maker may search it.
    """
    return str(getattr(encoder, "document_fingerprint", encoder.fingerprint))


def ranked(rows: NDArray[Any], scores: NDArray[Any], k: int) -> Hits:
    """The `k` best of unordered (row, score) pairs as hits: padding (negative rows) dropped, ties by row."""
    real = rows >= 0
    if not real.all():
        rows, scores = rows[real], scores[real]
    if len(scores) > k:
        # Everything at or above the k-th score, so that ties at the cut are decided by row too.
        kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        rows, scores = rows[kept], scores[kept]
    order = np.lexsort((rows, -scores))[:k]
    return Hits(rows[order].astype(np.int64), scores[order].astype(np.float32))


def no_hits() -> Hits:
    return Hits(np.empty(0, np.int64), np.empty(0, np.float32))


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocate_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, Any]:
    """A new writable memory-mapped .npy whose disk space is reserved now.

    Without the reservation a full disk would kill the process (SIGBUS) at some later write instead of raising OSError.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
    return array
