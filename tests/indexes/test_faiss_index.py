from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from shipped_indexes import shipped_specifications

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_index import (
    FaissIndex,
    check_out_file,
    damaged_index,
    ids_file,
    manifest_file,
    sign_bits,
)
from rankdistill.indexes.specification import IndexSpecification, load_specification

COUNT, DIMENSION = 1500, 32
IDS = [f"doc {row}\nwith a line" for row in range(COUNT)]
# Overlap of the first ten with exact search on the clustered vectors below, less a margin.
RECALL = {
    "flat": 1.0,
    "hnsw": 0.99,
    "ivf_flat": 0.95,
    "sq8": 0.95,
    "ivf_pq_refine": 0.9,
    "ivf_pq": 0.4,
    "opq_pq": 0.4,
    "opq_pq_fs": 0.3,
    "ivf_pq_fs": 0.4,
    "binary": 0.4,
    "rabitq": 0.3,
}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, DIMENSION))
    made = centres[rng.integers(0, 40, COUNT)] + rng.normal(size=(COUNT, DIMENSION)) * 0.7
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    made = vectors[:50] + np.random.default_rng(1).normal(size=(50, DIMENSION)).astype(np.float32) * 0.1
    return np.ascontiguousarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def specification(**settings: Any) -> IndexSpecification:
    return load_specification({"name": "test", **settings})


def test_flat_equals_brute_force(vectors: np.ndarray, queries: np.ndarray, tmp_path: Path) -> None:
    index = build_index(vectors, IDS, specification(factory="Flat"), tmp_path / "x.faiss")
    scores = queries @ vectors.T
    for row, hits in enumerate(index.search(queries, 20)):
        expected = np.argsort(-scores[row], kind="stable")[:20]
        np.testing.assert_array_equal(hits.rows, expected)
        np.testing.assert_allclose(hits.scores, scores[row, expected], atol=1e-5)
    assert index.doc_ids([2, 0]) == [IDS[2], IDS[0]]
    assert index.bytes == pytest.approx(COUNT * DIMENSION * 4, rel=0.01)


def test_l2_scores_are_minus_the_squared_distance(vectors: np.ndarray, queries: np.ndarray, tmp_path: Path) -> None:
    index = build_index(vectors * 3, IDS, specification(factory="Flat", metric="l2"), tmp_path / "x.faiss")
    distances = ((queries[0] - vectors * 3) ** 2).sum(axis=1)
    hits = index.search(queries[:1], 5)[0]
    np.testing.assert_array_equal(hits.rows, np.argsort(distances)[:5])
    np.testing.assert_allclose(hits.scores, -np.sort(distances)[:5], rtol=1e-4)


