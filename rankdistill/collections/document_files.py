"""Documents in the files that people keep them in: text, Markdown, HTML, PDF, JSON lines and Parquet.

Each reader yields a file's documents, and in the place of one that cannot be read the error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from rankdistill.collections.hf import DOCUMENT_ID, DOCUMENT_TEXT, parquet_rows
from rankdistill.collections.text_files import identifier, json_object, read_lines, read_text, text_of
from rankdistill.errors import RankdistillError

LONGEST_TITLE = 12  # words; a first line that is longer is no title
TITLES = ("title", "name", "headline")
HEADING = re.compile(r"#{1,6}\s+(.*?)[\s#]*")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)\s]*(?:\s[^)]*)?\)")
FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n(?:---|\.\.\.)\s*(?:\n|$)", re.DOTALL)
BLANK = re.compile(r"\n\s*\n")
CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)


class Text(NamedTuple):
    """A document: its title and paragraphs; of a record also its id, where it has any, and line from 1."""

    title: str
    paragraphs: list[str]
    doc_id: str | None = None
    line: int = 0


Read = Iterator[Text | RankdistillError]


def read_documents(path: Path) -> Read:
    """The documents of a file, by its ending; a file that breaks off has given those before the break."""
    try:
        yield from READERS[ending_of(path)](path)
    except RankdistillError as error:
        yield error
    except OSError as error:
        yield RankdistillError(f"cannot be read: {error.strerror}", where=str(path))


def ending_of(path: Path) -> str:
    return path.with_name(path.name.lower().removesuffix(".gz")).suffix


def _text(path: Path) -> Read:
    paragraphs = [part for part in BLANK.split(re.sub(r"(?m)^\W{3,}$", "", read_text(path))) if part.strip()]
    title = paragraphs[0].strip() if paragraphs else ""
    if len(paragraphs) > 1 and "\n" not in title and len(title.split()) <= LONGEST_TITLE and title[-1] not in ".!?:;,":
        yield Text(title, paragraphs[1:])
    else:
        yield Text(_named(path), paragraphs)


def _markdown(path: Path) -> Read:
    text, title = read_text(path), ""
    front = FRONT_MATTER.match(text)
    if front:
        named = re.search(r"^title:\s*(.+)$", front[1], re.MULTILINE)
        text, title = text[front.end() :], named[1].strip().strip("\"'") if named else ""
    lines: list[str] = []
    fenced = headed = False
    for line in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced and (heading := HEADING.fullmatch(line)):
            words, headed = LINK.sub(r"\1", heading[1]), True
            lines += ["", words] if title and words != title else [""]  # the first one is the title
            title = title or words
        elif line.strip() or not headed:  # a heading stands with what follows it
            lines.append(line if fenced else LINK.sub(r"\1", line))
            headed = False
    yield Text(title or _named(path), BLANK.split("\n".join(lines)))


def _html(path: Path) -> Read:
    page = _Page()
    try:
        page.feed(read_text(path, CHARSET))
        page.close()
    except (AssertionError, ValueError, RecursionError) as error:  # what html.parser raises over rare damage
        raise RankdistillError(f"no HTML that can be read ({error})", where=str(path)) from None
    page.end_paragraph()
    title = " ".join("".join(page.title).split())
    yield Text(title or page.heading or _named(path), page.paragraphs)


class _Page(HTMLParser):
    """The title, the first heading and the paragraphs of a page, without what is no text or leads elsewhere."""

    SKIPPED = frozenset({"script", "style", "noscript", "template", "nav", "svg", "iframe", "select", "button"})
    INLINE = re.compile(
        r"a|abbr|b|bd[io]|big|cite|code|del|dfn|em|font|i|img|ins|kbd|label|mark|q|s|samp|small|span|strike|strong|"
        r"su[bp]|time|tt|u|var|wbr"
    )

    def __init__(self) -> None:
        super().__init__()
        self.title: list[str] = []
        self.heading, self.paragraphs = "", list[str]()
        self._data: list[str] = []
        self._inside: list[str] = []  # skipped elements that are open
        self._before = ""  # a heading, which stands with what follows it

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in self.SKIPPED:
            self._inside.append(tag)
        if tag == "title":
            self._inside.append(tag)
        elif tag in ("td", "th", "br"):
            self._data.append(" ")
        elif not self.INLINE.fullmatch(tag):
            self.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._inside:
            del self._inside[self._inside.index(tag) :]
        elif re.fullmatch("h[1-6]", tag):
            self.end_paragraph(heading=True)
        elif tag not in ("td", "th", "br") and not self.INLINE.fullmatch(tag):
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self._data.append(data)
        elif self._inside == ["title"]:
            self.title.append(data)

    def end_paragraph(self, heading: bool = False) -> None:
        text = " ".join("".join(self._data).split())
        self._data = []
        if heading and text:
            self.heading = self.heading or text
            self._before = f"{self._before}\n{text}".strip()
        elif text:
            self.paragraphs.append(f"{self._before}\n{text}".strip())
            self._before = ""


def _pdf(path: Path) -> Read:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise RankdistillError("protected with a password", where=str(path), fix="save it without one")
        title = str((reader.metadata and reader.metadata.title) or "").strip()
        pages = [page.extract_text() for page in reader.pages]
    except (RankdistillError, OSError):
        raise
    except Exception as error:  # whatever a damaged PDF makes pypdf raise
        raise RankdistillError(f"no PDF that can be read ({type(error).__name__}: {error})", where=str(path)) from None
    paragraphs = [re.sub(r"(?<=\w)-\n(?=[a-z])", "", part) for page in pages for part in BLANK.split(page)]
    if not any(part.strip() for part in paragraphs):
        raise RankdistillError("a PDF without text: pictures of pages?", where=str(path), fix="read them with OCR")
    yield Text(title or _named(path), paragraphs)


def _records(path: Path) -> Read:
    rows = enumerate(parquet_rows(path), 1) if ending_of(path) == ".parquet" else read_lines(path)
    for number, row in rows:
        try:
            yield _record(row, f"{path}:{number}", number)
        except RankdistillError as error:
            yield error


def _record(row: dict[str, Any] | str, where: str, line: int) -> Text:
    record = json_object(row, where) if isinstance(row, str) else row
    text = next((record[name] for name in DOCUMENT_TEXT if name in record), None)
    if text is None:
        columns = json.dumps(list(record), ensure_ascii=False)
        raise RankdistillError(f"no {', '.join(DOCUMENT_TEXT)} among {columns}", where=where)
    title = next((record[name] for name in TITLES if isinstance(record.get(name), str)), "")
    own = next((record[name] for name in DOCUMENT_ID if record.get(name) is not None), None)
    doc_id = None if own is None else identifier(own, "id", where)
    return Text(" ".join(title.split()), BLANK.split(text_of(text, "text", where)), doc_id, line)


def _named(path: Path) -> str:
    """A title for a file that has none: its name in words."""
    return " ".join(re.split(r"[\W_]+", path.name.removesuffix(".gz").rpartition(".")[0])).strip()


READERS: dict[str, Callable[[Path], Read]] = {
    **dict.fromkeys((".txt", ".text", ".rst"), _text),
    **dict.fromkeys((".md", ".markdown"), _markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _html),
    ".pdf": _pdf,
    **dict.fromkeys((".jsonl", ".ndjson", ".parquet"), _records),
}
