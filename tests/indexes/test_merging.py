"""Shards joined: the same bytes as building in one go, and what may not be joined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_indexes

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.building import merge_indexes
from rankdistill.indexes.faiss_index import FaissIndex, ids_file

CUTS = [0, 700, 701, 1200]
VECTORS = np.random.default_rng(5).normal(size=(CUTS[-1], 32)).astype(np.float32)
IDS = [f"d{row}" for row in range(len(VECTORS))]


def build(rows: slice, path: Path, trained_by: FaissIndex | None = None, **settings: Any) -> FaissIndex:
    return small_indexes.build(path, VECTORS[rows], IDS[rows], {"trained_by": trained_by}, **settings)


def build_shards(folder: Path, **settings: Any) -> list[Path]:
    first = build(slice(*CUTS[:2]), folder / "0.faiss", **settings)
    for number in (1, 2):
        build(slice(*CUTS[number : number + 2]), folder / f"{number}.faiss", trained_by=first, **settings)
    return [folder / f"{number}.faiss" for number in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"factory": "Flat"},
        {"factory": "SQ8", "metric": "l2"},
        {"factory": "PQ4x6"},
        {"factory": "OPQ8,PQ8x4fs"},
        {"factory": "IVF{lists},PQ4x6", "search": {"nprobe": 5}},
        {"factory": "OPQ4,IVF8,PQ4x4fsr"},
        {"factory": "OPQ4,IVF8,PQ4x6", "refine": "SQ8", "search": {"k_factor": 3}},
        {"factory": "RR32,IVF8,RaBitQ"},
        {"factory": "BFlat", "binary": True},
        {"factory": "BIVF8", "binary": True},
    ],
    ids=lambda settings: str(settings["factory"]),
)
def test_shards_join_into_the_file_built_in_one_go(settings: dict[str, Any], tmp_path: Path) -> None:
    shards = build_shards(tmp_path, **settings)
    merged = merge_indexes(shards, tmp_path / "merged.faiss", collection_fingerprint="whole")
    whole = build(slice(None), tmp_path / "whole.faiss", trained_by=FaissIndex.open(shards[0]), **settings)
    if "RaBitQ" not in settings["factory"]:  # it stores floats, whose last bit a rotation of other rows changes
        assert merged.path.read_bytes() == whole.path.read_bytes()
    assert ids_file(merged.path).read_bytes() == ids_file(whole.path).read_bytes()
    opened = FaissIndex.open(merged.path, memory_map=True)
    assert opened.document_count == len(VECTORS) and opened.manifest["collection_fingerprint"] == "whole"
    for ours, theirs in zip(opened.search(VECTORS[:5], 10), whole.search(VECTORS[:5], 10), strict=True):
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        assert opened.doc_ids(ours.rows) == [IDS[row] for row in theirs.rows]


@pytest.mark.parametrize(
    ("message", "factory", "start", "settings"),
    [
        ("trained apart", "IVF8,Flat", 700, {}),
        ("trained apart", "OPQ4,PQ4x6", 700, {}),
        ("trained apart", "PQ8x4fs", 700, {}),
        ("factory is 'IVF8,Flat' in the first, 'IVF9,Flat' here", "IVF8,Flat", 700, {"factory": "IVF9,Flat"}),
        ("metric is 'inner_product'", "IVF8,Flat", 700, {"metric": "l2"}),
        ("1 document ids come twice, the first is 'd699'", "IVF8,Flat", 699, {}),
    ],
)
def test_what_does_not_belong_together_is_refused(
    message: str, factory: str, start: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    first = build(slice(0, 700), tmp_path / "a", factory=factory)
    second = build(slice(start, None), tmp_path / "b", **{"factory": factory, **settings})
    with pytest.raises(RankdistillError, match=message):
        merge_indexes([first.path, second.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_joined_or_trained_so_is_refused(tmp_path: Path) -> None:
    first = build(slice(0, 700), tmp_path / "a", factory="IVF8,Flat")
    with pytest.raises(UsageError, match="would replace one of its shards"):
        merge_indexes([first.path], first.path)
    with pytest.raises(UsageError, match="no indexes to merge"):
        merge_indexes([], tmp_path / "out")
    with pytest.raises(RankdistillError, match="FAISS cannot join indexes of HNSW8,Flat"):
        merge_indexes(build_shards(tmp_path, factory="HNSW8,Flat"), tmp_path / "out")
    with pytest.raises(RankdistillError, match="cannot train PQ4x6"):
        build(slice(700, None), tmp_path / "b", trained_by=first, factory="PQ4x6")
