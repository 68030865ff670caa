"""Artifacts: published whole or not at all, named by their content, safe to share by several processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked

from rankdistill.artifacts import (
    cache_dir,
    disk_errors,
    file_digest,
    find_artifact,
    fingerprint,
    locked,
    open_artifact,
    write_artifact,
    write_atomically,
)
from rankdistill.errors import RankdistillError


def write(path: Path, print_: str = "abc", resume: bool = False, content: str = "text") -> None:
    with write_artifact(path, kind="thing", fingerprint=print_, settings={"a": 1}, resume=resume) as writer:
        (writer.path / "file").write_text(content)
        writer.counts["files"] = 1


def test_an_artifact_says_what_made_it(tmp_path: Path) -> None:
    with write_artifact(
        tmp_path / "a", kind="thing", fingerprint="abc", settings={"x": 2}, inputs={"lists": "def"}
    ) as writer:
        writer.counts["rows"] = 3
        writer.notes["note"] = "n"
    artifact = open_artifact(tmp_path / "a", "thing")
    manifest = artifact.manifest
    assert (artifact.kind, artifact.fingerprint, artifact.counts) == ("thing", "abc", {"rows": 3})
    assert manifest["settings"] == {"x": 2} and manifest["inputs"] == {"lists": "def"} and manifest["note"] == "n"
    assert manifest["device"] == "cpu" and manifest["seconds"] >= 0 and "torch" in manifest["libraries"]
    assert "rows=3" in repr(artifact)


@pytest.mark.parametrize("resume", [False, True])
def test_a_failed_attempt_publishes_nothing_and_harms_nothing(tmp_path: Path, resume: bool) -> None:
    path = tmp_path / "a"
    write(path, "old", content="old")
    with (
        pytest.raises(KeyboardInterrupt),
        write_artifact(path, kind="thing", fingerprint="new", settings={}, resume=resume) as writer,
    ):
        (writer.path / "part").write_text("half")
        raise KeyboardInterrupt
    assert open_artifact(path).fingerprint == "old" and (path / "file").read_text() == "old"
    assert find_artifact(path, "thing", "new") is None
    assert len(list(tmp_path.glob(".a.*.partial"))) == resume
    with write_artifact(path, kind="thing", fingerprint="new", settings={}, resume=resume) as writer:
        assert (writer.path / "part").exists() == resume  # parts saved before a kill are handed out again
    assert open_artifact(path).fingerprint == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_parts_of_other_settings_are_not_resumed(tmp_path: Path) -> None:
    for print_ in ("one", "two"):
        with (
            pytest.raises(OSError),
            write_artifact(tmp_path / "a", kind="thing", fingerprint=print_, settings={}, resume=True) as writer,
        ):
            assert not list(writer.path.iterdir())
            (writer.path / "part").write_text(print_)
            raise OSError


def test_sweeping_up_leaves_other_artifacts_alone(tmp_path: Path) -> None:
    """`set.v2` is being written while `set` is published beside it."""
    with write_artifact(tmp_path / "set.v2", kind="thing", fingerprint="abc", settings={}) as writer:
        (writer.path / "part").write_text("half")
        write(tmp_path / "set")
        write(tmp_path / "s[e]t*")
    assert (tmp_path / "set.v2" / "part").is_file()


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(RankdistillError, match="there is no thing here"):
        open_artifact(path, "thing")
    write(path)
    with pytest.raises(RankdistillError, match="this is a thing artifact, not lists"):
        open_artifact(path, "lists")
    for text in ("{", "[]", '{"kind": "thing"}'):
        (path / "manifest.json").write_text(text)
        with pytest.raises(RankdistillError, match="manifest cannot be read"):
            open_artifact(path)


def test_a_fingerprint_depends_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [1.5, None, "ü"]}) == fingerprint({"b": [1.5, None, "ü"], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"b": 1}, [], {}, None, "", [["a", 1]]]
    assert len({fingerprint(value) for value in different}) == len(different)
    # The same in every process, whatever Python's hash seed: it names files that outlive them.
    code = "from rankdistill.artifacts import fingerprint; print(fingerprint({'a': 1, 'b': {'c', }}))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1 and b"" not in prints


def test_a_digest_sees_every_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    before = file_digest(path)
    path.write_text("two")  # the same size, at once
    assert file_digest(path) != before
    old = time.time() - 100
    os.utime(path, (old, old))
    resting = file_digest(path)
    assert file_digest(path) == resting  # now from memory
    path.write_text("six")
    assert file_digest(path) not in (before, resting)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKDISTILL_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("RANKDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "rankdistill"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RankdistillError, match=r"the disk is full(?s:.*)finished parts are kept"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "the disk is full"),
        (errno.EROFS, "cannot write"),
        (errno.EACCES, "cannot write"),
    ],
)
def test_disk_errors_say_what_to_do(number: int, words: str) -> None:
    with pytest.raises(RankdistillError, match=words) as caught, disk_errors("/some/where"):
        raise OSError(number, os.strerror(number))
    assert caught.value.where == "/some/where"
    with pytest.raises(FileNotFoundError), disk_errors("/some/where"):
        raise FileNotFoundError


def _hold(path: str, log: str, seconds: float) -> None:
    with locked(path):
        with open(log, "a") as stream:
            stream.write("in\n")
        time.sleep(seconds)
        with open(log, "a") as stream:
            stream.write("out\n")


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = Forked(_hold, str(tmp_path / "a"), str(log), 60.0, folder=tmp_path / "1")
    while not log.is_file() or log.read_text() != "in\n":
        time.sleep(0.02)
    others = [Forked(_hold, str(tmp_path / "a"), str(log), 0.1, folder=tmp_path / str(n)) for n in (2, 3)]
    time.sleep(0.5)
    assert log.read_text() == "in\n"  # they wait
    first.kill()
    assert [other.wait(30).code for other in others] == [0, 0]
    assert log.read_text().split() == ["in", "in", "out", "in", "out"]


def _write_forever(path: str) -> None:
    Path(path).with_name("started").touch()
    for number in range(1_000_000):
        with locked(path), write_artifact(Path(path), kind="thing", fingerprint=str(number), settings={}) as writer:
            for name in range(5):
                (writer.path / f"file-{name}").write_text(str(number))


def test_a_kill_at_any_moment_leaves_a_whole_artifact_or_none(tmp_path: Path) -> None:
    """Ten kills of a process that does nothing but publish."""
    path = tmp_path / "a"
    for number in range(10):
        writer = Forked(_write_forever, str(path), folder=tmp_path / "out")
        while not (tmp_path / "started").exists():
            time.sleep(0.005)
        time.sleep(0.05 + 0.0137 * number)
        writer.kill()
        (tmp_path / "started").unlink()
        if (path / "manifest.json").is_file():
            print_ = json.loads((path / "manifest.json").read_text())["fingerprint"]
            assert [file.read_text() for file in sorted(path.glob("file-*"))] == [print_] * 5
    write(path, "last")
    assert open_artifact(path).fingerprint == "last"
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"a", ".a.lock", "out"}  # the next whole one sweeps up after the killed
