from __future__ import annotations

import errno
import gc
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdistill.collections import Collection, open_collection, storage, writer
from rankdistill.collections.collection import parted
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.lists import lists_fingerprint

BeirFolder = Callable[..., Path]
DOCUMENTS = 9000  # more than two batches


def write_documents(count: int, text: str = "text") -> Callable[[writer.CollectionWriter], None]:
    def load(target: writer.CollectionWriter) -> None:
        for i in range(count):
            target.document(f"doc {i} é", "" if i % 2 else f"title {i}", f"{text} {i}")
        for i in range(20):
            target.query(f"q{i}", f"query {i}")
            target.judgment("train", f"q{i}", f"doc {i} é", 1)

    return load


@pytest.fixture(scope="module")
def numbered() -> Collection:
    return writer.imported({"numbered": DOCUMENTS}, write_documents(DOCUMENTS), name="numbered", spec="numbered")


def test_rows_and_ids_are_inverse(numbered: Collection) -> None:
    rows = np.random.default_rng(0).integers(0, DOCUMENTS, 5000)
    ids = numbered.doc_ids(rows)
    assert ids == [f"doc {row} é" for row in rows]
    np.testing.assert_array_equal(numbered.doc_rows(ids), rows)
    assert numbered.doc_rows(["doc 5", "doc 5 é", "", "doc 9000 é"]).tolist() == [-1, 5, -1, -1]
    assert numbered.doc_rows([]).dtype == np.int64


def test_texts_at_random_are_those_in_order(numbered: Collection) -> None:
    streamed = {}
    for first, texts in numbered.iter_documents(batch_size=1000):
        assert len(texts) == 1000
        streamed.update(enumerate(texts, first))
    rows = random.Random(1).sample(range(DOCUMENTS), 500)
    assert numbered.document_texts(rows) == [streamed[row] for row in rows]
    assert next(numbered.iter_documents(10, start=4090)) == (4090, [streamed[row] for row in range(4090, 4100)])
    assert streamed[4096] == "title 4096 text 4096" and streamed[4097] == "text 4097"


@pytest.mark.parametrize("row", [-1, DOCUMENTS])
def test_a_row_that_is_none_is_refused(numbered: Collection, row: int) -> None:
    with pytest.raises(IndexError, match=str(row)):
        numbered.document_texts([0, row])


