"""The order of the stages, and the evaluation that ends them.

    generate ─► mine ─► teach ─► score ─► train ─► quantize ─► index ─► evaluate

A `Workspace` is a run's folder (run_folder.py) with the walk through its stages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

from rankdistill.artifacts import claim_folder, locked, write_atomically
from rankdistill.collections import Collection
from rankdistill.errors import UsageError
from rankdistill.evaluation.evaluate import evaluate_suite
from rankdistill.evaluation.extrapolation import QuerySplit, run_split
from rankdistill.evaluation.results import SuiteEvaluation
from rankdistill.evaluation.suites import EvaluationSet, Suite, load_suite
from rankdistill.evaluation.systems import System
from rankdistill.indexes.bm25 import BM25
from rankdistill.indexes.lucene_bm25 import LuceneBM25
from rankdistill.indexes.specification import QuantizerSpecification
from rankdistill.progress import duration, say
from rankdistill.run_folder import STUDENT, RunFolder
from rankdistill.table_rows import open_bm25, run_systems
from rankdistill.upkeep import check_run, forget

STAGES = ("generate", "mine", "teach", "score", "train", "quantize", "index", "evaluate")


class Workspace(RunFolder):
    """A run's folder, walked from stage to stage.

    Args:
        path: the folder.
        recipe: what to run; the one saved in the folder unless given.
        store: folder of the score store; the user's cache unless given.
    """

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        suite: str | Path | None = None,
        out: str | Path | None = None,
        *,
        local: str | Path | None = None,
        fetch: bool = True,
    ) -> SuiteEvaluation:
        """Evaluate this run on a suite (the recipe's unless given); everything is written below `out`."""
        settings = self.recipe.evaluation
        chosen = {
            "depth": settings.depth,
            "rerank_depth": settings.teacher_depth,
            "first_stage_weight": settings.first_stage_weight,
            "latency_queries": settings.latency_queries,
        }
        declared = load_suite(suite or settings.suite)
        read = declared.model_copy(update={key: value for key, value in chosen.items() if value is not None})
        out = Path(out) if out is not None else self.path / "evaluation" / read.name
        if out.exists() and not out.is_dir():
            raise UsageError("an evaluation is written to a folder; there is a file here", where=str(out))

        def systems(collection: Collection, _: EvaluationSet, split: str) -> dict[str, System]:
            return self.systems(read, collection, split)

        def parted(collection: Collection, split: str) -> QuerySplit | None:
            if collection.fingerprint != self.collection.fingerprint:
                return None
            pool, training, folder = self.query_pool[0], self.queries[0], self.path / "vectors"
            return run_split(collection, split, pool, training, self.recipe, folder)

        trained = [name for name in (STUDENT, *self.recipe.baselines) if self.student_folder(name).is_dir()]
        students = {name: self.trained(name).fingerprint for name in trained}
        own = self.collection
        with locked(out), claim_folder(out):  # two processes would write one file of rankings
            return evaluate_suite(
                read, systems, out, split_for=parted, own=own, local=local, fetch=fetch, students=students
            )

    def systems(self, suite: Suite, collection: Collection, split: str) -> dict[str, System]:
        """The rows of a suite's table that this run can fill, made ready to search a collection."""
        return run_systems(self, suite, collection, split)

    def bm25(self) -> BM25 | LuceneBM25:
        """BM25 over the run's own collection: the recipe's, or with default settings."""
        return open_bm25(self, self.sources(self.documents, "bm25"), self.documents)

    # -- run ----------------------------------------------------------------------------------------------------------

    def run(self, until: str = STAGES[-1], force: Iterable[str] = ()) -> SuiteEvaluation | None:
        """Walk the stages; finished ones are not run again.

        Args:
            until: the last stage to run.
            force: stages whose artifacts are thrown away first (teacher scores in the store are kept).

        Raises:
            UsageError: an unknown stage.
        """
        for name in (until, *force):
            if name not in STAGES:
                raise UsageError(f"there is no stage {name!r}", fix=f"stages: {', '.join(STAGES)}")
        check_run(self)
        for name in force:
            forget(self, name)
        self.save_recipe()
        result = None
        for name in STAGES[: STAGES.index(until) + 1]:
            result = self._stage(name)
        return result

    def _stage(self, name: str) -> SuiteEvaluation | None:
        started = time.monotonic()
        result = None
        if name == "generate":
            if self.recipe.generate.generator is None:
                return None  # the collection's own queries: not a stage of it
            done = "{queries:,} queries of {kept:,} documents".format_map(self.generate().counts)
        elif name == "mine":
            train, dev = self.mine()
            done = f"{train.counts.get('queries', 0):,} training and {dev.counts.get('queries', 0):,} dev queries"
        elif name == "teach":
            done = self.teacher.type if self.recipe.teacher is not None else "no teacher"
        elif name == "score":
            done = f"{len(self.score()):,} scored lists"
            self.dev_lists()
        elif name == "train":
            names = [STUDENT, *self.recipe.baselines]
            for trained in names:
                self.train(trained)
            done = ", ".join(names)
        elif name in ("quantize", "index"):
            learned = [isinstance(specification, QuantizerSpecification) for specification in self.indexes]
            specifications = [
                each for each, is_learned in zip(self.indexes, learned) if is_learned == (name == "quantize")
            ]
            if not specifications and name == "quantize":
                return None  # no learned index in this recipe: not a stage of it
            student = self.student()
            indexes = [self.index(specification, student=student) for specification in specifications]
            done = ", ".join(f"{index.name} ({index.bytes_per_document:.0f} B a document)" for index in indexes)
            if not done and student.reads_pairs:
                return None  # it re-ranks: not a stage of it
            if not done:
                vectors = self.vectors(STUDENT, student, self.documents)
                done = f"no file; {vectors.kind.replace('_', ' ')} of {vectors.counts['documents']:,} documents"
        else:
            result = self.evaluate()
            done = str(result.path)
        say(f"{name}: {done} [{duration(time.monotonic() - started)}]")
        self._note_time(name, time.monotonic() - started)
        return result

    def _note_time(self, stage: str, seconds: float) -> None:
        """What each stage took, added up over restarts (an up-to-date stage adds next to nothing)."""
        path = self.path / "times.json"
        try:
            times = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            times = {}
        times[stage] = round(times.get(stage, 0.0) + seconds, 1)
        write_atomically(path, json.dumps(times, indent=2) + "\n")
