// A model's text as HTML that can do nothing: no scripts, handlers, styles, forms, frames, or requests to elsewhere.
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import c from "highlight.js/lib/languages/c";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import { Marked } from "marked";

const LANGUAGES = { bash, c, cpp, css, diff, go, java, javascript, json, python, rust, sql, typescript, xml, yaml };
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

const plain = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);

export function highlighted(code, language) {
  const known = language && hljs.getLanguage(language);
  const html = known ? hljs.highlight(code, { language, ignoreIllegals: true }).value : plain(code);
  return `<pre><code class="hljs">${html}</code></pre>`;
}

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    code: ({ text, lang }) => highlighted(text, (lang ?? "").trim().split(/\s/)[0].toLowerCase()),
    html: ({ text }) => plain(text), // shown as it was written
    image: ({ href, text }) => `<a href="${plain(href)}">${plain(text || "image")}</a>`, // nothing is fetched unasked
  },
});

const RULES = {
  USE_PROFILES: { html: true },
  FORBID_TAGS: ["img", "picture", "video", "audio", "source", "style", "form", "input", "button", "textarea", "select", "dialog"],
  FORBID_ATTR: ["style", "id", "name"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  ALLOW_DATA_ATTR: false,
  RETURN_TRUSTED_TYPE: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

export const markdown = (text) => DOMPurify.sanitize(marked.parse(text), RULES);
export const code = (text, language) => DOMPurify.sanitize(highlighted(text, language), RULES);
