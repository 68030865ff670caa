"""BM25 over a tokenizer's own pieces, as sparse vectors: what a learned student of that vocabulary is held against.

Documents are BM25 impacts of their tokens (the formula of bm25.py); queries say which tokens occur, in the very code of
an inference-free student. Any engine that searches a sparse student's vectors searches these, so that two rankers are
timed in the same one.
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
from rankdistill.students.token_weights import TokenWeights

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
        self._is_term = _term_mask(tokenizer, len(frequencies))
        self._idf, _ = bm25_factors(frequencies, lengths, k1, b)
        self._mean = float(lengths.mean())
        vocabulary = tokenizer.get_vocab()
        self.terms = [""] * len(self._idf)
        for term, column in vocabulary.items():
            self.terms[column] = term
        statistics = [frequencies.tolist(), len(lengths), self._mean]
        self.fingerprint = fingerprint(["token_bm25", k1, b, fingerprint(tokenizer.to_str()), fingerprint(statistics)])
        # Each term weighs 1; the rest nothing.
        self._queries = TokenWeights(tokenizer, self._is_term.astype(np.float32), self.fingerprint, self.fingerprint)

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
        frequencies, lengths, is_term = np.zeros(size, np.int64), [], _term_mask(opened, size)
        with progress("count tokens", collection.document_count, "documents") as bar:
            for _, texts in collection.iter_documents(batch_size=BATCH):
                counts = _counts(opened, texts, is_term)
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
        """csr_matrix float32 [texts, vocabulary]: 1 for each token that occurs."""
        return self._queries.encode_queries(texts)

    def encode_documents(self, texts: Sequence[str]) -> Any:
        """csr_matrix float32 [texts, vocabulary]: BM25's weight of each token."""
        made = _counts(self.tokenizer, texts, self._is_term)
        lengths = np.asarray(made.sum(axis=1), np.float64).ravel()
        norm = np.repeat(self.k1 * (1 - self.b + self.b * lengths / self._mean), np.diff(made.indptr))
        made.data = (self._idf[made.indices] * made.data / (made.data + norm)).astype(np.float32)
        return made


def _counts(tokenizer: Any, texts: Sequence[str], is_term: NDArray[np.bool_]) -> Any:
    from scipy import sparse

    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    found = [np.array(one.ids, np.int32) for one in encoded]
    ids = [np.unique(one[is_term[one]], return_counts=True) for one in found]
    columns = np.concatenate([*(one for one, _ in ids), np.empty(0, np.int32)])
    counts = np.concatenate([*(one for _, one in ids), np.empty(0, np.int64)]).astype(np.float32)
    ends = np.concatenate([[0], np.cumsum([len(one) for one, _ in ids], dtype=np.int64)])
    return sparse.csr_matrix((counts, columns, ends), shape=(len(texts), len(is_term)))


def _term_mask(tokenizer: Any, size: int) -> NDArray[np.bool_]:
    """[vocabulary] which tokens are terms: not the special ones, nor the unknown one."""
    mask = np.ones(size, bool)
    mask[[number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = False
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    if unknown is not None:
        mask[unknown] = False
    return mask


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
