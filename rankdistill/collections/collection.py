"""A collection: documents, queries and judgments in named splits, read from the cache through a memory map."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rankdistill.artifacts import Artifact, fingerprint
from rankdistill.collections.passages import document_of, judged_documents, passage_id
from rankdistill.collections.storage import IdIndex, Rows, Table, id_hash, readable
from rankdistill.errors import RankdistillError

UNJUDGED = (
    "it has no judgments: `rankdistill generate` makes queries for its documents, and candidates.unlabelled: titles "
    "(recipe documents_only) learns without any"
)
# Names under which collections publish what is one thing here: what one tunes on.
DEV_NAMES = ("dev", "validation", "valid", "val", "dev.small")
# The splits of queries that were made from the documents themselves (see `with_queries`).
GENERATED, GENERATED_DEV, GENERATED_TEST = "generated", "generated-dev", "generated-test"
Labels = Mapping[str, Mapping[str, int]]  # query id → document id → relevance


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
        further: query id → text of further queries (see `with_queries`); held in memory.
        labels: split → their judgments, beside those on disk.
    """

    def __init__(
        self,
        artifact: Artifact,
        name: str,
        spec: str,
        further: Mapping[str, str] | None = None,
        labels: Mapping[str, Labels] | None = None,
    ) -> None:
        self.artifact, self.name, self.spec = artifact, name, spec
        self.further, self._labels = dict(further or {}), {split: dict(each) for split, each in (labels or {}).items()}
        self.path: Path = artifact.path
        self.fingerprint: str = artifact.fingerprint
        with readable(self.path):
            self.document_count = int(artifact.counts["documents"])
            self.query_count = int(artifact.counts["queries"])
            self.splits: tuple[str, ...] = tuple(dict.fromkeys([*artifact.manifest["splits"], *self._labels]))
            self.problems: list[str] = list(artifact.manifest["problems"])
            # Where what is searched are passages: of how many documents, and how these were cut (documents.py).
            self.passages: dict[str, int] = dict(artifact.manifest.get("passages", {}))
        self._documents = Table(self.path / "documents.arrow")
        self._document_index = IdIndex(self.path, "documents", self._documents, "doc_id")
        self._queries = Table(self.path / "queries.arrow")
        self._query_index = IdIndex(self.path, "queries", self._queries, "query_id")
        self._tables: dict[str, Table] = {}
        if (len(self._documents), len(self._queries)) != (self.document_count, self.query_count):
            with readable(self.path):
                raise ValueError("the tables have other lengths than the manifest")

    def __reduce__(self) -> tuple[type[Collection], tuple[Any, ...]]:
        # Data loader workers open the files anew.
        return Collection, (self.artifact, self.name, self.spec, self.further, self._labels)

    def __len__(self) -> int:
        return self.document_count

    def __repr__(self) -> str:
        counts = {split: len(self._labels.get(split) or self.query_rows(split)) for split in self.splits}
        splits = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        kind = f"passages of {self.passages['documents']:,} documents" if self.passages else "documents"
        return (
            f"Collection({self.name}: {self.document_count:,} {kind}, {self.query_count:,} queries"
            f"{'; judged: ' + splits if splits else ', no judgments'})"
        )

    # Documents

    def doc_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        return self._documents.take("doc_id", rows)

    def doc_rows(self, ids: Sequence[str]) -> Rows:
        """int64 [len(ids)], -1 where an id is unknown; of a document that is here in passages, the first one's."""
        rows = self._document_index.lookup(ids)
        if self.passages and len(rows) and rows.min() < 0:
            first = self._document_index.lookup([passage_id(identifier, 1) for identifier in ids])
            return np.where(rows < 0, first, rows)
        return rows

    def found_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """What is found at these rows: ids of documents, where rows are passages too."""
        ids = self.doc_ids(rows)
        return list(map(document_of, ids)) if self.passages else ids

    def reach(self, count: int) -> int:
        """How many rows to search for, to find so many documents: twice what they have on average, and 100 more."""
        if not self.passages:
            return count
        each = math.ceil(self.document_count / self.passages["documents"])
        return min(self.document_count, 2 * each * count + 100)

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
            fix=f"its judged splits are: {', '.join(self.splits)}" if self.splits else UNJUDGED,
        )

    @property
    def training_split(self) -> str | None:
        """The split that is learned from: what was generated, where anything was, else train."""
        return next((split for split in (GENERATED, "train") if split in self.splits), None)

    def _qrels_table(self, split: str) -> Table:
        name = self.split_name(split)
        return self._tables.get(name) or self._tables.setdefault(name, Table(self.path / "qrels" / f"{name}.arrow"))

    def query_rows(self, split: str | None = None) -> Rows:
        """Rows of the queries on disk that have judgments in `split`, in file order; None: all of them."""
        if split is None:
            return np.arange(self.query_count, dtype=np.int64)
        if split in self._labels:
            rows = self._query_index.lookup(list(self._labels[split]))
            return np.unique(rows[rows >= 0])
        parts = [np.empty(0, np.int64)]
        for batch in self._qrels_table(split).batches:
            rows = batch.column("query_row").to_numpy()
            parts.append(rows[batch.column("doc_row").to_numpy() >= 0])
        return np.unique(np.concatenate(parts))

    def query_ids(self, split: str | None = None) -> list[str]:
        if split in self._labels:
            return list(self._labels[split])
        return self._queries.take("query_id", self.query_rows(split))

    def query_texts(self, ids: Sequence[str]) -> list[str]:
        """
        Raises:
            RankdistillError: an id is unknown.
        """
        rows = self._query_index.lookup(ids)
        on_disk = iter(self._queries.take("text", rows[rows >= 0]))
        try:
            return [next(on_disk) if row >= 0 else self.further[query_id] for query_id, row in zip(ids, rows)]
        except KeyError as error:
            raise RankdistillError(f"collection {self.name} has no query {error}", where=self.spec) from None

    def has_queries(self, ids: Sequence[str]) -> list[bool]:
        return [bool(row >= 0) or i in self.further for i, row in zip(ids, self._query_index.lookup(ids))]

    def with_queries(
        self,
        texts: Sequence[str],
        relevant: Mapping[str, Sequence[str]] | None = None,
        *,
        seed: int = 42,
        parts: Mapping[str, str] | None = None,
    ) -> Collection:
        """The same collection with further queries; `further` holds their ids and texts.

        An id is a hash of its text, so that the same text is the same query everywhere and the collection's fingerprint
        may stay: scores and indexes made with it still belong to it. Texts that repeat count once. Labels have a
        fingerprint of their own (`labels_fingerprint`).

        Args:
            relevant: text → ids of the documents that it was made from, its positives. They give the splits
                `generated`, `generated-dev` and `generated-test`.
            seed: of what is held out.
            parts: document id → split, where that is settled already; `parted` documents unless given.

        Raises:
            RankdistillError: a positive is not in the collection.
        """
        new = {text: query_id_of(text) for text in (*texts, *(relevant or ()))}
        labels: dict[str, dict[str, dict[str, int]]] = {}
        if relevant:
            parts = parts or parted(relevant.values(), seed)
            labels = {split: {} for split in (GENERATED, GENERATED_DEV, GENERATED_TEST)}
            for text, doc_ids in relevant.items():
                labels[parts[doc_ids[0]]][new[text]] = dict.fromkeys(doc_ids, 1)
        return self.with_labels({query_id: text for text, query_id in new.items()}, labels)

    def with_labels(self, texts: Mapping[str, str], labels: Mapping[str, Labels]) -> Collection:
        """The same collection with further queries, query id → text, and splits of judgments, laid over its own.

        Raises:
            RankdistillError: a judged document is not in the collection.
        """
        doc_ids = list({doc_id for split in labels.values() for judged in split.values() for doc_id in judged})
        for doc_id, row in zip(doc_ids, self.doc_rows(doc_ids).tolist(), strict=True):
            if row < 0:
                raise RankdistillError(f"collection {self.name} has no document {doc_id!r}", where=self.spec)
        laid = {**self._labels, **{split: judged for split, judged in labels.items() if judged}}
        return Collection(self.artifact, self.name, self.spec, {**self.further, **texts}, laid)

    def labels_fingerprint(self, split: str | None) -> list[str]:
        """What the collection's own fingerprint does not cover of a split: judgments laid over it; else empty."""
        return [fingerprint(self._labels[split])] if split in self._labels else []

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
        if split in self._labels:
            yield from ((query_id, dict(judged)) for query_id, judged in self._labels[split].items())
            return
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

    def found_qrels(self, split: str) -> dict[str, dict[str, int]]:
        """What a search is measured with: all judgments, of documents where rows are passages."""
        qrels = self.qrels(split, missing=True)
        return {query_id: judged_documents(judged) for query_id, judged in qrels.items()} if self.passages else qrels

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
            **{key: noted for key in ("passages", "skipped") if (noted := self.artifact.manifest.get(key)) is not None},
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


