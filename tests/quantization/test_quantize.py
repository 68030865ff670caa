"""From vectors to a FAISS file: what plain FAISS finds in it is what the torch model says, and bad input is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from planted import Learned, Planted, learn, make_specification, planted

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_assembly import parts_of
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.quantization.batches import Queries, TeacherScores
from rankdistill.quantization.quantize import quantize, quantize_files, quantizer_folder, recorded_scores

DEPTH = 30
LISTS = 5
IVF: dict[str, Any] = {"lists": LISTS, "search": {"nprobe": LISTS}}
L2: dict[str, Any] = {"metric": "l2", "query": "frozen"}
# Every mode there is, by what it is called here.
MODES: dict[str, dict[str, Any]] = {
    "4 bit": {},
    "8 bit": {"bits": 8},
    "4 bit, lists": IVF,
    "8 bit, lists": {**IVF, "bits": 8},
    "4 bit, lists, not residual": {**IVF, "residual": False},
    "8 bit, lists, not residual": {**IVF, "bits": 8, "residual": False},
    "4 bit, l2": L2,
    "8 bit, l2": {**L2, "bits": 8},
    "4 bit, l2, lists": {**L2, **IVF},
    "8 bit, l2, lists": {**L2, **IVF, "bits": 8},
    "4 bit, l2, lists, not residual": {**L2, **IVF, "residual": False},
    "8 bit, l2, lists, not residual": {**L2, **IVF, "bits": 8, "residual": False},
    "query frozen": {"query": "frozen"},
    "no rotation": {"rotation": "none"},
    "no rotation, query frozen": {"rotation": "none", "query": "frozen"},
    "learned rotation": {"rotation": "learned", "rotation_rate": 1e-2},
    "learned rotation, l2, lists": {**L2, **IVF, "rotation": "learned", "rotation_rate": 1e-2},
    "straight-through, lists": {**IVF, "codes": "straight_through"},
    "uniform": {"codes": "uniform"},
    "overlap": {"overlap": 3},
    "overlap, 8 bit, no rotation, query frozen": {"overlap": 2, "bits": 8, "rotation": "none", "query": "frozen"},
    "overlap, fast-scan": {"overlap": 2, "fast_scan": True, "subspaces": 8},
    "frozen codes": {"codes": "frozen"},
    "frozen codes, lists": {**IVF, "codes": "frozen"},
    "frozen codes, lists, not residual": {**IVF, "codes": "frozen", "residual": False},
    "fast-scan": {"fast_scan": True, "subspaces": 8},
    "fast-scan, lists": {**IVF, "fast_scan": True, "subspaces": 8},
    "fast-scan, lists, not residual": {**IVF, "fast_scan": True, "subspaces": 8, "residual": False},
    "fast-scan, l2": {**L2, "fast_scan": True, "subspaces": 8},
}
PLAIN = """
import sys
import faiss, numpy as np
folder = sys.argv[1]
queries = np.load(folder + "/queries.npy")
for number in range(int(sys.argv[2])):
    index = faiss.read_index(f"{folder}/{number}/index.faiss")
    scores, rows = index.search(queries, int(sys.argv[3]))
    np.savez(f"{folder}/{number}.npz", scores=scores, rows=rows)
