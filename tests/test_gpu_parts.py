"""Every part that computes with torch, on a stand-in for a GPU: it refuses what CUDA refuses and has the CPU's numbers.

A case is a function of the device to something that can be compared; a method without a case fails the first test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from standin_gpu import GPU, standin_gpu

from rankdistill.devices import use_device
from rankdistill.losses.base import Regulariser
from rankdistill.recipe import build, method_class, method_names
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.students.base import StudentModel, to_device
from rankdistill.teachers.base import TextList
from rankdistill.teachers.ensemble import score_list
from rankdistill.training.batch_teacher import BatchTeacher
from rankdistill.training.distiller import Distiller

if TYPE_CHECKING:
    from rankdistill.collections import Collection

QUERIES = ["which metal rusts in water", "largest animal ever", "insect that makes honey"]
DOCUMENTS = ["Iron rusts.", "Gold does not tarnish and is used for coins.", "The blue whale is large.", "Honey bees"]
CPU = torch.device("cpu")
KL: dict[str, Any] = {"type": "kl"}
NONE: Mapping[str, Any] = {}


@dataclass
class Parts:
    """What cases are made of: small models on disk, and a collection."""

    encoder: str
    sparse: str
    pairs: str
    language_model: str
    collection: Collection
    lists: ScoredLists
    folder: Path

    def settings(self, student: str) -> dict[str, Any]:
        given: dict[str, dict[str, Any]] = {
            "static": {"start": "words"},
            "multi_vector": {"projection": "random"},
            "query_tower": {"document_model": self.encoder},
        }
        return {"type": student, "model": self.encoder, "precision": "fp32", **given.get(student, {})}

    def student(self, kind: str, device: torch.device) -> StudentModel:
        """With the same random start wherever it is made, and without dropout."""
        torch.manual_seed(0)
        model: StudentModel = build("student", self.settings(kind)).create(device).eval()
        model.prepare(self.collection, self.folder / f"{kind}-{device.type}")
        return model


@pytest.fixture(scope="module")
def parts(
    tiny_encoder: Path, tiny_causal_lm: Path, tiny_collection: Collection, tmp_path_factory: pytest.TempPathFactory
) -> Parts:
    from sentence_transformers import CrossEncoder

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    CrossEncoder(str(tiny_encoder), num_labels=1, device="cpu").save_pretrained(str(folder / "pairs"))
    build("student", {"type": "splade", "model": str(tiny_encoder)}).create("cpu").save(folder / "sparse")
    names = tiny_collection.doc_ids(range(4))
    scores = np.array([3.0, 1.0, 0.5, -1.0], np.float32)
    lists = ((query_id, names, scores) for query_id in tiny_collection.query_ids("train")[:3])
    build_lists(lists, None, tiny_collection, "train", folder / "lists")
    read = ScoredLists.open(folder / "lists", tiny_collection)
    return Parts(
        *map(str, (tiny_encoder, folder / "sparse", folder / "pairs", tiny_causal_lm)), tiny_collection, read, folder
    )


@pytest.fixture(autouse=True)
def _rule() -> Iterator[None]:
    yield
    use_device(None, command=True)


def learn(parts: Parts, device: torch.device, loss: dict[str, Any], others: Mapping[str, Any] = NONE) -> list[Any]:
    """Two steps of a training with a loss or a weighting, then a third by one that goes on from its state on disk."""
    kind = others.get("student", "splade" if loss["type"] in PENALTIES else "dense")
    asks = build("loss", loss).needs_batch_teacher
    made: list[Any] = []

    def distiller() -> Distiller:
        one = build("loss", loss)
        teacher = None
        if asks:
            teacher = BatchTeacher(parts.student(others.get("batch_teacher", kind), device), parts.collection, "live")
        if isinstance(one, Regulariser) and one.needs_idf:
            one.use_idf(torch.linspace(0.1, 3.0, parts.student(kind, CPU).dimension))
        if hasattr(one, "fit"):
            one.fit(32, 32)
        weighting = build("weighting", others["weighting"]) if "weighting" in others else None
        return Distiller(parts.student(kind, device), {"it": one}, weighting, teacher).to(device).train()

    def step(model: Distiller, number: int) -> None:
        model.student.eval()
        model.at_step(number, 4)
        rows = np.arange(4)
        index = np.array([[0, 1, 2], [2, 1, 0], [3, 0, 0]])
        if model.student.reads_pairs:
            pairs = np.stack([np.repeat(np.arange(3), 3), index.ravel()], axis=1)
            documents, index = model.student.preprocess_pairs(QUERIES, DOCUMENTS, pairs), np.arange(9).reshape(3, 3)
        else:
            documents = model.student.preprocess(DOCUMENTS, "document")
        batch: dict[str, Any] = {
            "queries": to_device(model.student.preprocess(QUERIES, "query"), device),
            "documents": [to_device(documents, device)],
        }
        batch |= to_device(
            {
                "rows": torch.from_numpy(rows),
                "index": torch.from_numpy(index),
                "teacher_scores": torch.tensor([[2.0, 1.0, 0.1], [3.0, 0.0, 1.0], [1.0, 0.5, 0.0]]),
                "relevance": torch.tensor([[1, 0, -1], [1, -1, 0], [1, 0, -1]], dtype=torch.int32),
                "mask": torch.tensor([[True, True, True], [True, True, True], [True, True, False]]),
                "disagreement": torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.0, 1.0], [0.2, 0.1, 0.0]]),
            },
            device,
        )
        teacher = model._batch_teacher[0]
        if teacher is not None:
            batch["teacher_features"] = teacher.features(parts.lists.query_ids, QUERIES, rows)
        total = model(**batch)["loss"]
        if total.requires_grad:
            total.backward()
            torch.optim.SGD(model.parameters(), lr=1e-2).step()
            model.zero_grad()
        made.append(total.detach().cpu().numpy())

    model = distiller()
    for number in range(2):
        step(model, number)
    made.extend(value.cpu().numpy() for _, value in sorted(model.losses.named_buffers()))
    again = distiller()
    again.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    step(again, 2)
    return made


def encode_and_learn(parts: Parts, device: torch.device, kind: str) -> list[Any]:
    model = parts.student(kind, device)
    assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {device} == {model.device}
    learnt, rows = learn(parts, device, KL, {"student": kind}), np.arange(4)
    if model.reads_pairs:
        return [*learnt, model.similarities(QUERIES, DOCUMENTS)]
    return [
        *learnt,
        *(_plain(model.encode_queries(QUERIES)), _plain(model.encode_documents(DOCUMENTS))),
        _plain(model.pool_similarities(QUERIES, parts.collection.document_texts(rows), rows)),
    ]


def teach(parts: Parts, device: torch.device, settings: dict[str, Any]) -> list[Any]:
    use_device(str(device), command=True)
    names = [str(number) for number in range(len(DOCUMENTS))]
    text = re.sub(r"parts\.(\w+)", lambda place: str(getattr(parts, place[1])), json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKDISTILL_CACHE", str(parts.folder / f"cache-{device.type}"))  # answers are asked for anew
        teacher = build("teacher", json.loads(text))
        return [score_list(teacher, TextList(str(n), query, names, DOCUMENTS)) for n, query in enumerate(QUERIES)]


def teach_a_batch(parts: Parts, device: torch.device, kind: str, vectors: Any) -> list[Any]:
    teacher = BatchTeacher(parts.student(kind, device), parts.collection, vectors)
    teacher.prepare(parts.lists, parts.folder / f"batch-{kind}-{device.type}")
    ids = parts.lists.query_ids
    features = teacher.features(ids, parts.collection.query_texts(ids), np.arange(4))
    queries, documents = teacher.embed({name: _moved(value, device) for name, value in features.items()})
    return [teacher.score_all(queries, documents).cpu().numpy()]


def search_tokens(parts: Parts, device: torch.device) -> list[Any]:
    from rankdistill.indexes.multi_vector import MultiVectorEngine, encode_document_tokens

    model = parts.student("multi_vector", device)
    model.fingerprint = f"{model.fingerprint} {device}"
    vectors = encode_document_tokens(model, parts.collection, parts.folder / f"tokens-{device.type}")
    engine = MultiVectorEngine.over(model, vectors)
    assert engine.index.device == device
    reranked = engine.index.scores(model.encode_queries(QUERIES)[0], np.array([3, 1]))
    return [*(hits.scores for hits in engine.search(QUERIES, 5)), reranked]


def quantise(parts: Parts, device: torch.device, changes: dict[str, Any]) -> list[Any]:
    from rankdistill.indexes.specification import any_specification
    from rankdistill.quantization.batches import Queries
    from rankdistill.quantization.quantize import quantize
    from rankdistill.quantization.training import WEIGHTS

    random = np.random.default_rng(0)
    documents, queries = (random.normal(size=(count, 16)).astype(np.float32) for count in (300, 80))
    values = {"type": "distill_vq", "name": "small", "subspaces": 4, "bits": 4, "steps": 6, "batch": 16}
    values |= {"held_out": 16, "reassign_every": 3, "documents": {"top": 20, "random": 100, "live": True}}
    specification = any_specification({**values, "queries": {"pseudo": 0, "documents": 0}, **changes})
    file = parts.folder / f"quantised-{device.type}-{'-'.join(changes)}.faiss"
    index = quantize(documents, map(str, range(300)), Queries(given=queries), specification, file, device=device)
    assert index.manifest["device"] == str(device)
    return [value.numpy() for _, value in sorted(load_file(file.with_name(f"{file.name}.quantizer") / WEIGHTS).items())]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _plain(made: Any) -> Any:
    return made.toarray() if hasattr(made, "toarray") else getattr(made, "vectors", made)


PENALTIES = [name for name in method_names("loss") if issubclass(method_class("loss", name), Regulariser)]
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"type": name} for name in method_names("loss")},
    # More settings of a loss than its own defaults: those with tensors of their own.
    **{f"{name}, steered": {"type": name, "target": 3.0, "threshold": 1.0} for name in ("flops", "df_flops")},
    "margin_mse, all pairs": {"type": "margin_mse", "pairs": "all_pairs"},
    "lambda_loss, labels": {"type": "lambda_loss", "gain": "labels"},
    "ranknet, ndcg": {"type": "ranknet", "weighting": "ndcg"},
}
FP32 = {"precision": "fp32"}  # `auto` may be bf16 on a CPU
PAIRED: dict[str, dict[str, Any]] = {
    "bi_encoder": {"model": "parts.encoder", **FP32},
    "cross_encoder": {"model": "parts.pairs", **FP32},
}
LLM: dict[str, Any] = {"backend": {"type": "transformers", "model": "parts.language_model", **FP32}}
LISTWISE = {**LLM, "type": "listwise", "window": 3, "step": 1, "max_tokens": 8}
TEACHERS: dict[str, dict[str, Any]] = {
    **PAIRED,
    "sparse_encoder": {"model": "parts.sparse", **FP32},
    "ensemble": {"members": [{"type": name, **settings} for name, settings in PAIRED.items()]},
    **{"pairwise_llm": LLM, "pointwise_llm": LLM, "listwise": LISTWISE},
}
QUANTISERS: dict[str, dict[str, Any]] = {
    **{"plain": {}, "rotation": {"rotation": "learned"}, "overlap": {"overlap": 2}, "uniform": {"codes": "uniform"}},
    "frozen": {"codes": "frozen", "lists": 4},
}
NO_TORCH = {"recorded", "run", "bm25", "openai"}

# name → the function of parts and device, and what else it is given
CASES: dict[str, tuple[Any, ...]] = {
    **{f"loss {name}": (learn, loss) for name, loss in LOSSES.items()},
    "loss in_batch_kl, multi_vector teacher": (learn, {"type": "in_batch_kl"}, {"batch_teacher": "multi_vector"}),
    **{f"weighting {name}": (learn, KL, {"weighting": {"type": name}}) for name in method_names("weighting")},
    **{f"student {name}": (encode_and_learn, name) for name in method_names("student")},
    **{f"teacher {name}": (teach, {"type": name, **settings}) for name, settings in TEACHERS.items()},
    **{
        f"backend transformers, {decoding}": (teach, {**LISTWISE, "decoding": decoding, "max_tokens": None, **more})
        for decoding, more in {"constrained": {}, "first": {"signal": "logits"}}.items()
    },
    **{
        f"batch teacher {kind}, {vectors}": (teach_a_batch, kind, vectors)
        for kind in ("dense", "multi_vector", "splade")
        for vectors in ("live", "precomputed")
    },
    "search multi_vector": (search_tokens,),
    **{f"quantiser {name}": (quantise, changes) for name, changes in QUANTISERS.items()},
}
counted: dict[str, int] = {}


def test_every_method_has_a_case_or_computes_nothing() -> None:
    for kind in ("loss", "weighting", "student", "teacher", "backend"):
        cases = {case.split(",")[0].removeprefix(f"{kind} ") for case in CASES if case.startswith(f"{kind} ")}
        assert set(method_names(kind)) - NO_TORCH == cases, kind
    for kind, name in [("teacher", name) for name in NO_TORCH - {"openai"}]:
        assert not hasattr(method_class(kind, name), "device"), "it has a device, so it computes on one"


@pytest.mark.parametrize("case", CASES)
def test_it_follows_the_device(case: str, parts: Parts) -> None:
    compute, *settings = CASES[case]
    expected = compute(parts, CPU, *settings)
    with standin_gpu() as seen:
        found = compute(parts, GPU, *settings)
    counted[case] = seen[0]
    assert seen[0] > 10 and len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        rounding = {"rtol": 0, "atol": 1e-5} if case.startswith("quantiser") else {"rtol": 2e-4, "atol": 2e-5}
        np.testing.assert_allclose(one, other, **rounding)


def test_how_many_tensors_were_seen() -> None:
    """Of the cases that ran before this test."""
    print(f"{sum(counted.values()):,} tensors on the stand-in in {len(counted)} cases")
    assert sum(counted.values()) > 50 * len(counted)
