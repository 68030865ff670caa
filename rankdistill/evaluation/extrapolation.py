"""Interpolation and extrapolation: is a system as good on queries unlike those it was trained on?

After Zhan et al., Evaluating Extrapolation Performance of Dense Retrieval (2022, arXiv:2204.11447): a test query is
near its training queries (interpolation) or far from them (extrapolation), by the cosine of query embeddings. In every
part of extrapolation no query is nearer to a training query than the bound that is stated. From cheap to strict:

- A finished run is only looked at: its test queries are parted by the cosine to the nearest training query, at a bound.
- Clusters: training queries are clustered (spherical k-means) into buckets, one bucket is left out of training, and
  test queries of that bucket are the extrapolation; once for each bucket, pooled per query.
- Similarity: for a fixed test set two runs, one trained on the queries that are near a test query and one on as many
  that are not; the first shows interpolation and the second extrapolation, on the same test queries.

In one run the parts hold different queries, so one may be harder: the gap of a system that was trained on none of them,
such as BM25, says how much. `gap_beyond` is what is left of a system's gap after that one's. Pooled over folds the same
queries are in both parts, and gaps are of each query.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rankdistill.artifacts import MANIFEST, fingerprint, write_json, write_table
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.metrics import Qrels
from rankdistill.indexes.vectors import encode_queries, open_vectors
from rankdistill.progress import say
from rankdistill.recipe import Recipe
from rankdistill.sampling.base import generator
from rankdistill.students.models import resolve_model

FILE, TABLE = "extrapolation.json", "extrapolation.parquet"
INTERPOLATION, EXTRAPOLATION, NEITHER = PARTS = ("interpolation", "extrapolation", "neither")
MEASURED = (INTERPOLATION, EXTRAPOLATION)
REFERENCES = ("BM25", "student, untrained")  # systems that no training query taught anything; the first there is
SAMPLE = 50_000  # training queries that k-means is fitted to at most
RESTARTS, ITERATIONS = 4, 100
COSINES_AT_ONCE = 1 << 24
CONFIDENCE = 0.95

Vectors = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class QuerySplit:
    """Test queries parted by how near the training queries are.

    Attributes:
        bound: no query of the extrapolation part has a training query at a greater cosine.
        part: of each query, one of `PARTS` (neither: in the held-out bucket, but nearer than a given bound).
        nearest: float32 [queries], cosine to the nearest training query; `nearest_ids` says which that is.
        seen: documents relevant to at least one training query.
        settings: what else made it (protocol's options, encoder), for the record.
    """

    protocol: str
    bound: float
    query_ids: list[str]
    part: list[str]
    nearest: Vectors
    nearest_ids: list[str]
    training_queries: int
    seen: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)


# -- building ---------------------------------------------------------------------------------------------------------


def split_by_similarity(
    query_ids: Sequence[str],
    queries: Vectors,
    training_ids: Sequence[str],
    training: Vectors,
    bound: float | None = None,
) -> QuerySplit:
    """Part test queries by the cosine to the nearest training query: extrapolation below the bound.

    Args:
        queries, training: unit vectors [n, d].
        bound: the median of the test queries' cosines unless given, so that each part has half of them.
    """
    cosine, row = nearest(queries, training)
    bound = float(np.median(cosine)) if bound is None else bound
    part = np.where(cosine < bound, EXTRAPOLATION, INTERPOLATION).tolist()
    names = [training_ids[at] for at in row]
    return QuerySplit("similarity", bound, list(query_ids), part, cosine, names, len(training_ids))


def split_by_clusters(near: QuerySplit, inside: NDArray[np.bool_], bound: float | None = None) -> QuerySplit:
    """Part test queries by cluster: extrapolation is the bucket that was left out of training.

    Args:
        near: the same queries by their similarity to what was trained on, queries of the other buckets only.
        inside: [queries] whether a query is in the bucket.
        bound: queries of the bucket with a training query nearer than this (across the border) are in neither part;
            unless given, the nearest there is becomes the bound.
    """
    far = np.ones(len(inside), bool) if bound is None else near.nearest < bound
    if bound is None:
        bound = float(near.nearest[inside].max(initial=-1.0))
    part = np.where(inside & far, EXTRAPOLATION, np.where(inside, NEITHER, INTERPOLATION)).tolist()
    return replace(near, protocol="clusters", bound=bound, part=part)


def near_or_far(training: Vectors, queries: Vectors, keep: str, bound: float | None, seed: int) -> tuple[Ints, float]:
    """Rows of training queries that are near a test query, or as many that are far from all of them, and the bound.

    Args:
        keep: `near` (cosine to the nearest test query at least the bound) or `far` (below it).
        bound: the median of the training queries' cosines unless given.
        seed: draws from the larger of the two sets, so that both have the same size.
    """
    cosine, _ = nearest(training, queries)
    bound = float(np.median(cosine)) if bound is None else bound
    rows = {"near": np.flatnonzero(cosine >= bound), "far": np.flatnonzero(cosine < bound)}
    size = min(map(len, rows.values()))
    return np.sort(generator(seed, 5).permutation(rows[keep])[:size]), bound


def nearest(queries: Vectors, others: Vectors) -> tuple[Vectors, Ints]:
    """For each of n unit vectors the greatest cosine to m others, and which: float32 [n], int64 [n]."""
    cosine, row = np.empty(len(queries), np.float32), np.empty(len(queries), np.int64)
    step = max(1, COSINES_AT_ONCE // len(others))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        cosines = queries[part] @ others.T
        row[part], cosine[part] = cosines.argmax(axis=1), cosines.max(axis=1)
    return cosine, row


def assign(vectors: Vectors, centroids: Vectors) -> Ints:
    """The bucket of each vector: int64 [n]."""
    return np.asarray((vectors @ centroids.T).argmax(axis=1))


def spherical_kmeans(vectors: Vectors, buckets: int, seed: int) -> Vectors:
    """Unit centroids [buckets, d] that the vectors have the greatest cosine with: k-means++ starts, the best of four.

    The same seed and vectors give the same result, whatever the number of threads.
    """
    random = generator(seed, 4)
    if len(vectors) > SAMPLE:
        vectors = vectors[np.sort(random.choice(len(vectors), SAMPLE, replace=False))]
    if len(vectors) < buckets or len(np.unique(vectors, axis=0)) < buckets:
        raise RankdistillError(
            f"there are fewer than {buckets} different training queries", fix="ask for fewer buckets, or more queries"
        )
    tries = [_kmeans(vectors, buckets, random) for _ in range(RESTARTS)]
    return max(tries, key=lambda centroids: float((vectors @ centroids.T).max(axis=1).sum()))


def _kmeans(vectors: Vectors, buckets: int, random: np.random.Generator) -> Vectors:
    chosen = [int(random.integers(len(vectors)))]
    distance = 1 - vectors @ vectors[chosen[0]]
    while len(chosen) < buckets:
        weight = np.clip(distance, 0, None).astype(np.float64) ** 2
        weight[chosen] = 0
        chosen.append(int(random.choice(len(vectors), p=weight / weight.sum())))
        distance = np.minimum(distance, 1 - vectors @ vectors[chosen[-1]])
    centroids = vectors[chosen]
    labels = np.full(len(vectors), -1)
    for _ in range(ITERATIONS):
        cosine = vectors @ centroids.T
        new = cosine.argmax(axis=1)
        for empty in np.setdiff1d(np.arange(buckets), new):  # it takes over what fits worst elsewhere
            worst = int(cosine[np.arange(len(new)), new].argmin())
            new[worst] = empty
            cosine[worst] = 1
        if (new == labels).all():
            break
        labels = new
        sums = np.stack([vectors[labels == bucket].sum(axis=0) for bucket in range(buckets)])
        centroids = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return centroids


# -- for a run --------------------------------------------------------------------------------------------------------


def embed_queries(
    collection: Collection, query_ids: Sequence[str], model: str, folder: Path, length: int = 64
) -> Vectors:
    """Unit vectors [n, d] of a collection's queries, encoded once and kept below `folder` as an artifact.

    Memory: all of them, 4·d bytes a query (0.8 GB for MS MARCO's 500,000 training queries at 384 dimensions).
    """
    ids_digest = hashlib.sha256("\0".join(query_ids).encode()).hexdigest()[:16]
    key = [resolve_model(model).revision, length, collection.fingerprint, ids_digest]
    path = folder / f"queries-{fingerprint(key)}"
    if not (path / MANIFEST).is_file():
        from rankdistill.students.dense import DenseStudent

        encoder: Any = DenseStudent(model=model, query_length=length, precision="fp32").create()
        encode_queries(encoder, collection, path, query_ids=query_ids)
    vectors = np.array(open_vectors(path), np.float32)
    vectors /= np.maximum(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), 1e-12)[:, None]
    return vectors


def hold_out(
    collection: Collection, training: list[str], dev: list[str], recipe: Recipe, folder: Path
) -> tuple[list[str], list[str]]:
    """The training and dev queries that a recipe does not hold out; dev queries too, for they choose the checkpoint."""
    settings, seed = recipe.candidates.hold_out, recipe.seed
    if settings is None:
        return training, dev
    vectors, dev_vectors = (embed_queries(collection, ids, settings.model, folder) for ids in (training, dev))
    if settings.protocol == "clusters":
        centroids = spherical_kmeans(vectors, settings.buckets, seed)
        rows, dev_rows = (np.flatnonzero(assign(v, centroids) != settings.bucket) for v in (vectors, dev_vectors))
        how = f"bucket {settings.bucket} of {settings.buckets} is left out"
    else:
        tests = embed_queries(collection, collection.query_ids(settings.split), settings.model, folder)
        rows, bound = near_or_far(vectors, tests, settings.keep, settings.bound, seed)
        dev_rows = np.flatnonzero((nearest(dev_vectors, tests)[0] >= bound) == (settings.keep == "near"))
        how = f"those {settings.keep} of the split {settings.split} (bound {bound:.3f})"
    say(f"queries: {len(rows):,} of {len(training):,} training and {len(dev_rows):,} of {len(dev):,} dev ones: {how}")
    if not len(rows) or not len(dev_rows):
        raise RankdistillError(
            f"{len(rows)} training and {len(dev_rows)} dev queries are left",
            where="candidates.hold_out",
            fix="another bucket or bound, or more queries",
        )
    return [training[row] for row in rows], [dev[row] for row in dev_rows]


def run_split(
    collection: Collection, split: str, pool: list[str], training: list[str], recipe: Recipe, folder: Path
) -> QuerySplit | None:
    """How a run's test queries are parted: by what it held out, else by the similarity to what it was trained on.

    None where the recipe's `evaluation.extrapolation` is null. `pool` are the training queries before any was held
    out, `training` those it was trained on.
    """
    held_out, settings, seed = recipe.candidates.hold_out, recipe.evaluation.extrapolation, recipe.seed
    if settings is None:
        return None
    model, bound = (held_out or settings).model, settings.bound
    query_ids = collection.query_ids(split)
    vectors, queries = (embed_queries(collection, ids, model, folder) for ids in (pool, query_ids))
    row_of = {query_id: row for row, query_id in enumerate(pool)}
    record: dict[str, Any] = {"encoder": model, "held_out": held_out is not None}
    if held_out is not None and held_out.protocol == "similarity":
        tests = embed_queries(collection, collection.query_ids(held_out.split), model, folder)
        bound = near_or_far(vectors, tests, held_out.keep, held_out.bound, seed)[1]
    trained = vectors[[row_of[query_id] for query_id in training]]
    parted = split_by_similarity(query_ids, queries, training, trained, bound)
    if held_out is not None and held_out.protocol == "clusters":
        inside = assign(queries, spherical_kmeans(vectors, held_out.buckets, seed)) == held_out.bucket
        parted = split_by_clusters(parted, inside, bound)
        record |= {"buckets": held_out.buckets, "bucket": held_out.bucket}
    elif held_out is not None:  # of those far from training, what is near all the same is in neither part
        far = [NEITHER if part == INTERPOLATION else part for part in parted.part]
        parted = replace(parted, part=far if held_out.keep == "far" else [INTERPOLATION] * len(query_ids))
        record["keep"] = held_out.keep
    labelled = collection.training_split
    judged = collection.qrels(labelled) if labelled else {}
    seen = {doc_id for query_id in training for doc_id, grade in judged.get(query_id, {}).items() if grade > 0}
    return replace(parted, seen=frozenset(seen), settings=record)


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Extrapolation:
    """Figures of the parts: `protocols`, one of them, as `extrapolation.json` has them, `table` one row a query."""

    protocols: list[dict[str, Any]]
    table: pa.Table

    def to_json(self) -> dict[str, Any]:
        return {"confidence": CONFIDENCE, "protocols": self.protocols}

    def write(self, folder: Path) -> None:
        """`extrapolation.json` and `extrapolation.parquet`."""
        write_table(folder / TABLE, self.table)
        write_json(folder / FILE, self.to_json())


Floats = NDArray[np.float64]
Values = Mapping[str, Mapping[str, Floats]]  # system → metric → value of each query


def measure_split(split: QuerySplit, values: Values, qrels: Qrels, relevance_level: int = 1) -> Extrapolation:
    """Means of each part with 95 % t-intervals, the gap between them (Welch), and the overlap of relevant passages.

    `values` are of the queries of the qrels, in their order.
    """
    part_of = dict(zip(split.query_ids, split.part, strict=True))
    ids = {part: [query_id for query_id in qrels if part_of.get(query_id) == part] for part in PARTS}
    rows = {part: [row for row, query_id in enumerate(qrels) if part_of.get(query_id) == part] for part in MEASURED}
    measured = {
        part: {s: {m: v[np.array(rows[part], np.int64)] for m, v in by.items()} for s, by in values.items()}
        for part in MEASURED
    }
    entry = {
        "protocol": split.protocol,
        "bound": split.bound,
        **split.settings,
        "training_queries": split.training_queries,
        **_figures(measured, {part: len(query_ids) for part, query_ids in ids.items()}),
        "relevant_overlap": {part: _overlap(ids[part], qrels, split.seen, relevance_level) for part in MEASURED},
    }
    table = {
        "protocol": [split.protocol] * len(split.query_ids),
        "query_id": split.query_ids,
        "part": split.part,
        "nearest_cosine": split.nearest,
        "nearest_query_id": split.nearest_ids,
    }
    return Extrapolation([entry], pa.table(table))


def _figures(measured: Mapping[str, Values], counts: Mapping[str, int], paired: bool = False) -> dict[str, Any]:
    """The entries `parts` to `gap_beyond`; paired: both parts hold the same queries in one order."""
    parts = {
        part: {
            "queries": counts[part],
            "systems": {s: {m: float(v.mean()) for m, v in by.items() if len(v)} for s, by in systems.items()},
            "intervals": {
                s: {m: known and known[1:] for m, v in by.items() for known in [_mean(v)]} for s, by in systems.items()
            },
        }
        for part, systems in measured.items()
    }
    inside, outside = (measured[part] for part in MEASURED)
    reference = None if paired else next((name for name in REFERENCES if name in inside), None)
    beyond = {
        s: {m: _gap(v - inside[reference][m], outside[s][m] - outside[reference][m]) for m, v in by.items()}
        for s, by in inside.items()
        if reference is not None and s != reference
    }

    def gap(near: Floats, far: Floats) -> list[float] | None:
        return _mean(near - far) if paired else _gap(near, far)

    return {
        "parts": parts,
        "neither": counts[NEITHER],
        "paired": paired,
        "gap": {s: {m: gap(v, outside[s][m]) for m, v in by.items()} for s, by in inside.items()},
        "reference": reference,
        "gap_beyond": beyond,
    }


def _mean(values: Floats) -> list[float] | None:
    """[mean, low, high] by Student's t; None with fewer than two values."""
    from scipy.stats import sem, t

    if len(values) < 2:
        return None
    mean, half = float(values.mean()), float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * sem(values))
    return [mean, mean - half, mean + half]


def _gap(inside: Floats, outside: Floats) -> list[float] | None:
    """[difference of means, low, high] by Welch's t; None where a part has fewer than two queries."""
    from scipy.stats import ttest_ind

    if min(len(inside), len(outside)) < 2:
        return None
    difference = float(inside.mean() - outside.mean())
    if np.ptp(inside) == np.ptp(outside) == 0:
        return [difference] * 3
    ends = ttest_ind(inside, outside, equal_var=False).confidence_interval(CONFIDENCE)
    return [difference, float(ends.low), float(ends.high)]


def _overlap(query_ids: Sequence[str], qrels: Qrels, seen: frozenset[str], level: int) -> dict[str, Any]:
    """How much of what is relevant in a part is relevant to at least one training query too."""
    relevant = [{doc_id for doc_id, grade in qrels[query_id].items() if grade >= level} for query_id in query_ids]
    distinct = set().union(*relevant)
    pairs, seen_pairs = sum(map(len, relevant)), sum(len(documents & seen) for documents in relevant)
    return {
        "passages": len(distinct),
        "seen_passages": len(distinct & seen),
        "passage_share": len(distinct & seen) / len(distinct) if distinct else None,
        "pairs": pairs,
        "seen_pairs": seen_pairs,
        "pair_share": seen_pairs / pairs if pairs else None,
        "queries_with_seen": sum(bool(documents & seen) for documents in relevant),
    }


# -- pooling ----------------------------------------------------------------------------------------------------------


class _Fold(NamedTuple):
    """One run's evaluation: its protocol's entry, query → part, system → query → metric → value."""

    entry: dict[str, Any]
    part: dict[str, str]
    values: dict[str, dict[str, dict[str, float]]]


def pool_folds(folders: Sequence[str | Path]) -> Extrapolation:
    """Pool the evaluations of runs that each held something out, per query.

    A query that several runs have in one part counts once there, with the mean of its values: with clusters it is
    extrapolation for one run and interpolation for the others.

    Args:
        folders: of one set each (`evaluation/SUITE/SET`), the same set in all.

    Raises:
        UsageError: a run held nothing out, they differ in protocol or set, or a query is extrapolation twice.
    """
    if len(folders) < 2:
        raise UsageError("pooling needs at least two runs", fix="give the evaluations of all folds")
    folds = [_read_fold(Path(folder)) for folder in folders]
    first = folds[0]
    for folder, fold in zip(folders, folds, strict=True):
        if first.entry["protocol"] != fold.entry["protocol"] or first.part.keys() != fold.part.keys():
            raise UsageError("the runs differ in protocol or in test queries", where=str(folder))
    # part → query → the folds that have the query in this part
    parts = {p: {q: some for q in first.part if (some := [f for f in folds if f.part[q] == p])} for p in PARTS}
    if twice := [query for query, some in parts[EXTRAPOLATION].items() if len(some) > 1]:
        raise UsageError(
            f"query {twice[0]!r} is extrapolation in two of the runs ({len(twice)} such queries)",
            fix="give each bucket once, of runs with one seed",
        )
    systems = [system for system in first.values if all(system in fold.values for fold in folds)]
    metrics = list(next(iter(first.values[systems[0]].values())))

    def pooled(part: str, system: str, metric: str) -> Floats:
        means = [np.mean([f.values[system][q][metric] for f in some]) for q, some in parts[part].items()]
        return np.array(means, np.float64)

    measured = {part: {s: {m: pooled(part, s, m) for m in metrics} for s in systems} for part in MEASURED}
    never = sum(len(some) == len(folds) for some in parts[NEITHER].values())
    counts = {part: len(queries) for part, queries in parts.items()} | {NEITHER: never}
    overlap: dict[str, dict[str, Any]] = {}
    for part in MEASURED:
        pairs, seen = (sum(f.entry["relevant_overlap"][part][key] for f in folds) for key in ("pairs", "seen_pairs"))
        overlap[part] = {"pairs": pairs, "seen_pairs": seen, "pair_share": seen / pairs if pairs else None}
    entry = {
        "protocol": first.entry["protocol"],
        "bound": max(fold.entry["bound"] for fold in folds),
        "encoder": first.entry["encoder"],
        "held_out": True,
        "folds": len(folds),
        "training_queries": [fold.entry["training_queries"] for fold in folds],
        **_figures(measured, counts, paired=parts[INTERPOLATION].keys() == parts[EXTRAPOLATION].keys()),
        "relevant_overlap": overlap,
    }
    rows = [{"query_id": query, "part": part} for part in PARTS for query in parts[part]]
    return Extrapolation([entry], pa.Table.from_pylist(rows))


def _read_fold(folder: Path) -> _Fold:
    try:
        entry = json.loads((folder / FILE).read_text(encoding="utf-8"))["protocols"][0]
        table, per_query = pq.read_table(folder / TABLE), pq.read_table(folder / "per_query.parquet")
    except (OSError, ValueError, KeyError, IndexError, pa.ArrowException) as error:
        raise UsageError(
            f"there is no evaluation of extrapolation here: {error}",
            where=str(folder),
            fix="give the folder of a set, evaluation/SUITE/SET, of a run with candidates.hold_out",
        ) from None
    if not entry.get("held_out"):
        raise UsageError("this run held nothing out of training", where=str(folder), fix="set candidates.hold_out")
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in per_query.to_pylist():
        values.setdefault(row.pop("system"), {})[row.pop("query_id")] = row
    return _Fold(entry, {row["query_id"]: row["part"] for row in table.to_pylist()}, values)
