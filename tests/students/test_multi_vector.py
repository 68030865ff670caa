"""Multi-vector students: what they encode and score is what a plain MultiVectorEncoder does, and a slow loop."""

from __future__ import annotations

import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize
from small_models import TEXTS

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students import multi_vector, token_vectors
from rankdistill.students.base import split_by_length
from rankdistill.students.multi_vector import MultiVectorModel, MultiVectorStudent
from rankdistill.students.token_vectors import NO_TOKENS_SCORE, TokenVectors, maxsim

QUERIES = ["which metal rusts, in water?", "gold", ""]


def student(encoder: Path, **settings: Any) -> MultiVectorModel:
    return MultiVectorStudent(str(encoder), **{"precision": "fp32", **settings}).create("cpu")


def plain_scores(folder: Path) -> np.ndarray:
    """[queries, texts] as a user of plain sentence-transformers gets them."""
    plain = MultiVectorEncoder(str(folder), device="cpu", local_files_only=True)
    return np.asarray(plain.similarity(plain.encode_query(QUERIES), plain.encode_document(TEXTS)))


def slow(query: np.ndarray, document: np.ndarray) -> float:
    return sum(max(float(np.dot(q, d)) for d in document.astype(np.float64)) for q in query.astype(np.float64))


def test_scores_are_those_of_a_slow_loop(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(tiny_encoder, dimension=16, scale=3.0)
    queries, texts = model.encode_queries(QUERIES), model.encode_documents(TEXTS)
    expected = np.array([[slow(query, text) for text in texts] for query in queries])
    padded = torch.from_numpy(queries.padded()), torch.from_numpy(texts.padded())
    index = torch.tensor([[0, 3, 3], [4, 1, 2], [2, 0, 1]])
    for budget in (token_vectors.BUDGET, 1):  # all at once, and one query or document at a time
        monkeypatch.setattr(multi_vector, "BUDGET", budget)
        monkeypatch.setattr(token_vectors, "BUDGET", budget)
        monkeypatch.setattr(token_vectors, "BLOCK_TOKENS", min(budget, 65_536))
        np.testing.assert_allclose(maxsim(queries, texts), expected, atol=1e-5)
        every = model.score_all(*padded).detach().numpy()
        np.testing.assert_allclose(every, 3 * expected, atol=1e-5)
        own = model.score_lists(*padded, index).detach().numpy()
        np.testing.assert_allclose(own, np.take_along_axis(3 * expected, index.numpy(), 1), atol=1e-5)


def test_padding_never_wins_and_counts_nothing(tiny_encoder: Path) -> None:
    """Also where every real similarity is negative, so that a zero row would be the best match."""
    model = student(tiny_encoder)
    document = -torch.rand(1, 3, 4)
    query = torch.rand(1, 2, 4)
    score = model.score_all(query, document)
    assert score.item() < 0
    wide = model.join([document, -torch.rand(2, 7, 4)])
    assert wide.shape == (3, 7, 4)
    tall = model.join([query, torch.zeros(1, 5, 4)])
    torch.testing.assert_close(model.score_all(tall, wide)[0, 0], score[0, 0])
    torch.testing.assert_close(model.score_lists(tall[:1], wide, torch.tensor([[0]])), score)
    # A query without tokens scores 0, a document without tokens is below everything.
    assert (model.score_all(tall, wide)[1] == 0).all()
    nothing = torch.cat([wide, torch.zeros(1, 7, 4)])
    assert model.score_all(query, nothing)[0, 3] == NO_TOKENS_SCORE
    assert model.score_lists(query, nothing, torch.tensor([[3, 0]]))[0, 0] == NO_TOKENS_SCORE
    ragged = TokenVectors.of([document[0].numpy(), np.empty((0, 4), np.float32)], 4)
    np.testing.assert_allclose(
        maxsim(TokenVectors.of([query[0].numpy()], 4), ragged), [[score.item(), NO_TOKENS_SCORE]], rtol=1e-5
    )


def test_a_text_is_encoded_alike_alone_and_beside_longer_ones(tiny_encoder: Path) -> None:
    for settings in ({}, {"query_expansion": True, "query_length": 16}):
        model = student(tiny_encoder, **settings)
        together, beside = model.encode_documents(TEXTS), model.encode_queries(QUERIES)
        for text, one in zip(TEXTS, together, strict=True):
            np.testing.assert_allclose(model.encode_documents([text])[0], one, atol=1e-5)
        for text, one in zip(QUERIES, beside, strict=True):
            np.testing.assert_allclose(model.encode_queries([text])[0], one, atol=1e-5)
            if settings:
                assert len(one) == 16
        # Cut to parts of like length, as in training: the masks that expand queries are kept.
        parts = split_by_length(model.preprocess(QUERIES, "query"), 32)
        assert len(parts) > 1 or not settings
        rows = np.concatenate([rows for rows, _ in parts])
        joined = model.join([model.eval().embed(part, "query") for _, part in parts]).detach().numpy()
        for row, one in zip(rows, joined, strict=True):
            np.testing.assert_allclose(one[one.any(axis=1)], beside[row], atol=1e-5)


def test_gradients_are_those_of_finite_differences(tiny_encoder: Path) -> None:
    model = student(tiny_encoder, learn_scale=True).double()
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    documents = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 1]])
    assert torch.autograd.gradcheck(lambda q, d: model.score_lists(q, d, index), (queries, documents))
    assert torch.autograd.gradcheck(model.score_all, (queries, documents))