assert not [name for name in sys.modules if name.startswith(("rankdistill", "torch"))]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, data: Planted) -> Path:
    """All modes trained for a few steps, and searched by a fresh process that has FAISS alone."""
    threads = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("modes")
    np.save(folder / "queries.npy", data.queries[:50])
    for number, changes in enumerate(MODES.values()):
        learn(folder / str(number), data, **changes)
    arguments = [sys.executable, "-c", PLAIN, str(folder), str(len(MODES)), str(DEPTH)]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True, text=True)
    faiss.omp_set_num_threads(threads[0])
    torch.set_num_threads(threads[1])
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_plain_faiss_finds_what_the_torch_model_scores(exported: Path, data: Planted, mode: str) -> None:
    folder, specification = exported / str(list(MODES).index(mode)), make_specification(**MODES[mode])
    model = Learned.open(folder, specification)
    expected = model.scores(data.queries[:50])
    with np.load(f"{folder}.npz") as found:
        scores, rows = found["scores"], found["rows"]
    if specification.metric == "l2":
        scores = -scores
    assert (rows >= 0).all()
    difference = np.abs(scores - np.take_along_axis(expected, rows, axis=1)).max()
    best = np.argsort(-expected, axis=1, kind="stable")[:, :DEPTH]
    if specification.fast_scan:  # looks its scores up in tables of 8 bits
        assert difference < 0.03 * np.ptp(expected)
        assert np.mean([len(set(a) & set(b)) / DEPTH for a, b in zip(rows, best, strict=True)]) > 0.9
    else:
        assert difference < 1e-4
        ideal = np.take_along_axis(expected, best, axis=1)
        np.testing.assert_allclose(scores, ideal, atol=1e-4)
        # The very ids, wherever neighbours in the ranking (and the first one left out) are apart.
        more = -np.sort(-expected, axis=1)[:, : DEPTH + 1]
        apart = np.abs(np.diff(more, axis=1)) > 2e-4
        clear = apart & np.hstack([np.ones((len(apart), 1), bool), apart[:, :-1]])
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(rows[clear], best[clear])


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.startswith(("frozen", "overlap"))])
def test_codes_and_lists_are_those_of_the_final_parts(exported: Path, data: Planted, mode: str) -> None:
    """After training everything is encoded anew: with the last centroids, by the rule that the index probes with."""
    folder, specification = exported / str(list(MODES).index(mode)), make_specification(**MODES[mode])
    model = Learned.open(folder, specification)
    with torch.no_grad():
        rotated = torch.from_numpy(data.documents) @ model.model.rotation().T
        centroids = model.model.centroids
        lists = None if centroids is None else model.model.score(rotated, centroids.weight).argmax(dim=1)
        codes = model.model.nearest(model.model.residuals(rotated, lists)[0])
    if lists is not None:
        assert model.lists is not None
        assert (lists == model.lists).float().mean() > 0.998  # but for ties in the last digit
        codes = codes[lists == model.lists]
        assert (codes == model.codes[lists == model.lists]).float().mean() > 0.998
    else:
        assert (codes == model.codes).float().mean() > 0.998


def test_training_moved_what_it_should(exported: Path, data: Planted) -> None:
    """Codes that are frozen stay FAISS's, the rest moves: otherwise the modes above would all test the same."""
    modes = list(MODES)

    def weights(mode: str) -> Learned:
        return Learned.open(exported / str(modes.index(mode)), make_specification(**MODES[mode]))

    frozen, moved = weights("frozen codes"), weights("4 bit")
    assert (frozen.codes != moved.codes).any()
    assert not torch.equal(frozen.model.codebooks, moved.model.codebooks)
    assert moved.model.query_map is not None and weights("query frozen").model.query_map is None
    assert (moved.model.query_map.detach() - torch.eye(16)).abs().max() > 1e-4
    turned = weights("learned rotation").model
    rotation = turned.rotation().detach()
    assert (rotation - turned.rotation0).abs().max() > 1e-3
    assert (rotation @ rotation.T - torch.eye(16)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "mode",
    [
        "4 bit",
        "8 bit, lists",
        "4 bit, l2, lists",
        "no rotation, query frozen",
        "fast-scan, lists",
        "fast-scan",
    ],
)
def test_without_a_step_it_is_faisss_own_trained_index(tmp_path: Path, data: Planted, mode: str) -> None:
    changes = {**MODES[mode], "steps": 0}
    ours = learn(tmp_path, data, **changes)
    started = make_specification(**changes).started(16)
    theirs = build_index(data.documents, map(str, range(600)), started, tmp_path / "theirs.faiss").index
    scores, rows = theirs.search(data.queries, DEPTH)
    our_scores, our_rows = ours.index.search(data.queries, DEPTH)
    np.testing.assert_array_equal(our_rows, rows)
    np.testing.assert_allclose(our_scores, scores, atol=1e-5)
    np.testing.assert_array_equal(parts_of(ours.index).codes, parts_of(theirs).codes)


