"""What every engine that searches has in common, and the array files they share.

Rows, not ids: inside the package a document is its row number in the collection. An engine returns no row that is not
a document; the -1 with which FAISS pads short lists never leaves this layer.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple, Protocol, Self, overload

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, fingerprint
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]
Vectors = NDArray[np.float32]
IDS_AT_ONCE = 65_536
ENCODE_AGAIN = "encode the collection again with this student"


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


class ExhaustiveIndex(ABC):
    """What a student made of each document, memory-mapped and searched whole: the reference, with no file of its own.

    One subclass for each kind of vectors. Memory: one block of them, and `k` hits a query.

    Args:
        fingerprint: of the vectors.
        inputs: what they were made from; see `check_inputs`.
    """

    name: str

    def __init__(self, fingerprint: str, inputs: Mapping[str, str] | None = None) -> None:
        self.fingerprint, self.inputs = fingerprint, dict(inputs or {})

    @classmethod
    @abstractmethod
    def open(cls, artifact: Artifact | str | Path) -> Self:
        """Over an artifact of vectors."""

    @property
    @abstractmethod
    def dimension(self) -> int: ...

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of what is searched."""

    @abstractmethod
    def search(self, queries: Any, k: int) -> list[Hits]:
        """At most `k` hits for each encoded query; it refuses queries of another dimension, NaN and infinity."""

    @abstractmethod
    def scores(self, query: Any, rows: Rows) -> Scores:
        """[rows] scores of one encoded query with these documents: re-ranking."""

    def check(self, encoder: Any = None, collection: Any = None) -> None:
        """Refuse a student or a collection that these vectors were not made from."""
        check_inputs(self.inputs, encoder, collection, self.name)
        if (dimension := getattr(encoder, "dimension", self.dimension)) != self.dimension:
            raise RankdistillError(f"vectors of {self.dimension} dimensions, a student of {dimension}", where=self.name)


class StudentEngine:
    """A student's query encoder over an index of its documents' vectors; one subclass for each kind of vectors."""

    kind: ClassVar[str]
    exact: ClassVar[type[ExhaustiveIndex]]

    def __init__(self, encoder: Any, index: Any, *, collection: Any = None, name: str = "") -> None:
        """Raises RankdistillError when the index belongs to another student or collection."""
        index.check(encoder, collection)
        self.encoder, self.index, self.name = encoder, index, name or self.kind

    @classmethod
    def over(cls, encoder: Any, vectors: Artifact | str | Path, *, name: str = "") -> Self:
        """Exact search over an artifact of a student's vectors, without an index file."""
        return cls(encoder, cls.exact.open(vectors), name=name)

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.kind, self.encoder.fingerprint, self.index.fingerprint])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.encoder!r} over {self.index!r})"

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        if not queries:
            return []
        hits: list[Hits] = self.index.search(self.encoder.encode_queries(queries), k)
        return hits


class DocumentIds(Sequence[str]):
    """A collection's document ids in row order, read as they are asked for."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection

    def __len__(self) -> int:
        return self.collection.document_count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return self.collection.doc_ids(np.arange(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.collection.doc_ids([place % len(self)])[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), IDS_AT_ONCE):
            yield from self[start : start + IDS_AT_ONCE]


def document_fingerprint(encoder: Any) -> str:
    """Of what makes an encoder's document vectors: its own, or that of the model whose documents it was trained for.

    An index belongs to whoever made its vectors; every query encoder trained for that maker may search it.
    """
    return str(getattr(encoder, "document_fingerprint", encoder.fingerprint))


def check_inputs(
    inputs: Mapping[str, Any], encoder: Any, collection: Any, where: str | None, fix: str = ENCODE_AGAIN
) -> None:
    """Refuse an encoder or a collection other than those that vectors or an index were made from.

    Args:
        inputs: fingerprints of `encoder`, `vocabulary` and `collection`; what is not said is not checked.

    Raises:
        RankdistillError: the student, its vocabulary or the collection is another one.
    """
    if encoder is not None:
        made_by, vocabulary = inputs.get("encoder"), inputs.get("vocabulary")
        if made_by and made_by not in (encoder.fingerprint, document_fingerprint(encoder)):
            what = f"this index belongs to another student ({made_by}, not {encoder.fingerprint})"
            raise RankdistillError(what, where=where, fix=fix)
        if vocabulary and vocabulary != fingerprint(list(encoder.terms)):
            what = f"the index's terms are not those of this student's vocabulary of {len(encoder.terms):,}"
            raise RankdistillError(what, where=where, fix=fix)
    made_from = inputs.get("collection")
    if collection is not None and made_from and made_from != collection.fingerprint:
        what = f"this index is over another collection ({made_from}, not {collection.fingerprint})"
        raise RankdistillError(what, where=where, fix=f"build it again over {collection.name}")


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


def best_of_blocks(blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]], queries: int, k: int) -> list[Hits]:
    """The `k` best documents of each query, from scores and rows [queries, n] of blocks of documents in row order."""
    scores, rows = np.empty((queries, 0), np.float32), np.empty((queries, 0), np.int64)
    for block_scores, block_rows in blocks:
        scores, rows = np.hstack([scores, block_scores]), np.hstack([rows, block_rows])
        # Blocks come in row order and the sort is stable, so ties keep the lower row.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return [ranked(*best, k) for best in zip(rows, scores, strict=True)]


def no_hits() -> Hits:
    return Hits(np.empty(0, np.int64), np.empty(0, np.float32))


def available_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocate_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, Any]:
    """A new writable memory-mapped .npy whose disk space is reserved now."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as stream:
        reserve(stream, path.stat().st_size)
    return array


def reserve(stream: BinaryIO, size: int) -> None:
    """Reserve a file's disk space, so that a full disk is an error now.

    Later it would kill the process (SIGBUS) at some write into a mapping.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
