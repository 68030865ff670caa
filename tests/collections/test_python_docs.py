from __future__ import annotations

import json
import shutil
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest

from rankdistill.artifacts import cache_dir
from rankdistill.collections import Collection, open_collection, python_docs


@pytest.fixture(scope="module")
def collection() -> Collection:
    started = time.process_time()
    opened = open_collection("python-docs")
    assert time.process_time() - started < 15
    return opened


def top(identifier: str) -> str:
    return identifier.removeprefix("q:").partition(".")[0]


def test_size_and_shares(collection: Collection) -> None:
    assert collection.document_count > 5000
    assert collection.query_count > 4000
    shares = {split: len(collection.query_ids(split)) / collection.query_count for split in collection.splits}
    assert shares["train"] == pytest.approx(0.80, abs=0.05)
    assert shares["dev"] == pytest.approx(0.05, abs=0.02)
    assert shares["test"] == pytest.approx(0.15, abs=0.03)
    assert collection.problems == []


def test_no_module_is_in_two_splits(collection: Collection) -> None:
    modules = {split: {top(query_id) for query_id in collection.query_ids(split)} for split in collection.splits}
    assert sum(map(len, modules.values())) == len(set().union(*modules.values()))
    assert len(modules["test"]) > 10
    assert python_docs.split_of("_pyio.open") == python_docs.split_of("io.IOBase")


def test_queries_are_unique_short_and_not_in_their_document(collection: Collection) -> None:
    texts = collection.query_texts(collection.query_ids())
    assert max(Counter(text.casefold() for text in texts).values()) == 1
    assert all(5 <= len(text.split()) <= 30 for text in texts)
    for split in collection.splits:
        for batch in collection.iter_queries(split):
            documents = collection.documents(collection.doc_rows([query.query_id[2:] for query in batch]))
            for query, document in zip(batch, documents, strict=True):
                assert query.relevant == {document.doc_id: 1}
                assert query.text not in document.text


def test_a_document_as_expected(collection: Collection) -> None:
    (document,) = collection.documents(collection.doc_rows(["textwrap.dedent"]))
    assert document.title == "textwrap.dedent"
    assert document.text.startswith("def dedent(text):\nThis can be used to make triple-quoted strings")
    assert "margin = None" in document.text
    assert collection.query_texts(["q:textwrap.dedent"]) == [
        "Remove any common leading whitespace from every line in `text`."
    ]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of one package, whose parts are public and not."""
    shutil.copytree(Path(json.__file__).parent, tmp_path / "lib" / "json")
    (tmp_path / "lib" / "_hidden.py").write_text('def f():\n    """Nobody outside is to call this function."""\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "lib"))


def test_public_names_only(small: None) -> None:
    public, whole = open_collection("python-docs:public"), open_collection("python-docs")
    names = public.doc_ids(range(public.document_count))
    assert "json.dumps" in names and not [name for name in names if "._" in f".{name}"]
    assert "_hidden.f" in whole.doc_ids(range(whole.document_count))
    assert public.fingerprint != whole.fingerprint


def test_it_is_the_same_each_time(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content(collection: Collection) -> dict[str, bytes]:
        files = [*collection.path.rglob("*.arrow"), *collection.path.rglob("*.npy")]
        return {path.name: path.read_bytes() for path in files}

    first = open_collection("python-docs")
    monkeypatch.setenv("RANKDISTILL_CACHE", str(tmp_path / "other"))
    again = open_collection("python-docs")
    assert again.path.is_relative_to(cache_dir()) and again.path != first.path
    assert (again.fingerprint, content(again)) == (first.fingerprint, content(first)) and len(content(first)) > 6


MODULE = '''
def shown(value, *, width=3):
    """Shows the value, e.g. 3, on one line. Then more.

    >>> shown(3)
    """
    # Shows the value, e.g. 3, on one line.
    return str(value)

class Box:
    """Holds things"""
    size = 4

    def open(self):
        """Open the box with a key."""
        return self.size

def bare(): pass

def one(): "A docstring é on the line"; return "é"
'''


def test_definitions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shop.py"
    path.write_text(MODULE, encoding="utf-8")
    entries = {entry.name: entry for entry in python_docs.documented("shop", path)}
    assert list(entries) == ["shop.shown", "shop.Box", "shop.Box.open", "shop.one"]
    assert entries["shop.shown"].sentence == "Shows the value, e.g. 3, on one line."
    assert entries["shop.shown"].text.splitlines() == [
        "def shown(value, *, width=3):",
        "Then more.",
        "",
        ">>> shown(3)",
        "#  ",
        "return str(value)",
    ]
    assert entries["shop.Box"].text.splitlines() == [
        "class Box:",
        "size = 4",
        "",
        "def open(self):",
        "    return self.size",
    ]
    assert entries["shop.one"].text == 'def one():\n; return "é"'


def test_files_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(b"def f(:\n")
    assert list(python_docs.documented("broken", path)) == []
