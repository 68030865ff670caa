"""Where the memory gives out, work goes on in smaller parts and comes to the same numbers; models really raise here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rankdistill.errors import RankdistillError
from rankdistill.recipe import build
from rankdistill.students.base import StudentModel
from rankdistill.students.token_batches import out_of_memory

if TYPE_CHECKING:
    from rankdistill.collections import Collection

MESSAGES = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried 9 bytes"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@contextmanager
def memory_of(tokens: int, error: Exception = MESSAGES[0]) -> Iterator[list[int]]:
    """Every embedding of more tokens than these at once fails; gives the sizes that were tried."""
    tried: list[int] = []

    def check(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            tried.append(given[0].numel())
            if tried[-1] > tokens:
                raise error

    handle = register_module_forward_pre_hook(check)
    try:
        yield tried
    finally:
        handle.remove()


@pytest.mark.parametrize("error", MESSAGES)
def test_want_of_memory_is_known_on_every_device(error: RuntimeError) -> None:
    assert out_of_memory(error) and not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("kind", ["dense", "multi_vector", "splade"])
@pytest.mark.parametrize("error", MESSAGES[:2])
def test_texts_are_encoded_in_smaller_parts(
    kind: str, error: Exception, tiny_encoder: Path, tiny_collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    model: StudentModel = build("student", {"type": kind, "model": str(tiny_encoder), "precision": "fp32"}).create()
    texts = tiny_collection.document_texts(range(tiny_collection.document_count))
    expected = _array(model.encode_documents(texts))
    with memory_of(200, error) as tried:
        found = _array(model.encode_documents(texts))
        failed = sum(size > 200 for size in tried)
        again = _array(model.encode_documents(texts))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found, again)
    assert 1 <= failed == sum(size > 200 for size in tried), "a budget once halved stays so"
    assert model.budget.tokens <= 200 and capsys.readouterr().err.count("warning: the memory of cpu") == 1


def _array(made: Any) -> np.ndarray:
    return np.asarray(made.toarray() if hasattr(made, "toarray") else getattr(made, "vectors", made))


def test_a_text_too_long_for_the_memory_is_named_and_other_errors_pass(tiny_encoder: Path) -> None:
    model = build("student", {"type": "dense", "model": str(tiny_encoder)}).create()
    with memory_of(3), pytest.raises(RankdistillError, match=r"a text of \d+ tokens does not fit the memory"):
        model.encode_documents(["iron and copper", "gold"])
    with memory_of(3, RuntimeError("another")), pytest.raises(RuntimeError, match="another"):
        model.encode_documents(["iron and copper", "gold"])


def test_pairs_are_scored_in_smaller_parts(
    tiny_encoder: Path, tmp_path: Path, tiny_collection: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentence_transformers import CrossEncoder

    from rankdistill.teachers.cross_encoder import CrossEncoderTeacher

    CrossEncoder(str(tiny_encoder), num_labels=1, device="cpu").save_pretrained(str(tmp_path / "teacher"))
    queries, documents = ["which metal rusts", "largest animal"], tiny_collection.document_texts(range(20))
    pairs = np.array([(q, d) for q in range(2) for d in range(20)])
    teacher = CrossEncoderTeacher(str(tmp_path / "teacher"), precision="fp32")
    expected = teacher.score_pairs(queries, documents, pairs)
    with memory_of(100) as tried:
        found = teacher.score_pairs(queries, documents, pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (
        max(tried) > 100
        and teacher.load().budget.tokens < 960
        and capsys.readouterr().err.count("warning: the memory") == 1
    )


def test_prompts_are_answered_fewer_at_once(tiny_causal_lm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rankdistill.teachers.llm.base import Request
    from rankdistill.teachers.llm.local import TransformersBackend

    def ask(backend: TransformersBackend) -> list[Any]:
        words = ["iron", "gold and copper", "helium", "oak", "bee"]
        messages = [({"role": "user", "content": f"Rank [A] {word} [B] {word}s."},) for word in words]
        requests = [Request(messages=one, identifiers=("A", "B"), decoding="first", before="[") for one in messages]
        return [answer.logits for _, answer in sorted(backend.answer(enumerate(requests)))]

    plain = TransformersBackend(str(tiny_causal_lm), precision="fp32", batch_size=5, share_prefix=False)
    expected = ask(plain)
    sizes: list[int] = []

    def check(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.Embedding):
            sizes.append(len(given[0]))
            if len(given[0]) > 2:
                raise MESSAGES[0]

    handle = register_module_forward_pre_hook(check)
    try:
        found = ask(plain)
    finally:
        handle.remove()
    assert sizes == [5, 2, 2, 1] and capsys.readouterr().err.count("does not hold 5 prompts at once") == 1
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
