"""The command line: what each verb prints, how it ends, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Ending, Forked, program, ran, run

from rankdistill import __version__

VERBS = "run recipes collection mine score train index search serve evaluate compare doctor"
MAIN = [sys.executable, "-m", "rankdistill.cli.main"]


def error_of(ending: Ending, code: int) -> str:
    """The error a verb ended with: what was wrong first, no traceback."""
    assert ending.code == code, ending.err
    assert "Traceback" not in ending.err, ending.err
    return ending.err


# -- starting and ending ----------------------------------------------------------------------------------------------


def test_help_answers_in_under_half_a_second() -> None:
    """On the clock, or in processor time where other work delays the clock."""
    best = float("inf")
    for _ in range(5):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([*MAIN, "--help"], capture_output=True, text=True, check=True)
        after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
        worked = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        best = min(best, seconds, worked)
    assert best < 0.5
    for verb in VERBS.split():
        assert re.search(rf"^  {verb} ", done.stdout, re.MULTILINE), verb
    version = subprocess.run([*MAIN, "--version"], capture_output=True, text=True, check=True).stdout
    assert version == f"rankdistill {__version__}\n"


def test_shells_complete_verbs() -> None:
    no_guess = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*MAIN, "--show-completion", "bash"]
    shown = subprocess.run(command, env=no_guess, capture_output=True, text=True, check=True).stdout
    assert "_RANKDISTILL_COMPLETE=complete_bash" in shown and shown.strip().endswith("rankdistill")
    asked = {"_RANKDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": "rankdistill recipes s", "COMP_CWORD": "2"}
    found = subprocess.run(MAIN, env={**os.environ, **asked}, capture_output=True, text=True, check=False).stdout
    assert found.split() == ["show", "schema"]


REFUSED = [
    ("runn", 2, "No such command 'runn'"),
    ("run", 2, "Missing argument 'RECIPE'"),
    ("run margin_msee", 2, "did you mean 'margin_mse'"),
    ("run margin_mse --set sede=1", 2, "did you mean 'seed'"),
    ("run margin_mse --set seed", 2, "key=value"),
    ("run margin_mse --until trian", 2, "there is no stage 'trian'"),
    ("search RUN '  '", 2, "the query is empty"),
    ("search RUN words --fuse bm52", 2, "'bm52' is not there to fuse"),
    ("search RUN words --fuse bm25 --fuse bm25", 2, "bm25 is to be fused twice"),
    ("mine COLLECTION --out x --source '{type: bm26}'", 2, "did you mean 'bm25'"),
    ("mine COLLECTION --out x --source '{type: bm25'", 2, "not valid YAML"),
    ("mine COLLECTION --out x --source 5", 2, "keys and values"),
    ("mine COLLECTION --out x --source null", 2, "keys and values"),
    ("score COLLECTION --candidates x.trec --teacher '{type: bi_encoder, model: [}'", 2, "not valid YAML"),
    ("score COLLECTION --candidates x.trec --teacher ''", 2, "keys and values"),
    ("score COLLECTION", 2, "nothing to score"),
    ("quantize", 2, "what shall be quantised"),
    ("quantize --documents x.npy --spec flat", 2, "built, not learned"),
    ("quantize --documents missing.npy", 1, "no vectors here"),
    ("quantize --documents x.npy --set bitss=4", 2, "bits"),
    ("serve RUN --port 70000", 2, "there is no port 70000"),
    ("serve RUN --depth 0", 2, "--depth"),
    ("serve RUN --port 0 --index no_such_index", 2, "no_such_index"),
    ("serve RUN --port 0 --index no_such.faiss", 1, "there is no index here"),
    ("doctor --index none.faiss", 1, "there is no index here"),
    ("doctor --vectors vectors.npy", 2, "--vectors and --queries go with --index"),
    ("collection beir:/no/such/folder", 1, r"error: .*\n +where: /no/such/folder\n +fix:"),
    *((line, 1, r"error: this is no run\n +where: /no/such/run\n +fix:")
      for line in ("search /no/such/run words", "index /no/such/run", "evaluate /no/such/run", "serve /no/such/run")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "said"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_what_is_refused_says_what_where_and_what_to_do(
    line: str, code: int, said: str, finished: Path, tiny_beir: Path, tmp_path: Path
) -> None:
    places = {"RUN": str(finished), "COLLECTION": f"beir:{tiny_beir}"}
    words = [places.get(word, word) for word in shlex.split(line)]
    assert re.search(said, error_of(run(*words, folder=tmp_path, environment={"COLUMNS": "200"}), code))


def test_ctrl_c_ends_with_130_and_the_run_goes_on_later(recipe_file: Path, tmp_path: Path) -> None:
    arguments = ["run", recipe_file, "--out", tmp_path / "run", "--store", tmp_path / "store"]
    process = program(*arguments, folder=tmp_path / "first")
    while not (tmp_path / "run" / "candidates" / "train").exists():
        time.sleep(0.02)
        assert process.process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    ending = process.wait()
    assert "interrupted: run the same command again" in error_of(ending, 130)
    assert run(*arguments, folder=tmp_path / "second").code == 0


def test_ctrl_c_before_anything_has_begun(recipe_file: Path, tmp_path: Path) -> None:
    """The real program, interrupted while it is still importing."""
    process = subprocess.Popen(
        [*MAIN, "run", str(recipe_file), "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    # Python itself may die of the signal when it came inside an import; a shell reports 130 for both.
    assert process.returncode in (130, -signal.SIGINT), error


# -- recipes and doctor -----------------------------------------------------------------------------------------------


def test_recipes_are_listed_shown_copied_and_described(tmp_path: Path) -> None:
    listed = ran("recipes", folder=tmp_path)
    assert "margin_mse" in listed.out
    assert "margin_mse" in json.loads(run("recipes", "list", "--json", folder=tmp_path).out)
    shown = run("recipes", "show", "margin_mse", "--set", "seed=5", folder=tmp_path)
    values = yaml.safe_load(shown.out)
    assert values["seed"] == 5 and values["student"]["query_length"] == 32
    copy = tmp_path / "sub" / "mine.yaml"
    assert run("recipes", "copy", "margin_mse", copy, folder=tmp_path).code == 0
    assert yaml.safe_load(copy.read_text())["name"] == "margin_mse"
    assert "the file exists" in error_of(run("recipes", "copy", "margin_mse", copy, folder=tmp_path), 2)
    schema = json.loads(run("recipes", "schema", folder=tmp_path).out)
    assert "loss.margin_mse" in schema["$defs"]


def test_doctor_finds_what_is_needed(tmp_path: Path) -> None:
    ending = ran("doctor", folder=tmp_path)
    assert "torch" in ending.out and "faiss" in ending.out and "MISSING" not in ending.out
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json", folder=tmp_path).out)}
    assert checks["torch"]["ok"] and checks["cache"]["found"].startswith(os.environ["RANKDISTILL_CACHE"])
    # Whatever is missing comes with the command that brings it.
    assert all(check["ok"] or check["fix"] for check in checks.values())


# -- the stages as verbs ----------------------------------------------------------------------------------------------


def test_a_collection_is_described(tiny_beir: Path, tmp_path: Path) -> None:
    described = json.loads(ran("collection", f"beir:{tiny_beir}", "--json", folder=tmp_path).out)
    assert described["documents"] == 32 and described["problems"] == []
    assert yaml.safe_load(ran("collection", f"beir:{tiny_beir}", folder=tmp_path).out) == described


def test_mine_score_and_the_store(tiny_beir: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Foreign input: candidates as a TREC run, a teacher by its folder; the same pairs again cost nothing."""
    from sentence_transformers import CrossEncoder

    spec = f"beir:{tiny_beir}"
    trec = tmp_path / "candidates.trec"
    ran("mine", spec, "--out", tmp_path / "mined", "--depth", "5", "--trec", trec, folder=tmp_path)
    assert len(trec.read_text().splitlines()) > 20
    CrossEncoder(str(tiny_encoder), num_labels=1, device="cpu").save_pretrained(str(tmp_path / "teacher"))
    teacher = f"{{type: cross_encoder, model: {tmp_path / 'teacher'}, precision: fp32}}"
    arguments = ["score", spec, "--teacher", teacher, "--store", tmp_path / "store", "--candidates"]
    scored = ran(*arguments, tmp_path / "mined" / "candidates", "--out", tmp_path / "scores.parquet", folder=tmp_path)
    assert "logit" in scored.out
    parts = sorted((tmp_path / "store").rglob("part-*.parquet"))
    assert run(*arguments, trec, folder=tmp_path).code == 0
    assert sorted((tmp_path / "store").rglob("part-*.parquet")) == parts  # nothing was scored again
    ran(
        "score", spec, "--import", tmp_path / "scores.parquet", "--format", "auto", "--store", tmp_path / "other",
        folder=tmp_path,
    )  # fmt: skip


