"""Sparse students: what they encode is what a plain SparseEncoder encodes, whatever way they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sentence_transformers import SparseEncoder
from small_models import TEXTS

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.base import to_device
from rankdistill.students.sparse import SparseModel, SpladeStudent, active_terms

if TYPE_CHECKING:
    from rankdistill.collections import Collection

QUERIES = ["which metal rusts, in water?", "gold gold", ""]


def student(encoder: Path, **settings: Any) -> SparseModel:
    return SpladeStudent(str(encoder), **{"precision": "fp32", **settings}).create("cpu")


def plain_vectors(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(queries, texts) as a user of plain sentence-transformers gets them."""
    plain = SparseEncoder(str(folder), device="cpu", local_files_only=True)
    return tuple(
        encode(texts, convert_to_tensor=True).to_dense().numpy()
        for encode, texts in ((plain.encode_query, QUERIES), (plain.encode_document, TEXTS))
    )  # type: ignore[return-value]


@pytest.fixture(scope="module")
def masked_model(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with a masked-language head, as transformers saves it."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("masked") / "model"
    torch.manual_seed(1)
    AutoModelForMaskedLM.from_pretrained(tiny_encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


def test_vectors_are_sparse_matrices_in_good_order(tiny_encoder: Path) -> None:
    model = student(tiny_encoder)
    texts = TEXTS * 30
    vectors = model.encode_documents(texts)
    assert isinstance(vectors, csr_matrix) and vectors.dtype == np.float32
    assert vectors.shape == (len(texts), model.dimension) == (150, len(model.terms))
    assert vectors.has_sorted_indices and (vectors.data > 0).all()
    np.testing.assert_allclose(vectors[:5].toarray(), vectors[-5:].toarray(), atol=1e-5)
    with torch.inference_mode():
        embedded = model.eval().embed(to_device(model.preprocess(TEXTS, "document"), model.device), "document")
    np.testing.assert_allclose(vectors[:5].toarray(), embedded.numpy(), atol=1e-5)
    assert model.encode_documents([]).shape == (0, model.dimension)
    assert model.terms[int(model.model.tokenizer.convert_tokens_to_ids("iron"))] == "iron"


def test_scores_are_products_of_the_vectors(tiny_encoder: Path) -> None:
    model = student(tiny_encoder, scale=3.0)
    queries, documents = (
        torch.from_numpy(one.toarray()) for one in (model.encode_queries(QUERIES), model.encode_documents(TEXTS))
    )
    index = torch.tensor([[0, 1], [4, 2], [3, 3]])
    wanted = 3.0 * torch.einsum("qd,qnd->qn", queries, documents[index])
    torch.testing.assert_close(model.score_lists(queries, documents, index), wanted)
    torch.testing.assert_close(model.score_all(queries, documents).gather(1, index), wanted)
    similarities = model.similarities(QUERIES, TEXTS)
    assert isinstance(similarities, np.ndarray) and similarities.dtype == np.float32
    np.testing.assert_allclose(similarities, (queries @ documents.T).numpy(), rtol=1e-5)


def test_a_model_with_a_head_keeps_it_without_a_word(
    masked_model: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = student(masked_model)
    before = model.encode_documents(TEXTS)
    model.prepare(tiny_collection, tmp_path)
    assert abs(model.encode_documents(TEXTS) - before).max() == 0
    assert "head" not in capsys.readouterr().err
    plain = SparseEncoder(str(masked_model), device="cpu", local_files_only=True)
    wanted = plain.encode_document(TEXTS[:2], convert_to_tensor=True).to_dense().numpy()
    np.testing.assert_allclose(before[:2].toarray(), wanted, atol=1e-4)


def test_a_foreign_sparse_encoder_is_opened_as_it_is(masked_model: Path, tmp_path: Path) -> None:
    SparseEncoder(str(masked_model), device="cpu", local_files_only=True).save_pretrained(str(tmp_path / "foreign"))
    model = SpladeStudent(precision="fp32").open(tmp_path / "foreign", "cpu")
    for made, wanted in zip((QUERIES, TEXTS), plain_vectors(tmp_path / "foreign"), strict=True):
        got = model.encode_queries(made) if made is QUERIES else model.encode_documents(made)
        np.testing.assert_allclose(got.toarray(), wanted, atol=1e-4)
    started = student(tmp_path / "foreign", query_length=None, document_length=None)
    assert abs(started.encode_documents(TEXTS[:2]) - model.encode_documents(TEXTS[:2])).max() < 1e-5
    (tmp_path / "foreign" / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "sum"}')
    assert SpladeStudent(precision="fp32").open(tmp_path / "foreign", "cpu").fingerprint != model.fingerprint


def test_one_step_of_training_reaches_encoder_head_and_scale(tiny_encoder: Path) -> None:
    model = student(tiny_encoder, learn_scale=True, dropout=0.0)
    model.train()
    features = model.preprocess(TEXTS[:2], "document")
    scores = model.score_all(
        model.embed(model.preprocess(QUERIES[:2], "query"), "query"), model.embed(features, "document")
    )
    (scores[0, 1] - scores[0, 0]).backward()
    before = scores.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-4 * parameter.grad
    after = model.score_all(
        model.embed(model.preprocess(QUERIES[:2], "query"), "query"), model.embed(features, "document")
    )
    assert after[0, 0] - after[0, 1] > before[0, 0] - before[0, 1]
    assert model.scale.grad is not None
    names = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert any("word_embeddings" in name for name in names) and any("transform.dense" in name for name in names)


def test_limits_on_terms_keep_the_largest(tiny_encoder: Path, tmp_path: Path) -> None:
    whole, cut = student(tiny_encoder), student(tiny_encoder, document_terms=3, query_terms=2)
    vectors, few = whole.encode_documents(TEXTS), cut.encode_documents(TEXTS)
    assert (few.getnnz(axis=1) == 3).all() and (cut.encode_queries(QUERIES).getnnz(axis=1) == 2).all()
    for row in range(len(TEXTS)):
        np.testing.assert_array_equal(np.sort(few[row].data), np.sort(vectors[row].data)[-3:])
    assert whole.fingerprint != cut.fingerprint
    cut.save(tmp_path / "cut")
    opened = SpladeStudent(precision="fp32").open(tmp_path / "cut", "cpu")
    assert abs(opened.encode_documents(TEXTS) - few).max() < 1e-5


def test_statistics_count_terms() -> None:
    class Bare(SparseModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    queries = torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]])
    documents = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [2, 0, 0, 0]])
    figures = {name: round(float(one), 6) for name, one in Bare().statistics(queries, documents).items()}
    assert figures == {
        "active_terms/query": 1.0,
        "active_terms/document": 2.0,
        "empty/query": 0.5,
        "empty/document": 0.0,
        "common_terms/document": (1 / 2 + 1 + 1 / 4 + 1) / 4,  # the first term fires in all of them
    }


