from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes.base import Hits
from rankdistill.indexes.mining import FILE, Source, export_trec, mine
from rankdistill.indexes.sources import BM25Source, DenseSource, RunSource
from rankdistill.recipe import build
from rankdistill.runs import iter_run, read_run, write_trec

if TYPE_CHECKING:
    from rankdistill.collections import Collection

COUNT = 40
QUERIES = [f"query {number}" for number in range(9)]
QRELS = {"q0": {"d3": 1, "d20": 2, "d5": 0}, "q1": {"d0": 1}, "q2": {"d39": 1}}


class Fixed:
    """An engine with a fixed ranking of the documents, scores falling from 10 by one."""

    def __init__(self, name: str, rows: list[int]) -> None:
        self.name, self.fingerprint = name, f"{name}-{rows}"
        self.rows, self.searched = rows, 0

    def search(self, queries: Any, k: int) -> list[Hits]:
        self.searched += len(queries)
        rows = np.array(self.rows[:k], np.int64)
        return [Hits(rows, (10 - np.arange(len(rows))).astype(np.float32)) for _ in queries]


@pytest.fixture
def collection(make_collection: Any) -> Collection:
    return make_collection([f"document {row}" for row in range(COUNT)], QUERIES, QRELS)


@pytest.fixture
def ascending() -> Fixed:
    return Fixed("ascending", list(range(COUNT)))


def mined(artifact: Any) -> dict[str, list[int]]:
    return {query_id: [int(doc_id[1:]) for doc_id in ids] for query_id, ids, _ in iter_run(artifact.path / FILE)}


def test_one_source_unlabelled_is_its_ranking(collection: Collection, ascending: Fixed, tmp_path: Path) -> None:
    artifact = mine(collection, [Source(ascending)], tmp_path / "c", depth=5)
    assert mined(artifact) == {f"q{number}": [0, 1, 2, 3, 4] for number in range(9)}
    table = pq.read_table(artifact.path / FILE)
    assert table.schema.names == ["query_id", "doc_id", "rank", "score"]
    assert table["rank"].to_pylist()[:5] == [1, 2, 3, 4, 5] and table["score"].to_pylist()[:5] == [10, 9, 8, 7, 6]
    assert artifact.counts == {"queries": 9, "candidates": 45}


def test_labelled_documents_come_first_once(collection: Collection, ascending: Fixed, tmp_path: Path) -> None:
    lists = mined(mine(collection, [Source(ascending)], tmp_path / "a", depth=4, split="train"))
    assert lists == {"q0": [20, 3, 0, 1, 2, 4], "q1": [0, 1, 2, 3, 4], "q2": [39, 0, 1, 2, 3]}
    capped = mine(collection, [Source(ascending)], tmp_path / "b", depth=4, split="train", max_positives=1)
    assert mined(capped)["q0"] == [20, 0, 1, 2, 4]
    without = {"include_positives": False, "depth": 4, "split": "train"}
    assert mined(mine(collection, [Source(ascending)], tmp_path / "c", **without))["q0"] == [0, 1, 2, 3]
    left_out = mine(collection, [Source(ascending)], tmp_path / "d", **without, exclude_positives=True)
    assert mined(left_out)["q0"] == [0, 1, 2, 4]
    assert mined(left_out)["q1"] == [1, 2, 3, 4]


def test_sources_take_turns_until_their_quota(collection: Collection, ascending: Fixed, tmp_path: Path) -> None:
    other = Fixed("descending", [1, 30, 0, 31, 32, 33])
    sources = [Source(ascending, quota=3), Source(other, quota=2)]
    # 0 (a) 1 (b) 2 (a) 30 (b: quota) 3 (a: quota); nothing twice
    artifact = mine(collection, sources, tmp_path / "c", depth=10)
    assert mined(artifact)["q4"] == [0, 1, 2, 30, 3]
    assert mined(mine(collection, sources, tmp_path / "d", depth=3))["q4"] == [0, 1, 2]
    scores = pq.read_table(artifact.path / FILE)["score"].to_numpy()[:5]
    np.testing.assert_allclose(scores, 1 / np.arange(1, 6))


def test_rank_ranges_and_margins(collection: Collection, ascending: Fixed, tmp_path: Path) -> None:
    ranged = mine(collection, [Source(ascending, rank_from=3, rank_to=5)], tmp_path / "a", depth=10)
    assert mined(ranged)["q7"] == [2, 3, 4]
    deep = mine(collection, [Source(ascending, rank_from=3)], tmp_path / "b", depth=4, split="train")
    assert mined(deep)["q0"] == [20, 3, 2, 4, 5, 6]
    # q0: best labelled score known is 7 (document 3), so mined ones score at most 5; q1: 10, so at most 8.
    options = {"depth": 3, "split": "train"}
    absolute = mined(mine(collection, [Source(ascending)], tmp_path / "c", margin=2, **options))
    assert absolute["q0"] == [20, 3, 5, 6, 7] and absolute["q1"] == [0, 2, 3, 4]
    relative = mined(mine(collection, [Source(ascending, relative_margin=0.5)], tmp_path / "d", **options))
    assert relative["q1"] == [0, 5, 6, 7]
    shallow = Fixed("shallow", list(range(8)))  # does not find q2's labelled document: no margin there
    assert mined(mine(collection, [Source(shallow, margin=2)], tmp_path / "e", **options))["q2"] == [39, 0, 1, 2]


