"""The sections of a report on what was measured. Each takes what was read and gives markup, or says what is absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankdistill.evaluation.report import charts
from rankdistill.evaluation.report.charts import Point, number
from rankdistill.evaluation.report.data import RunData, SetData
from rankdistill.evaluation.report.findings import (
    cautions,
    comparison,
    headline,
    metric_name,
    percent,
    shortened,
    signed,
    size_of,
    tiles,
    times,
)
from rankdistill.evaluation.report.html import Content, Markup, join, tag
from rankdistill.evaluation.report.parts import (
    SHAPES,
    Cell,
    Header,
    absent,
    bullets,
    chip,
    copy_button,
    details,
    figure,
    grid,
    is_number,
    per_set,
    plain,
    section,
)
from rankdistill.evaluation.report.queries import Queries
from rankdistill.evaluation.results import bytes_text, figure_text, latency_text, p_text, rate_text, tables


def summary(run: RunData) -> Markup:
    what, kept = headline(run)
    shown = [
        tag(
            "div",
            {"class": "tile"},
            tag("dt", None, tile.label),
            tag("dd", None, tag("b", None, tile.value), tag("span", None, tile.detail)),
        )
        for tile in tiles(run)
    ]
    return tag(
        "section",
        {"id": "summary", "aria-labelledby": "summary-title"},
        tag("h2", {"id": "summary-title", "class": "unseen"}, "In short"),
        tag("p", {"class": "headline"}, kept),
        tag("p", {"class": "what"}, what),
        tag("dl", {"class": "tiles"}, shown) if shown else None,
        tag("div", {"class": "care"}, tag("h3", None, "Read with care"), bullets(cautions(run), "plain")),
    )


def results(run: RunData) -> Markup:
    lead = "Means over the queries; the best figures of a column are bold."
    if any(one.evaluation.significance is not None for one in run.sets):
        lead += (
            " Below each figure its 95\u00a0% interval. ▲ significantly better and ▼ significantly worse than the "
            "student; no mark: no difference could be shown."
        )
    macro = _macro(run) if len(run.sets) > 1 else None
    return section("results", "Results", macro, per_set(run, lambda one: _set_results(run, one)), lead=lead)


def _macro(run: RunData) -> Markup:
    metrics, rows = run.suite.metrics, []
    best = {name: max((of.get(name, 0.0) for of in run.suite.macro.values()), default=0.0) for name in metrics}
    for system, means in run.suite.macro.items():
        cells: list[Cell] = [(join(chip(run, system), system), system)]
        for name in metrics:
            value = means.get(name)
            shown = figure_text(value)
            strong = value is not None and shown == figure_text(best[name])
            cells.append((tag("b", None, shown) if strong else shown, value))
        rows.append(cells)
    header: list[Header] = [("system", False), *((metric_name(name), True) for name in metrics)]
    label = f"{run.suite.suite}: macro average over {run.suite.macro_sets} sets"
    missing = f" {len(run.suite.missing)} sets are missing from it." if run.suite.missing else ""
    note = f"Only systems that were measured on every set are averaged.{missing}"
    return join(
        tag("h3", None, label), grid(header, rows, label), bullets([note]), _published(run.suite.published, metrics)
    )


def _set_results(run: RunData, one: SetData) -> Markup:
    evaluation, metrics = one.evaluation, one.evaluation.metrics
    best = {
        name: max((row.means[name] for row in evaluation.rows if name in row.means), default=0.0) for name in metrics
    }
    costs = _cost_columns(one)
    rows, classes = [], []
    for row in evaluation.rows:
        cells: list[Cell] = [(join(chip(run, row.system), row.system), row.system)]
        for name in metrics:
            value = row.means.get(name)
            strong = figure_text(value) == figure_text(best[name])
            cells.append((_figure(run, one, row.system, name, value, strong), value))
        cells += [(text(row.system), value(row.system)) for _, text, value in costs]
        rows.append(cells)
        classes.append("chosen" if run.kind(row.system) == "student" else "")
    header: list[Header] = [("system", False), *((metric_name(name), True) for name in metrics)]
    header += [(name, True) for name, _, _ in costs]
    queries = evaluation.rows[0].notes.get("queries", 0) if evaluation.rows else 0
    label = f"{one.name}: {evaluation.split} split, {queries:,} queries, {evaluation.depth:,} documents deep"
    return join(
        tag("p", {"class": "table-title"}, label),
        grid(header, rows, label, classes=classes),
        _interval_chart(run, one),
        details("How each row was counted", bullets(_row_notes(one))),
        _comparisons(run, one),
        _published(evaluation.published, metrics),
    )


def _figure(run: RunData, one: SetData, system: str, metric: str, value: float | None, strong: bool) -> Markup:
    shown = figure_text(value)
    row = one.row(system)
    interval = _interval(one, system, metric) if row else None
    found = comparison(one, system, run.student, metric) if run.student and system != run.student else None
    sign: Markup | None = None
    if found is not None and found.significant:
        better = found.difference > 0
        words = f"significantly {'better' if better else 'worse'} than {run.student}"
        sign = tag("span", {"class": "up" if better else "down", "title": words}, "▲" if better else "▼")
        sign = join(sign, tag("span", {"class": "unseen"}, f" {words}"))
    below = tag("small", None, f"{interval[0]:.3f}–{interval[1]:.3f}") if interval else None
    return join(tag("span", {"class": "figure"}, sign, tag("b", None, shown) if strong else shown), below)


def _interval(one: SetData, system: str, metric: str) -> tuple[float, float] | None:
    row = one.row(system)
    found = ((one.significance or {}).get("intervals") or {}).get(system, {}).get(metric)
    found = found or (row.intervals.get(metric) if row else None)
    return (float(found[0]), float(found[1])) if found and None not in found else None


Column = tuple[str, Callable[[str], Content], Callable[[str], "float | None"]]


def _cost_columns(one: SetData) -> list[Column]:
    """Size and speed, where any system has them."""

    def rate(system: str) -> float | None:
        row = one.row(system)
        found = one.cost_of(system).get("batch_queries_per_second") or (row.queries_per_second if row else None)
        return float(found) if found else None

    def latency(system: str) -> float | None:
        found = (one.cost_of(system).get("total_ms") or {}).get("p50")
        return float(found) if found else None

    columns: list[Column] = [
        ("size", lambda name: bytes_text(size_of(one, name)), lambda name: size_of(one, name)),
        ("queries/s", lambda name: rate_text(rate(name)), rate),
        ("ms a query", lambda name: latency_text(latency(name)), latency),
    ]
    return [column for column in columns if any(column[2](name) for name in one.systems)]


def _row_notes(one: SetData) -> list[Content]:
    below = tables(one.evaluation)[0].lines_below
    return [line for line in below if not line.startswith("▲")]  # marks on this page refer to the student


def _interval_chart(run: RunData, one: SetData) -> Markup | None:
    rows = []
    for system in one.systems:
        row, interval = one.row(system), _interval(one, system, run.metric)
        if row is None or run.metric not in row.means:
            continue
        kind, value = run.kind(system), row.means[run.metric]
        hint = f"{system}: {value:.4f}" + (f" ({interval[0]:.4f}–{interval[1]:.4f})" if interval else "")
        low, high = interval or (None, None)
        rows.append((Point(value, 0, shortened([system])[system], kind, SHAPES[kind], hint), low, high))
    if not rows or all(low is None for _, low, _ in rows):
        return None
    title = f"{metric_name(run.metric)} of each system with its 95\u00a0% interval"
    return figure(
        charts.intervals(rows, title, metric_name(run.metric)),
        "Intervals are of each mean alone. Systems share their queries, so that two overlapping intervals may still "
        "differ significantly: the tests of pairs decide.",
    )


def _comparisons(run: RunData, one: SetData) -> Markup | None:
    found = one.evaluation.significance
    if found is None:
        return absent("Significance: not tested in this evaluation (it was made by an older version); evaluate again.")
    chosen = [each for each in found.comparisons if run.student in (each.a, each.b)] or found.comparisons
    rows: list[list[Cell]] = []
    for each in chosen:
        if run.student in (each.a, each.b):
            each = found.of(str(run.student), each.b if each.a == run.student else each.a, each.metric)
        interval = (
            f"{signed(each.low)} to {signed(each.high)}" if each.low is not None and each.high is not None else ""
        )
        effect = "" if each.effect_size is None else signed(each.effect_size, 2)
        verdict = "yes" if each.significant else "no"
        rows.append(
            [
                (f"{each.a} − {each.b}", f"{each.a} − {each.b}"),
                (metric_name(each.metric), each.metric),
                (signed(each.difference), each.difference),
                (interval, each.low),
                (effect, each.effect_size),
                (f"{each.wins} / {each.ties} / {each.losses}", each.wins),
                (p_text(each.p_t_corrected), each.p_t_corrected),
                (p_text(each.p_randomisation_corrected), each.p_randomisation_corrected),
                (verdict, verdict),
            ]
        )
    header: list[Header] = [("pair", False), ("metric", False), ("difference", True)]
    header += [("95\u00a0% interval", True), ("effect size", True), ("wins / ties / losses", True)]
    header += [("p, t-test", True), ("p, randomisation", True), ("significant", False)]
    corrected = {"holm": "Holm", "tukey_hsd": "Tukey HSD"}.get(found.correction, found.correction)
    note = (
        f"Two-sided, paired over {found.queries:,} queries; p-values corrected ({corrected}) over all pairs of a "
        f"metric that were compared; significant: the corrected randomisation test is below {found.alpha:g}. Effect "
        "size: Cohen’s d of the paired differences."
    )
    apart = (
        "An interval is of its pair alone: one without 0 may go with no mark, since the tests are corrected for all."
    )
    made = grid(header, rows, "Comparisons")
    return details("Tests of the student against each system", made, bullets([note, apart]))


def _published(figures: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Markup | None:
    rows: list[list[Cell]] = []
    for each in figures:
        if not set(each["metrics"]) & set(metrics):
            continue
        name = f"{each['system']} ({each['note']})" if each.get("note") else each["system"]
        cells = [(figure_text(each["metrics"].get(metric)), None) for metric in metrics]
        rows.append([(name, None), *cells, (each["source"], None)])
    if not rows:
        return None
    header: list[Header] = [("system", False), *((metric_name(name), True) for name in metrics)]
    label = "Published by others, not measured here"
    made = grid([*header, ("source", False)], rows, label, sortable=False)
    return tag("div", {"class": "published"}, tag("p", {"class": "table-title"}, label), made)


def trade_off(run: RunData) -> Markup:
    lead = (
        "Up is better, left is cheaper (logarithmic). The line joins the front: systems that no other beats in one "
        "without losing in the other."
    )
    return section("trade-off", "Quality against cost", per_set(run, lambda one: _trade_off(run, one)), lead=lead)


def _trade_off(run: RunData, one: SetData) -> Markup:
    made, missing = [], []
    metric = metric_name(run.metric)
    timed = any(one.cost_of(name).get("total_ms") for name in one.systems)

    def latency(name: str) -> float | None:
        if timed:
            found = (one.cost_of(name).get("total_ms") or {}).get("p50")
            return float(found) if found else None
        row = one.row(name)
        return 1000 / row.queries_per_second if row and row.queries_per_second else None

    label = "ms a query, one at a time (median)" if timed else "ms a query, in batches"
    wanted: list[tuple[str, Callable[[str], float | None], Callable[[float], str], str]] = [
        (label, latency, number, "latency"),
        ("bytes kept to search", lambda name: size_of(one, name), lambda size: bytes_text(round(size)), "size"),
    ]
    for axis, cost, text, word in wanted:
        points, without = [], []
        for name in one.systems:
            row, value = one.row(name), cost(name)
            if row is None or run.metric not in row.means:
                continue
            if not value:
                without.append(name)
                continue
            kind, score = run.kind(name), row.means[run.metric]
            hint = f"{name}: {metric} {score:.4f}, {text(value)}{' ms' if word == 'latency' else ''}"
            points.append(Point(value, score, shortened([name])[name], kind, SHAPES[kind], hint))
        if len(points) < 2:
            missing.append(f"Quality against {word} is not drawn: fewer than two systems have a {word}.")
            continue
        drawn = charts.trade_off(points, f"{metric} against {word}", axis, metric, text)
        left_out = f" Without a {word}: {', '.join(without)}." if without else ""
        made.append(figure(drawn, f"{metric} against {word}.{left_out}"))
    pair = tag("div", {"class": "pair"}, made) if made else None
    return join(pair, [absent(text) for text in missing])


def fidelity(run: RunData) -> Markup:
    lead = (
        "Agreement with the teacher is not effectiveness: a student may follow its teacher closely into its mistakes, "
        "or leave it and be right."
    )
    return section("fidelity", "Agreement with the teacher", per_set(run, lambda one: _fidelity(one, run)), lead=lead)


MEASURES = {
    "kendall_tau": "Kendall τ",
    "rbo": "RBO",
    "margin_correlation": "margins, r",
    "margin_correlation_pooled": "margins, r (pooled)",
}
# Counts that are shown together, or belong to the rules rather than to the systems.
APART = ("student_better", "equal", "teacher_better", "won", "lost", "queries", "all_tied", "without_margins")


def _fidelity(one: SetData, run: RunData) -> Content:
    found = one.fidelity
    systems = {name: of for name, of in ((found or {}).get("systems") or {}).items() if isinstance(of, dict)}
    if found is None or not systems:
        return absent("Agreement was not measured in this evaluation.")
    keys = dict.fromkeys(key for of in systems.values() for key in of if key not in APART)
    measures = [key for key in keys if any(is_number(of.get(key)) for of in systems.values())]
    header: list[Header] = [("system", False), (metric_name(run.metric), True)]
    header += [(MEASURES.get(name, name.replace("_", " ")), True) for name in measures]
    header += [("win / tie / loss", True), ("won / lost", True)]
    rows: list[list[Cell]] = []
    for name, of in systems.items():
        row = one.row(name)
        score = row.means.get(run.metric) if row else None
        cells: list[Cell] = [(join(chip(run, name), name), name), (figure_text(score), score)]
        for key in measures:
            value = of.get(key)
            cells.append((_measure(key, value), value) if is_number(value) else ("", None))
        for together in (("student_better", "equal", "teacher_better"), ("won", "lost")):
            counts = [of.get(key) for key in together]
            known = all(is_number(count) for count in counts)
            cells.append((" / ".join(f"{count:,}" for count in counts) if known else "", counts[0] if known else None))
        rows.append(cells)
    filled = [at for at in range(len(header)) if at < 2 or any(row[at][0] for row in rows)]
    teacher, depth, cutoff = (found.get(key, "?") for key in ("teacher", "depth", "cutoff"))
    listed: list[Content] = [
        f"Against the documents that the teacher scored, at most {depth} a query: Kendall’s τ-b, rank-biased overlap, "
        "Pearson’s r of the margins between scores.",
        f"Win / tie / loss: queries, by {metric_name(str(found.get('metric', run.metric)))}. Won / lost: relevant "
        f"documents that only the system, or only the teacher, has among its first {cutoff}.",
    ]
    notes = found.get("notes") or {}
    others = [f"{key.replace('_', ' ')} {plain(value)}" for key, value in notes.items() if is_number(value)]
    listed += [f"{'; '.join(others)}."] if others else []
    label = f"{one.name}: agreement with {teacher}"
    shown = grid([header[at] for at in filled], [[row[at] for at in filled] for row in rows], label)
    return join(shown, bullets(listed))


def _measure(key: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return percent(value) if key.startswith(("unscored", "not_retrieved")) else f"{value:.3f}"


def extrapolation(run: RunData) -> Markup:
    lead = (
        "Test queries that resemble training queries (interpolation) against those that do not (extrapolation): "
        "a student that holds only near its training queries shows it here."
    )
    made = per_set(run, lambda one: _extrapolation(one, run))
    return section("generalisation", "Interpolation and extrapolation", made, lead=lead)


def _extrapolation(one: SetData, run: RunData) -> Content:
    protocols = (one.extrapolation or {}).get("protocols")
    if not isinstance(protocols, list) or not protocols:
        return absent("Interpolation and extrapolation were not measured in this evaluation.")
    return [_protocol(one, run, each) for each in protocols if isinstance(each, dict)]


SPLITS = {"clusters": "By clusters of queries", "similarity": "By similarity to training queries"}
PARTS = ("interpolation", "extrapolation")


def _protocol(one: SetData, run: RunData, protocol: Mapping[str, Any]) -> Content:
    name = str(protocol.get("protocol", "split"))
    title = SPLITS.get(name, name)
    parts = [(protocol.get("parts") or {}).get(part) or {} for part in PARTS]
    reference = protocol.get("reference")
    rows: list[tuple[str, str, float, float]] = []
    cells: list[list[Cell]] = []
    for system in one.systems:
        means = [((part.get("systems") or {}).get(system) or {}).get(run.metric) for part in parts]
        if not is_number(means[0]) or not is_number(means[1]):
            continue
        rows.append((shortened([system])[system], run.kind(system), float(means[0]), float(means[1])))
        line: list[Cell] = [(join(chip(run, system), system), system)]
        for part, mean in zip(parts, means, strict=True):
            ends = ((part.get("intervals") or {}).get(system) or {}).get(run.metric)
            small = tag("small", None, f"{ends[0]:.3f}–{ends[1]:.3f}") if ends else None
            line.append((join(figure_text(mean), small), mean))
        for key in ("gap", "gap_beyond"):
            found = ((protocol.get(key) or {}).get(system) or {}).get(run.metric)
            shown = (
                join(signed(found[0]), tag("small", None, f"{signed(found[1], 3)} to {signed(found[2], 3)}"))
                if found
                else ""
            )
            line.append((shown, found[0] if found else None))
        cells.append(line)
    notes = _split_notes(protocol, parts)
    if not rows:
        nothing = absent("A part of this split is empty, so nothing can be compared.")
        return [tag("h3", None, title), nothing, bullets(notes)]
    metric = metric_name(run.metric)
    drawing = charts.dumbbells(rows, f"{metric}, {title}", metric, PARTS)
    header: list[Header] = [("system", False), *((part, True) for part in PARTS), ("gap", True)]
    header.append((f"gap beyond {reference}’s", True))
    filled = [at for at in range(len(header)) if at < 3 or any(line[at][0] for line in cells)]
    label = f"{one.name}: {metric}, {title}"
    shown_rows = [[line[at] for at in filled] for line in cells]
    return [
        tag("h3", None, title),
        tag("div", {"class": "pair"}, figure(drawing, f"{metric} in the two parts."), bullets(notes)),
        grid([header[at] for at in filled], shown_rows, label),
    ]


def _split_notes(protocol: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[Content]:
    counts = [f"{part.get('queries', '?')} test queries are {name}" for name, part in zip(PARTS, parts, strict=True)]
    notes: list[Content] = [f"{' and '.join(counts)}."]
    if protocol.get("neither"):
        notes.append(f"{protocol['neither']} are neither: in the held-out part, but too near to a training query.")
    bound, trained = protocol.get("bound"), protocol.get("training_queries")
    if is_number(bound):
        of = f"one of the {trained:,} training queries" if isinstance(trained, int) else "a training query"
        notes.append(f"No extrapolation query has {of} at a cosine above {bound:.3f}.")
    overlap = protocol.get("relevant_overlap") or {}
    for name in PARTS:
        of_part: Mapping[str, Any] = overlap.get(name) or {}
        share = of_part.get("passage_share")
        if is_number(share):
            notes.append(
                f"Of the {of_part['passages']:,} passages relevant to {name} queries, {of_part['seen_passages']:,} "
                f"({percent(share)}) are relevant to at least one training query too."
            )
    if protocol.get("gap"):
        notes.append(
            "Gap: interpolation less extrapolation, with its 95\u00a0% interval. The parts differ in difficulty "
            "too; the gap beyond a system that no training query taught anything is what training may explain."
        )
    return notes


def cost(run: RunData) -> Markup:
    lead = "On the same queries, warmed up. Encoding and search are timed apart; size is what is kept to search."
    return section("cost", "Cost", per_set(run, lambda one: _cost(one, run)), lead=lead)


def _cost(one: SetData, run: RunData) -> Content:
    environment = {**one.evaluation.environment, **((one.cost or {}).get("environment") or {})}
    where = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in environment.items()
        if isinstance(value, str | int | float)
    )
    rows = []
    for name in one.systems:
        row, of = one.row(name), one.cost_of(name)
        rate = of.get("batch_queries_per_second") or (row.queries_per_second if row else None)
        size, memory = size_of(one, name), of.get("memory_bytes")
        parameters = of.get("parameters") or (row.parameters if row else None)
        if not (rate or size or of):
            continue
        cells: list[Cell] = [(join(chip(run, name), name), name)]
        for part in ("encode_ms", "search_ms", "rerank_ms", "fuse_ms", "total_ms"):
            found = of.get(part) or {}
            shown = " / ".join(latency_text(found[p]) for p in ("p50", "p95", "p99") if is_number(found.get(p)))
            cells.append((shown, found.get("p50")))
        cells.append((rate_text(rate), rate))
        cells.append((bytes_text(size), size))
        each = of.get("bytes_a_document")
        cells.append(("" if not is_number(each) else f"{each:,.1f}", each if is_number(each) else None))
        cells.append((bytes_text(memory), memory))
        cells.append(("" if not parameters else f"{parameters / 1e6:,.1f} M", parameters))
        rows.append(cells)
    if not rows:
        return absent("Nothing was timed or weighed in this evaluation.")
    names = [
        "encode, ms",
        "search, ms",
        "re-rank, ms",
        "fuse, ms",
        "whole, ms",
        "queries/s",
        "size",
        "bytes a document",
        "memory",
        "parameters",
    ]
    header: list[Header] = [("system", False), *((name, True) for name in names)]
    filled = [at for at in range(len(header)) if at == 0 or any(row[at][0] for row in rows)]
    made = grid([header[at] for at in filled], [[row[at] for at in filled] for row in rows], f"{one.name}: cost")
    notes: list[Content] = [f"Measured with {where}."] if where else []
    if one.cost is None:
        notes.append("Latency of single queries and memory were not measured in this evaluation.")
    else:
        notes.append("Milliseconds of single queries: median / 95th / 99th percentile. Queries a second: in batches.")
        for same in one.cost.get("same_queries") or []:
            factors = (same.get("teacher_takes_times") or {}).items()
            listed = ", ".join(f"{times(factor)} {name}" for name, factor in factors)
            notes.append(
                f"On the same {same.get('queries', '?')} queries {same.get('teacher')} takes the time of {listed}."
            )
    return join(made, bullets(notes))


def paste(markdown: str, latex: str | None) -> Markup:
    made: list[Content] = []
    for name, title, text in (("markdown-text", "Markdown", markdown), ("latex-text", "LaTeX", latex)):
        if text is None:
            continue
        block = tag("pre", {"id": name, "tabindex": 0}, text)
        made.append(
            details(title, tag("div", {"class": "copyable"}, copy_button(name), block), opened=name.startswith("m"))
        )
    return section("paste", "Tables to paste", made)


def left_out(run: RunData, notes: Sequence[str]) -> Markup:
    items = [*run.missing, *notes]
    if not items:
        return section("missing", "What is not here", tag("p", None, "Nothing that the run has was left out."))
    return section("missing", "What is not here", bullets(items, "plain"))


def queries(run: RunData, found: Sequence[Queries | None]) -> Markup:
    """Teacher against student, each query a point; then the table, filled in by the page's script."""
    made = []
    for at, (one, of) in enumerate(zip(run.sets, found, strict=True)):
        drawn = _clouds(run, of) if of is not None else None
        text = (
            None
            if of is not None
            else absent("The values of each query are not there, so there is no table of queries.")
        )
        head = tag("h3", {"class": "set-name"}, one.name) if len(run.sets) > 1 else None
        made.append(
            tag("div", {"class": "of-set", "data-set": at}, head, drawn, text, tag("div", {"class": "explorer"}))
        )
    lead = (
        "Each query once. Choose two systems and a metric, sort and filter, and open a query to see the documents that "
        "both put first, with their labels."
    )
    script = tag("noscript", None, absent("The table of queries needs JavaScript, which this browser does not run."))
    return section("queries", "Query by query", join(made), script, lead=lead)


