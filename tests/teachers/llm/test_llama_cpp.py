"""llama.cpp's own server, on loopback, answers as the in-process engine does with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankdistill.teachers.llm.base import Request
from rankdistill.teachers.llm.local import TransformersBackend
from rankdistill.teachers.llm.openai_server import OpenAIBackend
from tests.students.test_gguf import gguf, write_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server has no wheel for this machine")


@pytest.fixture(scope="module")
def address(tiny_causal_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_causal_lm)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
    settings = xllamacpp.CommonParams()
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    settings.model.path = str(write_gguf(path, model, tokenizer, gguf.GGMLQuantizationType.F32))
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 1024, 2, 1, False
    server = xllamacpp.Server(settings)
    yield f"{server.listening_address}/v1"
    del server


def asked(backend: Any, *requests: Request) -> list[Any]:
    return [answer for _, answer in sorted(backend.answer(enumerate(requests)), key=lambda pair: pair[0])]


def question(text: str, *identifiers: str, decoding: str = "generate", **keys: Any) -> Request:
    return Request(({"role": "user", "content": text},), identifiers, decoding, **keys)


@pytest.fixture(scope="module")
def local(tiny_causal_lm: Path) -> TransformersBackend:
    return TransformersBackend(str(tiny_causal_lm), precision="fp32", device="cpu")


def server_backend(address: str, **keys: Any) -> OpenAIBackend:
    return OpenAIBackend("tiny", address, concurrency=2, prefill="last_message", constraint="llama_cpp", **keys)


TEXTS = ["which metal is relevant", "which gas", "rank bird tree planet by query"]


def test_greedy_answers_and_log_probabilities(address: str, local: TransformersBackend) -> None:
    requests = [question(text, max_tokens=6, log_probability=True) for text in TEXTS]
    for theirs, ours in zip(asked(server_backend(address), *requests), asked(local, *requests), strict=True):
        assert theirs.text == ours.text
        assert theirs.log_probability == pytest.approx(ours.log_probability, abs=0.01)
        assert theirs.usage.answer == ours.usage.answer and theirs.usage.estimated == 0


def test_the_likeliest_identifiers_are_read_alike(address: str, local: TransformersBackend) -> None:
    requests = [question(text, *"ABCD", decoding="first", before="[") for text in TEXTS]
    pairs = zip(asked(server_backend(address, logprobs=600), *requests), asked(local, *requests), strict=True)
    for theirs, ours in pairs:
        assert theirs.text == ours.text
        gaps = [[answer.logits[name] - answer.logits["A"] for name in "BCD"] for answer in (theirs, ours)]
        assert gaps[0] == pytest.approx(gaps[1], abs=0.02)  # the server keeps keys and values in 16 bits


def test_constrained_takes_the_likeliest_of_those_left_each_time(address: str, tiny_causal_lm: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(tiny_causal_lm) for kind in (AutoModelForCausalLM, AutoTokenizer))
    requests = [question(text, *"ABCD", decoding="constrained", before="[") for text in TEXTS]
    for request, answer in zip(requests, asked(server_backend(address), *requests), strict=True):
        prompt = tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
        left, said = list("ABCD"), "["
        while len(left) > 1:
            tokens = tokenizer(prompt + said, return_tensors="pt", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(tokens).logits[0, -1]
            names = {tokenizer.convert_tokens_to_ids(space + name): name for name in left for space in ("", "\u0120")}
            left.remove(names[max(names, key=lambda token: float(logits[token]))])
            said += next(name for name in "ABCD" if name not in left and name not in said) + "] > ["
        assert answer.text == f"{said[1:]}{left[0]}]"
        assert answer.usage.calls == 3  # of the last identifier there is no doubt


def test_a_prompt_that_is_too_long_is_refused_and_the_others_are_answered(address: str) -> None:
    long, short = asked(server_backend(address, retries=0), question("which gas " * 600), question("which gas"))
    assert "context" in long.refused and short.text and not short.refused


def test_the_same_seed_samples_the_same_answer(address: str) -> None:
    requests = [question("which gas", temperature=1.0, seed=seed, max_tokens=12) for seed in (1, 2, 1)]
    first, other, again = (answer.text for answer in asked(server_backend(address), *requests))
    assert first == again != other
