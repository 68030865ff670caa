"""Training: what a step sees, that it learns, that a killed one goes on exactly, and what it costs in memory."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from planted import Learned, Planted, learn, make_specification, planted

from rankdistill.artifacts import write_atomically
from rankdistill.quantization import training as training_module
from rankdistill.quantization.batches import Batch, Queries, Sampler, TeacherScores, best_documents
from rankdistill.quantization.training import QuantizerTraining


def sampler(data: Planted, work: Path, asked: Queries | None = None, **changes: Any) -> Sampler:
    work.mkdir(exist_ok=True)
    return Sampler(data.documents, asked or Queries(given=data.queries), make_specification(**changes), work)


def listed(batch: Batch) -> list[list[int]]:
    """Document rows of each query's list, in its order."""
    if batch.places is None:
        return [batch.rows.tolist() for _ in range(len(batch.queries))]
    return [batch.rows[places[mask].numpy()].tolist() for places, mask in zip(batch.places, batch.mask, strict=True)]


# -- what a step sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_the_best_documents_are_those_of_brute_force(
    tmp_path: Path, data: Planted, metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of documents and of queries that divide neither."""
    from rankdistill.quantization import batches

    monkeypatch.setattr(batches, "DOCUMENTS_AT_ONCE", 70)
    monkeypatch.setattr(batches, "QUERIES_AT_ONCE", 33)
    best = best_documents(data.queries, 600, data.documents.__getitem__, 12, metric, tmp_path / "best.npy")
    q, d = data.queries.astype(np.float64), data.documents.astype(np.float64)
    exact = q @ d.T if metric == "inner_product" else -((q[:, None] - d) ** 2).sum(axis=2)
    np.testing.assert_array_equal(best, np.argsort(-exact, axis=1)[:, :12])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"documents": {"in_batch": False}},
        {"documents": {"list_size": 7}},
        {"documents": {"limit": 50}},
        {"queries": {"documents": 1}},
    ],
)
def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path, data: Planted, changes: dict[str, Any]) -> None:
    first, again = sampler(data, tmp_path, **changes), sampler(data, tmp_path, **changes)
    for step in (5, 0, 5):  # in any order
        for one, other in zip(first.batch(step), again.batch(step), strict=True):
            if one is None:
                assert other is None
            else:
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert listed(first.batch(0)) != listed(first.batch(1))
    assert listed(first.batch(0)) != listed(sampler(data, tmp_path, seed=1, **changes).batch(0))


def test_lists_hold_the_best_of_all_queries_or_only_of_ones_own(tmp_path: Path, data: Planted) -> None:
    shared = sampler(data, tmp_path / "a", documents={"top": 10, "random": 30})
    batch = shared.batch(3)
    assert batch.places is None and shared.top is not None
    best = {int(row) for number in batch.numbers for row in shared.top[number]}
    assert best <= set(batch.rows.tolist()) and len(batch.rows) <= len(best) + 30
    torch.testing.assert_close(batch.queries, shared.vectors[batch.numbers])

    alone = sampler(data, tmp_path / "b", documents={"top": 10, "random": 30, "in_batch": False})
    batch = alone.batch(3)
    assert alone.top is not None
    common = set.intersection(*(set(one) for one in listed(batch)))
    for number, rows in zip(batch.numbers, listed(batch), strict=True):
        own = set(alone.top[number].tolist())
        assert own <= set(rows) and len(set(rows)) == len(rows)
        assert set(rows) - own <= common  # the random ones, the same for the whole batch
    assert 20 <= len(common) <= 40


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("size", [None, 5])
def test_labelled_positives_come_first_and_are_labelled(
    tmp_path: Path, data: Planted, in_batch: bool, size: int | None
) -> None:
    random = np.random.default_rng(0)
    positives = [random.choice(600, random.integers(0, 4), replace=False) for _ in data.queries]
    queries = Queries(given=data.queries, positives=positives)
    wanted = {"labelled": True, "in_batch": in_batch, "list_size": size, "limit": 90}
    made = sampler(data, tmp_path, queries, documents=wanted)
    for step in range(6):
        batch = made.batch(step)
        assert len(batch.rows) <= 90
        for number, rows, labels, mask in zip(batch.numbers, listed(batch), batch.labels, batch.mask, strict=True):
            mine = set(positives[number].tolist())
            assert rows[0] in mine and labels[0] == 1
            assert [int(label) for label in labels[mask]] == [1 if row in mine else -1 for row in rows]
            assert (labels[~mask] == -1).all()
            assert size is None or len(rows) <= size
            assert len(set(rows)) == len(rows)


def test_each_kind_of_query_has_its_share_and_held_out_ones_none(tmp_path: Path, data: Planted) -> None:
    queries = Queries(given=data.queries, pseudo=data.documents[:300] + 1)
    made = sampler(data, tmp_path, queries, queries={"given": 1, "pseudo": 2, "documents": 1, "most": 150}, batch=64)
    assert len(made.vectors) == 200 + 150 + 150  # given ones stay whole
    seen = np.concatenate([made.batch(step).numbers for step in range(200)])
    assert not set(seen.tolist()) & set(made.held_out.tolist())
    shares = np.histogram(seen, [0, 200, 350, 500])[0] / len(seen)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.02)
    assert len(set(seen.tolist())) == 500 - len(made.held_out)


def recorded(data: Planted) -> tuple[TeacherScores, list[np.ndarray]]:
    """Lists of unequal length for every other query, scored like a cross-encoder: another scale, another order."""
    random = np.random.default_rng(1)
    numbers = np.arange(0, len(data.queries), 2)
    rows = [random.choice(600, random.integers(3, 12), replace=False).astype(np.int32) for _ in numbers]
    scores: list[Any] = [
        40 * (data.documents[part] @ data.queries[n]) - 7 for part, n in zip(rows, numbers, strict=True)
    ]
    labels = [random.integers(-1, 2, len(part)).astype(np.int32) for part in rows]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in rows])]).astype(np.int64)
    flat = np.concatenate(scores).astype(np.float32)
    made = TeacherScores(numbers, offsets, np.concatenate(rows), flat, np.concatenate(labels))
    return made, rows


def test_recorded_lists_are_the_teachers_own_and_padding_is_masked(tmp_path: Path, data: Planted) -> None:
    teacher, rows = recorded(data)
    made = sampler(data, tmp_path, Queries(given=data.queries, teacher=teacher), relevance="scores")
    for step in range(4):
        batch = made.batch(step)
        assert batch.teacher is not None
        for place, (number, found) in enumerate(zip(batch.numbers, listed(batch), strict=True)):
            at = int(number) // 2
            part = slice(int(teacher.offsets[at]), int(teacher.offsets[at + 1]))
            expected = {
                int(row): (float(score), int(label))
                for row, score, label in zip(teacher.rows[part], teacher.scores[part], teacher.relevance[part])
            }
            mask = batch.mask[place]
            scores, labels = batch.teacher[place][mask].tolist(), batch.labels[place][mask].tolist()
            assert {row: (s, label) for row, s, label in zip(found, scores, labels)} == expected
            assert int(mask.sum()) == len(rows[at])
            assert not batch.teacher[place][~mask].any() and (batch.labels[place][~mask] == -1).all()
            positive = [label > 0 for label in labels]
            assert positive == sorted(positive, reverse=True)


def test_recorded_scores_teach_whatever_their_scale(tmp_path: Path, data: Planted) -> None:
    """The similarities times 40 teach what the similarities do: both are brought to one spread before the loss."""
    teacher, _ = recorded(data)
    small = replace(teacher, scores=teacher.scores / np.float32(40))
    losses_over = [{"type": "margin_mse", "pairs": "all_pairs"}]
    changes: dict[str, Any] = {"relevance": "scores", "steps": 40, "losses": losses_over}
    learned = []
    for name, scores in (("large", teacher), ("small", small)):
        learn(tmp_path / name, data, Queries(given=data.queries, teacher=scores), **changes)
        learned.append(Learned.open(tmp_path / name, make_specification(**changes)))
    losses = [[entry["loss"] for entry in one.log if "loss" in entry] for one in learned]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(learned[0].model.codebooks, learned[1].model.codebooks, atol=1e-2, rtol=1e-2)


def test_the_spread_of_identical_scores_is_no_division_by_zero(tmp_path: Path, data: Planted) -> None:
    one = sampler(data, tmp_path, documents={"top": 1})
    assert 0 < one.spread() < 1 and np.isfinite(one.spread())


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learned, Learned, Planted, list[float]]:
    """FAISS's own start and what 150 steps made of it, 8 codes of 4 bits for 32 dimensions."""
    data, changes = planted(1000, 3000, 32), dict[str, Any](subspaces=8, batch=32, query="frozen", held_out=300)
    changes["documents"] = {"top": 50, "random": 400}
    folder = tmp_path_factory.mktemp("learned")
    learn(folder / "start", data, steps=0, **changes)
    index = learn(folder / "end", data, steps=150, **changes)
    specification = make_specification(**changes)
    start, end = (Learned.open(folder / name, specification) for name in ("start", "end"))
    return start, end, data, [index.manifest["agreement"]["start"], index.manifest["agreement"]["end"]]


