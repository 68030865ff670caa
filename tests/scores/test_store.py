from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.scores.store import PairTable, ScoreStore, TeacherScores, hash_ids, pair_keys


def new_store(tmp_path: Path, **options: object) -> TeacherScores:
    return ScoreStore(tmp_path).folder("teacher", "collection", "logit", {"note": "x"}, **options)


def test_added_scores_are_found_before_and_after_writing_and_by_the_next_process(tmp_path: Path) -> None:
    scores = new_store(tmp_path)
    scores.add("q", ["a", "b"], [1.5, -2.0])
    for _ in range(2):
        assert scores.missing("q", ["c", "a", "b", "c"]) == ["c"]
        np.testing.assert_array_equal(scores.scores_of("q", ["b", "x", "a"]), np.float32([-2.0, np.nan, 1.5]))
        assert scores.missing("other", ["a"]) == ["a"]
        scores.flush()
    again = new_store(tmp_path)
    assert len(again) == 2 and again.missing("q", ["a", "b"]) == []
    assert again.manifest["description"] == {"note": "x"}


def test_a_pair_has_one_score_however_often_it_is_added(tmp_path: Path) -> None:
    first, second = new_store(tmp_path), new_store(tmp_path)
    first.add("q", ["a", "b", "a"], [1, 2, 9])
    second.add("q", ["b", "c"], [2, 3])
    first.flush()
    second.flush()
    scores = new_store(tmp_path)
    found = {(query, doc): score for query, docs, values in scores for doc, score in zip(docs, values, strict=True)}
    assert found == {("q", "a"): 1, ("q", "b"): 2, ("q", "c"): 3}
    assert sum(len(docs) for _, docs, _ in scores) == len(scores) == 3


def test_hashes_tell_ids_and_pairs_apart() -> None:
    ids = ["", "a", "b", "ab", "ba", "é", "a" * 300, "a" * 299 + "b"] + [str(i) for i in range(200_000)]
    hashes = hash_ids(ids)
    assert len(np.unique(hashes)) == len(ids)
    assert pair_keys(hashes[1:2], hashes[2:3]) != pair_keys(hashes[2:3], hashes[1:2])
    assert len(np.unique(pair_keys(np.repeat(hashes[:300], 300), np.tile(hashes[:300], 300)))) == 90_000


def test_pair_table_agrees_with_a_dictionary() -> None:
    random = np.random.default_rng(0)
    table, known = PairTable(), {}
    for _ in range(60):
        keys = random.integers(0, 4000, random.integers(1, 200)).astype(np.uint64)
        scores = random.normal(size=len(keys)).astype(np.float32)
        new = table.add(keys, scores)
        for key, score, is_new in zip(keys.tolist(), scores.tolist(), new.tolist(), strict=True):
            assert is_new == (key not in known)
            known.setdefault(key, score)
    asked = np.arange(4100, dtype=np.uint64)
    expected = np.array([known.get(key, np.nan) for key in asked.tolist()], dtype=np.float32)
    np.testing.assert_array_equal(table.find(asked), expected)
    assert len(table) == len(known)
    assert len(table._segments) < 12


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_when_written_and_when_read(tmp_path: Path, bad: float) -> None:
    scores = new_store(tmp_path)
    with pytest.raises(RankdistillError, match="document 'b'"):
        scores.add("q", ["a", "b"], [1.0, bad])
    part = scores.path / "part-1.parquet"
    pq.write_table(pa.table({"query_id": ["q"], "doc_id": ["d"], "score": pa.array([bad], pa.float32())}), part)
    with pytest.raises(RankdistillError, match=r"part-1\.parquet, row 1"):
        new_store(tmp_path)


def test_a_truncated_part_is_named_and_never_dropped_silently(tmp_path: Path) -> None:
    with new_store(tmp_path) as scores:
        scores.add("q", [str(i) for i in range(100)], np.arange(100))
    (part,) = scores.parts()
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RankdistillError, match=part.name) as caught:
        new_store(tmp_path)
    assert "delete this file" in str(caught.value)
    part.unlink()
    assert len(new_store(tmp_path)) == 0


