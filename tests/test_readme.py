"""The README and the page for contributors say what is there: every command, key, name and file in them exists."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml

import rankdistill
from rankdistill.recipe import check_recipe, merge, method_names, shipped

SOURCE = Path(__file__).parents[1]
README = (SOURCE / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (SOURCE / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_command_exists() -> None:
    from typer.main import get_command

    from rankdistill.cli.main import app

    verbs = get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("rankdistill ")]
    lines += re.findall(r"`(rankdistill [a-z][^`]*)`", README)
    assert len(lines) >= 8
    for line in lines:
        verb = line.split()[1]
        assert verb in verbs, line
        options = {option for parameter in verbs[verb].params for option in parameter.opts + parameter.secondary_opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", line)) <= options, line


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (SOURCE / "Makefile").read_text(), re.MULTILINE))
    for text in (README, CONTRIBUTING):
        named = re.findall(r"(?:^|`)make (?:[A-Z]+=\S* )*([a-z-]+)", text, re.MULTILINE)
        assert named
        assert set(named) <= targets


def test_the_recipe_is_a_recipe() -> None:
    whole, *parts = blocks("yaml")
    recipe = check_recipe(yaml.safe_load(whole), "README.md")
    assert recipe.teacher is not None
    assert list(recipe.baselines) == ["labels"]
    for part in parts:
        check_recipe(merge(yaml.safe_load(whole), yaml.safe_load(part)), "README.md")


@pytest.mark.parametrize(
    ("title", "kinds"), [("Teachers", ["teacher"]), ("Students", ["student", "loss", "weighting"])]
)
def test_every_method_is_named(title: str, kinds: list[str]) -> None:
    for kind in kinds:
        for name in method_names(kind):
            assert f"`{name}`" in section(title), f"the {kind} {name} is missing from the README"


def test_the_table_of_indexes_is_whole() -> None:
    table = section("Indexes").split("\n### ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(shipped("indexes"))


def test_the_keys_of_learned_quantisation_exist() -> None:
    from rankdistill.indexes.specification import QuantizerSpecification

    rows = re.findall(r"^\| (`[^|]+`) \|", section("Indexes").split("\n| key | |\n")[1], re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert len(keys) > 10
    assert keys <= QuantizerSpecification.model_fields.keys()
    for key in ("rotation", "codes", "query"):
        (row,) = re.findall(rf"^\| `{key}` \| (.*) \|$", section("Indexes"), re.MULTILINE)
        assert set(get_args(QuantizerSpecification.model_fields[key].annotation)) <= set(re.findall(r"`(\w+)`", row))


def test_python_blocks_name_what_exists() -> None:
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rankdistill":
                assert node.attr in rankdistill.__all__
    for name in re.findall(r"`(\w+)`", section("From Python").split("```")[-1]):
        assert name in rankdistill.__all__


def test_every_link_and_file_exists() -> None:
    for text in (README, CONTRIBUTING):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (SOURCE / target).exists(), target
    named = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", CONTRIBUTING)
    assert len(named) > 10
    for name in named:
        assert (SOURCE / name).exists() or (SOURCE / "rankdistill" / name).exists(), name


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for name in extras if f"`{name}`" not in section("Extras")} == set()
