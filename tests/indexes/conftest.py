"""Collections and encoders small enough to compute by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from rankdistill.collections import Collection

MakeCollection = Callable[..., "Collection"]


@pytest.fixture
def make_collection(tmp_path: Path) -> MakeCollection:
    """Texts (document ids d0, d1 …), queries (q0, q1 …) and qrels as a collection."""

    def make(
        texts: Sequence[str], queries: Sequence[str] = ("?",), qrels: Mapping[str, Mapping[str, int]] | None = None
    ) -> Collection:
        from rankdistill.collections import open_collection

        folder = tmp_path / "beir" / str(len(list(tmp_path.glob("beir/*"))))
        (folder / "qrels").mkdir(parents=True)
        for name, rows, letter in (("corpus", texts, "d"), ("queries", queries, "q")):
            lines = [json.dumps({"_id": f"{letter}{row}", "text": text}) for row, text in enumerate(rows)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        judged = qrels or {"q0": {"d0": 1}}
        lines = [f"{query}\t{doc}\t{grade}" for query, docs in judged.items() for doc, grade in docs.items()]
        (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
        return open_collection(f"beir:{folder}")

    return make


@pytest.fixture
def plain_pyserini(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`pyserini.search.lucene`, imported without a key."""
    from rankdistill.errors import RankdistillError
    from rankdistill.indexes.jvm import pyserini_module

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    try:
        return pyserini_module("pyserini.search.lucene")
    except RankdistillError as error:
        assert "fetches a list when it is imported" in error.what and "Python 3.11" in str(error.fix)
        pytest.skip(error.what)  # pyserini 2.4 without a network


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On such small data FAISS's threads only wait for each other."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


class WordEncoder:
    """A real, tiny encoder: a fixed random vector a word, summed and normalised; `log` counts what it encoded."""

    def __init__(self, dimension: int = 16, seed: int = 0) -> None:
        self.dimension, self.seed = dimension, seed
        self.similarity = "cos"
        self.fingerprint = f"words-{dimension}-{seed}"
        self.encoded = 0

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += len(texts)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                seed = int.from_bytes(word.encode()[:8], "little") + self.seed
                vectors[row] += np.random.default_rng(seed).normal(size=self.dimension)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    encode_queries = encode_documents = _encode


@pytest.fixture
def word_encoder() -> WordEncoder:
    return WordEncoder()