def query_id_of(text: str) -> str:
    """The id of a further query."""
    return f"text-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def parted(groups: Iterable[Sequence[str]], seed: int = 42, fraction: float = 0.1) -> dict[str, str]:
    """Document id → generated split: of the documents a tenth is held out for test and a tenth for dev (at least one
    query's of each, where there are three), by a hash of seed and id.

    Documents that share a query, and passages of one document, are held out together or not at all, so that no document
    of a query that measures has a training query. A set of many documents is the least likely to be held out.

    Args:
        groups: the ids of the documents that each query was made from.
    """
    together: dict[str, set[str]] = {}
    for doc_ids in groups:
        members = {*doc_ids, *map(document_of, doc_ids)}
        joint = members.union(*(together.get(doc_id, ()) for doc_id in members))
        together.update(dict.fromkeys(joint, joint))
    sets = list({id(joint): joint for joint in together.values()}.values())
    sets.sort(key=lambda joint: max(id_hash(f"{seed}:{doc_id}") for doc_id in joint))
    count = max(1, round(fraction * len(sets))) if len(sets) > 2 else 0
    names = [GENERATED_TEST] * count + [GENERATED_DEV] * count
    return {
        doc_id: names[place] if place < len(names) else GENERATED
        for place, joint in enumerate(sets)
        for doc_id in joint
    }
