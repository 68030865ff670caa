"""Runs: read, streamed and written without loss, in trec_eval's order; bad files are named by file and line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankdistill import runs
from rankdistill.errors import RankdistillError
from rankdistill.runs import Run, RunWriter, WhiteSpaceError, iter_run, read_run, trec_order, write_trec

Scores = dict[str, dict[str, float]]


def random_run(seed: int, queries: int = 20) -> Run:
    random = np.random.default_rng(seed)
    ids = [f"d{number}" for number in range(40)] + ["é", "\U0001f600", "￮", '"quoted"', "#", "a,b"]
    made: Scores = {}
    for query in range(queries):
        chosen = random.permutation(ids)[: random.integers(1, 30)]
        made[f"q{query}"] = {
            str(doc): float(score) for doc, score in zip(chosen, random.normal(size=30) * 9, strict=False)
        }
        if query % 2:
            made[f"q{query}"] = {doc: float(np.round(score)) for doc, score in made[f"q{query}"].items()}
    return Run.from_dict(made, "made")


def same(left: Run, right: Run) -> bool:
    return (
        left.query_ids == right.query_ids
        and left.doc_ids.equals(right.doc_ids)
        and left.offsets.tolist() == right.offsets.tolist()
        and left.scores.tobytes() == right.scores.tobytes()
    )


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz", "run.parquet"])
def test_a_written_run_reads_back_the_same(tmp_path: Path, name: str) -> None:
    run = random_run(1)
    path = tmp_path / name
    if path.suffix == ".parquet":
        with RunWriter(path) as writer:
            for query_id, doc_ids, scores in run:
                writer.add(query_id, doc_ids[::-1], scores[::-1])
    else:
        write_trec(run, path, "made")
    assert same(read_run(path), run)
    streamed = list(iter_run(path))
    for (query_id, doc_ids, scores), (their_id, their_docs, their_scores) in zip(run, streamed, strict=True):
        assert (query_id, doc_ids, scores.tolist()) == (their_id, their_docs, their_scores.tolist())
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_order_is_trec_evals() -> None:
    documents = {"b": 1.0, "a": 1.0, "é": 1.0, "z": 1.0, "low": -1.0, "high": 1.0000001, "same as 1": 1.00000001}
    (ranking,) = list(Run.from_dict({"q": documents}))
    assert ranking[1] == ["high", "é", "z", "same as 1", "b", "a", "low"]
    assert [list(documents)[i] for i in trec_order(np.array(list(documents.values())), list(documents))] == ranking[1]


def test_the_order_is_that_of_a_plain_sort_on_random_runs() -> None:
    for seed in range(20):
        for _, doc_ids, scores in random_run(seed):
            pairs = sorted(
                zip(scores.tolist(), doc_ids, strict=True), key=lambda p: (p[0], p[1].encode()), reverse=True
            )
            assert [doc_id for _, doc_id in pairs] == doc_ids


def test_other_white_space_line_ends_and_scattered_queries_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_bytes(b"\xef\xbb\xbfq1\tQ0\td1\t1\t2.5\tx\r\n\nq2 Q0   d1 1 1e3 x  \nq1 Q0 d2 2 3 x")
    run = read_run(path)
    assert run.to_dict() == {"q1": {"d2": 3.0, "d1": 2.5}, "q2": {"d1": 1000.0}} and run.name == "run"
    assert run.notes == {"rank_contradictions": 1}
    with pytest.raises(RankdistillError, match="'q1' do not lie together"):
        list(iter_run(path))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b"q Q0 d2 2 0.5", "5 columns instead of 6"),
        (b"q Q0 d2 2 0.5 x y", "7 columns"),
        (b"q Q0 d2 2 nan x", "not a finite float32 number: nan"),
        (b"q Q0 d2 2 -inf x", "not a finite"),
        (b"q Q0 d2 2 1e39 x", "not a finite float32 number: 1e"),
        (b"q Q0 d2 2 high x", "not a number: 'high'"),
        (b"q Q0 d2 2 1_0 x", "not a number"),
        (b"q Q0 d\xff 2 1 x", "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: bytes, message: str) -> None:
    path = tmp_path / "run.trec"
    path.write_bytes(b"q Q0 d1 1 1.0 x\n" + second + b"\n")
    for read in (read_run, lambda p: list(iter_run(p))):
        with pytest.raises(RankdistillError, match=message) as caught:
            read(path)
        assert caught.value.where is not None and caught.value.where.startswith(f"{path}:2")


def test_a_bad_line_far_down_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "BLOCK", 1000)
    path = tmp_path / "run.trec"
    lines = [f"q{number // 10} Q0 d{number} 1 {-number} x" for number in range(5000)]
    path.write_text("\n".join(lines) + "\n")
    assert len(read_run(path)) == len(list(iter_run(path))) == 500
    lines[4321] = "q432 Q0 d"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RankdistillError) as caught:
        read_run(path)
    assert caught.value.where == f"{path}:4322"


def test_the_quick_parser_takes_only_what_the_careful_one_reads_alike(tmp_path: Path) -> None:
    """Lines with white space, line ends or columns damaged at random places: either refused, or read the same."""
    random, taken = np.random.default_rng(0), 0
    for _ in range(400):
        text = "".join(f"q{n // 3} Q0 d{n} {n} {-n}.5 tag\n" for n in range(6)).encode()
        for _ in range(random.integers(0, 3)):
            at = int(random.integers(0, len(text)))
            damage = [b" ", b"  ", b"\t", b"\r\n", b"\n", b"\n\n", b"\x0b", b"", b"x"][random.integers(9)]
            text = text[:at] + damage + text[at + int(random.integers(0, 2)) :]
        if not text.strip():
            continue
        quick = runs._parse_quickly(text, " ")
        if quick is None:
            continue
        taken += 1
        careful = runs._parse_carefully(text, tmp_path / "run", 1)
        for name in ("query_id", "doc_id", "score"):
            assert quick[name].to_pylist() == careful[name].to_pylist(), text
    assert taken > 100


def test_parts_of_any_size_give_the_same_run_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = random_run(4)
    write_trec(run, tmp_path / "whole.trec", "x")
    write_trec(iter(list(run)), tmp_path / "streamed.trec", "x")
    given = [(query_id, dict(zip(ids[::-1], scores[::-1].tolist(), strict=True))) for query_id, ids, scores in run]
    for rows in (1, 7, 40):
        monkeypatch.setattr(runs, "ROWS_AT_ONCE", rows)
        again = Run.from_dict(dict(given), "made")
        assert same(again, run)
        write_trec(again, tmp_path / "parts.trec", "x")
        for name in ("parts", "streamed"):
            assert (tmp_path / f"{name}.trec").read_bytes() == (tmp_path / "whole.trec").read_bytes()


def test_self_hits_are_found_and_left_out() -> None:
    run = Run.from_dict({"a": {"a": 2.0, "b": 1.0}, "b": {"a": 2.0, "c": 1.0}, "c": {"c": 1.0}})
    assert run.self_hits.tolist() == [True, False, False, False, True]
    assert run.keep(~run.self_hits).to_dict() == {"a": {"b": 1.0}, "b": {"a": 2.0, "c": 1.0}, "c": {}}


def test_a_duplicate_document_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 a 1 2 x\nq1 Q0 b 2 1 x\nq2 Q0 a 1 2 x\nq2 Q0 c 2 1 x\nq2 Q0 a 3 0 x\n")
    for read in (read_run, lambda p: list(iter_run(p))):
        with pytest.raises(RankdistillError, match="document 'a' is listed more than once for query 'q2'") as caught:
            read(path)
        assert caught.value.where == str(path)


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.trec.gz"
    text = "".join(f"q Q0 d{number} {number} {-number} x\n" for number in range(3000)).encode()
    path.write_bytes(gzip.compress(text)[:-2000])
    with pytest.raises(RankdistillError, match="damaged or cut short"):
        read_run(path)
    path.write_bytes(gzip.compress(text))
    assert len(read_run(path).scores) == 3000


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    good = {"query_id": ["q", "q"], "doc_id": ["a", "b"], "score": [1.0, 0.5]}
    pq.write_table(pa.table(good), path)
    assert read_run(path).to_dict() == {"q": {"a": 1.0, "b": 0.5}}  # rank is not needed
    pq.write_table(pa.table({"query_id": [7, 7], "doc_id": [1, 2], "score": [1.0, 0.5]}), path)
    assert read_run(path).to_dict() == {"7": {"1": 1.0, "2": 0.5}}  # ids of another type are read as text
    for column, values, message in [
        ("score", [1.0, float("nan")], "not a finite"),
        ("doc_id", ["a", None], "empty cells"),
        ("doc_id", ["a", "a"], "more than once"),
    ]:
        pq.write_table(pa.table({**good, column: values}), path)
        with pytest.raises(RankdistillError, match=message):
            read_run(path)
    pq.write_table(pa.table({"query_id": ["q"], "document": ["a"], "score": [1.0]}), path)
    with pytest.raises(RankdistillError, match="no column doc_id"):
        read_run(path)
    path.write_bytes(b"PAR1" + b"damaged" * 10)
    with pytest.raises(RankdistillError, match="cannot be read"):
        read_run(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match="no such run"):
        read_run(tmp_path / "none")
    (tmp_path / "empty").write_text("")
    assert len(read_run(tmp_path / "empty")) == 0 and list(iter_run(tmp_path / "empty")) == []


@pytest.mark.parametrize("name", ["a b", "tab\t", ""])
def test_an_id_a_trec_file_cannot_carry_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(WhiteSpaceError, match="white space"):
        write_trec(Run.from_dict({"q": {"fine": 1.0, name: 0.5}}), tmp_path / "run.trec")
    assert not list(tmp_path.iterdir())


def test_a_failed_writer_leaves_nothing_and_refuses_bad_rankings(tmp_path: Path) -> None:
    path = tmp_path / "run.parquet"
    for doc_ids, scores, message in [
        (["a", "a"], [1.0, 2.0], "more than once"),
        (["a"], [float("nan")], "not a finite"),
    ]:
        with pytest.raises(RankdistillError, match=message), RunWriter(path) as writer:
            writer.add("q", doc_ids, np.array(scores))
        assert not list(tmp_path.iterdir())
    with pytest.raises(RankdistillError, match="written twice"), RunWriter(path) as writer:
        writer.add("q", ["a"], [1.0])
        writer.add("q", ["a"], [1.0])
    with RunWriter(path) as writer:
        writer.add("old", ["a"], [1.0])
    with pytest.raises(KeyError), RunWriter(path) as writer:
        writer.add("new", ["a"], [1.0])
        raise KeyError
    assert read_run(path).query_ids == ["old"]


def test_written_parquet_has_the_contracts_columns(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.parquet") as writer:
        writer.add("q", ["a", "b"], [0.5, 2.0])
        writer.add("r", ["a"], [1.0])
    table = pq.read_table(tmp_path / "run.parquet")
    assert table.schema.equals(
        pa.schema({"query_id": pa.string(), "doc_id": pa.string(), "rank": pa.int32(), "score": pa.float32()})
    )
    assert table["rank"].to_pylist() == [1, 2, 1] and table["doc_id"].to_pylist() == ["b", "a", "a"]


def test_ties_and_depth() -> None:
    run = Run.from_dict({"q": {"a": 1.0, "b": 1.0, "c": 0.5}, "r": {"a": 0.5}, "s": {"a": 0.5}}, "mine")
    assert run.tied.tolist() == [True, True, False, False, False]
    assert "3 queries, 5 documents, 40.0% of scores tied" in repr(run)
    assert run.first(1).to_dict() == {"q": {"b": 1.0}, "r": {"a": 0.5}, "s": {"a": 0.5}}


def test_pytrec_eval_and_ranx_read_what_is_written(tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    run = random_run(3)
    write_trec(run, tmp_path / "run.trec", "a tag")
    with open(tmp_path / "run.trec") as stream:
        assert pytrec_eval.parse_run(stream) == {q: dict(docs) for q, docs in _printed(tmp_path / "run.trec").items()}
    assert {q: list(docs) for q, docs in _printed(tmp_path / "run.trec").items()} == {q: d for q, d, _ in run}


def _printed(path: Path) -> Scores:
    found: Scores = {}
    for line in path.read_text().splitlines():
        query_id, _, doc_id, _, score, _ = line.split()
        found.setdefault(query_id, {})[doc_id] = float(score)
    return found


def test_streaming_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """Peak memory over what is there before, for a run and one eight times as long."""
    code = """
import json, resource, sys
import numpy as np
from rankdistill.runs import RunWriter, iter_run
ids = [f"document-{n}" for n in range(200)]
scores = -np.arange(200.0)
def peak(queries):
    with RunWriter(sys.argv[1]) as writer:
        for query in range(queries):
            writer.add(f"q{query}", ids, scores)
    assert sum(1 for _ in iter_run(sys.argv[1])) == queries
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([peak(1000), peak(8000)]))
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.parquet")], capture_output=True, text=True, check=True
    )
    short, long = json.loads(out.stdout)
    assert long - short < 40  # MiB; 1.4 million more rows held as a run would be 60 and more
