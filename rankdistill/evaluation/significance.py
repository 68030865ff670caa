"""Is a difference between systems more than chance? Tests, corrections for many systems, intervals.

All of it is paired: every system has one value for each query of the qrels, 0 where it returned nothing. Two tests of
each pair and metric:

- the paired t-test;
- Fisher's randomisation test, two-sided: if the systems are alike, chance says which of a query's two values is
  whose. All 2^n ways are counted where at most `EXACT_QUERIES` queries differ; else p = (b + 1) / (m + 1) over m
  random ones, which is never 0 (Phipson and Smyth 2010). Smucker, Allan and Carterette (CIKM 2007) compare the two.

With many systems something differs by chance, so p-values are corrected within each metric:

- `holm`: Holm's step-down over the pairs compared (1979): right for any dependence between them;
- `tukey_hsd`: the difference is set against the greatest one that chance makes among all systems. Analytic over the
  residual of the two-way layout systems × queries for the t side; randomised, permuting each query's values among the
  systems, for the other (Carterette, TOIS 2012). With two systems both are the uncorrected tests. The one-way Tukey
  test of statistics packages is not for paired values.

Intervals are bias-corrected and accelerated bootstrap ones (BCa, Efron 1987) over queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr

from rankdistill.errors import UsageError
from rankdistill.recipe import nearest

Correction = Literal["holm", "tukey_hsd"]
Floats = NDArray[np.float64]

BASELINE = "bm25"  # in any case: what marks refer to, where there is such a row and nothing else was said
EXACT_QUERIES = 16  # at most so many differing queries are enumerated (65,536 tosses)
PERMUTATIONS = 100_000
RESAMPLES = 10_000
CONFIDENCE = 0.95
CELLS = 1 << 22  # numbers of a random matrix made at once: bounds memory, some 32 MiB
TOSSES = 200_000_000  # random numbers a randomisation test may take: fewer permutations where queries are many
SAME = 1e-9  # values that differ by less are a tie
FEWEST_PERMUTATIONS = 2_000


@dataclass(frozen=True)
class Comparison:
    """One metric, two systems; everything as a − b, over the same queries.

    Attributes:
        low, high: 95% interval of the difference; None with fewer than two queries.
        effect_size: Cohen's d of paired values: mean over standard deviation of the differences; None where they do
            not vary and are not 0.
        wins, ties, losses: queries where a is better, equal (to 1e-9), worse.
        t: None where it is infinite or undefined (differences that do not vary, one query).
        p_t, p_randomisation: two-sided, of this pair alone.
        p_t_corrected, p_randomisation_corrected: for all pairs of the metric that were compared.
        significant: the corrected randomisation test is below alpha.
    """

    metric: str
    a: str
    b: str
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    effect_size: float | None
    wins: int
    ties: int
    losses: int
    t: float | None
    p_t: float
    p_randomisation: float
    p_t_corrected: float
    p_randomisation_corrected: float
    significant: bool

    def turned(self) -> Comparison:
        """The same as b − a."""
        values = asdict(self)
        for name, other in (("a", "b"), ("mean_a", "mean_b"), ("low", "high"), ("wins", "losses")):
            values[name], values[other] = values[other], values[name]
        for name in ("difference", "low", "high", "effect_size", "t"):
            values[name] = None if values[name] is None else -values[name]
        return Comparison(**values)


@dataclass
class Significance:
    """The comparisons of several systems on the same queries.

    Attributes:
        baseline: the system that marks in tables refer to.
        family: `all` pairs of systems were compared and corrected for, or only those with the `baseline`.
        seed, permutations, resamples: of the randomisation test and of the bootstrap.
        intervals: system → metric → [low, high], 95%, of the mean; without an entry where there is one query only.
        notes: counts of what the rules decided (`missing_queries`: system → queries it returned nothing for, which
            count 0 in every comparison; `tukey_permutations`).
    """

    alpha: float
    correction: Correction
    baseline: str | None
    family: Literal["all", "baseline"]
    metrics: list[str]
    systems: list[str]
    queries: int
    seed: int
    permutations: int
    resamples: int
    intervals: dict[str, dict[str, list[float]]]
    comparisons: list[Comparison]
    notes: dict[str, Any] = field(default_factory=dict)

    def of(self, a: str, b: str, metric: str) -> Comparison:
        """As `find`; KeyError where there is none."""
        pair = self.find(a, b, metric)
        if pair is None:
            raise KeyError((a, b, metric))
        return pair

    def find(self, a: str, b: str, metric: str) -> Comparison | None:
        """The comparison of a and b as a − b, whichever way round it was made."""
        for pair in self.comparisons:
            if pair.metric == metric and {pair.a, pair.b} == {a, b}:
                return pair if pair.a == a else pair.turned()
        return None

    def mark(self, system: str, metric: str, against: str | None = None) -> int:
        """1 or -1 where the system is significantly better or worse than another, by default the baseline; else 0."""
        pair = self.find(system, str(against or self.baseline), metric)
        return int(np.sign(pair.difference)) if pair is not None and pair.significant else 0

    def to_json(self) -> dict[str, Any]:
        """As `significance.json` has it; no NaN or infinity."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Significance:
        """From `to_json`."""
        return cls(**{**values, "comparisons": [Comparison(**pair) for pair in values["comparisons"]]})

    def __repr__(self) -> str:
        below = sum(pair.significant for pair in self.comparisons)
        return (
            f"Significance({len(self.systems)} systems, {self.queries:,} queries, {below} of "
            f"{len(self.comparisons)} comparisons below {self.alpha} by randomisation, {self.correction})"
        )


