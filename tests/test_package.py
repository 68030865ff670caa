"""What is installed: the wheel from its own folder, the lazy package, the start of the program."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rankdistill

SOURCE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the project's own backend in this process: no network."""
    build = pytest.importorskip("hatchling.build", reason="hatchling is in the extra [dev]")
    folder = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(SOURCE)
    try:
        return folder / str(build.build_wheel(str(folder)))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it and nothing of the source tree beside it."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True, env=environment, timeout=600)
    return folder


PROGRAM = ("-m", "rankdistill.cli.main")


def in_wheel(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the installed wheel, run in a folder that is not the source tree."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,  # a first import on a busy machine is slow
        check=False,
    )


def test_the_wheel_carries_every_declaration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    for folder in ("configs", "indexes", "eval/suites", "eval/reference"):
        shipped = {f"rankdistill/_declarations/{folder}/{path.name}" for path in (SOURCE / folder).glob("*.yaml")}
        assert shipped, folder
        assert shipped <= carried
    pages = {path.name for path in (SOURCE / "rankdistill/evaluation/page").iterdir()}
    assert {"base.css", "base.js", "report.css", "report.js"} <= pages
    assert {f"rankdistill/evaluation/page/{name}" for name in pages} <= carried
    assert not [name for name in carried if "tests/" in name or name.endswith(".pyc")]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    project = PROJECT["project"]
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(path).decode().splitlines()
    assert f"Version: {rankdistill.__version__}" in lines
    assert {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra")} == set(
        project["optional-dependencies"]
    )


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    found = in_wheel(installed, tmp_path, "-c", "import rankdistill; print(rankdistill.__file__)")
    assert Path(found.stdout.strip()) == installed / "rankdistill" / "__init__.py"


def test_recipes_are_listed_from_any_folder(installed: Path, tmp_path: Path) -> None:
    listed = in_wheel(installed, tmp_path, *PROGRAM, "recipes", "list")
    assert listed.returncode == 0, listed.stderr
    names = {line.split()[0] for line in listed.stdout.splitlines()}
    assert names == {path.stem for path in (SOURCE / "configs").glob("*.yaml")}


def test_a_copied_recipe_is_the_shipped_file(installed: Path, tmp_path: Path) -> None:
    copied = in_wheel(installed, tmp_path, *PROGRAM, "recipes", "copy", "margin_mse", "mine/own.yaml")
    assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "mine" / "own.yaml").read_bytes() == (SOURCE / "configs" / "margin_mse.yaml").read_bytes()


HEAVY = {"torch", "transformers", "sentence_transformers", "faiss", "ranx", "bm25s", "datasets", "pandas", "numba"}
NEEDLESS = HEAVY | {"numpy", "pyarrow", "pydantic"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rankdistill", NEEDLESS),
        ("rankdistill.cli.main", NEEDLESS),
        ("rankdistill.recipe", HEAVY),
        ("rankdistill.stages", HEAVY),
        ("rankdistill.collections", HEAVY | {"ir_datasets"}),
    ],
)
def test_importing_loads_nothing_heavy(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}\ndir(rankdistill)\nprint(*sorted({unwanted!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_public_name_is_there() -> None:
    for name in rankdistill.__all__:
        assert getattr(rankdistill, name) is not None
    assert set(rankdistill.__all__) <= set(dir(rankdistill))
    with pytest.raises(AttributeError, match="no attribute 'opn_collection'"):
        _ = rankdistill.opn_collection


PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())


def asked_for(python: str) -> list[Requirement]:
    """What `pip install .[dev]` asks for by name, on Linux."""
    extras = PROJECT["project"]["optional-dependencies"]
    found, waiting = [], [*PROJECT["project"]["dependencies"], *extras["dev"]]
    for entry in waiting:
        requirement = Requirement(entry)
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        if requirement.name == "rankdistill":
            waiting += chain.from_iterable(extras[extra] for extra in requirement.extras)
        else:
            found.append(requirement)
    return found


def pinned(file: str, python: str) -> dict[str, Version]:
    """name → the version that a file of constraints holds it to."""
    entries = [Requirement(line) for line in (SOURCE / file).read_text().splitlines() if not line.startswith("#")]
    system = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
    chosen = [entry for entry in entries if not entry.marker or entry.marker.evaluate(system)]
    assert len({entry.name for entry in chosen}) == len(chosen), "a package is pinned twice"
    return {entry.name: Version(str(entry.specifier).removeprefix("==")) for entry in chosen}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_is_that_of_the_declared_requirements(python: str) -> None:
    pins = pinned("constraints.txt", python) | pinned("constraints-cpu.txt", python)
    asked = asked_for(python)
    assert len(asked) > 30
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        assert name in pins and requirement.specifier.contains(pins[name]), f"{requirement}: run `make lock`"


def test_every_floor_is_what_the_lowest_environment_runs() -> None:
    pins = pinned("constraints-lowest.txt", "3.11") | pinned("constraints-cpu.txt", "3.11")
    for requirement in [*asked_for("3.11"), *map(Requirement, PROJECT["build-system"]["requires"])]:
        (floor,) = (Version(each.version) for each in requirement.specifier if each.operator in (">=", "=="))
        assert pins[canonicalize_name(requirement.name)] == floor, f"{requirement}: run `make lock`, raise the floor"


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_a_lock_names_versions_alone(file: str) -> None:
    text = (SOURCE / file).read_text()
    assert "://" not in text and "--" not in text
    assert not re.findall(r"^(?:torch|triton|nvidia|cuda)\b.*", text, re.MULTILINE), "a GPU set-up chooses these itself"


OPTIONAL = {"tensorboard"}  # used when installed, asked for by nobody


def test_every_imported_distribution_is_declared() -> None:
    """What the package imports must come with it, not by luck with another's dependencies."""
    project = PROJECT["project"]
    declared = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[\[>=<~! ]", entry)[0].lower().replace("_", "-") for entry in declared}
    owners_of = packages_distributions()
    ours = {"rankdistill", *sys.stdlib_module_names, *OPTIONAL}
    for path in (SOURCE / "rankdistill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules} - ours:
                owners = {owner.lower().replace("_", "-") for owner in owners_of.get(module, [module])}
                assert owners & names, f"{path.name} imports {module}, which pyproject.toml does not ask for"
