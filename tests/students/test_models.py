"""Where a model comes from, and what decides its revision."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankdistill.errors import RankdistillError
from rankdistill.students.models import folder_revision, resolve_model


def test_a_model_is_found_by_folder_or_packaged_name(tiny_encoder: Path, packaged_encoder: str) -> None:
    source = resolve_model(str(tiny_encoder))
    assert (source.path, source.revision) == (tiny_encoder.resolve(), folder_revision(tiny_encoder))
    source = resolve_model(packaged_encoder)
    assert (source.path / "config.json").is_file() and source.name == packaged_encoder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "no model folder") for name in ("./no/such/folder", "/no/such/folder", "a/b/c")),  # no hub is asked
        ("FOLDER", "there is no model in this folder"),
    ],
)
def test_what_is_no_model_is_refused_before_it_is_read(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(RankdistillError, match=words):
        resolve_model(name.replace("FOLDER", str(tmp_path)))
    (tmp_path / "package.json").rename(tmp_path / "package.md")
    with pytest.raises(RankdistillError, match="no model files"):
        folder_revision(tmp_path)


@pytest.mark.parametrize("offline", [True, False], ids=["told to be offline", "no network"])
def test_a_hub_name_without_a_network_is_said_quickly(offline: bool) -> None:
    """Without a network nothing answers at the hub's address: 192.0.2.1 is reserved for documentation."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": "https://192.0.2.1", "HF_HUB_OFFLINE": "1" if offline else "0"}
    code = (
        "import time, huggingface_hub, rankdistill.students.models as models\n"
        "start = time.monotonic()\n"
        "try: models.resolve_model('some-org/some-model')\n"
        "except models.RankdistillError as error: print(error)\n"
        "print('SECONDS', time.monotonic() - start)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    words, seconds = done.stdout.rsplit("SECONDS", 1)
    assert float(seconds) < 5, done.stdout
    assert "some-org/some-model" in words and "cannot be reached" in words and "fix:" in words
    assert time.monotonic() - started < 30


IDLE = (
    *(
        "checkpoint-10/trainer_state.json",
        "checkpoint-10/model.safetensors",
        "old/config.json",
        "runs/a.txt",
        "LICENSE",
    ),
    *(".cache/huggingface/x.json", "onnx/config.json", "training_args.bin", "pytorch_model.bin", "eval.csv"),
    *("README.md", "LICENSE", "all_results.json"),
)
LOADED = (
    *("spiece.spm", "bpe.codes", "vocab.bpe", "qwen.tiktoken", "chat_template.jinja", "new.json"),
    *("1_Pooling/model.safetensors", "additional_chat_templates/tool.jinja"),
)


def test_only_what_is_loaded_decides_the_revision(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    seen = {folder_revision(tiny_encoder)}
    for name in (*IDLE, *LOADED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
        assert (folder_revision(folder) in seen) == (name in IDLE), name
        seen.add(folder_revision(folder))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(content)
    assert folder_revision(folder) not in seen
    seen.add(folder_revision(folder))
    (folder / "1_Pooling" / "config.json").rename(folder / "1_Pooling" / "other.json")
    assert folder_revision(folder) not in seen


def test_a_part_outside_the_folder_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../other"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(RankdistillError, match="lies outside its folder"):
        folder_revision(folder)


def test_the_base_model_of_an_adapter_decides_its_revision(tiny_encoder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_encoder, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = resolve_model(str(adapter)).revision
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert resolve_model(str(adapter)).revision != before
    shutil.rmtree(base)
    with pytest.raises(RankdistillError, match="the adapter's base model: there is no model folder here"):
        resolve_model(str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    with pytest.raises(RankdistillError, match="names itself"):
        resolve_model(str(adapter))
