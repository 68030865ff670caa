from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rankdistill.errors import RankdistillError
from rankdistill.teachers.llm.answers import REPAIRS, identifier_logits, read_answer, read_logits, read_text
from rankdistill.teachers.llm.base import Answer
from rankdistill.teachers.llm.prompts import load_prompt

NUMBERS, LETTERS = load_prompt("listwise"), load_prompt("listwise_letters")


def numbers(text: str, count: int = 4, **options: object) -> tuple[list[int], dict[str, int]]:
    """(passages by number, best first; repairs)"""
    reading = read_text(text, NUMBERS.names(count), NUMBERS, **options)  # type: ignore[arg-type]
    return [place + 1 for place in reading.order], dict(reading.repairs)


def letters(text: str, count: int = 4, **options: object) -> tuple[str, dict[str, int]]:
    reading = read_text(text, LETTERS.names(count), LETTERS, **options)  # type: ignore[arg-type]
    return "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place] for place in reading.order), dict(reading.repairs)


KEPT = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "order", "repairs"),
    [
        ("[2] > [4] > [1] > [3]", [2, 4, 1, 3], {}),
        ("\n [2]>[4] >[1]> [3] ", [2, 4, 1, 3], {}),
        ("[2], [4], [1], [3]", [2, 4, 1, 3], {"form": 1}),
        ("[2] > [4]", [2, 4, 1, 3], {"form": 1, "missing": 2}),
        ("[2] > [2] > [4] > [1] > [3]", [2, 4, 1, 3], {"form": 1, "repeated": 1}),
        ("[2] > [9] > [4] > [0] > [1] > [3]", [2, 4, 1, 3], {"form": 1, "out_of_range": 2}),
        ("[2] > [4] > [1] > [3] > [9999999999999999999999]", [2, 4, 1, 3], {"form": 1, "out_of_range": 1}),
        ("Passage [2] is best, then [04].", [2, 4, 1, 3], {"other_text": 1, "missing": 2}),
        ("[2] > [4] > [1", [2, 4, 1, 3], {"cut": 1, "other_text": 1, "missing": 2}),
        ("", KEPT, {"empty": 1, "missing": 4}),
        ("  \n", KEPT, {"empty": 1, "missing": 4}),
        ("2 > 4 > 1 > 3", [2, 4, 1, 3], {"bare": 1}),
        ("```\n4,3,2,1.\n```", [4, 3, 2, 1], {"bare": 1}),
        ("[3, 1]", [3, 1, 2, 4], {"bare": 1, "missing": 2}),
        ("I cannot rank 3 of these 4 passages.", KEPT, {"no_identifier": 1, "missing": 4}),
        ("Ich kann das nicht: 2 von 4.", KEPT, {"no_identifier": 1, "missing": 4}),
        ("对不起，我不能。", KEPT, {"no_identifier": 1, "missing": 4}),
        ("【2】 > ［4］ > [ 1 ] > [٣]", [2, 4, 1, 3], {"form": 1}),
        ("<think>[1] > [2]?</think>[2] > [4] > [1] > [3]", [2, 4, 1, 3], {"reasoning": 1}),
        ("[1] first. </think> no </think>[2] > [4] > [1] > [3]", [2, 4, 1, 3], {"reasoning": 1}),
        ("<think>is [4] better than [2]", KEPT, {"endless_reasoning": 1, "empty": 1, "missing": 4}),
    ],
)
def test_stated_rules(text: str, order: list[int], repairs: dict[str, int]) -> None:
    assert numbers(text, finished="cut" not in repairs) == (order, repairs)
    assert set(repairs) <= set(REPAIRS)


