"""Vectors, token vectors and term weights are written in one way: a kill costs at most the shard in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import sparse

from rankdistill.errors import RankdistillError
from rankdistill.indexes import sparse_vectors
from rankdistill.indexes.multi_vector import encode_document_tokens, open_token_vectors
from rankdistill.indexes.sparse_vectors import encode_document_terms, open_postings, open_sparse_vectors
from rankdistill.indexes.vectors import encode_documents, open_vectors
from rankdistill.students.token_vectors import TokenVectors

if TYPE_CHECKING:
    from rankdistill.collections import Collection

TEXTS = [" ".join(f"w{(row * 7 + place * place) % 23}" for place in range(1 + row % 9)) for row in range(100)]
WIDTH = 23
KINDS = {"dense": encode_documents, "tokens": encode_document_tokens, "terms": encode_document_terms}
KILLED = (
    "import sys\n"
    "from test_encoding import KINDS, Words\n"
    "from rankdistill.collections import open_collection\n"
    "kind, collection, out, log = sys.argv[1:]\n"
    "KINDS[kind](Words(kind, log, seconds=0.002), open_collection(collection), out, shard_size=10)\n"
)


class Words:
    """Counts words; writes down every text it encodes, so that a killed process leaves a record."""

    similarity, storage, fingerprint = "dot", "fp16", "words"

    def __init__(self, kind: str, log: str | Path, seconds: float = 0.0) -> None:
        self.kind, self.log, self.seconds = kind, Path(log), seconds
        self.dimension = 2 if kind == "tokens" else WIDTH
        self.terms = [f"w{number}" for number in range(WIDTH)]

    def encode_documents(self, texts: Any) -> Any:
        with open(self.log, "a") as log:
            for text in texts:
                time.sleep(self.seconds)
                log.write(text + "\n")
        if self.kind == "tokens":
            return TokenVectors.of(
                [np.array([[len(word), int(word[1:])] for word in text.split()]) for text in texts], 2
            )
        counts = np.zeros((len(texts), WIDTH), np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                counts[row, int(word[1:])] += 1
        return counts if self.kind == "dense" else sparse.csr_matrix(counts)


def check(kind: str, path: Path, log: Path) -> None:
    """What is on disk is what an encoder says that was never stopped."""
    expected = Words(kind, log).encode_documents(TEXTS)
    if kind == "dense":
        np.testing.assert_array_equal(open_vectors(path), expected)
    elif kind == "tokens":
        stored = open_token_vectors(path)
        np.testing.assert_array_equal(stored.vectors, expected.vectors)
        np.testing.assert_array_equal(stored.offsets, expected.offsets)
    else:
        np.testing.assert_array_equal(open_sparse_vectors(path).toarray(), expected.toarray())
        np.testing.assert_array_equal(open_postings(path).matrix.toarray(), expected.toarray().T)


@pytest.mark.parametrize("kind", ["dense", "terms"])  # with one entry a text, and with offsets
def test_after_kill_9_no_finished_shard_is_encoded_again(make_collection: Any, tmp_path: Path, kind: str) -> None:
    collection: Collection = make_collection(TEXTS)
    log, kills = tmp_path / "log", 0
    command = [sys.executable, "-c", KILLED, kind, collection.spec, str(tmp_path / "v"), str(log)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    while True:
        process = subprocess.Popen(command, env=environment)
        before = len(log.read_text().splitlines()) if log.exists() else 0
        # Killed 25 texts later: two shards are finished, the third is in flight.
        while process.poll() is None and kills < 2:
            if log.exists() and len(log.read_text().splitlines()) >= before + 25:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "v").exists()
    encoded = log.read_text().splitlines()
    assert kills == 2 and set(encoded) == set(TEXTS)
    assert 100 <= len(encoded) <= 100 + kills * 10  # at most the shard in flight, each time
    check(kind, tmp_path / "v", tmp_path / "other log")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_beyond_the_last_shard_is_lost(make_collection: Any, tmp_path: Path, kind: str) -> None:
    """As a kill between two writes leaves it: entries without their lengths, and half a vector."""
    encoder: Any = Words(kind, tmp_path / "log")
    collection, encode = make_collection(TEXTS), encoder.encode_documents

    def fails(texts: Any) -> Any:
        if len(encoder.log.read_text().splitlines() if encoder.log.exists() else ()) >= 40:
            raise KeyboardInterrupt
        return encode(texts)

    encoder.encode_documents = fails
    with pytest.raises(KeyboardInterrupt):
        KINDS[kind](encoder, collection, tmp_path / "v", shard_size=20)
    for partial in tmp_path.rglob("*.npy"):
        with open(partial, "ab") as stream:
            stream.write(b"\x01" * 77)
    encoder.encode_documents = encode
    KINDS[kind](encoder, collection, tmp_path / "v", shard_size=20)
    assert len(encoder.log.read_text().splitlines()) == 100
    check(kind, tmp_path / "v", tmp_path / "other log")


def test_a_stop_after_the_last_shard_loses_nothing(
    make_collection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    encoder, collection = Words("terms", tmp_path / "log"), make_collection(TEXTS)
    monkeypatch.setattr(sparse_vectors, "_sort_by_term", stop)
    with pytest.raises(KeyboardInterrupt):
        encode_document_terms(encoder, collection, tmp_path / "v")
    monkeypatch.undo()
    encode_document_terms(encoder, collection, tmp_path / "v")
    assert len(encoder.log.read_text().splitlines()) == 100
    check("terms", tmp_path / "v", tmp_path / "other log")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("dense", value) for value in (np.nan, np.inf)),
        *(("tokens", value) for value in (np.nan, np.inf, 1e6)),  # fp16 ends at 65,504
        *(("terms", value) for value in (np.nan, np.inf, -0.5)),
    ],
)
def test_values_that_are_no_numbers_are_refused_with_the_document(
    make_collection: Any, tmp_path: Path, kind: str, value: float
) -> None:
    encoder: Any = Words(kind, tmp_path / "log")
    encode = encoder.encode_documents

    def diverged(texts: Any) -> Any:
        encoded = encode(texts)
        if len(encoder.log.read_text().splitlines()) == 40:  # the shard of rows 30 to 39
            if kind == "dense":
                encoded[3, 5] = value
            elif kind == "tokens":
                encoded = TokenVectors(encoded.vectors.astype(np.float32), encoded.offsets)
                encoded.vectors[encoded.offsets[3], 1] = value
            else:
                encoded.data[encoded.indptr[3]] = value
        return encoded

    encoder.encode_documents = diverged
    with pytest.raises(RankdistillError, match="NaN") as caught:
        KINDS[kind](encoder, make_collection(TEXTS), tmp_path / "v", shard_size=10)
    assert "'d33'" in str(caught.value) and not (tmp_path / "v").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_come_back_as_went_in(make_collection: Any, tmp_path: Path, kind: str) -> None:
    encoder: Any = Words(kind, tmp_path / "log")
    encode = encoder.encode_documents
    encoder.encode_documents = lambda texts: encode(texts[:-1])
    with pytest.raises(RankdistillError, match="99 vectors came back for 100 texts"):
        KINDS[kind](encoder, make_collection(TEXTS), tmp_path / "v")


def test_a_full_disk_is_said_and_finished_shards_stay(make_collection: Any, tmp_path: Path) -> None:
    """A limit on the size of files makes the reservation fail as a full disk does."""
    import resource

    collection, encoder = make_collection(TEXTS), Words("dense", tmp_path / "log")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(RankdistillError, match="the disk is full"):
            encode_documents(encoder, collection, tmp_path / "v")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "log").exists()  # said before anything was encoded
    encode_documents(encoder, collection, tmp_path / "v")
    check("dense", tmp_path / "v", tmp_path / "log")
