"""Late-interaction search: what is on disk is what was encoded, and exact search is brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from rankdistill.artifacts import open_artifact
from rankdistill.errors import RankdistillError
from rankdistill.indexes.by_student import encode_collection, exhaustive_engine
from rankdistill.indexes.multi_vector import (
    MultiVectorEngine,
    TokenIndex,
    encode_document_tokens,
    open_token_vectors,
)
from rankdistill.students import token_vectors
from rankdistill.students.token_vectors import TokenVectors

TEXTS = [" ".join(f"w{(row * 7 + place * place) % 23}" for place in range(1 + row % 9)) for row in range(100)]
QUERIES = ["w1 w2 w3", "w7", "w20 w5 w5 w11 w0"]


class WordTokens:
    """A real, tiny encoder: a fixed random vector of length one for each word."""

    dimension = 8

    def __init__(self, storage: Literal["fp16", "fp32"] = "fp32", seed: int = 0) -> None:
        self.storage, self.fingerprint, self.encoded = storage, f"words-{seed}", 0
        self.table = np.random.default_rng(seed).normal(size=(23, self.dimension)).astype(np.float32)
        self.table /= np.linalg.norm(self.table, axis=1, keepdims=True)

    def encode_queries(self, texts: Any) -> TokenVectors:
        return self.encode_documents(texts)

    def encode_documents(self, texts: Any) -> TokenVectors:
        self.encoded += len(texts)
        words = [np.array([int(word[1:]) for word in text.split()], np.int64) for text in texts]
        return TokenVectors.of([self.table[numbers] for numbers in words], self.dimension)

    def score(self, query: str, text: str) -> float:
        mine, theirs = self.encode_documents([query])[0], self.encode_documents([text])[0]
        return float((mine.astype(np.float64) @ theirs.T.astype(np.float64)).max(axis=1).sum())


def engine_over(texts: list[str], make_collection: Any, folder: Path, encoder: WordTokens | None = None) -> Any:
    encoder = encoder or WordTokens()
    vectors = encode_document_tokens(encoder, make_collection(texts), folder / "v")
    return MultiVectorEngine.over(encoder, vectors)


def test_the_files_hold_the_encoders_vectors(make_collection: Any, tmp_path: Path) -> None:
    collection, encoder = make_collection(TEXTS), WordTokens()
    artifact = encode_document_tokens(encoder, collection, tmp_path / "v", shard_size=7)
    stored, expected = open_token_vectors(artifact), encoder.encode_documents(TEXTS)
    assert isinstance(stored.vectors, np.memmap) and stored.vectors.dtype == np.float32
    np.testing.assert_array_equal(stored.vectors, expected.vectors)
    np.testing.assert_array_equal(stored.offsets, expected.offsets)
    assert artifact.counts == {"documents": 100, "tokens": len(expected.vectors), "dimension": 8}
    assert not (artifact.path / "lengths.bin").exists()
    encoded = encoder.encoded
    assert encode_document_tokens(encoder, collection, tmp_path / "v").fingerprint == artifact.fingerprint
    assert encoder.encoded == encoded  # it was there
    half = encode_document_tokens(WordTokens("fp16"), collection, tmp_path / "half")
    assert half.fingerprint != artifact.fingerprint
    vectors = open_token_vectors(half).vectors
    assert vectors.dtype == np.float16 and vectors.nbytes == stored.vectors.nbytes // 2
    np.testing.assert_allclose(vectors, expected.vectors, atol=5e-4)
    on_disk = sum((half.path / name).stat().st_size for name in ("tokens.npy", "offsets.npy"))
    assert 0 <= on_disk - TokenIndex.open(half).bytes <= 256  # the two headers


@pytest.mark.parametrize("budget", [1, 40, 10**6], ids=["one at a time", "small blocks", "all at once"])
def test_search_is_brute_force(
    make_collection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(token_vectors, "BLOCK_TOKENS", budget)
    monkeypatch.setattr(token_vectors, "BUDGET", budget)
    engine = engine_over(TEXTS, make_collection, tmp_path)
    scores = np.array([[engine.encoder.score(query, text) for text in TEXTS] for query in QUERIES])
    for hits, row in zip(engine.search(QUERIES, 30), scores, strict=True):
        # Texts with the same words tie: by row.
        expected = np.lexsort((np.arange(100), -row.round(5)))[:30]
        np.testing.assert_allclose(hits.scores, row[expected], atol=1e-5)
        np.testing.assert_allclose(row[hits.rows], hits.scores, atol=1e-5)
        assert len(set(hits.rows.tolist())) == 30 and (hits.rows >= 0).all()
    reranked = engine.index.scores(engine.encoder.encode_queries([QUERIES[0]])[0], np.array([3, 99, 3]))
    np.testing.assert_allclose(reranked, scores[0][[3, 99, 3]], atol=1e-5)
    assert len(engine.search(QUERIES[:1], 1000)[0].rows) == 100
    assert engine.search([], 5) == []


def test_equal_documents_are_ranked_by_row_and_empty_ones_last(make_collection: Any, tmp_path: Path) -> None:
    engine = engine_over(["", *["w1 w2"] * 5, "", *["w3"] * 5], make_collection, tmp_path)
    assert engine.search(["w1"], 3)[0].rows.tolist() == [1, 2, 3]
    hits = engine.search(["w3"], 12)[0]
    assert hits.rows[:5].tolist() == [7, 8, 9, 10, 11] and hits.rows[-2:].tolist() == [0, 6]
    assert np.isfinite(hits.scores).all() and (hits.scores[-2:] < -1e8).all()


def test_queries_of_another_dimension_and_files_that_do_not_fit_are_refused(
    make_collection: Any, tmp_path: Path
) -> None:
    index = engine_over(TEXTS, make_collection, tmp_path).index
    with pytest.raises(RankdistillError, match=r"\[n, 8\] was expected"):
        index.search(TokenVectors.of([np.ones((2, 5), np.float32)], 5), 3)
    artifact = open_artifact(tmp_path / "v")
    np.save(artifact.path / "offsets.npy", np.arange(101))
    with pytest.raises(RankdistillError, match="do not belong together"):
        open_token_vectors(artifact)


def test_a_student_and_its_engine(make_collection: Any, tiny_encoder: Path, tmp_path: Path) -> None:
    """The real model: exact search gives what the plain library's similarity gives, to the accuracy of the format."""
    from sentence_transformers import MultiVectorEncoder

    from rankdistill.students.dense import DenseStudent
    from rankdistill.students.multi_vector import MultiVectorStudent

    texts = ["iron rusts in water", "gold is used for coins", "the moon goes round the earth", "bees make honey"]
    collection = make_collection(texts)
    for storage, tolerance in (("fp32", 1e-5), ("fp16", 2e-3)):
        student = MultiVectorStudent(str(tiny_encoder), precision="fp32", storage=storage).create("cpu")  # type: ignore[arg-type]
        engine = exhaustive_engine(student, encode_collection(student, collection, tmp_path / storage))
        assert isinstance(engine, MultiVectorEngine)
        student.save(tmp_path / f"{storage}-model")
        plain = MultiVectorEncoder(str(tmp_path / f"{storage}-model"), device="cpu", local_files_only=True)
        expected = np.asarray(plain.similarity(plain.encode_query(["which metal rusts"]), plain.encode_document(texts)))
        hits = engine.search(["which metal rusts"], 4)[0]
        np.testing.assert_allclose(hits.scores, expected[0][hits.rows], atol=tolerance)
        assert (np.diff(hits.scores) <= 0).all()
    dense = DenseStudent(str(tiny_encoder), precision="fp32").create("cpu")
    vectors = encode_collection(dense, collection, tmp_path / "dense")
    assert vectors.kind == "vectors" and exhaustive_engine(dense, vectors).name == "dense"
