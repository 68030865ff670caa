"""A FAISS index made of learned parts, and the parts of a FAISS index: nothing is trained and nothing re-encoded here.

The parts are the rotation R, the centroids O of the lists (IVF) and the codebooks C of product quantisation. A vector v
is held as a list l and one codeword a subspace; what the index scores is, with o = 0 where there are no lists and
û = C[0, code 0] ‖ C[1, code 1] ‖ …:

    by_residual:  v̂ = o_l + û,  otherwise  v̂ = û;   inner product ⟨R q, v̂⟩, l2 ‖R q − v̂‖²

Product quantisation: Jégou, Douze & Schmid 2011; fast-scan, its 4-bit layout for registers: André et al. 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankdistill.errors import RankdistillError, UsageError

BLOCK = 65_536  # codes packed at a time
FAST_SCAN_CODEWORDS = 16
FAST_SCAN_ORDER = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
Metric = Literal["inner_product", "l2"]


@dataclass(frozen=True)
class IndexParts:
    """What a product-quantised index is made of; d is the dimension inside, after the rotation."""

    rotation: NDArray[np.float32] | None  # [d, dimension]
    centroids: NDArray[np.float32] | None  # [lists, d]
    codebooks: NDArray[np.float32]  # [subspaces, codewords, d/subspaces]
    metric: Metric
    by_residual: bool
    fast_scan: bool
    assignments: NDArray[np.int64] | None  # [n], the list of each vector
    codes: NDArray[np.uint8]  # [n, subspaces], codeword numbers
    ids: NDArray[np.int64]  # [n], as the index returns them, rising

    @property
    def bits(self) -> int:
        return int(self.codebooks.shape[1]).bit_length() - 1

    def decoded(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """v̂ of the vectors at these places of `ids`, [len(rows), d]."""
        chosen = [book[self.codes[rows, number]] for number, book in enumerate(self.codebooks)]
        vectors: NDArray[np.float32] = np.hstack(chosen)
        if self.centroids is None or self.assignments is None or not self.by_residual:
            return vectors
        return vectors + self.centroids[self.assignments[rows]]


def assemble_index(
    *,
    rotation: NDArray[Any] | None,
    centroids: NDArray[Any] | None,
    codebooks: NDArray[Any],
    metric: Metric = "inner_product",
    by_residual: bool = True,
    fast_scan: bool = False,
) -> Any:
    """A trained, empty FAISS index of exactly these parts; fill it with `add_codes`.

    Args:
        rotation: [d, dimension], applied to queries as R q; none keeps the vectors as they are.
        centroids: [lists, d]; none makes an index without lists (and `by_residual` means nothing).
        codebooks: [subspaces, codewords, d/subspaces], codewords a power of two, at most 256.
        by_residual: the codewords describe what is left of a vector after its centroid.
        fast_scan: the 4-bit layout that is searched in registers; 16 codewords.

    Raises:
        RankdistillError: shapes that do not fit, NaN, a number of codewords the index cannot hold.
    """
    import faiss

    codebooks = _array(codebooks, 3, "codebooks [subspaces, codewords, d/subspaces]")
    subspaces, codewords, width = codebooks.shape
    inside = subspaces * width
    bits = int(codewords).bit_length() - 1
    if codewords != 1 << bits or not 1 <= bits <= 8:
        raise RankdistillError(f"{codewords} codewords a subspace", fix="a power of two from 2 to 256")
    if fast_scan and codewords != FAST_SCAN_CODEWORDS:
        raise RankdistillError(
            f"a fast-scan index holds {FAST_SCAN_CODEWORDS} codewords a subspace, not {codewords}",
            fix="bits: 4, or an index without fast-scan",
        )
    index: Any
    kind = {"inner_product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    if centroids is None:
        index = faiss.IndexPQ(inside, subspaces, bits, kind)
        index.do_polysemous_training = False
    else:
        centroids = _array(centroids, 2, "centroids [lists, d]")
        if centroids.shape[1] != inside:
            raise RankdistillError(f"centroids of {centroids.shape[1]} dimensions, codebooks of {inside}")
        quantizer = faiss.IndexFlat(inside, kind)
        quantizer.add(centroids)
        index = faiss.IndexIVFPQ(quantizer, inside, len(centroids), subspaces, bits, kind)
        _give(quantizer, index)
        index.do_polysemous_training = False
        index.by_residual = by_residual
    faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    if centroids is not None:
        index.precompute_table()
    if fast_scan:
        index = _fast_scan(index)
    if rotation is None:
        return index
    rotation = _array(rotation, 2, "rotation [d, dimension]")
    if rotation.shape[0] != inside:
        raise RankdistillError(f"a rotation into {rotation.shape[0]} dimensions, codebooks of {inside}")
    transform: Any = faiss.LinearTransform(rotation.shape[1], inside, False)
    faiss.copy_array_to_vector(rotation.ravel(), transform.A)
    transform.is_trained = True
    transform.set_is_orthonormal()  # looks at A; lets FAISS turn decoded vectors back
    outer = faiss.IndexPreTransform(transform, index)
    transform.this.disown()
    _give(index, outer)
    return outer


def add_codes(
    index: Any,
    assignments: NDArray[Any] | None,
    codes: NDArray[Any],
    ids: NDArray[np.int64] | None = None,
) -> None:
    """Add vectors that are already codes: exactly these codewords, in exactly these lists.

    A fast-scan index is packed anew at each call: give it all its codes at once.

    Args:
        assignments: [n] the list of each vector; none for an index without lists.
        codes: [n, subspaces] codeword numbers, one byte each (also memory-mapped).
        ids: [n] what the index returns for them; the rows as they were added unless given (needs lists).

    Raises:
        RankdistillError: lengths that differ, a list or codeword the index does not have.
        UsageError: ids for an index without lists.
    """
    import faiss

    inner = _quantised(index)
    lists = isinstance(inner, faiss.IndexIVF)
    _check_codes(inner, assignments, codes, ids)
    if isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan):
        _add_to_fast_scan(inner, assignments, codes, ids)
    else:
        for start in range(0, len(codes), BLOCK):
            stop = min(start + BLOCK, len(codes))
            packed = pack_codes(np.asarray(codes[start:stop]), inner.pq.nbits)
            if not lists:
                inner.add_sa_codes(packed)
                continue
            assert assignments is not None
            prefix = _list_numbers(np.asarray(assignments[start:stop]), inner.coarse_code_size())
            rows = None if ids is None else np.asarray(ids[start:stop])
            inner.add_sa_codes(np.hstack([prefix, packed]), rows)
    if inner is not index:
        index.ntotal = inner.ntotal


def parts_of(index: Any) -> IndexParts:
    """The parts of a product-quantised FAISS index (`PQ`, `OPQ,PQ`, `IVF,PQ`, `OPQ,IVF,PQ`, fast-scan or not).

    A refine stage around it is passed over.

    Raises:
        RankdistillError: another kind of index, more than one transform, more than 8 bits a codeword.
    """
    import faiss

    inner = _quantised(index)
    rotation = _rotation(index)
    pq = inner.pq
    if pq.nbits > 8:
        raise RankdistillError(f"{pq.nbits} bits a codeword: at most 8 are read")
    codebooks = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub).copy()
    metric: Metric = "l2" if inner.metric_type == faiss.METRIC_L2 else "inner_product"
    fast = isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan)
    centroids: NDArray[np.float32] | None = None
    assignments: NDArray[np.int64] | None = None
    if isinstance(inner, faiss.IndexIVF):
        centroids = inner.quantizer.reconstruct_n(0, inner.nlist)
        assignments, codes, ids = _codes_of_lists(inner)
        by_residual = bool(inner.by_residual)
    else:
        codes = _codes_without_lists(inner)
        ids, by_residual = np.arange(len(codes)), False
    return IndexParts(rotation, centroids, codebooks, metric, by_residual, fast, assignments, codes, ids)


def pack_codes(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """[n, subspaces] codeword numbers → [n, ⌈subspaces · bits / 8⌉] bytes, lowest bits first, as FAISS packs them."""
    import faiss

    if bits == 8:
        return np.ascontiguousarray(codes, dtype=np.uint8)
    packed: NDArray[np.uint8] = faiss.pack_bitstrings(codes, bits)
    return packed


def unpack_codes(packed: NDArray[np.uint8], subspaces: int, bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`: [n, bytes] → [n, subspaces]."""
    import faiss

    if bits == 8:
        return np.ascontiguousarray(packed[:, :subspaces])
    codes = np.empty((len(packed), subspaces), np.uint8)
    for start in range(0, len(packed), BLOCK):  # FAISS unpacks to four bytes a number
        block = np.ascontiguousarray(packed[start : start + BLOCK])
        codes[start : start + BLOCK] = faiss.unpack_bitstrings(block, subspaces, bits)
    return codes


