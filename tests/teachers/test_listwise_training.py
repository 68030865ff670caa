"""Training a listwise ranker: what the loss is, and that a small model learns a planted order by it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm import make_causal_lm
from scipy.stats import kendalltau
from torch.nn import functional

from rankdistill.artifacts import Artifact
from rankdistill.collections import Collection, open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.losses.ranknet import RankNet
from rankdistill.teachers.listwise_training import (
    Collator,
    ListwiseTraining,
    Window,
    Windows,
    first_loss,
    read_orders,
    train_listwise,
)
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.llm.prompts import load_prompt

# What each passage is worth falls from left to right: all that there is to learn.
WORTH = "planet bird gas tree metal animal which yes document no true query false user".split()
PROMPT = """
kind: listwise
identifiers: letters
before: "{query}\\n"
passage: "[{identifier}] {passage}\\n"
"""


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompt") / "short.yaml"
    path.write_text(PROMPT)
    return str(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """A document for each word, and queries that say nothing."""
    folder = tmp_path_factory.mktemp("planted") / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d-{word}", "title": "", "text": word}) + "\n" for word in WORTH)
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q-{n}", "text": "rank"}) + "\n" for n in range(40))
    )
    lines = "".join(f"q-{n}\td-planet\t1\n" for n in range(40))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return open_collection(f"beir:{folder}")


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's run: ten documents a query in the planted order."""
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("orders") / "teacher.trec"
    with open(path, "w") as stream:
        for number in range(40):
            chosen = sorted(chance.sample(range(len(WORTH)), 10))
            for rank, at in enumerate(chosen, start=1):
                stream.write(f"q-{number} Q0 d-{WORTH[at]} {rank} {100 - rank} t\n")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("start"), spread=0.05)


def kendall(model: Path, prompt: str) -> float:
    """How far the one-step order of six words, none shown in training so, is the planted one: mean over 60 windows."""
    chance, template = random.Random(1), load_prompt(prompt)
    backend = TransformersBackend(str(model), precision="fp32", batch_size=30)
    shown = [chance.sample(range(len(WORTH)), 6) for _ in range(60)]
    asked = [template.render("rank", [WORTH[at] for at in window], decoding="first") for window in shown]
    found = []
    for number, answer in backend.answer(enumerate(asked)):
        assert answer.logits is not None
        found.append(kendalltau([-at for at in shown[number]], list(answer.logits.values())).statistic)
    return float(np.mean(found))


def train(
    start: Path, planted: Collection, orders: Path, prompt: str, out: Path, window: int = 6, seed: int = 1, **changes: Any
) -> Artifact:
    settings = {"steps": 120, "batch_size": 16, "accumulation": 1, "learning_rate": 5e-3, "noise": 0.0}
    return train_listwise(
        str(start),
        planted,
        out,
        {"orders": str(orders), "precision": "fp32", **settings, **changes},
        prompt=prompt,
        window=window,
        passage_tokens=4,
        device="cpu",
        seed=seed,
    )


def test_first_orders_better_than_text_alone(
    start: Path, planted: Collection, orders: Path, prompt: str, tmp_path: Path
) -> None:
    """Equal steps, batches and seed; what is measured is the order that one step gives."""
    joint = train(start, planted, orders, prompt, tmp_path / "joint")
    alone = train(start, planted, orders, prompt, tmp_path / "alone", ranking_weight=0.0)
    before, text, first = (kendall(path, prompt) for path in (start, alone.path / "model", joint.path / "model"))
    print("tau", before, text, first, joint.counts, alone.counts)
    assert 0
