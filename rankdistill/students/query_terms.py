"""One query at a time on the inference-free side, in microseconds: what a tokenizer makes of a word is remembered.

A tokenizer takes some 2 µs a token, and an array of one row (scipy) takes 30 µs more: as long as a search of a small
index. Here a query is a list of term ids and their weights, put together word by word.
"""

from __future__ import annotations

from typing import Any

MOST_WORDS = 200_000  # remembered at a time: some 30 MB
# Parts that treat a word alike whatever stands beside it, so that words can be tokenized apart. Byte-level and
# SentencePiece tokenizers do not: there a word's first piece holds the space before it.
NORMALISERS = ("BertNormalizer", "Lowercase", "NoneType")
SPLITTERS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


class QueryTerms:
    """The terms of a query, equal to `TokenWeights.encode_queries`.

    Args:
        encoder: a `TokenWeights`, whose tokenizer and weights these are.
    """

    def __init__(self, encoder: Any) -> None:
        self._tokenizer, self._prompt, self._most = encoder.tokenizer, encoder.prompt, encoder.most_terms
        self._weights: list[float] = encoder.weights.tolist()
        self._words: dict[str, list[int]] = {}
        parts = type(self._tokenizer.normalizer).__name__, type(self._tokenizer.pre_tokenizer).__name__
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._apart = parts[0] in NORMALISERS and parts[1] in SPLITTERS and not any(" " in t.content for t in added)
        self._longest = (self._tokenizer.truncation or {}).get("max_length")

    def __call__(self, text: str) -> tuple[list[int], list[float]]:
        """(term ids, each once; their weights above 0), heaviest first where the student keeps the heaviest only."""
        tokens = self._tokens(self._prompt + text)
        weights = self._weights
        ids = [token for token in dict.fromkeys(tokens) if weights[token] > 0]
        if self._most and len(ids) > self._most:
            ids = sorted(ids, key=lambda token: (-weights[token], token))[: self._most]
        return ids, [weights[token] for token in ids]

    def _tokens(self, text: str) -> list[int]:
        if not self._apart:
            return self._encode(text)
        words, tokens = self._words, []
        # At spaces alone: what else may part words is left to the tokenizer.
        for word in text.split(" "):
            found = words.get(word)
            if found is None:
                if len(words) >= MOST_WORDS:
                    words.clear()
                found = words[word] = self._encode(word)
            tokens += found
        if self._longest is not None and len(tokens) > self._longest:
            return self._encode(text)
        return tokens

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
