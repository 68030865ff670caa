"""Sweeps leave the index alone and measure what exact search says; a target recall is reached, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.operating_points import (
    OperatingPoint,
    Sweep,
    save_settings,
    search_grid,
    sweep,
    tuning_queries,
)
from rankdistill.indexes.base import Hits
from rankdistill.indexes.building import build_index
from rankdistill.indexes.dense import ExactIndex
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.specification import load_specification

COUNT, DIMENSION, QUERIES = 2000, 32, 60
Data = tuple[np.ndarray, np.ndarray]
Make = Callable[..., FaissIndex]
SPECIFICATIONS: dict[str, dict[str, Any]] = {
    "ivf": {"factory": "IVF40,Flat", "search": {"nprobe": 3}},
    "ivf_l2": {"factory": "IVF40,Flat", "metric": "l2", "search": {"nprobe": 3}},
    "ivf_pq_refined": {"factory": "IVF16,PQ8x4", "refine": "SQ8", "search": {"nprobe": 2, "k_factor": 2}},
    "opq_ivf_pq": {"factory": "OPQ8,IVF16,PQ8x4", "search": {"nprobe": 2}},
    "fast_scan": {"factory": "IVF16,PQ8x4fs", "refine": "Flat", "search": {"nprobe": 2, "k_factor": 2}},
    "graph": {"factory": "HNSW8,Flat", "build": {"efConstruction": 40}, "search": {"efSearch": 12}},
    "signs": {"factory": "BFlat", "binary": True, "search": {"rescore": 2}},
    "flat": {"factory": "Flat"},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """On such small data FAISS's threads only wait for each other."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    """Clustered unit vectors, and queries near some of them."""
    generator = np.random.default_rng(3)
    centres = generator.normal(size=(60, DIMENSION))
    vectors = centres[generator.integers(0, 60, COUNT)] + 1.5 * generator.normal(size=(COUNT, DIMENSION))
    queries = vectors[generator.choice(COUNT, QUERIES, replace=False)] + 1.5 * generator.normal(
        size=(QUERIES, DIMENSION)
    )
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (vectors, queries))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def index_of(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The index of a name above; built once, opened anew each time."""
    folder = tmp_path_factory.mktemp("indexes")

    def make(name: str) -> FaissIndex:
        path = folder / f"{name}.faiss"
        if not path.is_file():
            specification = load_specification({"name": name, **SPECIFICATIONS[name]})
            build_index(data[0], (f"d{n}" for n in range(COUNT)), specification, path, vectors_fingerprint="x")
        return FaissIndex.open(path)

    return make


def exact(data: Data, k: int = 40, metric: Any = "inner_product") -> list[Hits]:
    return ExactIndex(data[0], "x", metric=metric).search(data[1], k)


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_a_sweep_leaves_the_index_as_it_was(index_of: Make, data: Data, name: str) -> None:
    index = index_of(name)
    before = index.search(data[1], 10)
    file = index.path.read_bytes()
    found = sweep(index, data[1], exact(data, metric=index.specification.metric))
    after = index.search(data[1], 10)
    assert [hits.rows.tolist() for hits in after] == [hits.rows.tolist() for hits in before]
    assert index.path.read_bytes() == file
    # It was not swept at its own setting alone: there were others, with other results, unless there is nothing to set.
    assert (len({point.recall for point in found.points}) > 1) == (name != "flat")
    assert found.without_settings == (["flat"] if name == "flat" else [])
    if name in ("ivf", "ivf_l2"):  # recall rises with the lists visited, up to exhaustive search
        assert [point.settings["nprobe"] for point in found.points] == [1, 2, 4, 8, 16, 32, 40]
        recall = [point.recall for point in found.points]
        assert recall == sorted(recall) and recall[0] < 0.9 and recall[-1] == 1.0


def test_recall_is_the_overlap_with_exact_search(index_of: Make, data: Data) -> None:
    """Counted with numpy alone: the ten greatest products, and what plain FAISS finds at the same setting."""
    import faiss

    best = np.argsort(-(data[1] @ data[0].T), axis=1)[:, :10]
    plain = faiss.read_index(str(index_of("opq_ivf_pq").path))
    for point in sweep(index_of("opq_ivf_pq"), data[1], best, k=10).points:
        faiss.extract_index_ivf(plain).nprobe = int(point.settings["nprobe"])
        _, rows = plain.search(data[1], 10)
        overlap = [len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), best.tolist(), strict=True)]
        assert point.recall == pytest.approx(np.mean(overlap))


def test_what_ties_with_the_last_is_as_good(tmp_path: Path) -> None:
    """Every vector is there four times: which of the twins is found is chance, and costs nothing."""
    vectors = np.repeat(np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32), 4, axis=0)
    index = build_index(
        vectors, map(str, range(400)), load_specification({"name": "ivf", "factory": "IVF4,Flat"}), tmp_path / "x.faiss"
    )
    deep = ExactIndex(vectors, "x").search(vectors[::16], 12)
    assert sweep(index, vectors[::16], deep, k=6, grid={"nprobe": [4]}).points[0].recall == 1.0
    other_twins = [Hits(hits.rows[[0, 1, 2, 3, 6, 7]], hits.scores[[0, 1, 2, 3, 6, 7]]) for hits in deep]
    assert sweep(index, vectors[::16], other_twins, k=6, grid={"nprobe": [4]}).points[0].recall < 1.0


def test_judged_queries_give_metrics_and_the_front_follows_them(index_of: Make, data: Data) -> None:
    """The judgments are the exact three best, so full probing has nDCG@3 of 1 and recall@3 is another view of it."""
    reference = exact(data)
    ids = [f"q{n}" for n in range(QUERIES)]
    qrels = {i: {f"d{row}": 1 for row in hits.rows[:3]} for i, hits in zip(ids, reference, strict=True)}
    found = sweep(index_of("ivf"), data[1], reference, k=3, query_ids=ids, qrels=qrels, metrics=["ndcg@3", "recall@10"])
    assert found.quality == "ndcg@3" and found.depth == 10
    for point in found.points:
        assert 0 < point.metrics["ndcg@3"] <= 1 and point.metrics["recall@10"] >= point.recall - 1e-9
    assert found.points[-1].metrics == {"ndcg@3": 1.0, "recall@10": 1.0}
    values = [(point.metrics["ndcg@3"], point.queries_per_second) for point in found.points]
    front = [not any((a >= q and b >= r) and (a, b) != (q, r) for a, b in values) for q, r in values]
    shown = json.loads(json.dumps(found.to_json()))
    assert [point["front"] for point in shown["points"]] == front
    text = repr(found)
    assert "recall@3" in text and "ndcg@3" in text and "bytes/doc" in text and "threads" in text


def test_grids_hold_both_ends_and_powers_of_two(index_of: Make) -> None:
    assert search_grid(index_of("ivf"), 10) == {"nprobe": [1, 2, 4, 8, 16, 32, 40]}
    refined = {"k_factor": [1, 2, 4, 8, 16, 20], "nprobe": [1, 2, 4, 8, 16]}
    assert search_grid(index_of("ivf_pq_refined"), 100) == refined
    assert search_grid(index_of("graph"), 10) == {"efSearch": [10, 16, 32, 64, 128, 256, 512, 1024]}
    assert search_grid(index_of("signs"), 10) == {"rescore": [1, 2, 4, 8, 16, 32, 64]}
    assert search_grid(index_of("flat"), 10) == {}


@pytest.mark.parametrize(("name", "target"), [("ivf", 0.95), ("graph", 0.9), ("ivf_pq_refined", 0.9), ("signs", 0.36)])
def test_the_chosen_setting_reaches_the_target_and_a_lower_one_does_not(
    index_of: Make, data: Data, name: str, target: float
) -> None:
    index, reference = index_of(name), exact(data)
    found = sweep(index, data[1], reference, k=10, target_recall=target)
    chosen = found.chosen[name]
    assert chosen.recall >= target
    again = sweep(index, data[1], reference, k=10, grid={key: [value] for key, value in chosen.settings.items()})
    assert again.points[0].recall == chosen.recall
    cheaper = [
        point
        for point in found.points
        if point.settings != chosen.settings and all(point.settings[s] <= v for s, v in chosen.settings.items())
    ]
    assert cheaper and all(point.recall < target for point in cheaper)


def test_between_powers_of_two_the_gap_is_halved(index_of: Make, data: Data) -> None:
    index, reference = index_of("ivf"), exact(data)
    recall = {n: sweep(index, data[1], reference, grid={"nprobe": [n]}).points[0].recall for n in range(1, 41)}
    for target in (0.8, 0.95, 0.99):
        chosen = sweep(index, data[1], reference, target_recall=target).chosen["ivf"]
        smallest = min(n for n, value in recall.items() if value >= target)
        assert chosen.settings["nprobe"] - smallest <= max(1, smallest // 16)


def test_of_settings_that_cannot_be_compared_the_faster_is_chosen() -> None:
    def point(nprobe: int, k_factor: int, recall: float, rate: float, name: str = "a") -> OperatingPoint:
        return OperatingPoint(name, {"nprobe": nprobe, "k_factor": k_factor}, recall, {}, rate, {"p50": 1.0}, 8.0)

    points = [point(1, 8, 0.95, 10), point(8, 1, 0.95, 20), point(8, 8, 0.99, 99), point(1, 1, 0.5, 500)]
    found = Sweep(points, 10, 10, 5, "recall@10")
    assert found.reaching(0.9) is points[1]  # (8, 8) is said to be faster, but asks for more of both
    assert found.reaching(0.96) is points[2]


def test_a_target_out_of_reach_names_the_best(index_of: Make, data: Data) -> None:
    found = sweep(index_of("opq_ivf_pq"), data[1], exact(data))
    best = max(point.recall for point in found.points)
    with pytest.raises(RankdistillError, match=rf"recall@10 0.999: the best is {best:.4f} with nprobe \d+"):
        sweep(index_of("opq_ivf_pq"), data[1], exact(data), target_recall=0.999)
    assert sweep(index_of("flat"), data[1], exact(data), target_recall=1.0).chosen["flat"].settings == {}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ivf_pq_refined", {"nprobe": 7, "k_factor": 5}),
        ("graph", {"efSearch": 33}),
        ("opq_ivf_pq", {"nprobe": 5}),
        ("ivf", {"nprobe": 40, "max_codes": 100}),
        ("signs", {"rescore": 16}),
    ],
)
def test_saved_settings_are_what_the_file_is_searched_with(
    index_of: Make, data: Data, tmp_path: Path, name: str, settings: Any
) -> None:
    for path in index_of(name).path.parent.glob(f"{name}.faiss*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = FaissIndex.open(tmp_path / f"{name}.faiss")
    made_as, ids = index.fingerprint, index.doc_ids(range(COUNT))
    index.set_search(**settings)
    expected = [hits.rows.tolist() for hits in index.search(data[1], 10)]
    save_settings(FaissIndex.open(index.path), settings, {"target_recall": 0.9})
    again = FaissIndex.open(index.path)
    assert [hits.rows.tolist() for hits in again.search(data[1], 10)] == expected
    assert again.manifest["tuned"] == {"target_recall": 0.9} and again.doc_ids(range(COUNT)) == ids
    assert again.specification.search.model_dump(exclude_none=True) == {
        **SPECIFICATIONS[name]["search"], **settings,
    }  # fmt: skip
    assert again.fingerprint != made_as
    if "max_codes" not in settings and name != "signs":
        import faiss

        plain = faiss.read_index(str(index.path))
        assert [sorted(rows) for rows in plain.search(data[1], 10)[1].tolist()] == [sorted(rows) for rows in expected]
    # The same specification over the same vectors is not built again: the setting stays until it is chosen anew.
    kept = build_index(data[0], ids, load_specification({"name": name, **SPECIFICATIONS[name]}), index.path,
                       vectors_fingerprint="x")  # fmt: skip
    assert kept.manifest["tuned"] == {"target_recall": 0.9}


def test_a_foreign_index_is_swept_but_not_rewritten(data: Data, tmp_path: Path) -> None:
    import faiss

    plain = faiss.index_factory(DIMENSION, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    plain.train(data[0])
    plain.add(data[0])
    faiss.write_index(plain, str(tmp_path / "theirs.faiss"))
    index = FaissIndex.foreign(tmp_path / "theirs.faiss")
    assert sweep(index, data[1], exact(data)).points[-1].recall == 1.0
    with pytest.raises(UsageError, match="made elsewhere"):
        save_settings(index, {"nprobe": 4}, {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flat", {"exact": []}, "60 queries and 0 exact results"),
        ("flat", {"grid": {"nprobe": [1]}}, "no setting 'nprobe'"),
        ("ivf", {"grid": {"nprob": [1]}}, "nprob"),
        ("flat", {"target_recall": 1.5}, "cannot be aimed at"),
        ("ivf", {"qrels": {"q0": {"d0": 1}}}, "need their ids"),
        ("ivf", {"qrels": {"q0": {"d0": 1}}, "query_ids": ["x"] * QUERIES}, "none of the queries is judged"),
    ],
)
def test_wrong_calls_are_refused(index_of: Make, data: Data, name: str, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sweep(index_of(name), data[1], **{"exact": exact(data), **options})


# -- queries, and the command line ------------------------------------------------------------------------------------


def test_queries_come_from_dev_then_train_then_documents(tiny_beir: Path, tmp_path: Path) -> None:
    collection = open_collection(f"beir:{tiny_beir}")
    dev = tuning_queries(collection)
    assert dev.origin == "dev" and set(dev.ids) == set(collection.query_ids("dev"))
    assert dev.qrels == {i: collection.qrels("dev")[i] for i in dev.ids}
    assert not set(dev.ids) & set(collection.query_ids("test"))

    def without(*splits: str) -> Any:
        folder = tmp_path / "-".join(splits)
        (folder / "qrels").mkdir(parents=True)
        for path in tiny_beir.rglob("*"):
            if path.is_file() and path.stem not in splits:
                (folder / path.relative_to(tiny_beir)).write_bytes(path.read_bytes())
        return open_collection(f"beir:{folder}")

    held_out = tuning_queries(without("dev"))
    assert held_out.origin == "held out of train" and held_out.qrels
    own_words = tuning_queries(without("dev", "train"), most=5)
    assert own_words.origin.startswith("titles") and own_words.qrels is None and len(own_words.texts) == 5
    documents = collection.documents(np.arange(collection.document_count))
    assert set(own_words.texts) <= {document.title or " ".join(document.text.split()[:16]) for document in documents}


def test_the_command_sweeps_and_keeps_what_reaches_the_target(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    specification = tmp_path / "lists.yaml"
    specification.write_text("factory: IVF4,Flat\nsearch: {nprobe: 1}\n")

    def index(*options: object) -> forked.Ending:
        return forked.run("index", copy, *options, folder=tmp_path / "output")

    swept = index("--spec", specification, "--spec", "flat", "--sweep", "--json")
    assert swept.code == 0, swept.err
    found = json.loads(swept.out)
    assert {point["index"] for point in found["points"]} == {"lists", "flat"} and found["origin"] == "dev"
    assert found["without_settings"] == ["flat"] and not found["chosen"]
    made = FaissIndex.open(copy / "indexes/lists.faiss")
    assert made.specification.search.nprobe == 1  # a sweep alone changes nothing
    tuned = index("--spec", specification, "--target-recall", "1", "--recall-at", "5")
    assert tuned.code == 0 and "reaches recall@5 1.0000; written into the file" in tuned.out, tuned.err
    made = FaissIndex.open(copy / "indexes/lists.faiss")
    nprobe = made.specification.search.nprobe
    assert nprobe and nprobe > 1 and made.manifest["tuned"]["k"] == 5 and f"nprobe {nprobe} " in tuned.out
    for recall in ("2", "nan", "inf", "0"):
        wrong = index("--spec", "flat", "--target-recall", recall)
        assert wrong.code == 2 and "is not above 0 and at most 1" in wrong.err
