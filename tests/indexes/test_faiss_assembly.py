"""Indexes made of parts: against numpy, against FAISS's own trained indexes, and opened by plain FAISS."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.indexes.faiss_assembly import IndexParts, add_codes, assemble_index, pack_codes, parts_of, unpack_codes
from rankdistill.indexes.faiss_index import parts as parts_inside
from rankdistill.indexes.faiss_index import transforms

DIMENSION, LISTS, COUNT, DEPTH = 24, 6, 300, 40
QUERIES = np.random.default_rng(7).normal(size=(8, DIMENSION)).astype(np.float32)
# (fast-scan, bits): fast-scan scores are rounded to 8-bit tables, the others are exact.
KINDS = pytest.mark.parametrize(("fast_scan", "bits"), [(False, 8), (False, 4), (False, 6), (True, 4)])
METRICS = pytest.mark.parametrize("metric", ["inner_product", "l2"])


def random_parts(
    bits: int, lists: bool, residual: bool = True, rotated: bool = False, subspaces: int = 6, **more: Any
) -> IndexParts:
    rng = np.random.default_rng(bits + 10 * lists)
    return IndexParts(
        np.linalg.qr(rng.normal(size=(DIMENSION, DIMENSION)))[0].astype(np.float32) if rotated else None,
        rng.normal(size=(LISTS, DIMENSION)).astype(np.float32) if lists else None,
        rng.normal(size=(subspaces, 1 << bits, DIMENSION // subspaces)).astype(np.float32),
        by_residual=residual,
        assignments=rng.integers(0, LISTS - 1, COUNT) if lists else None,  # the last list stays empty
        codes=rng.integers(0, 1 << bits, (COUNT, subspaces)).astype(np.uint8),
        **more,
    )


def filled(parts: IndexParts, pieces: int = 1) -> Any:
    """The index of parts and codes; it visits every list."""
    index = assemble_index(parts)
    for rows in np.array_split(np.arange(COUNT), pieces):
        add_codes(index, None if parts.assignments is None else parts.assignments[rows], parts.codes[rows])
    if parts.centroids is not None:
        faiss.extract_index_ivf(index).nprobe = LISTS
    return index


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(first, second, strict=True)]))


@METRICS
@KINDS
@pytest.mark.parametrize(("lists", "residual"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rotated", [False, True])
def test_ids_and_scores_are_those_of_the_parts(
    metric: Any, fast_scan: bool, bits: int, lists: bool, residual: bool, rotated: bool
) -> None:
    parts = random_parts(bits, lists, residual, rotated, metric=metric, fast_scan=fast_scan)
    index = filled(parts)
    assert index.is_trained and index.ntotal == COUNT
    vectors = np.hstack([book[parts.codes[:, number]] for number, book in enumerate(parts.codebooks)])
    if lists and residual:
        assert parts.centroids is not None
        vectors = vectors + parts.centroids[parts.assignments]
    asked = QUERIES if parts.rotation is None else QUERIES @ parts.rotation.T
    expected = asked @ vectors.T if metric == "inner_product" else ((asked[:, None] - vectors) ** 2).sum(axis=2)
    scores, rows = index.search(QUERIES, DEPTH)
    best = np.argsort(-expected if metric == "inner_product" else expected, axis=1, kind="stable")[:, :DEPTH]
    difference = np.abs(scores - np.take_along_axis(expected, rows, axis=1)).max()
    if fast_scan:
        assert difference < 0.02 * np.ptp(expected) and overlap(rows, best) > 0.95
        return
    ideal = np.take_along_axis(expected, best, axis=1)
    assert difference < 1e-4
    np.testing.assert_allclose(scores, ideal, atol=1e-4)
    apart = np.abs(np.diff(ideal, axis=1)).min(axis=1) > 1e-4
    np.testing.assert_array_equal(rows[apart], best[apart])


@METRICS
@pytest.mark.parametrize("lists", [False, True])
def test_fast_scan_holds_the_codes_of_the_plain_index_and_ranks_alike(metric: Any, lists: bool) -> None:
    parts = random_parts(4, lists, True, True, subspaces=8, metric=metric)
    plain, fast = filled(parts), filled(replace(parts, fast_scan=True))
    assert "FastScan" in type(faiss.downcast_index(fast.index)).__name__
    held = parts_of(fast)
    np.testing.assert_array_equal(held.codes, parts.codes)
    assert held.fast_scan and held.codebooks.shape[1] == 16 and held.by_residual == lists
    if lists:
        np.testing.assert_array_equal(held.assignments, parts.assignments)
    assert overlap(plain.search(QUERIES, 20)[1], fast.search(QUERIES, 20)[1]) > 0.95


@pytest.mark.parametrize(("fast_scan", "bits"), [(False, 8), (False, 5), (True, 4)])
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("subspaces", [6, 3])
def test_codes_may_come_in_pieces_and_come_back_whole(fast_scan: bool, bits: int, lists: bool, subspaces: int) -> None:
    parts = random_parts(bits, lists, subspaces=subspaces, fast_scan=fast_scan)
    index, once = filled(parts, pieces=4), filled(parts)
    held = parts_of(index)
    np.testing.assert_array_equal(held.codes, parts.codes)
    np.testing.assert_array_equal(held.ids, np.arange(COUNT))
    for first, second in zip(index.search(QUERIES, 9), once.search(QUERIES, 9), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_faiss_packing(bits: int) -> None:
    parts = random_parts(bits, False)
    index = faiss.IndexPQ(DIMENSION, 6, bits)
    faiss.copy_array_to_vector(parts.codebooks.ravel(), index.pq.centroids)
    packed = index.pq.compute_codes(parts.decoded(np.arange(COUNT)))
    np.testing.assert_array_equal(pack_codes(parts.codes, bits), packed)
    np.testing.assert_array_equal(unpack_codes(packed, 6, bits), parts.codes)


@pytest.mark.parametrize(
    ("factory", "dimension"),
    [
        ("PQ4x8", 24),
        ("PQ8x4fs", 16),
        ("OPQ4,PQ4x6", 24),
        ("IVF6,PQ4x4", 24),
        ("OPQ4,IVF6,PQ4x5", 24),
        ("OPQ4,IVF6,PQ4x4fs", 24),
        ("OPQ4,IVF6,PQ4x4fsr", 24),
        ("OPQ4_16,IVF6,PQ4x5", 24),
    ],
)
@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
def test_parts_of_a_trained_index_make_the_same_file(factory: str, dimension: int, metric: int, tmp_path: Path) -> None:
    """What training without a step exports is FAISS's own index, to the byte."""
    vectors = np.random.default_rng(3).normal(size=(700, dimension)).astype(np.float32)
    trained = faiss.index_factory(dimension, factory, metric)
    for part in parts_inside(trained):
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # seconds
    for transform in transforms(trained):
        transform.niter = 3
    trained.train(vectors)
    trained.add(vectors)
    held = parts_of(trained)
    index = assemble_index(held)
    add_codes(index, held.assignments, held.codes)
    faiss.write_index(trained, str(tmp_path / "theirs"))
    faiss.write_index(index, str(tmp_path / "ours"))
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "ours").read_bytes()


