"""A folder of documents as people keep them: what is read, how it is cut, what is left out and said."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankdistill.collections import Collection, open_collection
from rankdistill.collections.documents import SKIPPED
from rankdistill.collections.passages import WORD, best_passages, document_of, split_passages
from rankdistill.errors import RankdistillError, UsageError

PAGE = """<html><head><meta charset="latin-1"><title>Caf\xe9 hours</title><script>var x = "no text";</script></head>
<body><nav><a href="/">Home</a></nav><h1>When we open</h1><p>The <b>caf\xe9</b> opens at eight&nbsp;o'clock.</p>
<table><tr><td>Sunday</td><td>closed</td></tr></table></body></html>"""
GUIDE = """---
title: "The guide"
---
# The guide

Read this [first](https://example.org/page).

## Setting up

Plug it in.

```
# no heading

switch on
```
"""


def pdf(text: str, password: str = "") -> bytes:
    """A PDF of one page with this line of text."""
    import io

    from pypdf import PdfReader, PdfWriter

    content = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(body)
    whole = body + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer
    if not password:
        return whole
    writer, out = PdfWriter(clone_from=PdfReader(io.BytesIO(whole))), io.BytesIO()
    writer.encrypt(password, algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def passages(collection: Collection) -> dict[str, tuple[str, str]]:
    rows = range(collection.document_count)
    return {item.doc_id: (item.title, item.text) for item in collection.documents(rows)}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def left_out(collection: Collection) -> dict[str, str]:
    lines = (collection.path / SKIPPED).read_text().splitlines()
    return {record["document"]: record["reason"] for record in map(json.loads, lines)}


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def test_a_folder_of_text_markdown_and_html(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "papers",
        {
            "sub/guide.md": GUIDE,
            "cafe.html": PAGE.encode("latin-1"),
            "long-night_shift.txt": "It begins at ten. Bring a light.",
            "titled.txt": "Night shift\n\nBring no light.",
            "packed.txt.gz": gzip.compress(b"A packed text."),
        },
    )
    collection = open_collection(str(folder))
    assert (collection.name, collection.spec) == ("papers", f"documents:{folder}")
    assert passages(collection) == {
        "cafe.html#1": ("Café hours", "When we open\nThe café opens at eight o'clock.\nSunday closed"),
        "long-night_shift.txt#1": ("long night shift", "It begins at ten. Bring a light."),
        "packed.txt.gz#1": ("packed", "A packed text."),
        "sub/guide.md#1": ("The guide", "Read this first.\nSetting up\nPlug it in.\n# no heading\nswitch on"),
        "titled.txt#1": ("Night shift", "Bring no light."),
    }
    assert collection.passages == {"documents": 5, "words": 120, "overlap": 0}
    assert collection.problems == ["there are no judgments of documents and queries that are here"]
    assert "5 passages of 5 documents" in repr(collection)


def test_records_of_json_lines_and_parquet(tmp_path: Path) -> None:
    lines = [{"_id": 7, "title": "Iron", "text": "It rusts."}, {"content": "No id.", "vector": [1, 2]}]
    folder = write(tmp_path / "records", {"a/some.jsonl": "\n".join(map(json.dumps, lines))})
    table = pa.table({"docid": ["p1", "p2"], "body": ["Copper is red.", "Gold is not."], "size": [1, 2]})
    pq.write_table(table, folder / "more.parquet")
    for spec in (f"documents:{folder}", str(folder)):
        assert passages(open_collection(spec)) == {
            "7#1": ("Iron", "It rusts."),
            "a/some.jsonl:2#1": ("", "No id."),
            "p1#1": ("", "Copper is red."),
            "p2#1": ("", "Gold is not."),
        }
    assert list(passages(open_collection(f"{folder}/more.parquet"))) == ["p1#1", "p2#1"]


def test_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf", reason="pypdf is in the extra [documents]")
    files = {"a.pdf": pdf("Iron rusts in water."), "b.pdf": pdf("secret", "x"), "c.pdf": b"%PDF-1.4\nnonsense"}
    collection = open_collection(str(write(tmp_path / "pdf", files)))
    assert passages(collection) == {"a.pdf#1": ("a", "Iron rusts in water.")}
    reasons = left_out(collection)
    assert reasons["b.pdf"] == "protected with a password" and reasons["c.pdf"].startswith("no PDF that can be read")


def test_pdf_without_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    folder = write(tmp_path / "pdf", {"a.md": "text", "b.pdf": b"%PDF-1.4"})
    with pytest.raises(RankdistillError, match=r"b\.pdf.*\n.*rankdistill\[documents\]"):
        open_collection(str(folder))


@pytest.mark.parametrize(
    ("files", "form"),
    [
        (["corpus.jsonl"], "beir"),
        (["corpus.jsonl.gz", "notes.md"], "beir"),
        (["collection.tsv", "queries.tsv"], "msmarco"),
        (["corpus-00000-of-00001.parquet"], "hf"),
        (["texts.jsonl", "corpus.md"], "documents"),
    ],
)
def test_a_folder_is_taken_for_what_it_holds(tmp_path: Path, files: list[str], form: str) -> None:
    contents: dict[str, str | bytes] = {
        "corpus.jsonl": '{"_id": "d", "text": "iron rusts"}',
        "corpus.jsonl.gz": gzip.compress(b'{"_id": "d", "text": "iron rusts"}'),
        "collection.tsv": "d\tiron rusts\n",
        "queries.tsv": "q\twhat rusts\n",
        "texts.jsonl": '{"_id": "d", "text": "iron rusts"}',
    }
    folder = write(tmp_path / "some", {name: contents.get(name, "Copper.") for name in files})
    for path in folder.glob("*.parquet"):
        pq.write_table(pa.table({"_id": ["d"], "text": ["iron rusts"]}), path)
    collection = open_collection(str(folder))
    assert collection.spec == f"{form}:{folder}"
    assert collection.doc_rows(["d#1" if form == "documents" else "d"]).min() >= 0
    assert collection.splits == ()


# ---------------------------------------------------------------------------------------------------------------------
# Passages


def test_long_documents_are_cut_where_sentences_and_paragraphs_end(tmp_path: Path) -> None:
    first, second = "One two three four five. Six seven eight.", "Nine ten. " + "word " * 12 + "end."
    folder = write(tmp_path / "long", {"a.md": f"# Numbers\n\n{first}\n\n{second}"})
    cut = passages(open_collection(f"{folder}?words=10"))
    assert cut == {
        "a.md#1": ("Numbers", "One two three four five. Six seven eight."),  # the next paragraph does not fit in whole
        "a.md#2": ("Numbers", "Nine ten."),
        "a.md#3": ("Numbers", "word " * 9 + "word"),
        "a.md#4": ("Numbers", "word word end."),
    }
    shared = list(passages(open_collection(f"documents:{folder}?words=10&overlap=3")).values())
    assert [text for _, text in shared][:2] == [first, "Six seven eight.\nNine ten."]


@pytest.mark.parametrize("settings", ["words=ten", "words=5", "overlap=100", "length=3", "words"])
def test_wrong_settings_of_passages(tmp_path: Path, settings: str) -> None:
    folder = write(tmp_path / "docs", {"a.md": "text"})
    with pytest.raises(UsageError, match="words"):
        open_collection(f"documents:{folder}?{settings}")


def test_scripts_without_spaces_are_cut_too() -> None:
    cut = list(split_passages(["金属は水で錆びる。" * 40, "鉄" * 100], words=30, overlap=0))
    assert len(cut) > 5 and all(len(WORD.findall(text)) <= 30 for text in cut)
    assert "".join(cut).replace("\n", "").replace(" ", "") == "金属は水で錆びる。" * 40 + "鉄" * 100


@given(st.lists(st.text(alphabet="ab. !金。\n", max_size=80), max_size=6), st.integers(1, 9), st.integers(0, 4))
def test_every_word_is_in_a_passage(paragraphs: list[str], words: int, overlap: int) -> None:
    cut = list(split_passages(paragraphs, words, min(overlap, words // 2)))
    assert all(0 < len(WORD.findall(text)) <= words for text in cut)
    if not overlap:
        assert "".join("".join(cut).split()) == "".join("".join(paragraphs).split())


def test_a_ranking_of_passages_is_one_of_documents() -> None:
    ranked = ["b#2", "a#7", "b#1", "c", "a#1", "a#x#1"]
    assert best_passages(ranked) == [0, 1, 3, 5]
    assert [document_of(ranked[at]) for at in best_passages(ranked)] == ["b", "a", "c", "a#x"]


def test_judgments_of_documents_are_of_their_passages(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "judged",
        {
            "a.md": "One two three four five six. Seven eight nine ten eleven.",
            "copy.md": "One two three four five six. Seven eight nine ten eleven.",  # judged: it stays
            "queries.jsonl": '{"_id": "q", "text": "numbers"}',
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\ta.md\t2\nq\tcopy.md\t1\nq\tgone.md\t1\n",
        },
    )
    collection = open_collection(f"documents:{folder}?words=10")
    assert collection.qrels("test") == {"q": {"a.md#1": 2, "a.md#2": 2, "copy.md#1": 1, "copy.md#2": 1}}
    assert collection.qrels("test", missing=True)["q"]["gone.md#1"] == 1
    assert collection.query_texts(["q"]) == ["numbers"]


# ---------------------------------------------------------------------------------------------------------------------
# What is left out

BAD: dict[str, tuple[str | bytes, str]] = {
    "empty.txt": ("", "no text"),
    "blank.md": (" \n\n\t", "no text"),
    "nothing.html": ("<html><script>x</script></html>", "no text"),
    "latin.txt": ("Caf\xe9.".encode("latin-1"), "the text is not UTF-8"),
    "utf16.txt": ("wide".encode("utf-16"), "the file is UTF-16 text"),
    "zipped.md": (b"PK\x03\x04rest", "the file is a zip archive"),
    "binary.txt": (b"text " * 20 + b"\0\1\2", "the file is binary, not text"),
    "noise.html": (os.urandom(64) + b"\xff\xfe\xff", "not UTF-8"),
    "cut.txt.gz": (gzip.compress(b"text " * 100)[:-6], "the gzip file is cut off or damaged"),
    "lines.jsonl": ('{"_id": "fine", "text": "Fine."}\n{broken\n{"a": 1}\n[1]\n{"_id": [1], "text": "x"}', ""),
    "table.parquet": (b"PAR1 no table", "the Parquet file is damaged"),
    "z-copy.md": ("A good document.\n", "the same text as a document before it"),
}


def test_a_bad_file_is_left_out_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "bad", {"a.md": "A good document.", **{name: text for name, (text, _) in BAD.items()}})
    collection = open_collection(str(folder))
    assert set(passages(collection)) == {"a.md#1", "fine#1"}
    reasons = left_out(collection)
    assert reasons.keys() == {*BAD.keys() - {"lines.jsonl"}, *(f"lines.jsonl:{line}" for line in range(2, 6))}
    for name, (_, words) in BAD.items():
        assert words in reasons.get(name, ""), name
    assert "not valid JSON" in reasons["lines.jsonl:2"] and "no text, contents" in reasons["lines.jsonl:3"]
    assert collection.describe()["skipped"] == len(reasons) == 15
    assert "15 documents are left out, all named in skipped.jsonl: binary.txt: " in capsys.readouterr().err


def test_what_is_no_document_is_passed_over(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "mixed",
        {"a.md": "A.", ".hidden.md": "B.", ".git/c.md": "C.", "d.png": b"\x89PNG", "e.docx": b"PK", "Makefile": "x:"},
    )
    write(tmp_path / "outside", {"secret.md": "A secret."})
    (folder / "link.md").symlink_to(tmp_path / "outside" / "secret.md")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.txt").symlink_to("nowhere")
    collection = open_collection(str(folder))
    assert set(passages(collection)) == {"a.md#1"}
    (problem,) = (line for line in collection.problems if "passed over" in line)
    assert all(part in problem for part in ("3 symbolic links", "1 .png", "1 .docx", "1 without an ending"))


def test_ids_that_come_twice_keep_the_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "twice", {f"{n}.jsonl": f'{{"_id": "d", "text": "Text {n}."}}' for n in (1, 2)})
    collection = open_collection(str(folder))
    assert passages(collection) == {"d#1": ("", "Text 1.")}
    assert left_out(collection) == {"2.jsonl:1": "the id 'd' was there before"}


@pytest.mark.skipif(os.fsencode("\udce9") != b"\xe9", reason="a file system of names in Unicode")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "names", {"a.md": "A."})
    with open(os.fsencode(folder) + b"/caf\xe9.md", "wb") as stream:
        stream.write(b"Coffee.")
    assert set(passages(open_collection(str(folder)))) == {"a.md#1", "caf\\xe9.md#1"}


def test_a_gigantic_text_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankdistill.collections.text_files.LONGEST_LINE", 1 << 20)
    folder = write(tmp_path / "big", {"a.md": "A.", "big.txt": b"words and more " * 100_000})
    assert left_out(open_collection(str(folder))) == {"big.txt": "a text of more than 1 MB"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "there are no documents here"),
        ({"a.png": b"x", "b.png": b"x"}, "it holds 2 .png"),
        ({"a.txt": b"\xff\xfe", "b.md": ""}, "of 2 documents none can be read: a.txt: the file is UTF-16"),
    ],
)
def test_no_document_at_all_is_an_error(tmp_path: Path, files: dict[str, str | bytes], words: str) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    with pytest.raises(RankdistillError) as caught:
        open_collection(str(write(folder, files)))
    assert words in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "closed", {"a.md": "A.", "b.md": "B."})
    (folder / "b.md").chmod(0)
    assert left_out(open_collection(str(folder))) == {"b.md": "the file cannot be read: Permission denied"}


def test_a_changed_document_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", {"a.md": "Old.", "b.md": "Same."})
    before = open_collection(str(folder))
    assert open_collection(str(folder)).fingerprint == before.fingerprint
    (folder / "a.md").write_text("New.")
    after = open_collection(str(folder))
    assert after.fingerprint != before.fingerprint
    assert passages(after)["a.md#1"] == ("a", "New.")
