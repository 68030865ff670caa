"""What a run does with a teacher: train it, score candidate lists with it into the store, only what is missing, and say
what that would cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from rankdistill.artifacts import MANIFEST, Artifact, ArtifactWriter, fingerprint, locked, obtain, write_atomically
from rankdistill.devices import unplaced
from rankdistill.errors import RankdistillError
from rankdistill.indexes import mining
from rankdistill.progress import progress, say, warn
from rankdistill.runs import iter_run
from rankdistill.scores.store import ScoreStore, TeacherScores
from rankdistill.teachers.base import Candidates, Dev, Teacher, TextList, added
from rankdistill.teachers.llm.asking import AskingTeacher
from rankdistill.teachers.llm.base import Backend
from rankdistill.teachers.llm.budget import Estimate

if TYPE_CHECKING:
    from rankdistill.collections import Collection

PAIRS = 4096  # handed to the teacher at once: sorted by length together, texts tokenised once
REPORT = "report.json"


def train_teacher(
    teacher: Teacher,
    settings: Mapping[str, Any],
    collection: Collection,
    candidates: Artifact,
    dev: tuple[Artifact, str] | None,
    path: Path,
    seed: int,
    split: str = "train",
) -> None:
    """Train it on the training candidates, judged by those of dev, as an artifact, and let it use the result; or what
    is there already.

    Args:
        settings: the recipe's, of this teacher.
        split: whose labels it is trained on.
        dev: what it is judged by, if anything: candidates of dev queries, and the split whose labels they have.
    """
    values = {**unplaced(settings), **teacher.training_inputs(), "seed": seed}
    inputs = {"candidates": candidates.fingerprint, **({"dev": dev[0].fingerprint} if dev else {})}

    def pairs(artifact: Artifact) -> Candidates:
        return iter_run(artifact.path / mining.FILE)

    def make(writer: ArtifactWriter) -> None:
        say(f"teach: training {settings['type']}")
        judged = Dev([(query_id, list(ids)) for query_id, ids, _ in pairs(dev[0])], dev[1]) if dev else None
        writer.counts = teacher.train(collection, pairs(candidates), writer.path / "model", seed, split, judged)

    print_ = fingerprint([values, inputs])
    obtain(path, kind="teacher", fingerprint=print_, settings=values, inputs=inputs, make=make, resume=True)
    teacher.use_trained(path / "model")


def score_candidates(
    teacher: Teacher,
    collection: Collection,
    candidates: Candidates,
    store: ScoreStore | None = None,
    *,
    total: int | None = None,
    chunk_pairs: int = PAIRS,
) -> TeacherScores:
    """Score what the store lacks of the candidates; memory is one chunk.

    After a kill the same call goes on where it stopped: only the chunk in flight is scored again.

    Where a document's score depends on its list (`Teacher.reads_lists`), the store's key covers all the candidates
    too, ids and order: scores made in other lists are never mixed in, and a list is scored whole or found whole. The
    ids of all candidates are then held in memory. What the teacher counted is added to the folder's report.

    Args:
        candidates: (query_id, doc_ids, _) a query, each query once; one query at a time is held.
        store: by default the one in the user's cache folder.
        total: candidate pairs, for the time left.

    Returns:
        The scores; `.scored` pairs are new, `.reused` were in the store, `.unscored` got none from this teacher.
    """
    store = store or ScoreStore()
    key, candidates = _key(teacher, candidates)
    about = {"teacher": teacher.describe(), "collection": collection.name}
    scores = store.folder(key, collection.fingerprint, teacher.score_kind, describe=about)
    seen: Counter[str] = Counter()
    asking = teacher.asking if isinstance(teacher, AskingTeacher) else None
    if asking is not None:
        asking.begin(store.root)
        warn_of_another_server(asking.backend, scores)
    busy = "score: another process is scoring with this teacher: its scores are waited for, not paid for twice"
    with (
        locked(scores.path / "scoring", busy),
        scores,
        _reporting(teacher, scores),
        progress("scoring", total, "pairs") as bar,
    ):
        scores.refresh()
        prepared = False
        for chunk in _chunks(teacher, collection, candidates, scores.missing, chunk_pairs, seen):
            if not prepared:  # not before something is to be scored: it may take long
                teacher.prepare(collection, prepared_folder(store))
                prepared = True
            if asking is not None:
                asking.health.earlier = seen["earlier"]
            waiting = scores.unscored + sum(len(item.doc_ids) for item in chunk)
            for query_id, doc_ids, values in teacher.score(chunk):
                scores.add(query_id, doc_ids, values)
                waiting -= len(doc_ids)
            scores.unscored = waiting
            bar.advance(seen["reused"] + scores.scored + scores.unscored - bar.done)
            scores.refresh()  # another process may have scored what comes next
        scores.reused += seen["reused"]
        bar.advance(scores.reused + scores.scored + scores.unscored - bar.done)
    if seen["unknown"]:
        warn(f"{seen['unknown']:,} candidates are not in {collection.name} and were not scored")
    if scores.unscored:
        warn(f"the teacher has no score for {scores.unscored:,} of the candidates asked for")
    if asking is not None:
        asking.finish(seen["earlier"])
    return scores


def _key(teacher: Teacher, candidates: Candidates) -> tuple[str, Candidates]:
    """The store's key, and the candidates, which it may take reading to know."""
    if not teacher.reads_lists:
        return teacher.fingerprint(), candidates
    lists = [(query_id, list(dict.fromkeys(doc_ids)), np.empty(0)) for query_id, doc_ids, _ in candidates]
    return lists_key(teacher.fingerprint(), lists), lists


