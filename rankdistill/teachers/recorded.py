"""Teachers whose scores are in a file: published scores, somebody else's, or any TREC run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rankdistill.artifacts import file_digest, fingerprint
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import progress, warn
from rankdistill.runs import iter_run
from rankdistill.scores.foreign_scores import ForeignScore, Format, iter_foreign
from rankdistill.scores.rank_scores import RankFunction, mean_rank_scores, plackett_luce
from rankdistill.scores.store import PairTable, ScoreKind, ScoreStore, TeacherScores, hash_ids, pair_keys
from rankdistill.teachers.base import Teacher, TextList

if TYPE_CHECKING:
    from rankdistill.collections import Collection

BLOCK = 65_536  # recorded pairs taken at once


class _FileTeacher(Teacher):
    """Looks scores up in a file read once; gives what it has and leaves the rest out."""

    file: str
    live = False

    def __post_init__(self) -> None:
        self._table: PairTable | None = None
        self._known_digest = ""
        self._by_text = False  # some scores are of texts, not of ids

    def _digest(self) -> str:
        """Of the file's bytes; an error where it changed since it was first asked for."""
        digest = _digest(self.file)
        self._known_digest = self._known_digest or digest
        if digest != self._known_digest:
            raise RankdistillError(
                "the file changed while it was read", where=self.file, fix="run the same command again"
            )
        return digest

    @abstractmethod
    def _pairs(self) -> Iterator[ForeignScore]: ...

    def table(self) -> PairTable:
        """The file's scores by pair (12 bytes a pair), by id or by text as the file has them."""
        if self._table is None:
            table = PairTable()
            with progress(f"reading {Path(self.file).name}", None, "scores") as bar:
                for block in _blocks(self._pairs()):
                    keys = pair_keys(hash_ids([item.query for item in block]), hash_ids([i.document for i in block]))
                    table.add(keys, np.array([item.score for item in block], dtype=np.float32))
                    self._by_text |= any(item.by_text for item in block)
                    bar.advance(len(block))
            self._digest()  # still that of the fingerprint
            self._table = table
        return self._table

    def score(self, lists: Sequence[TextList]) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """The recorded scores of each list, by ids, else by texts; documents without one are left out."""
        table = self.table()
        for item in lists:
            scores = np.full(len(item.doc_ids), np.nan, dtype=np.float32)
            by_text = ((item.query, item.documents), (item.query, item.doc_ids)) if self._by_text else ()
            for query, names in ((item.query_id, item.doc_ids), *by_text):
                absent = np.flatnonzero(np.isnan(scores))
                if len(absent):  # texts are hashed only where ids have no score: hashing is what takes the time
                    keys = pair_keys(hash_ids([query]), hash_ids([names[at] for at in absent]))
                    scores[absent] = table.find(keys)
            known = np.flatnonzero(~np.isnan(scores))
            if len(known):
                yield item.query_id, [item.doc_ids[at] for at in known], scores[known]


@dataclass(eq=False)
class RecordedTeacher(_FileTeacher):
    """Scores from a file.

    Args:
        file: the file; gzipped text too.
        format: auto, tsv, triples, trec, jsonl or parquet; see rankdistill.scores.foreign_scores.
        score_kind: what the scores are: logit, probability, similarity or rank.
    """

    type = "recorded"
    file: str
    format: Format = "auto"
    score_kind: ScoreKind = "logit"

    def fingerprint(self) -> str:
        return fingerprint({**self.describe(), "file": self._digest()})

    def _pairs(self) -> Iterator[ForeignScore]:
        return iter_foreign(self.file, self.format)


