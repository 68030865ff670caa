from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rankdistill.errors import RankdistillError
from rankdistill.indexes.vectors import encode_documents, encode_queries, open_vectors

if TYPE_CHECKING:
    from rankdistill.collections import Collection

TEXTS = [f"text number {row} of many" for row in range(100)]

# Encodes slowly and writes down every text it encodes, so that a killed process leaves a record.
SLOW_ENCODER = """
import sys, time
import numpy as np
from rankdistill.collections import open_collection
from rankdistill.indexes.vectors import encode_documents

class Slow:
    dimension, similarity, fingerprint = 4, "dot", "slow"
    def encode_documents(self, texts):
        with open(sys.argv[3], "a") as log:
            for text in texts:
                time.sleep(0.002)
                log.write(text + "\\n")
        return np.array([[len(text), *map(ord, text[-3:])] for text in texts], np.float32)

encode_documents(Slow(), open_collection(sys.argv[1]), sys.argv[2], shard_size=10)
"""


def test_vectors_are_the_encoders_row_by_row(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    collection = make_collection(TEXTS)
    artifact = encode_documents(word_encoder, collection, tmp_path / "v", shard_size=7)
    vectors = open_vectors(artifact)
    assert isinstance(vectors, np.memmap) and vectors.dtype == np.float32 and vectors.shape == (100, 16)
    np.testing.assert_array_equal(vectors, word_encoder.encode_documents(TEXTS))
    assert artifact.counts == {"documents": 100, "dimension": 16}
    assert word_encoder.encoded == 200
    again = encode_documents(word_encoder, collection, tmp_path / "v", shard_size=50)
    assert again.fingerprint == artifact.fingerprint and word_encoder.encoded == 200


def test_queries_keep_their_ids(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    collection = make_collection(TEXTS, ["one", "two", "three"], {"q2": {"d1": 1}, "q0": {"d2": 1}})
    artifact = encode_queries(word_encoder, collection, tmp_path / "q", split="train", shard_size=1)
    ids = pq.read_table(artifact.path / "query_ids.parquet")["query_id"].to_pylist()
    assert ids == collection.query_ids("train")
    np.testing.assert_array_equal(open_vectors(artifact), word_encoder.encode_queries(collection.query_texts(ids)))


def test_after_kill_9_no_finished_shard_is_encoded_again(make_collection: Any, tmp_path: Path) -> None:
    collection: Collection = make_collection(TEXTS)
    log, kills = tmp_path / "log", 0
    command = [sys.executable, "-c", SLOW_ENCODER, collection.spec, str(tmp_path / "v"), str(log)]
    while True:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        before = len(log.read_text().splitlines()) if log.exists() else 0
        # Killed 25 texts later: two shards are finished, the third is in flight.
        while process.poll() is None and kills < 3:
            if log.exists() and len(log.read_text().splitlines()) >= before + 25:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    encoded = log.read_text().splitlines()
    assert kills == 3
    assert set(encoded) == set(TEXTS)
    assert 100 <= len(encoded) <= 100 + kills * 10  # at most the shard in flight, each time
    vectors = open_vectors(tmp_path / "v")
    expected = np.array([[len(text), *map(ord, text[-3:])] for text in TEXTS], np.float32)
    np.testing.assert_array_equal(vectors, expected)


def test_bad_vectors_are_refused_by_name(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    collection = make_collection(TEXTS)
    encode = word_encoder.encode_documents

    def broken(texts: list[str]) -> np.ndarray:
        vectors = encode(texts)
        vectors[3, 5] = np.nan
        return vectors

    word_encoder.encode_documents = broken
    with pytest.raises(RankdistillError, match="NaN") as caught:
        encode_documents(word_encoder, collection, tmp_path / "v", shard_size=10)
    assert "'d3'" in str(caught.value)
    word_encoder.encode_documents = lambda texts: encode(texts)[:, :5]
    with pytest.raises(RankdistillError, match=r"\[n, 16\] was expected"):
        encode_documents(word_encoder, collection, tmp_path / "v")
    word_encoder.encode_documents = lambda texts: encode(texts)[:-1]
    with pytest.raises(RankdistillError, match="99 vectors came back for 100 texts"):
        encode_documents(word_encoder, collection, tmp_path / "v")
    with pytest.raises(RankdistillError, match="there is no vectors here"):
        open_vectors(tmp_path / "v")


def test_a_full_disk_is_said_and_finished_shards_stay(make_collection: Any, word_encoder: Any, tmp_path: Path) -> None:
    """A limit on the size of files makes the reservation fail as a full disk does."""
    import errno
    import resource

    collection = make_collection(TEXTS)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises((RankdistillError, OSError)) as caught:
            encode_documents(word_encoder, collection, tmp_path / "v")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert isinstance(caught.value, RankdistillError) or caught.value.errno == errno.EFBIG
    encode_documents(word_encoder, collection, tmp_path / "v")
    assert open_vectors(tmp_path / "v").shape == (100, 16)


def test_vectors_say_what_they_were_computed_in(
    make_collection: Any, word_encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collection = make_collection(TEXTS[:8])
    word_encoder.precision, word_encoder.device = "bf16", torch.device("cpu")
    made = encode_documents(word_encoder, collection, tmp_path / "v")
    assert (made.manifest["precision"], made.manifest["device"]) == ("bf16", "cpu")
    encode_documents(word_encoder, collection, tmp_path / "v")
    assert "made in" not in capsys.readouterr().err
    word_encoder.precision = "fp32"
    assert encode_documents(word_encoder, collection, tmp_path / "v").fingerprint == made.fingerprint
    assert "vectors made in bf16 on cpu are used; here they would be made in fp32 on cpu" in capsys.readouterr().err
