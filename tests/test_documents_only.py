"""From a folder of documents, without queries and judgments, through the whole program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import run

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.compare import compare
from rankdistill.evaluation.evaluate import evaluate_systems
from rankdistill.evaluation.report import report
from rankdistill.evaluation.search_page import Column, SearchPage
from rankdistill.recipe import load_recipe
from rankdistill.runs import Run
from rankdistill.stages import Workspace

SYNTHETIC = "synthetic queries, one document each counts as relevant"


@pytest.fixture(scope="module")
def facts(tiny_beir: Path) -> list[tuple[str, str, str]]:
    """(name, fact, a question about it)."""
    corpus, queries = (
        [json.loads(line) for line in (tiny_beir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("corpus", "queries")
    )
    documents = [record for record in corpus if record["_id"].startswith("d-")]
    return [(each["title"], each["text"], query["text"]) for each, query in zip(documents, queries, strict=True)]


@pytest.fixture(scope="module")
def folder(facts: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Markdown file a fact, the first of two passages."""
    place = tmp_path_factory.mktemp("own") / "notes"
    place.mkdir()
    for name, text, _ in facts:
        (place / f"{name}.md").write_text(
            f"# {name}\n\n{text}\n\nWhat {name} costs is another matter. It changes a lot."
        )
    return place


def changes(folder: Path, encoder: Path) -> list[str]:
    """The shipped recipe with a tiny encoder, in few steps."""
    model = f"model: {encoder}"
    return [
        f"collection={folder}?words=12",
        f"candidates.sources=[{{type: dense, {model}, quota: 3}}, {{type: bm25, quota: 3}}]",
        f"teacher={{type: bi_encoder, {model}}}",
        f"student={{type: dense, {model}, layers: [0], warm_up: {{steps: 2, batch_size: 4}}}}",
        "training.steps=4",
        "training.device=cpu",
        "evaluation.latency_queries=0",
        "evaluation.extrapolation=null",
    ]