def lists_key(teacher: str, candidates: Candidates) -> str:
    """The store's key for a teacher (by fingerprint) whose scores depend on the lists: it covers all ids in order."""
    return fingerprint([teacher, "lists", [[query_id, *doc_ids] for query_id, doc_ids, _ in candidates]])


def _chunks(
    teacher: Teacher,
    collection: Collection,
    candidates: Candidates,
    missing: Callable[[str, Sequence[str]], list[str]],
    most: int,
    seen: Counter[str],
) -> Iterator[list[TextList]]:
    """Lists of what is missing, about `most` pairs at once; a list is never torn: a listwise teacher reads it whole.

    Args:
        missing: the documents of a list without a score.
        seen: gets what is `reused` (pairs that have a score), `unknown` (that the collection lacks), and `earlier`
            (lists some of which has scores).
    """

    def texts() -> list[TextList]:
        queries = collection.query_texts([query_id for query_id, _ in chunk])
        rows = np.concatenate([np.asarray(collection.doc_rows(doc_ids)) for _, doc_ids in chunk])
        documents = iter(collection.document_texts(rows))
        return [
            TextList(query_id, query, doc_ids, [next(documents) for _ in doc_ids], collection)
            for query, (query_id, doc_ids) in zip(queries, chunk, strict=True)
        ]

    chunk: list[tuple[str, list[str]]] = []
    waiting = 0
    for query_id, listed, _ in candidates:
        doc_ids = list(dict.fromkeys(listed))
        absent = missing(query_id, doc_ids)
        rows = collection.doc_rows(absent) if absent else np.empty(0)
        known = [doc_id for doc_id, row in zip(absent, rows, strict=True) if row >= 0]
        begun = len(absent) < len(doc_ids)
        seen.update(reused=len(doc_ids) - len(absent), unknown=len(absent) - len(known), earlier=begun)
        if teacher.reads_lists and begun:
            known = []  # its list is scored: what has no score now got none
        if waiting and waiting + len(known) > most:
            yield texts()
            chunk, waiting = [], 0
        if known:
            chunk.append((query_id, known))
            waiting += len(known)
    if chunk:
        yield texts()


def warn_of_another_server(backend: Backend, scores: TeacherScores) -> None:
    """Servers name models freely (`default`): where no revision tells two apart, they would share scores."""
    now = backend.describe()
    try:
        then = json.loads((scores.path / MANIFEST).read_text(encoding="utf-8"))["description"]["teacher"]["backend"]
        old, new = (urlsplit(str(settings["base_url"])).netloc for settings in (then, now))
    except (OSError, ValueError, KeyError, TypeError):
        return
    if old != new and not now.get("revision"):
        warn(
            f"these scores were begun with {now['model']} at {old}, and now it is at {new}: if that is another model, "
            "give backend.revision"
        )


def prepared_folder(store: ScoreStore) -> Path:
    """Where teachers keep what they prepare for a collection."""
    return store.root / "prepared"


# ---------------------------------------------------------------------------------------------------------------------
# What teachers count beside their scores (repaired answers, position bias), summed over the commands that scored


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a folder of scores; empty if it has none."""
    path = Path(folder) / REPORT
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RankdistillError(
            f"the report cannot be read: {error}", where=str(path), fix="delete this file; the scores do not need it"
        ) from None


def keep_report(folder: str | Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the report of a folder of scores; returns the whole."""
    path = Path(folder) / REPORT
    with locked(path):
        whole: dict[str, Any] = added(read_report(folder), report)
        write_atomically(path, json.dumps(whole, indent=2) + "\n")
    return whole


@contextmanager
def _reporting(teacher: Teacher, scores: TeacherScores) -> Iterator[None]:
    """Keep beside the scores what the teacher counted, and say it; also where the work ends early."""
    try:
        yield
    finally:
        if report := teacher.take_report():
            for line in teacher.report_lines(keep_report(scores.path, report)):
                say(line)


# ---------------------------------------------------------------------------------------------------------------------
# What it would cost


def missing_pairs(
    teacher: Teacher, collection: Collection, candidates: Candidates, store: ScoreStore | None = None
) -> int:
    """Candidates that the teacher would have to score: those that the store lacks."""
    return sum(len(item.doc_ids) for chunk in _unscored(teacher, collection, candidates, store) for item in chunk)


def dry_run(
    teacher: AskingTeacher, collection: Collection, candidates: Candidates, store: ScoreStore | None = None
) -> Estimate:
    """Walk a whole scoring job, counting calls instead of making them; the store and the answers stay as they are.

    What the store or the cache of answers has already costs nothing here, as it would in the job. The teacher object
    is of no use for scoring afterwards.
    """
    store = store or ScoreStore()
    teacher.asking.begin(store.root)
    estimate = teacher.asking.dry_run()
    for chunk in _unscored(teacher, collection, candidates, store):
        estimate.pairs += sum(len(doc_ids) for _, doc_ids, _ in teacher.score(chunk))
    return estimate


def _unscored(
    teacher: Teacher, collection: Collection, candidates: Candidates, store: ScoreStore | None
) -> Iterator[list[TextList]]:
    key, candidates = _key(teacher, candidates)
    path = (store or ScoreStore()).root / key / collection.fingerprint
    scores = TeacherScores(path).check(score_kind=teacher.score_kind) if (path / MANIFEST).is_file() else None
    missing = scores.missing if scores is not None else lambda _, doc_ids: list(doc_ids)
    return _chunks(teacher, collection, candidates, missing, PAIRS, Counter())