def test_chosen_queries_keep_their_labels_and_unlabelled_ones_come_last(
    collection: Collection, ascending: Fixed, tmp_path: Path
) -> None:
    chosen = ["q5", "q2", "q0", "q5"]
    artifact = mine(collection, [Source(ascending)], tmp_path / "c", depth=2, split="train", query_ids=chosen)
    assert mined(artifact) == {"q0": [20, 3, 0, 1], "q2": [39, 0, 1], "q5": [0, 1]}
    assert artifact.counts["queries"] == 3
    with pytest.raises(RankdistillError):
        mine(collection, [Source(ascending)], tmp_path / "d", query_ids=["nobody"])
    with pytest.raises(RankdistillError, match="no queries to mine for"):
        mine(collection, [Source(ascending)], tmp_path / "d", query_ids=[])


def test_batches_do_not_change_the_file_and_nothing_is_mined_twice(
    collection: Collection, ascending: Fixed, tmp_path: Path
) -> None:
    first = mine(collection, [Source(ascending)], tmp_path / "a", depth=5, batch_size=2)
    second = mine(collection, [Source(ascending)], tmp_path / "b", depth=5)
    assert pq.read_table(first.path / FILE).equals(pq.read_table(second.path / FILE))
    searched = ascending.searched
    assert mine(collection, [Source(ascending)], tmp_path / "b", depth=5).fingerprint == second.fingerprint
    assert ascending.searched == searched
    assert mine(collection, [Source(ascending)], tmp_path / "b", depth=6).fingerprint != second.fingerprint
    assert sorted(path.name for path in first.path.iterdir()) == [FILE, "manifest.json"]


def test_a_stopped_run_goes_on_with_the_batch_in_flight(
    collection: Collection, ascending: Fixed, tmp_path: Path
) -> None:
    """A finished batch lies in a file that appears when it is whole; tests/test_kill.py kills the whole pipeline."""
    search, searched = ascending.search, list[str]()

    def stops(queries: Any, k: int) -> list[Hits]:
        searched.extend(queries)
        if len(searched) in (4, 7):
            raise KeyboardInterrupt
        return search(queries, k)

    ascending.search = stops  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            mine(collection, [Source(ascending)], tmp_path / "stopped", depth=5, batch_size=1)
        assert not (tmp_path / "stopped").exists()
    stopped = mine(collection, [Source(ascending)], tmp_path / "stopped", depth=5, batch_size=1)
    assert len(searched) == len(QUERIES) + 2 and set(searched) == set(QUERIES)
    whole = mine(collection, [Source(ascending)], tmp_path / "whole", depth=5)
    assert pq.read_table(stopped.path / FILE).equals(pq.read_table(whole.path / FILE))


def test_trec_runs_go_out_and_come_in_as_a_source(
    collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = {"q0": {"d7": 3.0, "d9": 5.0, "d1": 4.0}, "q3": {"d2": 1.0, "elsewhere": 2.0}}
    rankings = [(query_id, list(found), list(found.values())) for query_id, found in foreign.items()]
    write_trec(rankings, tmp_path / "foreign.trec", "tag")
    source = Source.of(RunSource(file=str(tmp_path / "foreign.trec")), collection, tmp_path / "work")
    assert "1 of 5 documents are not in" in capsys.readouterr().err
    artifact = mine(collection, [source], tmp_path / "c", depth=2)
    assert mined(artifact) == {"q0": [9, 1], "q3": [2]}
    export_trec(artifact, tmp_path / "out.trec")
    assert read_run(tmp_path / "out.trec").to_dict() == {"q0": {"d9": 5.0, "d1": 4.0}, "q3": {"d2": 1.0}}
    write_trec([("q0", ["else1", "else2"], [2, 1])], tmp_path / "other.trec")
    with pytest.raises(RankdistillError, match="no document of this run"):
        Source.of(RunSource(file=str(tmp_path / "other.trec")), collection, tmp_path / "work")


def test_recipe_sources_open_real_engines(tiny_collection: Collection, tiny_encoder: Path, tmp_path: Path) -> None:
    settings = [{"type": "bm25", "quota": 3}, {"type": "dense", "quota": 3, "model": str(tiny_encoder)}]
    kinds = [build("source", setting) for setting in settings]
    assert isinstance(kinds[0], BM25Source) and isinstance(kinds[1], DenseSource)
    sources = [Source.of(kind, tiny_collection, tmp_path / "work") for kind in kinds]
    artifact = mine(tiny_collection, sources, tmp_path / "c", depth=6, split="train")
    qrels = tiny_collection.qrels("train")
    lists = {query_id: doc_ids for query_id, doc_ids, _ in iter_run(artifact.path / FILE)}
    assert set(lists) == set(qrels)
    for query_id, doc_ids in lists.items():
        assert set(doc_ids[:1]) == set(qrels[query_id]) and len(set(doc_ids)) == len(doc_ids) >= 4
    filed = DenseSource(quota=3, model=str(tiny_encoder), index="flat").open(tiny_collection, tmp_path / "work")
    query = tiny_collection.query_texts(tiny_collection.query_ids("test"))
    for first, second in zip(sources[1].engine.search(query, 5), filed.search(query, 5), strict=True):  # type: ignore[union-attr]
        np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)


