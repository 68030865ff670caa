"""Search by late interaction: token vectors on disk, every document compared with the query (ColBERT's MaxSim).

What grows: on disk 2 (fp16) or 4 bytes · dimension for each token of each document; in memory one block of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import (
    Artifact,
    find_artifact,
    fingerprint,
    locked,
    open_artifact,
    write_artifact,
)
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import Hits, no_hits, ranked
from rankdistill.indexes.ragged import write_ragged
from rankdistill.indexes.vectors import check_vectors
from rankdistill.students.token_vectors import TokenVectors, maxsim_blocks

if TYPE_CHECKING:
    from rankdistill.collections import Collection

KIND = "token_vectors"
TOKENS, OFFSETS = "tokens.npy", "offsets.npy"
SHARD = 1024  # documents encoded and written together
FORMATS = {"fp16": np.float16, "fp32": np.float32}


class TokenEncoder(Protocol):
    """What a multi-vector student offers to the index."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def storage(self) -> Literal["fp16", "fp32"]:
        """Number format of the document vectors on disk."""

    def encode_queries(self, texts: Sequence[str]) -> TokenVectors: ...

    def encode_documents(self, texts: Sequence[str]) -> TokenVectors: ...


def encode_document_tokens(
    encoder: TokenEncoder, collection: Collection, path: str | Path, *, shard_size: int = SHARD
) -> Artifact:
    """Encode every document into `path`: tokens.npy [tokens, dimension], offsets.npy int64 [documents + 1].

    Document i has the rows offsets[i] to offsets[i + 1] of tokens.npy. A finished shard is never encoded twice: after a
    kill at any moment the same call goes on with the next one.

    Raises:
        RankdistillError: there are no documents; the encoder returns NaN or infinite vectors, or such as the number
            format cannot hold; the disk is full.
    """
    count = collection.document_count
    if not count:
        raise RankdistillError("there are no documents to encode", where=collection.name)
    settings = {"side": "documents", "storage": encoder.storage}
    wanted = fingerprint([KIND, settings, encoder.fingerprint, collection.fingerprint])
    path = Path(path)
    with locked(path):
        found = find_artifact(path, KIND, wanted)
        if found is not None:
            return found
        with write_artifact(
            path,
            kind=KIND,
            fingerprint=wanted,
            settings=settings,
            inputs={"encoder": encoder.fingerprint, "collection": collection.fingerprint},
            resume=True,
        ) as writer:
            tokens = _encode_shards(encoder, collection, writer.path, shard_size)
            writer.counts.update({"documents": count, "tokens": tokens, "dimension": encoder.dimension})
            writer.notes["file"] = TOKENS
        return open_artifact(path, KIND)


def _encode_shards(encoder: TokenEncoder, collection: Collection, folder: Path, shard_size: int) -> int:
    """The tokens written."""
    kind = np.dtype(FORMATS[encoder.storage])

    def name_of(row: int) -> str:
        return f"document {collection.doc_ids([row])[0]!r} of {collection.name}"

    def encode(first: int, texts: list[str]) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        made = encoder.encode_documents(texts)
        with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite and is refused
            stored = np.ascontiguousarray(made.vectors, dtype=kind)
        owner = np.repeat(np.arange(len(made)), np.diff(made.offsets))
        check_vectors(stored, encoder.dimension, _owner(owner, first, name_of))
        return np.diff(made.offsets), {TOKENS: stored}

    return write_ragged(folder, {TOKENS: (kind, (encoder.dimension,))}, OFFSETS, collection, encode, shard_size)


def _owner(owner: NDArray[np.int64], first: int, name_of: Callable[[int], str]) -> Callable[[int], str]:
    return lambda token: name_of(first + int(owner[token])) if len(owner) else name_of(first)


