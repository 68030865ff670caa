"""The first words about a student: is it better or worse than what one could have used without training it?

That is the encoder it was made from, whole and untouched, the first stage and BM25. Told from chance by the corrected
randomisation test of the evaluation (significance.py); where none was made, that is said too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankdistill.evaluation.evaluate import Evaluation

STUDENTS = ("student, distilled", "student")
UNTRAINED, BM25, ENCODER, FIRST_STAGE = "student, untrained", "BM25", "encoder: ", "first stage: "
# How each outcome is said, the worst news first.
WORDS = {
    "worse": "significantly worse than",
    "below": "below, though not tested against,",
    "better": "significantly better than",
    "above": "above, though not tested against,",
    "alike": "not distinguishable from",
}


def reference_rows(names: Sequence[str]) -> list[str]:
    """Rows that a student is held against: what could be used without training it, the encoders first."""
    encoders = [name for name in names if name.startswith((ENCODER, FIRST_STAGE))]
    return encoders + [name for name in (UNTRAINED, BM25) if name in names]


def outcomes(evaluation: Evaluation) -> dict[str, tuple[str, float, float]]:
    """Reference → (a key of WORDS, the student's mean, the reference's mean) in the first metric; {} without a student.

    A row of which the rows beside it show the same as the student's own is compared like any other.
    """
    metric = evaluation.metrics[0]
    means = {row.system: row.means[metric] for row in evaluation.rows if row.means.get(metric) is not None}
    student = next((name for name in STUDENTS if name in means), None)
    found: dict[str, tuple[str, float, float]] = {}
    for name in reference_rows(list(means)) if student else []:
        ours, theirs = means[str(student)], means[name]
        try:
            tested = evaluation.significance.of(str(student), name, metric) if evaluation.significance else None
        except KeyError:
            tested = None
        if tested is None:
            kind = "below" if ours < theirs else "above" if ours > theirs else "alike"
        else:
            kind = "alike" if not tested.significant else "worse" if tested.difference < 0 else "better"
        found[name] = (kind, ours, theirs)
    return found


def verdict(evaluations: Sequence[Evaluation]) -> list[str]:
    """One sentence an outcome, the worst first; over several sets, on how many of them."""
    every = [outcomes(one) for one in evaluations]
    found = []
    for kind, words in WORDS.items():
        parts = []
        for name in dict.fromkeys(name for one in every for name in one):
            hits = [one[name] for one in every if name in one and one[name][0] == kind]
            if hits and len(every) == 1:
                parts.append(f"“{name}” ({hits[0][1]:.4f} against {hits[0][2]:.4f})")
            elif hits:
                parts.append(f"“{name}” (on {len(hits)} of {sum(name in one for one in every)} sets)")
        if parts:
            found.append(f"The student is {words} {', '.join(parts)}.")
    return found
