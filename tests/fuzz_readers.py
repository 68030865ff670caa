"""Readers of data: good small files of every form, a few bytes of which are changed, cut, doubled or moved."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz import target

from rankdistill.artifacts import open_artifact
from rankdistill.collections import Collection, open_collection
from rankdistill.collections.text_files import read_lines
from rankdistill.evaluation.compare import read_judgments
from rankdistill.indexes.foreign_vectors import open_foreign_vectors
from rankdistill.runs import iter_run, read_run
from rankdistill.scores.foreign_scores import iter_foreign

ODD = [b"\t", b"\n", b"\r", b" ", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"[" * 2000, b"1" * 5000, b"nan"]
ODD += [b"-1e400", b"0.5", b"null", b"{", b"}", b'"', b"\\ud83d", b"\x1f\x8b", b"PAR1", b"score", b"9" * 400, b"1_0"]
TEXT = {
    "corpus.jsonl": '{"_id": "d1", "title": "Iron", "text": "rusts"}\n{"_id": 2, "text": "copper"}\n',
    "queries.jsonl": '{"_id": "q1", "text": "what rusts"}\n{"_id": "q2", "text": "what is green"}\n',
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\t2\t2\n",
    "collection.tsv": "d1\tiron\n2\tcopper\n",
    "queries.train.tsv": "q1\twhat rusts\n",
    "qrels.train.tsv": "q1 0 d1 1\n",
}
SCORES = {
    "s.tsv": "query_id\tdoc_id\tscore\nq1\td1\t1.5\nq1\td2\t-2\n",
    "t.tsv": "3.5\t-1\tq1\td1\td2\n",
    "s.jsonl": '{"query_id": "q1", "pos_ids": ["d1", 2], "pos_scores": [1, 0.5], "neg_ids": [], "neg_scores": []}\n',
    "t.jsonl": '{"query": "what", "pos": ["iron"], "pos_scores": [1], "neg": ["x"], "neg_scores": [0]}\n',
    "r.trec": "q1 Q0 d1 1 2.5 x\nq1 Q0 d2 2 1.5 x\nq2 Q0 d1 1 1 x\n",
}


def broken(random: random.Random, good: bytes) -> bytes:
    """One to four changes, before or after compression."""
    zipped = random.random() < 0.2
    data = bytearray(gzip.compress(good) if zipped and random.random() < 0.5 else good)
    for _ in range(random.randint(1, 4)):
        at, end = sorted(random.choices(range(len(data) + 1), k=2))
        kind = random.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = random.choice(ODD)
        elif kind == 3:
            data[at:end] = random.choice(ODD)
        elif kind == 4:
            data[at:at] = data[at:end]
        else:
            del data[end:]
    return gzip.compress(bytes(data)) if zipped and data[:2] != b"\x1f\x8b" else bytes(data)


def parquet(folder: Path, **columns: object) -> bytes:
    pq.write_table(pa.table(columns), folder / "made.parquet")
    return (folder / "made.parquet").read_bytes()


def tables(folder: Path) -> dict[str, bytes]:
    score = pa.array([1.0, 2.0], pa.float32())
    return {
        "scores": parquet(folder, query_id=["q1", "q1"], doc_id=["d1", "d2"], score=score),
        "judgments": parquet(folder, query_id=["q1", "q1"], doc_id=["d1", "d2"], relevance=[1, 0]),
        "corpus": parquet(folder, _id=["d1", "d2"], text=["iron", "copper"]),
        "queries": parquet(folder, _id=["q1"], text=["what"]),
        "qrels": parquet(folder, **{"query-id": ["q1"], "corpus-id": ["d1"], "score": [1]}),
        "vectors": parquet(folder, doc_id=["d1", "d2"], vector=[[1.0, 0.5], [0.5, 1.0]]),
    }


def folder_of(random: random.Random, folder: Path, names: list[str]) -> None:
    wrong = random.choice(names)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        good = TEXT[name].encode()
        (folder / name).write_bytes(broken(random, good) if name == wrong else good)


@target
def beir(random: random.Random, folder: Path) -> None:
    folder_of(random, folder, ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
    open_collection(f"beir:{folder}").describe()


@target
def msmarco(random: random.Random, folder: Path) -> None:
    folder_of(random, folder, ["collection.tsv", "queries.train.tsv", "qrels.train.tsv"])
    open_collection(f"msmarco:{folder}").describe()


@target
def parquet_collection(random: random.Random, folder: Path) -> None:
    made, wrong = tables(folder), random.choice(["corpus", "queries", "qrels"])
    (folder / "made.parquet").unlink()
    (folder / "qrels").mkdir()
    for name in ("corpus", "queries", "qrels"):
        path = folder / ("qrels/test.parquet" if name == "qrels" else f"{name}.parquet")
        path.write_bytes(broken(random, made[name]) if name == wrong else made[name])
    open_collection(f"hf:{folder}").describe()


@target
def scores_and_runs(random: random.Random, folder: Path) -> None:
    good = {**{name: text.encode() for name, text in SCORES.items()}, **tables(folder)}
    name = random.choice([*SCORES, "scores", "judgments"])
    file = folder / "given"
    file.write_bytes(broken(random, good[name]))
    readers: list[Callable[[], object]] = [
        lambda: list(iter_foreign(file)),
        lambda: read_run(file),
        lambda: list(iter_run(file)),
        lambda: read_judgments(file),
        lambda: list(read_lines(file)),
    ]
    random.choice(readers)()


@target
def vectors(random: random.Random, folder: Path) -> None:
    if random.random() < 0.4:
        (folder / "v.parquet").write_bytes(broken(random, tables(folder)["vectors"]))
        open_foreign_vectors(folder / "v.parquet", folder / "copy")
        return
    np.save(folder / "v.npy", np.eye(3, dtype=random.choice([np.float16, np.float32])))
    ids = b"d1\nd2\nd3\n"
    if random.random() < 0.5:
        (folder / "v.npy").write_bytes(broken(random, (folder / "v.npy").read_bytes()))
    else:
        ids = broken(random, ids)
    (folder / "ids.txt").write_bytes(ids)
    list(open_foreign_vectors(folder / "v.npy", folder / "copy", ids=folder / "ids.txt").ids)


@target
def cached_collection(random: random.Random, folder: Path) -> None:
    """Files of the cache, damaged: what is read is text or an error that names the folder, never another exception."""
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TEXT[name])
    kept = open_collection(f"beir:{folder}").path
    copy = folder / "copy"
    (copy / "qrels").mkdir(parents=True)
    files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    wrong = random.choice(files)
    for path in files:
        data = (kept / path).read_bytes()
        (copy / path).write_bytes(broken(random, data) if path == wrong else data)
    collection = Collection(open_artifact(copy, "collection"), "copy", "copy")
    collection.document_texts(range(len(collection)))
    collection.doc_rows(["d1", "2", "none"])
    list(collection.iter_queries("test"))
    json.dumps(collection.describe())
