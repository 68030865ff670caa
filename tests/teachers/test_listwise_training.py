"""Training a listwise ranker: what the loss is, and that a small model learns a planted order by it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm import make_causal_lm
from safetensors.torch import load_file
from scipy.stats import kendalltau
from torch.nn import functional

from rankdistill.collections import Collection, open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.losses.pairwise import RankNet
from rankdistill.recipe import build
from rankdistill.scores.lists import build_lists
from rankdistill.teachers.base import TextList
from rankdistill.teachers.listwise_training import (
    Collator,
    Window,
    Windows,
    first_loss,
    read_orders,
    train_listwise,
)
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.llm.prompts import load_prompt

# What each passage is worth falls from left to right: all that there is to learn.
WORTH = ["planet", "bird", "gas", "tree", "metal", "animal", "which", "document"]
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
    """A teacher's run: six documents a query in the planted order, with scores that mean nothing."""
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("orders") / "teacher.trec"
    with open(path, "w") as stream:
        for number in range(40):
            chosen = sorted(chance.sample(range(len(WORTH)), 6))
            for rank, at in enumerate(chosen, start=1):
                stream.write(f"q-{number} Q0 d-{WORTH[at]} {rank} {100 - rank} t\n")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("start"), spread=0.05)


def kendall(model: Path, prompt: str) -> float:
    """How far the one-step order of four words is the planted one: Kendall's tau, mean over 60 windows."""
    chance, template = random.Random(1), load_prompt(prompt)
    backend = TransformersBackend(str(model), precision="fp32", batch_size=30)
    shown = [chance.sample(range(len(WORTH)), 4) for _ in range(60)]
    asked = [template.render("rank", [WORTH[at] for at in window], decoding="first") for window in shown]
    found = []
    for number, answer in backend.answer(enumerate(asked)):
        assert answer.logits is not None
        found.append(kendalltau([-at for at in shown[number]], list(answer.logits.values())).statistic)
    return float(np.mean(found))


Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(start: Path, planted: Collection, orders: Path, prompt: str) -> Train:
    """Trains a model at `out`; what it came to."""

    def run(out: Path, model: Path = start, orders: Path = orders, **changes: Any) -> dict[str, Any]:
        settings = {"steps": 80, "batch_size": 16, "accumulation": 1, "learning_rate": 5e-3, "noise": 0.0}
        settings = {"orders": str(orders), "precision": "fp32", **settings, **changes}
        shape: dict[str, Any] = {"prompt": prompt, "window": 4, "passage_tokens": 4}
        return train_listwise(str(model), planted, out, settings, **shape, device="cpu", seed=1)

    return run


def test_first_orders_better_than_text_alone(start: Path, prompt: str, train: Train, tmp_path: Path) -> None:
    """Equal steps, batches and seed; what is measured is the order that one step gives."""
    joint = train(tmp_path / "joint")
    alone = train(tmp_path / "alone", ranking_weight=0.0)
    before, text, first = (kendall(path, prompt) for path in (start, tmp_path / "alone", tmp_path / "joint"))
    assert before < 0.2
    assert first > 0.45 and first > text + 0.25
    assert joint["orders"] == 40 and joint["steps"] == alone["steps"] == 80


def test_what_is_saved_is_an_ordinary_model(start: Path, train: Train, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tmp_path / "out" / "model", steps=2, batch_size=2, accumulation=2, noise=5.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").chat_template and model.config.use_cache
    old = AutoModelForCausalLM.from_pretrained(start).state_dict()
    assert any(not torch.equal(weight, old[name]) for name, weight in model.state_dict().items())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_a_batch_that_memory_does_not_hold_is_trained_in_smaller_parts(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.nn.modules.module import register_module_full_backward_hook

    sizes: list[int] = []

    def check(module: torch.nn.Module, _: Any, given: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            sizes.append(len(given[0]))
            if len(sizes) > 10 and sizes[-1] > 1:  # in the second of an accumulated step
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    settings = {"steps": 8, "batch_size": 3, "accumulation": 2}
    plain = train(tmp_path / "plain", **settings)
    handle = register_module_full_backward_hook(check)
    try:
        small = train(tmp_path / "small", **settings)
    finally:
        handle.remove()
    assert set(sizes[:10]) == {3} and set(sizes[-6:]) == {1}
    assert capsys.readouterr().err.count("does not hold a batch") == 1
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "small"))
    for name, weight in expected.items():
        torch.testing.assert_close(weight, weights[name], atol=1e-3, rtol=1e-2)
    for name in ("text_loss", "ranking_loss"):
        assert small[name] == pytest.approx(plain[name], abs=2e-3)


def test_adapters_are_merged_and_need_an_extra(
    start: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)  # as if it were not installed
        with pytest.raises(RankdistillError, match="peft") as caught:
            train(tmp_path / "none", steps=1, lora={})
        assert "rankdistill[llm]" in str(caught.value.fix)
    pytest.importorskip("peft")
    lora = {"rank": 2, "layers": ["q_proj"], "dropout": 0.0}
    train(tmp_path / "model", steps=2, batch_size=2, lora=lora, learning_rate=0.1)
    old, new = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "model"))
    assert set(new) == set(old)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "q_proj" in name}
    assert all(torch.linalg.matrix_rank(new[name] - old[name]) <= 2 for name in changed)


