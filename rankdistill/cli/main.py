"""The command line: parses, prints, calls. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from rankdistill import __version__
from rankdistill.devices import use_device
from rankdistill.errors import UsageError

if TYPE_CHECKING:
    from rankdistill.stages import Workspace

INTERRUPTED = 130
MOST = 1 << 31  # of anything that is counted

NEXT = (
    ("rankdistill report {run}", "all figures, queries and documents on one page"),
    ('rankdistill search {run} "..."', "search with the student"),
    ("rankdistill serve {run} --open", "the same beside BM25 and the teacher, in a browser"),
    ("rankdistill recipes copy {recipe} mine.yaml", "then set its `collection` to texts of your own"),
    ("{run}/student/model", "the student, for sentence-transformers: SentenceTransformer(...)"),
)

app = typer.Typer(
    help="Distil expensive rankers into retrievers that can be served.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with the program.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes", rich_help_panel=None)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for another program to read.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors only.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")]
Budget = Annotated[
    str | None, typer.Option(help="Stop a language model at 500calls, 200000tokens or 3.50 (money, by its prices).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and ask nothing.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder (or file) to write.")]
Store = Annotated[Path | None, typer.Option("--store", help="Folder of the score store; default: the user's cache.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...: where all of it runs; default: a GPU if any.")
]
Recipe = Annotated[str, typer.Argument(help="A recipe: file or shipped name.", metavar="RECIPE")]
Collection = Annotated[str, typer.Argument(help="A collection.", metavar="COLLECTION")]
Run = Annotated[Path, typer.Argument(help="The folder of a run.", metavar="RUN")]


def _version(show: bool) -> None:
    if show:
        print(f"rankdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def verb(device: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes --device, where it computes, and --quiet beside its own options."""

    def command_of(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        shared = {**({"device": (Device, None)} if device else {}), "quiet": (Quiet, False)}
        parameters = [
            *signature.parameters.values(),
            *(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                for name, (annotation, default) in shared.items()
            ),
        ]

        @functools.wraps(function)
        def command(**options: Any) -> None:
            chosen = {name: options.pop(name) for name in shared}
            _begin(chosen["quiet"] or options.get("as_json", False), chosen.get("device"))
            function(**options)

        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return app.command()(command)

    return command_of


def _between(least: float, most: float, *, open_end: bool = False) -> Callable[[float | None], float | None]:
    """A check of a number above `least` and at most (`open_end`: below) `most`, which NaN is not."""

    def check(value: float | None) -> float | None:
        if value is None or least < value < most or (value == most and not open_end):
            return value
        raise typer.BadParameter(f"{value} is not above {least:g} and {'below' if open_end else 'at most'} {most:g}")

    return check


# -- recipes ----------------------------------------------------------------------------------------------------------


@verb()
def run(
    recipe: Recipe,
    changes: Set = None,
    out: Out = None,
    until: Annotated[str, typer.Option(help="Stop after this stage.")] = "evaluate",
    force: Annotated[list[str] | None, typer.Option(help="Do this stage again.", metavar="STAGE")] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Walk a recipe: mine, teach, score, train, index, evaluate. Finished stages are not run again."""
    workspace = _workspace_of(recipe, changes or [], out, store)
    result = workspace.run(until, force or [])
    if result is None:
        return
    _show(result if as_json else result.tables(short=True), as_json)  # the rest is in the report
    if not as_json:
        steps = [(command.format(run=workspace.path, recipe=recipe), purpose) for command, purpose in NEXT]
        width = max(len(command) for command, _ in steps)
        print("\n".join(["", *(f"{command:{width}}  {purpose}" for command, purpose in steps)]))


@recipes_app.callback()
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """Names and descriptions of the shipped recipes."""
    from rankdistill.recipe import read_yaml, shipped

    known = {name: str(read_yaml(path).get("description", "")).strip() for name, path in shipped("configs").items()}
    if as_json:
        print(json.dumps(known, indent=2))
        return
    width = max(len(name) for name in known)
    for name, description in known.items():
        _print(f"{name:{width}}  {description.splitlines()[0] if description else ''}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")], changes: Set = None) -> None:
    """A recipe with every default filled in."""
    from rankdistill.recipe import load_recipe

    print(yaml.safe_dump(load_recipe(name, changes or []).resolved(), sort_keys=False), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")], file: Annotated[Path, typer.Argument(metavar="FILE")]
) -> None:
    """Copy a shipped recipe to a file of your own to edit."""
    from rankdistill.recipe import find_declaration

    source = find_declaration("configs", name)
    if file.exists():
        raise UsageError("the file exists", where=str(file), fix="choose another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(source.read_bytes())
    print(f"edit {file}, then: rankdistill run {file}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """JSON Schema of a recipe, for editors."""
    from rankdistill.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


@recipes_app.command("methods")
def recipes_methods(
    kind: Annotated[str | None, typer.Argument(help="loss, teacher, student ...; all unless given.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="TYPE", help="Explain this one: a type.")] = None,
) -> None:
    """What a recipe can name, methods of other installed packages too; one of them with its keys."""
    from rankdistill.recipe import KINDS, method_class, method_names, nearest, parameters_model

    if kind is not None and kind not in KINDS:
        raise UsageError(f"there is no kind of method {kind!r}", fix=nearest(kind, KINDS))
    for each in [kind] if kind else KINDS:
        for known in [name] if name else sorted(method_names(each)):
            cls = method_class(each, known)
            said = (inspect.getdoc(cls) or "(its class says nothing of it)").partition("\nArgs:\n")[0]
            if not name:
                _print(f"{each:9}  {known:22}  {said.splitlines()[0]}")
                continue
            _print(f"{each} {known}\n\n{said}")
            for key, field in parameters_model(cls).model_fields.items():
                default = "needed" if field.is_required() else json.dumps(field.default, default=str)
                _print(f"    {key} ({default}): {field.description or ''}")


# -- stages -----------------------------------------------------------------------------------------------------------


@verb(device=False)
def collection(
    spec: Annotated[str, typer.Argument(help="DIR, beir:DIR, msmarco:DIR, ir_datasets:NAME, hf:NAME or python-docs.")],
    as_json: Json = False,
) -> None:
    """What is in a collection: counts, lengths, judged share, problems."""
    from rankdistill.collections import open_collection

    described = open_collection(spec).describe()
    outline = yaml.safe_dump(described, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
    _print(json.dumps(described, indent=2) if as_json else outline.rstrip())


@verb()
def generate(
    recipe: Recipe,
    changes: Set = None,
    out: Out = None,
    budget: Budget = None,
    dry_run: DryRun = False,
    store: Store = None,
) -> None:
    """Make queries with labels from a collection's documents, as a recipe's `generate` says."""
    from rankdistill.generation.generate import estimate
    from rankdistill.recipe import build
    from rankdistill.upkeep import check_run

    limit = [f"generate.generator.budget={budget}"] if budget else []
    workspace = _workspace_of(recipe, [*(changes or []), *limit], out, store)
    checked = workspace.recipe
    method = checked.generate.generator
    if method is None:
        fix = "--set 'generate.generator={type: titles}', or the recipe gpl"
        raise UsageError("the recipe generates no queries", where="generate.generator", fix=fix)
    if dry_run:
        generator = build("generator", method.settings(), "generate.generator")
        print("\n".join(estimate(workspace.documents, generator, checked.generate, checked.seed, workspace.store)))
        return
    check_run(workspace)
    _print(workspace.generate())


@verb()
def mine(
    spec: Collection,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    source: Annotated[
        list[str] | None,
        typer.Option(help="A source of candidates as YAML, e.g. '{type: bm25, quota: 50}'.", metavar="SOURCE"),
    ] = None,
    split: Annotated[str, typer.Option(help="Whose queries.")] = "train",
    depth: Annotated[int, typer.Option(help="Documents a query.", min=1, max=MOST)] = 100,
    positives: Annotated[bool, typer.Option(help="Put the labelled positives first.")] = True,
    trec: Annotated[Path | None, typer.Option(help="Also write a TREC run file.")] = None,
) -> None:
    """Mine candidates for a collection's queries."""
    from rankdistill.artifacts import check_file, check_place
    from rankdistill.collections import open_collection
    from rankdistill.indexes.mining import Source, export_trec
    from rankdistill.indexes.mining import mine as mine_candidates
    from rankdistill.recipe import build

    settings = [build("source", text, "--source") for text in source or ["{type: bm25}"]]
    check_place(out / "candidates")
    if trec is not None:
        check_file(trec)
    opened = open_collection(spec)
    sources = [Source.of(one, opened, out / "engines") for one in settings]
    artifact = mine_candidates(
        opened, sources, out / "candidates", depth=depth, split=split, include_positives=positives
    )
    if trec is not None:
        export_trec(artifact, trec)
    _print(artifact)


@verb()
def score(
    spec: Collection,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="A teacher as YAML, e.g. '{type: cross_encoder, model: FOLDER}'; with --probe, several."),
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option(help="What to score: a candidates folder, or a run (TREC or Parquet).")
    ] = None,
    imported: Annotated[
        Path | None, typer.Option("--import", help="Bring in a foreign score file instead.", metavar="FILE")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="Of the file: tsv, triples, trec, jsonl or auto.")] = "auto",
    kind: Annotated[str, typer.Option(help="Of the file's scores: logit, probability, similarity, rank.")] = "logit",
    budget: Budget = None,
    dry_run: DryRun = False,
    probe: Annotated[
        int | None,
        typer.Option(help="Only so many labelled training queries: is it better than its first stage?", min=2),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the scores to a Parquet file.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="platt or isotonic: fit to the train split's labels; --out gets probabilities.", metavar="METHOD"
        ),
    ] = None,
    store: Store = None,
) -> None:
    """Score candidates with a teacher, or import scores; they go to the store, each pair once."""
    from rankdistill.artifacts import check_file
    from rankdistill.cli import scoring
    from rankdistill.collections import open_collection
    from rankdistill.recipe import build
    from rankdistill.runs import iter_run
    from rankdistill.scores.store import ScoreStore
    from rankdistill.teachers.recorded import import_scores
    from rankdistill.teachers.scoring import score_candidates

    if out is not None:
        check_file(out, reads=[candidates, imported], mark="PAR1")
    opened = open_collection(spec)
    if imported is not None:
        scores = import_scores(imported, form, opened, ScoreStore(store), kind)  # type: ignore[arg-type]
    elif not teacher or candidates is None:
        raise UsageError("nothing to score", fix="give --teacher and --candidates, or --import FILE")
    elif probe is not None:
        scoring.probe_teachers(teacher, budget, opened, candidates, probe, ScoreStore(store))
        return
    elif len(teacher) > 1:
        raise UsageError("several teachers are compared, not scored together", where="--teacher", fix="--probe 50")
    else:
        run_file = candidates / "candidates.parquet" if candidates.is_dir() else candidates
        live = scoring.limited(build("teacher", teacher[0], "--teacher"), budget)
        if dry_run:
            scoring.print_estimate(live, opened, iter_run(run_file), ScoreStore(store))
            return
        scores = score_candidates(live, opened, iter_run(run_file), ScoreStore(store))
    if calibrate is not None:
        scoring.calibrate_scores(scores, opened, calibrate, out)
    elif out is not None:
        scores.export(out)
    _print(scores)


