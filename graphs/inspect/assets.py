"""Style and script of the page, as constants so that they are packaged with the code."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --ground: #ffffff; --panel: #f6f7f9; --ink: #1c2127; --dim: #68727d; --line: #dfe3e8; --faint: #eceff2;
  --accent: #2f6fb3; --hot: #c4532d; --on: #ffffff;
  --c0: #4a78ad; --c1: #dd8a3e; --c2: #5b9d72; --c3: #a873a5; --c4: #4ea3a9; --c5: #cc5f63;
  --c6: #c7a53a; --c7: #97765f; --c8: #8187c9; --c9: #7f8b95; --c10: #b5688a; --c11: #84994b;
  --c12: #6d8f8a; --c13: #b07d4f; --c14: #7a6fb0; --c15: #9a9a5a; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --panel: #1b1f25; --ink: #dde2e7; --dim: #8d98a4; --line: #323941; --faint: #242930;
  --accent: #6ea8e6; --hot: #e58460; --on: #0e1114;
  --c0: #6b9bd1; --c1: #e8a25f; --c2: #79ba8f; --c3: #c193be; --c4: #6cbfc5; --c5: #e0807f;
  --c6: #d9bb5c; --c7: #b8977f; --c8: #a0a5e2; --c9: #98a4ae; --c10: #d488a8; --c11: #a4b968;
  --c12: #93b8b2; --c13: #d0a276; --c14: #a096d8; --c15: #bdbd80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
main, header > div, nav > div { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding: 34px 0 18px; }
h1 { font-size: 24px; font-weight: 600; margin: 0; letter-spacing: -0.01em; }
h1 small { font-weight: 400; color: var(--dim); font-size: 15px; letter-spacing: 0; margin-left: 10px; }
h2 { font-size: 17px; font-weight: 600; margin: 0 0 2px; letter-spacing: -0.005em; }
h3 { font-size: 13px; font-weight: 600; margin: 22px 0 6px; }
section { padding: 26px 0 22px; border-top: 1px solid var(--line); }
p.note { margin: 0 0 14px; color: var(--dim); max-width: 92ch; }
code, .mono { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 12px; }
.dim { color: var(--dim); fill: var(--dim); }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
td svg { display: inline-block; vertical-align: middle; max-width: none; }
.scroll { overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 20px 0 18px; }
.tiles div { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; }
.tiles b { display: block; font-size: 21px; font-weight: 600; line-height: 1.3; letter-spacing: -0.01em; }
.tiles span { color: var(--dim); font-size: 12.5px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 22px; margin: 0; font-size: 13px; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
dd s { color: var(--dim); }
nav { position: sticky; top: 0; z-index: 2; background: var(--ground); border-top: 1px solid var(--line); }
nav > div { display: flex; align-items: center; gap: 18px; padding-top: 9px; padding-bottom: 9px; font-size: 13px; }
nav a { color: var(--dim); text-decoration: none; }
nav a:hover { color: var(--ink); }
nav .buttons { margin-left: auto; }
.buttons { display: inline-flex; flex-wrap: wrap; overflow: hidden;
  border: 1px solid var(--line); border-radius: 6px; }
.buttons button { font: inherit; font-size: 13px; color: var(--dim); background: none; border: 0;
  padding: 3px 13px; cursor: pointer; }
.buttons button + button { border-left: 1px solid var(--line); }
.buttons button[aria-pressed="true"] { background: var(--accent); color: var(--on); }
.buttons button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
.pick { display: flex; align-items: center; gap: 12px; margin: 0 0 16px; font-size: 13px; }
table { border-collapse: collapse; font-size: 13px; }
th { text-align: left; font-weight: 500; color: var(--dim); font-size: 12px; vertical-align: bottom; }
th, td { padding: 3px 16px 3px 0; border-bottom: 1px solid var(--faint); white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
th.n, td.n { text-align: right; }
thead th { border-bottom-color: var(--line); }
table.total, table.buckets { width: 100%; margin-top: 12px; }
table.total td:last-child { width: 55%; white-space: normal; color: var(--dim); }
table.total tr:last-child td, table.buckets tr:last-child td {
  border-bottom: 0; border-top: 1px solid var(--line); font-weight: 600; }
table.kernels { width: 100%; margin-top: 18px; }
tr[data-launch].lit td { background: var(--faint); }
.columns { display: flex; flex-wrap: wrap; gap: 26px; align-items: flex-start; }
.columns > * { min-width: 0; }
.swatch { display: inline-flex; align-items: center; }
.swatch i, .legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 7px; }
.legend { display: flex; flex-wrap: wrap; gap: 3px 18px; font-size: 12px; color: var(--dim); margin: 8px 0 0; }
.legend span { display: inline-flex; align-items: center; }
.waste { display: flex; align-items: center; gap: 8px; font-weight: 400; }
.waste span { width: 52px; text-align: right; }
.bound { font-size: 12px; }
.bound.compute { color: var(--hot); }
.bound.memory { color: var(--accent); }
.bound.launch { color: var(--dim); }
svg text { fill: var(--ink); font-size: 11px; }
svg text.mono { font-size: 10.5px; }
svg text.dim, svg tspan.dim, svg text.tick, svg text.axis { fill: var(--dim); }
svg text.op { font-size: 12px; font-weight: 600; }
svg text.axis { font-size: 11.5px; }
svg text.onbar { fill: var(--on); font-size: 12.5px; font-weight: 500; pointer-events: none; }
svg text.inside { fill: var(--on); pointer-events: none; }
svg text.onfield { paint-order: stroke; stroke: var(--ground); stroke-width: 3px; stroke-opacity: 0.75;
  pointer-events: none; }
.grid { stroke: var(--faint); }
.track { fill: var(--faint); }
.filled { fill: var(--hot); }
.filled.kv { fill: var(--c3); }
.worst { stroke: var(--dim); stroke-width: 1.5; }
.part.memory { fill: var(--accent); }
.part.compute { fill: var(--hot); }
.part.launch { fill: var(--c9); opacity: 0.55; }
.box { fill: var(--panel); stroke: var(--line); }
.box.side { stroke-dasharray: 4 3; }
.port { fill: none; stroke: var(--dim); stroke-dasharray: 2 3; }
.edge { fill: none; stroke: var(--dim); stroke-width: 1.3; }
.head { fill: var(--dim); }
.edge.skip { stroke: var(--accent); stroke-width: 2; }
.head.skip { fill: var(--accent); }
svg text.shape { fill: var(--dim); font-size: 10px; paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
svg text.shape.skip { fill: var(--accent); }
.edge.cache { stroke: var(--c3); stroke-dasharray: 4 3; }
.head.cache { fill: var(--c3); }
.hit { fill: none; stroke: transparent; stroke-width: 10; }
.link:hover .edge { stroke-width: 3; }
.launch.lit .box, .launch:hover .box { stroke: var(--accent); stroke-width: 1.6; }
.buffer { fill-opacity: 0.92; }
.buffer:hover, .point:hover { stroke: var(--ink); stroke-width: 1.5; }
.point { fill-opacity: 0.85; stroke: var(--ground); stroke-width: 1; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.4; stroke-linejoin: round; }
.ground { fill: var(--ground); }
.cell { fill: var(--hot); stroke: var(--ground); stroke-width: 1.5; }
.illegal { fill: var(--panel); }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--ground); border: 1px solid var(--line);
  border-radius: 6px; box-shadow: 0 4px 18px rgba(0, 0, 0, 0.18);
  padding: 8px 11px; font-size: 12px; max-width: 560px; }
#tip b { display: block; font-weight: 600; overflow-wrap: anywhere; }
#tip div { display: grid; grid-template-columns: max-content 1fr; gap: 0 12px; }
#tip span:nth-child(odd) { color: var(--dim); }
#tip span { overflow-wrap: anywhere; }
footer { color: var(--dim); font-size: 12px; padding: 14px 0 40px;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
"""