def overlap(ours: np.ndarray, exact: np.ndarray, depth: int = 10) -> float:
    best, found = (np.argsort(-scores, axis=1)[:, :depth] for scores in (exact, ours))
    return float(np.mean([len(set(a) & set(b)) / depth for a, b in zip(best, found, strict=True)]))


def test_the_loss_falls_and_held_out_agreement_rises(
    learned: tuple[Learned, Learned, Planted, list[float]],
) -> None:
    start, end, _, (before, after) = learned
    losses = [entry["loss"] for entry in end.log if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:3])
    assert after > before + 0.02
    assert {"step": 0, "overlap@10": before} == end.log[0] and not start.log


def test_reconstruction_worsens_while_the_ranking_gets_better(
    learned: tuple[Learned, Learned, Planted, list[float]],
) -> None:
    """What distillation is for: fresh queries never look at the loud directions, so their error is free to grow."""
    start, end, data, _ = learned
    fresh = planted(1000, 4000, 32).queries[3000:]  # drawn after the others
    rotated = torch.from_numpy(data.documents) @ start.model.rotation().T
    errors = [float((rotated - one.decoded()).square().sum(dim=1).mean()) for one in (start, end)]
    exact = fresh @ data.documents.T
    agreements = [overlap(one.scores(fresh), exact) for one in (start, end)]
    assert errors[1] > 1.01 * errors[0]
    assert agreements[1] > agreements[0] + 0.02