@pytest.mark.parametrize(
    ("text", "order", "repairs"),
    [
        ("[C] > [A] > [D] > [B]", "CADB", {}),
        ("[c] > [a] > [d] > [b]", "CADB", {"form": 1}),
        ("C > A > D > B", "CADB", {"bare": 1}),
        ("Sorry", "ABCD", {"no_identifier": 1, "missing": 4}),
        ("A good answer is hard to find: C", "ABCD", {"no_identifier": 1, "missing": 4}),
        ("I do not know", "ABCD", {"no_identifier": 1, "missing": 4}),
        ("a b", "ABCD", {"no_identifier": 1, "missing": 4}),
        ("D", "DABC", {"bare": 1, "missing": 3}),
        ("[D] > [Z] > [DA]", "DABC", {"other_text": 1, "out_of_range": 1, "missing": 3}),
    ],
)
def test_letters_are_not_read_out_of_prose(text: str, order: str, repairs: dict[str, int]) -> None:
    assert letters(text) == (order, repairs)


@pytest.mark.parametrize("text", ["[2] > [1] > [3]", "2] > [1] > [3]"])
def test_an_answer_that_was_begun_for_the_model_reads_alike(text: str) -> None:
    """Engines may repeat the "[" they were given, or not."""
    assert numbers(text, 3, before="[") == ([2, 1, 3], {})


def test_two_passages_and_bare_words() -> None:
    pair, yes_no = load_prompt("pairwise"), load_prompt("pointwise")
    assert read_text("B", ("A", "B"), pair).order == (1, 0)
    assert read_text("Both are good.", ("A", "B"), pair).repairs == {"no_identifier": 1, "missing": 2}
    assert read_text("no", ("yes", "no"), yes_no).order == (1, 0)
    assert read_text("Not really", ("yes", "no"), yes_no).order == (0, 1)


def test_an_endless_answer_is_read_in_time() -> None:
    began = time.process_time()
    for text in (
        "[1] > " * 200_000,
        "word " * 200_000,
        "[" * 500_000,
        "1 " * 300_000,
        "<think>" * 100_000,
        "9" * 10**6,
    ):
        order, repairs = numbers(text, 20, finished=False)
        assert sorted(order) == list(range(1, 21)) and repairs["cut"] == 1
    assert time.process_time() - began < 10


# -- the answers of real models ----------------------------------------------------------------------------------------


def responses(shared_data: Path, name: str) -> list[tuple[int, str]]:
    lines = (shared_data / "msmarco-dl19" / "listwise-responses" / name).read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        record = json.loads(line)
        found.append((int(re.findall(r"(\d+) passages", record["prompt"])[0]), record["response"]))
    return found


def test_the_clean_answers_of_rankvicuna_are_read_exactly(shared_data: Path) -> None:
    answers = responses(shared_data, "rank-vicuna-7b.tas-b.top20.jsonl")
    assert len(answers) == 43
    for count, text in answers:
        expected = [int(piece.strip("[] ")) for piece in text.split(" > ")]  # nothing but the form they have
        assert numbers(text, count) == (expected, {})


def test_the_broken_answers_of_vicuna_are_repaired_and_counted(shared_data: Path) -> None:
    answers = responses(shared_data, "vicuna-13b.bm25.jsonl")
    repairs: Counter[str] = Counter()
    changed = []
    for count, text in answers:
        order, found = numbers(text, count)
        assert sorted(order) == list(range(1, count + 1)) and found
        repairs.update(found)
        if "no_identifier" not in found:
            changed.append((text, order, found))
        else:
            assert order == list(range(1, count + 1))  # "20 passages ..." names no passage
    assert len(answers) == 387
    assert repairs["no_identifier"] == 387 - len(changed) > 380
    # Every identifier that is in brackets counts, and every passage that is not named is counted as missing.
    named = sum(len(set(re.findall(r"\[(\d+)\]", text))) for text, _, _ in changed)
    assert repairs["missing"] == sum(count for count, _ in answers) - named
    for text, order, found in changed:
        first = list(dict.fromkeys(int(number) for number in re.findall(r"\[(\d+)\]", text)))
        assert order[: len(first)] == first
        assert found["missing"] == len(order) - len(first)


# -- any answer --------------------------------------------------------------------------------------------------------

WORDS = """
    [1] [20] [21] [0] [-1] [A] [T] > <think> </think> １ ［ 】 ٣ Sorry passages [[ ]] ² ½ [²] Ⅳ [Ⅳ] 😀 ß [ß] 99999999999
"""
PIECES = [
    *"[]<>() ,.;:|\n\t*-0123456789ABCDabcd", *WORDS.split(), "> ", " > ", "\x00", "\ud800", "\u200b", "\u2028"
]  # fmt: skip