def test_scores_of_another_collection_are_refused(finished: Path, tmp_path: Path, tiny_beir: Path) -> None:
    from rankdistill.scores.store import TeacherScores

    (folder,) = list(finished.parent.glob("store/*/*/manifest.json"))
    exported = tmp_path / "scores.parquet"
    TeacherScores(folder.parent).export(exported)
    other = tmp_path / "other"
    shutil.copytree(tiny_beir, other)
    with open(other / "corpus.jsonl", "a") as stream:
        stream.write(json.dumps({"_id": "new", "title": "", "text": "one more document"}) + "\n")
    ending = run("score", f"beir:{other}", "--import", exported, "--store", tmp_path / "store", folder=tmp_path)
    assert "belong to another collection" in error_of(ending, 1)


def test_train_makes_a_student_that_sentence_transformers_loads(
    finished: Path, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ran(
        "train", recipe_file, "--out", out, "--store", finished.parent / "store", "--set", "training.steps=2",
        "--student", "labels", folder=tmp_path,
    )  # fmt: skip
    assert (out / "baselines" / "labels" / "model" / "modules.json").is_file() and not (out / "student").exists()
    wrong = run("train", recipe_file, "--out", out, "--student", "label", folder=tmp_path)
    assert "no student 'label'" in error_of(wrong, 2)


def test_an_index_is_written_and_searched(finished: Path, tmp_path: Path) -> None:
    import faiss

    out = tmp_path / "my.faiss"
    ran("index", finished, "--spec", "hnsw", "--out", out, folder=tmp_path)
    assert faiss.read_index(str(out)).ntotal == 32
    exact = json.loads(run("search", finished, "which metal rusts", "-k", "3", "--json", folder=tmp_path).out)
    assert [hit["rank"] for hit in exact] == [1, 2, 3]
    assert exact[0]["score"] >= exact[1]["score"] >= exact[2]["score"] and exact[0]["text"]
    over = run("search", finished, "which metal rusts", "-k", "3", "--index", out, "--json", folder=tmp_path)
    assert [hit["doc_id"] for hit in json.loads(over.out)] == [hit["doc_id"] for hit in exact]
    plain = run("search", finished, "which metal rusts", "-k", "100", "--index", out, folder=tmp_path)
    assert len(plain.out.splitlines()) <= 32 and exact[0]["doc_id"] in plain.out  # no more hits than documents
    missing = run("search", finished, "words", "--index", tmp_path / "no.faiss", folder=tmp_path)
    assert "no.faiss" in error_of(missing, 1)


def test_evaluate_finds_sets_in_a_local_folder(finished: Path, tiny_beir: Path, tmp_path: Path) -> None:
    local = tmp_path / "sets"
    shutil.copytree(tiny_beir, local / "nfcorpus")
    arguments = ["evaluate", finished, "--suite", "beir", "--local", local, "--no-fetch", "--out", tmp_path / "results"]
    ending = ran(*arguments, "--json", folder=tmp_path)
    results = json.loads(ending.out)
    assert [one["collection"] for one in results["sets"]] or results["sets"]
    assert len(results["missing"]) > 5 and "ndcg@10" in results["metrics"]
    systems = {row["system"] for row in results["sets"][0]["rows"]}
    assert {"BM25", "student, untrained", "student, distilled"} <= systems
    runs = list((tmp_path / "results").rglob("*.trec"))
    assert runs and all(len(line.split()) == 6 for line in runs[0].read_text().splitlines())
    none = run("evaluate", finished, "--suite", "beir", "--no-fetch", folder=tmp_path)
    assert "no set of the suite" in error_of(none, 1) and "--local" in none.err


def test_run_prints_one_table_and_what_to_do_next_or_json(recipe_file: Path, finished: Path, tmp_path: Path) -> None:
    arguments = ["run", recipe_file, "--out", finished, "--store", finished.parent / "store"]
    ending = run(*arguments, "--json", folder=tmp_path)
    results = json.loads(ending.out)
    assert ending.code == 0 and {"BM25", "teacher", "student, flat"} <= {
        row["system"] for row in results["sets"][0]["rows"]
    }
    quiet = ran(*arguments, "--quiet", folder=tmp_path)
    assert quiet.err == "" and "student, distilled" in quiet.out
    table, steps = quiet.out.strip().rsplit("\n\n", 1)
    assert len(table.split("\n\n")) == 1 and "BM25" in table and "what serving costs" not in table
    assert len(steps.splitlines()) == 5
    assert f"rankdistill report {finished}" in steps and f"rankdistill recipes copy {recipe_file}" in steps


# -- bad places -------------------------------------------------------------------------------------------------------


def test_a_hub_name_without_a_network_is_said_quickly(recipe_file: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://192.0.2.1", "https_proxy": "", "HTTPS_PROXY": ""}
    ending = run(
        "run", recipe_file, "--out", tmp_path / "run", "--set", "student.model=some-org/some-model",
        "--set", "teacher=null", folder=tmp_path / "output", environment=environment,
    )  # fmt: skip
    assert time.monotonic() - started < 20
    error = error_of(ending, 1)
    assert "some-org/some-model" in error and "cannot be reached" in error and "fix:" in error


def metrics_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "evaluation" / "collection" / "results.json").read_text())
    return {row["system"]: row["means"] for row in results["sets"][0]["rows"]}


