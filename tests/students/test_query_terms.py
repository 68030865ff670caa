"""The short way to a query's terms is the long way's result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rankdistill.students import query_terms
from rankdistill.students.query_terms import QueryTerms
from rankdistill.students.token_weights import TokenWeights

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgxyz0123456789-,.!?'", "ab", "##b", "##c", "the", "é"]


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(PIECES[n], special=True) for n in range(4)])
    tokenizer.add_special_tokens([AddedToken("[MASK]", special=True, lstrip=True)])
    return tokenizer


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate([*letters, "ab", "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encoder(tokenizer: Tokenizer, **settings: int) -> TokenWeights:
    size = tokenizer.get_vocab_size()
    weights = np.random.default_rng(0).uniform(-0.3, 3, size).astype(np.float32)
    return TokenWeights(tokenizer, weights, "whole", "documents", **settings)


ENCODERS = {
    "wordpiece": encoder(bert()),
    "cut": encoder(bert(), longest=5),
    "heaviest": encoder(bert(), most_terms=3),
    "byte level": encoder(byte_level()),
}
WORDS = [
    "ab",
    "abc",
    "xyz the",
    "AB",
    "é",
    "e\u0301",
    "[SEP]",
    "[MASK]",
    "a-b",
    "don't",
    "漢字",
    "\t",
    "",
    "\u3000",
    "\x1c",
]
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=12).map(" ".join)


@pytest.mark.parametrize("name", ENCODERS)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_terms_and_weights_are_those_of_the_array(name: str, text: str) -> None:
    long_way = ENCODERS[name].encode_queries([text])
    terms, weights = ENCODERS[name].query_terms(text)
    assert dict(zip(terms, weights, strict=True)) == dict(
        zip(long_way.indices.tolist(), long_way.data.tolist(), strict=True)
    )
    assert len(set(terms)) == len(terms)


def test_words_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_terms, "MOST_WORDS", 3)
    short = QueryTerms(ENCODERS["wordpiece"])
    for word in ("ab", "the", "xyz", "a", "abc"):
        assert short(f"{word} ab")[0] == ENCODERS["wordpiece"].query_terms(f"{word} ab")[0]
        assert len(short._words) <= 3


def test_it_is_the_real_tokenizer_s_result(shared_data: Path) -> None:
    folder = shared_data / "bert-base-uncased-idf"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    table = json.loads((folder / "idf.json").read_text())
    weights = np.zeros(tokenizer.get_vocab_size(), np.float32)
    for token, weight in table.items():
        weights[tokenizer.token_to_id(token)] = weight
    real = TokenWeights(tokenizer, weights, "whole", "documents")
    with open(shared_data / "beir" / "cranfield" / "queries.jsonl") as stream:
        queries = [json.loads(line)["text"] for line in stream]
    vectors = real.encode_queries(queries)
    for row, query in enumerate(queries):
        terms, found = real.query_terms(query)
        np.testing.assert_array_equal(np.sort(terms), vectors[row].indices)
        assert sum(found) == pytest.approx(vectors[row].sum(), rel=1e-5)
