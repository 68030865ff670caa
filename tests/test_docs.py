"""README, docs/ and CONTRIBUTING: their commands, recipes and Python work, and the reference leaves nothing out."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import click
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import rankdistill
from rankdistill.cli.main import app
from rankdistill.recipe import KINDS, build, check_recipe, json_schema, load_recipe, merge, shipped, shipped_methods

SOURCE = Path(__file__).parents[1]
FILES = [SOURCE / "README.md", SOURCE / "CONTRIBUTING.md", *sorted((SOURCE / "docs").rglob("*.md"))]
PAGES = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The lines of `rankdistill` in blocks of shell, as words; `$(cat teacher.yaml)` is the page's first teacher."""
    first = yaml.safe_load(next(iter(blocks(text, "yaml")), "{}"))
    teacher = yaml.safe_dump(first.get("teacher", first))
    lines = [line for block in blocks(text, "bash") for line in block.splitlines() if line.startswith("rankdistill ")]
    return [
        [word.replace("$(cat teacher.yaml)", teacher) for word in shlex.split(line, comments=True)[1:]]
        for line in lines
    ]


def verb(words: list[str]) -> tuple[click.Command, list[str]]:
    command: Any = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_pages_show_commands() -> None:
    assert len(commands(README)) == 5
    assert sum(len(commands(text)) for text in PAGES.values()) > 50


@every_page
def test_commands_in_blocks_are_taken(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the program reads them: verbs, options, their values, and the recipes and methods that they name."""
    if page == "docs/how-to/own-methods.md":
        (tmp_path / "my_package").mkdir()
        (tmp_path / "my_package" / "losses.py").write_text(blocks(PAGES[page], "python")[0])
        monkeypatch.syspath_prepend(tmp_path)
    for words in commands(PAGES[page]):
        command, rest = verb(words)
        given = command.make_context(words[0], list(rest)).params  # an unknown option or a missing argument raises
        if given.get("recipe") in shipped("configs"):
            load_recipe(given["recipe"], given.get("changes") or [])
        for kind in ("teacher", "source"):
            for settings in given.get(kind) or []:
                build(kind, settings)
        if words[0] in ("index", "quantize"):
            from rankdistill.indexes.specification import any_specification

            for name in [given["spec"]] if words[0] == "quantize" else given["spec"] or []:
                any_specification(name, given.get("changes") or [])
        if words[0] == "evaluate":
            from rankdistill.evaluation.suites import load_suite

            assert load_suite(given["suite"]).sets


@every_page
def test_commands_in_sentences_exist(page: str) -> None:
    for line in re.findall(r"`(rankdistill [a-z][^`]*)`", PAGES[page]):
        command, rest = verb(line.split()[1:])
        assert command is not get_command(app), line
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= known, line


@every_page
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (SOURCE / "Makefile").read_text(), re.MULTILINE))
    assert {"quickstart", "docs"} <= targets
    named = re.findall(r"(?:^|`)make (?:[A-Z]+=\S* )*([a-z-]+)", PAGES[page], re.MULTILINE)
    assert set(named) <= targets


# ---------------------------------------------------------------------------------------------------------------------
# The README and the Python blocks, run


@pytest.fixture(scope="module")
def quickstart(
    tiny_beir: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """What stands in the pages → what it is here: a small recipe and collection. The work folder is the fixture's."""
    folder, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    recipe = tiny_recipe(candidates={"sources": [{"type": "bm25"}]})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "somebody.trec").write_text("q-helium Q0 d-helium 1 2.5 x\n")
    os.chdir(folder)
    yield {
        "run quickstart": "run tiny.yaml",
        "margin_mse": "tiny.yaml",
        '"quickstart"': '"tiny.yaml"',
        "runs/nf": "runs/quickstart",
        "beir:PATH/nfcorpus": f"beir:{tiny_beir}",
        "ivf_pq": "sq8",  # which needs no 256 vectors to learn from
    }
    os.chdir(before)


