from __future__ import annotations

from pathlib import Path

import pytest

from rankdistill.collections import open_collection
from rankdistill.collections.msmarco import split_name, text_id
from rankdistill.errors import RankdistillError

COLLECTION = "0\tIron rusts in water.\n1\tCopper turns green.\n2\tGold\tis soft\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "collection.tsv").write_text(COLLECTION)
    (tmp_path / "queries.train.tsv").write_text("10\twhat rusts\n11\twhat turns green\n")
    (tmp_path / "queries.dev.tsv").write_text("20\twhat is soft\n21\tunjudged\n")
    (tmp_path / "queries.dev.small.tsv").write_text("20\twhat is soft\n")  # again, as in MS MARCO
    (tmp_path / "qrels.train.tsv").write_text("10\t0\t0\t1\n11\t0\t1\t1\n")
    (tmp_path / "qrels.dev.small.tsv").write_text("20\t0\t2\t1\n")
    (tmp_path / "qrels.txt").write_text("20 Q0 2 3\n20 Q0 0 0\n20 Q0 77 1\n")
    return tmp_path


def message(spec: str) -> str:
    with pytest.raises(RankdistillError) as caught:
        open_collection(spec)
    return str(caught.value)


def test_all_files_are_read(folder: Path) -> None:
    collection = open_collection(f"msmarco:{folder}")
    assert (collection.document_count, collection.query_ids()) == (3, ["20", "21", "10", "11"])
    assert collection.document_texts([2]) == ["Gold\tis soft"]
    assert set(collection.splits) == {"train", "dev.small", "test"}
    assert collection.qrels("test") == {"20": {"2": 3, "0": 0}}
    assert collection.training_splits() == (["10", "11"], ["20"])
    assert any("1 of 3 judgments name documents" in problem for problem in collection.problems)


def test_one_query_id_with_two_texts_is_refused(folder: Path) -> None:
    (folder / "queries.dev.small.tsv").write_text("20\tanother text\n")
    text = message(f"msmarco:{folder}")
    assert "query id '20' occurs twice with different text" in text
    assert "queries.dev.small.tsv:1" in text and "queries.dev.tsv:1" in text


def test_bad_lines_are_named(folder: Path) -> None:
    (folder / "collection.tsv").write_text(COLLECTION + "3 no tab")
    assert "collection.tsv:4" in message(f"msmarco:{folder}")
    (folder / "collection.tsv").write_text(COLLECTION + "1\tagain\n")
    text = message(f"msmarco:{folder}")
    assert "document id '1' occurs twice" in text and "collection.tsv:2" in text and "collection.tsv:4" in text
    (folder / "collection.tsv").write_bytes(COLLECTION.encode() + b"3\t\xff\n")
    text = message(f"msmarco:{folder}")
    assert "0xff" in text and "collection.tsv:4" in text
    (folder / "collection.tsv").write_text(COLLECTION)
    (folder / "qrels.tsv").write_text("20\t2\t1\n")
    assert "two qrels files define the split 'test'" in message(f"msmarco:{folder}")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("qrels.train.tsv", "train"),
        ("qrels.dev.small.tsv.gz", "dev.small"),
        ("qrels.txt", "test"),
        ("2019qrels-pass.txt", "2019-pass"),
    ],
)
def test_split_names(name: str, split: str) -> None:
    assert split_name(Path(name)) == split


def test_triples_by_text_make_a_collection(tmp_path: Path) -> None:
    path = tmp_path / "triples.train.small.tsv"
    path.write_text("q one\tgood\tbad\nq one\tgood\tworse\nq two\tworse\tgood\n")
    collection = open_collection(f"msmarco:{tmp_path}")
    assert collection.document_texts(range(3)) == ["good", "bad", "worse"]
    one, two, good, worse = map(text_id, ("q one", "q two", "good", "worse"))
    assert collection.qrels("train") == {one: {good: 1}, two: {worse: 1}}
    assert collection.problems == []


def test_repeated_texts_beyond_the_remembered_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankdistill.collections.msmarco.REMEMBERED", 3)
    lines = "".join(f"query {i % 7}\tpassage {i % 5}\tpassage {i % 11}\n" for i in range(500))
    (tmp_path / "triples.tsv").write_text(lines)
    collection = open_collection(f"msmarco:{tmp_path}")
    assert sorted(collection.document_texts(range(11))) == sorted(f"passage {i}" for i in range(11))
    assert (collection.document_count, collection.query_count) == (11, 7)
    ids = [text_id(f"passage {i}") for i in range(11)]
    assert collection.doc_ids(collection.doc_rows(ids)) == ids
    assert collection.describe()["words"]["documents"] == {"p50": 2, "p95": 2, "max": 2}


def test_triples_by_id_alone_are_no_collection(tmp_path: Path) -> None:
    (tmp_path / "triples.tsv").write_text("1\t2\t3\n")
    assert "collection.tsv is missing" in message(f"msmarco:{tmp_path}")
    (tmp_path / "triples.tsv").unlink()
    assert "neither collection.tsv" in message(f"msmarco:{tmp_path}")


def test_shared_dl19(shared_data: Path) -> None:
    collection = open_collection(f"msmarco:{shared_data / 'msmarco-dl19'}")
    assert (collection.document_count, collection.query_count, collection.splits) == (11843, 43, ("test",))
    assert sum(map(len, collection.qrels("test").values())) == 3983
    assert sum(map(len, collection.qrels("test", missing=True).values())) == 9260
