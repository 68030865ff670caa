"""Scored lists: candidates, teacher scores and labels joined into the one thing that training reads.

An artifact of kind "lists", all columns memory-mapped: `queries.arrow` (query_id), `offsets.npy` int64 [Q+1],
`doc_rows.npy` int32, `scores.npy` float32, `relevance.npy` int32 (−1 = not judged), and, where several teachers gave
the scores, `disagreement.npy` float32 (standard deviation over the teachers of their normalised scores).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rankdistill.artifacts import Artifact, fingerprint, open_artifact, write_artifact
from rankdistill.collections import Collection
from rankdistill.collections.storage import Column, TableWriter
from rankdistill.errors import RankdistillError
from rankdistill.progress import warn
from rankdistill.scores.ensemble import Ensemble, ScoreSource

DISAGREEMENT = "disagreement.npy"
COLUMNS: dict[str, type[np.generic]] = {"doc_rows": np.int32, "scores": np.float32, "relevance": np.int32}
COUNTED = (
    *("lists", "documents", "positives", "without_score", "positives_without_score", "unknown_documents"),
    *("repeated_documents", "short_lists", "lists_without_positive", "doubtful_negatives"),
)


class ScoredList(NamedTuple):
    """One query's list, in the order of its candidates: arrays [n] of document rows, teacher scores and labels."""

    query_id: str
    doc_rows: np.ndarray
    scores: np.ndarray
    relevance: np.ndarray


