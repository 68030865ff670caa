"""What people write: YAML of plain values, and names that become files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankdistill.errors import UsageError
from rankdistill.plain import escaped, file_name, parse_yaml, path_name, read_yaml, shown, shown_lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5, true, null]", {"a": 1, "b": ["x", 2.5, True, None]}),
        ("day: 2024-01-31", {"day": "2024-01-31"}),
        ("a: {b: {}}", {"a": {"b": {}}}),
        ("a: =", {"a": "="}),
        ("", None),
    ],
)
def test_plain_values_are_read(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("&a [*a]", "aliases"),
        ("[" * 3000, "inside each other"),
        ("{a: " * 500, "inside each other"),
        ("m: !!binary /w==", "tags"),
        ("m: !!set {a, b}", "tags"),
        ("m: !!python/object/apply:os.system ['true']", "tags"),
        ("a: .nan", "no number"),
        ("a: -.inf", "no number"),
        (f"a: {'9' * 5000}", "no number"),
        ("a: 18446744073709551616", "no number"),
        ("1: a", "not text"),
        ("? [a]\n: b", "not text"),
        ("a: 1\nb: 2\na: 3", "'a' stands there twice"),
        ("a: '\ud800'", "UTF-8"),
        ("a: \x00", "not valid YAML"),
        ("{a: [", "line 1, column 6"),
        ("a: 1\nb: c: d", "line 2, column 5"),
    ],
)
def test_what_is_more_than_plain_is_refused_with_words(text: str, words: str) -> None:
    with pytest.raises(UsageError, match="not valid YAML") as caught:
        parse_yaml(text, "here")
    assert words in str(caught.value) and "here" in str(caught.value) and caught.value.fix
    assert len(str(caught.value)) < 600


def test_a_file_of_megabytes_is_no_file_of_settings(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text("a: 1\n" + "#" * (1 << 20))
    with pytest.raises(UsageError, match="more than 1 MB"):
        read_yaml(tmp_path / "large.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path)


UNSAFE = ["", ".", "..", "a/b", "../up", "/abs", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\u202eexe", " a", "a ", "x" * 201,
          ".hidden", "end.", "con", "NUL.txt", "\ud800"]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_would_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        path_name(name)
    assert path_name(file_name(name)) == file_name(name)


@pytest.mark.parametrize("name", ["a", "two words", "größe", "BM25 + student (scores)", "v1.2-b_3", "日本", "x" * 200])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert path_name(name) == file_name(name) == name


def test_foreign_text_is_shown_without_control_characters() -> None:
    assert shown("a\x1b]0;title\x07b\x9bc\u202ed") == "a\ufffd]0;title\ufffdb\ufffdc\ufffdd"
    assert shown("x" * 100, 10) == "x" * 9 + "…" and shown("größe 日本") == "größe 日本"


def test_foreign_text_is_shown_without_commands_to_the_terminal() -> None:
    assert shown_lines("a\x1b]0;x\x07\nb\u202ec") == "a\ufffd]0;x\ufffd\nb\ufffdc"
    values = ["\x9b2J", "\u200f é", "\x1b"]
    text = escaped(json.dumps(values, ensure_ascii=False))
    assert json.loads(text) == values and text.isprintable()
