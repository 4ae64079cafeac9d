// The page: a chat beside what the engine does.
import "uplot/dist/uPlot.min.css";
import "./style.css";
import { render } from "preact";
import { useState } from "preact/hooks";
import { locked, setKey } from "./api.js";
import { Engine } from "./engine.js";
import { html } from "./html.js";
import { connected, model, start } from "./live.js";
import { Chat } from "./talk.js";
import { side } from "./view.js";

function Key() {
  const [key, set] = useState("");
  return html`<form class="lock" onSubmit=${(event) => { event.preventDefault(); setKey(key.trim()); }}>
    <label>This server asks for an API key
      <input type="password" name="key" autocomplete="off" value=${key} onInput=${(event) => set(event.target.value)} />
    </label>
    <button disabled=${!key.trim()}>Use it</button>
  </form>`;
}

function Tab({ name, children }) {
  return html`<button role="tab" aria-selected=${side.value === name} onClick=${() => { side.value = name; }}>${children}</button>`;
}

function App() {
  const { model: name, target, device } = model.value ?? {};
  return html`<header class="top">
      <h1>makeready</h1>
      <span class=${`dot ${connected.value ? "on" : ""}`} title=${connected.value ? "connected" : "not connected"}></span>
      <span class="model" title=${name}>${name}</span><small>${[...new Set([target, device])].filter(Boolean).join(" · ")}</small>
      <nav role="tablist"><${Tab} name="chat">Chat<//><${Tab} name="engine">Engine<//></nav>
    </header>
    ${locked.value && html`<${Key} />`}
    <main data-side=${side.value}><${Chat} /><${Engine} /></main>`;
}

start();
render(html`<${App} />`, document.getElementById("app"));
