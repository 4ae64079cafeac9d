// What is asked of the server, and how its streams are read.
import { signal } from "@preact/signals";

const KEPT = "makeready api key";

export const apiKey = signal(sessionStorage.getItem(KEPT) ?? "");
export const locked = signal(false); // the server wants a key that it was not shown

export function setKey(key) {
  sessionStorage.setItem(KEPT, key);
  apiKey.value = key;
  locked.value = false;
}

export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["content-type"] = "application/json";
  if (apiKey.value) headers.authorization = `Bearer ${apiKey.value}`;
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
    cache: "no-store",
  });
  if (answer.ok) return answer;
  if (answer.status === 401) locked.value = true;
  const said = await answer.json().catch(() => null);
  const wait = answer.headers.get("retry-after");
  const more = wait && answer.status === 429 ? ` (try again in ${wait} s)` : "";
  throw new Error((said?.error?.message ?? `the server answered ${answer.status}`) + more);
}

// Data of server-sent events, as they come.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data: "));
        if (data.length) yield data.map((line) => line.slice(6)).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
