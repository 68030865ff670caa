"""A cross-encoder that ranks, before any training, as the bi-encoder that it is made of.

Query and document run through the encoder as one sequence, each with positions and special tokens as if it were alone.
A token attends to its own side as the encoder does, and beside that to the other side through a gate, one an attention
head, that starts shut (after the gated cross-attention of Flamingo, Alayrac et al. 2022, arXiv:2204.14198). Each side
is pooled as the encoder pools; the score is the scaled similarity of the two, plus a linear layer on their products and
differences that starts at zero. So training starts from the encoder's ranking and opens the gates, where a new head on
the first token starts from a random one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import load_file_path
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, scaled_dot_product_attention
from torch.nn.functional import dropout as dropped
from transformers import AttentionInterface

from rankdistill.errors import UsageError
from rankdistill.progress import quiet_transformers
from rankdistill.students.base import keep_layers, to_device
from rankdistill.students.loading import SAFE, UNBOUNDED, load_model, opening, text_limit
from rankdistill.students.masked_language import transformer_folder
from rankdistill.students.token_batches import SHORT

ATTENTION = "rankdistill_two_sided"
WEIGHTS = "pair_encoder.safetensors"
OWN, OTHER = 1, 2  # of a token: keys of its own side, and of the other
SCALE = 20.0  # of a cosine: margins of several units, as logits have
PROBE = [("which metal is liquid", "Mercury is a metal."), ("a longer question than its answer is", "No.")]
CLOSE = 0.02  # of a cosine: the same encoder in another order of sums
PAD_MULTIPLE = 8  # rows are padded to multiples of this many tokens: full tiles for AMX and tensor cores


def two_sided_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention to the own side plus gate · attention to the other: [rows, tokens, heads, width].

    Args:
        query, key, value: [rows, heads, tokens, width]
        attention_mask: uint8 [rows, 1, tokens, tokens]: OWN, OTHER, or 0 for padding.
    """
    gate = cast(Any, module).gate_of_heads().to(query.dtype).view(1, -1, 1, 1)
    own, other = attention_mask == OWN, attention_mask == OTHER
    if torch.is_grad_enabled() and query.shape[2] <= SHORT:  # on a CPU the backward pass takes a third of the time
        alike = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
        ours, theirs = (alike.masked_fill(~side, torch.finfo(alike.dtype).min).softmax(-1) for side in (own, other))
        mixed = dropped(ours + gate * theirs, dropout).to(value.dtype) @ value
    else:
        attend = partial(scaled_dot_product_attention, query, key, value, dropout_p=dropout, scale=scaling)
        mixed = attend(attn_mask=own) + gate * attend(attn_mask=other)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, two_sided_attention)


