"""Agreement with the teacher over a training, and the alarm: exact where it can be, and by simulation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import kendalltau
from trainings import assert_same_weights, log, run_values

from rankdistill.recipe import build, load_recipe
from rankdistill.scores.lists import build_lists
from rankdistill.stages import Workspace
from rankdistill.training.dev import AGREEMENT, Agreement, DevPool, find_hacking, last_alarm, trend_p

if TYPE_CHECKING:
    from rankdistill.artifacts import Artifact
    from rankdistill.collections import Collection
    from rankdistill.recipe import Recipe
    from rankdistill.scores.lists import ScoredLists

MakeRecipe = Callable[..., "Recipe"]
Train = Callable[..., "Artifact"]


# -- the alarm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 5, 6])
def test_the_trend_test_is_exact(size: int) -> None:
    """Against all orders counted."""
    random = np.random.default_rng(size)
    everything = list(permutations(range(size)))

    def wrong(values: Any) -> int:
        return sum(values[i] > values[j] for j in range(size) for i in range(j))

    counts = np.array([wrong(order) for order in everything])
    for _ in range(10):
        values = random.permutation(size).tolist()
        expected = float((counts <= wrong(values)).mean())
        assert trend_p(values) == pytest.approx(expected)
    assert trend_p([0.0] * size) == 1  # ties are no trend


STEPS = list(range(0, 1000, 100))
RISING = [0.1 + 0.03 * n for n in range(10)]
FALLING = [0.30, 0.31, 0.32, 0.33, 0.34, 0.34, 0.33, 0.32, 0.31, 0.30]


def test_the_alarm_rings_where_agreement_rises_and_the_metric_falls() -> None:
    alarm = find_hacking(STEPS, RISING, FALLING)
    assert alarm is not None and (alarm.from_step, alarm.to_step, alarm.evaluations) == (500, 900, 5)
    assert alarm.agreement_slope == pytest.approx(0.3) and alarm.metric_slope == pytest.approx(-0.1)
    assert alarm.fall == pytest.approx(0.04) and "teacher hacking: from step 500 to 900" in str(alarm)


@pytest.mark.parametrize(
    ("agreement", "metric"),
    [
        (RISING, RISING),  # learning
        (FALLING, FALLING),  # both fall: the student is ruined, not hacking
        (FALLING, RISING),
        (RISING, [0.3] * 10),
        (RISING, [0.3 - 0.0001 * n for n in range(10)]),  # a fall that nobody would see
        (RISING, [0.34, 0.30] * 5),
        ([0.5] * 10, FALLING),
    ],
)
def test_it_does_not_ring_otherwise(agreement: list[float], metric: list[float]) -> None:
    assert find_hacking(STEPS, agreement, metric) is None


def test_one_odd_evaluation_neither_makes_nor_hides_it() -> None:
    steps = list(range(14))
    rising = [0.1 * n for n in steps]
    falling = [0.5 - 0.01 * n for n in steps]
    assert find_hacking(steps, rising, [*falling[:10], 0.9, *falling[11:]]) is not None
    flat = [0.5] * 14
    assert find_hacking(steps, rising, [*flat[:13], 0.1]) is None
    assert find_hacking(steps[:3], rising[:3], falling[:3]) is None  # too few to tell


def test_noise_rings_seldom_and_hacking_nearly_always() -> None:
    random = np.random.default_rng(4)
    steps = list(range(0, 1100, 100))
    rising = np.linspace(0.2, 0.5, len(steps))

    def rings(metric: np.ndarray) -> bool:
        noise = random.normal(0, 0.004, (2, len(steps)))
        return find_hacking(steps, (rising + noise[0]).tolist(), (metric + noise[1]).tolist()) is not None

    still = np.mean([rings(np.full(len(steps), 0.4)) for _ in range(600)])
    learning = np.mean([rings(np.linspace(0.3, 0.4, len(steps))) for _ in range(600)])
    hacking = np.mean([rings(0.4 - 0.06 * np.maximum(np.linspace(-1, 1, len(steps)), 0)) for _ in range(300)])
    print(f"no trend {still:.3f}, learning {learning:.3f}, hacking {hacking:.3f}")
    assert still < 0.06 and learning == 0 and hacking > 0.9


def test_the_log_is_read_as_it_grew() -> None:
    entries = [
        {"step": step, AGREEMENT: agreement, "dev_map": metric}
        for step, agreement, metric in zip(STEPS, RISING, FALLING, strict=True)
    ]
    recovered = [{"step": 1000 + n, AGREEMENT: 0.4 + n / 100, "dev_map": 0.3 + n / 100} for n in range(10)]
    losses: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}, {"step": 7, "dev_map": 0.2}]  # of before it was measured
    alarm = last_alarm([*losses, *entries, *recovered], "dev_map")
    assert alarm is not None and alarm.to_step >= 900
    assert last_alarm([*losses, *entries[:6]], "dev_map") is None and last_alarm(losses, "dev_map") is None


# -- in a training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dev_agreement(lists: ScoredLists, tiny_collection: Collection) -> Agreement:
    return Agreement(lists, tiny_collection)


def test_agreement_is_taus_mean_over_the_lists_that_the_teacher_does_not_tie(
    lists: ScoredLists, tiny_collection: Collection, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    student = build("student", make_recipe().student.settings()).create("cpu")
    taus = []
    for query_id, rows, scores, _ in (lists[number] for number in range(len(lists))):
        ours = student.similarities(tiny_collection.query_texts([query_id]), tiny_collection.document_texts(rows))[0]
        taus.append(kendalltau(ours, scores).statistic)
    found = Agreement(lists, tiny_collection).evaluate(student)
    assert found == pytest.approx(np.mean(taus), abs=0.02)  # batches round differently
    query_ids, doc_ids = tiny_collection.query_ids("train")[:3], tiny_collection.doc_ids(range(6))
    tied = []
    for first in (query_ids[0], ""):
        scores_of = lambda q, d, first=first: np.arange(6.0) * (q == first)  # noqa: E731
        candidates = [(query_id, doc_ids, np.zeros(6)) for query_id in query_ids]
        made = build_lists(candidates, scores_of, tiny_collection, "train", tmp_path / f"tied-{first}")
        tied.append(Agreement(made, tiny_collection).evaluate(student))
    assert tied[0] != 0 and np.isfinite(tied[0]) and np.isnan(tied[1])


def test_it_is_logged_and_changes_nothing(
    train: Train, dev_pool: DevPool, dev_agreement: Agreement, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with_it = train(tmp_path / "with", dev=dev_pool, agreement=dev_agreement)
    without = train(tmp_path / "without", dev=dev_pool)
    assert_same_weights(with_it, without)
    assert with_it.fingerprint == without.fingerprint
    assert with_it.manifest["dev"] == without.manifest["dev"]
    entries = log(with_it)
    logged = {entry["step"]: entry[AGREEMENT] for entry in entries if AGREEMENT in entry}
    assert list(logged) == [0, 3, 6, 9, 12]
    assert all("dev_ndcg@10" in entry for entry in entries if AGREEMENT in entry)
    assert with_it.manifest[AGREEMENT] == {str(step): value for step, value in logged.items()}
    dev = with_it.manifest["dev"]
    saved = build("student", make_recipe().student.settings()).open(with_it.path / "model", "cpu")
    assert dev_agreement.evaluate(saved) == pytest.approx(logged[int(max(dev, key=dev.get))], abs=1e-9)
    assert len(set(logged.values())) > 1
    assert AGREEMENT not in without.manifest and "teacher_hacking" not in with_it.manifest


def test_a_student_that_learns_a_wrong_teacher_rings_the_alarm(
    train: Train, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student taught the labels first, then by a teacher who gives the relevant document the least score."""
    query_ids = tiny_collection.query_ids("train")
    qrels = tiny_collection.qrels("train")
    ids = tiny_collection.doc_ids(range(tiny_collection.document_count))

    def lists_of(sign: float, name: str) -> ScoredLists:
        def scores(query_id: str, doc_ids: Any) -> np.ndarray:
            return np.array([sign * 5.0 * (doc_id in qrels[query_id]) for doc_id in doc_ids])

        candidates = [(q, [*qrels[q], *(d for d in ids if d not in qrels[q])][:16], np.zeros(16)) for q in query_ids]
        return build_lists(candidates, scores, tiny_collection, "train", tmp_path / name, inputs={"name": name})

    dev = DevPool.build(tiny_collection, "train", query_ids, [[] for _ in query_ids], 32, 42, "ndcg@10")
    settings: dict[str, Any] = {"lists": {"type": "random_documents", "size": 8}, "log_every": 50}
    right = train(tmp_path / "one", on=lists_of(1, "right"), steps=120, checkpoints=1, **settings)
    settings |= {"student": {"model": str(right.path / "model")}, "schedule": "constant", "warmup": 0.0}
    wrong = lists_of(-1, "wrong")
    agreement = Agreement(wrong, tiny_collection)
    settings |= {"steps": 48, "checkpoints": 12, "learning_rate": 1e-3}
    hacked = train(tmp_path / "two", on=wrong, dev=dev, agreement=agreement, **settings)
    assert hacked.manifest["teacher_hacking"]["fall"] > 0.005
    assert capsys.readouterr().err.count("warning: teacher hacking") == 1


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(tiny_beir: Path, tiny_encoder: Path) -> dict[str, Any]:
    return run_values(tiny_beir, tiny_encoder, {"type": "static"}, steps=4, checkpoints=2)


