"""The query side of an inference-free student: a tokenizer and a weight for each token; no model, no torch.

A query is the set of its tokens: each that is there has its weight, however often it is there (as SparseStaticEmbedding
of sentence-transformers has it). Special and unknown tokens weigh nothing in a table made here, so a query of such
tokens alone is an empty vector, which matches no document.

This module imports neither torch nor transformers nor sentence_transformers: a search program that reads queries this
way starts in a fraction of a second and answers at the cost of a look-up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer

from rankdistill.artifacts import ArtifactWriter, fingerprint, obtain
from rankdistill.errors import RankdistillError
from rankdistill.progress import warn
from rankdistill.students.loading import UNBOUNDED, say_cut
from rankdistill.students.models import AGAIN, SETTINGS_FILE, folder_revision, saved_settings, says

if TYPE_CHECKING:
    from rankdistill.collections import Collection

ROUTER_FILE = "router_config.json"
STATIC = "SparseStaticEmbedding"
MOST_MISSING = 0.05  # share of a tokenizer's tokens that a table of weights may lack, and the other way round
MOST_WORDS = 200_000  # remembered at a time: some 30 MB
# Parts that treat a word alike whatever stands beside it, so that words can be tokenized apart. Byte-level and
# SentencePiece tokenizers do not: there a word's first piece holds the space before it.
NORMALISERS = ("BertNormalizer", "Lowercase", "NoneType")
SPLITTERS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


class TokenWeights:
    """Encodes queries as the tokens they hold, weighted.

    Args:
        tokenizer: its padding is turned off.
        weights: [vocabulary] of each token; below 0 (training may drive one there) counts as 0.
        fingerprint: of the whole student, queries and documents.
        document_fingerprint: of what decides the document vectors.
        prompt: text put before each query.
        longest: tokens a query is cut to.
        most_terms: keep this many of a query's largest weights; 0 for all.
    """

    inference_free = True
    reads_pairs = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        weights: NDArray[np.float32],
        fingerprint: str,
        document_fingerprint: str,
        prompt: str = "",
        longest: int = UNBOUNDED,
        most_terms: int = 0,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if longest < UNBOUNDED:
            tokenizer.enable_truncation(longest)
        self.tokenizer, self.prompt, self.most_terms = tokenizer, prompt, most_terms
        self.weights = np.maximum(weights, 0, dtype=np.float32)
        self.fingerprint, self.document_fingerprint = fingerprint, document_fingerprint
        self.dimension = len(weights)
        self.cut = {"query": 0}  # queries encoded so far that were longer than is read

    @classmethod
    def open(cls, folder: str | Path) -> TokenWeights:
        """The query side of a saved inference-free student, or of any SparseEncoder with static query weights."""
        folder = Path(folder)
        side = folder / query_folder(folder)
        settings = saved_settings(folder)
        given = says(folder, "config_sentence_transformers.json")
        try:
            tokenizer = Tokenizer.from_file(str(side / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            where = str(side / "tokenizer.json")
            raise RankdistillError(f"the tokenizer cannot be read: {error}", where=where, fix=AGAIN) from None
        longest = says(side, "tokenizer_config.json").get("model_max_length") or UNBOUNDED
        weights = _saved_weights(side, tokenizer)
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if len(weights) < size:
            raise RankdistillError(
                f"the query side has {len(weights):,} weights and its tokenizer {size:,} tokens", where=str(side)
            )
        whole, documents = settings.fingerprint, settings.document_fingerprint
        if not (whole and documents):
            whole, documents = sparse_fingerprints(folder)
        prompt = (given.get("prompts") or {}).get("query") or ""
        most = (settings.terms or {}).get("query") or 0
        return cls(tokenizer, weights, whole, documents, prompt, int(min(longest, UNBOUNDED)), most)

    def encode_queries(self, texts: Sequence[str]) -> csr_matrix:
        """[texts, vocabulary] float32; sorted indices, weights above 0 only; an empty row where no token has weight."""
        # Slow tokenizers' word offsets are not asked for.
        encoded = self.tokenizer.encode_batch_fast([self.prompt + text for text in texts], add_special_tokens=False)
        rows = [self._terms(text.ids) for text in encoded]
        if cut := sum(bool(text.overflowing) for text in encoded):
            if not self.cut["query"]:
                say_cut(cut, len(texts))
            self.cut["query"] += cut
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        columns = np.concatenate([*rows, np.empty(0, np.int32)])
        return csr_matrix((self.weights[columns], columns, starts), shape=(len(rows), self.dimension))

    @cached_property
    def query_terms(self) -> QueryTerms:
        """Called with one query: its term ids and weights, as `encode_queries` gives them, in a tenth of the time."""
        return QueryTerms(self)

    def _terms(self, tokens: list[int]) -> NDArray[np.int32]:
        terms = np.unique(np.array(tokens, dtype=np.int32))
        terms = terms[self.weights[terms] > 0]
        if self.most_terms and len(terms) > self.most_terms:
            terms = np.sort(terms[np.argsort(-self.weights[terms], kind="stable")[: self.most_terms]])
        return terms

    @property
    def terms(self) -> list[str]:
        """The vocabulary, by id; "" where the tokenizer has no token of an id."""
        return [self.tokenizer.id_to_token(number) or "" for number in range(self.dimension)]

    def __repr__(self) -> str:
        return f"TokenWeights({int((self.weights > 0).sum()):,} of {self.dimension:,} tokens weigh something)"


class QueryTerms:
    """The terms of one query at a time, equal to `TokenWeights.encode_queries`, in microseconds.

    A tokenizer takes some 2 µs a token, and an array of one row (scipy) 30 µs more: as long as a search of a small
    index. Here what a tokenizer makes of a word is remembered, and a query is put together word by word.
    """

    def __init__(self, encoder: TokenWeights) -> None:
        self._tokenizer, self._prompt, self._most = encoder.tokenizer, encoder.prompt, encoder.most_terms
        self._weights: list[float] = encoder.weights.tolist()
        self._words: dict[str, list[int]] = {}
        parts = type(self._tokenizer.normalizer).__name__, type(self._tokenizer.pre_tokenizer).__name__
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._apart = parts[0] in NORMALISERS and parts[1] in SPLITTERS and not any(" " in t.content for t in added)
        self._longest = (self._tokenizer.truncation or {}).get("max_length")

    def __call__(self, text: str) -> tuple[list[int], list[float]]:
        """(term ids, each once; their weights above 0), heaviest first where the student keeps the heaviest only."""
        tokens = self._tokens(self._prompt + text)
        weights = self._weights
        ids = [token for token in dict.fromkeys(tokens) if weights[token] > 0]
        if self._most and len(ids) > self._most:
            ids = sorted(ids, key=lambda token: (-weights[token], token))[: self._most]
        return ids, [weights[token] for token in ids]

    def _tokens(self, text: str) -> list[int]:
        if not self._apart:
            return self._encode(text)
        words, tokens = self._words, []
        # At spaces alone: what else may part words is left to the tokenizer.
        for word in text.split(" "):
            if word not in words:
                if len(words) >= MOST_WORDS:
                    words.clear()
                words[word] = self._encode(word)
            tokens += words[word]
        if self._longest is not None and len(tokens) > self._longest:
            return self._encode(text)
        return tokens

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def query_folder(folder: Path) -> str:
    """Which folder of a saved SparseEncoder holds the static query weights."""
    routes = says(folder, ROUTER_FILE)
    query = (routes.get("structure") or {}).get("query") or []
    if len(query) != 1 or not str((routes.get("types") or {}).get(query[0], "")).endswith(f".{STATIC}"):
        raise RankdistillError(
            "this is no inference-free sparse student: it has no table of query token weights",
            where=str(folder),
            fix="open it as a whole model: it encodes queries with its encoder",
        )
    name = str(query[0])
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise RankdistillError(f"a part of a model lies outside its folder: {name}", where=str(folder / ROUTER_FILE))
    return name


def sparse_fingerprints(folder: Path, settings: Any = None) -> tuple[str, str]:
    """(whole model, what decides its document vectors) of a saved SparseEncoder; `settings` are the number format and
    the limits on terms."""
    whole = folder_revision(folder, without=SETTINGS_FILE)
    routes = says(folder, ROUTER_FILE).get("structure") or {}
    parts = [str(part) for part in routes.get("document") or []]
    documents: Any = whole
    if parts and not set(parts) & set(routes.get("query") or []):
        prompts = says(folder, "config_sentence_transformers.json").get("prompts") or {}
        documents = [[folder_revision(folder / part) for part in parts], prompts.get("document") or ""]
    return fingerprint(["sparse", whole, settings]), fingerprint(["sparse documents", documents, settings])


def collection_idf(collection: Collection, tokenizer: Tokenizer, size: int, folder: Path) -> tuple[Any, str]:
    """([size] weights, fingerprint): each token's inverse document frequency in a collection, as BM25 has it.

    log(1 + (N − n + ½) / (n + ½)) for a token that n of N documents hold (Robertson and Spärck Jones). A token that no
    document holds weighs as one that a single document holds: documents may come to it by expansion. Special tokens
    weigh nothing; the caller sees to them. Computed once and kept below `folder`. Documents are read whole.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = {"tokenizer": fingerprint(tokenizer.to_str()), "size": size, "formula": "bm25"}
    inputs = {"collection": collection.fingerprint}
    print_ = fingerprint([settings, inputs])
    path = folder / f"idf-{print_}"

    def make(writer: ArtifactWriter) -> None:
        counts = np.zeros(size, dtype=np.int64)
        for _, texts in collection.iter_documents():
            for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                counts[np.unique(np.array(encoded.ids, dtype=np.int64))] += 1
        held = np.maximum(counts, 1)
        weights = np.log1p((collection.document_count - held + 0.5) / (held + 0.5)).astype(np.float32)
        np.save(writer.path / "idf.npy", weights)
        writer.counts |= {"documents": collection.document_count, "tokens": int((counts > 0).sum())}

    obtain(path, kind="idf", fingerprint=print_, settings=settings, inputs=inputs, make=make)
    return np.load(path / "idf.npy"), print_


