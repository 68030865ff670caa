"""Artifacts: published whole or not at all, named by their content, safe to share by several processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from forked import Forked

from rankdistill.artifacts import (
    CLAIM,
    SMALL,
    ArtifactWriter,
    cache_dir,
    check_file,
    check_place,
    claim_folder,
    damaged_file,
    disk_errors,
    file_digest,
    find_artifact,
    fingerprint,
    locked,
    obtain,
    open_artifact,
    remove_artifacts,
    remove_leftovers,
    sealed_artifact,
    write_artifact,
    write_atomically,
)
from rankdistill.errors import RankdistillError, UsageError


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


@pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, b"x", float("nan"), {"a": float("inf")}])
def test_what_is_no_plain_value_has_no_fingerprint(value: object) -> None:
    """An object's text would tell its address: another one in each process."""
    with pytest.raises(RankdistillError, match="no fingerprint"):
        fingerprint(["settings", {"value": value}])


def test_a_fingerprint_depends_on_content_alone() -> None:
    assert fingerprint({"a": 1, "b": [1.5, None, "ü"]}) == fingerprint({"b": [1.5, None, "ü"], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"b": 1}, [], {}, None, "", [["a", 1]]]
    assert len({fingerprint(value) for value in different}) == len(different)
    # The same in every process, whatever Python's hash seed: it names files that outlive them.
    code = "from rankdistill.artifacts import fingerprint; print(fingerprint({'a': 1, 'b': ['c']}))"
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1 and b"" not in prints


@pytest.fixture
def resting(tmp_path: Path) -> Path:
    """A file whose digest is remembered: large, and at rest for two seconds since its last change of any kind."""
    path = tmp_path / "resting"
    path.write_bytes(b"a" * (SMALL + 1))
    os.utime(path, (time.time() - 100,) * 2)
    time.sleep(2.1)
    return path


