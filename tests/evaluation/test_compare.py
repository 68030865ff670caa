"""Comparing runs from Python, and runs and judgments that others wrote: every rule has its count, nothing is silent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.compare import compare, read_judgments
from rankdistill.evaluation.evaluate import evaluate_systems
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.tables import plain_table
from rankdistill.runs import Run, read_run, write_trec

QRELS = {"q1": {"a": 2, "b": 0}, "q2": {"a": 1}, "q3": {"c": 1}}


def test_queries_that_differ_between_runs_count_zero_and_are_counted() -> None:
    one = Run.from_dict({"q1": {"a": 1.0}, "q2": {"a": 1.0}, "other": {"a": 1.0}}, "one")
    two = Run.from_dict({"q3": {"c": 1.0}}, "two")
    found = compare([one, two], QRELS, metrics=["mrr@10"])
    (pair,) = found.significance.comparisons if found.significance else ()
    assert (pair.mean_a, pair.mean_b, pair.wins, pair.losses) == (1 / 3, 2 / 3, 1, 2)
    assert found.significance is not None
    assert found.significance.queries == 3 and found.significance.notes["missing_queries"] == {"one": 1, "two": 2}
    text = plain_table(found)
    assert "one: 3 queries, judged@10 100.0%, 1 queries without a retrieved document count 0" in text
    assert "1 queries of the run have no judgments and are left out" in text
    assert "two: 3 queries, judged@10 100.0%, 2 queries without a retrieved document count 0" in text


def test_names_may_be_given_and_order_is_kept(tmp_path: Path) -> None:
    write_trec(Run.from_dict({"q1": {"a": 1.0}}), tmp_path / "x.trec")
    found = compare({"mine": tmp_path / "x.trec", "yours": Run.from_dict({"q1": {"b": 1.0}})}, QRELS)
    assert [row.system for row in found.rows] == ["mine", "yours"]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for name in ("first/seed-1/bm25.trec", "first/seed-2/bm25.trec", "other/tas-b.trec"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_trec(Run.from_dict({"q1": {"a": 1.0}}), tmp_path / name)
        paths.append(tmp_path / name)
    found = compare(paths, QRELS)
    assert [row.system for row in found.rows] == ["seed-1/bm25", "seed-2/bm25", "tas-b"]
    with pytest.raises(UsageError, match="two runs are called"):
        compare([paths[0], paths[0]], QRELS)


def test_the_result_does_not_depend_on_the_form_of_the_run(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    made = {q: {f"d{n}": float(s) for n, s in enumerate(random.normal(size=20))} for q in QRELS}
    run = Run.from_dict(made, "a")
    write_trec(run, tmp_path / "b.trec.gz")
    rows = [(q, d, s) for q, docs in made.items() for d, s in docs.items()]
    random.shuffle(rows)
    pandas.DataFrame(rows, columns=["query_id", "doc_id", "score"]).to_parquet(tmp_path / "c.parquet")
    qrels = {q: {f"d{n}": int(n % 3) for n in range(9)} for q in QRELS}
    found = compare([run, tmp_path / "b.trec.gz", tmp_path / "c.parquet"], qrels)
    assert [row.system for row in found.rows] == ["a", "b", "c"]
    assert found["a"].means == found["b"].means == found["c"].means
    assert found.significance is not None and all(one.ties == 3 for one in found.significance.comparisons)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["ndgc@10"]}, "did you mean ndcg@10"),
        ({"correction": "bonferroni"}, "choose holm or tukey"),
        ({"alpha": 5}, "between 0 and 1"),
        ({"collection": "python-docs"}, "both judgments and a collection"),
        ({"runs": []}, "no run to compare"),
        ({"qrels": {}}, "no judgments"),
    ],
)
def test_wrong_settings_teach(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"runs": [Run.from_dict({"q1": {"a": 1.0}})], "qrels": QRELS, **settings}
    with pytest.raises(RankdistillError, match=message):
        compare(**given)


# -- judgments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "q1 0 a 2\nq1 0 b 0\nq2 0 a 1\nq3 0 c 1\n",
        "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq2\ta\t1\nq3\tc\t1\n",
    ],
)
def test_judgments_in_trec_and_beir_form(tmp_path: Path, text: str) -> None:
    (tmp_path / "qrels").write_text(text)
    assert read_judgments(tmp_path / "qrels") == QRELS


def test_judgments_as_parquet_of_text_or_numbers(tmp_path: Path) -> None:
    path = tmp_path / "qrels.parquet"
    rows = [{"query_id": q, "doc_id": d, "relevance": level} for q, docs in QRELS.items() for d, level in docs.items()]
    for written, expected in ((rows, QRELS), ([{"query_id": 7, "doc_id": 8, "relevance": 1}], {"7": {"8": 1}})):
        pq.write_table(pa.Table.from_pylist(written), path)
        assert read_judgments(path) == expected
    lacking = {"query_id": ["q"], "document": ["d"], "relevance": [1]}
    empty = {"query_id": ["q", None], "doc_id": ["d", "e"], "relevance": [1, 1]}
    for columns, words in ((lacking, "no column doc_id"), (empty, "empty cells")):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(RankdistillError, match=words):
            read_judgments(path)


def test_judgments_that_repeat_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qrels").write_text("q 0 a 1\nq 0 b 0\nq 0 a 1\nq 0 a 1\n")
    assert read_judgments(tmp_path / "qrels") == {"q": {"a": 1, "b": 0}}
    assert "2 judgments are repeated and count once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("q 0 a 1\nq 0 b 0\nq 0 a 2\n", "judged 1 and 2", ":3"),
        ("\n", "holds no judgments", ""),
        ("q 0 a 1\nq 0 b high\n", "not a whole number", ":2"),
    ],
)
def test_wrong_judgments_are_refused(tmp_path: Path, text: str, message: str, line: str) -> None:
    path = tmp_path / "qrels"
    path.write_text(text)
    with pytest.raises(RankdistillError, match=message) as caught:
        read_judgments(path)
    assert str(caught.value.where).startswith(f"{path}{line}")


# -- runs made elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([11, 12]), {"11", "12"}),
        (pa.array([11.0, 12.0]), {"11", "12"}),  # what pandas makes of whole numbers beside an empty cell
        (pa.array([1_000_000.0, 12.0]), {"1000000", "12"}),
        (pa.array(["a", "b"]).dictionary_encode(), {"a", "b"}),
        (pa.array([b"a", b"b"]), {"a", "b"}),
    ],
)
def test_ids_of_other_types_are_text_and_numbers_are_counted(tmp_path: Path, ids: Any, expected: set[str]) -> None:
    path = tmp_path / "run.parquet"
    pq.write_table(pa.table({"query_id": ["q", "q"], "doc_id": ids, "score": [2.0, 1.0]}), path)
    run = read_run(path)
    assert set(run.to_dict()["q"]) == expected
    assert run.notes == ({"numeric_ids": 2} if pa.types.is_primitive(ids.type) else {})
    found = evaluate_run(run, {"q": {next(iter(sorted(expected))): 1}}, ["recall@10"])
    assert found.means == {"recall@10": 1.0}
    assert ("2 ids were numbers and are taken as text" in repr(found)) == bool(run.notes)


@pytest.mark.parametrize("ids", [pa.array([1.5, 2.0]), pa.array([True, False]), pa.array([[1], [2]])])
def test_ids_that_are_no_ids_are_refused(tmp_path: Path, ids: Any) -> None:
    path = tmp_path / "run.parquet"
    pq.write_table(pa.table({"query_id": ["q", "q"], "doc_id": ids, "score": [2.0, 1.0]}), path)
    with pytest.raises(RankdistillError, match=r"not whole|not text") as caught:
        read_run(path)
    assert "column doc_id" in str(caught.value.where)


def test_numbers_as_keys_in_python_meet_text() -> None:
    run: Any = {1: {10: 2.0, 11: 1.0}}
    found = evaluate_run(Run.from_dict(run), {"1": {"10": 1}}, ["mrr@10"])
    assert found.means == {"mrr@10": 1.0} and found.notes["numeric_ids"] == 3
    qrels: Any = {np.int64(1): {10: 1}}
    assert evaluate_run(Run.from_dict({"1": {"10": 1.0}}), qrels, ["mrr@10"]).notes["numeric_ids"] == 2
    wrong: Any
    for wrong, words in (({1: 2.0, "1": 1.0}, "same as text"), ({1.5: 2.0}, "is a float, not text")):
        with pytest.raises(RankdistillError, match=words):
            Run.from_dict({"q": wrong})


def test_what_was_wrong_with_a_file_is_told_in_the_evaluation_of_it(tmp_path: Path) -> None:
    """The run that is written is in order; the note on the ranks of the one that was read must not get lost."""
    (tmp_path / "run.trec").write_text("q1 Q0 a 2 2.0 x\nq1 Q0 b 1 1.0 x\nq2 Q0 q2 1 1.0 x\nq2 Q0 a 2 0.5 x\n")
    collection: Any = SimpleNamespace(
        name="mine", spec="memory", fingerprint="0", splits=("test",),
        query_ids=lambda split: list(QRELS), query_texts=list, found_qrels=lambda split: QRELS,
    )  # fmt: skip
    found = evaluate_systems({"mine": tmp_path / "run.trec"}, collection, "test", ["mrr@10"], 1, tmp_path / "out",
                             drop_self_hits=True)  # fmt: skip
    notes = found["mine"].notes
    assert (notes["rank_contradictions"], notes["self_hits_dropped"], notes["missing_queries"]) == (1, 1, 1)
    assert found["mine"].means["mrr@10"] == pytest.approx(2 / 3)
    assert read_run(tmp_path / "out" / "runs" / "mine.trec").to_dict() == {"q1": {"a": 2.0}, "q2": {"a": 0.5}}
    assert "1 queries whose ranks contradict their scores (scores decide)" in plain_table(found)
    assert (tmp_path / "out" / "significance.json").is_file()


def test_a_rank_that_is_no_number_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    pq.write_table(
        pa.table({"query_id": ["q"] * 2, "doc_id": ["a", "b"], "score": [1.0, 2.0], "rank": ["x", "y"]}), path
    )
    assert list(read_run(path).to_dict()["q"]) == ["b", "a"]
