"""What every reader of text shares: headers, other files that lie about, compressed and foreign files, ids, length."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankdistill.artifacts import open_artifact
from rankdistill.collections import Collection, beir, open_collection, text_files
from rankdistill.collections.text_files import is_header, read_lines, read_qrels, text_ids, text_keys
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.compare import compare, read_judgments
from rankdistill.runs import read_run
from rankdistill.scores.foreign_scores import iter_foreign

BeirFolder = Callable[..., Path]


@pytest.mark.parametrize(
    ("read", "first"),
    [
        *((read_qrels, line) for line in ("q0\td0\t0.5", "q0 0 d0 l", "q0 0 d0 x", "q0\td0\trel", "query\tiron\tx")),
        *((read, f"q0\td0\t{value}") for value in ("N/A", "1_0") for read in (read_qrels, iter_foreign)),
        *((iter_foreign, line) for line in ("q0\td0\t0,75", "q0 d0 high")),
    ],
)
def test_a_first_line_of_data_is_never_taken_for_a_header(
    tmp_path: Path, read: Callable[[Path], Iterator[object]], first: str
) -> None:
    file = tmp_path / "test.tsv"
    file.write_text(f"{first}\nq1\td1\t1\n")
    with pytest.raises(RankdistillError, match=r"is not a (whole number|score)\n.*test.tsv:1"):
        list(read(file))


@pytest.mark.parametrize(
    "header",
    [
        "query-id\tcorpus-id\tscore",
        "qid 0 docno rel",
        '"Query ID"\t"Doc"\t"Label"',
        "topic Q0 doc judgment",
        "qid\tc\tg",
    ],
)
def test_headers_are_known_by_their_words(tmp_path: Path, header: str) -> None:
    file = tmp_path / "test.tsv"
    row = "q1\t0\td1\t1" if len(text_files.split_columns(header)) == 4 else "q1\td1\t1"
    file.write_text(f"{header}\n{row}\n")
    assert [tuple(one) for one in read_qrels(file)] == [("q1", "d1", 1, 2)]
    assert not is_header(["q1", "d1", "1"])


def test_headers_of_runs_triples_and_texts(tmp_path: Path) -> None:
    run, triples = tmp_path / "a.trec", tmp_path / "triples.tsv"
    run.write_text("qid Q0 docid rank score tag\nq1 Q0 d1 1 2.5 x\n")
    assert read_run(run).to_dict() == {"q1": {"d1": 2.5}}
    triples.write_text("pos_score\tneg_score\tqid\tpos\tneg\n2\t1\tq1\td1\td2\n")
    assert [tuple(one)[:3] for one in iter_foreign(triples)] == [("q1", "d1", 2.0), ("q1", "d2", 1.0)]
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "collection.tsv").write_text("id\ttext\nd1\tone\nd2\ttwo\n")
    (folder / "queries.tsv").write_text("qid\tquery\nq1\twhich\n")
    (folder / "qrels.tsv").write_text("q1\td1\t1\n")
    collection = open_collection(f"msmarco:{folder}")
    assert (collection.doc_ids(range(2)), collection.query_ids()) == (["d1", "d2"], ["q1"])


@pytest.mark.parametrize(
    ("first", "header"),
    [
        ("docno\tabstract", True),
        ("Document ID\tDocument text", True),
        ("passage_id\tpassage_text", True),
        ("id\tThe text of iron", False),
        ("d0\ttext", False),
    ],
)
def test_headers_of_texts(tmp_path: Path, first: str, header: bool) -> None:
    (tmp_path / "collection.tsv").write_text(f"{first}\nd1\tone\n")
    assert len(list(text_files.read_pairs(tmp_path / "collection.tsv"))) == 2 - header


STRAY = ["test.tsv.bak", "test.tsv~", "._test.tsv", ".test.tsv.swp", "test.tsv.bz2", "TEST.TSV", "test.tsv.gz.part"]


def test_backup_and_hidden_files_are_named_and_not_read(
    beir_folder: BeirFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = beir_folder()
    before = open_collection(f"beir:{folder}")
    assert "ignored" not in capsys.readouterr().err
    for name in STRAY:
        (folder / "qrels" / name).write_bytes(
            b"\x00\x05\x16\xff" if "bz2" in name or name[0] == "." else b"q2\td1\t1\n"
        )
    after = open_collection(f"beir:{folder}")
    assert (after.splits, after.fingerprint) == (("test",), before.fingerprint)
    assert "ignored ._test.tsv, .test.tsv.swp, TEST.TSV, test.tsv.bak" in capsys.readouterr().err


def test_stray_files_of_other_folders(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name, text in (("collection", "d1\tone\n"), ("queries", "q1\twhich\n"), ("qrels.dev", "q1\td1\t1\n")):
        (folder / f"{name}.tsv").write_text(text)
        for stray in (f"._{name}.tsv", f"{name}.tsv.bak", f".{name}.tsv.swp"):
            (folder / stray).write_bytes(b"\xff\x00")
    assert open_collection(f"msmarco:{folder}").qrels("dev") == {"q1": {"d1": 1}}
    parquet = tmp_path / "p"
    (parquet / "qrels").mkdir(parents=True)
    pq.write_table(pa.table({"_id": ["d1"], "text": ["one"]}), parquet / "corpus.parquet")
    pq.write_table(pa.table({"_id": ["q1"], "text": ["which"]}), parquet / "queries.parquet")
    judged = {"query-id": ["q1"], "corpus-id": ["d1"], "score": [1]}
    pq.write_table(pa.table(judged), parquet / "qrels" / "test.parquet")
    for stray in ("._corpus.parquet", "qrels/._test.parquet", "queries.parquet.bak"):
        (parquet / stray).write_bytes(b"\x00\x05\x16")
    assert open_collection(f"hf:{parquet}").splits == ("test",)
    runs = tmp_path / "r"
    runs.mkdir()
    for name in ("a.trec", "b.run"):
        (runs / name).write_text("q1 Q0 d1 1 1 x\n")
    for stray in ("._a.trec", "a.trec.bak", ".b.run.swp"):
        (runs / stray).write_bytes(b"\x00\x05\x16")
    assert [row.system for row in compare([runs], {"q1": {"d1": 1}}).rows] == ["a", "b"]


def test_two_files_of_one_split_are_refused(beir_folder: BeirFolder) -> None:
    folder = beir_folder()
    (folder / "qrels" / "test.tsv.gz").write_bytes(gzip.compress(b"q2\td1\t1\n"))
    with pytest.raises(RankdistillError, match=r"two qrels files define the split 'test'\n.*test.tsv, .*test.tsv.gz"):
        open_collection(f"beir:{folder}")


def compressed(text: str) -> dict[str, tuple[bytes, str]]:
    return {
        "bz2": (bz2.compress(text.encode()), "bzip2"),
        "xz": (lzma.compress(text.encode()), "xz"),
        "utf16": (text.encode("utf-16"), "UTF-16"),
        "utf16le": (text.encode("utf-16-le"), "UTF-16"),
        "gzipped utf16": (gzip.compress(text.encode("utf-16")), "UTF-16"),
        "zip": (b"PK\x03\x04 and so on", "zip"),
    }


@pytest.mark.parametrize("form", list(compressed("")))
def test_other_forms_are_called_by_their_name(tmp_path: Path, form: str) -> None:
    data, word = compressed("q1 Q0 d1 1 2.5 x\nq1 Q0 d2 2 1.5 x\n")[form]
    file = tmp_path / "file"
    file.write_bytes(data)
    for read in (read_run, lambda path: list(read_lines(path)), lambda path: list(iter_foreign(path)), read_judgments):
        with pytest.raises(RankdistillError, match=word):
            read(file)


def test_an_index_of_pandas_and_commas_are_told(tmp_path: Path) -> None:
    file = tmp_path / "file.tsv"
    for text, word in (("\tquery-id\tcorpus-id\tscore\n0\tq1\td1\t1\n", "pandas"), ("q,d,score\nq1,d1,1\n", "commas")):
        file.write_text(text)
        for read in (lambda path: list(iter_foreign(path)), lambda path: list(read_qrels(path))):
            with pytest.raises(RankdistillError, match=word):
                read(file)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr("rankdistill.runs.LONGEST_LINE", 1 << 20)
    monkeypatch.setattr("rankdistill.runs.BLOCK", 1 << 16)
    file = tmp_path / "file"
    file.write_bytes(gzip.compress(b"q1 Q0 d1 1 1 x\n" + b" " * (1 << 22)))
    for read in (read_run, lambda path: list(read_lines(path)), lambda path: list(read_qrels(path))):
        with pytest.raises(RankdistillError, match=r"longer than 1 MB|columns"):
            read(file)


def test_ids_have_no_white_space_around_them_on_any_side(beir_folder: BeirFolder, tmp_path: Path) -> None:
    corpus = [{"_id": "d0 ", "text": "zero"}, {"_id": "\td 1", "text": "one"}]
    folder = beir_folder(corpus, [{"_id": " q1", "text": "which"}], {"test": "q1\td0 \t1\nq1 \td 1\t2\n"})
    collection = open_collection(f"beir:{folder}")
    assert collection.qrels("test") == {"q1": {"d0": 1, "d 1": 2}} and not collection.problems
    pq.write_table(
        pa.table({"query_id": ["q1 "], "doc_id": [" d0"], "score": pa.array([1.0], pa.float32())}),
        tmp_path / "run.parquet",
    )
    assert read_run(tmp_path / "run.parquet").to_dict() == {"q1": {"d0": 1.0}}


def test_whole_numbers_become_their_digits_and_the_rest_is_refused() -> None:
    assert text_ids(pa.array([1, 20]), "here").to_pylist() == ["1", "20"]
    assert text_keys({1: {"a": 0.5}}, "here") == ({"1": {"a": 0.5}}, 1)
    with pytest.raises(RankdistillError, match="is a bool, not text"):
        text_keys({"q": {True: 1.0}}, "here")


def test_whole_numbers_are_ids_in_json_lines_too(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text('{"query_id": 100, "pos_ids": [0], "pos_scores": [3.5], "neg_ids": [7], "neg_scores": [-1]}\n')
    assert [tuple(one) for one in iter_foreign(file)] == [("100", "0", 3.5, False), ("100", "7", -1.0, False)]
    for score in ("1" + "0" * 400, "1e39", "1" * 5000):
        file.write_text(f'{{"query_id": "a", "pos_ids": ["b"], "pos_scores": [{score}]}}\n')
        with pytest.raises(RankdistillError, match=r"s.jsonl:1"):
            list(iter_foreign(file))


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        (pa.array(["1", "2"]), ""),
        (pa.array([1.0, 2.0]), ""),
        (pa.array([1, 3_000_000_000]), "beyond 32 bits.*row 2"),
        (pa.array([1, None]), "None is not a whole number.*row 2"),
        (pa.array([1.0, float("nan")]), "nan is not a whole number.*row 2"),
        (pa.array([1.0, 1.5]), "1.5 is not a whole number.*row 2"),
        (pa.array(["1", "good"]), "'good' is not a whole number.*row 2"),
    ],
)
def test_grades_in_parquet(tmp_path: Path, grades: pa.Array, message: str) -> None:
    (tmp_path / "qrels").mkdir()
    pq.write_table(pa.table({"_id": ["d1", "d2"], "text": ["one", "two"]}), tmp_path / "corpus.parquet")
    pq.write_table(pa.table({"_id": ["q1"], "text": ["which"]}), tmp_path / "queries.parquet")
    columns = {"query-id": ["q1", "q1"], "corpus-id": ["d1", "d2"], "score": grades}
    pq.write_table(pa.table(columns), tmp_path / "qrels" / "test.parquet")
    named = dict(zip(("query_id", "doc_id", "relevance"), columns.values(), strict=True))
    pq.write_table(pa.table(named), tmp_path / "judgments.parquet")
    readers = (
        lambda: open_collection(f"hf:{tmp_path}").qrels("test"),
        lambda: read_judgments(tmp_path / "judgments.parquet"),
    )
    for read in readers:
        if message:
            with pytest.raises(RankdistillError, match=f"(?s){message}"):
                read()
        else:
            assert read() == {"q1": {"d1": 1, "d2": 2}}


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    beir_folder: BeirFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beir_folder([{"_id": "d1", "title": "Iron", "text": "as it was before it changed"}])
    corpus, read = folder / "corpus.jsonl", beir.read_json_lines

    def changed(path: Path):  # type: ignore[no-untyped-def]
        text = path.read_text()
        path.write_text(text.replace("Iron", "Lead"))
        yield from list(read(path))
        path.write_text(text)

    monkeypatch.setattr(beir, "read_json_lines", changed)
    with pytest.raises(RankdistillError, match="changed while it was read"):
        open_collection(f"beir:{folder}")
    monkeypatch.undo()
    assert (
        open_collection(f"beir:{folder}").documents([0])[0].title
        == json.loads(corpus.read_text().split("\n")[0])["title"]
    )


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone"])
def test_damaged_files_of_the_cache_say_what_to_delete(beir_folder: BeirFolder, damage: str) -> None:
    folder = open_collection(f"beir:{beir_folder(name=f'cached-{damage}', corpus=[{'_id': damage, 'text': 'x'}])}").path
    for path in [*folder.glob("*.arrow"), *folder.glob("*.npy")]:
        good = path.read_bytes()
        bad = {"cut": good[: len(good) // 2], "empty": b"", "garbage": b"\xff" * len(good)}.get(damage)
        path.unlink() if bad is None else path.write_bytes(bad)
        with pytest.raises(RankdistillError, match=f"delete {folder} and run"):
            Collection(open_artifact(folder), "c", "c")
        path.write_bytes(good)


def test_errors_cut_what_they_quote(tmp_path: Path) -> None:
    file, field = tmp_path / "a.trec", "x" * 20_000
    file.write_text(f"q1 Q0 d1 1 {field} x\n")
    with pytest.raises(RankdistillError, match="20,") as caught:
        read_run(file)
    assert len(str(caught.value)) < 1200 and "a.trec:1" in str(caught.value)


def test_ids_of_vectors_and_unlabelled_queries_come_through_the_same_reader(tmp_path: Path) -> None:
    from rankdistill.indexes.foreign_vectors import open_foreign_vectors

    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    text = "\ufeffd\u20280\nd\x0c1\r\nd2\n"
    for name, data in (("ids.txt", text.encode()), ("ids.gz", gzip.compress(("doc_id\n" + text[1:]).encode()))):
        (tmp_path / name).write_bytes(data)
        opened = open_foreign_vectors(tmp_path / "v.npy", tmp_path / "copy", ids=tmp_path / name)
        assert list(opened.ids) == ["d\u20280", "d\x0c1", "d2"]
