"""Each finding on an index made to have it, and on one made not to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from shipped_indexes import shipped_specifications

from rankdistill.errors import RankdistillError
from rankdistill.indexes.building import build_index
from rankdistill.indexes.faiss_assembly import add_codes, assemble_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.inspection import check_index
from rankdistill.indexes.specification import load_specification

COUNT, DIMENSION = 1500, 32


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    made = rng.normal(size=(40, DIMENSION))[rng.integers(0, 40, COUNT)] + rng.normal(size=(COUNT, DIMENSION)) * 0.7
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def build(vectors: np.ndarray, folder: Path, **settings: Any) -> FaissIndex:
    specification = load_specification({"name": "test", **settings})
    return build_index(vectors, map(str, range(len(vectors))), specification, folder / "x.faiss")


def foreign(index: Any, folder: Path) -> FaissIndex:
    faiss.write_index(index, str(folder / "x.faiss"))
    return FaissIndex.foreign(folder / "x.faiss")


@pytest.mark.parametrize("name", sorted(shipped_specifications()))
def test_what_is_shipped_gets_no_warning(name: str, vectors: np.ndarray, tmp_path: Path) -> None:
    index = build_index(vectors, map(str, range(COUNT)), load_specification(name), tmp_path / "x", similarity="cos")
    before = index.search(vectors[:5], 10)
    for opened in (index, FaissIndex.open(tmp_path / "x", memory_map=True)):
        for given in (vectors, None):
            found = check_index(opened, vectors=given, k=50, sample=300)
            assert found.warnings == [] and found["documents"] == COUNT, str(found)
            assert "WARNING" not in str(found) and found.to_json()["findings"]["documents"] == COUNT
    for first, second in zip(before, index.search(vectors[:5], 10), strict=True):
        np.testing.assert_array_equal(first.rows, second.rows)  # looking changes nothing


@pytest.mark.parametrize("factory", ["PQ4x6", "OPQ8,PQ8x4fs", "IVF8,PQ4x6", "OPQ4,IVF8,PQ4x4fsr", "IVF8,SQ8", "SQ8"])
def test_lengths_and_directions_are_those_of_the_decoded_vectors(
    factory: str, vectors: np.ndarray, tmp_path: Path
) -> None:
    index = build(vectors * 3, tmp_path, factory=factory)
    decoded = index.index.reconstruct_n(0, COUNT) if "fs" not in factory else None
    found = check_index(index, vectors=vectors * 3, sample=COUNT)
    if decoded is not None:
        kept = np.linalg.norm(decoded, axis=1) / 3
        assert found["length kept, mean"] == pytest.approx(kept.mean(), abs=1e-3)
        assert found["length kept, spread"] == pytest.approx(kept.std() / kept.mean(), abs=1e-3)
        cosines = (decoded * vectors).sum(1) / np.linalg.norm(decoded, axis=1)
        assert found["direction kept, mean"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert 0.8 < float(found["direction kept, mean"]) <= 1  # type: ignore[arg-type]


def test_lists_are_counted(vectors: np.ndarray, tmp_path: Path) -> None:
    index = build(vectors, tmp_path, factory="IVF20,Flat", search={"nprobe": 5})
    sizes = np.array([index.index.invlists.list_size(number) for number in range(20)])
    found = check_index(index, vectors=vectors)
    assert found["lists, largest"] == sizes.max() and found["lists, empty"] == (sizes == 0).sum()
    assert found["lists, imbalance"] == pytest.approx(index.index.invlists.imbalance_factor(), abs=1e-3)
    assert found["own list probed first"] == 1.0


@pytest.mark.parametrize("fast_scan", [False, True])
def test_lists_that_are_not_those_that_are_probed(vectors: np.ndarray, fast_scan: bool, tmp_path: Path) -> None:
    """Every document in the list after its own, two thirds of the lists empty, the rest in one."""
    rng = np.random.default_rng(1)
    codebooks = rng.normal(size=(4, 16, 8)).astype(np.float32) * 0.1
    codes = rng.integers(0, 16, (COUNT, 4)).astype(np.uint8)
    centroids = np.eye(30, DIMENSION, dtype=np.float32)
    made = assemble_index(rotation=None, centroids=centroids, codebooks=codebooks, fast_scan=fast_scan)
    own = (vectors @ centroids.T).argmax(axis=1)
    add_codes(made, (own + 1) % 30, codes)
    found = check_index(foreign(made, tmp_path), vectors=vectors)
    assert found["own list probed first"] == 0.0 and found["own list among the probed"] == 0.0
    assert any("assign them again by the rule" in warning for warning in found.warnings)

    made = assemble_index(rotation=None, centroids=centroids, codebooks=codebooks, fast_scan=fast_scan)
    add_codes(made, np.where(np.arange(COUNT) < 9, np.arange(COUNT), 9), codes)
    found = check_index(foreign(made, tmp_path))
    assert found["lists, empty"] == 20 and float(found["lists, imbalance"]) > 29  # type: ignore[arg-type]
    text = str(found)
    assert "use fewer lists" in text and "times as many vectors as with even lists" in text


def test_short_lists_leave_hits_missing(vectors: np.ndarray, tmp_path: Path) -> None:
    index = build(vectors, tmp_path, factory="IVF30,Flat", search={"nprobe": 1})
    queries = vectors[:200]
    expected = (index.index.search(queries, 100)[1] < 0).mean()
    found = check_index(index, queries=queries, k=100)
    assert expected > 0 and found["hits missing (-1) of 100"] == pytest.approx(expected, abs=1e-4)
    assert any("raise nprobe" in warning for warning in found.warnings)
    assert check_index(index, queries=queries, k=3)["hits missing (-1) of 3"] == 0


@pytest.mark.parametrize("factory", ["PQ1x2", "IVF2,PQ1x2", "PQ1x4fs", "IVF2,PQ1x4fsr"])
def test_shared_codes_are_counted(factory: str, vectors: np.ndarray, tmp_path: Path) -> None:
    found = check_index(build(vectors, tmp_path, factory=factory), vectors=vectors)
    assert found["codes shared"] == 1.0 and any("more subspaces or bits" in warning for warning in found.warnings)
    # Vectors that are the same anyway are not the codes' fault.
    same = vectors[np.arange(COUNT) % 300]
    found = check_index(build(same, tmp_path, factory="PQ4x8"), vectors=same)
    assert found["codes shared"] == 1.0 and not any("codes shared" in warning for warning in found.warnings)


def test_codes_that_change_lengths_are_named(vectors: np.ndarray, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    codebooks = rng.normal(size=(4, 16, 8)).astype(np.float32) * np.linspace(0.1, 3, 16)[None, :, None]
    made = assemble_index(rotation=None, centroids=None, codebooks=codebooks.astype(np.float32))
    add_codes(made, None, np.repeat(rng.integers(0, 16, (COUNT, 1)), 4, axis=1).astype(np.uint8))
    found = check_index(foreign(made, tmp_path), vectors=vectors)
    assert any(warning.startswith("length kept, spread") for warning in found.warnings)


def test_polysemous_filters_are_found(vectors: np.ndarray, tmp_path: Path) -> None:
    index = build(vectors, tmp_path, factory="OPQ4,IVF8,PQ4x8")
    assert check_index(index)["polysemous filter"] == "off"
    faiss.downcast_index(index.index.index).polysemous_ht = 20
    found = check_index(index)
    assert found["polysemous filter"] == "on" and any("polysemous_ht = 0" in warning for warning in found.warnings)
    index = build(vectors, tmp_path, factory="PQ4x8")
    index.index.search_type = faiss.IndexPQ.ST_polysemous
    found = check_index(index)
    assert found["polysemous filter"] == "on" and any("FAISS cannot search" in warning for warning in found.warnings)


def test_more_lists_probed_than_there_are(vectors: np.ndarray, tmp_path: Path) -> None:
    """FAISS's fast-scan finds next to nothing then; our settings never go there, a foreign file may."""
    index = build(vectors, tmp_path, factory="IVF8,PQ8x4fsr", search={"nprobe": 1000})
    assert index.index.nprobe == 8 and check_index(index).warnings == []
    best = index.search(vectors[:50], 10)
    index.index.nprobe = 9
    worse = index.search(vectors[:50], 10)
    assert np.mean([len(set(a.rows) & set(b.rows)) for a, b in zip(best, worse, strict=True)]) < 5
    assert any("set nprobe to 8" in warning for warning in check_index(index).warnings)


def test_broken_codebooks_and_wrong_vectors(vectors: np.ndarray, tmp_path: Path) -> None:
    index = build(vectors, tmp_path, factory="PQ4x4")
    with pytest.raises(RankdistillError, match=r"vectors of shape \[1499, 32\], an index of 1500 × 32"):
        check_index(index, vectors=vectors[1:])
    faiss.copy_array_to_vector(np.full(16 * DIMENSION, np.nan, np.float32), index.index.pq.centroids)
    assert any("the codebooks are broken" in warning for warning in check_index(index).warnings)
