from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.scores.foreign_scores import detect_format, iter_foreign
from rankdistill.scores.store import ScoreStore
from rankdistill.teachers.base import TextList
from rankdistill.teachers.recorded import RecordedTeacher, RunTeacher, import_scores
from rankdistill.teachers.scoring import score_candidates

if TYPE_CHECKING:
    from rankdistill.collections import Collection

TSV = "query_id\tdoc_id\tscore\nq-iron\td-iron\t3.5\nq-iron\td-oak\t-1\nq-gold\td-gold\t2\n"
TRIPLES = "3.5\t-1\tq-iron\td-iron\td-oak\n2\t0.5\tq-gold\td-gold\td-bee\n3.5\t7\tq-iron\td-iron\td-bat\n"
TREC = "q-iron Q0 d-iron 1 3.5 x\nq-iron Q0 d-oak 2 -1 x\nq-gold Q0 d-gold 1 2 x\n"


def jsonl(collection: Collection) -> str:
    iron, oak = collection.documents(collection.doc_rows(["d-iron", "d-oak"]))
    record = {
        "query": collection.query_texts(["q-iron"])[0],
        "pos": [iron.text],
        "neg": [f"{oak.title} {oak.text}"],
        "pos_scores": [3.5],
        "neg_scores": [-1],
    }
    by_id = {"query_id": "q-gold", "pos_ids": ["d-gold"], "pos_scores": [2]}
    return json.dumps(record) + "\n" + json.dumps(by_id) + "\n"


@pytest.mark.parametrize("format", ["tsv", "triples", "trec", "jsonl"])
@pytest.mark.parametrize("zipped", [False, True])
def test_foreign_formats_are_told_apart_and_imported(
    tiny_collection: Collection, tmp_path: Path, format: str, zipped: bool
) -> None:
    content = {"tsv": TSV, "triples": TRIPLES, "trec": TREC, "jsonl": jsonl(tiny_collection)}[format]
    file = tmp_path / "scores"
    file.write_bytes(gzip.compress(content.encode()) if zipped else content.encode())
    assert detect_format(file) == format
    scores = import_scores(file, "auto", tiny_collection, ScoreStore(tmp_path / "store"))
    np.testing.assert_array_equal(
        scores.scores_of("q-iron", ["d-oak", "d-iron", "d-moon"]), np.float32([-1, 3.5, np.nan])
    )
    np.testing.assert_array_equal(scores.scores_of("q-gold", ["d-gold"]), np.float32([2]))
    again = import_scores(file, "auto", tiny_collection, ScoreStore(tmp_path / "store"))
    assert again.scored == 0 and len(again) == len(scores)