SCRIPT = """
"use strict";
const tip = document.getElementById("tip");
function fill(content) {
  const [title, ...rows] = content.split("\\n");
  const head = document.createElement("b"), grid = document.createElement("div");
  head.textContent = title;
  for (const row of rows)
    for (const cell of row.split("\\t")) {
      const span = document.createElement("span");
      span.textContent = cell;
      grid.append(span);
    }
  tip.replaceChildren(head, grid);
}
function light(launch) {
  const key = launch && launch.dataset.launch, pane = launch && launch.closest(".pane");
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  if (key !== null && pane)
    for (const found of pane.querySelectorAll(`[data-launch="${key}"]`)) found.classList.add("lit");
}
document.addEventListener("mousemove", event => {
  const over = event.target.closest("[data-tip]");
  light(event.target.closest("[data-launch]"));
  tip.hidden = !over;
  if (!over) return;
  fill(over.dataset.tip);
  const x = event.clientX + 16, y = event.clientY + 16;
  tip.style.left = Math.max(4, Math.min(x, innerWidth - tip.offsetWidth - 12)) + "px";
  const above = Math.max(4, event.clientY - tip.offsetHeight - 12);
  tip.style.top = (y + tip.offsetHeight > innerHeight - 8 ? above : y) + "px";
});
document.addEventListener("click", event => {
  const button = event.target.closest("button[data-group]");
  if (!button) return;
  const { group, key } = button.dataset;
  for (const other of document.querySelectorAll("button[data-group]"))
    if (other.dataset.group === group) other.setAttribute("aria-pressed", String(other.dataset.key === key));
  for (const pane of document.querySelectorAll(".pane"))
    if (pane.dataset.group === group) pane.hidden = pane.dataset.key !== key;
});
"""