def test_reconstruction_alone_is_the_unsupervised_baseline(tmp_path: Path, data: Planted) -> None:
    changes: dict[str, Any] = {"losses": [], "reconstruction": 1.0, "query": "frozen", "held_out": 0}
    changes["training_sample"] = 40  # FAISS has seen hardly more vectors than it has codewords
    learn(tmp_path / "start", data, steps=0, **changes)
    learn(tmp_path / "end", data, steps=60, **changes)
    specification = make_specification(**changes)
    errors = []
    for name in ("start", "end"):
        one = Learned.open(tmp_path / name, specification)
        rotated = torch.from_numpy(data.documents) @ one.model.rotation().T
        errors.append(float((rotated - one.decoded()).square().sum(dim=1).mean()))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize(
    "losses",
    [
        [{"type": "listnet"}],
        [{"type": "mse"}],
        [{"type": "ranknet", "weighting": "ndcg"}],
        [{"type": "margin_mse", "pairs": "all_pairs"}],
        [{"type": "infonce"}],
        [{"type": "kl"}, {"type": "infonce", "weight": 0.1}],
    ],
)
def test_every_list_loss_teaches_codebooks(
    tmp_path: Path, data: Planted, losses: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "LOG_EVERY", 1)
    exact = data.queries @ data.documents.T
    queries = Queries(given=data.queries, positives=[row.argsort()[-2:].astype(np.int64) for row in exact])
    labelled = any(loss["type"] == "infonce" for loss in losses)
    changes: dict[str, Any] = {"losses": losses, "documents": {"list_size": 30, "labelled": labelled}, "steps": 60}
    learn(tmp_path, data, queries, codebook_rate=3e-2, **changes)
    log = [entry["loss"] for entry in Learned.open(tmp_path, make_specification()).log if "loss" in entry]
    assert np.mean(log[40:]) < np.mean(log[:20])


def test_the_weight_of_the_lists_loss_is_fixed_by_the_first_batch(tmp_path: Path, data: Planted) -> None:
    """w = L_pq / L_ivf of the first batch, so that both count the same there; then it stays."""
    learn(tmp_path, data, lists=5, steps=30)
    log = [entry for entry in Learned.open(tmp_path, make_specification(lists=5)).log if "loss" in entry]
    weights = [(entry["loss"] - entry["pq"]) / entry["ivf"] for entry in log]
    np.testing.assert_allclose(weights, weights[0], rtol=1e-4)


