"""The rules that hold the house together, read from the sources: who may import whom, what is never called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankdistill

PACKAGE = Path(rankdistill.__file__).parent
MODULES = {
    ".".join(("rankdistill", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Upper rows import lower ones, never the other way; within a row there are no circles.
ROWS = [
    {"cli"},
    {"stages", "table_rows", "upkeep", "run_folder"},
    {"teachers", "generation", "training", "quantization", "evaluation"},
    {"students", "losses", "sampling", "indexes", "scores"},
    {"collections", "runs", "artifacts", "recipe"},
    {"errors", "plain", "progress", "devices"},
]
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}


def part_of(module: str) -> str:
    """rankdistill.indexes.bm25 → indexes; the package's own __init__ → "" """
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> set[str]:
    """The package's modules that a module imports anywhere: at its top, in its functions, for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            # `from package import name`: the name may be a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else str(node.module) for name in names)
    return {name for name in found if name in MODULES and name != module}


def calls(module: str) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def test_every_part_of_the_package_has_a_row() -> None:
    assert {part_of(module) for module in MODULES} - {""} <= ROW.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module)])
def test_imports_run_one_way(module: str) -> None:
    row = ROW[part_of(module)]
    upwards = {name for name in imports(module) if part_of(name) and ROW[part_of(name)] < row}
    assert not upwards, f"{module} imports from a row above its own"


def test_parts_of_a_row_import_each_other_one_way() -> None:
    """indexes may know students or students indexes, not both."""
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        for name in imports(module):
            if part_of(module) and part_of(name) and part_of(module) != part_of(name):
                edges.setdefault(part_of(module), set()).add(part_of(name))
    assert circle(edges) is None


def test_modules_import_each_other_one_way() -> None:
    """Imports inside functions and for type checking count: a circle that is hidden is still one."""
    edges = {module: imports(module) for module in MODULES if module != "rankdistill"}
    assert circle(edges) is None


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """A way from a node back to itself."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str] | None:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return None
        for following in sorted(edges.get(node, ())):
            found = walk(following, [*way, node])
            if found:
                return found
        done.add(node)
        return None

    return next((found for node in sorted(edges) if (found := walk(node, []))), None)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unsafe_is_called(module: str) -> None:
    """No pickle in any disguise, no YAML that makes objects, no shell, no code from data."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno}: a bare except"
    for line, name, call in calls(module):
        where = f"{module}:{line}: {name}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "eval", "exec"}, where
        assert name not in {"os.system", "os.popen"}, where
        assert keywords.get("shell", "False") == "False", where
        assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("trust_remote_code", "False") == "False", where


def test_every_module_says_what_it_is_for() -> None:
    undocumented = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            undocumented.append(module)
    assert not undocumented


@pytest.mark.parametrize("module", MODULES)
def test_text_files_are_utf8_whatever_the_locale(module: str) -> None:
    for line, name, call in calls(module):
        keywords = {keyword.arg for keyword in call.keywords}
        if name.endswith((".read_text", ".write_text")):
            assert "encoding" in keywords, f"{module}:{line}: {name}"
        elif name == "open":
            mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "'r'"
            assert "encoding" in keywords or "b" in mode or not mode.startswith("'"), f"{module}:{line}: {name}"
