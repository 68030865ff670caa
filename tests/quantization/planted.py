"""Vectors with a planted structure: queries look only at some directions, documents vary in all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from rankdistill.indexes.faiss_index import FaissIndex
    from rankdistill.indexes.specification import QuantizerSpecification
    from rankdistill.quantization.quantizer import VectorQuantizer


@dataclass
class Planted:
    documents: NDArray[np.float32]
    queries: NDArray[np.float32]


def planted(documents: int = 600, queries: int = 200, dimension: int = 16, seed: int = 0) -> Planted:
    """Documents in clusters along a quarter of the directions, loud noise along the others; queries near documents."""
    random = np.random.default_rng(seed)
    signal = dimension // 4
    turn = np.linalg.qr(random.normal(size=(dimension, dimension)))[0]
    centres = random.normal(size=(60, signal))
    held = np.hstack(
        [
            centres[random.integers(0, 60, documents)] + 0.5 * random.normal(size=(documents, signal)),
            2 * random.normal(size=(documents, dimension - signal)),
        ]
    )
    asked = held[random.integers(0, documents, queries)].copy()
    asked[:, :signal] += 0.3 * random.normal(size=(queries, signal))
    asked[:, signal:] = 0.1 * random.normal(size=(queries, dimension - signal))
    return Planted((held @ turn).astype(np.float32), (asked @ turn).astype(np.float32))


def make_specification(**changes: Any) -> QuantizerSpecification:
    """A small one: 4 codes of 4 bits a document, a few steps; `documents` and `queries` are merged in."""
    from rankdistill.indexes.specification import QuantizerSpecification, any_specification

    values: dict[str, Any] = {
        "type": "distill_vq",
        "name": "small",
        "subspaces": 4,
        "bits": 4,
        "steps": 6,
        "batch": 16,
        "held_out": 40,
        "reassign_every": 3,
    }
    values["documents"] = {"top": 20, "random": 100, **changes.pop("documents", {})}
    values["queries"] = {"pseudo": 0, "documents": 0, **changes.pop("queries", {})}
    made = any_specification({**values, **changes})
    assert isinstance(made, QuantizerSpecification)
    return made


def learn(folder: Path, data: Planted, asked: Any = None, similarity: Any = None, **changes: Any) -> FaissIndex:
    """`quantize` over planted vectors, into folder/index.faiss."""
    from rankdistill.quantization.batches import Queries
    from rankdistill.quantization.quantize import quantize

    folder.mkdir(parents=True, exist_ok=True)
    names = map(str, range(len(data.documents)))
    asked = asked if asked is not None else Queries(given=data.queries)
    specification = make_specification(**changes)
    return quantize(data.documents, names, asked, specification, folder / "index.faiss", similarity=similarity)


@dataclass
class Learned:
    """What `learn` left on disk, as a torch model."""

    model: VectorQuantizer
    codes: Tensor
    lists: Tensor | None
    log: list[dict[str, Any]]

    @classmethod
    def open(cls, folder: Path, specification: QuantizerSpecification) -> Learned:
        import torch
        from safetensors.torch import load_file

        from rankdistill.indexes.faiss_assembly import IndexParts
        from rankdistill.quantization.quantizer import VectorQuantizer

        held = folder / "index.faiss.quantizer"
        tensors = load_file(held / "quantizer.safetensors")
        wide = specification.overlap if "columns" in tensors else 1
        parts = IndexParts(
            tensors["rotation0"].numpy(),
            tensors["centroids.weight"].numpy() if "centroids.weight" in tensors else None,
            tensors["codebooks"][:, :, : tensors["codebooks"].shape[2] // wide].numpy(),
            specification.metric,
            specification.residual,
            specification.fast_scan,
        )
        learned = {"learn_rotation": "skew" in tensors, "learn_query_map": "query_map" in tensors}
        model = VectorQuantizer(parts, **learned, overlap=wide)
        model.load_state_dict(tensors)
        lists = torch.from_numpy(np.load(held / "lists.npy")) if (held / "lists.npy").is_file() else None
        codes = torch.from_numpy(np.load(held / "codes.npy").astype(np.int64))
        log = held / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        return cls(model.eval(), codes, lists, [json.loads(line) for line in lines])

    def decoded(self) -> Tensor:
        """[n, d], what the stored codes stand for."""
        vectors = self.model.decode(self.codes)
        if self.model.by_residual and self.lists is not None and self.model.centroids is not None:
            vectors = vectors + self.model.centroids(self.lists)
        return vectors.detach()

    def scores(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """[queries, n], of every document."""
        import torch

        with torch.no_grad():
            asked = torch.from_numpy(queries) @ self.model.query_transform().T
            return self.model.score(asked, self.decoded()).numpy()