def _array(values: NDArray[Any], dimensions: int, name: str) -> NDArray[np.float32]:
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim != dimensions or not array.size:
        raise RankdistillError(f"an array of shape {list(array.shape)} where {name} was expected")
    if not np.isfinite(array).all():
        raise RankdistillError(f"NaN or infinity in the {name}", fix="the training diverged: a lower learning rate")
    return array


def _give(part: Any, owner: Any) -> None:
    """Let the C++ object own the part, so that it lives as long as its owner and not as Python's name for it."""
    part.this.disown()
    owner.own_fields = True


def _fast_scan(plain: Any) -> Any:
    """A 4-bit IndexPQ or IndexIVFPQ as fast-scan: same codes, ids, lists; the plain one is empty-handed afterwards."""
    import faiss

    fast: Any
    if isinstance(plain, faiss.IndexIVFPQ):
        fast = faiss.IndexIVFPQFastScan(plain)
        plain.own_fields, fast.own_fields = False, True  # the quantizer, which both point to
        fast.orig_invlists = None  # would point into the plain index, which goes away
        fast.precompute_table()  # as reading it from a file does: the same sums in the same order
    else:
        fast = faiss.IndexPQFastScan(plain)
        fast.orig_codes = None
    return fast


def _quantised(index: Any) -> Any:
    """The index that holds codes, inside a transform or a refine stage."""
    import faiss

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _quantised(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _quantised(index.base_index)
    known = faiss.IndexPQ, faiss.IndexIVFPQ, faiss.IndexPQFastScan, faiss.IndexIVFPQFastScan
    if not isinstance(index, known) or isinstance(index, faiss.IndexIVFPQR):
        raise RankdistillError(f"{type(index).__name__} is no product-quantised index", fix="OPQ,IVF,PQ or part of it")
    return index


def _rotation(index: Any) -> NDArray[np.float32] | None:
    import faiss

    index = faiss.downcast_index(index)
    chain: Any
    if isinstance(index, faiss.IndexRefine):
        return _rotation(index.base_index)
    if not isinstance(index, faiss.IndexPreTransform):
        return None
    chain = index.chain
    transforms: list[Any] = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
    names = [type(one).__name__ for one in transforms]
    inner = faiss.downcast_index(index.index)
    if len(transforms) != 1 or not isinstance(transforms[0], faiss.LinearTransform) or transforms[0].have_bias:
        raise RankdistillError(f"the transforms {', '.join(names)} are not one rotation")
    if isinstance(inner, faiss.IndexPreTransform):
        raise RankdistillError("a transform inside a transform is not one rotation")
    matrix: NDArray[np.float32] = faiss.vector_to_array(transforms[0].A)
    return matrix.reshape(transforms[0].d_out, transforms[0].d_in).copy()


def _list_numbers(assignments: NDArray[Any], size: int) -> NDArray[np.uint8]:
    """List numbers in `size` bytes each, lowest first: what FAISS reads before a stand-alone code."""
    return np.ascontiguousarray(assignments, dtype="<i8").view(np.uint8).reshape(-1, 8)[:, :size]


def _check_codes(inner: Any, assignments: Any, codes: Any, ids: Any) -> None:
    import faiss

    lists = isinstance(inner, faiss.IndexIVF)
    if codes.ndim != 2 or codes.shape[1] != inner.pq.M:
        raise RankdistillError(f"codes of shape {list(codes.shape)} where [n, {inner.pq.M}] was expected")
    if lists == (assignments is None):
        raise RankdistillError("assignments belong to an index with lists, and only to one")
    if ids is not None and not lists:
        raise UsageError("ids of its own need an index with lists", fix="leave ids out: rows are returned")
    for name, values in (("assignments", assignments), ("ids", ids)):
        if values is not None and values.shape != (len(codes),):
            raise RankdistillError(f"{len(codes)} codes but {name} of shape {list(values.shape)}")
    if len(codes) and (inner.pq.ksub < 256 or codes.dtype != np.uint8):
        bad = int(codes.max()) if codes.max() >= inner.pq.ksub else int(min(0, codes.min()))
        if bad:
            raise RankdistillError(f"codeword {bad} where there are {inner.pq.ksub}")
    if assignments is not None and len(codes) and not (assignments.min() >= 0 and assignments.max() < inner.nlist):
        raise RankdistillError(
            f"lists {assignments.min()} to {assignments.max()} where there are {inner.nlist}",
            fix="every document has a list from 0 on; -1 is none",
        )


def _add_to_fast_scan(inner: Any, assignments: Any, codes: Any, ids: Any) -> None:
    """Through a plain 4-bit index: FAISS takes no codes into a fast-scan index (add_sa_codes of one with lists reads
    past its input, merge_from of one without leaves what it likes in the padding).
    """
    import faiss

    plain: Any
    packed: Any
    lists = isinstance(inner, faiss.IndexIVF)
    if lists and ids is None:
        ids = np.arange(inner.ntotal, inner.ntotal + len(codes))
    if inner.ntotal:
        held_lists, held, held_ids = _codes_of_lists(inner) if lists else (None, _codes_without_lists(inner), None)
        codes = np.concatenate([held, codes])
        if lists:
            assignments, ids = np.concatenate([held_lists, assignments]), np.concatenate([held_ids, ids])
    if lists:
        plain = faiss.IndexIVFPQ(inner.quantizer, inner.d, inner.nlist, inner.pq.M, inner.pq.nbits, inner.metric_type)
        plain.own_fields, plain.by_residual = False, inner.by_residual
    else:
        plain = faiss.IndexPQ(inner.d, inner.pq.M, inner.pq.nbits, inner.metric_type)
    plain.pq, plain.is_trained = inner.pq, True
    add_codes(plain, assignments, codes, ids)
    if lists:
        packed = faiss.IndexIVFPQFastScan(plain)
        packed.own_fields = packed.own_invlists = False
        inner.replace_invlists(packed.invlists, True)
    else:
        packed = faiss.IndexPQFastScan(plain)
        inner.codes, inner.ntotal2 = packed.codes, packed.ntotal2
    inner.ntotal = packed.ntotal


def _codes_without_lists(inner: Any) -> NDArray[np.uint8]:
    import faiss

    if isinstance(inner, faiss.IndexPQFastScan):
        return _unpack_blocks(inner, faiss.vector_to_array(inner.codes), inner.ntotal)
    if not inner.ntotal:
        return np.empty((0, inner.pq.M), np.uint8)
    # A view into FAISS's memory, or into the file where the index is memory-mapped; a copy leaves here.
    packed = faiss.rev_swig_ptr(inner.codes.data(), inner.ntotal * inner.code_size).reshape(inner.ntotal, -1)
    return unpack_codes(packed, inner.pq.M, inner.pq.nbits).copy()


def _codes_of_lists(inner: Any) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """(assignments, codes, ids) of an index with lists, by rising id."""
    import faiss

    invlists: Any = faiss.downcast_InvertedLists(inner.invlists)
    sizes = np.array([invlists.list_size(number) for number in range(inner.nlist)], np.int64)
    ids = np.empty(sizes.sum(), np.int64)
    codes = np.empty((len(ids), inner.pq.M), np.uint8)
    fast = isinstance(inner, faiss.IndexIVFPQFastScan)
    start = 0
    for number, size in enumerate(sizes.tolist()):
        if not size:
            continue
        id_pointer, code_pointer = invlists.get_ids(number), invlists.get_codes(number)
        try:
            ids[start : start + size] = faiss.rev_swig_ptr(id_pointer, size)
            if fast:
                stored = -(-size // inner.bbs) * invlists.block_size
                block = _unpack_blocks(inner, faiss.rev_swig_ptr(code_pointer, stored), size)
            else:
                packed = faiss.rev_swig_ptr(code_pointer, size * inner.code_size).reshape(size, -1)
                block = unpack_codes(packed, inner.pq.M, inner.pq.nbits)
            codes[start : start + size] = block
        finally:
            invlists.release_ids(number, id_pointer)
            invlists.release_codes(number, code_pointer)
        start += size
    order = np.argsort(ids, kind="stable")
    return np.repeat(np.arange(inner.nlist), sizes)[order], codes[order], ids[order]


def _unpack_blocks(inner: Any, blocks: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Fast-scan blocks → [n, subspaces] codeword numbers (FAISS's own unpacker takes one vector a call).

    A block holds `bbs` vectors: for each pair of subspaces and each 32 vectors 16 bytes of the one subspace, 16 of the
    other; byte j has the codeword of vector FAST_SCAN_ORDER[j] in its low bits, of 16 vectors further in its high ones.
    """
    pairs = -(-inner.pq.M // 2)
    stored = np.asarray(blocks).reshape(-1, pairs, inner.bbs // 32, 2, 16)
    # [blocks, pair, stripe, of the pair, half, byte] → [blocks, stripe, half, byte, pair, of the pair]
    halves = np.stack([stored & 15, stored >> 4], axis=4).transpose(0, 2, 4, 5, 1, 3)
    codes = np.empty_like(halves)
    codes[:, :, :, FAST_SCAN_ORDER] = halves
    return np.ascontiguousarray(codes.reshape(-1, 2 * pairs)[:count, : inner.pq.M])