@dataclass(eq=False)
class RunTeacher(_FileTeacher):
    """Any run (TREC text or Parquet) as teacher: somebody's re-ranking, a listwise LLM's order, BM25.

    Args:
        file: the run.
        score_kind: similarity takes the run's scores; rank takes its order alone (scores re-dealt by a re-ranker mean
            nothing as margins).
        function: score of rank r, with score_kind rank: reciprocal 1/r, log ln(n/r), ndcg_gain 1/log2(1+r), none −r;
            plackett_luce: strengths fitted to the orders of `file` and `repeats`.
        repeats: further runs of the same teacher, with score_kind rank. The scores of a document are averaged over
            the runs that have it.
    """

    type = "run"
    file: str
    score_kind: Literal["rank", "similarity"] = "rank"
    function: Literal[RankFunction, "plackett_luce"] = "reciprocal"
    repeats: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.repeats = list(self.repeats or [])
        if self.repeats and self.score_kind == "similarity":
            raise UsageError(
                "runs are fused by their orders", where="teacher.repeats", fix="score_kind: rank, or an ensemble"
            )
        if self.function == "plackett_luce" and self.score_kind == "rank" and not self.repeats:
            raise UsageError("plackett_luce is fitted to several runs", where="teacher.repeats", fix="name the others")

    def fingerprint(self) -> str:
        function = self.function if self.score_kind == "rank" else None
        repeats = {"repeats": [_digest(file) for file in self.repeats]} if self.repeats else {}
        return fingerprint(
            {"type": self.type, "file": self._digest(), "kind": self.score_kind, "function": function, **repeats}
        )

    def _pairs(self) -> Iterator[ForeignScore]:
        if self.score_kind == "similarity":
            yield from iter_foreign(self.file, "trec")
            return
        for query_id, orders in self._orders():
            items: dict[str, int] = {}
            numbered = [[items.setdefault(doc_id, len(items)) for doc_id in order] for order in orders]
            if self.function == "plackett_luce":
                scores = plackett_luce(numbered, len(items))
            else:
                scores = mean_rank_scores(numbered, len(items), self.function)
            yield from (ForeignScore(query_id, doc_id, score) for doc_id, score in zip(items, scores.tolist()))

    def _orders(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Each query's orders in the runs that have it; the repeats are held in memory, the first run is not."""
        repeats = [{query_id: ids for query_id, ids, _ in iter_run(file)} for file in self.repeats or ()]
        seen = set()
        for query_id, doc_ids, _ in iter_run(self.file):
            seen.add(query_id)
            yield query_id, [doc_ids, *(run[query_id] for run in repeats if query_id in run)]
        for query_id in dict.fromkeys(query_id for run in repeats for query_id in run if query_id not in seen):
            yield query_id, [run[query_id] for run in repeats if query_id in run]


def _digest(file: str) -> str:
    if not Path(file).is_file():
        raise RankdistillError("there is no score file here", where=str(file))
    return file_digest(file)


def _blocks(pairs: Iterator[ForeignScore]) -> Iterator[list[ForeignScore]]:
    while block := list(islice(pairs, BLOCK)):
        yield block


def import_scores(
    file: str | Path,
    format: Format,
    collection: Collection,
    store: ScoreStore | None = None,
    score_kind: ScoreKind = "logit",
) -> TeacherScores:
    """Bring foreign scores into the store (`rankdistill score --import FILE`).

    Pairs whose query or document the collection lacks are left out, counted and said; of a pair that comes twice the
    first score stays. The same file imported again adds nothing.

    Returns:
        The collection's scores; `.scored` pairs are new, `.reused` were there, `.unscored` are not in the collection.

    Raises:
        RankdistillError: a bad line (file and line named), a NaN or infinite score, another collection's export, or
            not one pair of this collection.
    """
    teacher = RecordedTeacher(str(file), format, score_kind)
    scores = (store or ScoreStore()).folder(
        teacher.fingerprint(),
        collection.fingerprint,
        score_kind,
        describe={"teacher": teacher.describe(), "collection": collection.name},
    )
    ids = _Ids(collection)
    unknown_queries: set[str] = set()
    unknown_documents = total = 0
    with scores, progress(f"importing {Path(file).name}", None, "scores") as bar:
        for block in _blocks(iter_foreign(file, format, collection.fingerprint)):
            total += len(block)
            pairs = zip(map(ids.query, block), ids.documents(block), block, strict=True)
            for query_id, group in groupby(pairs, key=lambda pair: pair[0]):
                rows = [(doc_id, item) for _, doc_id, item in group]
                known = [(doc_id, item.score) for doc_id, item in rows if doc_id is not None and query_id is not None]
                scores.unscored += len(rows) - len(known)
                if query_id is not None:
                    doc_ids, values = [doc_id for doc_id, _ in known], [score for _, score in known]
                    scores.reused += len(known) - scores.add(query_id, doc_ids, values)
                    unknown_documents += len(rows) - len(known)
                elif len(unknown_queries) < 100_000:
                    unknown_queries.update(item.query for _, item in rows)
            bar.advance(len(block))
        teacher.fingerprint()  # refuses a file that changed, before its last scores are written
    if unknown_queries:
        warn(f"{file}: {len(unknown_queries):,} queries are not in {collection.name}, e.g. {min(unknown_queries)!r}")
    if unknown_documents:
        warn(f"{file}: {unknown_documents:,} scores are of documents that are not in {collection.name}")
    if total and not len(scores):
        raise RankdistillError(
            f"not one of its {total:,} scores is of a query and a document of {collection.name}",
            where=str(file),
            fix="give the collection that the scores were made for",
        )
    return scores


class _Ids:
    """Ids of the collection for what a file calls queries and documents: ids, or texts."""

    def __init__(self, collection: Collection) -> None:
        self.collection, self.query_ids = collection, collection.query_ids()
        self.queries = dict.fromkeys(self.query_ids)

    def query(self, item: ForeignScore) -> str | None:
        if item.query in self.queries:
            return item.query
        return self._by_text.get(item.query.strip()) if item.by_text else None

    @cached_property
    def _by_text(self) -> dict[str, str]:
        texts = map(str.strip, self.collection.query_texts(self.query_ids))
        return dict(zip(texts, self.query_ids, strict=True))

    def documents(self, block: Sequence[ForeignScore]) -> list[str | None]:
        names = [item.document for item in block]
        rows = np.asarray(self.collection.doc_rows(names))
        doc_ids: list[str | None] = [name if row >= 0 else None for name, row in zip(names, rows, strict=True)]
        texts = [at for at, item in enumerate(block) if doc_ids[at] is None and item.by_text]
        if texts:
            hashes, numbers = self._texts
            asked = hash_ids([names[at].strip() for at in texts])
            place = np.minimum(np.searchsorted(hashes, asked), len(hashes) - 1)
            hits = np.flatnonzero(hashes[place] == asked)
            for at, doc_id in zip(hits, self.collection.doc_ids(numbers[place[hits]]), strict=True):
                doc_ids[texts[at]] = doc_id
        return doc_ids

    @cached_property
    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of document texts, with and without the title, and their rows: 32 bytes a document."""
        hashes, rows = [], []
        count = self.collection.document_count
        for part in np.split(np.arange(count), range(4096, count, 4096)):
            bare = [document.text.strip() for document in self.collection.documents(part)]
            titled = [text.strip() for text in self.collection.document_texts(part)]
            hashes += [hash_ids(bare), hash_ids(titled)]
            rows += [part, part]
        joined, first = np.unique(np.concatenate(hashes), return_index=True)
        return joined, np.concatenate(rows)[first]
