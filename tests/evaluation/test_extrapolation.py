"""Interpolation and extrapolation: what the parts promise holds, and the figures are those of the queries in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankdistill.cli.folds import fold_recipes, run_folds
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.extrapolation import (
    EXTRAPOLATION,
    FILE,
    INTERPOLATION,
    NEITHER,
    TABLE,
    QuerySplit,
    assign,
    embed_queries,
    measure_split,
    near_or_far,
    nearest,
    pool_folds,
    spherical_kmeans,
    split_by_clusters,
    split_by_similarity,
)
from rankdistill.recipe import check_recipe, load_recipe
from rankdistill.stages import Workspace


def unit(count: int, dimension: int, seed: int, topics: int = 6) -> np.ndarray:
    """Unit vectors round a few directions, as queries are."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(topics, dimension))
    vectors = centres[random.integers(0, topics, count)] + random.normal(0, 0.7, (count, dimension))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def ids(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


# -- splits -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.one_of(st.none(), st.floats(-0.2, 1)), st.integers(1, 80), st.integers(1, 200))
def test_no_query_of_extrapolation_is_nearer_than_the_bound(
    seed: int, bound: float | None, tests: int, trained: int
) -> None:
    queries, training = unit(tests, 16, seed), unit(trained, 16, seed + 1)
    split = split_by_similarity(ids("q", tests), queries, ids("t", trained), training, bound)
    # Every cosine by itself, in double precision.
    cosines = queries.astype(np.float64) @ training.astype(np.float64).T
    for row, part in enumerate(split.part):
        assert (part == EXTRAPOLATION) == bool(split.nearest[row] < np.float32(split.bound))
        if part == EXTRAPOLATION:
            assert cosines[row].max() <= split.bound + 1e-6
        else:
            assert cosines[row].max() >= split.bound - 1e-6
        assert cosines[row, int(split.nearest_ids[row][1:])] == pytest.approx(cosines[row].max(), abs=1e-6)
        assert split.nearest[row] == pytest.approx(cosines[row].max(), abs=1e-6)
    if bound is None:
        assert split.part.count(EXTRAPOLATION) <= tests / 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 4), st.one_of(st.none(), st.floats(0, 1)))
def test_the_left_out_bucket_is_the_extrapolation(seed: int, bucket: int, bound: float | None) -> None:
    queries, training = unit(70, 16, seed), unit(150, 16, seed + 1)
    centroids = spherical_kmeans(training, 5, seed)
    kept = np.flatnonzero(assign(training, centroids) != bucket)
    near = split_by_similarity(ids("q", 70), queries, [f"t{row}" for row in kept], training[kept])
    split = split_by_clusters(near, assign(queries, centroids) == bucket, bound)
    cosines = queries.astype(np.float64) @ training.astype(np.float64).T
    where = (queries @ centroids.T).argmax(axis=1)
    for row, part in enumerate(split.part):
        assert (part == INTERPOLATION) == (where[row] != bucket)
        if part == EXTRAPOLATION:
            assert cosines[row, kept].max() <= split.bound + 1e-6
        elif part == NEITHER:
            assert bound is not None and cosines[row, kept].max() >= bound - 1e-6
    if bound is None:
        assert NEITHER not in split.part
    assert split.training_queries == len(kept) and split.bound == (bound if bound is not None else split.bound)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.one_of(st.none(), st.floats(0.2, 0.8)))
def test_near_and_far_training_queries_are_as_many_and_on_their_side_of_the_bound(
    seed: int, bound: float | None
) -> None:
    queries, training = unit(30, 16, seed), unit(121, 16, seed + 1)
    kept = {keep: near_or_far(training, queries, keep, bound, seed) for keep in ("near", "far")}
    assert len(kept["near"][0]) == len(kept["far"][0]) and kept["near"][1] == kept["far"][1]
    highest = (training.astype(np.float64) @ queries.astype(np.float64).T).max(axis=1)
    for keep, (rows, stated) in kept.items():
        assert len(set(rows.tolist())) == len(rows) and (np.diff(rows) > 0).all()
        assert (highest[rows] >= stated - 1e-6 if keep == "near" else highest[rows] <= stated + 1e-6).all()
        again = near_or_far(training, queries, keep, bound, seed)[0]
        assert again.tolist() == rows.tolist()
    if bound is None:
        assert len(kept["far"][0]) == 60


def test_nearest_in_blocks_is_nearest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, training = unit(50, 8, 1), unit(64, 8, 2)
    cosines, rows = nearest(queries, training)
    monkeypatch.setattr("rankdistill.evaluation.extrapolation.COSINES_AT_ONCE", 64 * 7)
    in_blocks = nearest(queries, training)
    np.testing.assert_allclose(in_blocks[0], cosines, atol=1e-6)
    assert in_blocks[1].tolist() == rows.tolist()


