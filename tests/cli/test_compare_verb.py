"""`rankdistill compare`: any run files, folders of them, folders of evaluations; figures, forms, errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from forked import Ending, run
from scipy import stats

QUERIES = [f"q{number}" for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs and judgments: `better` has the relevant document first, `worse` second or third."""
    runs = tmp_path / "runs"
    runs.mkdir()
    better, worse, qrels = [], [], []
    for number, query in enumerate(QUERIES):
        qrels.append(f"{query} 0 d{number} 2")
        better += [f"{query} Q0 d{number} 1 2.0 x", f"{query} Q0 other 2 1.0 x"]
        worse += [f"{query} Q0 {doc} {rank} {-rank} x" for rank, doc in enumerate(["other", "third"][: number % 2 + 1])]
        worse.append(f"{query} Q0 d{number} 9 -9 x")
    for name, lines in (("runs/better.trec", better), ("runs/worse.trec", worse), ("qrels.txt", qrels)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def compare(folder: Path, *arguments: object, code: int = 0) -> Ending:
    ending = run("compare", *arguments, folder=folder / "output")
    assert ending.code == code, ending.err
    assert "Traceback" not in ending.err
    return ending


def test_a_folder_of_runs_against_judgments(folder: Path) -> None:
    found = compare(folder, folder / "runs", "--qrels", folder / "qrels.txt", "--metric", "mrr@10", "--json")
    values = json.loads(found.out)
    (one,) = values["significance"]["comparisons"]
    assert (one["a"], one["b"], one["mean_b"], one["losses"]) == ("worse", "better", 1.0, 12)
    theirs = stats.ttest_rel([1 / 2, 1 / 3] * 6, [1.0] * 12)
    assert (one["t"], one["p_t"]) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert one["p_randomisation"] == 2 / 2**12 and one["significant"]
    assert [row["means"]["mrr@10"] for row in values["rows"]] == pytest.approx([1.0, 5 / 12])


def test_the_tables_in_every_form(folder: Path) -> None:
    given = (folder / "runs" / "worse.trec", folder / "runs" / "better.trec", "--qrels", folder / "qrels.txt")
    text = compare(folder, *given, "--baseline", "worse", "--metric", "mrr@10").out
    assert "better  1.0000▲" in text and "better or worse than worse" in text and "12/0/0" in text
    markdown = compare(folder, *given, "--format", "markdown", "--metric", "mrr@10").out
    assert "| better | **1.0000▲** |" in markdown
    out = folder / "table.tex"
    ending = compare(folder, *given, "--format", "latex", "--out", out, "--metric", "mrr@10")
    assert ending.out == "" and r"better & \textbf{1.0000$^{\dagger}$}" in out.read_text()
    assert "choose text, markdown, latex" in compare(folder, *given, "--format", "html", code=2).err


def test_judgments_of_a_collection_and_tukey(folder: Path, tiny_beir: Path) -> None:
    queries = [line.split("\t") for line in (tiny_beir / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    (folder / "mine.trec").write_text("".join(f"{q} Q0 {d} 1 1 x\n" for q, d, _ in queries))
    (folder / "none.run").write_text("")
    ending = compare(folder, folder / "mine.trec", folder / "none.run", "--collection", f"beir:{tiny_beir}",
                     "--correction", "tukey", "--json")  # fmt: skip
    values = json.loads(ending.out)
    assert [row["means"]["ndcg@10"] for row in values["rows"]] == [1.0, 0.0]
    assert values["rows"][1]["notes"]["missing_queries"] == len(queries) and values["split"] == "test"
    assert values["significance"]["correction"] == "tukey_hsd"
    wrong = compare(folder, folder / "mine.trec", "--collection", f"beir:{tiny_beir}", "--split", "tset", code=2)
    assert "no judgments for the split 'tset'" in wrong.err and "splits: " in wrong.err


def test_an_evaluation_brings_its_judgments_and_two_of_them_are_told_apart(finished: Path, tmp_path: Path) -> None:
    values = json.loads(compare(tmp_path, finished, "--json").out)
    (results,) = (finished / "evaluation").glob("*/*/results.json")
    recorded = json.loads(results.read_text())
    assert {row["system"]: row["means"] for row in values["rows"]} == {
        row["system"]: row["means"] for row in recorded["rows"]
    }
    assert values["metrics"] == recorded["metrics"]
    for name in ("one", "two"):
        shutil.copytree(results.parent, tmp_path / name / "set")
    values = json.loads(compare(tmp_path, tmp_path / "one" / "set", tmp_path / "two" / "set", "--json").out)
    assert {"one/BM25", "two/BM25"} <= {row["system"] for row in values["rows"]}
    changed = json.loads((tmp_path / "two" / "set" / "results.json").read_text()) | {"split": "dev"}
    (tmp_path / "two" / "set" / "results.json").write_text(json.dumps(changed))
    assert "different sets" in compare(tmp_path, tmp_path / "one/set", tmp_path / "two/set", code=2).err


def test_what_is_wrong_is_said(folder: Path) -> None:
    better, qrels = folder / "runs" / "better.trec", folder / "qrels.txt"
    (folder / "nothing").mkdir()
    (folder / "foreign.trec").write_text("another Q0 d 1 1 x\n")
    for arguments, code, message in [
        ([better], 2, "nothing to judge the runs with"),
        ([better, "--qrels", qrels, "--baseline", "bettre"], 2, "did you mean 'better'"),
        ([folder / "nothing", "--qrels", qrels], 2, "neither an evaluation nor run files"),
        ([folder / "absent.trec", "--qrels", qrels], 1, "no such run file"),
        ([folder / "foreign.trec", "--qrels", qrels], 1, "none of the run's 1 queries has judgments"),
        ([better, "--qrels", folder / "absent.txt"], 1, "no such file of judgments"),
    ]:  # fmt: skip
        assert message in compare(folder, *arguments, code=code).err, message


def test_real_runs_of_dl19(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "msmarco-dl19"
    ending = compare(tmp_path, folder / "runs", "--qrels", folder / "qrels.txt", "--relevance-level", "2", "--json")
    values = json.loads(ending.out)
    means = {row["system"]: round(row["means"]["ndcg@10"], 4) for row in values["rows"]}
    assert means == {"ada2": .7035, "bm25": .5058, "bm25-rm3": .5216, "repllama": .7384, "splade-pp-ed": .7308,
                     "tas-b": .7210}  # fmt: skip
    assert {row["notes"]["queries"] for row in values["rows"]} == {43}
    assert {row["system"] for row in values["rows"] if row["notes"]["tied_share"] > 0.5} == {"repllama"}
    assert len(values["significance"]["comparisons"]) == 15 * 4
    strong = {one["a"] for one in values["significance"]["comparisons"]
              if one["metric"] == "ndcg@10" and one["b"] == "bm25" and one["significant"]}  # fmt: skip
    assert strong == {"ada2", "repllama", "splade-pp-ed", "tas-b"}


def test_out_is_none_of_the_files_that_are_read(folder: Path) -> None:
    better, qrels = folder / "runs" / "better.trec", folder / "qrels.txt"
    better.write_text(better.read_text().replace(" x\n", " rankdistill\n"))  # a run that was made here
    before = better.read_bytes()
    for given in ((better,), (folder / "runs",)):
        ending = compare(
            folder, *given, "--qrels", qrels, "--out", folder / "runs" / ".." / "runs" / "better.trec", code=2
        )
        assert "one of those that are read" in ending.err
    assert better.read_bytes() == before
    (folder / "link.trec").symlink_to(better)
    compare(folder, better, "--qrels", qrels, "--out", folder / "link.trec", code=2)


@pytest.mark.parametrize(
    "option", ["--alpha=nan", "--alpha=inf", "--alpha=0", "--alpha=1", "--alpha=-1", "--relevance-level=0"]
)
def test_numbers_out_of_bounds_are_refused(folder: Path, option: str) -> None:
    ending = compare(folder, folder / "runs", "--qrels", folder / "qrels.txt", option, code=2)
    assert option[:7] in ending.err


def test_names_of_runs_reach_no_terminal_as_commands(folder: Path) -> None:
    (folder / "runs" / "better.trec").rename(folder / "runs" / "be\x1b]0;x\x07\x9bt.trec")
    for form in ("text", "markdown"):
        out = compare(folder, folder / "runs", "--qrels", folder / "qrels.txt", "--format", form).out
        assert "be\ufffd]0;x" in out and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)
