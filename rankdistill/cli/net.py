"""The last net below the program: what goes wrong is told as what, where and what to do, never as a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from rankdistill.errors import RankdistillError
from rankdistill.plain import shown

TRACEBACK = "RANKDISTILL_TRACEBACK"
AGAIN = "run the same command again: finished parts are kept"
# By name, so that no library is imported for it. What they read was made by another program, or is damaged.
DAMAGED = {
    "ArrowException": "a Parquet or Arrow file cannot be read",
    "SafetensorError": "a file of weights cannot be read",
    "JSONDecodeError": "a JSON file cannot be read",
    "UnicodeDecodeError": "a file holds bytes that are not UTF-8",
    "BadGzipFile": "a compressed file cannot be read",
    "zlib.error": "a compressed file cannot be read",
    "EOFError": "a file ends too early",
}


def explained(error: BaseException) -> RankdistillError:
    """Any exception as an error that says what, where if it is known, and what to do."""
    if isinstance(error, RankdistillError):
        return error
    said = shown(" ".join(str(error).split()), 300)
    kinds = [kind.__name__ if kind.__module__ != "zlib" else "zlib.error" for kind in type(error).__mro__]
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return RankdistillError("memory is used up", fix="smaller batches or lengths, or a machine with more; " + AGAIN)
    what = next((DAMAGED[kind] for kind in kinds if kind in DAMAGED), None)
    if what is not None:
        return RankdistillError(
            f"{what}: {said}",
            where=_place(error),
            fix=f"it is damaged, or of another program: make it again, or see {TRACEBACK}=1 for which it is",
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = None if error.filename is None else shown(os.fsdecode(error.filename), 300)
        return RankdistillError(f"the system refuses: {error.strerror}", where=where or _place(error), fix=AGAIN)
    if isinstance(error, RecursionError):
        said = "values nested too deeply"
    return RankdistillError(
        f"this is a bug in rankdistill: {type(error).__name__}: {said}",
        where=_place(error),
        fix=f"please report it, with what the command prints under {TRACEBACK}=1",
    )


def _place(error: BaseException) -> str:
    """The last line of rankdistill on the way to the error."""
    package = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(package)] or list(frames)
    if not own:
        return "unknown"
    file = Path(own[-1].filename)
    return f"{file.relative_to(package.parent) if file.is_relative_to(package) else file}, line {own[-1].lineno}"


def report(error: Exception) -> int:
    """Print an error; returns the exit code: 2 for wrong usage, else 1."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    told = explained(error)
    lines = [shown(line, 2000) for line in str(told).splitlines()]
    print("error: " + "\n".join(lines), file=sys.stderr)
    return told.exit_code
