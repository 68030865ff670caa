"""Answers that were paid for, kept so that none is paid for twice.

    <root>/answers/<fingerprint of the backend>/answers.sqlite      key → text, logits, usage ... as JSON

`root` is the score store's (`--store`; by default in the user's cache folder). The key is a hash of the whole prompt,
of how it is decoded and of the engine (`Request.key`), so a changed prompt is another record and no prompt is written.
Any number of processes may use one file: each answer is a transaction, which a kill leaves whole or undone.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from rankdistill.artifacts import cache_dir, make_folder
from rankdistill.errors import RankdistillError
from rankdistill.progress import warn
from rankdistill.teachers.llm.base import Answer, Usage

FILE = "answers.sqlite"
SEGMENTS = "segment-*.jsonl"  # what earlier versions wrote: a record a line
WAIT = 60.0  # seconds for another process's transaction


def answers_root(store: str | Path | None = None) -> Path:
    """The folder of all answers below a score store's root, or in the user's cache folder."""
    return (Path(store) if store is not None else cache_dir() / "scores") / "answers"


class AnswerCache:
    """The answers of one engine.

    Args:
        folder: `answers_root(...) / backend.answered_by()`; made with the first answer.
        unkept: new answers go here and not to the disk: a dry run's.
    """

    def __init__(self, folder: str | Path, unkept: dict[str, Answer] | None = None) -> None:
        self.folder, self.unkept = Path(folder), unkept
        self._connection: sqlite3.Connection | None = None

    def __len__(self) -> int:
        with self._table() as table:
            return int(table.execute("SELECT count(*) FROM answers").fetchone()[0]) if table else 0

    def __repr__(self) -> str:
        return f"AnswerCache({len(self):,} answers at {self.folder})"

    def find(self, key: str) -> Answer | None:
        """The answer of that key, also one that another process has just written, or None."""
        if self.unkept is not None and key in self.unkept:
            return self.unkept[key]
        with self._table() as table:
            row = table.execute("SELECT record FROM answers WHERE key = ?", (key,)).fetchone() if table else None
        try:
            return None if row is None else _answer(json.loads(row[0]))
        except (ValueError, TypeError, RecursionError):
            warn(f"an answer cannot be read and is asked again ({self.folder / FILE}, {key})")
            return None

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer; it is on the disk when this returns."""
        if answer.logits and not all(map(math.isfinite, answer.logits.values())):
            raise RankdistillError(
                f"the model gave logits that are no numbers: {answer.logits}",
                fix="load it with precision: fp32; if that stays, its weights are broken",
            )
        if self.unkept is not None:
            self.unkept[key] = answer
            return
        record = {name: value for name, value in asdict(answer).items() if name not in ("kept", "refused")}
        # ASCII: a text with half a surrogate pair is written and read as it came.
        text = json.dumps(record, ensure_ascii=True, allow_nan=False)
        with self._table(write=True) as table:
            assert table is not None
            table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    @contextmanager
    def _table(self, write: bool = False) -> Iterator[sqlite3.Connection | None]:
        """The open file; None where there is none and none is to be made."""
        try:
            yield self._open(write)
        except sqlite3.Error as error:
            self.close()
            place = isinstance(error, sqlite3.OperationalError)  # full, read-only, locked; else the file is damaged
            raise RankdistillError(
                f"the kept answers cannot be {'written' if write else 'read'}: {error}",
                where=str(self.folder / FILE),
                fix="free some space or give another --store, and run the same command again: what came is kept"
                if place
                else "move this file away and run the same command again: its answers are asked for anew",
            ) from error

    def _open(self, write: bool) -> sqlite3.Connection | None:
        if self._connection is None:
            segments = sorted(self.folder.glob(SEGMENTS))
            if write:
                make_folder(self.folder)
            elif not segments and not (self.folder / FILE).exists():
                return None
            # Each statement is a transaction of its own.
            self._connection = sqlite3.connect(self.folder / FILE, timeout=WAIT, isolation_level=None)
            self._connection.text_factory = bytes  # what is damaged is told by the one who reads it
            # Also to read: a kill may have left the file without it.
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, record TEXT)")
            for segment in segments:
                self._take_over(self._connection, segment)
        return self._connection

    def _take_over(self, table: sqlite3.Connection, segment: Path) -> None:
        """Copy the answers that an earlier version wrote, once; its file stays as it is."""
        taken = f"{segment.name}, {segment.stat().st_size} bytes"
        table.execute("CREATE TABLE IF NOT EXISTS taken (segment TEXT PRIMARY KEY)")
        if table.execute("SELECT 1 FROM taken WHERE segment = ?", (taken,)).fetchone():
            return
        table.execute("BEGIN IMMEDIATE")
        with open(segment, "rb") as stream:
            for line in stream:
                try:
                    key = json.loads(line)["key"]
                    table.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (str(key), line.decode()))
                except (ValueError, KeyError, TypeError, RecursionError):
                    if line.endswith(b"\n"):  # else a kill has cut it
                        warn(f"an answer cannot be read and is asked again ({segment})")
        table.execute("INSERT OR IGNORE INTO taken VALUES (?)", (taken,))
        table.execute("COMMIT")


def _answer(record: Any) -> Answer:
    """The answer that `AnswerCache.add` wrote, or ValueError where it is none."""
    try:
        logits = record["logits"] and {name: float(value) for name, value in record["logits"].items()}
        usage = Usage(**record["usage"])
        likelihood = record.get("log_probability")
        likelihood = None if likelihood is None else float(likelihood)
        told = [*(logits or {}).values(), likelihood or 0.0]
        numbers = all(map(math.isfinite, told)) and min(astuple(usage)) >= 0
        if not numbers or not isinstance(record["text"], str):
            raise ValueError("not an answer")
        return Answer(record["text"], logits, usage, bool(record["finished"]), "", likelihood, kept=True)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not an answer: {error}") from None