@pytest.mark.parametrize("name", sorted(shipped_specifications()))
def test_every_shipped_specification_builds_and_finds(
    name: str, vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    index = build_index(vectors, IDS, load_specification(name), tmp_path / "x.faiss")
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    hits = index.search(queries, 10)
    recall = np.mean([len(set(found.rows) & set(row)) / 10 for found, row in zip(hits, exact, strict=True)])
    assert recall >= RECALL[name]
    for found in hits:
        assert len(found.rows) == 10 and (found.rows >= 0).all() and len(set(found.rows)) == 10
        assert (np.diff(found.scores) <= 0).all()
    assert index.mappable == ("fs" not in index.manifest["factory"])
    mapped = FaissIndex.open(tmp_path / "x.faiss", memory_map=True)
    for first, second in zip(hits, mapped.search(queries, 10), strict=True):
        np.testing.assert_array_equal(first.rows, second.rows)
        np.testing.assert_array_equal(first.scores, second.scores)


def test_plain_faiss_in_a_fresh_process_gives_the_same_ids(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    names = ["hnsw", "ivf_pq", "ivf_pq_refine", "opq_pq"]
    built = {name: build_index(vectors, IDS, load_specification(name), tmp_path / name) for name in names}
    np.save(tmp_path / "queries.npy", queries)
    code = (
        "import json, sys, faiss, numpy as np, pyarrow.parquet as pq\n"
        "for name in sys.argv[1:]:\n"
        "    scores, rows = faiss.read_index(name).search(np.load('queries.npy'), 10)\n"
        "    ids = pq.read_table(f'{name}.ids.parquet')['doc_id'].to_pylist()\n"
        "    print(json.dumps([[ids[row] for row in found] for found in rows]))\n"
        "assert not any(module.startswith('rankdistill') for module in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *names]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for index, line in zip(built.values(), printed.splitlines(), strict=True):
        ours = [index.doc_ids(hits.rows) for hits in index.search(queries, 10)]
        for mine, theirs in zip(ours, json.loads(line), strict=True):
            assert set(mine) == set(theirs) and mine[0] == theirs[0]


def test_binary_opens_with_plain_faiss_and_ranks_by_hamming_distance(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    spec = specification(factory="BFlat", binary=True)
    index = build_index(vectors, IDS, spec, tmp_path / "x.faiss")
    plain = faiss.read_index_binary(str(tmp_path / "x.faiss"))
    assert plain.ntotal == COUNT and index.bytes < COUNT * DIMENSION / 8 + 200
    signs = np.where(vectors > 0, 1, -1)
    products = np.where(queries > 0, 1, -1) @ signs.T
    for row, hits in enumerate(index.search(queries, 10)):
        np.testing.assert_array_equal(hits.scores, np.sort(products[row])[::-1][:10])
        np.testing.assert_array_equal(products[row, hits.rows], hits.scores)
    # Re-scoring everything is exact search of float queries over signs.
    index.set_search(rescore=COUNT)
    for row, hits in enumerate(index.search(queries, 10)):
        np.testing.assert_array_equal(hits.rows, np.argsort(-(signs @ queries[row]), kind="stable")[:10])
    graph = build_index(vectors, IDS, specification(factory="BHNSW16", binary=True), tmp_path / "graph.faiss")
    lists = build_index(
        vectors, IDS, specification(factory="BIVF8", binary=True, search={"nprobe": 8, "rescore": 3}), tmp_path / "l"
    )
    np.testing.assert_array_equal(graph._codes(np.arange(5)), sign_bits(vectors[:5]))
    np.testing.assert_array_equal(lists._codes(np.arange(5)), sign_bits(vectors[:5]))
    assert all(len(hits.rows) == 10 for hits in lists.search(queries, 10))


def test_padding_never_leaves_and_ties_go_by_row(tmp_path: Path) -> None:
    vectors = np.eye(8, dtype=np.float32)[np.arange(40) % 8]
    index = build_index(vectors, map(str, range(40)), specification(factory="IVF8,Flat"), tmp_path / "x.faiss")
    index.set_search(nprobe=1)
    assert index.index.search(vectors[:1], 20)[1].min() == -1  # FAISS pads the short list
    hits = index.search(vectors[:2], 20)
    for query, found in enumerate(hits):
        assert len(found.rows) < 20 and (found.rows >= 0).all()
        np.testing.assert_array_equal(found.rows[:5], query + 8 * np.arange(5))
        np.testing.assert_array_equal(found.rows[5:], np.sort(found.rows[5:]))  # all score 0
    assert len(index.search(vectors[:1], 0)[0].rows) == 0


def test_settings_are_kept_in_the_file_and_polysemous_hamming_stays_off(vectors: np.ndarray, tmp_path: Path) -> None:
    spec = specification(factory="IVF{lists},PQ{subspaces}x8", lists=20, search={"nprobe": 7})
    index = build_index(vectors, IDS, spec, tmp_path / "x.faiss")
    plain = faiss.read_index(str(tmp_path / "x.faiss"))
    assert plain.nprobe == 7 and plain.polysemous_ht == 0
    index.set_search(nprobe=3)
    assert index.index.nprobe == 3 and FaissIndex.open(tmp_path / "x.faiss").index.nprobe == 7
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


def test_the_seed_decides_the_index(vectors: np.ndarray, tmp_path: Path) -> None:
    settings = {"factory": "IVF8,PQ4x6", "training_sample": 500}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_index(vectors, IDS, specification(**settings, seed=seed), tmp_path / name)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other
    assert json.loads(manifest_file(tmp_path / "a").read_text())["trained_on"] == 500


def test_an_index_is_built_once_for_the_same_vectors(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    build_index(vectors, IDS, specification(factory="Flat"), path, vectors_fingerprint="v1")
    stamp = path.stat().st_mtime_ns
    build_index(vectors, IDS, specification(factory="Flat", description="other words"), path, vectors_fingerprint="v1")
    assert path.stat().st_mtime_ns == stamp
    other = build_index(
        vectors, (f"x{one}" for one in IDS), specification(factory="Flat"), path, vectors_fingerprint="v1"
    )
    assert path.stat().st_mtime_ns != stamp and other.doc_ids([0, 1]) == [f"x{one}" for one in IDS[:2]]
    stamp = path.stat().st_mtime_ns
    build_index(vectors, IDS, specification(factory="Flat"), path, vectors_fingerprint="v2")
    assert path.stat().st_mtime_ns != stamp


class Encoder:
    def __init__(self, fingerprint: str, dimension: int = DIMENSION) -> None:
        self.fingerprint, self.dimension = fingerprint, dimension


def test_an_index_of_another_student_is_refused(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    build_index(
        vectors,
        IDS,
        specification(factory="Flat"),
        path,
        student_fingerprint="mine",
        collection_fingerprint="texts",
    )
    index = FaissIndex.open(path)
    index.check(Encoder("mine"))  # type: ignore[arg-type]
    with pytest.raises(RankdistillError, match="belongs to another student"):
        index.check(Encoder("other"))  # type: ignore[arg-type]
    with pytest.raises(RankdistillError, match="32 dimensions, the student makes 64"):
        index.check(Encoder("mine", 64))  # type: ignore[arg-type]
    collection = type("Collection", (), {"fingerprint": "others", "name": "others"})()
    with pytest.raises(RankdistillError, match="another collection"):
        index.check(collection=collection)


def corrupted(vectors: np.ndarray, row: int, value: float) -> np.ndarray:
    vectors = vectors.copy()
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda v: v[:100], {"factory": "IVF200,Flat"}, "100 vectors cannot train 200"),
        (lambda v: v[:100], {"factory": "PQ4x8"}, "100 vectors cannot train 256"),
        (lambda v: v, {"factory": "PQ5x4"}, "32 is not divisible by the number of subspaces"),
        (lambda v: v[:, :31], {"factory": "BFlat", "binary": True}, "31 is not divisible by 8"),
        (lambda v: v, {"factory": "Flatt"}, "FAISS does not know this index"),
        (lambda v: v, {"factory": "{list},Flat"}, "cannot be filled in"),
        (lambda v: v, {"factory": "PQ4x8fs"}, "a fast-scan index holds 4 bits a codeword, not 8"),
        (lambda v: v, {"factory": "OPQ4,IVF8,PQ4fsr"}, "a fast-scan index holds 4 bits a codeword, not 8"),
        (lambda v: v, {"factory": "OPQ5,PQ4x4"}, "32 is not divisible by the number of subspaces 5"),
        (lambda v: v, {"factory": "OPQ4_20,PQ8x4"}, "20 is not divisible by the number of subspaces 8"),
        (lambda v: v[np.arange(len(v)) % 12], {"factory": "PQ4x4fs"}, "only 12 of 1500 vectors are different"),
        (lambda v: v, {"factory": "Flat", "search": {"nprobe": 3}}, "no setting 'nprobe'"),
        (lambda v: v, {"factory": "IVF100,Flat", "training_sample": 50}, "training_sample 50 is smaller"),
        (lambda v: corrupted(v, 1234, np.nan), {"factory": "Flat"}, "NaN"),
        (lambda v: corrupted(v, slice(0, 100), 0), {"factory": "Flat"}, "100 of 1500 vectors are zero"),
        (lambda v: v[:0], {"factory": "Flat"}, "nothing to index"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    change: Any, settings: dict[str, Any], message: str, vectors: np.ndarray, tmp_path: Path
) -> None:
    changed = change(vectors)
    with pytest.raises(RankdistillError, match=message):
        build_index(changed, IDS[: len(changed)], specification(**settings), tmp_path / "x.faiss")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_other_bad_input(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, path = specification(factory="Flat"), tmp_path / "x.faiss"
    with pytest.raises(RankdistillError, match="1500 vectors but 1499 document ids"):
        build_index(vectors, IDS[:-1], flat, path)
    with pytest.raises(RankdistillError, match="a vector of length 2 from a student that scores by cosine"):
        build_index(vectors * 2, IDS, flat, path, similarity="cos")
    if not hasattr(faiss, "StandardGpuResources"):
        with pytest.raises(RankdistillError, match="a GPU was asked for"):
            build_index(vectors, IDS, flat, path, device="gpu")
    assert not path.exists()
    index = build_index(corrupted(vectors, 7, 0), IDS, flat, path, similarity="cos")
    assert "1 vectors are zero (first: row 7)" in capsys.readouterr().err
    with pytest.raises(RankdistillError, match="NaN"):
        index.search(corrupted(queries, 1, np.nan), 5)
    with pytest.raises(RankdistillError, match=r"\[n, 32\] was expected"):
        index.search(queries[:, :8], 5)


def test_damaged_files_are_refused(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    with pytest.raises(RankdistillError, match="there is no index here"):
        FaissIndex.open(path)
    build_index(vectors, IDS, specification(factory="Flat"), path)
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
    ids_file(path).write_bytes(b"PAR1")
    with pytest.raises(RankdistillError, match="damaged"):
        FaissIndex.open(path)
    manifest_file(path).unlink()
    with pytest.raises(RankdistillError, match="has no manifest"):
        FaissIndex.open(path)
    assert FaissIndex.foreign(path).document_count == COUNT


@pytest.mark.parametrize("change", [{"specification": None}, {"specification": {"name": 3}}, {"specification": []}])
def test_a_damaged_manifest_is_named(vectors: np.ndarray, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "x.faiss"
    build_index(vectors, IDS, specification(factory="Flat"), path)
    whole = json.loads(manifest_file(path).read_text())
    manifest_file(path).write_text(json.dumps(whole | change))
    with pytest.raises(RankdistillError, match=r"manifest is damaged(.|\n)*x\.faiss\.json"):
        FaissIndex.open(path)


@pytest.mark.parametrize("moment", range(4))
def test_an_index_being_published_is_taken_for_no_stranger_s(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
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
        build_index(vectors, IDS, specification(factory="Flat"), path)
    monkeypatch.undo()
    with pytest.raises(RankdistillError, match=r"not finished|no index"):
        FaissIndex.open(path)
    assert damaged_index(manifest_file(path)) == path
    assert build_index(vectors, IDS, specification(factory="Flat"), path).document_count == COUNT


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
    index = build_index(vectors, map(str, range(800)), specification(factory="OPQ3,PQ3x4"), tmp_path / "x.faiss")
    plain = faiss.index_factory(12, "OPQ3,PQ3x4", faiss.METRIC_INNER_PRODUCT)
    faiss.downcast_index(plain.index).do_polysemous_training = False
    plain.train(vectors)
    plain.add(vectors)
    ours, theirs = (((vectors - one.reconstruct_n(0, 800)) ** 2).sum(axis=1).mean() for one in (index.index, plain))
    assert ours < 0.95 * theirs
    few = build_index(vectors[:50], map(str, range(50)), specification(factory="OPQ3,PQ3x4fs"), tmp_path / "y.faiss")
    assert few.document_count == 50


def test_memory_mapped_codes_stay_on_disk(tmp_path: Path) -> None:
    """Opened by a process that may not hold them: anonymous memory grows by less than a tenth of the file."""
    from rankdistill.indexes.faiss_assembly import add_codes, assemble_index
    from rankdistill.indexes.faiss_index import publish_index

    rng, count = np.random.default_rng(0), 200_000
    codebooks, centroids = rng.normal(size=(32, 256, 2)), rng.normal(size=(64, 64))
    codes, lists = rng.integers(0, 256, (count, 32)).astype(np.uint8), rng.integers(0, 64, count)
    code = (
        "import sys, numpy as np, faiss\n"
        "from rankdistill.indexes.faiss_index import FaissIndex\n"
        "def anonymous():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "query = np.ones((1, 64), np.float32)\n"
        "FaissIndex.open(sys.argv[1] + '.small').search(query, 5)\n"  # what a first search allocates anyway
        "before = anonymous()\n"
        "index = FaissIndex.open(sys.argv[1], memory_map=sys.argv[2] == '1')\n"
        "hits = index.search(query, 5)[0]\n"
        "print(anonymous() - before, *hits.rows)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name, held in (("pq", None), ("ivf", centroids)):
        path = tmp_path / name
        for rows, file in ((count, path), (100, Path(f"{path}.small"))):
            made = assemble_index(rotation=None, centroids=held, codebooks=codebooks)
            add_codes(made, None if held is None else lists[:rows], codes[:rows])
            publish_index(made, map(str, range(rows)), file, specification=specification(factory="any"), manifest={})
        printed = [
            subprocess.run(
                [sys.executable, "-c", code, str(path), mapped],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            ).stdout.split()
            for mapped in "01"
        ]
        size = path.stat().st_size / 1024
        assert printed[0][1:] == printed[1][1:]
        # What is held takes its place in part from memory that the imports freed.
        assert int(printed[0][0]) > 0.4 * size and int(printed[1][0]) < 0.1 * size, (name, printed, size)


def test_fewer_vectors_than_dimensions_train_no_rotation(tmp_path: Path) -> None:
    """FAISS corrupts its memory there and the process is gone."""
    vectors = np.random.default_rng(0).normal(size=(300, 384)).astype(np.float32)
    turned = specification(factory="OPQ16,PQ16x4")
    with pytest.raises(RankdistillError, match="300 vectors cannot train a rotation of 384 dimensions"):
        build_index(vectors, map(str, range(300)), turned, tmp_path / "turned.faiss")


def test_a_foreign_index_is_known_by_its_content(tmp_path: Path) -> None:
    """Not by its path and size: another index of as many bytes is another one, and a moved one is the same."""
    prints = []
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        index = faiss.IndexFlatIP(4)
        index.add(np.random.default_rng(seed).normal(size=(9, 4)).astype(np.float32))
        faiss.write_index(index, str(tmp_path / f"{name}.faiss"))
        prints.append(FaissIndex.foreign(tmp_path / f"{name}.faiss").fingerprint)
    assert prints[0] == prints[2] != prints[1]
