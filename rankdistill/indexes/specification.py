"""Index specifications: one YAML says which index to build, how it is trained and how it is searched."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.sparse_specification import SPARSE, SparseSpecification
from rankdistill.plain import Name, Section, read_yaml, shown
from rankdistill.recipe import (
    Loss,
    Method,
    check_values,
    find_declaration,
    method_class,
    method_place,
    nearest,
    override_value,
)


class SearchSettings(Section):
    """How an index is searched; stored in the file where FAISS does, so that plain FAISS searches alike."""

    nprobe: int | None = Field(default=None, ge=1, description="lists visited (IVF)")
    efSearch: int | None = Field(default=None, ge=1, description="breadth of the graph search (HNSW)")
    k_factor: float | None = Field(default=None, ge=1, description="refine: hits re-scored for each one returned")
    max_codes: int | None = Field(default=None, ge=1, description="codes visited at most (IVF)")
    rescore: int | None = Field(default=None, ge=1, description="binary: hits re-scored for each one returned")


class IndexSpecification(Section):
    """One index a student can be exported to; a YAML file in indexes/."""

    type: Literal["faiss"] = Field(default="faiss")
    name: Name
    description: str = ""
    factory: str = Field(description="FAISS factory string; {lists}, {subspaces} and {dimension} are filled in")
    metric: Literal["inner_product", "l2"] = "inner_product"
    lists: int | Literal["auto"] = Field(default="auto", description="auto: 4·√N, at most N/39")
    subspaces: int | Literal["auto"] = Field(
        default="auto",
        description="codes a document of PQ; auto: the largest divisor of the dimension up to an eighth (a quarter when"
        " a codeword takes 4 bits: a byte for each 8 dimensions either way)",
    )
    binary: bool = Field(default=False, description="sign bits, Hamming distance; opens with faiss.read_index_binary")
    refine: str | None = Field(default=None, description="second stage that re-scores: Flat, SQ8, SQfp16 …")
    build: dict[str, int] = Field(default_factory=dict, description="efConstruction, …")
    training_sample: int | None = Field(
        default=None, ge=1, description="vectors to train on; unless given 256 a list, at least 65536"
    )
    seed: int = Field(default=42, ge=0, lt=1 << 31)
    search: SearchSettings = SearchSettings()

    def resolve(self, count: int, dimension: int) -> str:
        """The factory string for `count` vectors of `dimension`; an error where a part of it cannot divide that."""
        lists = self.lists
        if lists == "auto":
            lists = max(1, min(round(4 * math.sqrt(count)), count // 39))
        subspaces = self.subspaces
        if subspaces == "auto":
            subspaces = _divisor(dimension, 4 if re.search(r"PQ\{subspaces\}x4", self.factory) else 8)
        try:
            text = self.factory.format(lists=lists, subspaces=subspaces, dimension=dimension)
        except (KeyError, IndexError, ValueError) as error:
            what, fix = f"{error} cannot be filled in", "{lists}, {subspaces}, {dimension}"
            raise UsageError(what, where=f"{self.name}: factory", fix=fix) from None
        _check_subspaces(text, dimension, f"{self.name}: {text}")
        if self.refine:
            text += f",Refine({self.refine})"
        if self.binary and dimension % 8:
            raise RankdistillError(f"the dimension {dimension} is not divisible by 8", where=f"{self.name}: binary")
        return text


def load_specification(source: str | Path | dict[str, Any] | IndexSpecification) -> IndexSpecification:
    """A specification of vectors from a YAML file, a shipped name ("ivf_pq") or a mapping; not of a learned index."""
    specification = any_specification(source)
    if isinstance(specification, QuantizerSpecification):
        fix = "rankdistill quantize, or the indexes of a recipe"
        raise UsageError(f"{specification.name} is learned, not built", fix=fix)
    if isinstance(specification, SparseSpecification):
        raise UsageError(f"{specification.name} is an index of term weights, for a sparse student, not of vectors")
    return specification


def any_specification(
    source: str | Path | dict[str, Any] | AnySpecification, changes: Iterable[str] = ()
) -> AnySpecification:
    """As `load_specification`, of every kind: `type: faiss` (also without a type), `type: distill_vq`, or one of the
    indexes of term weights (sparse_specification.py).

    Args:
        changes: `key=value`, nested keys with dots, as for recipes.
    """
    if isinstance(source, IndexSpecification | QuantizerSpecification | SparseSpecification):
        return source
    if isinstance(source, dict):
        values, where = dict(source), "index specification"
    else:
        path = find_declaration("indexes", str(source))
        values, where = {"name": path.stem, **read_yaml(path)}, str(path)
    for change in changes:
        override_value(values, change)
    known: dict[str, type[Any]] = {"faiss": IndexSpecification, "distill_vq": QuantizerSpecification, **SPARSE}
    kind = str(values.get("type", "faiss"))
    if kind not in known:
        if method_place("index", kind) is None:
            what, fix = f"there is no index of type {shown(values['type'])!r}", nearest(kind, known)
            raise UsageError(what, where=f"{where}: type", fix=fix)
        known[kind] = method_class("index", kind, f"{where}: type")
    return check_values(known[kind], values, where)


def vectors_needed(factory: str) -> int:
    """Training vectors without which FAISS cannot run k-means for this factory string."""
    lists = [int(number) for number in re.findall(r"IVF(\d+)", factory)]
    codewords = [1 << int(bits or 8) for bits in re.findall(r"(?<![A-Z])PQ\d+(?:x(\d+))?", factory)]
    return max([1, *lists, *codewords])


def _divisor(dimension: int, width: int) -> int:
    """The largest number of subspaces that are at least so wide."""
    return max(count for count in range(1, max(1, dimension // width) + 1) if dimension % count == 0)


def _check_subspaces(factory: str, dimension: int, where: str) -> None:
    """Refuse subspaces that do not divide the dimension they cut, and codewords fast-scan cannot hold."""
    for part in factory.split(","):
        quantiser = re.fullmatch(r"(O?)PQ(\d+)(?:_(\d+))?(?:x(\d+))?(fsr?)?(?:_\d+)?(?:np)?", part)
        if quantiser is None:
            narrowed = re.fullmatch(r"(?:PCAW?R?|RR|ITQ|Pad)(\d+)", part)
            dimension = int(narrowed[1]) if narrowed else dimension
            continue
        rotates, subspaces, narrowed_to, bits, fast = quantiser.groups()
        dimension = int(narrowed_to) if rotates and narrowed_to else dimension
        if int(subspaces) < 1 or dimension % int(subspaces):
            what = f"the dimension {dimension} is not divisible by the number of subspaces {subspaces}"
            raise RankdistillError(what, where=where, fix="subspaces: auto, or a divisor of the dimension")
        if fast and bits != "4":
            fix = f"PQ{subspaces}x4{fast} (twice the subspaces for the same bytes), or PQ{subspaces}x8 without fs"
            what = f"a fast-scan index holds 4 bits a codeword, not {bits or 8}"
            raise RankdistillError(what, where=where, fix=fix)


# -- learned quantisation ---------------------------------------------------------------------------------------------


class SampledQueries(Section):
    """Whose rankings the quantiser learns to keep. Judgments are not needed for any of them."""

    given: float = Field(default=1, ge=0, description="share drawn from the training queries, where there are any")
    pseudo: float = Field(default=1, ge=0, description="... from titles and first sentences, encoded as queries")
    documents: float = Field(default=1, ge=0, description="... from the document vectors themselves")
    most: int = Field(default=20_000, ge=1, description="of each kind at most so many, drawn by the seed")


class SampledDocuments(Section):
    """Which documents a query's list holds in a training step."""

    top: int = Field(default=200, ge=0, description="the teacher's best documents for the query")
    live: bool = Field(default=False, description="... found again with the codes of the moment (JPQ), not once")
    labelled: bool = Field(
        default=False, description="a labelled positive, put first; queries without one are left out"
    )
    random: int = Field(default=1024, ge=0, description="documents drawn at random, the same for the whole batch")
    in_batch: bool = Field(default=True, description="each query also sees the documents of the others")
    list_size: int | None = Field(
        default=None, ge=2, description="documents a list, drawn anew each step; for losses over pairs"
    )
    limit: int = Field(default=8192, ge=2, description="different documents in a step at most")


