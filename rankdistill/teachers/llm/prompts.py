"""Prompts as files: what a language model is asked, in words that a user can copy and edit (`configs/prompts/`).

Queries and passages are foreign text. They are put in once, after the template was read, so that braces in them mean
nothing; and they are `escaped`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rankdistill.artifacts import fingerprint
from rankdistill.errors import UsageError
from rankdistill.plain import Section
from rankdistill.recipe import check_values, find_declaration, nearest, read_yaml
from rankdistill.teachers.llm.base import Decoding, Request

FOLDER = "configs/prompts"
Kind = Literal["listwise", "pointwise", "pairwise"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOWS = {  # fewest and most passages
    "listwise": (1, math.inf, "at least one passage"),
    "pairwise": (2, 2, "two passages"),
    "pointwise": (1, 1, "one passage"),
}
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
# Where each placeholder may stand; {query} and {count} may stand anywhere but in `item` and `separator`.
PLACES = {
    "system": {"query", "count", "first", "last", "example"},
    "before": {"query", "count", "first", "last", "example"},
    "passage": {"query", "count", "identifier", "passage"},
    "after": {"query", "count", "first", "last", "example"},
    "item": {"identifier"},
    "begins": set[str](),
}

# What a chat format or a tokenizer may take for its own: <|im_start|>, <s>, </s>, <<SYS>>, <start_of_turn> ...
_ANGLE = re.compile(r"<(?=[|｜/!<\w])")
# ... [INST], [CLS], and what may be taken for identifiers: [1], [ A ], 【2】, ［３］, [1, 2].
_BRACKET = re.compile(r"[\[［【〔]([^\[\]［］【】〔〕]{0,24})[\]］】〕]")


class Prompt(Section):
    """A template; every text may hold placeholders in braces.

    Args:
        kind: listwise: several passages a prompt; pairwise: two; pointwise: one.
        identifiers: numeric: 1, 2 ...; letters: A to Z; or the words that may be answered (yes, no).
        system: the system message; none if empty.
        before: begins the user message; {query}, {count}, {first} and {last} identifier, {example} of an answer.
        passage: each passage: {identifier}, {passage}.
        after: ends the user message.
        item: how one identifier stands in an answer. With `separator` it is the rule for a whole answer: items with
            separators between them, each identifier once, white space free.
        separator: between two items.
        begins: text that the answer is made to begin with where identifiers are read from one step (`first`) or may
            alone be generated (`constrained`); by default what stands before the identifier in `item`.
    """

    kind: Kind
    description: str = ""
    identifiers: Literal["numeric", "letters"] | list[str]
    system: str = ""
    before: str
    passage: str
    after: str = ""
    item: str = "[{identifier}]"
    separator: str = " > "
    begins: str = Field("", validate_default=True)

    @field_validator("identifiers")
    @classmethod
    def _distinct(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and (len(value) < 2 or len(set(value)) < len(value) or not all(value)):
            raise ValueError("at least two different words")
        return value

    @field_validator("system", "before", "passage", "after", "item", "begins")
    @classmethod
    def _known_placeholders(cls, value: str, info: ValidationInfo) -> str:
        known = PLACES[str(info.field_name)]
        for name in PLACEHOLDER.findall(value):
            if name not in known:
                raise ValueError(f"{{{name}}} means nothing here; {nearest(name, known) or 'no placeholder does'}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Prompt:
        if "{passage}" not in self.passage:
            raise ValueError("`passage` should hold {passage}")
        if "{query}" not in self.system + self.before + self.passage + self.after:
            raise ValueError("{query} should be somewhere")
        if isinstance(self.identifiers, str) and "{identifier}" not in self.passage:
            raise ValueError("`passage` should hold {identifier}, or an answer cannot name it")
        if self.kind == "listwise" and not isinstance(self.identifiers, str):
            raise ValueError("a listwise prompt has numeric identifiers or letters")
        if self.item.count("{identifier}") != 1:
            raise ValueError("`item` should hold {identifier} once")
        if not self.separator.strip():
            raise ValueError("`separator` should hold more than white space")
        if not self.begins:
            object.__setattr__(self, "begins", self.item.split("{identifier}")[0])
        return self

    def fingerprint(self) -> str:
        """Of everything that the model sees and that its answers are read by."""
        return fingerprint(self.model_dump(exclude={"description"}))

    def names(self, count: int) -> tuple[str, ...]:
        """The identifiers of `count` passages, in their order (or the words that may be answered)."""
        if isinstance(self.identifiers, list):
            return tuple(self.identifiers)
        if self.identifiers == "numeric":
            return tuple(str(number) for number in range(1, count + 1))
        if count > len(LETTERS):
            raise UsageError(
                f"{count} passages in one prompt, but there are {len(LETTERS)} letters",
                where="teacher.window",
                fix=f"a window of at most {len(LETTERS)}, or a prompt with numeric identifiers",
            )
        return tuple(LETTERS[:count])

    def escaped(self, text: str) -> str:
        """A foreign text as this template shows it."""
        return escaped(text, self.delimiters)

    @property
    def delimiters(self) -> tuple[str, ...]:
        """What stands directly around {passage} or an identifier, where it could not be mere text: `<doc>`, `>>>`."""
        opening, closing = self.passage.split("{passage}", 1)
        opening = opening.split("}")[-1].split("\n")[-1].strip()
        closing = closing.split("{")[0].strip().split("\n")[0].strip()
        pieces = [opening, closing, *self.item.split("{identifier}")]
        return tuple(
            dict.fromkeys(p for piece in pieces if len(p := piece.strip()) > 1 and re.search(r"[^\w\s.:,)]", p))
        )

    def render(
        self,
        query: str,
        passages: Sequence[str],
        *,
        decoding: Decoding = "generate",
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> Request:
        """The request for one query and its passages, in the order they are shown; both are escaped here.

        Args:
            passages: cut by `fit_passages` (which escapes too: twice changes nothing).
            max_tokens: of the answer; by default enough for a whole ranking and some words around it.
        """
        fewest, most, shows = SHOWS[self.kind]
        if not fewest <= len(passages) <= most:
            raise UsageError(f"a {self.kind} prompt shows {shows}, not {len(passages)}")
        names = self.names(len(passages))
        values = {
            "query": self.escaped(query),
            "count": str(len(passages)),
            "first": names[0],
            "last": names[-1],
            "example": self.example(names),
        }
        shown = [
            _filled(self.passage, {**values, "passage": self.escaped(text), "identifier": name})
            for name, text in zip(names if isinstance(self.identifiers, str) else [""] * len(passages), passages)
        ]
        user = _filled(self.before, values) + "".join(shown) + _filled(self.after, values)
        system = [{"role": "system", "content": _filled(self.system, values).strip()}] if self.system.strip() else []
        return Request(
            messages=(*system, {"role": "user", "content": user.strip()}),
            identifiers=names,
            decoding=decoding,
            before="" if decoding == "generate" else self.begins,
            max_tokens=max_tokens or (1 if decoding == "first" else answer_tokens(len(names))),
            temperature=temperature,
            seed=seed,
        )

    def is_whole(self, text: str, names: Sequence[str]) -> bool:
        """Whether an answer obeys the template's rule: every identifier once, as an item, separators between them."""
        items = [item.strip() for item in text.strip().split(self.separator.strip())]
        return sorted(items) == sorted(self.item.replace("{identifier}", name).strip() for name in names)

    def example(self, names: Sequence[str]) -> str:
        """How an answer looks: the first identifiers in an order that is nobody's favourite."""
        chosen = [names[place] for place in (2, 0, 1) if place < len(names)]
        return self.separator.join(self.item.replace("{identifier}", name) for name in chosen)


