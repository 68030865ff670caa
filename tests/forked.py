"""The program in processes of its own, forked from a server that has the libraries loaded.

A fresh Python needs seconds to import torch; a forked one starts at once, can be killed at any moment like any other
process, and shares nothing with the tests but the disk.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PRELOAD = [
    "rankdistill.cli.main",
    "rankdistill.stages",
    "rankdistill.training.trainer",
    "rankdistill.evaluation.evaluate",
    "rankdistill.evaluation.suites",
    "rankdistill.evaluation.results",
    "rankdistill.indexes.bm25",
    "rankdistill.indexes.dense",
    "rankdistill.indexes.mining",
    "rankdistill.teachers.cross_encoder_training",
    "rankdistill.teachers.ensemble",
    "rankdistill.teachers.recorded",
    "rankdistill.teachers.listwise",
    "rankdistill.teachers.llm.openai_server",
    "rankdistill.students.dense",
    "rankdistill.scores.lists",
    "rankdistill.teachers.scoring",
    "rankdistill.collections.beir",
    "rankdistill.losses.contrastive",
    "rankdistill.losses.margin_mse",
    "rankdistill.sampling.base",
    "sentence_transformers.cross_encoder",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert_fast",
    "bm25s.numba",
    "faiss",
    "openai",
    "openai.resources.chat",
    "orjson",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class Ending(NamedTuple):
    """How a process ended: its exit code (minus the signal's number after a kill) and what it printed."""

    code: int | None
    out: str
    err: str


class Forked:
    """A function running in a forked process, its output in files below `folder`."""

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in ("out", "err"):
            (folder / name).unlink(missing_ok=True)  # an earlier one's
        _start_server()
        variables = {**os.environ, **(environment or {})}
        self.process = _context.Process(target=_child, args=(function, arguments, str(folder), variables))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 300.0) -> Ending:
        """Its ending; killed when it takes longer."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"not finished after {seconds} s:\n{self._text('err')}")
        return Ending(self.process.exitcode, self._text("out"), self._text("err"))

    def work(self, seconds: float) -> bool:
        """Wait until it has worked so long, in processor time: a busy machine shifts nothing. False if it ended."""
        while self.process.is_alive():
            if self.processor_seconds() >= seconds:
                return True
            self.process.join(0.004)
        return False

    def processor_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended just now
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL: nothing in the process can react."""
        self.process.kill()
        self.process.join()

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.is_file() else ""


def program(*arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None) -> Forked:
    """`rankdistill ARGUMENTS` in a forked process."""
    return Forked(_rankdistill, [str(argument) for argument in arguments], folder=folder, environment=environment)


def run(*arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None) -> Ending:
    """`rankdistill ARGUMENTS`, to its end."""
    return program(*arguments, folder=folder, environment=environment).wait()


def ran(*arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None) -> Ending:
    """The same of what must succeed."""
    ending = run(*arguments, folder=folder, environment=environment)
    assert ending.code == 0, ending.err
    return ending


def _start_server() -> None:
    before = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        # What the program sets before it imports the libraries, which the server has imported already.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    try:
        forkserver.ensure_running()  # a server once started goes on
    finally:
        os.environ.clear()
        os.environ.update(before)


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], folder: str, variables: Mapping[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        target = os.open(Path(folder) / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()  # the libraries' objects: each training collects garbage, and would look through them all
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _rankdistill(arguments: list[str]) -> None:
    from rankdistill.cli.main import main

    sys.argv = ["rankdistill", *arguments]
    main()
