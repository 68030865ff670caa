"""Recipes: what is wrong is named with the nearest right word, and what is resolved reproduces the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankdistill.errors import UsageError
from rankdistill.recipe import (
    KINDS,
    find_declaration,
    json_schema,
    load_recipe,
    merge,
    method_class,
    method_names,
    parameters_model,
    shipped,
)

SMALL: dict[str, Any] = {
    "collection": "beir:facts",
    "teacher": {"type": "cross_encoder", "model": "m", "train": {"steps": 4}},
    "student": {"type": "dense", "layers": [0]},
    "training": {"losses": [{"type": "margin_mse"}, {"type": "kl", "weight": 0.5}], "steps": 10},
    "baselines": {"labels": {"training": {"losses": [{"type": "infonce"}]}}},
}


@pytest.mark.parametrize("name", sorted(shipped("configs")))
def test_every_shipped_recipe_is_right(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    recipe = load_recipe(name)
    assert recipe.description and recipe.name == name
    for baseline, changes in recipe.baselines.items():
        # What a baseline does not name is the recipe's own.
        assert (recipe.baseline(baseline).student == recipe.student) == ("student" not in changes)
    assert load_recipe(recipe.resolved()) == recipe
    jsonschema.validate(yaml.safe_load(shipped("configs")[name].read_text()), json_schema())


def test_a_resolved_recipe_has_every_default_and_is_the_same_again() -> None:
    recipe = load_recipe(SMALL)
    resolved = recipe.resolved()
    assert (
        resolved["student"]["query_length"] == 32 and resolved["training"]["losses"][0]["pairs"] == "positive_vs_rest"
    )
    assert resolved["teacher"]["train"]["steps"] == 4 and resolved["teacher"]["train"]["negatives"] > 0
    again = load_recipe(yaml.safe_load(yaml.safe_dump(resolved)))
    assert again == recipe and again.resolved() == resolved
    json.dumps(resolved)


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"colection": "x"}, "colection", "did you mean 'collection'?"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat", "did you mean 'learning_rate'?"),
        ({"candidates": {"dept": 1}}, "candidates.dept", "did you mean 'depth'?"),
        ({"student": {"type": "dense", "pooling_mode": "cls"}}, "student: pooling_mode", "did you mean 'pooling'?"),
        ({"training": {"losses": [{"type": "kl", "temprature": 2}]}}, "losses.0: temprature", "'temperature'"),
        ({"teacher": {"type": "cross_encoder", "model": "m", "train": {"stepz": 4}}}, "train.stepz", "'steps'"),
        ({"student": {"type": "densse"}}, "student.type", "did you mean 'dense'?"),
        ({"training": {"losses": [{"type": "margin_msee"}]}}, "losses.0.type", "did you mean 'margin_mse'?"),
        (
            {"teacher": {"type": "listwise", "backend": {"type": "vllm", "model": "m"}}},
            "backend.type",
            "type: openai with the base_url of a running `vllm serve`",
        ),
        ({"baselines": {"labels": {"training": {"lossses": []}}}}, "baselines.labels: training.lossses", "'losses'"),
    ],
)
def test_an_unknown_word_is_answered_with_the_nearest(changes: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe({**SMALL, **changes})
    assert where in (caught.value.where or "") and words in (caught.value.fix or ""), str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": "soon"}, "seed"),
        ({"training": {"steps": -1}}, "steps"),
        ({"training": {"losses": []}}, "losses"),
        ({"training": {"precision": "fp8"}}, "precision"),
        ({"student": {"type": "dense", "query_length": "long"}}, "query_length"),
        ({"student": {"layers": [0]}}, "student"),
        ({"teacher": {"model": "m"}}, "teacher"),
        ({"collection": None}, "collection"),
        ({"seed": -1}, "seed"),
        ({"student": {"type": "dense", "query_length": -3}}, "query_length: .*greater than or equal to 3"),
        ({"student": {"type": "static", "document_length": 1}}, "document_length"),
        ({"student": {"type": "dense", "dropout": 1}}, "dropout"),
        ({"student": {"type": "dense", "scale": 0}}, "scale"),
        ({"teacher": {"type": "cross_encoder", "model": "m", "max_length": 1}}, "max_length"),
        ({"teacher": {"type": "listwise", "backend": {"type": "openai", "model": "m"}, "window": 1}}, "window"),
        ({"candidates": {"sources": [{"type": "bm25", "k1": "nan"}]}}, "k1: .*finite"),
        ({"candidates": {"sources": [{"type": "bm25", "b": 2}]}}, "b: "),
        ({"candidates": {"sources": [{"type": "bm25", "quota": -5}]}}, "quota"),
        ({"training": {"batches": {"type": "random_batches", "size": 0}}}, "size"),
        ({"seed": 1 << 32}, "seed"),
        ({"name": "../../elsewhere"}, "name: .* would be a path"),
        ({"name": ""}, "name: "),
        ({"baselines": {"../../m": {}}}, "baselines.*would be a path"),
        ({"baselines": {"": {}}}, "baselines"),
        ({"baselines": {"student": {}}}, "what the recipe's own student is called"),
        ({"training": {"learning_rate": float("inf")}}, "learning_rate: .*finite"),
        ({"training": {"epochs": "nan"}}, "epochs: .*finite"),
        ({"student": {"type": "dense", "scale": float("nan")}}, "scale: .*finite"),
        ({"student": {"type": ["dense"]}}, "student.type: .*string"),
        ({"student": {"type": "dense", "dropout": "nan"}}, "dropout: .*finite"),
        ({"training": {"losses": [{"type": "kl", "weight": {"end": "nan"}}]}}, "finite"),
        ({"student": {"type": "dense", "scale": "1e39"}}, "scale: float32 cannot hold 1e\\+39"),
        ({"training": {"losses": [{"type": "kl", "weight": {"end": 1e300}}]}}, "weight.end: float32 cannot hold"),
        ({"training": {"losses": [{"type": "kl", "temperature": 1e-46}]}}, "temperature: float32 cannot hold"),
        ({"training": {"max_gradient_norm": 1e200}}, "max_gradient_norm: float32 cannot hold"),
        ({"teacher": {"type": "bi_encoder", "model": "x", "scale": -1e39}}, "scale"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe({**SMALL, **changes})


def test_overrides_reach_everything_and_change_nothing_that_was_given() -> None:
    before = json.dumps(SMALL)
    recipe = load_recipe(
        SMALL,
        [
            "seed=7",
            "name=two words",
            "training.learning_rate=1.0e-4",
            "training.losses.1.weight=0.25",
            "training.losses.0={type: infonce, temperature: 0.1}",
            "student.layers=[0, 2]",
            "student.query_prompt='query: '",
            "teacher.train.steps=9",
            "baselines.labels.training.steps=3",
            "indexes=[flat, ivf_pq]",
            "evaluation.depth=20",
            "candidates.margin=null",
        ],
    )
    assert (recipe.seed, recipe.name, recipe.training.learning_rate) == (7, "two words", 1e-4)
    losses = [loss.settings() for loss in recipe.training.losses]
    assert (losses[0]["type"], losses[0]["temperature"], losses[1]["weight"]) == ("infonce", 0.1, 0.25)
    student = recipe.student.settings()
    assert student["layers"] == [0, 2] and student["query_prompt"] == "query: "
    assert recipe.teacher is not None and recipe.teacher.settings()["train"]["steps"] == 9
    assert recipe.baseline("labels").training.steps == 3 and recipe.training.steps == 10
    assert recipe.indexes == ["flat", "ivf_pq"] and recipe.evaluation.depth == 20
    assert json.dumps(SMALL) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key=value"),
        ("=3", "key=value"),
        ("sed=3", "did you mean 'seed'"),
        ("training.losses.5.weight=1", "'5' is not one of the 2 entries"),
        ("training.losses.first.weight=1", "'first' is not one of the 2 entries"),
        ("collection.name=x", "'collection' holds a value, not keys"),
        ("training.losses.².weight=1", "'²' is not one of the 2 entries"),
        (f"seed={'9' * 5000}", "no number"),
        (f"name={'[' * 3000}", "inside each other"),
        ("student.model=&a [*a]", "aliases"),
        ("student.model=!!binary /w==", "tags"),
        ("student.scale=.nan", "no number"),
        (f"student{'.x' * 3000}=1", "there is no such key"),
        ("student.layers=[0", "layers: .*list"),
    ],
)
def test_a_wrong_override_is_named(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe(SMALL, [override])


def test_a_baseline_is_the_recipe_with_its_changes() -> None:
    recipe = load_recipe(
        {
            **SMALL,
            "baselines": {
                "labels": {"training": {"losses": [{"type": "infonce"}]}},
                "table": {"student": {"type": "static"}},
                "wide": {"student": {"layers": [0, 1]}},
            },
        }
    )
    labels = recipe.baseline("labels")
    assert [loss.type for loss in labels.training.losses] == ["infonce"]
    assert labels.training.steps == 10 and labels.student == recipe.student and labels.baselines == {}
    table = recipe.baseline("table").student.settings()
    assert table["type"] == "static" and "layers" not in table  # another type: none of the old one's keys
    assert recipe.baseline("wide").student.settings()["layers"] == [0, 1]


def test_merging_replaces_lists_and_other_types_whole() -> None:
    base = {"a": {"type": "x", "p": 1, "q": 2}, "l": [1, 2], "k": {"m": 1}}
    assert merge(base, {"a": {"p": 9}, "k": {"n": 2}}) == {
        "a": {"type": "x", "p": 9, "q": 2}, "l": [1, 2], "k": {"m": 1, "n": 2},
    }  # fmt: skip
    assert merge(base, {"a": {"type": "y"}, "l": [3]})["a"] == {"type": "y"}
    assert merge(base, {"l": [3]})["l"] == [3]
    assert base == {"a": {"type": "x", "p": 1, "q": 2}, "l": [1, 2], "k": {"m": 1}}


# -- methods ----------------------------------------------------------------------------------------------------------

METHODS = [(kind, name) for kind in KINDS for name in method_names(kind)]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_every_method_is_found_and_each_of_its_keys_is_explained(kind: str, name: str) -> None:
    cls = method_class(kind, name)
    assert cls.type == name
    for key, field in parameters_model(cls).model_fields.items():
        assert field.description, f"{cls.__name__} does not explain {key}"


def test_the_schema_is_json_schema_and_holds_every_method() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for kind, name in METHODS:
        assert schema["$defs"][f"{kind}.{name}"]["properties"]["type"]["const"] == name
    check = jsonschema.Draft202012Validator(schema)
    assert not list(check.iter_errors(SMALL))
    assert not list(check.iter_errors(load_recipe(SMALL).resolved()))
    for wrong in (
        {"sed": 1},
        {"student": {"type": "densse"}},
        {"student": {"type": "dense", "layer": 1}},
        {"training": {"losses": [{"type": "kl", "tau": 1}]}},
        {"candidates": {"sources": [{"type": "bm25", "quotas": 1}]}},
    ):
        assert list(check.iter_errors({**SMALL, **wrong})), wrong


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_a_file_or_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml").collection == "beir:facts"
    by_name = find_declaration("configs", "margin_mse")
    assert by_name == find_declaration("configs", "configs/margin_mse.yaml") and by_name.is_file()
    with pytest.raises(UsageError, match="did you mean 'margin_mse'"):
        load_recipe("margin_msee")
    with pytest.raises(UsageError, match="no file and no shipped"):
        load_recipe("elsewhere/margin_mse.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- a\n- b\n", "keys and values"),
        (b"", "keys and values"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
