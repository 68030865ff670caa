"""Suites: what is evaluated, on which sets, with which metrics; and where each set is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator, model_validator

from rankdistill.collections import Collection, open_collection
from rankdistill.collections.collection import GENERATED, GENERATED_DEV, GENERATED_TEST
from rankdistill.collections.text_files import plain_or_gzip
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.fusion import FusedRow
from rankdistill.evaluation.metrics import DEFAULT_METRICS, parse_metric
from rankdistill.plain import Name, Section, read_yaml
from rankdistill.recipe import check_values, declarations, find_declaration

FOLDER = "eval/suites"
REFERENCE_FOLDER = "eval/reference"
OWN = "own"
SYNTHETIC = (GENERATED_TEST, GENERATED_DEV, GENERATED)

M = TypeVar("M", bound=Section)
SystemKind = Literal[
    "bm25", "lucene_bm25", "sources", "encoder", "untrained", "baselines", "student", "teacher", "indexes"
]


class EvaluationSet(Section):
    """One set of a suite."""

    name: Name = Field(description="How tables call it; a local folder of this name is used before `collection`.")
    collection: str = Field(OWN, description="A collection, or `own`: the one the run was trained on.")
    split: str | None = Field(None, description="Default: test, or the only split with judgments.")
    relevance_level: int = Field(1, ge=1, description="Least judgment that counts in binary metrics (TREC DL: 2).")
    drop_self_hits: bool = Field(False, description="Leave out documents whose id is the query's (ArguAna).")
    group: str | None = Field(None, description="Sets of one group count as one in the macro average (CQADupStack).")


class Suite(Section):
    """What to evaluate."""

    name: Name
    description: str = ""
    sets: list[EvaluationSet] = Field(min_length=1)
    metrics: list[str] = Field(list(DEFAULT_METRICS), min_length=1)
    depth: int = Field(1000, ge=1, description="Documents retrieved for each query.")
    systems: list[SystemKind] = Field(
        ["bm25", "sources", "encoder", "untrained", "baselines", "student", "teacher", "indexes"],
        description="Rows of the table, those of them that the run has.",
    )
    rerank_depth: int = Field(100, ge=1, description="First-stage documents that are re-ranked.")
    first_stage_weight: float = Field(
        0.0, ge=0, description="Times this, the first source's score is added to the teacher's or a re-ranker's."
    )
    rerank: bool = Field(
        False, description="Students and the teacher also re-rank BM25's first documents, in rows of their own."
    )
    fusion: list[FusedRow] = Field([], description="Rows made of others by fusion, those whose members the run has.")
    baseline: str | None = Field(
        None, description="The row that marks of significance refer to; default BM25, else the first."
    )
    correction: Literal["holm", "tukey", "tukey_hsd"] = Field("holm", description="Of p-values, for many systems.")
    alpha: float = Field(0.05, gt=0, lt=1, description="What corrected p-values are held against.")
    latency_queries: int = Field(
        100, ge=0, description="Queries whose latency is measured one by one, seconds a system; 0 measures none."
    )

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: list[str]) -> list[str]:
        for metric in metrics:
            parse_metric(metric)
        return metrics

    @model_validator(mode="after")
    def _named_once(self) -> Suite:
        if len({folder_name(entry.name).lower() for entry in self.sets}) < len(self.sets):
            raise ValueError("two sets have the same name, or names that differ in signs alone")
        if len({row.name for row in self.fusion}) < len(self.fusion):
            raise ValueError("two fused rows have the same name")
        return self

    def __repr__(self) -> str:
        return f"Suite({self.name}: {', '.join(entry.name for entry in self.sets)}; {', '.join(self.metrics)})"

    __str__ = __repr__


class ReferenceFigure(Section):
    """Published figures of one system."""

    system: str
    metrics: dict[str, float | tuple[float, float]] = Field(description="A figure, or the least and greatest reported.")
    source: str = Field(min_length=1)
    note: str = ""


class Reference(Section):
    """Published figures on one set; printed beside measured ones and marked, never mixed with them."""

    set: str = Field(description="The name of the set in suites, or `macro:NAME` for an average.")
    title: str = ""
    figures: list[ReferenceFigure] = Field(min_length=1)


def folder_name(name: str) -> str:
    """What the files of a set or a system are called: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.+-]+", "-", name)


