"""What a report says in words: what was distilled into what, what was kept, and what to be careful about.

Every sentence is made from figures of the files; what was not measured is said to be so, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rankdistill.evaluation.report.data import BM25, TEACHER, RunData, StudentData
from rankdistill.evaluation.results import verdict
from rankdistill.evaluation.significance import bootstrap_means
from rankdistill.evaluation.tables import bytes_text, rate_text, signed

RESAMPLES = 4000
FEW_QUERIES = 50
FEW_TIMED = 20
FEW_JUDGED = 0.5
NAMES = {"ndcg": "nDCG", "mrr": "MRR", "recall": "Recall", "map": "MAP", "precision": "P", "hit_rate": "Hit rate"}


class Tile(NamedTuple):
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


def short(system: str) -> str:
    """A system's name for charts: what all rows of a kind begin with is dropped."""
    return system.removeprefix("student, ").removeprefix("first stage: ")


def describe_model(settings: Mapping[str, Any] | None) -> str:
    """A teacher or a student of a recipe, in a few words."""
    if not settings:
        return "labels alone"
    kind = str(settings.get("type", "model")).replace("_", "-")
    if kind == "ensemble":
        members = [describe_model(member) for member in settings.get("members") or []]
        return f"an ensemble of {len(members)} ({'; '.join(members)})"
    name = str(settings.get("model") or settings.get("file") or "").rstrip("/").rsplit("/", 1)[-1]
    article = "an" if kind[:1] in "aeiou" else "a"
    cut = f", {len(settings['layers'])} of its layers" if settings.get("layers") else ""
    tuned = " fine-tuned in the run" if settings.get("train") else ""
    return f"{article} {kind}{f' {name}' if name else ''}{cut}{tuned}"


def ratio_interval(run: RunData, a: str, b: str, seed: int = 0) -> tuple[float, float] | None:
    """95\u00a0% interval of mean(a) / mean(b): percentiles of a bootstrap over queries, drawn within each set.

    None without the values of each query, or where sets are averaged in groups that the files do not name.
    """
    if len(run.sets) > 1 and run.suite.macro_sets != len(run.sets):
        return None
    means = np.zeros((RESAMPLES, 2))
    for number, test_set in enumerate(run.sets):
        values = [test_set.per_query.get(name, {}).get(run.metric, np.array([np.nan])) for name in (a, b)]
        if any(len(of_system) < 2 or np.isnan(of_system).any() for of_system in values):
            return None
        means += bootstrap_means(np.stack(values, axis=1)[None], RESAMPLES, seed + number)[0]
    if (means[:, 1] <= 0).any():
        return None
    low, high = np.percentile(means[:, 0] / means[:, 1], [2.5, 97.5])
    return float(low), float(high)


def _bounds(run: RunData) -> str:
    interval = ratio_interval(run, str(run.student), TEACHER)
    return "no interval" if interval is None else f"95\u00a0% interval {100 * interval[0]:.1f}–{percent(interval[1])}"


# -- the headline -----------------------------------------------------------------------------------------------------


def headline(run: RunData) -> tuple[str, str]:
    """(what was distilled into what; whether it beats what there was before, then what was kept)."""
    parameters = next((each.manifest.get("parameters") for each in run.students if each.name == "student"), None)
    size = f" ({parameters / 1e6:,.1f} M parameters)" if isinstance(parameters, int) else ""
    teacher = run.recipe.get("teacher")
    made = f"distilled from {describe_model(teacher)}" if teacher else "trained on labels alone"
    what = f"The student is {describe_model(run.recipe.get('student'))}{size}, {made}."

    if not run.sets:
        return what, "Nothing was measured: there are no judgments to measure with."
    where = f"on {run.sets[0].name}"
    if len(run.sets) > 1:
        where = f"on average over {run.suite.macro_sets} sets of {run.suite.suite}"
    metric, score, best = metric_name(run.metric), run.quality(run.student), run.quality(TEACHER)
    faster = speed_up(run)
    if score is None:
        kept = f"There is no figure of the student {where}."
    elif best is None or best <= 0:
        kept = f"The student reaches {metric} {score:.4f} {where}. No teacher was measured beside it."
    else:
        verb = "keeps" if score <= best else "reaches"
        kept = f"The student {verb} {percent(score / best)} of the teacher’s {metric} {where} ({_bounds(run)})"
        kept += f", at {times(faster[0])} its speed." if faster else "."
        what += "" if faster else " The teacher’s speed was not measured."
    return what, " ".join([*verdict(run.sets), kept])


def speed_up(run: RunData) -> tuple[float, str] | None:
    """How many times as fast as the teacher the student answers, and how that was measured; mean over the sets."""
    factors, queries = [], 0
    for same in (same for test_set in run.sets for same in test_set.same_queries):
        factor = (same.get("teacher_takes_times") or {}).get(run.student)
        if same.get("teacher") == TEACHER and factor:
            factors.append(float(factor))
            queries += int(same.get("queries", 0))
    if factors and len(factors) == len(run.sets):
        return _geometric_mean(factors), f"one at a time, the same {queries:,} queries for both"
    ours, theirs = _rate(run, run.student), _rate(run, TEACHER)
    if ours is None or theirs is None:
        return None
    return ours / theirs, f"{rate_text(ours)} against {rate_text(theirs)} queries a second, in batches"


def _rate(run: RunData, system: str | None) -> float | None:
    """Queries a second, over the sets."""
    rows = [test_set.row(system) for test_set in run.sets]
    rates = [row.queries_per_second for row in rows if row is not None and row.queries_per_second]
    return _geometric_mean(rates) if rates and len(rates) == len(run.sets) else None


