"""What a report says in words: what was distilled into what, what was kept, and what to be careful about.

Every sentence is made from figures of the files; what was not measured is said to be so, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankdistill.evaluation.report.data import BM25, TEACHER, RunData, SetData
from rankdistill.evaluation.results import bytes_text, rate_text, verdict

RESAMPLES = 4000
FEW_QUERIES = 50
FEW_TIMED = 20
FEW_JUDGED = 0.5
CELLS = 1 << 21  # random row numbers drawn at once
NAMES = {"ndcg": "nDCG", "mrr": "MRR", "recall": "Recall", "map": "MAP", "precision": "P", "hit_rate": "Hit rate"}


@dataclass
class Tile:
    """One figure of the headline: what it is, and where it comes from."""

    value: str
    label: str
    detail: str


def metric_name(metric: str) -> str:
    """`ndcg@10` as papers write it."""
    head, at, cutoff = metric.partition("@")
    return NAMES.get(head, head) + at + cutoff


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%" if share < 10 else f"{100 * share:,.0f}\u00a0%"


def times(factor: float) -> str:
    return f"{factor:,.0f}×" if factor >= 10 else f"{factor:.2g}×"


def signed(value: float, decimals: int = 4) -> str:
    """With a plus or a minus; what rounds to nothing has neither."""
    shown = f"{abs(value):.{decimals}f}"
    return shown if float(shown) == 0 else f"{'+' if value > 0 else '−'}{shown}"


# -- who is who -------------------------------------------------------------------------------------------------------


def describe_model(settings: Mapping[str, Any] | None) -> str:
    """A teacher or a student of a recipe, in a few words."""
    if not settings:
        return "labels alone"
    kind = str(settings.get("type", "model")).replace("_", "-")
    if kind == "ensemble":
        members = [describe_model(one) for one in settings.get("members") or []]
        return f"an ensemble of {len(members)} ({'; '.join(members)})"
    name = str(settings.get("model") or settings.get("file") or "").rstrip("/").rsplit("/", 1)[-1]
    of = f" {name}" if name else ""
    trained = " fine-tuned in the run" if settings.get("train") else ""
    article = "an" if kind[:1] in "aeiou" else "a"
    layers = settings.get("layers")
    cut = f", {len(layers)} of its layers" if layers else ""
    return f"{article} {kind}{of}{cut}{trained}"


def quality(run: RunData, system: str | None) -> float | None:
    """The headline figure of a system: of the one set, or the macro average over all."""
    if system is None:
        return None
    if len(run.sets) == 1:
        row = run.sets[0].row(system)
        return None if row is None else row.means.get(run.metric)
    return run.suite.macro.get(system, {}).get(run.metric)


def ratio_interval(run: RunData, a: str, b: str, seed: int = 0) -> tuple[float, float] | None:
    """95\u00a0% interval of mean(a) / mean(b): percentiles of a bootstrap over queries, drawn within each set.

    None without the values of each query, or where sets are averaged in groups that the files do not name.
    """
    pairs = []
    for one in run.sets:
        values = [one.per_query.mean_of(name, run.metric) if one.per_query else None for name in (a, b)]
        if values[0] is None or values[1] is None or len(values[0]) < 2:
            return None
        pairs.append(np.stack([values[0], values[1]]))
    if not pairs or (len(pairs) > 1 and run.suite.macro_sets != len(pairs)):
        return None
    random = np.random.default_rng(seed)
    means = np.zeros((2, RESAMPLES))
    for pair in pairs:
        queries = pair.shape[1]
        step = max(1, CELLS // queries)
        for start in range(0, RESAMPLES, step):
            rows = random.integers(0, queries, (min(step, RESAMPLES - start), queries))
            means[:, start : start + step] += pair[:, rows].mean(axis=2)
    if (means[1] <= 0).any():
        return None
    low, high = np.percentile(means[0] / means[1], [2.5, 97.5])
    return float(low), float(high)


def _bounds(interval: tuple[float, float] | None) -> str:
    return "no interval" if interval is None else f"95\u00a0% interval {100 * interval[0]:.1f}–{percent(interval[1])}"


def _where(run: RunData) -> str:
    if len(run.sets) > 1:
        return f"on average over {run.suite.macro_sets} sets of {run.suite.suite}"
    return f"on {run.sets[0].name}"


# -- the headline -----------------------------------------------------------------------------------------------------


def headline(run: RunData) -> tuple[str, str]:
    """(what was distilled into what; whether it beats what there was before, then what was kept)."""
    what, kept = _kept_words(run)
    return what, " ".join([*verdict([one.evaluation for one in run.sets]), kept])


def _kept_words(run: RunData) -> tuple[str, str]:
    student, metric = run.student, metric_name(run.metric)
    parameters = next((one.manifest.get("parameters") for one in run.students if one.name == "student"), None)
    size = f" ({parameters / 1e6:,.1f} M parameters)" if isinstance(parameters, int) else ""
    what = f"{describe_model(run.recipe.get('student'))}{size}"
    teacher = run.recipe.get("teacher")
    made = f"distilled from {describe_model(teacher)}" if teacher else "trained on labels alone"
    first = f"The student is {what}, {made}."
    score, best = quality(run, student), quality(run, TEACHER)
    where = _where(run)
    if student is None or score is None:
        return first, f"There is no figure of the student {where}."
    if best is None or best <= 0:
        return first, f"The student reaches {metric} {score:.4f} {where}. No teacher was measured beside it."
    bounds = _bounds(ratio_interval(run, student, TEACHER))
    verb = "keeps" if score <= best else "reaches"
    kept = f"The student {verb} {percent(score / best)} of the teacher’s {metric} {where} ({bounds})"
    found = speed_up(run, student)
    if found is None:
        return f"{first} The teacher’s speed was not measured.", f"{kept}."
    return first, f"{kept}, at {times(found[0])} its speed."


def _rate(run: RunData, system: str) -> float | None:
    """Queries a second, geometric mean over the sets."""
    rates = []
    for one in run.sets:
        rate = one.cost_of(system).get("batch_queries_per_second")
        row = one.row(system)
        rate = rate if rate else row.queries_per_second if row else None
        if not rate:
            return None
        rates.append(float(rate))
    return float(np.exp(np.mean(np.log(rates)))) if rates else None


def speed_up(run: RunData, student: str) -> tuple[float, str] | None:
    """How many times as fast as the teacher the student answers, and how that was measured; mean over the sets."""
    factors, queries = [], 0
    for one in run.sets:
        for same in (one.cost or {}).get("same_queries") or []:
            factor = (same.get("teacher_takes_times") or {}).get(student)
            if same.get("teacher") == TEACHER and factor:
                factors.append(float(factor))
                queries += int(same.get("queries", 0))
    if factors and len(factors) == len(run.sets):
        return float(np.exp(np.mean(np.log(factors)))), f"one at a time, the same {queries:,} queries for both"
    ours, theirs = _rate(run, student), _rate(run, TEACHER)
    if ours is None or theirs is None:
        return None
    return ours / theirs, f"{rate_text(ours)} against {rate_text(theirs)} queries a second, in batches"


def tiles(run: RunData) -> list[Tile]:
    """The figures under the headline, those that can be computed."""
    found = [_kept(run), _faster(run), _closed(run), _against_labels(run), _smallest(run)]
    return [tile for tile in found if tile is not None]


def _kept(run: RunData) -> Tile | None:
    score, best = quality(run, run.student), quality(run, TEACHER)
    if run.student is None or score is None or not best:
        return None
    return Tile(
        percent(score / best),
        f"of the teacher’s {metric_name(run.metric)}",
        f"{score:.4f} against {best:.4f}; {_bounds(ratio_interval(run, run.student, TEACHER))}",
    )


def _faster(run: RunData) -> Tile | None:
    if run.student is None:
        return None
    found = speed_up(run, run.student)
    if found is not None:
        return Tile(times(found[0]), "the teacher’s speed", found[1])
    ours = _rate(run, run.student)
    if ours is None:
        return None
    return Tile(rate_text(ours), "queries a second, the student", "in batches; the teacher’s speed was not measured")


def _row_of(run: RunData, kind: str) -> str | None:
    return next((name for one in run.sets for name in one.systems if run.kind(name) == kind), None)


def _closed(run: RunData) -> Tile | None:
    start, score, best = quality(run, _row_of(run, "untrained")), quality(run, run.student), quality(run, TEACHER)
    if start is None or score is None or best is None or best <= start:
        return None
    share = (score - start) / (best - start)
    return Tile(
        percent(share),
        "of the gap between the untrained student and the teacher closed",
        f"from {start:.4f} to {score:.4f}, of {best:.4f}",
    )


def _against_labels(run: RunData) -> Tile | None:
    name = _row_of(run, "baseline")
    score, plain = quality(run, run.student), quality(run, name)
    if name is None or run.student is None or score is None or plain is None:
        return None
    detail = f"{score:.4f} against {plain:.4f}"
    if len(run.sets) == 1:
        found = comparison(run.sets[0], run.student, name, run.metric)
        if found is not None and found.low is not None and found.high is not None:
            detail += f"; difference 95\u00a0% interval {signed(found.low)} to {signed(found.high)}"
    return Tile(signed(score - plain), f"{metric_name(run.metric)} over “{name}”, same lists and budget", detail)


def _smallest(run: RunData) -> Tile | None:
    """The smallest index, of those of the student."""
    if run.student is None or len(run.sets) != 1:
        return None
    one = run.sets[0]
    whole = size_of(one, run.student)
    sizes = [(size, name) for name in one.systems if run.kind(name) == "index" and (size := size_of(one, name))]
    if not sizes or not whole or min(sizes)[0] >= whole:
        return None
    size, name = min(sizes)
    score, plain = quality(run, name), quality(run, run.student)
    if score is None or not plain:
        return None
    return Tile(
        percent(size / whole),
        f"of the bytes in “{name}”, with {percent(score / plain)} of the student’s {metric_name(run.metric)}",
        f"{bytes_text(size)} against {bytes_text(whole)}; {score:.4f} against {plain:.4f}",
    )


def size_of(one: SetData, system: str) -> int | None:
    """Bytes that are kept to search."""
    row = one.row(system)
    size = one.cost_of(system).get("bytes") or (row.bytes if row else None)
    return int(size) if size else None


def comparison(one: SetData, a: str, b: str, metric: str) -> Any:
    """The comparison a − b, or None where the pair was not compared."""
    found = one.evaluation.significance
    if found is None:
        return None
    try:
        return found.of(a, b, metric)
    except KeyError:
        return None


# -- read with care ---------------------------------------------------------------------------------------------------


def cautions(run: RunData) -> list[str]:
    """What a reader should know before believing the figures."""
    return [*_weak_teacher(run), *_checkpoints(run), *_judgments(run), *_speed_of_few(run), *_scope(run)]


def _weak_teacher(run: RunData) -> list[str]:
    best = quality(run, TEACHER)
    if best is None:
        return ["No teacher was measured on these queries: what was kept of it is not known."]
    others = [BM25, _row_of(run, "first-stage"), _row_of(run, "untrained")]
    better = [(name, value) for name in others if name and (value := quality(run, name)) is not None and value >= best]
    found = [
        f"The teacher ({best:.4f}) is not above “{name}” ({value:.4f}) here: agreeing with it is no proof of quality."
        for name, value in better
    ]
    notes = {row.note for one in run.sets if (row := one.row(TEACHER)) and row.note}
    return found + [
        f"{note[0].upper()}{note[1:]}: what it ranks below, and its recall, are those of that list."
        for note in sorted(notes)
    ]


def _checkpoints(run: RunData) -> list[str]:
    found = []
    for student in run.students:
        dev = {int(step): value for step, value in (student.manifest.get("dev") or {}).items()}
        if dev and max(dev, key=lambda step: (dev[step], -step)) == 0:
            found.append(f"“{student.name}”: its best checkpoint on dev is step 0, so its row is the untrained model.")
        alarm = hacking(student.manifest)
        if alarm:
            found.append(f"“{student.name}”: {alarm}")
    return found


def hacking(manifest: Mapping[str, Any]) -> str:
    """The alarm of a student's manifest: agreement with the teacher rose while the dev metric fell; "" without one."""
    note = manifest.get("teacher_hacking")
    if not note:
        return ""
    if not isinstance(note, Mapping) or "from_step" not in note:
        return note if isinstance(note, str) else ALARM
    falls = f" by {note['fall']:.4f}" if isinstance(note.get("fall"), float) else ""
    return (
        f"from step {note['from_step']} to {note.get('to_step', '?')} agreement with the teacher on dev still rose "
        f"while quality fell{falls} (teacher hacking)."
    )


