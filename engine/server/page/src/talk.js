// The chat, drawn.
import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { again, busy, clear, messages, problems, send, sendResult, settings, stop } from "./chat.js";
import { count, duration, html, Safe } from "./html.js";
import { code, markdown } from "./markdown.js";
import { chosenId, side } from "./view.js";

const open = signal(false);

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function Call({ call, waits }) {
  const [result, setResult] = useState("");
  return html`<div class="call">
    <header>calls <b>${call.name || "…"}</b></header>
    <${Safe} made=${code(pretty(call.arguments), "json")} />
    ${waits && html`<form class="result" onSubmit=${(event) => { event.preventDefault(); sendResult(call, result); }}>
      <input aria-label="result" placeholder="what ${call.name} gives" value=${result} onInput=${(event) => setResult(event.target.value)} />
      <button>Reply</button>
    </form>`}
  </div>`;
}

function Facts({ message }) {
  const { facts, reason, id } = message;
  const see = () => { chosenId.value = id; side.value = "engine"; };
  return html`<footer class="facts">
    ${facts && html`<span><b>${count(facts.tokens)}</b> tokens</span>`}
    ${facts?.rate && html`<span><b>${facts.rate.toFixed(1)}</b> tokens/s</span>`}
    ${facts && html`<span>first after <b>${duration(facts.first)}</b></span>`}
    ${facts?.prompt != null && html`<span><b>${count(facts.cached ?? 0)}</b> of ${count(facts.prompt)} prompt tokens cached</span>`}
    ${reason && reason !== "stop" && html`<span class="reason">${reason}</span>`}
    ${id && html`<button class="link" onClick=${see}>its life</button>`}
  </footer>`;
}

function Message({ message, waits }) {
  const { role, content, reasoning, calls, error, busy, json } = message;
  if (role === "user") return html`<article class="user"><p>${content}</p></article>`;
  if (role === "tool") return html`<article class="tool"><header>${message.name} gave</header><pre>${content}</pre></article>`;
  return html`<article class="assistant">
    ${reasoning && html`<details class="reasoning" open=${busy && !content}><summary>Reasoning</summary><p>${reasoning}</p></details>`}
    ${content && html`<${Safe} class="text" made=${json ? code(pretty(content), "json") : markdown(content)} />`}
    ${calls?.map((call) => call && html`<${Call} call=${call} waits=${waits && !busy && !messages.value.some((each) => each.call === call.id)} />`)}
    ${busy && html`<span class="cursor" aria-label="writing"></span>`}
    ${error && html`<p class="error" role="alert">${error}</p>`}
    ${!busy && html`<${Facts} message=${message} />`}
  </article>`;
}

function Field({ name, label, hint, area, ...more }) {
  const change = (event) => { settings.value = { ...settings.value, [name]: event.target.value }; };
  const problem = problems.value[name];
  return html`<label class=${area ? "wide" : ""}>
    <span>${label}</span>
    ${area
      ? html`<textarea rows="3" name=${name} spellcheck="false" placeholder=${hint} value=${settings.value[name]} onInput=${change} ...${more} />`
      : html`<input type="number" name=${name} placeholder=${hint} value=${settings.value[name]} onInput=${change} ...${more} />`}
    ${problem && html`<em class="error">${problem}</em>`}
  </label>`;
}

function Settings() {
  return html`<div class="settings" hidden=${!open.value}>
    <${Field} name="temperature" label="Temperature" hint="model's" min="0" max="2" step="0.1" />
    <${Field} name="topP" label="Top p" hint="model's" min="0" max="1" step="0.05" />
    <${Field} name="maxTokens" label="Max tokens" hint="what fits" min="1" step="1" />
    <${Field} area name="system" label="System prompt" hint="none" />
    <${Field} area name="schema" label="JSON schema of the answer" hint=${'{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'} />
    <${Field} area name="tools" label="Tools" hint=${'[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'} />
  </div>`;
}

export function Chat() {
  const [text, setText] = useState("");
  const list = useRef(null);
  const follow = useRef(true);
  const box = useRef(null);
  const wrong = Object.keys(problems.value).length > 0;
  const go = () => {
    if (!text.trim() || busy.value || wrong) return;
    follow.current = true;
    send(text);
    setText("");
  };
  useLayoutEffect(() => {
    if (follow.current) list.current.scrollTop = list.current.scrollHeight;
  }, [messages.value]);
  useEffect(() => {
    box.current.style.height = "auto";
    box.current.style.height = `${Math.min(box.current.scrollHeight, 200)}px`;
  }, [text]);
  const last = messages.value.at(-1);
  const lastAnswer = messages.value.findLast((each) => each.role === "assistant");
  return html`<section class="chat" aria-label="Chat">
    <div class="messages" ref=${list} aria-live="polite"
      onScroll=${({ target }) => { follow.current = target.scrollHeight - target.scrollTop - target.clientHeight < 40; }}>
      ${!messages.value.length && html`<p class="empty">Ask the model something. What the engine does with it is drawn as it happens.</p>`}
      ${messages.value.map((message) => html`<${Message} message=${message} waits=${message === lastAnswer} />`)}
    </div>
    <${Settings} />
    <form class="composer" onSubmit=${(event) => { event.preventDefault(); go(); }}>
      <textarea ref=${box} rows="1" name="prompt" placeholder="Message" aria-label="Message" value=${text}
        onInput=${(event) => setText(event.target.value)}
        onKeyDown=${(event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); go(); } }} />
      ${busy.value
        ? html`<button type="button" class="stop" onClick=${stop}>Stop</button>`
        : html`<button class="send" disabled=${!text.trim() || wrong}>Send</button>`}
    </form>
    <nav class="below">
      <button class="link" aria-expanded=${open.value} onClick=${() => { open.value = !open.value; }}>${wrong ? "⚠ " : ""}Sampling, schema, tools</button>
      <span></span>
      ${last?.role === "assistant" && !busy.value && html`<button class="link" onClick=${again}>Again</button>`}
      ${last && html`<button class="link" onClick=${clear}>New chat</button>`}
    </nav>
  </section>`;
}