def test_a_refine_stage_scores_with_the_vectors_themselves(tmp_path: Path, data: Planted) -> None:
    """Also behind a learned query map, which only the first stage is to see."""
    index = learn(tmp_path, data, refine="Flat", search={"k_factor": 20}, query_rate=0.01)
    reopened: Any = faiss.read_index(str(tmp_path / "index.faiss"))
    scores, rows = reopened.search(data.queries[:20], 10)
    exact = data.queries[:20] @ data.documents.T
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), atol=1e-4)
    best = np.argsort(-exact, axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, best, strict=True)]) > 0.9
    assert index.document_count == 600


def test_what_lies_beside_the_index_says_how_it_was_made(tmp_path: Path, data: Planted) -> None:
    index = learn(tmp_path, data)
    assert index.doc_ids([0, 599]) == ["0", "599"]
    opened = FaissIndex.open(tmp_path / "index.faiss")
    assert opened.manifest["quantizer"]["steps"] == 6 and opened.manifest["factory"] == "OPQ4,PQ4x4"
    agreement = opened.manifest["agreement"]
    assert set(agreement) == {"start", "end", "queries"} and agreement["queries"] == 40
    held = quantizer_folder(tmp_path / "index.faiss")
    assert {file.name for file in held.iterdir()} == {
        "manifest.json",
        "quantizer.safetensors",
        "codes.npy",
        "log.jsonl",
    }
    assert np.load(held / "codes.npy", mmap_mode="r").dtype == np.uint8
    log = [json.loads(line) for line in (held / "log.jsonl").read_text().splitlines()]
    assert log[0]["overlap@10"] == agreement["start"] and log[-1]["overlap@10"] == agreement["end"]


def test_no_held_out_query_leaves_valid_json(tmp_path: Path, data: Planted) -> None:
    index = learn(tmp_path, data, held_out=0)
    assert index.manifest["agreement"] == {}
    held = quantizer_folder(tmp_path / "index.faiss")
    for text in [*(held / "log.jsonl").read_text().splitlines(), (held / "manifest.json").read_text()]:
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_same_is_kept_and_anything_else_is_made_anew(tmp_path: Path, data: Planted) -> None:
    """Also without fingerprints from the caller: by the vectors and queries themselves."""
    first = learn(tmp_path, data)
    stamp = (tmp_path / "index.faiss").stat().st_mtime_ns
    assert learn(tmp_path, data).fingerprint == first.fingerprint
    assert (tmp_path / "index.faiss").stat().st_mtime_ns == stamp
    last_row = data.documents.copy()
    last_row[-1] += 1
    others = [
        (data, Queries(given=data.queries[::-1].copy()), {}),
        (Planted(last_row, data.queries), None, {}),
        (data, None, {"seed": 7}),
        (data, None, {"steps": 7}),
    ]
    made = {first.fingerprint}
    for vectors, queries, changes in others:
        made.add(learn(tmp_path, vectors, queries, **changes).fingerprint)
    assert len(made) == 1 + len(others)


def test_search_settings_do_not_train_again(tmp_path: Path, data: Planted) -> None:
    learn(tmp_path, data, **IVF)
    weights = quantizer_folder(tmp_path / "index.faiss") / "quantizer.safetensors"
    stamp = weights.stat().st_mtime_ns
    again = learn(tmp_path, data, **{**IVF, "search": {"nprobe": 2}}, refine="SQ8")
    assert weights.stat().st_mtime_ns == stamp
    assert faiss.extract_index_ivf(again.index.base_index).nprobe == 2


