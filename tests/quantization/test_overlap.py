"""Overlapping subspaces: what the index scores, how codes get better, what it is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from planted import Learned, Planted, learn, make_specification

OVERLAP: dict[str, Any] = {"overlap": 2, "steps": 40, "checkpoint_every": 15}


def test_the_index_scores_as_the_model_and_holds_no_more_bytes(tmp_path: Path, data: Planted) -> None:
    learn(tmp_path, data, **OVERLAP)
    index: Any = faiss.read_index(str(tmp_path / "index.faiss"))
    inner: Any = faiss.downcast_index(index.index)
    assert inner.code_size == 2  # 4 subspaces of 4 bits
    held = Learned.open(tmp_path, make_specification(**OVERLAP))
    model, codes = held.model, held.codes
    transform = model.query_transform().detach().numpy()
    assert transform.shape == (32, 16)
    decoded = model.decode(codes).detach()
    scores, rows = index.search(data.queries, 30)
    expected = data.queries @ transform.T @ decoded.numpy().T
    np.testing.assert_allclose(scores, np.take_along_axis(expected, rows, 1), atol=1e-4)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :30], atol=1e-4)
    # Folded back, a decoded vector gives the same score in the space of rotated vectors.
    asked = torch.from_numpy(data.queries) @ model.query_transform(folded=True).T
    folded = (asked @ model.fold(decoded).T).detach().numpy()
    np.testing.assert_allclose(folded, expected, atol=1e-4)


def test_turns_lower_the_error_and_each_turn_is_the_best_for_its_subspace(tmp_path: Path, data: Planted) -> None:
    learn(tmp_path, data, **OVERLAP)
    model = Learned.open(tmp_path, make_specification(**OVERLAP)).model
    rotated = torch.from_numpy(data.documents[:100]) @ model.rotation().T
    random = torch.randint(16, (100, 4), generator=torch.Generator().manual_seed(0))

    def error(chosen: torch.Tensor) -> torch.Tensor:
        return (rotated - model.fold(model.decode(chosen))).square().sum(dim=1).detach()

    once, twice = model.improve(rotated, random), model.improve(rotated, random, 2)
    assert (error(once) <= error(random) + 1e-5).all() and (error(twice) <= error(once) + 1e-5).all()
    # The last subspace was chosen with all others as they are now: no other codeword is nearer.
    for other in range(16):
        changed = once.clone()
        changed[:, -1] = other
        assert (error(once) <= error(changed) + 1e-5).all()


def test_it_keeps_more_of_the_ranking_than_disjoint_subspaces(tmp_path: Path, data: Planted) -> None:
    disjoint, overlapping = (
        learn(tmp_path / str(overlap), data, overlap=overlap, steps=200).manifest["agreement"]["end"]
        for overlap in (1, 4)
    )
    assert overlapping > disjoint + 0.03


def test_without_a_step_nothing_overlaps(tmp_path: Path, data: Planted) -> None:
    """It is FAISS's own index then: overlapping codebooks that have learned nothing hold nothing more."""
    index: Any = learn(tmp_path, data, overlap=4, steps=0).index
    assert faiss.downcast_index(index.index).d == 16
