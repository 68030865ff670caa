"""Small folders in the formats that are read, made for each test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

BeirFolder = Callable[..., Path]

CORPUS = [
    {"_id": "d1", "title": "Iron", "text": "Iron rusts in water."},
    {"_id": "d2", "title": "Copper", "text": "It turns green with age."},
    {"_id": "dé 3", "title": "", "text": "Gold does not tarnish: 金."},
]
QUERIES = [{"_id": "q1", "text": "which metal rusts"}, {"_id": "q2", "text": "which metal turns green"}]
QRELS = {"test": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\n"}


@pytest.fixture
def beir_folder(tmp_path: Path) -> BeirFolder:
    """Write a BEIR folder: records or raw lines for corpus and queries, split → text for qrels."""

    def write(
        corpus: list[dict[str, object] | str] | None = None,
        queries: list[dict[str, object] | str] | None = None,
        qrels: dict[str, str] | None = None,
        name: str = "metals",
    ) -> Path:
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        for file, records in (("corpus", CORPUS if corpus is None else corpus), ("queries", queries or QUERIES)):
            lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
            (folder / f"{file}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        for split, text in (QRELS if qrels is None else qrels).items():
            (folder / "qrels" / f"{split}.tsv").write_text(text)
        return folder

    return write