def test_parts_live_as_long_as_the_index() -> None:
    """Nothing inside may hang on a Python name: the quantizer, the rotation, the index within."""
    parts = random_parts(8, True, True, True, metric="l2")
    indexes = [filled(parts, pieces=3) for _ in range(20)]
    expected = indexes[0].search(QUERIES, 10)
    gc.collect()
    _ = [np.random.default_rng(seed).normal(size=100_000) for seed in range(20)]  # something to overwrite freed memory
    for index in indexes:
        for first, second in zip(expected, index.search(QUERIES, 10), strict=True):
            np.testing.assert_array_equal(first, second)


def test_bad_parts_and_codes_are_named() -> None:
    good: Any = random_parts(8, True, True, True)
    for message, changes in (
        (r"no fast-scan index holds together: codebooks \[6, 256, 4\]", {"fast_scan": True}),
        ("holds together", {"codebooks": good.codebooks[:, :200]}),
        ("holds together", {"codebooks": good.codebooks[:, :1]}),
        (r"centroids \[6, 23\]", {"centroids": good.centroids[:, :23]}),
        (r"rotation \[12, 24\]", {"rotation": good.rotation[:12]}),
        ("NaN or infinity in the centroids", {"centroids": good.centroids * np.nan}),
    ):
        with pytest.raises(RankdistillError, match=message):
            assemble_index(replace(good, **changes))
    index, four = assemble_index(good), assemble_index(replace(good, codebooks=good.codebooks[:, :16]))
    for arguments in (
        (index, None, good.codes),
        (index, good.assignments, good.codes[:, :5]),
        (index, good.assignments[:-1], good.codes),
        (index, np.where(np.arange(COUNT) == 5, 6, 0), good.codes),
        (index, np.where(np.arange(COUNT) == 5, -1, 0), good.codes),
        (four, good.assignments, np.full_like(good.codes, 255)),
        (index, good.assignments, good.codes.astype(np.int64) - 1 - good.codes),
    ):
        with pytest.raises(RankdistillError, match="that this index has no place for"):
            add_codes(*arguments)
    assert index.ntotal == four.ntotal == 0
    for factory, message in (("SQ8", "no product-quantised index"), ("L2norm,PQ4x8", "not one rotation")):
        with pytest.raises(RankdistillError, match=message):
            parts_of(faiss.index_factory(DIMENSION, factory))
