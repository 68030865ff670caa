"""Which queries are learned from without labels: never one that measures."""

from __future__ import annotations

import gzip
import math
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rankdistill.collections import open_collection
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.recipe import Recipe, load_recipe
from rankdistill.sampling.training_queries import keyword_queries, query_pool, with_unlabelled

if TYPE_CHECKING:
    from rankdistill.collections import Collection


def recipe(collection: Collection, unlabelled: str | None = None, **candidates: Any) -> Recipe:
    candidates["unlabelled"] = unlabelled
    return load_recipe({"collection": collection.spec, "student": {"type": "dense"}, "candidates": candidates})


@pytest.fixture
def bare(tiny_beir: Path, tmp_path: Path) -> Collection:
    """Documents and queries without any judgment."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        shutil.copy(tiny_beir / name, folder / name)
    return open_collection(f"beir:{folder}")


def test_labelled_queries_are_those_of_the_splits(tiny_collection: Collection) -> None:
    assert query_pool(tiny_collection, recipe(tiny_collection)) == (
        tiny_collection.query_ids("train"),
        tiny_collection.query_ids("dev"),
        "dev",
    )


def test_queries_without_labels_are_never_those_that_measure(tiny_collection: Collection, bare: Collection) -> None:
    train, dev, judged = query_pool(tiny_collection, recipe(tiny_collection, "queries"))
    assert (train, dev, judged) == (tiny_collection.query_ids("train"), tiny_collection.query_ids("dev"), "dev")
    train, dev, judged = query_pool(bare, recipe(bare, "queries"))
    assert judged is None and sorted([*train, *dev]) == sorted(bare.query_ids()) and len(dev) == 2
    with pytest.raises(UsageError, match=r"no train split[\s\S]*unlabelled"):
        query_pool(bare, recipe(bare))
    some = query_pool(bare, recipe(bare, "queries", queries=5, dev_queries=1))
    assert len(some[0]) == 5 and len(some[1]) == 1 and set(some[0]) <= set(train)


def test_titles_of_documents(bare: Collection) -> None:
    wanted = recipe(bare, "titles")
    known = with_unlabelled(bare, wanted)
    train, dev, _ = query_pool(known, wanted)
    texts = known.query_texts([*train, *dev])
    assert "iron" in texts and "A note about iron and its price." in texts  # a title, and a first sentence
    assert not set(train) & set(dev)
    # Beside the collection's own; the same text has the same id; workers of a data loader know them too.
    assert known.query_texts(["q-iron", train[0]]) == [*bare.query_texts(["q-iron"]), texts[0]]
    assert with_unlabelled(bare, wanted).further == known.further and known.fingerprint == bare.fingerprint
    assert pickle.loads(pickle.dumps(known)).query_texts(train) == texts[: len(train)]  # noqa: S301
    assert known.has_queries([train[0], "q-iron", "nobody"]) == [True, True, False]
    with pytest.raises(RankdistillError, match="nobody"):
        known.query_texts([train[0], "nobody"])
    assert len(with_unlabelled(bare, recipe(bare, "titles", queries=3)).further) == 3


def test_keywords_stand_out_in_their_document(tiny_collection: Collection, bare: Collection) -> None:
    texts = [text.lower() for text in bare.document_texts(range(bare.document_count))]
    words = [re.findall(r"[a-z]{3,}(?:-[a-z]+)*", text) for text in texts]
    held = Counter(word for each in words for word in set(each))
    queries = keyword_queries(bare, range(bare.document_count), 1)
    assert queries == keyword_queries(bare, range(bare.document_count), 1)
    assert queries != keyword_queries(bare, range(bare.document_count), 2)
    assert {len(query.split()) for query in queries} >= {1, 2, 3}
    for query, own in zip(queries, words, strict=True):
        weights = {word: own.count(word) * math.log(len(words) / held[word]) for word in own if held[word] > 1}
        fifth = sorted(weights.values(), reverse=True)[:5][-1:]
        assert all(weights[word] >= fifth[0] for word in query.split())
        assert [own.index(word) for word in query.split()] == sorted(own.index(word) for word in query.split())
    measured = tiny_collection.query_texts(tiny_collection.query_ids("test"))
    assert not set(with_unlabelled(tiny_collection, recipe(tiny_collection, "keywords")).further.values()) & set(
        measured
    )


def test_lines_of_a_file_without_test_queries(
    tiny_collection: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "asked.txt"
    (test_query,) = tiny_collection.query_texts(tiny_collection.query_ids("test")[:1])
    file.write_text(f"what rusts\n\n  how do bats hunt \nwhat rusts\n{test_query}\n")
    wanted = recipe(tiny_collection, str(file))
    known = with_unlabelled(tiny_collection, wanted)
    train, _, judged = query_pool(known, wanted)
    assert known.query_texts(train) == ["what rusts", "how do bats hunt"] and judged == "dev"
    assert "1 are dev or test queries" in capsys.readouterr().err
    for name, content, message in (("gone.txt", None, "no file"), ("one.txt", "one\n", "fewer than two")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=message):
            with_unlabelled(tiny_collection, recipe(tiny_collection, str(tmp_path / name)))


def test_a_text_file_is_read_as_all_others_are(bare: Collection, tmp_path: Path) -> None:
    file = tmp_path / "queries.gz"
    file.write_bytes(gzip.compress("\ufeffwhat rusts\nhow do\u2028bats hunt\n".encode()))
    known = with_unlabelled(bare, recipe(bare, str(file)))
    assert list(known.further.values()) == ["what rusts", "how do\u2028bats hunt"]
    file.write_bytes("café\nthé\n".encode("latin-1"))
    with pytest.raises(RankdistillError, match=r"byte 0xe9 .* not UTF-8\n.*queries.gz:1"):
        with_unlabelled(bare, recipe(bare, str(file)))


def test_generated_queries_are_learned_from_where_there_are_any(tiny_collection: Collection, bare: Collection) -> None:
    relevant = {f"about {doc_id}": [doc_id] for doc_id in bare.doc_ids(range(20))}
    known = bare.with_queries([], relevant)
    train, dev, judged = query_pool(known, recipe(bare))
    assert (train, dev, judged) == (known.query_ids("generated"), known.query_ids("generated-dev"), "generated-dev")
    # Real dev queries choose the checkpoint where there are any.
    known = tiny_collection.with_queries([], relevant)
    assert query_pool(known, recipe(tiny_collection))[1:] == (tiny_collection.query_ids("dev"), "dev")
    few = bare.with_queries([], {"about one": bare.doc_ids([0])})
    with pytest.raises(RankdistillError, match=r"1 queries are left[\s\S]*reason"):
        query_pool(few, recipe(bare))
