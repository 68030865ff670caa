"""Texts as vectors of their tokens: how they are held, and their late-interaction scores without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# As sentence-transformers has it: below any real score, and small enough to be scaled and squared in float32.
NO_TOKENS_SCORE = -1e9
BLOCK_TOKENS = 65_536  # of documents, in float32 at a time
BUDGET = 16_777_216  # similarities of two tokens held at a time: 64 MiB


@dataclass(frozen=True)
class TokenVectors:
    """Vectors [tokens, dimension] of all texts one after the other; text i has rows offsets[i] to offsets[i + 1]."""

    vectors: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[NDArray[Any]], dimension: int) -> TokenVectors:
        """From one array [tokens, dimension] a text."""
        offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in texts], dtype=np.int64)]).astype(np.int64)
        return cls(np.concatenate([*texts, np.empty((0, dimension), np.float32)]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> NDArray[Any]:
        """[tokens, dimension]"""
        if not 0 <= text < len(self):
            raise IndexError(text)
        return self.vectors[self.offsets[text] : self.offsets[text + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[text] for text in range(len(self)))

    def take(self, texts: NDArray[np.int64] | Sequence[int]) -> TokenVectors:
        """The vectors of these texts, in this order."""
        return TokenVectors.of([self[int(text)] for text in texts], self.vectors.shape[1])

    def blocks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(first text, text after the last) of runs of texts with at most so many tokens, at least one text each."""
        start = 0
        while start < len(self):
            end = int(np.searchsorted(self.offsets, self.offsets[start] + tokens, side="right")) - 1
            yield start, max(end, start + 1)
            start = max(end, start + 1)

    def padded(self) -> NDArray[np.float32]:
        """[texts, longest, dimension] float32, zero rows where a text has no token."""
        lengths = np.diff(self.offsets)
        out = np.zeros((len(self), int(lengths.max(initial=0)), self.vectors.shape[1]), np.float32)
        out[np.arange(out.shape[1]) < lengths[:, None]] = self.vectors[self.offsets[0] : self.offsets[-1]]
        return out


def maxsim_blocks(
    queries: TokenVectors, documents: TokenVectors, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Every query against every document, a block of documents at a time: pairs of the block's first document and
    float32 scores [queries, documents of the block].

    The score is Σ over the query's tokens of the largest inner product with a token of the document (ColBERT, Khattab
    and Zaharia 2020, arXiv:2004.12832); a document without tokens scores `NO_TOKENS_SCORE`, a query without tokens 0.
    """
    import torch

    starts = documents.offsets
    for start, end in documents.blocks(BLOCK_TOKENS):
        lengths = torch.from_numpy(np.diff(starts[start : end + 1]))
        vectors = np.array(
            documents.vectors[starts[start] : starts[end]], np.float32
        )  # a memory map cannot be written to
        block = torch.from_numpy(vectors).to(device)
        owner = torch.repeat_interleave(torch.arange(end - start), lengths).to(device)[:, None]
        scores = np.zeros((len(queries), end - start), np.float32)
        for first, last in queries.blocks(max(1, BUDGET // max(1, len(block)))):
            offsets = queries.offsets[first : last + 1]
            asked = np.ascontiguousarray(queries.vectors[offsets[0] : offsets[-1]], np.float32)
            similarity = block @ torch.from_numpy(asked).to(device).T  # [document tokens, query tokens]
            best = similarity.new_full((end - start, len(asked)), torch.finfo(torch.float32).min)
            best.scatter_reduce_(0, owner.expand_as(similarity), similarity, "amax")
            asking = torch.repeat_interleave(torch.arange(last - first), torch.from_numpy(np.diff(offsets)))
            total = best.new_zeros(end - start, last - first).index_add_(1, asking.to(device), best)
            scores[first:last] = total.T.cpu().numpy()
        scores[:, (lengths == 0).numpy()] = NO_TOKENS_SCORE
        yield start, scores


def maxsim(queries: TokenVectors, documents: TokenVectors, device: torch.device | str = "cpu") -> NDArray[np.float32]:
    """[queries, documents] scores, see `maxsim_blocks`."""
    blocks = [scores for _, scores in maxsim_blocks(queries, documents, device)]
    return np.concatenate([*blocks, np.empty((len(queries), 0), np.float32)], axis=1)