def test_a_run_scores_dev_lists_in_its_score_stage(values: dict[str, Any], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    workspace.run("score")
    lists = workspace.dev_lists()
    assert lists is not None and set(lists.query_ids) <= set(workspace.collection.query_ids("dev"))
    parts = sorted((tmp_path / "store").rglob("part-*.parquet"))
    student = workspace.train()
    assert list(student.manifest[AGREEMENT]) == ["0", "2", "4"]
    assert sorted((tmp_path / "store").rglob("part-*.parquet")) == parts  # training asks the teacher nothing
    shutil.rmtree(tmp_path / "run" / "student")
    off = Workspace(tmp_path / "run", load_recipe(values, ["training.agreement_queries=0"]), tmp_path / "store")
    assert off.dev_lists() is None and AGREEMENT not in off.train().manifest
    few = Workspace(tmp_path / "few", load_recipe(values, ["training.agreement_queries=2"]), tmp_path / "store")
    found = few.dev_lists()
    assert found is not None and len(found) <= 2
    # A recorded teacher without scores of dev queries trains without.
    lists = workspace.score()
    lines = [
        f"{query_id}\t{doc_id}\t{score}\n"
        for query_id, rows, scores, _ in (lists[number] for number in range(len(lists)))
        for doc_id, score in zip(workspace.collection.doc_ids(rows), scores, strict=True)
    ]
    (tmp_path / "scores.tsv").write_text("".join(lines))
    recipe = load_recipe({**values, "teacher": {"type": "recorded", "file": str(tmp_path / "scores.tsv")}})
    recorded = Workspace(tmp_path / "recorded", recipe, tmp_path / "store")
    assert recorded.dev_lists() is None and AGREEMENT not in recorded.train().manifest
