// The conversation: state, and what is asked for.
import { computed, signal } from "@preact/signals";
import { ask, events } from "./api.js";

export const messages = signal([]); // {role, content, reasoning, calls, facts, error, busy, id}
export const settings = signal({ system: "", temperature: "", topP: "", maxTokens: "", schema: "", tools: "" });
export const problems = computed(() => {
  const found = {};
  for (const name of ["schema", "tools"]) {
    try {
      if (settings.value[name].trim()) JSON.parse(settings.value[name]);
    } catch (error) {
      found[name] = error.message;
    }
  }
  return found;
});
let under = null;

export const busy = computed(() => messages.value.some((message) => message.busy));

export function stop() {
  under?.abort();
}

export function clear() {
  stop();
  messages.value = [];
}

export function send(text) {
  messages.value = [...messages.value, { role: "user", content: text }];
  return answer();
}

export function sendResult(call, text) {
  messages.value = [...messages.value, { role: "tool", call: call.id, name: call.name, content: text }];
  const answered = new Set(messages.value.filter((each) => each.role === "tool").map((each) => each.call));
  const asked = messages.value.flatMap((each) => each.calls ?? []);
  if (asked.every((each) => answered.has(each.id))) return answer();
}

export function again() {
  let last = messages.value.length;
  while (last && messages.value[last - 1].role === "assistant") last--;
  messages.value = messages.value.slice(0, last);
  return answer();
}

function body() {
  const { system, temperature, topP, maxTokens, schema, tools } = settings.value;
  const said = messages.value.filter((each) => !each.busy).map((each) => {
    if (each.role === "tool") return { role: "tool", tool_call_id: each.call, content: each.content };
    const made = { role: each.role, content: each.content };
    if (each.calls?.length) {
      made.tool_calls = each.calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name, arguments: call.arguments },
      }));
    }
    return made;
  });
  const asked = {
    messages: system.trim() ? [{ role: "system", content: system }, ...said] : said,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (temperature !== "") asked.temperature = Number(temperature);
  if (topP !== "") asked.top_p = Number(topP);
  if (maxTokens !== "") asked.max_tokens = Number(maxTokens);
  if (schema.trim()) {
    const schemaGiven = JSON.parse(schema);
    asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema: schemaGiven, strict: true } };
  }
  if (tools.trim()) {
    const given = [JSON.parse(tools)].flat();
    asked.tools = given.map((tool) => (tool.type ? tool : { type: "function", function: tool }));
  }
  return asked;
}

async function answer() {
  const place = messages.value.length;
  const made = { role: "assistant", content: "", reasoning: "", calls: [], busy: true, json: Boolean(settings.value.schema.trim()) };
  const show = (change) => {
    Object.assign(made, change);
    if (messages.value.length > place) messages.value = messages.value.with(place, { ...made });
  };
  messages.value = [...messages.value, made];
  under = new AbortController();
  const began = performance.now();
  let first = null;
  let last = null;
  let usage = null;
  let pieces = 0;
  try {
    const response = await ask("v1/chat/completions", { body: body(), signal: under.signal });
    show({ id: response.headers.get("x-request-id") });
    let drawn = 0;
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      const delta = choice.delta ?? {};
      if (delta.content || delta.reasoning_content || delta.tool_calls) {
        last = performance.now();
        first ??= last;
        pieces++;
      }
      made.content += delta.content ?? "";
      made.reasoning += delta.reasoning_content ?? "";
      for (const part of delta.tool_calls ?? []) {
        const call = (made.calls[part.index] ??= { id: "", name: "", arguments: "" });
        call.id ||= part.id ?? "";
        call.name ||= part.function?.name ?? "";
        call.arguments += part.function?.arguments ?? "";
      }
      if (choice.finish_reason) made.reason = choice.finish_reason;
      if (performance.now() - drawn > 33 || choice.finish_reason) {
        drawn = performance.now();
        show({});
      }
    }
  } catch (error) {
    if (error.name === "AbortError") made.reason = "stopped";
    else made.error = error.message;
  }
  const tokens = usage?.completion_tokens ?? pieces;
  const seconds = (last - first) / 1000;
  show({
    busy: false,
    facts: first && {
      tokens,
      rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
      first: (first - began) / 1000,
      prompt: usage?.prompt_tokens,
      cached: usage?.prompt_tokens_details?.cached_tokens,
    },
  });
}
