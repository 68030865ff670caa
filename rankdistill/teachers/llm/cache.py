"""Answers that were paid for, kept so that none is paid for twice.

    <root>/answers/<fingerprint of the backend>/segment-*.jsonl      one line an answer: key, text, logits, usage ...

`root` is the score store's (`--store`; by default in the user's cache folder). The key is a hash of the whole prompt,
of how it is decoded and of the engine (`Request.key`), so a changed prompt is another record and no prompt is written.
Each process appends to a segment of its own, a whole line at once; what a kill leaves of a last line is not read.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankdistill.artifacts import cache_dir, disk_errors
from rankdistill.errors import RankdistillError
from rankdistill.progress import warn
from rankdistill.teachers.llm.base import Answer, Usage

SYNC_SECONDS = 1.0  # between two fsyncs: a kill loses nothing that was written, a power cut at most this
LOOK_SECONDS = 1.0  # between two looks at what other processes have added


def answers_root(store: str | Path | None = None) -> Path:
    """The folder of all answers below a score store's root, or in the user's cache folder."""
    return (Path(store) if store is not None else cache_dir() / "scores") / "answers"


class AnswerCache:
    """The answers of one engine. In memory an answer is its key and where it lies: about 200 bytes.

    Args:
        folder: `answers_root(...) / backend.fingerprint()`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.damaged = 0  # whole lines that could not be read; they are asked again
        self._at: dict[str, tuple[Path, int]] = {}
        self._read: dict[Path, int] = {}  # segment → bytes looked at
        self._segment: Path | None = None
        self._stream: int | None = None
        self._synced = self._looked = -math.inf
        self.refresh()

    def __len__(self) -> int:
        return len(self._at)

    def __repr__(self) -> str:
        return f"AnswerCache({len(self):,} answers at {self.folder})"

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def refresh(self) -> None:
        """Take in what other processes have written meanwhile."""
        self._looked = time.monotonic()
        for segment in sorted(self.folder.glob("segment-*.jsonl")):
            start = self._read.get(segment, 0)
            try:
                if segment.stat().st_size <= start:
                    continue
                with open(segment, "rb") as stream:
                    stream.seek(start)
                    for line in stream:
                        if not line.endswith(b"\n"):
                            break  # being written, or cut by a kill
                        try:
                            self._at.setdefault(_record(line)["key"], (segment, start))
                        except ValueError:
                            self._damage(segment, start)
                        start += len(line)
            except OSError as error:
                self.damaged += 1
                warn(f"answers cannot be read and are asked again: {error}")
            self._read[segment] = start

    def _damage(self, segment: Path, start: int) -> None:
        self.damaged += 1
        warn(f"an answer cannot be read and is asked again ({segment}, byte {start})")

    def find(self, key: str) -> Answer | None:
        """The answer of that key, or None."""
        if key not in self._at and time.monotonic() - self._looked > LOOK_SECONDS:
            self.refresh()
        place = self._at.get(key)
        if place is None:
            return None
        segment, start = place
        try:
            with open(segment, "rb") as stream:
                stream.seek(start)
                record = _record(stream.readline())
            if record["key"] != key:
                raise ValueError("another key")
            return _answer(record)
        except (OSError, ValueError):
            # Deleted or changed under us: the answer is asked again.
            self._damage(segment, start)
            del self._at[key]
            return None

    def add(self, key: str, answer: Answer) -> None:
        """Write an answer; it is in the file when this returns.

        Raises:
            RankdistillError: a logit that is no number, a full or read-only disk.
        """
        if answer.logits and not all(math.isfinite(value) for value in answer.logits.values()):
            raise RankdistillError(
                f"the model gave logits that are no numbers: {answer.logits}",
                fix="load it with precision: fp32; if that stays, its weights are broken",
            )
        record: Mapping[str, Any] = {
            "key": key,
            "text": answer.text,
            "logits": answer.logits,
            "usage": vars(answer.usage),
            "seconds": round(answer.seconds, 6),
            "finished": answer.finished,
        }
        # ASCII: a text with half a surrogate pair is written and read as it came.
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        if self._stream is None:
            self._open()
        assert self._stream is not None and self._segment is not None
        start = self._read[self._segment]
        try:
            with disk_errors(self._segment):
                written = 0
                while written < len(line):
                    written += os.write(self._stream, line[written:])
                if time.monotonic() - self._synced > SYNC_SECONDS:
                    os.fsync(self._stream)
                    self._synced = time.monotonic()
        except BaseException:
            self.close()  # half a line may stand there: nothing is written after it
            raise
        self._read[self._segment] = start + len(line)
        self._at[key] = (self._segment, start)

    def _open(self) -> None:
        name = f"segment-{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._stream = os.open(self.folder / name, flags, 0o644)
        self._segment = self.folder / name
        self._read[self._segment] = 0

    def close(self) -> None:
        """Make what was written durable; a later `add` begins a new segment."""
        if self._stream is not None:
            try:
                os.fsync(self._stream)
            except OSError:
                pass  # the write itself has said so
            os.close(self._stream)
        self._stream = None


def _record(line: bytes) -> dict[str, Any]:
    """A line of a segment.

    Raises:
        ValueError: it is no record with a key.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        raise ValueError("not a record")
    return record


def _answer(record: dict[str, Any]) -> Answer:
    """The answer that `AnswerCache.add` wrote.

    Raises:
        ValueError: something is missing or of another kind.
    """
    try:
        logits, usage = record["logits"], record["usage"]
        numbers = [usage[name] for name in ("prompt", "answer", "cached", "calls")]
        values = [] if logits is None else [float(value) for value in logits.values()]
        if not isinstance(record["text"], str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("not an answer")
        if not all(map(math.isfinite, [*values, float(record["seconds"])])):
            raise ValueError("not a number")
        return Answer(
            text=record["text"],
            logits=None if logits is None else dict(zip(logits, values, strict=True)),
            usage=Usage(**usage),
            seconds=float(record["seconds"]),
            finished=bool(record["finished"]),
            kept=True,
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not an answer: {error}") from None