def check_options(systems: Sequence[str], baseline: str | None, correction: str) -> tuple[str | None, Correction]:
    """The row that marks refer to (the named one, else BM25, else the first) and the correction; `tukey` for short."""
    correction = "tukey_hsd" if correction == "tukey" else correction
    if correction not in get_args(Correction):
        raise UsageError(f"there is no correction {correction!r}", where="correction", fix="choose holm or tukey")
    if baseline is None:
        baseline = next((name for name in systems if name.lower() == BASELINE), next(iter(systems), None))
    elif baseline not in systems:
        fix = nearest(baseline, systems)
        raise UsageError(f"there is no system {baseline!r} to be the baseline", where="baseline", fix=fix)
    return baseline, cast(Correction, correction)


def compare_values(
    values: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str | None = None,
    family: Literal["all", "baseline"] = "all",
    correction: str = "holm",
    alpha: float = 0.05,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
    resamples: int = RESAMPLES,
    notes: Mapping[str, Any] | None = None,
) -> Significance:
    """Compare systems pair by pair on every metric.

    Args:
        values: system → metric → one value for each query, float [queries], the same queries in the same order.
        baseline: the system that marks refer to; default BM25, else the first.
        family: compare `all` pairs, or every system with the `baseline` alone: fewer pairs are corrected for (with
            `tukey_hsd` always all).
        permutations: of the randomisation tests; fewer where queries are so many that more would take minutes.

    Raises:
        UsageError: an unknown baseline or correction, alpha outside (0, 1).
        ValueError: values of different lengths, or not finite.
    """
    systems = list(values)
    baseline, chosen = check_options(systems, baseline, correction)
    if not 0 < alpha < 1:
        raise UsageError(f"alpha is {alpha}, but must lie between 0 and 1", where="alpha", fix="0.05 is usual")
    metrics = list(next(iter(values.values()))) if systems else []
    table = _table(values, metrics)  # [metrics, queries, systems]
    queries = table.shape[1]
    family = "all" if chosen == "tukey_hsd" else family
    result = Significance(
        alpha=alpha,
        correction=chosen,
        baseline=baseline,
        family=family,
        metrics=metrics,
        systems=systems,
        queries=queries,
        seed=seed,
        permutations=_affordable(permutations, queries),
        resamples=resamples,
        intervals={name: {} for name in systems},
        comparisons=[],
        notes=dict(notes or {}),
    )
    if not table.size:
        return result
    resampled = bootstrap_means(table, resamples, seed)  # [metrics, resamples, systems]
    for number, metric in enumerate(metrics):
        for column, name in enumerate(systems):
            if interval := bca(resampled[number, :, column], table[number, :, column]):
                result.intervals[name][metric] = list(interval)
    # (a, b): b is the baseline or the earlier row, so that a − b is positive where the later one is better.
    pairs = [
        (first, second) if systems[second] == baseline else (second, first)
        for first, second in itertools.combinations(range(len(systems)), 2)
        if family == "all" or baseline in (systems[first], systems[second])
    ]
    if not pairs:
        return result
    differences = np.stack([table[:, :, a] - table[:, :, b] for a, b in pairs], axis=2)
    p = randomisation(differences, result.permutations, seed)
    t, p_t = (np.stack(parts) for parts in zip(*map(paired_t, differences), strict=True))
    if chosen == "tukey_hsd":
        # A permutation of all systems takes much longer than a toss for each query.
        result.notes["tukey_permutations"] = permuted = _affordable(permutations, 8 * queries * len(systems))
        corrected = randomised_tukey_hsd(table, pairs, permuted, seed)
        corrected_t = [tukey_hsd(of_metric, pairs) for of_metric in table]
    else:
        corrected, corrected_t = np.array([holm(each) for each in p]), [holm(each) for each in p_t]
    for (number, metric), (at, (a, b)) in itertools.product(enumerate(metrics), enumerate(pairs)):
        d, statistic = differences[number, :, at], float(t[number, at])
        low, high = bca(resampled[number, :, a] - resampled[number, :, b], d) or (None, None)
        result.comparisons.append(
            Comparison(
                metric=metric,
                a=systems[a],
                b=systems[b],
                mean_a=float(table[number, :, a].mean()),
                mean_b=float(table[number, :, b].mean()),
                difference=float(d.mean()),
                low=low,
                high=high,
                effect_size=statistic / queries**0.5 if np.isfinite(statistic) else None,
                wins=int((d > SAME).sum()),
                ties=int((np.abs(d) <= SAME).sum()),
                losses=int((d < -SAME).sum()),
                t=statistic if np.isfinite(statistic) else None,
                p_t=float(p_t[number, at]),
                p_randomisation=float(p[number, at]),
                p_t_corrected=float(corrected_t[number][at]),
                p_randomisation_corrected=float(corrected[number, at]),
                significant=bool(corrected[number, at] < alpha),
            )
        )
    return result