@verb()
def train(
    recipe: Recipe,
    changes: Set = None,
    out: Out = None,
    student: Annotated[str, typer.Option(help="`student`, or the name of a baseline.")] = "student",
    nproc: Annotated[
        int | None, typer.Option("--nproc", help="Train in so many processes (training.processes).", min=1, max=1024)
    ] = None,
    store: Store = None,
) -> None:
    """Train a recipe's student, with the stages before it where they are missing."""
    from rankdistill.progress import launched
    from rankdistill.upkeep import check_run

    processes = nproc or (launched()[1] if launched()[1] > 1 else None)  # `accelerate launch` says it in its own way
    together = [f"training.processes={processes}"] if processes else []
    workspace = _workspace_of(recipe, [*(changes or []), *together], out, store)
    check_run(workspace)
    artifact = workspace.train(student)
    if launched()[0] == 0:
        _print(f"{artifact.path / 'model'}  (loads in sentence-transformers)")


@verb()
def index(
    folder: Run,
    spec: Annotated[
        list[str] | None, typer.Option(help="An index specification: file or shipped name; again for more.")
    ] = None,
    on: Annotated[str | None, typer.Option("--collection", help="Index another collection than the run's own.")] = None,
    out: Out = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try search settings; print the best of quality, speed and bytes.")
    ] = False,
    target_recall: Annotated[
        float | None,
        typer.Option(
            help="Search as cheaply as this recall of exact search allows; kept in the file.", callback=_between(0, 1)
        ),
    ] = None,
    recall_at: Annotated[int, typer.Option(help="Documents of which recall counts.", min=1, max=MOST)] = 10,
    as_json: Json = False,
) -> None:
    """Export a run's student to an index: a file that plain FAISS opens, or a sparse student's inverted index."""
    from rankdistill.collections import open_collection

    names = spec or ["flat"]
    if out is not None and len(names) > 1:
        raise UsageError("one file cannot hold several indexes", where="--out", fix="one --spec, or no --out")
    workspace = _workspace(folder)
    if sweep or target_recall is not None:
        _refuse_for_sparse(workspace, "--sweep" if sweep else "--target-recall")
    over = open_collection(on) if on else workspace.documents
    student = workspace.student()
    indexes = [workspace.index(name, out, student=student, collection=over) for name in names]
    if not sweep and target_recall is None:
        _print(json.dumps([one.manifest for one in indexes], indent=2) if as_json else "\n".join(map(repr, indexes)))
        return
    from rankdistill.evaluation.operating_points import sweep_student
    from rankdistill.indexes.faiss_index import FaissIndex

    swept = sweep_student(
        student,
        [one for one in indexes if isinstance(one, FaissIndex)],
        workspace.vectors("student", student, over),
        over,
        k=recall_at,
        target_recall=target_recall,
        seed=workspace.recipe.seed,
    )
    if as_json or sweep:
        _show(swept, as_json)
    for name, point in swept.chosen.items():
        if not as_json:
            kept = "written into the file" if point.settings else "it has nothing to set"
            _print(f"{name}: {point} reaches recall@{recall_at} {point.recall:.4f}; {kept}")