def test_two_processes_in_one_workspace(recipe_file: Path, finished: Path, tmp_path: Path) -> None:
    arguments = ["run", recipe_file, "--out", tmp_path / "run", "--store", tmp_path / "store"]
    pair = [program(*arguments, folder=tmp_path / name) for name in ("one", "two")]
    for process in pair:
        ending = process.wait()
        assert ending.code == 0, ending.err
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    assert not list((tmp_path / "run").rglob("*.partial"))


def _run_with_small_files(arguments: list[str], limit: int) -> None:
    from rankdistill.cli.main import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["rankdistill", *arguments]
    main()


@pytest.mark.parametrize("limit", [500, 8_000, 60_000])
def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(
    recipe_file: Path, finished: Path, tmp_path: Path, limit: int
) -> None:
    """No file may grow beyond `limit` bytes: like a full disk, it hits whichever stage writes first beyond it."""
    arguments = ["run", str(recipe_file), "--out", str(tmp_path / "run"), "--store", str(tmp_path / "store")]
    full = Forked(_run_with_small_files, arguments, limit, folder=tmp_path / "full").wait()
    error = error_of(full, 1)
    assert "the disk is full" in error and "where:" in error and "free some space and run the same command" in error
    ran(*arguments, folder=tmp_path / "after")
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(recipe_file: Path, finished: Path, small_disk: Path, tmp_path: Path) -> None:
    arguments = ["run", recipe_file, "--out", small_disk / "run", "--store", tmp_path / "store"]
    error = error_of(run(*arguments, folder=tmp_path / "full"), 1)
    assert "the disk is full" in error and str(small_disk) in error
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    ran(*arguments, folder=tmp_path / "after")
    assert metrics_of(small_disk / "run") == metrics_of(finished)


def test_teachers_are_probed_before_they_are_paid_for(tiny_beir: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    collection, out = f"beir:{tiny_beir}", tmp_path / "mined"
    teacher = ["--teacher", f"{{type: bi_encoder, model: {tiny_encoder}}}"]
    for flag in ("--no-positives", "--positives"):
        assert run("mine", collection, "--depth", "8", flag, "--out", str(out / flag), folder=tmp_path).code == 0
    probe = ["score", collection, *teacher, "--probe", "5", "--store", str(tmp_path / "store")]
    found = ran(*probe, "--candidates", str(out / "--no-positives" / "candidates"), folder=tmp_path)
    assert "5 training queries" in found.out and "pairs/s" in found.out
    assert "first stage" in found.err  # an untrained encoder: it is said to be no better
    refused = run(*probe, "--candidates", str(out / "--positives" / "candidates"), folder=tmp_path)
    assert refused.code == 2 and "positives first" in refused.err
    candidates = ["--candidates", str(out / "--positives" / "candidates")]
    several = run("score", collection, *teacher, *teacher, *candidates, folder=tmp_path)
    assert several.code == 2 and "--probe 50" in several.err