def test_kmeans_finds_clusters_that_are_there_and_is_the_same_each_time() -> None:
    random = np.random.default_rng(7)
    centres = np.eye(5, 24)
    truth = random.integers(0, 5, 400)
    noisy = centres[truth] + random.normal(0, 0.05, (400, 24))
    vectors = np.asarray(noisy / np.linalg.norm(noisy, axis=1, keepdims=True), np.float32)
    centroids = spherical_kmeans(vectors, 5, 3)
    labels = assign(vectors, centroids)
    assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 5  # one bucket for each true cluster
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert (spherical_kmeans(vectors, 5, 3) == centroids).all()

    with pytest.raises(RankdistillError, match="fewer than 3"):
        spherical_kmeans(np.repeat(unit(2, 8, 0), 10, axis=0), 3, 0)


def test_kmeans_of_many_is_as_good_as_faisss() -> None:
    import faiss

    vectors = unit(600, 16, 5, topics=9)
    own = float((vectors @ spherical_kmeans(vectors, 9, 1).T).max(axis=1).sum())
    reference = faiss.Kmeans(16, 9, spherical=True, niter=50, nredo=4, seed=1)
    reference.train(vectors)
    theirs = np.asarray(reference.centroids, np.float32)
    assert own > 0.98 * float((vectors @ theirs.T).max(axis=1).sum())


# -- measuring --------------------------------------------------------------------------------------------------------

QRELS = {f"q{n}": {f"d{n}": 1, "shared": 1, "bad": 0} for n in range(10)}


def a_split(seen: frozenset[str] = frozenset({"shared", "d1", "d9"})) -> QuerySplit:
    part = [INTERPOLATION] * 6 + [EXTRAPOLATION] * 3 + [NEITHER]
    return QuerySplit("clusters", 0.5, ids("q", 10), part, np.zeros(10, np.float32), ["t"] * 10, 7, seen)


def test_figures_are_those_of_the_queries_of_a_part() -> None:
    random = np.random.default_rng(0)
    values = {name: {"map": random.random(10), "mrr": random.random(10)} for name in ("BM25", "student")}
    (entry,) = measure_split(a_split(), values, QRELS).protocols
    inside, outside = entry["parts"][INTERPOLATION], entry["parts"][EXTRAPOLATION]
    assert (inside["queries"], outside["queries"], entry["neither"]) == (6, 3, 1)
    for name, own in values.items():
        for metric, value in own.items():
            assert inside["systems"][name][metric] == pytest.approx(value[:6].mean())
            expected = stats.t.interval(0.95, 2, value[6:9].mean(), stats.sem(value[6:9]))
            assert outside["intervals"][name][metric] == pytest.approx(list(expected))
            welch = stats.ttest_ind(value[:6], value[6:9], equal_var=False)
            found = welch.confidence_interval(0.95)
            expected_gap = [value[:6].mean() - value[6:9].mean(), found.low, found.high]
            assert entry["gap"][name][metric] == pytest.approx(expected_gap)
    assert entry["reference"] == "BM25" and list(entry["gap_beyond"]) == ["student"]
    beyond = values["student"]["map"] - values["BM25"]["map"]
    assert entry["gap_beyond"]["student"]["map"][0] == pytest.approx(beyond[:6].mean() - beyond[6:9].mean())


def test_relevant_passages_seen_in_training_are_counted_from_one() -> None:
    (entry,) = measure_split(a_split(), {}, QRELS).protocols
    inside = entry["relevant_overlap"][INTERPOLATION]
    # 6 queries: 6 own passages (d1 seen) and the shared one, which 6 pairs name.
    assert (inside["passages"], inside["seen_passages"], inside["pairs"], inside["seen_pairs"]) == (7, 2, 12, 7)
    assert inside["queries_with_seen"] == 6 and inside["passage_share"] == pytest.approx(2 / 7)
    outside = entry["relevant_overlap"][EXTRAPOLATION]
    assert (outside["passages"], outside["seen_passages"], outside["pair_share"]) == (4, 1, 0.5)
    (entry,) = measure_split(a_split(frozenset()), {}, QRELS).protocols
    assert entry["relevant_overlap"][EXTRAPOLATION]["pair_share"] == 0


def test_an_empty_part_has_no_figures() -> None:
    split = QuerySplit("similarity", -1.0, ids("q", 10), [INTERPOLATION] * 10, np.ones(10, np.float32), ["t"] * 10, 7)
    found = measure_split(split, {"student": {"map": np.zeros(10)}}, QRELS)
    (entry,) = found.protocols
    assert entry["parts"][EXTRAPOLATION] == {
        "queries": 0, "systems": {"student": {}}, "intervals": {"student": {"map": None}}
    }  # fmt: skip
    assert entry["gap"]["student"]["map"] is None
    json.dumps(found.to_json(), allow_nan=False)


