"""What the search page answers: the engines' own results, where the others put each document, labels, the teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.search_page import (
    FOLLOWED,
    MOST_DOCUMENTS,
    Column,
    Reranker,
    SearchPage,
    clean_query,
    in_turn,
)

QUERY = "which gas do balloons need"


def column(answer: dict[str, Any], key: str) -> dict[str, Any]:
    return next(one for one in answer["columns"] if one["key"] == key)


def ids(answer: dict[str, Any], key: str) -> list[str]:
    return [hit["doc_id"] for hit in column(answer, key)["hits"]]


def test_each_column_shows_what_its_engine_finds(search_page: SearchPage, page_parts: dict[str, Any]) -> None:
    answer = search_page.search(QUERY, 6)
    assert [one["key"] for one in answer["columns"]] == ["bm25", "student", "student-sq8"]
    for key, engine in (("bm25", "bm25"), ("student", "student"), ("student-sq8", "sq8")):
        hits = page_parts[engine].search([QUERY], 6)[0]
        assert ids(answer, key) == page_parts["collection"].doc_ids(hits.rows)
        shown = column(answer, key)
        assert [hit["rank"] for hit in shown["hits"]] == list(range(1, len(hits.rows) + 1))
        assert np.allclose([hit["score"] for hit in shown["hits"]], hits.scores, atol=1e-4)


def test_every_document_has_its_rank_in_every_column(search_page: SearchPage, page_parts: dict[str, Any]) -> None:
    """Beyond the documents shown too; None where an engine does not find it."""
    answer = search_page.search(QUERY, 3)
    orders = {
        key: page_parts["collection"].doc_ids(page_parts[engine].search([QUERY], FOLLOWED)[0].rows)
        for key, engine in (("bm25", "bm25"), ("student", "student"), ("student-sq8", "sq8"))
    }
    shown = {doc_id for key in orders for doc_id in ids(answer, key)}
    assert answer["documents"].keys() == shown
    assert all(one["characters"] == len(one["text"]) for one in answer["documents"].values())
    for doc_id, document in answer["documents"].items():
        for key, order in orders.items():
            assert document["ranks"][key] == (order.index(doc_id) + 1 if doc_id in order else None)
    ranks = [document["ranks"]["student"] for document in answer["documents"].values()]
    assert max(ranks) > 3, "the test needs a document that the student has further down"
    assert None in [document["ranks"]["bm25"] for document in answer["documents"].values()]


def test_times_are_those_of_the_parts_and_students_share_an_encoding(search_page: SearchPage) -> None:
    answer = search_page.search(QUERY, teacher="all")
    assert column(answer, "bm25")["times"].keys() == {"search_ms"}
    assert column(answer, "student")["times"].keys() == {"encode_ms", "search_ms"}
    assert column(answer, "teacher")["times"].keys() == {"teacher_ms"}
    assert column(answer, "student")["times"]["encode_ms"] == column(answer, "student-sq8")["times"]["encode_ms"]
    assert all(0 < value < 60_000 for one in answer["columns"] for value in one["times"].values())


def test_a_judged_query_comes_with_its_labels(search_page: SearchPage) -> None:
    answer = search_page.search("  star that\theats the earth ", 10)
    judged = {"query_id": "q-sun", "split": "test", "judged": 3, "relevant": 2, "relevant_missing": 1}
    assert answer["judged"] == judged
    assert answer["documents"]["d-sun"]["relevance"] == 1
    assert answer["documents"]["d-moon"]["relevance"] == 0
    assert {d["relevance"] for i, d in answer["documents"].items() if i not in ("d-sun", "d-moon")} == {None}
    # The missing document is relevant 2 and part of the ideal order.
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    for one in answer["columns"]:
        rank = answer["documents"]["d-sun"]["ranks"][one["key"]]
        gain = 1 / math.log2(rank + 1) if rank and rank <= 10 else 0.0
        assert one["ndcg@10"] == pytest.approx(gain / ideal, abs=1e-4)
    free = search_page.search("star that heats the eart")
    assert free["judged"] is None and {one["ndcg@10"] for one in free["columns"]} == {None}


def test_examples_are_the_judged_queries_of_the_test_split(search_page: SearchPage) -> None:
    about = search_page.about()
    assert about["split"] == "test" and about["judged_queries"] == 3
    found = {(search_page.search(example["text"])["judged"] or {})["query_id"] for example in about["examples"]}
    assert found == {example["query_id"] for example in about["examples"]} == {"q-helium", "q-spider", "q-sun"}


def test_the_teacher_orders_what_a_column_found_by_its_own_scores(search_page: SearchPage) -> None:
    """The teacher is the student's own encoder, so it must leave the student's order as it is."""
    answer = search_page.search(QUERY, 5, teacher="student")
    assert ids(answer, "teacher") == ids(answer, "student")
    over_bm25 = search_page.search("a note about the price of balloons and metals", 8, teacher="bm25")
    found = [doc_id for doc_id, one in over_bm25["documents"].items() if (one["ranks"]["bm25"] or 99) <= 8]
    assert sorted(ids(over_bm25, "teacher")) == sorted(found)
    orders = [over_bm25["documents"][doc_id]["ranks"]["student"] for doc_id in ids(over_bm25, "teacher")]
    assert orders == sorted(orders) and ids(over_bm25, "teacher") != ids(over_bm25, "bm25")


def test_the_teacher_reads_so_many_documents_and_leaves_out_what_it_has_no_score_for(
    make_page: Callable[..., SearchPage],
) -> None:
    read: list[int] = []

    def asked(scores: Callable[[int], Any], depth: int, teacher: str) -> dict[str, Any]:
        def counting(item: Any) -> Any:
            read.append(len(item.doc_ids))
            return scores(len(item.doc_ids))

        page = make_page()
        page.teacher = Reranker(counting, depth=depth)
        return page.search(QUERY, MOST_DOCUMENTS, teacher=teacher)

    answer = asked(np.ones, 7, "all")
    assert set(read) == {7} and column(answer, "teacher")["found"] == 7
    assert column(answer, "teacher")["note"] == "7 documents re-ranked"
    answer = asked(lambda count: [np.nan, 1.0, 2.0] + [np.nan] * (count - 3), 5, "student")
    assert ids(answer, "teacher") == [ids(answer, "student")[2], ids(answer, "student")[1]]
    assert column(answer, "teacher")["note"] == "scores of 2 of 5 documents"
    answer = asked(lambda count: np.full(count, np.nan), 5, "all")
    assert column(answer, "teacher")["note"] == "no score for this query"


def test_a_query_without_a_known_word_leaves_bm25_empty(search_page: SearchPage) -> None:
    answer = search_page.search("qqqq 🦑", 4, teacher="bm25")
    assert ids(answer, "bm25") == [] and len(ids(answer, "student")) == 4
    nothing = {"key": "teacher", "hits": [], "found": 0, "times": {}, "ndcg@10": None, "error": ""}
    assert column(answer, "teacher") == nothing | {"note": "nothing to re-rank"}


def test_a_column_that_fails_says_so_and_leaves_the_others(
    make_page: Callable[..., SearchPage], page_parts: Any
) -> None:
    class Broken:
        def search(self, queries: Any, k: int) -> Any:
            raise RankdistillError("the index is damaged", where="/secret/path")

    page = make_page(Column("broken", Broken()), Column("BM25", page_parts["bm25"]))
    answer = page.search("star that heats the earth")
    assert column(answer, "broken")["error"] == "the index is damaged" and "/secret" not in json.dumps(answer)
    assert ids(answer, "bm25")[0] == "d-sun"


def test_without_a_teacher_none_can_be_asked(make_page: Callable[..., SearchPage]) -> None:
    page = make_page(teacher=False)
    assert page.about()["teacher"] is None
    with pytest.raises(UsageError, match="no teacher"):
        page.search("iron", teacher="all")


def test_columns_of_one_name_keep_apart(make_page: Callable[..., SearchPage], page_parts: Any) -> None:
    page = make_page(*(Column(name, page_parts["bm25"]) for name in ("a b", "A-B", "teacher", "all", "…")))
    assert [one.key for one in page.columns] == ["a-b", "a-b-2", "teacher-2", "all-2", "column"]
    assert len(page.search("iron")["columns"]) == 5


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text_is_answered_or_refused(search_page: SearchPage, text: str) -> None:
    try:
        query = clean_query(text)
    except UsageError as error:
        assert "empty" in error.what
        return
    assert clean_query(query) == query and "\0" not in query and query == query.strip()
    answer = search_page.search(text, 3, teacher="all")
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert all(not one["error"] for one in answer["columns"])
    assert len(ids(answer, "student")) == len(ids(answer, "teacher")) == 3


@given(st.lists(st.lists(st.integers(0, 20), unique=True, max_size=8), max_size=4), st.integers(1, 12))
def test_taking_in_turn_gives_each_list_its_share(lists: list[list[int]], count: int) -> None:
    taken = in_turn(lists, count)
    everything = {value for one in lists for value in one}
    assert len(taken) == len(set(taken)) == min(count, len(everything)) and set(taken) <= everything
    # Nothing is taken that a list has further down than a value that was left.
    best = {value: min(one.index(value) for one in lists if value in one) for value in everything}
    left = everything - set(taken)
    assert not left or max(best[value] for value in taken) <= min(best[value] for value in left)
