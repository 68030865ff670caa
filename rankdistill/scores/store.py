"""The store of teacher scores: the expensive thing, kept once and shared by all later runs.

    <root>/<teacher fingerprint>/<collection fingerprint>/manifest.json
                                                          part-*.parquet      query_id, doc_id, score (float32)

A part is written whole or not at all and never changed, so any number of processes may add to one folder and a kill
loses at most what was not yet written. In memory a pair is a 64-bit hash of its two ids and a score: 12 bytes a pair
(1.2 GB for MS MARCO's 500,000 queries × 200), sorted, no Python objects. Two of 10⁸ pairs share a hash with
probability 3·10⁻⁴.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankdistill.artifacts import (
    MANIFEST,
    SCHEMA_VERSION,
    cache_dir,
    check_file,
    fingerprint,
    locked,
    write_atomically,
    written_whole,
)
from rankdistill.errors import RankdistillError, UsageError

ScoreKind = Literal["logit", "probability", "similarity", "rank"]

SCHEMA = pa.schema([("query_id", pa.string()), ("doc_id", pa.string()), ("score", pa.float32())])
PART_PAIRS = 65_536  # pairs kept in memory at most before a part is written …
PART_SECONDS = 20.0  # … or this long after the last one


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """Python's 64-bit hash of each id, uint64 [N]: the same within a process alone, so it is never written."""
    return np.fromiter(map(hash, ids), np.int64).view(np.uint64)


def pair_keys(query_hash: np.ndarray, doc_hash: np.ndarray) -> np.ndarray:
    """One 64-bit key a pair, from the hashes of its two ids; (a, b) and (b, a) differ."""
    return query_hash * np.uint64(0x9E3779B97F4A7C15) + doc_hash


