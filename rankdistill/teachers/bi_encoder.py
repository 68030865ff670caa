"""A bi-encoder as teacher: cheap scores on every pair, and a member of ensembles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rankdistill.artifacts import fingerprint
from rankdistill.students.models import resolve_model
from rankdistill.students.token_batches import Precision, autocast, resolve_precision
from rankdistill.teachers.base import PairTeacher

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


class BiEncoderTeacher(PairTeacher):
    """Any sentence-transformers model; the score of a pair is a product of its two vectors.

    Args:
        model: a folder, a packaged encoder or a hub name.
        similarity: dot, cos, or auto: what the model's own configuration says (cos when it says nothing).
        scale: the similarity is multiplied by this (a cosine of spread 0.2 is a faint signal for a margin loss).
        max_length: tokens a text; the model's own limit by default.
        precision: auto, fp32, bf16 or fp16.
        batch_size: texts a batch.
        device: cpu, cuda ...; a GPU if there is one by default.
    """

    type = "bi_encoder"
    score_kind = "similarity"

    def __init__(
        self,
        model: str,
        similarity: Literal["auto", "dot", "cos"] = "auto",
        scale: float = 1.0,
        max_length: int | None = None,
        precision: Precision = "auto",
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        self.model_name, self.similarity, self.scale = model, similarity, scale
        self.max_length, self.batch_size = max_length, batch_size
        self.precision: Precision = precision
        self._device_name = device
        self._model: SentenceTransformer | None = None

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self._device_name or ("cuda" if torch.cuda.is_available() else "cpu"))

    def fingerprint(self) -> str:
        settings = self.describe()
        del settings["model"]
        return fingerprint({**settings, "revision": resolve_model(self.model_name).revision})

    def describe(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "model": self.model_name,
            "similarity": self.similarity,
            "scale": self.scale,
            "max_length": self.max_length,
            "precision": resolve_precision(self.device, self.precision),
        }

    def load(self) -> SentenceTransformer:
        """The model, loaded once."""
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            from rankdistill.teachers.cross_encoder import quiet_transformers

            with quiet_transformers():
                model = SentenceTransformer(
                    str(resolve_model(self.model_name).path),
                    device=str(self.device),
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},  # never a pickle
                )
            if self.max_length is not None:
                model.max_seq_length = self.max_length
            self._model = model.eval()
        return self._model

    def score_pairs(self, queries: Sequence[str], documents: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """float32 [N] similarities of pairs [N, 2]; each text is encoded once."""
        model = self.load()
        cosine = self.similarity == "cos" or (
            self.similarity == "auto" and model.similarity_fn_name in (None, "cosine")
        )
        with autocast(self.device, self.precision):
            options: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": False}
            query_vectors = np.asarray(model.encode_query(list(queries), **options), dtype=np.float32)
            document_vectors = np.asarray(model.encode_document(list(documents), **options), dtype=np.float32)
        if cosine:
            for vectors in (query_vectors, document_vectors):
                vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores = np.empty(len(pairs), dtype=np.float32)
        for start in range(0, len(pairs), 8192):
            part = pairs[start : start + 8192]
            scores[start : start + 8192] = np.einsum(
                "nd,nd->n", query_vectors[part[:, 0]], document_vectors[part[:, 1]]
            )
        return scores * np.float32(self.scale)
