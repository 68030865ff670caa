"""`score` with a language model behind a server: --dry-run, --budget, kill -9, and keys that are written nowhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from forked import Ending, program, ran, run
from llm_server import Body, Server, by_number, serving

from rankdistill.collections import Collection

SECRET = "sk-test-77aa3f9c1d"
CONCURRENCY = 3


@pytest.fixture
def server() -> Iterator[Server]:
    def slowly(body: Body, number: int) -> Any:
        time.sleep(0.01)
        return by_number(body)

    with serving(slowly) as one:
        yield one


@pytest.fixture
def trec(tiny_collection: Collection, tmp_path: Path) -> Path:
    """Every training query with the same ten documents: two windows of six, by four."""
    doc_ids = tiny_collection.doc_ids(range(10))
    lines = [
        f"{query_id} Q0 {doc_id} {rank} {20 - rank} run"
        for query_id in tiny_collection.query_ids("train")
        for rank, doc_id in enumerate(doc_ids, 1)
    ]
    path = tmp_path / "run.trec"
    path.write_text("\n".join(lines) + "\n")
    return path


class Job:
    """The verb with a listwise teacher behind the server."""

    def __init__(self, server: Server, beir: Path, trec: Path, folder: Path) -> None:
        self.folder = folder
        backend = {"type": "openai", "model": "m", "base_url": server.url, "key": "MY_KEY", "concurrency": CONCURRENCY}
        self.teacher = {"type": "listwise", "backend": backend, "window": 6, "step": 4, "queries_at_once": 4}
        self.arguments = ["score", f"beir:{beir}", "--candidates", str(trec), "--store", str(folder / "store")]
        self.environment = {"MY_KEY": SECRET}

    def all(self, *more: str, **settings: Any) -> list[str]:
        return [*self.arguments, "--teacher", yaml.safe_dump({**self.teacher, **settings}), *more]

    def run(self, *more: str, **settings: Any) -> Ending:
        return run(*self.all(*more, **settings), folder=self.folder / "output", environment=self.environment)


@pytest.fixture
def job(server: Server, tiny_beir: Path, trec: Path, tmp_path: Path) -> Job:
    return Job(server, tiny_beir, trec, tmp_path)


def test_dry_run_budget_and_going_on(job: Job, server: Server, tiny_collection: Collection) -> None:
    lists = len(tiny_collection.query_ids("train"))
    prices = {"prompt": 100.0, "answer": 200.0}
    # Before: what it would cost, and nothing asked.
    ending = job.run("--dry-run", "--budget", "5calls", prices=prices)
    assert ending.code == 0, ending.err
    assert f"{10 * lists:,} pairs to score" in ending.out and f"expected: {2 * lists} calls" in ending.out
    assert "in money" in ending.out and "the budget of 5 calls may not hold that" in ending.out
    assert server.bodies == [] and not (job.folder / "store").exists()
    # Stopped at the limit, with what to do.
    ending = job.run("--budget", "5calls")
    assert ending.code == 1 and len(server.bodies) == 5
    assert "the budget of 5 calls" in ending.err and "goes on from here" in ending.err
    # What is left costs so much.
    ending = job.run("--dry-run")
    assert f"expected: {2 * lists - 5} calls" in ending.out and "answers are in the cache" in ending.out
    # The recipe's own budget; the command line's counts instead.
    ending = job.run(budget="2calls")
    assert ending.code == 1 and len(server.bodies) == 7
    ending = job.run("--budget", "1000calls", "--out", str(job.folder / "scores.parquet"), budget="2calls")
    assert ending.code == 0, ending.err
    assert len(server.bodies) == 2 * lists and set(server.asked().values()) == {1}
    assert f"spent: {2 * lists - 7} calls" in ending.err and "answers from the cache" in ending.err
    assert pq.read_table(job.folder / "scores.parquet").num_rows == 10 * lists
    # Everything is in the store: nothing is asked.
    ending = job.run()
    assert ending.code == 0 and "spent: 0 calls" in ending.err and len(server.bodies) == 2 * lists


def test_killed_and_run_again_no_window_is_paid_twice(job: Job, server: Server, tiny_collection: Collection) -> None:
    lists = len(tiny_collection.query_ids("train"))
    kills = 0
    for target in (3, 9):
        process = program(*job.all(), folder=job.folder / "output", environment=job.environment)
        while process.process.is_alive() and len(server.bodies) < target:
            time.sleep(0.002)
        kills += process.process.is_alive()
        process.kill()
        process.wait()
    ending = job.run()
    assert ending.code == 0, ending.err
    assert kills == 2 and len(server.asked()) == 2 * lists
    again = sum(times - 1 for times in server.asked().values())
    assert again <= kills * CONCURRENCY, f"{again} windows paid again after {kills} kills"


def test_the_key_is_sent_and_written_nowhere(job: Job, server: Server) -> None:
    ending = job.run("--out", str(job.folder / "scores.parquet"))
    assert ending.code == 0, ending.err
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    files = [path for path in job.folder.rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" and "MY_KEY" in path.read_text() for path in files)
    assert any(path.name == "answers.sqlite" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_what_is_refused(job: Job, server: Server, tiny_encoder: Path) -> None:
    for more, settings, message in (
        (["--budget", "lots"], {}, "is no budget"),
        (["--budget", "3.50"], {}, "needs prices"),
        ([], {"prices": {"prompt": 1.0}}, "prices.answer: field required"),
        ([], {"decoding": "constrained"}, "held to given words"),
    ):
        ending = job.run(*more, **settings)  # type: ignore[arg-type]
        assert ending.code == 2 and message in ending.err, ending.err
    del job.environment["MY_KEY"]
    ending = job.run()
    assert ending.code == 2 and "MY_KEY is not set" in ending.err
    assert server.bodies == []
    # A teacher that asks nobody.
    teacher = yaml.safe_dump({"type": "bi_encoder", "model": str(tiny_encoder)})
    arguments = [*job.arguments, "--teacher", teacher]
    ending = run(*arguments, "--budget", "5calls", folder=job.folder / "output")
    assert ending.code == 2 and "asks no language model" in ending.err
    ending = ran(*arguments, "--dry-run", folder=job.folder / "output")
    assert re.search(r"^\d+ pairs to score; a teacher of type 'bi_encoder'", ending.out)
    assert not (job.folder / "store").exists() or not list((job.folder / "store").glob("*/*/part-*"))