class PairTable:
    """Pair → score, by sorted hashes: 12 bytes a pair. Of a pair added twice the first score stays."""

    def __init__(self) -> None:
        self._segments: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._segments)

    def add(self, keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Add uint64 [N] keys and float32 [N] scores; returns which were new, bool [N]: of one that comes twice the
        first."""
        distinct, first = np.unique(keys, return_index=True)
        fresh = np.isnan(self.find(distinct))
        distinct, first = distinct[fresh], first[fresh]
        if len(first):
            self._segments.append((distinct, np.asarray(scores, dtype=np.float32)[first]))
        # Segments of rising size, each more than twice the next: N pairs are moved O(log N) times.
        while len(self._segments) > 1 and len(self._segments[-2][0]) < 2 * len(self._segments[-1][0]):
            right, left = self._segments.pop(), self._segments.pop()
            joined = np.concatenate([left[0], right[0]])
            order = np.argsort(joined, kind="stable")
            self._segments.append((joined[order], np.concatenate([left[1], right[1]])[order]))
        new = np.zeros(len(keys), dtype=bool)
        new[first] = True
        return new

    def find(self, keys: np.ndarray) -> np.ndarray:
        """float32 [N], NaN where a pair is not in the table."""
        result = np.full(len(keys), np.nan, dtype=np.float32)
        for known, scores in self._segments:
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = known[at] == keys
            result[hit] = scores[at[hit]]
        return result


DELETE = "delete this file and run the same command again: only the pairs in it are scored once more"


def read_part(path: Path, metadata: Mapping[str, str] | None = None, fix: str = DELETE) -> pa.Table:
    """Read a part or an exported score file and check it: columns, finite scores, and whose scores they are.

    Args:
        metadata: what the file's own `teacher`, `collection` and `score_kind` must be.
        fix: what to do about a file that cannot be read.

    Raises:
        RankdistillError: it is damaged, holds NaN or infinity, or belongs to another teacher or collection.
    """
    try:
        with open(path, "rb") as stream:  # bytes first: a memory-mapped file that is truncated later would crash
            table = pq.read_table(pa.BufferReader(stream.read()), page_checksum_verification=True)
        own = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankdistillError(f"the teacher scores cannot be read: {reason}", where=str(path), fix=fix) from None
    _check_owner(own, metadata or {}, path)
    scores = table["score"].to_numpy()
    if table["query_id"].null_count or table["doc_id"].null_count:
        raise RankdistillError("the teacher scores have empty ids", where=str(path), fix=fix)
    for bad in np.flatnonzero(~np.isfinite(scores)).tolist():
        what = f"a teacher score is {scores[bad]} (query {table['query_id'][bad]}, document {table['doc_id'][bad]})"
        fix = "delete this file and score again, with precision: fp32 if it comes back"
        raise RankdistillError(what, where=f"{path}, row {bad + 1}", fix=fix)
    return table


def _check_owner(own: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Refuse scores of another teacher, collection or kind, where they say whose they are."""
    for name, value in expected.items():
        if own.get(name, value) != value:
            what = f"these scores belong to another {name.replace('_', ' ')} ({own[name]}, not {value})"
            fix = "score this collection with this teacher, or import scores made for it"
            raise RankdistillError(what, where=str(path), fix=fix)


def _keys_of(table: pa.Table) -> np.ndarray:
    """uint64 [N] of a part's pairs; a query's rows lie together, so its id is hashed once."""
    queries = table["query_id"].combine_chunks().dictionary_encode()
    hashes = hash_ids(queries.dictionary.to_pylist())[queries.indices.to_numpy()]
    return pair_keys(hashes, hash_ids(table["doc_id"].to_pylist()))


class TeacherScores(AbstractContextManager["TeacherScores"]):
    """One teacher's scores on one collection: a folder of parts, and what is not yet written.

    Use as a context manager, or call `flush()` at the end. Opening reads every part (and refuses a damaged one).
    """

    def __init__(self, path: str | Path, *, part_pairs: int = PART_PAIRS, part_seconds: float = PART_SECONDS) -> None:
        self.path = Path(path)
        self.part_pairs, self.part_seconds = part_pairs, part_seconds
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise RankdistillError("there are no teacher scores here", where=str(self.path))
        try:
            self.manifest: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
            self.teacher = str(self.manifest["teacher"])
            self.collection = str(self.manifest["collection"])
            self.score_kind: ScoreKind = self.manifest["score_kind"]
        except (ValueError, KeyError) as error:
            raise RankdistillError(f"the manifest cannot be read: {error!r}", where=str(manifest)) from None
        self.scored = 0  # pairs added through this object
        self.reused = 0  # pairs asked for that were there already (counted by score_candidates)
        self.unscored = 0  # pairs asked for that the teacher gave no score to
        self._table = PairTable()
        self._read: set[str] = set()
        self._pending: dict[int, tuple[str, str, float]] = {}  # key of a pair → its row
        self._written = time.monotonic()
        self.refresh()

    @property
    def metadata(self) -> dict[str, str]:
        return {"teacher": self.teacher, "collection": self.collection, "score_kind": self.score_kind}

    def check(self, *, collection: str | None = None, score_kind: str | None = None) -> TeacherScores:
        """Refuse scores made for another collection (by fingerprint) or of another kind.

        Raises:
            RankdistillError: naming both.
        """
        expected = {"collection": collection, "score_kind": score_kind}
        _check_owner(self.metadata, {name: value for name, value in expected.items() if value}, self.path)
        return self

    def __repr__(self) -> str:
        name = self.manifest.get("description", {}).get("collection", self.collection)
        return f"TeacherScores({len(self):,} pairs ({self.score_kind}) of {name} at {self.path})"

    def __len__(self) -> int:
        return len(self._table) + len(self._pending)

    def __exit__(self, *_: object) -> None:
        self.flush()  # also on Ctrl-C: what is paid for is kept

    def parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def refresh(self) -> None:
        """Take in the parts that other processes wrote meanwhile."""
        for part in self.parts():
            if part.name not in self._read:
                table = read_part(part, self.metadata)
                self._table.add(_keys_of(table), table["score"].to_numpy())
                self._read.add(part.name)

    def missing(self, query_id: str, doc_ids: Sequence[str]) -> list[str]:
        """The documents of a list that have no score yet, each once, in order."""
        distinct = list(dict.fromkeys(doc_ids))
        absent = np.isnan(self.scores_of(query_id, distinct))
        return [distinct[at] for at in np.flatnonzero(absent)]

    def scores_of(self, query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
        """float32 [len(doc_ids)], NaN where there is no score."""
        keys = _keys(query_id, doc_ids)
        scores = self._table.find(keys)
        if self._pending:
            for at in np.flatnonzero(np.isnan(scores)):
                *_, scores[at] = self._pending.get(int(keys[at]), (np.nan,))
        return scores

    def add(self, query_id: str, doc_ids: Sequence[str], scores: np.ndarray | Sequence[float]) -> int:
        """Add scores of a list; pairs that have one already are left as they are. Returns how many were new.

        Raises:
            RankdistillError: a score is NaN or infinite.
        """
        values = np.asarray(scores, dtype=np.float32)
        if values.shape != (len(doc_ids),):
            raise UsageError(f"{len(doc_ids)} documents but scores of shape {values.shape} for query {query_id!r}")
        for bad in np.flatnonzero(~np.isfinite(values)).tolist():
            where = f"query {query_id!r}, document {doc_ids[bad]!r}"
            raise RankdistillError(f"a teacher score is {values[bad]}", where=where)
        keys, before = _keys(query_id, doc_ids), len(self._pending)
        for at in np.flatnonzero(np.isnan(self._table.find(keys))).tolist():
            self._pending.setdefault(int(keys[at]), (query_id, doc_ids[at], float(values[at])))
        new = len(self._pending) - before
        self.scored += new
        if len(self._pending) >= self.part_pairs or time.monotonic() - self._written >= self.part_seconds:
            self.flush()
        return new

    def flush(self) -> None:
        """Write what is pending as one part; durable when it returns."""
        self._written = time.monotonic()
        if not self._pending:
            return
        name = f"part-{time.time_ns():020d}-{os.getpid()}-{threading.get_ident() & 0xFFFF:04x}.parquet"
        columns = zip(*self._pending.values(), strict=True)
        schema = SCHEMA.with_metadata(self.metadata)
        table = pa.table([pa.array(values, field.type) for values, field in zip(columns, SCHEMA)], schema=schema)
        with written_whole(self.path / name) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        self._read.add(name)
        self._table.add(np.fromiter(self._pending, np.uint64, len(self._pending)), table["score"].to_numpy())
        self._pending = {}

    def _distinct(self) -> Iterator[pa.Table]:
        """The parts, without the pairs that an earlier one has."""
        self.flush()
        seen = PairTable()
        for part in self.parts():
            table = read_part(part, self.metadata)
            yield table.filter(pa.array(seen.add(_keys_of(table), table["score"].to_numpy())))

    def __iter__(self) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """(query_id, doc_ids, scores) as written, part by part: a query may come in pieces, a pair comes only once."""
        for table in self._distinct():
            queries, documents, scores = (*(table[name].to_pylist() for name in SCHEMA.names[:2]), table["score"])
            for query_id, group in itertools.groupby(range(len(queries)), queries.__getitem__):
                rows = list(group)
                yield query_id, documents[rows[0] : rows[-1] + 1], scores[rows[0] : rows[-1] + 1].to_numpy()

    def export(self, file: str | Path, calibrator: Callable[[np.ndarray], np.ndarray] | None = None) -> int:
        """Write all scores to one Parquet file that carries the fingerprints; returns the pairs written.

        Args:
            calibrator: write what it makes of the scores, as probabilities (see scores/calibration.py).
        """
        pairs = 0
        file = Path(file)
        check_file(file, mark="PAR1")
        metadata = self.metadata | {"written_by": "rankdistill"}
        if calibrator is not None:
            metadata |= {"score_kind": "probability", "teacher": fingerprint([self.teacher, str(calibrator)])}
        schema = SCHEMA.with_metadata(metadata)
        with written_whole(file) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in self._distinct():
                if calibrator is not None:
                    scores = calibrator(table["score"].to_numpy()).astype(np.float32)
                    table = table.set_column(2, SCHEMA.field("score"), pa.array(scores))
                writer.write_table(table.replace_schema_metadata(schema.metadata))
                pairs += len(table)
        return pairs


def _keys(query_id: str, doc_ids: Sequence[str]) -> np.ndarray:
    return pair_keys(hash_ids([query_id]), hash_ids(doc_ids))


class ScoreStore:
    """All teachers' scores below one root folder (default: below the user's cache folder)."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root) if root is not None else cache_dir() / "scores"

    def __repr__(self) -> str:
        return f"ScoreStore({self.root}: {len(list(self.root.glob(f'*/*/{MANIFEST}')))} teacher-collection folders)"

    def folder(
        self,
        teacher_fingerprint: str,
        collection_fingerprint: str,
        score_kind: ScoreKind,
        describe: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> TeacherScores:
        """Open one teacher's scores on one collection; made if there are none.

        Args:
            describe: anything a reader wants to know (teacher settings, collection name): kept in the manifest.
            options: of `TeacherScores`.
        """
        if score_kind not in get_args(ScoreKind):
            raise UsageError(f"unknown score kind {score_kind!r}", fix=", ".join(get_args(ScoreKind)))
        path = self.root / teacher_fingerprint / collection_fingerprint
        content = {
            "kind": "scores",
            "schema": SCHEMA_VERSION,
            "teacher": teacher_fingerprint,
            "collection": collection_fingerprint,
            "score_kind": score_kind,
            "description": dict(describe or {}),
        }
        if not (path / MANIFEST).exists():
            with locked(path):
                if not (path / MANIFEST).exists():  # another process may have been faster
                    write_atomically(path / MANIFEST, json.dumps(content, indent=2, default=str) + "\n")
        scores = TeacherScores(path, **options)
        if scores.teacher != teacher_fingerprint:
            raise RankdistillError("this folder holds another teacher's scores", where=str(path))
        return scores.check(collection=collection_fingerprint, score_kind=score_kind)
