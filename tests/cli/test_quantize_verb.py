"""The verb `quantize`: over a run's student, and over vectors made elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import ran, run
from safetensors.torch import load_file, save_file

from rankdistill.indexes.building import build_index
from rankdistill.indexes.specification import load_specification

SMALL = ("--set", "subspaces=4", "--set", "bits=4", "--set", "steps=5", "--set", "batch=8")


@pytest.fixture(scope="module")
def own_run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("quantize") / "run"))


def test_a_runs_student_becomes_an_index_that_search_reads(own_run: Path, tmp_path: Path) -> None:
    done = ran("quantize", own_run, "--spec", "distill_pq", *SMALL, "--json", folder=tmp_path)
    manifest = json.loads(done.out)
    assert manifest["quantizer"]["overlap"] == 4 and manifest["documents"] == 32
    file = own_run / "indexes" / "distill_pq.faiss"
    index = faiss.read_index(str(file))
    assert index.ntotal == 32
    found = ran("search", own_run, "metal that rusts", "--index", file, "--json", "-k", "3", folder=tmp_path)
    assert len(json.loads(found.out)) == 3
    again = ran("quantize", own_run, "--spec", "distill_pq", *SMALL, folder=tmp_path)
    assert "FAISS trains" not in again.err


def test_a_query_encoder_that_is_trained_along_is_used(own_run: Path, tmp_path: Path) -> None:
    options = ("--set", "query=encoder", "--set", "encoder_rate=1e-3")
    done = ran("quantize", own_run, "--spec", "distill_pq_lean", *SMALL, *options, "--json", folder=tmp_path)
    manifest = json.loads(done.out)
    file = own_run / "indexes" / "distill_pq_lean.faiss"
    encoder = file.parent / manifest["query_encoder"]
    assert (encoder / "model.safetensors").is_file() or list(encoder.rglob("*.safetensors"))
    student = json.loads((own_run / "vectors" / "student-facts" / "manifest.json").read_text())["inputs"]["encoder"]
    assert manifest["student_fingerprint"] not in ("", student)
    ran("search", own_run, "metal that rusts", "--index", file, "--json", folder=tmp_path)


def test_indexes_of_a_student_that_was_trained_again_are_refused(own_run: Path, tmp_path: Path) -> None:
    """Also one with a query encoder of its own, which still belongs to the index, as its documents do not."""
    lean = ("--spec", "distill_pq_lean", *SMALL, "--set", "query=encoder", "--set", "encoder_rate=1e-3")
    copy = Path(shutil.copytree(own_run, tmp_path / "run"))
    assert run("quantize", copy, *lean, folder=tmp_path).code == 0
    shutil.copytree(copy / "vectors" / "student-facts", tmp_path / "before")
    weights = copy / "student" / "model" / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    manifest = json.loads((copy / "student" / "manifest.json").read_text())
    (copy / "student" / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    for name in ("flat", "distill_pq_lean"):
        found = run("search", copy, "metal", "--index", copy / "indexes" / f"{name}.faiss", folder=tmp_path)
        assert found.code == 1 and "this index belongs to another student" in found.err and not found.out
        page = run("serve", copy, "--port", "0", "--index", copy / "indexes" / f"{name}.faiss", folder=tmp_path)
        assert page.code == 1 and "this index belongs to another student" in page.err
    assert run("search", copy, "metal", folder=tmp_path).code == 0  # encodes the collection again
    old, vectors = copy / "indexes" / "flat.faiss", copy / "vectors" / "student-facts" / "documents.npy"
    looked = run("doctor", "--index", old, "--vectors", vectors, folder=tmp_path)
    assert looked.code == 1 and "the index was built from other vectors" in looked.err
    assert run("doctor", "--index", old, "--vectors", tmp_path / "before" / "documents.npy", folder=tmp_path).code == 0


def test_an_index_that_names_no_student_is_searched_with_a_warning(own_run: Path, tmp_path: Path) -> None:
    vectors = np.load(own_run / "vectors" / "student-facts" / "documents.npy")
    for count, code, words in ((len(vectors), 0, "does not say which student"), (20, 1, "another collection (20 doc")):
        build_index(vectors[:count], map(str, range(count)), load_specification("flat"), tmp_path / "x.faiss")
        found = run("search", own_run, "metal", "--index", tmp_path / "x.faiss", folder=tmp_path)
        assert (found.code, words in found.err) == (code, True), found.err


def test_foreign_vectors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = random.normal(size=(300, 16)).astype(np.float32)
    np.save(tmp_path / "documents.npy", documents)
    (tmp_path / "ids.txt").write_text("".join(f"d{n}\n" for n in range(300)))
    queries = pa.table({"query_id": [f"q{n}" for n in range(60)], "vector": list(random.normal(size=(60, 16)))})
    pq.write_table(queries, tmp_path / "queries.parquet")
    file = tmp_path / "x.faiss"
    arguments = ("--documents", tmp_path / "documents.npy", "--ids", tmp_path / "ids.txt", "--out", file)
    ran("quantize", *arguments, "--queries", tmp_path / "queries.parquet", *SMALL, folder=tmp_path)
    assert faiss.read_index(str(file)).ntotal == 300
    assert pq.read_table(f"{file}.ids.parquet")["doc_id"][7].as_py() == "d7"


def test_a_learned_index_is_a_stage_of_a_recipe(own_run: Path, recipe_file: Path, tmp_path: Path) -> None:
    specification = tmp_path / "tiny_pq.yaml"
    specification.write_text("{type: distill_vq, subspaces: 4, bits: 4, steps: 5, batch: 8, overlap: 2}")
    options = ("--out", own_run, "--store", own_run.parent / "store", "--set", f"indexes=[flat, {specification}]")
    file = own_run / "indexes" / "tiny_pq.faiss"
    done = ran("run", recipe_file, *options, "--until", "quantize", folder=tmp_path)
    assert "quantize: tiny_pq" in done.err and file.is_file()
    written = file.stat().st_mtime_ns
    done = ran("run", recipe_file, *options, "--json", folder=tmp_path)
    rows = [row["system"] for row in json.loads(done.out)["sets"][0]["rows"]]
    assert "student, tiny_pq" in rows and "student, flat" in rows
    assert file.stat().st_mtime_ns == written
    done = ran("run", recipe_file, *options, "--until", "quantize", "--force", "quantize", folder=tmp_path)
    assert file.stat().st_mtime_ns != written


def test_a_learned_query_map_cannot_train_a_shard(own_run: Path) -> None:
    from rankdistill.errors import RankdistillError
    from rankdistill.indexes.building import build_index
    from rankdistill.indexes.faiss_index import FaissIndex

    learned = FaissIndex.open(own_run / "indexes" / "distill_pq.faiss")
    vectors = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    with pytest.raises(RankdistillError, match="cannot choose the codes"):
        build_index(vectors, map(str, range(40)), learned.specification, own_run / "shard.faiss", trained_by=learned)
