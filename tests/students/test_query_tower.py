"""Query towers: a small query encoder over another model's documents, trained without labels, searching its index."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build, load_recipe
from rankdistill.stages import Workspace
from rankdistill.students.base import ENCODE_BUDGET, to_device
from rankdistill.students.dense import DenseModel
from rankdistill.students.query_tower import QueryTowerModel, QueryTowerStudent
from rankdistill.training.dev import Agreement

if TYPE_CHECKING:
    from rankdistill.collections import Collection

FP32 = {"precision": "fp32"}
QUERIES = ["which metal rusts in water", "bird that swims and cannot fly", "what goes round the earth in a month"]


@pytest.fixture(scope="module")
def narrow_encoder(tiny_beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another width (20) and another tokenizer (whole words) than the tiny encoder has."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    texts = "".join((tiny_beir / name).read_text() for name in ("corpus.jsonl", "queries.jsonl"))
    words = sorted(set(re.findall(r"[a-z]+", texts.lower())))
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).normal(size=(len(words) + 1, 20)).astype(np.float32)
    folder = tmp_path_factory.mktemp("narrow") / "model"
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def tower(small: Path, large: Path, **settings: Any) -> QueryTowerModel:
    values = {"model": str(small), "document_model": str(large), "precision": "fp32", "document_length": 32}
    return QueryTowerStudent(**{**values, **settings}).create("cpu")


def large_model(path: Path) -> DenseModel:
    settings = {"type": "dense", "model": str(path), "precision": "fp32", "document_length": 32}
    model: DenseModel = build("student", settings).create("cpu")
    return model


def test_queries_by_the_small_model_documents_by_the_large_one(tiny_encoder: Path, narrow_encoder: Path) -> None:
    large, model = large_model(tiny_encoder), tower(narrow_encoder, tiny_encoder)
    texts = ["Iron is a metal.", "Bees make honey."]
    np.testing.assert_array_equal(model.encode_documents(texts), large.encode_documents(texts))
    assert model.encode_queries(QUERIES).shape == (3, large.dimension) and model.similarity == large.similarity
    # Where the widths are equal a projection starts as the identity; where they differ there must be one.
    mapped = tower(tiny_encoder, tiny_encoder, projection="linear")
    np.testing.assert_allclose(mapped.encode_queries(QUERIES), large.encode_queries(QUERIES), atol=1e-6)
    with pytest.raises(UsageError, match="20 dimensions, the document model 32"):
        tower(narrow_encoder, tiny_encoder, projection="none")
    with pytest.raises(UsageError, match="layers"):
        QueryTowerStudent(encoder="static", layers=[0])
    # Only the query encoder is trained and counted.
    narrow = SentenceTransformer(str(narrow_encoder), device="cpu")
    own = sum(parameter.numel() for parameter in narrow.parameters()) + 20 * large.dimension
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == own
    # The projection keeps angles at first: 20 dimensions fit into 32.
    before = narrow.encode(QUERIES, normalize_embeddings=True)
    after = model.encode_queries(QUERIES)
    after /= np.linalg.norm(after, axis=1, keepdims=True)
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)


def test_an_index_of_the_large_model_is_searched_and_no_other(
    tiny_collection: Collection, tiny_encoder: Path, narrow_encoder: Path, tmp_path: Path
) -> None:
    from rankdistill.indexes.dense import DenseEngine, export_index
    from rankdistill.indexes.specification import load_specification
    from rankdistill.indexes.vectors import encode_documents

    large = large_model(tiny_encoder)
    vectors = encode_documents(large, tiny_collection, tmp_path / "vectors")
    index = export_index(large, tiny_collection, vectors, load_specification("flat"), tmp_path / "large.faiss")
    # A tower that starts from the large model itself searches as it does.
    same = tower(tiny_encoder, tiny_encoder)
    for query, mine, its in zip(
        QUERIES,
        DenseEngine(same, index, collection=tiny_collection).search(QUERIES, 5),
        DenseEngine(large, index).search(QUERIES, 5),
    ):
        assert mine.rows.tolist() == its.rows.tolist(), query
    DenseEngine(tower(narrow_encoder, tiny_encoder), index)
    # What it encodes is the large model's: found where that has encoded them.
    again = encode_documents(same, tiny_collection, tmp_path / "vectors")
    assert again.fingerprint == vectors.fingerprint and again.manifest == vectors.manifest
    # Its queries are not the large model's.
    assert same.fingerprint != large.fingerprint
    for other in (large_model(narrow_encoder), tower(tiny_encoder, tiny_encoder, document_length=16)):
        with pytest.raises(RankdistillError, match=r"another student|dimensions"):
            DenseEngine(other, index)


def test_what_is_saved_is_a_plain_sentence_transformer_and_opens_without_the_large_model(
    tiny_encoder: Path, narrow_encoder: Path, tmp_path: Path
) -> None:
    large = shutil.copytree(tiny_encoder, tmp_path / "large")
    model = tower(narrow_encoder, large)
    folder = tmp_path / "tower"
    folder.mkdir()
    model.save(folder)
    plain = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(plain.encode(QUERIES), model.encode_queries(QUERIES), atol=1e-5)
    settings = {"type": "query_tower", "document_model": str(large), "precision": "fp32", "document_length": 32}
    shutil.rmtree(large)
    opened = build("student", settings).open(folder, "cpu")
    np.testing.assert_allclose(opened.encode_queries(QUERIES), model.encode_queries(QUERIES), atol=1e-5)
    assert opened.document_fingerprint == model.document_fingerprint
    with pytest.raises(RankdistillError, match="large"):
        opened.encode_documents(["Iron."])
    # Another model in its place is noticed when a document has to be encoded.
    shutil.copytree(narrow_encoder, large)
    with pytest.raises(RankdistillError, match="another document model"):
        build("student", settings).open(folder, "cpu").encode_documents(["Iron."])
    with pytest.raises(RankdistillError, match="whose documents"):
        build("student", settings).open(tiny_encoder, "cpu")


@pytest.mark.parametrize("encoder", ["transformer", "static"])
def test_both_models_are_one_sentence_transformer(tiny_encoder: Path, tmp_path: Path, encoder: str) -> None:
    layers = {"layers": [0]} if encoder == "transformer" else {}
    model = tower(tiny_encoder, tiny_encoder, encoder=encoder, query_prompt="query: ", **layers)
    model.save_both(tmp_path / "both")
    plain, texts = SentenceTransformer(str(tmp_path / "both"), device="cpu"), ["Iron is a metal. " * 20, "Bees."]
    np.testing.assert_allclose(plain.encode_query(QUERIES), model.encode_queries(QUERIES), atol=1e-5)
    np.testing.assert_allclose(plain.encode_document(texts), model.encode_documents(texts), atol=1e-5)
    assert plain.similarity_fn_name == model.model.similarity_fn_name


def recipe_for(collection: Path, small: Path, large: Path, **training: Any) -> Any:
    short = {"document_length": 32, **FP32}
    model = {"model": str(large), **short}
    return load_recipe(
        {
            "name": "tower",
            "collection": f"beir:{collection}",
            "candidates": {"depth": 8, "unlabelled": "queries", "sources": [{"type": "dense", **model}]},
            "teacher": {"type": "bi_encoder", "model": str(large), **FP32, "max_length": 32, "scale": 300.0},
            "student": {
                "type": "query_tower",
                "model": str(small),
                "document_model": str(large),
                **short,
                "scale": 300.0,
            },
            "training": {
                "losses": [{"type": "query_mse"}],
                "batch_teacher": {"type": "dense", **model},
                "batches": {"type": "random_batches", "size": 4},
                "lists": {"type": "random_documents", "size": 4},
                "steps": 60,
                "learning_rate": 3e-2,
                "checkpoints": 3,
                "dev_documents": 32,
                "precision": "fp32",
                "device": "cpu",
                **training,
            },
        }
    )


@pytest.mark.parametrize("changes", [{}, {"losses": [{"type": "kl"}], "batch_teacher": None}], ids=["query_mse", "kl"])
def test_it_learns_from_queries_alone(
    changes: dict[str, Any], tiny_beir: Path, tiny_encoder: Path, narrow_encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "facts").mkdir()  # without any judgment
    for name in ("corpus.jsonl", "queries.jsonl"):
        shutil.copy(tiny_beir / name, tmp_path / "facts" / name)
    recipe = recipe_for(tmp_path / "facts", narrow_encoder, tiny_encoder, **changes)
    run = Workspace(tmp_path / "run", recipe, tmp_path / "store")
    train, dev, judged = run.queries
    assert judged is None and len(train) + len(dev) == 16 and len(dev) == 2
    lists = run.score()
    assert (np.asarray(lists.relevance) == -1).all()
    artifact = run.train()
    curve = artifact.manifest["dev"]
    assert "the teacher's order" in artifact.manifest["dev_metric"] and max(curve.values()) >= curve["0"]

    large, student, start = large_model(tiny_encoder), run.student(), run.student("untrained")
    # Mean Kendall's tau with the large model over its training lists.
    agreement = Agreement(lists, run.collection)
    assert agreement.evaluate(student) > agreement.evaluate(start) + 0.2
    # The documents were encoded once, in mining, and the index is the large model's.
    assert not (run.path / "vectors").exists() or not list((run.path / "vectors").iterdir())
    index = run.index("flat")
    assert index.manifest["student_fingerprint"] == large.fingerprint
    index.check(large, run.collection)
    assert run.engine(index.path).search(["which metal rusts in water"], 3)[0].rows.shape == (3,)


def test_the_large_model_does_not_run_while_it_learns(
    tiny_collection: Collection, tiny_encoder: Path, narrow_encoder: Path, tmp_path: Path
) -> None:
    from rankdistill.indexes.by_student import prepare_student
    from rankdistill.students.base import split_by_length

    model = tower(narrow_encoder, tiny_encoder)
    prepare_student(model, tiny_collection, tmp_path / "prepared")
    large, model.documents._model = model.documents.load(), None
    model.documents.settings = {"model": str(tmp_path / "gone")}
    rows = np.array([3, 0, 3, 7])
    ((places, part),) = split_by_length(model.preprocess_documents(tiny_collection, rows), ENCODE_BUDGET)
    embedded = model.embed(to_device(part, torch.device("cpu")), "document")
    assert not embedded.requires_grad and places.tolist() == [0, 1, 2, 3]
    expected = large.encode_documents(tiny_collection.document_texts(rows))
    np.testing.assert_allclose(embedded.numpy(), expected, atol=1e-6)
    scores = model.score_lists(
        model.embed(model.preprocess(QUERIES, "query"), "query"), embedded, torch.tensor([[0, 1]] * 3)
    )
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters() if parameter.requires_grad)


def test_vectors_made_before_are_taken_or_refused(
    tiny_collection: Collection, tiny_encoder: Path, narrow_encoder: Path, tmp_path: Path
) -> None:
    from rankdistill.indexes.by_student import encode_collection
    from rankdistill.indexes.vectors import encode_documents

    made = encode_documents(large_model(tiny_encoder), tiny_collection, tmp_path / "made")
    model = tower(narrow_encoder, tiny_encoder, document_vectors=str(made.path))
    assert encode_collection(model, tiny_collection, tmp_path / "run" / "vectors" / "student-facts").path == made.path
    other = tower(narrow_encoder, tiny_encoder, document_vectors=str(made.path), document_length=8)
    with pytest.raises(RankdistillError, match="another model"):
        encode_collection(other, tiny_collection, tmp_path / "run" / "vectors" / "student-facts")
