// The search page. Everything from the collection is set as text; no markup is ever made from data.
"use strict";

const at = (id) => document.getElementById(id);
const SIZES = [3, 5, 10, 20, 50];
const TEACHER = "teacher";
let about = null; // what /api/about said
let answer = null; // what /api/search said last
let asked = null; // the request in flight
let shown = ""; // the column in front on a narrow screen

function element(name, properties = {}, ...children) {
  const { dataset = {}, attributes = {}, ...rest } = properties;
  const made = Object.assign(document.createElement(name), rest);
  Object.assign(made.dataset, dataset);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, textContent]) => element("option", { value, textContent })));
  if (entries.some(([value]) => value === chosen)) select.value = chosen;
}

function say(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("failed", failed);
}

const milliseconds = (value) =>
  value < 1000 ? `${value < 10 ? value.toFixed(1) : Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  for (; bytes >= 1000 && step < units.length - 1; step++) bytes /= 1000;
  return `${step && bytes < 10 ? bytes.toFixed(2) : step && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[step]}`;
}

async function get(path, signal) {
  const response = await fetch(path, { signal, credentials: "omit" });
  const body = await response.json();
  if (!response.ok) throw new Error([body.error.what, body.error.fix].filter(Boolean).join(": "));
  return body;
}

// -- columns ----------------------------------------------------------------------------------------------------------

function names() {
  const found = about.columns.map((column) => [column.key, column.name]);
  if (about.teacher) found.push([TEACHER, "teacher"]);
  return found;
}

const nameOf = (key) => (names().find(([known]) => known === key) || [key, key])[1];
const kindOf = (key) => (key === TEACHER ? TEACHER : about.columns.find((one) => one.key === key).kind);
const reference = () => answer.columns.find((column) => column.key === at("reference").value) || null;
const isRelevant = (document_) => document_.relevance !== null && document_.relevance > 0;

// How far a document has come from its rank in the reference: text, class and words for a screen reader.
function move(docId, rank, key) {
  const base = reference();
  if (!base || base.key === key || base.error) return null;
  const before = answer.documents[docId].ranks[base.key];
  const name = nameOf(base.key);
  if (before === null || before === undefined) {
    const within = base.key === TEACHER ? "not among what the teacher re-ranked" : `not in the first ${about.limits.followed} of ${name}`;
    return ["new", "new", within];
  }
  if (before === rank) return ["=", "same", `same rank in ${name}`];
  const up = before > rank;
  return [`${up ? "▲" : "▼"} ${Math.abs(before - rank)}`, up ? "up" : "down", `${up ? "up" : "down"} from rank ${before} in ${name}`];
}

function label(document_) {
  if (document_.relevance === null) return null;
  const relevant = document_.relevance > 0;
  return element("span", {
    className: relevant ? "label relevant" : "label",
    textContent: relevant ? `✓ relevant ${document_.relevance}` : `judged ${document_.relevance}`,
  });
}

function hit(key, { doc_id: docId, rank, score }) {
  const found = answer.documents[docId];
  const moved = move(docId, rank, key);
  const item = element("li", { className: "hit", dataset: { doc: docId } });
  const text = found.text.length < found.characters ? `${found.text} …` : found.text;
  item.append(
    element(
      "div",
      { className: "top" },
      element("span", { className: "rank", textContent: rank }),
      element("button", {
        type: "button",
        className: "open",
        textContent: found.title || docId,
        attributes: { "aria-expanded": "false", tabindex: rank === 1 ? "0" : "-1" },
      }),
      moved ? element("span", { className: `move ${moved[1]}`, textContent: moved[0], title: moved[2], attributes: { "aria-label": moved[2], role: "img" } }) : null,
    ),
    element("p", { className: "text", textContent: text || "(no text)" }),
    element("p", { className: "meta" }, label(found), element("span", { textContent: score.toFixed(3), title: "score" }), element("span", { textContent: found.title ? docId : "" })),
  );
  return item;
}

// Documents among the first of the reference that this column does not show.
function gone(column) {
  const base = reference();
  if (!base || base.key === column.key || base.error || column.error) return null;
  const here = new Set(column.hits.map((one) => one.doc_id));
  const lost = base.hits.filter((one) => !here.has(one.doc_id));
  if (!lost.length) return null;
  const beyond = column.key === TEACHER ? "not re-ranked" : `beyond ${about.limits.followed}`;
  const list = element("ul", {}, ...lost.map((one) => {
    const found = answer.documents[one.doc_id];
    const now = found.ranks[column.key];
    return element(
      "li",
      { className: "hit", dataset: { doc: one.doc_id } },
      element(
        "div",
        { className: "top" },
        element("span", { className: "open", textContent: found.title || found.text.slice(0, 120) || one.doc_id }),
        isRelevant(found) ? element("span", { className: "label relevant", textContent: "✓", title: "judged relevant", attributes: { role: "img", "aria-label": "judged relevant" } }) : null,
        element("span", { className: "move down", textContent: `${one.rank} → ${now === null || now === undefined ? beyond : now}` }),
      ),
    );
  }));
  return element("div", { className: "gone" }, element("h3", { textContent: `Lost: ${lost.length} of the first ${base.hits.length} of ${nameOf(base.key)}` }), list);
}

function facts(column) {
  const parts = [];
  const words = { encode_ms: "encode", search_ms: "search", teacher_ms: "teacher" };
  for (const [name, value] of Object.entries(column.times)) parts.push(element("span", { dataset: { time: name }, textContent: `${words[name] || name} ${milliseconds(value)}` }));
  const known = about.columns.find((one) => one.key === column.key);
  if (known && known.bytes !== null) parts.push(size(known.bytes));
  if (column.note) parts.push(column.note);
  const line = element("p", { className: "facts" });
  parts.forEach((part, number) => line.append(number ? " · " : "", part));
  return line;
}

function quality(column) {
  const line = element("p", { className: "facts" });
  if (column["ndcg@10"] !== null && column["ndcg@10"] !== undefined) {
    line.append("nDCG@10 ", element("b", { textContent: column["ndcg@10"].toFixed(3).replace(/^0/, "") }));
  }
  const base = reference();
  if (base && base.key === column.key) line.append(line.childNodes.length ? " · " : "", "moves are counted against this column");
  else if (base && !base.error && !column.error) {
    const there = new Set(base.hits.map((one) => one.doc_id));
    const shared = column.hits.filter((one) => there.has(one.doc_id)).length;
    line.append(line.childNodes.length ? " · " : "", `shares ${shared} of ${base.hits.length} with ${nameOf(base.key)}`);
  }
  return line;
}

function columnOf(key, name) {
  const column = answer && answer.columns.find((one) => one.key === key);
  const heading = element("h2", { textContent: name, id: `name-${key}` });
  const made = element("section", { className: "column", id: `column-${key}`, dataset: { key, kind: kindOf(key) }, attributes: { "aria-labelledby": `name-${key}` } }, element("header", {}, heading));
  if (key === TEACHER && about.teacher.note) heading.append(" ", element("small", { textContent: about.teacher.note }));
  const note = (about.columns.find((one) => one.key === key) || {}).note;
  if (note) heading.title = note;
  if (!column) {
    const message = element("p", { className: "message" });
    if (key === TEACHER && answer) {
      message.append(element("button", { type: "button", className: "ask", textContent: "Ask the teacher", onclick: () => search({ teacher: true }) }));
      message.append(`Re-ranks up to ${about.teacher.depth} documents; it may take a while.`);
    } else message.append(key === TEACHER ? "On demand, after a search." : "");
    made.append(message);
    return made;
  }
  made.firstChild.append(facts(column), quality(column));
  if (column.error) made.append(element("p", { className: "message error", textContent: column.error }));
  else if (!column.hits.length) made.append(element("p", { className: "message", textContent: key === "bm25" ? "No document shares a word with this query." : "Nothing found." }));
  made.append(element("ol", { attributes: { "aria-label": `${name}: documents` } }, ...column.hits.map((one) => hit(key, one))));
  const lost = gone(column);
  if (lost) made.append(lost);
  return made;
}

function draw() {
  const focused = document.activeElement.closest?.(".hit");
  const place = focused && [focused.closest(".column").dataset.key, focused.dataset.doc];
  if (!names().some(([key]) => key === shown)) shown = names()[0][0];
  at("columns").replaceChildren(...names().map(([key, name]) => columnOf(key, name)));
  at("tabs").replaceChildren(
    ...names().map(([key, textContent]) => element("button", { type: "button", textContent, dataset: { key }, attributes: { "aria-controls": `column-${key}` }, onclick: () => front(key) })),
  );
  front(shown);
  if (place) hits(place[0]).find((one) => one.dataset.doc === place[1])?.querySelector("button")?.focus();
}

function front(key) {
  shown = key;
  for (const tab of at("tabs").children) tab.setAttribute("aria-pressed", String(tab.dataset.key === key));
  for (const column of at("columns").children) column.classList.toggle("shown", column.dataset.key === key);
}

function judged() {
  const found = answer.judged;
  if (!found) return "Not a judged query: no labels.";
  const missing = found.relevant_missing ? ` (${found.relevant_missing} not in the collection)` : "";
  return `Judged query ${found.query_id} of ${found.split}: ${found.judged} judged, ${found.relevant} relevant${missing}.`;
}

// -- searching --------------------------------------------------------------------------------------------------------

async function search({ teacher = at("always").checked, remember = true } = {}) {
  const query = at("q").value.trim();
  if (!query) {
    say("Type a query, or pick a judged one.");
    at("q").focus();
    return;
  }
  if (remember) keep(query);
  asked?.abort();
  const mine = (asked = new AbortController());
  document.body.classList.add("busy");
  const parameters = new URLSearchParams({ q: query, k: at("k").value });
  try {
    if (!(teacher && answer && answer.query === query && answer.k === Number(at("k").value))) {
      say("Searching …");
      answer = await get(`api/search?${parameters}`, mine.signal);
      draw();
    }
    if (teacher && about.teacher) {
      say("The teacher reads …");
      parameters.set("teacher", at("base").value);
      answer = await get(`api/search?${parameters}`, mine.signal);
      draw();
    }
    say(judged());
  } catch (error) {
    if (error.name !== "AbortError") say(error instanceof TypeError ? "The server does not answer: is it still running?" : error.message, true);
  } finally {
    if (asked === mine) document.body.classList.remove("busy");
  }
}

// The address holds the query and the settings, so that it can be kept and sent.
function keep(query) {
  const state = new URLSearchParams({ q: query, k: at("k").value, against: at("reference").value });
  if (about.teacher && at("always").checked) state.set("teacher", at("base").value);
  const address = `?${state}`;
  if (address === location.search) return;
  const same = new URLSearchParams(location.search).get("q") === query;
  history[same ? "replaceState" : "pushState"](null, "", address);
}

function restore() {
  const state = new URLSearchParams(location.search);
  at("q").value = state.get("q") || "";
  at("k").value = SIZES.includes(Number(state.get("k"))) ? state.get("k") : String(about.depth);
  const keys = names().map(([key]) => key);
  at("reference").value = keys.includes(state.get("against")) ? state.get("against") : keys[0];
  const base = state.get("teacher");
  at("base").value = base === "all" || keys.slice(0, about.columns.length).includes(base) ? base : "all";
  at("always").checked = Boolean(base);
  at("example").value = about.examples.some((one) => one.text === at("q").value) ? at("q").value : "";
  if (at("q").value.trim()) search({ remember: false });
}

// -- pointing and keys ------------------------------------------------------------------------------------------------

function mark(docId) {
  for (const one of document.querySelectorAll(".hit")) one.classList.toggle("marked", docId !== null && one.dataset.doc === docId);
}

const hits = (key) => [...document.querySelectorAll(`#column-${CSS.escape(key)} ol .hit`)];

