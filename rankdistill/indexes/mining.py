"""Mining: which documents a query's list may hold. A search over one or several engines, mixed by quota.

The result is a run kept for training: candidates.parquet with query_id, doc_id, rank, score. With one source and no
labelled documents put first, `score` is the engine's; otherwise, since scores of different engines do not compare,
it is 1/rank.

What grows: the ids of the queries (and, of a foreign run, their offsets); texts, hits and lists are those of one batch.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rankdistill.artifacts import Artifact, ArtifactWriter, fingerprint, obtain, written_whole
from rankdistill.collections import Collection
from rankdistill.collections.collection import Document, Query, joined
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Engine, Hits, Rows, Scores
from rankdistill.indexes.sources import SHARE, CandidateSource, RecordedRun
from rankdistill.progress import progress, say, warn
from rankdistill.runs import SCHEMA, RunWriter, iter_run, write_trec

FILE = "candidates.parquet"
SPARE = 8  # documents searched for in place of those whose text is the query's or a positive's
MANY_EMPTY = 0.2  # of the queries without a hit: a source that finds nothing is named
BATCH = 256  # queries searched, and saved, at a time


@dataclass(frozen=True)
class Source:
    """An engine and its share of each list; the fields are those of `CandidateSource`."""

    engine: Engine | RecordedRun
    quota: int | None = None
    rank_from: int = 1
    rank_to: int | None = None
    margin: float | None = None
    relative_margin: float | None = None

    @classmethod
    def of(
        cls,
        settings: CandidateSource,
        collection: Collection,
        folder: Path,
        opened: dict[str, Engine | RecordedRun] | None = None,
    ) -> Source:
        """Open a recipe's source; what it needs is built below `folder`, or taken from the `opened` engines."""
        opened = {} if opened is None else opened
        key = settings.engine_key()
        if key not in opened:
            opened[key] = settings.open(collection, folder)
        return cls(opened[key], **{name: getattr(settings, name) for name in SHARE})

    def settings(self) -> dict[str, object]:
        share = {name: getattr(self, name) for name in SHARE}
        return {"engine": self.engine.name, "fingerprint": self.engine.fingerprint, **share}


def mine(
    collection: Collection,
    sources: Sequence[Source],
    out: str | Path,
    *,
    depth: int = 100,
    split: str | None = None,
    query_ids: Sequence[str] | None = None,
    include_positives: bool = True,
    exclude_positives: bool = False,
    max_positives: int | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    drop_same_texts: bool = True,
    batch_size: int = BATCH,
) -> Artifact:
    """Mine candidates for a split's queries, or for any queries of the collection.

    Sources take turns: each in its order gives its next document that no other has given, until its quota or `depth` is
    reached. Resumable: after a kill only the batch in flight is searched again.

    Args:
        depth: mined documents a query, over all sources; labelled ones put first do not count.
        split: whose labels count; without it queries are unlabelled.
        query_ids: mine these; all of the split (of the collection) unless given. Those without labels come last.
        include_positives: put the documents labelled relevant (relevance > 0) first.
        exclude_positives: leave them out altogether; with neither they stay where they are mined.
        max_positives: put at most so many first, the most relevant, then the best ranked; the rest is left out.
        margin: default of the sources': drop a mined document that scores above best labelled score - margin …
        relative_margin: … or above (1 - relative_margin) · that score; none where no labelled document is found.
        drop_same_texts: leave out unlabelled documents whose text is the query's or a relevant document's: as negatives
            they would teach the opposite.
        batch_size: queries at a time.
    """
    alone = depth if len(sources) == 1 else None
    defaults: dict[str, Any] = {"quota": alone, "margin": margin, "relative_margin": relative_margin}
    sources = [
        replace(source, **{name: value for name, value in defaults.items() if getattr(source, name) is None})
        for source in sources
    ]
    if not sources:
        raise UsageError("there is nothing to mine from", where="candidates.sources")
    if any(source.quota is None for source in sources):
        raise UsageError("each of several sources needs a quota", where="candidates.sources", fix="quota: 50")
    settings = {
        "sources": [source.settings() for source in sources],
        "depth": depth,
        "split": split,
        "include_positives": include_positives,
        "exclude_positives": exclude_positives,
        "max_positives": max_positives,
        "drop_same_texts": drop_same_texts,
        "batch_size": batch_size,
        "queries": None if query_ids is None else hashlib.sha256("\0".join(query_ids).encode()).hexdigest()[:16],
    }
    total = len(set(query_ids) if query_ids is not None else collection.query_ids(split))
    if not total:
        raise RankdistillError("there are no queries to mine for", where=f"{collection.name}, split {split}")
    miner = _Miner(collection, sources, depth, include_positives, exclude_positives, max_positives, drop_same_texts)

    def make(writer: ArtifactWriter) -> None:
        if not (writer.path / FILE).is_file():  # else a kill came after all batches were joined
            parts: list[Path] = []
            with progress("mine", total, "queries") as bar:
                for queries in _batches(collection, split, query_ids, batch_size):
                    part = writer.path / f"part-{len(parts):06d}.parquet"
                    if not part.is_file():
                        with RunWriter(part) as run:
                            for query_id, doc_ids, scores in miner.lists(queries):
                                run.add(query_id, doc_ids, scores)
                    parts.append(part)
                    bar.advance(len(queries))
            _join(parts, writer.path / FILE)
        for part in writer.path.glob("part-*.parquet"):
            part.unlink()
        miner.say_losses(total)
        writer.counts.update({"queries": total, "candidates": pq.read_metadata(writer.path / FILE).num_rows})
        encoders = {id(encoder): encoder for source in sources if (encoder := getattr(source.engine, "encoder", None))}
        if cut := sum(getattr(encoder, "cut", {}).get("query", 0) for encoder in encoders.values()):
            writer.counts["cut_queries"] = cut  # by these encoders since they were loaded
        writer.notes["file"] = FILE

    labels = collection.labels_fingerprint(split)
    inputs = {f"source {place}": source.engine.fingerprint for place, source in enumerate(sources, 1)}
    return obtain(
        out,
        kind="candidates",
        fingerprint=fingerprint(["candidates", settings, collection.fingerprint, *labels]),
        settings=settings,
        inputs={"collection": collection.fingerprint, **inputs},
        make=make,
        resume=True,
    )


