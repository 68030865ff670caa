"""Fusion: the scores are ranx's, odd members do no harm, and a suite's rows say what cannot be fused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rankdistill.errors import UsageError
from rankdistill.evaluation.fusion import FusedEngine, FusedRow, Fusion, fuse, fused_rows
from rankdistill.evaluation.suites import load_suite
from rankdistill.evaluation.systems import EngineSystem, RerankSystem
from rankdistill.indexes.base import Hits, no_hits, ranked
from rankdistill.runs import Run, write_trec

if TYPE_CHECKING:
    pass

BY_RANX = """
answer = []
for runs, norm, method, params in asked:
    fused = ranx.fuse(runs=[ranx.Run(run) for run in runs], norm=norm, method=method, params=params)
    answer.append({q: {d: float(s) for d, s in docs.items()} for q, docs in fused.run.items()})
"""


def random_runs(seed: int, ties: bool, everything: bool = False) -> list[dict[str, dict[str, float]]]:
    """Three runs over 12 queries and 40 documents; scores are float32 numbers, many equal where `ties`."""
    rng = np.random.default_rng(seed)
    runs: list[dict[str, dict[str, float]]] = []
    for scale in (1, 30, 0.2):
        run = {}
        for query in range(12):
            count = 40 if everything else int(rng.integers(2, 30))
            scores = rng.integers(1, 6, count) if ties else rng.random(count)
            scores[0], scores[-1] = (9, 0) if ties else (1.5, -0.5)  # never all equal, where the two differ
            names = rng.permutation(40)[:count]
            run[f"q{query}"] = {f"d{n}": float(np.float32(s * scale)) for n, s in zip(names, scores, strict=True)}
        runs.append(run)
    return runs


def test_scores_are_those_of_ranx(ranx: Callable[[str, Any], Any]) -> None:
    asked: list[Any] = []
    ours: list[Run] = []
    weights = [0.2, 0.5, 0.3]
    for ties in (False, True):
        runs, whole = random_runs(3, ties), random_runs(4, ties, everything=True)
        given, all_documents = ([Run.from_dict(run) for run in some] for some in (runs, whole))
        ordered = [run.to_dict() for run in given]  # ranx ranks in the order it is given: trec_eval's, where scores tie
        for theirs, mine in (
            ((ordered, None, "rrf", None), fuse(given)),
            ((ordered, None, "rrf", {"k": 10}), fuse(given, k=10)),
            ((runs, "min-max", "wsum", {"weights": weights}), fuse(given, "weighted_sum", weights=weights)),
            *(
                (
                    (whole, norm, "wsum", {"weights": weights}),
                    fuse(all_documents, "weighted_sum", weights=weights, normalisation=normalisation),
                )
                for norm, normalisation in ((None, "none"), ("zmuv", "z_score"))
            ),
        ):
            asked.append(theirs)
            ours.append(mine)
    for fused, found in zip(ours, ranx(BY_RANX, asked), strict=True):
        assert fused.to_dict().keys() == found.keys()
        for query, documents in fused.to_dict().items():
            assert documents == pytest.approx(found[query], rel=1e-5, abs=1e-5)


def test_a_query_or_a_member_that_is_missing_leaves_the_others() -> None:
    one = Run.from_dict({"a": {"x": 2.0, "y": 1.0}, "b": {"x": 1.0}, "empty": {}})
    other = Run.from_dict({"c": {"z": 5.0}, "a": {"y": 9.0, "z": 3.0}})
    fused = fuse([one, other])
    assert fused.query_ids == ["a", "b", "empty", "c"]
    found = fused.to_dict()
    assert found["empty"] == {} and list(found["b"]) == ["x"] and list(found["c"]) == ["z"]
    assert found["a"] == pytest.approx({"y": 1 / 62 + 1 / 61, "x": 1 / 61, "z": 1 / 62})
    assert next(ids for _, ids, _ in fused) == ["y", "x", "z"]
    assert len(fuse([Run.from_dict({})])) == 0


@pytest.mark.parametrize(
    "settings", [{}, {"method": "weighted_sum"}, {"method": "weighted_sum", "normalisation": "z_score"}]
)
def test_one_member_keeps_its_order_and_two_equal_ones_too(settings: dict[str, Any]) -> None:
    run = Run.from_dict(random_runs(5, ties=False)[0])
    for members in ([run], [run, run]):
        assert [ids for _, ids, _ in fuse(members, **settings)] == [ids for _, ids, _ in run]
    doubled = fuse([run, run], **settings).to_dict()
    weighted = fuse([run], weights=[2], **settings).to_dict()
    assert all(doubled[query] == pytest.approx(weighted[query], abs=1e-6) for query in doubled)


@pytest.mark.parametrize("normalisation", ["min_max", "z_score", "none"])
def test_a_document_that_a_member_lacks_gains_nothing_by_it(normalisation: Any) -> None:
    settings: dict[str, Any] = {"normalisation": normalisation, "weights": [1.0, 1.0]}
    one = Run.from_dict({"q": {"both": 1.0, "lacking": 1.0, "other": 0.5}})
    # `both` is the lowest but one of the second run, below its mean and below 0.
    second = Run.from_dict({"q": {"top": 3.0, "high": 2.9, "both": -1.0, "last": -2.0}})
    found = fuse([one, second], "weighted_sum", **settings).to_dict()["q"]
    assert found["both"] > found["lacking"]
    if normalisation == "min_max":  # a member's only hit counts
        one, only = Run.from_dict({"q": {"x": 3.0, "y": 2.0, "z": 0.0}}), Run.from_dict({"q": {"y": 7.0}})
        assert fuse([one, only], "weighted_sum").to_dict()["q"] == pytest.approx({"y": 2 / 3 + 1, "x": 1.0, "z": 0.0})


def test_run_files_and_depth(tmp_path: Path) -> None:
    runs = [Run.from_dict(run) for run in random_runs(6, ties=True)]
    for number, run in enumerate(runs):
        write_trec(run, tmp_path / f"{number}.trec")
    fused = fuse([tmp_path / f"{number}.trec" for number in range(3)], depth=5, name="all")
    expected = fuse([run.first(5) for run in runs]).first(5)
    assert fused.to_dict() == expected.to_dict() and fused.name == "all" and np.diff(fused.offsets).max() == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to fuse"),
        ({"weights": [1.0]}, "1 weights for 2 rankings"),
        ({"weights": [1.0, -1.0]}, "not negative"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": [float("nan"), 1.0]}, "finite"),
        ({"normalisation": "min_max"}, "normalisation has no meaning with method: rrf"),
        ({"method": "weighted_sum", "k": 60}, "k has no meaning with method: weighted_sum"),
        ({"method": "borda"}, "rrf"),
        ({"k": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    runs = [Run.from_dict({"q": {"x": 1.0}})] * 2 if settings else []
    with pytest.raises(UsageError, match=message):
        fuse(runs, **settings)


# -- engines ----------------------------------------------------------------------------------------------------------


class Fixed:
    """An engine with given scores, [queries, documents]; a query is its row number; 0 is no hit."""

    def __init__(self, scores: np.ndarray, name: str = "fixed") -> None:
        self.scores, self.name, self.fingerprint, self.asked = scores, name, f"{name}{scores.sum()}", 0

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        self.asked = k
        found = [np.flatnonzero(self.scores[int(query)]) for query in queries]
        return [ranked(rows, self.scores[int(q)][rows], k) for q, rows in zip(queries, found, strict=True)]


class TwoSteps(Fixed):
    """The same with an encoder, which several engines may share."""

    def __init__(self, scores: np.ndarray, encoder: Any) -> None:
        super().__init__(scores)
        self.encoder, self.index = encoder, self

    def search(self, queries: Any, k: int) -> list[Hits]:
        return super().search([str(query) for query in queries], k)


class Encoder:
    calls = 0
    device = "cpu"

    def encode_queries(self, texts: Sequence[str]) -> list[int]:
        self.calls += 1
        return [int(text) for text in texts]


def test_engines_fuse_as_runs_do_ties_by_row() -> None:
    rng = np.random.default_rng(7)
    scores = [rng.integers(0, 4, (6, 30)).astype(np.float32) for _ in range(2)]
    scores[0][2] = 0  # a query one member has no hit for
    scores[0][3] = scores[1][3] = 0
    encoder = Encoder()
    engine = FusedEngine({"a": Fixed(scores[0]), "b": TwoSteps(scores[1], encoder), "c": TwoSteps(scores[1], encoder)})
    found = engine.search([str(query) for query in range(6)], 8)
    assert encoder.calls == 1
    for query, hits in enumerate(found):
        total: dict[int, float] = {}
        for member in (scores[0], scores[1], scores[1]):
            for rank, row in enumerate(ranked(np.flatnonzero(member[query]), member[query][member[query] > 0], 8).rows):
                total[int(row)] = total.get(int(row), 0) + 1 / (61 + rank)
        expected = sorted(total, key=lambda row: (-np.float32(total[row]), row))[:8]
        assert hits.rows.tolist() == expected
        assert hits.scores == pytest.approx([total[row] for row in expected])
    assert len(found[3].rows) == len(no_hits().rows)
    deeper = FusedEngine(engine.members, Fusion(), depth=20)
    deeper.search(["0"], 8)
    assert engine.members["a"].asked == 20  # type: ignore[attr-defined]
    assert deeper.fingerprint != engine.fingerprint != FusedEngine(engine.members, Fusion(k=1)).fingerprint


# -- suites -----------------------------------------------------------------------------------------------------------


def test_the_shipped_suite_fuses_what_a_run_has() -> None:
    suite = load_suite("hybrid")
    rows = {name: EngineSystem(Fixed(np.ones((1, 3), np.float32), name), bytes=8) for name in ("BM25", "student")}
    made = fused_rows(suite.fusion, rows, pytest.fail)
    assert list(made) == ["BM25 + student", "BM25 + student (scores)"]
    assert made["BM25 + student"].bytes == 16
    assert made["BM25 + student"].note == "reciprocal rank fusion (k = 60) of BM25, student"
    rows["first stage: m"] = rows.pop("student")
    rows["student, distilled"] = EngineSystem(Fixed(np.ones((1, 3), np.float32)))
    assert len(fused_rows(suite.fusion, rows, pytest.fail)) == len(suite.fusion)


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ("[{name: x, members: [bm25]}]", "at least 2"),
        ("[{name: x, members: [bm25, bm25]}]", "named twice"),
        ("[{name: x, members: [bm25, student], weights: [1]}]", "1 weights for 2 members"),
        ("[{name: x, members: [a, b], weigths: [1, 2]}]", "unknown key 'weigths'.*did you mean 'weights'"),
        ("[{name: x, members: [a, b]}, {name: x, members: [a, c]}]", "two fused rows have the same name"),
        ("[{name: x, members: [a, b], method: rff}]", "rrf"),
    ],
)
def test_a_wrong_fusion_in_a_suite_is_named(tmp_path: Path, fusion: str, message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(f"name: x\nsets: [{{name: a}}]\nfusion: {fusion}")
    with pytest.raises(UsageError, match=f"(?s){message}"):
        load_suite(path)


@pytest.mark.parametrize(
    ("name", "members", "message"),
    [
        ("x", ["bm25", "studnet"], "(?s)'studnet' is neither a row.*did you mean 'student'"),
        ("x", ["student", "student, distilled"], "two members are the same row"),
        ("x", ["bm25", "teacher"], "the row 'teacher' is no search"),
        ("BM25", ["bm25", "flat"], "there is a row of this name"),
        ("x", ["bm25", "flat"], ""),
    ],
)
def test_members_that_cannot_be_fused_are_named(name: str, members: list[str], message: str) -> None:
    system = EngineSystem(Fixed(np.ones((1, 3), np.float32)))
    teacher = RerankSystem(lambda lists: [], Run.from_dict({}), 3)
    rows = {"BM25": system, "student, distilled": system, "student, flat": system, "teacher": teacher}
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        fused = fused_rows([FusedRow(name=name, members=members)], rows, pytest.fail)
    assert message or list(fused["x"].engine.members) == ["BM25", "student, flat"]
