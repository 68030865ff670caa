"""The last net: any exception is told in words, with an exit code, and never as a traceback."""

from __future__ import annotations

import errno
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from rankdistill.cli.net import report
from rankdistill.errors import RankdistillError, UsageError


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fails", "words", "code"),
    [
        (lambda: json.loads("{"), "a JSON file cannot be read", 1),
        (lambda: b"\xff".decode(), "not UTF-8", 1),
        (lambda: zlib.decompress(b"x"), "a compressed file cannot be read", 1),
        (lambda: _raise(pa.ArrowInvalid("bad\npage")), "a Parquet or Arrow file cannot be read: bad page", 1),
        (lambda: _raise(SafetensorError("header")), "a file of weights cannot be read: header", 1),
        (lambda: Path("/nowhere/at/all").read_bytes(), "No such file or directory\n  where: /nowhere/at/all", 1),
        (lambda: _raise(OSError(errno.EIO, "Input/output error")), "Input/output error", 1),
        (lambda: _raise(MemoryError()), "memory is used up", 1),
        (lambda: _raise(RecursionError()), "nested too deeply", 1),
        (lambda: [][1], "this is a bug in rankdistill: IndexError: list index out of range", 1),
        (lambda: _raise(RankdistillError("what", fix="so")), "error: what\n  fix:   so", 1),
        (lambda: _raise(UsageError("a\x1b[2Jb")), "error: a\ufffd[2Jb", 2),
    ],
)
def test_every_exception_is_told_in_words(
    fails: Callable[[], object], words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as caught:
        fails()
    assert report(caught.value) == code
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told and told.startswith("error: ")


def test_the_traceback_is_there_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANKDISTILL_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert report(caught.value) == 1 and "Traceback" in capsys.readouterr().err
