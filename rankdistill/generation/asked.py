"""Queries asked of a language model (InPars, Bonifacio et al. 2022, arXiv:2202.05144; Promptagator, Dai et al. 2022,
arXiv:2209.11755): a few examples, the passage, one line back.

Prompts are asked through the one loop that teachers use (teachers/llm/asking.py), so that an answer is paid for once,
whatever happens to the process. Passages are foreign text: escaped, and one to a prompt, so that what a document tells
the model to do can spoil its own queries alone.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, field_validator

from rankdistill.artifacts import fingerprint
from rankdistill.collections.collection import held_out
from rankdistill.collections.text_files import read_lines
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.generation.base import Draft, Generator
from rankdistill.generation.filters import judged_texts, normalised
from rankdistill.plain import Section
from rankdistill.recipe import check_values, find_declaration, read_yaml
from rankdistill.teachers.llm.asking import Asking
from rankdistill.teachers.llm.base import Answer, Request
from rankdistill.teachers.llm.budget import Prices
from rankdistill.teachers.llm.prompts import FOLDER, PLACEHOLDER, fit_passages

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DOCUMENTS_AT_ONCE = 256
NAMES = "query|question|search|claim|title|keywords|rewritten query"
LABEL = re.compile(rf"^\s*(?:[-*•]\s+|\d+[.)]\s+)?(?:(?:{NAMES})\s*:[\s*]*)?", re.IGNORECASE)
QUOTES = "\"'“”„«»`*"


class Example(Section):
    passage: str = Field(min_length=1)
    typed: str = Field("", description="of a rewriting: the query before it")
    query: str = Field(min_length=1)


class QueryKind(Section):
    """One kind of query.

    Args:
        task: what the model is to write.
        field: what stands before the answer's place: Question.
        examples: passages with their queries, where the recipe gives no others.
    """

    task: str
    field: str = "Query"
    examples: list[Example] = Field(default_factory=list)


class GenerationPrompt(Section):
    """How a passage is shown to a model that writes queries for it.

    Args:
        system: the system message; {task} is that of the kind of query.
        passage: the user's turn before the field's name: {passage}, and in a rewriting {query}.
        kinds: name → a kind of query.
    """

    kind: Literal["generation"]
    description: str = ""
    system: str
    passage: str
    kinds: dict[str, QueryKind] = Field(min_length=1)

    @field_validator("passage")
    @classmethod
    def _shows_it(cls, value: str) -> str:
        if "{passage}" not in value:
            raise ValueError("it should hold {passage}")
        return value

    def fingerprint(self) -> str:
        return fingerprint(self.model_dump(exclude={"description"}))

    def render(self, kind: str, passage: str, examples: Sequence[Example], query: str = "", **decoding: Any) -> Request:
        """The request for one passage, which is escaped and cut already, as are the examples'."""
        chosen = self.kinds[kind]

        def turn(passage: str, query: str = "") -> dict[str, str]:
            shown = PLACEHOLDER.sub(lambda m: {"passage": passage, "query": query}.get(m[1], m[0]), self.passage)
            return {"role": "user", "content": f"{shown.strip()}\n{chosen.field}:"}

        messages = [{"role": "system", "content": self.system.replace("{task}", chosen.task).strip()}]
        for example in examples:
            messages += [turn(example.passage, example.typed), {"role": "assistant", "content": example.query}]
        return Request((*messages, turn(passage, query)), (), stop="\n", **decoding)


def load_generation_prompt(name: str) -> GenerationPrompt:
    """A prompt by path or by the name of a shipped one.

    Raises:
        UsageError: there is none, or it is no prompt of kind generation.
    """
    path = find_declaration(FOLDER, name)
    values = read_yaml(path)
    if values.get("kind") != "generation":
        raise UsageError(
            f"this prompt is {values.get('kind')}, not generation", where=str(path), fix="prompt: generation"
        )
    return check_values(GenerationPrompt, values, str(path))


def read_query(answer: Answer) -> str:
    """The query in an answer: its first line that says something, without what stands around a query; "" for none."""
    text = answer.text.rpartition("</think>")[2].partition("<think>")[0]
    line = next((line for line in text.splitlines() if line.strip(QUOTES + " \t#>-:")), "")
    line = LABEL.sub("", line.strip(QUOTES + " \t")).strip(QUOTES + " \t")
    return " ".join(line.split())


