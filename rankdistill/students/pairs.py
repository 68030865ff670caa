"""Queries and documents as one sequence of token ids, each text tokenised once however many pairs it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

PAD_MULTIPLE = 8  # rows are padded to multiples of this many tokens: full tiles for AMX and tensor cores


Frame = tuple[list[int], list[int]]  # token ids, and their types
Sides = list[tuple[np.ndarray, np.ndarray]]  # (query, document) token ids a pair


class PairJoiner(NamedTuple):
    """How a tokenizer joins two token sequences: [prefix] query [middle] document [suffix], and its token types."""

    prefix: Frame
    middle: Frame
    suffix: Frame
    query_type: int
    document_type: int
    two_sided: bool = False  # the token types number the sides, whatever the model itself takes them for

    @property
    def special(self) -> int:
        return sum(len(ids) for ids, _ in (self.prefix, self.middle, self.suffix))

    def sides(
        self, queries: Sequence[np.ndarray], documents: Sequence[np.ndarray], pairs: np.ndarray, limit: int
    ) -> tuple[Sides, np.ndarray]:
        """Token ids of each pair [N, 2], cut longest first to `limit` tokens a pair, and how many tokens it has."""
        lengths = [np.array([len(ids) for ids in texts], np.int64) for texts in (queries, documents)]
        kept = longest_first(lengths[0][pairs[:, 0]], lengths[1][pairs[:, 1]], limit - self.special)
        sides = [(queries[q][:n], documents[d][:m]) for (q, d), n, m in zip(pairs.tolist(), *kept, strict=True)]
        return sides, kept[0] + kept[1] + self.special

    def join(self, sides: Sides, padding: tuple[int, int], limit: int) -> dict[str, torch.Tensor]:
        """A batch: input_ids, attention_mask and token_type_ids, int64 [pairs, width] each; `padding` is the token id
        and type of places after the end, the width a multiple of 8 at most `limit`, unless a pair is longer."""
        lengths = np.array([len(query) + len(document) + self.special for query, document in sides])
        longest = int(lengths.max())
        width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(limit, longest))
        ids, kinds = (np.full((len(sides), width), value, dtype=np.int64) for value in padding)
        for line, kind, (query, document) in zip(ids, kinds, sides, strict=True):
            end = 0
            own = (query, self.query_type), (document, self.document_type)
            for part, types in (self.prefix, own[0], self.middle, own[1], self.suffix):
                line[end : end + len(part)], kind[end : end + len(part)] = part, types
                end += len(part)
        mask = (np.arange(width)[None, :] < lengths[:, None]).astype(np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def longest_first(query: np.ndarray, document: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] lengths kept of each pair's query and document under the `longest_first` rule of the tokenizers
    library.

    The longer side gives way first; when both are longer than half the room (tokens of a pair without special ones),
    each gets half (the longer side, or the document when equal, the odd token)."""
    swap = query > document
    shorter, longer = np.where(swap, document, query), np.where(swap, query, document)
    cut = shorter + longer > room
    first = shorter.copy()
    second = np.where(shorter > room, shorter, np.maximum(shorter, room - shorter))
    both = first + second > room
    first = np.where(both, room // 2, first)
    second = np.where(both, room // 2 + room % 2, second)
    first, second = np.where(cut, first, shorter), np.where(cut, second, longer)
    return np.where(swap, second, first), np.where(swap, first, second)


def padding_of(tokenizer: Any) -> tuple[int, int]:
    """Token id and token type of places after the end."""
    return int(tokenizer.pad_token_id), int(getattr(tokenizer, "pad_token_type_id", 0) or 0)


def bare_tokenizer(tokenizer: Any, limit: int) -> Any:
    """The fast tokenizer underneath, cutting single texts at the pair limit (no more can ever be used)."""
    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_padding()
    bare.enable_truncation(limit)
    return bare


def token_ids(bare: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids without special tokens, int32 a text."""
    encodings = bare.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def learn_joiner(tokenizer: Any) -> PairJoiner | None:
    """Read the layout of a pair off the tokenizer's own output; None when it does not have the usual form."""
    joiners: list[PairJoiner] = []
    for query, document in (("what is this", "a longer text that answers it"), ("is", "no")):
        q, d = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (query, document))
        pair = tokenizer(query, document, return_token_type_ids=True)
        ids, types = list(pair["input_ids"]), list(pair.get("token_type_ids") or [0] * len(pair["input_ids"]))
        sides = pair.sequence_ids(0)
        if 0 not in sides or 1 not in sides:
            return None
        start, middle = sides.index(0), sides.index(0) + len(q)
        second, suffix = sides.index(1), sides.index(1) + len(d)
        if ids[start:middle] != q or ids[second:suffix] != d or start > second:
            return None
        prefix, between, end = slice(0, start), slice(middle, second), slice(suffix, None)
        frames = [(ids[part], types[part]) for part in (prefix, between, end)]
        joiners.append(PairJoiner(frames[0], frames[1], frames[2], types[start], types[second]))
    return joiners[0] if joiners[0] == joiners[1] else None


def two_sided_joiner(tokenizer: Any, query_prompt: str = "", document_prompt: str = "") -> PairJoiner:
    """Each side with the special tokens that it has alone, its prompt first; the token types number the sides."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
    before, after = whole[:start], whole[start + len(text) :]
    query, document = (
        before + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in (query_prompt, document_prompt)
    )
    middle = (after + document, [0] * len(after) + [1] * len(document))
    return PairJoiner((query, [0] * len(query)), middle, (after, [1] * len(after)), 0, 1, two_sided=True)
