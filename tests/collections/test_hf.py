from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankdistill.artifacts import cache_dir, fingerprint, write_atomically
from rankdistill.collections import hf, open_collection
from rankdistill.errors import RankdistillError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a clone of a BEIR data set of the hub."""
    rows = {
        "corpus/train-00000-of-00002": [{"_id": "d1", "title": "Iron", "text": "rusts"}],
        "corpus/train-00001-of-00002": [{"_id": "d2", "title": "", "text": "copper"}],
        "queries": [{"_id": 7, "text": "what rusts"}, {"_id": 8, "text": "green metal"}],
        "qrels/train": [{"query-id": "7", "corpus-id": "d1", "score": 1}],
        "qrels/test-00000-of-00001": [{"query-id": "8", "corpus-id": "d2", "score": 2.0}],
    }
    for name, records in rows.items():
        path = tmp_path / "clone" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records), path)
    return tmp_path / "clone"


def test_a_folder_of_parquet(folder: Path, tmp_path: Path) -> None:
    collection = open_collection(f"hf:{folder}")
    assert collection.document_texts([0, 1]) == ["Iron rusts", "copper"]
    assert collection.qrels("train") == {"7": {"d1": 1}}
    assert collection.qrels("test") == {"8": {"d2": 2}}
    assert collection.name == "clone"
    shutil.copytree(folder, tmp_path / "other")
    assert open_collection(f"hf:{tmp_path / 'other'}").fingerprint == collection.fingerprint


def test_judgments_without_a_column_of_relevance_name_relevant_pairs(folder: Path) -> None:
    """NanoBEIR's form."""
    (folder / "qrels/test-00000-of-00001.parquet").unlink()
    pq.write_table(pa.table({"query-id": ["7", "8"], "corpus-id": ["d1", "d2"]}), folder / "qrels/train.parquet")
    assert open_collection(f"hf:{folder}").qrels("train") == {"7": {"d1": 1}, "8": {"d2": 1}}


@pytest.mark.parametrize("name", ["grade", "Relevance", "rating"])
def test_a_relevance_of_another_name_is_read(folder: Path, name: str) -> None:
    pq.write_table(
        pa.table({"query-id": ["7", "8"], "corpus-id": ["d1", "d2"], name: [0, 2]}), folder / "qrels/train.parquet"
    )
    assert open_collection(f"hf:{folder}").qrels("train") == {"7": {"d1": 0}, "8": {"d2": 2}}


def test_a_relevance_that_is_a_list_is_an_error(folder: Path) -> None:
    pq.write_table(pa.table({"query-id": ["7"], "corpus-id": ["d1"], "score": [[1]]}), folder / "qrels/train.parquet")
    with pytest.raises(RankdistillError, match=r"the relevance \[1\] is not a whole number"):
        open_collection(f"hf:{folder}")


def break_column(folder: Path) -> str:
    pq.write_table(pa.table({"_id": ["q"], "words": ["x"]}), folder / "queries.parquet")
    return "no column text or query among _id, words"


def break_grade(folder: Path) -> str:
    pq.write_table(pa.table({"query-id": ["7"], "corpus-id": ["d1"], "score": [0.5]}), folder / "qrels/train.parquet")
    return "0.5 is not a whole number"


def break_file(folder: Path) -> str:
    path = folder / "queries.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    return "the Parquet file is damaged"


def break_layout(folder: Path) -> str:
    shutil.rmtree(folder / "corpus")
    return "needs corpus*.parquet"


def repeat_document(folder: Path) -> str:
    shutil.copy(folder / "corpus/train-00000-of-00002.parquet", folder / "corpus/train-00002-of-00002.parquet")
    return "document id 'd1' occurs twice"


@pytest.mark.parametrize("damage", [break_column, break_grade, break_file, break_layout, repeat_document])
def test_bad_folders(folder: Path, damage: Callable[[Path], str]) -> None:
    words = damage(folder)
    with pytest.raises(RankdistillError) as caught:
        open_collection(f"hf:{folder}")
    assert words in str(caught.value) and caught.value.where is not None


def no_network(*_: object, **__: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


def test_no_network_is_said_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    with pytest.raises(RankdistillError, match="hub cannot be reached"):
        open_collection("hf:BeIR/never-imported-here")
    assert time.monotonic() - started < 10


def test_without_network_an_imported_collection_opens_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, layout, _ = hf._local(folder)
    hf.imported(key, lambda writer: hf._load(writer, layout), name="before", spec="before")
    write_atomically(cache_dir() / "collections" / f"hub-{fingerprint('org/name')}.json", hf.json.dumps(key))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert open_collection("hf:org/name").document_count == 2


CONFIGURATIONS = """---
configs:
- config_name: corpus
  data_files: corpus/*.parquet
- config_name: queries
  data_files: queries.parquet
- config_name: default
  data_files:
  - split: train
    path: qrels/train.parquet
  - split: test
    path: qrels/test-00000-of-00001.parquet
---
"""


def test_layout_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a repository's configurations from a local clone as it does from the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (folder / "README.md").write_text(CONFIGURATIONS)
    key = {"loader": "hf", "revisions": {str(folder): None}, "test": "layout"}
    layout = hf._hub_layout(key, "hf:clone")
    collection = hf.imported(key, lambda writer: hf._load(writer, layout), name="clone", spec="hf:clone")
    assert collection.document_texts([0, 1]) == ["Iron rusts", "copper"]
    assert (collection.qrels("train"), collection.qrels("test")) == ({"7": {"d1": 1}}, {"8": {"d2": 2}})