def here(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def test_the_commands_of_the_readme_run(quickstart: dict[str, str]) -> None:
    for line in blocks(README, "bash")[1].splitlines():
        words = shlex.split(here(line, quickstart), comments=True)[1:]
        if words[0] != "serve":  # it runs until it is stopped: tests/cli/test_serve.py
            result = CliRunner().invoke(app, words, catch_exceptions=False)
            assert result.exit_code == 0, result.output
    made = {path.name for path in Path().iterdir()} | {path.name for path in Path("runs/quickstart").iterdir()}
    assert {"docs.faiss", "docs.faiss.ids.parquet", "report.html", "student", "evaluation"} <= made


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/python.md"])
def test_python_blocks_run(page: str, quickstart: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(PAGES[page], "python")
    exec(compile(here(block, quickstart), page, "exec"), {})
    assert "ndcg@10" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("path", sorted((SOURCE / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, quickstart: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)  # committed without what they print
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(here("".join(cell["source"]), quickstart), f"{path.name}, cell {number}", "exec"), names)
        assert capsys.readouterr().out.strip()


def test_the_loss_of_the_page_on_own_methods_is_hubers() -> None:
    import torch

    (block,) = blocks(PAGES["docs/how-to/own-methods.md"], "python")
    names: dict[str, Any] = {}
    exec(compile(block, "own-methods.md", "exec"), names)
    student, teacher = torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[3.0, 2.5, 2.5]])  # margins 1, 3 and 0.5, 0.5
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = names["Huber"](delta=1.0)(student, teacher, torch.tensor([[1, 0, 0]]), mask)
    assert loss.item() == pytest.approx((0.5**2 / 2 + (2.5 - 0.5)) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# What pages name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@every_page
def test_recipes_are_recipes(page: str) -> None:
    from rankdistill.evaluation.suites import Suite

    (whole,) = blocks(README, "yaml")
    for block in blocks(PAGES[page], "yaml"):
        part = yaml.safe_load(block)
        if "fusion" in part:
            Suite.model_validate({"name": "page", "sets": [{"name": "own", "collection": "own"}], **part})
        elif "type" in part:
            build("teacher", block)
        elif "backend" in part:
            build("backend", part["backend"])
        else:
            assert check_recipe(merge(yaml.safe_load(whole), part), page).student


@every_page
def test_python_names_what_exists(page: str) -> None:
    for block in blocks(PAGES[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rankdistill":
                assert node.attr in rankdistill.__all__
    for name in re.findall(r"`(rankdistill(?:\.\w+)+)", PAGES[page]):
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize(
    ("page", "kinds"),
    [("teachers", ["teacher"]), ("students", ["student"]), ("losses", ["loss", "weighting"]), ("indexes", [])],
)
def test_tables_name_what_exists(page: str, kinds: list[str]) -> None:
    known = {name for kind in kinds for name in shipped_methods(kind)} or set(shipped("indexes"))
    known |= set(shipped("configs"))  # which recipe learns from what
    first = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGES[f"docs/explanation/{page}.md"], re.MULTILINE)
    named = {name for cell in first for name in re.findall(r"\w+", cell)} - {"type"}  # a column's title
    assert len(named) > 5
    assert named <= known


def test_the_keys_of_learned_quantisation_exist() -> None:
    from rankdistill.indexes.specification import QuantizerSpecification

    page = PAGES["docs/explanation/quantisation.md"]
    rows = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert len(keys) > 10
    assert keys <= QuantizerSpecification.model_fields.keys()
    for key in ("rotation", "codes", "query"):
        (row,) = re.findall(rf"^\| `{key}` \| (.*) \|$", page, re.MULTILINE)
        assert set(get_args(QuantizerSpecification.model_fields[key].annotation)) <= set(re.findall(r"`(\w+)`", row))


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \|", PAGES["docs/how-to/install.md"], re.MULTILINE)) == set(extras)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("reference", SOURCE / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {Path(name).stem: text for name, text in module.pages().items()}


def rows(text: str) -> set[str]:
    return set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))


def undescribed(text: str) -> list[str]:
    """The keys whose row ends with an empty cell."""
    return re.findall(r"^\| `(\w+)` \|.*\| +\|$", text, re.MULTILINE)


def part(text: str, heading: str) -> str:
    """The text below a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## `{heading}`")[1], flags=re.MULTILINE)[0]


def test_the_reference_has_every_key_of_a_recipe(reference: dict[str, str]) -> None:
    schema = json_schema()
    sections = ["Generate", "Candidates", "HoldOut", "Training", "Evaluate", "Extrapolation"]
    keys = {key for name in sections for key in schema["$defs"][name]["properties"]} | schema["properties"].keys()
    assert len(keys) > 60
    assert rows(reference["recipe"]) == keys
    assert undescribed(reference["recipe"]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_has_every_method_and_setting(kind: str, reference: dict[str, str]) -> None:
    schema = json_schema()["$defs"]
    headings = re.findall(r"^## `(\w+)`", reference[kind], re.MULTILINE)
    assert headings == sorted(shipped_methods(kind))
    for name in headings:
        text = part(reference[kind], name)
        assert schema[f"{kind}.{name}"]["properties"].keys() - {"type"} <= rows(text), name
        assert undescribed(text.split("\n### ")[0]) == [], name
        assert len(text.strip().splitlines()[0]) > 15, f"{name} has no description"


def test_the_reference_has_every_verb_and_option(reference: dict[str, str]) -> None:
    verbs: dict[str, click.Command] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    verbs |= {f"recipes {name}": child for name, child in verbs["recipes"].commands.items()}  # type: ignore[attr-defined]
    for name, command in verbs.items():
        text = part(reference["commands"], name)
        assert (command.help or "").split(".")[0] in text.replace("\\", "")
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
        assert all(f"`{option}`" in text for option in options), name


def test_the_reference_has_the_python_api(reference: dict[str, str]) -> None:
    for name in rankdistill.__all__:
        text = part(reference["python"], name)
        thing = getattr(rankdistill, name)
        if inspect.isfunction(thing):
            assert all(key in text for key in inspect.signature(thing).parameters), name


def test_the_reference_has_specifications_suites_metrics_and_shipped_files(reference: dict[str, str]) -> None:
    from rankdistill.evaluation.metrics import METRICS
    from rankdistill.evaluation.suites import Suite
    from rankdistill.indexes.sparse_specification import SPARSE
    from rankdistill.indexes.specification import IndexSpecification, QuantizerSpecification

    assert shipped("indexes").keys() <= rows(reference["specifications"])
    for model in (IndexSpecification, QuantizerSpecification, *SPARSE.values()):
        assert model.model_fields.keys() <= rows(reference["specifications"])
    assert Suite.model_fields.keys() <= rows(reference["suites"])
    assert rows(reference["metrics"]) == set(METRICS)
    for folder in ("configs", "indexes", "eval/suites", "configs/prompts"):
        assert shipped(folder)
        assert all(path.read_text().rstrip() in reference["shipped"] for path in shipped(folder).values())


@every_page
def test_every_link_and_file_exists(page: str, reference: dict[str, str]) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        path = (SOURCE / page).parent / target
        made = {"reference": set(reference), "results": {path.stem for path in (SOURCE / "eval/results").glob("*.md")}}
        assert path.exists() or path.stem in made.get(path.parent.name, ()), target


def test_every_file_that_contributors_read_of_exists() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", PAGES["CONTRIBUTING.md"])
    assert len(named) > 10
    for name in named:
        assert (SOURCE / name).exists() or (SOURCE / "rankdistill" / name).exists(), name