@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.text(min_size=1).filter(lambda text: text.isprintable()), min_size=1, max_size=60, unique=True))
def test_any_ids_are_found(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    target = writer.CollectionWriter(folder, "ids")
    for identifier in ids[::2]:
        target.document(identifier, "", "text")
    target.finish()
    target.close()
    table = storage.Table(folder / "documents.arrow")
    index = storage.IdIndex(folder, "documents", table, "doc_id")
    expected = [place // 2 if place % 2 == 0 else -1 for place in range(len(ids))]
    assert index.lookup(ids).tolist() == expected


def test_equal_hashes_of_different_ids_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "id_hash", lambda identifier: len(identifier))
    target = writer.CollectionWriter(tmp_path, "colliding")
    for identifier in ("a", "bb", "b", "cc", "c"):
        target.document(identifier, "", identifier)
    target.finish()
    target.close()
    index = storage.IdIndex(tmp_path, "documents", storage.Table(tmp_path / "documents.arrow"), "doc_id")
    assert index.lookup(["c", "a", "cc", "d", "b", "bb", "dd"]).tolist() == [4, 0, 3, -1, 2, 1, -1]


def test_queries(numbered: Collection) -> None:
    assert numbered.query_texts(["q3", "q0"]) == ["query 3", "query 0"]
    with pytest.raises(RankdistillError, match="no query 'q99'"):
        numbered.query_texts(["q3", "q99"])
    assert [query.query_id for batch in numbered.iter_queries(batch_size=7) for query in batch] == numbered.query_ids()
    with pytest.raises(RankdistillError, match=r"no split 'test'[\s\S]*train"):
        numbered.query_ids("test")


def test_held_out_dev_queries(numbered: Collection) -> None:
    train, dev = numbered.training_splits(0.2, seed=1)
    assert (len(train), len(dev)) == (16, 4)
    assert sorted(train + dev) == sorted(numbered.query_ids("train"))
    assert numbered.training_splits(0.2, seed=1) == (train, dev)
    assert numbered.training_splits(0.2, seed=2) != (train, dev)
    assert len(numbered.training_splits(0.0)[1]) == 1


def test_own_dev_split_is_used_under_any_name(beir_folder: BeirFolder) -> None:
    collection = open_collection(f"beir:{beir_folder(qrels={'train': 'q1 0 d1 1', 'validation': 'q2 0 d2 1'})}")
    assert collection.training_splits() == (["q1"], ["q2"])
    assert collection.qrels("dev") == {"q2": {"d2": 1}}


def test_second_opening_imports_nothing(beir_folder: BeirFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"beir:{beir_folder()}"
    first = open_collection(spec)
    monkeypatch.setattr(writer, "obtain", lambda *_, **__: pytest.fail("imported again"))
    again = open_collection(spec)
    assert (again.fingerprint, again.qrels("test")) == (first.fingerprint, first.qrels("test"))
    assert open_collection(again) is again


def test_it_travels_to_another_process(numbered: Collection) -> None:
    there = pickle.loads(pickle.dumps(numbered))  # noqa: S301 - as a data loader sends it to its workers
    assert there.document_texts([8999]) == numbered.document_texts([8999])


def test_describe(beir_folder: BeirFolder) -> None:
    collection = open_collection(f"beir:{beir_folder()}")
    described = json.loads(json.dumps(collection.describe()))
    assert described["documents"] == 3 and described["queries"] == 2
    assert described["words"]["documents"] == {"p50": 5, "p95": 6, "max": 6}
    assert described["splits"]["test"] == {
        "queries": 2,
        "judgments": 3,
        "judged_per_query": {"mean": 1.5, "max": 2},
        "grades": {"0": 1, "1": 1, "2": 1},
        "judged_share_of_pairs": 0.5,
    }
    assert "3 documents" in repr(collection) and "test 2" in repr(collection)


def test_memory_does_not_grow_with_the_corpus() -> None:
    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        writer.imported({"peak": count}, write_documents(count, "x" * 1000), name="peak", spec="peak")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(14_000) < 1.5 * peak(5_000)


IMPORT = """
import sys, time
from rankdistill.collections import writer
def load(target):
    with open(sys.argv[1], "a") as log:
        log.write("import\\n")
    for i in range(5000):
        target.document(f"d{i}", "", f"text {i}")
    if sys.argv[2] == "hang":
        print("ready", flush=True)
        time.sleep(60)
    target.query("q", "query text")
    target.judgment("test", "q", "d7", 1)
collection = writer.imported({"process": sys.argv[1]}, load, name="process", spec="process")
print(collection.document_count, collection.qrels("test"))
"""


def start(log: Path, how: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", IMPORT, str(log), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_import_is_never_taken_for_a_whole_one(tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    killed = start(log, "hang")
    assert killed.stdout is not None and killed.stdout.readline() == "ready\n"
    assert list((cache / "collections").glob(".*.partial"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    output, _ = start(log, "finish").communicate(timeout=60)
    assert output == "5000 {'q': {'d7': 1}}\n"
    assert not list((cache / "collections").glob(".*.partial"))


def test_two_processes_import_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [start(log, "finish") for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["5000 {'q': {'d7': 1}}\n"] * 2
    assert log.read_text() == "import\n"


class SmallDisk(io.FileIO):
    """A file on a disk that has room for `room` more bytes in all."""

    room = 0

    def write(self, data: Any) -> int:
        SmallDisk.room -= memoryview(data).nbytes
        if SmallDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 500, 100_000, 450_000])
def test_a_full_disk_is_said_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path, room: int) -> None:
    load = write_documents(10_000)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "open", lambda path, mode: SmallDisk(path, mode.replace("b", "")), raising=False)
        patched.setattr(SmallDisk, "room", room)
        with pytest.raises(RankdistillError, match="disk is full"):
            writer.imported({"disk": room}, load, name="disk", spec="disk")
    assert not list((cache / "collections").glob(".*.partial"))
    assert writer.imported({"disk": room}, load, name="disk", spec="disk").document_count == 10_000


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bier:somewhere", "did you mean 'beir'"),
        ("beir", "what comes after the colon is missing"),
        ("python-docs:private", "no variant 'private'"),
    ],
)
def test_wrong_names(spec: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_collection(spec)
    assert words in str(caught.value)


def test_queries_made_of_documents_are_labelled_and_held_out_by_document(tiny_collection: Collection) -> None:
    """No document of a query that measures has a training query, also where two documents share a text."""
    doc_ids = tiny_collection.doc_ids(range(32))
    relevant = {f"what is {doc_id}": [doc_id] for doc_id in doc_ids}
    relevant |= {f"more of {doc_id}": [doc_id] for doc_id in doc_ids} | {"either": [doc_ids[0], doc_ids[9]]}
    known = tiny_collection.with_queries([], relevant)
    assert known.splits == (*tiny_collection.splits, "generated", "generated-dev", "generated-test")
    splits = known.splits[-3:]
    sources = [{doc_id for judged in known.qrels(split).values() for doc_id in judged} for split in splits]
    assert set().union(*sources) == set(doc_ids) and sum(map(len, sources)) == len(doc_ids)
    assert all(sources) and len(sources[0]) >= 24
    qrels = {query_id: judged for split in splits for query_id, judged in known.qrels(split).items()}
    (either,) = [i for i in qrels if known.query_texts([i]) == ["either"]]
    assert qrels[either] == {doc_ids[0]: 1, doc_ids[9]: 1} and len(qrels) == 65
    assert [query.text for batch in known.iter_queries("generated-dev") for query in batch] == known.query_texts(
        known.query_ids("generated-dev")
    )
    again = pickle.loads(pickle.dumps(known))  # noqa: S301
    assert all(again.qrels(split) == known.qrels(split) for split in splits)
    assert f"generated {len(known.query_ids('generated'))}" in repr(known)
    assert known.describe()["splits"]["generated-test"]["queries"] == len(known.query_ids("generated-test"))
    # Another seed holds out others; the order in which texts come does not matter.
    reordered = tiny_collection.with_queries([], dict(reversed(relevant.items())))
    assert reordered.qrels("generated-test") == known.qrels("generated-test")
    other = tiny_collection.with_queries([], relevant, seed=1)
    assert other.qrels("generated-test") != known.qrels("generated-test")
    assert known.training_split == "generated" and tiny_collection.training_split == "train"
    with pytest.raises(RankdistillError, match="no document 'nobody'"):
        tiny_collection.with_queries([], {"who": ["nobody"]})


def test_labels_laid_over_have_a_fingerprint_of_their_own(tiny_collection: Collection) -> None:
    """The collection's stays, and scores belong to it; what reads the labels cannot be taken for another's."""
    first, second = (tiny_collection.with_queries([], {"which one": [doc_id]}) for doc_id in ("d-iron", "d-gold"))
    assert first.fingerprint == second.fingerprint and first.query_ids("generated") == second.query_ids("generated")
    assert first.labels_fingerprint("generated") != second.labels_fingerprint("generated")
    assert lists_fingerprint(first, "generated") != lists_fingerprint(second, "generated")
    assert first.labels_fingerprint("train") == [] and lists_fingerprint(first, "train") == lists_fingerprint(
        tiny_collection, "train"
    )


def test_passages_of_one_document_are_held_out_together() -> None:
    parts = parted([[f"doc{number // 4}#{number % 4}"] for number in range(80)], seed=1)
    of_document: dict[str, set[str]] = {}
    for number in range(80):
        of_document.setdefault(f"doc{number // 4}", set()).add(parts[f"doc{number // 4}#{number % 4}"])
    assert all(len(names) == 1 for names in of_document.values())
    assert sorted(name for names in of_document.values() for name in names)[-2:] == ["generated-test"] * 2
