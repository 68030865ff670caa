"""A larger collection made of the facts: four of each, told apart by a number."""

from __future__ import annotations

from pathlib import Path

from conftest import FACTS, write_beir


def many_facts(folder: Path, copies: int = 4) -> Path:
    facts = [
        (f"{name}{number}", f"{text} This is note {number}.", f"{question} in note {number}")
        for number in range(copies)
        for name, text, question in FACTS
    ]
    return write_beir(folder, facts)
