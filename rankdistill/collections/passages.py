"""Long documents as passages, and a ranking of passages as one of documents.

Passage 3 of document `guide.md` has the id `guide.md#3`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

# A word: two characters of a script that writes no spaces, or what stands between spaces, 40 characters at most.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}]{{1,40}}")
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])")
NUMBERED = re.compile(r"#\d+$")


def split_passages(paragraphs: Iterable[str], words: int, overlap: int) -> Iterator[str]:
    """Passages of at most `words` words, made of whole sentences; one that is longer is cut between words.

    A passage that is half full ends with a paragraph where the next one would not fit in whole. The next passage begins
    with the last sentences of the one before, as many as `overlap` words hold.
    """
    held: list[tuple[str, int]] = []  # a sentence with what parts it from the one before, its words
    new = False  # whether a sentence is held that no passage has yet
    for paragraph in paragraphs:
        sentences = list(_sentences(paragraph, words))
        whole = sum(count for _, count in sentences)
        for number, (sentence, count) in enumerate(sentences):
            size = sum(count for _, count in held)
            if new and (size + count > words or (not number and 2 * size >= words and size + whole > words)):
                yield "".join(text for text, _ in held).strip()
                while held and sum(count for _, count in held) > min(overlap, words - count):
                    held.pop(0)
            held.append((f"{' ' if number else chr(10)}{sentence}", count))
            new = True
    if new:
        yield "".join(text for text, _ in held).strip()


def _sentences(paragraph: str, words: int) -> Iterator[tuple[str, int]]:
    """(sentence, its words), none with more than `words`."""
    for sentence in SENTENCE_END.split(paragraph.strip()):
        starts = [word.start() for word in WORD.finditer(sentence)]
        bounds = [*starts[::words], len(sentence)]
        for number, (start, end) in enumerate(pairwise(bounds)):
            yield sentence[start:end].rstrip(), min(words, len(starts) - number * words)


def passage_id(doc_id: str, number: int) -> str:
    """The id of a document's passage, numbered from 1."""
    return f"{doc_id}#{number}"


def document_of(passage_id: str) -> str:
    """The id of the document that a passage is of; a document's own id stays as it is."""
    return NUMBERED.sub("", passage_id)


def best_passages(ranked: Sequence[str]) -> list[int]:
    """Where in a ranking of passages, best first, each document has its best one (MaxP; Dai and Callan 2019)."""
    first: dict[str, int] = {}
    for at, identifier in enumerate(ranked):
        first.setdefault(document_of(identifier), at)
    return list(first.values())


def judged_documents(judged: Mapping[str, int]) -> dict[str, int]:
    """Judgments of passages as judgments of documents: the greatest of each."""
    found: dict[str, int] = {}
    for identifier, relevance in judged.items():
        document = document_of(identifier)
        found[document] = max(relevance, found.get(document, relevance))
    return found
