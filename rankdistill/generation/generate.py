"""The stage `generate`: documents in, an artifact of queries with labels out.

generated/queries.parquet    query_id, text, doc_id, split, prompt, tokens, log_probability, rank_<source>, kept,
                             reason: a row for each query and document, what was thrown away too
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rankdistill.artifacts import Artifact, ArtifactWriter, fingerprint, obtain
from rankdistill.collections.collection import GENERATED, parted, query_id_of
from rankdistill.errors import RankdistillError
from rankdistill.generation.base import Draft, Generator
from rankdistill.generation.filters import Best, Duplicates, Filter, Form, Overlap, RoundTrip, judged_texts, words
from rankdistill.generation.rewriting import NoWorse, Rewritten, leak, relabelled
from rankdistill.progress import progress, say, warn
from rankdistill.sampling.base import generator as random_generator
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import Teacher
from rankdistill.teachers.llm.budget import Estimate
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.indexes.base import Engine
    from rankdistill.recipe import Generate

FILE = "queries.parquet"
KIND = "generated"
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("query_id", "text", "doc_id", "original_id", "split", "prompt")]
    + [("tokens", pa.int32()), ("log_probability", pa.float32())]
)


def chosen_documents(collection: Collection, documents: int | None, least_words: int, seed: int) -> list[int]:
    """Rows of documents of enough words, drawn by the seed.

    Raises:
        RankdistillError: no document is long enough.
    """
    wanted, rows = documents or collection.document_count, []
    order = random_generator(seed, 16).permutation(collection.document_count)
    for start in range(0, len(order), 4096):
        some = order[start : start + 4096]
        texts = collection.document_texts(some)
        rows += [int(row) for row, text in zip(some, texts, strict=True) if len(words(text)) >= least_words]
        if len(rows) >= wanted:
            break
    if not rows:
        raise RankdistillError(
            f"no document of {collection.name} has {least_words} words",
            where="generate.least_words",
            fix="a smaller number, or longer documents",
        )
    return sorted(rows[:wanted])


def generate(
    collection: Collection,
    generator: Generator,
    settings: Generate,
    out: str | Path,
    *,
    seed: int = 42,
    engines: Callable[[], Mapping[str, Engine]] = dict,
    sources: Sequence[Any] = (),
    judge: Teacher | None = None,
    store: ScoreStore | None = None,
) -> Artifact:
    """Queries for a collection's documents, filtered; what is there with the same settings is found.

    Args:
        engines: opens what searches, by name, for the round trip.
        sources: the settings of these engines.
        judge: a teacher whose scores decide beside the filters.
        store: of the judge's scores and of the answers of a language model.
    """
    store = store or ScoreStore()
    _prepare(generator, collection, store)
    values = settings.model_dump(mode="json", exclude={"generator", "judge"})
    decides = [values, generator.fingerprint(), collection.fingerprint, seed, judge.fingerprint() if judge else None]
    decides += [list(map(str, sources))] if settings.round_trip or generator.rewrites else []

    def make(writer: ArtifactWriter) -> None:
        rows = _shown(collection, generator, settings, seed)
        say(f"generate: {generator.type}, for {f'{len(rows):,} documents' if rows else 'training queries'}")
        drafts = []
        with progress("generate", None, "queries") as bar:
            for draft in generator.drafts(collection, rows):
                drafts.append(draft)
                bar.advance(1)
        if generator.asking is not None:
            generator.asking.finish()
        if generator.rewrites:
            _rewritten(writer, collection, drafts, engines())
            return
        texts = _texts(collection, drafts)
        first: list[Filter] = [Form(texts, generator.copies), Duplicates(), Overlap(judged_texts(collection).values())]
        for each in first:
            each(drafts)
        left = [draft for draft in drafts if not draft.reason]
        groups: dict[str, list[str]] = {}
        for draft in left:
            groups.setdefault(draft.text, []).append(draft.doc_id)
        parts = parted(groups.values(), seed)
        for draft in left:
            draft.part = parts[draft.doc_id]
        later: list[Filter] = []
        if settings.round_trip:
            later.append(RoundTrip(collection, engines(), settings.round_trip))
        if settings.likeliest < 1:
            if all(draft.log_probability is None for draft in left):
                warn("generate.likeliest: the language model tells no log-probabilities: nothing is dropped by them")
            later.append(Best("unlikely", settings.likeliest, lambda some: [_likelihood(draft) for draft in some]))
        if judge is not None:
            scores = _judged(judge, collection, store)
            later.append(Best("judged low", settings.judge_share, scores))
        for each in later:
            each(drafts)
        _write(writer, drafts)

    return obtain(
        out,
        kind=KIND,
        fingerprint=fingerprint([KIND, *decides]),
        settings={
            "recipe": settings.model_dump(mode="json"),
            "seed": seed,
            "generator": generator.describe(),
            "judge": judge.describe() if judge is not None else None,
        },
        inputs={"collection": collection.fingerprint},
        make=make,
    )


def _prepare(generator: Generator, collection: Collection, store: ScoreStore) -> None:
    if generator.asking is not None:
        generator.asking.begin(store.root)
    generator.prepare(collection, store.root)


def _shown(collection: Collection, generator: Generator, settings: Generate, seed: int) -> list[int]:
    if generator.rewrites:
        return []
    return chosen_documents(collection, settings.documents, settings.least_words, seed)


def _texts(collection: Collection, drafts: Sequence[Draft]) -> dict[str, str]:
    ids = list(dict.fromkeys(draft.doc_id for draft in drafts))
    return dict(zip(ids, collection.document_texts(collection.doc_rows(ids)), strict=True))


def _rewritten(
    writer: ArtifactWriter, collection: Collection, drafts: list[Draft], engines: Mapping[str, Engine]
) -> None:
    """Filter rewrites of training queries, and count what they took from their documents."""
    ids = [draft.original_id for draft in drafts]
    originals = dict(zip(ids, collection.query_texts(ids), strict=True))
    texts = _texts(collection, drafts)
    filters: list[Filter] = [Rewritten(texts, originals), Overlap(judged_texts(collection).values())]
    filters += [NoWorse(collection, engine, originals) for engine in list(engines.values())[:1]]
    for each in filters:
        each(drafts)
    for draft in drafts:
        draft.part = GENERATED
    writer.notes["shared_words"] = leak([draft for draft in drafts if not draft.reason], texts, originals)
    _write(writer, drafts)


def _likelihood(draft: Draft) -> float:
    return np.nan if draft.log_probability is None else draft.log_probability


def _judged(judge: Teacher, collection: Collection, store: ScoreStore) -> Callable[[Sequence[Draft]], list[float]]:
    def values(drafts: Sequence[Draft]) -> list[float]:
        known = collection.with_queries([draft.text for draft in drafts])
        lists: dict[str, list[str]] = {}
        for draft in drafts:
            lists.setdefault(query_id_of(draft.text), []).append(draft.doc_id)
        candidates = [(query_id, doc_ids, np.zeros(len(doc_ids))) for query_id, doc_ids in lists.items()]
        scores = score_candidates(judge, known, candidates, store)
        return [float(scores.scores_of(query_id_of(draft.text), [draft.doc_id])[0]) for draft in drafts]

    return values


def _write(writer: ArtifactWriter, drafts: Sequence[Draft]) -> None:
    """The table, the counts, and a line for a person."""
    columns: dict[str, Any] = {
        "query_id": [query_id_of(draft.text) for draft in drafts],
        "split": [draft.part if not draft.reason else "" for draft in drafts],
        **{
            name: [getattr(draft, name) for draft in drafts]
            for name in SCHEMA.names
            if name not in ("query_id", "split")
        },
    }
    table = pa.table(columns, schema=SCHEMA)
    for name in dict.fromkeys(name for draft in drafts for name in draft.ranks):
        table = table.append_column(f"rank_{name}", pa.array([d.ranks.get(name) for d in drafts], pa.int32()))
    table = table.append_column("kept", pa.array([not draft.reason for draft in drafts]))
    table = table.append_column("reason", pa.array([draft.reason for draft in drafts], pa.string()))
    pq.write_table(table, writer.path / FILE)
    kept = [draft for draft in drafts if not draft.reason]
    reasons = Counter(draft.reason for draft in drafts if draft.reason)
    writer.counts |= {"drafts": len(drafts), "kept": len(kept), "queries": len({draft.text for draft in kept})}
    writer.notes["reasons"] = dict(reasons.most_common())
    lost = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    say(f"generate: {len(kept):,} of {len(drafts):,} queries are kept{f'; dropped: {lost}' if lost else ''}")
    if not kept:
        sample = "; ".join(repr(draft.text[:80]) for draft in drafts[:3])
        raise RankdistillError(
            f"no generated query is kept ({lost}); the first: {sample}",
            where="generate",
            fix="look at what the model writes: another prompt, examples, a larger model, or weaker filters",
        )


def labelled(collection: Collection, artifact: Artifact) -> Collection:
    """The collection with the kept queries of a `generated` artifact, in the splits that it gave them."""
    rows = pq.read_table(artifact.path / FILE).to_pylist()
    settings = artifact.manifest["settings"]["generator"]
    if "mix" in settings:
        return relabelled(collection, rows, settings["mix"])
    relevant: dict[str, list[str]] = {}
    parts = {}
    for row in rows:
        if row["kept"]:
            relevant.setdefault(row["text"], []).append(row["doc_id"])
            parts[row["doc_id"]] = row["split"]
    return collection.with_queries([], relevant, parts=parts)


def estimate(
    collection: Collection, generator: Generator, settings: Generate, seed: int, store: ScoreStore
) -> list[str]:
    """What generating would cost, for a person; nothing is asked and nothing is kept."""
    _prepare(generator, collection, store)
    rows = _shown(collection, generator, settings, seed)
    if generator.asking is None:
        return [f"{len(rows):,} documents; a generator of type {generator.type!r} asks no language model"]
    counted: Estimate = generator.asking.dry_run()
    asked = sum(1 for _ in generator.drafts(collection, rows))
    return [f"{asked:,} queries of {len(rows):,} documents", *counted.lines()[1:]]
