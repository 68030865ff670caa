from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankdistill.collections import Query, open_collection
from rankdistill.errors import RankdistillError

BeirFolder = Callable[..., Path]


def message(folder: Path) -> str:
    with pytest.raises(RankdistillError) as caught:
        open_collection(f"beir:{folder}")
    return str(caught.value)


def test_a_folder_is_read_as_it_is(beir_folder: BeirFolder) -> None:
    collection = open_collection(f"beir:{beir_folder()}")
    assert (collection.name, collection.document_count, collection.query_count) == ("metals", 3, 2)
    assert collection.splits == ("test",)
    assert collection.doc_ids([2, 0]) == ["dé 3", "d1"]
    assert collection.document_texts([0, 1, 2]) == [
        "Iron rusts in water.",  # the title begins the text: not repeated
        "Copper It turns green with age.",
        "Gold does not tarnish: 金.",
    ]
    assert collection.qrels("test") == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert list(collection.iter_queries("test", batch_size=1)) == [
        [Query("q1", "which metal rusts", {"d1": 2, "d2": 0})],
        [Query("q2", "which metal turns green", {"d2": 1})],
    ]
    assert collection.problems == []


def test_gzip_reads_the_same(beir_folder: BeirFolder) -> None:
    plain = beir_folder()
    packed = beir_folder(name="packed")
    for path in [*packed.glob("*.jsonl"), *packed.glob("qrels/*.tsv")]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    one, other = open_collection(f"beir:{plain}"), open_collection(f"beir:{packed}")
    assert one.documents(range(3)) == other.documents(range(3))
    assert one.qrels("test") == other.qrels("test")


