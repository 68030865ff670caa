"""From orders to scores: what a student can learn from a model that only puts documents in order.

The scores that re-rankers write beside their order are often the first stage's, dealt out anew; they mean nothing as
margins. Here a score is a function of the rank, a strength fitted to several orders, or the model's own logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from rankdistill.errors import UsageError

RankFunction = Literal["reciprocal", "log", "ndcg_gain", "none"]
Order = Literal["given", "reversed", "shuffled"]
TENTHS = 10


def rank_scores(count: int, function: RankFunction = "reciprocal") -> np.ndarray:
    """Scores of the ranks 1 to n, float64 [n], falling.

    - `reciprocal`: 1 / r
    - `log`: ln(n / r): each halving of the rank is worth the same; the last is 0
    - `ndcg_gain`: 1 / log₂(1 + r), what a relevant document is worth to NDCG at that rank
    - `none`: −r
    """
    ranks = np.arange(1, count + 1, dtype=np.float64)
    if function == "reciprocal":
        return np.asarray(1 / ranks)
    if function == "log":
        return np.log(count / ranks)
    if function == "ndcg_gain":
        return np.asarray(1 / np.log2(1 + ranks))
    if function == "none":
        return -ranks
    raise UsageError(f"unknown rank function {function!r}", fix=", ".join(get_args(RankFunction)))


def mean_rank_scores(orders: Sequence[Sequence[int]], count: int, function: RankFunction = "reciprocal") -> np.ndarray:
    """The mean over several orders of the rank function: float64 [count] by item, NaN where no order has the item.

    Args:
        orders: items 0 to count − 1, best first; an order may lack items: the mean is over those that have it.
    """
    total, seen = np.zeros(count), np.zeros(count)
    for order in orders:
        items = np.asarray(order, dtype=np.int64)
        total[items] += rank_scores(len(items), function)
        seen[items] += 1
    return np.where(seen > 0, total / np.maximum(seen, 1), np.nan)


def plackett_luce(orders: Sequence[Sequence[int]], count: int, ridge: float = 0.1) -> np.ndarray:
    """Log-strengths under the Plackett-Luce model: each order draws its items one by one, each in proportion to exp(s)
    among those that are left (Plackett 1975; Luce 1959).

    Maximises Σ log P(order) − ridge/2 · Σ s². The ridge keeps finite what orders that agree would push to infinity,
    and puts an item of no order at 0. Solved by L-BFGS; the objective is concave.

    Args:
        orders: items 0 to count − 1, best first; an order may lack items.
        ridge: above 0; the smaller, the further the scores are apart where all orders agree.

    Returns:
        float64 [count], mean 0.
    """
    from scipy.optimize import minimize

    if ridge <= 0:
        raise UsageError(f"the ridge must be above 0, not {ridge}")
    items = [np.asarray(order, dtype=np.int64) for order in orders if len(order) > 1]
    if not items:
        return np.zeros(count)

    def loss(s: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = ridge / 2 * float(s @ s), ridge * s
        for order in items:
            t = s[order]
            e = np.exp(t - t.max())
            left = np.cumsum(e[::-1])[::-1]  # Σ exp over the items not yet drawn
            value += float((np.log(left) + t.max() - t).sum())
            # An item is among those left at every draw up to its own.
            gradient[order] += e * np.cumsum(1 / left) - 1
        return value, gradient

    optimum = minimize(loss, np.zeros(count), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "gtol": 1e-7})
    strengths = np.asarray(optimum.x)
    return strengths - strengths.mean()


def joined_logits(windows: Sequence[tuple[Sequence[int], np.ndarray]], count: int) -> np.ndarray:
    """One scale for logits that were read in several windows.

    Logits of two windows differ by a constant that means nothing (each is a softmax over its own passages). So
    logit(w, d) = s(d) + o(w) is fitted by least squares over all windows; documents that two windows share tie them
    together. One window keeps its logits as they are, but for their mean.

    Args:
        windows: (documents, logits) of each window; NaN where the engine did not report one: such a document counts
            as 1 below the lowest of its window, which bounds it from above.
        count: documents of the list.

    Returns:
        float64 [count], mean 0; documents that were in no window: the lowest score.
    """
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for documents, logits in windows:
        known = np.isfinite(logits)
        columns.append(np.asarray(documents, dtype=np.int64))
        values.append(np.where(known, logits, logits[known].min() - 1 if known.any() else 0.0))
    if not columns:
        return np.zeros(count)
    documents_at, logit = np.concatenate(columns), np.concatenate(values)
    if len(columns) == 1:  # nothing to fit, and equal logits stay equal to the last digit
        scores = np.full(count, logit.min())
        scores[documents_at] = logit
        return np.asarray(scores - scores.mean())
    matrix = np.zeros((len(logit), count + len(columns)))
    rows = np.arange(len(logit))
    matrix[rows, documents_at] = 1
    matrix[rows, count + np.repeat(np.arange(len(columns)), [len(part) for part in columns])] = 1
    scores = np.asarray(np.linalg.lstsq(matrix, logit, rcond=None)[0][:count])
    seen = np.zeros(count, dtype=bool)
    seen[documents_at] = True
    scores = np.where(seen, scores, scores[seen].min())
    return np.asarray(scores - scores.mean())


def shown_order(order: Order, count: int, seed: int, *names: str | int) -> list[int]:
    """In which order a window's passages are shown: places of the window, a pure function of its arguments.

    Args:
        names: what tells this window from others: query, permutation, window.
    """
    if order == "given":
        return list(range(count))
    if order == "reversed":
        return list(range(count))[::-1]
    text = "\x1f".join(str(part) for part in (seed, *names))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return [int(at) for at in np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(count)]


def agreement(orders: Sequence[Sequence[int]]) -> float:
    """How far several orders of the same items agree: Kendall's τ, the mean over all pairs of orders, −1 to 1.

    1 for a single order, and for fewer than two items.
    """
    count = len(orders[0]) if orders else 0
    if len(orders) < 2 or count < 2:
        return 1.0
    ranks = np.argsort(np.asarray(orders), axis=1)
    upper = np.triu_indices(count, 1)
    signs = np.stack([np.sign(rank[:, None] - rank[None, :])[upper] for rank in ranks])
    # The sum over pairs of orders of their products, from the square of the sum: orders have no ties.
    total = signs.sum(axis=0)
    pairs = len(orders) * (len(orders) - 1)
    return float(((total**2 - len(orders)) / pairs).mean())


@dataclass
class PositionBias:
    """How the place at which a passage is shown moves its place in the answer. Sums, so that reports add up.

    Args:
        shown: passages seen in each tenth of the prompt.
        answered: the sum of their places in the answers, 0 (first) to 1 (last).
        moved, spread: over windows that were shown in several orders, Σ xy and Σ xx of a passage's place shown (x) and
            answered (y), each less its mean over the orders: the same passage among the same ones, elsewhere.
    """

    shown: list[int] = field(default_factory=lambda: [0] * TENTHS)
    answered: list[float] = field(default_factory=lambda: [0.0] * TENTHS)
    moved: float = 0.0
    spread: float = 0.0

    def add(self, order: Sequence[int]) -> None:
        """Count one answer: places shown, best first."""
        last = len(order) - 1
        for place, at in enumerate(order if last > 0 else ()):
            tenth = min(TENTHS - 1, at * TENTHS // last)
            self.shown[tenth] += 1
            self.answered[tenth] += place / last

    def add_repeats(self, shown: np.ndarray, answered: np.ndarray) -> None:
        """Count a window asked several times: int [orders, passages], places shown and answered by passage."""
        x = shown - shown.mean(axis=0)
        y = answered - answered.mean(axis=0)
        self.moved += float((x * y).sum())
        self.spread += float((x * x).sum())

    @property
    def effect(self) -> float | None:
        """Places that a passage falls in the answer for each place it is shown later: 0 for a model that reads, 1 for
        one that copies the order of its prompt. None where nothing was shown in several orders."""
        return self.moved / self.spread if self.spread else None

    def places(self) -> list[float | None]:
        """The mean place in the answer, 0 to 1, of what was shown in each tenth. .5 throughout where passages are
        shuffled and their place does not matter; shown in a ranking's order it rises, by the ranking's own merit."""
        return [total / seen if seen else None for seen, total in zip(self.shown, self.answered)]

    def to_json(self) -> dict[str, Any]:
        return {"shown": self.shown, "answered": self.answered, "moved": self.moved, "spread": self.spread}