@pytest.fixture(scope="module")
def mine(folder: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe documents_only."""
    place = tmp_path_factory.mktemp("mine")
    sets = [part for change in changes(folder, tiny_encoder) for part in ("--set", change)]
    ending = run("run", "documents_only", *sets, "--out", place / "run", "--store", place / "store", folder=place)
    assert ending.code == 0, ending.err
    (place / "out").write_text(ending.out)
    return place


def test_a_run_says_that_nothing_was_measured(mine: Path) -> None:
    printed = " ".join((mine / "out").read_text().split())
    assert "sets not evaluated" in printed and "rankdistill generate" in printed and "serve" in printed
    results = json.loads((mine / "run/evaluation/collection/results.json").read_text())
    assert results["sets"] == [] and results["macro"] == {} and "no judgments" in results["missing"][0]["reason"]
    page = report(mine / "run").read_text()
    assert "Nothing was measured: there are no judgments to measure with." in page
    again = run("evaluate", mine / "run", folder=mine)
    assert again.code == 0 and "no judgments" in again.out + again.err


def test_titles_are_the_queries_of_first_passages_alone(mine: Path, facts: list[tuple[str, str, str]]) -> None:
    collection = Workspace(mine / "run").collection
    texts = set(collection.further.values())
    assert {name for name, _, _ in facts} <= texts and collection.document_count > len(facts)
    assert "What iron costs is another matter." in texts  # a later passage's first sentence


def test_search_finds_documents_by_their_best_passage(mine: Path) -> None:
    ending = run("search", mine / "run", "what iron costs", "-k", "5", "--json", folder=mine)
    assert ending.code == 0, ending.err
    results = json.loads(ending.out)
    assert len({hit["doc_id"] for hit in results}) == 5 and all("#" not in hit["doc_id"] for hit in results)
    assert all(hit["passage"].startswith(hit["doc_id"] + "#") for hit in results)
    assert [hit["score"] for hit in results] == sorted((hit["score"] for hit in results), reverse=True)


def test_the_search_page_shows_a_document_once_and_with_one_passage(mine: Path) -> None:
    workspace = Workspace(mine / "run", store=mine / "store")
    columns = [Column("BM25", workspace.bm25()), Column("student", workspace.engine())]
    answer = SearchPage(workspace.documents, columns).search("what iron costs, and gold", 8)
    assert "collection" not in vars(workspace)  # to search, no query is made of any document
    bm25, student = ([hit["doc_id"] for hit in column["hits"]] for column in answer["columns"])
    assert set(bm25[:2]) == {"iron.md", "gold.md"} and len(set(student)) == 8
    assert answer["documents"].keys() == {*bm25, *student}
    assert answer["documents"]["iron.md"]["ranks"].keys() == {"bm25", "student"}


def test_what_needs_labels_says_what_to_do(folder: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    ending = run("mine", folder, "--out", tmp_path / "candidates", folder=tmp_path)
    assert ending.code == 1 and "rankdistill generate" in ending.err and "unlabelled: titles" in ending.err
    recipe = load_recipe({"collection": str(folder), "student": {"type": "dense", "model": str(tiny_encoder)}})
    with pytest.raises(UsageError, match=r"no train split[\s\S]*unlabelled: queries[\s\S]*rankdistill generate"):
        Workspace(tmp_path / "run", recipe).train()


def test_a_split_that_is_not_there_does_not_end_a_run(tiny_beir: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Judgments, but none to test with: known when all is trained, so said and no failure."""
    place = tmp_path / "facts"
    (place / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        (place / name).write_bytes((tiny_beir / name).read_bytes())
    sets = [f"collection={place}", *changes(place, tiny_encoder)[1:], "candidates.unlabelled=null"]
    found = Workspace(tmp_path / "run", load_recipe("documents_only", sets), tmp_path / "store").run()
    assert found is not None and found.sets == []
    assert "no judgments for the split 'test' (it has train)" in found.missing[0]["reason"]


# ---------------------------------------------------------------------------------------------------------------------
# Judgments of documents, and synthetic ones


def judged(tmp_path: Path, split: str) -> Path:
    place = tmp_path / "judged"
    (place / "qrels").mkdir(parents=True)
    for name in ("a", "b", "c"):
        words = " ".join(f"{name}{number}" for number in range(11))
        (place / f"{name}.txt").write_text(f"{words}. {words}.\n\nEnd.")
    (place / "queries.jsonl").write_text('{"_id": "q", "text": "a0"}\n')
    (place / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb.txt\t1\nq\tgone.txt\t1\n")
    return place


def test_a_ranking_of_passages_is_measured_as_one_of_documents(tmp_path: Path) -> None:
    place = judged(tmp_path, "test")
    collection = open_collection(f"{place}?words=12")
    ranked = {"q": {"a.txt#2": 9.0, "a.txt#1": 8.0, "b.txt#2": 7.0, "b.txt#1": 6.0, "c.txt#1": 5.0}}

    class Engine:
        def search(self, queries: list[str], k: int) -> list[Any]:
            from rankdistill.indexes.base import Hits

            rows = collection.doc_rows(list(ranked["q"]))[:k]
            return [Hits(rows, np.array(list(ranked["q"].values()), np.float32)[:k]) for _ in queries]

    from rankdistill.evaluation.systems import EngineSystem

    systems = {"run": Run.from_dict(ranked), "engine": EngineSystem(Engine())}
    found = evaluate_systems(systems, collection, "test", ["mrr@10", "recall@2", "ndcg@10"], out=tmp_path / "out")
    # b is second of the documents a, b, c; of two relevant documents one is here.
    for system in ("run", "engine"):
        means = found[system].means
        assert means["mrr@10"] == 0.5 and means["recall@2"] == 0.5
        assert means["ndcg@10"] == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))
        written = [line.split()[2] for line in (tmp_path / "out" / found[system].run).read_text().splitlines()]
        assert written == ["a.txt", "b.txt", "c.txt"]
    compared = compare([tmp_path / "out" / found["run"].run], collection=collection, metrics=["mrr@10"])
    assert compared.rows[0].means == {"mrr@10": 0.5}

    alone = open_collection(f"{place}?words=12&by=passage")
    passages = evaluate_systems({"run": Run.from_dict(ranked)}, alone, "test", ["mrr@10"], out=tmp_path / "alone")
    assert passages["run"].means["mrr@10"] == pytest.approx(1 / 3)  # the third passage


def test_figures_of_synthetic_queries_are_marked(
    facts: list[tuple[str, str, str]], folder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """A collection whose only judgments to test with were generated: everything that shows a number says so."""
    place = tmp_path / "notes"
    (place / "qrels").mkdir(parents=True)
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    asked = [(f"q-{name}", question, f"{name}.md") for name, _, question in facts]
    (place / "queries.jsonl").write_text("".join(json.dumps({"_id": q, "text": t}) + "\n" for q, t, _ in asked))
    (place / "qrels/generated-test.tsv").write_text("".join(f"{q}\t{doc_id}\t1\n" for q, _, doc_id in asked))
    workspace = Workspace(tmp_path / "run", load_recipe("documents_only", changes(place, tiny_encoder)), tmp_path / "s")
    found = workspace.run()
    assert found is not None and [each.name for each in found.sets] == [f"notes: {SYNTHETIC}"]
    assert found.sets[0].split == "generated-test" and found.macro == {}
    assert SYNTHETIC in found.sets[0].tables()[0].title
    assert SYNTHETIC in (tmp_path / "run/evaluation/collection/results.md").read_text()
    assert f"on notes: {SYNTHETIC}" in report(tmp_path / "run").read_text()
    assert SYNTHETIC in compare([tmp_path / "run"]).tables()[0].title


def test_of_an_own_and_other_sets_synthetic_ones_are_not_averaged(tmp_path: Path) -> None:
    from rankdistill.evaluation.evaluate import evaluate_suite
    from rankdistill.evaluation.suites import Suite

    own = open_collection(str(judged(tmp_path / "one", "generated-test")))
    other = open_collection(str(judged(tmp_path / "two", "test")))
    suite = Suite.model_validate(
        {
            "name": "two",
            "metrics": ["mrr@10"],
            "sets": [{"name": "own", "collection": "own"}, {"name": "o", "collection": other.spec}],
        }
    )
    ranked = Run.from_dict({"q": {"b.txt#1": 1.0}})
    found = evaluate_suite(suite, lambda *_: {"run": ranked}, tmp_path / "out", own=own)
    assert [each.name for each in found.sets] == [f"judged: {SYNTHETIC}", "o"]
    assert found.macro == {"run": {"mrr@10": 1.0}} and found.macro_sets == 1


def test_foreign_sets_that_are_absent_are_still_an_error(mine: Path) -> None:
    with pytest.raises(RankdistillError, match="no set of the suite"):
        Workspace(mine / "run").evaluate("beir", fetch=False, out=mine / "beir")
