"""The real library, with small data sets registered in it from files."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import ir_datasets
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
from ir_datasets.util import LocalDownload

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError


def local(path: Path, text: str) -> LocalDownload:
    path.write_text(text)
    return LocalDownload(path)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ir")
    docs = TsvDocs(local(folder / "docs.tsv", "d1\tiron rusts\nd2\tcopper turns green\n"), namespace="tiny", lang="en")
    ir_datasets.registry.register("rdtest-tiny", Dataset(docs))
    for split, query, qrels in (
        ("train", "q1\twhat rusts\n", "q1 0 d1 1\n"),
        ("dev", "q2\twhat turns green\n", "q2 0 d2 1\nq2 0 d9 1\n"),
        ("test", "q3\tgreen metal\n", "q3 0 d2 2\n"),
    ):
        queries = TsvQueries(local(folder / f"{split}.tsv", query), namespace="tiny", lang="en")
        judged = TrecQrels(local(folder / f"{split}.txt", qrels), {0: "no", 1: "yes", 2: "very"})
        ir_datasets.registry.register(f"rdtest-tiny/{split}", Dataset(docs, queries, judged))
    ir_datasets.registry.register("rdtest-odd", Dataset(docs))
    ir_datasets.registry.register("rdtest-odd/monday", Dataset(docs, queries, judged))
    return "rdtest-tiny"


def test_a_parent_gives_its_children_as_splits(registered: str) -> None:
    collection = open_collection(f"ir_datasets:{registered}")
    assert (collection.name, collection.document_count, collection.query_count) == ("rdtest-tiny", 2, 3)
    assert set(collection.splits) == {"train", "dev", "test"}
    assert collection.document_texts([0, 1]) == ["iron rusts", "copper turns green"]
    assert collection.training_splits() == (["q1"], ["q2"])
    assert collection.qrels("test") == {"q3": {"d2": 2}}
    assert len(collection.problems) == 1 and "'d9' at rdtest-tiny/dev" in collection.problems[0]


def test_a_name_with_judgments_is_one_split(registered: str) -> None:
    collection = open_collection(f"ir_datasets:{registered}/test")
    assert (collection.name, collection.splits) == ("rdtest-tiny-test", ("test",))
    assert collection.query_ids() == ["q3"]


def test_names_it_does_not_know_or_that_have_no_judgments(registered: str) -> None:
    with pytest.raises(UsageError, match="no data set 'rdtest-tiny/tset'"):
        open_collection(f"ir_datasets:{registered}/tset")
    with pytest.raises(UsageError, match=r"no judgments[\s\S]*rdtest-odd/monday"):
        open_collection("ir_datasets:rdtest-odd")
    assert open_collection("ir_datasets:rdtest-odd/monday").splits == ("monday",)


def test_no_network_is_said_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(RankdistillError) as caught:
        open_collection("ir_datasets:beir/scifact/test")
    assert time.monotonic() - started < 20
    assert "cannot be reached" in str(caught.value) and "IR_DATASETS_HOME" in str(caught.value)
