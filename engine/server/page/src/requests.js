// Requests that run, wait, or ended while this page watched; and the life of one.
import { computed } from "@preact/signals";
import { count, duration, html } from "./html.js";
import { now, requests } from "./live.js";
import { chosenId } from "./view.js";

const SHOWN = 40;

const rows = computed(() => {
  const all = [...requests.value.values()];
  const open = all.filter((row) => row.state !== "done").reverse();
  const done = all.filter((row) => row.state === "done").sort((a, b) => (b.finished ?? b.arrived) - (a.finished ?? a.arrived));
  return { list: [...open, ...done].slice(0, SHOWN), rest: Math.max(0, all.length - SHOWN) };
});

const end = (row) => row.finished ?? now.value?.now ?? row.arrived;

// Parts of a life, [class, from, to].
function parts(row) {
  const last = end(row);
  const made = [];
  if (row.admitted == null) return [["queued", row.arrived, last]];
  made.push(["queued", row.arrived, row.admitted]);
  for (const [, , from, to] of row.chunks ?? []) made.push(["prefill", Math.max(from, row.arrived), Math.min(to, last)]);
  if (row.first_token != null) made.push(["decode", row.first_token, last]);
  return made;
}

function Bar({ row, label }) {
  const from = row.arrived;
  const whole = Math.max(1e-6, end(row) - from);
  const share = (seconds) => `${(100 * seconds) / whole}%`;
  return html`<div class="bar" role="img" aria-label=${label}>
    ${parts(row).map(([kind, begin, stop]) => html`<i class=${kind} style=${{ left: share(begin - from), width: share(Math.max(stop - begin, 0)) }}></i>`)}
  </div>`;
}

const state = (row) => (row.state === "done" ? row.reason ?? "done" : row.state);
const name = (row) => row.id.length > 14 ? `${row.id.slice(0, 12)}…` : row.id;
const isChosen = (row) => chosenId.value === row.id || chosenId.value === row.key;

export function Requests() {
  const { list, rest } = rows.value;
  return html`<section>
    <h2>Requests <small>${list.length ? "choose one to see its life" : "none since this page watches"}</small></h2>
    ${list.length > 0 && html`<div class="requests"><table>
      <thead><tr><th>id</th><th>state</th><th class="n">prompt</th><th class="n">cached</th><th class="n">out</th><th class="life">life</th></tr></thead>
      <tbody>${list.map((row) => html`<tr key=${row.key} class=${isChosen(row) ? "chosen" : ""} tabindex="0"
        onClick=${() => { chosenId.value = isChosen(row) ? null : row.key; }}
        onKeyDown=${(event) => { if (event.key === "Enter") chosenId.value = row.key; }}>
        <td class="id" title=${row.id}>${name(row)}</td><td class=${`state ${row.state} ${row.reason ?? ""}`}>${state(row)}</td>
        <td class="n">${count(row.prompt_tokens)}</td><td class="n">${count(row.cached_tokens)}</td><td class="n">${count(row.output_tokens)}</td>
        <td class="life"><${Bar} row=${row} label=${`life of ${row.id}`} /></td>
      </tr>`)}</tbody>
    </table></div>`}
    ${rest > 0 && html`<p class="note">and ${count(rest)} more</p>`}
  </section>`;
}

function Line({ at, what, more }) {
  return html`<li><time>${at == null ? "" : `+${at ? duration(at) : 0}`}</time><span>${what}${more && html` <small>${more}</small>`}</span></li>`;
}

export function Life() {
  const all = [...requests.value.values()];
  const row = all.findLast(isChosen);
  if (!row) return null;
  const since = (at) => (at == null ? null : at - row.arrived);
  const decoding = row.first_token != null ? end(row) - row.first_token : null;
  const chunks = row.chunks ?? [];
  const shown = chunks.length > 12 ? [...chunks.slice(0, 6), null, ...chunks.slice(-5)] : chunks;
  return html`<aside class="dialog" aria-label="Life of a request">
    <header><h2>${row.id}${row.sample ? ` · sample ${row.sample}` : ""}</h2><button class="link" onClick=${() => { chosenId.value = null; }}>Close</button></header>
    <${Bar} row=${row} label="its life" />
    <ol class="events">
      <${Line} at=${0} what="queued" more=${`${count(row.prompt_tokens)} prompt tokens`} />
      ${row.admitted != null && html`<${Line} at=${since(row.admitted)} what="began to run" more=${`${count(row.cached_tokens)} tokens were cached`} />`}
      ${shown.map((chunk) => chunk
        ? html`<${Line} at=${since(chunk[2])} what=${`prefill of ${count(chunk[1])}`} more=${`tokens ${count(chunk[0])} to ${count(chunk[0] + chunk[1] - 1)}, ${duration(chunk[3] - chunk[2])}`} />`
        : html`<${Line} what=${`${chunks.length - 11} more chunks`} />`)}
      ${row.first_token != null && html`<${Line} at=${since(row.first_token)} what="first token" />`}
      ${decoding != null && row.output_tokens > 1 && html`<${Line} at=${since(end(row))} what=${`${count(row.output_tokens)} tokens`} more=${`${duration(decoding / (row.output_tokens - 1))} a token, ${((row.output_tokens - 1) / decoding).toFixed(1)} tokens/s`} />`}
      ${row.retractions > 0 && html`<${Line} what=${`sent back to wait ${row.retractions}×`} more="pages ran out" />`}
      ${row.state === "done" && html`<${Line} at=${since(row.finished)} what=${`finished: ${row.reason}`} />`}
    </ol>
  </aside>`;
}