function focusHit(item) {
  const button = item?.querySelector("button");
  if (!button) return;
  for (const other of item.closest("ol").querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
  front(item.closest(".column").dataset.key);
  button.focus();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    at("q").focus();
    at("q").select();
    return;
  }
  if (event.target === at("q") && event.key === "ArrowDown") {
    const first = hits(shown)[0];
    if (first) event.preventDefault();
    focusHit(first);
    return;
  }
  const item = event.target.closest?.("ol .hit");
  if (!item) return;
  const key = item.closest(".column").dataset.key;
  const rows = hits(key);
  const row = rows.indexOf(item);
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (event.key === "ArrowUp" && row === 0) at("q").focus();
    else focusHit(rows[row + (event.key === "ArrowDown" ? 1 : -1)]);
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    event.preventDefault();
    const keys = names().map(([name]) => name);
    const step = event.key === "ArrowRight" ? 1 : -1;
    for (let next = keys.indexOf(key) + step; next >= 0 && next < keys.length; next += step) {
      const there = hits(keys[next]);
      if (!there.length) continue;
      // The same document where the column has it, else the same rank.
      focusHit(there.find((one) => one.dataset.doc === item.dataset.doc) || there[Math.min(row, there.length - 1)]);
      break;
    }
  }
}

function toggle(item) {
  const whole = item.classList.toggle("whole");
  item.querySelector("button").setAttribute("aria-expanded", String(whole));
}

