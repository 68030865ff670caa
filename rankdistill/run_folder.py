"""A run's folder: the artifacts in it, each made from those before it when it is asked for.

    generate ─► mine ─► teach ─► score ─► train ─► quantize ─► index ─► evaluate

An artifact whose fingerprint is on disk is not made again, so each can be asked for alone, and a killed run goes on
where it stopped. The rows of a table (table_rows.py) and the walk through the stages (stages.py) are made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rankdistill.artifacts import (
    MANIFEST,
    Artifact,
    ArtifactWriter,
    check_file,
    find_artifact,
    fingerprint,
    locked,
    open_artifact,
    write_atomically,
)
from rankdistill.collections import Collection, open_collection
from rankdistill.devices import command_device, use_device
from rankdistill.errors import RankdistillError, UsageError
from rankdistill.evaluation.extrapolation import hold_out
from rankdistill.generation.generate import generate, labelled
from rankdistill.indexes.base import Engine
from rankdistill.indexes.by_student import (
    CROSS_ENCODER,
    check_index,
    check_vectors,
    encode_collection,
    exhaustive_engine,
    index_files,
    open_index,
    query_encoder,
    query_side,
)
from rankdistill.indexes.dense import DenseEngine, export_index
from rankdistill.indexes.faiss_index import FaissIndex
from rankdistill.indexes.mining import FILE, Source, mine
from rankdistill.indexes.sources import RecordedRun
from rankdistill.indexes.sparse import BuiltSparseIndex, SparseEngine, build_sparse_index
from rankdistill.indexes.sparse_specification import SparseSpecification
from rankdistill.indexes.specification import AnySpecification, QuantizerSpecification, any_specification
from rankdistill.indexes.vectors import VectorFolders
from rankdistill.progress import launched, say, warn
from rankdistill.recipe import Recipe, build, check_recipe, read_yaml
from rankdistill.runs import Ranking, iter_run
from rankdistill.sampling.training_queries import query_pool, with_unlabelled
from rankdistill.scores.ensemble import ScoreSource
from rankdistill.scores.lists import ScoredLists, build_lists, lists_fingerprint
from rankdistill.scores.store import ScoreStore
from rankdistill.students.provenance import check_student
from rankdistill.teachers.base import Teacher
from rankdistill.teachers.ensemble import EnsembleTeacher
from rankdistill.teachers.probe import named, probe_long
from rankdistill.teachers.scoring import score_candidates, train_teacher

if TYPE_CHECKING:  # these load torch, which a search over an inference-free student's index does without
    from rankdistill.students.base import StudentModel
    from rankdistill.training.warm_up import WarmUpTraining

STUDENT = "student"
UNTRAINED = "untrained"
RECIPE = "recipe.yaml"
WRITTEN = "# Written by rankdistill"  # its first words
MINING = ("depth", "include_positives", "exclude_positives", "max_positives", "margin", "relative_margin")
AGREEMENT_DEPTH = 20  # documents of a dev query that are re-ranked, or on which agreement with the teacher is measured


class RunFolder:
    """A run's folder and what fills it, as far as the indexes.

    Args:
        path: the folder.
        recipe: what to run; the one saved in the folder unless given.
        store: folder of the score store; the user's cache unless given.
    """

    def __init__(self, path: str | Path, recipe: Recipe | None = None, store: str | Path | None = None) -> None:
        self.path = Path(path)
        saved = self.path / RECIPE
        if recipe is None:
            if not saved.is_file():
                fix = "give the folder that `rankdistill run` wrote"
                raise RankdistillError("this is no run", where=str(self.path), fix=fix)
            recipe = check_recipe(read_yaml(saved), str(saved))
        self.recipe = recipe
        use_device(recipe.device)
        self.store_path = store

    def __repr__(self) -> str:
        done = [name for name in ("candidates", "lists", STUDENT, "evaluation") if (self.path / name).exists()]
        return f"{type(self).__name__}({self.path}: {self.recipe.name}; {', '.join(done) or 'nothing'} done)"

    def save_recipe(self) -> None:
        """The resolved recipe, which reproduces the run."""
        check_file(self.path / RECIPE, mark=WRITTEN)
        text = yaml.safe_dump(self.recipe.resolved(), sort_keys=False, allow_unicode=True).encode()
        write_atomically(self.path / RECIPE, _headed(text))

    @cached_property
    def collection(self) -> Collection:
        if self.recipe.generate.generator is not None:
            return labelled(self.documents, self.generate())
        return with_unlabelled(self.documents, self.recipe)

    # -- generate -----------------------------------------------------------------------------------------------------

    @cached_property
    def documents(self) -> Collection:
        """The collection as it was opened, without the queries that a recipe brings: to search it, nothing is made."""
        return open_collection(self.recipe.collection)

    def generate(self) -> Artifact:
        """Queries made from the documents, with labels."""
        settings, path = self.recipe.generate, self.path / "generated"
        assert settings.generator is not None
        if self.student_folder(STUDENT).is_dir() and (path / MANIFEST).is_file():
            written = open_artifact(path, "generated")
            asked = written.manifest["settings"].get("recipe"), written.manifest["inputs"]["collection"]
            if asked == (self.recipe.resolved()["generate"], self.documents.fingerprint):
                return written  # to search with what was trained, no language model need be there
        generator = build("generator", settings.generator.settings(), "generate.generator")
        judge = build("teacher", settings.judge.settings(), "generate.judge") if settings.judge else None
        sources = [method.settings() for method in self.recipe.candidates.sources]

        def engines() -> dict[str, Engine]:
            opened = {each.engine.fingerprint: each.engine for each in self.sources(self.documents)}
            found = [engine for engine in opened.values() if not isinstance(engine, RecordedRun)]
            return {f"{engine.name}{place or ''}": engine for place, engine in enumerate(found)}

        options: dict[str, Any] = {"seed": self.recipe.seed, "engines": engines, "sources": sources, "judge": judge}
        return generate(self.documents, generator, settings, path, **options, store=self.store)

    # -- mine ---------------------------------------------------------------------------------------------------------

    @cached_property
    def queries(self) -> tuple[list[str], list[str], str | None]:
        """Training queries, dev queries, and the split whose labels the dev queries have, if they have any."""
        train, dev, dev_split = self.query_pool
        return *hold_out(self.collection, train, dev, self.recipe, self.path / "vectors"), dev_split

    @cached_property
    def query_pool(self) -> tuple[list[str], list[str], str | None]:
        """The same before any is held out."""
        return query_pool(self.collection, self.recipe)

    @property
    def labels(self) -> str | None:
        """The split whose labels the training queries have: None where they are learned from without any."""
        return self._labelled if self.recipe.candidates.unlabelled is None else None

    @property
    def _labelled(self) -> str:
        return self.collection.training_split or "train"

    def sources(self, collection: Collection, kind: str | None = None) -> list[Source]:
        """The recipe's sources of candidates, or those of one type, opened over a collection."""
        folder = self.path / "engines"
        methods = [method for method in self.recipe.candidates.sources if kind in (None, method.type)]
        settings = [build("source", method.settings()) for method in methods]
        opened: dict[str, Any] = {}
        with locked(folder):
            return [Source.of(source, collection, folder, opened) for source in settings]

    @cached_property
    def own_sources(self) -> list[Source]:
        return self.sources(self.collection)

    def mine(self) -> tuple[Artifact, Artifact]:
        """Candidates of the training and the dev queries."""
        train_ids, dev_ids, dev_split = self.queries
        place, settings = self.path / "candidates" / "train", self.recipe.candidates
        options = settings.model_dump(include=set(MINING))
        train = mine(self.collection, self.own_sources, place, split=self.labels, query_ids=train_ids, **options)
        return train, self._search("dev", self.collection, self.own_sources, settings.depth, dev_split, dev_ids)

    def _search(
        self,
        name: str,
        collection: Collection,
        sources: list[Source],
        depth: int,
        split: str | None,
        query_ids: list[str] | None = None,
    ) -> Artifact:
        """Candidates as a search finds them, for what is measured."""
        plain: dict[str, Any] = {"include_positives": False, "drop_same_texts": False}
        place = self.path / "candidates" / name
        return mine(collection, sources, place, depth=depth, split=split, query_ids=query_ids, **plain)

    def first_stage(
        self,
        collection: Collection,
        source: Source,
        name: str,
        depth: int,
        split: str,
        query_ids: list[str] | None = None,
    ) -> Artifact:
        """What a source finds by itself for a split's queries, or for these of them: what a re-ranker is shown. Quotas
        and ranks of the recipe say what a training list holds."""
        return self._search(name, collection, [Source(source.engine)], depth, split, query_ids)

    # -- teach --------------------------------------------------------------------------------------------------------

    @property
    def store(self) -> ScoreStore:
        return ScoreStore(self.store_path)

    @cached_property
    def teacher(self) -> Any:
        """The recipe's teacher, trained where it has to be (a member of an ensemble in a folder of its own)."""
        if self.recipe.teacher is None:
            raise UsageError("the recipe names no teacher", where="teacher", fix="add a teacher to the recipe")
        settings = self.recipe.teacher.settings()
        teacher = build("teacher", settings, "teacher")
        if not isinstance(teacher, EnsembleTeacher):
            self._trained(teacher, settings, "teacher")
            return teacher
        for number, (member, own) in enumerate(zip(teacher.teachers, settings["members"], strict=True)):
            self._trained(member, own, f"teacher-{number}")
        if teacher.needs_calibration:
            candidates, _ = self.mine()
            inputs, out = {"candidates": candidates.fingerprint}, self.path / "teacher-calibration"
            queries, lists = self.queries[0], lambda: _lists(candidates)
            teacher.calibrate(self.collection, lists, queries, out, self.store, inputs=inputs, split=self._labelled)
        return teacher

    def _trained(self, teacher: Teacher, settings: Mapping[str, Any], name: str) -> None:
        """Ready to score: trained where it has to be, and told where vectors lie."""
        from rankdistill.teachers.encoders import BiEncoderTeacher

        if isinstance(teacher, BiEncoderTeacher):
            teacher.encoded = self.vector_folders
        if teacher.needs_training:
            (_, dev_ids, split), depth = self.queries, teacher.judged_depth
            dev = None
            if split and depth:
                source = self.own_sources[0]
                dev = self.first_stage(self.collection, source, f"dev-{name}", depth, split, dev_ids), split
            candidates, seed = self.mine()[0], self.recipe.seed
            train_teacher(teacher, settings, self.collection, candidates, dev, self.path / name, seed, self._labelled)

    # -- score --------------------------------------------------------------------------------------------------------

    def scores(self, collection: Collection, candidates: Artifact) -> ScoreSource:
        """The teacher's scores of candidates; only pairs that the store lacks are paid for."""
        scored = []
        for member in members_of(self.teacher):
            say(f"score: {member.type} over {candidates.counts.get('queries', '?')} queries")
            total = candidates.counts.get("candidates")
            scores = score_candidates(member, collection, _lists(candidates), self.store, total=total)
            say(f"score: {scores.scored:,} pairs scored, {scores.reused:,} found in the store")
            scored.append(scores)
        combined: ScoreSource = self.teacher.combine(scored) if isinstance(self.teacher, EnsembleTeacher) else scored[0]
        return combined

    def _probe(self, candidates: Artifact) -> None:
        """Before a long scoring, what the teachers are worth on some of its lists.

        One that was trained here knows their labels: its training has judged it on dev queries.
        """
        assert self.recipe.teacher is not None and self.labels is not None
        settings = self.recipe.teacher.settings()
        members = zip(members_of(self.teacher), settings.get("members", [settings]), strict=True)
        teachers = named(member for member, own in members if member.live and not own.get("train"))
        engine, lists = self.own_sources[0].engine, lambda: _lists(candidates)
        probe_long(teachers, self.collection, lists, self.queries[0], engine, self.store, split=self.labels)

    def score(self, name: str = STUDENT) -> ScoredLists:
        """Scored lists: the training candidates with the teacher's scores and the labels, as a student reads them."""
        candidates, _ = self.mine()
        inputs = {"candidates": candidates.fingerprint}
        if self.recipe.teacher is not None:
            inputs["teacher"] = self.teacher.fingerprint()
        keys = {"negatives_below", "extra_positives"}
        own, look = (each.candidates.model_dump(include=keys) for each in (self.recipe, self.recipe_of(name)))
        path = self.path / ("lists" if own == look else f"lists-{name}")
        look = {key: value for key, value in look.items() if value and self.recipe.teacher is not None}
        with locked(path):
            expected = lists_fingerprint(self.collection, self.labels, inputs, look)
            if find_artifact(path, "lists", expected) is None:
                # Without a teacher labels alone are read.
                if self.recipe.teacher is not None and self.labels is not None:
                    self._probe(candidates)
                scores = self.scores(self.collection, candidates) if self.recipe.teacher is not None else None
                options: dict[str, Any] = {"inputs": inputs, "settings": look, **look}
                build_lists(_lists(candidates), scores, self.collection, self.labels, path, **options)
            return ScoredLists.open(path, self.collection)

    def dev_lists(self) -> ScoredLists | None:
        """A few short scored lists of dev queries, to measure agreement with the teacher while training."""
        most = self.recipe.training.agreement_queries if self.recipe.teacher is not None else 0
        if not most:
            return None
        _, dev_ids, split = self.queries
        some = dev_ids[:: -(-len(dev_ids) // most)]  # spread evenly: files are often sorted by topic
        candidates = self._search("agreement", self.collection, self.own_sources, AGREEMENT_DEPTH, split, some)
        path = self.path / "dev-lists"
        inputs = {"candidates": candidates.fingerprint, "teacher": self.teacher.fingerprint()}
        with locked(path):
            if find_artifact(path, "lists", lists_fingerprint(self.collection, split, inputs)) is None:
                scores_of = self.scores(self.collection, candidates).scores_of
                # A recorded teacher may know training queries only.
                scored = [item for item in _lists(candidates) if (scores_of(*item[:2]) > float("-inf")).sum() > 1]
                if not scored:
                    say("score: no teacher scores of dev queries: agreement with the teacher is not measured")
                    return None
                build_lists(scored, scores_of, self.collection, split, path, inputs=inputs)
            return ScoredLists.open(path, self.collection)

    # -- train --------------------------------------------------------------------------------------------------------

    def recipe_of(self, name: str) -> Recipe:
        """The recipe of the student or of a baseline.

        Raises:
            UsageError: the recipe has no baseline of that name.
        """
        if name == STUDENT:
            return self.recipe
        if name not in self.recipe.baselines:
            fix = f"known: {', '.join([STUDENT, *self.recipe.baselines])}"
            raise UsageError(f"the recipe has no student {name!r}", fix=fix)
        return self.recipe.baseline(name)

    def student_folder(self, name: str) -> Path:
        return self.path / STUDENT if name == STUDENT else self.path / "baselines" / name

    def train(self, name: str = STUDENT) -> Artifact:
        """Train the student, or a baseline, on the scored lists."""
        from rankdistill.training.dev import Agreement
        from rankdistill.training.trainer import fit_student, obtain_student, training_fingerprint_values

        self.save_recipe()
        lists, (_, dev) = self.score(name), self.mine()
        inputs = {"lists": lists.fingerprint, "dev": dev.fingerprint}
        recipe, path = self.recipe_of(name), self.student_folder(name)
        warm_up = self.warm_up(recipe)
        if warm_up is not None:
            inputs["start"] = warm_up.fingerprint
        if recipe.training.processes > launched()[1] == 1:
            print_ = fingerprint(training_fingerprint_values(recipe, inputs))
            return find_artifact(path, "student", print_) or self._train_together(name, recipe.training.processes)

        def make(writer: ArtifactWriter) -> None:
            start = self._start(warm_up)
            say(f"train: {name}")
            dev_lists = self.dev_lists()
            agreement = Agreement(dev_lists, self.collection) if dev_lists is not None else None
            pool, prepared = self.dev_pool(recipe), self.path / "prepared"
            options: dict[str, Any] = {"agreement": agreement, "start": start, "encoded": self.vector_folders}
            fit_student(recipe, lists, self.collection, pool, writer, prepared, **options)

        return obtain_student(path, recipe, inputs, make)

    def warm_up(self, recipe: Recipe) -> WarmUpTraining | None:
        """The warm-up of a recipe's student, if it has one."""
        from rankdistill.training.warm_up import warm_up_of

        trained = self._trained_settings if recipe.student != self.recipe.student else None
        return warm_up_of(recipe, self.collection, lambda: self.queries[0], trained)

    def _start(self, warm_up: WarmUpTraining | None) -> Path | None:
        """The folder of the warmed-up model."""
        return warm_up.run(self.warm_up_folder, self.vector_folders).path / "model" if warm_up is not None else None

    def _trained_settings(self) -> dict[str, Any]:
        """The trained student as settings of a model; its vectors, which are searched later, are encoded by now."""
        model = self.train().path / "model"
        self.vectors(STUDENT, self.student(), self.documents)
        return {**self.recipe.student.settings(), "model": str(model), "warm_up": None}

    @property
    def warm_up_folder(self) -> Path:
        """Beside the score store: other seeds, in other folders, start from the same."""
        return self.store.root / "warm-up"

    def _train_together(self, name: str, processes: int) -> Artifact:
        from rankdistill.training.processes import run_together

        options = {"--out": self.path, "--student": name, "--store": self.store_path, "--device": command_device()}
        given = [str(word) for option in options.items() if option[1] is not None for word in option]
        run_together(processes, ["train", str(self.path / RECIPE), *given])
        return open_artifact(self.student_folder(name), "student")

    def dev_pool(self, recipe: Recipe) -> Any:
        from rankdistill.training.dev import DevPool, RerankPool

        training, (_, dev_ids, dev_split) = recipe.training, self.queries
        candidates = {query_id: doc_ids for query_id, doc_ids, _ in _lists(self.mine()[1])}
        judge = dev_split or self.dev_lists()
        if judge is None:
            warn("dev queries have neither labels nor teacher scores: the last checkpoint is kept, not the best")
            return None
        pool = (self.collection, judge, dev_ids, [candidates.get(query_id, []) for query_id in dev_ids])
        if recipe.student_kind == CROSS_ENCODER:
            return RerankPool(*pool, AGREEMENT_DEPTH, training.metric)
        return DevPool.build(*pool, training.dev_documents, recipe.seed, training.metric)

    def trained(self, name: str = STUDENT) -> Artifact:
        """A trained student's artifact; an error where there is none, or one of other settings than the recipe's."""
        artifact = open_artifact(self.student_folder(name), "student")
        check_student(artifact, self.recipe_of(name), self.path)
        return artifact

    def student(self, name: str = STUDENT) -> StudentModel:
        """A trained student, loaded; `untrained` is the one it started from, warmed up where the recipe says so.

        Raises:
            RankdistillError: it has not been trained yet, or under other settings than the recipe's.
        """
        if name != UNTRAINED:
            return self._open_student(self.trained(name).path / "model", self.recipe_of(name))
        start = self._start(self.warm_up(self.recipe))
        maker = build("student", self.recipe.student.settings(), "student")
        model: StudentModel = self._open_student(start) if start else maker.create(self.recipe.student_device)
        model.prepare(self.collection, self.path / "prepared")  # as its training begins
        return model

    # -- index --------------------------------------------------------------------------------------------------------

    def vectors(self, name: str, student: StudentModel, collection: Collection) -> Artifact:
        """A student's document vectors of a collection, encoded once."""
        check_vectors(student)
        return encode_collection(student, collection, self._vectors_folder(name, collection), self.vector_folders)

    @property
    def vector_folders(self) -> VectorFolders:
        """Where document vectors go, and what the run's students and sources left of them."""
        return VectorFolders(self.path / "vectors", ((self.path / "engines", "vectors*"), (self.path / "vectors", "*")))

    def _vectors_folder(self, name: str, collection: Collection) -> Path:
        return self.path / "vectors" / f"{name}-{collection.name}"

    @cached_property
    def indexes(self) -> list[AnySpecification]:
        """The recipe's indexes that are files: a multi-vector or sparse student's vectors are searched as they are.

        Raises:
            UsageError: an index that the student cannot have.
        """
        return index_files(self.recipe.student_kind, self.recipe.indexes)

    def index_file(self, specification: str | AnySpecification, collection: Collection | None = None) -> Path:
        """Where an index lies: a FAISS file, or a sparse student's folder."""
        folder = self.path / "indexes"
        if collection is not None and collection.fingerprint != self.documents.fingerprint:
            folder = folder / collection.name
        read = any_specification(specification)
        return folder / (read.name if isinstance(read, SparseSpecification) else f"{read.name}.faiss")

    def index(
        self,
        specification: str | AnySpecification,
        out: str | Path | None = None,
        *,
        student: StudentModel | None = None,
        collection: Collection | None = None,
    ) -> FaissIndex | BuiltSparseIndex:
        """Export the student to an index over a collection (its own unless given); a learned one is trained first."""
        specification = any_specification(specification)
        check_index(self.recipe.student_kind, specification)
        collection = collection or self.documents
        student = student or self.student()
        out = Path(out) if out is not None else self.index_file(specification, collection)
        out.parent.mkdir(parents=True, exist_ok=True)
        vectors = self.vectors(STUDENT, student, collection)
        if isinstance(specification, SparseSpecification):
            return build_sparse_index(student, collection, vectors, specification, out)
        if not isinstance(specification, QuantizerSpecification):
            return export_index(student, collection, vectors, specification, out)
        from rankdistill.quantization.quantize import quantize_student

        own = collection.fingerprint == self.documents.fingerprint
        return quantize_student(
            student,
            collection,
            vectors,
            specification,
            out,
            query_ids=self.queries[0] if own and self.collection.training_split else None,
            lists=self.score() if own and specification.relevance == "scores" else None,
            open_student=self._open_student,
        )

    def _open_student(self, folder: Path, recipe: Recipe | None = None) -> StudentModel:
        recipe = recipe or self.recipe
        model: StudentModel = build("student", recipe.student.settings(), "student").open(folder, recipe.student_device)
        return model

    def searched(self, index: FaissIndex | BuiltSparseIndex, student: Any) -> DenseEngine | SparseEngine:
        """An index with the encoder its queries need: the student's, or the one that was trained along with it."""
        if isinstance(index, BuiltSparseIndex):
            return SparseEngine(query_encoder(student), index, name=str(index.path))
        from rankdistill.quantization.quantize import query_encoder_folder

        own = query_encoder_folder(index) if index.manifest.get("quantizer") else None
        if own is not None:
            index.check_documents(student)
        return DenseEngine(self._open_student(own) if own else student, index, name=str(index.path))

    def engine(self, index: str | Path | None = None, *, memory_map: bool = False) -> Engine:
        """The student over an index of it, or over all its vectors, to search with text.

        Of an inference-free student whose documents are encoded the table of query weights alone is read: no torch.

        Args:
            memory_map: leave a FAISS index's codes on disk until they are touched.

        Raises:
            RankdistillError: the index belongs to another student or another collection.
        """
        opened = open_index(index, memory_map=memory_map) if index is not None else None
        model = self.trained().path / "model"
        vectors = self._vectors_folder(STUDENT, self.documents)
        student = query_side(self.recipe.student_kind, model, index, self.documents, vectors) or self.student()
        if opened is None:
            return exhaustive_engine(student, self.vectors(STUDENT, student, self.documents))
        if memory_map and not getattr(opened, "mappable", False):
            warn("a fast-scan index cannot be memory-mapped: it was read into memory whole")
        opened.check(collection=self.documents)
        return self.searched(opened, student)


def _headed(recipe: bytes) -> bytes:
    """A saved recipe's text below who wrote it, and its digest."""
    digest = hashlib.sha256(recipe).hexdigest()
    return f"{WRITTEN}, and again by each run into this folder. SHA-256: {digest}\n".encode() + recipe


def recipe_is_whole(run: Path) -> bool:
    """Whether a run's recipe, where it has one, is what was written."""
    saved = run / RECIPE
    content = saved.read_bytes() if saved.is_file() else _headed(b"")
    return content == _headed(content.partition(b"\n")[2])


def _lists(candidates: Artifact) -> Iterator[Ranking]:
    """The (query id, document ids, scores) of a candidates artifact."""
    return iter_run(candidates.path / FILE)


def members_of(teacher: Any) -> Sequence[Any]:
    """An ensemble's teachers, or the one there is."""
    return getattr(teacher, "teachers", [teacher])
