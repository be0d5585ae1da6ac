// Writes the page into the Python package: one script, one style sheet, the icon and the example pictures.
// Not minified: what ships is what a reader can check, and a change shows as a change.
import { build } from "esbuild";
import { copyFile, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const pictures = join(here, "../examples/pictures");
const out = join(here, "../src/blip2/server/static");

await rm(out, { recursive: true, force: true });
await mkdir(join(out, "examples"), { recursive: true });

await build({
  entryPoints: [join(here, "src/main.ts")],
  outfile: join(out, "page.js"),
  bundle: true,
  format: "esm",
  target: "es2022",
  charset: "utf8",
});
await copyFile(join(here, "src/style.css"), join(out, "page.css"));
for (const file of ["index.html", "icon.svg"]) await copyFile(join(here, "src", file), join(out, file));

const read = async (path) => JSON.parse(await readFile(path, "utf8"));
const known = new Set((await read(join(pictures, "pictures.json"))).pictures.map((one) => one.file));
const examples = await read(join(here, "examples.json"));
for (const { name } of examples) {
  if (!known.has(name)) throw new Error(`${name} is not in examples/pictures/pictures.json: its licence is unknown.`);
  await copyFile(join(pictures, name), join(out, "examples", name));
}
await writeFile(join(out, "examples/examples.json"), JSON.stringify(examples, null, 1) + "\n");