class PairEncoder(Transformer):
    """The module of such a cross-encoder.

    Where this package is installed, plain sentence-transformers loads what was saved: `CrossEncoder(folder,
    trust_remote_code=True)`, the flag because the class is not one of its own; `open_pair_encoder` does without.

    Args:
        model_name_or_path: the encoder's folder, or a saved module's.
        pooling: of each side's tokens: their mean, or the first.
        similarity: of the two sides: cosine or dot product.
        scale: the similarity is multiplied by it.
        side_prompts: what the encoder has before queries and before documents.
        options: as sentence-transformers' Transformer has them.
    """

    config_keys = [*Transformer.config_keys, "pooling", "similarity", "scale", "side_prompts"]

    def __init__(
        self,
        model_name_or_path: str,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        similarity: Literal["cos", "dot"] = "cos",
        scale: float = SCALE,
        side_prompts: tuple[str, str] = ("", ""),
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, **options)
        self.pooling, self.similarity, self.scale, self.side_prompts = pooling, similarity, scale, list(side_prompts)
        self.model.config.num_labels = 1
        self.model.set_attn_implementation(ATTENTION)
        self.gates = nn.Parameter(torch.zeros(self._number_layers(), self.model.config.num_attention_heads))
        self.factor = nn.Parameter(torch.tensor(1.0), requires_grad=False)  # on all of the score
        self.head = nn.Linear(2 * self.get_embedding_dimension(), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._bare: tuple[int, Any] | None = None
        self.joiner = two_sided_joiner(self.tokenizer, *side_prompts)
        # RoBERTa and its kin count positions from after the padding's.
        padding = getattr(getattr(self.model, "embeddings", None), "padding_idx", None)
        self.first_position = 0 if padding is None or "roberta" not in self.model.config.model_type else padding + 1

    def _number_layers(self) -> int:
        layers = [module for module in self.model.modules() if hasattr(module, "is_causal")]
        if not layers:
            raise AttributeError(f"the layers of {type(self.model).__name__} compute it their own way")
        for number, layer in enumerate(layers):
            layer.__dict__["gate_of_heads"] = partial(self._gate, number)
        return len(layers)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Cut to these layers of the encoder, counted from 0, with their gates."""
        keep_layers(self, layers)
        self.gates = nn.Parameter(self.gates.detach()[list(layers)])
        self._number_layers()

    def _gate(self, layer: int) -> Tensor:
        return self.gates[layer]

    def preprocess(
        self, inputs: Any, prompt: str | None = None, processing_kwargs: Any = None, **_: Any
    ) -> dict[str, Any]:
        """A batch of (query, document) texts, cut longest first."""
        limit = min(int(self.max_seq_length or UNBOUNDED), UNBOUNDED)
        if self._bare is None or self._bare[0] != limit:
            self._bare = limit, bare_tokenizer(self.tokenizer, limit)
        queries, documents = (token_ids(self._bare[1], side) for side in zip(*inputs, strict=True))
        pairs = np.arange(len(queries))[:, None].repeat(2, axis=1)
        token_sides = self.joiner.sides(queries, documents, pairs, limit)[0]
        return {**self.joiner.join(token_sides, padding_of(self.tokenizer), limit), "modality": "text"}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `scores`, float32 [pairs, 1]."""
        ids, sides, valid = features["input_ids"], features["token_type_ids"], features["attention_mask"].bool()
        ours = [valid & (sides == side) for side in (0, 1)]  # [pairs, tokens]
        same = sides[:, :, None] == sides[:, None, :]
        mask = torch.where(same, OWN, OTHER).masked_fill(~valid[:, None, :], 0).to(torch.uint8)
        places = torch.arange(ids.shape[1], device=ids.device) - ours[0].sum(1, keepdim=True) * ours[1]
        hidden = self.model(
            input_ids=ids, attention_mask=mask[:, None], position_ids=self.first_position + places * valid
        ).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            query, document = (self._pool(hidden.float(), side) for side in ours)
            if self.similarity == "cos":
                alike = cosine_similarity(query, document)
            else:
                alike = (query * document).sum(dim=1)
            query, document = normalize(query, dim=1), normalize(document, dim=1)
            # Both parts have values around 1 in place of 1 / dimension: the layer learns at the pace of others.
            width = query.shape[1]
            compared = torch.cat([width * query * document, width**0.5 * (query - document).abs()], dim=1)
            features["scores"] = self.factor * (self.scale * alike[:, None] + self.head(compared))
        return features

    def _pool(self, hidden: Tensor, side: Tensor) -> Tensor:
        if self.pooling == "cls":
            first = side.float().argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), first]
        weights = side.float()[:, :, None]
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        super().save(output_path, *args, **kwargs)
        weights = {
            "gates": self.gates,
            "head.weight": self.head.weight,
            "head.bias": self.head.bias,
            "factor": self.factor,
        }
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, Path(output_path) / WEIGHTS)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **options: Any) -> PairEncoder:
        module = super().load(model_name_or_path, *args, **options)
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        path = load_file_path(model_name_or_path, WEIGHTS, **{name: options[name] for name in names if name in options})
        if path is None:
            raise FileNotFoundError(f"{model_name_or_path} has no {WEIGHTS}")
        module.load_state_dict(load_file(path), strict=False)
        return module


