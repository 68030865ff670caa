"""What tests of several students start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny encoder with weights large enough that its vectors differ."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.manual_seed(3)
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embeddings" in name else 0.3)
    folder = tmp_path_factory.mktemp("encoder") / "model"
    model.save_pretrained(str(folder), create_model_card=False)
    return folder