@verb()
def quantize(
    folder: Annotated[Path | None, typer.Argument(help="The folder of a run.", metavar="[RUN]")] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Vectors made elsewhere instead: .npy, or Parquet with doc_id and vector.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="... and of queries to learn from: .npy, or Parquet with query_id and vector.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="Ids of a .npy of documents: text, one a line, or Parquet.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="A teacher's scores of them: a run (TREC or Parquet), for relevance: scores.")
    ] = None,
    spec: Annotated[str, typer.Option(help="A learned index specification: file or shipped name.")] = "distill_pq",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the specification.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Learn codebooks that keep the ranking, and write an index that plain FAISS opens."""
    from rankdistill.indexes.specification import QuantizerSpecification, any_specification

    specification = any_specification(spec, changes or [])
    if not isinstance(specification, QuantizerSpecification):
        raise UsageError(
            f"{specification.name} is built, not learned", where="--spec", fix="rankdistill index, or distill_pq"
        )
    if (folder is None) == (documents is None):
        raise UsageError("what shall be quantised?", fix="give the folder of a run, or --documents FILE")
    if folder is not None:
        foreign = [name for name, value in (("queries", queries), ("ids", ids), ("scores", scores)) if value]
        if foreign:
            raise UsageError(f"--{foreign[0]} belongs to --documents", fix="a run has its own")
        learned = _workspace(folder).index(specification, out)
    else:
        from rankdistill.quantization.quantize import quantize_files

        assert documents is not None
        file = out or Path(f"{specification.name}.faiss")
        learned = quantize_files(documents, queries, specification, file, ids=ids, scores=scores)
    _print(json.dumps(learned.manifest, indent=2) if as_json else learned)


@verb()
def search(
    folder: Run,
    query: Annotated[str, typer.Argument(help="What to look for.", metavar="QUERY")],
    index_file: Annotated[
        Path | None, typer.Option("--index", help="An index of this run (file or folder); exact search without one.")
    ] = None,
    memory_map: Annotated[
        bool, typer.Option("--memory-map", help="Leave a FAISS index on disk, for one that memory does not hold.")
    ] = False,
    count: Annotated[int, typer.Option("-k", help="Documents to show.", min=1, max=MOST)] = 10,
    fuse: Annotated[
        list[str] | None,
        typer.Option(help="Fuse with `bm25`, or the student of another run's folder; again for more.", metavar="WITH"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search a run's collection with its student."""
    from rankdistill.collections.passages import best_passages
    from rankdistill.plain import escaped, shown

    workspace = _searching_workspace(folder)
    if memory_map:
        _refuse_for_sparse(workspace, "--memory-map")
    if not query.strip():
        raise UsageError("the query is empty", fix='rankdistill search RUN "some words"')
    engine = workspace.engine(index_file, memory_map=memory_map)
    if fuse:
        from rankdistill.table_rows import fused_engine

        engine = fused_engine(workspace, engine, fuse, count)
    over = workspace.documents
    hits = engine.search([query], over.reach(count))[0]
    best = (best_passages(over.doc_ids(hits.rows)) if over.passages else list(range(len(hits.rows))))[:count]
    rows = [int(hits.rows[at]) for at in best]
    results = [
        {
            "rank": rank,
            "score": round(float(hits.scores[at]), 4),
            "doc_id": found,
            **({"passage": document.doc_id} if over.passages else {}),
            "text": f"{document.title} {document.text}".strip(),
        }
        for rank, (at, found, document) in enumerate(zip(best, over.found_ids(rows), over.documents(rows)), 1)
    ]
    if as_json:
        print("\n".join(map(escaped, json.dumps(results, indent=2, ensure_ascii=False).split("\n"))))
        return
    for result in results:
        doc_id, text = shown(result["doc_id"]), shown(" ".join(str(result["text"]).split()), 100)
        print(f"{result['rank']:3}  {result['score']:8.4f}  {doc_id}  {text}")


