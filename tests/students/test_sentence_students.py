"""Dense students: what they encode is what plain sentence-transformers encodes, and what a recipe's keys do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from small_models import TEXTS

from rankdistill.errors import UsageError
from rankdistill.indexes.vectors import encode_documents
from rankdistill.students.base import split_by_length
from rankdistill.students.dense import DenseModel, DenseStudent, StaticStudent
from rankdistill.teachers.encoders import BiEncoderTeacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def dense(encoder: Path, **settings: Any) -> DenseModel:
    return DenseStudent(str(encoder), **{"precision": "fp32", **settings}).create("cpu")


def test_lengths_cut_each_side_to_its_own_and_prompts_are_put_before_the_text(tiny_encoder: Path) -> None:
    student = dense(tiny_encoder, query_length=5, document_length=9)
    assert student.preprocess(TEXTS, "query")["input_ids"].shape == (5, 5)
    assert student.preprocess(TEXTS, "document")["input_ids"].shape == (5, 9)
    student, plain = dense(tiny_encoder, query_prompt="metal ", document_prompt="gas "), dense(tiny_encoder)
    np.testing.assert_allclose(student.encode_queries(["gold"]), plain.encode_queries(["metal gold"]), atol=1e-6)
    np.testing.assert_allclose(student.encode_documents(["gold"]), plain.encode_documents(["gas gold"]), atol=1e-6)
    assert student.fingerprint != plain.fingerprint


@pytest.mark.parametrize("layer", [0, 1])
def test_a_cut_encoder_runs_that_layer_alone(tiny_encoder: Path, layer: int) -> None:
    """Against the layer itself, called by hand on the input embeddings."""
    student = dense(tiny_encoder, layers=[layer], similarity="dot")
    whole = SentenceTransformer(str(tiny_encoder), device="cpu")[0].model.eval()
    features = student.preprocess(TEXTS[:1], "document")
    with torch.inference_mode():
        hidden = whole.embeddings(features["input_ids"])
        hidden = whole.encoder.layer[layer](hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    np.testing.assert_allclose(student.encode_documents(TEXTS[:1])[0], hidden[0].mean(0).numpy(), atol=1e-5)
    assert student.model[0].model.config.num_hidden_layers == 1


@pytest.mark.parametrize("layers", [[2], [-1], [], [0, 5]])
def test_layers_that_are_not_there_are_refused(tiny_encoder: Path, layers: list[int]) -> None:
    with pytest.raises(UsageError, match=r"layers 0 to 1(?s:.*)student\.layers"):
        dense(tiny_encoder, layers=layers)


def test_a_dot_product_student_learns_its_own_lengths(tiny_encoder: Path, tmp_path: Path) -> None:
    """`similarity: dot` takes the encoder's normalisation away; `keep` keeps it, and `cos` adds one."""
    transformer = Transformer(str(tiny_encoder), max_seq_length=64)
    normalised = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean"), Normalize()], device="cpu")
    normalised.save_pretrained(str(tmp_path / "normalised"), create_model_card=False)

    def lengths(model: DenseModel) -> np.ndarray:
        return np.asarray(np.linalg.norm(model.encode_documents(TEXTS), axis=1))

    kept, dot = dense(tmp_path / "normalised"), dense(tmp_path / "normalised", similarity="dot")
    assert kept.similarity == "cos" and dot.similarity == "dot"
    np.testing.assert_allclose(lengths(kept), 1, atol=1e-5)
    assert np.ptp(lengths(dot)) > 0.01
    assert not any(isinstance(module, Normalize) for module in dot.model)
    np.testing.assert_allclose(
        dot.encode_documents(TEXTS), dense(tiny_encoder, similarity="dot").encode_documents(TEXTS), atol=1e-5
    )
    np.testing.assert_allclose(lengths(dense(tiny_encoder, similarity="cos")), 1, atol=1e-5)


