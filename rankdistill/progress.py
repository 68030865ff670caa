"""Progress with rate and time left: a live bar on a terminal, plain lines elsewhere, nothing when quiet.

Everything here goes to standard error: standard output is for results.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rankdistill.plain import shown

_quiet = False
PLAIN_INTERVAL = 10.0  # seconds between two plain lines


def set_quiet(quiet: bool) -> None:
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


def launched() -> tuple[int, int]:
    """(rank, processes) as torchrun or `accelerate launch` set them in the environment; (0, 1) without either."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text: str) -> None:
    """One line for the user (a stage begins, a file was written); silent with `--quiet`, and in all but the first of
    several processes."""
    if not _quiet and launched()[0] == 0:
        print(shown(text, len(text)), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line that must be seen, also with `--quiet`."""
    if launched()[0] == 0:
        print(f"warning: {shown(text, len(text))}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Counts work done; `advance(n)` after each piece."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.note = ""
        self.started = time.monotonic()
        self._printed = self.started
        self._live = sys.stderr.isatty() and not _quiet

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if now - self._printed >= (0.1 if self._live else PLAIN_INTERVAL):
            self._printed = now
            self._print(end="" if self._live else "\n")

    def _print(self, end: str) -> None:
        if _quiet or launched()[0] > 0:
            return
        seconds = time.monotonic() - self.started
        rate = self.done / seconds if seconds else 0.0
        line = f"{shown(self.label)}: {self.done:,}"
        if self.total:
            line += f"/{self.total:,}"
        line += f" {self.unit}, {rate:,.1f}/s"
        if self.total and rate and self.done < self.total:
            line += f", {duration((self.total - self.done) / rate)} left"
        if self.note:
            line += f", {self.note}"
        print(f"\r\033[K{line}" if self._live else line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        seconds = time.monotonic() - self.started
        if self._live or seconds >= PLAIN_INTERVAL:
            self._print(end="\n")


@contextmanager
def progress(label: str, total: int | None, unit: str) -> Iterator[Progress]:
    bar = Progress(label, total, unit)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and advice of the libraries in our output."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
