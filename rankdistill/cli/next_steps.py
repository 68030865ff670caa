"""What a run prints when it is done: one table, and five things to do next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankdistill.evaluation.results import SuiteEvaluation

STEPS = (
    ("rankdistill report {run}", "all figures, queries and documents on one page"),
    ('rankdistill search {run} "..."', "search with the student"),
    ("rankdistill serve {run} --open", "the same beside BM25 and the teacher, in a browser"),
    ("rankdistill recipes copy {recipe} mine.yaml", "then set its `collection` to texts of your own"),
    ("{run}/student/model", "the student, for sentence-transformers: SentenceTransformer(...)"),
)


def show_run(result: SuiteEvaluation, run: Path, recipe: str) -> None:
    """The tables of quality and what to do next; the rest is in the report."""
    from rankdistill.evaluation.results import print_tables, tables

    print_tables(tables(result, short=True))
    steps = [(command.format(run=run, recipe=recipe), purpose) for command, purpose in STEPS]
    width = max(len(command) for command, _ in steps)
    print("\n".join(["", *(f"{command:{width}}  {purpose}" for command, purpose in steps)]))
