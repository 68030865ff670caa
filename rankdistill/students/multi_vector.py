"""Multi-vector students: one vector a token, compared by late interaction (ColBERT), as a MultiVectorEncoder."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from tokenizers import AddedToken
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import say
from rankdistill.students.base import (
    DOCUMENT_LENGTH,
    QUERY_LENGTH,
    Device,
    EncoderModel,
    EncoderStudent,
    Features,
    Side,
    evaluating,
    to_device,
)
from rankdistill.students.dense import vector_width
from rankdistill.students.loading import load_model, side_length, text_limit
from rankdistill.students.models import folder_revision, resolve_model, saved_settings, says
from rankdistill.students.token_vectors import BUDGET, NO_TOKENS_SCORE, TokenVectors, maxsim

HEAD_DIMENSION = 128  # of a token vector, as ColBERT has it
PIECES, A_TEXT = 4096, 16  # of the vocabulary, from which a projection starts, and how many make a text
TOKENS = "token_embeddings"
SCORED, ATTENDED = "attention_mask", "attended"  # tokens that count, and those that the encoder sees


class MultiVectorModel(EncoderModel):
    """A MultiVectorEncoder as a student; embeddings are [texts, tokens, dimension] with zero rows where no token is.

    A score is the sum over the query's tokens of the best inner product with a token of the document. Where the model
    divides it by the number of query tokens (`meanmaxsim`), the query's vectors are divided."""

    def __init__(self, model: MultiVectorEncoder, maker: MultiVectorStudent, scale: float, source: Any) -> None:
        super().__init__(model, maker, scale)
        self.storage = maker.storage  # number format of document vectors on disk
        self.dimension = vector_width(model, source)
        self.similarity = "dot"  # of a text: a sum over its tokens, not bounded by 1
        self.normalised = any(isinstance(module, Normalize) for module in model)
        self.mean = model.similarity_fn_name == "meanmaxsim"
        settings = [module.get_config_dict() for module in model if isinstance(module, MultiVectorMask)]
        first: Any = model[0]
        lengths = [getattr(first, name, None) for name in ("query_length", "document_length", "query_expansion")]
        formats = self.precision, self.storage
        self.fingerprint = fingerprint(
            ["multi_vector", source, self.normalised, self.mean, lengths, model.prompts, settings, *formats]
        )

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        """As the base class has it; `attention_mask` marks the tokens that count, also those that expand a query and
        that the encoder does not see, so that cutting padding off leaves them in."""
        features = super().preprocess(texts, side)
        expansion = features.get("query_expansion_positions")
        if expansion is not None:
            features[ATTENDED] = features[SCORED]
            features[SCORED] = features[SCORED] | expansion.to(features[SCORED].dtype)
        return features

    def embed(self, features: Features, side: Side) -> Tensor:
        inputs = dict(features)
        inputs[SCORED] = inputs.pop(ATTENDED, inputs[SCORED])
        outputs = self.model(inputs, task=side)
        vectors, mask = outputs[TOKENS].float(), outputs[SCORED].bool()
        if self.normalised:
            vectors = nn.functional.normalize(vectors, dim=-1)  # again in float32: a bf16 norm would cost two digits
        vectors = vectors * mask[..., None]
        if self.mean and side == "query":
            vectors = vectors / mask.sum(dim=1).clamp(min=1)[:, None, None]
        return vectors

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts of different numbers of tokens are padded with zero rows."""
        longest = max(part.shape[1] for part in parts)
        return torch.cat([nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])

    def score_lists(self, queries: Tensor, documents: Tensor, index: Tensor) -> Tensor:
        """Memory: the documents' vectors once for each list they are in."""
        at_once = max(1, BUDGET // max(1, index.shape[1] * documents.shape[1] * max(queries.shape[1:])))
        parts = []
        for asked, rows in zip(queries.split(at_once), index.split(at_once), strict=True):
            listed = documents[rows]  # [lists, n, document tokens, dimension]
            parts.append(_best(listed @ asked.transpose(1, 2)[:, None], listed).sum(dim=-1))
        return self.scale * torch.cat(parts).masked_fill(_empty(documents)[index], NO_TOKENS_SCORE)

    def score_all(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Memory: similarities of all tokens of a few documents at a time; for the gradient the best of each."""
        asked = queries.flatten(0, 1).T  # [dimension, all query tokens]
        at_once = max(1, BUDGET // max(1, asked.shape[1] * documents.shape[1]))
        parts = [
            _best(part @ asked, part).unflatten(1, queries.shape[:2]).sum(dim=-1).T for part in documents.split(at_once)
        ]
        return self.scale * torch.cat(parts, dim=1).masked_fill(_empty(documents), NO_TOKENS_SCORE)

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        return maxsim(self.encode_queries(queries), self.encode_documents(documents), self.device)

    def _encode(self, texts: Sequence[str], side: Side) -> TokenVectors:
        vectors: list[NDArray[np.float32]] = [np.empty((0, self.dimension), np.float32)] * len(texts)

        def take(rows: NDArray[np.int64], embeddings: Tensor) -> None:
            for row, tokens in zip(rows, embeddings.float().cpu().numpy(), strict=True):
                vectors[row] = tokens[tokens.any(axis=1)]

        self.embed_all(texts, side, take)
        return TokenVectors.of(vectors, self.dimension)


def _best(similarity: Tensor, documents: Tensor) -> Tensor:
    """[..., query tokens] the largest of similarities [..., document tokens, query tokens]; zero rows never win."""
    nothing = ~documents.detach().any(dim=-1, keepdim=True)
    # In place, and `max` keeps only where the best was: the similarities are not held for the gradient.
    return similarity.masked_fill_(nothing, torch.finfo(similarity.dtype).min).max(dim=-2).values


def _empty(documents: Tensor) -> Tensor:
    """[documents] those without any token."""
    return ~documents.detach().any(dim=-1).any(dim=-1)


@dataclass(eq=False)
class MultiVectorStudent(EncoderStudent):
    """One vector a token, compared by late interaction: a ColBERT model, or any encoder with a projection put on it.

    Args:
        model: folder, packaged encoder or hub name: a multi-vector model keeps its projection and its settings, any
            other encoder gets a projection of its token vectors.
        dimension: of a token vector; the model's own, or 128 (at most the encoder's width) where a projection is made.
        projection: what a new projection starts from: `principal`: the principal directions of token vectors, which
            keep most of every inner product; `random`: random orthogonal directions; `none`: there is none.
        similarity: of two tokens: `cos`, `dot`, or `keep`: what the model came with, `cos` where it had no choice made.
        scale: factor on scores during training; what a model trained here came with, else 1, unless given.
        query_length: tokens a query is cut to, its prompt not counted; what a multi-vector model came with, else 32,
            unless given.
        document_length: tokens a document is cut to, its prompt not counted; what a multi-vector model came with, else
            128, unless given.
        query_expansion: fill queries up to `query_length` with [MASK] tokens, whose vectors count too (ColBERT); what
            the model came with unless given. An encoder that was not trained with them starts far worse with them.
        attend_to_expansion: let the encoder's other tokens see them.
        query_prompt: text put before each query; a special token of the vocabulary ("[unused0] ") stays one token.
        skip_punctuation: punctuation of documents matches nothing; what the model came with unless given, true for a
            new projection.
        storage: number format of document vectors on disk: fp16 halves them and changes scores by less than 0.001 a
            query token.
    """

    type = "multi_vector"
    dimension: int | None = None
    projection: Literal["principal", "random", "none"] = "principal"
    similarity: Literal["keep", "dot", "cos"] = "keep"
    scale: float | None = None
    query_length: int | None = None
    document_length: int | None = None
    query_expansion: bool | None = None
    attend_to_expansion: bool = False
    query_prompt: str | None = None
    skip_punctuation: bool | None = None
    storage: Literal["fp16", "fp32"] = "fp16"

    def create(self, device: Device = None) -> MultiVectorModel:
        source = resolve_model(self.model)
        ready = is_multi_vector(source.path)
        kind: Any = MultiVectorEncoder if ready else SentenceTransformer
        model: Any = load_model(kind, source.path, device)
        transformer: Any = model[0]
        if not isinstance(transformer, Transformer):
            raise UsageError(
                f"{self.model!r} has no transformer, whose token vectors are compared", where="student.model"
            )
        self.cut(transformer)
        if not ready:
            model = self._with_head(transformer, device)
        elif self.dimension not in (None, model.get_embedding_dimension()):
            raise UsageError(
                f"the token vectors of {self.model!r} have {model.get_embedding_dimension()} dimensions",
                where=f"student.dimension: {self.dimension}",
                fix="leave it out, or start from an encoder without a projection",
            )
        self.set_prompts(model)
        keep_markers_whole(model)
        self._set_lengths(transformer, ready, model.prompts)
        if self.skip_punctuation is not None:
            for mask in [module for module in model if isinstance(module, MultiVectorMask)]:
                mask.skiplist_words = list(string.punctuation) if self.skip_punctuation else []
                mask.resolve_with_tokenizer(model.tokenizer)
        self._set_similarity(model)
        named = [source.revision, self.layers, None if ready else [self.dimension, self.projection]]
        scale = self.scale if self.scale is not None else saved_scale(source.path) if ready else 1.0
        return MultiVectorModel(model, self, scale, named)

    def open(self, folder: Path, device: Device = None) -> MultiVectorModel:
        if not is_multi_vector(folder):
            raise RankdistillError(
                "this is no multi-vector model", where=str(folder), fix="train one: student.type: multi_vector"
            )
        model = load_model(MultiVectorEncoder, folder, device)
        return MultiVectorModel(model, self, saved_scale(folder), folder_revision(folder))

    def _with_head(self, transformer: Transformer, device: Device) -> MultiVectorEncoder:
        """The encoder's token vectors, projected, those that count marked."""
        width = int(transformer.get_embedding_dimension())
        modules: list[nn.Module] = [transformer]
        if self.projection != "none":
            dimension = self.dimension or min(HEAD_DIMENSION, width)
            if dimension > width:
                raise UsageError(
                    f"the encoder's token vectors have {width} dimensions only", where=f"student.dimension: {dimension}"
                )
            weight = (
                principal_directions(transformer, dimension)
                if self.projection == "principal"
                else nn.init.orthogonal_(torch.empty(dimension, width), generator=torch.Generator().manual_seed(0))
            )
            head = Dense(width, dimension, bias=False, activation_function=nn.Identity(), module_input_name=TOKENS)
            head.linear.weight = nn.Parameter(weight)
            modules.append(head)
            say(
                f"student: {self.model} has no projection of its token vectors; one from {width} to {dimension} "
                f"dimensions starts from {self.projection} directions, untrained"
            )
        elif self.dimension not in (None, width):
            raise UsageError(
                f"without a projection token vectors have {width} dimensions",
                where=f"student.dimension: {self.dimension}",
            )
        skipped = list(string.punctuation) if self.skip_punctuation is not False else []
        modules += [MultiVectorMask(skiplist_words=skipped), Normalize(module_input_name=TOKENS)]
        return MultiVectorEncoder(modules=modules, device=str(resolve_device(device)), similarity_fn_name="maxsim")

    def _set_lengths(self, transformer: Any, ready: bool, prompts: dict[str, Any]) -> None:
        limit, expansion = text_limit(transformer), transformer.query_expansion if ready else None
        transformer.query_expansion = None  # it refuses a query length below its own
        came = {"query": (expansion or {}).get("length") or transformer.query_length}
        came["document"] = transformer.document_length
        for side, usual in (("query", QUERY_LENGTH), ("document", DOCUMENT_LENGTH)):
            length = getattr(self, f"{side}_length")
            if ready and came[side] and length is None:
                tokens = min(came[side], limit)  # a model's own lengths count its prompts
            else:
                tokens = side_length(transformer, side, length or usual, prompts.get(side))
            setattr(transformer, f"{side}_length", tokens)
        transformer.max_seq_length = transformer.document_length
        if self.query_expansion or (self.query_expansion is None and expansion is not None):
            settings = {"strategy": "fixed", **(expansion or {}), "length": transformer.query_length}
            settings["attend"] = self.attend_to_expansion or bool(settings.get("attend"))
            transformer.query_expansion = settings

    def _set_similarity(self, model: MultiVectorEncoder) -> None:
        places = [place for place, module in enumerate(model) if isinstance(module, Normalize)]
        if self.similarity == "dot":
            for place in reversed(places):
                del model[place]
        elif self.similarity == "cos" and not places:
            model.append(Normalize(module_input_name=TOKENS))


def is_multi_vector(folder: Path) -> bool:
    """Whether a folder holds a multi-vector model: sentence-transformers' own, PyLate's or Stanford's."""
    for name in ("config_sentence_transformers.json", "config.json"):
        settings = says(folder, name)
        if settings.get("model_type") in ("MultiVectorEncoder", "ColBERT"):
            return True
        architectures = map(str, settings.get("architectures") or [])
        if any(name == "HF_ColBERT" or name.endswith("ForRetrieval") for name in architectures):
            return True
    return False


def saved_scale(folder: Path) -> float:
    """The factor on scores that a model was trained with here; 1 for one made elsewhere."""
    scale = saved_settings(folder).scale
    return 1.0 if scale is None else scale


def keep_markers_whole(model: MultiVectorEncoder) -> None:
    """Let a prompt that is a token of the vocabulary, such as `[unused0] `, be read as that token, not by its parts."""
    tokenizer: Any = model.tokenizer
    words = {prompt.strip() for prompt in model.prompts.values() if prompt and prompt.strip()}
    whole = sorted(word for word in words & set(tokenizer.get_vocab()) if tokenizer.tokenize(word) != [word])
    if whole:
        added = [AddedToken(word, normalized=False, special=True) for word in whole]
        tokenizer.add_special_tokens({"additional_special_tokens": added})


def principal_directions(transformer: Transformer, dimension: int) -> Tensor:
    """[dimension, width] orthonormal directions in which token vectors are largest (no centring: inner products).

    The tokens are pieces of the vocabulary, a few at a time as a text: no text is at hand yet.
    """
    tokenizer: Any = transformer.tokenizer
    special = set(tokenizer.all_special_ids)
    known = np.array([number for number in sorted(tokenizer.get_vocab().values()) if number not in special])
    chosen = np.random.default_rng(0).permutation(known)[:PIECES]
    texts = tokenizer.batch_decode([part.tolist() for part in np.array_split(chosen, max(1, len(chosen) // A_TEXT))])
    device = next(transformer.parameters()).device
    width = int(transformer.get_embedding_dimension())
    second = torch.zeros(width, width, dtype=torch.float64)
    with evaluating(transformer), torch.inference_mode():
        for start in range(0, len(texts), 64):
            outputs = transformer(to_device(transformer.preprocess(texts[start : start + 64]), device))
            vectors = outputs[TOKENS][outputs["attention_mask"].bool()].double().cpu()
            vectors = nn.functional.normalize(vectors, dim=-1)
            second += vectors.T @ vectors
    _, directions = torch.linalg.eigh(second)
    return directions.flip(1)[:, :dimension].T.float().contiguous()
