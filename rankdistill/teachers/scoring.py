"""The scoring loop: candidate lists through a teacher into the store, only what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rankdistill.progress import progress, warn
from rankdistill.scores.store import ScoreStore, TeacherScores
from rankdistill.teachers.base import Teacher, TextList

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def score_candidates(
    teacher: Teacher,
    collection: Collection,
    candidates: Iterable[tuple[str, Sequence[str], np.ndarray]],
    store: ScoreStore | None = None,
    *,
    total: int | None = None,
    chunk_pairs: int = 4096,
) -> TeacherScores:
    """Score what the store lacks of the candidates; memory is one chunk.

    After a kill the same call goes on where it stopped: only the chunk in flight is scored again.

    Args:
        candidates: (query_id, doc_ids, _) a query; one query at a time is held.
        store: by default the one in the user's cache folder.
        total: candidate pairs, for the time left.
        chunk_pairs: pairs handed to the teacher at once: sorted by length together, texts tokenised once.

    Returns:
        The scores; `.scored` pairs are new, `.reused` were in the store, `.unscored` got none from this teacher.
    """
    scores = (store or ScoreStore()).folder(
        teacher.fingerprint(),
        collection.fingerprint,
        teacher.score_kind,
        describe={"teacher": teacher.describe(), "collection": collection.name},
    )
    unknown = 0
    with scores, progress("scoring", total, "pairs") as bar:
        chunk: list[tuple[str, list[str]]] = []
        waiting = 0

        def score_chunk() -> None:
            nonlocal waiting
            queries = collection.query_texts([query_id for query_id, _ in chunk])
            rows = np.concatenate([np.asarray(collection.doc_rows(doc_ids)) for _, doc_ids in chunk])
            texts = iter(collection.document_texts(rows))
            lists = [
                TextList(query_id, query, doc_ids, [next(texts) for _ in doc_ids])
                for query, (query_id, doc_ids) in zip(queries, chunk, strict=True)
            ]
            done = 0
            for query_id, doc_ids, values in teacher.score(lists):
                scores.add(query_id, doc_ids, values)
                done += len(doc_ids)
            scores.unscored += waiting - done
            bar.advance(waiting)
            chunk.clear()
            waiting = 0
            scores.refresh()  # another process may have scored what comes next

        for query_id, given, _ in candidates:
            doc_ids = list(dict.fromkeys(given))
            absent = scores.missing(query_id, doc_ids)
            scores.reused += len(doc_ids) - len(absent)
            bar.advance(len(doc_ids) - len(absent))
            known = (
                [d for d, row in zip(absent, collection.doc_rows(absent), strict=True) if row >= 0] if absent else []
            )
            unknown += len(absent) - len(known)
            if waiting and waiting + len(known) > chunk_pairs:
                score_chunk()  # a list is never torn: a listwise teacher reads it whole
            if known:
                chunk.append((query_id, known))
                waiting += len(known)
        if chunk:
            score_chunk()
    if unknown:
        warn(f"{unknown:,} candidates are not in {collection.name} and were not scored")
    if scores.unscored:
        warn(f"the teacher has no score for {scores.unscored:,} of the candidates asked for")
    return scores
