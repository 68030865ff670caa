"""The rows of an evaluation's table: what a run has to show beside each other, made ready to search a collection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rankdistill.artifacts import MANIFEST, open_artifact
from rankdistill.collections import Collection
from rankdistill.errors import UsageError
from rankdistill.evaluation.fusion import FusedEngine, fused_rows
from rankdistill.evaluation.suites import Suite
from rankdistill.evaluation.systems import EngineSystem, Reranking, RerankSystem, StudentReranking, System
from rankdistill.indexes.base import Engine
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.by_student import exhaustive_engine
from rankdistill.indexes.dense import DenseEngine
from rankdistill.indexes.lucene_bm25 import LuceneBM25
from rankdistill.indexes.mining import FILE, Source
from rankdistill.indexes.sparse import searched_here
from rankdistill.plain import file_name
from rankdistill.progress import warn
from rankdistill.run_folder import STUDENT, UNTRAINED, RunFolder, members_of
from rankdistill.runs import iter_run
from rankdistill.students.models import resolve_model, says
from rankdistill.teachers.base import TextList
from rankdistill.teachers.ensemble import score_list
from rankdistill.teachers.scoring import prepared_folder

FUSED = 100  # documents of each member that a fused search looks at, at least


def run_systems(run: RunFolder, suite: Suite, collection: Collection, split: str) -> dict[str, System]:
    """Row of the table → system, of all that a suite asks for and the run can fill."""
    rows: dict[str, System] = {}
    own = collection.fingerprint == run.collection.fingerprint
    sources = run.own_sources if own else run.sources(collection)
    reranking: dict[str, System] = {}  # rows over BM25's first documents

    # What is re-ranked: the table of the row, the source, and what its candidates' folder is called.
    stages: list[tuple[dict[str, System], Source, str]] = [(rows, sources[0], "")]
    if "bm25" in suite.systems or suite.rerank:
        bm25 = open_bm25(run, sources, collection)
        rows["BM25"] = EngineSystem(bm25, bytes=bm25.bytes, note="" if bm25.name == "bm25" else bm25.name)
        if suite.rerank and sources[0].engine is not bm25:
            stages.append((reranking, Source(bm25), "-bm25"))
    if "lucene_bm25" in suite.systems:
        lucene = open_bm25(run, sources, collection, lucene=True)
        rows[lucene.name] = EngineSystem(lucene, bytes=lucene.bytes)
    if "sources" in suite.systems:
        rows |= _dense_rows(sources, run.recipe.candidates.sources)
    if "teacher" in suite.systems and run.recipe.teacher is not None:
        for table, source, suffix in stages:
            row, system = _teacher_row(run, collection, split, source, suite.rerank_depth, suffix)
            table |= {row: system if suffix else _with_first_stage(system, suite)} if system is not None else {}
    encoder = str(run.recipe.student.settings().get("model"))
    whole = any(f"{row}, ".startswith(f"first stage: {encoder}, ") for row in rows)
    if "encoder" in suite.systems and not whole and _is_cut(run):
        rows[f"encoder: {encoder}"] = _whole_encoder(run, encoder, collection)
    names = []
    if "untrained" in suite.systems:
        warmed = run.warm_up(run.recipe) is not None
        names.append((UNTRAINED, "student, warmed up" if warmed else "student, untrained"))
    if "student" in suite.systems:
        names.append((STUDENT, "student, distilled" if run.recipe.teacher else "student"))
    if "baselines" in suite.systems:
        names += [(name, f"student, {name}") for name in run.recipe.baselines]
    for name, row in names:
        if name != UNTRAINED and not (run.student_folder(name) / MANIFEST).is_file():
            continue
        student, note = run.student(name), "" if name == UNTRAINED else _best_step(run, name)
        if student.reads_pairs:
            for table, source, suffix in stages:
                system = _rerank_row(run, collection, split, source, suite.rerank_depth, suffix, student, note)
                table[row] = system if suffix else _with_first_stage(system, suite)
            continue
        engine = exhaustive_engine(student, run.vectors(name, student, collection))
        rows[row] = _engine_system(engine, note)
        if suite.rerank:
            reranking[row] = StudentReranking(bm25, engine, suite.rerank_depth)
    if "indexes" in suite.systems and (run.student_folder(STUDENT) / MANIFEST).is_file():
        student = run.student()
        for specification in run.indexes:
            if not searched_here(specification):
                continue  # files for other software
            index = run.index(specification, student=student, collection=collection)
            rows[f"student, {index.name}"] = _engine_system(run.searched(index, student))
    rows |= {f"{row}, re-ranking BM25@{suite.rerank_depth}": system for row, system in reranking.items()}
    return rows | fused_rows(suite.fusion, rows, lambda folder: _student_of(RunFolder(folder), collection))


def _dense_rows(sources: Sequence[Source], methods: Sequence[Any]) -> dict[str, System]:
    """A row for each dense engine that candidates come from, however many sources share it; named after its model, and
    what tells it from others of that model."""
    dense: dict[str, tuple[dict[str, Any], DenseEngine]] = {}
    for source, method in zip(sources, methods, strict=True):
        if isinstance(source.engine, DenseEngine):
            dense.setdefault(source.engine.fingerprint, (method.settings(), source.engine))
    rows: dict[str, System] = {}
    for settings, engine in dense.values():
        alike = [other for other, _ in dense.values() if other["model"] == settings["model"]]
        keys = ("index", "query_length", "document_length", "precision")
        own = [f"{key} {settings[key]}" for key in keys if any(other[key] != settings[key] for other in alike)]
        rows[", ".join([f"first stage: {settings['model']}", *own])] = _engine_system(engine)
    return rows


def _is_cut(run: RunFolder) -> bool:
    """Whether the student begins as something else than the encoder it is made from; else `untrained` is its row."""
    settings = run.recipe.student.settings()
    if settings["type"] == "dense" and not settings.get("layers") and run.warm_up(run.recipe) is None:
        return False
    if not settings.get("model"):
        return False
    folder = resolve_model(str(settings["model"])).path
    kind = says(folder, "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    # A bare transformer, or a model of terms or tokens, is no encoder that anybody would search with.
    return (folder / "modules.json").is_file() and kind == "SentenceTransformer"


def _whole_encoder(run: RunFolder, name: str, collection: Collection) -> EngineSystem:
    """What could have been used without any training: the encoder as it came, with the student's lengths."""
    from rankdistill.students.dense import DenseStudent

    settings = run.recipe.student.settings()
    keys = ("query_length", "document_length", "query_prompt", "document_prompt", "precision")
    own = {key: settings[key] for key in keys if settings.get(key) is not None}
    model = DenseStudent(name, **own).create(run.recipe.student_device)
    return _engine_system(exhaustive_engine(model, run.vectors("encoder", model, collection)))


