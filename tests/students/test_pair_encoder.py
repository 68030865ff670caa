from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from rankdistill.errors import UsageError
from rankdistill.students.pair_encoder import pair_encoder

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def pairs_of(collection: Collection) -> list[tuple[str, str]]:
    queries = collection.query_texts(collection.query_ids()[:4])
    return [(query, text) for query in queries for text in collection.document_texts(range(8))]


def cosines(folder: Path, pairs: list[tuple[str, str]], prompts: tuple[str, str] = ("", "")) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    sides = [
        model.encode([pair[side] for pair in pairs], prompt=prompts[side], normalize_embeddings=True) for side in (0, 1)
    ]
    return np.asarray((sides[0] * sides[1]).sum(axis=1))


def opened(model: Any) -> Any:
    """With gates and head as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        model[0].gates.normal_(0.5, 0.3)
        model[0].head.weight.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_before_training_it_scores_as_its_encoder(
    encoder: Path, tiny_collection: Collection, tmp_path: Path, pooling: str
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    (saved,) = folder.glob("*Pooling/config.json")
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "pooling_mode": pooling}))
    config = folder / "config_sentence_transformers.json"
    prompts = {"query": "which metal: ", "document": "a note: "}
    config.write_text(json.dumps({**json.loads(config.read_text()), "prompts": prompts}))
    pairs = pairs_of(tiny_collection)
    model = pair_encoder(folder, None, "cpu")
    expected = 20 * cosines(folder, pairs, (prompts["query"], prompts["document"]))
    assert expected.std() > 0.1
    np.testing.assert_allclose(model.predict(pairs), expected, atol=1e-3)
    # A shut gate and a head of zeros learn from the first step.
    model(dict(model.preprocess(pairs[:8])))["scores"].std().backward()
    gates, weight = dict(model.named_parameters())["0.gates"], dict(model.named_parameters())["0.head.weight"]
    assert float(cast(Any, gates.grad).abs().min()) > 0 and float(cast(Any, weight.grad).abs().max()) > 0


def test_opened_gates_let_each_side_read_the_other(encoder: Path, tiny_collection: Collection) -> None:
    """With the gates open a score is no longer a function of two vectors."""
    pairs = pairs_of(tiny_collection)
    model = opened(pair_encoder(encoder, None, "cpu"))
    scores = model.predict(pairs)
    assert np.abs(scores - 20 * cosines(encoder, pairs)).max() > 0.5
    np.testing.assert_allclose(scores[:5], [model.predict([pair])[0] for pair in pairs[:5]], atol=1e-4)  # padding


def test_an_encoder_that_cannot_be_had_that_way_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    """It pools otherwise, or its attention is not open to change: MPNet adds a bias of relative positions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoTokenizer, MPNetConfig, MPNetModel

    tokenizer = AutoTokenizer.from_pretrained(str(next(tiny_encoder.rglob("tokenizer.json")).parent))
    tokenizer.save_pretrained(tmp_path / "mpnet")
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "mpnet")
    modules = [Transformer(str(tmp_path / "mpnet"), max_seq_length=64), Pooling(32, pooling_mode="mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "st"), create_model_card=False)
    with pytest.raises(UsageError, match="not open to change") as error:
        pair_encoder(tmp_path / "st", None, "cpu")
    assert "start: head" in str(error.value)
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    (saved,) = folder.glob("*Pooling/config.json")
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "pooling_mode": "max"}))
    with pytest.raises(UsageError, match="pools"):
        pair_encoder(folder, None, "cpu")
