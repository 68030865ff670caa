"""Training: it learns, it can be stopped at any moment and goes on exactly, and what it saves is what it says."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from forked import Forked
from safetensors.torch import save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_full_backward_hook
from trainings import Stop, assert_same_weights, log, logged, resumed, stop_at, weights

from rankdistill.errors import RankdistillError
from rankdistill.recipe import build, check_recipe
from rankdistill.training import trainer as trainer_module
from rankdistill.training.batches import BatchStream
from rankdistill.training.checkpoints import STATE, WEIGHTS, averaged, copy_of, last_checkpoint, load_mix
from rankdistill.training.dev import AGREEMENT, Agreement, DevPool
from rankdistill.training.distiller import Distiller
from rankdistill.training.trainer import fit_scale, train_student

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists

MakeRecipe = Callable[..., "Recipe"]
Train = Callable[..., "Artifact"]


@pytest.fixture(scope="module")
def undisturbed(train: Train, dev_pool: DevPool, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The training of these tests, run through: 12 steps, a checkpoint every 3, dropout on."""
    artifact = train(tmp_path_factory.mktemp("undisturbed") / "student", dev=dev_pool)
    values = artifact.manifest["dev"]
    assert int(max(values, key=values.get)) >= 6  # a trained student, or the tests below would compare little
    return artifact


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_two_trainings_are_the_same_bit_for_bit(
    undisturbed: Artifact, train: Train, dev_pool: DevPool, tmp_path: Path
) -> None:
    assert_same_weights(train(tmp_path / "student", dev=dev_pool), undisturbed)
    # Dropout is on: another seed of the same data takes another way.
    other = weights(train(tmp_path / "other", seed=43))
    assert any((other[name] != value).any() for name, value in weights(undisturbed).items())


RAMPS = {"weight": {"end": 1.0, "over": 0.5}, "temperature": {"start": 4.0, "end": 1.0, "shape": "cosine"}}
# What is kept of the course of a training beside weights: TAID's lambda and momentum, weights by difficulty, ramps;
# λ of regularisers that reach for a target; samplers, the batch teacher, averages, mixes; a table of query weights.
COURSES: dict[str, dict[str, Any]] = {
    "course": {
        "losses": [{"type": "taid", "rate": 0.2, "momentum": 0.5}, {"type": "kl", **RAMPS}],
        "weighting": {"type": "difficulty"},
        "accumulation": 2,
    },
    "batch teacher": {
        "batches": {"type": "topic_batches", "size": 3, "clusters": 2, "model": "ENCODER"},
        "lists": {"type": "balanced_pairs", "size": 3},
        "losses": [{"type": "margin_mse"}, {"type": "in_batch_margin_mse"}],
        "batch_teacher": {"type": "dense", "model": "ENCODER", "similarity": "cos", "precision": "fp32"},
    },
    "mixes": {"average": 3, "interpolate": [0.5, 0.75]},
    "regularisers": {
        "losses": [
            {"type": "margin_mse"},
            *({"type": name, "side": "document", "target": 20, "ramp": 0.5} for name in ("df_flops", "idf_flops")),
        ],
        "accumulation": 2,
        "student": {"type": "splade", "dropout": 0.0},
    },
}


