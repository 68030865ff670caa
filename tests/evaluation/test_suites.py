"""Suites: every shipped one loads, wrong ones teach, sets are found or named as missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.metrics import parse_metric
from rankdistill.evaluation.suites import (
    FOLDER,
    REFERENCE_FOLDER,
    EvaluationSet,
    Found,
    Missing,
    load_references,
    load_suite,
    locate,
)
from rankdistill.recipe import declarations, shipped


class Opened:
    """A collection's name and splits."""

    def __init__(self, spec: str, name: str = "facts", splits: tuple[str, ...] = ("test",)) -> None:
        self.spec, self.name, self.splits = spec, name, splits


def test_every_shipped_suite_loads_and_is_named_after_its_file() -> None:
    suites = {name: load_suite(name) for name in shipped(FOLDER)}
    assert {"quickstart", "collection", "beir", "msmarco_dev", "trec_dl", "nanobeir"} <= suites.keys()
    assert all(suite.name == name for name, suite in suites.items())
    beir = suites["beir"]
    assert len({one.group or one.name for one in beir.sets}) == 14  # the public sets of BEIR, CQADupStack as one
    assert [one.name for one in beir.sets if one.drop_self_hits] == ["arguana"]
    assert all(one.relevance_level == 2 for one in suites["trec_dl"].sets)
    nano = suites["nanobeir"].sets
    assert len(nano) == 13 and all(one.collection == f"hf:zeta-alpha-ai/{one.name}" for one in nano)


def test_beir_names_are_known_to_ir_datasets() -> None:
    registry = pytest.importorskip("ir_datasets").registry
    for suite in ("beir", "msmarco_dev", "trec_dl"):
        for one in load_suite(suite).sets:
            assert one.collection.removeprefix("ir_datasets:") in registry._registered, one.name


def test_every_reference_has_a_source_and_a_metric_that_exists() -> None:
    names = [one.name for suite in shipped(FOLDER) for one in load_suite(suite).sets]
    for path in declarations(REFERENCE_FOLDER).glob("*.yaml"):
        named = path.read_text().split("set: ")[1].split("\n")[0]
        assert named in names or named.startswith("macro:")
        figures = load_references(named)
        assert figures and all(figure.source for figure in figures)
        for figure in figures:
            for metric, value in figure.metrics.items():
                parse_metric(metric)
                assert all(0 < part < 1 for part in (value if isinstance(value, tuple) else (value,)))
    assert load_references("no such set") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nsets: [{name: a}]\nmetrix: [map]", "unknown key 'metrix'.*did you mean 'metrics'"),
        ("name: x\nsets: [{name: a, relevance_levels: 2}]", "unknown key 'relevance_levels'.*'relevance_level'"),
        ("name: x\nsets: [{name: a}]\nmetrics: [ndgc@10]", "ndgc@10.*did you mean ndcg@10"),
        ("name: x\nsets: []", "sets"),
        ("name: x\nsets: [{name: a}, {name: a}]", "two sets have the same name"),
        ("name: x\nsets: [{name: a, relevance_level: 0}]", "relevance_level"),
        ("name: x\nsets: [{name: a}]\nbase_line: BM25", "unknown key 'base_line'.*did you mean 'baseline'"),
        ("name: x\nsets: [{name: a}]\ncorrection: bonferroni", "correction"),
        ("name: x\nsets: [{name: a}]\nalpha: 2", "alpha"),
        ("name: x\nsets: [{name: a}]\nalpha: .nan", "no number"),
        ("name: .\nsets: [{name: a}]", "would be a path"),
        ("name: x\nsets: [{name: ../a}]", "would be a path"),
        ("name: x\nsets: [{name: a b}, {name: a-b}]", "differ in signs"),
    ],
)
def test_a_wrong_suite_names_the_key_and_the_nearest_right_one(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        load_suite(path)
    with pytest.raises(UsageError, match="beir"):
        load_suite("bier")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("corpus.jsonl", "beir"),
        ("collection.tsv.gz", "msmarco"),
        ("corpus/train-00000-of-00001.parquet", "hf"),
        ("corpus.parquet", "hf"),
    ],
)
def test_a_local_folder_comes_before_the_own_collection_and_the_declared_one(
    tmp_path: Path, file: str, kind: str
) -> None:
    path = tmp_path / "facts" / file
    path.parent.mkdir(parents=True)
    path.touch()
    own, facts = Opened("beir:/elsewhere/facts"), EvaluationSet(name="facts", collection="ir_datasets:beir/facts")

    def place(**options: Any) -> Any:
        found = locate(facts, opener=lambda spec: Opened(spec, splits=("train",)), **options)
        assert isinstance(found, Found)
        return found.collection.spec, found.split

    assert place(own=own, local=tmp_path) == (f"{kind}:{tmp_path / 'facts'}", "train")
    assert place(own=own) == (own.spec, "test")
    assert place() == ("ir_datasets:beir/facts", "train")


def test_missing_sets_have_a_reason(tmp_path: Path) -> None:
    def offline(spec: str) -> Any:
        raise RankdistillError(f"{spec} cannot be reached")

    facts = EvaluationSet(name="facts", collection="ir_datasets:beir/facts")
    assert locate(facts, opener=offline) == Missing("ir_datasets:beir/facts cannot be reached")
    found = locate(facts, local=tmp_path, fetch=False, opener=offline)
    assert isinstance(found, Missing) and "no folder" in found.reason and "fetching is off" in found.reason
    assert isinstance(locate(EvaluationSet(name="mine", collection="own"), opener=offline), Missing)
    train_only = Opened("x", splits=("train", "dev"))
    missing = locate(facts, opener=lambda _: train_only)
    assert isinstance(missing, Missing) and "no judgments for the split 'test' (it has train, dev)" in missing.reason
    assert locate(facts, opener=lambda _: Opened("x", splits=("dev.small",)))[1] == "dev.small"
