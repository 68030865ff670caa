"""Reading text files that others wrote: every mistake is named by file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from rankdistill.errors import RankdistillError

GZIP_MAGIC = b"\x1f\x8b"


def open_bytes(path: Path) -> IO[bytes]:
    """Open for reading; gzip is known by its first bytes, not by the name."""
    with open(path, "rb") as stream:
        compressed = stream.read(2) == GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if compressed else open(path, "rb")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end); blank lines are passed over.

    Raises:
        RankdistillError: a line is not UTF-8, or the gzip stream is cut off or damaged.
    """
    number = 0
    with open_bytes(path) as stream:
        while True:
            try:
                raw = stream.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise RankdistillError(
                    f"the gzip file is cut off or damaged ({error})",
                    where=f"{path}:{number + 1}",
                    fix="fetch or compress the file again",
                ) from None
            if not raw:
                return
            number += 1
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RankdistillError(
                    f"byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line is not UTF-8",
                    where=f"{path}:{number}",
                    fix="convert the file to UTF-8 (for example: iconv -f LATIN1 -t UTF-8)",
                ) from None
            line = line.rstrip("\r\n")
            if line and not line.isspace():
                yield number, line


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object).

    Raises:
        RankdistillError: a line is not one JSON object (the last one is often cut off).
    """
    for number, line in read_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise RankdistillError(
                f"the line is not valid JSON ({reason}); is the file cut off here?",
                where=f"{path}:{number}",
                fix="each line must be one JSON object",
            ) from None
        if not isinstance(record, dict):
            raise RankdistillError(
                f"the line is a JSON {type(record).__name__}, not an object", where=f"{path}:{number}"
            )
        yield number, record


def identifier(value: Any, key: str, where: str) -> str:
    """An id as a string: strings as they are, whole numbers in digits.

    Raises:
        RankdistillError: it is missing, empty or of another type.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    problem = "is missing or empty" if value in (None, "") else f"is a {type(value).__name__}, not a string"
    raise RankdistillError(f"the id {key!r} {problem}", where=where)


def text_of(value: Any, key: str, where: str) -> str:
    """A text field; null counts as empty.

    Raises:
        RankdistillError: it is not a string.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RankdistillError(f"{key!r} is a {type(value).__name__}, not a string", where=where)
    return value


class Judgement(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int
    line: int


def read_qrels(path: Path) -> Iterator[Judgement]:
    """Judgements in TREC form (`query 0 document relevance`, spaces or tabs) or three columns, header or none.

    A line with a tab is split at tabs (ids may hold spaces then), any other at white space.

    Raises:
        RankdistillError: a line has another number of columns or its relevance is no whole number.
    """
    first = True
    for number, line in read_lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        where = f"{path}:{number}"
        if len(fields) not in (3, 4) or not fields[0].strip() or not fields[-2].strip():
            raise RankdistillError(
                f"expected 3 or 4 columns (query, [0,] document, relevance), found {len(fields)}: {line[:80]!r}",
                where=where,
            )
        try:
            grade = float(fields[-1])
            relevance = int(grade)
            if relevance != grade or not -(2**31) <= relevance < 2**31:
                raise ValueError
        except (ValueError, OverflowError):
            if first:  # a header
                first = False
                continue
            raise RankdistillError(f"the relevance {fields[-1]!r} is not a whole number", where=where) from None
        first = False
        yield Judgement(fields[0].strip(), fields[-2].strip(), relevance, number)


def read_pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, id, text) of a two-column TSV; further tabs belong to the text.

    Raises:
        RankdistillError: a line has no tab, or an empty id.
    """
    for number, line in read_lines(path):
        identity, tab, text = line.partition("\t")
        if not tab:
            raise RankdistillError(f"expected `id<tab>text`, found no tab: {line[:80]!r}", where=f"{path}:{number}")
        yield number, identifier(identity.strip(), "id", f"{path}:{number}"), text


def plain_or_gzip(folder: Path, name: str) -> Path | None:
    """`folder/name`, else `folder/name.gz`, else None."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def stem(path: Path) -> str:
    """The file name without `.gz` and without its last ending."""
    return Path(path.name.removesuffix(".gz")).stem


def distinct_files(paths: Iterator[Path]) -> list[Path]:
    """Sorted files; of `x` and `x.gz` only `x`."""
    files = {path for path in paths if path.is_file()}
    return sorted(path for path in files if path.suffix != ".gz" or path.with_suffix("") not in files)


def existing_folder(folder: str, loader: str) -> Path:
    """
    Raises:
        RankdistillError: there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise RankdistillError("there is no such folder", where=str(path), fix=f"give an existing one: {loader}:DIR")
    return path
