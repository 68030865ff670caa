"""What people write: YAML of plain values, and names that become files. Both are checked before anything uses them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from rankdistill.errors import UsageError

LONGEST = 1 << 20  # bytes of a YAML file
DEEPEST = 40  # collections inside each other
LONGEST_NAME = 200  # bytes: a file system takes 255, and endings are added
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class NotPlain(UsageError):
    """YAML, but more than plain values."""


class Section(BaseModel):
    """Settings whose keys are all known and whose numbers are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def path_name(name: str) -> str:
    """A name that is used as that of a file or folder, returned as it is.

    Raises:
        ValueError: it would lead elsewhere, or no file can be called so.
    """
    if not name or name != name.strip():
        raise ValueError("a name has at least one character, and no blank at either end")
    if name in (".", "..") or re.search(r"[/\\]", name):
        raise ValueError(f"{shown(name)!r} would be a path: a name has no / and no \\, and is not . or ..")
    if CONTROL.search(name):
        raise ValueError(f"{shown(name)!r} holds a control character")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"a name of {len(name.encode())} bytes is too long for a file: at most {LONGEST_NAME}")
    if name.startswith(".") or name.endswith(".") or RESERVED.fullmatch(name):
        raise ValueError(f"{name!r} is no file's name everywhere: no dot at either end, and not con, nul ...")
    return name


def file_name(text: str) -> str:
    """What a folder or data set is called, as a name that `path_name` takes."""
    name = CONTROL.sub("-", re.sub(r"[/\\]", "-", text)).encode()[:LONGEST_NAME].decode(errors="ignore").strip(" .")
    return name if name and not RESERVED.fullmatch(name) else f"_{name}"


Name = Annotated[str, AfterValidator(path_name)]


def shown(text: Any, most: int = 80) -> str:
    """Foreign text as it may stand on a terminal and in an error: no control characters, cut to `most` characters."""
    text = CONTROL.sub("\ufffd", str(text))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown_lines(text: Any) -> str:
    """The same of several lines, whole."""
    return "\n".join(shown(line, len(line)) for line in str(text).split("\n"))


def escaped(json_line: str) -> str:
    """A line of JSON whose control characters are written as such (`\\u009b`): the same values, safe on a terminal."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json_line)


class _Loader(yaml.SafeLoader):
    """Plain values alone: no alias (a few lines of them fill memory), no tag, no date, no key twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("aliases (*name) are not read", "write the value out")
        if getattr(event, "tag", None):
            raise _Refused(f"tags ({shown(event.tag)}) are not read", "write the value alone")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(f"more than {DEEPEST} values stand inside each other", "close the brackets")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if not isinstance(key, str):
                raise _Refused(f"the key {shown(key)} is not text", f'put it in quotes: "{shown(key)}"')
            if key in keys[:number]:
                raise _Refused(f"the key {shown(key)!r} stands there twice", "keep one of them")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int | float:
        try:
            made = self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)
        except ValueError:  # thousands of digits
            made = math.inf
        if abs(made) >= 1 << 63 if isinstance(made, int) else not math.isfinite(made):
            raise _Refused(f"{shown(node.value)} is no number that can be used", "a finite number below 2^63")
        return made


class _Refused(Exception):
    """What is wrong and what to do."""


for kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _Loader.construct_number)
# A date stays the text it is.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """Plain values from YAML: mappings with text keys, lists, text, finite numbers below 2^63, true, false, null.

    Raises:
        UsageError: it is not YAML, or holds anything else.
    """
    try:
        if re.search(r"[\ud800-\udfff]", text):  # bytes of the command line that are no text
            raise _Refused("not UTF-8 text", "save it as UTF-8")
        return _Loader(text).get_single_data()
    except _Refused as refused:
        raise NotPlain(f"not valid YAML: {refused.args[0]}", where=where, fix=refused.args[1]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = error.problem or error.context or "it cannot be read"
        raise UsageError(f"not valid YAML: {shown(what)}", where=f"{where}{at}", fix=QUOTES) from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise UsageError(f"not valid YAML: {shown(error, 200)}", where=where, fix=QUOTES) from None


QUOTES = "look for an open bracket or quote; text with : or # stands in quotes"


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """A mapping written on the command line: `{type: bm25, quota: 50}`."""
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise UsageError("this should hold keys and values", where=where, fix="for example '{type: bm25}'")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read safely.

    Raises:
        UsageError: the file cannot be read, is not YAML, too large, or not a mapping.
    """
    try:
        if path.stat().st_size > LONGEST:
            raise UsageError(f"more than {LONGEST >> 20} MB: this is no file of settings", where=str(path))
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UsageError(f"not valid YAML: {error}", where=str(path), fix="save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not isinstance(values, dict):
        raise UsageError("the file should hold keys and values", where=str(path))
    return values
