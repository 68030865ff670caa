"""vLLM in this process: a language model on a GPU, many prompts at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

from rankdistill.artifacts import fingerprint
from rankdistill.errors import require
from rankdistill.students.models import ModelSource, resolve_model
from rankdistill.teachers.llm.base import Answer, Backend, Request, Usage
from rankdistill.teachers.llm.chat import Chat, load_tokenizer, separators

STEP_TOKENS = 8  # of one identifier
MOST_TOKENS = 128  # that say the identifiers of one prompt


class VLLMBackend(Backend):
    """vLLM in this process (extra `vllm`, which needs a GPU).

    Written against vLLM's documentation (0.12 and later: `LLM.generate`, `allowed_token_ids`, `structured_outputs`,
    `logprobs_mode`) and **not run where it was written**: there was no vLLM and no GPU for it. Prompts, templates and
    identifiers' tokens are those of the `transformers` backend, which was.

    Args:
        model: a folder or hub name.
        precision: vLLM's `dtype`: auto, bfloat16, float16, float32.
        batch_size: prompts handed to the engine at once; it schedules them itself.
        template_options: handed to the model's chat template (`enable_thinking: false`).
        engine: more keys for vLLM's `LLM`, e.g. {tensor_parallel_size: 2, max_model_len: 8192}.
    """

    type: ClassVar[str] = "vllm"
    decodings: ClassVar[frozenset[str]] = frozenset({"generate", "first", "constrained"})

    def __init__(
        self,
        model: str,
        precision: str = "auto",
        batch_size: int = 256,
        template_options: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
    ) -> None:
        self.model_name, self.precision, self.batch_size = model, precision, batch_size
        self.template_options, self.engine = dict(template_options or {}), dict(engine or {})

    @cached_property
    def _source(self) -> ModelSource:
        return resolve_model(self.model_name)

    @cached_property
    def chat(self) -> Chat:
        """The model's tokenizer and template."""
        return Chat(load_tokenizer(self._source.path), "auto", self.template_options)

    @cached_property
    def _sampling(self) -> Any:
        return require("vllm.sampling_params", extra="vllm", why="a language model in vLLM")

    @cached_property
    def _model(self) -> Any:
        vllm = require("vllm", extra="vllm", why="a language model in vLLM")
        # Log-probabilities after masking: those of the allowed tokens alone, so none of them can be missing.
        settings = {"logprobs_mode": "processed_logprobs", "max_logprobs": MOST_TOKENS, **self.engine}
        return vllm.LLM(model=str(self._source.path), dtype=self.precision, **settings)

    def fingerprint(self) -> str:
        return fingerprint([self.type, self._source.revision, self.precision, self.chat.fingerprint(), self.engine])

    def describe(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "model": self.model_name,
            "revision": self._source.revision,
            "precision": self.precision,
            "template_options": self.template_options,
            "engine": self.engine,
        }

    def count_tokens(self, request: Request) -> int:
        return len(self.chat.tokens(self.chat.render(request.messages, request.before)))

    def count_text(self, texts: Sequence[str]) -> list[int]:
        return [len(self.chat.text_tokens(text)) for text in texts]

    def answer(self, requests: Iterable[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """Answer batch by batch; what differs in decoding is handed to the engine together."""
        source = iter(requests)
        while batch := list(islice(source, self.batch_size)):
            held = [item for item in batch if item[1].decoding == "constrained"]
            yield from self._once([item for item in batch if item[1].decoding != "constrained"])
            yield from self._one_by_one(held)

    def _generate(self, prompts: Sequence[str], parameters: Sequence[Any]) -> list[Any]:
        tokens = [{"prompt_token_ids": self.chat.tokens(prompt)} for prompt in prompts]
        return list(self._model.generate(tokens, sampling_params=list(parameters), use_tqdm=False)) if tokens else []

    def _once(self, batch: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        started = time.monotonic()
        prompts = [self.chat.render(request.messages, request.before) for _, request in batch]
        spelled: list[dict[str, list[int]]] = []
        parameters = []
        for (_, request), prompt in zip(batch, prompts, strict=True):
            options: dict[str, Any] = {"max_tokens": request.max_tokens}
            spelled.append({})
            if request.decoding == "first":
                spelled[-1] = self.chat.identifier_tokens(prompt, request.identifiers)
                # At most as many as log-probabilities may be asked for: the usual spellings come first.
                allowed = sorted({token for tokens in spelled[-1].values() for token in tokens[:2]})[:MOST_TOKENS]
                options = {"max_tokens": 1, "allowed_token_ids": allowed, "logprobs": len(allowed)}
            seed = request.seed if request.temperature > 0 else None
            parameters.append(self._sampling.SamplingParams(temperature=request.temperature, seed=seed, **options))
        outputs = self._generate(prompts, parameters)
        seconds = (time.monotonic() - started) / max(len(batch), 1)
        for (number, request), output, tokens in zip(batch, outputs, spelled, strict=True):
            said = output.outputs[0]
            usage = _usage(output)
            if request.decoding == "generate":
                yield number, Answer(said.text, None, usage, seconds, said.finish_reason != "length")
                continue
            found = {token: entry.logprob for token, entry in said.logprobs[0].items()}
            logits = {name: max((found[t] for t in ids if t in found), default=None) for name, ids in tokens.items()}
            known = {name: float(value) for name, value in logits.items() if value is not None}
            yield number, Answer(max(known, key=lambda name: known[name], default=""), known, usage, seconds)

    def _one_by_one(self, batch: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, Answer]]:
        """One identifier after the other, of those that are left; the engine keeps what prompts have in common."""
        started = time.monotonic()
        orders: list[list[str]] = [[] for _ in batch]
        usages = [Usage(calls=1) for _ in batch]
        for place in range(max((len(request.identifiers) for _, request in batch), default=0)):
            rows = [row for row, (_, request) in enumerate(batch) if len(request.identifiers) > place + 1]
            prompts, parameters = [], []
            for row in rows:
                request = batch[row][1]
                given = "".join(name + separators(request.before)[0] for name in orders[row])
                prompts.append(self.chat.render(request.messages, request.before + given))
                left = [name for name in request.identifiers if name not in orders[row]]
                parameters.append(
                    self._sampling.SamplingParams(
                        temperature=request.temperature,
                        seed=request.seed if request.temperature > 0 else None,
                        max_tokens=STEP_TOKENS,
                        structured_outputs=self._sampling.StructuredOutputsParams(choice=left),
                    )
                )
            for row, output in zip(rows, self._generate(prompts, parameters), strict=True):
                orders[row].append(output.outputs[0].text.strip())
                paid, before = _usage(output), usages[row]
                usages[row] = Usage(
                    before.prompt + paid.prompt, before.answer + paid.answer, before.cached + paid.cached
                )
        seconds = (time.monotonic() - started) / max(len(batch), 1)
        for (number, request), order, usage in zip(batch, orders, usages, strict=True):
            order += [name for name in request.identifiers if name not in order]
            separator, end = separators(request.before)
            yield number, Answer(separator.join(order) + end, None, usage, seconds)


def _usage(output: Any) -> Usage:
    cached = getattr(output, "num_cached_tokens", None) or 0
    return Usage(len(output.prompt_token_ids), len(output.outputs[0].token_ids), cached)