def stop_before(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Training is interrupted before each of these steps, once."""
    original, left = QuantizerTraining._train_step, list(steps)

    def step(self: QuantizerTraining) -> dict[str, float]:
        if left and self.step == left[0]:
            del left[0]
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(QuantizerTraining, "_train_step", step)


# -- a query encoder trained along ------------------------------------------------------------------------------------


def learn_encoder(folder: Path, encoder: Path, beir: Path, **changes: Any) -> tuple[Any, Any, list[str]]:
    """(index, the student, its questions): a student's own texts and vectors, its query encoder trained along."""
    from rankdistill.quantization.quantize import quantize
    from rankdistill.students.dense import DenseStudent

    student = DenseStudent(str(encoder), similarity="dot").create("cpu")
    held, asked = (
        [json.loads(line)["text"] for line in (beir / f"{name}.jsonl").read_text().splitlines()]
        for name in ("corpus", "queries")
    )
    texts = [f"{text} Note {number}." for number in range(10) for text in held]
    questions = [f"{text} {number}" for number in range(6) for text in asked]
    folder.mkdir(exist_ok=True)
    index = quantize(
        student.encode_documents(texts),
        map(str, range(len(texts))),
        Queries(given=student.encode_queries(questions), given_texts=questions),
        make_specification(query="encoder", encoder_rate=1e-2, held_out=10, **changes),
        folder / "index.faiss",
        student=student,
        student_fingerprint=student.fingerprint,
        open_student=lambda path: DenseStudent(str(path)).open(path, "cpu"),
    )
    return index, student, questions


def test_a_query_encoder_is_trained_along_and_the_callers_stays_as_it_was(
    tmp_path: Path, tiny_encoder: Path, tiny_beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankdistill.quantization.quantize import query_encoder_folder
    from rankdistill.students.dense import DenseStudent

    changes: dict[str, Any] = {"steps": 30, "checkpoint_every": 8, "subspaces": 8}
    index, student, questions = learn_encoder(tmp_path / "calm", tiny_encoder, tiny_beir, **changes)
    folder = query_encoder_folder(index)
    assert folder is not None
    own = DenseStudent(str(folder)).open(folder, "cpu")
    before, after = student.encode_queries(questions), own.encode_queries(questions)
    fresh = DenseStudent(str(tiny_encoder), similarity="dot").create("cpu")
    np.testing.assert_array_equal(before, fresh.encode_queries(questions))
    assert np.abs(after - before).max() > 1e-3
    assert index.manifest["student_fingerprint"] == own.fingerprint != student.fingerprint
    log = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    assert losses[-1]["pq"] < losses[0]["pq"] and "dense" in losses[0]

    stop_before(monkeypatch, 13)
    with pytest.raises(KeyboardInterrupt):
        learn_encoder(tmp_path / "killed", tiny_encoder, tiny_beir, **changes)
    learn_encoder(tmp_path / "killed", tiny_encoder, tiny_beir, **changes)
    for file in ("index.faiss", "index.faiss.quantizer/query_encoder/model.safetensors"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "calm" / file).read_bytes()


def test_a_query_encoder_without_texts_is_refused(tmp_path: Path, data: Planted, tiny_encoder: Path) -> None:
    from rankdistill.errors import UsageError
    from rankdistill.quantization.quantize import quantize
    from rankdistill.students.dense import DenseStudent

    student = DenseStudent(str(tiny_encoder)).create("cpu")
    queries, specification = Queries(given=data.queries), make_specification(query="encoder")
    with pytest.raises(UsageError, match="reads texts"):
        quantize(data.documents, map(str, range(600)), queries, specification, tmp_path / "x", student=student)


# -- killed and resumed -----------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "lists, learned rotation, soft": {"lists": 5, "rotation": "learned", "codes": "straight_through"},
    "frozen codes, lists, live": {"lists": 5, "codes": "frozen", "residual": False, "documents": {"live": True}},
    "frozen codes and lists": {"lists": 5, "codes": "frozen"},
    "uniform": {"codes": "uniform"},
    "overlap": {"overlap": 2},
}


def files(folder: Path) -> dict[str, bytes]:
    """Bytes of what training leaves, but for times."""
    held = folder / "index.faiss.quantizer"
    names = [file for file in sorted(held.iterdir()) if file.name != "manifest.json"]
    return {file.name: file.read_bytes() for file in names} | {"index": (folder / "index.faiss").read_bytes()}


@pytest.mark.parametrize("mode", RESUMED)
def test_a_training_stopped_at_any_step_ends_with_the_same_bytes(
    tmp_path: Path, data: Planted, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**RESUMED[mode], "steps": 12, "checkpoint_every": 4, "reassign_every": 3}
    learn(tmp_path / "calm", data, **changes)
    expected = files(tmp_path / "calm")
    stop_before(monkeypatch, 2, 6, 7, 11)  # before the first checkpoint, between two, twice after one, near the end
    said: list[str] = []
    monkeypatch.setattr(training_module, "say", said.append)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "killed", data, **changes)
        assert not (tmp_path / "killed" / "index.faiss").exists()
    learn(tmp_path / "killed", data, **changes)
    assert [text.rpartition(" ")[2] for text in said] == ["4", "4", "8"]
    assert files(tmp_path / "killed") == expected
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {path.name for path in (tmp_path / "calm").iterdir()}


