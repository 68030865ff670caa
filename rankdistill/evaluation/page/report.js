"use strict";
// Brings the report to life: tables that sort, the set that is shown, hints on charts, the table of queries, copying.
// Texts are set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const PAGE = 50; // lines of the table of queries shown at once
  const FIDELITY_NAMES = { kendall_tau: "Kendall τ", rbo: "RBO", margin_correlation: "margins" };

  /** An element with attributes, and children set as text or as elements. */
  function make(name, attributes, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value === true) element.setAttribute(key, "");
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }
  const named = (metric) => data.names[metric] || metric;
  const shown = (value, digits = 4) => (value === null || value === undefined ? "" : value.toFixed(digits));
  const signed = (value) => (value === null ? "" : (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(4));

  // -- tables ---------------------------------------------------------------------------------------------------------

  const numeric = (cell) => cell.classList.contains("number");
  /** Sort a table's rows by a column; nothing sorts last both ways. */
  function sortRows(table, column, down) {
    const body = table.tBodies[0];
    const value = (row) => {
      const given = row.cells[column].dataset.value;
      if (given === undefined || given === "") return null;
      return numeric(row.cells[column]) ? Number(given) : given;
    };
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = typeof a === "number" ? a - b : a.localeCompare(b);
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  }
  function markSorted(heads, head, down) {
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      // Numbers begin with the greatest, words with A.
      const down = before === "none" ? numeric(head) : before === "ascending";
      sortRows(table, column, down);
      markSorted(heads, head, down);
    }));
  }

  // -- sets, sections, hints, copying ---------------------------------------------------------------------------------

  const choice = document.getElementById("set-choice");
  const showSet = (number) => {
    for (const part of document.querySelectorAll(".of-set")) part.hidden = part.dataset.set !== number;
  };
  if (choice) {
    choice.addEventListener("change", () => showSet(choice.value));
    showSet(choice.value);
  }

  const links = new Map([...document.querySelectorAll(".links a")].map((link) => [link.hash.slice(1), link]));
  if ("IntersectionObserver" in window) {
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.classList.remove("here");
        const link = links.get(entry.target.id);
        if (!link) continue;
        link.classList.add("here");
        const box = link.parentElement;
        box.scrollLeft = link.offsetLeft - box.offsetLeft - box.clientWidth / 2 + link.clientWidth / 2;
      }
    }, { rootMargin: "-15% 0px -80% 0px" });
    for (const part of document.querySelectorAll("main > section")) seen.observe(part);
  }

  const hint = document.getElementById("hint");
  document.addEventListener("pointermove", (event) => {
    const text = event.target instanceof Element ? event.target.getAttribute("data-hint") : null;
    hint.hidden = !text;
    if (!text) return;
    hint.textContent = text;
    const box = hint.getBoundingClientRect();
    const left = Math.min(event.clientX + 12, window.innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    hint.style.left = `${Math.max(8, left)}px`;
    hint.style.top = `${above > 8 ? above : event.clientY + 16}px`;
  });
  document.addEventListener("scroll", () => { hint.hidden = true; }, { passive: true });

  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      let done = false;
      try {
        await navigator.clipboard.writeText(source.textContent);
        done = true;
      } catch {
        const range = document.createRange();
        range.selectNodeContents(source);
        const selection = window.getSelection();
        selection.removeAllRanges();
        selection.addRange(range);
        done = document.execCommand("copy"); // for browsers that give a file no clipboard
      }
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  // -- the table of queries -------------------------------------------------------------------------------------------

  function explorer(box, of, number) {
    const state = { a: of.pair[0], b: of.pair[1], metric: 0, filter: "", side: "all", sort: "difference", down: false, count: PAGE };
    const id = (name) => `queries-${number}-${name}`;
    const select = (name, options, value, change) => {
      const made = make("select", { id: id(name) }, options.map(([key, text]) => make("option", { value: key }, text)));
      made.value = value;
      made.addEventListener("change", () => { change(made.value); state.count = PAGE; draw(); });
      return made;
    };
    const field = (text, control, style) => make("label", { class: style }, text, control);
    const systems = of.systems.map((name, at) => [at, name]);
    const search = make("input", { id: id("filter"), type: "search", placeholder: "words of the query, or its id" });
    search.addEventListener("input", () => { state.filter = search.value.trim().toLowerCase(); state.count = PAGE; draw(); });
    const side = select("side", [["all", "all queries"], ["better", "first better"], ["worse", "first worse"], ["same", "no difference"]], "all", (value) => { state.side = value; });
    const controls = make("div", { class: "controls" },
      field("First system", select("a", systems, state.a, (value) => { state.a = Number(value); })),
      field("against", select("b", systems, state.b, (value) => { state.b = Number(value); })),
      field("Metric", select("metric", of.metrics.map((name, at) => [at, named(name)]), 0, (value) => { state.metric = Number(value); })),
      field("Show", side),
      field("Filter", search, "grow"));
    const tally = make("p", { class: "tally", "aria-live": "polite" });
    const head = make("thead");
    const body = make("tbody");
    const table = make("table", {}, make("caption", { class: "unseen" }, `Queries of ${of.name}`), head, body);
    const scroller = make("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": `Queries of ${of.name}` }, table);
    const more = make("button", { type: "button", class: "more" });
    more.addEventListener("click", () => { state.count += PAGE; draw(); });
    box.append(controls, tally, scroller, more);

    const value = (system, row) => of.values[system][state.metric][row];
    const gap = (row) => {
      const [a, b] = [value(state.a, row), value(state.b, row)];
      return a === null || b === null ? null : Number((a - b).toFixed(4));
    };
    const measures = () => Object.keys(of.fidelity).filter((name) => of.fidelity[name][state.a]);
    function columns() {
      const found = [
        { key: "query", text: "query", value: (row) => of.queries[row][1] || of.queries[row][0] },
        { key: "difference", text: "difference", number: true, value: gap },
        { key: "a", text: of.systems[state.a], number: true, value: (row) => value(state.a, row) },
        { key: "b", text: of.systems[state.b], number: true, value: (row) => value(state.b, row) },
      ];
      for (const name of measures()) {
        found.push({ key: name, text: FIDELITY_NAMES[name] || name.replace(/_/g, " "), number: true, digits: 3, value: (row) => of.fidelity[name][state.a][row] });
      }
      return found;
    }
    function rows() {
      return of.queries.map((_, row) => row).filter((row) => {
        const difference = gap(row);
        if (state.side === "better" && !(difference > 0)) return false;
        if (state.side === "worse" && !(difference < 0)) return false;
        if (state.side === "same" && difference !== 0) return false;
        if (!state.filter) return true;
        const [name, text] = of.queries[row];
        return name.toLowerCase().includes(state.filter) || text.toLowerCase().includes(state.filter);
      });
    }

    function document_(number_, rank, others, line) {
      const [name, title, text] = of.docs[number_];
      const label = of.labels[line]?.of[number_];
      const badge = label === undefined ? make("span", { class: "badge" }, "not judged")
        : label >= of.level ? make("span", { class: "badge relevant" }, of.level > 1 || label > 1 ? `relevant (${label})` : "relevant")
        : make("span", { class: "badge wrong" }, `not relevant (${label})`);
      const at = others.list.indexOf(number_);
      const where = at < 0 ? `not in the first ${others.list.length} of “${others.name}”` : `${at + 1} in “${others.name}”`;
      return make("li", {}, make("span", { class: "rank" }, String(rank)), make("div", {},
        make("div", { class: "head" }, make("span", { class: "doc-title" }, title || name), badge),
        text ? make("p", { class: "text" }, text) : null,
        make("p", { class: "where" }, `${title ? `${name} · ` : ""}${where}`)));
    }
    function opened(row, width) {
      const top = of.top[row];
      const inner = make("div", { class: "inner" });
      inner.append(make("p", {}, `Query ${of.queries[row][0]}: ${of.queries[row][1] || "(its text is not here)"}`));
      if (!top) {
        inner.append(make("p", {}, "The documents of this query are not embedded; they are for the queries that differ most. The rankings lie in the evaluation’s folder, in runs/."));
      } else {
        const relevant = of.labels[row].relevant;
        const found = (list) => list.filter((number_) => of.labels[row].of[number_] >= of.level).length;
        const pair = [state.a, state.b].map((system) => ({ name: of.systems[system], list: top[system] || [] }));
        inner.append(make("p", {}, `${relevant} relevant ${relevant === 1 ? "document is" : "documents are"} known for it. `
          + pair.map((one) => `“${one.name}” has ${found(one.list)} of them among its first ${one.list.length}`).join("; ") + "."));
        inner.append(make("div", { class: "lists" }, pair.map((one, at) => make("div", {}, make("h4", {}, one.name),
          one.list.length ? make("ol", {}, one.list.map((number_, rank) => document_(number_, rank + 1, pair[1 - at], row)))
            : make("p", {}, "It returned nothing.")))));
      }
      return make("tr", { class: "opened" }, make("td", { colspan: width }, inner));
    }

    function draw(reopen) {
      const shownColumns = columns();
      if (!shownColumns.some((column) => column.key === state.sort)) { state.sort = "difference"; state.down = false; }
      const sorter = shownColumns.find((column) => column.key === state.sort);
      const kept = rows();
      kept.sort((x, y) => {
        const [a, b] = [sorter.value(x), sorter.value(y)];
        if (a === null || a === undefined || b === null || b === undefined) return (a === null || a === undefined) - (b === null || b === undefined);
        const order = typeof a === "number" ? a - b : a.localeCompare(b);
        return (state.down ? -order : order) || x - y;
      });
      const focused = document.activeElement?.closest?.("th")?.dataset.key;
      head.replaceChildren(make("tr", {}, shownColumns.map((column) => {
        const button = make("button", { type: "button" }, column.text);
        button.addEventListener("click", () => {
          if (state.sort === column.key) state.down = !state.down;
          else { state.sort = column.key; state.down = Boolean(column.number) && column.key !== "difference"; }
          state.count = PAGE;
          draw();
        });
        const sorted = state.sort === column.key ? (state.down ? "descending" : "ascending") : "none";
        return make("th", { scope: "col", "aria-sort": sorted, "data-key": column.key, class: column.number ? "number" : null }, button);
      })));
      if (focused) head.querySelector(`th[data-key="${CSS.escape(focused)}"] button`)?.focus();
      body.replaceChildren(...kept.slice(0, state.count).map((row) => {
        const open = make("button", { type: "button", class: of.top[row] ? "open" : "open bare", "aria-expanded": "false" },
          make("span", {}, of.queries[row][1] || of.queries[row][0]));
        const line = make("tr", { "data-row": row }, shownColumns.map((column) => {
          if (column.key === "query") return make("th", { scope: "row", class: "query" }, open);
          const found = column.value(row);
          const style = column.key === "difference" && found ? (found > 0 ? "number plus" : "number minus") : "number";
          return make("td", { class: style }, column.key === "difference" ? signed(found) : shown(found, column.digits));
        }));
        open.addEventListener("click", () => {
          const wide = open.getAttribute("aria-expanded") === "true";
          open.setAttribute("aria-expanded", String(!wide));
          if (wide) { line.nextElementSibling.remove(); return; }
          const made = opened(row, shownColumns.length);
          made.querySelector(".inner").style.setProperty("--room", `${scroller.clientWidth}px`);
          line.after(made);
        });
        return line;
      }));
      const counted = { better: 0, worse: 0, same: 0 };
      for (let row = 0; row < of.queries.length; row += 1) {
        const difference = gap(row);
        if (difference !== null) counted[difference > 0 ? "better" : difference < 0 ? "worse" : "same"] += 1;
      }
      tally.replaceChildren(make("b", {}, of.systems[state.a]), ` is better on ${counted.better} queries, worse on ${counted.worse}, the same on ${counted.same}. `,
        `${kept.length.toLocaleString("en")} ${kept.length === 1 ? "query" : "queries"} shown.`);
      more.hidden = kept.length <= state.count;
      more.textContent = `Show ${Math.min(PAGE, kept.length - state.count)} more`;
      if (reopen !== undefined) {
        const line = body.querySelector(`tr[data-row="${reopen}"]`);
        line?.querySelector("button.open").click();
        line?.scrollIntoView({ block: "center" });
        line?.querySelector("button.open").focus({ preventScroll: true });
      }
    }
    draw();
    return (row) => {
      state.filter = search.value = "";
      state.side = side.value = "all";
      state.count = of.queries.length;
      draw(row);
    };
  }

  data.sets.forEach((of, number) => {
    const part = document.querySelector(`#queries .of-set[data-set="${number}"]`);
    if (!of || !part) return;
    const go = explorer(part.querySelector(".explorer"), of, number);
    part.addEventListener("click", (event) => {
      const row = event.target instanceof Element ? event.target.getAttribute("data-query") : null;
      if (row !== null) go(Number(row));
    });
  });
})();
