"""`python-docs`: a real collection on every machine, made from the interpreter's own standard library.

A document is a documented function, method or class: its qualified name (title), its signature, its docstring
without the first sentence, and its code. The query is that first sentence; its one relevant document is the one it
was taken from. Queries are unique and have 5 to 30 words; a document whose sentence is not so has no query. Train,
dev and test differ by top-level module or package, so no test module is seen in training.

Sources are parsed, never imported: the collection depends on the files of the standard library alone.
`python-docs:public` keeps names without a leading underscore in any component.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

from rankdistill.collections.collection import Collection
from rankdistill.collections.storage import id_hash
from rankdistill.collections.writer import CollectionWriter, imported
from rankdistill.errors import RankdistillError, UsageError

SCHEMA = 1  # of the way documents and queries are made
SKIPPED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test"}
    | {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"}
    | {"distutils"}  # left the library in 3.12
)
SHORTEST, LONGEST = 5, 30  # words of a query
SPLIT_SALT = "python-docs 1487"  # of some thousand, one that comes near 80/5/15 by queries, all names and public ones
SHARES = (("test", 0.15), ("dev", 0.20), ("train", 1.0))  # cumulative

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Entry(NamedTuple):
    """One documented definition; `sentence` is the first one of its docstring, wherever `text` no longer has it."""

    name: str
    text: str
    sentence: str


def open_source(argument: str, spec: str) -> Collection:
    if argument not in ("", "public"):
        raise UsageError(f"python-docs has no variant {argument!r}", where=spec, fix="write python-docs:public")
    root = Path(sysconfig.get_path("stdlib"))
    files = list(module_files(root))
    if not files:
        raise RankdistillError("the standard library's sources are not installed", where=str(root))
    content = hashlib.sha256()
    for module, path in files:
        data = path.read_bytes()
        content.update(f"{module} {len(data)}\n".encode() + data)
    key = {
        "loader": "python-docs",
        "schema": SCHEMA,
        "public": argument == "public",
        "python": platform.python_version(),
        "sources": content.hexdigest(),
    }

    def load(writer: CollectionWriter) -> None:
        names: set[str] = set()
        queries: list[tuple[str, str]] = []
        for module, path in files:
            for entry in documented(module, path):
                hidden = any(part.startswith("_") for part in entry.name.split("."))
                if entry.name in names or (hidden and argument == "public"):
                    continue  # a name defined twice (by platform, say) is one document: the first
                names.add(entry.name)
                writer.document(entry.name, entry.name, entry.text)
                queries.append((entry.name, entry.sentence))
        times = Counter(sentence.casefold() for _, sentence in queries)
        for name, sentence in queries:
            if times[sentence.casefold()] == 1 and SHORTEST <= len(sentence.split()) <= LONGEST:
                writer.query(f"q:{name}", sentence)
                writer.judgment(split_of(name), f"q:{name}", name, 1)

    return imported(key, load, name="python-docs" + (f"-{argument}" if argument else ""), spec=spec)


def module_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(module name, source file) of the standard library, in the order of their names."""

    def walk(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.name in SKIPPED or path.stem.startswith(("_sysconfigdata", "test_")):
                continue
            if path.is_dir() and path.name.isidentifier():
                yield from walk(path, f"{package}{path.name}.")
            elif path.suffix == ".py" and path.stem.isidentifier():
                name = package[:-1] if path.stem == "__init__" else package + path.stem
                if name:
                    yield name, path

    return walk(root, "")


def split_of(name: str) -> str:
    """The split of a definition, decided by its top-level module; `_pyio` goes with `io`."""
    top = re.sub(r"^_+(py)?", "", name.partition(".")[0])
    share = id_hash(f"{SPLIT_SALT}:{top}") / 2**64
    return next(split for split, limit in SHARES if share < limit)


def documented(module: str, path: Path) -> Iterator[Entry]:
    """The documented functions, methods and classes of a source file, nested ones in functions left out.

    A file that does not parse (bad examples kept on purpose, a template) has none.
    """
    source = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    try:
        yield from _definitions(tree, module, lines)
    except UnicodeDecodeError:
        return


def _definitions(parent: ast.AST, prefix: str, lines: list[bytes]) -> Iterator[Entry]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            name = f"{prefix}.{node.name}"
            docstring = ast.get_docstring(node, clean=True)
            if docstring:
                sentence, rest = first_sentence(docstring)
                if sentence:
                    yield Entry(name, _text(node, lines, sentence, rest), sentence)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, name, lines)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(node, prefix, lines)


def _text(node: Definition, lines: list[bytes], sentence: str, rest: str) -> str:
    """Signature, the rest of the docstring, the code without the docstring.

    A class's code is also without the docstrings of its members: their first sentences are queries of other documents.
    """
    doc = node.body[0]
    signature = _source(lines, _start(node), _start(doc)).strip()
    members = [part for part in ast.walk(node) if part is not node] if isinstance(node, ast.ClassDef) else []
    holes = sorted((part.body[0] for part in members if _is_documented(part)), key=_start)
    pieces, at = list[str](), _end(doc)
    for hole in holes:
        pieces.append(_source(lines, at, _start(hole)).rstrip())
        at = _end(hole)
    pieces.append(_source(lines, at, _end(node)))
    code = inspect.cleandoc("\n" + "".join(pieces).strip("\n"))
    text = "\n".join(part for part in (signature, rest, code) if part)
    return text.replace(sentence, " ")  # a copy of the sentence in a comment would give the answer away


def _is_documented(node: ast.AST) -> TypeGuard[Definition]:
    return isinstance(node, Definition) and ast.get_docstring(node, clean=False) is not None


def _start(node: ast.stmt) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.stmt) -> tuple[int, int]:
    return node.end_lineno or 0, node.end_col_offset or 0


def _source(lines: list[bytes], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The source from (line, byte offset) to (line, byte offset)."""
    part = lines[start[0] - 1 : end[0]]
    part[-1] = part[-1][: end[1]]
    part[0] = part[0][start[1] :]
    return b"".join(part).decode()


def first_sentence(docstring: str) -> tuple[str, str]:
    """(first sentence on one line, the rest of the docstring); the sentence ends at a stop or with its paragraph."""
    paragraph = re.match(r".*?(?=\n\s*\n|\n\s*>>>|\Z)", docstring, re.DOTALL)
    assert paragraph
    end = re.search(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)[.!?](?=\s|$)", paragraph.group())
    stop = end.end() if end else paragraph.end()
    return " ".join(docstring[:stop].split()), docstring[stop:].strip()
