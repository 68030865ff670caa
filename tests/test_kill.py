"""`run` is killed at random moments, at least twenty times, and run again until it is done.

Whatever the moment: the same final metrics and weights as an undisturbed run, nothing half-written taken for whole, and
no pair scored twice except those of the part in flight.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from forked import Forked

from rankdistill.artifacts import open_artifact
from rankdistill.scores.lists import ScoredLists
from rankdistill.stages import STAGES as ALL_STAGES

KILLS = 20
CHUNK = PART = 24  # pairs handed to the teacher at once, and pairs a part of the store


STAGES = [stage for stage in ALL_STAGES if stage not in ("generate", "quantize")]  # this recipe has neither


def run_recipe(recipe: str, out: str, store: str, log: str) -> None:
    """The program, its score store in small parts, and every pair that is scored noted in a log."""
    import sys

    from rankdistill.cli.main import main
    from rankdistill.scores.store import TeacherScores
    from rankdistill.teachers.scoring import score_candidates

    TeacherScores.__init__.__kwdefaults__["part_pairs"] = PART  # type: ignore[attr-defined]
    score_candidates.__kwdefaults__["chunk_pairs"] = CHUNK  # type: ignore[attr-defined]
    original = TeacherScores.add
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def add(self: TeacherScores, query_id: str, doc_ids: Any, scores: Any) -> int:
        lines = "".join(f"{self.path.parent.name} {query_id} {doc_id}\n" for doc_id in doc_ids)
        os.write(descriptor, lines.encode())
        return original(self, query_id, doc_ids, scores)

    TeacherScores.add = add  # type: ignore[method-assign]
    sys.argv = ["rankdistill", "run", recipe, "--out", out, "--store", store]
    main()


def copies(beir: Path, folder: Path, count: int = 4) -> Path:
    """A larger collection: each document and query so many times, told apart by a number."""
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        entries = [json.loads(line) for line in (beir / name).read_text().splitlines()]
        numbered = [
            {**entry, "_id": f"{entry['_id']}-{number}", "text": f"{entry['text']} Note {number}."}
            for number in range(count)
            for entry in entries
        ]
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in numbered))
    for file in (beir / "qrels").iterdir():
        header, *lines = file.read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        numbered_rows = [f"{q}-{n}\t{d}-{n}\t{grade}" for n in range(count) for q, d, grade in rows]
        (folder / "qrels" / file.name).write_text("\n".join([header, *numbered_rows]) + "\n")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tiny_beir: Path, tiny_encoder: Path, tiny_recipe: Callable[..., dict[str, Any]]) -> Path:
    path = tmp_path / "kill.yaml"
    model = str(tiny_encoder)
    sources = [{"type": "bm25", "quota": 8}, {"type": "dense", "model": model, "quota": 8}]
    values = tiny_recipe(
        collection=f"beir:{copies(tiny_beir, tmp_path / 'facts')}",
        candidates={"depth": 16, "sources": sources},
        teacher={"type": "cross_encoder", "model": model, "max_length": 48, "train": {"steps": 6, "batch_size": 8}},
        student={"type": "dense", "model": model, "layers": [0], "similarity": "dot", "document_length": 32},
        training={
            "steps": 12,
            "learning_rate": 5e-3,
            "batches": {"type": "random_batches", "size": 4},
            "checkpoints": 4,
            "metric": "map",
            "log_every": 3,
        },
        baselines={"labels": {"training": {"losses": [{"type": "infonce"}]}}},
        indexes=["flat", "sq8"],
        evaluation={"teacher_depth": 20},
    )
    path.write_text(yaml.safe_dump(values))
    return path


class Workplace:
    """One workspace with its own store and log, run and killed until it is done."""

    def __init__(self, root: Path, recipe: Path) -> None:
        self.root, self.recipe = root, recipe
        self.out, self.store, self.log = root / "run", root / "store", root / "log"
        root.mkdir()

    def start(self) -> Forked:
        return Forked(run_recipe, *map(str, (self.recipe, self.out, self.store, self.log)), folder=self.root / "output")

    def stage(self) -> str:
        """The stage that the last attempt had reached."""
        output = self.root / "output" / "err"
        lines = output.read_text() if output.is_file() else ""
        finished = re.findall(rf"^({'|'.join(STAGES)}): .*\[\w+\]$", lines, re.MULTILINE)
        return STAGES[min(len(finished), len(STAGES) - 1)]

    def check_whole(self) -> None:
        """Everything that has its final name is whole."""
        for manifest in self.out.rglob("manifest.json"):
            if any(part.endswith((".partial", ".old")) for part in manifest.relative_to(self.out).parts):
                continue
            artifact = open_artifact(manifest.parent)
            if artifact.kind == "candidates":
                rows = pq.read_table(artifact.path / "candidates.parquet").num_rows
                assert rows == artifact.counts["candidates"]
            elif artifact.kind == "lists":
                assert len(ScoredLists.open(artifact.path)) == artifact.counts["lists"]
            elif artifact.kind == "vectors":
                assert np.isfinite(np.load(artifact.path / artifact.manifest["file"], allow_pickle=False)).all()
            elif artifact.kind in ("student", "teacher"):
                assert self.weights(artifact.path)
        for file in self.out.glob("indexes/*.faiss"):
            import faiss

            assert faiss.read_index(str(file)).ntotal > 0
        for part in self.store.glob("*/*/part-*.parquet"):
            assert pq.read_table(part).num_rows > 0

    def weights(self, folder: Path) -> dict[str, bytes]:
        from safetensors.numpy import load_file

        return {name: array.tobytes() for name, array in load_file(folder / "model" / "model.safetensors").items()}

    def result(self) -> dict[str, Any]:
        """What must not depend on kills: metrics, weights and the teacher's scores."""
        results = json.loads((self.out / "evaluation" / "collection" / "results.json").read_text())
        return {
            "metrics": {row["system"]: row["means"] for one in results["sets"] for row in one["rows"]},
            "dev": open_artifact(self.out / "student").manifest["dev"],
            "student": self.weights(self.out / "student"),
            "labels": self.weights(self.out / "baselines" / "labels"),
            "scores": self.scores(),
        }

    def scores(self) -> dict[tuple[str, str, str], float]:
        rows = [
            ((part.parents[1].name, row["query_id"], row["doc_id"]), row["score"])
            for part in self.store.glob("*/*/part-*.parquet")
            for row in pq.read_table(part).to_pylist()
        ]
        assert len(dict(rows)) == len(rows), "a pair is in the store twice"
        return dict(rows)

    def scored_again(self) -> int:
        lines = self.log.read_text().splitlines()
        return len(lines) - len(set(lines))


