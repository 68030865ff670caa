"""The search page in a real browser: what a person sees, types and points at."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from rankdistill.evaluation.page_server import PageServer
from rankdistill.evaluation.search_page import SearchPage

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Start = Callable[..., "Page"]
QUERY, COLUMNS = "which gas do balloons need", ("bm25", "student", "student-sq8", "teacher")


@pytest.fixture
def start(open_page: Start, served: PageServer) -> Start:
    """The page, ready to be asked."""

    def begin(query: str = "", **context: Any) -> Page:
        page = open_page(served.url + query, **context)
        page.wait_for_selector("#status:not(:empty)")
        return page

    return begin


def ask(page: Page, query: str, column: str = "") -> None:
    page.fill("#q", query)
    page.press("#q", "Enter")
    settled(page, column)


def settled(page: Page, column: str = "") -> None:
    """Nothing is on its way, and a column shows documents."""
    if column:
        page.wait_for_selector(f"#column-{column} ol .hit")
    until(
        page,
        "document.querySelector('#status').textContent.match(/udged|empty|answer/) "
        "&& !document.body.classList.contains('busy')",
    )


def until(page: Page, condition: str) -> None:
    """Playwright's own wait_for_function looks again with eval, which the page's content policy forbids."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def shown(page: Page, key: str) -> list[str]:
    return page.eval_on_selector_all(f"#column-{key} ol .hit", "items => items.map(one => one.dataset.doc)")


