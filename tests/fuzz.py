"""A fuzz: whatever is fed to what reads foreign input, it is taken or refused with words, and nothing else happens.

    python -m tests.fuzz --minutes 30             # all targets in turns, new seeds each time
    python -m tests.fuzz --only recipe --seed 7   # what a failure printed, again

A target takes a `random.Random` and a folder of its own, makes one input and feeds it. It may raise `RankdistillError`
(that is a refusal); any other exception is a fault. Targets lie here and in `fuzz_*.py` beside this file, each
registered by `@target`; `test_fuzz.py` runs each for a second or two.
"""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from rankdistill.errors import RankdistillError

Target = Callable[[random.Random, Path], object]
TARGETS: dict[str, Target] = {}
SLOW = 20.0  # seconds for one small input: as much a fault as an exception


def target(function: Target) -> Target:
    TARGETS[function.__name__] = function
    return function


def load_targets() -> dict[str, Target]:
    """All targets by name, those of the modules beside this one too."""
    here = Path(__file__).parent
    sys.path.insert(0, str(here))
    sys.modules.setdefault("fuzz", sys.modules[__name__])  # `python -m tests.fuzz` and `import fuzz` are one module
    for path in sorted(here.glob("fuzz_*.py")):
        importlib.import_module(path.stem)
    return TARGETS


def attempt(name: str, seed: int) -> str | None:
    """Feed one input; what went wrong, or None."""
    folder, started = Path(tempfile.mkdtemp(prefix="fuzz-")), time.process_time()
    try:
        TARGETS[name](random.Random(f"{name} {seed}"), folder)
    except RankdistillError as error:
        try:
            str(error).encode()
        except UnicodeEncodeError:
            return "the error cannot be printed"
    except Exception:  # that is what is looked for
        return traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.process_time() - started
    return f"{seconds:.0f} s for one input" if seconds > SLOW else None


# -- mutations --------------------------------------------------------------------------------------------------------

# What has broken readers before: numbers at the edges, words that mean something to YAML, paths, signs.
VALUES = (
    "null", "true", "[]", "{}", "''", "0", "-1", "1", "2", "3.5", "1e-400", "1e400", ".nan", "nan", "-.inf", "inf",
    "-0.0", "9" * 400, "9" * 5000, "18446744073709551616", "4294967296", "²", "٣", "0x10", "2024-01-01", "1:30",
    "'../../evil'", "/dev/null", "~nobody", ".", "..", "''", "' x '", "'a/b'", "'a\\b'", "con", "'\\0'", '"\\0"',
    '"\\e]0;x\\a"', "x" * 300, "é", "\u2028", "\u202eabc", "\ufeff", "\ud800", "&a [*a]", "*a", "!!binary /w==",
    "!!set {a, b}", "!!python/object:os.system x", "[[a]]", "{a: {b: {c: 1}}}", "{type: bm25}", "{type: [a]}",
    "{type: 5}", "{type: null}", "{type: dense, model: .}", "[1, a, null]", "- a", "? a", "@", "`", "%", "{<<: {a: 1}}",
    "[" * 3000, "{a: " * 500, "(" * 50, "{", "}", "'", '"', "|", ">", "auto", "cpu", "cuda:99", "nonsense", "{", "#",
)  # fmt: skip


