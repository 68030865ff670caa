"""Queries without a model: no torch is imported, and what cannot be read is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.students.token_weights import TokenWeights, sparse_fingerprints

if TYPE_CHECKING:
    from rankdistill.collections import Collection


@pytest.fixture(scope="module")
def saved(tiny_encoder: Path, tiny_collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rankdistill.students.inference_free import InferenceFreeStudent

    folder = tmp_path_factory.mktemp("inference_free")
    model = InferenceFreeStudent(str(tiny_encoder), precision="fp32").create("cpu")
    model.prepare(tiny_collection, folder / "prepared")
    model.save(folder / "model")
    return folder / "model"


def test_no_heavy_library_is_imported(saved: Path) -> None:
    code = f"""
import sys
from rankdistill.students.token_weights import TokenWeights
encoder = TokenWeights.open({str(saved)!r})
assert encoder.encode_queries(["iron and gold", "nothing"]).nnz > 1
heavy = {{"torch", "transformers", "sentence_transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_rows_are_in_order_and_a_limit_keeps_the_heaviest(saved: Path) -> None:
    encoder = TokenWeights.open(saved)
    vectors = encoder.encode_queries(["which metal rusts in water", "", "gold"])
    assert vectors.shape == (3, encoder.dimension) and vectors.dtype == np.float32
    assert vectors.has_sorted_indices and (vectors.data > 0).all()
    assert encoder.encode_queries([]).shape == (0, encoder.dimension)
    few = TokenWeights(encoder.tokenizer, encoder.weights, "", "", most_terms=2).encode_queries(
        ["which metal rusts in water"]
    )
    np.testing.assert_array_equal(np.sort(few.data), np.sort(vectors[0].data)[-2:])


def test_fingerprints_name_what_decides_each_side(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    whole, documents = sparse_fingerprints(folder)
    (folder / "README.md").write_text("a card")
    (folder / "rankdistill.json").write_text("{}")
    assert sparse_fingerprints(folder) == (whole, documents)
    opened = TokenWeights.open(folder)
    assert (opened.fingerprint, opened.document_fingerprint) == (whole, documents)
    (folder / "query_0_SparseStaticEmbedding" / "config.json").write_text('{"frozen": false}')
    changed = sparse_fingerprints(folder)
    assert changed[0] != whole and changed[1] == documents
    (folder / "document_1_SpladePooling" / "config.json").write_text("{}")
    assert sparse_fingerprints(folder)[1] != documents


def test_folders_that_hold_no_table(saved: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match="no inference-free sparse student"):
        TokenWeights.open(tiny_encoder)
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    side = folder / "query_0_SparseStaticEmbedding"
    tokenizer = json.loads((side / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["aword"] = len(tokenizer["model"]["vocab"])
    (side / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RankdistillError, match="weights and its tokenizer"):
        TokenWeights.open(folder)
    (side / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(RankdistillError, match="cannot be read"):
        TokenWeights.open(folder)
    (side / "model.safetensors").unlink()
    with pytest.raises(RankdistillError, match="no query weights"):
        TokenWeights.open(folder)
    router = folder / "router_config.json"
    router.write_text(router.read_text().replace("query_0_Sparse", "../query_0_Sparse"))
    with pytest.raises(RankdistillError, match="outside"):
        TokenWeights.open(folder)
