// Charts over time and histograms, by uPlot; the strip of steps, on a canvas of its own.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { html } from "./html.js";

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");

export function Plot({ make, data, height = 110, label }) {
  const place = useRef(null);
  const plot = useRef(null);
  useEffect(() => {
    const build = () => {
      plot.current?.destroy();
      const width = place.current.clientWidth;
      plot.current = new uPlot({ width, height, ...make() }, data, place.current);
    };
    build();
    const sized = new ResizeObserver(() => plot.current.setSize({ width: place.current.clientWidth, height }));
    sized.observe(place.current);
    dark.addEventListener("change", build);
    return () => {
      sized.disconnect();
      dark.removeEventListener("change", build);
      plot.current.destroy();
    };
  }, []);
  useEffect(() => plot.current?.setData(data), [data]);
  return html`<div class="plot" role="img" aria-label=${label} ref=${place}></div>`;
}

export const axis = (more = {}) => ({
  stroke: colour("muted"),
  grid: { stroke: colour("line"), width: 1 },
  ticks: { show: false },
  font: "11px system-ui",
  size: 34,
  gap: 2,
  ...more,
});

const KINDS = { decode: "decode", extend: "prefill" };

function draw(canvas, steps, hovered) {
  const scale = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  const shown = steps.slice(-Math.floor(width / BAR));
  const top = Math.max(1e-6, ...shown.map((step) => Math.max(step.seconds, step.predicted ?? 0)));
  const left = width - shown.length * BAR;
  const tall = (seconds) => Math.max(1, (seconds / top) * (height - 6));
  shown.forEach((step, place) => {
    const x = left + place * BAR;
    const bar = tall(step.seconds);
    const paint = colour(KINDS[step.kind] ?? "other");
    pen.fillStyle = paint;
    pen.globalAlpha = 0.25;
    pen.fillRect(x, height - bar, BAR - 1, bar);
    pen.globalAlpha = 1;
    const used = bar * (step.tokens / step.bucket_tokens);
    pen.fillRect(x, height - used, BAR - 1, used);
    if (step.retractions) {
      pen.fillStyle = colour("bad");
      pen.fillRect(x, 0, BAR - 1, 3);
    }
    if (step.predicted != null) {
      pen.fillStyle = colour("ink");
      pen.fillRect(x - 0.5, height - tall(step.predicted) - 1, BAR, 1.5);
    }
    if (step === hovered) {
      pen.strokeStyle = colour("ink");
      pen.strokeRect(x - 0.5, 0.5, BAR, height - 1);
    }
  });
  return top;
}

const BAR = 6;

export function Strip({ steps, hovered, onHover }) {
  const place = useRef(null);
  useEffect(() => {
    draw(place.current, steps, hovered);
  });
  const at = (event) => {
    const { left, width } = place.current.getBoundingClientRect();
    const back = Math.floor((width - (event.clientX - left)) / BAR);
    onHover(steps[steps.length - 1 - back] ?? null);
  };
  return html`<canvas class="strip" ref=${place} role="img" aria-label="The latest steps" onPointerMove=${at} onPointerDown=${at} onPointerLeave=${() => onHover(null)}></canvas>`;
}