def _student_of(run: RunFolder, collection: Collection) -> EngineSystem:
    """Another run's student, searching exactly."""
    student = run.student()
    return _engine_system(exhaustive_engine(student, run.vectors(STUDENT, student, collection)))


def fused_engine(run: RunFolder, engine: Engine, names: Sequence[str], count: int) -> FusedEngine:
    """A run's engine fused by rank with others over its collection: `bm25`, or the student of another run's folder.

    Args:
        count: documents that will be asked for; at least FUSED of each member are fused.

    Raises:
        UsageError: a name is neither, or given twice.
        RankdistillError: the other run has no trained student.
    """
    members: dict[str, Any] = {str(run.path): engine}
    for name in names:
        if name in members:
            raise UsageError(f"{name} is to be fused twice", where="--fuse")
        if name == "bm25":
            members[name] = open_bm25(run, run.sources(run.documents, name), run.documents)
        elif Path(name).is_dir():
            members[name] = _student_of(RunFolder(name), run.documents).engine
        else:
            raise UsageError(f"{name!r} is not there to fuse", where="--fuse", fix="bm25, or the folder of another run")
    return FusedEngine(members, depth=max(count, FUSED))


def open_bm25(
    run: RunFolder, sources: Sequence[Source], collection: Collection, lucene: bool = False
) -> BM25 | LuceneBM25:
    """BM25 over a collection: that of the sources, or one with default settings.

    Args:
        lucene: Lucene's; otherwise the first of the sources, or the embedded one.
    """
    for source in sources:
        if isinstance(source.engine, LuceneBM25 if lucene else (BM25, LuceneBM25)):
            return source.engine
    engine: type[BM25 | LuceneBM25] = LuceneBM25 if lucene else BM25
    kind = "lucene_bm25" if lucene else "bm25"
    path = run.path / "engines" / f"{kind}-{engine().fingerprint_for(collection)}"
    engine().build(collection, path)
    return engine.open(path)


def _engine_system(engine: Any, note: str = "") -> EngineSystem:
    if getattr(engine.encoder, "inference_free", False):
        no_model = "no model runs at query time: a query is its tokens, weighed by a table"
        note = f"{note}; {no_model}" if note else no_model
    return EngineSystem(engine, bytes=engine.index.bytes, note=note)


