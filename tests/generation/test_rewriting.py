"""Training queries written again: what is kept of them, whose labels they have, and the alarm for leaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from llm_server import Server, completion

from rankdistill.generation.base import Draft
from rankdistill.generation.rewriting import Rewritten, is_ambiguous, leak
from rankdistill.recipe import load_recipe
from rankdistill.stages import Workspace

if TYPE_CHECKING:
    from rankdistill.collections import Collection

PASSAGE = (
    "The Battle of Hastings was fought on 14 October 1066 between the Norman army of William and the English army."
)


def rewrite(body: dict[str, Any], _: int) -> dict[str, Any]:
    typed = re.search("A user typed: (.*)", body["messages"][-1]["content"]).group(1)  # type: ignore[union-attr]
    return completion(f"exactly {typed}, please", body)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(rewrite)
    yield server
    server.close()


@pytest.mark.parametrize("mix", [True, False])
def test_rewrites_have_their_originals_labels(
    mix: bool, tiny_collection: Collection, server: Server, tmp_path: Path
) -> None:
    backend = {"type": "openai", "model": "m", "base_url": server.url, "retries": 0}
    generator = {"type": "rewriting", "backend": backend, "queries": "all", "mix": mix}
    values = {"collection": tiny_collection.spec, "student": {"type": "dense"}, "generate": {"generator": generator}}
    workspace = Workspace(tmp_path, load_recipe(values), tmp_path / "store")
    artifact = workspace.generate()
    rows = pq.read_table(artifact.path / "queries.parquet").to_pylist()
    train = tiny_collection.qrels("train")
    assert {row["original_id"] for row in rows} == set(train) and len(server.bodies) == len(train)
    kept = [row for row in rows if row["kept"]]
    assert kept and all(0 < row["rank_rewrite"] <= row["rank_original"] for row in kept)
    qrels = workspace.collection.qrels("generated")
    assert all(qrels[row["query_id"]] == train[row["original_id"]] for row in kept)
    originals = train.keys() if mix else train.keys() - {row["original_id"] for row in kept}
    assert qrels.keys() == {row["query_id"] for row in kept} | originals
    ids, dev, judged = workspace.queries
    assert set(ids) == qrels.keys() and (dev, judged) == (tiny_collection.query_ids("dev"), "dev")
    assert artifact.manifest["shared_words"]["before"] > 0
    assert workspace.mine()[0].counts["queries"] == len(qrels)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("when was the battle of Hastings 1066", ""),
        ("", "empty"),
        ("Hastings 1066", "unchanged"),
        ("when was the battle of Hastings", "loses a name or a number"),
        ("what the passage says of Hastings 1066", "about the passage"),
        ("Hastings 1066 fought on 14 October 1066 between the Norman army of William", "copied"),
        ("Hastings 1066 " + "battle " * 30, "length"),
    ],
)
def test_what_a_rewrite_may_not_do(text: str, reason: str) -> None:
    draft = Draft(text, "d", original_id="q")
    Rewritten({"d": PASSAGE}, {"q": "hastings 1066"})([draft])
    assert draft.reason == reason


def test_short_queries_are_ambiguous() -> None:
    assert is_ambiguous("hastings") and is_ambiguous("who won at hastings in the end")
    assert not is_ambiguous("which army fought against William near Hastings")


def test_a_leak_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    texts, originals = {"d": PASSAGE}, {"q": "hastings"}
    assert leak([Draft("hastings war", "d", original_id="q")], texts, originals) == {"before": 1.0, "after": 1.0}
    assert not capsys.readouterr().err
    quoted = Draft("battle of hastings of the norman army", "d", original_id="q")
    assert leak([quoted], texts, originals) == {"before": 1.0, "after": 6.0}
    assert "may give the answer away" in capsys.readouterr().err
