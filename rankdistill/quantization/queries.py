"""What a quantiser learns from, out of a collection: its training queries, and pseudo-queries made from its documents.

Queries of dev and test are never used; judgments only where a specification asks for labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankdistill.artifacts import fingerprint
from rankdistill.collections import Collection
from rankdistill.indexes.specification import QuantizerSpecification
from rankdistill.quantization.batches import Queries, TeacherScores
from rankdistill.sampling.base import generator
from rankdistill.sampling.training_queries import pseudo_queries
from rankdistill.scores.lists import ScoredLists
from rankdistill.students.base import StudentModel


def collection_queries(
    student: StudentModel,
    collection: Collection,
    specification: QuantizerSpecification,
    *,
    query_ids: Sequence[str] | None = None,
    lists: ScoredLists | None = None,
) -> tuple[Queries, str]:
    """The queries a specification asks for, encoded by the student, and a fingerprint of all that decides them.

    Args:
        query_ids: training queries to use; those of the training split, if there is one, unless given.
        lists: the teacher's scored lists, for `relevance: scores`; their queries are the given ones.
    """
    split = collection.training_split
    recorded = specification.relevance == "scores" and lists is not None
    if lists is not None and recorded:
        query_ids = lists.query_ids
    elif query_ids is None:
        query_ids = collection.query_ids(split) if split else []
    shares = specification.queries
    ids = list(query_ids) if shares.given or recorded else []
    if not recorded and len(ids) > shares.most:
        chosen = generator(specification.seed, 21).choice(len(ids), shares.most, replace=False)
        ids = [ids[row] for row in np.sort(chosen)]
    texts = collection.query_texts(ids) if ids else []
    pseudo: list[str] = []
    if shares.pseudo and not recorded:
        count = min(shares.most, collection.document_count)
        rows = np.sort(generator(specification.seed, 22).choice(collection.document_count, count, replace=False))
        pseudo = [text for text in pseudo_queries(collection, rows) if text]
    positives = None
    if specification.documents.labelled:
        judged = collection.qrels(split) if split else {}
        positives = [
            collection.doc_rows([doc_id for doc_id, grade in judged.get(query_id, {}).items() if grade > 0])
            for query_id in ids
        ]
    teacher = None
    if lists is not None and recorded:
        teacher = TeacherScores(np.arange(len(lists)), lists.offsets, lists.doc_rows, lists.scores, lists.relevance)
    queries = Queries(
        given=student.encode_queries(texts) if texts else None,
        pseudo=student.encode_queries(pseudo) if pseudo else None,
        positives=positives,
        teacher=teacher,
        given_texts=list(texts) or None,
        pseudo_texts=pseudo or None,
    )
    made_from = [student.fingerprint, collection.fingerprint, ids, len(pseudo)]
    made_from += [[rows.tolist() for rows in positives] if positives is not None else None]
    return queries, fingerprint(["queries", *made_from, lists.fingerprint if recorded and lists else None])