def _table(values: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> Floats:
    """float64 [metrics, queries, systems]."""
    arrays = [[np.asarray(by_metric[metric], np.float64) for metric in metrics] for by_metric in values.values()]
    shapes = {array.shape for by_metric in arrays for array in by_metric}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"systems have values of different shapes: {sorted(shapes)}")
    table = np.array(arrays).transpose(1, 2, 0) if shapes else np.zeros((len(metrics), 0, len(values)))
    if not np.isfinite(table).all():
        raise ValueError("a value is not finite")
    return table


def _affordable(permutations: int, row: int) -> int:
    return max(min(permutations, TOSSES // max(row, 1)), min(permutations, FEWEST_PERMUTATIONS))


# -- tests ------------------------------------------------------------------------------------------------------------


def paired_t(differences: Any) -> tuple[Floats, Floats]:
    """Paired t-test, two-sided: (t, p), each [columns].

    Args:
        differences: [queries, columns] or [queries]. Where all are 0, or there is one query, nothing speaks against
            chance: p = 1 and t = 0 or NaN. Where all are equal and not 0, t is infinite and p = 0.
    """
    d = np.asarray(differences, np.float64)
    d = d.reshape(len(d), -1)
    queries = len(d)
    if queries < 2:
        return np.full(d.shape[1], np.nan), np.ones(d.shape[1])
    mean, sd = d.mean(axis=0), d.std(axis=0, ddof=1)
    sd = np.where(sd <= 1e-12 * np.abs(d).max(axis=0), 0.0, sd)  # where only rounding makes values differ
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(sd > 0, mean / (sd / np.sqrt(queries)), np.where(mean == 0, 0.0, np.sign(mean) * np.inf))
    return t, np.asarray(2 * stdtr(queries - 1, -np.abs(t)))


def randomisation(differences: Floats, permutations: int = PERMUTATIONS, seed: int = 0) -> Floats:
    """Fisher's randomisation test, two-sided: p [metrics, pairs] of differences [metrics, queries, pairs].

    One set of tosses serves all of them.
    """
    metrics, queries, pairs = differences.shape
    d = differences.transpose(1, 0, 2).reshape(queries, -1)
    nonzero = np.count_nonzero(d, axis=0)
    # Sums of the same numbers in another order differ in their last digits: what is that near counts as equal.
    least = np.abs(d.sum(axis=0)) - SAME * np.abs(d).sum(axis=0)
    p = np.ones(d.shape[1])
    for column in np.flatnonzero((nonzero > 0) & (nonzero <= EXACT_QUERIES)):
        sums = np.zeros(1)  # of all sign patterns
        for value in d[d[:, column] != 0, column]:
            sums = np.concatenate([sums + value, sums - value])
        p[column] = (np.abs(sums) >= least[column]).mean()
    sampled = np.flatnonzero(nonzero > EXACT_QUERIES)
    if len(sampled):
        beyond = np.zeros(len(sampled), np.int64)
        total, many = d[:, sampled].sum(axis=0), np.ascontiguousarray(d[:, sampled])
        random = np.random.default_rng([seed, 0])
        chunk = max(CELLS // queries, 1)
        for start in range(0, permutations, chunk):
            size = min(chunk, permutations - start)
            tossed = np.unpackbits(random.integers(0, 256, (size, -(-queries // 8)), np.uint8), axis=1, count=queries)
            # With signs ±1 = 2 bit − 1 the sum of signed differences is twice the sum where the bit is 1, less all.
            beyond += (np.abs(2 * (tossed.astype(np.float64) @ many) - total) >= least[sampled]).sum(axis=0)
        p[sampled] = (beyond + 1) / (permutations + 1)
    return p.reshape(metrics, pairs)


# -- corrections ------------------------------------------------------------------------------------------------------


def holm(p: Any) -> Floats:
    """Holm's step-down correction of p-values [tests]."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected


def tukey_hsd(values: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Tukey's honestly significant difference over the two-way layout [queries, systems]: p of each pair of columns.

    The error is what neither the query nor the system explains.
    """
    from scipy.stats import studentized_range

    queries, systems = values.shape
    if queries < 2:
        return np.ones(len(pairs))
    means = values.mean(axis=0)
    rest = values - values.mean(axis=1, keepdims=True) - means + values.mean()
    freedom = (queries - 1) * (systems - 1)
    error = np.sqrt(np.square(rest).sum() / freedom / queries)
    gaps = np.array([abs(means[a] - means[b]) for a, b in pairs])
    if error <= 1e-12 * max(float(np.abs(values).max()), SAME):
        return np.where(gaps <= SAME, 1.0, 0.0)
    return np.clip(studentized_range.sf(gaps / error, systems, freedom), 0.0, 1.0)


def randomised_tukey_hsd(
    table: Floats, pairs: Sequence[tuple[int, int]], permutations: int = PERMUTATIONS, seed: int = 0
) -> Floats:
    """Randomised Tukey HSD (Carterette 2012) of a table [metrics, queries, systems]: p [metrics, pairs].

    Each query's values are permuted among the systems; p is how often the greatest difference of two means then
    reaches the pair's, with the arrangement found counted once. One set of permutations serves all metrics.
    """
    metrics, queries, systems = table.shape
    means = table.mean(axis=1)
    gaps = np.array([np.abs(means[:, a] - means[:, b]) for a, b in pairs]).T
    least = gaps - SAME * np.abs(table).mean(axis=(1, 2))[:, None]
    beyond = np.zeros(gaps.shape, np.int64)
    random = np.random.default_rng([seed, 1])
    # Queries that every system answers alike stay as they are however they are permuted.
    told = (np.ptp(table, axis=2) > 0).any(axis=0)
    constant, varied = table[:, ~told].sum(axis=1), table[:, told]
    if not told.any():
        return np.ones(gaps.shape)
    columns = np.arange(systems, dtype=np.uint8)
    chunk = max(CELLS // varied[0].size, 1)
    for start in range(0, permutations, chunk):
        size = min(chunk, permutations - start)
        order = random.permuted(np.broadcast_to(columns, (size, *varied[0].shape)), axis=2)
        for metric in range(metrics):
            shuffled = np.take_along_axis(varied[metric][None], order, axis=2).sum(axis=1) + constant[metric]
            beyond[metric] += (np.ptp(shuffled / queries, axis=1)[:, None] >= least[metric]).sum(axis=0)
    return np.asarray((beyond + 1) / (permutations + 1))


# -- intervals --------------------------------------------------------------------------------------------------------


def bootstrap_means(table: Floats, resamples: int, seed: int) -> Floats:
    """Means of resampled queries, the same samples for every metric and system: [metrics, resamples, systems]."""
    metrics, queries, systems = table.shape
    flat = np.ascontiguousarray(table.transpose(1, 0, 2).reshape(queries, -1))
    means = np.empty((resamples, flat.shape[1]))
    random = np.random.default_rng([seed, 2])
    chunk = max(CELLS // queries, 1)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = random.integers(0, queries, (size, queries), np.int32)
        drawn += np.arange(size, dtype=np.int32)[:, None] * queries
        counts = np.bincount(drawn.ravel(), minlength=size * queries).reshape(size, queries)
        means[start : start + size] = counts.astype(np.float64) @ flat / queries
    return means.reshape(resamples, metrics, systems).transpose(1, 0, 2)


def bca(resampled: Floats, values: Floats) -> tuple[float, float] | None:
    """The BCa interval of the mean of values [queries], from means of bootstrap samples; None with fewer than two."""
    if len(values) < 2:
        return None
    mean = float(values.mean())
    centred = values - mean  # for a mean the jackknife's deviations are these, over n − 1
    spread = float(np.square(centred).sum())
    if spread <= (1e-12 * float(np.abs(values).max())) ** 2 * len(values):
        return mean, mean
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    # Means that equal the sample's count half below: per-query values are often few and coarse.
    near = SAME * max(abs(mean), float(np.abs(values).max()))
    below = ((resampled < mean - near).mean() + (resampled <= mean + near).mean()) / 2
    bias = ndtri(np.clip(below, 0.5 / len(resampled), 1 - 0.5 / len(resampled)))
    tails = bias + ndtri([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.quantile(resampled, ndtr(bias + tails / (1 - acceleration * tails)))
    return float(low), float(high)
