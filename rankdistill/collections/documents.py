"""`documents:PATH`: a folder of documents, or one file of them, cut into passages.

Text (.txt, .md), HTML and PDF files are a document each, whose id is the file's path in the folder. JSON lines (.jsonl)
and Parquet files hold a document in each record: `text`, and where there are any `title` and `_id`. Hidden files and
symbolic links are passed over. What cannot be read, has no text, or has the text of a document before it is left out,
counted and named in `skipped.jsonl` beside the collection.

A document becomes passages of at most 120 words, its title with each (`split_passages`); `documents:PATH?words=200` and
`...?words=200&overlap=40` say otherwise. Searches find documents, each where its best passage is (`best_passages`), and
are measured so; with `...?by=passage` each passage counts for itself.

Queries and judgments are optional, in the form of BEIR: `queries.jsonl` and `qrels/SPLIT.tsv`. A judgment of a document
is one of each of its passages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from pydantic import Field, model_validator

from rankdistill.artifacts import file_digest, fingerprint
from rankdistill.collections.beir import judgment_files, load_queries
from rankdistill.collections.collection import Collection
from rankdistill.collections.document_files import READERS, Text, ending_of, read_documents
from rankdistill.collections.passages import passage_id, split_passages
from rankdistill.collections.storage import id_hash
from rankdistill.collections.text_files import Judgment, read_qrels, stem
from rankdistill.collections.writer import CollectionWriter, imported, stamps
from rankdistill.errors import RankdistillError
from rankdistill.plain import Section
from rankdistill.recipe import check_values

SCHEMA = 1  # of the way documents are read and cut
SKIPPED = "skipped.jsonl"
NAMED = 3  # of the files that are left out, in a message


class Cut(Section):
    """How documents are cut into passages: what stands behind the question mark."""

    words: int = Field(120, ge=10, lt=10**8)
    overlap: int = Field(0, ge=0)
    by: Literal["document", "passage"] = "document"

    @model_validator(mode="after")
    def _fits(self) -> Cut:
        if self.overlap > self.words // 2:
            raise ValueError(f"passages of {self.words} words cannot share {self.overlap}: at most half of their words")
        return self


def place_of(argument: str) -> tuple[Path, Cut]:
    """The file or folder, and how documents are cut: `PATH?words=200&overlap=40`.

    Raises:
        UsageError: a setting that is unknown or no number that can be used.
    """
    path, _, settings = argument.rpartition("?")
    if not path or Path(argument).expanduser().exists():
        path, settings = argument, ""
    return Path(path).expanduser(), check_values(Cut, dict(parse_qsl(settings, keep_blank_values=True)), argument)


def open_source(argument: str, spec: str) -> Collection:
    path, cut = place_of(argument)
    root = path if path.is_dir() else path.parent
    if not path.exists():
        raise RankdistillError("there is no such file or folder", where=str(path), fix="documents:PATH")
    queries, qrels = judgment_files(root) if path.is_dir() else ([], [])
    files, kinds = _files(path, {*queries, *qrels})
    if not files:
        other = f"; it holds {_counted(kinds)}" if kinds else ""
        fix = f"documents end in {', '.join(READERS)}"
        raise RankdistillError(f"there are no documents here{other}", where=str(path), fix=fix)
    digests, unreadable = _digests(root, files)
    stamped = stamps(path for path in [*files, *queries, *qrels] if path not in unreadable)
    key = {
        "loader": "documents",
        "schema": SCHEMA,
        **cut.model_dump(),
        "files": digests,
        "queries": [file_digest(path) for path in queries],
        "qrels": {stem(path): file_digest(path) for path in qrels},
        "pdf": _pdf_reader(files),
    }

    def load(writer: CollectionWriter) -> None:
        writer.root = str(root)
        _Import(writer, root, cut, qrels).run(path, files, kinds)
        load_queries(writer, queries)

    return imported(key, load, name=path.resolve().name, spec=spec, files=stamped)


def _files(path: Path, judged: set[Path]) -> tuple[list[Path], list[str]]:
    """(files of documents, sorted by their path; the kinds of those that are none)."""
    if not path.is_dir():
        return ([path], []) if ending_of(path) in READERS else ([], [ending_of(path)])
    files, kinds = [], list[str]()
    for folder, folders, names in os.walk(path):
        places = [Path(folder, name) for name in (*folders, *names) if name[0] != "."]
        kinds += ["symbolic links" for place in places if place.is_symlink()]
        folders[:] = [name for name in folders if name[0] != "."]  # linked ones are not entered
        for place in places:
            if place in judged or place.is_symlink() or not place.is_file():
                continue
            if ending_of(place) in READERS:
                files.append(place)
            else:
                kinds.append(ending_of(place) or "without an ending")
    return sorted(files, key=lambda file: file.parts), kinds


def _counted(kinds: list[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in Counter(kinds).most_common(5))


def _digests(root: Path, files: list[Path]) -> tuple[str, set[Path]]:
    """(a digest of all files' names and content, those that cannot be read)."""
    content, unreadable = hashlib.sha256(), set()
    for path in files:
        try:
            digest = file_digest(path)
        except OSError as error:
            digest = fingerprint(["unreadable", str(error.strerror)])
            unreadable.add(path)
        content.update(os.fsencode(path.relative_to(root)) + f" {digest}\n".encode())
    return content.hexdigest(), unreadable


def _pdf_reader(files: list[Path]) -> str | None:
    """The version of what reads PDF, where there are any: another one may read another text.

    Raises:
        RankdistillError: it is not installed.
    """
    first = next((path for path in files if ending_of(path) == ".pdf"), None)
    if first is None:
        return None
    try:
        from pypdf import __version__
    except ImportError:
        fix = "pip install 'rankdistill[documents]', or take the PDF files out of the folder"
        raise RankdistillError("PDF files are read with pypdf, which is missing", where=str(first), fix=fix) from None
    return str(__version__)


class _Import:
    """One import of documents.

    Memory: a document's text, two numbers of each document, and the judgments.
    """

    def __init__(self, writer: CollectionWriter, root: Path, cut: Cut, qrels: list[Path]) -> None:
        self.writer, self.root, self.cut = writer, root, cut
        self.judgments = {stem(path): (path, list(read_qrels(path))) for path in qrels}
        # Passages of each judged document; one that is missing counts as one, which the collection does not hold.
        self.passages = {row.doc_id: 1 for _, rows in self.judgments.values() for row in rows}
        self.seen: set[int] = set()  # hashes of ids and texts
        self.documents = 0
        self.skipped: list[str] = []  # the first, as a message names them
        self.left = 0

    def run(self, source: Path, files: list[Path], kinds: list[str]) -> None:
        with open(self.writer.folder / SKIPPED, "w", encoding="utf-8") as named:
            for path in files:
                name = os.fsencode(path.relative_to(self.root)).decode(errors="backslashreplace")
                self.writer.source = str(path)
                for item in read_documents(path):
                    if isinstance(item, Text):
                        where, reason = f"{name}:{item.line}" if item.line else name, self._add(item, name)
                    else:
                        where, reason = name + (item.where or "").removeprefix(str(path)), item.what
                    if reason:
                        named.write(json.dumps({"document": where, "reason": reason}, ensure_ascii=False) + "\n")
                        self.left += 1
                        self.skipped += [f"{where}: {reason}"] if len(self.skipped) < NAMED else []
        if not self.documents:
            fix = "text is UTF-8; a PDF holds text and has no password"
            what = f"of {self.left:,} documents none can be read: {'; '.join(self.skipped)}"
            raise RankdistillError(what, where=str(source), fix=fix)
        if self.left:
            first = "; ".join([*self.skipped, *(["..."] if self.left > NAMED else [])])
            self.writer.problems.append(f"{self.left:,} documents are left out, all named in {SKIPPED}: {first}")
        if kinds:
            self.writer.problems.append(f"passed over, being no documents: {_counted(kinds)}")
        cut = self.cut.model_dump(exclude={"by"})
        passages = {"documents": self.documents, **cut} if self.cut.by == "document" else {}
        self.writer.notes |= {"passages": passages, "skipped": self.left}
        for split, (path, rows) in self.judgments.items():
            self.writer.take(partial(self.writer.judgment, split), path, self._of_passages(rows))

    def _add(self, text: Text, name: str) -> str:
        """Why a document is left out; "" where it is taken."""
        doc_id = text.doc_id or (f"{name}:{text.line}" if text.line else name)
        whole = " ".join(" ".join(text.paragraphs).split())
        if not whole:
            return "no text"
        if id_hash(f"id {doc_id}") in self.seen:
            return f"the id {doc_id!r} was there before"
        if id_hash(f"text {whole}") in self.seen and doc_id not in self.passages:
            return "the same text as a document before it"
        self.seen |= {id_hash(f"id {doc_id}"), id_hash(f"text {whole}")}
        number = 0
        for number, passage in enumerate(split_passages(text.paragraphs, self.cut.words, self.cut.overlap), 1):
            self.writer.document(passage_id(doc_id, number), text.title, passage, text.line)
        self.documents += 1
        if doc_id in self.passages:
            self.passages[doc_id] = number
        return ""

    def _of_passages(self, judgments: list[Judgment]) -> Iterator[Judgment]:
        for judgment in judgments:
            for number in range(1, self.passages[judgment.doc_id] + 1):
                yield judgment._replace(doc_id=passage_id(judgment.doc_id, number))
