"""Search by late interaction: token vectors on disk, every document compared with the query (ColBERT's MaxSim).

What grows: on disk 2 (fp16) or 4 bytes · dimension for each token of each document; in memory one block of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import Artifact, ArtifactWriter, fingerprint, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError
from rankdistill.indexes.base import ExhaustiveIndex, Hits, Rows, Scores, StudentEngine, best_of_blocks, no_hits
from rankdistill.indexes.encoding import Layout, Texts, encode_texts
from rankdistill.indexes.vectors import check_vectors
from rankdistill.students.token_vectors import TokenVectors, maxsim_blocks

KIND = "token_vectors"
TOKENS, OFFSETS = "tokens.npy", "offsets.npy"
SHARD = 1024  # documents encoded and written together
FORMATS = {"fp16": np.float16, "fp32": np.float32}


def encode_document_tokens(
    encoder: Any, collection: Collection, path: str | Path, *, shard_size: int = SHARD
) -> Artifact:
    """Encode every document into `path`: tokens.npy [tokens, dimension], offsets.npy int64 [documents + 1].

    Document i has the rows offsets[i] to offsets[i + 1] of tokens.npy.

    Args:
        encoder: a multi-vector student; its `storage` is the number format on disk.

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
    path = open_artifact(artifact, KIND).path
    try:
        vectors = np.load(path / TOKENS, mmap_mode="r", allow_pickle=False)
        offsets = np.load(path / OFFSETS, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RankdistillError(f"the token vectors cannot be read: {error}", where=str(path)) from None
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(vectors) or (np.diff(offsets) < 0).any():
        raise RankdistillError("tokens.npy and offsets.npy do not belong together", where=str(path))
    return TokenVectors(vectors, offsets)


class TokenIndex(ExhaustiveIndex):
    """Brute force over memory-mapped token vectors, a block at a time, with some of the queries at once."""

    name = "exact, token vectors"
    device: Any = "cpu"  # where the products are computed

    def __init__(self, vectors: TokenVectors, fingerprint: str, inputs: Mapping[str, str] | None = None) -> None:
        super().__init__(fingerprint, inputs)
        self.vectors = vectors

    @classmethod
    def open(cls, artifact: Artifact | str | Path) -> TokenIndex:
        artifact = open_artifact(artifact, KIND)
        return cls(open_token_vectors(artifact), artifact.fingerprint, artifact.manifest["inputs"])

    @property
    def dimension(self) -> int:
        return int(self.vectors.vectors.shape[1])

    @property
    def bytes(self) -> int:
        return int(self.vectors.vectors.nbytes + self.vectors.offsets.nbytes)

    def search(self, queries: TokenVectors, k: int) -> list[Hits]:
        check_vectors(queries.vectors, self.dimension, lambda row: f"query token {row}")
        if (k := min(k, len(self.vectors))) < 1 or not len(queries):
            return [no_hits() for _ in queries]
        blocks = (
            (scores, np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape))
            for start, scores in maxsim_blocks(queries, self.vectors, self.device)
        )
        return best_of_blocks(blocks, len(queries), k)

    def scores(self, query: NDArray[np.float32], rows: Rows) -> Scores:
        queries = TokenVectors.of([query], self.dimension)
        check_vectors(queries.vectors, self.dimension, lambda row: f"query token {row}")
        blocks = [scores[0] for _, scores in maxsim_blocks(queries, self.vectors.take(rows), self.device)]
        return np.concatenate([np.empty(0, np.float32), *blocks])


class MultiVectorEngine(StudentEngine):
    """A multi-vector student over the token vectors of a collection, on the student's device."""

    kind, exact = "multi_vector", TokenIndex

    def __init__(self, encoder: Any, index: TokenIndex, *, collection: Any = None, name: str = "") -> None:
        super().__init__(encoder, index, collection=collection, name=name)
        index.device = getattr(encoder, "device", "cpu")