def test_a_digest_sees_every_change(resting: Path) -> None:
    """Of a file that changes at once to one of the same size, and of one whose time was put back."""
    small = resting.with_name("small")
    small.write_text("one")
    before = file_digest(small)
    small.write_text("two")
    assert file_digest(small) != before
    stat, before = resting.stat(), file_digest(resting)
    assert any((cache_dir() / "digests").iterdir()) and file_digest(resting) == before  # now from memory
    resting.write_bytes(b"b" * (SMALL + 1))
    os.utime(resting, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert resting.stat().st_mtime_ns == stat.st_mtime_ns and file_digest(resting) != before


def test_a_memory_of_digests_that_is_damaged_or_cannot_be_written_costs_time_alone(
    resting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = file_digest(resting)
    for remembered in (cache_dir() / "digests").iterdir():
        remembered.write_text("")
    assert file_digest(resting) == digest
    monkeypatch.setenv("RANKDISTILL_CACHE", "/dev/null/cache")
    assert file_digest(resting) == digest


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


def test_disk_errors_say_what_to_do() -> None:
    full, forbidden = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EROFS, errno.EACCES)
    for number in (*full, *forbidden):
        words = "the disk is full" if number in full else "cannot write"
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


def _obtain(path: str, print_: str, log: str, fails: bool = False) -> None:
    def make(writer: ArtifactWriter) -> None:
        with open(log, "a") as stream:
            stream.write(print_)
        time.sleep(0.2)
        (writer.path / "file").write_text(print_)
        if fails:
            raise KeyboardInterrupt

    artifact = obtain(path, kind="thing", fingerprint=print_, settings={}, inputs={"lists": "def"}, make=make)
    assert (artifact.path / "file").read_text() == print_ and artifact.manifest["inputs"] == {"lists": "def"}


def test_what_is_obtained_is_made_once_whoever_asks(tmp_path: Path) -> None:
    path, log = str(tmp_path / "a"), tmp_path / "log"
    processes = [Forked(_obtain, path, "x", str(log), folder=tmp_path / str(n)) for n in range(3)]
    assert [process.wait(30).code for process in processes] == [0, 0, 0] and log.read_text() == "x"
    with pytest.raises(KeyboardInterrupt):
        _obtain(path, "y", str(log), fails=True)
    assert open_artifact(path).fingerprint == "x" and log.read_text() == "xy"
    _obtain(path, "y", str(log))
    (tmp_path / "a" / "file").write_text("z")  # damaged
    _obtain(path, "y", str(log))
    assert log.read_text() == "xyyy"


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


# -- what is not ours -------------------------------------------------------------------------------------------------


def claim(folder: Path) -> None:
    with claim_folder(folder):
        pass


def test_a_file_of_the_user_in_an_artifact_is_not_deleted_with_it(tmp_path: Path) -> None:
    for name in ("notes.txt", "deep/notes.txt", "link"):
        write(tmp_path / "a")
        notes = tmp_path / "a" / name
        notes.parent.mkdir(exist_ok=True)
        notes.symlink_to(tmp_path) if name == "link" else notes.write_text("mine")
        (tmp_path / "a" / ".DS_Store").write_text("a file system's")
        for act in (write, remove_artifacts):
            with pytest.raises(UsageError, match="there is a file in this a that rankdistill did not write") as caught:
                act(tmp_path / "a")
            assert caught.value.where == str(notes) and os.path.lexists(notes)
        notes.unlink()
        write(tmp_path / "a")
        remove_artifacts(tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_a_claimed_folder_is_sealed_with_what_was_written_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    claim(folder)
    (folder / "notes.txt").write_text("mine")
    time.sleep(0.02)
    with claim_folder(folder):
        (folder / "runs").mkdir()
        for name in ("table.md", "runs/a.trec"):
            (folder / name).write_text("ours")
    sealed = sealed_artifact(folder / CLAIM)
    assert sorted(sealed.manifest["files"]) == ["runs/a.trec", "table.md"] and damaged_file(sealed) is None
    with pytest.raises(UsageError, match="did not write"):
        remove_artifacts(folder)
    (folder / "notes.txt").unlink()
    (folder / "runs" / "a.trec").write_text("OURS")
    assert damaged_file(sealed, thorough=True) == "runs/a.trec"
    (folder / CLAIM).write_text("cut")
    remove_artifacts(folder)
    assert not folder.exists()


OTHERS = {
    "thesis": {"notes.txt": "mine"},
    "extension": {"manifest.json": '{"kind": "extension", "fingerprint": "x"}', "code.js": "1"},
    "broken": {"manifest.json": "{", "code.js": "1"},
    "nested": {"deep/er/notes.txt": "mine"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_origin_is_never_replaced(tmp_path: Path, name: str) -> None:
    for file, content in OTHERS[name].items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(content)
    with pytest.raises(UsageError, match="there is a folder here that rankdistill did not write"):
        write(tmp_path / name)
    with pytest.raises(UsageError, match="did not write"):
        claim(tmp_path / name)
    remove_artifacts(tmp_path / name)
    assert {file: (tmp_path / name / file).read_text() for file in OTHERS[name]} == OTHERS[name]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_comes_there_while_an_artifact_is_written_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="did not write"),
        write_artifact(tmp_path / "a", kind="thing", fingerprint="abc", settings={}),
    ):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes.txt").write_text("mine")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_new_empty_and_own_places_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "new"):
        write(tmp_path / name)
        check_place(tmp_path / name)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "..rankdistill.1.tmp").write_text("")  # of a process that was killed while it claimed it
    claim(tmp_path / "results")
    (tmp_path / "results" / "table.md").write_text("ours")
    claim(tmp_path / "results")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="there is a file here"):
        write(tmp_path / "file")