def pair_encoder(folder: Path, max_length: int | None, device: str) -> CrossEncoder:
    """An untrained cross-encoder that scores as the encoder of `folder` does (see the module's docstring).

    Raises:
        UsageError: the encoder cannot be had that way: its attention is not open to change, it pools otherwise, or has
            layers after pooling.
    """
    fix = "train: {start: head}, a new scoring head on the first token"
    encoder = load_model(SentenceTransformer, folder, device)
    modules = [module for module in encoder if not isinstance(module, Normalize)]
    pooled = modules[1] if len(modules) == 2 and isinstance(modules[1], Pooling) else None
    mode = pooled.pooling_mode if pooled is not None else None
    if mode not in ("mean", "cls"):
        raise UsageError(
            "this encoder is not one that pools by the mean or the first token", where=str(folder), fix=fix
        )
    normal = len(modules) < len(encoder) or encoder.similarity_fn_name != "dot"
    prompts = tuple((encoder.prompts or {}).get(side) or "" for side in ("query", "document"))
    path = str(encoder_folder(folder))
    try:
        with quiet_transformers():
            module = PairEncoder(
                path,
                pooling=cast(Any, mode),
                similarity="cos" if normal else "dot",
                scale=SCALE if normal else 1.0,
                side_prompts=cast(Any, prompts),
                model_kwargs={"use_safetensors": True, **SAFE},
                processor_kwargs=dict(SAFE),
                max_seq_length=max_length or encoder.max_seq_length,
            )
            module.max_seq_length = min(module.max_seq_length or UNBOUNDED, text_limit(module))
            model = CrossEncoder(modules=[module], device=device, activation_fn=nn.Identity()).eval()
            scores = _outputs(model, PROBE, "scores").reshape(-1).numpy() / module.scale
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, IndexError) as error:
        raise UsageError(
            f"this encoder's attention is not open to change: {error}", where=str(folder), fix=fix
        ) from None
    query, document = (
        _outputs(encoder.eval(), [pair[side] for pair in PROBE], "sentence_embedding", prompt=prompts[side] or None)
        for side in (0, 1)
    )
    expected = (cosine_similarity(query, document) if normal else (query * document).sum(dim=1)).numpy()
    if not np.allclose(scores, expected, atol=CLOSE * max(1.0, float(np.abs(expected).max()))):
        raise UsageError(
            f"joined in pairs, this encoder scores {scores.round(3)} where it scores {expected.round(3)} alone",
            where=str(folder),
            fix=fix,
        )
    return model


def _outputs(model: Any, inputs: Any, name: str, **options: Any) -> Tensor:
    """On the CPU, float32."""
    with torch.no_grad():
        features = to_device(dict(model.preprocess(inputs, **options)), model.device)
        return cast(Tensor, model(features)[name].float().cpu())


def open_pair_encoder(folder: Path, max_length: int | None, device: str) -> CrossEncoder | None:
    """What `CrossEncoder.save_pretrained` made of one; None where `folder` is none."""
    if not (folder / WEIGHTS).is_file():
        return None
    with opening(folder):
        module = PairEncoder.load(str(folder), model_kwargs={"use_safetensors": True}, **SAFE)
    if max_length is not None:
        module.max_seq_length = max_length
    return CrossEncoder(modules=[module], device=device, activation_fn=nn.Identity())


def encoder_folder(start: Path) -> Path:
    """Where an encoder's transformer lies: a sentence-transformers folder may keep it in a sub-folder."""
    folder = transformer_folder(start)
    if not (folder / "config.json").is_file():
        raise UsageError("there is no transformer to start a cross-encoder from", where=str(start))
    return folder


# -- query and document as one sequence of token ids, each text tokenised once however many pairs it is in -------------

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