async function begin() {
  try {
    about = await get("api/about");
  } catch (error) {
    say(error.message, true);
    return;
  }
  document.title = `${about.name} · rankdistill`;
  at("about").textContent = [about.name, about.collection.name, `${about.collection.documents.toLocaleString("en")} documents`].filter(Boolean).join(" · ");
  at("q").maxLength = about.limits.query;
  const sizes = SIZES.includes(about.depth) ? SIZES : SIZES.concat(about.depth).sort((a, b) => a - b);
  options(at("k"), sizes.map((value) => [String(value), String(value)]), String(about.depth));
  options(at("reference"), names(), names()[0][0]);
  options(at("base"), [["all", "the first of all columns"], ...about.columns.map((one) => [one.key, one.name])], "all");
  for (const control of document.querySelectorAll(".teacher")) control.hidden = !about.teacher;
  at("example-label").hidden = !about.examples.length;
  const all = about.examples.length === about.judged_queries;
  const offered = `${all ? "" : `${about.examples.length} of the `}${about.judged_queries.toLocaleString("en")} ${about.split} queries`;
  options(at("example"), [["", `${offered} …`], ...about.examples.map((one) => [one.text, one.text])], "");
  say(about.teacher ? "Type a query, or pick a judged one." : `Type a query, or pick a judged one. No teacher: ${about.no_teacher}.`);

  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    at("example").value = "";
    search();
  });
  at("example").addEventListener("change", () => {
    if (!at("example").value) return;
    at("q").value = at("example").value;
    search();
  });
  at("k").addEventListener("change", () => search());
  at("base").addEventListener("change", () => at("q").value.trim() && search({ teacher: true }));
  at("always").addEventListener("change", () => at("always").checked && at("q").value.trim() && search());
  at("reference").addEventListener("change", () => {
    if (!answer) return;
    keep(answer.query);
    draw();
  });
  const columns = at("columns");
  for (const [name, leaves] of [["mouseover", false], ["focusin", false], ["mouseleave", true], ["focusout", true]]) {
    columns.addEventListener(name, (event) => mark(leaves ? null : event.target.closest?.(".hit")?.dataset.doc ?? null));
  }
  columns.addEventListener("click", (event) => {
    const item = event.target.closest("ol .hit");
    if (item && !String(getSelection())) toggle(item);
  });
  document.addEventListener("keydown", onKey);
  addEventListener("popstate", restore);
  draw();
  restore();
}

begin();
