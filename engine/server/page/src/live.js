// What the engine told, kept for drawing.
import { effect, signal } from "@preact/signals";
import { apiKey, ask, events } from "./api.js";

const STEPS = 600;
const SERIES_SECONDS = 60;
const REQUESTS = 100;

export const model = signal(null);
export const connected = signal(false);
export const problem = signal(null);
export const now = signal(null); // the latest event
export const steps = signal([]);
export const requests = signal(new Map());
export const series = signal({ at: [], running: [], waiting: [], rate: [] });
export const most = signal(0); // pages that were held at once, since this page watches
export const retractions = signal(0);
let predicted = null;

// Seconds that a step should take: between those for the shortest and the longest context.
function prediction(step) {
  const costs = predicted?.buckets[step.bucket];
  if (!costs) return null;
  const { contexts } = predicted;
  const context = Math.max(contexts[0], Math.min(contexts.at(-1), (step.held * model.value.page_size) / Math.max(step.running || step.rows, 1)));
  const share = (context - contexts[0]) / (contexts.at(-1) - contexts[0] || 1);
  return costs[0] + share * (costs.at(-1) - costs[0]);
}

export function windowed(seconds) {
  const since = (now.value?.now ?? 0) - seconds;
  return steps.value.filter((step) => step.at > since);
}

function take(event) {
  if (event.predicted) {
    predicted = event.predicted;
    for (const step of steps.value) step.predicted = prediction(step);
  }
  for (const step of event.steps) {
    step.predicted = prediction(step);
    retractions.value += step.retractions;
    most.value = Math.max(most.value, step.held);
  }
  steps.value = [...steps.value, ...event.steps].slice(-STEPS);
  if (event.requests.length) {
    const all = new Map(requests.value);
    for (const row of event.requests) all.set(row.key, { ...all.get(row.key), ...row });
    const extra = [...all.values()].filter((row) => row.state === "done").slice(0, Math.max(0, all.size - REQUESTS));
    for (const row of extra) all.delete(row.key);
    requests.value = all;
  }
  now.value = event;
  const made = windowed(2).reduce((sum, step) => sum + step.new_tokens, 0) / 2;
  const values = { at: event.now, running: event.running, waiting: event.waiting, rate: made };
  const from = series.value.at.findIndex((at) => at > event.now - SERIES_SECONDS);
  series.value = Object.fromEntries(
    Object.entries(series.value).map(([name, list]) => [name, [...list.slice(Math.max(0, from)), values[name]]]),
  );
}

async function watch(signal) {
  while (!signal.aborted) {
    try {
      const answer = await ask("live", { signal });
      for await (const data of events(answer)) {
        const event = JSON.parse(data);
        if (event.model !== undefined) {
          model.value = event;
          steps.value = [];
          requests.value = new Map();
          series.value = { at: [], running: [], waiting: [], rate: [] };
          most.value = retractions.value = 0;
          connected.value = true;
          problem.value = null;
        } else {
          take(event);
        }
      }
      problem.value = "the server ended the stream";
    } catch (error) {
      if (signal.aborted) return;
      problem.value = error.message;
    }
    connected.value = false;
    await new Promise((resolve) => setTimeout(resolve, 2000));
    if (problem.value && document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

export function start() {
  effect(() => {
    void apiKey.value; // another key: ask again
    const abort = new AbortController();
    watch(abort.signal);
    return () => abort.abort();
  });
}
