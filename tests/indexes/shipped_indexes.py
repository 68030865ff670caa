from __future__ import annotations

from rankdistill.indexes.specification import IndexSpecification, any_specification
from rankdistill.recipe import shipped


def shipped_specifications() -> dict[str, IndexSpecification]:
    """The shipped ones that are built; the learned ones are made by `rankdistill quantize`."""
    every = {name: any_specification(path) for name, path in shipped("indexes").items()}
    return {name: built for name, built in every.items() if isinstance(built, IndexSpecification)}
