"""Reading what others wrote: every mistake is named by file and line. All text and all ids come in through here."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rankdistill.errors import RankdistillError
from rankdistill.progress import say

GZIP_MAGIC = b"\x1f\x8b"
LONGEST_LINE = 64 << 20  # bytes; what is longer is no line but damage, and would fill the memory
TO_UTF8 = "convert the file to UTF-8 (for example: iconv -f LATIN1 -t UTF-8)"
FOREIGN = {  # first bytes → what such a file is, and what to do
    b"BZh": ("compressed with bzip2", "bunzip2 FILE; plain text and gzip are read"),
    b"\xfd7zXZ\x00": ("compressed with xz", "unxz FILE; plain text and gzip are read"),
    b"PK\x03\x04": ("a zip archive", "unzip FILE; plain text and gzip are read"),
    b"(\xb5/\xfd": ("compressed with zstd", "unzstd FILE; plain text and gzip are read"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it; plain text and gzip are read"),
    b"PAR1": ("Parquet, not text", "give a text file here"),
    b"\x93NUMPY": ("a NumPy array, not text", "give a text file here"),
    b"\xff\xfe": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE"),
}
# What columns of judgments and scores are called.
VALUE_NAME = re.compile(
    r"(.*[-_ .])?(score|relevance|rel|label|grade|judge?ment|rating|gain|logit|similarity|sim|value|qrel)s?"
)
QUERY_NAMES = {"query", "queries", "queryid", "qid", "topic", "topicid", "question", "questionid"}
DOCUMENT_NAMES = {
    *("document", "doc", "docid", "docno", "documentid", "did", "corpusid", "passage", "passageid", "pid", "id"),
    *("positive", "negative", "pos", "neg", "positiveid", "negativeid", "posid", "negid"),
}
TEXT_NAME = re.compile(
    r"([\w#]+[-_ ])?(text|content|body|passage|document|doc|query|question|title|abstract|sentence|topic)s?"
)


def open_text(path: Path) -> IO[bytes]:
    """Open for reading; gzip is known by its first bytes, not by the name.

    Raises:
        RankdistillError: it cannot be opened, or is no text: otherwise compressed, UTF-16, binary.
    """
    try:
        with open(path, "rb") as probe:
            zipped = probe.read(2) == GZIP_MAGIC
        stream: Any = gzip.open(path, "rb") if zipped else open(path, "rb")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise RankdistillError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    try:
        head: bytes = stream.peek(64)[:64]
    except (EOFError, OSError, zlib.error):
        return cast(IO[bytes], stream)  # damaged: said where it is read
    for magic, (what, fix) in FOREIGN.items():
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            stream.close()
            raise RankdistillError(f"the file is {what}", where=str(path), fix=fix.replace("FILE", path.name))
    if head and head.count(0) * 4 >= len(head):
        stream.close()
        fix = f"iconv -f UTF-16 -t UTF-8 {path.name}, or fetch it again"
        raise RankdistillError("the file is full of NUL bytes: UTF-16 text, or damaged", where=str(path), fix=fix)
    return cast(IO[bytes], stream)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end); blank lines are passed over.

    Raises:
        RankdistillError: a line is not UTF-8 or longer than 64 MB, or the gzip stream is cut off or damaged.
    """
    path, number = Path(path), 0
    with open_text(path) as stream:
        while True:
            where = f"{path}:{number + 1}"
            try:
                raw = stream.readline(LONGEST_LINE + 1)
            except (EOFError, OSError, zlib.error) as error:
                what, fix = f"the gzip file is cut off or damaged ({error})", "fetch or compress the file again"
                raise RankdistillError(what, where=where, fix=fix) from None
            if not raw:
                return
            if len(raw) > LONGEST_LINE:
                raise long_line(where)
            number += 1
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line is not UTF-8"
                raise RankdistillError(what, where=where, fix=TO_UTF8) from None
            line = line.rstrip("\r\n")
            if line and not line.isspace():
                yield number, line


def long_line(where: str) -> RankdistillError:
    fix = "does the file lack line ends, or is it damaged? A text of that length must be split"
    return RankdistillError(f"the line is longer than {LONGEST_LINE >> 20} MB", where=where, fix=fix)