def test_a_listwise_teacher_trains_its_model(
    start: Path, planted: Collection, orders: Path, prompt: str, tmp_path: Path
) -> None:
    settings = {
        "type": "listwise",
        "backend": {"type": "transformers", "model": str(start), "precision": "fp32", "device": "cpu"},
        "prompt": prompt,
        "decoding": "first",
        "signal": "logits",
        "window": 4,
        "step": 2,
        "passage_tokens": 4,
        "train": {"orders": str(orders), "steps": 2, "batch_size": 2, "precision": "fp32", "learning_rate": 1e-2},
    }
    teacher = build("teacher", settings)
    teacher.asking.begin(tmp_path / "store")
    assert teacher.needs_training
    with pytest.raises(RankdistillError, match="trained before"):
        teacher.fingerprint()
    copy = tmp_path / "orders.trec"
    copy.write_bytes(orders.read_bytes())
    moved = build("teacher", {**settings, "train": {**settings["train"], "orders": str(copy)}})  # type: ignore[dict-item]
    assert moved.training_inputs() == teacher.training_inputs()  # what they are, not where
    assert teacher.train(planted, [], tmp_path / "model", seed=3)["orders"] == 40
    assert not teacher.needs_training
    untrained = build("teacher", {key: value for key, value in settings.items() if key != "train"})
    assert teacher.fingerprint() != untrained.fingerprint()
    item = TextList("q", "rank", [f"d-{word}" for word in WORTH], WORTH)
    ((_, doc_ids, scores),) = teacher.score([item])
    untrained.asking.begin(tmp_path / "store")
    ((_, _, before),) = untrained.score([item])
    assert doc_ids == item.doc_ids and not np.allclose(scores, before)
    moved.use_trained(tmp_path / "model")
    assert moved.fingerprint() == teacher.fingerprint()
    with pytest.raises(UsageError, match="not trained here"):
        build("teacher", {**settings, "backend": {"type": "openai", "model": "x", "base_url": "http://127.0.0.1:1/v1"}})


# ---------------------------------------------------------------------------------------------------------------------


def batch(start: Path, prompt: str, windows: Sequence[Window]) -> tuple[Collator, dict[str, torch.Tensor]]:
    from rankdistill.teachers.llm.chat import Chat, load_tokenizer

    collate = Collator(Chat(load_tokenizer(start)), load_prompt(prompt), passage_tokens=4, context=2048)
    return collate, collate(windows)


WINDOWS = [
    Window("rank", ["tree", "planet", "gas"], np.array([-2.0, 0.0, -1.0], dtype=np.float32)),
    Window("rank which", ["which", "bird", "gas", "metal"], np.array([-3.0, 0.0, -1.0, -2.0], dtype=np.float32)),
]


def test_the_answer_is_the_teacher_s_order(start: Path, prompt: str) -> None:
    collate, made = batch(start, prompt, WINDOWS)
    tokenizer = collate.chat.tokenizer
    texts = tokenizer.batch_decode(made["input_ids"], skip_special_tokens=False)
    assert texts[0].endswith("<|assistant|>[B] > [C] > [A]<|end|>")
    assert texts[1].endswith("<|assistant|>[B] > [C] > [D] > [A]<|end|>")
    assert texts[0].startswith("<|pad|>") and not made["attention_mask"][0, 0]
    assert [tokenizer.decode([token]) for token in made["identifiers"][1].tolist()] == ["A", "B", "C", "D"]
    assert made["mask"].tolist() == [[True, True, True, False], [True] * 4]