@pytest.mark.parametrize(
    ("format", "content", "line", "message"),
    [
        ("tsv", TSV + "q-iron\td-bat\n", 5, "2 fields instead of 3"),
        ("tsv", TSV + "q-iron\td-bat\tlots\n", 5, "not a score"),
        ("tsv", "q\td\t1\nq\td2\tnan\n", 2, "not finite"),
        ("tsv", "q\td\t1\nq\td2\t-inf\n", 2, "not finite"),
        ("tsv", "q\td\t1\nq\t\t2\n", 2, "empty field"),
        ("triples", TRIPLES + "1\t2\tq-iron\td-iron\n", 4, "4 fields instead of 5"),
        ("triples", TRIPLES + "1\tinf\tq-iron\td-iron\td-bat\n", 4, "not finite"),
        ("jsonl", '{"query": "a", "pos": ["b"], "pos_scores": [1]}\n{"query": "a", "pos"\n', 2, "not valid JSON"),
        ("jsonl", '{"query": "a", "pos": ["b"], "pos_scores": [NaN]}\n', 1, "not finite"),
        ("jsonl", '{"query": "a", "pos": ["b", "c"], "pos_scores": [1]}\n', 1, "2 pos but 1 pos_scores"),
        ("jsonl", '{"query": "a", "pos": ["b"], "pos_scores": ["1"]}\n', 1, "numbers"),
        ("jsonl", '{"query": "a"}\n', 1, "no scores"),
        ("jsonl", "[1]\n", 1, "not an object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, format: str, content: str, line: int, message: str) -> None:
    file = tmp_path / "scores"
    file.write_text(content)
    with pytest.raises(RankdistillError, match=message) as caught:
        list(iter_foreign(file, format))  # type: ignore[arg-type]
    assert f"scores:{line}" in str(caught.value)


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("tsv", b"q\td\t1\nq\td\xff\t1\n", "scores:2"),
        ("triples", gzip.compress(TRIPLES.encode() * 100)[:-12], "damaged"),
    ],
    ids=["not utf-8", "cut gzip"],
)
def test_bad_bytes_are_named(tmp_path: Path, format: Any, content: bytes, message: str) -> None:
    (tmp_path / "scores").write_bytes(content)
    with pytest.raises(RankdistillError, match=message):
        list(iter_foreign(tmp_path / "scores", format))


def test_pairs_that_are_not_in_the_collection_are_counted_and_said(
    tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.tsv"
    file.write_text(TSV + "q-none\td-iron\t1\nq-iron\td-none\t1\n")
    scores = import_scores(file, "tsv", tiny_collection, ScoreStore(tmp_path / "store"))
    assert (scores.scored, scores.unscored) == (3, 2)
    said = capsys.readouterr().err
    assert "1 queries are not in" in said and "1 scores are of documents" in said
    file.write_text("a\tb\t1\n")
    with pytest.raises(RankdistillError, match="not one of its 1 scores"):
        import_scores(file, "tsv", tiny_collection, ScoreStore(tmp_path / "store"))


def test_an_export_of_another_collection_is_refused(tiny_collection: Collection, tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "store")
    for fingerprint, fits in ((tiny_collection.fingerprint, True), ("0123456789abcdef", False)):
        with store.folder("teacher", fingerprint, "logit") as scores:
            scores.add("q-iron", ["d-iron"], [1.25])
        file = tmp_path / f"{fits}.parquet"
        scores.export(file)
        if fits:
            assert import_scores(file, "auto", tiny_collection, store).scores_of("q-iron", ["d-iron"])[0] == 1.25
        else:
            with pytest.raises(RankdistillError, match="another collection"):
                import_scores(file, "auto", tiny_collection, store)


def test_recorded_teachers_give_what_they_have(tiny_collection: Collection, tmp_path: Path) -> None:
    ids, file = ["d-moon", "d-oak", "d-iron"], tmp_path / "scores"
    documents = tiny_collection.document_texts(tiny_collection.doc_rows(ids))
    item = TextList("q-iron", tiny_collection.query_texts(["q-iron"])[0], ids, documents)
    file.write_text(TSV)
    ((_, doc_ids, scores),) = RecordedTeacher(str(file)).score([item])
    assert (doc_ids, scores.tolist()) == (["d-oak", "d-iron"], [-1.0, 3.5])
    file.write_text(TREC)
    similarity: dict[str, Any] = {"score_kind": "similarity"}
    teachers = {
        RecordedTeacher(str(file)): [-1.0, 3.5],
        RunTeacher(str(file)): [0.5, 1.0],
        RunTeacher(str(file), function="none"): [-2.0, -1.0],
        RunTeacher(str(file), **similarity): [-1.0, 3.5],
    }
    for teacher, expected in teachers.items():
        ((_, doc_ids, scores),) = teacher.score([item])
        assert (doc_ids, scores.tolist()) == (["d-oak", "d-iron"], expected)
    assert len({teacher.fingerprint() for teacher in teachers}) == 4
    lists, store = [("q-iron", ids, np.zeros(3))], ScoreStore(tmp_path / "store")
    stored = score_candidates(RunTeacher(str(file)), tiny_collection, lists, store)
    assert (stored.scored, stored.unscored, stored.score_kind) == (2, 1, "rank")
    with pytest.raises(RankdistillError, match="no score file"):
        RecordedTeacher(str(tmp_path / "none")).fingerprint()


def test_texts_are_not_hashed_where_ids_have_the_scores(
    tiny_collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing the texts of 500,000 lists took a day, for scores that were found by ids."""
    from rankdistill.teachers import recorded

    documents, texts = tiny_collection.doc_ids([0, 1]), tiny_collection.document_texts([0, 1])
    query = tiny_collection.query_texts(["q-iron"])[0]
    by_id = {"query_id": "q-iron", "pos_ids": documents[:1], "pos_scores": [1.0]}
    by_text = {"query": query, "pos": texts[1:], "pos_scores": [2.0]}
    (tmp_path / "scores.jsonl").write_text(f"{json.dumps(by_id)}\n{json.dumps(by_text)}\n")
    teacher = RecordedTeacher(str(tmp_path / "scores.jsonl"))
    teacher.table()
    hashed: list[str] = []
    real = recorded.hash_ids
    monkeypatch.setattr(recorded, "hash_ids", lambda ids: hashed.extend(ids) or real(ids))
    ((_, found, scores),) = teacher.score([TextList("q-iron", query, documents, texts)])
    assert found == documents and scores.tolist() == [1.0, 2.0]
    assert texts[0] not in hashed and texts[1] in hashed  # of the one without a score by id


def test_runs_of_one_teacher_are_fused(tmp_path: Path) -> None:
    """Only the orders count: the scores beside them were dealt out anew."""
    orders = [["a", "b", "c"], ["b", "a", "c"], ["b", "c"]]
    files = []
    for number, order in enumerate(orders):
        files.append(tmp_path / f"{number}.trec")
        lines = [f"q Q0 {doc_id} {rank} {9 - rank} x\n" for rank, doc_id in enumerate(order, 1)]
        files[-1].write_text("".join(lines) + ("only Q0 c 1 5 x\nonly Q0 a 2 4 x\n" if number == 2 else ""))
    first, *others = map(str, files)
    items = [TextList("q", "", ["c", "b", "a"], [""] * 3), TextList("only", "", ["a", "c"], [""] * 2)]
    (_, found, scores), (_, _, last) = RunTeacher(first, repeats=others).score(items)
    assert found == ["c", "b", "a"]
    np.testing.assert_allclose(scores, [(1 / 3 + 1 / 3 + 1 / 2) / 3, (1 / 2 + 1 + 1) / 3, (1 + 1 / 2) / 2])
    np.testing.assert_allclose(last, [1 / 2, 1])  # a query that the first run lacks
    (_, _, strengths), _ = RunTeacher(first, function="plackett_luce", repeats=others).score(items)
    assert strengths[1] > strengths[2] > strengths[0]
    (_, _, gains), _ = RunTeacher(first, function="ndcg_gain", repeats=others[1:]).score(items)
    np.testing.assert_allclose(gains[2], 1)
    prints = [
        RunTeacher(first, repeats=list(files_)).fingerprint() for files_ in ((), others, others[:1], others[::-1])
    ]
    assert len(set(prints)) == 4
    for settings in ({"function": "plackett_luce"}, {"score_kind": "similarity", "repeats": others}):
        with pytest.raises(UsageError, match="repeats"):
            RunTeacher(first, **settings)
    with pytest.raises(RankdistillError, match="no score file"):
        RunTeacher(first, repeats=["nowhere.trec"]).fingerprint()


def test_real_listwise_runs_teach_by_their_order(shared_data: Path) -> None:
    """GPT-3.5's five repeats over BM25: fused they order at least as well as the middle one (nDCG@10, 43 queries)."""
    from rankdistill.evaluation.metrics import evaluate_run
    from rankdistill.runs import Run, iter_run

    folder = shared_data / "msmarco-dl19"
    files = [str(folder / "listwise-runs" / f"gpt-3.5-turbo.bm25.repeat{number}.trec") for number in range(1, 6)]
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.txt").read_text().splitlines():
        query, _, document, relevance = line.split()
        qrels.setdefault(query, {})[document] = int(relevance)

    def ndcg(teacher: RunTeacher) -> float:
        lists = [TextList(query, "", ids, [""] * len(ids)) for query, ids, _ in iter_run(files[0])]
        run = {query: dict(zip(ids, scores.tolist(), strict=True)) for query, ids, scores in teacher.score(lists)}
        return float(evaluate_run(Run.from_dict(run), qrels, ["ndcg@10"]).means["ndcg@10"])

    alone = [ndcg(RunTeacher(file)) for file in files]
    assert 0.67 < min(alone) < max(alone) < 0.70  # as published beside the runs: .674 to .694
    assert ndcg(RunTeacher(files[0], function="plackett_luce", repeats=files[1:])) >= np.median(alone) - 0.005
