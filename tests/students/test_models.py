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


def test_a_folder_is_found_by_its_path(tiny_encoder: Path) -> None:
    source = resolve_model(str(tiny_encoder))
    assert source.path == tiny_encoder.resolve()
    assert source.revision == folder_revision(tiny_encoder)


def test_the_packaged_encoder_is_found_by_its_name(packaged_encoder: str) -> None:
    source = resolve_model(packaged_encoder)
    assert (source.path / "config.json").is_file() and source.name == packaged_encoder


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_a_hub(name: str) -> None:
    with pytest.raises(RankdistillError, match="no model folder"):
        resolve_model(name)


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


def test_the_revision_depends_on_content_and_not_on_place_or_card(tiny_encoder: Path, tmp_path: Path) -> None:
    here = tmp_path / "moved"
    shutil.copytree(tiny_encoder, here)
    original = folder_revision(tiny_encoder)
    (here / "README.md").write_text("another card")
    (here / ".cache").mkdir()
    assert folder_revision(here) == original
    weights = here / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(content)
    changed = folder_revision(here)
    assert changed != original
    (here / "1_Pooling" / "config.json").rename(here / "1_Pooling" / "other.json")
    assert folder_revision(here) not in (original, changed)


def test_a_folder_without_model_files_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(RankdistillError, match="no model files"):
        folder_revision(tmp_path)


def test_only_what_is_loaded_decides_the_revision(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "model")
    before = folder_revision(folder)
    for name in (
        *("checkpoint-10/trainer_state.json", "checkpoint-10/model.safetensors", "old/config.json", "runs/a.txt"),
        *(
            ".cache/huggingface/x.json",
            "onnx/config.json",
            "training_args.bin",
            "pytorch_model.bin",
            "eval.csv",
            "LICENSE",
            "all_results.json",
        ),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
        assert folder_revision(folder) == before, name
    for name in (
        *("spiece.spm", "bpe.codes", "vocab.bpe", "qwen.tiktoken", "chat_template.jinja", "new.json"),
        *("1_Pooling/model.safetensors", "additional_chat_templates/tool.jinja"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
        after = folder_revision(folder)
        assert after != before, name
        before = after


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


def test_a_folder_of_anything_else_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(RankdistillError, match="there is no model in this folder"):
        resolve_model(str(tmp_path))