def open_token_vectors(artifact: Artifact | str | Path) -> TokenVectors:
    """The token vectors of an artifact, memory-mapped.

    Raises:
        RankdistillError: it is not one, or its files are damaged.
    """
    if not isinstance(artifact, Artifact):
        artifact = open_artifact(artifact, KIND)
    try:
        vectors = np.load(artifact.path / TOKENS, mmap_mode="r", allow_pickle=False)
        offsets = np.load(artifact.path / OFFSETS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RankdistillError(f"the token vectors cannot be read: {error}", where=str(artifact.path)) from None
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(vectors) or (np.diff(offsets) < 0).any():
        raise RankdistillError("tokens.npy and offsets.npy do not belong together", where=str(artifact.path))
    return TokenVectors(vectors, offsets)


class TokenIndex:
    """Brute force over memory-mapped token vectors: every document is compared, a block at a time.

    Memory: one block of vectors in float32, its similarities with some of the queries, and `k` hits a query.

    Args:
        device: where the products are computed.
    """

    name = "exact, token vectors"

    def __init__(
        self, vectors: TokenVectors, fingerprint: str, inputs: dict[str, str] | None = None, device: Any = "cpu"
    ) -> None:
        self.vectors, self.fingerprint, self.inputs, self.device = vectors, fingerprint, inputs or {}, device

    @property
    def dimension(self) -> int:
        return int(self.vectors.vectors.shape[1])

    @property
    def bytes(self) -> int:
        return int(self.vectors.vectors.nbytes + self.vectors.offsets.nbytes)

    def check(self, encoder: TokenEncoder | None = None, collection: Any = None) -> None:
        """Refuse a student or a collection these vectors were not made from.

        Raises:
            RankdistillError: a fingerprint or the dimension differs.
        """
        for what, given in (("encoder", encoder), ("collection", collection)):
            if given is not None and self.inputs.get(what, given.fingerprint) != given.fingerprint:
                raise RankdistillError(
                    f"these token vectors belong to another {what}", fix="encode the collection again with this student"
                )
        if encoder is not None and encoder.dimension != self.dimension:
            raise RankdistillError(f"token vectors of {self.dimension} dimensions, a student of {encoder.dimension}")

    def search(self, queries: TokenVectors, k: int) -> list[Hits]:
        self._check_queries(queries)
        k = min(k, len(self.vectors))
        if k < 1 or not len(queries):
            return [no_hits() for _ in queries]
        best_scores = np.empty((len(queries), 0), np.float32)
        best_rows = np.empty((len(queries), 0), np.int64)
        for start, scores in maxsim_blocks(queries, self.vectors, self.device):
            rows = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
            best_scores, best_rows = np.hstack([best_scores, scores]), np.hstack([best_rows, rows])
            # Blocks come in row order and the sort is stable, so ties keep the lower row.
            order = np.argsort(-best_scores, axis=1, kind="stable")[:, :k]
            best_scores = np.take_along_axis(best_scores, order, axis=1)
            best_rows = np.take_along_axis(best_rows, order, axis=1)
        return [ranked(best_rows[i], best_scores[i], k) for i in range(len(queries))]

    def scores(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[rows] scores of one query's token vectors with these documents: re-ranking."""
        asked = TokenVectors.of([query], self.dimension)
        self._check_queries(asked)
        found = [scores[0] for _, scores in maxsim_blocks(asked, self.vectors.take(rows), self.device)]
        return np.concatenate([np.empty(0, np.float32), *found])

    def _check_queries(self, queries: TokenVectors) -> None:
        check_vectors(queries.vectors, self.dimension, lambda row: f"query token {row}")


class MultiVectorEngine:
    """An engine made of a multi-vector student and the token vectors of a collection that it made."""

    def __init__(
        self, encoder: TokenEncoder, index: TokenIndex, *, collection: Any = None, name: str = "multi_vector"
    ) -> None:
        """Raises RankdistillError when the index belongs to another student or collection."""
        index.check(encoder, collection)
        self.encoder, self.index, self.name = encoder, index, name

    @classmethod
    def over(
        cls, encoder: TokenEncoder, vectors: Artifact | str | Path, *, name: str = "multi_vector"
    ) -> MultiVectorEngine:
        """Exact search over a token vectors artifact, on the encoder's device."""
        artifact = vectors if isinstance(vectors, Artifact) else open_artifact(vectors, KIND)
        inputs = dict(artifact.manifest["inputs"])
        device = getattr(encoder, "device", "cpu")
        return cls(encoder, TokenIndex(open_token_vectors(artifact), artifact.fingerprint, inputs, device), name=name)

    @property
    def fingerprint(self) -> str:
        return fingerprint(["multi_vector", self.encoder.fingerprint, self.index.fingerprint])

    def __repr__(self) -> str:
        return f"MultiVectorEngine({self.encoder!r} over {self.index!r})"

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        if not queries:
            return []
        return self.index.search(self.encoder.encode_queries(queries), k)
