"""Indexes made of parts: against numpy, against FAISS's own trained indexes, and opened by plain FAISS."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.indexes.faiss_assembly import add_codes, assemble_index, pack_codes, parts_of, unpack_codes
from rankdistill.indexes.faiss_index import parts

DIMENSION, LISTS, COUNT, DEPTH = 24, 6, 300, 40
# (fast-scan, bits): fast-scan scores are rounded to 8-bit tables, the others are exact.
KINDS = [(False, 8), (False, 4), (False, 6), (True, 4)]


class Parts:
    """Random parts, and the scores that the formulas of the module give for them."""

    def __init__(self, bits: int, lists: bool, residual: bool, rotated: bool, subspaces: int = 6) -> None:
        rng = np.random.default_rng(bits + 10 * lists)
        self.rotation = np.linalg.qr(rng.normal(size=(DIMENSION, DIMENSION)))[0].astype(np.float32) if rotated else None
        self.centroids = rng.normal(size=(LISTS, DIMENSION)).astype(np.float32) if lists else None
        width = DIMENSION // subspaces
        self.codebooks = rng.normal(size=(subspaces, 1 << bits, width)).astype(np.float32)
        self.codes = rng.integers(0, 1 << bits, (COUNT, subspaces)).astype(np.uint8)
        self.lists = rng.integers(0, LISTS - 1, COUNT) if lists else None  # the last list stays empty
        self.residual = residual
        self.queries = rng.normal(size=(8, DIMENSION)).astype(np.float32)

    def scores(self, metric: str) -> np.ndarray:
        vectors = np.hstack([book[self.codes[:, number]] for number, book in enumerate(self.codebooks)])
        if self.centroids is not None and self.residual:
            vectors = vectors + self.centroids[self.lists]
        queries = self.queries if self.rotation is None else self.queries @ self.rotation.T
        if metric == "inner_product":
            return queries @ vectors.T
        return ((queries[:, None] - vectors) ** 2).sum(axis=2)

    def index(self, metric: Any, fast_scan: bool = False, pieces: int = 1) -> Any:
        made = assemble_index(
            rotation=self.rotation,
            centroids=self.centroids,
            codebooks=self.codebooks,
            metric=metric,
            by_residual=self.residual,
            fast_scan=fast_scan,
        )
        for rows in np.array_split(np.arange(COUNT), pieces):
            add_codes(made, None if self.lists is None else self.lists[rows], self.codes[rows])
        visit_all(made)
        return made


def visit_all(index: Any) -> None:
    if faiss.try_extract_index_ivf(index) is not None:
        faiss.extract_index_ivf(index).nprobe = LISTS


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize(("fast_scan", "bits"), KINDS)
@pytest.mark.parametrize(("lists", "residual"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("rotated", [False, True])
def test_ids_and_scores_are_those_of_the_parts(
    metric: str, fast_scan: bool, bits: int, lists: bool, residual: bool, rotated: bool
) -> None:
    made = Parts(bits, lists, residual, rotated)
    index, expected = made.index(metric, fast_scan), made.scores(metric)
    assert index.is_trained and index.ntotal == COUNT
    scores, rows = index.search(made.queries, DEPTH)
    best = np.argsort(-expected if metric == "inner_product" else expected, axis=1, kind="stable")[:, :DEPTH]
    difference = np.abs(scores - np.take_along_axis(expected, rows, axis=1)).max()
    if fast_scan:
        assert difference < 0.02 * np.ptp(expected)
        assert np.mean([len(set(a) & set(b)) for a, b in zip(rows, best, strict=True)]) > 0.95 * DEPTH
        return
    assert difference < 1e-4
    np.testing.assert_allclose(scores, np.take_along_axis(expected, best, axis=1), atol=1e-4)
    apart = np.abs(np.diff(np.take_along_axis(expected, best, axis=1), axis=1)).min(axis=1) > 1e-4
    np.testing.assert_array_equal(rows[apart], best[apart])


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("lists", [False, True])
def test_fast_scan_holds_the_codes_of_the_plain_index_and_ranks_alike(metric: str, lists: bool) -> None:
    made = Parts(4, lists, True, True, subspaces=8)
    plain, fast = made.index(metric), made.index(metric, fast_scan=True)
    assert "FastScan" in type(faiss.downcast_index(fast.index)).__name__
    held = parts_of(fast)
    np.testing.assert_array_equal(held.codes, made.codes)
    assert held.fast_scan and held.codebooks.shape[1] == 16 and held.by_residual == lists
    if lists:
        np.testing.assert_array_equal(held.assignments, made.lists)
    ours, theirs = plain.search(made.queries, 20)[1], fast.search(made.queries, 20)[1]
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(ours, theirs, strict=True)]) > 0.95


@pytest.mark.parametrize(("fast_scan", "bits"), [(False, 8), (False, 5), (True, 4)])
@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("subspaces", [6, 3])
def test_codes_may_come_in_pieces_and_come_back_whole(fast_scan: bool, bits: int, lists: bool, subspaces: int) -> None:
    made = Parts(bits, lists, True, False, subspaces)
    index = made.index("inner_product", fast_scan, pieces=4)
    held = parts_of(index)
    np.testing.assert_array_equal(held.codes, made.codes)
    np.testing.assert_array_equal(held.ids, np.arange(COUNT))
    once = made.index("inner_product", fast_scan)
    for first, second in zip(index.search(made.queries, 9), once.search(made.queries, 9), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_faiss_packing(bits: int) -> None:
    made = Parts(bits, False, False, False)
    index = faiss.IndexPQ(DIMENSION, 6, bits)
    faiss.copy_array_to_vector(made.codebooks.ravel(), index.pq.centroids)
    vectors = np.hstack([book[made.codes[:, number]] for number, book in enumerate(made.codebooks)])
    np.testing.assert_array_equal(pack_codes(made.codes, bits), index.pq.compute_codes(vectors))
    np.testing.assert_array_equal(unpack_codes(pack_codes(made.codes, bits), 6, bits), made.codes)


@pytest.mark.parametrize(
    "factory",
    [
        "PQ4x8",
        "PQ8x4fs",
        "OPQ4,PQ4x6",
        "IVF6,PQ4x4",
        "OPQ4,IVF6,PQ4x5",
        "OPQ4,IVF6,PQ4x4fs",
        "OPQ4,IVF6,PQ4x4fsr",
        "OPQ4_16,IVF6,PQ4x5",
    ],
)
@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
def test_parts_of_a_trained_index_make_the_same_file(factory: str, metric: int, tmp_path: Path) -> None:
    """What training without a step exports is FAISS's own index, to the byte."""
    vectors = np.random.default_rng(3).normal(size=(700, DIMENSION)).astype(np.float32)
    if factory.startswith("PQ8x4"):
        vectors = np.ascontiguousarray(vectors[:, :16])
    trained = faiss.index_factory(vectors.shape[1], factory, metric)
    for part in parts(trained):
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # seconds
    trained.train(vectors)
    trained.add(vectors)
    held = parts_of(trained)
    made = assemble_index(
        rotation=held.rotation,
        centroids=held.centroids,
        codebooks=held.codebooks,
        metric=held.metric,
        by_residual=held.by_residual,
        fast_scan=held.fast_scan,
    )
    add_codes(made, held.assignments, held.codes)
    faiss.write_index(trained, str(tmp_path / "theirs"))
    faiss.write_index(made, str(tmp_path / "ours"))
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "ours").read_bytes()


