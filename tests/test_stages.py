"""The order of stages and what is stale: what does not depend on a change is not made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.report import report
from rankdistill.indexes.mining import FILE
from rankdistill.recipe import load_recipe
from rankdistill.runs import iter_run
from rankdistill.stages import STAGES, Workspace

Open = Callable[..., Workspace]


@pytest.fixture(scope="module")
def values(tiny_recipe: Callable[..., dict[str, Any]], tiny_encoder: Path) -> dict[str, Any]:
    sources = [{"type": "bm25", "quota": 4}, {"type": "dense", "model": str(tiny_encoder), "quota": 3}]
    return tiny_recipe(name="stages", candidates={"sources": sources})


@pytest.fixture(scope="module")
def done(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its store."""
    folder = tmp_path_factory.mktemp("stages")
    Workspace(folder / "run", load_recipe(values), folder / "store").run()
    return folder


@pytest.fixture
def reopen(values: dict[str, Any], done: Path, tmp_path: Path) -> Open:
    """A copy of the finished run under a recipe with these changes."""

    def make(*overrides: str) -> Workspace:
        shutil.copytree(done, tmp_path / "copy")
        return Workspace(tmp_path / "copy" / "run", load_recipe(values, overrides), tmp_path / "copy" / "store")

    return make


ARTIFACTS = {"mine": "candidates/train", "score": "lists", "train": "student"}


def stamps(workspace: Workspace) -> dict[str, int]:
    return {stage: (workspace.path / name / "manifest.json").stat().st_mtime_ns for stage, name in ARTIFACTS.items()}


def made_again(workspace: Workspace) -> set[str]:
    """The stages whose artifact a run of the workspace made anew."""
    before = stamps(workspace)
    workspace.run()
    after = stamps(workspace)
    return {stage for stage in ARTIFACTS if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("name=another", set()),
        ("training.log_every=3", set()),
        ("evaluation.depth=5", set()),
        ("indexes=[flat, sq8]", set()),
        ("training.learning_rate=0.01", {"train"}),
        ("student.scale=3", {"train"}),
        ("seed=7", {"train"}),
        ("teacher.max_length=9", {"score", "train"}),
        ("candidates.depth=5", {"mine", "score", "train"}),
    ],
)
def test_only_what_depends_on_a_change_is_made_again(reopen: Open, override: str, again: set[str]) -> None:
    assert made_again(reopen(override)) == again


