"""Real, tiny sparse encoders of made-up words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from rankdistill.indexes.sparse_specification import SparseSpecification
from rankdistill.indexes.specification import any_specification

WORDS = 40


class WordCounts:
    """The vocabulary is w0 … w39; a word weighs what was drawn for it, times how often it occurs."""

    def __init__(self, seed: int = 0, words: int = WORDS, name: str = "w") -> None:
        self.terms = [f"{name}{number}" for number in range(words)]
        self.weights = np.random.default_rng(seed).uniform(0.1, 3, words).astype(np.float32)
        self.fingerprint = f"words-{seed}-{words}-{name}"
        self.encoded = 0

    def encode_documents(self, texts: Sequence[str]) -> Any:
        self.encoded += len(texts)
        return self._encode(texts)

    def encode_queries(self, texts: Sequence[str]) -> Any:
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> Any:
        counts = sparse.lil_matrix((len(texts), len(self.terms)), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                if word in self.terms:
                    counts[row, self.terms.index(word)] += 1
        return (counts.tocsr() @ sparse.diags(self.weights)).astype(np.float32).sorted_indices()


def random_texts(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in random.integers(0, WORDS, 1 + row % longest)) for row in range(count)]


def sparse_specification(source: str | dict[str, Any]) -> SparseSpecification:
    specification = any_specification(source)
    assert isinstance(specification, SparseSpecification)
    return specification