@verb()
def evaluate(
    folder: Run,
    suite: Annotated[str | None, typer.Option(help="A suite: file or shipped name; the recipe's by default.")] = None,
    local: Annotated[
        Path | None, typer.Option(help="A folder of sets in BEIR layout, used before any download.")
    ] = None,
    fetch: Annotated[bool, typer.Option(help="Look for sets that are not on this machine.")] = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure a run: BM25, the student before and after, baselines, the teacher, each index."""
    _show(_workspace(folder).evaluate(suite, out, local=local, fetch=fetch), as_json)


@verb()
def folds(
    recipe: Recipe,
    changes: Set = None,
    out: Out = None,
    protocol: Annotated[
        str, typer.Option(help="`clusters` of queries left out in turn, or `similarity` to the test queries.")
    ] = "clusters",
    buckets: Annotated[int, typer.Option(help="Clusters, and so runs.", min=2, max=MOST)] = 5,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Measure extrapolation: run a recipe once for each part of the queries held out, and pool per query."""
    from rankdistill.cli.folds import run_folds
    from rankdistill.evaluation.results import extrapolation_table
    from rankdistill.recipe import load_recipe

    if protocol not in ("clusters", "similarity"):
        raise UsageError(f"there is no protocol {protocol!r}", where="--protocol", fix="clusters or similarity")
    checked = load_recipe(recipe, changes or [])
    out = out or Path("runs") / f"{checked.name}-folds"
    pooled, name = run_folds(checked, out, store, protocol=protocol, buckets=buckets)  # type: ignore[arg-type]
    entry = pooled.protocols[0]
    metrics = next(iter(entry["gap"].values()))
    _show(pooled if as_json else [extrapolation_table(entry, metric, name) for metric in metrics], as_json)


@verb()
def serve(
    folder: Run,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback are open to others.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8080,
    index: Annotated[
        list[str] | None,
        typer.Option(help="An index specification or index file of this run; the recipe's by default.", metavar="SPEC"),
    ] = None,
    depth: Annotated[int, typer.Option(help="Documents a column.", min=1, max=50)] = 10,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = False,
) -> None:
    """A local page that shows BM25, the student, its indexes and the teacher side by side for a query you type."""
    from rankdistill.cli.serve import search_page
    from rankdistill.evaluation.page_server import PageServer
    from rankdistill.progress import say, warn

    workspace = _workspace(folder)
    server = PageServer(host, port)  # before anything is loaded: the port may be taken
    if not server.loopback:
        warn(f"{host} is not loopback: whoever reaches this machine can search this collection and read its documents")

    def ready(url: str) -> None:
        print(url, flush=True)
        say("Ctrl-C ends it")
        if open_browser:
            webbrowser.open(url)

    server.run(search_page(workspace, index, depth), ready)


@verb(device=False)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run files, or folders of runs or evaluations.", metavar="RUN...")],
    on: Annotated[str | None, typer.Option("--collection", help="Whose judgments; default the evaluation's.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the collection; default: test.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="A file of judgments: TREC, BEIR or Parquet.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="As ranx names them, e.g. ndcg@10.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this run alone; default: all pairs.")] = None,
    correction: Annotated[str, typer.Option(help="For many systems: holm or tukey.")] = "holm",
    alpha: Annotated[
        float, typer.Option(help="What corrected p-values are held against.", callback=_between(0, 1, open_end=True))
    ] = 0.05,
    relevance_level: Annotated[
        int | None, typer.Option(help="Least judgment that counts in binary metrics.", min=1)
    ] = None,
    drop_self_hits: Annotated[bool, typer.Option(help="Leave out documents whose id is the query's.")] = False,
    form: Annotated[str, typer.Option("--format", help="text, markdown or latex.")] = "text",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of printing.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs made anywhere: metrics, tests of significance, intervals."""
    from rankdistill.evaluation.compare import compare as compare_runs
    from rankdistill.evaluation.compare import show

    comparison = compare_runs(
        runs,
        qrels,
        collection=on,
        split=split,
        metrics=metric,
        baseline=baseline,
        correction=correction,
        alpha=alpha,
        relevance_level=relevance_level,
        drop_self_hits=drop_self_hits or None,
    )
    show(comparison, "json" if as_json else form, out)


@verb(device=False)
def report(
    folder: Run,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; default: RUN/report.html.")] = None,
    suite: Annotated[str | None, typer.Option(help="Which evaluation; default: of the recipe's suite.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables as Markdown to this file.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Also write the tables as LaTeX to this file.")] = None,
) -> None:
    """Write an evaluated run as one HTML page that opens from disk: tables, charts, queries and documents."""
    from rankdistill.evaluation.report import report as write_report

    _print(write_report(folder, out, suite=suite, markdown=markdown, latex=latex))


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="Read every file of this run instead.", metavar="[RUN]")] = None,
    index_file: Annotated[Path | None, typer.Option("--index", help="Look at an index file instead.")] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="With --index: the vectors it was built from (.npy or Parquet).")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="With --index: query vectors to search with (.npy or Parquet).")
    ] = None,
    count: Annotated[int, typer.Option("-k", help="With --index: hits asked for.", min=1, max=MOST)] = 100,
    as_json: Json = False,
) -> None:
    """What is installed, what is missing, how to get it; or what is wrong with an index."""
    _begin(as_json)
    from rankdistill.cli.doctor import checks, damaged_artifacts, look_at_index

    if folder is not None:
        damaged = damaged_artifacts(folder)
        _print(json.dumps(damaged, indent=2) if as_json else "\n".join(damaged) or "every file is what was written")
        raise typer.Exit(bool(damaged))
    if index_file is not None:
        looked = look_at_index(index_file, vectors, queries, count)
        _print(json.dumps(looked.to_json(), indent=2) if as_json else looked)
        return
    if vectors is not None or queries is not None:
        raise UsageError("--vectors and --queries go with --index", fix="rankdistill doctor --index FILE")
    results = checks()
    _print(json.dumps([check._asdict() for check in results], indent=2) if as_json else "\n".join(map(str, results)))
    if any(check.needed and not check.ok for check in results):
        raise typer.Exit(1)


# -- shared -----------------------------------------------------------------------------------------------------------


def _begin(quiet: bool, device: str | None = None) -> None:
    from rankdistill.progress import set_quiet

    set_quiet(quiet)
    use_device(device, command=True)
    # Libraries' own bars and advice would drown ours; ours say what is going on.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The CPU library keeps a kernel for each shape it has met: by default a thousand, which took gigabytes.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _print(value: Any) -> None:
    """Results as a terminal may show them: ids, titles and paths are others' words."""
    from rankdistill.plain import shown_lines

    print(shown_lines(value))


def _workspace(folder: Path) -> Workspace:
    from rankdistill.stages import Workspace

    return Workspace(folder)


def _workspace_of(recipe: str, changes: list[str], out: Path | None, store: Path | None) -> Workspace:
    from rankdistill.recipe import load_recipe
    from rankdistill.stages import Workspace

    checked = load_recipe(recipe, changes)
    return Workspace(out or Path("runs") / checked.name, checked, store)


def _searching_workspace(folder: Path) -> Workspace:
    """The saved recipe of an inference-free student is read without importing the methods it names, and so without
    torch: its own search needs none of them."""
    from rankdistill import recipe as recipes
    from rankdistill.indexes.by_student import INFERENCE_FREE
    from rankdistill.run_folder import RECIPE
    from rankdistill.stages import Workspace

    saved = folder / RECIPE
    values = recipes.read_yaml(saved) if saved.is_file() else None
    recipe = values and recipes.check_values(recipes.Recipe, values, str(saved), recipes.AS_WRITTEN)
    return Workspace(folder, recipe if recipe and recipe.student_kind == INFERENCE_FREE else None)


def _refuse_for_sparse(workspace: Workspace, option: str) -> None:
    """Refuse an option that means something for FAISS indexes alone."""
    from rankdistill.indexes.by_student import SPARSE_STUDENTS

    if workspace.recipe.student_kind in SPARSE_STUDENTS:
        raise UsageError(
            f"{option} is for FAISS indexes; a sparse student has none",
            where=f"student.type: {workspace.recipe.student_kind}",
            fix="leave it out; how Seismic searches is in its specification (query_cut, heap_factor)",
        )


def _show(result: Any, as_json: bool) -> None:
    from rankdistill.evaluation.tables import print_tables

    if as_json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print_tables(result)


def main() -> None:
    """The entry point: exit 0 done, 1 failed, 2 wrong usage or recipe, 130 interrupted (resumable)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no failure
    try:
        app(prog_name="rankdistill")
    except SystemExit as ending:
        if ending.code == INTERRUPTED:
            print("interrupted: run the same command again to go on from here", file=sys.stderr)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:  # nothing below is to end in a traceback
        from rankdistill.cli.net import report as report_error

        raise SystemExit(report_error(error)) from None


if __name__ == "__main__":
    main()
