"""What writes queries, and what one of them is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankdistill.artifacts import fingerprint
from rankdistill.sampling.training_queries import pseudo_query

if TYPE_CHECKING:
    from rankdistill.collections import Collection
    from rankdistill.teachers.llm.asking import Asking


@dataclass
class Draft:
    """One query as it was written for one document, and what became of it."""

    text: str
    doc_id: str
    prompt: str = ""  # the kind of query that was asked for
    tokens: int = 0  # of the answer
    log_probability: float | None = None  # mean over the answer's tokens, where the engine tells it
    original_id: str = ""  # the query that it rewrites
    reason: str = ""  # why it was thrown away; empty: it is kept
    part: str = ""  # the split of its document
    ranks: dict[str, int] = field(default_factory=dict)  # source → rank of the document, 0: not found


class Generator(ABC):
    """Writes queries for documents. The constructor takes the recipe's settings and loads nothing."""

    type: ClassVar[str]
    copies: ClassVar[bool] = False  # its queries are the documents' own words: they are no fault
    rewrites: ClassVar[bool] = False  # it is shown training queries, not documents without any
    asking: Asking | None = None  # the language model that it asks, if any

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that decides the queries, of no path and no time."""

    @abstractmethod
    def drafts(self, collection: Collection, rows: Sequence[int]) -> Iterator[Draft]:
        """Queries for these documents, in an order that depends on nothing but the arguments."""

    def describe(self) -> dict[str, Any]:
        """The settings, for manifests."""
        return {"type": self.type}

    def prepare(self, collection: Collection, root: Path) -> None:  # noqa: B027
        """Told before it writes which collection the documents are of; what is worth keeping goes below `root`."""


class TitleGenerator(Generator):
    """The title of each document, or its first sentence: no language model, and nothing to pay."""

    type = "titles"
    copies = True

    def fingerprint(self) -> str:
        return fingerprint([self.type, 1])

    def drafts(self, collection: Collection, rows: Sequence[int]) -> Iterator[Draft]:
        for start in range(0, len(rows), 4096):
            for item in collection.documents(rows[start : start + 4096]):
                yield Draft(pseudo_query(item.title, item.text), item.doc_id, "title")
