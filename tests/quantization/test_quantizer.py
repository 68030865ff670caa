"""The quantiser as a torch module: its gradients, its rotation, its codes, against definitions and other libraries."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from rankdistill.indexes.faiss_assembly import IndexParts
from rankdistill.quantization.quantizer import VectorQuantizer, encode, uniform_codes

SUBSPACES, CODEWORDS, WIDTH, LISTS, COUNT = 3, 16, 4, 5, 60
INSIDE = SUBSPACES * WIDTH


def random_parts(
    metric: Any = "inner_product",
    lists: bool = False,
    residual: bool = True,
    codewords: int = CODEWORDS,
    rotated: bool = True,
    seed: int = 0,
) -> IndexParts:
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(INSIDE, INSIDE)))[0].astype(np.float32)
    return IndexParts(
        rotation if rotated else None,
        random.normal(size=(LISTS, INSIDE)).astype(np.float32) if lists else None,
        random.normal(size=(SUBSPACES, codewords, WIDTH)).astype(np.float32),
        metric,
        residual,
    )


def random_vectors(count: int = COUNT, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, INSIDE)).astype(np.float32)


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize(("lists", "residual"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("codewords", [16, 256])
def test_codes_and_decoded_vectors_follow_the_formulas(
    metric: Any, lists: bool, residual: bool, codewords: int
) -> None:
    """Against loops over the formulas in double precision; and the module and `encode` agree."""
    held, vectors = random_parts(metric, lists, residual, codewords), random_vectors()
    model = VectorQuantizer(held)
    assert held.rotation is not None
    u = vectors.astype(np.float64) @ held.rotation.T.astype(np.float64)
    rest = u.copy()
    chosen = None
    if held.centroids is not None:
        o = held.centroids.astype(np.float64)
        near = u @ o.T if metric == "inner_product" else -((u[:, None] - o) ** 2).sum(axis=2)
        chosen = near.argmax(axis=1)
        rest = u - o[chosen] if residual else u
    parts = rest.reshape(COUNT, SUBSPACES, 1, WIDTH)
    codes = ((parts - held.codebooks[None]) ** 2).sum(axis=3).argmin(axis=2)
    decoded = np.hstack([held.codebooks[m][codes[:, m]] for m in range(SUBSPACES)])
    if held.centroids is not None and residual:
        decoded = decoded + held.centroids[chosen]

    found_lists, found = encode(vectors, held)
    rotated = torch.from_numpy(vectors) @ model.rotation().T
    if chosen is not None:
        np.testing.assert_array_equal(found_lists, chosen)
    np.testing.assert_array_equal(found, codes)
    given = None if chosen is None else torch.from_numpy(chosen)
    out, out_codes = model(rotated, given)
    np.testing.assert_array_equal(out_codes.numpy(), codes)
    np.testing.assert_allclose(out.detach().numpy(), decoded, atol=1e-5)
    queries = random_vectors(4, seed=9)
    expected = queries @ decoded.T if metric == "inner_product" else -((queries[:, None] - decoded) ** 2).sum(axis=2)
    np.testing.assert_allclose(model.score(torch.from_numpy(queries), out).detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_many_vectors_are_faisss_own(bits: int) -> None:
    """In several blocks, and where codewords are so wide that FAISS takes another way."""
    random = np.random.default_rng(3)
    vectors = random.normal(size=(4096 + 77, 40)).astype(np.float32)
    index = faiss.IndexPQ(40, 2, bits)
    index.pq.cp.niter = 3
    index.train(vectors[:600])
    books = faiss.vector_to_array(index.pq.centroids).reshape(2, 1 << bits, 20)
    _, codes = encode(vectors, IndexParts(None, None, books, "l2", False))
    packed = index.pq.compute_codes(vectors)
    theirs = packed if bits == 8 else np.stack([packed[:, 0] & 15, packed[:, 0] >> 4], axis=1)
    np.testing.assert_array_equal(codes, theirs)


@pytest.mark.parametrize("lists", [False, True])
def test_straight_through_gradients_are_those_of_the_smoothed_choice(lists: bool) -> None:
    """Finite differences in double precision of g(C) = Σ_k (onehot_k + p_k(C) - p_k(C0)) · (C_k or C0_k):

    the chosen codewords move with the choice held, and the choice moves with the codewords held.
    """
    model = VectorQuantizer(random_parts(lists=lists), softness=0.7).double()
    rotated = torch.from_numpy(random_vectors(7)).double() @ model.rotation0.T
    centroids: Any = model.centroids
    given = model.score(rotated, centroids.weight).argmax(dim=1) if lists else None
    target = torch.from_numpy(random_vectors(7, seed=5)).double()

    def loss_of(decoded: Tensor) -> Tensor:
        return (decoded * target).sum() + decoded.square().sum()

    decoded, codes = model(rotated, given)
    rest = model.residuals(rotated, given)[0].detach()
    torch.testing.assert_close(decoded - (0 if not lists else centroids(given)), model.decode(codes))
    loss_of(decoded).backward()
    gradient = model.codebooks.grad
    assert gradient is not None

    start = model.codebooks.detach().clone()
    square = (rest.transpose(0, 1)[:, :, None] - start[:, None]).square().sum(dim=3)  # [M, n, K]
    scale = 0.7 * square.min(dim=2).values.mean()
    base = torch.zeros(()) if not lists else centroids(given).detach()

    def p_of(books: Tensor) -> Tensor:
        return (-(rest.transpose(0, 1)[:, :, None] - books[:, None]).square().sum(dim=3) / scale).softmax(dim=2)

    p0, onehot = p_of(start), torch.nn.functional.one_hot(codes.T, CODEWORDS).double()

    def smoothed(books: Tensor) -> float:
        hard = torch.einsum("mnk,mkd->nmd", onehot, books)
        soft = torch.einsum("mnk,mkd->nmd", p_of(books) - p0, start)
        return float(loss_of((hard + soft).flatten(1) + base))

    random = np.random.default_rng(0)
    step = 1e-6
    places = {(m, int(codes[0, m]), 1) for m in range(SUBSPACES)}  # chosen ones, and others
    places |= {
        (int(random.integers(SUBSPACES)), int(random.integers(CODEWORDS)), int(random.integers(WIDTH)))
        for _ in range(40)
    }
    for place in places:
        up, down = start.clone(), start.clone()
        up[place] += step
        down[place] -= step
        expected = (smoothed(up) - smoothed(down)) / (2 * step)
        assert float(gradient[place]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # Without the soft choice, codewords that nobody chose learn nothing; with it, all do.
    unused = torch.ones(SUBSPACES, CODEWORDS, dtype=torch.bool)
    for m in range(SUBSPACES):
        unused[m, codes[:, m]] = False
    assert unused.any() and gradient[unused].abs().sum() > 0
    plain = VectorQuantizer(random_parts(lists=lists)).double()
    loss_of(plain(rotated, given)[0]).backward()
    assert plain.codebooks.grad is not None and not plain.codebooks.grad[unused].any()


def test_a_learned_rotation_stays_orthogonal() -> None:
    model = VectorQuantizer(random_parts(), learn_rotation=True)
    torch.testing.assert_close(model.rotation(), model.rotation0)  # from where it starts
    assert model.skew is not None
    vectors, target = torch.from_numpy(random_vectors(64)), torch.from_numpy(random_vectors(64, seed=8))
    optimiser = torch.optim.Adam([model.skew], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (vectors @ model.rotation().T - target @ model.rotation0.T.roll(1, 0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05 and model.skew.abs().max() > 0.5  # it has gone far
    rotation = model.rotation().detach()
    assert (rotation @ rotation.T - torch.eye(INSIDE)).abs().max() < 1e-5


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_a_step_touches_only_the_lists_of_its_documents(metric: Any) -> None:
    model = VectorQuantizer(random_parts(metric, lists=True), softness=0.1)
    assert model.centroids is not None
    rotated, lists = torch.from_numpy(random_vectors(6)), torch.tensor([0, 0, 3, 3, 3, 0])
    decoded, _ = model(rotated, lists)
    queries = torch.from_numpy(random_vectors(4, seed=2))
    (model.score(queries, decoded).square().mean() + model.score(queries, model.centroids(lists)).mean()).backward()
    gradient = model.centroids.weight.grad
    assert gradient is not None and gradient.is_sparse
    assert gradient.coalesce().indices().tolist() == [[0, 3]]
    before = model.centroids.weight.detach().clone()
    torch.optim.SparseAdam([model.centroids.weight], lr=0.1).step()
    moved = (model.centroids.weight.detach() - before).abs().sum(dim=1) > 0
    assert moved.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("count", [64, 40, 10])  # also more codewords than vectors
def test_uniform_codes_are_those_of_optimal_transport(count: int) -> None:
    """Against a plan of uniform marginals made without logarithms; codes are spread more evenly than the nearest."""
    random = np.random.default_rng(count)
    # Most vectors are nearest to a few codewords.
    vectors, books = random.normal(size=(count, 4)), random.normal(size=(16, 4)) * np.linspace(0.2, 3, 16)[:, None]
    distances = ((vectors[:, None] - books) ** 2).sum(axis=2)
    strength = 0.2
    cost = distances - distances.min(axis=1, keepdims=True)
    plan = np.exp(-cost / (strength * cost.mean()))
    for _ in range(5_000):  # Sinkhorn & Knopp's own way: rows, columns, rows ...
        plan /= plan.sum(axis=1, keepdims=True) * count
        plan /= plan.sum(axis=0, keepdims=True) * 16
    np.testing.assert_allclose(plan.sum(axis=1), 1 / count, atol=1e-9)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / 16, atol=1e-9)
    codes = uniform_codes(torch.from_numpy(distances)[None], strength=strength, iterations=2000)[:, 0].numpy()
    np.testing.assert_array_equal(codes, plan.argmax(axis=1))
    greatest = [np.bincount(one, minlength=16).max() for one in (codes, distances.argmin(axis=1))]
    assert greatest[0] < greatest[1]


def test_uniform_codes_of_several_subspaces_are_those_of_each() -> None:
    distances = torch.from_numpy(np.random.default_rng(1).exponential(size=(3, 50, 16)))
    together = uniform_codes(distances)
    assert together.shape == (50, 3)
    for m in range(3):
        torch.testing.assert_close(together[:, m], uniform_codes(distances[m : m + 1])[:, 0])
    # Where nothing pulls a vector anywhere, the nearest codeword is what is left.
    nearly = torch.zeros(1, 16, 16)
    nearly[0] = 1 - torch.eye(16)
    assert uniform_codes(nearly)[:, 0].tolist() == list(range(16))
