"""The start of a new head: how many terms it gives, what it learns of masked tokens, and that it is made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from test_out_of_memory import memory_of

from rankdistill.artifacts import open_artifact
from rankdistill.errors import UsageError
from rankdistill.recipe import build
from rankdistill.students.masked_language import head_parameters, load_masked_language, mask_tokens
from rankdistill.students.sparse import SparseModel

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def student(start: Path, **warm_up: Any) -> SparseModel:
    settings = {"type": "splade", "model": str(start), "precision": "fp32", "warm_up": warm_up}
    model: SparseModel = build("student", settings).create("cpu")
    return model


def test_biases_give_a_document_the_wanted_terms(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    texts = tiny_collection.document_texts(range(tiny_collection.document_count))
    dense = student(tiny_encoder)
    assert dense.encode_documents(texts).getnnz(axis=1).mean() > 0.4 * dense.dimension
    model = student(tiny_encoder, terms=10)
    model.prepare(tiny_collection, tmp_path)
    vectors = model.encode_documents(texts)
    assert vectors.getnnz(axis=1).mean() == pytest.approx(10, abs=0.1)
    # No term is everywhere any more, and those that are no words are nowhere.
    assert vectors.getnnz(axis=0).max() < len(texts)
    assert vectors[:, sorted(model.model.tokenizer.all_special_ids)].nnz == 0
    assert open_artifact(next(tmp_path.glob("warm-up-*"))).counts["terms"] == pytest.approx(10, abs=0.1)


def test_masked_tokens_are_learnt_and_the_encoder_is_not_touched(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    losses = []
    for steps in (1, 80):
        model = student(tiny_encoder, steps=steps, batch=16, learning_rate=1e-2, terms=0)
        transformer: Any = model.model[0]
        encoder = {name: one.clone() for name, one in transformer.model.bert.state_dict().items()}
        model.prepare(tiny_collection, tmp_path / str(steps))
        losses.append(open_artifact(next((tmp_path / str(steps)).glob("warm-up-*"))).counts["loss"])
        assert all(torch.equal(one, encoder[name]) for name, one in transformer.model.bert.state_dict().items())
        assert all(one.requires_grad for one in transformer.model.parameters())
    assert losses[1] < losses[0] - 0.4
    whole = student(tiny_encoder, steps=2, encoder=True, terms=0)
    before = whole.model[0].model.get_input_embeddings().weight.clone()  # type: ignore[union-attr]
    whole.prepare(tiny_collection, tmp_path / "whole")
    assert not torch.equal(whole.model[0].model.get_input_embeddings().weight, before)  # type: ignore[union-attr]


def test_it_is_made_once_and_leaves_the_random_numbers_alone(
    tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path
) -> None:
    def made() -> tuple[SparseModel, torch.Tensor]:
        torch.manual_seed(3)
        model = student(tiny_encoder, steps=3, batch=4, terms=20)
        model.prepare(tiny_collection, tmp_path)
        return model, torch.rand(3)

    first, luck = made()
    (file,) = tmp_path.rglob("*.safetensors")
    written = file.stat().st_mtime_ns
    second, same_luck = made()
    assert [(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors")] == [(file, written)]
    assert torch.equal(luck, same_luck)
    assert first.fingerprint == second.fingerprint != student(tiny_encoder, steps=3, batch=4, terms=20).fingerprint
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    third = student(tiny_encoder, steps=4, batch=4, terms=20)
    third.prepare(tiny_collection, tmp_path)
    assert third.fingerprint != first.fingerprint
    assert third.document_fingerprint != first.document_fingerprint


def test_masking_is_eighty_ten_ten() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(10, 1000, (200, 100))
    tokens[:, 0] = 2  # special
    attention = torch.ones_like(tokens)
    attention[:, 90:] = 0
    chosen, shown, labels = mask_tokens(tokens, attention, torch.tensor([2, 3]), 3, 0.15)
    assert not chosen[:, 0].any() and not chosen[:, 90:].any()
    assert torch.equal(labels, tokens[chosen])
    assert torch.equal(shown[~chosen], tokens[~chosen])
    count = len(labels)
    assert count / (200 * 89) == pytest.approx(0.15, abs=0.01)
    masked, kept = (shown[chosen] == 3).sum() / count, (shown[chosen] == labels).sum() / count
    assert (float(masked), float(kept)) == pytest.approx((0.8, 0.1), abs=0.03)
    nothing = mask_tokens(tokens[:, :1], attention[:, :1], torch.tensor([2]), 3, 0.5)
    assert not nothing[0].any() and len(nothing[2]) == 0


def test_a_head_that_was_made_starts_from_the_identity(tiny_encoder: Path) -> None:
    with pytest.raises(UsageError, match="warm_up"):
        student(tiny_encoder, stesp=3)
    transformer, had = load_masked_language(tiny_encoder, "tiny")
    assert not had
    head = head_parameters(transformer.model)
    assert not any("word_embeddings" in name for name in head)
    square = next(one for one in head.values() if one.ndim == 2)
    np.testing.assert_array_equal(square.detach().numpy(), np.eye(len(square)))


@pytest.mark.parametrize("encoder", [False, True])
def test_a_batch_that_memory_does_not_hold_is_learnt_in_smaller_parts(
    encoder: bool, tiny_encoder: Path, tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for tokens in (10**9, 100):
        settings = {"type": "splade", "model": str(tiny_encoder), "precision": "fp32", "dropout": 0.0}
        warm_up = {"steps": 3, "batch": 16, "encoder": encoder, "terms": 0, "learning_rate": 1e-2}
        model: SparseModel = build("student", {**settings, "warm_up": warm_up}).create("cpu")
        with memory_of(tokens) as tried:
            model.prepare(tiny_collection, tmp_path / str(tokens))
        losses.append(open_artifact(next((tmp_path / str(tokens)).glob("warm-up-*"))).counts["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3) and max(tried) > 100 >= max(tried[-3:])
    assert capsys.readouterr().err.count("does not hold a batch") == 1