# -- pooling ----------------------------------------------------------------------------------------------------------


def fold(folder: Path, part: list[str], value: float, held_out: bool = True, protocol: str = "clusters") -> Path:
    """A run's evaluation of ten queries: query n has value + n/100."""
    folder.mkdir()
    split = QuerySplit(
        protocol, 0.4 + value / 10, ids("q", 10), part, np.zeros(10, np.float32), ["t"] * 10, 7,
        frozenset({"shared"}), {"encoder": "e", "held_out": held_out},
    )  # fmt: skip
    own = {"student": {"map": value + np.arange(10) / 100}, f"only {value}": {"map": np.zeros(10)}}
    measure_split(split, own, QRELS).write(folder)
    tables = [
        pa.table({"system": [name] * 10, "query_id": ids("q", 10), "map": one["map"]}) for name, one in own.items()
    ]
    pq.write_table(pa.concat_tables(tables), folder / "per_query.parquet")
    return folder


def test_folds_are_pooled_per_query(tmp_path: Path) -> None:
    """Three buckets: a query is extrapolation in one fold, interpolation in two, of which the mean counts."""
    bucket = [n % 3 for n in range(10)]
    folders = []
    for left_out in range(3):
        part = [EXTRAPOLATION if own == left_out else INTERPOLATION for own in bucket]
        folders.append(fold(tmp_path / str(left_out), part, float(left_out)))
    pooled = pool_folds(folders)
    (entry,) = pooled.protocols
    assert entry["parts"][INTERPOLATION]["queries"] == entry["parts"][EXTRAPOLATION]["queries"] == 10
    assert list(entry["parts"][INTERPOLATION]["systems"]) == ["student"]  # what all folds have
    outside = [bucket[n] + n / 100 for n in range(10)]
    inside = [(3 - bucket[n]) / 2 + n / 100 for n in range(10)]
    assert entry["parts"][EXTRAPOLATION]["systems"]["student"]["map"] == pytest.approx(np.mean(outside))
    assert entry["parts"][INTERPOLATION]["systems"]["student"]["map"] == pytest.approx(np.mean(inside))
    assert entry["bound"] == pytest.approx(0.6) and entry["folds"] == 3
    # The same queries in both parts: the gap is of each query.
    differences = np.array(inside) - np.array(outside)
    expected = stats.t.interval(0.95, 9, differences.mean(), stats.sem(differences))
    assert entry["paired"] and entry["reference"] is None and entry["gap_beyond"] == {}
    assert entry["gap"]["student"]["map"] == pytest.approx([differences.mean(), *expected])
    overlap = entry["relevant_overlap"]
    assert (overlap[INTERPOLATION]["pairs"], overlap[EXTRAPOLATION]["pairs"]) == (40, 20)
    assert overlap[EXTRAPOLATION]["pair_share"] == 0.5
    with pytest.raises(UsageError, match="extrapolation in two"):
        pool_folds([*folders, folders[0]])


def test_what_cannot_be_pooled_is_refused(tmp_path: Path) -> None:
    part = [INTERPOLATION] * 5 + [EXTRAPOLATION] * 5
    good = fold(tmp_path / "good", part, 0.0)
    for others, words in {
        (): "at least two",
        (fold(tmp_path / "looked at", part, 0.0, held_out=False),): "held nothing out",
        (fold(tmp_path / "other", part, 0.0, protocol="similarity"),): "differ in protocol",
        (tmp_path,): "no evaluation of extrapolation",
    }.items():
        with pytest.raises(UsageError, match=words):
            pool_folds([good, *others])


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(tiny_beir: Path, tiny_encoder: Path) -> dict[str, Any]:
    model = str(tiny_encoder)
    return {
        "name": "folds",
        "collection": f"beir:{tiny_beir}",
        "candidates": {"depth": 4, "sources": [{"type": "bm25", "quota": 4}]},
        "student": {"type": "static", "model": model},
        "training": {"steps": 2, "checkpoints": 1, "losses": [{"type": "infonce"}], "device": "cpu"},
        "evaluation": {"extrapolation": {"model": model}, "latency_queries": 0},
    }