def overflow(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_typing_a_query_shows_every_column_with_times_and_moves(start: Start, search_page: SearchPage) -> None:
    page = start()
    assert page.title() == "facts · rankdistill"
    ask(page, QUERY)
    expected = search_page.search(QUERY)
    assert page.locator("#columns h2").all_inner_texts() == ["BM25", "student", "student, sq8", "teacher bi_encoder"]
    for column in expected["columns"]:
        assert shown(page, column["key"]) == [hit["doc_id"] for hit in column["hits"]]
    for key, times in (("bm25", 1), ("student", 2), ("student-sq8", 2)):
        texts = page.locator(f"#column-{key} [data-time]").all_inner_texts()
        assert len(texts) == times and all(re.fullmatch(r"\w+ [\d.]+ m?s", text) for text in texts)
    # Against BM25: what it had too has moved by the difference of ranks, the rest is new.
    for hit in expected["columns"][1]["hits"]:
        before = expected["documents"][hit["doc_id"]]["ranks"]["bm25"]
        badge = page.inner_text(f"#column-student ol .hit[data-doc='{hit['doc_id']}'] .move")
        if before is None:
            assert badge == "new"
        else:
            step = before - hit["rank"]
            assert badge == ("=" if not step else f"{'▲' if step > 0 else '▼'} {abs(step)}")
    assert page.locator("#column-bm25 .move").count() == 0
    lost = set(shown(page, "bm25")) - set(shown(page, "student"))
    assert lost == set(
        page.eval_on_selector_all("#column-student .gone .hit", "items => items.map(one => one.dataset.doc)")
    )
    page.select_option("#reference", "student")
    assert page.locator("#column-student .move").count() == 0
    assert page.locator("#column-student-sq8 .move").count() >= 5


def test_the_teacher_is_asked_on_demand(start: Start, search_page: SearchPage) -> None:
    page = start()
    ask(page, QUERY)
    assert shown(page, "teacher") == []
    page.click(".ask")
    settled(page, "teacher")
    expected = search_page.search(QUERY, teacher="all")["columns"][-1]
    assert shown(page, "teacher") == [hit["doc_id"] for hit in expected["hits"]]
    assert "8 documents re-ranked" in page.inner_text("#column-teacher .facts")
    page.select_option("#reference", "teacher")
    titles = page.eval_on_selector_all("#column-student .move", "all => all.map(one => one.title || one.textContent)")
    assert titles and all("teacher" in title or "→" in title for title in titles)
    page.check("#always")
    until(page, "location.search.includes('teacher=all')")
    ask(page, "desert plant", "teacher")
    page.reload()  # the address holds it all
    page.wait_for_selector("#column-teacher ol .hit")
    assert page.input_value("#q") == "desert plant" and page.input_value("#reference") == "teacher"


def test_a_judged_query_is_picked_and_its_labels_are_shown(start: Start) -> None:
    page = start()
    page.select_option("#example", "star that heats the earth")
    settled(page, "bm25")
    assert page.inner_text("#status") == ("Judged query q-sun of test: 3 judged, 2 relevant (1 not in the collection).")
    assert "✓ relevant 1" in page.inner_text("#column-bm25 ol .hit[data-doc='d-sun']")
    assert "judged 0" in page.inner_text("#column-bm25 ol .hit[data-doc='d-moon']")
    assert "nDCG@10" in page.inner_text("#column-student")


def test_hostile_documents_are_text(start: Start) -> None:
    page = start("?q=zirconium+%3Cscript%3Ewindow.hacked%3D1%3C%2Fscript%3E")
    settled(page, "bm25")
    hit = page.locator("#column-bm25 ol .hit").first
    assert hit.locator(".open").inner_text() == '<img src="x" onerror="window.hacked = 1">'
    assert hit.locator(".text").text_content() == (
        "<script>window.hacked = 1</script> zirconium & <b>bold</b> \"quotes\" 'and' </style>"
    )
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b:not(.facts b)").count() == 0
    assert page.input_value("#q") == "zirconium <script>window.hacked=1</script>"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_columns_are_tabs_and_nothing_overflows(start: Start, scheme: str) -> None:
    page = start(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    assert overflow(page) == 0
    ask(page, "zirconium " + "unbreakable" * 30)
    page.click("#tabs button:last-child")
    page.click(".ask")
    settled(page, "teacher")
    for number, key in enumerate(COLUMNS):
        page.click(f"#tabs button:nth-child({number + 1})")
        assert page.locator(".column:visible").evaluate_all("all => all.map(one => one.dataset.key)") == [key]
        page.locator(f"#column-{key} ol .open").first.click()
        assert overflow(page) == 0, key
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")


def test_side_by_side_on_a_desk_and_marked_in_every_column(start: Start) -> None:
    page = start(viewport={"width": 1280, "height": 800})
    ask(page, QUERY)
    boxes = [page.locator(f"#column-{key}").bounding_box() for key in COLUMNS]
    assert all(a and b and a["x"] + a["width"] <= b["x"] and a["y"] == b["y"] for a, b in pairwise(boxes))
    assert overflow(page) == 0 and not page.is_visible("#tabs")
    both = next(one for one in shown(page, "bm25") if one in shown(page, "student"))
    page.hover(f"#column-bm25 ol .hit[data-doc='{both}']")
    marked = page.eval_on_selector_all(
        ".marked", "all => all.map(one => [one.closest('.column').dataset.key, one.dataset.doc])"
    )
    assert {tuple(one) for one in marked} >= {("bm25", both), ("student", both)}
    assert {doc_id for _, doc_id in marked} == {both}
    page.hover("h2")
    assert page.locator(".marked").count() == 0


def test_the_keyboard_alone_is_enough(start: Start) -> None:
    page = start()
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    settled(page, "student")
    hit = "document.activeElement.closest('.hit')"
    focused = f"[{hit}?.closest('.column').dataset.key, {hit}?.dataset.doc]"
    page.keyboard.press("ArrowDown")
    first, student = shown(page, "bm25"), shown(page, "student")
    assert page.evaluate(focused) == ["bm25", first[0]]
    assert page.eval_on_selector_all(".marked", "all => all.length") >= 1
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == ["bm25", first[1]]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == ["student", first[1] if first[1] in student else student[1]]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q" and page.input_value("#q") == QUERY


def test_going_back_shows_the_query_before_and_an_empty_one_asks_for_words(start: Start) -> None:
    page = start()
    ask(page, "desert plant")
    ask(page, "which planet is red")
    page.go_back()
    until(page, "document.querySelector('#q').value === 'desert plant'")
    settled(page)
    assert shown(page, "bm25")[0] == "d-cactus"
    before = shown(page, "student")
    page.fill("#q", "   ")
    page.press("#q", "Enter")
    until(page, "document.querySelector('#status').textContent.startsWith('Type a query')")
    assert shown(page, "student") == before


def test_a_server_that_is_gone_is_said(browser: Browser, search_page: SearchPage) -> None:
    server = PageServer(port=0)
    server.start(search_page)
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_selector("#status:not(:empty)")
    server.stop()
    ask(page, "iron")
    assert page.inner_text("#status") == "The server does not answer: is it still running?"
    page.close()