def test_punctuation_of_documents_matches_nothing(tiny_encoder: Path) -> None:
    model, whole = student(tiny_encoder), student(tiny_encoder, skip_punctuation=False)
    count = lambda one, text: len(one.encode_documents([text])[0])  # noqa: E731
    assert count(whole, "gold .") == count(model, "gold .") + 1 == count(whole, "gold") + 1
    assert len(model.encode_queries(["gold ."])[0]) == len(whole.encode_queries(["gold ."])[0])
    assert model.model[2].skiplist_words == list(string.punctuation)
    assert model.fingerprint != whole.fingerprint


def test_lengths_cut_each_side_to_its_own_and_a_marker_of_the_vocabulary_stays_one_token(tiny_encoder: Path) -> None:
    marked = student(tiny_encoder, query_prompt="[MASK] ", document_prompt="gold ")
    vocabulary = marked.model.tokenizer.get_vocab()
    tokens = marked.preprocess(["iron"], "query")["input_ids"][0].tolist()
    assert tokens[1:3] == [vocabulary["[MASK]"], vocabulary["iron"]]
    model = student(tiny_encoder, query_length=5, document_length=9, skip_punctuation=False)
    assert len(model.encode_queries([TEXTS[3]])[0]) == 5 and len(model.encode_documents([TEXTS[3]])[0]) == 9
    long = student(tiny_encoder, document_length=4096)  # beyond the encoder's positions nothing is to be had
    assert long.preprocess(TEXTS, "document")["input_ids"].shape[1] == 64
    assert np.isfinite(long.encode_documents(TEXTS).vectors).all()
    assert len(long.encode_documents([])) == 0 and long.similarities([], TEXTS).shape == (0, 5)


def test_the_principal_projection_keeps_more_of_inner_products_than_a_random_one(
    tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(student(tiny_encoder, dimension=8).model[1], Dense)
    assert "has no projection of its token vectors" in capsys.readouterr().err
    whole = student(tiny_encoder, projection="none")
    vectors = whole.encode_documents(TEXTS).vectors

    def error(projection: Any) -> float:
        weight = student(tiny_encoder, dimension=8, projection=projection).model[1].linear.weight.detach().numpy()
        np.testing.assert_allclose(weight @ weight.T, np.eye(8), atol=1e-5)
        kept = vectors @ weight.T
        return float(np.abs(vectors @ vectors.T - kept @ kept.T).mean())

    assert error("principal") < 0.8 * error("random")
    # All directions: a rotation, which changes no inner product.
    rotated = student(tiny_encoder, dimension=32).similarities(QUERIES, TEXTS)
    np.testing.assert_allclose(rotated, whole.similarities(QUERIES, TEXTS), atol=1e-4)


def test_a_model_that_divides_by_the_query_does_so_here(tiny_encoder: Path, tmp_path: Path) -> None:
    model = student(tiny_encoder)
    model.model.similarity_fn_name = "meanmaxsim"
    model.save(tmp_path / "model")
    opened = MultiVectorStudent(precision="fp32").open(tmp_path / "model", "cpu")
    np.testing.assert_allclose(opened.similarities(QUERIES, TEXTS), plain_scores(tmp_path / "model"), atol=1e-5)
    assert np.abs(opened.similarities(QUERIES, TEXTS)).max() <= 1 + 1e-5


def test_what_cannot_be_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="32 dimensions only"):
        student(tiny_encoder, dimension=33)
    with pytest.raises(UsageError, match=r"layers 0 to 1"):
        student(tiny_encoder, layers=[7])
    with pytest.raises(RankdistillError, match="no multi-vector model"):
        MultiVectorStudent().open(tiny_encoder)
    student(tiny_encoder, dimension=8).save(tmp_path / "model")
    with pytest.raises(UsageError, match="have 8 dimensions"):
        student(tmp_path / "model", dimension=16)
    broken = shutil.copytree(tmp_path / "model", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RankdistillError, match=r"weights are damaged.*[Hh]eader ?[Tt]oo ?[Ss]mall"):
        MultiVectorStudent().open(broken)


def test_dropping_the_normalisation_is_a_dot_product(tiny_encoder: Path, tmp_path: Path) -> None:
    dot = student(tiny_encoder, similarity="dot", dimension=8)
    assert not any(isinstance(module, Normalize) for module in dot.model)
    lengths = np.linalg.norm(dot.encode_documents(TEXTS).vectors, axis=1)
    assert np.ptp(lengths) > 0.01
    unit = np.linalg.norm(student(tiny_encoder).encode_documents(TEXTS).vectors, axis=1)
    np.testing.assert_allclose(unit, 1, atol=1e-5)
    dot.save(tmp_path / "model")
    again = MultiVectorStudent(precision="fp32").open(tmp_path / "model", "cpu")
    assert not again.normalised and again.fingerprint != dot.fingerprint
    # A model without normalisation gets one where the recipe asks for it.
    assert student(tmp_path / "model", similarity="cos").normalised


def test_a_model_trained_here_brings_its_scale(tiny_encoder: Path, tmp_path: Path) -> None:
    """As a teacher of a batch it is on the scale that it learnt."""
    model = student(tiny_encoder, scale=3.0)
    model.scale.data.fill_(4.5)
    model.save(tmp_path / "model")
    assert student(tmp_path / "model").scale.item() == 4.5
    assert student(tmp_path / "model", scale=2.0).scale.item() == 2.0
    assert MultiVectorStudent(scale=2.0).open(tmp_path / "model", "cpu").scale.item() == 4.5
    assert student(tiny_encoder).scale.item() == 1.0