def test_scores_of_another_collection_are_refused(tmp_path: Path) -> None:
    with new_store(tmp_path) as scores:
        scores.add("q", ["a"], [1])
    with pytest.raises(RankdistillError, match="another collection"):
        TeacherScores(scores.path).check(collection="elsewhere")
    other = ScoreStore(tmp_path).folder("teacher", "elsewhere", "logit")
    (other.path / "part-9.parquet").write_bytes(scores.parts()[0].read_bytes())
    with pytest.raises(RankdistillError, match="another collection"):
        ScoreStore(tmp_path).folder("teacher", "elsewhere", "logit")
    with pytest.raises(RankdistillError, match="another score kind"):
        ScoreStore(tmp_path).folder("teacher", "collection", "similarity")


def test_a_full_disk_says_so_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = new_store(tmp_path)
    scores.add("q", ["a"], [1])
    scores.flush()
    scores.add("q", ["b"], [2])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RankdistillError, match="disk is full"):
            scores.flush()
    assert len(new_store(tmp_path)) == 1
    scores.flush()  # nothing pending was lost
    assert len(new_store(tmp_path)) == 2
    assert not list(scores.path.glob("*.tmp"))


WRITER = """
    import sys, time
    import numpy as np
    from rankdistill.scores.store import ScoreStore
    root, log, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    scores = ScoreStore(root).folder("teacher", "collection", "logit", part_pairs=50)
    with scores, open(log, "a") as stream:
        for query in range(60):
            wanted = scores.missing(str(query), [str(d) for d in range(10)])
            for doc in wanted:
                stream.write(f"{query} {doc}\\n")
            stream.flush()
            scores.add(str(query), wanted, np.array([query * 10 + int(d) for d in wanted], dtype=np.float32))
            time.sleep(pause)
"""


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def check_complete(root: Path) -> None:
    scores = ScoreStore(root).folder("teacher", "collection", "logit")
    assert len(scores) == 600
    for query in range(60):
        expected = np.arange(query * 10, query * 10 + 10, dtype=np.float32)
        np.testing.assert_array_equal(scores.scores_of(str(query), [str(d) for d in range(10)]), expected)


def test_after_kill_9_only_the_part_in_flight_is_scored_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    kills = 0
    for delay in (0.05, 0.15, 0.25):
        process = start(tmp_path / "store", log, 0.01)
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert start(tmp_path / "store", log, 0).wait() == 0
    asked = log.read_text().splitlines()
    assert len(set(asked)) == 600 and kills >= 1
    assert len(asked) - 600 <= kills * 60  # one part of 50, and one list of 10 that filled it
    check_complete(tmp_path / "store")


def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    processes = [start(tmp_path / "store", tmp_path / f"log{n}", 0.001) for n in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    check_complete(tmp_path / "store")


def test_export_carries_the_fingerprints(tmp_path: Path) -> None:
    with new_store(tmp_path) as scores:
        scores.add("q", ["a", "b"], [1, 2])
    file = tmp_path / "out.parquet"
    assert scores.export(file) == 2
    schema = pq.read_schema(file)
    assert schema.metadata[b"collection"] == b"collection" and schema.metadata[b"score_kind"] == b"logit"


def test_any_flipped_bit_of_a_part_is_found(tmp_path: Path) -> None:
    """Pages carry checksums: a part whose values changed is refused, not read as other scores."""
    from rankdistill.scores.store import read_part

    with ScoreStore(tmp_path).folder("t", "c", "logit") as scores:
        scores.add("q", [f"d{number}" for number in range(200)], np.linspace(-3, 3, 200).astype(np.float32))
    part = next(tmp_path.rglob("part-*.parquet"))
    whole, before = part.read_bytes(), read_part(part)
    for at in range(4, len(whole), 7):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = read_part(part)
        except RankdistillError:
            continue
        assert found.equals(before), f"byte {at}"