def lists_fingerprint(
    collection: Collection,
    split: str | None,
    inputs: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The fingerprint that `build_lists` will give: whether lists on disk are these can be told before any is made."""
    labels = collection.labels_fingerprint(split)
    return fingerprint(["lists", split, collection.fingerprint, dict(inputs or {}), dict(settings or {}), *labels])


def build_lists(
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    scores: ScoreSource | Callable[[str, Sequence[str]], np.ndarray] | None,
    collection: Collection,
    split: str | None,
    out: str | Path,
    *,
    inputs: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    negatives_below: float | None = None,
    extra_positives: bool = False,
) -> ScoredLists:
    """Join candidates, teacher scores and the split's labels; memory does not grow with the number of queries.

    A document without a score is dropped, never given a guessed one, be it the labelled positive; so are documents
    that the collection lacks, and then lists of fewer than two documents. All of it is counted.

    Args:
        candidates: (query_id, doc_ids, _) a query.
        scores: (query_id, doc_ids) → float32 [n], NaN where missing, or what has it as `scores_of`; all 0 without. Of
            an `Ensemble` the column `disagreement` is written too, and what does not fit between its teachers (one that
            lacks many documents, scales far apart) is said.
        split: whose qrels give the relevance; candidates of other queries are kept, unjudged (all, without a split).
        out: the artifact's folder.
        inputs: fingerprints of candidates and teacher; with the collection's they decide the lists' own.
        negatives_below, extra_positives: see `second_look`; with what else shapes the lists they belong in `settings`.
    """
    qrels = collection.qrels(split) if split is not None else {}
    ensemble = scores if isinstance(scores, Ensemble) else None
    scores_of = scores if scores is None or callable(scores) else scores.scores_of
    counts = dict.fromkeys(COUNTED, 0)
    with write_artifact(
        out,
        kind="lists",
        fingerprint=lists_fingerprint(collection, split, inputs, settings),
        settings={"split": split, **(settings or {})},
        inputs={"collection": collection.fingerprint, **(inputs or {})},
    ) as writer:
        dtypes = COLUMNS if ensemble is None else {**COLUMNS, "disagreement": np.float32}
        queries = TableWriter(writer.path / "queries.arrow", pa.schema([("query_id", pa.string())]))
        with ExitStack() as stack:
            stack.callback(queries.abandon)
            columns = {
                name: stack.enter_context(Column(writer.path / f"{name}.npy", dtype)) for name, dtype in dtypes.items()
            }
            offsets = stack.enter_context(Column(writer.path / "offsets.npy", np.int64))
            offsets.append(np.zeros(1))
            for query_id, listed, _ in candidates:
                doc_ids = list(dict.fromkeys(listed))
                counts["repeated_documents"] += len(listed) - len(doc_ids)
                judged = qrels.get(query_id, {})
                recorded = scores_of(query_id, doc_ids) if scores_of is not None else np.zeros(len(doc_ids))
                teacher = np.asarray(recorded, dtype=np.float32)
                if np.isinf(teacher).any():
                    raise RankdistillError("a teacher score is infinite", where=f"query {query_id!r}")
                rows = np.asarray(collection.doc_rows(doc_ids))
                relevance = np.array([judged.get(doc_id, -1) for doc_id in doc_ids], dtype=np.int32)
                unscored, unknown = np.isnan(teacher), rows < 0
                counts["without_score"] += int(unscored.sum())
                counts["positives_without_score"] += int((unscored & (relevance > 0)).sum())
                counts["unknown_documents"] += int(unknown.sum())
                relevance, doubtful = second_look(teacher, relevance, negatives_below, extra_positives)
                counts["doubtful_negatives"] += int(doubtful.sum())
                keep = ~(unscored | unknown | doubtful)
                if keep.sum() < 2:
                    counts["short_lists"] += 1
                    continue
                values: dict[str, np.ndarray] = {"doc_rows": rows, "scores": teacher, "relevance": relevance}
                if ensemble is not None:
                    values["disagreement"] = ensemble.disagreement_of(query_id, doc_ids)
                for name, column in columns.items():
                    column.append(values[name][keep])
                counts["documents"] = columns["doc_rows"].length
                offsets.append(np.array([counts["documents"]]))
                positives = int((relevance[keep] > 0).sum())
                counts["positives"] += positives
                counts["lists_without_positive"] += positives == 0
                queries.add(query_id)
                counts["lists"] += 1
            queries.close()
        if not counts["lists"]:
            raise RankdistillError(
                "no list with two scored documents is left" if scores_of else "no list of two documents is left",
                where=str(out),
                fix="score the candidates of this split with this teacher first"
                if counts["without_score"]
                else "the sources find too few documents: see what `mine` said, and try another source or language",
            )
        writer.counts.update(counts)
    for name, text in (
        ("without_score", "candidates have no teacher score and were left out"),
        ("unknown_documents", "candidates are not in the collection and were left out"),
        ("short_lists", "lists of fewer than two scored documents were left out"),
    ):
        if counts[name]:
            warn(f"{counts[name]:,} {text}")
    for problem in ensemble.problems() if ensemble is not None else ():
        warn(problem)
    return ScoredLists.open(out)


def second_look(
    scores: np.ndarray, relevance: np.ndarray, negatives_below: float | None = None, extra_positives: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Unjudged documents of one list that its teacher likes nearly as much as the labelled positive, or more: labels
    are incomplete, and many of these are relevant (positive-aware mining, de Souza P. Moreira et al. 2024,
    arXiv:2407.15831).

    Args:
        scores, relevance: [documents]; the positive's score p is the highest of those labelled relevant.
        negatives_below: leave out what scores above p - (1 - this) · |p|; of a negative p too a share below it.
        extra_positives: label what scores p or more relevant (1), instead of leaving it out.

    Returns:
        The relevance of each document, and which are left out, bool. Both as they were where nothing is labelled.
    """
    labelled = scores[(relevance > 0) & ~np.isnan(scores)]
    doubtful = np.zeros(len(scores), dtype=bool)
    if len(labelled):
        best, unjudged = labelled.max(), relevance < 0
        if extra_positives:
            relevance = np.where(unjudged & (scores >= best), 1, relevance).astype(relevance.dtype)
        if negatives_below is not None:
            doubtful = (relevance < 0) & (scores > best - (1 - negatives_below) * abs(best))
    return relevance, doubtful


class ScoredLists:
    """Scored lists on disk, memory-mapped; `lists[i]` is the i-th."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        path = artifact.path
        try:
            self._queries = pa.ipc.open_file(pa.memory_map(str(path / "queries.arrow"))).read_all()["query_id"]
            self.offsets: np.ndarray = np.load(path / "offsets.npy", allow_pickle=False)
            dtypes = {**COLUMNS, "disagreement": np.float32} if (path / DISAGREEMENT).is_file() else COLUMNS
            columns = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in dtypes}
            if any(column.dtype != dtypes[name] for name, column in columns.items()):
                raise ValueError("a column has the wrong type")
            if len(self.offsets) != len(self._queries) + 1 or (np.diff(self.offsets) < 1).any():
                raise ValueError("offsets do not match the queries")
            if any(len(column) != self.offsets[-1] for column in columns.values()):
                raise ValueError("the columns differ in length")
        except (OSError, ValueError, EOFError, IndexError, pa.ArrowException) as error:
            raise RankdistillError(
                f"these scored lists are damaged: {error}", where=str(path), fix="delete the folder and run again"
            ) from None
        self.doc_rows, self.scores, self.relevance = (columns[name] for name in COLUMNS)
        # [documents] float32 between the teachers of an ensemble
        self.disagreement: np.ndarray | None = columns.get("disagreement")
        for name, column in (("teacher score", self.scores), ("disagreement", self.disagreement)):
            if column is not None:
                self._check_finite(name, column)

    def _check_finite(self, name: str, column: np.ndarray) -> None:
        for start in range(0, len(column), 1 << 22):
            for place in np.flatnonzero(~np.isfinite(column[start : start + (1 << 22)])):
                query = self._queries[int(np.searchsorted(self.offsets, start + place, "right")) - 1]
                where = f"{self.artifact.path}, query {query.as_py()!r}"
                raise RankdistillError(f"a {name} is {column[start + place]}", where=where)

    @classmethod
    def open(cls, path: str | Path, collection: Collection | None = None) -> ScoredLists:
        """Open and check: whole, finite, and (when one is given) made from this collection.

        Raises:
            RankdistillError: they are not.
        """
        artifact = open_artifact(path, "lists")
        made_from = artifact.manifest.get("inputs", {}).get("collection")
        if collection is not None and made_from != collection.fingerprint:
            raise RankdistillError(
                f"these lists belong to another collection ({made_from}, not {collection.fingerprint})", where=str(path)
            )
        return cls(artifact)

    @property
    def fingerprint(self) -> str:
        return self.artifact.fingerprint

    @property
    def query_ids(self) -> list[str]:
        return [str(query_id) for query_id in self._queries.to_pylist()]

    def __len__(self) -> int:
        return len(self._queries)

    def _part(self, index: int) -> slice:
        """Where the i-th list lies in the columns."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self.offsets[index % len(self) :][:2].tolist()
        return slice(start, end)

    def __getitem__(self, index: int) -> ScoredList:
        part = self._part(index)
        query_id = str(self._queries[index % len(self)].as_py())
        return ScoredList(query_id, self.doc_rows[part], self.scores[part], self.relevance[part])

    def disagreement_of(self, index: int) -> np.ndarray | None:
        """float32 [n] of the i-th list: the standard deviation over the teachers of a document's normalised scores (0
        where one alone has scored it), a view into the file; None where the scores come from one teacher.
        """
        return None if self.disagreement is None else self.disagreement[self._part(index)]

    def __repr__(self) -> str:
        return f"ScoredLists({len(self):,} lists, {int(self.offsets[-1]):,} documents at {self.artifact.path})"
