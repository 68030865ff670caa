from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from small_indexes import COUNT, DIMENSION, IDS, QUERIES, VECTORS, build, shipped_specifications, specification

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_assembly import IndexParts, add_codes, assemble_index
from rankdistill.indexes.faiss_index import (
    FaissIndex,
    check_out_file,
    damaged_index,
    ids_file,
    manifest_file,
    publish_index,
    sign_bits,
)
from rankdistill.indexes.inspection import check_index
from rankdistill.indexes.specification import load_specification

# Overlap of the first ten with exact search on the clustered vectors, less a margin.
RECALL = {"flat": 1.0, "hnsw": 0.99, "ivf_flat": 0.95, "sq8": 0.95, "ivf_pq_refine": 0.9, "ivf_pq": 0.4, "opq_pq": 0.4}
RECALL |= {"opq_pq_fs": 0.3, "ivf_pq_fs": 0.4, "binary": 0.4, "rabitq": 0.3}


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_flat_equals_brute_force(metric: str, tmp_path: Path) -> None:
    """Scores are inner products, or minus the squared distance."""
    vectors = VECTORS if metric == "inner_product" else VECTORS * 3
    index = build(tmp_path / "x.faiss", vectors, factory="Flat", metric=metric)
    scores = QUERIES @ vectors.T
    if metric == "l2":
        scores = -((QUERIES[:, None] - vectors) ** 2).sum(axis=2)
    for row, hits in enumerate(index.search(QUERIES, 20)):
        expected = np.argsort(-scores[row], kind="stable")[:20]
        np.testing.assert_array_equal(hits.rows, expected)
        np.testing.assert_allclose(hits.scores, scores[row, expected], rtol=1e-4, atol=1e-5)
    assert index.doc_ids([2, 0]) == [IDS[2], IDS[0]]
    assert index.bytes == pytest.approx(COUNT * DIMENSION * 4, rel=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shipped")


def shipped_index(name: str, folder: Path) -> FaissIndex:
    """Built once."""
    options: dict[str, Any] = {"similarity": "cos", "vectors_fingerprint": "clustered"}
    return build_index(VECTORS, IDS, load_specification(name), folder / name, **options)


@pytest.mark.parametrize("name", sorted(shipped_specifications()))
def test_every_shipped_specification_builds_finds_and_gets_no_warning(name: str, folder: Path) -> None:
    index = shipped_index(name, folder)
    exact = np.argsort(-(QUERIES @ VECTORS.T), axis=1)[:, :10]
    hits = index.search(QUERIES, 10)
    assert np.mean([len(set(ours.rows) & set(row)) / 10 for ours, row in zip(hits, exact, strict=True)]) >= RECALL[name]
    for ours in hits:
        assert len(ours.rows) == 10 and (ours.rows >= 0).all() and len(set(ours.rows)) == 10
        assert (np.diff(ours.scores) <= 0).all()
    assert index.mappable == ("fs" not in index.manifest["factory"])
    for opened in (index, FaissIndex.open(folder / name, memory_map=True)):
        for vectors in (VECTORS, None):
            check = check_index(opened, vectors=vectors, k=50, sample=300)
            assert check.warnings == [] and check["documents"] == COUNT, str(check)
            assert "WARNING" not in str(check) and check.to_json()["findings"]["documents"] == COUNT
        for first, second in zip(hits, opened.search(QUERIES, 10), strict=True):  # looking changes nothing
            np.testing.assert_array_equal(first.rows, second.rows)
            np.testing.assert_array_equal(first.scores, second.scores)


def test_plain_faiss_in_a_fresh_process_gives_the_same_ids(folder: Path) -> None:
    names = ["hnsw", "ivf_pq", "ivf_pq_refine", "opq_pq"]
    indexes = [shipped_index(name, folder) for name in names]
    np.save(folder / "queries.npy", QUERIES)
    code = (
        "import json, sys, faiss, numpy as np, pyarrow.parquet as pq\n"
        "for name in sys.argv[1:]:\n"
        "    scores, rows = faiss.read_index(name).search(np.load('queries.npy'), 10)\n"
        "    ids = pq.read_table(f'{name}.ids.parquet')['doc_id'].to_pylist()\n"
        "    print(json.dumps([[ids[row] for row in found] for found in rows]))\n"
        "assert not any(module.startswith('rankdistill') for module in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *names]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    for index, line in zip(indexes, printed.splitlines(), strict=True):
        for hits, theirs in zip(index.search(QUERIES, 10), json.loads(line), strict=True):
            ours = index.doc_ids(hits.rows)
            assert set(ours) == set(theirs) and ours[0] == theirs[0]


def test_binary_opens_with_plain_faiss_and_ranks_by_hamming_distance(tmp_path: Path) -> None:
    index = build(tmp_path / "x.faiss", factory="BFlat", binary=True)
    assert faiss.read_index_binary(str(tmp_path / "x.faiss")).ntotal == COUNT
    assert index.bytes < COUNT * DIMENSION / 8 + 200
    signs = np.where(VECTORS > 0, 1, -1)
    products = np.where(QUERIES > 0, 1, -1) @ signs.T
    for row, hits in enumerate(index.search(QUERIES, 10)):
        np.testing.assert_array_equal(hits.scores, np.sort(products[row])[::-1][:10])
        np.testing.assert_array_equal(products[row, hits.rows], hits.scores)
    # Re-scoring everything is exact search of float queries over signs, whatever holds the bits.
    for name, settings in {
        "graph": {"factory": "BHNSW16"},
        "lists": {"factory": "BIVF8", "search": {"nprobe": 8}},
    }.items():
        other = build(tmp_path / name, binary=True, **settings)
        np.testing.assert_array_equal(other._codes(np.arange(5)), sign_bits(VECTORS[:5]))
    for searched in (index, other):
        searched.set_search(rescore=COUNT)
        for row, hits in enumerate(searched.search(QUERIES, 10)):
            np.testing.assert_array_equal(hits.rows, np.argsort(-(signs @ QUERIES[row]), kind="stable")[:10])


def test_padding_never_leaves_and_ties_go_by_row(tmp_path: Path) -> None:
    vectors = np.eye(8, dtype=np.float32)[np.arange(40) % 8]
    index = build(tmp_path / "x.faiss", vectors, factory="IVF8,Flat")
    index.set_search(nprobe=1)
    assert index.index.search(vectors[:1], 20)[1].min() == -1  # FAISS pads the short list
    for query, hits in enumerate(index.search(vectors[:2], 20)):
        assert len(hits.rows) < 20 and (hits.rows >= 0).all()
        np.testing.assert_array_equal(hits.rows[:5], query + 8 * np.arange(5))
        np.testing.assert_array_equal(hits.rows[5:], np.sort(hits.rows[5:]))  # all score 0
    assert len(index.search(vectors[:1], 0)[0].rows) == 0


def test_settings_are_kept_in_the_file_and_polysemous_hamming_stays_off(tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    index = build(path, factory="IVF{lists},PQ{subspaces}x8", lists=20, search={"nprobe": 7})
    plain = faiss.read_index(str(path))
    assert plain.nprobe == 7 and plain.polysemous_ht == 0
    index.set_search(nprobe=3)
    assert index.index.nprobe == 3 and FaissIndex.open(path).index.nprobe == 7
    with pytest.raises(UsageError, match="no setting 'efSearch'"):
        index.set_search(efSearch=10)
    with pytest.raises(UsageError, match="unknown key 'nprobes'"):
        index.set_search(nprobes=10)


@pytest.mark.parametrize(
    ("count", "dimension", "factory"),
    [(1500, 32, "IVF38,PQ4x8"), (10_000, 384, "IVF256,PQ48x8"), (10**6, 768, "IVF4000,PQ96x8"), (50, 7, "IVF1,PQ1x8")],
)
def test_lists_and_subspaces_fit_the_vectors(count: int, dimension: int, factory: str) -> None:
    assert specification(factory="IVF{lists},PQ{subspaces}x8").resolve(count, dimension) == factory


def test_the_seed_decides_the_index(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(tmp_path / name, factory="IVF8,PQ4x6", training_sample=500, seed=seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other
    assert json.loads(manifest_file(tmp_path / "a").read_text())["trained_on"] == 500


def test_an_index_is_built_once_for_the_same_vectors_and_ids(tmp_path: Path) -> None:
    path, others = tmp_path / "x.faiss", [f"x{doc_id}" for doc_id in IDS]

    def stamp(ids: list[str], vectors: str, **settings: str) -> int:
        index = build(path, VECTORS, ids, {"vectors_fingerprint": vectors}, factory="Flat", **settings)
        assert index.doc_ids([0, 1]) == ids[:2]
        return path.stat().st_mtime_ns

    first, again = stamp(IDS, "v1"), stamp(IDS, "v1", description="other words")
    assert first == again != stamp(others, "v1") != stamp(others, "v2")


def test_an_index_of_another_student_is_refused(tmp_path: Path) -> None:
    made_from = {"student_fingerprint": "mine", "collection_fingerprint": "texts"}
    index = build(tmp_path / "x.faiss", options=made_from, factory="Flat")

    def student(fingerprint: str, dimension: int = DIMENSION) -> Any:
        return SimpleNamespace(fingerprint=fingerprint, dimension=dimension)

    index.check(student("mine"))
    with pytest.raises(RankdistillError, match="belongs to another student"):
        index.check(student("other"))
    with pytest.raises(RankdistillError, match="32 dimensions, the student makes 64"):
        index.check(student("mine", 64))
    with pytest.raises(RankdistillError, match="another collection"):
        index.check(collection=SimpleNamespace(fingerprint="others", name="others"))


def corrupted(row: Any, value: float, vectors: np.ndarray = VECTORS) -> np.ndarray:
    vectors = vectors.copy()
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "settings", "message"),
    [
        (VECTORS[:100], {"factory": "IVF200,Flat"}, "100 vectors cannot train 200"),
        (VECTORS[:100], {"factory": "PQ4x8"}, "100 vectors cannot train 256"),
        (VECTORS, {"factory": "PQ5x4"}, "32 is not divisible by the number of subspaces"),
        (VECTORS[:, :31], {"factory": "BFlat", "binary": True}, "31 is not divisible by 8"),
        (VECTORS, {"factory": "Flatt"}, "FAISS does not know this index"),
        (VECTORS, {"factory": "{list},Flat"}, "cannot be filled in"),
        (VECTORS, {"factory": "PQ4x8fs"}, "a fast-scan index holds 4 bits a codeword, not 8"),
        (VECTORS, {"factory": "OPQ4,IVF8,PQ4fsr"}, "a fast-scan index holds 4 bits a codeword, not 8"),
        (VECTORS, {"factory": "OPQ5,PQ4x4"}, "32 is not divisible by the number of subspaces 5"),
        (VECTORS, {"factory": "OPQ4_20,PQ8x4"}, "20 is not divisible by the number of subspaces 8"),
        (VECTORS[np.arange(COUNT) % 12], {"factory": "PQ4x4fs"}, "only 12 of 1500 vectors are different"),
        (VECTORS, {"factory": "Flat", "search": {"nprobe": 3}}, "no setting 'nprobe'"),
        (VECTORS, {"factory": "IVF100,Flat", "training_sample": 50}, "training_sample 50 is smaller"),
        (corrupted(1234, np.nan), {"factory": "Flat"}, "NaN"),
        (corrupted(slice(0, 100), 0), {"factory": "Flat"}, "100 of 1500 vectors are zero"),
        (VECTORS[:0], {"factory": "Flat"}, "nothing to index"),
        # FAISS corrupts its memory there and the process is gone.
        (np.tile(VECTORS[:300], 12), {"factory": "OPQ16,PQ16x4"}, "300 vectors cannot train a rotation of 384"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    vectors: np.ndarray, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RankdistillError, match=message):
        build(tmp_path / "x.faiss", vectors, **settings)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_other_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cosine = tmp_path / "x.faiss", {"similarity": "cos"}
    with pytest.raises(RankdistillError, match="1500 vectors but 1499 document ids"):
        build(path, ids=IDS[:-1], factory="Flat")
    with pytest.raises(RankdistillError, match="a vector of length 2 from a student that scores by cosine"):
        build(path, VECTORS * 2, options=cosine, factory="Flat")
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(RankdistillError, match="a GPU was asked for"):
            build(path, options={"device": "gpu"}, factory="Flat")
    assert not path.exists()
    index = build(path, corrupted(7, 0), options=cosine, factory="Flat")
    assert "1 vectors are zero (first: row 7)" in capsys.readouterr().err
    with pytest.raises(RankdistillError, match="NaN"):
        index.search(corrupted(1, np.nan, QUERIES), 5)
    with pytest.raises(RankdistillError, match=r"\[n, 32\] was expected"):
        index.search(QUERIES[:, :8], 5)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    with pytest.raises(RankdistillError, match="there is no index here"):
        FaissIndex.open(path)
    build(path, factory="Flat")
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        assert damaged_index(manifest_file(path)) == path
        with pytest.raises(RankdistillError, match="damaged"):
            FaissIndex.open(path)
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(RankdistillError, match="FAISS cannot read this index"):
            FaissIndex.foreign(path)
    path.write_bytes(whole)
    assert damaged_index(manifest_file(path)) is None
    manifest = json.loads(manifest_file(path).read_text())
    for change in ({"specification": None}, {"specification": {"name": 3}}, {"specification": []}):
        manifest_file(path).write_text(json.dumps(manifest | change))
        with pytest.raises(RankdistillError, match=r"manifest is damaged(.|\n)*x\.faiss\.json"):
            FaissIndex.open(path)
    manifest_file(path).write_text(json.dumps(manifest))
    ids_file(path).write_bytes(b"PAR1")
    with pytest.raises(RankdistillError, match="damaged"):
        FaissIndex.open(path)
    manifest_file(path).unlink()
    with pytest.raises(RankdistillError, match="has no manifest"):
        FaissIndex.open(path)
    assert FaissIndex.foreign(path).document_count == COUNT


@pytest.mark.parametrize("moment", range(4))
def test_an_index_being_published_is_taken_for_no_stranger_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Another process looks between two renames, or the writer is killed there: the next one builds it again."""
    path, replace, renames = tmp_path / "x.faiss", os.replace, iter(range(99))

    def stop(source: Any, target: Any) -> None:
        if next(renames) == moment:
            raise KeyboardInterrupt
        replace(source, target)
        check_out_file(path)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        build(path, factory="Flat")
    monkeypatch.undo()
    with pytest.raises(RankdistillError, match=r"not finished|no index"):
        FaissIndex.open(path)
    assert damaged_index(manifest_file(path)) == path
    assert build(path, factory="Flat").document_count == COUNT


def test_specifications_are_checked(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("factory: Flat\nnprob: 3\n")
    with pytest.raises(UsageError, match="unknown key 'nprob'"):
        load_specification(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("factory: Flat\n")
    assert load_specification(tmp_path / "mine.yaml").name == "mine"
    with pytest.raises(UsageError, match="no file and no shipped declaration 'ivfpq'"):
        load_specification("ivfpq")


def test_rotations_are_learned_for_the_bits_that_follow(tmp_path: Path) -> None:
    """FAISS's own OPQ learns for 8 bits: worse for 4, and impossible with fewer than 256 vectors."""
    rng = np.random.default_rng(3)
    vectors = (rng.normal(size=(800, 12)) @ rng.normal(size=(12, 12)) * np.linspace(0.1, 2, 12)).astype(np.float32)
    index = build(tmp_path / "x.faiss", vectors, factory="OPQ3,PQ3x4")
    plain = faiss.index_factory(12, "OPQ3,PQ3x4", faiss.METRIC_INNER_PRODUCT)
    faiss.downcast_index(plain.index).do_polysemous_training = False
    plain.train(vectors)
    plain.add(vectors)
    ours, theirs = (((vectors - each.reconstruct_n(0, 800)) ** 2).sum(axis=1).mean() for each in (index.index, plain))
    assert ours < 0.95 * theirs
    assert build(tmp_path / "y.faiss", vectors[:50], factory="OPQ3,PQ3x4fs").document_count == 50


MEMORY = """
import sys, numpy as np
from rankdistill.indexes.faiss_index import FaissIndex
def anonymous():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))
query = np.ones((1, 64), np.float32)
FaissIndex.open(sys.argv[1] + '.small').search(query, 5)  # what a first search allocates anyway
before = anonymous()
index = FaissIndex.open(sys.argv[1], memory_map=sys.argv[2] == '1')
hits = index.search(query, 5)[0]
print(anonymous() - before, *hits.rows)
"""


@pytest.mark.parametrize("lists", [False, True])
def test_memory_mapped_codes_stay_on_disk(lists: bool, tmp_path: Path) -> None:
    """Opened by a process that may not hold them: anonymous memory grows by less than a tenth of the file."""
    rng, count, path = np.random.default_rng(0), 200_000, tmp_path / "index"
    codes, assignments = rng.integers(0, 256, (count, 32)).astype(np.uint8), rng.integers(0, 64, count)
    parts = IndexParts(None, rng.normal(size=(64, 64)) if lists else None, rng.normal(size=(32, 256, 2)))
    for rows, file in ((count, path), (100, Path(f"{path}.small"))):
        index = assemble_index(parts)
        add_codes(index, assignments[:rows] if lists else None, codes[:rows])
        publish_index(index, map(str, range(rows)), file, specification=specification(factory="any"), manifest={})
    command, environment = [sys.executable, "-c", MEMORY, str(path)], {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    (read, *rows), (mapped, *again) = (
        subprocess.run([*command, how], capture_output=True, text=True, check=True, env=environment).stdout.split()
        for how in "01"
    )
    size = path.stat().st_size / 1024
    assert rows == again
    # What is held takes its place in part from memory that the imports freed.
    assert int(read) > 0.4 * size and int(mapped) < 0.1 * size, (read, mapped, size)


def test_a_foreign_index_is_known_by_its_content(tmp_path: Path) -> None:
    """Not by its path and size: another index of as many bytes is another one, and a moved one is the same."""
    prints = []
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        index = faiss.IndexFlatIP(4)
        index.add(np.random.default_rng(seed).normal(size=(9, 4)).astype(np.float32))
        faiss.write_index(index, str(tmp_path / f"{name}.faiss"))
        prints.append(FaissIndex.foreign(tmp_path / f"{name}.faiss").fingerprint)
    assert prints[0] == prints[2] != prints[1]
