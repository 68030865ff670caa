"""The tables of a report, as cells; the page's template writes them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from rankdistill.evaluation.report.data import RunData, SetData, StudentData, is_number
from rankdistill.evaluation.report.findings import metric_name, percent, plain, signed
from rankdistill.evaluation.results import Row, bytes_text, figure_text, latency_text, p_text, rate_text
from rankdistill.evaluation.significance import Comparison

T = TypeVar("T")
MEASURES = {
    "kendall_tau": "Kendall τ",
    "rbo": "RBO",
    "margin_correlation": "margins, r",
    "margin_correlation_pooled": "margins, r (pooled)",
}
# Counts that are shown together, or belong to the rules rather than to the systems.
TOGETHER = {"win / tie / loss": ("student_better", "equal", "teacher_better"), "won / lost": ("won", "lost")}
APART = {"queries", "all_tied", "without_margins"}.union(*TOGETHER.values())
COSTS = {
    "encode, ms": "encode_ms",
    "search, ms": "search_ms",
    "re-rank, ms": "rerank_ms",
    "fuse, ms": "fuse_ms",
    "whole, ms": "total_ms",
}


class Cell(NamedTuple):
    """What a cell shows.

    Attributes:
        value: what it is sorted by.
        below: in small letters below the text.
        kind: of the system whose mark stands before the text.
        sign: `better` or `worse`, where it significantly is, than the student.
    """

    text: str
    value: float | str | None = None
    below: str = ""
    kind: str = ""
    sign: str = ""
    strong: bool = False
    code: bool = False


class Grid(NamedTuple):
    """A table: its name read aloud, (name, does it hold numbers?) of each column, rows, the rows that are stressed."""

    label: str
    header: list[tuple[str, bool]]
    rows: list[list[Cell]]
    chosen: list[bool]
    sortable: bool = True


@dataclass
class Column:
    """A column of a table of `T`: its name, and the cell of each row."""

    name: str
    cell: Callable[[Any], Cell]


def _grid(
    label: str, rows: Sequence[T], columns: Sequence[Column], chosen: Callable[[T], bool] | None = None
) -> Grid | None:
    """A table without the columns in which nothing stands; None where no row is left. The first column heads a row."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    filled = [at for at in range(len(columns)) if any(line[at].text for line in cells)]
    header = [(columns[at].name, any(is_number(line[at].value) for line in cells)) for at in filled]
    stressed = [chosen is not None and chosen(row) for row in rows]
    return Grid(label, header, [[line[at] for at in filled] for line in cells], stressed) if rows else None


def _number(value: Any, text: Callable[[Any], str] = figure_text, **more: Any) -> Cell:
    return Cell(text(value), value, **more) if is_number(value) else Cell("")


def _counted(value: float) -> str:
    return f"{value:,.0f}"


def _words(value: Any, code: bool = False) -> Cell:
    return Cell(str(value or ""), str(value or ""), code=code)


def _system(run: RunData) -> Column:
    return Column("system", lambda name: Cell(name, name, kind=run.kind(name)))


def results(run: RunData, test_set: SetData) -> Grid | None:
    rows = test_set.evaluation.rows

    def figure(metric: str) -> Column:
        best = figure_text(max((row.means[metric] for row in rows if metric in row.means), default=0.0))

        def cell(row: Row) -> Cell:
            value, interval = row.means.get(metric), test_set.interval(row.system, metric)
            tested = test_set.comparison(row.system, run.student, metric) if row.system != run.student else None
            return _number(
                value,
                below=f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "",
                sign=("better" if tested.difference > 0 else "worse") if tested and tested.significant else "",
                strong=figure_text(value) == best,
            )

        return Column(metric_name(metric), cell)

    queries, depth = f"{test_set.queries:,} queries", f"{test_set.evaluation.depth:,} documents deep"
    label = f"{test_set.name}: {test_set.evaluation.split} split, {queries}, {depth}"
    columns = [
        Column("system", lambda row: Cell(row.system, row.system, kind=run.kind(row.system))),
        *map(figure, test_set.evaluation.metrics),
        Column("size", lambda row: _number(test_set.cost_of(row.system).get("bytes"), bytes_text)),
        Column("queries/s", lambda row: _number(test_set.rate(row.system), rate_text)),
        Column("ms a query", lambda row: _number(test_set.latency(row.system), latency_text)),
    ]
    return _grid(label, rows, columns, lambda row: run.kind(row.system) == "student")


