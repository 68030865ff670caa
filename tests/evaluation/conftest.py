"""A finished run, and a search page over real engines: BM25, an encoder exactly and in 8 bits, its like as teacher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rankdistill.collections import open_collection
from rankdistill.evaluation.page_server import PageServer
from rankdistill.evaluation.search_page import Column, Reranker, SearchPage
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.dense import DenseEngine, export_index
from rankdistill.indexes.specification import load_specification
from rankdistill.indexes.vectors import encode_documents
from rankdistill.recipe import load_recipe
from rankdistill.stages import Workspace
from rankdistill.teachers.encoders import BiEncoderTeacher
from rankdistill.teachers.ensemble import score_list

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# What a page must show as text: markup in a title and in a text, other scripts, an empty document.
HOSTILE = {
    "_id": "d-<hostile>",
    "title": '<img src="x" onerror="window.hacked = 1">',
    "text": "<script>window.hacked = 1</script> zirconium & <b>bold</b> \"quotes\" 'and' </style>",
}
FURTHER = [
    HOSTILE,
    {"_id": "d-кит", "title": "Кит 🐋", "text": "Кит — 鯨 — حوت."},
    {"_id": "d-empty", "title": "", "text": ""},
]


SCRIPT = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
ZINC = f"Zinc {SCRIPT} keeps iron from rusting. </script> & <b>bold</b> zinc"
METALS = [
    ("zinc", ZINC, f"zinc keeps iron from rust {SCRIPT}"),
    ("tin", "Tin is a soft metal; old cans are made of it.", "soft metal of cans"),
    ("lead", "Lead is a heavy metal that keeps out rays.", "heavy metal against rays"),
    ("neon", "Neon is a gas that glows red in tubes.", "gas that glows red"),
]


def add_metals(folder: Path) -> None:
    with open(folder / "corpus.jsonl", "a") as corpus, open(folder / "queries.jsonl", "a") as queries:
        for name, text, question in METALS:
            corpus.write(json.dumps({"_id": f"d-{name}", "title": f"<i>{name}</i>", "text": text}) + "\n")
            corpus.write(json.dumps({"_id": f"x-{name}", "title": "", "text": f"A note about {name}."}) + "\n")
            queries.write(json.dumps({"_id": f"q-{name}", "text": question}) + "\n")
    with open(folder / "qrels" / "test.tsv", "a") as stream:
        stream.write("q-zinc\td-zinc\t1\nq-zinc\tx-zinc\t0\nq-lead\td-lead\t2\nq-tin\td-tin\t1\nq-neon\td-neon\t1\n")


@pytest.fixture(scope="session")
def run(tiny_beir: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over facts of which some hold markup; the hostile one is a test query."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_beir, folder / "facts")
    add_metals(folder / "facts")
    recipe = load_recipe(
        {
            "name": "tiny",
            "description": f"A run {SCRIPT}",
            "collection": f"beir:{folder / 'facts'}",
            "candidates": {"depth": 6, "sources": [{"type": "bm25"}]},
            "teacher": {"type": "bi_encoder", "model": str(tiny_encoder)},
            "student": {"type": "static", "model": str(tiny_encoder)},
            "training": {
                "steps": 6,
                "checkpoints": 2,
                "log_every": 2,
                "lists": {"type": "random_documents", "size": 4},
                "device": "cpu",
            },
            "baselines": {"labels": {"training": {"losses": [{"type": "infonce"}]}}},
            "indexes": ["flat", "sq8"],
        }
    )
    Workspace(folder / "run", recipe, folder / "store").run()
    return folder / "run"


@pytest.fixture(scope="session")
def page_parts(tiny_beir: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The collection, the engines by name and the teacher's scores."""
    from rankdistill.students.dense import DenseStudent

    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(tiny_beir, folder / "facts")
    with open(folder / "facts" / "corpus.jsonl", "a") as stream:
        stream.writelines(json.dumps(document) + "\n" for document in FURTHER)
    with open(folder / "facts" / "qrels" / "test.tsv", "a") as stream:
        stream.write("q-sun\td-moon\t0\nq-sun\td-nowhere\t2\n")
    collection = open_collection(f"beir:{folder / 'facts'}")
    BM25().build(collection, folder / "bm25")
    student = DenseStudent(model=str(tiny_encoder), precision="fp32").create("cpu")
    vectors = encode_documents(student, collection, folder / "vectors")
    index = export_index(student, collection, vectors, load_specification("sq8"), folder / "sq8.faiss")
    teacher = BiEncoderTeacher(model=str(tiny_encoder), precision="fp32", device="cpu")
    exact: Any = DenseEngine.over(student, vectors)
    return {
        "collection": collection,
        "bm25": BM25.open(folder / "bm25", threads=1),
        "student": exact,
        "sq8": DenseEngine(student, index, collection=collection),
        "scores": lambda item: score_list(teacher, item),
    }


@pytest.fixture(scope="session")
def make_page(page_parts: dict[str, Any]) -> Callable[..., SearchPage]:
    """A page of these columns, or of the usual three and the teacher."""

    def make(*columns: Column, teacher: bool = True, depth: int = 5) -> SearchPage:
        usual = [
            Column("BM25", page_parts["bm25"]),
            Column("student", page_parts["student"], page_parts["student"].index.bytes),
            Column("student, sq8", page_parts["sq8"], page_parts["sq8"].index.bytes),
        ]
        reranker = Reranker(page_parts["scores"], depth=8, note="bi_encoder") if teacher else None
        return SearchPage(page_parts["collection"], columns or usual, reranker, name="facts", depth=depth)

    return make


@pytest.fixture(scope="session")
def search_page(make_page: Callable[..., SearchPage]) -> SearchPage:
    return make_page()


@pytest.fixture(scope="session")
def served(search_page: SearchPage) -> Iterator[PageServer]:
    """The page on a free port."""
    server = PageServer(port=0)
    server.start(search_page)
    yield server
    server.stop()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page by its address; at the end nothing may have gone wrong in it, and nothing been asked elsewhere."""
    trouble: list[str] = []
    contexts = []

    def start(address: str, **context: Any) -> Page:
        contexts.append(browser.new_context(**context))
        contexts[-1].set_default_timeout(180_000)  # a busy machine is slow, not wrong
        page, own = contexts[-1].new_page(), address.partition("?")[0]
        page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(f"dialog {dialog.message}"))
        page.on("request", lambda sent: None if sent.url.startswith(own) else trouble.append(f"asked {sent.url}"))
        page.goto(address)
        return page

    yield start
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture(scope="session")
def ranx() -> Callable[[str, Any], Any]:
    """Runs code on `asked`, and gives its `answer`, where ranx compiles nothing: it takes 27 s on a fresh machine."""
    pytest.importorskip("ranx")

    def run_code(code: str, asked: Any) -> Any:
        code = f"import json, sys, ranx\nasked = json.load(sys.stdin)\n{code}\njson.dump(answer, sys.stdout)"
        environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run_code
