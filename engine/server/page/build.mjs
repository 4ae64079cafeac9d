// Bundles src/ into built/, which is committed: whoever runs the server needs no node.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const out = process.argv[2] ?? "built";
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
await build({
  entryPoints: { page: "src/main.js" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "eof",
  charset: "utf8",
});
const digest = (name) => createHash("sha256").update(readFileSync(`${out}/${name}`)).digest("hex").slice(0, 16);
const page = readFileSync("src/index.html", "utf8").replace(/page\/(page\.\w+)/g, (path, name) => `${path}?${digest(name)}`);
writeFileSync(`${out}/index.html`, page);
