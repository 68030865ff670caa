"""Which queries are learned from: those with labels, or any others; and which are held out to choose a checkpoint.

Queries of a split that is neither train nor dev are never among them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rankdistill.collections.collection import DEV_NAMES, GENERATED, GENERATED_DEV, held_out
from rankdistill.collections.passages import document_of, passage_id
from rankdistill.collections.text_files import read_lines
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import warn
from rankdistill.sampling.base import generator

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe

MOST_PSEUDO = 100_000  # pseudo-queries made of documents, unless candidates.queries says how many
PSEUDO_WORDS = 32
WORD = re.compile(r"[^\W\d_]{3,}(?:-[^\W\d_]+)*")
KEYWORDS, SALIENT = 3, 5  # words of a query at most, and of its document from which they are drawn
AT_ONCE = 4096  # documents
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s")
WHERE = "candidates.unlabelled"


def with_unlabelled(collection: Collection, recipe: Recipe) -> Collection:
    """The collection with the queries that `candidates.unlabelled` brings: titles or keywords of documents, or lines of
    a file, at least two."""
    source = recipe.candidates.unlabelled
    if source is None or source == "queries":
        return collection
    if source in ("titles", "keywords"):
        count = min(recipe.candidates.queries or MOST_PSEUDO, collection.document_count)
        rows = np.sort(generator(recipe.seed, 2, 4).choice(collection.document_count, count, replace=False))
        by_words = source == "keywords"
        texts = keyword_queries(collection, rows, recipe.seed) if by_words else pseudo_queries(collection, rows)
    else:
        if not Path(source).is_file():
            raise UsageError(
                f"there is no file {source!r}", where=WHERE, fix="queries, titles, keywords, or a text file"
            )
        texts = [line.strip() for _, line in read_lines(source)]
    texts = [text for text in _without_judged(collection, texts, source) if text]
    if len(set(texts)) < 2:
        raise UsageError(f"{source} gives fewer than two queries", where=WHERE)
    return collection.with_queries(texts)


def _without_judged(collection: Collection, texts: list[str], source: str) -> list[str]:
    """Without queries that measure: those of the collection's splits but train, letter for letter."""
    judged: set[str] = set()
    for split in collection.splits:
        if split != "train":
            judged.update(text.strip() for text in collection.query_texts(collection.query_ids(split)))
    kept = [text for text in texts if text not in judged]
    if len(kept) < len(texts):
        warn(f"{source}: {len(texts) - len(kept):,} are dev or test queries of {collection.name}: left out")
    return kept


def pseudo_queries(collection: Collection, rows: np.ndarray) -> list[str]:
    """A query made of each document (see `pseudo_query`), "" where it has no text; a title is its first passage's."""
    texts: list[str] = []
    for start in range(0, len(rows), AT_ONCE):
        for item in collection.documents(rows[start : start + AT_ONCE]):
            later = collection.passages and item.doc_id != passage_id(document_of(item.doc_id), 1)
            texts.append(pseudo_query("" if later else item.title, item.text))
    return texts


def pseudo_query(title: str, text: str) -> str:
    """The title of a document, or its first sentence where it has none: at most 32 words, none for an empty one."""
    words = (title.strip() or SENTENCE_END.split(text.strip(), maxsplit=1)[0]).split()
    return " ".join(words[:PSEUDO_WORDS])


def keyword_queries(collection: Collection, rows: Sequence[int] | np.ndarray, seed: int) -> list[str]:
    """One to three words of each document, as people type them: drawn from its five of most weight, in its order.

    A word weighs its count times ln(documents / documents that hold it); one that no other document holds is a name or
    a slip, and left out. "" for a document without such words. Memory grows with the words of the collection. Scripts
    without spaces have no words here.
    """
    held: Counter[str] = Counter()
    for start in range(0, collection.document_count, AT_ONCE):
        for text in collection.document_texts(range(start, min(start + AT_ONCE, collection.document_count))):
            held.update(set(WORD.findall(text.lower())))
    random, queries = generator(seed, 2, 5), []
    for start in range(0, len(rows), AT_ONCE):
        for text in collection.document_texts(rows[start : start + AT_ONCE]):
            count = Counter(word for word in WORD.findall(text.lower()) if held[word] > 1)
            weight = {word: times * math.log(collection.document_count / held[word]) for word, times in count.items()}
            salient = sorted(weight, key=weight.__getitem__, reverse=True)[:SALIENT]
            drawn = random.permutation(len(salient))[: random.integers(1, KEYWORDS + 1)]
            chosen = {salient[place] for place in drawn}
            queries.append(" ".join(word for word in count if word in chosen))
    return queries


def query_pool(collection: Collection, recipe: Recipe) -> tuple[list[str], list[str], str | None]:
    """Training queries, dev queries, and the split whose labels the dev queries have (None: they have none).

    Dev queries are those of the collection's dev split; without one, a tenth of the training queries. A collection
    without a train split is refused where the recipe asks for labels."""
    settings, seed = recipe.candidates, recipe.seed
    own_dev = next((name for name in DEV_NAMES if name in collection.splits), None)
    dev_split: str | None = "dev" if own_dev else "train"
    if settings.unlabelled is None:
        split = collection.training_split
        if split is None:
            raise UsageError(
                f"collection {collection.name} has no train split",
                where=collection.spec,
                fix=f"to learn from queries without labels, {WHERE}: queries (or titles, keywords, or a text file); "
                "`rankdistill generate` makes queries with labels for documents",
            )
        if split == GENERATED:
            train, dev_split = collection.query_ids(split), "dev" if own_dev else GENERATED_DEV
            if dev_split not in (*collection.splits, "dev"):
                raise RankdistillError(
                    f"{len(train)} queries are left of those generated: none can be held out as dev queries",
                    where="generate",
                    fix="more documents or weaker filters: `reason` in generated/queries.parquet says what each lost",
                )
            dev = collection.query_ids(dev_split)
        else:
            train, dev = collection.training_splits(seed=seed)
    else:
        train = list(collection.further) or _unjudged(collection)
        if len(train) < 2:
            raise RankdistillError(
                f"collection {collection.name} has {len(train)} queries that are no dev or test queries",
                where=WHERE,
                fix="titles, keywords, or a text file with one query a line",
            )
        if own_dev:
            dev = collection.query_ids("dev")
        else:
            (train, dev), dev_split = held_out(train, seed=seed), None
    return _some(train, settings.queries, seed, 0), _some(dev, settings.dev_queries, seed, 1), dev_split


def _unjudged(collection: Collection) -> list[str]:
    """All queries but those that a split other than train judges."""
    kept = set(range(collection.query_count))
    for split in collection.splits:
        if split != "train":
            kept -= set(collection.query_rows(split).tolist())
    ids = collection.query_ids()
    return [ids[row] for row in sorted(kept)]


def _some(ids: list[str], most: int | None, seed: int, stream: int) -> list[str]:
    if most is None or len(ids) <= most:
        return ids
    chosen = generator(seed, 2, stream).choice(len(ids), most, replace=False)
    return [ids[row] for row in sorted(chosen)]