def test_moving_everything_makes_nothing_again(done: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    """Fingerprints hold no path: the run, its collection and its encoder may be moved."""
    shutil.copytree(done, tmp_path / "there")
    shutil.copytree(values["collection"].removeprefix("beir:"), tmp_path / "facts")
    shutil.copytree(values["student"]["model"], tmp_path / "encoder")
    text = json.dumps(values)
    text = text.replace(values["collection"], f"beir:{tmp_path}/facts").replace(
        values["student"]["model"], str(tmp_path / "encoder")
    )
    moved = Workspace(tmp_path / "there" / "run", load_recipe(json.loads(text)), tmp_path / "there" / "store")
    assert made_again(moved) == set()


def test_a_second_student_pays_the_teacher_nothing(
    values: dict[str, Any], done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "store", tmp_path / "store")
    parts = sorted((tmp_path / "store").rglob("*.parquet"))
    other = load_recipe(values, ["seed=5", "student.start=words", "training.losses=[{type: kl}]"])
    Workspace(tmp_path / "run", other, tmp_path / "store").run("train")
    assert sorted((tmp_path / "store").rglob("*.parquet")) == parts
    assert "score: 0 pairs scored" in capsys.readouterr().err


def test_a_long_scoring_begins_with_what_the_teacher_is_worth(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankdistill.teachers import probe

    for name, value in {"COUNT": 3, "SHARE": 0.5, "LONG": 0.0}.items():
        monkeypatch.setattr(probe, name, value)
    members = [values["teacher"], {"type": "bm25"}]
    recipe = load_recipe({**values, "teacher": {"type": "ensemble", "members": members}})
    Workspace(tmp_path / "run", recipe, tmp_path / "store").run("score")
    lines = capsys.readouterr().err.splitlines()
    probes = [at for at, line in enumerate(lines) if line.startswith("probe: ")]
    assert len(probes) == 2 and probes[1] < next(at for at, line in enumerate(lines) if line.startswith("score: "))
    said = [float(lines[at].partition("ndcg@10 ")[2][:5]) for at in probes]
    assert said == sorted(said, reverse=True)


def test_until_stops_after_a_stage_and_the_rest_follows(values: dict[str, Any], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "run", load_recipe(values), tmp_path / "store")
    assert workspace.run("mine") is None
    assert (workspace.path / "candidates").is_dir() and not (workspace.path / "lists").exists()
    workspace.run("score")
    assert (workspace.path / "lists").is_dir() and not (workspace.path / "student").exists()
    with pytest.raises(RankdistillError, match="student"):
        workspace.student()
    assert workspace.run() is not None
    # This recipe writes no queries, and none of its indexes is learned.
    expected = [stage for stage in STAGES if stage not in ("generate", "quantize")]
    assert list(json.loads((workspace.path / "times.json").read_text())) == expected


def test_force_makes_a_stage_again_and_keeps_the_scores(reopen: Open) -> None:
    workspace = reopen()
    before = stamps(workspace)
    parts = sorted(workspace.path.parent.rglob("part-*.parquet"))
    workspace.run("score", force=["mine", "score"])
    assert {stage for stage, stamp in stamps(workspace).items() if stamp != before[stage]} == {"mine", "score"}
    assert sorted(workspace.path.parent.rglob("part-*.parquet")) == parts
    with pytest.raises(UsageError, match="no stage 'trian'"):
        workspace.run(force=["trian"])


def test_the_saved_recipe_reproduces_the_run(done: Path, tmp_path: Path) -> None:
    saved = yaml.safe_load((done / "run" / "recipe.yaml").read_text())
    again = Workspace(tmp_path / "run", load_recipe(saved), tmp_path / "store")
    result, first = again.run(), Workspace(done / "run", store=done / "store").evaluate(out=tmp_path / "results")
    assert result is not None and result.macro == first.macro
    weights = [(folder / "student/model/model.safetensors").read_bytes() for folder in (done / "run", again.path)]
    assert weights[0] == weights[1]


def test_a_run_opens_from_its_folder_alone(done: Path) -> None:
    workspace = Workspace(done / "run", store=done / "store")
    assert workspace.recipe.name == "stages" and "student" in repr(workspace)
    hits = workspace.engine().search(["which metal rusts"], 5)[0]
    assert len(hits.rows) == 5 and (hits.rows >= 0).all()
    over = workspace.engine(workspace.index_file("flat")).search(["which metal rusts"], 5)[0]
    assert over.rows.tolist() == hits.rows.tolist()


def test_a_recipe_without_a_teacher_trains_on_labels(values: dict[str, Any], tmp_path: Path) -> None:
    changes = ["teacher=null", "training.losses=[{type: infonce}]"]
    workspace = Workspace(tmp_path / "run", load_recipe(values, changes), tmp_path / "store")
    result = workspace.run()
    assert result is not None and "student" in result.macro and "teacher" not in result.macro
    assert not (tmp_path / "store").exists()


# -- what is not ours, and what is another recipe's -------------------------------------------------------------------

PLACES = [
    "student", "lists", "teacher", "dev-lists", "candidates/train", "engines/own", "vectors/student-facts",
    "baselines/labels", "prepared/own",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("force", [[], list(STAGES)])
def test_a_run_deletes_no_folder_of_the_user(
    values: dict[str, Any], tmp_path: Path, place: str, force: list[str]
) -> None:
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="there is a folder here that rankdistill did not write") as caught:
        Workspace(tmp_path, load_recipe(values), tmp_path / "store").run("mine", force)
    assert place in str(caught.value.where)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thesis.txt"]


@pytest.mark.parametrize("file", ["recipe.yaml", "indexes/flat.faiss", "indexes/flat.faiss.json"])
def test_a_run_writes_over_no_file_of_the_user(values: dict[str, Any], tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("collection: mine")
    with pytest.raises(UsageError, match="there is a file here that rankdistill did not write"):
        Workspace(tmp_path, load_recipe(values), tmp_path / "store").run("mine")
    assert (tmp_path / file).read_text() == "collection: mine"


def test_forcing_a_stage_leaves_what_lies_beside_its_artifacts(reopen: Open) -> None:
    workspace = reopen()
    for folder in ("engines", "indexes", "vectors"):
        (workspace.path / folder / "notes.txt").write_text("mine")
    workspace.run("mine", force=["mine", "index"])
    assert not (workspace.path / "indexes" / "flat.faiss").exists()
    assert len(list(workspace.path.rglob("notes.txt"))) == 3


def test_an_evaluation_is_written_into_a_folder_of_its_own(done: Path, tmp_path: Path) -> None:
    (tmp_path / "paper.tex").write_text("mine")
    with pytest.raises(UsageError, match="did not write"):
        Workspace(done / "run", store=done / "store").evaluate(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["paper.tex"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.suite=nonsense", "no shipped declaration 'nonsense'"),
        ("training.metric=ndgc@10", "there is no metric 'ndgc@10'"),
        ("indexes=[nonsense]", "no shipped declaration 'nonsense'"),
        ("training.device=nonsense", "there is no device 'nonsense'"),
        ("teacher.device=cuda:99", "there is no device 'cuda:99'"),
        ("student.model=/gone", "there is no model folder here"),
        ("student={type: dense, layers: [0, 6]}", r"layers are of 0 to 5, not \[0, 6\]"),
        ("student={type: dense, layers: []}", r"layers are of 0 to 5, not \[\]"),
        ("teacher.model=/gone", "there is no model folder here"),
        ("teacher={type: ensemble, members: [{type: bi_encoder, model: /gone}]}", "there is no model folder here"),
        ("teacher={type: listwise, backend: {type: transformers, model: /gone}}", "there is no model folder here"),
        ("teacher={type: listwise, backend: {type: transformers, model: ENCODER}}", "no causal language model"),
        ("teacher={type: pointwise_llm, backend: {type: openai, model: x, tokenizer: /gone}}", "no model folder here"),
        ("teacher={type: recorded, file: /gone}", "there is no file here"),
        ("candidates.sources=[{type: run, file: /gone}]", "there is no file here"),
        ("training.batch_teacher={type: dense, model: CUT}", "the weights are damaged"),
        ("student={type: dense, warm_up: {teacher: {type: dense, model: PICKLED}}}", "the weights are a pickle"),
        ("teacher={type: cross_encoder, model: CUT}", "the weights are damaged"),
        ("baselines={other: {student: {type: static, model: NONE}}}", "it has no weights"),
        ("evaluation.extrapolation.model=/gone", "there is no model folder here"),
    ],
)
def test_what_can_only_fail_fails_first(
    values: dict[str, Any], tmp_path: Path, tiny_encoder: Path, override: str, words: str
) -> None:
    for name in ("CUT", "PICKLED", "NONE"):
        weights = Path(shutil.copytree(tiny_encoder, tmp_path / name)) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        if name != "CUT":
            weights.rename(weights.with_name("pytorch_model.bin" if name == "PICKLED" else "lost"))
        override = override.replace(name, str(tmp_path / name))
    override = override.replace("ENCODER", str(tiny_encoder))
    with pytest.raises(RankdistillError, match=words):
        Workspace(tmp_path / "run", load_recipe(values, [override]), tmp_path / "store").run("mine")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=3", "training.steps was 4, it is 3"),
        ("student.document_length=16", "student.document_length was 256, it is 16"),
        ("candidates.depth=5", "candidates.depth was 6, it is 5"),
        ("teacher.max_length=9", "teacher.max_length was None, it is 9"),
        ("seed=7", "seed was 42, it is 7"),
    ],
)
def test_a_student_is_not_shown_under_another_recipe(reopen: Open, override: str, words: str) -> None:
    workspace = reopen(override)
    workspace.run("mine")  # saves the new recipe
    again = Workspace(workspace.path, store=workspace.store_path)
    for use in (again.student, again.engine, again.evaluate, lambda: again.index("flat"), lambda: report(again.path)):
        with pytest.raises(RankdistillError, match="trained under other settings") as caught:
            use()
        assert words in caught.value.what and "rankdistill run" in str(caught.value.fix)


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "training.log_every=3",
        "training.device=cpu",
        "evaluation.depth=5",
        "indexes=[sq8]",
        "student.model=/gone",
    ],
)
def test_a_student_is_opened_where_what_changed_decides_nothing(reopen: Open, override: str) -> None:
    workspace = reopen(override)
    workspace.save_recipe()
    assert Workspace(workspace.path).student() is not None


