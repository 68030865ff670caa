"""Evaluation of systems: the figures are those of the runs written, tables show them, published ones stand apart."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError
from rankdistill.evaluation.evaluate import Evaluation, evaluate_suite, evaluate_systems
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.suites import EvaluationSet, Suite
from rankdistill.evaluation.systems import EngineSystem, RerankSystem
from rankdistill.evaluation.tables import bytes_text, markdown, plain_table, print_tables
from rankdistill.indexes.base import Hits
from rankdistill.runs import Run, read_run, write_trec

WORDS = ["iron", "gold", "helium", "whale", "bat", "oak", "moon", "mars", "bee", "spider"]


class Facts:
    """A collection of 40 short documents in memory: query i asks for word i; 4 documents hold each word."""

    spec = "memory:facts"
    fingerprint = "0" * 16
    splits = ("test",)

    def __init__(self, name: str = "facts", separator: str = "-") -> None:
        self.name = name
        self.ids = [f"d{separator}{word}{separator}{copy}" for word in WORDS for copy in range(4)]
        self.texts = [f"{word} " * (copy + 1) for word in WORDS for copy in range(4)]

    def query_ids(self, split: str | None = None) -> list[str]:
        return [f"q-{word}" for word in WORDS]

    def query_texts(self, ids: Sequence[str]) -> list[str]:
        return [query_id.removeprefix("q-") for query_id in ids]

    def found_qrels(self, split: str) -> dict[str, dict[str, int]]:
        return {query: {self.ids[4 * n]: 1, self.ids[4 * n + 3]: 2} for n, query in enumerate(self.query_ids())}

    def doc_ids(self, rows: Any) -> list[str]:
        return [self.ids[row] for row in rows]

    def doc_rows(self, ids: Sequence[str]) -> np.ndarray:
        return np.array([self.ids.index(doc_id) if doc_id in self.ids else -1 for doc_id in ids], np.int64)

    def document_texts(self, rows: Any) -> list[str]:
        return [self.texts[row] for row in rows]


class CountWords:
    """A real little engine: the score is how often the query's word is in the document."""

    def __init__(self, collection: Facts) -> None:
        self.collection, self.asked = collection, 0

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        self.asked += len(queries)
        found = []
        for query in queries:
            scores = np.array([text.split().count(query) for text in self.collection.texts], np.float32)
            rows = np.argsort(-scores, kind="stable")[:k]
            found.append(Hits(rows, scores[rows]))
        return found


