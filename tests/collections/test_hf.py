from __future__ import annotations

import shutil
import socket
import time
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


@pytest.mark.parametrize(
    ("column", "grades"),
    # Without a column of relevance (NanoBEIR) each pair is relevant.
    [({}, (1, 1)), *(({name: [0, 2]}, (0, 2)) for name in ("grade", "Relevance", "rating"))],
)
def test_a_relevance_is_read_under_many_names(folder: Path, column: dict[str, list[int]], grades: tuple[int]) -> None:
    (folder / "qrels/test-00000-of-00001.parquet").unlink()
    judged = {"query-id": ["7", "8"], "corpus-id": ["d1", "d2"], **column}
    pq.write_table(pa.table(judged), folder / "qrels/train.parquet")
    assert open_collection(f"hf:{folder}").qrels("train") == {"7": {"d1": grades[0]}, "8": {"d2": grades[1]}}


PAIR = {"query-id": ["7"], "corpus-id": ["d1"]}


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("queries.parquet", {"_id": ["q"], "words": ["x"]}, "no column text or query among _id, words"),
        ("qrels/train.parquet", {**PAIR, "score": [0.5]}, "0.5 is not a whole number"),
        ("qrels/train.parquet", {**PAIR, "score": [[1]]}, "the relevance [1] is not a whole number"),
        ("corpus/more.parquet", {"_id": ["d1"], "title": ["Iron"], "text": ["rusts"]}, "id 'd1' occurs twice"),
        ("queries.parquet", "cut", "the Parquet file is damaged"),
        ("corpus", "gone", "needs corpus*.parquet"),
    ],
)
def test_bad_folders(folder: Path, file: str, content: dict[str, list[object]] | str, words: str) -> None:
    if content == "gone":
        shutil.rmtree(folder / file)
    elif content == "cut":
        (folder / file).write_bytes((folder / file).read_bytes()[:-20])
    else:
        pq.write_table(pa.table(content), folder / file)
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