def test_a_report_shows_no_figures_of_an_earlier_student(reopen: Open) -> None:
    workspace = reopen("training.steps=3")
    workspace.run("train")
    with pytest.raises(RankdistillError, match="was trained again after this evaluation"):
        report(workspace.path)


@pytest.mark.parametrize("part", ["batch_teacher", "batches"])
def test_other_weights_of_a_model_that_training_reads_train_anew(
    values: dict[str, Any], tmp_path: Path, part: str
) -> None:
    """The batch teacher's and the topics' encoder decide the student as its own does, by weights and not by path."""
    from rankdistill.training.trainer import training_fingerprint_values

    encoder = tmp_path / "encoder"
    shutil.copytree(values["student"]["model"], encoder)
    kinds = {"batch_teacher": {"type": "dense"}, "batches": {"type": "topic_batches"}}
    recipe = load_recipe(values, [f"training.{part}={{type: {kinds[part]['type']}, model: {encoder}}}"])
    before = training_fingerprint_values(recipe, {})
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    assert training_fingerprint_values(recipe, {}) != before
    shutil.copytree(encoder, tmp_path / "moved")
    moved = load_recipe(values, [f"training.{part}={{type: {kinds[part]['type']}, model: {tmp_path / 'moved'}}}"])
    assert training_fingerprint_values(moved, {}) == training_fingerprint_values(recipe, {})