def perfect_teacher(lists: Sequence[Any]) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Judges the first and the fourth document of a word best; says nothing about the third."""
    for one in reversed(lists):
        pairs = [(doc_id, {"0": 2.0, "3": 3.0, "1": 1.0}.get(doc_id[-1])) for doc_id in one.doc_ids]
        known = [(doc_id, score) for doc_id, score in pairs if score is not None]
        yield one.query_id, [doc_id for doc_id, _ in known], np.array([score for _, score in known])


@pytest.fixture
def collection() -> Facts:
    return Facts()


@pytest.fixture
def evaluation(collection: Facts, tmp_path: Path) -> Evaluation:
    engine = EngineSystem(CountWords(collection), bytes=1_500_000)
    hits = dict(zip(collection.query_ids(), engine.engine.search(WORDS, 8), strict=True))
    base = Run.from_dict(
        {query: dict(zip(collection.doc_ids(h.rows), h.scores.tolist(), strict=True)) for query, h in hits.items()}
    )
    systems = {"words": engine, "teacher": RerankSystem(perfect_teacher, base, depth=4), "given [run]": base}
    return evaluate_systems(systems, collection, "test", ["ndcg@10", "mrr@10", "recall@100"], 20, tmp_path / "out")


def test_rows_are_the_figures_of_the_runs_on_disk(evaluation: Evaluation, collection: Facts, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for row in evaluation.rows:
        again = evaluate_run(read_run(out / row.run), collection.found_qrels("test"), evaluation.metrics)
        assert again.means == row.means
    assert evaluation["teacher"].means["ndcg@10"] == 1.0 > evaluation["words"].means["ndcg@10"]
    assert evaluation["given [run]"].means == pytest.approx(evaluation["words"].means)
    assert evaluation["words"].queries_per_second and evaluation["words"].queries_per_second > 0
    assert evaluation["given [run]"].queries_per_second is None  # speed is measured where something searched
    assert evaluation["words"].bytes == 1_500_000 and evaluation.environment["threads"] >= 1
    files = {"per_query.parquet", "results.json", "results.md", "significance.json"}
    files |= {"fidelity.json", "fidelity.parquet"}
    assert {path.name for path in out.iterdir() if path.is_file()} >= files
    assert sorted(path.name for path in (out / "runs").iterdir()) == ["given-run.trec", "teacher.trec", "words.trec"]


def test_json_and_per_query_hold_the_same_means(evaluation: Evaluation, tmp_path: Path) -> None:
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    table = pq.read_table(tmp_path / "out" / "per_query.parquet").to_pandas()
    assert list(table.columns) == ["system", "query_id", "ndcg@10", "mrr@10", "recall@100"]
    for row in values["rows"]:
        of_system = table[table.system == row["system"]]
        assert len(of_system) == 10
        assert of_system[list(row["means"])].mean().to_dict() == pytest.approx(row["means"])
    assert values["rows"][0]["notes"]["queries"] == 10


@pytest.mark.parametrize(
    ("weight", "order", "scores"),
    [(0.0, "31", [3, 1]), (0.5, "31", [6.5, 5.5]), (2.5, "13", [23.5, 20.5])],
)
def test_the_first_stages_score_is_added_and_its_rest_follows_the_re_ranked(
    collection: Facts, weight: float, order: str, scores: list[float]
) -> None:
    base = Run.from_dict({"q-iron": {"d-iron-1": 9.0, "d-iron-2": 8.0, "d-iron-3": 7.0, "d-gold-0": 6.0, "gone": 5.0}})
    system = RerankSystem(perfect_teacher, base, depth=3, first_stage_weight=weight)
    ((query_id, doc_ids, found), other) = system.run(collection, ["q-iron", "q-bat"], ["iron", "bat"], 10)
    ranked = [f"d-iron-{number}" for number in order]
    assert (query_id, doc_ids) == ("q-iron", [*ranked, "d-iron-2", "d-gold-0", "gone"]) and (np.diff(found) < 0).all()
    np.testing.assert_allclose(found[:2], scores)
    assert other[:2] == ("q-bat", [])


def test_self_hits_are_dropped_and_the_depth_kept(tmp_path: Path) -> None:
    collection = Facts()
    collection.ids[0] = "q-iron"
    systems = {"words": EngineSystem(CountWords(collection))}
    found = evaluate_systems(systems, collection, "test", ["recall@100"], 4, tmp_path, drop_self_hits=True)
    run = read_run(tmp_path / found["words"].run)
    assert found["words"].notes["self_hits_dropped"] == 1
    assert np.diff(run.offsets).tolist() == [4] * 10
    assert "q-iron" not in run.to_dict()["q-iron"] and "1 self hits dropped" in plain_table(found)


def test_ids_with_white_space_are_evaluated_as_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collection = Facts(separator=" ")
    found = evaluate_systems({"words": EngineSystem(CountWords(collection))}, collection, "test", ["map"], 5, tmp_path)
    assert found["words"].run == "runs/words.parquet" and found["words"].means["map"] > 0
    assert "stays Parquet" in capsys.readouterr().err


def test_a_foreign_run_file_is_measured_as_given(collection: Facts, tmp_path: Path) -> None:
    run = Run.from_dict({"q-iron": {"d-iron-3": 1.0}, "another": {"d-bat-0": 1.0}})
    write_trec(run, tmp_path / "foreign.trec")
    found = evaluate_systems(
        {"foreign": tmp_path / "foreign.trec"}, collection, "test", ["mrr@10"], 5, tmp_path / "out"
    )
    assert found["foreign"].means == {"mrr@10": 0.1}
    assert found["foreign"].notes["missing_queries"] == 9 and found["foreign"].notes["ignored_queries"] == 1


def test_systems_with_like_names_get_files_of_their_own(collection: Facts, tmp_path: Path) -> None:
    run = Run.from_dict({"q-iron": {"d-iron-3": 1.0}})
    looked_up = RerankSystem(perfect_teacher, run, timed=False)
    found = evaluate_systems({"a b": run, "a/b": run, "A-b": looked_up}, collection, "test", ["map"], 5, tmp_path)
    assert len({row.run.lower() for row in found.rows}) == 3
    assert found["A-b"].queries_per_second is None  # what was scored elsewhere has no speed here


def test_tables_show_best_bold_and_published_apart(evaluation: Evaluation, collection: Facts, tmp_path: Path) -> None:
    text = markdown(evaluation)
    assert "| teacher | **1.0000▲** |" in text and "| 1.5 MB |" in text and "given [run]" in text
    named = evaluate_systems({"words": EngineSystem(CountWords(collection))}, collection, "test", ["ndcg@10"], 20,
                             tmp_path / "named", name="nfcorpus")  # fmt: skip
    measured, published = plain_table(named).split("\n\n")
    assert "0.317–0.325" in published and "published by others, not measured here" in published
    assert "0.317" not in measured and "BM25" not in measured
    assert [row.system for row in named.rows] == ["words"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_width_shows_every_figure_and_a_pipe_gets_plain_text(evaluation: Evaluation) -> None:
    stream = io.StringIO()
    print_tables(evaluation, stream)
    assert stream.getvalue().strip() == plain_table(evaluation) and "\x1b" not in stream.getvalue()
    assert "teacher\n  ndcg@10     1.0000▲\n" in plain_table(evaluation, width=30)
    for width in (40, 120):
        print_tables(evaluation, stream := Terminal(), width)
        for row in evaluation.rows:
            assert row.system in stream.getvalue()
            assert all(f"{value:.4f}" in stream.getvalue() for value in row.means.values())


def test_a_suite_averages_groups_and_lists_missing_sets(tmp_path: Path) -> None:
    sets = {name: Facts(name) for name in ("one", "two", "three")}

    def opener(spec: str) -> Facts:
        if spec not in sets:
            raise RankdistillError(f"{spec} is not on this machine")
        return sets[spec]

    def systems_for(collection: Any, one: EvaluationSet, split: str) -> dict[str, Any]:
        hits = {"one": 10, "two": 5, "three": 0}[collection.name]
        run = {q: {collection.ids[4 * n]: 1.0} for n, q in enumerate(collection.query_ids()[:hits])}
        systems: dict[str, Any] = {"run": Run.from_dict(run)}
        return systems | ({"only here": Run.from_dict(run)} if collection.name == "one" else {})

    suite = Suite(name="mine", metrics=["mrr@10"], depth=5, sets=[
        EvaluationSet(name="one", collection="one"),
        EvaluationSet(name="two", collection="two", group="pair"),
        EvaluationSet(name="three", collection="three", group="pair"),
        EvaluationSet(name="four", collection="four"),
    ])  # fmt: skip
    found = evaluate_suite(suite, systems_for, tmp_path, opener=opener)
    assert [one["run"].means["mrr@10"] for one in found.sets] == [1.0, 0.5, 0.0]
    assert found.macro == {"run": {"mrr@10": pytest.approx((1.0 + (0.5 + 0.0) / 2) / 2)}}
    assert found.missing == [{"set": "four", "reason": "four is not on this machine"}]
    text = (tmp_path / "results.md").read_text()
    assert "macro average over 2 sets" in text and "1 sets are missing from this average" in text
    assert "not measured on every set, so not averaged: only here" in text and "four is not on this machine" in text
    assert json.loads((tmp_path / "results.json").read_text())["macro"]["run"]["mrr@10"] == pytest.approx(0.625)
    with pytest.raises(RankdistillError, match="no set of the suite mine could be found"):
        evaluate_suite(Suite(name="mine", sets=[suite.sets[3]]), systems_for, tmp_path, opener=opener)


def test_sizes_are_printed_in_three_digits() -> None:
    assert [bytes_text(n) for n in (None, 0, 999, 1000, 999_600, 1_234_567, 5 * 10**9)] == [
        "", "0 B", "999 B", "1 kB", "1 MB", "1.23 MB", "5 GB",
    ]  # fmt: skip


def test_agreement_is_with_what_the_teacher_scored(evaluation: Evaluation, tmp_path: Path) -> None:
    """Three of the four documents it was given; the rest of its run only follows."""
    assert evaluation.fidelity is not None and evaluation.fidelity.depth == 3
    words = evaluation.fidelity.systems["words"]
    # The engine ranks copies 3 2 1 0, the teacher 3 0 1 (it says nothing of 2): of three pairs one stands wrong.
    assert words["kendall_tau"] == pytest.approx(1 / 3) and words["queries"] == 10
    assert words["overlap@10"] == 1.0 and words["not_retrieved"] == 0.0
    assert json.loads((tmp_path / "out" / "fidelity.json").read_text()) == evaluation.fidelity.to_json()
    assert "agreement with the teacher" in (tmp_path / "out" / "results.md").read_text()


def test_queries_that_are_documents_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By id and text: Cranfield's query 1 is not document 1."""
    folder = tmp_path / "c"
    (folder / "qrels").mkdir(parents=True)
    texts = {"d0": "why is the sky blue", "1": "wings", "d2": "light is scattered"}
    (folder / "corpus.jsonl").write_text("".join(f'{{"_id": "{i}", "text": "{t}"}}\n' for i, t in texts.items()))
    (folder / "queries.jsonl").write_text(
        '{"_id": "d0", "text": "Why is the sky blue"}\n{"_id": "1", "text": "which wings"}'
    )
    (folder / "qrels" / "test.tsv").write_text("d0\td2\t1\n1\t1\t1\n")
    run = Run.from_dict({"d0": {"d0": 2.0, "d2": 1.0}, "1": {"1": 1.0}})
    collection = open_collection(f"beir:{folder}")
    found = evaluate_systems({"a": run}, collection, "test", ["mrr@10"], 10, tmp_path / "a")
    assert found["a"].notes["self_documents"] == 1 and "drop_self_hits" in repr(found)
    assert "1 of 2 queries are documents of c (same id, same text)" in capsys.readouterr().err
    dropped = evaluate_systems({"a": run}, collection, "test", ["mrr@10"], 10, tmp_path / "b", drop_self_hits=True)
    assert not dropped["a"].notes["self_documents"] and "are documents" not in capsys.readouterr().err