def unrepeated(query: str) -> str:
    """What an endless answer says before it loops: up to a word twice in a row, or to two that stood there before.

    Small models loop, and what they say first is often good.
    """
    words, pairs = query.split(), set()
    for at, (one, next_one) in enumerate(pairwise(word.lower().strip(".,;:") for word in words)):
        if one == next_one or (one, next_one) in pairs:
            return " ".join(words[: at + (one == next_one)])
        pairs.add((one, next_one))
    return query


class Asked(NamedTuple):
    """A passage as text, what is asked about it, and where a draft of it begins."""

    draft: Draft
    passage: str
    query: str = ""
    seed: int = 0


class AskingGenerator(Generator):
    """A generator that asks a language model; a subclass says what of a collection is shown, in `asked`.

    Args:
        backend: the engine: its `type` (transformers, openai) and keys.
        prompt: a prompt of kind generation: a file, or a shipped name.
        passage_tokens: passages are cut to so many tokens.
        max_tokens: of an answer.
        temperature: of the sampling; 0 is greedy.
        log_probabilities: ask a server for the log-probability of each token too (a model in process tells it anyway).
        budget: the most that may be spent: 500calls, 200000tokens, or money such as 3.50.
        prices: money for a million tokens, {prompt: 0.15, answer: 0.60}.
    """

    def __init__(
        self,
        backend: dict[str, Any],
        prompt: str = "generation",
        passage_tokens: int = 180,
        max_tokens: int = 32,
        temperature: float = 0.7,
        log_probabilities: bool = False,
        budget: str | float | None = None,
        prices: Prices | None = None,
    ) -> None:
        self.asking: Asking = Asking(backend, budget, prices, nothing="are empty")
        self.prompt = load_generation_prompt(prompt)
        self.passage_tokens, self.max_tokens, self.temperature = passage_tokens, max_tokens, temperature
        self.log_probabilities = log_probabilities
        self.examples: dict[str, list[Example]] = {name: kind.examples for name, kind in self.prompt.kinds.items()}

    def settings(self) -> dict[str, Any]:
        """What decides the queries beside the engine."""
        shown = {name: [each.model_dump() for each in examples] for name, examples in self.examples.items()}
        names = ("type", "passage_tokens", "max_tokens", "temperature")
        return {**{name: getattr(self, name) for name in names}, "prompt": self.prompt.fingerprint(), "examples": shown}

    def fingerprint(self) -> str:
        return fingerprint({**self.settings(), "backend": self.asking.backend.fingerprint()})

    def describe(self) -> dict[str, Any]:
        return {**self.settings(), "backend": self.asking.backend.describe()}

    @abstractmethod
    def asked(self, collection: Collection, rows: Sequence[int]) -> Iterator[list[Asked]]:
        """What is asked, in chunks that are asked together."""

    def drafts(self, collection: Collection, rows: Sequence[int]) -> Iterator[Draft]:
        examples = {name: self._fitted_examples(name) for name in self.prompt.kinds}
        for chunk in self.asked(collection, rows):
            texts = self._fitted([item.passage for item in chunk])
            requests = [
                self.prompt.render(
                    item.draft.prompt,
                    text,
                    examples[item.draft.prompt],
                    item.query,
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    seed=item.seed,
                    log_probability=self.log_probabilities,
                )
                for item, text in zip(chunk, texts, strict=True)
            ]
            # Prompts of one kind share their beginning; of one length they need no padding.
            order = sorted(range(len(chunk)), key=lambda at: (chunk[at].draft.prompt, len(texts[at]), at))
            for at, answer in self.asking.ask((at, requests[at]) for at in order):
                draft = chunk[at].draft
                text = draft.text = read_query(answer)
                draft.tokens, draft.log_probability = answer.usage.answer, answer.log_probability
                cut = not answer.finished and "\n" not in answer.text.strip()
                if cut:
                    draft.text = unrepeated(text)
                    cut = draft.text == text
                draft.reason = "refused" if answer.refused else "cut" if cut else ""
                self.asking.see(answer, bool(draft.text))
            yield from (item.draft for item in chunk)

    def _fitted(self, texts: Sequence[str]) -> list[str]:
        return fit_passages(texts, self.passage_tokens, self.asking.backend.count_text)[0]

    def _fitted_examples(self, kind: str) -> list[Example]:
        examples = self.examples[kind]
        texts = self._fitted([each.passage for each in examples])
        return [each.model_copy(update={"passage": text}) for text, each in zip(texts, examples, strict=True)]