def read_idf(path: Path, vocabulary: dict[str, int], size: int, special: Sequence[str]) -> NDArray[np.float32]:
    """[size] weights of a tokenizer's tokens from a JSON file: token → weight.

    Special tokens weigh nothing, whatever the file says. Up to 5 % of the tokenizer's other tokens may be missing: they
    take the file's median weight, and how many is said.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankdistillError(f"cannot read the IDF table: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise RankdistillError(f"the IDF table is no JSON: {error}", where=str(path)) from None
    if not isinstance(table, dict) or not table:
        raise RankdistillError("the IDF table must be a JSON object: token → weight", where=str(path))
    wrong = [token for token, weight in table.items() if not _is_weight(weight)]
    if wrong:
        raise RankdistillError(
            f"{len(wrong):,} of {len(table):,} weights are negative or no finite numbers, such as {wrong[0]!r}:"
            f" {table[wrong[0]]!r}",
            where=str(path),
        )
    words = {token: number for token, number in vocabulary.items() if token not in set(special) and number < size}
    missing = words.keys() - table.keys()
    foreign = table.keys() - vocabulary.keys()
    if len(missing) > MOST_MISSING * len(words) or len(foreign) > MOST_MISSING * len(table):
        raise RankdistillError(
            f"this IDF table is of another vocabulary: {len(missing):,} of the tokenizer's {len(words):,} tokens have"
            f" no weight, and {len(foreign):,} of the table's {len(table):,} tokens are not the tokenizer's",
            where=str(path),
            fix="a table made with this tokenizer, or idf: collection",
        )
    median = float(np.median([float(weight) for weight in table.values()]))
    if missing or foreign:
        warn(
            f"{path}: {len(missing):,} of {len(words):,} tokens have no weight and take the median, {median:.3f};"
            f" {len(foreign):,} tokens of the table are not the tokenizer's"
        )
    weights = np.zeros(size, dtype=np.float32)
    for token, number in words.items():
        weights[number] = table.get(token, median)
    return weights


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value)) and value >= 0


def _saved_weights(side: Path, tokenizer: Tokenizer) -> NDArray[np.float32]:
    tensors = side / "model.safetensors"
    if tensors.is_file():
        try:
            weights = load_file(tensors).get("weight")
        except SafetensorError as error:
            raise RankdistillError(f"the query weights cannot be read: {error}", where=str(tensors)) from None
        if weights is None or weights.ndim != 1 or not np.isfinite(weights).all():
            raise RankdistillError("the query side must hold one finite weight a token", where=str(tensors))
        return weights.astype(np.float32)
    named = says(side, "config.json").get("path")
    table = says(side, Path(str(named)).name) if named else {}
    if not table:
        raise RankdistillError("there are no query weights here", where=str(tensors))
    weights = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), np.float32)
    for token, weight in table.items():
        number = tokenizer.token_to_id(token)
        if number is not None and _is_weight(weight):
            weights[number] = weight
    return weights
