// The engine, drawn: figures, steps, pages, load, latencies, requests.
import { computed, signal } from "@preact/signals";
import uPlot from "uplot";
import { axis, colour, Plot, Strip } from "./charts.js";
import { count, duration, html } from "./html.js";
import { Life, Requests } from "./requests.js";
import { connected, model, most, now, problem, retractions, series, steps, windowed } from "./live.js";

const hovered = signal(null);

const rates = computed(() => {
  void now.value;
  const recent = windowed(2);
  const sum = (name) => recent.reduce((total, step) => total + step[name], 0);
  const known = recent.filter((step) => step.predicted != null);
  const ratio = known.reduce((total, step) => total + step.seconds, 0) / known.reduce((total, step) => total + step.predicted, 0);
  const prompt = sum("prompt_tokens");
  const cached = sum("cached_tokens");
  return { generated: sum("new_tokens") / 2, prompt: prompt / 2, hit: prompt + cached ? cached / (prompt + cached) : null, ratio };
});

function Tile({ name, value, of, warn }) {
  return html`<div class=${`tile ${warn ? "warn" : ""}`}><b>${value}</b>${of && html`<small> / ${of}</small>`}<span>${name}</span></div>`;
}

function Tiles() {
  const { generated, prompt } = rates.value;
  const { running = 0, waiting = 0 } = now.value ?? {};
  return html`<div class="tiles">
    <${Tile} name="tok/s" value=${count(generated)} />
    <${Tile} name="prompt tok/s" value=${count(prompt)} />
    <${Tile} name="running" value=${running} of=${model.value?.max_rows} />
    <${Tile} name="waiting" value=${count(waiting)} warn=${waiting > 0} />
    <${Tile} name="retractions" value=${count(retractions.value)} warn=${retractions.value > 0} />
  </div>`;
}

function Steps() {
  const step = hovered.value ?? steps.value.at(-1);
  const { ratio } = rates.value;
  return html`<section>
    <h2>Steps <small><i class="key decode"></i>decode <i class="key prefill"></i>prefill <i class="key pale"></i>padding <i class="key mark"></i>predicted</small></h2>
    <${Strip} steps=${steps.value} hovered=${hovered.value} onHover=${(step) => { hovered.value = step; }} />
    <p class="note">${step
      ? html`<b>${step.bucket}</b> · ${step.rows} ${step.rows === 1 ? "row" : "rows"}, ${count(step.tokens)} of ${count(step.bucket_tokens)} tokens${step.cached_tokens ? `, ${count(step.cached_tokens)} cached` : ""} · ${duration(step.seconds)}${step.predicted != null ? `, predicted ${duration(step.predicted)}` : ""}${model.value?.target !== "cpu" ? ` · host ${duration(step.host_seconds)}` : ""}${ratio ? ` · ${ratio.toFixed(2)}× predicted over 2 s` : ""}`
      : "No step yet."}</p>
  </section>`;
}

function Pool() {
  const total = model.value?.pages ?? 1;
  const [free, cached, held] = now.value?.pages ?? [total, 0, 0];
  const share = (pages) => `${(100 * pages) / total}%`;
  return html`<section>
    <h2>Pages <small>${count(total)} pages of ${model.value?.page_size} tokens</small></h2>
    <div class="pool" role="img" aria-label=${`${held} held, ${cached} cached, ${free} free`}>
      <i class="held" style=${{ width: share(held) }}></i><i class="cached" style=${{ width: share(cached) }}></i>
      <i class="most" style=${{ left: share(most.value) }} title="most held at once"></i>
    </div>
    <p class="note"><i class="key held"></i><b>${count(held)}</b> held <i class="key cached"></i><b>${count(cached)}</b> cached <i class="key pale"></i><b>${count(free)}</b> free · most held ${count(most.value)}</p>
  </section>`;
}

const line = (name, paint, fill, more = {}) => ({ label: name, stroke: colour(paint), fill: fill && colour(fill), width: 1.5, points: { show: false }, ...more });

function load() {
  return {
    cursor: { show: false },
    legend: { show: false },
    scales: { x: { time: false, range: (plot, low) => [Math.min(low ?? 0, -10), 0] }, y: { range: (plot, low, high) => [0, Math.max(4, high)] }, rate: { range: (plot, low, high) => [0, Math.max(10, high * 1.1)] } },
    axes: [
      axis({ size: 26, values: (plot, splits) => splits.map((at) => (at === 0 ? "now" : `${at} s`)) }),
      axis({ incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000] }),
      axis({ scale: "rate", side: 1, size: 40, grid: { show: false } }),
    ],
    series: [{}, line("running", "decode", "decode-pale"), line("waiting", "warn"), line("tokens/s", "ink", null, { scale: "rate", dash: [3, 3], width: 1 })],
  };
}

function Load() {
  const { at, running, waiting, rate } = series.value;
  const end = at.at(-1) ?? 0;
  return html`<section>
    <h2>Load <small><i class="key decode"></i>running <i class="key waiting"></i>waiting <i class="key dashed"></i>tokens/s</small></h2>
    <${Plot} make=${load} label="Requests running and waiting, and tokens a second, over the last minute" data=${[at.map((each) => each - end), running, waiting, rate]} />
  </section>`;
}

function within(bounds, counts, share) {
  const total = counts.reduce((sum, each) => sum + each, 0);
  let below = 0;
  for (let place = 0; place < counts.length; place++) {
    below += counts[place];
    if (total && below >= share * total) return place < bounds.length ? `≤ ${duration(bounds[place])}` : `> ${duration(bounds.at(-1))}`;
  }
  return "–";
}

function Histogram({ name, title, paint }) {
  const [bounds, counts] = now.value?.latencies[name] ?? [[], []];
  const make = () => ({
    cursor: { show: false },
    legend: { show: false },
    scales: { x: { time: false, range: [-0.6, counts.length - 0.4] }, y: { range: (plot, low, high) => [0, Math.max(1, high)] } },
    axes: [
      axis({ size: 26, grid: { show: false }, splits: () => bounds.map((_, place) => place + 0.5).filter((_, place) => place % 4 === 1), values: (plot, splits) => splits.map((at) => duration(bounds[at - 0.5]).replace(/\.0+ /, " ").replace(" ", "")) }),
      axis({ space: 18, incrs: [1, 2, 5, 10, 50, 100, 500, 1000, 5000, 10000, 50000, 100000] }),
    ],
    series: [{}, { stroke: colour(paint), fill: colour(paint), paths: uPlot.paths.bars({ size: [0.86, 60] }), points: { show: false } }],
  });
  return html`<section>
    <h2>${title}</h2>
    ${counts.length > 0 && html`<${Plot} make=${make} label=${title} data=${[counts.map((_, place) => place), counts]} height=${96} />`}
    <p class="note">p50 ${within(bounds, counts, 0.5)} · p99 ${within(bounds, counts, 0.99)}</p>
  </section>`;
}

export function Engine() {
  return html`<section class="engine" aria-label="Engine">
    ${!connected.value && html`<p class="error" role="status">${problem.value ?? "connecting"}</p>`}
    <${Tiles} />
    <${Steps} />
    <${Pool} />
    <${Load} />
    <div class="two">
      <${Histogram} name="first_token" title="First token" paint="prefill" />
      <${Histogram} name="between_tokens" title="Between tokens" paint="decode" />
    </div>
    <${Requests} />
    <${Life} />
  </section>`;
}