def test_models_that_cannot_be_sparse_students(
    tiny_encoder: Path, tiny_causal_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="has no masked-language head"):
        student(tiny_causal_lm)
    with pytest.raises(RankdistillError, match="no SparseEncoder"):
        SpladeStudent().open(tiny_encoder, "cpu")
    with pytest.raises(RankdistillError, match="not finite"):
        active_terms(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(UsageError, match="shared query encoder"):
        SpladeStudent(query_model="x")


def test_two_encoders_of_different_vocabularies_are_refused(masked_model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(masked_model, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["gold"], words["iron"] = words["iron"], words["gold"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"2 of \d+ tokens differ"):
        student(masked_model, query_encoder="separate", query_model=str(other))


@pytest.mark.parametrize("kind", ["RobertaConfig", "DistilBertConfig", "ModernBertConfig"])
@pytest.mark.parametrize("head", [True, False])
def test_other_kinds_of_encoders(
    kind: str, head: bool, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    sizes: dict[str, int] = {"vocab_size": len(tokenizer), "max_position_embeddings": 80, "pad_token_id": 0}
    if kind == "DistilBertConfig":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3} if "Modern" in kind else {}
    maker: Any = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
    torch.manual_seed(0)
    maker.from_config(getattr(transformers, kind)(**sizes)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    model = student(tmp_path / "start")
    assert ("has no masked-language head" in capsys.readouterr().err) is not head
    assert all(one is not None for one in model._heads.values())  # in little memory, all of them
    model.save(tmp_path / "model")
    _, documents = plain_vectors(tmp_path / "model")
    np.testing.assert_allclose(model.encode_documents(TEXTS).toarray(), documents, atol=1e-4)
    bert: Any = model.model[0].model  # type: ignore[union-attr]
    assert bert.get_output_embeddings().weight is bert.get_input_embeddings().weight
