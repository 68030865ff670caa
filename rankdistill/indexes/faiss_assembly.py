"""A FAISS index made of learned parts, and the parts of a FAISS index: nothing is trained and nothing re-encoded here.

The parts are the rotation R, the centroids O of the lists (IVF) and the codebooks C of product quantisation. A vector v
is held as a list l and one codeword a subspace; what the index scores is, with o = 0 where there are no lists and
û = C[0, code 0] ‖ C[1, code 1] ‖ …:

    by_residual:  v̂ = o_l + û,  otherwise  v̂ = û;   inner product ⟨R q, v̂⟩, l2 ‖R q − v̂‖²

Product quantisation: Jégou, Douze & Schmid 2011; fast-scan, its 4-bit layout for registers: André et al. 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rankdistill.errors import RankdistillError
from rankdistill.indexes.faiss_index import coded, each_list, faiss_metric, transforms

BLOCK = 65_536  # codes packed at a time
FAST_SCAN_CODEWORDS = 16
FAST_SCAN_ORDER = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
Metric = Literal["inner_product", "l2"]


@dataclass(frozen=True)
class IndexParts:
    """What a product-quantised index is made of; d is the dimension inside, after the rotation."""

    rotation: NDArray[np.float32] | None  # [d, dimension], applied to queries as R q; none keeps vectors as they are
    centroids: NDArray[np.float32] | None  # [lists, d]; none without lists (and `by_residual` means nothing)
    codebooks: NDArray[np.float32]  # [subspaces, codewords, d/subspaces], codewords a power of two, at most 256
    metric: Metric = "inner_product"
    by_residual: bool = True  # the codewords describe what is left of a vector after its centroid
    fast_scan: bool = False  # the 4-bit layout that is searched in registers: 16 codewords
    assignments: NDArray[np.int64] | None = None  # [n], the list of each vector
    codes: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0), np.uint8))  # [n, subspaces], numbers
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [n], rising

    def decoded(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """v̂ of the vectors at these places of `ids`, [len(rows), d]."""
        chosen = [book[self.codes[rows, number]] for number, book in enumerate(self.codebooks)]
        vectors: NDArray[np.float32] = np.hstack(chosen)
        if self.centroids is None or self.assignments is None or not self.by_residual:
            return vectors
        return vectors + self.centroids[self.assignments[rows]]


def assemble_index(parts: IndexParts) -> Any:
    """A trained, empty FAISS index of exactly these parts; fill it with `add_codes`.

    Raises:
        RankdistillError: parts that do not fit together, or hold NaN.
    """
    import faiss

    named = {name: getattr(parts, name) for name in ("codebooks", "centroids", "rotation")}
    arrays = {name: np.ascontiguousarray(part, np.float32) for name, part in named.items() if part is not None}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise RankdistillError(f"NaN or infinity in the {name}", fix="the training diverged: a lower learning rate")
    codebooks, centroids, rotation = arrays["codebooks"], arrays.get("centroids"), arrays.get("rotation")
    subspaces, codewords, width = codebooks.shape
    inside, bits, fast_scan = subspaces * width, int(codewords).bit_length() - 1, parts.fast_scan
    if not (
        codewords == 1 << bits
        and 1 <= bits <= 8
        and (not fast_scan or codewords == FAST_SCAN_CODEWORDS)
        and (centroids is None or centroids.shape[1] == inside)
        and (rotation is None or len(rotation) == inside)
    ):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise RankdistillError(f"parts that no {'fast-scan ' if fast_scan else ''}index holds together: {shapes}")
    index: Any
    kind = faiss_metric(parts.metric)
    if centroids is None:
        index = faiss.IndexPQ(inside, subspaces, bits, kind)
        index.do_polysemous_training = False
    else:
        quantizer = faiss.IndexFlat(inside, kind)
        quantizer.add(centroids)
        index = faiss.IndexIVFPQ(quantizer, inside, len(centroids), subspaces, bits, kind)
        _give(quantizer, index)
        index.do_polysemous_training = False
        index.by_residual = parts.by_residual
    faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    if centroids is not None:
        index.precompute_table()
    if fast_scan:
        index = _fast_scan(index)
    if rotation is None:
        return index
    transform: Any = faiss.LinearTransform(rotation.shape[1], inside, False)
    faiss.copy_array_to_vector(rotation.ravel(), transform.A)
    transform.is_trained = True
    transform.set_is_orthonormal()  # looks at A; lets FAISS turn decoded vectors back
    outer = faiss.IndexPreTransform(transform, index)
    transform.this.disown()
    _give(index, outer)
    return outer


def add_codes(index: Any, assignments: NDArray[Any] | None, codes: NDArray[Any]) -> None:
    """Add vectors that are already codes: exactly these codewords, in exactly these lists.

    A fast-scan index is packed anew at each call: give it all its codes at once.

    Args:
        assignments: [n] the list of each vector; none for an index without lists.
        codes: [n, subspaces] codeword numbers, one byte each (also memory-mapped).
    """
    import faiss

    inner = _quantised(index)
    _check_codes(inner, assignments, codes)
    if isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan):
        _add_to_fast_scan(inner, assignments, codes)
    else:
        for start in range(0, len(codes), BLOCK):
            block = slice(start, start + BLOCK)
            packed = pack_codes(np.asarray(codes[block]), inner.pq.nbits)
            if assignments is not None:  # FAISS reads the list's number before each code, lowest byte first
                lists = np.ascontiguousarray(assignments[block], dtype="<i8").view(np.uint8).reshape(-1, 8)
                packed = np.hstack([lists[:, : inner.coarse_code_size()], packed])
            inner.add_sa_codes(packed)
    if inner is not index:
        index.ntotal = inner.ntotal


def parts_of(index: Any) -> IndexParts:
    """The parts of a product-quantised FAISS index (`PQ`, `OPQ,PQ`, `IVF,PQ`, `OPQ,IVF,PQ`, fast-scan or not).

    A refine stage around it is passed over. An error for any other kind, and for more than 8 bits a codeword.
    """
    import faiss

    inner = _quantised(index)
    pq = inner.pq
    if pq.nbits > 8:
        raise RankdistillError(f"{pq.nbits} bits a codeword: at most 8 are read")
    lists = isinstance(inner, faiss.IndexIVF)
    assignments, codes, ids = _held(inner)
    return IndexParts(
        _rotation(index),
        inner.quantizer.reconstruct_n(0, inner.nlist) if lists else None,
        faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub).copy(),
        "l2" if inner.metric_type == faiss.METRIC_L2 else "inner_product",
        lists and bool(inner.by_residual),
        isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan),
        assignments,
        codes,
        ids,
    )


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

    inner = coded(index)
    known = faiss.IndexPQ, faiss.IndexIVFPQ, faiss.IndexPQFastScan, faiss.IndexIVFPQFastScan
    if not isinstance(inner, known) or isinstance(inner, faiss.IndexIVFPQR):
        raise RankdistillError(f"{type(inner).__name__} is no product-quantised index", fix="OPQ,IVF,PQ or part of it")
    return inner


def _rotation(index: Any) -> NDArray[np.float32] | None:
    import faiss

    chain = transforms(index)
    if not chain:
        return None
    if len(chain) != 1 or not isinstance(chain[0], faiss.LinearTransform) or chain[0].have_bias:
        names = ", ".join(type(transform).__name__ for transform in chain)
        raise RankdistillError(f"the transforms {names} are not one rotation")
    matrix: NDArray[np.float32] = faiss.vector_to_array(chain[0].A)
    return matrix.reshape(chain[0].d_out, chain[0].d_in).copy()


def _check_codes(inner: Any, assignments: Any, codes: Any) -> None:
    """FAISS would read and write where nothing is."""
    lists = getattr(inner, "nlist", None)
    given = None if assignments is None else assignments.shape
    fits = codes.ndim == 2 and codes.shape[1] == inner.pq.M and given == (None if lists is None else codes.shape[:1])
    for numbers, most in ((codes, inner.pq.ksub), (assignments, lists)):
        if fits and numbers is not None and len(numbers):
            fits = numbers.min() >= 0 and numbers.max() < most
    if not fits:
        shapes = f"codes {list(codes.shape)}" + ("" if given is None else f" and assignments {list(given)}")
        where = f"{inner.pq.M} subspaces of {inner.pq.ksub} codewords, {lists or 'no'} lists"
        raise RankdistillError(f"{shapes}, or numbers in them, that this index has no place for", where=where)


def _add_to_fast_scan(inner: Any, assignments: Any, codes: Any) -> None:
    """Through a plain 4-bit index: FAISS takes no codes into a fast-scan index (add_sa_codes of one with lists reads
    past its input, merge_from of one without leaves what it likes in the padding).
    """
    import faiss

    plain: Any
    packed: Any
    lists = isinstance(inner, faiss.IndexIVF)
    if inner.ntotal:
        held_lists, held_codes, _ = _held(inner)
        codes = np.concatenate([held_codes, codes])
        assignments = None if held_lists is None else np.concatenate([held_lists, assignments])
    if lists:
        plain = faiss.IndexIVFPQ(inner.quantizer, inner.d, inner.nlist, inner.pq.M, inner.pq.nbits, inner.metric_type)
        plain.own_fields, plain.by_residual = False, inner.by_residual
    else:
        plain = faiss.IndexPQ(inner.d, inner.pq.M, inner.pq.nbits, inner.metric_type)
    plain.pq, plain.is_trained = inner.pq, True
    add_codes(plain, assignments, codes)
    if lists:
        packed = faiss.IndexIVFPQFastScan(plain)
        packed.own_fields = packed.own_invlists = False
        inner.replace_invlists(packed.invlists, True)
    else:
        packed = faiss.IndexPQFastScan(plain)
        inner.codes, inner.ntotal2 = packed.codes, packed.ntotal2
    inner.ntotal = packed.ntotal


def _held(inner: Any) -> tuple[NDArray[np.int64] | None, NDArray[np.uint8], NDArray[np.int64]]:
    """(assignments, codes, ids) of an index, by rising id."""
    import faiss

    count, pq = int(inner.ntotal), inner.pq
    if not hasattr(inner, "nlist"):
        if isinstance(inner, faiss.IndexPQFastScan):
            codes = _unpack_blocks(inner, faiss.vector_to_array(inner.codes), count)
        elif count:
            # A view into FAISS's memory, or into the file where the index is memory-mapped; a copy leaves here.
            packed = faiss.rev_swig_ptr(inner.codes.data(), count * inner.code_size).reshape(count, -1)
            codes = unpack_codes(packed, pq.M, pq.nbits).copy()
        else:
            codes = np.empty((0, pq.M), np.uint8)
        return None, codes, np.arange(count)
    fast, start = isinstance(inner, faiss.IndexIVFPQFastScan), 0
    lists, ids, codes = np.empty(count, np.int64), np.empty(count, np.int64), np.empty((count, pq.M), np.uint8)
    for number, list_ids, pointer in each_list(inner):
        size = len(list_ids)
        here = slice(start, start + size)
        lists[here], ids[here] = number, list_ids
        if fast:
            invlists: Any = faiss.downcast_InvertedLists(inner.invlists)
            stored = -(-size // inner.bbs) * invlists.block_size
            codes[here] = _unpack_blocks(inner, faiss.rev_swig_ptr(pointer, stored), size)
        else:
            packed = faiss.rev_swig_ptr(pointer, size * inner.code_size).reshape(size, -1)
            codes[here] = unpack_codes(packed, pq.M, pq.nbits)
        start += size
    order = np.argsort(ids, kind="stable")
    return lists[order], codes[order], ids[order]


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