def _best_step(run: RunFolder, name: str) -> str:
    """Which checkpoint a student is: step 0 says that training did not help on dev."""
    manifest = open_artifact(run.student_folder(name), "student").manifest
    dev = manifest.get("dev") or {}
    if not dev:
        return ""
    best = max(dev, key=lambda step: dev[step])
    mixes = manifest.get("mixes") or {}
    share = max(mixes, key=lambda share: mixes[share], default=None)
    if share is not None and mixes[share] > dev[best]:
        tried = f"the best of {len(dev)} checkpoints and {len(mixes)} mixes on dev"
        return f"{tried}: {float(share):.0%} of the trained weights, the rest those it started from"
    return f"the best of {len(dev)} checkpoints on dev: step {best} of {manifest['counts']['steps']}"


def _teacher_row(
    run: RunFolder, collection: Collection, split: str, source: Source, depth: int, suffix: str
) -> tuple[str, RerankSystem | None]:
    """(the row's name, the teacher re-ranking the top of a source of candidates); its scores go to the store.

    A recorded teacher may lack scores: where it has none there is no row (it would be the first stage's, under the
    teacher's name), and where it knows some of the queries the row is of those, and says so.
    """
    candidates = run.first_stage(collection, source, file_name(f"{collection.name}-{split}{suffix}"), depth, split)
    file = candidates.path / FILE
    scores = run.scores(collection, candidates)

    def recorded(lists: Sequence[Any]) -> Iterable[tuple[str, Sequence[str], Any]]:
        return ((item.query_id, item.doc_ids, scores.scores_of(item.query_id, item.doc_ids)) for item in lists)

    part, listed, scored, total = set[str](), 0, 0, 0
    for query_id, doc_ids, _ in iter_run(file):
        known = int(np.isfinite(scores.scores_of(query_id, doc_ids)).sum())
        part |= {query_id} if known else set()
        listed, scored, total = listed + 1, scored + known, total + len(doc_ids)
    if not scored:
        warn(f"no row for the teacher on {collection.name}, {split}: it has no score for any of {total:,} candidates")
        return "teacher", None
    note = f"the teacher re-ranks the first {depth} of {source.engine.name}"
    if scored < total:
        note += f"; it has scores for {scored:,} of {total:,} candidates, the others follow in the first stage's order"
    served = _served_teacher(run, collection, source.engine, depth)
    system = RerankSystem(recorded, file, depth, note=note, timed=False, served=served)
    if len(part) == listed or _live(run.teacher):
        return "teacher", system
    system.part = part
    return f"teacher, on {len(part):,} of {len(collection.query_ids(split)):,} queries", system


def _rerank_row(
    run: RunFolder,
    collection: Collection,
    split: str,
    source: Source,
    depth: int,
    suffix: str,
    student: Any,
    note: str,
) -> RerankSystem:
    """A student that reads pairs, re-ranking the top of a source of candidates, as its teacher's row does."""
    candidates = run.first_stage(collection, source, file_name(f"{collection.name}-{split}{suffix}"), depth, split)
    student.freeze()

    def live(lists: Sequence[Any]) -> Iterable[tuple[str, Sequence[str], Any]]:
        return ((item.query_id, item.doc_ids, student.rerank(item.query, item.documents)) for item in lists)

    served = Reranking(
        source.engine,
        collection,
        lambda query, _, documents: student.rerank(query, documents),
        lambda: [student],
        depth,
    )
    said = f"the student re-ranks the first {depth} of {source.engine.name}"
    note = f"{said}; {note}" if note else said
    return RerankSystem(live, candidates.path / FILE, depth, note=note, timed=False, served=served)


def _with_first_stage(system: RerankSystem, suite: Suite) -> RerankSystem:
    """With the first source's own scores added, where the suite says so; BM25's have another scale."""
    weight = suite.first_stage_weight
    said = f"{system.note}; {weight:g} × the first stage's score is added" if weight else system.note
    return replace(system, first_stage_weight=weight, note=said)


def _served_teacher(run: RunFolder, collection: Collection, engine: Any, depth: int) -> Reranking | None:
    """The teacher scoring live, to measure its speed; None where its scores or candidates were made elsewhere."""
    teacher = run.teacher
    if not _live(teacher) or not hasattr(engine, "search"):
        return None
    teacher.prepare(collection, prepared_folder(run.store))

    def score(query: str, doc_ids: list[str], documents: list[str]) -> Any:
        return score_list(teacher, TextList("", query, doc_ids, documents))

    def models() -> list[Any]:
        return [member.load() for member in members_of(teacher) if hasattr(member, "load")]

    return Reranking(engine, collection, score, models, depth)


def _live(teacher: Any) -> bool:
    return all(member.live for member in members_of(teacher))