def skip_header(lines: Iterator[tuple[int, str]], is_header: Callable[[str], bool]) -> Iterator[tuple[int, str]]:
    """Lines without the first of them, where that names columns."""
    first = next(lines, None)
    if first is not None and not is_header(first[1]):
        yield first
    yield from lines


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object); a line that is not one JSON object is an error."""
    for number, line in read_lines(path):
        yield number, json_object(line, f"{path}:{number}")


def json_object(line: str, where: str) -> dict[str, Any]:
    """
    Raises:
        RankdistillError: the line is not one JSON object.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        what = f"the line is not valid JSON ({reason}); is the file cut off here?"
        raise RankdistillError(what, where=where, fix="each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise RankdistillError(f"the line is a JSON {type(record).__name__}, not an object", where=where)
    return record


def read_text(path: Path, charset: re.Pattern[bytes] | None = None) -> str:
    """A whole file of text, in UTF-8 unless its beginning names another `charset` (group 1 of the pattern).

    Raises:
        RankdistillError: it is larger than 64 MB, in another encoding, binary, or damaged gzip.
    """
    content = b""
    try:
        with open_text(path) as stream:
            while len(content) <= LONGEST_LINE and (part := stream.read(LONGEST_LINE)):
                content += part  # a gzip file that is cut off shows it at its end alone
    except (EOFError, zlib.error) as error:
        raise RankdistillError(f"the gzip file is cut off or damaged ({error})", where=str(path)) from None
    if len(content) > LONGEST_LINE:
        fix = "split it, or write its parts as JSON lines"
        raise RankdistillError(f"a text of more than {LONGEST_LINE >> 20} MB", where=str(path), fix=fix)
    declared = charset and charset.search(content[:4096])
    try:
        text = content.decode(declared[1].decode() if declared else "utf-8-sig")
    except (UnicodeDecodeError, LookupError):
        raise RankdistillError("the text is not UTF-8", where=str(path), fix=TO_UTF8) from None
    if "\0" in text:
        raise RankdistillError("the file is binary, not text", where=str(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def identifier(value: Any, key: str, where: str) -> str:
    """An id as a string: strings without white space around them, whole numbers in digits; nothing else is one."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    empty = value is None or isinstance(value, str)
    problem = "is missing or empty" if empty else f"is a {type(value).__name__}, not a string"
    raise RankdistillError(f"the id {key!r} {problem}", where=where)


def text_ids(ids: pa.Array, where: str) -> pa.Array:
    """Ids as large_string: text without white space around it, as collections have it; whole numbers in digits.

    Raises:
        RankdistillError: they are of another type (numbers that are not whole, truth values).
    """
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_floating(ids.type):
        try:  # pandas makes floats of whole numbers where a cell was empty
            ids = ids.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise RankdistillError(f"ids are numbers that are not whole: {error}", where=where) from None
    kind = pa.types
    if not any(check(ids.type) for check in (kind.is_integer, kind.is_string, kind.is_large_string, kind.is_binary)):
        raise RankdistillError(f"ids are {ids.type}, not text", where=where, fix="write ids as text or whole numbers")
    return pc.utf8_trim_whitespace(ids.cast(pa.large_string()))


def text_keys(values: Mapping[Any, Mapping[Any, Any]], where: str) -> tuple[Mapping[str, Mapping[str, Any]], int]:
    """A run or qrels whose ids are text, and how many ids were whole numbers and are taken as their digits.

    Raises:
        RankdistillError: an id is of another type, or two are the same as text.
    """
    if set(map(type, values)) <= {str} and all(set(map(type, documents)) <= {str} for documents in values.values()):
        return values, 0
    numeric, texts = 0, dict[str, dict[str, Any]]()
    for query_id, documents in values.items():
        inner, name = {_as_text(doc_id, where): value for doc_id, value in documents.items()}, _as_text(query_id, where)
        if len(inner) < len(documents) or name in texts:
            what = f"ids of query {query_id!r} are the same as text"
            raise RankdistillError(what, where=where, fix="write every id as text")
        texts[name] = inner
        numeric += sum(not isinstance(identity, str) for identity in (query_id, *documents))
    return texts, numeric


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value))
    what = f"the id {value!r} is a {type(value).__name__}, not text"
    raise RankdistillError(what, where=where, fix="write ids as text")


def text_of(value: Any, key: str, where: str) -> str:
    """A text field, which must be a string; null counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RankdistillError(f"{key!r} is a {type(value).__name__}, not a string", where=where)
    return value


def to_number(text: str) -> float:
    """A number as files have it, else a ValueError: Python itself would take `1_000` and digits of other scripts."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return float(text)


def split_columns(line: str) -> list[str]:
    """A line with a tab is split at tabs (ids may hold spaces then), any other at white space."""
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def is_header(fields: Sequence[str], value: int = -1) -> bool:
    """Whether a first line names columns: the value's, or the query's. Data is never passed over: `query` alone may be
    an id.

    Args:
        value: the place of the column of relevance or score.
    """
    if len(fields) < 3 or any(re.search(r"\d", field) for field in fields if field not in ("0", "Q0", "q0")):
        return False
    names = [_letters(field) for field in fields]
    named = VALUE_NAME.fullmatch(fields[value].lower().strip("\"'"))
    of_queries = names[0] in QUERY_NAMES and (names[0].endswith("id") or not DOCUMENT_NAMES.isdisjoint(names[1:]))
    return bool(named) or of_queries


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def odd_columns(fields: Sequence[str]) -> str | None:
    """What to do about a line with a wrong number of columns, where it can be told."""
    if len(fields) > 1 and (not fields[0] or fields[0].startswith("Unnamed:")):
        return "the first column has no name: it is pandas' index, leave it out (to_csv(..., index=False))"
    if len(fields) == 1 and "," in fields[0]:
        return "write tabs between columns, not commas"
    return None


class Judgment(NamedTuple):
    query_id: str
    doc_id: str
    relevance: int
    line: int


def grade(value: Any, where: str) -> int:
    """A relevance as a whole number of 32 bits; digits as text count, as do 1.0 and "1.0"."""
    try:
        number = to_number(value) if isinstance(value, str) else float(value)
        if isinstance(value, bool) or number != int(number):
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise RankdistillError(f"the relevance {value!r} is not a whole number", where=where) from None
    if not -(2**31) <= number < 2**31:
        raise RankdistillError(f"the relevance {value!r} is beyond 32 bits", where=where)
    return int(number)


def read_qrels(path: Path) -> Iterator[Judgment]:
    """Judgments in TREC form (`query 0 document relevance`, spaces or tabs) or three columns, header (see `is_header`)
    or none."""
    for number, line in skip_header(read_lines(path), _names_judgments):
        fields, where = split_columns(line), f"{path}:{number}"
        if len(fields) not in (3, 4) or not fields[0] or not fields[-2]:
            what = f"expected 3 or 4 columns (query, [0,] document, relevance), found {len(fields)}"
            what = what if len(fields) not in (3, 4) else "a column is empty"
            raise RankdistillError(f"{what}: {line[:80]!r}", where=where, fix=odd_columns(fields))
        yield Judgment(fields[0], fields[-2], grade(fields[-1], where), number)


def _names_judgments(line: str) -> bool:
    fields = split_columns(line)
    return len(fields) in (3, 4) and bool(fields[0] and fields[-2]) and is_header(fields)


def read_pairs(path: Path) -> Iterator[tuple[str, str, int]]:
    """(id, text, line number) of a two-column TSV, header or none; further tabs belong to the text."""
    for number, line in skip_header(read_lines(path), _names_text):
        identity, tab, text = line.partition("\t")
        where = f"{path}:{number}"
        if not tab:
            raise RankdistillError(f"expected `id<tab>text`, found no tab: {line[:80]!r}", where=where)
        yield identifier(identity, "id", where), text, number


def _names_text(line: str) -> bool:
    identity, _, text = line.partition("\t")
    return bool(TEXT_NAME.fullmatch(text.strip().lower())) and _letters(identity) in QUERY_NAMES | DOCUMENT_NAMES


def plain_or_gzip(folder: Path, name: str) -> Path | None:
    """`folder/name`, else `folder/name.gz`, else None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def stem(path: Path) -> str:
    """The file name without `.gz` and without its last ending."""
    return Path(path.name.removesuffix(".gz")).stem


def data_files(folder: Path, pattern: str, endings: tuple[str, ...]) -> list[Path]:
    """Sorted files of a folder that match a pattern and end in one of `endings`.

    Hidden files (macOS writes `._x`, editors `.x.swp`) and other endings (`x.bak`, `x~`, `x.bz2`) are no data; those
    that look alike are named to the user.
    """
    data, ignored = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name
        if name[0] != "." and name.endswith(endings) and fnmatch(name, pattern) and path.is_file():
            data.append(path)
        elif fnmatch(name.lower().lstrip("._"), pattern.lower()) and any(end in name.lower() for end in endings):
            ignored += [name] if path.is_file() else []
    if ignored:
        names = ", ".join(ignored[:5]) + (" …" if len(ignored) > 5 else "")
        say(f"{folder}: ignored {names} (what is read ends in {' or '.join(endings)})")
    return data


def refuse_one_split(splits: Iterable[tuple[str, Path]]) -> None:
    seen: dict[str, Path] = {}
    for split, path in splits:
        if seen.setdefault(split, path) != path:
            what, where = f"two qrels files define the split {split!r}", f"{seen[split]}, {path}"
            raise RankdistillError(what, where=where, fix="rename or remove one")


def existing_folder(folder: str, loader: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise RankdistillError("there is no such folder", where=str(path), fix=f"give an existing one: {loader}:DIR")
    return path
