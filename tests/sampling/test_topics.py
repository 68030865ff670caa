"""Topic batches: pure batches, each query once, a pure function of the epoch; the clustering is made once and kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import build
from rankdistill.sampling.topics import TopicBatches, cluster

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists

SubjectLists = tuple["ScoredLists", "Collection", NDArray[np.int64]]
SUBJECTS = (
    "iron copper gold metal rusts",
    "whale bat penguin animal swim",
    "moon sun mars planet star",
    "oak cactus tree desert acorns",
)


def sampler(topics: list[int] | NDArray[np.int64], size: int, clusters: int | None = None) -> TopicBatches:
    """Topic batches over given clusters, whose centroids lie on a line: the nearest cluster is the next number."""
    made = TopicBatches(size)
    clusters = clusters or int(np.max(topics)) + 1
    angle = np.linspace(0, 1.5, clusters)
    made.use(np.asarray(topics, np.int64), np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32))
    return made


@settings(deadline=None, max_examples=100)
@given(
    topics=st.lists(st.integers(0, 7), min_size=1, max_size=120),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 50),
)
def test_an_epoch_covers_all_queries_but_the_last_few_and_none_twice(
    topics: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = sampler(topics, size, 8).epoch(len(topics), seed, epoch)
    used = batches.ravel()
    assert len(set(used.tolist())) == len(used) and set(used.tolist()) <= set(range(len(topics)))
    full = len(topics) // size
    assert batches.shape == ((full, size) if full else (1, len(topics)))
    # A mixed batch takes the last queries of the cluster it was drawn from: there is at most one a cluster.
    mixed = sum(len({topics[place] for place in batch}) > 1 for batch in batches.tolist())
    assert mixed <= len(set(topics))


def test_clusters_of_whole_batches_give_no_mixed_one() -> None:
    topics = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 100))
    assert all(len(set(topics[batch])) == 1 for batch in sampler(topics, 10).epoch(1200, 1, 0))


def test_a_small_cluster_is_topped_up_from_the_nearest() -> None:
    """Cluster 1 holds one query; cluster 3, of four, is nearest to it, then 0, then 2."""
    topics = np.repeat([0, 1, 2, 3], [40, 1, 40, 4])
    made = TopicBatches(8)
    made.use(topics, np.array([[0.8, 0.6, 0], [1, 0, 0], [0, 1, 0], [0.81, 0, 0.586]], np.float32))
    firsts = [topics[made.epoch(len(topics), 3, epoch)[0]].tolist() for epoch in range(60)]
    assert [first for first in firsts if first[0] == 1] == [[1, 3, 3, 3, 3, 0, 0, 0]] * sum(f[0] == 1 for f in firsts)
    assert sum(first[0] == 1 for first in firsts) > 5
    assert all(len(set(first)) == 1 for first in firsts if first[0] in (0, 2))


def test_clusters_are_drawn_uniformly_whatever_their_size() -> None:
    """The first batch of an epoch: clusters of 5 and of 500 queries equally often, chi-square over 800 epochs."""
    topics = np.repeat(np.arange(4), [5, 20, 100, 500])
    made = sampler(topics, 4)
    made_first = [int(topics[made.epoch(len(topics), 7, epoch)[0][0]]) for epoch in range(800)]
    assert chisquare(np.bincount(made_first, minlength=4)).pvalue > 1e-3
    pairs = np.concatenate([sampler([0] * 6 + [1] * 6, 2).epoch(12, 5, epoch)[0] for epoch in range(1500)])
    assert chisquare(np.bincount(pairs, minlength=12)).pvalue > 1e-3  # queries of a cluster meet uniformly


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    topics = np.random.default_rng(0).integers(0, 5, 100)
    made = sampler(topics, 8)
    first = made.epoch(100, 1, 0)
    assert not np.array_equal(made.epoch(100, 1, 1), first) and not np.array_equal(made.epoch(100, 2, 0), first)
    # Asked for in another order, by another sampler: the same epochs.
    assert np.array_equal(sampler(topics, 8).epoch(100, 1, 0), first)
    assert np.array_equal(made.epoch(100, 1, 0), first)


def test_what_is_not_clustered_is_refused() -> None:
    with pytest.raises(RankdistillError, match="prepare"):
        TopicBatches(4).epoch(10, 1, 0)
    with pytest.raises(RankdistillError, match="12 queries are clustered and 10"):
        sampler(np.arange(12), 4).epoch(10, 1, 0)
    with pytest.raises(UsageError, match="greater than or equal to 1"):
        build("sampler", {"type": "topic_batches", "clusters": 0})


# -- clustering -------------------------------------------------------------------------------------------------------


def planted(clusters: int, each: int, dimension: int = 16) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors of very different lengths around directions at right angles, shuffled; and their direction."""
    random = np.random.default_rng(2)
    directions = np.linalg.qr(random.normal(size=(dimension, dimension)))[0][:clusters]
    truth = random.permutation(np.repeat(np.arange(clusters), each))
    vectors = directions[truth] + random.normal(scale=0.05, size=(len(truth), dimension))
    return (vectors * random.uniform(0.1, 10, (len(truth), 1))).astype(np.float32), truth


def test_planted_clusters_are_found_whatever_the_vectors_lengths() -> None:
    vectors, truth = planted(5, 60)
    topics, centroids = cluster(vectors, 5)
    assert topics.shape == (300,) and np.linalg.norm(centroids, axis=1) == pytest.approx(1, abs=1e-5)
    together = topics[:, None] == topics[None, :]
    assert np.array_equal(together, truth[:, None] == truth[None, :])
    again = cluster(vectors, 5)
    assert np.array_equal(again[0], topics) and np.array_equal(again[1], centroids)


