"""What is wrong with an index before its users find out: lists, codes, lengths, whether search finds its documents.

| finding                    | what it says                                                                          |
|----------------------------|---------------------------------------------------------------------------------------|
| lists, empty, imbalance    | L·Σ size² / n²: 1 when all are equal; as if so many times as much were searched        |
| vectors visited            | share of all vectors that one query is compared with                                  |
| own list probed first      | documents found in the list that a search for them visits first: assign = probe        |
| length kept                | ‖v̂‖ / ‖v‖ of what the codes say against the vector; its spread re-ranks by length      |
| direction kept             | cosine of v̂ and v                                                                     |
| codes shared               | documents whose code another one has: they tie, whatever the query                     |
| hits missing (−1)          | places a search for k leaves empty                                                    |
| polysemous filter          | drops documents by the Hamming distance of their codes; ruins recall unless trained so |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankdistill.errors import RankdistillError
from rankdistill.indexes.faiss_assembly import parts_of
from rankdistill.indexes.faiss_index import FaissIndex, coded, each_list, parts, reason_of, sign_bits, transforms
from rankdistill.indexes.vectors import check_vectors, row_hashes

UNEVEN = 3.0  # imbalance above which lists cost more than they save; k-means on real vectors ends at 1.2 to 2
EMPTY = 0.1
AGREEMENT = 0.95
SPREAD = 0.15  # of the lengths kept, standard deviation over mean
SHARED = 0.05


@dataclass(frozen=True)
class IndexCheck:
    """All findings about an index: name → what was measured, and what to do where it is bad."""

    path: str
    description: str
    findings: dict[str, tuple[float | int | str, str]] = field(default_factory=dict)

    def add(self, name: str, value: float | int | str, bad: bool = False, warning: str = "") -> None:
        self.findings[name] = round(value, 4) if isinstance(value, float) else value, warning if bad else ""

    @property
    def warnings(self) -> list[str]:
        return [f"{name}: {warning}" for name, (_, warning) in self.findings.items() if warning]

    def __getitem__(self, name: str) -> float | int | str:
        return self.findings[name][0]

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, (value, _) in self.findings.items()}
        return {"path": self.path, "description": self.description, "findings": values, "warnings": self.warnings}

    def __str__(self) -> str:
        lines = [self.description]
        for name, (value, warning) in self.findings.items():
            shown = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
            lines.append(f"{'WARNING' if warning else 'ok':9}{name:34}{shown}")
            if warning:
                lines.append(f"{'':9}{'':4}{warning}")
        return "\n".join(lines)


def check_index(
    index: FaissIndex,
    *,
    vectors: NDArray[np.float32] | None = None,
    queries: NDArray[np.float32] | None = None,
    k: int = 100,
    sample: int = 1000,
    seed: int = 0,
) -> IndexCheck:
    """Measure an index on a sample of its documents; it is searched as its settings say.

    Args:
        vectors: [documents, dimension], those it was built from; without them lengths are compared where the student
            scores by cosine (every length is one), and documents stand for themselves by their codes.
        queries: [n, dimension] to search with; documents unless given.
        k: hits asked for.
        sample: documents, and queries, looked at.

    Raises:
        RankdistillError: vectors of another number or dimension than the index's.
    """

    count, binary = index.document_count, index.specification.binary
    if vectors is not None and vectors.shape != (count, index.dimension):
        what = f"vectors of shape {list(vectors.shape)}, an index of {count} × {index.dimension}"
        fix = "give the vectors that the index was built from, in its order"
        raise RankdistillError(what, where=str(index.path), fix=fix)
    check = IndexCheck(str(index.path), repr(index))
    check.add("documents", count)
    check.add("bytes a document", round(index.bytes_per_document, 2))
    if not count:
        return check
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:sample])
    inner, originals, turned = coded(index.index), None, None
    if vectors is not None:
        originals = np.ascontiguousarray(vectors[rows], np.float32)
        check_vectors(originals, index.dimension, lambda row: f"row {rows[row]}")
        turned = originals
        for transform in transforms(index.index):  # as the coded index sees them
            turned = transform.apply(turned)
    decoded = None if binary else _decoded(inner, rows)
    if decoded is not None and not np.isfinite(decoded).all():
        check.add("documents decoded", "NaN", True, "the codebooks are broken: train again")
        decoded = None
    has_lists = hasattr(inner, "invlists")
    if has_lists:
        _add_lists(check, inner)
        inside = decoded if turned is None or binary else turned
        if inside is not None:
            _add_probing(check, inner, _lists_of_rows(inner)[rows], inside, exact=turned is not None)
    if decoded is not None:
        _add_lengths(check, decoded, turned, index.manifest.get("similarity") == "cos")
    if (hashes := _code_hashes(inner)) is not None:
        shared, same = _share_of_shared(hashes), 0.0 if vectors is None else _share_of_shared(row_hashes(vectors))
        advice = "more subspaces or bits: these documents cannot be told apart"
        if same:
            advice += f" ({same:.1%} have the very vector of another: those never can)"
        check.add("codes shared", shared, shared - same > SHARED, advice)
    asked = queries if queries is not None else originals
    asked = _outside(index.index, decoded) if asked is None else asked[:sample]
    if asked is not None:
        _add_missing(check, index, asked, min(k, count), "raise nprobe" if has_lists else "raise efSearch")
    _add_polysemous(check, index.index)
    return check


def _lists_of_rows(ivf: Any) -> NDArray[np.int64]:
    lists = np.full(int(ivf.ntotal), -1, np.int64)
    for number, ids, _ in each_list(ivf):
        known = (ids >= 0) & (ids < len(lists))
        lists[ids[known]] = number
    return lists


def _decoded(inner: Any, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """What the codes of rows say, [n, d] inside any rotation; None where FAISS cannot tell."""
    import faiss

    no_map: Any = faiss.DirectMap.NoMap  # type: ignore[attr-defined]  # missing in FAISS's stubs
    if isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan):
        return parts_of(inner).decoded(rows)
    ivf = isinstance(inner, faiss.IndexIVF)
    if ivf and isinstance(inner, faiss.IndexIVFFastScan):
        return None  # FAISS's reconstruct reads where nothing is
    had_map = ivf and inner.direct_map.type != no_map
    try:
        if ivf and not had_map:
            inner.make_direct_map()
        decoded: NDArray[np.float32] = np.stack([inner.reconstruct(int(row)) for row in rows])
    except RuntimeError:
        return None
    finally:
        if ivf and not had_map:
            inner.set_direct_map_type(no_map)
    return decoded


def _outside(index: Any, decoded: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """Decoded vectors turned back into the student's space, to search with."""
    if decoded is None:
        return None
    try:
        for transform in reversed(transforms(index)):
            decoded = transform.reverse_transform(decoded)
    except RuntimeError:
        return None
    return decoded