@pytest.mark.parametrize("course", COURSES)
def test_a_stopped_training_goes_on_exactly(
    course: str, train: Train, dev_pool: DevPool, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first checkpoint, and at two random steps: the same weights, log and figures."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    changes = json.loads(json.dumps(COURSES[course]).replace("ENCODER", str(tiny_encoder)))
    changes["dev"] = dev_pool if course == "mixes" else None
    whole = train(tmp_path / "whole" / "student", **changes)
    steps = {2, *random.Random(seed).sample(range(4, 12), 2)}
    stopped = resumed(lambda: train(tmp_path / "stopped" / "student", **changes), monkeypatch, steps)
    assert_same_weights(stopped, whole)
    timed = ("epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    first, second = (
        {(entry["step"], name): value for entry in log(artifact) for name, value in entry.items() if name not in timed}
        for artifact in (whole, stopped)
    )
    assert first == second and len(logged(whole)) == 12
    for key in ("dev", "loss", "mixes"):
        assert stopped.manifest.get(key) == whole.manifest.get(key)
    assert stopped.fingerprint == whole.fingerprint
    if course == "course":  # in the first step the ramp of the second loss is at 0
        entries = [entry for entry in log(whole) if "loss" in entry]
        assert entries[0]["loss"] == pytest.approx(entries[0]["loss/taid"], abs=1e-6)
        assert entries[-1]["loss"] == pytest.approx(entries[-1]["loss/taid"] + entries[-1]["loss/kl"], rel=1e-4)
    if course == "regularisers":
        assert len(set(logged(whole, "weight/df_flops_document"))) > 5  # λ is moving


def test_the_gradient_cache_keeps_the_activations_of_one_part(
    lists: ScoredLists, tiny_collection: Collection, tiny_encoder: Path
) -> None:
    """Bytes that the graph of one batch holds until its gradients are computed."""
    student = build("student", {"type": "dense", "model": str(tiny_encoder), "precision": "fp32"}).create("cpu")
    batches = build("sampler", {"type": "random_batches", "size": 8})
    documents = build("sampler", {"type": "random_documents", "size": 8})
    batch = BatchStream(lists, tiny_collection, student, batches, documents, 1, 1, 64)[0]

    def held(cached: bool) -> tuple[int, torch.Tensor]:
        found = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal found
            found += tensor.nbytes if tensor.grad_fn is not None else 0  # weights are there anyway
            return tensor

        torch.manual_seed(0)
        distiller = Distiller(student, {"kl": build("loss", {"type": "kl"})}, gradient_cache=cached, token_budget=64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = distiller(**batch)["loss"]
        kept = found
        student.zero_grad()
        loss.backward()
        gradient = torch.cat([each.grad.flatten() for each in student.parameters() if each.grad is not None])
        return kept, gradient

    plain, cached = held(False), held(True)
    assert cached[0] < plain[0] / 10
    torch.testing.assert_close(cached[1], plain[1])


def _train_and_die(folder: str, step: int, recipe: dict[str, Any], lists: str, beir: str) -> None:
    """In a process of its own: SIGKILL at a step."""
    from rankdistill.collections import open_collection
    from rankdistill.recipe import load_recipe
    from rankdistill.scores.lists import ScoredLists

    collection = open_collection(f"beir:{beir}")
    query_ids = collection.query_ids("train")
    dev = DevPool.build(collection, "train", query_ids, [[] for _ in query_ids], 24, 42, "ndcg@10")
    stop_at(pytest.MonkeyPatch(), {step}, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_student(load_recipe(recipe), ScoredLists.open(lists), collection, dev, Path(folder))


def test_a_killed_training_goes_on_exactly(
    undisturbed: Artifact, lists: ScoredLists, tiny_beir: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    step = random.randrange(1, 12)
    arguments = (make_recipe().resolved(), str(lists.artifact.path), str(tiny_beir))
    killed = Forked(_train_and_die, str(tmp_path / "student"), step, *arguments, folder=tmp_path / "killed").wait()
    assert killed.code == -signal.SIGKILL, killed.err
    resumed = Forked(_train_and_die, str(tmp_path / "student"), 0, *arguments, folder=tmp_path / "resumed").wait()
    assert resumed.code == 0, resumed.err
    assert ("going on from checkpoint" in resumed.err) == (step > 3)
    assert_same_weights(tmp_path / "student", undisturbed)


def test_a_torn_checkpoint_is_passed_over(
    undisturbed: Artifact, train: Train, dev_pool: DevPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state, which is written last, ends in the middle: the checkpoint before counts. None holds a pickle."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was written or read")

    for module, name in ((torch, "save"), (torch, "load"), (np, "save")):
        monkeypatch.setattr(module, name, refuse)
    stop_at(monkeypatch, {8})
    with pytest.raises(Stop):
        train(tmp_path / "student", dev=dev_pool)
    (work,) = tmp_path.glob(".student.*.partial")
    newest, older = work / "checkpoint-6", work / "checkpoint-3"
    assert last_checkpoint(work) == newest and older.is_dir()
    assert {path.suffix for path in [*newest.iterdir(), *older.iterdir()]} == {".json", ".safetensors"}
    state = newest / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-20])
    assert last_checkpoint(work) == older
    artifact = train(tmp_path / "student", dev=dev_pool)
    assert_same_weights(artifact, undisturbed)
    left = [path for path in artifact.path.rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".json", ".jsonl", ".safetensors", ".md", ".txt"}
    assert not list(artifact.path.glob("checkpoint-*")) and last_checkpoint(artifact.path) is None


# -- what a step is ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_dropout(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no-dropout") / "model"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


EXPANDED = {"query_expansion": True, "query_length": 16, "learn_scale": True}
# Ways to make a step that differ by rounding alone. Compared are the loss and the gradient's norm: Adam would blow up
# the rounding of gradients near 0. (Accumulation: in the first epoch the same lists and documents meet, all lists have
# as many pairs, and nothing is random.)
ONE_STEP: dict[str, list[dict[str, Any]]] = {
    "two batches of four accumulated are one of eight": [
        {"batches": {"type": "random_batches", "size": 8 // count}, "accumulation": count} for count in (1, 2)
    ],
    "parts of a batch": [{"token_budget": budget} for budget in (64, 4096)],
    "gradient cache": [
        {"student": {"type": "multi_vector", **EXPANDED}, "gradient_cache": cached, "token_budget": 64}
        for cached in (False, True)
    ],
}


@pytest.mark.parametrize("way", ONE_STEP)
def test_the_way_of_a_step_changes_rounding_only(way: str, train: Train, no_dropout: Path, tmp_path: Path) -> None:
    entries = []
    for number, changes in enumerate(ONE_STEP[way]):
        student = {**changes.get("student", {}), "model": str(no_dropout)}
        artifact = train(tmp_path / str(number), **{**changes, "student": student}, steps=1)
        entries.append(next(entry for entry in log(artifact) if "loss" in entry))
    for key in ("loss", "grad_norm", "loss/margin_mse"):
        assert entries[0][key] == pytest.approx(entries[1][key], rel=1e-4), key


@pytest.mark.parametrize("threads", ["false", "true"])  # of the tokenizers: a fork leaves them behind
def test_the_number_of_loader_processes_changes_nothing(
    undisturbed: Artifact,
    train: Train,
    dev_pool: DevPool,
    tmp_path: Path,
    threads: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)

    def fail(*_: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)  # a loader that waits for lost threads waits for ever
    try:
        artifact = train(tmp_path / "student", dev=dev_pool, loader_processes=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert_same_weights(artifact, undisturbed)


@pytest.mark.parametrize(("fails", "accumulation"), [("forward", 1), ("backward", 2)])
def test_a_batch_that_memory_does_not_hold_is_trained_in_smaller_parts(
    train: Train, no_dropout: Path, tmp_path: Path, fails: str, accumulation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same losses, gradients and course: the failed batch leaves nothing behind, half a backward pass neither."""
    losses = [{"type": "taid", "momentum": 0.5}, {"type": "kl"}]
    same: dict[str, Any] = {"student": {"model": str(no_dropout)}, "steps": 3, "checkpoints": 1, "losses": losses}
    same |= {"accumulation": accumulation, "token_budget": 256}
    expected = train(tmp_path / "plain", **same)
    tried: list[int] = []

    def forward(module: torch.nn.Module, given: Any) -> None:
        # From the second batch on: it may be the second of an accumulated step.
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None and torch.is_grad_enabled():
            tried.append(given[0].numel())
            if fails == "forward" and len(tried) > 2 and tried[-1] > 100:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def backward(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and len(tried) > 2 and tried[-1] > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes")

    handles = [register_module_forward_pre_hook(forward)]
    if fails == "backward":
        handles.append(register_module_full_backward_hook(backward))
    try:
        found = train(tmp_path / "small", **same)
    finally:
        for handle in handles:
            handle.remove()
    assert max(tried[:2]) > 100 > max(tried[-3:]) and capsys.readouterr().err.count("does not hold a batch") == 1
    for one, other in zip(log(found), log(expected), strict=True):
        for key in {key for key in one if "loss" in key or "norm" in key or "dev" in key}:
            assert one[key] == pytest.approx(other[key], rel=1e-3), key


def test_a_batch_that_comes_a_text_at_a_time_and_does_not_fit_is_refused(train: Train, tmp_path: Path) -> None:
    def check(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = register_module_forward_pre_hook(check)
    try:
        with pytest.raises(RankdistillError, match="the memory does not hold a batch"):
            train(tmp_path / "student")
    finally:
        handle.remove()


def test_bf16_runs_and_stays_near_fp32(undisturbed: Artifact, train: Train, tmp_path: Path) -> None:
    artifact = train(tmp_path / "student", precision="bf16", checkpoints=1)
    assert artifact.manifest["precision"] == "bf16"
    first, half = (logged(artifact)[0] for artifact in (undisturbed, artifact))
    assert half == pytest.approx(first, rel=0.05) and half != first
    assert all(value.dtype == np.float32 for value in weights(artifact).values())


# -- what is left behind ----------------------------------------------------------------------------------------------


def test_the_log_is_plain_and_whole(undisturbed: Artifact) -> None:
    entries = log(undisturbed)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    for entry in steps:
        assert {"loss", "loss/margin_mse", "learning_rate", "grad_norm", "epoch"} <= entry.keys()
        assert entry["loss"] == pytest.approx(entry["loss/margin_mse"], rel=1e-5)  # one loss of weight 1
    rates = [entry["learning_rate"] for entry in steps]
    assert max(rates) <= 5e-3 and rates[-1] < rates[5]  # warm-up, then falling
    assert [entry["step"] for entry in entries if "dev_ndcg@10" in entry] == [0, 3, 6, 9, 12]


def test_the_best_checkpoint_is_the_one_saved(
    train: Train, dev_pool: DevPool, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    # A learning rate that ruins the student: the best is the one before training, or an early one.
    artifact = train(tmp_path / "student", dev=dev_pool, learning_rate=0.2, schedule="constant")
    values = {entry["step"]: entry["dev_ndcg@10"] for entry in log(artifact) if "dev_ndcg@10" in entry}
    assert len(set(values.values())) > 1
    student = build("student", make_recipe().student.settings()).open(artifact.path / "model", "cpu")
    assert dev_pool.evaluate(student) == pytest.approx(max(values.values()), abs=1e-9)
    assert values[12] < max(values.values())
    assert not (artifact.path / "best").exists()


def test_the_model_card_is_written_from_the_run(undisturbed: Artifact) -> None:
    card = (undisturbed.path / "model" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["library_name"] == "sentence-transformers" and "rankdistill" in header["tags"]
    assert "12 steps" in text and "margin_mse" in text and "ndcg@10" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["training"]["learning_rate"] == 5e-3


LOADERS = {"dense": SentenceTransformer, "static": SentenceTransformer, "multi_vector": MultiVectorEncoder}
FLOPS = [{"type": "flops", "side": side, "weight": 0.01} for side in ("query", "document")]
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "dense": ({"similarity": "dot"}, [{"type": "margin_mse"}]),
    "static": ({"learn_scale": True}, [{"type": "margin_mse"}]),
    "multi_vector": ({"scale": 2.0}, [{"type": "margin_mse"}]),
    "multi_vector, expanded": ({"scale": 2.0, **EXPANDED}, [{"type": "kl"}]),
    "splade": ({}, [{"type": "margin_mse"}, *FLOPS]),
    "inference_free": ({}, [{"type": "margin_mse"}, FLOPS[1]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_student_learns(
    kind: str, train: Train, lists: ScoredLists, tiny_collection: Collection, dev_pool: DevPool, tmp_path: Path
) -> None:
    """And what is saved is what a user of plain sentence-transformers gets."""
    settings, losses = KINDS[kind]
    student = {"type": kind.partition(",")[0], **({} if kind == "static" else {"dropout": 0.0}), **settings}
    settings = {"student": student, "steps": 24, "losses": losses, "learning_rate": 0.05 if kind == "static" else 5e-3}
    agreement = Agreement(lists, tiny_collection)
    artifact = train(tmp_path / "out", dev=dev_pool, agreement=agreement, **settings)
    course = logged(artifact, f"loss/{losses[0]['type']}")
    assert np.mean(course[-6:]) < 0.75 * np.mean(course[:6]), course
    dev, agreed = (list(artifact.manifest[name].values()) for name in ("dev", AGREEMENT))
    assert max(dev[1:]) > dev[0] and max(agreed) > agreed[0]
    model = artifact.path / "model"
    opened = build("student", {"type": student["type"], "precision": "fp32"}).open(model, "cpu")
    loader: Any = LOADERS.get(student["type"], SparseEncoder)
    plain = loader(str(model), device="cpu", local_files_only=True)
    scores = plain.similarity(plain.encode_query(dev_pool.queries), plain.encode_document(dev_pool.documents))
    ours = opened.similarities(dev_pool.queries, dev_pool.documents)
    np.testing.assert_allclose(ours, scores.to_dense().numpy(), rtol=1e-4, atol=1e-4)
    assert dev_pool.evaluate(opened) == pytest.approx(max(dev), abs=1e-6)
    assert f'{loader.__name__}("PATH' in (model / "README.md").read_text()


# -- learning ---------------------------------------------------------------------------------------------------------


def test_a_student_learns_its_teachers_order(
    train: Train,
    lists: ScoredLists,
    make_lists: Callable[..., ScoredLists],
    tiny_collection: Collection,
    make_recipe: MakeRecipe,
    tmp_path: Path,
) -> None:
    """From the teacher's scores Kendall's tau rises above 0.6; from the same scores shuffled within each list it stays
    below 0.3. Only the right pairing of scores and documents teaches."""
    training = {"steps": 150, "checkpoints": 1, "lists": {"type": "random_documents", "size": 8}, "log_every": 50}

    def agreement(on: ScoredLists, name: str) -> float:
        artifact = train(tmp_path / name, on=on, **training)
        student = build("student", make_recipe().student.settings()).open(artifact.path / "model", "cpu")
        return Agreement(lists, tiny_collection).evaluate(student)

    assert agreement(lists, "true") > 0.6
    assert agreement(make_lists(tiny_collection, tmp_path / "shuffled", shuffle=True), "false") < 0.3


# -- what cannot be trained -------------------------------------------------------------------------------------------


def test_lists_without_a_positive_are_refused_where_a_loss_needs_one(
    train: Train, tiny_collection: Collection, tmp_path: Path
) -> None:
    from rankdistill.scores.lists import build_lists

    query_id = tiny_collection.query_ids("train")[0]
    relevant = tiny_collection.qrels("train")[query_id]
    others = [doc_id for doc_id in tiny_collection.doc_ids(range(8)) if doc_id not in relevant]
    candidates = [(query_id, others, np.zeros(len(others)))]
    lists = build_lists(candidates, lambda q, d: np.arange(len(d)), tiny_collection, "train", tmp_path / "lists")
    with pytest.raises(RankdistillError, match=r"margin_mse needs a labelled positive(?s:.*)all_pairs"):
        train(tmp_path / "student", on=lists)
    losses = [{"type": "margin_mse", "pairs": "all_pairs"}]
    assert train(tmp_path / "student", on=lists, losses=losses, steps=2).counts["steps"] == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_training_that_diverges_says_so(train: Train, tmp_path: Path, precision: str) -> None:
    """In fp16 a batch may overflow, and its step is skipped; not each."""
    beyond: dict[str, Any] = {"learning_rate": 1e30, "max_gradient_norm": 1e9, "schedule": "constant", "warmup": 0.0}
    with pytest.raises(RankdistillError, match=r"the loss is (nan|inf) at step(?s:.*)learning_rate"):
        train(tmp_path / "student", precision=precision, **beyond)


def test_the_settings_that_decide_nothing_are_not_in_the_fingerprint(make_recipe: MakeRecipe) -> None:
    values = [
        trainer_module.training_fingerprint_values(make_recipe(**changes), {"lists": "abc", "dev": "def"})
        for changes in (
            {},
            {"log_every": 7},
            {"loader_processes": 2},
            {"agreement_queries": 0},
            {"learning_rate": 2e-3},
        )
    ]
    assert values[0] == values[1] == values[2] == values[3] != values[4]


@pytest.mark.parametrize(
    ("schedule", "warmup", "name"),
    [("constant", 0.1, "constant_with_warmup"), ("constant", 0.0, "constant"), ("linear", 0.1, "linear")],
)
def test_warmup_counts_under_every_schedule(schedule: str, warmup: float, name: str, tmp_path: Path) -> None:
    recipe = check_recipe(
        {
            "collection": "beir:x",
            "student": {"type": "static"},
            "training": {"schedule": schedule, "warmup": warmup, "device": "cpu"},
        }
    )
    arguments = trainer_module.training_arguments(recipe, 100, tmp_path)
    assert str(arguments.lr_scheduler_type.value) == name and arguments.warmup_steps == round(100 * warmup)


# -- averages of checkpoints, mixes with the start, a fitted scale ----------------------------------------------------


def test_a_mix_of_0_is_the_start_and_of_1_the_end(make_recipe: MakeRecipe) -> None:
    student = build("student", make_recipe().student.settings()).create("cpu")
    start = copy_of(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    end = copy_of(student)
    for share, wanted in ((0.0, start), (1.0, end)):
        load_mix(student, start, end, share)
        assert all(torch.equal(value, wanted[name]) for name, value in copy_of(student).items())
    load_mix(student, start, end, 0.25)
    for name, value in copy_of(student).items():
        if value.is_floating_point():
            assert torch.allclose(value, 0.75 * start[name] + 0.25 * end[name], atol=1e-6), name


def test_the_average_is_that_of_the_last_checkpoints_student(tmp_path: Path) -> None:
    for step, value in ((2, 100.0), (10, 1.0), (20, 4.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"student.w": torch.full((3,), value), "losses.x": torch.ones(1)}, folder / WEIGHTS)
        (folder / STATE).write_text("{}")
    found = averaged(tmp_path, 2)
    assert list(found) == ["w"] and found["w"].tolist() == [2.5, 2.5, 2.5]


def test_the_best_on_dev_is_published_be_it_a_mix(
    train: Callable[..., Artifact], dev_pool: DevPool, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    artifact = train(tmp_path / "student", dev=dev_pool, average=3, interpolate=[0.5], learning_rate=2e-2)
    manifest = artifact.manifest
    assert set(manifest["mixes"]) == {"1", "0.5"}
    best = max([*manifest["dev"].values(), *manifest["mixes"].values()])
    student = build("student", make_recipe().student.settings()).open(artifact.path / "model", "cpu")
    assert dev_pool.evaluate(student) == pytest.approx(best, abs=1e-6)


def test_a_fitted_scale_is_that_of_least_squares(
    lists: ScoredLists, tiny_collection: Collection, make_recipe: MakeRecipe
) -> None:
    """Teacher scores that are 7 times the student's cosines: the scale becomes 7."""
    recipe = make_recipe(student={"similarity": "cos"})
    student = build("student", recipe.student.settings()).create("cpu").eval()
    samplers = (build("sampler", one.settings()) for one in (recipe.training.batches, recipe.training.lists))

    class Planted(BatchStream):
        def __getitem__(self, number: int) -> dict[str, Any]:
            batch = super().__getitem__(number)
            with torch.no_grad():
                queries = student.embed(batch["queries"], "query")
                documents = student.join([student.embed(part, "document") for part in batch["documents"]])
                cosines = torch.einsum("qd,qnd->qn", queries, documents[batch["index"]])
            return batch | {"teacher_scores": 7 * cosines + torch.arange(len(cosines))[:, None]}  # a shift a list

    assert student.scale.item() == 20
    fit_scale(student, Planted(lists, tiny_collection, student, *samplers, 42, 12, 4096))
    assert student.scale.item() == pytest.approx(7, rel=1e-3)