def _clouds(run: RunData, of: Queries) -> Markup | None:
    data = of.data
    a, b = (data["systems"][at] for at in data["pair"])
    metric = run.metric if run.metric in data["metrics"] else data["metrics"][0]
    column = data["metrics"].index(metric)
    ours, theirs = (data["values"][data["systems"].index(name)][column] for name in (a, b))
    known = [
        (x, y, row) for row, (x, y) in enumerate(zip(theirs, ours, strict=True)) if x is not None and y is not None
    ]
    if not known:
        return None
    places: dict[tuple[float, float], list[int]] = {}
    for x, y, row in known:
        places.setdefault((x, y), []).append(row)
    points = []
    for (x, y), rows in places.items():
        text = data["queries"][rows[0]][1] or data["queries"][rows[0]][0]
        more = f" and {len(rows) - 1} more queries" if len(rows) > 1 else ""
        points.append((x, y, f"{text}{more}: {y:.3f} against {x:.3f}", str(rows[0]), len(rows)))
    name = metric_name(metric)
    better, worse = sum(y > x for x, y, _ in known), sum(y < x for x, y, _ in known)
    described = f"{better} queries above the diagonal ({a} better), {worse} below, {len(known) - better - worse} on it."
    made = [
        figure(
            charts.cloud(points, f"{name} of each query: {a} against {b}", b, a, description=described),
            f"{name} of each query; larger points are several. {described} Choose a point to find it in the table.",
        )
    ]
    if of.scores:
        specks = [
            (
                t,
                s,
                f"{data['queries'][row][1] or data['queries'][row][0]} · {doc_id}: {a} {s:+.3g}, {b} {t:+.3g}",
                "",
                1,
            )
            for row, doc_id, s, t in of.scores
        ]
        axis = "score less its query’s mean"
        label = f"Scores of the same pairs, {a} against {b}"
        drawn = f"{len(specks):,} drawn at random of {of.scored:,}" if len(specks) < of.scored else f"all {of.scored:,}"
        text = f"Scores of the pairs that the teacher re-ranked and the student retrieved ({drawn}), "
        text += "less each query’s mean."
        if of.correlation is not None:
            text += f" Correlation {of.correlation:.3f}."
        cloud = charts.cloud(specks, label, f"{b}, {axis}", f"{a}, {axis}", equal=False, description=text)
        made.append(figure(cloud, text))
    return tag("div", {"class": "pair"}, made)