def test_truncated_gzip_names_the_line(beir_folder: BeirFolder) -> None:
    folder = beir_folder(corpus=[{"_id": str(i), "text": f"text {i * 7919}"} for i in range(3000)])
    corpus = folder / "corpus.jsonl"
    data = gzip.compress(corpus.read_bytes())
    (folder / "corpus.jsonl.gz").write_bytes(data[: len(data) // 2])
    corpus.unlink()
    text = message(folder)
    assert "gzip file is cut off" in text
    line = int(text.split("corpus.jsonl.gz:")[1].split()[0])
    assert 1000 < line < 2000


QUERY = {"_id": "q", "text": "a b"}
FAULTS: list[tuple[dict[str, Any], list[str]]] = [
    *(({"corpus": [{"_id": "d1", "text": "fine"}, line]}, [words, "/corpus.jsonl:2"]) for line, words in (
        ('{"_id": "d9", "text": "cut of', "not valid JSON"),
        ("[1, 2]", "not an object"),
        ('{"text": "no id"}', "missing or empty"),
        ('{"_id": "", "text": "empty id"}', "missing or empty"),
        ('{"_id": 1.5, "text": "odd id"}', "is a float"),
        ('{"_id": "d9"}', "no 'text'"),
        ('{"_id": "d9", "text": 5}', "is a int"),
        ("[" * 100_000, "not valid JSON"),
    )),
    *(({"qrels": {"test": f"q1\td1\t1\n{line}\n"}}, ["qrels/test.tsv:2"])
      for line in ("q1\td1", "q1\td1\tx", "q1\td1\t1.5", "q1\td1\tnan", "q1\t0\td1\t1\t1", "\td1\t1")),
    ({"corpus": [{"_id": str(i % 4000), "text": f"{i}"} for i in range(9000)]},
     ["document id '0' occurs twice", "corpus.jsonl:1 and", "corpus.jsonl:4001"]),
    ({"queries": [QUERY, {"_id": "p", "text": "c"}, QUERY]},
     ["query id 'q' occurs twice", "queries.jsonl:1 and", "queries.jsonl:3"]),
    ({"corpus": []}, ["has no documents"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), FAULTS, ids=[" ".join(said)[:60] for _, said in FAULTS])
def test_faults_are_named_by_file_and_line(beir_folder: BeirFolder, content: dict[str, Any], said: list[str]) -> None:
    text = message(beir_folder(**content))
    assert all(words in text for words in said), text


def test_bytes_that_are_not_utf8_are_named(beir_folder: BeirFolder) -> None:
    folder = beir_folder()
    with open(folder / "queries.jsonl", "ab") as stream:
        stream.write('{"_id": "q3", "text": "café"}\n'.encode("latin-1"))
    text = message(folder)
    assert "byte 0xe9" in text and "queries.jsonl:3" in text


@pytest.mark.parametrize(
    "text", ["q1\td1\t1\n", "q1 0 d1 1\n", "q1\t0\td1\t1.0\n", "\ufeffquery-id\tc\ts\r\nq1\td1\t1\r\n"]
)
def test_qrels_forms(beir_folder: BeirFolder, text: str) -> None:
    assert open_collection(f"beir:{beir_folder(qrels={'test': text})}").qrels("test") == {"q1": {"d1": 1}}


def test_qrels_of_missing_ids_are_counted_left_out_and_said(
    beir_folder: BeirFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "q1\tgone\t1\nq1\td1\t1\nnobody\td1\t1\nq2\tgone\t2\nq2\tlost\t1\n"
    collection = open_collection(f"beir:{beir_folder(qrels={'test': lines})}")
    assert collection.qrels("test") == {"q1": {"d1": 1}}
    assert collection.query_ids("test") == ["q1"]
    assert collection.qrels("test", missing=True) == {"q1": {"gone": 1, "d1": 1}, "q2": {"gone": 2, "lost": 1}}
    queries, documents = collection.problems
    assert "1 of 5 judgments name queries" in queries and "'nobody' at qrels/test.tsv:3" in queries
    assert "3 of 5 judgments name documents" in documents and "'gone' at qrels/test.tsv:1" in documents
    printed = capsys.readouterr().err
    assert all(f"warning: collection metals: {problem}" in printed for problem in collection.problems)


def test_judgments_repeated_with_another_grade_are_said(beir_folder: BeirFolder) -> None:
    lines = "q1 0 d1 1\nq1 0 d2 1\nq1 0 d1 3\nq1 0 d2 1\n"
    collection = open_collection(f"beir:{beir_folder(qrels={'test': lines})}")
    assert collection.qrels("test") == {"q1": {"d1": 3, "d2": 1}}
    assert len(collection.problems) == 1 and "1 of 4 judgments are repeated" in collection.problems[0]


def test_empty_texts_are_kept_and_counted(beir_folder: BeirFolder) -> None:
    corpus = [{"_id": "a", "text": ""}, {"_id": "b", "text": None, "title": "T"}, {"_id": "c", "text": " "}]
    collection = open_collection(f"beir:{beir_folder(corpus=corpus, qrels={'test': 'q1 0 a 1'})}")
    assert collection.document_count == 3
    assert collection.document_texts([0, 1]) == ["", "T"]
    assert collection.problems == ["2 documents have no text (first: 'a' at corpus.jsonl:1)"]


def test_half_a_surrogate_pair_is_replaced_and_counted(beir_folder: BeirFolder) -> None:
    folder = beir_folder(corpus=[r'{"_id": "d1", "text": "x \ud83d y"}'])
    collection = open_collection(f"beir:{folder}")
    assert collection.document_texts([0]) == ["x \ufffd\ufffd\ufffd y"]  # its three bytes
    assert any("half a surrogate pair" in problem for problem in collection.problems)


def test_missing_files_are_named(beir_folder: BeirFolder, tmp_path: Path) -> None:
    assert "there is no such folder" in message(tmp_path / "nowhere")
    folder = beir_folder()
    (folder / "queries.jsonl").unlink()
    assert "needs queries.jsonl" in message(folder)


def test_fingerprint_is_of_the_content_not_the_path(beir_folder: BeirFolder, tmp_path: Path) -> None:
    folder = beir_folder()
    shutil.copytree(folder, tmp_path / "copy")
    first, copy = open_collection(f"beir:{folder}"), open_collection(f"beir:{tmp_path / 'copy'}")
    assert (first.fingerprint, first.path) == (copy.fingerprint, copy.path)
    assert (first.name, copy.name) == ("metals", "copy")
    with open(folder / "queries.jsonl", "a") as stream:
        stream.write(json.dumps({"_id": "q3", "text": "one more"}) + "\n")
    changed = open_collection(f"beir:{folder}")
    assert changed.fingerprint != first.fingerprint and changed.query_count == 3
    shutil.copy(copy.path / "manifest.json", tmp_path)  # the old one stays whole
    (tmp_path / "copy" / "qrels" / "test.tsv").rename(tmp_path / "copy" / "qrels" / "dev.tsv")
    assert open_collection(f"beir:{tmp_path / 'copy'}").splits == ("dev",)


def test_a_failed_import_leaves_nothing(beir_folder: BeirFolder, cache: Path) -> None:
    before = {path.name for path in (cache / "collections").glob("*")}
    message(beir_folder(corpus=[{"_id": "d1", "text": "x"}, "{"]))
    left = {path.name for path in (cache / "collections").glob("*")} - before
    assert all(name.endswith(".lock") for name in left)


def test_shared_collections(shared_data: Path) -> None:
    nfcorpus = open_collection(f"beir:{shared_data / 'beir' / 'nfcorpus'}")
    assert (nfcorpus.document_count, nfcorpus.query_count) == (3633, 3237)
    counted = {name: (split["queries"], split["judgments"]) for name, split in nfcorpus.describe()["splits"].items()}
    assert counted == {"train": (2590, 110575), "dev": (324, 11385), "test": (323, 12334)}
    assert nfcorpus.problems == []
    train, dev = open_collection(f"beir:{shared_data / 'beir' / 'cranfield'}").training_splits()
    assert (len(train), len(dev)) == (135, 15)