def load_suite(source: str | Path) -> Suite:
    """A suite by path or shipped name."""
    path = find_declaration(FOLDER, str(source))
    return _validated(Suite, read_yaml(path), path)


def load_references(set_name: str) -> list[ReferenceFigure]:
    """Published figures for a set: [] when there are none."""
    figures: list[ReferenceFigure] = []
    for path in sorted(declarations(REFERENCE_FOLDER).glob("*.yaml")):
        reference = _validated(Reference, read_yaml(path), path)
        if reference.set == set_name:
            figures += reference.figures
    return figures


def _validated(model: type[M], values: Any, path: Path) -> M:
    try:
        return check_values(model, values, str(path))
    except UsageError as error:  # a metric of another name has no place of its own
        where = f"{path}: metrics" if (error.where or "").startswith("metrics") else error.where
        raise UsageError(error.what, where=where, fix=error.fix) from None


def set_title(name: str, split: str) -> str:
    """What a set is called wherever figures of it stand."""
    return f"{name}: synthetic queries, one document each counts as relevant" if split in SYNTHETIC else name


class Found(NamedTuple):
    """A set that can be evaluated."""

    collection: Collection
    split: str


class Missing(NamedTuple):
    """A set that could not be evaluated, and why; `unjudged`: it is the run's own, and lacks the judgments."""

    reason: str
    unjudged: bool = False


def locate(
    entry: EvaluationSet,
    *,
    own: Collection | None = None,
    local: Path | None = None,
    fetch: bool = True,
    opener: Callable[[str], Any] = open_collection,
) -> Found | Missing:
    """Find a set: a folder of its name below `local` (in BEIR or MS MARCO layout, or a clone of a data set of the hub),
    the run's `own` collection (for `collection: own`, and for a set of its name or specification), then the declared
    one, which may have to be downloaded unless `fetch` is off. `opener` opens a specification."""
    folder = local / entry.name if local is not None else None
    layouts = {
        "beir": folder is not None and plain_or_gzip(folder, "corpus.jsonl"),
        "msmarco": folder is not None and plain_or_gzip(folder, "collection.tsv"),
        "hf": folder is not None
        and any(path for place in ("corpus*", "corpus/*") for path in folder.glob(f"{place}.parquet")),
    }
    kind = next((kind for kind, there in layouts.items() if there), None)
    candidate: Any = None
    try:
        if kind is not None:
            candidate = opener(f"{kind}:{folder}")
        elif own is not None and (entry.collection in (OWN, own.spec) or entry.name == own.name):
            candidate = own
        elif entry.collection == OWN:
            return Missing("the run names no collection of its own")
        elif not fetch and not entry.collection.startswith(("beir:", "msmarco:", "python-docs")):
            where = f"there is no folder {folder}" if folder is not None else "no folder of local sets was given"
            return Missing(f"{where}, and fetching is off")
        else:
            candidate = opener(entry.collection)
    except (RankdistillError, OSError) as error:
        return Missing(error.what if isinstance(error, RankdistillError) else str(error))
    splits, is_own = candidate.splits, own is not None and candidate is own
    split = entry.split or ("test" if "test" in splits or len(splits) != 1 else splits[0])
    if is_own and split not in splits and GENERATED_TEST in splits:
        split = GENERATED_TEST
    if split in splits:
        return Found(candidate, split)
    reason = f"has no judgments for the split {split!r} (it has {', '.join(splits)})"
    if not splits:
        reason = "has no judgments to measure with: write some, or let `rankdistill generate` make queries"
    return Missing(f"{candidate.spec} {reason}", is_own)
