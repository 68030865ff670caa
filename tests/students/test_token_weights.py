"""Queries without a model: no torch is imported, one at a time is as many at once, what cannot be read is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rankdistill.errors import RankdistillError
from rankdistill.students import token_weights
from rankdistill.students.token_weights import QueryTerms, TokenWeights, sparse_fingerprints

if TYPE_CHECKING:
    from rankdistill.collections import Collection


@pytest.fixture(scope="module")
def saved(tiny_encoder: Path, tiny_collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rankdistill.students.sparse import InferenceFreeStudent

    folder = tmp_path_factory.mktemp("inference_free")
    model = InferenceFreeStudent(str(tiny_encoder), precision="fp32").create("cpu")
    model.prepare(tiny_collection, folder / "prepared")
    model.save(folder / "model")
    return folder / "model"


def test_no_heavy_library_is_imported(saved: Path) -> None:
    code = f"""
import sys
from rankdistill.students.token_weights import TokenWeights
encoder = TokenWeights.open({str(saved)!r})
assert encoder.encode_queries(["iron and gold", "nothing"]).nnz > 1
heavy = {{"torch", "transformers", "sentence_transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_rows_are_in_order_and_a_limit_keeps_the_heaviest(saved: Path) -> None:
    encoder = TokenWeights.open(saved)
    vectors = encoder.encode_queries(["which metal rusts in water", "", "gold"])
    assert vectors.shape == (3, encoder.dimension) and vectors.dtype == np.float32
    assert vectors.has_sorted_indices and (vectors.data > 0).all()
    assert encoder.encode_queries([]).shape == (0, encoder.dimension)
    few = TokenWeights(encoder.tokenizer, encoder.weights, "", "", most_terms=2).encode_queries(
        ["which metal rusts in water"]
    )
    np.testing.assert_array_equal(np.sort(few.data), np.sort(vectors[0].data)[-2:])


def test_fingerprints_name_what_decides_each_side(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    whole, documents = sparse_fingerprints(folder)
    (folder / "README.md").write_text("a card")
    (folder / "rankdistill.json").write_text("{}")
    assert sparse_fingerprints(folder) == (whole, documents)
    opened = TokenWeights.open(folder)
    assert (opened.fingerprint, opened.document_fingerprint) == (whole, documents)
    (folder / "query_0_SparseStaticEmbedding" / "config.json").write_text('{"frozen": false}')
    changed = sparse_fingerprints(folder)
    assert changed[0] != whole and changed[1] == documents
    (folder / "document_1_SpladePooling" / "config.json").write_text("{}")
    assert sparse_fingerprints(folder)[1] != documents


def test_folders_that_hold_no_table(saved: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match="no inference-free sparse student"):
        TokenWeights.open(tiny_encoder)
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    side = folder / "query_0_SparseStaticEmbedding"
    tokenizer = json.loads((side / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["aword"] = len(tokenizer["model"]["vocab"])
    (side / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RankdistillError, match="weights and its tokenizer"):
        TokenWeights.open(folder)
    (side / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RankdistillError, match="cannot be read"):
        TokenWeights.open(folder)
    (side / "model.safetensors").unlink()
    with pytest.raises(RankdistillError, match="no query weights"):
        TokenWeights.open(folder)
    router = folder / "router_config.json"
    router.write_text(router.read_text().replace("query_0_Sparse", "../query_0_Sparse"))
    with pytest.raises(RankdistillError, match="outside"):
        TokenWeights.open(folder)


# -- one query at a time -----------------------------------------------------------------------------------------------

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
WORDS = ["ab", "abc", "xyz the", "AB", "é", "e\u0301", "[SEP]", "[MASK]", "a-b", "don't", "漢字"]
WORDS += ["\t", "", "\u3000", "\x1c"]
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
    monkeypatch.setattr(token_weights, "MOST_WORDS", 3)
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
