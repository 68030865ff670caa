"""Teachers of term weights: their scores are those of the engine or model behind them, for every pair."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.bm25 import BM25
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import TextList
from rankdistill.teachers.ensemble import EnsembleTeacher
from rankdistill.teachers.scoring import score_candidates
from rankdistill.teachers.sparse import BM25Teacher, SparseEncoderTeacher

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def everything(collection: Collection) -> list[tuple[str, list[str], np.ndarray]]:
    """Every query with every document."""
    doc_ids = collection.doc_ids(range(collection.document_count))
    return [(query_id, doc_ids, np.zeros(len(doc_ids))) for query_id in collection.query_ids()]


def slow_bm25(query: str, documents: list[str], k1: float, b: float) -> list[float]:
    """The formula, a document at a time, over words of two letters and more, without stop words and stemming."""
    words = [re.findall(r"\b\w\w+\b", text.lower()) for text in documents]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for document in words:
        score = 0.0
        for term in re.findall(r"\b\w\w+\b", query.lower()):
            frequency = sum(term in other for other in words)
            tf = document.count(term)
            if tf:
                idf = math.log(1 + (len(words) - frequency + 0.5) / (frequency + 0.5))
                score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_bm25_scores_every_pair_by_the_formula(tiny_collection: Collection, tmp_path: Path) -> None:
    teacher = BM25Teacher(k1=1.2, b=0.75, language="none")
    scores = score_candidates(teacher, tiny_collection, everything(tiny_collection), ScoreStore(tmp_path))
    documents = tiny_collection.document_texts(range(tiny_collection.document_count))
    zeros = 0
    for query_id, doc_ids, _ in everything(tiny_collection):
        query = tiny_collection.query_texts([query_id])[0]
        found = scores.scores_of(query_id, doc_ids)
        np.testing.assert_allclose(found, slow_bm25(query, documents, 1.2, 0.75), rtol=1e-5)
        zeros += int((found == 0).sum())
    assert zeros > 50  # no common word: a score all the same


def test_bm25_teaches_what_the_engine_finds(tiny_collection: Collection, tmp_path: Path) -> None:
    teacher = BM25Teacher(scale=2.0)
    scores = score_candidates(teacher, tiny_collection, everything(tiny_collection), ScoreStore(tmp_path))
    BM25().build(tiny_collection, tmp_path / "engine")
    engine = BM25.open(tmp_path / "engine")
    for query_id, doc_ids, _ in everything(tiny_collection):
        (hits,) = engine.search(tiny_collection.query_texts([query_id]), 10_000)
        expected = np.zeros(len(doc_ids), np.float32)
        expected[hits.rows] = 2 * hits.scores
        np.testing.assert_allclose(scores.scores_of(query_id, doc_ids), expected, rtol=1e-5)


def test_bm25_needs_a_collection_and_goes_by_the_last(
    tiny_collection: Collection, tiny_beir: Path, tmp_path: Path
) -> None:
    from rankdistill.collections import open_collection

    item = TextList("q", "gas", ["d"], ["Helium is a light gas"])
    teacher = BM25Teacher()
    with pytest.raises(RankdistillError, match="knows no collection"):
        list(teacher.score([item]))
    shutil.copytree(tiny_beir, tmp_path / "other")
    gases = [line for line in (tiny_beir / "corpus.jsonl").read_text().splitlines(True) if "gas" in line]
    (tmp_path / "other" / "corpus.jsonl").write_text("".join(gases))
    other = open_collection(f"beir:{tmp_path}/other")
    found = []
    for collection in (tiny_collection, other, tiny_collection):
        teacher.prepare(collection, tmp_path / "prepared")
        found.append(float(next(teacher.score([item]))[2][0]))
    assert found[0] == found[2] and found[0] > 2 * found[1] > 0
    assert len(list((tmp_path / "prepared").glob("bm25-*/manifest.json"))) == 2


def test_the_store_pays_bm25_once_and_keeps_its_settings_apart(tiny_collection: Collection, tmp_path: Path) -> None:
    store, lists = ScoreStore(tmp_path), everything(tiny_collection)
    first = score_candidates(BM25Teacher(), tiny_collection, lists, store)
    again = BM25Teacher()
    assert score_candidates(again, tiny_collection, lists, store).scored == 0 < first.scored
    assert again.engine.path is None  # nothing to score: nothing was indexed or opened
    assert len({BM25Teacher(**change).fingerprint() for change in ({}, {"k1": 1.0}, {"b": 0.1}, {"scale": 2.0})}) == 4  # type: ignore[arg-type]


def test_vectors_kept_change_no_score(
    tiny_collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankdistill.teachers import sparse

    documents = tiny_collection.document_texts(range(tiny_collection.document_count))
    queries = tiny_collection.query_texts(tiny_collection.query_ids())
    pairs = np.array([(q, d) for q in range(len(queries)) for d in range(len(documents))])
    teacher = BM25Teacher()
    teacher.prepare(tiny_collection, tmp_path)
    expected = teacher.score_pairs(queries, documents, pairs)
    monkeypatch.setattr(sparse, "POSTINGS_AT_ONCE", 50)
    np.testing.assert_array_equal(teacher.score_pairs(queries, documents, pairs), expected)
    for most in (40, 3):  # room for some documents; for none
        monkeypatch.setattr(sparse, "KEPT_POSTINGS", most)
        teacher = BM25Teacher()
        teacher.prepare(tiny_collection, tmp_path)
        for first in (0, 4, 2, 8):
            some = pairs[pairs[:, 1] < 4]
            found = teacher.score_pairs(queries, documents[first : first + 4], some)
            np.testing.assert_array_equal(found, expected.reshape(len(queries), -1)[:, first : first + 4].ravel())
            assert sum(len(columns) for columns, _ in teacher._kept.values()) == teacher._kept_postings <= most
        np.testing.assert_array_equal(teacher.score_pairs(queries, documents, pairs), expected)


def test_an_ensemble_of_kinds_by_hand(tiny_collection: Collection, tmp_path: Path) -> None:
    """Per query min-max of each member over all candidates, mean, × 30; then KL of the softmax."""
    import torch

    from rankdistill.losses.divergence import KLDivergence

    ensemble = EnsembleTeacher(
        [
            {"type": "recorded", "file": str(_recorded(tmp_path / "dense.tsv", [0.9, 0.5, 0.1]))},
            {"type": "recorded", "file": str(_recorded(tmp_path / "sparse.tsv", [4.0, 12.0, 0.0]))},
        ],
        normalisation="min_max",
        aggregation="mean",
        scale=30.0,
    )
    doc_ids = ["d-iron", "d-gold", "d-moon"]
    lists = [("q-iron", doc_ids, np.zeros(3))]
    store = ScoreStore(tmp_path / "store")
    source = ensemble.combine([score_candidates(one, tiny_collection, lists, store) for one in ensemble.teachers])
    # dense: 1, .5, 0; sparse: 1/3, 1, 0; mean: 2/3, 3/4, 0.
    teacher = source.scores_of("q-iron", doc_ids)
    np.testing.assert_allclose(teacher, [20.0, 22.5, 0.0], rtol=1e-6)
    student = torch.tensor([[1.0, 2.0, 0.5]])
    p = np.exp([-2.5, 0.0, -22.5]) / np.exp([-2.5, 0.0, -22.5]).sum()
    q = np.exp([1.0, 2.0, 0.5]) / np.exp([1.0, 2.0, 0.5]).sum()
    labels, mask = torch.tensor([[1, 0, 0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = KLDivergence()(student, torch.from_numpy(teacher)[None], labels, mask)
    assert float(loss) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)


def _recorded(path: Path, scores: list[float]) -> Path:
    doc_ids = ["d-iron", "d-gold", "d-moon"]
    path.write_text("".join(f"q-iron\t{doc_id}\t{score}\n" for doc_id, score in zip(doc_ids, scores, strict=True)))
    return path


# -- SparseEncoder ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["splade", "inference_free"])
def sparse_folder(
    request: pytest.FixtureRequest,
    tiny_encoder: Path,
    tiny_collection: Collection,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A sparse student as a run leaves it, but for rankdistill.json: a plain SparseEncoder's folder."""
    import torch

    from rankdistill.recipe import build

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sparse")
    student = build("student", {"type": request.param, "model": str(tiny_encoder), "precision": "fp32"})
    model = student.create("cpu")
    model.prepare(tiny_collection, folder / "prepared")
    model.save(folder / "model")
    (folder / "model" / "rankdistill.json").unlink()
    return folder / "model"


