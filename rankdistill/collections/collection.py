"""A collection: documents, queries and judgments in named splits, read from the cache through a memory map."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rankdistill.artifacts import Artifact
from rankdistill.collections.storage import IdIndex, Rows, Table, id_hash, readable
from rankdistill.errors import RankdistillError

# Names under which collections publish what is one thing here: what one tunes on.
DEV_NAMES = ("dev", "validation", "valid", "val", "dev.small")


class Document(NamedTuple):
    doc_id: str
    title: str
    text: str


class Query(NamedTuple):
    """`relevant`: judged documents with their relevance, 0 and below (judged, not relevant) included."""

    query_id: str
    text: str
    relevant: dict[str, int]


def joined(title: str, text: str) -> str:
    """Title and text as one text; a title that is empty or already begins the text is not repeated."""
    if not title or text.startswith(title):
        return text
    return f"{title} {text}" if text else title


class Collection:
    """Documents, queries and qrels of one collection (see `open_collection`).

    Rows are positions in the documents file; ids are strings. Nothing holds all texts in memory.

    Args:
        artifact: kind "collection", as `rankdistill.collections.writer.imported` leaves it.
        name: what tables and file names call it.
        spec: what `open_collection` was given.
        unlabelled: query id → text of further queries (see `with_queries`); held in memory.
    """

    def __init__(self, artifact: Artifact, name: str, spec: str, unlabelled: Mapping[str, str] | None = None) -> None:
        self.artifact, self.name, self.spec = artifact, name, spec
        self.unlabelled = dict(unlabelled or {})
        self.path: Path = artifact.path
        self.fingerprint: str = artifact.fingerprint
        with readable(self.path):
            self.document_count = int(artifact.counts["documents"])
            self.query_count = int(artifact.counts["queries"])
            self.splits: tuple[str, ...] = tuple(artifact.manifest["splits"])
            self.problems: list[str] = list(artifact.manifest["problems"])
        self._documents = Table(self.path / "documents.arrow")
        self._document_index = IdIndex(self.path, "documents", self._documents, "doc_id")
        self._queries = Table(self.path / "queries.arrow")
        self._query_index = IdIndex(self.path, "queries", self._queries, "query_id")
        self._tables: dict[str, Table] = {}
        if (len(self._documents), len(self._queries)) != (self.document_count, self.query_count):
            with readable(self.path):
                raise ValueError("the tables have other lengths than the manifest")

    def __reduce__(self) -> tuple[type[Collection], tuple[Artifact, str, str, dict[str, str]]]:
        # Data loader workers open the files anew.
        return Collection, (self.artifact, self.name, self.spec, self.unlabelled)

    def __len__(self) -> int:
        return self.document_count

    def __repr__(self) -> str:
        splits = ", ".join(f"{split} {len(self.query_rows(split)):,}" for split in self.splits)
        return (
            f"Collection({self.name}: {self.document_count:,} documents, {self.query_count:,} queries"
            f"{'; judged: ' + splits if splits else ', no judgments'})"
        )

    # Documents

    def doc_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        return self._documents.take("doc_id", rows)

    def doc_rows(self, ids: Sequence[str]) -> Rows:
        """int64 [len(ids)], -1 where an id is unknown."""
        return self._document_index.lookup(ids)

    def documents(self, rows: Sequence[int] | Rows) -> list[Document]:
        columns = (self._documents.take(name, rows) for name in Document._fields)
        return [Document(*values) for values in zip(*columns, strict=True)]

    def document_texts(self, rows: Sequence[int] | Rows) -> list[str]:
        """Title and text of each row as one text (see `joined`)."""
        titles, texts = self._documents.take("title", rows), self._documents.take("text", rows)
        return [joined(title, text) for title, text in zip(titles, texts, strict=True)]

    def iter_documents(self, batch_size: int = 1024, start: int = 0) -> Iterator[tuple[int, list[str]]]:
        """(row of the first, at most `batch_size` texts as `document_texts` gives them), all documents from `start`."""
        for first in range(start, self.document_count, batch_size):
            yield first, self.document_texts(range(first, min(first + batch_size, self.document_count)))

    # Queries and judgments

    def split_name(self, split: str) -> str:
        """The split of that name; dev, validation, valid, val and dev.small stand for each other.

        Raises:
            RankdistillError: the collection has no such split.
        """
        names = (split, *DEV_NAMES) if split in DEV_NAMES else (split,)
        for name in names:
            if name in self.splits:
                return name
        raise RankdistillError(
            f"collection {self.name} has no split {split!r}",
            where=self.spec,
            fix=f"its judged splits are: {', '.join(self.splits) or 'none'}",
        )

    def _qrels_table(self, split: str) -> Table:
        name = self.split_name(split)
        if name not in self._tables:
            self._tables[name] = Table(self.path / "qrels" / f"{name}.arrow")
        return self._tables[name]

    def query_rows(self, split: str | None = None) -> Rows:
        """Rows of the queries that have judgments in `split`, in file order; None: all queries."""
        if split is None:
            return np.arange(self.query_count, dtype=np.int64)
        parts = [np.empty(0, np.int64)]
        for batch in self._qrels_table(split).batches:
            rows = batch.column("query_row").to_numpy()
            parts.append(rows[batch.column("doc_row").to_numpy() >= 0])
        return np.unique(np.concatenate(parts))

    def query_ids(self, split: str | None = None) -> list[str]:
        return self._queries.take("query_id", self.query_rows(split))

    def query_texts(self, ids: Sequence[str]) -> list[str]:
        """
        Raises:
            RankdistillError: an id is unknown.
        """
        rows = self._query_index.lookup(ids)
        if len(rows) and rows.min() < 0:
            if self.unlabelled:
                return self._mixed_texts(ids, rows)
            unknown = ids[int(np.argmin(rows))]
            raise RankdistillError(f"collection {self.name} has no query {unknown!r}", where=self.spec)
        return self._queries.take("text", rows)

    def _mixed_texts(self, ids: Sequence[str], rows: Rows) -> list[str]:
        own = iter(self._queries.take("text", rows[rows >= 0]))
        try:
            return [next(own) if row >= 0 else self.unlabelled[query_id] for query_id, row in zip(ids, rows)]
        except KeyError as error:
            raise RankdistillError(f"collection {self.name} has no query {error}", where=self.spec) from None

    def has_queries(self, ids: Sequence[str]) -> list[bool]:
        return [bool(row >= 0) or i in self.unlabelled for i, row in zip(ids, self._query_index.lookup(ids))]

    def with_queries(self, texts: Sequence[str]) -> Collection:
        """The same collection with further queries, which have no labels; `unlabelled` holds their ids and texts.

        An id is a hash of its text, so that the same text is the same query everywhere and the collection's fingerprint
        may stay: scores, candidates and indexes made with it still belong to it. Texts that repeat count once.
        """
        new = {f"text-{hashlib.sha256(text.encode()).hexdigest()[:20]}": text for text in texts}
        return Collection(self.artifact, self.name, self.spec, {**self.unlabelled, **new})

    def iter_queries(self, split: str | None = None, batch_size: int = 512) -> Iterator[list[Query]]:
        """Queries with their judgments in `split`, in file order (None: all queries, no judgments)."""
        if split is None:
            for first in range(0, self.query_count, batch_size):
                rows = range(first, min(first + batch_size, self.query_count))
                ids, texts = self._queries.take("query_id", rows), self._queries.take("text", rows)
                yield [Query(query_id, text, {}) for query_id, text in zip(ids, texts, strict=True)]
            return
        judged = self._iter_judged(split)
        while group := dict(itertools.islice(judged, batch_size)):
            texts = self.query_texts(list(group))
            yield [Query(query_id, text, group[query_id]) for query_id, text in zip(group, texts, strict=True)]

    def _iter_judged(self, split: str, missing: bool = False) -> Iterator[tuple[str, dict[str, int]]]:
        """(query id, document id → relevance): the file is sorted by query, so memory is one query's."""
        current, relevant = "", dict[str, int]()
        for batch in self._qrels_table(split).batches:
            columns = (batch.column(name).to_pylist() for name in ("query_id", "doc_id", "relevance", "doc_row"))
            for query_id, doc_id, relevance, row in zip(*columns, strict=True):
                if query_id != current:
                    if relevant:
                        yield current, relevant
                    current, relevant = query_id, {}
                if row >= 0 or missing:
                    relevant[doc_id] = relevance
        if relevant:
            yield current, relevant

    def qrels(self, split: str, *, missing: bool = False) -> dict[str, dict[str, int]]:
        """query id → document id → relevance.

        Args:
            split: one of `splits`.
            missing: also the judgments of documents the collection does not hold. A run made elsewhere, over the
                whole corpus, is measured with them: without them the ideal ranking is another one.
        """
        return dict(self._iter_judged(split, missing))

    def training_splits(self, dev_fraction: float = 0.1, seed: int = 42) -> tuple[list[str], list[str]]:
        """(train query ids, dev query ids).

        The collection's own dev split where there is one. Else the `dev_fraction` of the train queries (at least
        one) with the smallest hash of seed and id: it does not depend on the file's order, and a query that is
        added moves at most one other.

        Raises:
            RankdistillError: there is no train split, or it has fewer than two queries and no dev split beside it.
        """
        train = self.query_ids("train")
        if any(name in self.splits for name in DEV_NAMES):
            return train, self.query_ids("dev")
        if len(train) < 2:
            raise RankdistillError(f"collection {self.name} has too few train queries to hold out a dev split")
        return held_out(train, dev_fraction, seed)

    # For people

    def describe(self) -> dict[str, Any]:
        """Counts, lengths in words, judgments per query of each split, and what import found wrong."""
        splits = {}
        for split in self.splits:
            grades: Counter[int] = Counter()
            judged: list[int] = []
            for _, relevant in self._iter_judged(split):
                judged.append(len(relevant))
                grades.update(relevant.values())
            per_query = np.array(judged) if judged else np.zeros(1)
            splits[split] = {
                "queries": len(judged),
                "judgments": int(sum(judged)),
                "judged_per_query": {"mean": round(float(per_query.mean()), 2), "max": int(per_query.max())},
                "grades": {str(grade): grades[grade] for grade in sorted(grades)},
                "judged_share_of_pairs": round(sum(judged) / max(1, len(judged) * self.document_count), 6),
            }
        return {
            "name": self.name,
            "spec": self.spec,
            "fingerprint": self.fingerprint,
            "path": str(self.path),
            "documents": self.document_count,
            "queries": self.query_count,
            "words": self.artifact.manifest["words"],
            "splits": splits,
            "problems": self.problems,
        }


def held_out(query_ids: Sequence[str], fraction: float = 0.1, seed: int = 42) -> tuple[list[str], list[str]]:
    """(rest, held out) of at least two queries: the `fraction` with the smallest hash of seed and id, at least one."""
    count = min(len(query_ids) - 1, max(1, round(len(query_ids) * fraction)))
    chosen = set(sorted(query_ids, key=lambda query_id: id_hash(f"{seed}:{query_id}"))[:count])
    return [i for i in query_ids if i not in chosen], [i for i in query_ids if i in chosen]