def _add_lists(check: IndexCheck, ivf: Any) -> None:
    sizes = np.array([ivf.invlists.list_size(number) for number in range(ivf.nlist)], np.float64)
    count, nprobe, empty = len(sizes), int(ivf.nprobe), int((sizes == 0).sum())
    imbalance = float(count * (sizes**2).sum() / max(1.0, sizes.sum()) ** 2)
    uneven = f"a search visits {imbalance:.1f} times as many vectors as with even lists"
    uneven += ": train on more vectors, or with normalised centroids"
    too_many = f"nprobe {nprobe} of {count} lists: set nprobe to {count}; fast-scan breaks beyond it"
    check.add("lists", count)
    check.add("lists, empty", empty, empty > EMPTY * count, "use fewer lists")
    check.add("lists, largest", int(sizes.max()))
    check.add("lists, imbalance", imbalance, imbalance > UNEVEN, uneven)
    check.add("nprobe", nprobe, nprobe > count, too_many)
    check.add("vectors visited, about", min(1.0, nprobe / count * imbalance))


def _add_probing(
    check: IndexCheck, ivf: Any, lists: NDArray[np.int64], inside: NDArray[np.float32], exact: bool
) -> None:
    _, probed = ivf.quantizer.search(np.ascontiguousarray(inside), min(int(ivf.nprobe), int(ivf.nlist)))
    known = lists >= 0
    first = float((probed[known, 0] == lists[known]).mean())
    among = float((probed[known] == lists[known, None]).any(axis=1).mean())
    assign = "documents stand in other lists than those a search for them visits: assign them again by the rule the"
    assign += " index probes by (its metric), with the final centroids"
    # A code says only about where its document is, so that its own list may be the second nearest.
    check.add("own list probed first", first, first < (AGREEMENT if exact else 0.8), assign)
    missed = f"a search for a document misses it with nprobe {ivf.nprobe}"
    check.add("own list among the probed", among, among < AGREEMENT, missed)


