"use strict";
// Sorts, filters and pages the table of latents. Text only ever enters the page as text nodes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { coders, folders, statuses, words, explainers, series, rows } = data;
  const total = rows.latent.length;
  const PER_PAGE = 100;
  const byId = (id) => document.getElementById(id);
  const el = (tag, attributes = {}, text) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const svg = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const textOf = (i) => {
    const wanted = byId("f-explainer").value;
    const texts = rows.texts[i];
    return (wanted === "" ? texts.find((text) => text !== null) : texts[+wanted]) ?? null;
  };
  const columns = [
    { name: "Coder", key: (i) => coders[rows.coder[i]], cell: (i) => el("td", {}, coders[rows.coder[i]]) },
    { name: "Latent", right: true, key: (i) => rows.latent[i], cell: linkCell },
  ];
  if (data.has_density) columns.push({ name: "Density", right: true, key: (i) => rows.density[i], cell: (i) => el("td", { class: "r" }, rows.density[i] === null ? "-" : rows.density[i].toPrecision(2)) });
  columns.push({ name: "Explanation", key: (i) => (textOf(i) ?? "").toLowerCase() || null, cell: (i) => el("td", { class: "text" }, textOf(i) ?? "-") });
  series.forEach((s, n) => columns.push({ name: s.name, title: s.title, right: true, key: (i) => rows.values[n][0][i], cell: (i) => scoreCell(i, n) }));
  columns.push({ name: "Status", key: (i) => statuses[rows.status[i]], cell: statusCell });

  function linkCell(i) {
    const cell = el("td", { class: "r" });
    cell.append(el("a", { href: `latents/${folders[rows.coder[i]]}/${rows.latent[i]}.html` }, String(rows.latent[i])));
    return cell;
  }
  function statusCell(i) {
    const status = statuses[rows.status[i]];
    const cell = el("td");
    cell.append(el("span", { class: status === "ok" ? "badge ok" : "badge plain", title: words[status] ?? status }, status));
    return cell;
  }
  function scoreCell(i, n) {
    const [value, low, high, control] = rows.values[n].map((list) => list[i]);
    const cell = el("td", { class: "r score" });
    if (value === null) { cell.textContent = "-"; return cell; }
    cell.append(el("span", { class: "v" }, value.toFixed(3)));
    const [left, right] = series[n].domain;
    const x = (v) => (3 + (Math.min(Math.max(v, left), right) - left) / (right - left) * 74).toFixed(1);
    const bar = svg("svg", { class: "bar", width: 80, height: 12, viewBox: "0 0 80 12", "aria-hidden": "true" });
    bar.append(svg("path", { class: "track", d: "M3 6H77" }));
    if (series[n].chance !== null) bar.append(svg("path", { class: "chance", d: `M${x(series[n].chance)} 1V11` }));
    if (low !== null && high !== null) bar.append(svg("path", { class: "ci", d: `M${x(low)} 6H${x(high)}` }));
    if (control !== null) bar.append(svg("path", { class: "control", d: `M${x(control)} 2.5l3.5 3.5l-3.5 3.5l-3.5 -3.5z` }));
    bar.append(svg("circle", { class: "dot", cx: x(value), cy: 6, r: 3 }));
    cell.append(bar);
    cell.title = (low !== null ? `${low.toFixed(3)} to ${high.toFixed(3)}` : "no interval") + (control !== null ? `, control ${control.toFixed(3)}` : "");
    return cell;
  }

  let sorted = { column: 0, down: false };
  let shown = [];
  let page = 0;
  const head = byId("latents").tHead.appendChild(el("tr"));
  columns.forEach((column, number) => {
    const cell = el("th", { scope: "col", class: column.right ? "r" : "" });
    const button = el("button", { type: "button", title: column.title ?? `Sort by ${column.name.toLowerCase()}` }, column.name);
    button.addEventListener("click", () => {
      // Scores are read from the best down, names from the first up.
      sorted = { column: number, down: sorted.column === number ? !sorted.down : number >= columns.length - 1 - series.length && number < columns.length - 1 };
      refresh();
    });
    cell.append(button);
    head.append(cell);
  });

  function option(select, value, text) { select.append(el("option", { value }, text)); }
  coders.forEach((name, n) => option(byId("f-coder"), n, name));
  statuses.forEach((name, n) => option(byId("f-status"), n, name));
  if (explainers.length > 1) option(byId("f-explainer"), "", "any");
  explainers.forEach((name, n) => option(byId("f-explainer"), n, name));
  byId("l-explainer").hidden = explainers.length < 2;
  series.forEach((s, n) => option(byId("f-series"), n, s.title));
  for (const id of ["f-series", "f-min", "f-max"]) byId(id).closest("label").hidden = !series.length;

  const lower = rows.texts.map((texts, i) => `${coders[rows.coder[i]]}/${rows.latent[i]} ${texts.filter((t) => t !== null).join("\n")}`.toLowerCase());
  function matches(i) {
    const coder = byId("f-coder").value, status = byId("f-status").value;
    if (coder !== "" && rows.coder[i] !== +coder) return false;
    if (status !== "" && rows.status[i] !== +status) return false;
    if (byId("f-explainer").value !== "" && textOf(i) === null && explainers.length > 1) return false;
    const min = byId("f-min").value, max = byId("f-max").value;
    if (series.length && (min !== "" || max !== "")) {
      const value = rows.values[+byId("f-series").value][0][i];
      if (value === null || (min !== "" && value < +min) || (max !== "" && value > +max)) return false;
    }
    return terms.every((term) => (/^\d+$/.test(term) ? String(rows.latent[i]) === term || lower[i].includes(term) : lower[i].includes(term)));
  }
  let terms = [];
  function refresh() {
    terms = byId("q").value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = [];
    for (let i = 0; i < total; i++) if (matches(i)) shown.push(i);
    const { key } = columns[sorted.column];
    const keys = new Map(shown.map((i) => [i, key(i)]));
    const sign = sorted.down ? -1 : 1;
    // What has no value stays at the end either way; ties stay in order of coder and latent.
    shown.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === y) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      return (x < y ? -1 : 1) * sign;
    });
    [...head.children].forEach((cell, number) => cell.setAttribute("aria-sort", number !== sorted.column ? "none" : sorted.down ? "descending" : "ascending"));
    page = 0;
    draw();
  }
  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    const body = el("tbody");
    for (const i of shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE)) {
      const row = el("tr");
      row.append(...columns.map((column) => column.cell(i)));
      body.append(row);
    }
    byId("latents").tBodies[0].replaceWith(body);
    byId("count").textContent = `${shown.length.toLocaleString("en")} of ${total.toLocaleString("en")} latents`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("pager").hidden = pages < 2;
    byId("prev").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }
  byId("prev").addEventListener("click", () => { page--; draw(); });
  byId("next").addEventListener("click", () => { page++; draw(); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  let waiting;
  byId("filters").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 80); });
  byId("filters").hidden = false;
  refresh();
  // Where scripts fail to run this is absent, which the tests look for.
  document.documentElement.dataset.ready = "true";
})();