def _geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def tiles(run: RunData) -> Iterator[Tile]:
    """The figures under the headline, those that can be computed."""
    student, metric = run.student, metric_name(run.metric)
    score, best = run.quality(student), run.quality(TEACHER)
    if student is None:
        return
    if score is not None and best:
        detail = f"{score:.4f} against {best:.4f}; {_bounds(run)}"
        yield Tile(percent(score / best), f"of the teacher’s {metric}", detail)
    faster, rate = speed_up(run), _rate(run, student)
    if faster is not None:
        yield Tile(times(faster[0]), "the teacher’s speed", faster[1])
    elif rate is not None:
        yield Tile(rate_text(rate), "queries a second, the student", "in batches; the teacher’s speed was not measured")
    if score is None:
        return
    start = run.quality(run.of_kind("untrained"))
    if start is not None and best is not None and best > start:
        label = "of the gap between the untrained student and the teacher closed"
        yield Tile(percent((score - start) / (best - start)), label, f"from {start:.4f} to {score:.4f}, of {best:.4f}")
    baseline = run.of_kind("baseline")
    plain = run.quality(baseline)
    if plain is not None:
        detail = f"{score:.4f} against {plain:.4f}"
        tests = run.sets[0].significance if len(run.sets) == 1 else None
        tested = tests.find(student, str(baseline), run.metric) if tests is not None else None
        if tested is not None and tested.low is not None and tested.high is not None:
            detail += f"; difference 95\u00a0% interval {signed(tested.low)} to {signed(tested.high)}"
        yield Tile(signed(score - plain), f"{metric} over “{baseline}”, same lists and budget", detail)
    yield from _smallest(run, student, score)


def _smallest(run: RunData, student: str, score: float) -> Iterator[Tile]:
    """The smallest index, of those of the student."""
    sizes = {row.system: row.bytes for row in run.sets[0].rows if row.bytes}
    name = min((each for each in sizes if run.kind(each) == "index"), key=lambda each: (sizes[each], each), default="")
    whole, quality = sizes.get(student), run.quality(name)
    if len(run.sets) == 1 and whole and score and quality is not None and sizes[name] < whole:
        yield Tile(
            percent(sizes[name] / whole),
            f"of the bytes in “{name}”, with {percent(quality / score)} of the student’s {metric_name(run.metric)}",
            f"{bytes_text(sizes[name])} against {bytes_text(whole)}; {quality:.4f} against {score:.4f}",
        )


# -- read with care ---------------------------------------------------------------------------------------------------


def cautions(run: RunData) -> Iterator[str]:
    """What a reader should know before believing the figures."""
    best = run.quality(TEACHER)
    if best is None:
        yield "No teacher was measured on these queries: what was kept of it is not known."
    else:
        for name in (BM25, run.of_kind("first-stage"), run.of_kind("untrained")):
            value = run.quality(name)
            if value is not None and value >= best:
                yield (
                    f"The teacher ({best:.4f}) is not above “{name}” ({value:.4f}) here: agreeing with it is no proof "
                    "of quality."
                )
        for note in sorted({row.note for test_set in run.sets if (row := test_set.row(TEACHER)) and row.note}):
            yield f"{note[0].upper()}{note[1:]}: what it ranks below, and its recall, are those of that list."
    for student in run.students:
        if student.kept_step == 0:
            yield f"“{student.name}”: its best checkpoint on dev is step 0, so its row is the untrained model."
        if alarm := hacking(student):
            yield f"“{student.name}”: {alarm}"
    judged = list(_judgments(run))
    yield from judged if len(judged) <= 4 else judged[:3]
    if len(judged) > 4:
        yield f"… and {len(judged) - 3} more sets with few judgments or queries."
    counts = [int(same.get("queries", 0)) for test_set in run.sets for same in test_set.same_queries]
    if counts and min(counts) < FEW_TIMED:
        yield f"The teacher is so slow here that it was timed on {min(counts)} queries: its factor is a rough one."
    yield f"One seed ({run.recipe.get('seed', '?')}): intervals are over queries, not over trainings."
    if run.suite.missing:
        names = ", ".join(entry["set"] for entry in run.suite.missing)
        yield f"{len(run.suite.missing)} sets of the suite are missing: {names}."
    if all(test_set.significance is None for test_set in run.sets):
        yield "No tests of significance were made: evaluate the run again to have them."


def hacking(student: StudentData) -> str:
    """The alarm of a student's manifest: agreement with the teacher rose while the dev metric fell; "" without one."""
    note = student.manifest.get("teacher_hacking")
    if not note or isinstance(note, str):
        return note or ""
    if not isinstance(note, Mapping) or "from_step" not in note:
        return "on dev, agreement with the teacher still rose while quality fell (teacher hacking)."
    falls = f" by {note['fall']:.4f}" if isinstance(note.get("fall"), float) else ""
    return (
        f"from step {note['from_step']} to {note.get('to_step', '?')} agreement with the teacher on dev still rose "
        f"while quality fell{falls} (teacher hacking)."
    )


def _judgments(run: RunData) -> Iterator[str]:
    for test_set in run.sets:
        shares = [(row.notes.get("judged@10"), row.system) for row in test_set.rows]
        known = [(share, name) for share, name in shares if isinstance(share, int | float)]
        if known and min(known)[0] < FEW_JUDGED:
            low, high = min(known), max(known)
            yield (
                f"{test_set.name}: of the first ten documents {100 * low[0]:.0f} % (“{low[1]}”) to "
                f"{100 * high[0]:.0f} % (“{high[1]}”) are judged. Unjudged ones count as not "
                "relevant, so a system that finds what nobody judged is underrated."
            )
        if (queries := test_set.queries) < FEW_QUERIES:
            yield f"{test_set.name} has {queries} queries: small differences cannot be told from chance."
