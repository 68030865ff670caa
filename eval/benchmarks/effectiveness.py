"""Is the student better than the encoder anybody could download? A shipped recipe on several collections, the
quickstart's unless `--recipe` names another.

For each collection and seed one run of the recipe, with the ablations as its baselines: teacher, student of the
encoder's size, student of half its layers, and the same without one of their parts, at about the same training time.
Finished stages are not run again; a killed call goes on where it stopped. Test is measured once a run; parts are
compared on dev.

    python eval/benchmarks/effectiveness.py --collection python-docs:public --collection beir:PATH/nfcorpus --rows
    python eval/benchmarks/effectiveness.py --split dev --seeds 1 --out ablation.md
    python eval/benchmarks/effectiveness.py --split dev --seeds 1 --rows --teacher '{start: head}' --out head.md
    python eval/benchmarks/effectiveness.py --recipe documents_only_multi_vector --rows start --out documents_only.md
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from rankdistill.artifacts import write_atomically
from rankdistill.evaluation.significance import compare_values
from rankdistill.progress import say
from rankdistill.recipe import find_declaration, load_recipe, merge, read_yaml
from rankdistill.run_folder import STUDENT
from rankdistill.stages import Workspace

METRICS = ("ndcg@10", "recall@100")
HALF = {"layers": [0, 2, 5]}
# baseline → changes to the recipe; `half` is the recipe's own
ROWS: dict[str, dict[str, Any]] = {
    "labels": {"training": {"losses": [{"type": "infonce"}], "fit_scale": False}},
    "start": {"training": {"steps": 0}},
    "kl": {"training": {"losses": [{"type": "kl"}]}},
    "constant-scale": {"training": {"fit_scale": False}},
    "mix": {"training": {"interpolate": [0.25, 0.5, 0.75]}},
    "average": {"training": {"average": 3, "checkpoints": 8}},
    "filter": {"candidates": {"negatives_below": 0.95}},
    # The warm-up of `half` takes as long as these many steps over lists.
    "half-lists-alone": {"student": {**HALF, "warm_up": None}, "training": {"steps": 50, "learning_rate": 1e-4}},
    "half-after-encoder": {"student": {**HALF, "warm_up": {"steps": 60, "learning_rate": 2e-4}}},
}


def workspace(spec: str, seed: int, options: argparse.Namespace) -> Workspace:
    values = read_yaml(find_declaration("configs", options.recipe))
    own: dict[str, Any] = {
        "name": "effectiveness",
        "seed": seed,
        "collection": spec,
        "baselines": {name: row for name, row in ROWS.items() if options.rows is None or name in options.rows},
        "indexes": [],
        "evaluation": {"extrapolation": None, "latency_queries": 64, "teacher_depth": 50},
    }
    changes = "".join(f"-{key}-{value}" for key, value in options.teacher.items())
    if options.recipe == "quickstart":
        own |= {"candidates": {"queries": options.queries}, "training": {"steps": options.steps}}
        values["teacher"]["members"][0]["train"] |= {"steps": options.teacher_steps, **options.teacher}
    else:
        changes = f"-{Path(options.recipe).stem}"
    path = options.work / f"{Path(spec).name.replace(':', '-')}-{seed}{changes}"
    return Workspace(path, load_recipe(merge(values, own)), options.work / "store")


def measure(spec: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """system → metric → a value for each test query, with queries a second beside them."""
    run = workspace(spec, seed, options)
    done = run.path / f"measured-{options.split}.json"
    if done.is_file():
        measured: dict[str, Any] = json.loads(done.read_text())
        return measured
    for name in (STUDENT, *run.recipe.baselines):
        run.train(name)
    suite = {
        "name": f"effectiveness-{options.split}",
        "sets": [{"name": "set", "collection": spec, "split": options.split}],
        "metrics": list(METRICS),
        "depth": 100,
        "rerank_depth": 50,
        "systems": ["bm25", "sources", "teacher", "student", "baselines"],
        "fusion": [{"name": "BM25 + first stage", "members": ["bm25", "first_stage"]}],
    }
    suite_file = run.path / f"{suite['name']}.yaml"
    write_atomically(suite_file, yaml.safe_dump(suite))
    one = run.evaluate(suite_file).sets[0]
    file = next((run.path / "evaluation" / suite["name"]).rglob("per_query.parquet"))
    table = pq.read_table(file).to_pandas()
    measured = {
        row.system: {
            metric: table[table["system"] == row.system].sort_values("query_id")[metric].tolist() for metric in METRICS
        }
        | {"queries/s": row.queries_per_second}
        for row in one.rows
    }
    write_atomically(done, json.dumps(measured))
    means = {row: round(float(np.mean(values[METRICS[0]])), 4) for row, values in measured.items()}
    say(f"{spec}, seed {seed}: {means}")
    return measured


def table(spec: str, seeds: dict[int, dict[str, Any]], split: str) -> list[str]:
    """Means over the seeds, and each row against the encoder: values of a query averaged over seeds."""
    rows = [row for row in next(iter(seeds.values())) if all(row in one for one in seeds.values())]
    values = {row: {m: np.mean([one[row][m] for one in seeds.values()], axis=0) for m in METRICS} for row in rows}
    encoder = next(row for row in rows if row.startswith("first stage"))
    tests = compare_values(values, baseline=encoder, family="baseline", seed=1)
    base = float(values[encoder][METRICS[0]].mean())
    count = len(values[encoder][METRICS[0]])
    lines = [
        f"## {Path(spec).name}",
        "",
        f"{count} {split} queries, seeds {', '.join(map(str, seeds))}.",
        "",
        "| system | nDCG@10 | each seed | of the encoder's | Δ | 95 % | p | Recall@100 | queries/s |",
        "|:---|---:|:---|---:|---:|:---|---:|---:|---:|",
    ]
    for row in rows:
        ndcg, recall = (float(values[row][metric].mean()) for metric in METRICS)
        each = ", ".join(_figure(float(np.mean(one[row][METRICS[0]]))) for one in seeds.values())
        cells = [row, _figure(ndcg), each, f"{ndcg / base:.1%}", "", "", ""]
        if row != encoder:
            one = tests.of(row, encoder, METRICS[0])
            p = f"{one.p_randomisation_corrected:.4f}"
            difference = values[row][METRICS[0]] - values[encoder][METRICS[0]]
            low, high = np.percentile(_bootstrap(difference), [2.5, 97.5])
            cells[4:] = [f"{one.difference:+.4f}", f"{low:+.4f} to {high:+.4f}", f"**{p}**" if one.significant else p]
        rates = [one[row]["queries/s"] for one in seeds.values() if one[row]["queries/s"]]
        cells += [_figure(recall), f"{np.median(rates):,.0f}" if rates else ""]
        lines.append("| " + " | ".join(cells) + " |")
    student = "student, distilled"
    for other, says in (
        ("student, labels", "The teacher's part, distilled against labels alone on the same lists"),
        ("student, start", "What training adds to the student's start"),
    ):
        if other in rows:
            pair = compare_values({row: {METRICS[0]: values[row][METRICS[0]]} for row in (student, other)}, seed=1)
            against = pair.of(student, other, METRICS[0])
            low, high = np.percentile(_bootstrap(values[student][METRICS[0]] - values[other][METRICS[0]]), [2.5, 97.5])
            figures = f"{against.difference:+.4f} nDCG@10, {low:+.4f} to {high:+.4f}, p = {against.p_randomisation:.4f}"
            lines += ["", f"{says}: {figures}."]
    return [*lines, ""]


def _bootstrap(values: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.array([values[random.integers(len(values), size=len(values))].mean() for _ in range(resamples)])


def _figure(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", action="append", help="again for more; default: python-docs:public")
    parser.add_argument("--recipe", default="quickstart", help="a shipped recipe, or a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--queries", type=int, default=512, help="training queries whose lists are scored")
    parser.add_argument("--steps", type=int, default=32, help="of the student of the encoder's size")
    parser.add_argument("--teacher-steps", type=int, default=84)
    parser.add_argument("--teacher", type=yaml.safe_load, default={}, help="changes to the cross-encoder's training")
    parser.add_argument("--split", default="test", help="whose queries")
    parser.add_argument("--rows", nargs="*", help="of the ablations only these; none: --rows")
    parser.add_argument("--work", type=Path, default=Path("runs/effectiveness"), help="what is made on the way")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, run nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "effectiveness.md")
    options = parser.parse_args()
    specs = options.collection or ["python-docs:public"]
    named = " ".join(f"--collection {one.rpartition(':')[0]}:{Path(one.rpartition(':')[2]).name}" for one in specs)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    settings = f"--recipe {Path(options.recipe).stem} --split {options.split}"
    if options.recipe == "quickstart":
        settings += f" --queries {options.queries} --steps {options.steps} --teacher-steps {options.teacher_steps}"
    settings += f" --teacher '{json.dumps(options.teacher)}'" if options.teacher else ""
    lines = [
        "# Is the student better than the encoder it came from?",
        "",
        f"`python eval/benchmarks/effectiveness.py {named} {settings}`; {device}, {platform.machine()}, torch "
        f"{torch.__version__}. The teacher re-ranks the encoder's first 50. nDCG@10 and "
        "Recall@100 of an exhaustive search, means over the seeds; Δ, its bootstrap interval and p against the encoder "
        "(values of a query averaged over seeds, randomisation test, Holm's correction over rows and both metrics; "
        "bold: p < .05).",
        "",
    ]
    found: dict[str, dict[int, dict[str, Any]]] = {spec: {} for spec in specs}
    for seed in options.seeds:
        for spec in specs:
            if not options.table or (workspace(spec, seed, options).path / f"measured-{options.split}.json").is_file():
                found[spec][seed] = measure(spec, seed, options)
            if found[spec]:  # what is there is written at once
                body = [line for one, seeds in found.items() if seeds for line in table(one, seeds, options.split)]
                write_atomically(options.out, "\n".join([*lines, *body]))
    print(options.out.read_text())


if __name__ == "__main__":
    main()
