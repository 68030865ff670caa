"""The report in a real browser, of a run that went through; and what it says of a run that lacks pieces."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import numpy as np
import pyarrow.parquet as pq
import pytest

from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.report import report
from rankdistill.evaluation.report.data import read_run_data
from rankdistill.evaluation.report.findings import ratio_interval

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Start = Callable[..., "Page"]
SCRIPT = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"


@pytest.fixture(scope="module")
def written(run: Path) -> Path:
    return report(run)


@pytest.fixture
def page(open_page: Start, written: Path) -> Page:
    return open_page(written.as_uri(), viewport={"width": 1280, "height": 900})


def per_query(run: Path, system: str, metric: str = "ndcg@10") -> dict[str, float]:
    path = next(run.glob("evaluation/*/*/per_query.parquet"))
    rows = pq.read_table(path).to_pylist()
    return {row["query_id"]: row[metric] for row in rows if row["system"] == system}


def test_every_section_is_there_with_the_runs_figures(page: Page, run: Path) -> None:
    headings = page.locator("main h2").all_inner_texts()
    assert len(headings) == 11
    assert page.locator("main svg.chart").count() >= 5
    targets = page.eval_on_selector_all("nav a", "links => links.map(a => a.hash.slice(1))")
    assert all(page.locator(f"section#{name}").count() == 1 for name in targets)
    assert page.locator("#results tbody tr").first.inner_text().startswith("BM25")
    results = json.loads(next(run.glob("evaluation/*/results.json")).read_text())
    (of_set,) = results["sets"]
    table = page.locator("#results table.sortable").first
    for row in of_set["rows"]:
        line = table.locator("tbody tr", has=page.locator("th", has_text=re.compile(f"^{re.escape(row['system'])}$")))
        for metric, value in row["means"].items():
            assert f"{value:.4f}" in line.inner_text(), (row["system"], metric)
    means = {row["system"]: row["means"]["ndcg@10"] for row in of_set["rows"]}
    kept = f"{100 * means['student, distilled'] / means['teacher']:.1f}\u00a0%"
    assert kept in page.locator(".headline").inner_text()


def test_markup_in_texts_stays_text(page: Page) -> None:
    assert page.title() == "tiny: distillation report"
    assert SCRIPT in page.locator(".described").inner_text()
    page.locator("#queries input[type=search]").fill("zinc")
    line = page.locator("#queries tbody tr")
    assert line.count() == 1 and SCRIPT in line.inner_text()
    line.locator("button.open").click()
    shown = page.locator("tr.opened").inner_text()
    assert SCRIPT in shown and "<b>bold</b> zinc" in shown
    assert page.locator("main img, main b:text('bold'), main script").count() == 0
    assert page.title() == "tiny: distillation report"


def test_nothing_of_the_page_may_fetch_or_run(page: Page, browser: Browser, written: Path, tmp_path: Path) -> None:
    policy = page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy and "file" not in policy
    suspicious = page.eval_on_selector_all(
        "html, html *",
        "all => all.flatMap(one => [...one.attributes].map(a => a.name)).filter(n => /^(style|src.*|on.+)$/.test(n))",
    )
    assert suspicious == []
    links = page.eval_on_selector_all("[href]", "all => all.map(one => one.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    # The second line of defence: even markup that was smuggled in runs nothing.
    smuggled = tmp_path / "smuggled.html"
    smuggled.write_text(written.read_text().replace("<footer>", f"<footer>{SCRIPT}"))
    other = browser.new_page()
    other.goto(smuggled.as_uri())
    assert other.title() == "tiny: distillation report"
    other.close()


def column(page: Page, number: int) -> list[float]:
    cells = page.locator(f"#queries tbody tr td:nth-child({number})").all_inner_texts()
    return [float(cell.replace("−", "-")) for cell in cells]


def test_queries_are_sorted_by_click_and_by_keyboard(page: Page, run: Path) -> None:
    expected = per_query(run, "student, distilled")
    teacher = per_query(run, "teacher")
    differences = sorted(round(expected[name] - teacher[name], 4) for name in expected)
    assert column(page, 2) == pytest.approx(differences, abs=1.01e-4)
    head = page.locator("#queries th", has_text="difference")
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert column(page, 2) == pytest.approx(differences[::-1], abs=1.01e-4)
    assert head.get_attribute("aria-sort") == "descending"
    button = page.locator("#queries th", has_text="student, distilled").locator("button")
    button.focus()
    page.keyboard.press("Enter")
    assert column(page, 3) == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-4)
    # The header was drawn anew: the focus must be where it was, to go on from there.
    page.keyboard.press("Space")
    assert column(page, 3) == pytest.approx(sorted(expected.values()), abs=1e-4)


def test_tables_are_sorted_by_click_and_by_keyboard(page: Page) -> None:
    table = page.locator("#results table.sortable").first
    head, cells = table.locator("th", has_text="nDCG@10"), table.locator("tbody tr td:nth-child(2)")

    def values() -> list[float]:
        return [float(value) for value in cells.evaluate_all("c => c.map(x => x.dataset.value)")]

    head.locator("button").click()
    assert values() == sorted(values(), reverse=True) and len(set(values())) > 1
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert values() == sorted(values()) and head.get_attribute("aria-sort") == "ascending"
    name = table.locator("th button", has_text="system")
    name.click()
    systems = table.locator("tbody th").all_inner_texts()
    assert systems == sorted(systems, key=str.lower)


def test_a_query_opens_to_the_documents_with_their_labels(page: Page, run: Path) -> None:
    page.locator("#queries input[type=search]").fill("q-lead")
    button = page.locator("#queries button.open")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    lists = page.locator("tr.opened .lists > div")
    assert lists.count() == 2
    for number, system in enumerate(("student-distilled", "teacher")):
        lines = next(run.glob(f"evaluation/*/*/runs/{system}.trec")).read_text().splitlines()
        ranked = [line.split()[2] for line in lines if line.startswith("q-lead ")][:10]
        shown = lists.nth(number).locator("li").all_inner_texts()
        assert [next(name for name in ranked if name in text) for text in shown] == ranked
        assert any("relevant (2)" in text and "d-lead" in text for text in shown) == ("d-lead" in ranked)
    page.keyboard.press("Enter")
    assert page.locator("tr.opened").count() == 0 and button.get_attribute("aria-expanded") == "false"


def test_two_other_systems_are_compared_and_a_point_leads_to_its_query(page: Page, run: Path) -> None:
    page.locator("#queries select").nth(0).select_option(label="BM25")
    page.locator("#queries select").nth(1).select_option(label="student, labels")
    a, b = per_query(run, "BM25"), per_query(run, "student, labels")
    better = sum(round(a[name] - b[name], 4) > 0 for name in a)
    assert f"is better on {better} queries" in page.locator("#queries .tally").inner_text()
    page.locator("#queries select").nth(3).select_option("better")
    assert page.locator("#queries tbody tr").count() == better
    point = page.locator("#queries circle[data-query]").first
    row = point.get_attribute("data-query")
    point.click(force=True)
    assert page.locator(f'#queries tr[data-row="{row}"] button.open').get_attribute("aria-expanded") == "true"


def brightness(page: Page) -> float:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))


def test_dark_and_light_follow_the_system_and_the_button(open_page: Start, written: Path) -> None:
    for scheme in ("light", "dark"):
        page = open_page(written.as_uri(), color_scheme=scheme)
        assert (brightness(page) > 128) == (scheme == "light")
        button = page.locator("#theme")
        button.click()
        assert "light" in button.inner_text() and brightness(page) > 128
        button.click()
        assert "dark" in button.inner_text() and brightness(page) < 128
        page.emulate_media(media="print", color_scheme=scheme)  # type: ignore[arg-type]
        assert brightness(page) == 255


def test_a_phone_scrolls_down_only(open_page: Start, written: Path) -> None:
    page = open_page(written.as_uri(), viewport={"width": 375, "height": 812}, has_touch=True)
    page.locator("#queries button.open").first.click()
    for box in page.locator("details").all():
        box.evaluate("box => box.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.locator("tr.opened .inner").first.bounding_box()["width"] <= 375  # type: ignore[index]


def test_the_keyboard_and_those_who_listen_reach_all_of_it(page: Page, run: Path) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    unlabelled = page.eval_on_selector_all(
        "select, input", "all => all.filter(one => !one.labels.length && !one.ariaLabel).length"
    )
    assert unlabelled == 0
    assert page.locator("svg.chart:not(:has(> title))").count() == 0
    dev = json.loads((run / "student" / "manifest.json").read_text())["dev"]
    best = max(dev, key=lambda step: (dev[step], -int(step)))
    hints = page.eval_on_selector_all("#training .dot.best", "all => all.map(one => one.dataset.hint)")
    assert any(hint.startswith(f"student, step {best}: ") and hint.endswith("(kept)") for hint in hints)


def test_tables_to_paste_are_those_of_the_files(page: Page, run: Path, tmp_path: Path) -> None:
    report(run, tmp_path / "page.html", markdown=tmp_path / "t.md", latex=tmp_path / "t.tex")
    # The files end in a line that says who wrote them.
    markdown, latex = ((tmp_path / name).read_text().rsplit("\n", 2)[0] for name in ("t.md", "t.tex"))
    assert page.locator("#markdown-text").text_content() == markdown
    assert page.locator("#latex-text").text_content() == latex
    assert r"\begin{tabular}" in (tmp_path / "t.tex").read_text()
    page.locator("#paste button.copy").first.click()
    page.wait_for_selector("#paste button.copy:text-is('Copied')")


# -- without a browser ------------------------------------------------------------------------------------------------


def copy_of(run: Path, tmp_path: Path) -> Path:
    """Without weights and vectors, which a report does not read."""
    left_out = shutil.ignore_patterns("model", "vectors", "engines", "indexes")
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=left_out))


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    bare = copy_of(run, tmp_path)
    for path in bare.glob("evaluation/*/*/*"):
        if path.name != "results.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("student", "baselines", "candidates", "lists"):
        shutil.rmtree(bare / name)
    (bare / "times.json").write_text("{")
    text = report(bare).read_text()
    missing = text[text.index('<section id="missing"') :]
    apart = ["significance", "agreement", "extrapolation", "cost"]
    for what in [*apart, "values of each query", "manifest", "times.json"]:
        assert what in missing, what
    assert "no interval" in text


def test_damaged_files_are_said_to_be(run: Path, tmp_path: Path) -> None:
    damaged = copy_of(run, tmp_path)
    folder = next(damaged.glob("evaluation/*/*/per_query.parquet")).parent
    (folder / "per_query.parquet").write_bytes(b"PAR1 no more")
    (folder / "cost.json").write_text("[]")
    (folder / "fidelity.json").write_text('{"systems": {"student, distilled": 3}}')
    text = report(damaged).read_text()
    assert "the values of each query cannot be read" in text and "cannot be read: it is no object" in text
    next(damaged.glob("evaluation/*/results.json")).write_text('{"sets": [{"rows": 1}]}')
    with pytest.raises(RankdistillError, match="results cannot be read"):
        report(damaged)


def test_a_collection_that_is_gone_costs_the_texts_and_no_path_leaves_the_folder(run: Path, tmp_path: Path) -> None:
    """results.json may come from elsewhere."""
    foreign = copy_of(run, tmp_path)
    (tmp_path / "secret.trec").write_text("q-lead Q0 d-secret 1 1.0 x\n")
    path = next(foreign.glob("evaluation/*/results.json"))
    results = path.read_text().replace("runs/BM25.trec", "../../../../secret.trec")
    path.write_text(results.replace("/facts", "/nowhere"))
    text = report(foreign).read_text()
    assert "The texts are not shown" in text and "d-zinc" in text and "soft metal of cans" not in text
    assert "d-secret" not in text and "The ranking of “BM25” is not there." in text


def test_wrong_folders_and_names(run: Path, tmp_path: Path) -> None:
    bare = copy_of(run, tmp_path)
    shutil.rmtree(bare / "evaluation")
    refused: list[tuple[tuple[Path, ...], dict[str, Any], type[Exception], str]] = [
        ((tmp_path,), {}, RankdistillError, "no run"),
        ((run,), {"suite": "beir"}, UsageError, "no evaluation 'beir'"),
        ((run, tmp_path), {}, UsageError, "there is a folder here"),
        ((bare,), {}, RankdistillError, "not been evaluated"),
    ]
    for arguments, options, kind, words in refused:
        with pytest.raises(kind, match=words):
            report(*arguments, **options)


def test_several_sets_have_a_macro_table_and_a_choice(open_page: Start, run: Path, tmp_path: Path) -> None:
    several = copy_of(run, tmp_path)
    path = next(several.glob("evaluation/*/results.json"))
    results: dict[str, Any] = json.loads(path.read_text())
    first = results["sets"][0]
    shutil.copytree(path.parent / first["name"], path.parent / "other")
    results["sets"].append({**first, "name": "other"})
    results["macro_sets"] = 2
    results["missing"] = [{"set": "scifact", "reason": "no <network>"}]
    path.write_text(json.dumps(results))
    page = open_page(report(several).as_uri())
    assert "macro average over 2 sets" in page.locator("#results").inner_text()
    assert page.locator("#queries .of-set:visible .set-name").all_inner_texts() == [first["name"]]
    page.locator("#set-choice").select_option(label="other")
    assert page.locator("#queries .of-set:visible .set-name").all_inner_texts() == ["other"]
    assert "no <network>" in page.locator("#missing").inner_text()


def test_the_ratio_has_the_interval_of_a_bootstrap(run: Path) -> None:
    """Against a bootstrap written out query by query."""
    data = read_run_data(run)
    found = ratio_interval(data, "student, distilled", "teacher")
    assert found is not None
    ours, theirs = per_query(run, "student, distilled"), per_query(run, "teacher")
    pairs = np.array([(ours[name], theirs[name]) for name in ours])
    random = np.random.default_rng(7)
    ratios = [np.divide(*pairs[random.integers(0, len(pairs), len(pairs))].mean(axis=0)) for _ in range(4000)]
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert found == pytest.approx((low, high), abs=0.25 * (high - low))
    point = np.divide(*pairs.mean(axis=0))
    assert found[0] <= point <= found[1]


def test_the_verb_prints_where_the_page_is(run: Path, tmp_path: Path) -> None:
    # In a process of its own: what the program sets for all of its process must not reach the tests that follow.
    page = tmp_path / "new" / "page.html"
    ended = forked.ran("report", run, "--out", page, "--latex", tmp_path / "t.tex", "-q", folder=tmp_path)
    assert ended.out.split() == [str(page)]
    assert page.read_text().startswith("<!doctype html>") and (tmp_path / "t.tex").is_file()


def test_the_page_has_bounds(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankdistill.evaluation.report.queries.OPENED", 1)
    monkeypatch.setattr("rankdistill.evaluation.report.queries.MOST_QUERIES", 2)
    text = report(run, tmp_path / "page.html").read_text()
    data = json.loads(re.findall(r'id="report-data">(.*?)</script>', text)[0])["sets"][0]
    assert len(data["queries"]) == 2 and 1 <= len(data["top"]) <= 2
    assert re.search(r"The table has the 2 of \d+ queries that differ most", text)
    ours, theirs = per_query(run, "student, distilled"), per_query(run, "teacher")
    gaps = sorted((abs(ours[name] - theirs[name]) for name in ours), reverse=True)
    kept = [abs(ours[name] - theirs[name]) for name, _ in data["queries"]]
    assert sorted(kept, reverse=True) == pytest.approx(gaps[:2])
