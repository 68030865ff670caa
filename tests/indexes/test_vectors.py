from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rankdistill.errors import RankdistillError
from rankdistill.indexes.vectors import encode_documents, encode_queries, open_vectors

TEXTS = [f"text number {row} of many" for row in range(100)]


def test_vectors_are_the_encoders_row_by_row(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    collection = make_collection(TEXTS)
    artifact = encode_documents(word_encoder, collection, tmp_path / "v", shard_size=7)
    vectors = open_vectors(artifact)
    assert isinstance(vectors, np.memmap) and vectors.dtype == np.float32 and vectors.shape == (100, 16)
    np.testing.assert_array_equal(vectors, word_encoder.encode_documents(TEXTS))
    assert artifact.counts == {"documents": 100, "dimension": 16}
    assert word_encoder.encoded == 200
    again = encode_documents(word_encoder, collection, tmp_path / "v", shard_size=50)
    assert again.fingerprint == artifact.fingerprint and word_encoder.encoded == 200


def test_queries_keep_their_ids(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    collection = make_collection(TEXTS, ["one", "two", "three"], {"q2": {"d1": 1}, "q0": {"d2": 1}})
    artifact = encode_queries(word_encoder, collection, tmp_path / "q", split="train", shard_size=1)
    ids = pq.read_table(artifact.path / "query_ids.parquet")["query_id"].to_pylist()
    assert ids == collection.query_ids("train")
    np.testing.assert_array_equal(open_vectors(artifact), word_encoder.encode_queries(collection.query_texts(ids)))


def test_vectors_of_another_dimension_are_refused(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    encode = word_encoder.encode_documents
    word_encoder.encode_documents = lambda texts: encode(texts)[:, :5]
    with pytest.raises(RankdistillError, match=r"\[n, 16\] was expected"):
        encode_documents(word_encoder, make_collection(TEXTS), tmp_path / "v")
    with pytest.raises(RankdistillError, match="there is no vectors here"):
        open_vectors(tmp_path / "v")


def test_vectors_say_what_they_were_computed_in(
    make_collection: Any, word_encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection = make_collection(TEXTS[:8])
    word_encoder.precision, word_encoder.device = "bf16", torch.device("cpu")
    made = encode_documents(word_encoder, collection, tmp_path / "v")
    assert (made.manifest["precision"], made.manifest["device"]) == ("bf16", "cpu")
    encode_documents(word_encoder, collection, tmp_path / "v")
    assert "made in" not in capsys.readouterr().err
    word_encoder.precision = "fp32"
    assert encode_documents(word_encoder, collection, tmp_path / "v").fingerprint == made.fingerprint
    assert "vectors made in bf16 on cpu are used; here they would be made in fp32 on cpu" in capsys.readouterr().err
