"""`rankdistill score --calibrate`: the tables are printed, and the file holds probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rankdistill.cli.main import app
from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError


def test_scores_are_calibrated_on_training_labels(tiny_beir: Path, tmp_path: Path) -> None:
    collection = open_collection(f"beir:{tiny_beir}")
    random = np.random.default_rng(0)
    lines, expected = [], []
    for split in ("train", "test"):
        for query_id, judged in collection.qrels(split).items():
            for doc_id in collection.doc_ids(range(collection.document_count)):
                score = 3.0 * (doc_id in judged) + random.normal()
                lines.append(f"{query_id}\t{doc_id}\t{score}\n")
                expected.append(score)
    file, out = tmp_path / "scores.tsv", tmp_path / "probabilities.parquet"
    file.write_text("".join(lines))
    command = ["score", f"beir:{tiny_beir}", "--import", str(file), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, [*command, "--calibrate", "platt", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "expected calibration error" in result.output and "training queries" in result.output
    table = pq.read_table(out)
    probabilities = table["score"].to_numpy()
    assert table.schema.metadata[b"score_kind"] == b"probability" and len(probabilities) == len(expected)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    # The order is the teacher's.
    assert np.corrcoef(np.argsort(np.argsort(expected)), np.argsort(np.argsort(probabilities)))[0, 1] > 0.999
    with pytest.raises(UsageError, match="platt or isotonic"):
        CliRunner().invoke(app, [*command, "--calibrate", "beta"], catch_exceptions=False)


def test_without_a_train_split_nothing_is_fitted(tiny_beir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    (bare / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (bare / name).write_bytes((tiny_beir / name).read_bytes())
    file = tmp_path / "scores.tsv"
    file.write_text("q-iron\td-iron\t1.0\nq-iron\td-oak\t0.0\n")
    command = ["score", f"beir:{bare}", "--import", str(file), "--store", str(tmp_path / "store")]
    with pytest.raises(RankdistillError, match="no train split"):
        CliRunner().invoke(app, [*command, "--calibrate", "platt"], catch_exceptions=False)