@pytest.mark.parametrize("max_length", [None, 8])
def test_sparse_encoder_scores_are_those_of_sentence_transformers(
    sparse_folder: Path, tiny_collection: Collection, max_length: int | None
) -> None:
    import torch
    from sentence_transformers import SparseEncoder

    documents = tiny_collection.document_texts(range(tiny_collection.document_count))
    queries = tiny_collection.query_texts(tiny_collection.query_ids())
    pairs = np.array([(q, d) for d in range(len(documents)) for q in range(len(queries)) if (q + d) % 3])
    teacher = SparseEncoderTeacher(str(sparse_folder), scale=0.5, max_length=max_length, precision="fp32", device="cpu")
    found = teacher.score_pairs(queries, documents, pairs)
    peer = SparseEncoder(str(sparse_folder), device="cpu")
    if max_length is not None:
        for module in peer.modules():
            if hasattr(module, "query_length"):
                module.query_length = module.document_length = max_length
    with torch.no_grad():
        products = peer.encode_query(queries).to_dense() @ peer.encode_document(documents).to_dense().T
    expected = 0.5 * products.numpy()[pairs[:, 0], pairs[:, 1]]
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_kind_of_a_model_is_looked_at(sparse_folder: Path, tiny_encoder: Path) -> None:
    from rankdistill.teachers.bi_encoder import BiEncoderTeacher

    with pytest.raises(UsageError, match="is a SparseEncoder") as caught:
        BiEncoderTeacher(str(sparse_folder)).load()
    assert caught.value.fix == "type: sparse_encoder"
    with pytest.raises(UsageError, match="is no SparseEncoder") as caught:
        SparseEncoderTeacher(str(tiny_encoder)).load()
    assert caught.value.fix == "type: bi_encoder"


def test_a_sparse_encoder_is_known_by_its_weights_and_settings(sparse_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse_folder, tmp_path / "moved")
    known = SparseEncoderTeacher(str(sparse_folder)).fingerprint()
    assert SparseEncoderTeacher(str(tmp_path / "moved")).fingerprint() == known
    for changed in ({"scale": 2.0}, {"max_length": 5}, {"precision": "fp16"}):
        assert SparseEncoderTeacher(str(sparse_folder), **changed).fingerprint() != known  # type: ignore[arg-type]
