"""Reading answers: an order out of what a language model wrote, by stated rules, each repair counted by its kind.

The rules, in turn:

1. What stands before the last `</think>` is not read; nor what follows a `<think>` that never ends.
2. Identifiers are read where they stand as the template's items, "[3]" (full-width and other brackets, white space
   within and small letters too). Only an answer without any of these is read as a bare list ("3 > 1 > 2", "C, A"), and
   only where it holds nothing else: numbers and letters are never read out of prose ("Sorry", "20 passages ...").
3. An identifier that comes again is dropped, and so is one that names no passage.
4. Passages that were not named follow in their old order.

So whatever the answer, the result is a permutation of the passages; whether it says anything at all of them is
`Reading.readable`, and a list none of whose answers does has no score.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankdistill.errors import RankdistillError
from rankdistill.teachers.llm.base import Answer, Request
from rankdistill.teachers.llm.prompts import Prompt

# What each repair means; reports name them.
REPAIRS = {
    "reasoning": "answers with reasoning before them, which was not read",
    "endless_reasoning": "answers whose reasoning never ended",
    "cut": "answers that were cut at their longest",
    "empty": "empty answers",
    "no_identifier": "answers without a readable identifier",
    "bare": "answers that were bare lists",
    "other_text": "answers with other text between or around identifiers",
    "form": "answers with other separators",
    "repeated": "identifiers named again",
    "out_of_range": "identifiers of no passage",
    "missing": "passages not named",
    "absent": "passages whose identifier had no reported logit",
}
_BRACKETS = str.maketrans("【〔⟦「", "[[[[") | str.maketrans("】〕⟧」", "]]]]")
_MARKS = " \t\r\n\f\v.,;:>|*`'\"()[]{}→-–—=#"  # may stand around and between the entries of a bare list
_SPLIT = re.compile(r"[\s,;>|→]+")


@dataclass(frozen=True)
class Reading:
    """An answer as an order."""

    order: tuple[int, ...]  # places of the passages as they were shown, best first: a permutation
    repairs: Mapping[str, int]  # kind → how many (see REPAIRS); empty for an answer that obeys the template's rule
    logits: np.ndarray | None = None  # float64 [n] by the place shown, NaN where absent; None where there are none
    refused: bool = False  # there is no answer: the engine refused the prompt

    @property
    def readable(self) -> bool:
        """The answer says something of at least one passage."""
        return self.repairs.get("missing", 0) + self.repairs.get("absent", 0) < len(self.order)


def read_answer(answer: Answer, request: Request, prompt: Prompt) -> Reading:
    """The order that an answer gives, read as its request was decoded.

    Raises:
        RankdistillError: `first` was asked for and the engine gave no logits.
    """
    if answer.refused:
        count = len(request.identifiers)
        return Reading(tuple(range(count)), {"missing": count}, refused=True)
    if request.decoding == "first":
        if answer.logits is None:
            raise RankdistillError(
                "the backend gave no logits of the identifiers",
                fix="a server with logprobs, or decoding: generate (pairwise_llm has it where pointwise_llm has none)",
            )
        return read_logits(answer.logits, request.identifiers)
    return read_text(answer.text, request.identifiers, prompt, before=request.before, finished=answer.finished)


def read_text(
    text: str, identifiers: Sequence[str], prompt: Prompt, *, before: str = "", finished: bool = True
) -> Reading:
    """The order in a text, by the rules above.

    Args:
        before: what the answer was made to begin with; put in front where the engine did not repeat it.
    """
    repairs: Counter[str] = Counter()
    if not finished:
        repairs["cut"] += 1
    thought, end, rest = text.rpartition("</think>")
    if end:
        repairs["reasoning"] += 1
        text = rest
    text, endless, _ = text.partition("<think>")
    if endless:
        repairs["endless_reasoning"] += 1
    if before and text.strip() and not thought and not text.lstrip().startswith(before):
        text = before + text
    if prompt.is_whole(text, identifiers):
        names = [item.strip() for item in text.strip().split(prompt.separator.strip())]
        place = {prompt.item.replace("{identifier}", name).strip(): at for at, name in enumerate(identifiers)}
        return Reading(tuple(place[name] for name in names), dict(repairs))
    known = {name: at for at, name in enumerate(identifiers)}
    order: dict[int, None] = {}
    for name in _named(text, prompt, repairs):
        at = known.get(name)
        if at is None:
            repairs["out_of_range"] += 1
        elif at in order:
            repairs["repeated"] += 1
        else:
            order[at] = None
    missing = [at for at in range(len(identifiers)) if at not in order]
    repairs["missing"] += len(missing)
    return Reading((*order, *missing), {kind: count for kind, count in repairs.items() if count})


def _named(text: str, prompt: Prompt, repairs: Counter[str]) -> list[str]:
    """Identifiers in the order in which a text names them, however often, of passages or not."""
    text = unicodedata.normalize("NFKC", text.translate(_BRACKETS))
    if not text.strip():
        repairs["empty"] += 1
        return []
    item, alone = _patterns(prompt)
    if item is not None and (tokens := item.findall(text)):
        between = item.sub(" ", text).replace(prompt.separator.strip(), " ")
        repairs["other_text" if any(c.isalnum() for c in between) else "form"] += 1
        return [_name(token) for token in tokens]
    tokens = [token for piece in _SPLIT.split(text) if (token := piece.strip(_MARKS))]
    if tokens and all(alone.fullmatch(token) for token in tokens):
        repairs["bare"] += 1
        return [_name(token) for token in tokens]
    repairs["no_identifier"] += 1
    return []


def _patterns(prompt: Prompt) -> tuple[re.Pattern[str] | None, re.Pattern[str]]:
    """(an identifier as the template's item, or None where nothing stands around it; an identifier alone)."""
    if isinstance(prompt.identifiers, str):
        # In a bare list a small letter is as likely a word: "a".
        marked, alone = {"numeric": (r"\d+", r"\d+"), "letters": ("[A-Za-z]", "[A-Z]")}[prompt.identifiers]
    else:
        marked = alone = "|".join(map(re.escape, sorted(prompt.identifiers, key=len, reverse=True)))
    opening, closing = (re.escape(part.strip()) for part in prompt.item.split("{identifier}"))
    item = re.compile(rf"{opening}\s*({marked})\s*{closing}") if opening and closing else None
    return item, re.compile(alone)


def _name(token: str) -> str:
    """The identifier as templates write it: a letter is a capital, a number has no leading zeros."""
    if token[0].isdigit():
        # Digits of any script; more of them than any window has passages are no number (and slow to convert).
        return str(int(token)) if len(token) <= 6 else token
    return token.upper() if len(token) == 1 else token


# ---------------------------------------------------------------------------------------------------------------------
# One step's logits (FIRST, Gangi Reddy et al. 2024, arXiv:2406.15657)


def read_logits(logits: Mapping[str, float], identifiers: Sequence[str]) -> Reading:
    """The order of the identifiers' logits, falling; equal ones, and then absent ones (NaN too), in the order shown."""
    values = np.array([logits.get(name, np.nan) for name in identifiers], dtype=np.float64)
    absent = np.isnan(values)
    order = np.argsort(np.where(absent, np.inf, -values), kind="stable")
    # A reported logit of minus infinity sorts before what was not reported.
    order = np.concatenate([order[~absent[order]], order[absent[order]]])
    return Reading(tuple(int(at) for at in order), {"absent": int(absent.sum())} if absent.any() else {}, logits=values)


def identifier_logits(tokens: Iterable[tuple[str, float]], identifiers: Sequence[str]) -> dict[str, float]:
    """identifier → logit, from the texts of tokens and their logits.

    White space around a token's text (and the marks that some tokenizers write for it) does not count; of two tokens
    that decode to one identifier the larger logit is taken. Other tokens are passed over.
    """
    logits: dict[str, float] = {}
    for text, logit in tokens:
        name = text.strip(" \t\r\n▁Ġ")
        if name in identifiers and logit > logits.get(name, -np.inf):  # NaN is not
            logits[name] = float(logit)
    return logits
