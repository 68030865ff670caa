"""Each finding on an index made to have it; what is shipped gets none (test_faiss_index.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from small_indexes import COUNT, DIMENSION, VECTORS
from small_indexes import build as build_at

from rankdistill.errors import RankdistillError
from rankdistill.indexes.faiss_assembly import IndexParts, add_codes, assemble_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.inspection import IndexCheck, check_index


def build(folder: Path, vectors: np.ndarray = VECTORS, **settings: Any) -> FaissIndex:
    return build_at(folder / "x.faiss", vectors, **settings)


def check_made(parts: IndexParts, lists: Any, codes: np.ndarray, folder: Path, vectors: Any = VECTORS) -> IndexCheck:
    """Of somebody else's file, made of parts."""
    index = assemble_index(parts)
    add_codes(index, lists, codes.astype(np.uint8))
    faiss.write_index(index, str(folder / "x.faiss"))
    return check_index(FaissIndex.foreign(folder / "x.faiss"), vectors=vectors)


def warned(check: IndexCheck, words: str) -> bool:
    return any(words in warning for warning in check.warnings)


@pytest.mark.parametrize("factory", ["PQ4x6", "OPQ8,PQ8x4fs", "IVF8,PQ4x6", "OPQ4,IVF8,PQ4x4fsr", "IVF8,SQ8", "SQ8"])
def test_lengths_and_directions_are_those_of_the_decoded_vectors(factory: str, tmp_path: Path) -> None:
    index = build(tmp_path, VECTORS * 3, factory=factory)
    check = check_index(index, vectors=VECTORS * 3, sample=COUNT)
    if "fs" not in factory:
        decoded = index.index.reconstruct_n(0, COUNT)
        kept = np.linalg.norm(decoded, axis=1) / 3
        assert check["length kept, mean"] == pytest.approx(kept.mean(), abs=1e-3)
        assert check["length kept, spread"] == pytest.approx(kept.std() / kept.mean(), abs=1e-3)
        cosines = (decoded * VECTORS).sum(1) / np.linalg.norm(decoded, axis=1)
        assert check["direction kept, mean"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert 0.8 < float(check["direction kept, mean"]) <= 1


def test_lists_are_counted(tmp_path: Path) -> None:
    index = build(tmp_path, factory="IVF20,Flat", search={"nprobe": 5})
    sizes = np.array([index.index.invlists.list_size(number) for number in range(20)])
    check = check_index(index, vectors=VECTORS)
    assert check["lists, largest"] == sizes.max() and check["lists, empty"] == (sizes == 0).sum()
    assert check["lists, imbalance"] == pytest.approx(index.index.invlists.imbalance_factor(), abs=1e-3)
    assert check["own list probed first"] == 1.0


@pytest.mark.parametrize("fast_scan", [False, True])
def test_lists_that_are_not_those_that_are_probed(fast_scan: bool, tmp_path: Path) -> None:
    """Every document in the list after its own, two thirds of the lists empty, the rest in one."""
    rng = np.random.default_rng(1)
    codebooks, codes = rng.normal(size=(4, 16, 8)).astype(np.float32) * 0.1, rng.integers(0, 16, (COUNT, 4))
    parts = IndexParts(None, np.eye(30, DIMENSION, dtype=np.float32), codebooks, fast_scan=fast_scan)
    check = check_made(parts, (VECTORS[:, :30].argmax(axis=1) + 1) % 30, codes, tmp_path)
    assert check["own list probed first"] == 0.0 and check["own list among the probed"] == 0.0
    assert warned(check, "assign them again by the rule")
    check = check_made(parts, np.minimum(np.arange(COUNT), 9), codes, tmp_path, vectors=None)
    assert check["lists, empty"] == 20 and float(check["lists, imbalance"]) > 29
    text = str(check)
    assert "use fewer lists" in text and "times as many vectors as with even lists" in text


def test_short_lists_leave_hits_missing(tmp_path: Path) -> None:
    index, queries = build(tmp_path, factory="IVF30,Flat", search={"nprobe": 1}), VECTORS[:200]
    expected = (index.index.search(queries, 100)[1] < 0).mean()
    check = check_index(index, queries=queries, k=100)
    assert expected > 0 and check["hits missing (-1) of 100"] == pytest.approx(expected, abs=1e-4)
    assert warned(check, "raise nprobe")
    assert check_index(index, queries=queries, k=3)["hits missing (-1) of 3"] == 0


@pytest.mark.parametrize("factory", ["PQ1x2", "IVF2,PQ1x2", "PQ1x4fs", "IVF2,PQ1x4fsr"])
def test_shared_codes_are_counted(factory: str, tmp_path: Path) -> None:
    check = check_index(build(tmp_path, factory=factory), vectors=VECTORS)
    assert check["codes shared"] == 1.0 and warned(check, "more subspaces or bits")


def test_vectors_that_are_the_same_anyway_are_not_the_codes_fault(tmp_path: Path) -> None:
    same = VECTORS[np.arange(COUNT) % 300]
    check = check_index(build(tmp_path, same, factory="PQ4x8"), vectors=same)
    assert check["codes shared"] == 1.0 and not warned(check, "codes shared")


def test_codes_that_change_lengths_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    codebooks = rng.normal(size=(4, 16, 8)) * np.linspace(0.1, 3, 16)[None, :, None]
    codes = np.repeat(rng.integers(0, 16, (COUNT, 1)), 4, axis=1)
    assert warned(check_made(IndexParts(None, None, codebooks), None, codes, tmp_path), "length kept, spread")


def test_polysemous_filters_are_found(tmp_path: Path) -> None:
    index = build(tmp_path, factory="RR32,IVF8,PQ4x8")
    assert check_index(index)["polysemous filter"] == "off"
    faiss.downcast_index(index.index.index).polysemous_ht = 20
    check = check_index(index)
    assert check["polysemous filter"] == "on" and warned(check, "polysemous_ht = 0")
    index = build(tmp_path, factory="PQ4x8")
    index.index.search_type = faiss.IndexPQ.ST_polysemous
    check = check_index(index)
    assert check["polysemous filter"] == "on" and warned(check, "FAISS cannot search")


def test_more_lists_probed_than_there_are(tmp_path: Path) -> None:
    """FAISS's fast-scan finds next to nothing then; our settings never go there, a foreign file may."""
    index = build(tmp_path, factory="IVF8,PQ8x4fsr", search={"nprobe": 1000})
    assert index.index.nprobe == 8 and check_index(index).warnings == []
    best = index.search(VECTORS[:50], 10)
    index.index.nprobe = 9
    worse = index.search(VECTORS[:50], 10)
    assert np.mean([len(set(a.rows) & set(b.rows)) for a, b in zip(best, worse, strict=True)]) < 5
    assert warned(check_index(index), "set nprobe to 8")


def test_broken_codebooks_and_wrong_vectors(tmp_path: Path) -> None:
    index = build(tmp_path, factory="PQ4x4")
    with pytest.raises(RankdistillError, match=r"vectors of shape \[1499, 32\], an index of 1500 × 32"):
        check_index(index, vectors=VECTORS[1:])
    faiss.copy_array_to_vector(np.full(16 * DIMENSION, np.nan, np.float32), index.index.pq.centroids)
    assert warned(check_index(index), "the codebooks are broken")