class FewShotGenerator(AskingGenerator):
    """A language model that is shown a few passages with their queries, and then a document.

    Args:
        kinds: kinds of query, in turn; those that the prompt has (question, keywords, claim, title).
        per_document: queries asked for each document; those of one kind differ by their seed.
        examples: what is shown: `prompt` (the prompt's own), `train` (drawn from the train split), or a JSON-lines
            file with passage and query. Queries of dev and test splits are refused.
        shots: examples shown at most.
    """

    type = "few_shot"

    def __init__(
        self,
        backend: dict[str, Any],
        kinds: list[str] | None = None,
        per_document: int = 3,
        examples: str = "prompt",
        shots: int = 4,
        **asking: Any,
    ) -> None:
        super().__init__(backend, **asking)
        self.kinds = kinds or ["question", "keywords"][: len(self.prompt.kinds)]
        self.per_document, self.source, self.shots = per_document, examples, shots
        for name in self.kinds:
            if name not in self.prompt.kinds:
                has = ", ".join(self.prompt.kinds)
                raise UsageError(
                    f"the prompt has no kind of query {name!r}", where="generator.kinds", fix=f"one of {has}"
                )
        if per_document < 1 or shots < 0:
            raise UsageError("per_document is at least 1, shots not below 0", where="generator.per_document")
        if per_document > len(self.kinds) and self.temperature <= 0:
            raise UsageError(
                f"{per_document} queries a document of {len(self.kinds)} kinds are the same ones without a temperature",
                where="generator.temperature",
                fix="temperature: 0.7, or more kinds",
            )
        self.examples = {name: each[:shots] for name, each in self.examples.items() if name in self.kinds}
        self.prompt = self.prompt.model_copy(update={"kinds": {name: self.prompt.kinds[name] for name in self.kinds}})

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kinds": self.kinds, "per_document": self.per_document}

    def prepare(self, collection: Collection, root: Path) -> None:
        """Read the examples, and refuse those that measure."""
        if self.source == "prompt":
            return
        known = judged_texts(collection)
        if self.source == "train":
            found = self._of_train(collection, set(known))
        else:
            found = [check_values(Example, json.loads(line), f"{self.source}:{at}") for at, line in _json(self.source)]
            for example in found:
                if normalised(example.query) in known:
                    raise UsageError(
                        f"the example {example.query!r} is a dev or test query of {collection.name}",
                        where=self.source,
                        fix="examples from train or of your own: what is shown cannot be measured with",
                    )
        if not found:
            raise UsageError("there is no example", where="generator.examples", fix="prompt, train or a file")
        self.examples = dict.fromkeys(self.kinds, found[: self.shots])

    def _of_train(self, collection: Collection, judged: set[str]) -> list[Example]:
        """Train queries with their best document, in an order that depends on their ids alone."""
        if "train" not in collection.splits:
            raise UsageError("there is no train split to draw examples from", where="generator.examples", fix="a file")
        qrels = collection.qrels("train")
        ids = list(qrels)
        ids = held_out(ids, 4 * self.shots / len(ids))[1] if len(ids) > 4 * self.shots else ids
        found = []
        for query_id, query in zip(ids, collection.query_texts(ids), strict=True):
            best = max(qrels[query_id], key=lambda doc_id: qrels[query_id][doc_id])
            if qrels[query_id][best] > 0 and normalised(query) not in judged:
                (text,) = collection.document_texts(collection.doc_rows([best]))
                found.append(Example(passage=text, query=query))
        return found

    def asked(self, collection: Collection, rows: Sequence[int]) -> Iterator[list[Asked]]:
        for start in range(0, len(rows), DOCUMENTS_AT_ONCE):
            some = rows[start : start + DOCUMENTS_AT_ONCE]
            pairs = list(zip(collection.doc_ids(some), collection.document_texts(some), strict=True))
            yield [
                Asked(Draft("", doc_id, self.kinds[number % len(self.kinds)]), text, seed=number)
                for number in range(self.per_document)
                for doc_id, text in pairs
            ]


def _json(path: str) -> Iterator[tuple[int, str]]:
    if not Path(path).expanduser().is_file():
        raise UsageError(f"there is no file {path!r}", where="generator.examples", fix="prompt, train or a file")
    for at, line in read_lines(path):
        try:
            if line.strip():
                if not isinstance(json.loads(line), Mapping):
                    raise ValueError("not an object")
                yield at, line
        except ValueError as error:
            raise RankdistillError(
                f"no JSON object: {error}", where=f"{path}:{at}", fix='one a line: {"passage": "...", "query": "..."}'
            ) from None