@pytest.mark.parametrize("place", ["state.json", "checkpoint.new"])
def test_a_stop_while_a_checkpoint_is_written_loses_none(
    tmp_path: Path, data: Planted, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"steps": 12, "checkpoint_every": 4}
    learn(tmp_path / "calm", data, **changes)
    saves, write, rename = iter((False, True)), write_atomically, Path.rename

    def stopping_write(path: Path, content: str) -> None:
        if Path(path).name == place and next(saves):
            raise KeyboardInterrupt
        write(path, content)

    def stopping_rename(self: Path, target: Any) -> Path:
        if self.name == place and next(saves):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(training_module, "write_atomically", stopping_write)
    monkeypatch.setattr(Path, "rename", stopping_rename)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "killed", data, **changes)
    monkeypatch.undo()
    said: list[str] = []
    monkeypatch.setattr(training_module, "say", said.append)
    learn(tmp_path / "killed", data, **changes)
    assert said == ["small: going on from step 4"]
    assert files(tmp_path / "killed") == files(tmp_path / "calm")


# -- memory -----------------------------------------------------------------------------------------------------------


def measure(folder: str, file: str) -> None:
    """Print by how many KiB the memory of this process rose at most while it quantised a memory-mapped file."""
    import faiss

    from rankdistill.indexes import building
    from rankdistill.quantization import batches, quantize

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    # Blocks smaller than both collections, so that what is left to grow is what grows with them.
    building.SHARD = quantize.BLOCK = training_module.BLOCK = batches.DOCUMENTS_AT_ONCE = 4096
    changes: dict[str, Any] = {"lists": 8, "subspaces": 8, "training_sample": 1000, "steps": 4}
    documents = np.load(file, mmap_mode="r")
    queries = planted(600, 200, documents.shape[1]).queries
    learn(Path(folder) / "warm", Planted(np.array(documents[:5000]), queries), **changes)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])  # what is mapped from files does not count

    start, peaks, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    learn(Path(folder), Planted(documents, queries), **changes)
    done.set()
    watcher.join()
    print(max(peaks) - start)


def test_memory_grows_by_codes_ids_and_lists_not_by_vectors(tmp_path: Path) -> None:
    """12 bytes a document in lists that double as they grow (36 at worst), and its list twice while assigned anew."""
    random, counts = np.random.default_rng(0), (80_000, 180_000)  # more than a block of ids
    for count in counts:
        np.save(tmp_path / f"{count}.npy", random.normal(size=(count, 64)).astype(np.float32))
    for attempt in range(2):  # what the allocator keeps back comes on top, by chance, up to 60 bytes a document
        kilobytes = []
        for count in counts:
            place, file = str(tmp_path / f"{count}-{attempt}"), str(tmp_path / f"{count}.npy")
            ending = Forked(measure, place, file, folder=tmp_path / "output").wait()
            assert ending.code == 0, ending
            kilobytes.append(int(ending.out))
        slope = 1024 * (kilobytes[1] - kilobytes[0]) / (counts[1] - counts[0])
        print(f"{kilobytes} KiB: {slope:.0f} bytes a document more, a vector takes {4 * 64}")
        if slope < 100:
            return
    pytest.fail(f"{slope:.0f} bytes a document")