def export_trec(candidates: Artifact, path: str | Path, tag: str = "rankdistill") -> None:
    """Write candidates as a TREC run file, streaming."""
    write_trec(iter_run(candidates.path / FILE), path, tag)


def _batches(
    collection: Collection, split: str | None, query_ids: Sequence[str] | None, size: int
) -> Iterator[list[Query]]:
    """The queries to mine, with their labels, in batches that are the same at each call."""
    if query_ids is None:
        yield from collection.iter_queries(split, size)
        return
    missing = dict.fromkeys(query_ids)
    batch: list[Query] = []
    for queries in collection.iter_queries(split, size) if split is not None else ():
        batch += [query for query in queries if query.query_id in missing]
        for query in queries:
            missing.pop(query.query_id, None)
        while len(batch) >= size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch
    unlabelled = list(missing)
    for start in range(0, len(unlabelled), size):
        ids = unlabelled[start : start + size]
        yield [Query(query_id, text, {}) for query_id, text in zip(ids, collection.query_texts(ids), strict=True)]


@dataclass(frozen=True)
class _Miner:
    collection: Collection
    sources: Sequence[Source]
    depth: int
    include_positives: bool
    exclude_positives: bool
    max_positives: int | None
    drop_same_texts: bool
    dropped: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)  # engine → queries it finds nothing for

    def say_losses(self, queries: int) -> None:
        """Name the engines that find nothing for many queries, and say how many documents were left out."""
        for engine, count in self.empty.items():
            if count > MANY_EMPTY * queries:
                hint = ": is its language right? lucene_bm25 parts words of more scripts" if engine == "bm25" else ""
                warn(f"mine: {engine} finds nothing for {count:,} of {queries:,} queries{hint}")
        if self.dropped["documents"]:
            same = f"{self.dropped['documents']:,} documents with the text of their query or of a relevant document"
            say(f"mine: {same} were left out, of {self.dropped['queries']:,} queries")

    def lists(self, queries: Sequence[Query]) -> Iterator[tuple[str, list[str], Scores]]:
        """(query id, document ids, scores) of each query that has any candidate."""
        labels = [self._labels(query.relevant) for query in queries]
        of_sources = self._search(queries, max(map(len, labels)))
        for query, labelled, *hits in zip(queries, labels, *of_sources, strict=True):
            same = self._same_texts(query, hits, labelled) if self.drop_same_texts else set()
            rows, scores = self._mix(hits, labelled, same)
            if len(rows):
                yield query.query_id, self.collection.doc_ids(rows), scores

    def _same_texts(self, query: Query, hits: Sequence[Hits], labels: dict[int, int]) -> set[int]:
        """Rows of unlabelled documents whose text is the query's or a relevant document's, but for case and spaces."""
        rows = {row for source, its in zip(self.sources, hits) for row in its.rows[source.rank_from - 1 :].tolist()}
        unlabelled = sorted(rows - labels.keys())
        taken = {_plain(query.text)}.union(*map(_plain_forms, self.collection.documents(list(labels)))) - {""}
        documents = zip(unlabelled, self.collection.documents(unlabelled), strict=True)
        same = {row for row, document in documents if taken & _plain_forms(document)}
        self.dropped.update(documents=len(same), queries=bool(same))
        return same

    def _labels(self, relevant: dict[str, int]) -> dict[int, int]:
        """row → relevance of the documents labelled relevant."""
        ids = [doc_id for doc_id, relevance in relevant.items() if relevance > 0]
        pairs = zip(self.collection.doc_rows(ids).tolist(), ids, strict=True)
        return {row: relevant[doc_id] for row, doc_id in pairs if row >= 0}

    def _search(self, queries: Sequence[Query], positives: int) -> list[list[Hits]]:
        """For each source its hits of each query, deep enough that the quota can be filled after documents are passed
        over. Sources of one engine share one search, as deep as the deepest of them needs."""
        taken = sum(other.quota or 0 for other in self.sources)
        depths: dict[str, int] = {}
        needed = []
        for source in self.sources:
            filtered = source.margin is not None or source.relative_margin is not None
            least = source.rank_from - 1 + taken * (2 if filtered else 1) + positives
            needed.append(source.rank_to or least + SPARE * self.drop_same_texts)
            key = source.engine.fingerprint
            depths[key] = max(needed[-1], depths.get(key, 0))
        searched: dict[str, list[Hits]] = {}
        for engine in (source.engine for source in self.sources):
            if (key := engine.fingerprint) not in searched:
                if isinstance(engine, RecordedRun):
                    searched[key] = engine.recorded([query.query_id for query in queries], depths[key])
                else:
                    searched[key] = engine.search([query.text for query in queries], depths[key])
                self.empty[engine.name] += sum(not len(hits.rows) for hits in searched[key])
        return [
            [Hits(hits.rows[:depth], hits.scores[:depth]) for hits in searched[source.engine.fingerprint]]
            for source, depth in zip(self.sources, needed, strict=True)
        ]

    def _mix(self, hits: Sequence[Hits], labels: dict[int, int], same: Set[int]) -> tuple[Rows, Scores]:
        """One query's list: labelled documents first if wanted, then the sources' in turn."""
        first = self._first(hits, labels) if self.include_positives else []
        passed_over = same | labels.keys() if self.include_positives or self.exclude_positives else same
        offers = [self._offer(source, its, labels, passed_over) for source, its in zip(self.sources, hits, strict=True)]
        mined: dict[int, float] = {}
        left = [source.quota or 0 for source in self.sources]
        turns = deque(range(len(self.sources)))
        while turns and len(mined) < self.depth:
            place = turns.popleft()
            offer = next(((row, score) for row, score in offers[place] if row not in mined), None)
            if offer is not None:
                mined[offer[0]] = offer[1]
                left[place] -= 1
                if left[place]:
                    turns.append(place)
        rows = np.array([*first, *mined], np.int64)
        if first or len(self.sources) > 1:
            return rows, (1 / np.arange(1, len(rows) + 1)).astype(np.float32)
        return rows, np.array(list(mined.values()), np.float32)

    def _first(self, hits: Sequence[Hits], labels: dict[int, int]) -> list[int]:
        """The labelled documents: most relevant first, then best ranked by any source, then by row."""
        ranks: dict[int, int] = {}
        for its in hits:
            for rank, row in enumerate(its.rows.tolist()):
                if row in labels:
                    ranks[row] = min(rank, ranks.get(row, rank))
        order = sorted(labels, key=lambda row: (-labels[row], row not in ranks, ranks.get(row, 0), row))
        return order[: self.max_positives]

    def _offer(
        self, source: Source, hits: Hits, labels: dict[int, int], passed_over: Set[int]
    ) -> Iterator[tuple[int, float]]:
        """A source's documents that may be taken, best first."""
        pairs = list(zip(hits.rows.tolist(), hits.scores.tolist(), strict=True))
        best, limit = max((score for row, score in pairs if row in labels), default=None), np.inf
        if best is not None and source.margin is not None:
            limit = best - source.margin
        if best is not None and source.relative_margin is not None:
            # Of |score|, so that a negative score is lowered by a margin too.
            limit = min(limit, best - source.relative_margin * abs(best))
        for row, score in pairs[source.rank_from - 1 : source.rank_to or len(pairs)]:
            if row not in passed_over and (score <= limit or row in labels):
                yield row, score


def same_text(text: str, document: Document) -> bool:
    return bool(text.strip()) and _plain(text) in _plain_forms(document)


def _plain_forms(document: Document) -> set[str]:
    """A document's text without and with its title, as they are compared."""
    return {_plain(document.text), _plain(joined(document.title, document.text))}


def _plain(text: str) -> str:
    """A text as it is compared: Unicode composed, without case, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _join(parts: Sequence[Path], out: Path) -> None:
    """Copy the parts' row groups into one file, which appears when it is complete."""
    with written_whole(out) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part, schema=SCHEMA)
            if len(table):
                writer.write_table(table)
