"use strict";
const every = 2000, paces = [];
let last = null;
const all = name => document.querySelectorAll(name);
const set = (e, name, value) => e.setAttribute(name, String(value));

function row(cells) {
  const tr = document.createElement("tr");
  tr.append(...cells.map(text => {
    const td = document.createElement("td");
    td.textContent = text;
    return td;
  }));
  return tr;
}

function show(doc) {
  const {texts, rows, bars} = doc.shown;
  document.documentElement.dataset.state = doc.state;
  for (const e of all("[data-text]")) e.textContent = texts[e.dataset.text];
  for (const e of all("[data-rows]")) e.replaceChildren(...rows[e.dataset.rows].map(row));
  for (const e of all("[data-if]")) e.hidden = !(rows[e.dataset.if] || texts[e.dataset.if]).length;
  for (const e of all("[data-list]")) {
    e.hidden = !rows[e.dataset.list].length;
    e.replaceChildren(...rows[e.dataset.list].map(([text]) => {
      const li = document.createElement("li");
      li.textContent = text;
      return li;
    }));
  }
  for (const e of all("[data-width]")) set(e, "width", bars[e.dataset.width]);
  for (const e of all("[data-height]")) {
    const at = Number(e.dataset.height), height = bars.win_rates[at];
    set(e, "height", height);
    set(e, "y", 60 - height);
    set(e, "class", at < bars.weak_until ? "weak" : "strong");
  }
  for (const e of all("[data-threshold]")) for (const x of ["x1", "x2"]) set(e, x, bars.threshold);
}

function pace(requests) {
  const now = performance.now();
  if (last && requests >= last.requests) {
    paces.push(1000 * (requests - last.requests) / (now - last.now));
    if (paces.length > 60) paces.shift();
    const most = Math.max(1, ...paces), rate = paces.at(-1);
    document.querySelector("[data-now]").textContent =
      `${rate.toLocaleString("en", {maximumFractionDigits: rate < 10 ? 1 : 0})} a second now`;
    if (paces.length > 2) set(document.querySelector("[data-pace]"), "points", paces.map((p, i) =>
      `${118 - 2 * (paces.length - 1 - i)},${(23 - 22 * p / most).toFixed(1)}`).join(" "));
  }
  last = {now, requests};
}

async function refresh() {
  try {
    const answer = await fetch("/status.json", {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    const doc = await answer.json();
    show(doc);
    pace(doc.requests);
  } catch {
    document.documentElement.dataset.state = "away";
    document.querySelector("[data-text=state]").textContent = "Not reached";
  }
  setTimeout(refresh, every);
}
refresh();
