import htm from "htm";
import { h } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";

export const html = htm.bind(h);

// Text that was made safe, in an element.
export function Safe({ made, class: name }) {
  const place = useRef(null);
  useLayoutEffect(() => {
    place.current.innerHTML = made;
  }, [String(made)]);
  return html`<div ref=${place} class=${name}></div>`;
}

export const count = (number) => Math.round(number).toLocaleString("en-US");

export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(0)} µs`;
  if (seconds < 0.01) return `${(seconds * 1e3).toFixed(2)} ms`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.1 ? 1 : 0)} ms`;
  return seconds < 100 ? `${seconds.toFixed(2)} s` : `${(seconds / 60).toFixed(1)} min`;
}