def test_parts_live_as_long_as_the_index() -> None:
    """Nothing inside may hang on a Python name: the quantizer, the rotation, the index within."""
    made = Parts(8, True, True, True)
    indexes = [made.index("l2", pieces=3) for _ in range(20)]
    expected = indexes[0].search(made.queries, 10)
    gc.collect()
    _ = [np.random.default_rng(seed).normal(size=100_000) for seed in range(20)]  # something to overwrite freed memory
    for index in indexes:
        for first, second in zip(expected, index.search(made.queries, 10), strict=True):
            np.testing.assert_array_equal(first, second)


def test_bad_parts_are_named() -> None:
    made = Parts(8, True, True, True)
    good: dict[str, Any] = {"rotation": made.rotation, "centroids": made.centroids, "codebooks": made.codebooks}
    for message, changes in (
        (r"no fast-scan index holds together: codebooks \[6, 256, 4\]", {"fast_scan": True}),
        ("holds together", {"codebooks": made.codebooks[:, :200]}),
        ("holds together", {"codebooks": made.codebooks[:, :1]}),
        (r"centroids \[6, 23\]", {"centroids": made.centroids[:, :23]}),
        (r"rotation \[12, 24\]", {"rotation": made.rotation[:12]}),
        ("NaN or infinity in the centroids", {"centroids": made.centroids * np.nan}),
    ):
        with pytest.raises(RankdistillError, match=message):
            assemble_index(**{**good, **changes})
    index = assemble_index(**good)
    four = assemble_index(**{**good, "codebooks": made.codebooks[:, :16]})
    for arguments in (
        (index, None, made.codes),
        (index, made.lists, made.codes[:, :5]),
        (index, made.lists[:-1], made.codes),
        (index, np.where(np.arange(COUNT) == 5, 6, 0), made.codes),
        (index, np.where(np.arange(COUNT) == 5, -1, 0), made.codes),
        (four, made.lists, np.full_like(made.codes, 255)),
        (index, made.lists, made.codes.astype(np.int64) - 1 - made.codes),
    ):
        with pytest.raises(RankdistillError, match="that this index has no place for"):
            add_codes(*arguments)
    assert index.ntotal == four.ntotal == 0
    for factory, message in (("SQ8", "no product-quantised index"), ("L2norm,PQ4x8", "not one rotation")):
        with pytest.raises(RankdistillError, match=message):
            parts_of(faiss.index_factory(DIMENSION, factory))
