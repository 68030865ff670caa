"""Inference-free students: queries from a table, documents from an encoder; the same in plain sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.sparse import InferenceFreeStudent, SparseModel

if TYPE_CHECKING:
    from rankdistill.collections import Collection

QUERIES = ["which metal rusts, in water?", "gold gold", "", "[SEP] Ω", "iron gold " * 60]
TEXTS = ["Iron is a metal that rusts when it meets water and oxygen.", "gold", ""]


def student(encoder: Path, collection: Collection, folder: Path, **settings: Any) -> SparseModel:
    model = InferenceFreeStudent(str(encoder), **{"precision": "fp32", **settings}).create("cpu")
    model.prepare(collection, folder)
    return model


def test_queries_weigh_rare_words_more(tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path) -> None:
    model = student(tiny_encoder, tiny_collection, tmp_path)
    weights = model.token_weights
    assert weights is not None
    of = dict(zip(model.terms, weights.weights, strict=True))
    assert of["iron"] > of["is"] > of["a"] > 0
    assert of["[UNK]"] == of["[CLS]"] == of["[PAD]"] == 0
    count = tiny_collection.document_count
    held = sum("iron" in text.lower().split() for text in tiny_collection.document_texts(range(count)))
    assert of["iron"] == pytest.approx(np.log1p((count - held + 0.5) / (held + 0.5)))


def test_tokens_of_many_documents_weigh_nothing(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    whole, cut = (student(tiny_encoder, tiny_collection, tmp_path, common=share) for share in (1.0, 0.3))
    assert whole.token_weights is not None and cut.token_weights is not None
    tokenizer = whole.token_weights.tokenizer
    texts = tiny_collection.document_texts(range(tiny_collection.document_count))
    held = np.zeros(whole.dimension)
    for encoded in tokenizer.encode_batch(texts, add_special_tokens=False):
        held[np.unique(encoded.ids)] += 1
    kept = np.where((held + 0.5) / (len(texts) + 1) <= 0.3, whole.token_weights.weights, 0)
    np.testing.assert_array_equal(cut.token_weights.weights, kept)
    assert 0 < (kept > 0).sum() < (whole.token_weights.weights > 0).sum()
    assert whole.fingerprint != cut.fingerprint and whole.document_fingerprint == cut.document_fingerprint


def test_the_table_waits_for_its_collection(tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path) -> None:
    model = InferenceFreeStudent(str(tiny_encoder), precision="fp32").create("cpu")
    before = model.fingerprint
    with pytest.raises(RankdistillError, match="has not seen"):
        model.encode_queries(QUERIES)
    model.prepare(tiny_collection, tmp_path)
    first = model.encode_queries(QUERIES)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(made) == 1
    model.prepare(tiny_collection, tmp_path)
    again = student(tiny_encoder, tiny_collection, tmp_path)
    assert abs(again.encode_queries(QUERIES) - first).max() == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == made
    assert before != model.fingerprint == again.fingerprint


def test_a_trained_table_moves_and_never_counts_below_nothing(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    frozen = student(tiny_encoder, tiny_collection, tmp_path)
    assert frozen.static is not None and not frozen.static.weight.requires_grad
    model = student(tiny_encoder, tiny_collection, tmp_path, train_idf=True)
    static = model.static
    assert static is not None
    model.train()
    queries = model.embed(model.preprocess(["iron metal"], "query"), "query")
    queries.sum().backward()
    assert static.weight.grad is not None and int((static.weight.grad > 0).sum()) == 2
    iron = model.terms.index("iron")
    with torch.no_grad():
        static.weight[iron] = -2.0
    assert model.encode_queries(["iron metal"]).nnz == 1
    model.save(tmp_path / "model")
    assert static.weight[iron] == -2.0  # the training goes on with what it had
    plain = SparseEncoder(str(tmp_path / "model"), device="cpu", local_files_only=True)
    assert plain.encode_query("iron").to_dense().sum() == 0
    opened = InferenceFreeStudent(train_idf=True).open(tmp_path / "model", "cpu").static
    assert opened is not None and opened.weight.requires_grad


def test_a_table_from_a_file(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = student(tiny_encoder, tiny_collection, tmp_path)
    table = {term: 1.0 + number for number, term in enumerate(whole.terms)}
    path = tmp_path / "idf.json"
    path.write_text(json.dumps(table))
    model = InferenceFreeStudent(str(tiny_encoder), idf=str(path)).create("cpu")
    got = model.encode_queries(["iron [SEP]"])
    assert (got.indices.tolist(), got.data.tolist()) == ([model.terms.index("iron")], [table["iron"]])
    del table["iron"]
    path.write_text(json.dumps(table))
    other = InferenceFreeStudent(str(tiny_encoder), idf=str(path)).create("cpu")
    assert f"1 of {len(model.terms) - 5} tokens have no weight" in capsys.readouterr().err
    assert other.encode_queries(["iron"]).data[0] == pytest.approx(np.median(list(table.values())))
    assert other.fingerprint != model.fingerprint
    assert other.document_fingerprint == model.document_fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ('{"iron": -1}', "negative or no finite numbers, such as 'iron'"),
        ('{"iron": "much"}', "no finite numbers"),
        ('{"iron": 1.0, "nowhere": 2.0}', r"another vocabulary: \d+ of .* \d+ tokens have no weight, and 1 of"),
    ],
)
def test_wrong_tables(tiny_encoder: Path, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "idf.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RankdistillError, match=message):
        InferenceFreeStudent(str(tiny_encoder), idf=str(path)).create("cpu")


def test_the_published_table_fits_its_tokenizer(shared_data: Path) -> None:
    from tokenizers import Tokenizer

    from rankdistill.students.token_weights import read_idf

    folder = shared_data / "bert-base-uncased-idf"
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    weights = read_idf(folder / "idf.json", vocabulary, len(vocabulary), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    assert (weights > 0).sum() == 30522 - 5
    assert weights[vocabulary["the"]] < weights[vocabulary["water"]] < weights[vocabulary["zinc"]]


def test_a_table_is_kept_or_there_is_none(tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path) -> None:
    model = student(tiny_encoder, tiny_collection, tmp_path)
    model.save(tmp_path / "model")
    kept = InferenceFreeStudent(str(tmp_path / "model"), idf="keep", precision="fp32").create("cpu")
    assert abs(kept.encode_queries(QUERIES) - model.encode_queries(QUERIES)).max() == 0
    assert abs(kept.encode_documents(TEXTS) - model.encode_documents(TEXTS)).max() < 1e-5
    with pytest.raises(UsageError, match="no table of query weights"):
        InferenceFreeStudent(str(tiny_encoder), idf="keep").create("cpu")


def test_a_vocabulary_padded_for_speed_is_cut(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    padded = AutoModelForMaskedLM.from_pretrained(tiny_encoder)
    padded.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
    padded.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    model = student(tmp_path / "padded", tiny_collection, tmp_path)
    assert model.dimension == len(tokenizer) == model.encode_documents(TEXTS).shape[1]
    assert "is cut to its tokenizer's" in capsys.readouterr().err
    model.save(tmp_path / "model")
    plain = SparseEncoder(str(tmp_path / "model"), device="cpu", local_files_only=True)
    wanted = plain.encode_document(TEXTS, convert_to_tensor=True).to_dense().numpy()
    np.testing.assert_allclose(model.encode_documents(TEXTS).toarray(), wanted, atol=1e-4)


def test_cut_queries_are_counted_and_said_once(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = student(tiny_encoder, tiny_collection, tmp_path, query_length=3)
    model.encode_queries(["iron iron iron", "iron"])
    assert model.cut["query"] == 0
    capsys.readouterr()
    queries = ["iron iron iron", "iron iron iron iron", "gold iron gold iron gold"]
    model.encode_queries(queries)
    assert model.cut["query"] == 2
    assert "2 of 3 queries are longer than query_length and are cut" in capsys.readouterr().err
    weights = model.token_weights
    assert weights is not None
    weights.encode_queries(queries)
    assert model.cut["query"] == 4 and "query_length" not in capsys.readouterr().err
