"""The status page: one HTML document that needs nothing from elsewhere and asks /status.json every two seconds.

Names from the configuration and the network reach the page as text nodes only, never as markup.
"""

from __future__ import annotations

import base64
import hashlib

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --good: #2a7f3f; --bad: #c22f2f; --flow: #3572b0; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem 1.2rem 3rem; max-width: 78rem; }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; }
h1 { font-size: 1.35rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
#health { font-weight: 600; padding: .1rem .7rem; border-radius: 1rem; color: #fff; background: #777; }
#health.ok { background: var(--good); } #health.failing { background: var(--bad); }
#problems { color: var(--bad); margin: .5rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; border-bottom-width: 2px; } tbody tr:hover { background: var(--soft); }
th.text, td.text { text-align: left; } .bad { color: var(--bad); font-weight: 600; } .soft { opacity: .65; }
svg { width: 100%; min-width: 56rem; height: auto; } svg text { fill: currentColor; font-size: 13px; }
svg .name { font-weight: 600; } svg .figure { font-size: 15px; } svg .small { font-size: 11.5px; opacity: .8; }
svg rect { fill: var(--soft); stroke: var(--line); } svg .flow { stroke: var(--flow); fill: none; stroke-width: 2; }
svg .drop { stroke: var(--line); fill: none; stroke-dasharray: 3 3; } svg text.bad { fill: var(--bad); }
footer { margin-top: 2rem; } a { color: var(--flow); }
"""

_SCRIPT = """
"use strict";
const REFRESH_MS = 2000;
const NONE = "-";
const byId = (id) => document.getElementById(id);
const number = (n) => n === null || n === undefined ? NONE : Math.round(n).toLocaleString("en");
const sum = (rows, get) => rows.reduce((total, row) => total + get(row), 0);
const entries = (map) => Object.entries(map).filter(([, n]) => n).map(([name, n]) => `${name} ${number(n)}`).join(", ");

function scaled(n, step, units) {
  let i = 0;
  while (Math.abs(n) >= step && i < units.length - 1) { n /= step; i += 1; }
  return `${i && n < 100 ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
}
const size = (n) => n === null || n === undefined ? NONE : scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
const rate = (n) => n === null ? "" : `${scaled(n, 1000, ["", "k", "M", "G"]).trim()}/s`;
const bits = (n) => n === null ? "" : scaled(8 * n, 1000, ["b/s", "kb/s", "Mb/s", "Gb/s"]);

function duration(s) {
  if (s === null || s === undefined) return NONE;
  if (s < 90) return `${s.toFixed(s < 10 ? 1 : 0)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`;
}

// Rates are differences of two refreshes; a counter that went back belongs to a new start, and has none yet.
let before = null;
function perSecond(now, get) {
  if (!before || now.taken_ns <= before.taken_ns) return null;
  const difference = get(now) - get(before);
  return difference < 0 || Number.isNaN(difference) ? null : difference / ((now.taken_ns - before.taken_ns) / 1e9);
}
const interfaceOf = (label, get) => (status) => {
  const found = status.interfaces.find((row) => row.label === label);
  return found ? get(found) : NaN;
};

function table(id, columns, rows) {
  const element = byId(id);
  element.replaceChildren();
  const head = element.createTHead().insertRow();
  for (const [title, , kind] of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = title;
    if (kind === "text") cell.className = "text";
    head.append(cell);
  }
  const body = element.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const [, get, kind, isBad] of columns) {
      const cell = line.insertCell();
      cell.textContent = get(row);
      if (kind === "text") cell.classList.add("text");
      if (isBad && isBad(row)) cell.classList.add("bad");
    }
  }
  element.closest("section").hidden = rows.length === 0;
}

const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  byId("journey").append(element);
}

const BOX = { width: 138, height: 76, step: 172, top: 14 };
function box(column, top, name, figure, small) {
  const x = 4 + column * BOX.step, middle = x + BOX.width / 2;
  shape("rect", { x, y: top, width: BOX.width, height: BOX.height, rx: 8 });
  shape("text", { x: middle, y: top + 22, class: "name", "text-anchor": "middle" }, name);
  shape("text", { x: middle, y: top + 44, class: "figure", "text-anchor": "middle" }, figure);
  shape("text", { x: middle, y: top + 64, class: "small", "text-anchor": "middle" }, small);
}
function arrow(column, top) {
  const from = 4 + column * BOX.step + BOX.width, y = top + BOX.height / 2;
  shape("path", { d: `M${from + 2} ${y} H${from + 29} m-6 -4 l6 4 l-6 4`, class: "flow" });
}
function drop(column, name, count, isLoss) {
  const middle = 4 + column * BOX.step + BOX.width / 2, y = BOX.top + BOX.height;
  shape("path", { d: `M${middle} ${y + 2} V${y + 26}`, class: "drop" });
  const marks = isLoss && count ? "bad" : "small";
  shape("text", { x: middle, y: y + 42, class: marks, "text-anchor": "middle" }, `${name} ${number(count)}`);
}

function drawJourney(status) {
  byId("journey").replaceChildren();
  const rows = status.interfaces, outputs = status.outputs, meter = status.meter;
  const dropped = (stage) => sum(rows, (row) => row.dropped[stage]);
  const waiting = (...places) => sum(rows, (row) => sum(places, (place) => row.in_flight[place]));
  const received = (s) => sum(s.interfaces, (row) => row.received_packets);
  const top = BOX.top;
  box(0, top, "Received", number(received(status)), rate(perSecond(status, received)));
  drop(0, "by the card", sum(rows, (row) => row.nic_dropped_packets || 0), true);
  box(1, top, "Kernel ring", number(waiting("kernel")), "waiting");
  drop(1, "dropped", dropped("kernel"), true);
  box(2, top, "Capture", number(waiting("reorder")), "held for order");
  drop(2, "filtered", dropped("filter") + dropped("gate") + dropped("foreign"), false);
  box(3, top, "Ring", number(waiting("ring")), size(sum(rows, (row) => row.ring_used_bytes)));
  drop(3, "dropped", dropped("ring"), true);
  box(4, top, "Merge", number(waiting("merge")), "held");
  drop(4, "dropped", dropped("merge"), true);
  box(5, top, "Written", number(sum(rows, (row) => row.written_packets)),
      `${number(sum(outputs, (row) => row.open_packets))} in open files`);
  drop(5, "lost", dropped("writer") + dropped("unclean"), true);
  box(6, top, "ready/", `${number(sum(outputs, (row) => row.files_published + row.files_recovered))} files`,
      size(sum(outputs, (row) => row.published_bytes)));
  drop(6, "quarantined", sum(outputs, (row) => row.quarantined_packets), true);
  for (let column = 0; column < 6; column += 1) arrow(column, top);
  if (!meter) return;
  const second = 168, x = 4 + 2 * BOX.step + BOX.width - 14;
  const path = `M${x} ${top + BOX.height + 2} V${second + BOX.height / 2} H${x + 43} m-6 -4 l6 4 l-6 4`;
  shape("path", { d: path, class: "flow" });
  box(3, second, "Meter", number(meter.metered_packets), `${number(meter.active_flows)} flows`);
  arrow(3, second);
  box(4, second, "IPFIX", `${number(sum(status.exports, (row) => row.records))} records`,
      `${number(sum(status.exports, (row) => row.not_sent_flows))} flows not sent`);
}

const INTERFACES = (now) => [
  ["interface", (row) => row.label, "text"],
  ["source", (row) => row.uri, "text"],
  ["", (row) => row.is_live ? (row.is_up ? "up" : "down") : "file", "text", (row) => row.is_live && !row.is_up],
  ["packets", (row) => rate(perSecond(now, interfaceOf(row.label, (r) => r.received_packets)))],
  ["", (row) => bits(perSecond(now, interfaceOf(row.label, (r) => r.read_bytes)))],
  ["received", (row) => number(row.received_packets)],
  ["= written", (row) => number(row.written_packets)],
  ["+ dropped", (row) => number(row.dropped_packets), "", (row) => row.lost_packets > 0],
  ["+ in flight", (row) => number(row.in_flight_packets)],
  ["by stage", (row) => entries(row.dropped), "text"],
  ["ring", (row) => `${Math.round(100 * row.ring_used_bytes / Math.max(1, row.ring_capacity_bytes))} %`],
  ["late", (row) => number(row.late_packets + row.late_written_packets)],
];
const OUTPUTS = (now) => [
  ["output", (row) => row.name, "text"],
  ["directory", (row) => row.directory, "text"],
  ["written", (row) => number(row.written_packets)],
  ["published", (row) => `${number(row.files_published)} files`],
  ["size", (row) => size(row.published_bytes)],
  ["waiting", (row) => number(row.queued_files), "", (row) => row.queued_files > 2],
  ["quarantined", (row) => number(row.files_quarantined), "", (row) => row.files_quarantined > 0],
  ["errors", (row) => number(row.write_errors + row.compressor_failures), "",
   (row) => row.write_errors + row.compressor_failures > 0],
  ["open for", (row) => row.file_opened_ns ? duration((now.taken_ns - row.file_opened_ns) / 1e9) : NONE],
  ["disk free", (row) => row.storage ? size(row.storage.free_bytes) : NONE],
];
const EXPORTS = [
  ["collector", (row) => row.uri, "text"],
  ["", (row) => row.is_up ? "up" : "down", "text", (row) => !row.is_up],
  ["records", (row) => number(row.records)],
  ["messages", (row) => number(row.messages)],
  ["size", (row) => size(row.bytes)],
  ["errors", (row) => number(row.send_errors), "", (row) => row.send_errors > 0],
  ["flows not sent", (row) => number(row.not_sent_flows), "", (row) => row.not_sent_flows > 0],
];
const TRACEFLOW = [
  ["observed", (row) => number(row.observed_packets)],
  ["= no TCP", (row) => number(row.other_packets)],
  ["+ in files", (row) => number(row.published_packets)],
  ["+ held", (row) => number(row.held_packets + row.queued_packets)],
  ["+ left out", (row) => number(sum(Object.values(row.left_out), (count) => count)), "",
   (row) => sum(Object.values(row.left_out), (count) => count) > 0],
  ["+ lost", (row) => number(row.lost_unclean_packets), "", (row) => row.lost_unclean_packets > 0],
  ["missed", (row) => number(row.missed_packets), "", (row) => row.missed_packets > 0],
  ["flows", (row) => number(row.flows_created)],
  ["active", (row) => number(row.active_flows)],
  ["kept", (row) => `${number(row.stored_files)} files`],
  ["size", (row) => size(row.stored_bytes + row.staged_bytes)],
];
const WORKERS = [
  ["process", (row) => row.name, "text"],
  ["pid", (row) => row.pid || NONE],
  ["state", (row) => row.state, "text", (row) => !row.is_fresh && row.state !== "ended"],
  ["last sign of life", (row) => duration(row.heartbeat_age_s)],
  ["up for", (row) => duration(row.uptime_s)],
  ["restarts", (row) => number(row.restarts), "", (row) => row.restarts > 0],
  ["CPU", (row) => row.process ? duration(row.process.cpu_seconds) : NONE],
  ["memory", (row) => row.process ? size(row.process.resident_bytes) : NONE],
];

function setHealth(kind, text, problems) {
  byId("health").className = kind;
  byId("health").textContent = text;
  byId("problems").replaceChildren(...problems.map((problem) => {
    const item = document.createElement("li");
    item.textContent = problem;
    return item;
  }));
}

function show(now) {
  const failing = now.problems.length > 0;
  setHealth(failing ? "failing" : "ok", failing ? "failing" : "healthy", now.problems);
  byId("about").textContent = `version ${now.service.version}, up for ${duration(now.service.uptime_s)}`;
  drawJourney(now);
  table("interfaces", INTERFACES(now), now.interfaces);
  table("outputs", OUTPUTS(now), now.outputs);
  table("exports", EXPORTS, now.exports);
  table("traceflow", TRACEFLOW, now.traceflow ? [now.traceflow] : []);
  table("workers", WORKERS, now.workers);
  before = now;
}

async function refresh() {
  try {
    const answer = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    show(await answer.json());
  } catch (error) {
    setHealth("failing", "no answer", ["The service does not answer; the figures below are its last ones."]);
  }
  setTimeout(refresh, REFRESH_MS);
}
refresh();
"""

_BODY = """
<header><h1>Capture appliance</h1><span id="health" role="status">…</span><span id="about" class="soft"></span></header>
<noscript><p>This page draws with JavaScript; <a href="status.json">status.json</a> and <a href="metrics">metrics</a>
hold the same figures.</p></noscript>
<ul id="problems"></ul>
<h2>A packet's journey</h2>
<div class="scroll"><svg id="journey" viewBox="0 0 1180 252" role="img"
aria-label="Packets by stage, from interface to published files; the tables below hold the same figures"></svg></div>
<section hidden><h2>Interfaces</h2><div class="scroll"><table id="interfaces"></table></div></section>
<section hidden><h2>Outputs</h2><div class="scroll"><table id="outputs"></table></div></section>
<section hidden><h2>Flow collectors</h2><div class="scroll"><table id="exports"></table></div></section>
<section hidden><h2>Flow traces</h2><div class="scroll"><table id="traceflow"></table></div></section>
<section hidden><h2>Processes</h2><div class="scroll"><table id="workers"></table></div></section>
<footer class="soft"><a href="metrics">metrics</a> · <a href="healthz">healthz</a> ·
<a href="status.json">status.json</a></footer>
"""

PAGE = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Capture appliance</title>\n'
    f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>{_BODY}<script>{_SCRIPT}</script>\n'
    "</body>\n</html>\n"
)


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


# Only this script and this style run; only this service is asked; nobody frames the page.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