def test_an_interrupt_just_after_publishing_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path) -> None:
        if path == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr("rankdistill.artifacts._sync", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", resume=True)
    assert open_artifact(tmp_path / "a").fingerprint == "abc"


def _publish_without_end(path: Path) -> None:
    for number in range(sys.maxsize):
        with write_artifact(path, kind="thing", fingerprint="abc", settings={}) as writer:
            (writer.path / f"file {number}").write_text("text")


def test_what_another_process_is_publishing_is_taken_for_no_stranger_s(tmp_path: Path) -> None:
    write(tmp_path / "a")
    publishing = Forked(_publish_without_end, tmp_path / "a", folder=tmp_path / "log")
    try:
        end = time.time() + 1.5
        while time.time() < end:
            check_place(tmp_path / "a")
    finally:
        publishing.kill()


def test_a_file_is_written_over_only_where_it_is_ours(tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    check_file(file)
    file.write_text("")
    check_file(file)
    file.write_text("| a |\n" * 10_000 + "<!-- written by rankdistill -->")
    check_file(file)
    file.write_text("my notes")
    with pytest.raises(UsageError, match="there is a file here that rankdistill did not write"):
        check_file(file)
    file.write_text("# Written by rankdistill\n")
    check_file(file, mark="# Written by")
    with pytest.raises(UsageError, match="there is a file of another kind here"):
        check_file(file, mark="<!doctype html")
    for folder in ("artifact/model", "results/runs"):
        write(tmp_path / "artifact")
        claim(tmp_path / "results")
        with pytest.raises(UsageError, match="this would change what rankdistill has written there"):
            check_file(tmp_path / folder / "table.md", ours=True)
    check_file(file, ours=True)
    with pytest.raises(UsageError, match="there is a folder here, and a file is to be written"):
        check_file(tmp_path)


def test_a_damaged_manifest_in_the_cache_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKDISTILL_CACHE", str(tmp_path))
    for name, taken in (("collections/0123456789abcdef-2", True), ("collections/thesis", False)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("")
        with nullcontext() if taken else pytest.raises(UsageError, match="did not write"):
            check_place(tmp_path / name)


def test_no_file_takes_a_device_s_or_a_pipe_s_place(tmp_path: Path) -> None:
    """As root a rename onto /dev/null succeeds, and takes it from the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no file but a device or a pipe"):
        check_file(tmp_path / "pipe")
    with pytest.raises(RankdistillError, match="cannot write"):
        write_atomically(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_removing_artifacts_leaves_what_lies_beside_them(tmp_path: Path) -> None:
    write(tmp_path / "engines" / "bm25-1")
    (tmp_path / "engines" / "notes.txt").write_text("mine")
    write(tmp_path / "lists")
    remove_artifacts(tmp_path / "engines")
    remove_artifacts(tmp_path / "lists")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["engines", "notes.txt"]


@pytest.mark.parametrize("place", ["/dev/null/below", "/proc/below", "file/below"])
def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RankdistillError, match=r"cannot write|did not write|No such file") as caught:
        write(Path(place) if place.startswith("/") else tmp_path / place)
    assert "where" in str(caught.value)


def test_leftovers_of_processes_that_are_gone_are_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        f".part-1.parquet.{gone.pid}.tmp": False,
        f".part-2.parquet.{os.getpid()}.tmp": True,  # its process runs
        ".notes.tmp": True,
        "data.tmp": True,
    }
    for name in names:
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f".fresh.{gone.pid}.tmp").write_text("another machine may be writing it")
    remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert (tmp_path / f".fresh.{gone.pid}.tmp").exists()


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, SMALL + 100])
def test_a_flipped_bit_is_found_when_an_artifact_is_used(
    tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with write_artifact(tmp_path / "a", kind="thing", fingerprint="abc", settings={}) as writer:
        (writer.path / "in").mkdir()
        (writer.path / "in" / "file").write_bytes(b"x" * size)
    artifact = open_artifact(tmp_path / "a")
    assert damaged_file(artifact, thorough=True) is None
    with open(tmp_path / "a/in/file", "r+b") as stream:
        stream.seek(50)
        stream.write(b"y")
    assert damaged_file(artifact) == damaged_file(artifact, thorough=True) == "in/file"
    with pytest.raises(RankdistillError, match="a file of this thing artifact is damaged") as caught:
        open_artifact(tmp_path / "a")
    assert "in/file" in str(caught.value.where) and "delete" in str(caught.value.fix)
    assert find_artifact(tmp_path / "a", "thing", "abc") is None  # and so it is made again
    assert "it is made again" in capsys.readouterr().err
    (tmp_path / "a/in/file").unlink()
    assert damaged_file(artifact) == "in/file"


def test_everything_is_on_the_disk_before_an_artifact_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        order.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        order.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr("os.fsync", noted_sync)
    monkeypatch.setattr("os.replace", noted_replace)
    with write_artifact(tmp_path / "a", kind="thing", fingerprint="abc", settings={}) as writer:
        (writer.path / "in").mkdir()
        (writer.path / "in" / "file").write_text("x")
    whole = order.index("rename a")
    before = order[:whole]
    assert {"sync file", "sync in", "sync .a.abc.partial"} <= set(before)
    assert before.index("sync file") < before.index("rename manifest.json")
    assert order[whole + 1] == f"sync {tmp_path.name}"


def test_who_waits_for_another_process_is_told(tmp_path: Path) -> None:
    code = (
        "import sys; from rankdistill.artifacts import locked\n"
        f"with locked({str(tmp_path / 'a')!r}, 'another one has it'): print('mine')"
    )
    with locked(tmp_path / "a"):
        other = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert other.stderr is not None and other.stderr.readline() == "another one has it\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "mine\n"