def mutated(text: str, rng: random.Random, values: tuple[str, ...] = VALUES) -> str:
    """A text with one to four changes: values replaced, lines doubled, dropped or moved, characters changed."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        line, way = lines[at], rng.randrange(8)
        if way < 3 and ":" in line:
            lines[at] = f"{line[: line.index(':') + 1]} {rng.choice(values)}"
        elif way == 3:
            lines.insert(rng.randrange(len(lines) + 1), line)
        elif way == 4:
            del lines[at]
        elif way == 5:
            lines.insert(at, f"{' ' * rng.choice((0, 2, 4))}{rng.choice(values)}: {rng.choice(values)}")
        elif way == 6 and line:
            cut = rng.randrange(len(line))
            lines[at] = line[:cut] + rng.choice(values) + line[cut + rng.randint(0, 3) :]
        else:
            lines[at] = " " * rng.randint(0, 6) + line.strip()
        text = "\n".join(lines) or rng.choice(values)
    return text


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with a flipped bit, a hole, a cut, a doubled part or foreign bytes in them."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, way = rng.randrange(len(data) + 1), rng.randrange(5)
        if way == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            del data[at : at + rng.randint(1, 64)]
        elif way == 3:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        else:
            data[at:at] = rng.choice(
                (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\t\t", b'"', b"\xed\xa0\x80", b"[" * 3000)
            )
    return bytes(data)


def some(items: dict[str, Path], rng: random.Random) -> str:
    return rng.choice(sorted(items.values())).read_text(encoding="utf-8")


# -- recipes, specifications, suites, the command line ----------------------------------------------------------------


def _write(folder: Path, text: str, rng: random.Random) -> Path:
    file = folder / "given.yaml"
    content = text.encode("utf-8", "surrogatepass")
    file.write_bytes(damaged(content, rng) if rng.random() < 0.1 else content)
    return file


@target
def recipe(rng: random.Random, folder: Path) -> object:
    from rankdistill.recipe import load_recipe, shipped

    return load_recipe(str(_write(folder, mutated(some(shipped("configs"), rng), rng), rng))).resolved()


@target
def specification(rng: random.Random, folder: Path) -> object:
    from rankdistill.indexes.specification import IndexSpecification, any_specification
    from rankdistill.recipe import shipped

    found = any_specification(_write(folder, mutated(some(shipped("indexes"), rng), rng), rng))
    return found.resolve(10_000, 384) if isinstance(found, IndexSpecification) else found


@target
def suite(rng: random.Random, folder: Path) -> object:
    from rankdistill.evaluation.suites import FOLDER, load_suite
    from rankdistill.recipe import shipped

    return load_suite(_write(folder, mutated(some(shipped(FOLDER), rng), rng), rng))


@target
def prompt(rng: random.Random, folder: Path) -> object:
    from rankdistill.recipe import shipped
    from rankdistill.teachers.llm.prompts import load_prompt

    return load_prompt(str(_write(folder, mutated(some(shipped("configs/prompts"), rng), rng), rng)))


def _keys(values: object, way: str = "") -> Iterator[str]:
    """All keys of a recipe as `--set` writes them."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield f"{way}{key}"
        yield from _keys(value, f"{way}{key}.")


@target
def set_value(rng: random.Random, folder: Path) -> object:
    from rankdistill.recipe import load_recipe, shipped

    name = rng.choice(sorted(shipped("configs")))
    keys = list(_keys(load_recipe(name).resolved()))
    key = rng.choice(keys) if rng.random() < 0.9 else mutated(rng.choice(keys), rng)
    return load_recipe(name, [f"{key}={rng.choice(VALUES)}" for _ in range(rng.randint(1, 2))]).resolved()


@target
def method_value(rng: random.Random, folder: Path) -> object:
    """What `--source` and `--teacher` are given."""
    from rankdistill.recipe import build, method_names

    kind = rng.choice(("source", "teacher"))
    text = f"{{type: {rng.choice(sorted(method_names(kind)))}, model: some/model, file: scores.tsv, k1: 0.9, quota: 3}}"
    if rng.random() < 0.3:
        return build(kind, rng.choice(VALUES), f"--{kind}")
    keys = [part for part in text[1:-1].split(", ") if rng.random() < 0.7]
    keys = [mutated(part, rng) if rng.random() < 0.4 else part for part in keys]
    return build(kind, "{" + ", ".join(keys) + rng.choice(("}", "}", "}", "")), f"--{kind}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=1.0)
    options.add_argument("--only", choices=sorted(load_targets()), nargs="+", default=sorted(TARGETS))
    options.add_argument("--seed", type=int, help="one input alone")
    given = options.parse_args()
    if given.seed is not None:
        wrong = [(name, given.seed, found) for name in given.only if (found := attempt(name, given.seed))]
    else:
        wrong, tried = [], 0
        end, first = time.monotonic() + 60 * given.minutes, random.SystemRandom().randrange(10**9)
        while time.monotonic() < end:
            for name in given.only:
                found = attempt(name, first + tried)
                if found:
                    wrong.append((name, first + tried, found))
            tried += 1
        print(f"{tried:,} inputs for each of {', '.join(given.only)}: {len(wrong)} faults")
    for name, seed, found in wrong[:20]:
        print(f"\n== python -m tests.fuzz --only {name} --seed {seed}\n{found}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    sys.modules["fuzz"] = sys.modules["__main__"]
    main()