def test_the_loss_against_one_window_at_a_time(start: Path, prompt: str) -> None:
    """Text loss and ranking loss of a padded batch, from the plain pass over each window's own tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start)
    collate, made = batch(start, prompt, WINDOWS)
    attention = made.pop("attention_mask")
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(made.pop("input_ids"), attention_mask=attention, position_ids=positions).logits
        text, ranks = first_loss(logits[:, -made["answers"].shape[1] - 1 :], **made, ranking=RankNet("rank"))
        said, pairs, weights = [], 0.0, 0.0
        for window in WINDOWS:
            ids, answer, names = collate.example(window)
            plain = model(torch.tensor([ids + answer])).logits[0]
            said.append(functional.cross_entropy(plain[len(ids) - 1 : -1], torch.tensor(answer), reduction="none"))
            scores = plain[len(ids) - 1, names].tolist()
            order = np.argsort(-window.scores)
            for i in range(len(order)):
                for j in range(i + 1, len(order)):
                    weight = 1 / (i + 1 + j + 1)
                    pairs += weight * np.log1p(np.exp(scores[order[j]] - scores[order[i]]))
                    weights += weight
    assert float(text) == pytest.approx(float(torch.cat(said).mean()), abs=1e-5)
    assert float(ranks) == pytest.approx(pairs / weights, abs=1e-5)


def test_the_teacher_s_scores_get_no_gradient() -> None:
    logits, teacher = torch.randn(1, 3, 9, requires_grad=True), torch.tensor([[2.0, 1.0]], requires_grad=True)
    answers, names = torch.tensor([[4, 5]]), torch.tensor([[4, 6]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    text, ranks = first_loss(logits, answers, torch.tensor([2]), names, teacher, mask, RankNet("rank"))
    (gradient,) = torch.autograd.grad(ranks, logits, retain_graph=True)
    (text + ranks).backward()
    assert teacher.grad is None and logits.grad is not None
    # The ranking is read where the first identifier is due, and nowhere else.
    assert gradient[0, 0, [4, 6]].abs().min() > 0 and not gradient[0, 1:].any()


def test_windows_are_drawn_by_seed_and_place() -> None:
    orders = [
        (lambda n=n: Window(f"q{n}", [f"{n}-{at}" for at in range(7)], -np.arange(7, dtype=np.float32)))
        for n in range(5)
    ]
    made = [Windows(orders, 15, 4, seed)[at] for seed in (1, 1, 2) for at in range(15)]
    first, again, other = made[:15], made[15:30], made[30:]
    assert [w.passages for w in first] == [w.passages for w in again] != [w.passages for w in other]
    for lap in range(3):  # each order once a lap
        assert sorted(w.query for w in first[5 * lap : 5 * lap + 5]) == [f"q{n}" for n in range(5)]
    for window in first:
        assert len(set(window.passages)) == 4
        assert [float(-score) for score in window.scores] == [int(text.split("-")[1]) for text in window.passages]
    assert len({tuple(w.passages) for w in first if w.query == "q0"}) == 3


def test_orders_of_a_run_are_its_ranks_and_those_of_scored_lists_keep_ties(
    planted: Collection, orders: Path, tmp_path: Path
) -> None:
    for _, doc_ids, scores in read_orders(orders, planted):
        worth = [WORTH.index(doc_id.removeprefix("d-")) for doc_id in doc_ids]
        assert worth == sorted(worth) and scores.tolist() == [-at for at in range(6)]
    known = {"d-gas": 1.0, "d-bird": 3.0, "d-tree": 1.0}
    score = lambda query_id, doc_ids: np.array([known[doc_id] for doc_id in doc_ids], dtype=np.float32)  # noqa: E731
    build_lists([("q-0", list(known), np.zeros(3))], score, planted, "train", tmp_path / "lists")
    ((query_id, doc_ids, scores),) = read_orders(tmp_path / "lists", planted)
    assert (query_id, doc_ids, scores.tolist()) == ("q-0", ["d-bird", "d-gas", "d-tree"], [3.0, 1.0, 1.0])


def test_what_cannot_be_trained_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.trec"
    foreign.write_text("q-0 Q0 d-gas 1 2 t\nq-0 Q0 x 2 1 t\nelse Q0 d-gas 1 2 t\nelse Q0 d-bird 2 1 t\n")
    short = make_causal_lm(tmp_path / "short", max_position_embeddings=40)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"orders": tmp_path / "none.trec"}, UsageError, "no orders here"),
        ({"orders": foreign}, RankdistillError, "no order"),
        ({"ranking_weight": 0, "text_weight": 0}, UsageError, "weight of 0"),
        ({"model": short}, UsageError, "more than the 40 tokens"),
        ({"noisy": 1}, ValueError, "noisy"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            train(tmp_path / "out", **changes)
    said = capsys.readouterr().err
    assert "1 documents are not in" in said and "1 queries are not in" in said and "1 orders of fewer" in said
