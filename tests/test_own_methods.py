"""Methods of a package that a user wrote and installed: named by place or by entry point, held to the same checks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankdistill import recipe
from rankdistill.collections import open_collection
from rankdistill.errors import UsageError
from rankdistill.indexes.sparse import build_sparse_index, open_sparse_index, searched_here
from rankdistill.indexes.sparse_vectors import encode_document_terms
from rankdistill.indexes.specification import any_specification
from rankdistill.recipe import build, json_schema, load_recipe, method_names, shipped_type
from rankdistill.stages import Workspace
from rankdistill.students.provenance import with_revisions

EXAMPLE = Path(__file__).parent / "example_package"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example package on the path as pip leaves it there; gone afterwards."""
    place = tmp_path / "site"
    shutil.copytree(EXAMPLE, place)
    monkeypatch.syspath_prepend(str(place))
    forget()
    yield place
    monkeypatch.undo()
    for name in [one for one in sys.modules if one.partition(".")[0] == "acme"]:
        del sys.modules[name]
    forget()


def forget() -> None:
    method_names.cache_clear()
    recipe._registered.cache_clear()


@pytest.mark.parametrize("name", ["acme.methods:HuberMargins", "huber_margins"])
def test_a_loss_is_named_by_its_place_or_its_entry_point(name: str) -> None:
    loss = build("loss", {"type": name, "knee": 2})
    scores, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    total, count = loss.terms(scores, teacher, torch.tensor([[1, 0]]), mask)
    assert (total.item(), count.item()) == (2.0, 2)  # ½ (3 − 1)², of two documents
    for key, words in (("kneee", "did you mean 'knee'?"), ("knee", "number")):
        with pytest.raises(UsageError) as caught:
            build("loss", {"type": name, key: "deep"})
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acme.methods:HuberMarginz", "AttributeError"),
        ("acme.nowhere:HuberMargins", "No module named 'acme.nowhere'"),
        (":HuberMargins", "cannot be used as a loss"),
        ("acme.methods:", "cannot be used as a loss"),
        ("acme.methods:LEARNING_RATE", "is no loss"),
        ("acme.methods:SharedWords", "is no loss"),
        ("acme.methods:Unnamed", "no name of its own"),
        ("acme.methods:Unfinished", "lacks terms"),
        ("acme.methods:Untyped", "cannot be used as a loss"),
        ("rankdistill.losses.margin_mse:MarginMSE", "would be taken for margin_mse"),
        ("hubber_margins", "did you mean 'huber_margins'?"),
    ],
)
def test_what_is_no_loss_is_refused_with_words(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        build("loss", {"type": name})
    assert words in str(caught.value)


def test_a_taken_name_is_refused(installed: Path) -> None:
    (installed / "acme-1.0.dist-info" / "entry_points.txt").write_text("[rankdistill.loss]\nkl = acme.methods:Kl\n")
    forget()
    with pytest.raises(UsageError, match=r"acme\.methods:Kl is registered as the loss 'kl', which is rankdistill\."):
        build("loss", {"type": "margin_mse"})


def test_the_schema_has_them() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema())
    for loss, right in (
        ({"type": "huber_margins", "knee": 2.0}, True),
        ({"type": "huber_margins", "kneee": 2.0}, False),
        ({"type": "acme.methods:HuberMargins", "knee": 2.0}, True),
    ):
        values = {"collection": "beir:x", "student": {"type": "dense"}, "training": {"losses": [loss]}}
        assert (not list(check.iter_errors(values))) == right, loss


def test_the_code_of_a_method_is_in_a_students_fingerprint(installed: Path) -> None:
    before = [with_revisions({"type": name}) for name in ("huber_margins", "acme.methods:HuberMargins")]
    assert before[0]["code"] == before[1]["code"] and with_revisions({"type": "kl"}) == {"type": "kl"}
    with open(installed / "acme" / "methods.py", "a") as stream:
        stream.write("LEARNING_RATE = 0.2\n")
    assert with_revisions({"type": "huber_margins"})["code"] != before[0]["code"]


def test_a_run_of_methods_of_ones_own(
    tmp_path: Path, tiny_recipe: Callable[..., dict[str, Any]], tiny_encoder: Path
) -> None:
    values = tiny_recipe(
        candidates={"sources": [{"type": "acme.methods:PlainBM25", "k1": 1.2, "quota": 6}]},
        teacher={"type": "shared_words", "gain": 2.0},
        student={"type": "small_static", "model": str(tiny_encoder), "dimension": 4},
        training={"losses": [{"type": "acme.methods:HuberMargins"}], "steps": 2, "checkpoints": 1},
        indexes=[],
    )
    made = load_recipe(values)
    assert load_recipe(made.resolved()) == made and made.student_kind == "static"
    assert shipped_type("student", "dense") == "dense"
    workspace = Workspace(tmp_path / "run", made, tmp_path / "store")
    workspace.run("train")
    student = workspace.student()
    assert student.dimension == 4
    query_id, _, scores, _ = workspace.score()[0]
    assert query_id.startswith("q-") and set(np.unique(scores) % 2) == {0}
    hits = workspace.engine().search(["which metal rusts in water"], 3)[0]
    assert len(hits.rows) == 3


def test_an_index_of_ones_own(tmp_path: Path, tiny_beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "indexes"))
    from sparse_encoders import WordCounts

    collection, encoder = open_collection(f"beir:{tiny_beir}"), WordCounts()
    encoder.terms[:3] = ["metal", "is", "that"]
    vectors = encode_document_terms(encoder, collection, tmp_path / "vectors")
    texts = collection.document_texts(range(collection.document_count))
    rounded = np.floor(encoder.encode_queries(texts).toarray() / 0.25) * 0.25
    query = encoder.encode_queries(["that metal"])
    expected = rounded @ query.toarray()[0]
    for name in ("scan", "acme.scan:ScanSpecification"):
        specification = any_specification({"type": name, "name": "mine", "step": 0.25})
        assert searched_here(specification)
        built = build_sparse_index(encoder, collection, vectors, specification, tmp_path / "index")
        again = open_sparse_index(built.path)
        assert again.specification == specification
        (hits,) = again.search(query, 5)
        np.testing.assert_allclose(hits.scores, np.sort(expected[expected > 0])[::-1][:5], rtol=1e-5)
    with pytest.raises(UsageError, match="did you mean 'step'"):
        any_specification({"type": "scan", "name": "mine", "stepp": 2})
    with pytest.raises(UsageError, match="is no index"):
        any_specification({"type": "acme.methods:HuberMargins", "name": "mine"})


def test_recipes_methods_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    from rankdistill.cli.main import recipes_methods

    recipes_methods("loss")
    assert "huber_margins" in (listed := capsys.readouterr().out) and "margin_mse" in listed
    recipes_methods("loss", "acme.methods:HuberMargins")
    assert "knee (1.0): margin error from which on" in capsys.readouterr().out
    recipes_methods("source", "acme.methods:PlainBM25")  # its constructor passes on what all sources take
    assert "rank_from (1): first rank taken" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean 'loss'"):
        recipes_methods("los")
