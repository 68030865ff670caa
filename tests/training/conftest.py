"""Scored lists over the facts, and a recipe that trains the tiny encoder on them in about a second."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists
    from rankdistill.training.dev import DevPool

DOCUMENTS = 12  # a list


def shared_words(query: str, text: str) -> float:
    """The teacher of these tests: words in common, each worth 2, and a fixed crumb a pair so that nothing is tied."""
    common = set(re.findall(r"\w+", query.lower())) & set(re.findall(r"\w+", text.lower()))
    return 2.0 * len(common) + zlib.crc32(f"{query}|{text}".encode()) / 2**32


def candidates_of(collection: Collection) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Each training query with its labelled document first, then eleven others."""
    everything = collection.doc_ids(range(collection.document_count))
    for number, (query_id, relevant) in enumerate(collection.qrels("train").items()):
        others = [everything[(number * 5 + step) % len(everything)] for step in range(len(everything))]
        doc_ids = [*relevant, *(doc_id for doc_id in others if doc_id not in relevant)][:DOCUMENTS]
        yield query_id, doc_ids, np.zeros(len(doc_ids), np.float32)


def _make_lists(collection: Collection, out: Path, shuffle: bool = False) -> ScoredLists:
    from rankdistill.scores.lists import build_lists

    random = np.random.default_rng(1)

    def scores_of(query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        query = collection.query_texts([query_id])[0]
        texts = collection.document_texts(collection.doc_rows(doc_ids))
        scores = np.array([shared_words(query, text) for text in texts], np.float32)
        return random.permutation(scores) if shuffle else scores

    return build_lists(candidates_of(collection), scores_of, collection, "train", out, inputs={"shuffle": str(shuffle)})


@pytest.fixture(scope="session")
def make_lists() -> Callable[..., ScoredLists]:
    """(collection, folder, shuffle) → scored lists; `shuffle` permutes the scores within each list."""
    return _make_lists


@pytest.fixture(scope="session")
def lists(tiny_collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> ScoredLists:
    return _make_lists(tiny_collection, tmp_path_factory.mktemp("scored") / "lists")


@pytest.fixture(scope="session")
def dev_pool(tiny_collection: Collection) -> DevPool:
    """The training queries themselves, so that a student that learns at all gets better on them."""
    from rankdistill.training.dev import DevPool

    query_ids = tiny_collection.query_ids("train")
    return DevPool.build(tiny_collection, "train", query_ids, [[] for _ in query_ids], 24, 42, "ndcg@10")


@pytest.fixture(scope="session")
def make_recipe(tiny_encoder: Path) -> Callable[..., Recipe]:
    """A recipe for the tiny encoder; keywords change keys of `training`, `student=` those of the student, dense
    with dot products unless it has a type."""
    from rankdistill.recipe import load_recipe

    def make(student: dict[str, Any] | None = None, seed: int = 42, **training: Any) -> Recipe:
        values = {
            "name": "facts",
            "seed": seed,
            "collection": "beir:facts",
            "student": {
                **({} if student and "type" in student else {"type": "dense", "similarity": "dot"}),
                "model": str(tiny_encoder),
                "document_length": 32,
                "precision": "fp32",
                **(student or {}),
            },
            "training": {
                "batches": {"type": "random_batches", "size": 4},
                "lists": {"type": "random_documents", "size": 4},
                "steps": 12,
                "checkpoints": 4,
                "learning_rate": 5e-3,
                "precision": "fp32",
                "log_every": 1,
                "device": "cpu",
                **training,
            },
        }
        return load_recipe(values)

    return make


@pytest.fixture(scope="session")
def train(
    lists: ScoredLists, tiny_collection: Collection, make_recipe: Callable[..., Recipe]
) -> Callable[..., Artifact]:
    """A training of `make_recipe`'s in a folder; `on=`, `dev=` and `agreement=` are of the training, the rest is the
    recipe's."""
    from rankdistill.training.trainer import train_student

    def run(
        out: Path, *, on: ScoredLists = lists, dev: DevPool | None = None, agreement: Any = None, **changes: Any
    ) -> Artifact:
        return train_student(make_recipe(**changes), on, tiny_collection, dev, out, agreement=agreement)

    return run
