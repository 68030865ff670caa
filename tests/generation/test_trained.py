"""A generator that is fine-tuned once on labelled pairs, kept, and used on another collection."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from causal_lm import make_causal_lm

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.generation.trained import TrainedGenerator
from rankdistill.recipe import build

if TYPE_CHECKING:
    from rankdistill.collections import Collection

WORDS = ["metal", "gas", "bird", "tree", "planet", "animal"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The query for a document is always the same: what can be learned in a few steps."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "qrels").mkdir()
    lines = [(f"{number}", f"a {WORDS[number % 6]} document") for number in range(24)]
    documents = [json.dumps({"_id": f"d{i}", "title": "", "text": text}) for i, text in lines]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    queries = [json.dumps({"_id": f"q{i}", "text": "which animal"}) for i, _ in lines]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    judged = "".join(f"q{i}\td{i}\t1\n" for i, _ in lines)
    (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return open_collection(f"beir:{folder}")


def test_it_learns_to_write_what_it_was_shown_and_is_trained_once(
    labelled: Collection, tiny_collection: Collection, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "type": "trained",
        "backend": {"type": "transformers", "model": str(make_causal_lm(tmp_path / "lm"))},
        "collection": labelled.spec,
        "epochs": 24,
        "learning_rate": 3e-3,
        "per_document": 1,
        "temperature": 0,
        "max_tokens": 8,
    }
    texts = []
    for _ in range(2):
        generator = build("generator", settings)
        generator.asking.begin(tmp_path / "store")
        started = time.monotonic()
        generator.prepare(tiny_collection, tmp_path / "store")
        texts.append([draft.text for draft in generator.drafts(tiny_collection, [0, 5, 9])])
        took = time.monotonic() - started
    assert texts[0] == texts[1] == ["which animal"] * 3
    (folder,) = (tmp_path / "store" / "generators").glob("[!.]*/manifest.json")
    manifest = json.loads(folder.read_text())
    assert manifest["counts"]["pairs"] == 22 and manifest["loss"] < 0.5 and took < 60


def test_what_cannot_be_trained_is_refused(labelled: Collection, tmp_path: Path) -> None:
    server = {"type": "openai", "model": "m"}
    with pytest.raises(UsageError, match="behind a server is not trained here"):
        TrainedGenerator(server, labelled.spec)
    model = {"type": "transformers", "model": str(make_causal_lm(tmp_path / "lm"))}
    with pytest.raises(UsageError, match="are above 0"):
        TrainedGenerator(model, labelled.spec, pairs=0)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (bare / name).write_bytes((Path(labelled.spec.partition(":")[2]) / name).read_bytes())
    with pytest.raises(RankdistillError, match="there is no train split"):
        TrainedGenerator(model, f"beir:{bare}").prepare(labelled, tmp_path / "store")
