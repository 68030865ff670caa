"""Search by late interaction: token vectors on disk, every document compared with the query (ColBERT's MaxSim).

What grows: on disk 2 (fp16) or 4 bytes · dimension for each token of each document; in memory one block of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, ArtifactWriter, fingerprint, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import Best, Hits, StudentEngine, check_inputs, no_hits
from rankdistill.indexes.encoding import Layout, Texts, encode_texts
from rankdistill.indexes.vectors import check_vectors
from rankdistill.students.token_vectors import TokenVectors, maxsim_blocks

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

    Document i has the rows offsets[i] to offsets[i + 1] of tokens.npy.

    Raises:
        RankdistillError: there are no documents; the encoder returns NaN or infinite vectors, or such as the number
            format cannot hold; the disk is full.
    """
    texts = Texts.documents(collection, shard_size)
    layout = Layout(np.dtype(FORMATS[encoder.storage]), (encoder.dimension,))

    def encode(first: int, shard: list[str]) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        tokens = encoder.encode_documents(shard)
        with np.errstate(over="ignore"):  # what fp16 cannot hold becomes infinite and is refused
            stored = np.ascontiguousarray(tokens.vectors, dtype=layout.format)
        row_of = np.append(np.repeat(np.arange(len(tokens)), np.diff(tokens.offsets)), 0)
        check_vectors(stored, encoder.dimension, lambda token: texts.name_of(first + int(row_of[token])))
        return np.diff(tokens.offsets), {TOKENS: stored}

    def finish(writer: ArtifactWriter, tokens: int) -> None:
        writer.counts.update({"tokens": tokens, "dimension": encoder.dimension})
        writer.notes["file"] = TOKENS

    settings = {"side": "documents", "storage": encoder.storage}
    return encode_texts(
        path,
        KIND,
        texts,
        encoder,
        collection,
        encode,
        {TOKENS: layout},
        offsets=OFFSETS,
        fingerprint=fingerprint([KIND, settings, encoder.fingerprint, collection.fingerprint]),
        settings=settings,
        finish=finish,
    )


def open_token_vectors(artifact: Artifact | str | Path) -> TokenVectors:
    """The token vectors of an artifact, memory-mapped."""
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
        """Refuse a student or a collection these vectors were not made from."""
        check_inputs(self.inputs, encoder, collection, self.name)
        if encoder is not None and encoder.dimension != self.dimension:
            raise RankdistillError(f"token vectors of {self.dimension} dimensions, a student of {encoder.dimension}")

    def search(self, queries: TokenVectors, k: int) -> list[Hits]:
        self._check_queries(queries)
        k = min(k, len(self.vectors))
        if k < 1 or not len(queries):
            return [no_hits() for _ in queries]
        best = Best(len(queries), k)
        for start, scores in maxsim_blocks(queries, self.vectors, self.device):
            best.add(scores, np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape))
        return best.hits()

    def scores(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[rows] scores of one query's token vectors with these documents: re-ranking."""
        queries = TokenVectors.of([query], self.dimension)
        self._check_queries(queries)
        blocks = [scores[0] for _, scores in maxsim_blocks(queries, self.vectors.take(rows), self.device)]
        return np.concatenate([np.empty(0, np.float32), *blocks])

    def _check_queries(self, queries: TokenVectors) -> None:
        check_vectors(queries.vectors, self.dimension, lambda row: f"query token {row}")


class MultiVectorEngine(StudentEngine):
    """A multi-vector student over the token vectors of a collection."""

    kind = "multi_vector"

    @classmethod
    def over(cls, encoder: TokenEncoder, vectors: Artifact | str | Path, *, name: str = "") -> MultiVectorEngine:
        """Exact search over a token vectors artifact, on the encoder's device."""
        artifact = open_artifact(vectors, KIND)
        inputs, device = dict(artifact.manifest["inputs"]), getattr(encoder, "device", "cpu")
        return cls(encoder, TokenIndex(open_token_vectors(artifact), artifact.fingerprint, inputs, device), name=name)
