"""The one rule of where torch computes, and that everything follows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankdistill.devices import resolve_device, unplaced, use_device
from rankdistill.errors import UsageError
from rankdistill.recipe import build, load_recipe
from rankdistill.stages import Workspace


@pytest.fixture(autouse=True)
def _rule() -> Iterator[None]:
    yield
    use_device(None)
    use_device(None, command=True)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps", "meta", "gpu", "cpu:1", "tpu"])
def test_a_device_that_is_not_there_is_refused_with_what_is(name: str) -> None:
    if name in ("cuda", "cuda:0") and torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(UsageError) as error:
        resolve_device(name)
    assert name in error.value.what and str(error.value.fix).endswith("cpu")


def test_the_command_decides_then_the_class_then_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device() == torch.device("cuda")
    use_device("cuda:1")
    assert (resolve_device(), resolve_device("cuda:2")) == (torch.device("cuda:1"), torch.device("cuda:2"))
    use_device("cuda:3", command=True)
    assert (resolve_device(), resolve_device("cuda:2")) == (torch.device("cuda:3"), torch.device("cuda:3"))
    assert resolve_device(torch.device("cuda:2")) == torch.device("cuda:2"), "one resolved before stays"


def test_a_recipe_s_device_is_followed_and_decides_nothing(tmp_path: Path, tiny_encoder: Path) -> None:
    values: dict[str, Any] = {
        "collection": "python-docs",
        "student": {"type": "dense", "model": str(tiny_encoder)},
        "teacher": {"type": "bi_encoder", "model": str(tiny_encoder)},
    }
    plain, placed = load_recipe(values), load_recipe({**values, "device": "cpu"})
    own = load_recipe({**values, "training": {"device": "cpu"}})
    assert (plain.student_device, placed.student_device, own.student_device) == (None, "cpu", "cpu")
    from rankdistill.training.trainer import training_fingerprint_values

    assert training_fingerprint_values(plain, {}) == training_fingerprint_values(placed, {})
    assert training_fingerprint_values(plain, {}) == training_fingerprint_values(own, {})
    nested = {"type": "x", "device": "cuda:1", "members": [{"device": "cpu", "scale": 2}]}
    assert unplaced(nested) == {"type": "x", "device": None, "members": [{"device": None, "scale": 2}]}
    with pytest.raises(UsageError, match="'cuda:9'"):
        Workspace(tmp_path, load_recipe({**values, "device": "cuda:9"}))


def test_a_student_s_scale_lies_where_its_encoder_does(tiny_encoder: Path) -> None:
    model = build("student", {"type": "dense", "model": str(tiny_encoder)}).create(torch.device("meta"))
    assert {one.device.type for one in model.parameters()} == {"meta"} and model.device.type == "meta"


STUDENTS: dict[str, dict[str, Any]] = {
    "dense": {"learn_scale": True},
    "static": {"start": "words"},
    "multi_vector": {"projection": "random"},
    "splade": {},
    "inference_free": {},
    "query_tower": {"document_model": ""},
    "cross_encoder": {},
}


def test_every_kind_of_student_is_tried_below() -> None:
    from rankdistill.recipe import method_names

    assert set(STUDENTS) == set(method_names("student"))


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_tensor_of_a_student_follows_its_device(kind: str, tiny_encoder: Path) -> None:
    """On a stand-in that refuses what CUDA does: made there, it encodes and learns, and gives the CPU's numbers."""
    from standin_gpu import GPU, standin_gpu

    from rankdistill.students.base import to_device
    from rankdistill.training.distiller import Distiller

    settings = {"type": kind, "model": str(tiny_encoder), "precision": "fp32", **STUDENTS[kind]}
    settings |= {"document_model": str(tiny_encoder)} if kind == "query_tower" else {}
    texts = ["iron rusts in water", "gold", "the blue whale is large"]

    def losses(model: Any, device: torch.device) -> float:
        model.start = None
        if model.reads_pairs:
            documents = model.preprocess_pairs(texts, texts, np.array([[0, 1], [1, 2], [2, 2]]))
        else:
            documents = model.preprocess(texts, "document")
        parts = [to_device(features, device) for features in (model.preprocess(texts, "query"), documents)]
        loss = build("loss", {"type": "infonce"})
        distiller = Distiller(model, {"kl": build("loss", {"type": "kl"}), "infonce": loss}).to(device)
        batch = {
            "rows": torch.arange(3),
            "index": torch.tensor([[0, 1], [1, 2], [2, 0]]),
            "teacher_scores": torch.tensor([[2.0, 1.0], [3.0, 0.0], [1.0, 0.5]]),
            "relevance": torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.int32),
            "mask": torch.ones(3, 2, dtype=torch.bool),
        }
        made = distiller(queries=parts[0], documents=[parts[1]], **to_device(batch, device))["loss"]
        if made.requires_grad:
            made.backward()
        return float(made.detach())

    torch.manual_seed(0)
    expected = losses(build("student", settings).create("cpu").eval(), torch.device("cpu"))
    with standin_gpu() as seen:
        torch.manual_seed(0)
        model = build("student", settings).create(GPU).eval()
        tensors = [*model.parameters(), *model.buffers()]
        assert tensors and {one.device for one in tensors} == {GPU} and model.device == GPU
        assert losses(model, GPU) == pytest.approx(expected, rel=1e-4)
        print(f"{kind}: {len(tensors)} parameters and buffers, {seen[0]} tensors in operations")
        assert seen[0] > 20