@pytest.mark.parametrize(("clusters", "count"), [(1, 5), (5, 5), (3, 4)])
def test_few_vectors_are_no_trouble(clusters: int, count: int) -> None:
    vectors = planted(5, 1)[0][:count]
    topics, centroids = cluster(vectors, clusters)
    assert topics.min() >= 0 and topics.max() < clusters == len(centroids)
    assert len(set(topics.tolist())) == clusters


def test_vectors_that_are_alike_or_nothing_are_no_trouble() -> None:
    """Equal queries share a cluster, others stay empty; a vector of zeros has no direction and some cluster."""
    vectors = np.ones((20, 4), np.float32)
    vectors[3] = 0
    topics, centroids = cluster(vectors, 4)
    assert np.isfinite(centroids).all()
    assert len(set(np.delete(topics, 3).tolist())) == 1
    made = TopicBatches(4)
    made.use(topics, centroids)
    assert len(set(made.epoch(20, 1, 0).ravel().tolist())) == 20


@pytest.fixture(scope="module")
def subject_lists(tmp_path_factory: pytest.TempPathFactory) -> SubjectLists:
    """Lists of 48 queries about four subjects; and the subject of each."""
    from rankdistill.collections import open_collection
    from rankdistill.scores.lists import build_lists

    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("subjects")
    subjects = random.permutation(np.repeat(np.arange(4), 12))
    words = [" ".join(random.choice(SUBJECTS[subject].split(), 4)) for subject in subjects]
    queries = [{"_id": f"q{number}", "text": text} for number, text in enumerate(words)]
    documents = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(words)]
    (folder / "qrels").mkdir()
    for name, rows in (("queries", queries), ("corpus", documents)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{number}\td{number}\t1\n" for number in range(len(words)))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    collection = open_collection(f"beir:{folder}")
    candidates = [
        (f"q{number}", [f"d{(number + step) % len(words)}" for step in range(4)], np.zeros(4, np.float32))
        for number in range(len(words))
    ]
    lists = build_lists(candidates, lambda q, d: np.arange(len(d)) + 0.5, collection, "train", folder / "lists")
    return lists, collection, subjects


def test_queries_of_one_subject_meet_and_the_clustering_is_made_once(
    subject_lists: SubjectLists, tiny_encoder: Path, tmp_path: Path
) -> None:
    """The whole way from texts to batches; only some of the lists are trained on."""
    lists, collection, subjects = subject_lists
    members = np.flatnonzero(np.arange(len(lists)) % 6 != 0)

    def manifest(name: str) -> Path:
        return tmp_path / name / "manifest.json"

    def prepared(**settings: int) -> TopicBatches:
        batches = TopicBatches(model=str(tiny_encoder), **settings)
        batches.prepare(lists, members, collection, tmp_path)
        return batches

    first = prepared(size=4, clusters=4)
    batches = members[first.epoch(len(members), 1, 0)]
    assert np.mean([np.bincount(subjects[batch]).max() / 4 for batch in batches]) > 0.85  # of random batches: 0.47
    written = json.loads(manifest("topics").read_text())
    assert written["counts"]["queries"] == 48 and written["counts"]["clusters"] == 4
    assert written["device"] in ("cpu", "cuda") and written["inputs"]["collection"] == collection.fingerprint
    times = [manifest(name).stat().st_mtime_ns for name in ("topics", "query_vectors")]
    other_size = prepared(size=8, clusters=4)
    assert manifest("topics").stat().st_mtime_ns == times[0]
    assert np.array_equal(first.topics, other_size.topics)  # type: ignore[arg-type]
    more = prepared(clusters=6)
    assert manifest("topics").stat().st_mtime_ns != times[0] and more.topics is not None and more.topics.max() == 5
    assert manifest("query_vectors").stat().st_mtime_ns == times[1]  # encoded once for both


def test_processes_that_come_at_once_have_the_same_clusters(
    subject_lists: SubjectLists, tiny_encoder: Path, tmp_path: Path
) -> None:
    lists, collection, _ = subject_lists
    made = [TopicBatches(4, clusters=5, model=str(tiny_encoder)) for _ in range(3)]
    arguments = (lists, np.arange(len(lists)), collection, tmp_path)
    threads = [threading.Thread(target=one.prepare, args=arguments) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    epochs = [one.epoch(len(lists), 1, 0) for one in made]
    assert np.array_equal(epochs[0], epochs[1]) and np.array_equal(epochs[0], epochs[2])


def test_fewer_queries_than_clusters(
    subject_lists: SubjectLists,
    tiny_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As many clusters as queries, and it is said; by default a cluster for 200 queries, at least two."""
    lists, collection, _ = subject_lists
    made = TopicBatches(4, clusters=1000, model=str(tiny_encoder))
    made.prepare(lists, np.arange(len(lists)), collection, tmp_path)
    assert "1,000 clusters of 48 queries" in capsys.readouterr().err
    assert len(set(made.epoch(48, 1, 0).ravel().tolist())) == 48
    default = TopicBatches(4, model=str(tiny_encoder))
    default.prepare(lists, np.arange(len(lists)), collection, tmp_path)
    assert default.topics is not None and set(default.topics.tolist()) == {0, 1}
    assert capsys.readouterr().err.count("warning") == 0
