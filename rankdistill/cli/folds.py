"""The verb `folds`: a recipe trained once for each part of the queries that is held out, and pooled per query."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rankdistill.errors import UsageError
from rankdistill.evaluation.extrapolation import Extrapolation, pool_folds
from rankdistill.progress import say
from rankdistill.recipe import HoldOut, Recipe, check_recipe, merge
from rankdistill.stages import Workspace

Protocol = Literal["clusters", "similarity"]


def fold_recipes(recipe: Recipe, protocol: Protocol = "clusters", buckets: int = 5) -> Iterator[tuple[str, Recipe]]:
    """(name, recipe) of each fold: one for each bucket, or one `far` from the test queries and one `near` them.

    Other settings of the recipe's own `candidates.hold_out` (bound, encoder) stay.
    """
    settings = (recipe.candidates.hold_out or HoldOut()).model_dump() | {"protocol": protocol, "bucket": 0}
    folds: list[dict[str, Any]] = [{"keep": "far"}, {"keep": "near"}]
    if protocol == "clusters":
        folds = [{"buckets": buckets, "bucket": bucket} for bucket in range(buckets)]
    for fold in folds:
        name = fold.get("keep", f"bucket-{fold.get('bucket')}")
        changed = merge(recipe.resolved(), {"candidates": {"hold_out": {**settings, **fold}}})
        yield name, check_recipe(changed, f"fold {name}")


def run_folds(
    recipe: Recipe,
    out: Path,
    store: Path | None = None,
    *,
    protocol: Protocol = "clusters",
    buckets: int = 5,
) -> tuple[Extrapolation, str]:
    """Run every fold in a folder of its own below `out`; what is finished is not run again.

    A teacher that is trained in the run is trained in each fold, or it would have seen what is held out.

    Returns:
        The pooled figures, which are written to `out`, and the name of the set.

    Raises:
        UsageError: the recipe measures no extrapolation.
    """
    if recipe.evaluation.extrapolation is None:
        raise UsageError("the recipe measures no extrapolation", where="evaluation.extrapolation", fix="remove `null`")
    folders, sets = [], []
    for name, fold in fold_recipes(recipe, protocol, buckets):
        say(f"fold {name}")
        result = Workspace(out / name, fold, store).run()
        assert result is not None
        measured = [one for one in result.sets if one.extrapolation is not None and one.path is not None]
        if not measured:
            raise UsageError(
                "the suite does not hold the collection that is trained on",
                where=f"evaluation.suite: {recipe.evaluation.suite}",
                fix="evaluation.suite: collection",
            )
        folders.append(measured[0].path)
        sets.append(measured[0].name)
    pooled = pool_folds([folder for folder in folders if folder is not None])
    pooled.write(out)
    return pooled, sets[0]