def test_a_baseline_may_read_the_lists_with_a_second_look(values: dict[str, Any], tmp_path: Path) -> None:
    changed = {**values, "baselines": {"filter": {"candidates": {"negatives_below": 1.0}}}}
    workspace = Workspace(tmp_path / "run", load_recipe(changed), tmp_path / "store")
    own, looked = workspace.score(), workspace.score("filter")
    assert own.artifact.path.name == "lists" and looked.artifact.path.name == "lists-filter"
    left_out = own.artifact.counts["documents"] - looked.artifact.counts["documents"]
    assert left_out >= looked.artifact.counts["doubtful_negatives"] > 0 == own.artifact.counts["doubtful_negatives"]


def test_a_trained_teacher_is_judged_by_the_top_of_the_first_source(values: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the quotas are that training lists are mixed by; and nothing is searched where nothing judges."""
    model = values["teacher"]["model"]
    for name, judge in (("judged", {"dev_queries": 4, "dev_depth": 9}), ("unjudged", {"dev_queries": 0})):
        train = {"start": "head", "steps": 1, "batch_size": 2, "checkpoints": 1, **judge}
        teacher = {"type": "cross_encoder", "model": model, "max_length": 16, "train": train}
        candidates = {
            "depth": 6,
            "sources": [{"type": "dense", "model": model, "quota": 2}, {"type": "bm25", "quota": 4}],
        }
        recipe = load_recipe({**values, "teacher": teacher, "candidates": candidates})
        run = Workspace(tmp_path / name, recipe, tmp_path / "store")
        assert run.teacher is not None
        folder = run.path / "candidates" / "dev-teacher"
        assert folder.exists() == (name == "judged")
        if folder.exists():
            engine, texts = run.own_sources[0].engine, run.collection.query_texts(run.queries[1])
            found = [run.collection.doc_ids(hits.rows) for hits in engine.search(texts, 9)]
            assert [doc_ids for _, doc_ids, _ in iter_run(folder / FILE)] == [list(one) for one in found]
            assert {len(one) for one in found} == {9}