def test_wrong_settings_are_named(collection: Collection, ascending: Fixed, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to mine from"):
        mine(collection, [], tmp_path / "c")
    with pytest.raises(UsageError, match="needs a quota"):
        mine(collection, [Source(ascending, quota=2), Source(ascending)], tmp_path / "c")
    with pytest.raises(UsageError, match="ranks 5 to 2"):
        build("source", {"type": "bm25", "rank_from": 5, "rank_to": 2})
    with pytest.raises(UsageError, match="quota: input should be greater than or equal to 1"):
        build("source", {"type": "bm25", "quota": 0})
    with pytest.raises(UsageError, match="unknown key 'qouta'"):
        build("source", {"type": "bm25", "qouta": 3})


def test_texts_of_the_query_and_of_positives_are_no_negatives(tmp_path: Path) -> None:
    """The form of ArguAna and Quora: queries are documents; Cranfield's query 1 is not document 1."""
    corpus = {
        "d0": ("", "Why is the sky  blue?"),  # the query's own document
        "d1": ("Sky", "Light is scattered."),  # relevant
        "copy0": ("", "why is the SKY blue?"),  # the query's text under another id
        "copy1": ("", "light is scattered."),  # a relevant text again
        "d4": ("", "The sea is blue."),
        "1": ("", "Wings and slipstreams."),  # the id of a query, another text
    }
    (tmp_path / "c" / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": name, "title": title, "text": text}) for name, (title, text) in corpus.items()]
    (tmp_path / "c" / "corpus.jsonl").write_text("\n".join(lines))
    (tmp_path / "c" / "queries.jsonl").write_text(
        '{"_id": "d0", "text": "Why is the sky blue?"}\n{"_id": "1", "text": "why is the sea blue"}'
    )
    (tmp_path / "c" / "qrels" / "train.tsv").write_text("d0\td1\t1\n1\td4\t1\n")
    collection = open_collection(f"beir:{tmp_path / 'c'}")
    engine = Fixed("all", list(range(6)))

    def lists(name: str, **options: Any) -> dict[str, list[str]]:
        made = mine(collection, [Source(engine)], tmp_path / name, depth=3, **options)
        return {query_id: ids for query_id, ids, _ in iter_run(made.path / FILE)}

    assert lists("a", split="train") == {"d0": ["d1", "d4", "1"], "1": ["d4", "d0", "d1", "copy0"]}
    assert lists("b")["d0"] == ["d1", "copy1", "d4"]  # without labels
    assert lists("all", drop_same_texts=False)["d0"] == ["d0", "d1", "copy0"]


def test_sources_of_one_engine_share_its_search(collection: Collection, ascending: Fixed, tmp_path: Path) -> None:
    shares = [Source(ascending, quota=1), Source(ascending, quota=1, rank_from=5), Source(ascending, 2, 8, 10)]
    lists = mined(mine(collection, shares, tmp_path / "a", depth=4))
    assert lists["q4"] == [0, 4, 7, 8]
    assert ascending.searched == collection.query_count


def test_recipe_sources_of_one_encoder_open_it_once(tiny_collection: Collection, tmp_path: Path) -> None:
    opened: dict[str, Any] = {}
    settings = [DenseSource(quota=quota, rank_from=first) for quota, first in ((4, 1), (3, 10), (2, 20))]
    bm25 = [BM25Source(quota=4), BM25Source(quota=2, rank_from=9), BM25Source(quota=2, k1=1.2)]
    sources = [Source.of(each, tiny_collection, tmp_path, opened) for each in [*settings, *bm25]]
    assert len({id(source.engine) for source in sources[:3]}) == 1 and len(opened) == 3


def test_candidates_of_queries_whose_labels_changed_are_mined_anew(
    collection: Collection, ascending: Fixed, tmp_path: Path
) -> None:
    """A generated query's id is its text's: its labels are another's when another document gave it."""
    first = {}
    for doc_id in collection.doc_ids([3, 5]):
        labelled = collection.with_queries([], {"what is it": [doc_id]})
        artifact = mine(labelled, [Source(ascending)], tmp_path / "candidates", depth=2, split="generated")
        first[doc_id] = next(iter_run(artifact.path / "candidates.parquet"))[1][0]
    assert list(first) == list(first.values())