class QuantizerSpecification(Section):
    """A product-quantised index whose codebooks are learned to keep the ranking; a YAML file in indexes/."""

    type: Literal["distill_vq"] = Field(default="distill_vq")
    name: Name
    description: str = ""
    subspaces: int | Literal["auto"] = Field(default="auto", description="codes a document; auto: one for 8 dimensions")
    bits: Literal[4, 8] = 8
    fast_scan: bool = Field(default=False, description="the 4-bit layout that is searched in registers")
    lists: int | Literal["auto"] = Field(default=0, description="inverted lists; 0: none; auto: 4·√N, at most N/39")
    residual: bool = Field(default=True, description="codes describe what is left after the list's centroid")
    metric: Literal["inner_product", "l2"] = "inner_product"
    overlap: int = Field(
        default=1,
        ge=1,
        le=16,
        description="subspaces so many times as wide, sharing dimensions with their neighbours: more of the ranking"
        " kept at the same bytes a document, for a codebook and a query transform so many times as large",
    )
    rotation: Literal["none", "opq", "learned"] = Field(default="opq", description="learned: OPQ's, trained along")
    query: Literal["frozen", "linear", "encoder"] = Field(
        default="linear",
        description="frozen: the query vectors as they are; linear: a matrix on them, kept inside the index;"
        " encoder: the student's own query encoder is trained along, for a run's student",
    )
    codes: Literal["nearest", "straight_through", "frozen", "uniform"] = Field(
        default="nearest",
        description="nearest: chosen anew each step; straight_through: with gradients of a soft choice (Distill-VQ);"
        " frozen: FAISS's, never changed (JPQ); uniform: each codeword used alike in a batch (RepCONC)",
    )
    softness: float = Field(default=0.1, gt=0, description="of the soft choice, in mean squared errors")
    relevance: Literal["vectors", "scores"] = Field(
        default="vectors", description="the teacher: the uncompressed vectors themselves, or the run's scored lists"
    )
    queries: SampledQueries = SampledQueries()
    documents: SampledDocuments = SampledDocuments()
    losses: list[Loss] = Field(default_factory=lambda: [Method.model_validate({"type": "kl"})], validate_default=True)
    reconstruction: float = Field(default=0.0, ge=0, description="weight of ||u - v^||^2 in units of its start")
    temperature: float | Literal["auto"] = Field(
        default="auto", description="scores are divided by it before the losses; auto: from the teacher's own spread"
    )
    steps: int = Field(default=600, ge=0, description="0: FAISS's own trained index")
    batch: int = Field(default=128, ge=1)
    codebook_rate: float = Field(default=3e-2, gt=0, description="learning rate, in standard deviations of a codebook")
    centroid_rate: float = Field(default=1e-2, gt=0, description="... of the centroids")
    query_rate: float = Field(default=2e-3, gt=0, description="... of the query map")
    encoder_rate: float = Field(default=2e-5, gt=0, description="... of the query encoder")
    rotation_rate: float = Field(default=1e-4, gt=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    reassign_every: int = Field(default=100, ge=1, description="steps between two assignments of documents to lists")
    checkpoint_every: int = Field(default=100, ge=1)
    held_out: int = Field(default=200, ge=0, description="queries kept apart to measure agreement with float search")
    training_sample: int | None = Field(default=None, ge=1, description="vectors that FAISS starts from")
    refine: str | None = Field(default=None, description="second stage that re-scores: Flat, SQ8, SQfp16 …")
    seed: int = Field(default=42, ge=0, lt=1 << 31)
    search: SearchSettings = SearchSettings()

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        l2, overlap = self.metric == "l2", self.overlap > 1
        apart = self.lists or self.codes != "nearest" or self.rotation == "learned" or l2
        if self.fast_scan and self.bits != 4:
            raise ValueError(f"a fast-scan index holds 4-bit codes, not {self.bits}-bit ones (bits: 4)")
        if l2 and self.query == "linear":
            raise ValueError(
                "a query map needs inner products: distances compare with the documents' own space (query: frozen)"
            )
        if l2 and self.query == "encoder":
            raise ValueError("query: encoder needs inner products (metric: inner_product)")
        if overlap and apart:
            raise ValueError(
                "overlapping subspaces go with inner products, without lists, codes other than the nearest, and a "
                "learned rotation (overlap: 1; or lists: 0, codes: nearest, rotation: opq, metric: inner_product)"
            )
        if self.codes == "frozen" and self.rotation == "learned":
            raise ValueError("frozen codes do not follow a learned rotation (rotation: opq)")
        return self

    def started(self, dimension: int) -> IndexSpecification:
        """The FAISS index that training starts from, which is also how the result describes itself."""
        rotation = "" if self.rotation == "none" else "OPQ{subspaces},"
        lists = "IVF{lists}," if self.lists else ""
        fast = ("fsr" if self.residual and self.lists else "fs") if self.fast_scan else ""
        subspaces: int | Literal["auto"] = self.subspaces
        if subspaces == "auto":
            subspaces = _divisor(dimension, self.bits)
        return IndexSpecification(
            name=self.name,
            description=self.description,
            factory=f"{rotation}{lists}PQ{{subspaces}}x{self.bits}{fast}",
            metric=self.metric,
            lists=self.lists or 1,
            subspaces=subspaces,
            refine=self.refine,
            training_sample=self.training_sample,
            seed=self.seed,
            search=self.search,
        )


AnySpecification = IndexSpecification | QuantizerSpecification | SparseSpecification