def test_a_finished_run_is_looked_at(values: dict[str, Any], tmp_path: Path) -> None:
    """The nearest training query is that by vectors made here and now; nothing is measured where it is switched off."""
    workspace = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    result = workspace.run()
    assert result is not None and result.sets[0].path is not None
    folder = result.sets[0].path
    (entry,) = json.loads((folder / FILE).read_text())["protocols"]
    table = pq.read_table(folder / TABLE).to_pylist()
    collection, model = workspace.collection, values["student"]["model"]
    trained = workspace.queries[0]
    assert entry["protocol"] == "similarity" and entry["training_queries"] == len(trained)
    assert [row["query_id"] for row in table] == collection.query_ids("test")
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(model, device="cpu")
    texts = [collection.query_texts(some) for some in (collection.query_ids("test"), trained)]
    own = [plain.encode(some, normalize_embeddings=True) for some in texts]
    for row, cosines in zip(table, own[0] @ own[1].T, strict=True):
        assert row["nearest_cosine"] == pytest.approx(float(cosines.max()), abs=1e-4)
        assert row["part"] == (EXTRAPOLATION if row["nearest_cosine"] < entry["bound"] else INTERPOLATION)
    assert "interpolation and extrapolation" in (folder / "results.md").read_text()
    off = Workspace(tmp_path / "run", load_recipe(values, ["evaluation.extrapolation=null"]), tmp_path / "store")
    again = off.evaluate(out=tmp_path / "off")
    assert again.sets[0].extrapolation is None and not list((tmp_path / "off").rglob(FILE))


def test_vectors_are_made_once(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = Workspace(tmp_path / "run", load_recipe(values)).collection
    some = collection.query_ids("train")[2:6]
    first = embed_queries(collection, some, values["student"]["model"], tmp_path)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("rankdistill.evaluation.extrapolation.encode_queries", refuse)
    assert (embed_queries(collection, some, values["student"]["model"], tmp_path) == first).all()
    with pytest.raises(AssertionError, match="again"):
        embed_queries(collection, some[::-1], values["student"]["model"], tmp_path)


@pytest.mark.parametrize("protocol", ["clusters", "similarity"])
def test_the_whole_protocol(values: dict[str, Any], tmp_path: Path, protocol: Any) -> None:
    changes = [f"candidates.hold_out={{model: {values['student']['model']}}}"]
    recipe = load_recipe(values, changes)
    pooled, name = run_folds(recipe, tmp_path / "folds", tmp_path / "store", protocol=protocol, buckets=2)
    (entry,) = pooled.protocols
    assert name == "facts" and entry["protocol"] == protocol and entry["folds"] == 2
    assert json.loads((tmp_path / "folds" / FILE).read_text())["protocols"] == [entry]
    inside, outside = (entry["parts"][part]["queries"] for part in (INTERPOLATION, EXTRAPOLATION))
    assert inside == 3 and (protocol == "similarity" or outside + entry["neither"] == 3)
    # What each fold says of a query is what its own training queries say.
    for fold_name, fold_recipe in fold_recipes(recipe, protocol, 2):
        workspace = Workspace(tmp_path / "folds" / fold_name, fold_recipe, tmp_path / "store")
        (folder,) = (tmp_path / "folds" / fold_name / "evaluation" / "collection").glob("*/")
        table, trained = pq.read_table(folder / TABLE).to_pylist(), set(workspace.queries[0])
        assert {row["nearest_query_id"] for row in table} | set(workspace.score().query_ids) <= trained
        if protocol == "clusters":  # the bucket that is held out is not trained on, the others are
            pool, held_out = workspace.query_pool[0], fold_recipe.candidates.hold_out
            vectors = embed_queries(workspace.collection, pool, values["student"]["model"], tmp_path / "v")
            labels = assign(vectors, spherical_kmeans(vectors, 2, recipe.seed))
            kept = {query for query, label in zip(pool, labels, strict=True) if held_out and label != held_out.bucket}
            assert trained == kept and len(kept) < len(pool)
        for row in table:
            assert row["part"] != EXTRAPOLATION or row["nearest_cosine"] <= entry["bound"] + 1e-6
    encoder = f"encoder: {values['student']['model']}"
    rows = {"BM25", encoder, "student, untrained", "student", "student, flat"}
    assert set(entry["parts"][EXTRAPOLATION]["systems"]) == rows


def test_wrong_settings_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    for changes, words in {"bucket: 5": "5 is not one of 0 to 4", "bukets: 3": "did you mean 'buckets'"}.items():
        with pytest.raises(UsageError, match=words):
            load_recipe(values, [f"candidates.hold_out={{{changes}}}"])
    resolved = load_recipe(values).resolved()
    assert check_recipe(resolved).resolved() == resolved
    with pytest.raises(UsageError, match="measures no extrapolation"):
        run_folds(load_recipe(values, ["evaluation.extrapolation=null"]), Path("nowhere"))
    ended = forked.run("folds", "quickstart", "--protocol", "cluster", folder=tmp_path)
    assert ended.code == 2 and "clusters or similarity" in ended.err
