"""The reference pages, made from the code while MkDocs builds the site (a hook; see mkdocs.yml).

No page of it is kept: a setting, method, verb or function is described where it is defined, and nowhere else.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import rankdistill
from rankdistill.recipe import (
    KINDS,
    Method,
    Recipe,
    explained,
    method_class,
    parameters_model,
    shipped,
    shipped_methods,
)

SOURCE = Path(__file__).parents[1]
PLURAL = {
    "loss": "Losses",
    "weighting": "Weightings of lists",
    "sampler": "Samplers",
    "student": "Students",
    "teacher": "Teachers",
    "backend": "Backends of language models",
    "source": "Sources of candidates",
    "generator": "Generators of queries",
}
assert PLURAL.keys() == KINDS.keys()


RESULTS = sorted((SOURCE / "eval" / "results").glob("*.md"))


def on_config(config: Any) -> Any:
    """MkDocs' hook: lists the pages of the reference and the measured results, whichever there are."""
    config.nav.append({"Reference": list(pages())})
    config.nav.append({"Measured": [f"results/{path.name}" for path in RESULTS]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' hook: adds the reference and the measured results to the site."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for path in RESULTS:
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def pages() -> dict[str, str]:
    """Path in the site → Markdown, of every page of the reference."""
    texts = {
        "commands": commands_page(),
        "recipe": recipe_page(),
        **{kind: methods_page(kind) for kind in KINDS},
        "specifications": specifications_page(),
        "suites": suites_page(),
        "metrics": metrics_page(),
        "shipped": shipped_page(),
        "python": python_page(),
    }
    return {f"reference/{name}.md": text for name, text in texts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def recipe_page() -> str:
    intro = "A recipe is one YAML file. Every key but `collection` and `student` has a default."
    return page("Recipe keys", intro, *sections(Recipe, ""))


def methods_page(kind: str) -> str:
    intro = f"A {kind} is chosen by its `type`; the other keys are its settings."
    seen: set[type[BaseModel]] = set()
    parts = [part for name in sorted(shipped_methods(kind)) for part in method(kind, name, seen)]
    return page(PLURAL[kind], intro, *parts)


def method(kind: str, name: str, seen: set[type[BaseModel]]) -> Iterator[str]:
    cls = method_class(kind, name)
    says = explained(cls)
    yield f"## `{name}`\n\n{prose(cls.__doc__ or '', without='Args')}"
    model = parameters_model(cls)
    yield table(model, says) if model.model_fields else "It has no settings."
    yield from nested(model, "", 3, seen)


def specifications_page() -> str:
    from rankdistill.indexes.sparse_specification import SPARSE
    from rankdistill.indexes.specification import IndexSpecification, QuantizerSpecification, any_specification

    rows = ["| name | type | |", "|---|---|---|"]
    for name, path in shipped("indexes").items():
        known = any_specification(path)
        rows.append(f"| `{name}` | `{known.type}` | {cell(known.description)} |")  # type: ignore[union-attr]
    seen: set[type[BaseModel]] = set()
    parts = ["## Shipped specifications\n\n" + "\n".join(rows)]
    for kind, model in {"faiss": IndexSpecification, "distill_vq": QuantizerSpecification, **SPARSE}.items():
        parts += [f"## `type: {kind}`\n\n{prose(model.__doc__ or '')}", *sections(model, "", 3, seen)]
    return page("Index specifications", "An index specification is one YAML file; `--spec` takes it by name.", *parts)


def suites_page() -> str:
    from rankdistill.evaluation.suites import Suite

    return page(
        "Suite keys", "A suite says what is evaluated, on which sets, with which metrics.", *sections(Suite, "")
    )


def metrics_page() -> str:
    from rankdistill.evaluation import metrics

    rows = [f"| `{name}` | {cell(what)} |" for name, what in metrics.METRICS.items()]
    names = "## Names\n\n| metric | what it is |\n|---|---|\n" + "\n".join(rows)
    return page("Metrics", prose(metrics.__doc__ or ""), names)


def commands_page() -> str:
    from typer.main import get_command

    from rankdistill.cli.main import app

    parts = [part for name, command in get_command(app).commands.items() for part in verb(name, command)]  # type: ignore[attr-defined]
    return page("Commands", "`rankdistill VERB --help` prints the same.", *parts)


def verb(name: str, command: Any) -> Iterator[str]:
    rows, usage = [], f"rankdistill {name}"
    for parameter in command.params:
        names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
            usage += f" {names.strip('`')}"
        default = parameter.default if parameter.default not in (None, False, ...) else ""
        rows.append(f"| {names} | {code(default)} | {cell(parameter.help or '')} |")
    usage += " COMMAND" if hasattr(command, "commands") else " [OPTIONS]"
    options = "\n".join(["| | default | |", "|---|---|---|", *rows]) if rows else ""
    yield f"## `{name}`\n\n```\n{usage}\n```\n\n{escaped(command.help or '')}\n\n{options}"
    for inner, child in getattr(command, "commands", {}).items():
        yield from verb(f"{name} {inner}", child)


def python_page() -> str:
    parts = [part for name in rankdistill.__all__ for part in public(name, getattr(rankdistill, name))]
    return page(
        "Python API", "Importing `rankdistill` loads nothing heavy; each name is imported at its first use.", *parts
    )


def public(name: str, thing: Any) -> Iterator[str]:
    if not callable(thing):
        yield f"## `{name}`\n\n`{thing!r}`"
        return
    yield f"## `{name}`\n\n{signature(name, thing)}\n\n{prose(thing.__doc__ or '')}"
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        own = [cls for cls in reversed(thing.__mro__) if cls.__module__.startswith("rankdistill")]
        for inner, member in {name: member for cls in own for name, member in vars(cls).items()}.items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if not inner.startswith("_") and inspect.isfunction(function):
                yield f"### `{name}.{inner}`\n\n{signature(inner, function)}\n\n{prose(function.__doc__ or '')}"


def shipped_page() -> str:
    parts = []
    folders = {
        "configs": "Recipes",
        "indexes": "Index specifications",
        "eval/suites": "Suites",
        "configs/prompts": "Prompts",
    }
    for folder, title in folders.items():
        parts.append(f"## {title}")
        parts += [
            f"### `{name}`\n\n{fence('yaml', path.read_text(encoding='utf-8'))}"
            for name, path in shipped(folder).items()
        ]
    return page("Shipped files", "Every declaration that comes with the program: copy one to make your own.", *parts)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def sections(
    model: type[BaseModel], prefix: str, level: int = 2, seen: set[type[BaseModel]] | None = None
) -> Iterator[str]:
    """A table of the model's keys, then those of each section inside it, under its dotted name; each once a page."""
    name = prefix.rstrip(".")
    yield (heading(level, name, model) if name else "") + table(model)
    yield from nested(model, prefix, level, set() if seen is None else seen)


def heading(level: int, name: str, model: type[BaseModel]) -> str:
    return f"{'#' * level} `{name}` {{#{model.__name__}}}\n\n{prose(model.__doc__ or '')}\n\n"


def nested(model: type[BaseModel], prefix: str, level: int, seen: set[type[BaseModel]]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        for found in parts_of(field.annotation):
            if is_section(found) and found not in seen:
                seen.add(found)
                yield from sections(found, f"{prefix}{name}.", level, seen)


def is_section(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, BaseModel) and hint is not Method


def parts_of(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint) if typing.get_origin(hint) is not Literal else ():
        yield from parts_of(inner)


def table(model: type[BaseModel], says: dict[str, str] | None = None) -> str:
    rows = []
    for name, field in model.model_fields.items():
        inner = [part.__doc__ or "" for part in parts_of(field.annotation) if is_section(part)]
        text = field.description or (says or {}).get(name) or "".join(inner[:1]).split("\n")[0]
        rows.append(f"| `{name}` | {kind_of(field)} | {default_of(field)} | {cell(text)} |")
    return "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below" if not isinstance(value, Method) else code(value.settings())
    if isinstance(value, list):
        value = [item.settings() if isinstance(item, Method) else item for item in value]
    return code(value)


def kind_of(field: FieldInfo) -> str:
    kind = next((part for part in field.metadata if isinstance(part, str) and part in KINDS), None)
    text = f"[{kind}]({kind}.md)" if kind else hint(field.annotation)
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        f"{signs[name]} {getattr(part, name)}" for part in field.metadata for name in signs if hasattr(part, name)
    ]
    return ", ".join([text, *map(cell, bounds)])


def hint(annotation: Any) -> str:
    """A type as a person writes it: `int or null`, `"a" or "b"`, `list of loss`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        kind = next((part for part in inner[1:] if isinstance(part, str) and part in KINDS), None)
        return f"[{kind}]({kind}.md)" if kind else hint(inner[0])
    if origin is Literal:
        return " or ".join(code(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(hint(part) for part in inner))
    if origin in (list, tuple, set) or (origin is not None and issubclass(origin, Iterable) and len(inner) == 1):
        return f"list of {hint(inner[0])}" if inner else "list"
    if annotation is type(None):
        return "null"
    if is_section(annotation):
        return f"[section](#{annotation.__name__})"
    return "mapping" if origin is not None else getattr(annotation, "__name__", "any").replace("Any", "any")


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n((?:(?: +.*)?\n?)*)", re.MULTILINE)


def items(body: str) -> dict[str, str]:
    found = re.findall(r"^(\w[\w, ]*): (.*(?:\n +.*)*)", textwrap.dedent(body), re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}


def prose(doc: str, without: str = "") -> str:
    """A docstring as Markdown: its sections become tables and paragraphs."""

    def section(match: re.Match[str]) -> str:
        title, body = match[1], match[2]
        if title == without:
            return ""
        if title in ("Args", "Attributes"):
            rows = [f"| `{name}` | {cell(text)} |" for name, text in items(body).items()]
            return "\n".join(["\n| | |", "|---|---|", *rows, ""])
        return f"\n**{title}**: {escaped(' '.join(body.split()))}\n"

    text = inspect.cleandoc(doc)
    before = SECTION.split(text)[0]
    rest = "".join(section(match) for match in SECTION.finditer(text))
    return f"{listed(escaped(before))}\n{rest}".strip()


def listed(text: str) -> str:
    """With a blank line before a list, which Markdown wants, and indented blocks as code."""
    text = re.sub(r"(?m)^(?!- |\s)(.+)\n(?=- )", r"\1\n\n", text)
    return re.sub(r"(?m)^(?! )(.+)\n(?=    )", r"\1\n\n", text)


def escaped(text: str) -> str:
    """Text in which nothing but `code` is Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if n % 2 else re.sub(r"([*\[\]_])", r"\\\1", part).replace("<", "&lt;") for n, part in enumerate(parts)
    )


def cell(text: str) -> str:
    return " ".join(escaped(text).split()).replace("|", "&#124;")


def code(value: Any) -> str:
    if value == "":
        return ""
    text = value if isinstance(value, str) else yaml.safe_dump(plain(value), default_flow_style=True, width=10_000)
    return f"`{text.strip().removesuffix('...').strip()}`".replace("|", "¦")


def plain(value: Any) -> Any:
    """As YAML has it: no tuples, no paths, no objects, a third rounded."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if isinstance(value, int | str | None) else str(value)


def signature(name: str, thing: Any) -> str:
    try:
        shape = inspect.signature(thing)
    except (TypeError, ValueError):  # an attribute, a built-in
        return ""
    parameters = [
        str(parameter).replace("'", "") for parameter in shape.parameters.values() if parameter.name != "self"
    ]
    returns = (
        "" if shape.return_annotation in (shape.empty, "None") else f" -> {shape.return_annotation}".replace("'", "")
    )
    text = f"{name}({', '.join(parameters)}){returns}"
    if len(text) > 90:
        text = f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){returns}"
    return fence("python", text)


def fence(language: str, text: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def page(title: str, intro: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", intro, *parts]) + "\n"