def test_vectors_and_scores_made_elsewhere_go_by_their_ids(
    tmp_path: Path, data: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's scores as the teacher; what has no vector is left out and counted."""
    for name, vectors, letter in (("documents", data.documents, "d"), ("queries", data.queries, "q")):
        np.save(tmp_path / f"{name}.npy", vectors)
        column = {"documents": "doc_id", "queries": "query_id"}[name]
        ids = [f"{letter}{row}" for row in range(len(vectors))]
        pq.write_table(pa.table({column: ids}), tmp_path / f"{name}.npy.ids.parquet")
    exact = data.queries @ data.documents.T
    lines = []
    for query in range(100):
        best = np.argsort(-exact[query])[:20]
        ranked = [(f"d{row}", float(exact[query, row])) for row in best]
        ranked = [*ranked[:10], ("nowhere", float(exact[query, best[10]])), *ranked[11:]] if query < 7 else ranked
        lines += [f"q{query} Q0 {name} {rank} {score:.6f} t" for rank, (name, score) in enumerate(ranked, start=1)]
    lines += [f"nobody Q0 d{row} {row + 1} {-row} t" for row in range(3)]
    (tmp_path / "scores.trec").write_text("\n".join(lines) + "\n")
    specification = make_specification(relevance="scores", steps=5)
    index = quantize_files(
        tmp_path / "documents.npy",
        tmp_path / "queries.npy",
        specification,
        tmp_path / "index.faiss",
        scores=tmp_path / "scores.trec",
    )
    said = capsys.readouterr().err
    assert "1 queries of" in said and "7 scored documents of" in said
    assert index.doc_ids([0, 599]) == ["d0", "d599"]
    teacher = recorded_scores(
        tmp_path / "scores.trec", [f"q{row}" for row in range(200)], [f"d{row}" for row in range(600)]
    )
    assert len(teacher.queries) == 100 and np.diff(teacher.offsets).tolist() == [19] * 7 + [20] * 93
    np.testing.assert_allclose(
        teacher.scores, exact[np.repeat(teacher.queries, np.diff(teacher.offsets)), teacher.rows], atol=1e-5
    )
    with pytest.raises(UsageError, match="needs --scores"):
        quantize_files(tmp_path / "documents.npy", None, specification, tmp_path / "other.faiss")
    with pytest.raises(RankdistillError, match="no query of these scores"):
        recorded_scores(tmp_path / "scores.trec", ["x"], ["y"])


# -- bad input --------------------------------------------------------------------------------------------------------


def changed(data: Planted, documents: Any = slice(None), value: float | None = None, queries: Any = None) -> Planted:
    """Some of the documents, or all of them with a value in these places; other queries."""
    held = data.documents[documents] if value is None else data.documents.copy()
    if value is not None:
        held[documents] = value
    return Planted(held, data.queries if queries is None else queries)


@pytest.mark.parametrize(
    ("match", "error", "changes"),
    [
        ("not divisible", RankdistillError, {"subspaces": 5}),
        ("600 vectors cannot train 700 lists", RankdistillError, {"lists": 700}),
        ("4-bit codes, not 8-bit", UsageError, {"fast_scan": True, "bits": 8}),
        ("query map needs inner products", UsageError, {"metric": "l2", "query": "linear"}),
        ("query: encoder needs inner products", UsageError, {"metric": "l2", "query": "encoder"}),
        ("trains a run's student along", UsageError, {"query": "encoder"}),
        ("frozen codes do not follow", UsageError, {"codes": "frozen", "rotation": "learned"}),
        ("needs a labelled positive", RankdistillError, {"losses": [{"type": "infonce"}]}),
        ("cannot train codebooks", RankdistillError, {"losses": [{"type": "in_batch_infonce"}]}),
        ("cannot train codebooks", RankdistillError, {"losses": [{"type": "kl"}, {"type": "taid"}]}),
        ("would cover a dimension twice", UsageError, {"overlap": 8}),
        ("overlapping subspaces go with", UsageError, {"overlap": 2, "lists": 4}),
        ("overlapping subspaces go with", UsageError, {"overlap": 2, "codes": "frozen"}),
        ("overlapping subspaces go with", UsageError, {"overlap": 2, "rotation": "learned"}),
        ("overlapping subspaces go with", UsageError, {"overlap": 2, "metric": "l2", "query": "frozen"}),
        ("needs judgments", UsageError, {"documents": {"labelled": True}}),
        ("scored lists", UsageError, {"relevance": "scores"}),
        ("no query to learn from", UsageError, {"queries": {"given": 0}}),
        ("fewer than two documents", RankdistillError, {"documents": {"top": 1, "random": 0}, "batch": 1}),
        ("student that scores by cosine", RankdistillError, {"similarity": "cos"}),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, data: Planted, match: str, error: type[Exception], changes: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        learn(tmp_path, data, **changes)
    assert not (tmp_path / "index.faiss").exists()


def test_losses_over_all_pairs_of_long_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="compares all pairs"):
        learn(tmp_path, planted(1500, 3000), losses=[{"type": "ranknet"}], batch=2000, documents={"limit": 8192})


@pytest.mark.parametrize(
    ("match", "change", "settings"),
    [
        ("200 vectors cannot train 256", lambda data: changed(data, slice(200)), {"bits": 8}),
        ("nothing to quantise", lambda data: changed(data, slice(0)), {}),
        ("only 10 of 600 vectors are different", lambda data: changed(data, np.arange(600) % 10), {}),
        ("row 17", lambda data: changed(data, (17, 3), np.nan), {}),
        ("row 17", lambda data: changed(data, (17, 3), np.inf), {}),
        ("vectors are zero", lambda data: changed(data, slice(100), 0), {}),
        ("NaN or infinity", lambda data: changed(data, queries=data.queries * np.float32(np.inf)), {}),
        (r"shape \[200, 8\] where \[n, 16\]", lambda data: changed(data, queries=data.queries[:, :8].copy()), {}),
    ],
)
def test_vectors_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, data: Planted, match: str, change: Any, settings: dict[str, Any]
) -> None:
    with pytest.raises(RankdistillError, match=match):
        learn(tmp_path, change(data), **settings)
    assert not (tmp_path / "index.faiss").exists()


def test_duplicates_and_a_few_zero_vectors_are_kept(
    tmp_path: Path, data: Planted, capsys: pytest.CaptureFixture[str]
) -> None:
    index = learn(tmp_path, Planted(np.repeat(data.documents[:200], 3, axis=0), data.queries))
    scores, rows = index.index.search(data.queries[:10], 6)
    assert (np.abs(scores[:, 0] - scores[:, 2]) < 1e-5).all()  # all three copies, one after the other
    assert (rows[:, 0] // 3 == rows[:, 1] // 3).all() and (rows[:, 1] // 3 == rows[:, 2] // 3).all()
    index = learn(tmp_path, changed(data, [3, 500], 0))
    assert index.manifest["zero_vectors"] == 2 and "2 vectors are zero" in capsys.readouterr().err


def test_ids_must_be_as_many_as_vectors_and_cost_no_second_training(tmp_path: Path, data: Planted) -> None:
    queries, specification, path = Queries(given=data.queries), make_specification(), tmp_path / "index.faiss"
    for count in (599, 601):
        with pytest.raises(RankdistillError, match=f"600 vectors but {count} document ids"):
            quantize(data.documents, map(str, range(count)), queries, specification, path)
    assert not path.exists()
    weights = quantizer_folder(path) / "quantizer.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert learn(tmp_path, data).document_count == 600 and weights.stat().st_mtime_ns == stamp


def test_a_cosine_students_vectors_have_length_one(tmp_path: Path, data: Planted) -> None:
    unit = data.documents / np.linalg.norm(data.documents, axis=1, keepdims=True)
    assert learn(tmp_path, Planted(unit, data.queries), similarity="cos").manifest["similarity"] == "cos"


NONE = np.empty(0, np.int32)


@pytest.mark.parametrize(
    ("match", "positives", "settings"),
    [
        ("labels of 3 queries, vectors of 200", 3, {"documents": {"labelled": True}}),
        # positives of queries that take no part
        (
            "no query to learn from",
            200,
            {"documents": {"labelled": True}, "queries": {"given": 0, "pseudo": 1}},
        ),
        ("scored lists", 0, {"relevance": "scores"}),
    ],
)
def test_labels_and_lists_belong_to_given_queries(
    tmp_path: Path, data: Planted, match: str, positives: int, settings: dict[str, Any]
) -> None:
    teacher = TeacherScores(np.empty(0, np.int64), np.zeros(1, np.int64), NONE, np.empty(0, np.float32), NONE)
    queries = Queries(data.queries, data.queries, positives=[np.array([1])] * positives, teacher=teacher)
    with pytest.raises(UsageError, match=match):
        learn(tmp_path, data, queries, **settings)
