"""rankdistill: turn an expensive ranker into a retriever that can be served.

Each verb of the command line is a function or class here, imported when it is first asked for: importing the package
imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankdistill.collections import open_collection as open_collection
    from rankdistill.collections.collection import Collection as Collection
    from rankdistill.errors import RankdistillError as RankdistillError
    from rankdistill.errors import UsageError as UsageError
    from rankdistill.evaluation.compare import compare as compare
    from rankdistill.evaluation.evaluate import evaluate_suite as evaluate_suite
    from rankdistill.evaluation.evaluate import evaluate_systems as evaluate_systems
    from rankdistill.evaluation.extrapolation import pool_folds as pool_folds
    from rankdistill.evaluation.fusion import fuse as fuse
    from rankdistill.evaluation.metrics import evaluate_run as evaluate_run
    from rankdistill.evaluation.report import report as report
    from rankdistill.indexes.building import build_index as build_index
    from rankdistill.indexes.building import merge_indexes as merge_indexes
    from rankdistill.indexes.dense import export_index as export_index
    from rankdistill.indexes.faiss_index import FaissIndex as FaissIndex
    from rankdistill.indexes.inspection import check_index as check_index
    from rankdistill.indexes.mining import mine as mine
    from rankdistill.recipe import load_recipe as load_recipe
    from rankdistill.runs import Run as Run
    from rankdistill.runs import read_run as read_run
    from rankdistill.scores.store import ScoreStore as ScoreStore
    from rankdistill.stages import Workspace as Workspace
    from rankdistill.teachers.recorded import import_scores as import_scores
    from rankdistill.teachers.scoring import score_candidates as score_candidates
    from rankdistill.training.trainer import train_student as train_student

__version__ = "0.1.0"

# Public name → its module.
_PUBLIC = {
    "Collection": "collections.collection",
    "FaissIndex": "indexes.faiss_index",
    "RankdistillError": "errors",
    "Run": "runs",
    "ScoreStore": "scores.store",
    "UsageError": "errors",
    "Workspace": "stages",
    "build_index": "indexes.building",
    "check_index": "indexes.inspection",
    "compare": "evaluation.compare",
    "evaluate_run": "evaluation.metrics",
    "evaluate_suite": "evaluation.evaluate",
    "evaluate_systems": "evaluation.evaluate",
    "export_index": "indexes.dense",
    "fuse": "evaluation.fusion",
    "import_scores": "teachers.recorded",
    "load_recipe": "recipe",
    "merge_indexes": "indexes.building",
    "mine": "indexes.mining",
    "open_collection": "collections",
    "pool_folds": "evaluation.extrapolation",
    "read_run": "runs",
    "report": "evaluation.report",
    "score_candidates": "teachers.scoring",
    "train_student": "training.trainer",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value  # the next look-up finds it at once
    return value


def __dir__() -> list[str]:
    return __all__