def test_run_survives_being_killed_at_any_moment(tmp_path: Path, recipe: Path) -> None:
    calm = Workplace(tmp_path / "calm", recipe)
    process, lasts = calm.start(), Counter[str]()
    while process.work(process.processor_seconds() + 0.01):
        lasts[calm.stage()] = process.processor_seconds()
    ending = process.wait()
    assert ending.code == 0, ending.err
    ends = [0.0, *(lasts[stage] for stage in STAGES)]
    seconds = {stage: max(0.02, ends[at + 1] - ends[at]) for at, stage in enumerate(STAGES)}
    expected = calm.result()
    assert calm.scored_again() == 0 and len(expected["scores"]) > 20 * PART

    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    print(f"seed {seed}; undisturbed: {', '.join(f'{stage} {value:.2f} s' for stage, value in seconds.items())}")
    kills: Counter[str] = Counter()
    finished, worked = 0, 0.0
    while kills.total() < KILLS:
        place = Workplace(tmp_path / f"killed-{finished}", recipe)
        scoring_kills = 0
        # No later kill once there are enough: the last workspace is run to its end.
        while kills.total() < KILLS:
            # Somewhere in a stage, each aimed at as often: some are over in no time, and would hardly be hit.
            aim = STAGES[(chance.randrange(2) + kills.total()) % len(STAGES)]
            process = place.start()
            while process.work(process.processor_seconds() + 0.01) and STAGES.index(place.stage()) < STAGES.index(aim):
                pass
            if not process.work(process.processor_seconds() + chance.uniform(0.0, seconds[aim])):
                break
            worked += process.processor_seconds()
            process.kill()
            kills[place.stage()] += 1
            scoring_kills += place.stage() in ("score", "evaluate")
            place.check_whole()
        else:
            process = place.start()
        ending = process.wait()
        assert ending.code == 0, ending.err
        place.check_whole()
        again = place.scored_again()
        # A list is never torn, so a part may be over its size by one.
        assert again <= scoring_kills * (PART + CHUNK + 2 * 16), f"{again} pairs scored again, {scoring_kills} kills"
        found = place.result()
        for name, value in expected.items():
            assert found[name] == value, f"{name} differs after kills"
        finished += 1
        print(f"workspace {finished}: done, {again} of {len(found['scores'])} pairs scored again")
    print(f"{kills.total()} kills: {dict(kills)}; {worked:.0f} s of processor time until they came")
    assert kills.total() >= 20 and len(kills) >= 4
