"""`rankdistill serve`: from a run's folder to a page, and its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked, program, run

Serve = Callable[..., tuple[Forked, str]]


@pytest.fixture
def serve(finished: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start `rankdistill serve` over the finished run and wait for its address."""
    started: list[Forked] = []

    def start(*arguments: str) -> tuple[Forked, str]:
        folder = tmp_path / str(len(started))
        process = program("serve", finished, "--port", "0", *arguments, folder=folder)
        started.append(process)
        while not (printed := (folder / "out").read_text() if (folder / "out").is_file() else "").endswith("\n"):
            assert process.process.is_alive(), (folder / "err").read_text()
            time.sleep(0.02)
        return process, printed.strip()

    yield start
    for process in started:
        process.kill()


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_the_run_until_it_is_told_to_stop(serve: Serve, how: signal.Signals) -> None:
    process, url = serve("--depth", "3")
    about = get(url + "api/about")
    assert about["name"] == "tiny" and about["depth"] == 3 and about["teacher"]["depth"] == 30
    # The recipe's flat index finds what the student finds and is not shown twice.
    assert [one["name"] for one in about["columns"]] == ["BM25", "student"]
    answer = get(url + "api/search?q=star+that+heats+the+earth&teacher=all")
    assert [one["key"] for one in answer["columns"]] == ["bm25", "student", "teacher"]
    assert [one["error"] for one in answer["columns"]] == ["", "", ""]
    assert [len(one["hits"]) for one in answer["columns"][1:]] == [3, 3]
    assert answer["columns"][0]["hits"][0]["doc_id"] == "d-sun" and answer["judged"]["query_id"] == "q-sun"

    os.kill(process.pid, how)
    ending = process.wait()
    assert ending.code == 0 and ending.out == url + "\n", ending.err
    assert "Traceback" not in ending.err and "warning" not in ending.err
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(url.rstrip("/").rpartition(":")[2])))
        free.listen()


def test_a_search_agrees_with_the_verb_search(serve: Serve, finished: Path, tmp_path: Path) -> None:
    _, url = serve("--index", "flat", "--index", str(finished / "indexes" / "flat.faiss"), "--index", "sq8")
    answer = get(url + "api/search?q=what+gas+fills+balloons&k=5")
    assert [one["key"] for one in answer["columns"]] == [
        "bm25",
        "student",
        "student-flat",
        "student-flat-2",
        "student-sq8",
    ]
    found = json.loads(run("search", finished, "what gas fills balloons", "-k", "5", "--json", folder=tmp_path).out)
    for column in answer["columns"][1:4]:
        assert [hit["doc_id"] for hit in column["hits"]] == [one["doc_id"] for one in found]
        assert [round(hit["score"], 3) for hit in column["hits"]] == [round(one["score"], 3) for one in found]


def test_a_taken_port_is_said_before_anything_is_loaded(finished: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ending = run("serve", finished, "--port", port, folder=tmp_path)
    assert ending.code == 1 and ending.out == "" and "Traceback" not in ending.err
    assert f"error: port {port} is taken" in ending.err and "--port 0 picks a free one" in ending.err


def test_other_addresses_than_loopback_come_with_a_warning(serve: Serve) -> None:
    process, url = serve("--host", "0.0.0.0", "--quiet")
    assert url.startswith("http://127.0.0.1:") and get(url + "api/about")["name"] == "tiny"
    os.kill(process.pid, signal.SIGINT)
    ending = process.wait()
    assert ending.code == 0
    assert ending.err.startswith("warning: 0.0.0.0 is not loopback: whoever reaches this machine can search")