ALARM = "on dev, agreement with the teacher still rose while quality fell (teacher hacking)."


def _judgments(run: RunData) -> list[str]:
    found = []
    for one in run.sets:
        shares = [(row.notes.get("judged@10"), row.system) for row in one.evaluation.rows]
        known = [(share, name) for share, name in shares if isinstance(share, int | float)]
        if known and min(known)[0] < FEW_JUDGED:
            low, high = min(known), max(known)
            found.append(
                f"{one.name}: of the first ten documents {100 * low[0]:.0f} % (“{low[1]}”) to {100 * high[0]:.0f} % "
                f"(“{high[1]}”) are judged. Unjudged ones count as not relevant, so a system that finds what nobody "
                "judged is underrated."
            )
        queries = one.evaluation.rows[0].notes.get("queries", 0) if one.evaluation.rows else 0
        if queries < FEW_QUERIES:
            found.append(f"{one.name} has {queries} queries: small differences cannot be told from chance.")
    return (
        found if len(found) <= 4 else [*found[:3], f"… and {len(found) - 3} more sets with few judgments or queries."]
    )


def _speed_of_few(run: RunData) -> list[str]:
    counts = [int(same.get("queries", 0)) for one in run.sets for same in (one.cost or {}).get("same_queries") or []]
    if not counts or min(counts) >= FEW_TIMED:
        return []
    return [f"The teacher is so slow here that it was timed on {min(counts)} queries: its factor is a rough one."]


def _scope(run: RunData) -> list[str]:
    found = [f"One seed ({run.recipe.get('seed', '?')}): intervals are over queries, not over trainings."]
    if run.suite.missing:
        names = ", ".join(entry["set"] for entry in run.suite.missing)
        found.append(f"{len(run.suite.missing)} sets of the suite are missing: {names}.")
    if all(one.evaluation.significance is None for one in run.sets):
        found.append("No tests of significance were made: evaluate the run again to have them.")
    return found


def shortened(names: Sequence[str]) -> dict[str, str]:
    """Names for charts: what all rows of a kind begin with is dropped."""
    return {name: name.removeprefix("student, ").removeprefix("first stage: ") for name in names}