def answer_tokens(identifiers: int) -> int:
    """Tokens that an answer may have: at most 6 an identifier with what stands around it, and room for a few words."""
    return 6 * identifiers + 32


def _filled(text: str, values: dict[str, str]) -> str:
    """Each placeholder replaced once: what is put in is not looked at again."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def escaped(text: str, delimiters: Sequence[str] = ()) -> str:
    """Foreign text on one line that cannot be taken for part of a prompt.

    - Control and invisible characters go, white space becomes single spaces.
    - Square brackets (of any script) around something short become round ones: "[1] > [2]" reads "(1) > (2)", and
      "[INST]" reads "(INST)".
    - A space is put behind "<" where a tag or a special token could begin: "< |im_start|>", "< /s>".
    - The template's own delimiters are broken by a space.

    Applied twice it gives the same as once.
    """
    characters = (" " if c.isspace() else c for c in text)
    text = "".join(c for c in characters if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    text = " ".join(text.split())
    while (flat := _BRACKET.sub(r"(\1)", text)) != text:
        text = flat
    text = _ANGLE.sub("< ", text)
    for delimiter in delimiters:
        broken = re.compile(re.escape(delimiter), re.IGNORECASE)
        while broken.search(text):
            text = broken.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def fit_passages(
    passages: Sequence[str], tokens: int, count: Callable[[Sequence[str]], list[int]], delimiters: Sequence[str] = ()
) -> tuple[list[str], int]:
    """Escape passages and cut those longer than `tokens` (as `count` counts them), at a space where one is near; the
    texts, and how many were cut."""
    texts = [escaped(text, delimiters) for text in passages]
    counts = dict(enumerate(count(texts))) if texts else {}
    cut = sum(number > tokens for number in counts.values())
    while long := [at for at, number in counts.items() if number > tokens and len(texts[at]) > 1]:
        for at in long:
            texts[at] = _shortened(texts[at], tokens / counts[at])
        counts = dict(zip(long, count([texts[at] for at in long]), strict=True))
    return texts, cut


def _shortened(text: str, share: float) -> str:
    """About this share of a text and at least a character less, to the last space in the last fifth."""
    length = max(1, min(len(text) - 1, int(len(text) * share)))
    kept = text[:length]
    space = kept.rfind(" ")
    return kept[:space] if space > 0.8 * length else kept.rstrip() or kept


def load_prompt(name: str, kind: Kind | None = None) -> Prompt:
    """A template by path or by the name of a shipped one.

    Args:
        kind: refuse another kind of prompt.

    Raises:
        UsageError: there is none, a key is unknown or wrong, or it is of another kind.
    """
    path = find_declaration(FOLDER, name)
    prompt = check_values(Prompt, read_yaml(path), str(path))
    if kind is not None and prompt.kind != kind:
        raise UsageError(f"this prompt is {prompt.kind}, not {kind}", where=str(path), fix=f"prompt: {kind}")
    return prompt