def test_the_scale_multiplies_training_scores_only(tiny_encoder: Path) -> None:
    queries, documents = torch.eye(2, 4), torch.eye(4)
    index = torch.tensor([[0, 1], [3, 1]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for settings, scale in (({"similarity": "cos"}, 20.0), ({"similarity": "dot"}, 1.0), ({"scale": 7}, 7.0)):
        student = dense(tiny_encoder, **settings)
        torch.testing.assert_close(student.score_lists(queries, documents, index).detach(), expected * scale)
        assert not student.scale.requires_grad
    student = dense(tiny_encoder, similarity="cos")
    np.testing.assert_allclose(np.diag(student.similarities(TEXTS[:2], TEXTS[:2])), 1, atol=1e-5)
    learning = dense(tiny_encoder, learn_scale=True)
    learning.score_lists(queries, documents, index).sum().backward()
    assert learning.scale.grad is not None and learning.scale.grad.item() == 2.0


def test_a_static_table_holds_each_token_through_the_encoder(tiny_encoder: Path) -> None:
    """`forward`: the vector of a one-token text is the encoder's own."""
    student = StaticStudent(str(tiny_encoder), similarity="dot").create("cpu")
    encoder = SentenceTransformer(str(tiny_encoder), device="cpu")
    np.testing.assert_allclose(student.encode_documents(["metal"]), encoder.encode(["metal"]), atol=2e-2)


def test_a_saved_table_is_a_start_too_but_has_no_layers(tiny_encoder: Path, tmp_path: Path) -> None:
    table = StaticStudent(str(tiny_encoder), similarity="dot").create("cpu")
    table.save(tmp_path / "static")
    again = dense(tmp_path / "static", similarity="dot")
    np.testing.assert_allclose(again.encode_documents(TEXTS), table.encode_documents(TEXTS), atol=1e-5)
    with pytest.raises(UsageError, match=r"no transformer whose layers(?s:.*)student\.layers"):
        dense(tmp_path / "static", layers=[0])


def test_a_folder_of_plain_sentence_transformers_opens_with_its_own_similarity(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    for name, similarity in (("dot", "dot"), ("cosine", "cos")):
        model.similarity_fn_name = name
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
        opened = DenseStudent(precision="fp32").open(tmp_path / name, "cpu")
        assert opened.similarity == similarity
        lengths = np.linalg.norm(opened.encode_documents(TEXTS[:2]), axis=1)
        assert (np.abs(lengths - 1) < 1e-5).all() == (similarity == "cos")


def test_encoding_does_not_depend_on_what_else_is_encoded(tiny_encoder: Path) -> None:
    """Texts are sorted by length and padded together; each vector is its own text's all the same."""
    student = dense(tiny_encoder)
    together = student.encode_documents(TEXTS * 3)
    np.testing.assert_allclose(together[:5], together[5:10], atol=1e-6)
    for place, text in enumerate(TEXTS):
        np.testing.assert_allclose(student.encode_documents([text])[0], together[place], atol=1e-5)
    assert student.encode_documents([]).shape == (0, 32)


@pytest.mark.parametrize("side", ["right", "left"])
def test_parts_of_like_length_cover_every_text_once(side: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    mask = torch.zeros(60, 40, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(40 - length, 40)] = 1
    ids = torch.arange(60)[:, None] * mask
    parts = split_by_length({"input_ids": ids, "attention_mask": mask, "prompt_length": 3}, budget=128)
    rows = np.concatenate([rows for rows, _ in parts])
    assert sorted(rows.tolist()) == list(range(60))
    assert len(parts) > 5
    for rows, part in parts:
        assert part["input_ids"].numel() <= 128
        assert part["prompt_length"] == 3
        assert (part["attention_mask"].sum(1).numpy() == lengths[rows]).all()  # no token is cut off
        assert (part["input_ids"].amax(1).numpy() == rows).all()  # nor another row's


def test_the_fingerprint_names_weights_and_settings_but_no_path(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "elsewhere")
    original = dense(tiny_encoder).fingerprint
    assert dense(tmp_path / "elsewhere").fingerprint == original
    for settings in ({"layers": [0]}, {"query_length": 7}, {"similarity": "dot"}, {"pooling": "cls"}):
        assert dense(tiny_encoder, **settings).fingerprint != original


def test_dropout_is_set_everywhere_and_is_off_while_encoding(tiny_encoder: Path) -> None:
    student, other = dense(tiny_encoder, dropout=0.0).train(), dense(tiny_encoder).train()
    features = student.preprocess(["which metal rusts in water"], "query")
    assert torch.equal(student.embed(features, "query"), student.embed(features, "query"))
    assert not torch.equal(other.embed(features, "query"), other.embed(features, "query"))
    np.testing.assert_array_equal(other.encode_queries(TEXTS), other.encode_queries(TEXTS))
    assert other.training and other.model.training


def test_texts_that_a_static_student_cuts_are_counted(tiny_encoder: Path) -> None:
    model = StaticStudent(model=str(tiny_encoder), document_length=3).create("cpu")
    np.testing.assert_array_equal(*model.encode_documents(["gold does not tarnish", "gold does not"]))
    model.take_cut()
    model.encode_queries(["iron iron iron", "iron", "iron iron iron iron", ""])
    model.encode_documents(["gold gold gold gold gold", "iron iron iron iron"])
    assert model.cut == {"query": 1, "document": 2}


def test_cut_queries_are_counted_and_said_once(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dense(tiny_encoder, query_length=6, document_length=8)
    model.encode_queries(["gold", "iron"])
    assert model.cut == {"query": 0, "document": 0} and "query_length" not in capsys.readouterr().err
    model.encode_queries(["gold", "gold and iron and oak", "iron iron iron iron iron"])
    assert model.cut["query"] == 2
    assert "2 of 3 queries are longer than query_length and are cut" in capsys.readouterr().err
    model.encode_queries(["gold and iron and oak"])
    assert model.cut["query"] == 3 and "query_length" not in capsys.readouterr().err
    texts = tiny_collection.document_texts(np.arange(tiny_collection.document_count))
    whole = dense(tiny_encoder, document_length=64).preprocess(texts, "document")["attention_mask"].sum(dim=1)
    counts = encode_documents(model, tiny_collection, tmp_path / "vectors", shard_size=10).counts
    assert counts["cut"] == int((whole > 8).sum()) > 0


def test_a_teacher_reports_what_it_cut(tiny_encoder: Path) -> None:
    teacher = BiEncoderTeacher(str(tiny_encoder), max_length=6, device="cpu")
    assert teacher.take_report() == {}
    teacher.score_pairs(["gold and iron and oak"], ["gold", "gold and iron and oak"], np.array([[0, 0], [0, 1]]))
    assert teacher.take_report() == {"cut_query": 1, "cut_document": 1}
    assert teacher.take_report() == {}
