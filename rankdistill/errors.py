"""Errors that teach: what was wrong, where (file, line or key), and what to do about it."""

from __future__ import annotations

import importlib
from types import ModuleType

LONGEST = 600  # characters of a line of an error


def _cut(text: str) -> str:
    lines = [
        line if len(line) <= LONGEST else f"{line[: LONGEST - 200]} … [{len(line):,} characters] … {line[-150:]}"
        for line in text.split("\n")
    ]
    return "\n".join(lines if len(lines) <= 60 else [*lines[:50], f"… [{len(lines):,} lines]"])


class RankdistillError(Exception):
    """A failure a user can act on (exit code 1).

    Args:
        what: what was wrong, in one sentence.
        where: the file, line or key it was found at.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        # Errors quote what others wrote: a field of 20 kB is named by its beginning and its end.
        self.what, self.where, self.fix = _cut(what), where and _cut(where), fix and _cut(fix)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return lines


class UsageError(RankdistillError):
    """A wrong command line or recipe (exit code 2)."""

    exit_code = 2


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Raises:
        RankdistillError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise RankdistillError(
            f"{why} needs the Python package {module.split('.')[0]!r}, which is not installed",
            fix=f"pip install 'rankdistill[{extra}]'",
        ) from None
