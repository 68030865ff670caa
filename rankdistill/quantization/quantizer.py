"""The quantiser as a torch module: rotation, lists, codebooks, and how a vector becomes codes and comes back.

With u = R v and o the centroid of the vector's list (none without lists, or when codes do not hold residuals):
    codes    k_m = argmin_k ||(u - o)_m - C[m, k]||^2
    decoded  v^ = o + (C[1, k_1] | ... | C[M, k_M])
    score    <R W q, v^>, or -||R q - v^||^2
With `overlap` k the subspaces are k times as wide and share dimensions with their neighbours: codewords add up where
they meet, the space inside has k · d dimensions, A (R's rows, k times each) stands for R, and codes are chosen in turn.
W, the query map, is the identity unless it is trained. Distill-VQ: Xiao et al. 2022, arXiv:2204.00185.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankdistill.indexes.faiss_assembly import IndexParts, Metric, unpack_codes
from rankdistill.indexes.faiss_index import faiss_metric

DISTANCES_AT_ONCE = 1 << 25  # numbers in one block of distances to codewords
CODES_AT_ONCE = 4096  # vectors: FAISS holds all their distances to all codewords where a codeword is 16 wide or more


class VectorQuantizer(nn.Module):
    """Product quantisation with gradients: codebooks always, centroids, rotation and query map if asked for.

    Args:
        parts: what to start from; its codes are not read.
        learn_rotation: R = cayley(S) R_0 with S skew-symmetric, so that R stays orthogonal.
        learn_query_map: W, [d, d], from the identity; inner product only.
        softness: temperature of straight-through gradients to all codewords, in units of the mean squared distance to
            the nearest one; without it only the chosen codewords learn.
        overlap: how many times wider than d/M the subspaces are.
    """

    rotation0: Tensor
    columns: Tensor | None  # [M, width], the dimensions of each subspace, where they overlap

    def __init__(
        self,
        parts: IndexParts,
        *,
        learn_rotation: bool = False,
        learn_query_map: bool = False,
        softness: float | None = None,
        overlap: int = 1,
    ) -> None:
        super().__init__()
        subspaces, self.codewords, self.width = parts.codebooks.shape
        self.metric: Metric = parts.metric
        self.by_residual = parts.by_residual and parts.centroids is not None
        self.softness = softness
        inside = subspaces * self.width
        rotation = parts.rotation if parts.rotation is not None else np.eye(inside, dtype=np.float32)
        self.register_buffer("rotation0", torch.from_numpy(np.array(rotation, np.float32)))
        codebooks = torch.from_numpy(np.array(parts.codebooks, np.float32))
        columns = None
        if overlap > 1:
            own = torch.arange(subspaces)[:, None] * self.width
            columns = (own + torch.arange(overlap * self.width)) % inside
            # What is added starts at zero: the same decoded vectors as without it.
            codebooks = nn.functional.pad(codebooks, (0, (overlap - 1) * self.width))
            self.width *= overlap
        self.register_buffer("columns", columns)
        self.codebooks = nn.Parameter(codebooks)
        self.skew = nn.Parameter(torch.zeros(inside, inside)) if learn_rotation else None
        self.query_map = nn.Parameter(torch.eye(rotation.shape[1])) if learn_query_map else None
        self.centroids: nn.Embedding | None = None
        if parts.centroids is not None:
            # Sparse gradients: a step touches the lists of its documents, however many there are.
            start = torch.from_numpy(np.array(parts.centroids, np.float32))
            self.centroids = nn.Embedding.from_pretrained(start, freeze=False, sparse=True)

    @property
    def subspaces(self) -> int:
        return int(self.codebooks.shape[0])

    def rotation(self) -> Tensor:
        """R [d, dimension], orthogonal if it was at the start."""
        return query_transform(self.rotation0, self.skew)

    def query_transform(self, folded: bool = False) -> Tensor:
        """R W [d, dimension], or A W [overlap · d, dimension]: what a query is multiplied by.

        Args:
            folded: R W in any case, which goes with folded decoded vectors.
        """
        return query_transform(self.rotation0, self.skew, self.query_map, None if folded else self.columns)

    def fold(self, decoded: Tensor) -> Tensor:
        """Decoded vectors [n, overlap · d] in the space of rotated ones [n, d]: codewords that meet add up."""
        if self.columns is None:
            return decoded
        return decoded.new_zeros(len(decoded), self.rotation0.shape[0]).index_add(1, self.columns.flatten(), decoded)

    @torch.no_grad()
    def improve(self, rotated: Tensor, codes: Tensor, sweeps: int = 1) -> Tensor:
        """Codes [n, M] of overlapping subspaces made better, one subspace after the other, the others held (iterated
        conditional modes, as additive quantisers are encoded: Babenko and Lempitsky 2014).
        """
        assert self.columns is not None
        codes = codes.clone()
        left = rotated - self.fold(self.decode(codes))
        for _ in range(sweeps):
            for number, columns in enumerate(self.columns):
                book = self.codebooks[number]
                target = left[:, columns] + book[codes[:, number]]
                codes[:, number] = (book.square().sum(dim=1) - 2 * target @ book.T).argmin(dim=1)
                left[:, columns] = target - book[codes[:, number]]
        return codes

    def residuals(self, rotated: Tensor, lists: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the codes describe [n, M, d/M], and the centroids to add to it [n, d], if any."""
        base = self.centroids(lists) if self.centroids is not None and lists is not None else None
        rest = rotated if base is None or not self.by_residual else rotated - base
        return rest.view(len(rest), self.subspaces, self.width), base

    def distances(self, rest: Tensor) -> Tensor:
        """Squared distances to the codewords, less each vector's own square: [M, n, codewords]."""
        vectors = rest.transpose(0, 1)
        return self.codebooks.square().sum(dim=2)[:, None] - 2 * vectors @ self.codebooks.transpose(1, 2)

    @torch.no_grad()
    def nearest(self, rest: Tensor) -> Tensor:
        """Codeword numbers [n, M] of vectors [n, M, d/M]."""
        rows = max(1, DISTANCES_AT_ONCE // (self.subspaces * self.codewords))
        return torch.cat([self.distances(part).argmin(dim=2).T for part in rest.split(rows)])

    def decode(self, codes: Tensor) -> Tensor:
        """[n, M] codeword numbers → [n, d]."""
        offsets = torch.arange(self.subspaces, device=codes.device) * self.codewords
        chosen = nn.functional.embedding(codes + offsets, self.codebooks.flatten(0, 1))
        return chosen.flatten(1)

    def decode_straight_through(self, rest: Tensor, codes: Tensor) -> Tensor:
        """The chosen codewords, with gradients as if the choice had been soft (Bengio et al. 2013; Distill-VQ, eq. 9).

        Forward: exactly `decode(codes)`. Backward: the chosen codewords get the gradient of the choice, and all
        codewords that of p = softmax(-distance / softness) times themselves.
        """
        chosen = self.decode(codes)
        if self.softness is None:
            return chosen
        distances = self.distances(rest)
        own = rest.detach().square().sum(dim=2).T
        nearest = distances.detach().gather(2, codes.T[:, :, None])[:, :, 0] + own
        scale = self.softness * nearest.mean().clamp(min=1e-12)
        p = (-distances / scale).softmax(dim=2)
        soft = torch.einsum("mnk,mkd->nmd", p, self.codebooks.detach()).flatten(1)
        return chosen + (soft - soft.detach())

    def forward(self, rotated: Tensor, lists: Tensor | None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decoded vectors [n, d] of rotated ones, and their codes [n, M] (found unless given)."""
        if self.columns is not None:
            assert codes is not None, "overlapping subspaces have no nearest codes"
            return self.decode(codes), codes
        rest, base = self.residuals(rotated, lists)
        chosen = self.nearest(rest) if codes is None else codes
        decoded = self.decode(chosen) if codes is not None else self.decode_straight_through(rest, chosen)
        return (decoded + base if base is not None and self.by_residual else decoded), chosen

    def score(self, queries: Tensor, decoded: Tensor) -> Tensor:
        """[queries, documents] as the index scores them (l2: minus the squared distance); queries transformed."""
        return similarity(queries, decoded, self.metric)

    def encode(self, vectors: NDArray[np.float32], by_residual: bool | None = None) -> tuple[Any, NDArray[np.uint8]]:
        """Lists and codes of vectors [n, dimension], as the parts are now; see `encode`."""
        parts = self.parts()
        return encode(vectors, parts if by_residual is None else replace(parts, by_residual=by_residual))

    @torch.no_grad()
    def parts(self) -> IndexParts:
        centroids = None if self.centroids is None else self.centroids.weight.detach().cpu().numpy().copy()
        rotation, codebooks = (part.detach().cpu().numpy().copy() for part in (self.rotation(), self.codebooks))
        return IndexParts(rotation, centroids, codebooks, self.metric, self.by_residual)


def query_transform(
    rotation0: Tensor, skew: Tensor | None, query_map: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """R W of a quantiser's tensors, A W with columns; R alone without a query map."""
    transform = rotation0
    if skew is not None:
        half = (skew - skew.T) / 2
        one = torch.eye(len(half), dtype=half.dtype, device=half.device)
        transform = torch.linalg.solve(one + half, one - half) @ transform
    if query_map is not None:
        transform = transform @ query_map
    return transform if columns is None else transform[columns.flatten()]


def similarity(queries: Tensor, documents: Tensor, metric: Metric) -> Tensor:
    """[queries, documents]: inner products, or minus squared distances."""
    products = queries @ documents.T
    if metric == "inner_product":
        return products
    return 2 * products - documents.square().sum(dim=1) - queries.square().sum(dim=1, keepdim=True)


@torch.no_grad()
def uniform_codes(distances: Tensor, strength: float = 0.05, iterations: int = 50) -> Tensor:
    """Codes [n, M] under the constraint that a batch uses each codeword alike (RepCONC, Zhan et al. 2022).

    Sinkhorn's iterations on exp(-distance / (strength · mean distance)) give the plan with uniform marginals; each
    vector takes its greatest entry.

    Args:
        distances: [M, n, codewords].
    """
    spread = distances - distances.min(dim=2, keepdim=True).values
    logits = -spread / (strength * spread.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12))
    codewords = torch.zeros(distances.shape[0], 1, distances.shape[2], dtype=distances.dtype, device=distances.device)
    share = np.log(distances.shape[1] / distances.shape[2])
    for _ in range(iterations):
        vectors = -(logits + codewords).logsumexp(dim=2, keepdim=True)
        codewords = share - (logits + vectors).logsumexp(dim=1, keepdim=True)
    return (logits + codewords).argmax(dim=2).T


def encode(vectors: NDArray[np.float32], parts: IndexParts) -> tuple[NDArray[np.int64] | None, NDArray[np.uint8]]:
    """Lists [n] and codes [n, M] of vectors [n, dimension], by FAISS's own kernels on all threads.

    Rounded as FAISS rounds, so that its own trained parts give its own codes. A vector goes to the list that the index
    probes first for it: by inner product where the index scores by it.
    """
    import faiss

    subspaces, codewords, width = parts.codebooks.shape
    rotated = np.ascontiguousarray(vectors, dtype=np.float32)
    if parts.rotation is not None:
        inside, dimension = parts.rotation.shape
        turn = faiss.LinearTransform(dimension, inside, False)
        faiss.copy_array_to_vector(np.ascontiguousarray(parts.rotation, dtype=np.float32).ravel(), turn.A)
        turn.is_trained = True
        rotated = turn.apply(rotated)
    lists: NDArray[np.int64] | None = None
    if parts.centroids is not None:
        centroids = np.ascontiguousarray(parts.centroids)
        _, nearest = faiss.knn(rotated, centroids, 1, metric=faiss_metric(parts.metric))
        lists = nearest[:, 0].astype(np.int64)
        if parts.by_residual:
            rotated = rotated - centroids[lists]
    quantiser = faiss.ProductQuantizer(subspaces * width, subspaces, codewords.bit_length() - 1)
    faiss.copy_array_to_vector(np.ascontiguousarray(parts.codebooks, dtype=np.float32).ravel(), quantiser.centroids)
    codes = np.empty((len(rotated), subspaces), np.uint8)
    for start in range(0, len(rotated), CODES_AT_ONCE):
        packed = quantiser.compute_codes(rotated[start : start + CODES_AT_ONCE])
        codes[start : start + CODES_AT_ONCE] = unpack_codes(packed, subspaces, quantiser.nbits)
    return lists, codes