def macro(run: RunData) -> Grid | None:
    means = run.suite.macro

    def figure(metric: str) -> Column:
        best = figure_text(max((of_system.get(metric, 0.0) for of_system in means.values()), default=0.0))
        shown = {name: figure_text(of_system.get(metric)) for name, of_system in means.items()}
        return Column(metric_name(metric), lambda name: _number(means[name].get(metric), strong=shown[name] == best))

    label = f"{run.suite.suite}: macro average over {run.suite.macro_sets} sets"
    return _grid(label, list(means), [_system(run), *map(figure, run.suite.metrics)])


def published(figures: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Grid | None:
    """Figures of others that share a metric with ours."""
    columns = [
        Column("system", lambda row: _words(f"{row['system']} ({row['note']})" if row.get("note") else row["system"])),
        *(Column(metric_name(name), lambda row, name=name: _number(row["metrics"].get(name))) for name in metrics),  # type: ignore[misc]
        Column("source", lambda row: _words(row["source"])),
    ]
    shared = [row for row in figures if set(row["metrics"]) & set(metrics)]
    grid = _grid("Published by others, not measured here", shared, columns)
    return grid and grid._replace(sortable=False)


def comparisons(run: RunData, test_set: SetData) -> Grid | None:
    """The student against each system; all pairs where it was not compared."""
    tests = test_set.evaluation.significance
    if tests is None:
        return None
    student = str(run.student)
    pairs = [
        tests.of(student, each.b if each.a == student else each.a, each.metric)
        for each in tests.comparisons
        if student in (each.a, each.b)
    ]

    def interval(each: Comparison) -> Cell:
        known = each.low is not None and each.high is not None
        return Cell(f"{signed(each.low)} to {signed(each.high)}", each.low) if known else Cell("")  # type: ignore[arg-type]

    columns = [
        Column("pair", lambda each: _words(f"{each.a} − {each.b}")),
        Column("metric", lambda each: _words(metric_name(each.metric))),
        Column("difference", lambda each: _number(each.difference, signed)),
        Column("95\u00a0% interval", interval),
        Column("effect size", lambda each: _number(each.effect_size, lambda value: signed(value, 2))),
        Column("wins / ties / losses", lambda each: Cell(f"{each.wins} / {each.ties} / {each.losses}", each.wins)),
        Column("p, t-test", lambda each: _number(each.p_t_corrected, p_text)),
        Column("p, randomisation", lambda each: _number(each.p_randomisation_corrected, p_text)),
        Column("significant", lambda each: _words("yes" if each.significant else "no")),
    ]
    return _grid("Comparisons", pairs or tests.comparisons, columns)


def fidelity(run: RunData, test_set: SetData) -> Grid | None:
    systems = {name: of for name, of in (test_set.fidelity.get("systems") or {}).items() if isinstance(of, dict)}

    def measure(key: str) -> Column:
        def text(value: float) -> str:
            if isinstance(value, int):
                return f"{value:,}"
            return percent(value) if key.startswith(("unscored", "not_retrieved")) else f"{value:.3f}"

        return Column(MEASURES.get(key, key.replace("_", " ")), lambda name: _number(systems[name].get(key), text))

    def together(title: str, keys: Sequence[str]) -> Column:
        def cell(name: str) -> Cell:
            counts = [systems[name].get(key) for key in keys]
            known = all(is_number(count) for count in counts)
            return Cell(" / ".join(f"{count:,}" for count in counts), counts[0]) if known else Cell("")

        return Column(title, cell)

    columns = [
        _system(run),
        Column(metric_name(run.metric), lambda name: _number(test_set.score(name, run.metric))),
        *(measure(key) for key in dict.fromkeys(key for of in systems.values() for key in of if key not in APART)),
        *(together(title, keys) for title, keys in TOGETHER.items()),
    ]
    return _grid(f"{test_set.name}: agreement with {test_set.fidelity.get('teacher', '?')}", list(systems), columns)


def extrapolation(run: RunData, test_set: SetData, protocol: Mapping[str, Any], title: str) -> Grid | None:
    """Test queries near the training queries against those far from them: an entry of `extrapolation.json`."""
    parts = {name: part or {} for name, part in (protocol.get("parts") or {}).items()}

    def of(values: Mapping[str, Any], system: str) -> Any:
        return (values.get(system) or {}).get(run.metric)

    def mean(part: str) -> Column:
        def cell(system: str) -> Cell:
            ends = of(parts[part].get("intervals") or {}, system)
            below = f"{ends[0]:.3f}–{ends[1]:.3f}" if ends else ""
            return _number(of(parts[part].get("systems") or {}, system), below=below)

        return Column(part, cell)

    def gap(key: str, name: str) -> Column:
        def cell(system: str) -> Cell:
            value = of(protocol.get(key) or {}, system)
            if not value:
                return Cell("")
            return Cell(signed(value[0]), value[0], below=f"{signed(value[1], 3)} to {signed(value[2], 3)}")

        return Column(name, cell)

    columns = [
        _system(run),
        *map(mean, parts),
        gap("gap", "gap"),
        gap("gap_beyond", f"gap beyond {protocol.get('reference')}’s"),
    ]
    measured = [name for name in test_set.systems if all(column.cell(name).text for column in columns[1:3])]
    return _grid(f"{test_set.name}: {metric_name(run.metric)}, {title}", measured, columns)


def costs(run: RunData, test_set: SetData) -> Grid | None:
    def latencies(key: str) -> Callable[[str], Cell]:
        def cell(name: str) -> Cell:
            known = [test_set.latency(name, percentile, key) for percentile in ("p50", "p95", "p99")]
            return Cell(" / ".join(latency_text(value) for value in known if is_number(value)), known[0])

        return cell

    columns = [
        _system(run),
        *(Column(title, latencies(key)) for title, key in COSTS.items()),
        Column("queries/s", lambda name: _number(test_set.rate(name), rate_text)),
        Column("size", lambda name: _number(test_set.cost_of(name).get("bytes"), bytes_text)),
        Column(
            "bytes a document", lambda name: _number(test_set.cost_of(name).get("bytes_a_document"), "{:,.1f}".format)
        ),
        Column("memory", lambda name: _number(test_set.cost_of(name).get("memory_bytes"), bytes_text)),
        Column(
            "parameters", lambda name: _number(test_set.cost_of(name).get("parameters"), lambda n: f"{n / 1e6:,.1f} M")
        ),
    ]
    return _grid(f"{test_set.name}: cost", [name for name in test_set.systems if test_set.cost_of(name)], columns)


def students(run: RunData) -> Grid | None:
    def count(key: str) -> Callable[[StudentData], Cell]:
        return lambda each: _number((each.manifest.get("counts") or {}).get(key), _counted)

    columns = [
        Column("student", lambda each: _words(each.name)),
        Column("kept step", lambda each: _number(each.kept_step, _counted)),
        Column("of", count("steps")),
        Column("best on dev", lambda each: _number(max(each.dev.values(), default=None))),
        Column("lists", count("lists")),
        Column("documents a list", count("documents_a_list")),
        Column("seconds", lambda each: _number(each.manifest.get("seconds"), _counted)),
        Column("precision", lambda each: _words(each.manifest.get("precision"))),
    ]
    return _grid("Students trained in this run", run.students, columns)


def environment(run: RunData) -> Grid | None:
    rows: dict[tuple[str, str], None] = {}
    for name, value in (item for test_set in run.sets for item in test_set.evaluation.environment.items()):
        versions = value if isinstance(value, dict) else {name.replace("_", " "): value}
        rows.update({(str(what), str(version)): None for what, version in versions.items()})
    columns = [Column("what", lambda row: Cell(row[0])), Column("version or value", lambda row: Cell(row[1]))]
    grid = _grid("Environment of the evaluation", list(rows), columns)
    return grid and grid._replace(sortable=False)


def artifacts(run: RunData) -> Grid | None:
    def counts(item: tuple[str, Mapping[str, Any]]) -> Cell:
        values = (item[1].get("counts") or {}).items()
        return Cell(", ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in values))

    columns = [
        Column("folder", lambda item: _words(item[0], code=True)),
        Column("kind", lambda item: _words(item[1].get("kind"))),
        Column("fingerprint", lambda item: _words(item[1].get("fingerprint"), code=True)),
        Column("seconds", lambda item: _number(item[1].get("seconds"), "{:,.1f}".format)),
        Column("device", lambda item: _words(item[1].get("device"))),
        Column("counts", counts),
    ]
    return _grid("Artifacts", list(run.manifests.items()), columns)