def mutated(text: str, random_: random.Random) -> str:
    pieces = re.findall(r"\[\w+\]|.", text, re.DOTALL)
    for _ in range(random_.randint(1, 12)):
        at = random_.randint(0, len(pieces))
        kind = random_.randrange(5)
        if kind == 0:
            pieces[at:at] = [random_.choice(PIECES)]
        elif kind == 1:
            del pieces[at : at + random_.randint(1, 8)]
        elif kind == 2 and pieces:
            pieces[at:at] = [random_.choice(pieces)] * random_.randint(1, 3)
        elif kind == 3:
            random_.shuffle(pieces)
        elif pieces:
            pieces[min(at, len(pieces) - 1)] = random_.choice(PIECES)
    return "".join(pieces)


def test_mutated_answers_never_raise_lose_or_double_a_document() -> None:
    """12,000 of them; each is clean by the template's rule, or has a repair that says why not."""
    random_ = random.Random(6)
    clean = 0
    seen: Counter[str] = Counter()
    for number in range(12_000):
        prompt = (NUMBERS, LETTERS)[number % 2]
        count = random_.choice([1, 2, 5, 20])
        names = prompt.names(count)
        whole = prompt.separator.join(f"[{name}]" for name in random_.sample(names, count))
        text = mutated(whole, random_) if number % 50 else whole
        before, finished = random_.choice(["", "["]), random_.random() < 0.9
        reading = read_text(text, names, prompt, before=before, finished=finished)
        assert sorted(reading.order) == list(range(count)), text
        assert set(reading.repairs) <= set(REPAIRS) and all(value > 0 for value in reading.repairs.values())
        seen.update(reading.repairs.keys())
        if not reading.repairs:
            clean += 1
            assert prompt.is_whole(text, names) or prompt.is_whole(before + text, names), text
            places = [names.index(name) for name in re.findall(r"\w+", text)]
            assert list(reading.order) == places
    assert clean >= 240  # those that were not mutated
    assert set(seen) == set(REPAIRS) - {"absent"}  # the fuzz reaches every kind


# -- one step's logits -------------------------------------------------------------------------------------------------


def test_the_order_of_logits() -> None:
    names = tuple("ABCDE")
    reading = read_logits({"B": 2.0, "A": -1.0, "E": 3.5, "D": 0.0, "C": 1.0}, names)
    assert reading.order == (4, 1, 2, 3, 0) and reading.repairs == {}
    assert reading.logits is not None
    np.testing.assert_array_equal(reading.logits, [-1.0, 2.0, 1.0, 0.0, 3.5])
    absent = read_logits({"D": -9.0, "B": float("nan"), "X": 8.0, "A": -np.inf}, names)
    # Absent ones last in the order shown, after even a logit of minus infinity; they are counted.
    assert absent.order == (3, 0, 1, 2, 4) and absent.repairs == {"absent": 3}
    assert read_logits({}, names).order == (0, 1, 2, 3, 4)
    assert read_logits(dict.fromkeys("ECA", 1.0), names).order == (0, 2, 4, 1, 3)  # ties as shown


def test_first_needs_logits() -> None:
    request = LETTERS.render("q", ["x", "y", "z"], decoding="first")
    assert read_answer(Answer("C", {"C": 1.0, "A": 0.5, "B": 0.0}), request, LETTERS).order == (2, 0, 1)
    with pytest.raises(RankdistillError, match="no logits"):
        read_answer(Answer("C"), request, LETTERS)


def test_of_two_tokens_that_spell_one_identifier_the_larger_counts() -> None:
    tokens = [("A", 1.0), ("▁A", 2.5), (" A", 2.0), ("B", -1.0), ("AB", 9.0), ("a", 9.0), ("C", np.nan), ("Z", 3.0)]
    assert identifier_logits(tokens, tuple("ABC")) == {"A": 2.5, "B": -1.0}