def _add_lengths(
    check: IndexCheck, decoded: NDArray[np.float32], originals: NDArray[np.float32] | None, unit: bool
) -> None:
    lengths = np.linalg.norm(decoded, axis=1)
    if originals is None and not unit:
        check.add("length of decoded, mean", float(lengths.mean()))
        return
    before = np.ones(len(lengths)) if originals is None else np.linalg.norm(originals, axis=1)
    real = before > 0
    if not real.any():
        return
    kept = lengths[real] / before[real]
    mean, spread = float(kept.mean()), float(kept.std() / max(kept.mean(), 1e-12))
    advice = "inner products rank by it: more bytes, or train the codebooks for ranking (rankdistill quantize)"
    check.add("length kept, mean", mean, mean < 0.5, advice)
    check.add("length kept, spread", spread, spread > SPREAD, advice)
    if originals is not None:
        products = (decoded[real] * originals[real]).sum(axis=1)
        cosines = products / np.maximum(lengths[real] * before[real], 1e-12)
        check.add("direction kept, mean", float(cosines.mean()))


def _code_hashes(inner: Any) -> NDArray[np.int64] | None:
    """A hash of each document's list and code, in any order; none where documents are not held as codes."""
    import faiss

    if isinstance(inner, faiss.IndexPQFastScan | faiss.IndexIVFPQFastScan):
        held = parts_of(inner)
        lists = [] if held.assignments is None else [held.assignments[:, None].view(np.uint8)]
        return row_hashes(np.hstack([*lists, held.codes]))
    if isinstance(inner, faiss.IndexIVF) and not isinstance(inner, faiss.IndexIVFFastScan):
        hashes = []
        for number, ids, codes in each_list(inner):
            packed = faiss.rev_swig_ptr(codes, len(ids) * inner.code_size).reshape(len(ids), -1)
            hashes.append(row_hashes(packed, str(number).encode()))
        return np.concatenate(hashes)
    if isinstance(inner, faiss.IndexFlatCodes):
        size = int(inner.code_size)
        return row_hashes(faiss.rev_swig_ptr(inner.codes.data(), int(inner.ntotal) * size).reshape(-1, size))
    return None


def _share_of_shared(hashes: NDArray[np.int64]) -> float:
    _, counts = np.unique(hashes, return_counts=True)
    return float(counts[counts > 1].sum() / len(hashes))


def _add_missing(check: IndexCheck, index: FaissIndex, queries: NDArray[np.float32], k: int, fix: str) -> None:
    queries, name = np.ascontiguousarray(queries, np.float32), f"hits missing (-1) of {k}"
    try:
        _, rows = index.index.search(sign_bits(queries) if index.specification.binary else queries, k)
    except RuntimeError as error:
        check.add(name, "all", True, f"FAISS cannot search this index: {reason_of(error)}")
        return
    missing = float((rows < 0).mean())
    warning = f"{missing:.1%} of {k} hits are -1, which is no document: {fix}, or ask for fewer"
    check.add(name, missing, missing > 0, warning)


def _add_polysemous(check: IndexCheck, index: Any) -> None:
    import faiss

    kind: Any = faiss.IndexPQ
    filtering = (kind.ST_polysemous, kind.ST_polysemous_generalize)
    quantised: list[Any] = [part for part in parts(index) if isinstance(part, faiss.IndexIVFPQ | faiss.IndexPQ)]
    on = any(
        part.polysemous_ht != 0 if isinstance(part, faiss.IndexIVFPQ) else part.search_type in filtering
        for part in quantised
    )
    fix = "it drops documents unseen: set polysemous_ht = 0 (IVFPQ) or search_type = ST_PQ (PQ)"
    if quantised:
        check.add("polysemous filter", "on" if on else "off", on, fix)
