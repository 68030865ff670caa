"""What a student of any kind saves is the same model in plain sentence-transformers, opened again, and as a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from small_models import TEXTS as SHORT_AND_LONG

from rankdistill.recipe import build
from rankdistill.students.models import SETTINGS_FILE
from rankdistill.students.sparse import is_sparse
from rankdistill.students.token_vectors import TokenVectors
from rankdistill.students.token_weights import TokenWeights
from rankdistill.teachers.cross_encoder import CrossEncoderTeacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection

QUERIES = ["which metal rusts, in water?", "gold gold", "", "[SEP] Ω", "iron gold " * 60]
TEXTS = [*SHORT_AND_LONG, "Honey bees gather nectar; ünïcödé 蜜蜂 \x00 too"]
LOADERS: dict[str, Any] = {
    "dense": SentenceTransformer,
    "static": SentenceTransformer,
    "multi_vector": MultiVectorEncoder,
    "splade": SparseEncoder,
    "inference_free": SparseEncoder,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("dense", {"similarity": "cos"}),
    ("dense", {"layers": [1], "pooling": "cls"}),
    ("dense", {"query_length": 5, "document_length": 11}),
    ("dense", {"query_prompt": "which ", "document_prompt": "a fact: ", "query_length": 9}),
    ("static", {}),
    ("static", {"similarity": "dot"}),
    ("static", {"dimension": 6}),
    ("static", {"start": "words"}),
    ("multi_vector", {}),
    ("multi_vector", {"dimension": 8, "projection": "random"}),
    ("multi_vector", {"projection": "none", "similarity": "dot"}),
    ("multi_vector", {"layers": [1], "query_length": 5, "document_length": 11, "skip_punctuation": False}),
    ("multi_vector", {"query_expansion": True, "query_length": 12}),
    ("multi_vector", {"query_expansion": True, "query_length": 12, "attend_to_expansion": True}),
    ("multi_vector", {"query_prompt": "which ", "document_prompt": "a fact: "}),
    ("splade", {}),
    ("splade", {"pooling": "sum"}),
    ("splade", {"activation": "log1p_relu", "layers": [1], "query_length": 5, "document_length": 11}),
    ("splade", {"query_encoder": "separate", "pooling": "sum", "activation": "log1p_relu"}),
    ("splade", {"query_prompt": "which ", "document_prompt": "a fact: "}),
    ("inference_free", {}),
    ("inference_free", {"pooling": "sum", "activation": "log1p_relu", "query_length": 9}),
]


def student(kind: str, model: Path, **settings: Any) -> Any:
    return build("student", {"type": kind, "model": str(model), "precision": "fp32", **settings})


def plain(encoded: Any) -> np.ndarray:
    """What ours or sentence-transformers' encoders return, as numbers."""
    if isinstance(encoded, TokenVectors):
        return encoded.vectors
    if isinstance(encoded, csr_matrix | torch.Tensor):
        return np.asarray(encoded.toarray() if isinstance(encoded, csr_matrix) else encoded.to_dense())
    return np.concatenate([np.asarray(tokens) for tokens in encoded]) if isinstance(encoded, list) else encoded


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_a_saved_student_encodes_the_same_everywhere(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    model, folder = student(kind, tiny_encoder, **settings).create("cpu"), tmp_path / "model"
    model.prepare(tiny_collection, tmp_path / "prepared")
    model.save(folder)
    queries, documents = plain(model.encode_queries(QUERIES)), plain(model.encode_documents(TEXTS))
    assert queries.any() and documents.any() and np.isfinite(documents).all()
    theirs = LOADERS[kind](str(folder), device="cpu", local_files_only=True)
    np.testing.assert_allclose(plain(theirs.encode_query(QUERIES)), queries, atol=1e-4)
    np.testing.assert_allclose(plain(theirs.encode_document(TEXTS)), documents, atol=1e-4)
    opened = student(kind, tiny_encoder).open(folder, "cpu")
    np.testing.assert_allclose(plain(opened.encode_queries(QUERIES)), queries, atol=1e-5)
    np.testing.assert_allclose(plain(opened.encode_documents(TEXTS)), documents, atol=1e-5)
    assert (opened.similarity, opened.dimension) == (model.similarity, model.dimension)
    if kind == "multi_vector":  # the start of another training keeps its projection and settings
        again = student(kind, folder).create("cpu")
        np.testing.assert_allclose(again.similarities(QUERIES, TEXTS), model.similarities(QUERIES, TEXTS), atol=1e-6)
    if model.sparse:
        saved = json.loads((folder / SETTINGS_FILE).read_text())
        assert is_sparse(folder) and not is_sparse(tiny_encoder) and saved["type"] == kind
        assert (saved["fingerprint"], saved["document_fingerprint"]) == (
            opened.fingerprint,
            opened.document_fingerprint,
        )
    if kind == "inference_free":
        without_torch = TokenWeights.open(folder)
        for other in (theirs, opened, without_torch, student("splade", tiny_encoder).open(folder, "cpu")):
            encode = getattr(other, "encode_queries", None) or other.encode_query
            np.testing.assert_array_equal(plain(encode(QUERIES)), queries)
        with torch.inference_mode():
            embedded = opened.eval().embed(opened.preprocess(QUERIES, "query"), "query")
        np.testing.assert_array_equal(embedded.numpy(), queries)
        assert opened.inference_free and without_torch.terms == opened.terms == model.terms
        assert without_torch.fingerprint == opened.fingerprint
        assert without_torch.document_fingerprint == opened.document_fingerprint
        lengths = (queries > 0).sum(axis=1)
        assert (lengths[2:4] == 0).all() and lengths[0] > 3
        assert lengths[1] == 1  # a token that is there twice counts once


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("start", ["encoder", "head"])
def test_a_saved_cross_encoder_is_a_teacher_and_one_of_the_library(
    encoder: Path, tiny_collection: Collection, tmp_path: Path, start: str, layers: list[int] | None
) -> None:
    texts = tiny_collection.query_texts(tiny_collection.query_ids()[:4]), tiny_collection.document_texts(range(8))
    folder = tmp_path / "model"
    torch.manual_seed(1)
    model = student("cross_encoder", encoder, layers=layers, start=start, max_length=33).create("cpu").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gates" in name or "head" in name or "factor" in name:
                weight.add_(torch.rand_like(weight))  # as after some training
    scores = model.similarities(*texts)
    model.save(folder)
    np.testing.assert_allclose(student("cross_encoder", encoder).open(folder, "cpu").similarities(*texts), scores)
    again = student("cross_encoder", folder, max_length=33).create("cpu").eval()  # and a student goes on from it
    np.testing.assert_allclose(again.similarities(*texts), scores, atol=1e-5)
    pairs = np.indices(scores.shape).reshape(2, -1).T
    teacher = CrossEncoderTeacher(str(folder), precision="fp32", device="cpu")
    np.testing.assert_allclose(teacher.score_pairs(*texts, pairs), scores.ravel(), atol=1e-5)
    theirs = CrossEncoder(str(folder), device="cpu", trust_remote_code=start == "encoder")
    assert theirs.num_labels == 1 and theirs.max_seq_length == 33 and not list(folder.rglob("*.py"))
    asked = [(query, text) for query in texts[0] for text in texts[1]]
    np.testing.assert_allclose(theirs.predict(asked), scores.ravel(), atol=1e-5)
