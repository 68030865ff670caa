"""From chat messages to a model's tokens, and from identifiers to the tokens that answer with them.

Prompts carry passages that others wrote: what looks like one of the tokenizer's control tokens there is broken up, so
that a passage cannot end the user's turn and begin the assistant's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.loading import SAFE, opening

KNOWN = 10_000  # tokens of what follows a prompt's end are looked up, not computed again
TAIL = 64  # characters of the prompt's end that decide how what follows is cut into tokens
CLOSING = {"[": "]", "(": ")", "{": "}", "<": ">"}


def load_tokenizer(folder: Path) -> Any:
    """A model's tokenizer, or an error where there is none that can be read."""
    from transformers import AutoTokenizer

    with opening(folder, "transformers"):
        return AutoTokenizer.from_pretrained(str(folder), **SAFE)


class Chat:
    """A tokenizer of transformers and how it is told who says what.

    Args:
        template: `auto`: the model's chat template, or plain text where it has none; `plain`: plain text,
            `System: ...`, `User: ...`, `Assistant:`, parted by empty lines.
        options: handed to the model's chat template (`enable_thinking: false`); one that it does not read is refused.
    """

    def __init__(
        self, tokenizer: Any, template: Literal["auto", "plain"] = "auto", options: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        self._known: dict[tuple[str, str], list[int] | None] = {}
        self.template = ""  # as the model has it; empty for plain text
        if template == "auto" and getattr(tokenizer, "chat_template", None):
            self.template = str(tokenizer.get_chat_template())
        unread = [name for name in self.options if not re.search(rf"\b{re.escape(name)}\b", self.template)]
        if unread:
            has = "this model's chat template" if self.template else "plain text, used for want of a chat template,"
            raise UsageError(
                f"{has} does not read {', '.join(unread)}", where="backend.template_options", fix="leave it out"
            )

    def fingerprint(self) -> str:
        return fingerprint([self.template or "plain", self.options])

    # -- prompts ------------------------------------------------------------------------------------------------------

    @cached_property
    def _control(self) -> re.Pattern[str]:
        added = self.tokenizer.get_added_vocab()
        tokens = {*self.tokenizer.all_special_tokens, *(t for t in added if t.startswith("<") and t.endswith(">"))}
        known = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, known)) or r"(?!)")

    def harmless(self, text: str) -> str:
        """The text with a space inside whatever the tokenizer would read as one of its control tokens."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def render(self, messages: Sequence[Mapping[str, str]], before: str = "") -> str:
        """The prompt as text, up to where the assistant goes on after `before`.

        A template that refuses a system message gets it at the head of the first user message.
        """
        clean = [{**message, "content": self.harmless(message["content"])} for message in messages]
        if not self.template:
            turns = [f"{message['role'].capitalize()}: {message['content']}" for message in clean]
            return "\n\n".join([*turns, "Assistant:"]) + (f" {before}" if before else "")
        return self._apply(clean) + before

    def _apply(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self.options)
            )
        except TemplateError as error:
            if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
                joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
                return self._apply([{"role": "user", "content": joined}, *messages[2:]])
            raise RankdistillError(
                f"the model's chat template refuses the messages: {error}",
                fix="use a prompt with other roles, or chat_template: plain",
            ) from None

    def tokens(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: the template has written its special tokens, plain text gets the usual."""
        ids = list(self.tokenizer(text, add_special_tokens=not self.template, verbose=False)["input_ids"])
        if not self.template and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # the answer is still to come
        return ids

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text."""
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [len(tokens) for tokens in ids]

    # -- identifiers --------------------------------------------------------------------------------------------------

    @cached_property
    def _spelled(self) -> dict[str, list[int]]:
        """Text without outer space → the tokens that decode to it."""
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in range(len(self.tokenizer)) if token not in special]
        spelled: dict[str, list[int]] = {}
        for token, text in zip(ids, self.tokenizer.batch_decode([[token] for token in ids]), strict=True):
            spelled.setdefault(text.strip(), []).append(token)
        return spelled

    def spelled(self, name: str, usual: int) -> list[int]:
        """All tokens that say it, the usual one first."""
        return [usual, *(token for token in self._spelled.get(name, []) if token != usual)]

    def _after(self, prompt: str, following: str) -> list[int] | None:
        """The tokens of what follows a prompt; None where the two run into one token."""
        key = prompt[-TAIL:], following
        if key not in self._known:
            if len(self._known) > KNOWN:
                self._known.clear()
            start, whole = self.text_tokens(key[0]), self.text_tokens("".join(key))
            self._known[key] = whole[len(start) :] if whole[: len(start)] == start else None
        return self._known[key]

    def identifier_tokens(self, prompt: str, identifiers: Sequence[str]) -> dict[str, list[int]]:
        """Identifier → the tokens that say it right after the prompt, the usual one first; one that is more than
        one token here is refused."""
        tokens_of: dict[str, list[int]] = {}
        for name in identifiers:
            tokens = self._after(prompt, name)
            if tokens is None or len(tokens) != 1 or self.tokenizer.decode(tokens).strip() != name:
                raise _not_one_token(name, prompt, tokens)
            tokens_of[name] = self.spelled(name, tokens[0])
        if len({tokens[0] for tokens in tokens_of.values()}) < len(tokens_of):
            raise UsageError("two identifiers are the same token", where=", ".join(identifiers))
        return tokens_of

    def answer_tokens(self, prompt: str, identifiers: Sequence[str], separator: str) -> dict[str, list[int]]:
        """Identifier → tokens of it and of the separator after it, in an answer that goes on from the prompt."""
        return {
            name: self._after(prompt, name + separator) or self.text_tokens(name) + self.text_tokens(separator)
            for name in identifiers
        }


def separators(before: str) -> tuple[str, str]:
    """What stands between two identifiers and after the last one, in an answer that begins with `before`.

    The bracket that it ends with is closed and opened again: "[" gives "] > [" and "]"; without one it is " > ".
    """
    opening = before[-1:] if before[-1:] in CLOSING else ""
    closing = CLOSING.get(opening, "")
    return f"{closing} > {opening}", closing


def _not_one_token(name: str, prompt: str, tokens: Sequence[int] | None) -> UsageError:
    why = "runs into the text before it" if tokens is None else f"is {len(tokens)} tokens"
    fix = "identifiers: letters" if name.isdigit() else "identifiers: numeric" if len(name) == 1 else "shorter words"
    return UsageError(
        f"the identifier {name!r} {why} for this model's tokenizer after {prompt[-1:]!r}: one step cannot score it",
        where="teacher.identifiers",
        fix=f"a prompt with {fix}, fewer passages, or decoding: constrained",
    )
