"""BM25 over a tokenizer's own pieces, as sparse vectors: what a learned student of that vocabulary is held against.

Documents are BM25 impacts of their tokens (the formula of bm25.py), queries say how often each token occurs. Any engine
that searches a sparse student's vectors searches these, so that two rankers are timed in the same one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError
from rankdistill.indexes.bm25 import bm25_factors
from rankdistill.progress import progress

if TYPE_CHECKING:
    from rankdistill.collections import Collection

BATCH = 1024


class TokenBM25:
    """An encoder of BM25 weights, ready for `encode_document_terms` and `SparseEngine`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; special tokens, the unknown one too, are no terms, and nothing is cut.
        frequencies: [vocabulary] documents that each token occurs in.
        lengths: [documents] tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        frequencies: NDArray[np.int64],
        lengths: NDArray[np.int64],
        k1: float = 0.9,
        b: float = 0.4,
    ) -> None:
        self.tokenizer, self.k1, self.b = tokenizer, k1, b
        self._idf, _ = bm25_factors(frequencies, lengths, k1, b)
        self._mean = float(lengths.mean())
        vocabulary = tokenizer.get_vocab()
        self.terms = [""] * len(self._idf)
        for term, column in vocabulary.items():
            self.terms[column] = term
        statistics = [frequencies.tolist(), len(lengths), self._mean]
        self.fingerprint = fingerprint(["token_bm25", k1, b, fingerprint(tokenizer.to_str()), fingerprint(statistics)])

    @classmethod
    def of(cls, collection: Collection, tokenizer: Any, k1: float = 0.9, b: float = 0.4) -> TokenBM25:
        """Count a collection's tokens.

        Args:
            tokenizer: a `tokenizers.Tokenizer`, a tokenizer.json, or a folder that holds one.

        Raises:
            RankdistillError: there is no tokenizer, or no document has a token.
        """
        opened = _plain(tokenizer)
        size = max(opened.get_vocab().values()) + 1
        frequencies, lengths = np.zeros(size, np.int64), []
        with progress("count tokens", collection.document_count, "documents") as bar:
            for _, texts in collection.iter_documents(batch_size=BATCH):
                counts = _counts(opened, texts, size)
                frequencies += np.bincount(counts.indices, minlength=size)
                lengths.append(np.asarray(counts.sum(axis=1), np.int64).ravel())
                bar.advance(len(texts))
        if not frequencies.any():
            raise RankdistillError("no document has a token", where=collection.name)
        return cls(opened, frequencies, np.concatenate(lengths), k1, b)

    def __repr__(self) -> str:
        return f"TokenBM25(k1={self.k1}, b={self.b}, {len(self.terms)} terms)"

    @property
    def dimension(self) -> int:
        return len(self.terms)

    def encode_queries(self, texts: Sequence[str]) -> Any:
        """csr_matrix float32 [texts, vocabulary]: how often each token occurs."""
        return _counts(self.tokenizer, texts, self.dimension)

    def encode_documents(self, texts: Sequence[str]) -> Any:
        """csr_matrix float32 [texts, vocabulary]: BM25's weight of each token."""
        made = _counts(self.tokenizer, texts, self.dimension)
        lengths = np.asarray(made.sum(axis=1), np.float64).ravel()
        norm = np.repeat(self.k1 * (1 - self.b + self.b * lengths / self._mean), np.diff(made.indptr))
        made.data = (self._idf[made.indices] * made.data / (made.data + norm)).astype(np.float32)
        return made


def _counts(tokenizer: Any, texts: Sequence[str], size: int) -> Any:
    from scipy import sparse

    special = [number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    dropped = np.zeros(size, bool)
    dropped[[*special, *([unknown] if unknown is not None else [])]] = True
    found = [np.asarray(one.ids, np.int64) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    ids = [np.unique(one[~dropped[one]], return_counts=True) for one in found]
    columns = np.concatenate([np.empty(0, np.int64), *(one for one, _ in ids)])
    counts = np.concatenate([np.empty(0, np.float32), *(one for _, one in ids)]).astype(np.float32)
    ends = np.cumsum([0, *(len(one) for one, _ in ids)])
    return sparse.csr_matrix((counts, columns, ends), shape=(len(texts), size))


def _plain(tokenizer: Any) -> Any:
    """A tokenizer without truncation and padding."""
    from tokenizers import Tokenizer

    if isinstance(tokenizer, str | Path):
        file = Path(tokenizer)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            text = json.dumps(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RankdistillError(f"there is no tokenizer here: {error}", where=str(file)) from None
    else:
        text = tokenizer.to_str()
    opened = Tokenizer.from_str(text)
    opened.no_truncation()
    opened.no_padding()
    return opened
