// src/conversation.ts
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, pictureIds: [], turns: [] };
}
function newTurn(kind, pictureId, question) {
  return { id: newId(), kind, pictureId, question, answer: "", state: "waiting", error: "", notes: [] };
}
function isRunning(turn) {
  return turn.state === "waiting" || turn.state === "streaming";
}
function askedText(turn) {
  if (turn.kind === "caption") return "Caption";
  if (turn.kind === "alt") return "Alt text";
  return turn.question;
}
function titleOf(conversation, pictures) {
  const question = conversation.turns.find((turn) => turn.kind === "question")?.question;
  const picture = pictures.get(conversation.pictureIds[0] ?? "");
  return conversation.title || question || picture?.name || "New conversation";
}
function turnsToSend(turns, asked, pictures, limits, hasSystemLine) {
  if (asked.kind !== "question") return { sent: [{ turn: asked, withPicture: true }], leftOut: 0 };
  const before = turns.slice(0, Math.max(0, turns.indexOf(asked)));
  const history = before.filter((turn) => turn.answer !== "" && (turn.state === "done" || turn.state === "stopped"));
  for (let leftOut = 0; ; leftOut++) {
    const sent = withPictures([...history.slice(leftOut), asked]);
    if (leftOut === history.length || fits(sent, pictures, limits, hasSystemLine)) return { sent, leftOut };
  }
}
function withPictures(turns) {
  let shown = "";
  return turns.map((turn) => {
    const withPicture = turn.pictureId !== shown || turn.kind !== "question";
    shown = turn.pictureId;
    return { turn, withPicture };
  });
}
function fits(sent, pictures, limits, hasSystemLine) {
  const messages2 = 2 * sent.length - 1 + (hasSystemLine ? 1 : 0);
  const shown = sent.filter((one) => one.withPicture);
  const bytes = shown.reduce((sum, one) => sum + (pictures.get(one.turn.pictureId)?.blob.size ?? 0), 0);
  return messages2 <= limits.messages && shown.length <= limits.images && bytes * 4 / 3 + 65536 <= limits.body_bytes;
}

// src/picture.ts
var LONGEST_SIDE = 1024;
var MOST_BYTES = 4e6;
var QUALITY = 0.9;
var UnreadablePicture = class extends Error {
};
async function openPicture(file, name, formats) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  if (!bitmap || bitmap.width === 0) throw new UnreadablePicture(refusal(name, formats));
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const asItIs = scale === 1 && formats.includes(file.type) && file.size <= MOST_BYTES;
  const blob = asItIs ? file : await drawn(bitmap, width, height, file.type);
  bitmap.close();
  const kept = new Blob([blob], { type: blob.type });
  return { id: newId(), name, alt: "", credit: "", width, height, blob: kept };
}
async function drawn(bitmap, width, height, type) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  if (!context) throw new UnreadablePicture("This browser cannot make a large picture smaller. Choose a smaller one.");
  context.imageSmoothingQuality = "high";
  if (type !== "image/jpeg") {
    const webp = await encoded(canvas, context, bitmap, "image/webp");
    if (webp?.type === "image/webp") return webp;
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
  }
  const jpeg = await encoded(canvas, context, bitmap, "image/jpeg");
  if (!jpeg) throw new UnreadablePicture("The picture could not be made smaller. Choose a smaller one.");
  return jpeg;
}
function encoded(canvas, context, bitmap, type) {
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, QUALITY));
}
function refusal(name, formats) {
  const names = formats.map((format) => format.replace("image/", "").toUpperCase());
  return `${name} cannot be opened as a picture. These kinds work: ${names.join(", ")}.`;
}
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new UnreadablePicture("The picture could not be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}
var urls = /* @__PURE__ */ new Map();
function pictureUrl(picture) {
  const known = urls.get(picture.id);
  if (known !== void 0) return known;
  const url = URL.createObjectURL(picture.blob);
  urls.set(picture.id, url);
  return url;
}
function forgetPicture(id) {
  const url = urls.get(id);
  if (url !== void 0) URL.revokeObjectURL(url);
  urls.delete(id);
}
function pictureFile(transfer) {
  const files = Array.from(transfer?.files ?? []);
  return files.find((file) => file.type.startsWith("image/")) ?? files[0] ?? null;
}

// src/sse.ts
async function* serverSentEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let unread = "";
  let data = [];
  try {
    for (; ; ) {
      const { done, value } = await reader.read();
      unread += done ? decoder.decode() + "\n\n" : decoder.decode(value, { stream: true });
      const lines = unread.split("\n");
      unread = lines.pop() ?? "";
      for (const line of lines.map((one) => one.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => void 0);
  }
}

// src/api.ts
var ServerError = class extends Error {
};
var UNREACHABLE = "The server does not answer. See whether it is still running, then try again.";
async function fetchPageInfo() {
  const response = await send("/page.json", {});
  return await response.json();
}
var Server = class {
  constructor(info, key) {
    this.info = info;
    this.key = key;
  }
  info;
  key;
  /** The answer in one piece. Captions are asked for so, because then the server may choose the best of several. */
  async answer(sent, pictures, signal) {
    const response = await this.post("/v1/chat/completions", { messages: await messages(sent, pictures, "") }, signal);
    const completion = await response.json();
    const choice = completion.choices?.[0];
    if (!choice) throw new ServerError("The server sent no answer. Try again.");
    return { text: choice.message?.content ?? "", notes: notesOf(completion) };
  }
  /** The answer as it is written: `onPiece` gets each new piece of text. */
  async streamAnswer(sent, pictures, settings, signal, onPiece) {
    const body = {
      messages: await messages(sent, pictures, settings.system),
      stream: true,
      temperature: settings.temperature,
      ...settings.maxTokens === null ? {} : { max_tokens: settings.maxTokens }
    };
    const response = await this.post("/v1/chat/completions", body, signal);
    if (!response.body) throw new ServerError(UNREACHABLE);
    const notes = [];
    for await (const data of readable(serverSentEvents(response.body), signal)) {
      if (data === "[DONE]") return notes;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message ?? "The server stopped with an error. Try again.");
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) onPiece(piece);
      notes.push(...notesOf(chunk));
    }
    throw new ServerError("The connection ended before the answer did. Try again.");
  }
  async attention(sent, pictures, system, answer, byWord) {
    const body = { messages: await messages(sent, pictures, system), answer, by_word: byWord };
    const response = await this.post("/v1/attention", body, null);
    return await response.json();
  }
  async post(path, body, signal) {
    const text = JSON.stringify({ model: this.info.model, ...body });
    for (let wasRefused = false; ; wasRefused = true) {
      let key = this.key.current();
      if (wasRefused || this.info.needs_key && key === "") {
        const given = await this.key.ask(wasRefused);
        if (given === null) throw new ServerError("This server answers only to those who have its key.");
        key = given;
      }
      const headers = { "Content-Type": "application/json" };
      if (key !== "") headers["Authorization"] = `Bearer ${key}`;
      const response = await send(path, { method: "POST", headers, body: text, signal }, [401]);
      if (response.status !== 401) return response;
    }
  }
};
async function messages(sent, pictures, system) {
  const out = [];
  if (system !== "") out.push({ role: "system", content: system });
  for (const [at, { turn, withPicture }] of sent.entries()) {
    const parts = [];
    const picture = pictures.get(turn.pictureId);
    if (withPicture && picture) parts.push({ type: "image_url", image_url: { url: await dataUrl(picture.blob) } });
    if (turn.kind === "question") parts.push({ type: "text", text: turn.question });
    out.push({ role: "user", content: parts });
    if (at < sent.length - 1) out.push({ role: "assistant", content: turn.answer });
  }
  return out;
}
function notesOf(completion) {
  const notes = [...completion.warnings ?? []];
  const reason = completion.choices?.[0]?.finish_reason;
  if (reason === "length") notes.push("Cut at the longest length allowed.");
  if (reason === "content_filter") notes.push("Part of the answer was held back by the server's filter.");
  return notes;
}
async function send(path, options, passed = []) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(UNREACHABLE);
  }
  if (response.ok || passed.includes(response.status)) return response;
  throw new ServerError(await messageOf(response));
}
async function* readable(events, signal) {
  try {
    yield* events;
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("The connection broke off before the answer was whole. Try again.");
  }
}
async function messageOf(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? `The server refused with status ${response.status}.`;
  const wait = response.status === 429 || response.status === 503 ? secondsToWait(response) : null;
  return wait === null ? said : `${said} Try again in ${duration(wait)}.`;
}
function secondsToWait(response) {
  const header = response.headers.get("Retry-After");
  if (header === null) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1e3;
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}
function duration(seconds) {
  if (seconds < 120) return seconds === 1 ? "1 second" : `${seconds} seconds`;
  return `${Math.ceil(seconds / 60)} minutes`;
}

// src/alt_text.ts
var LONGEST = 125;
function tidyAltText(caption) {
  const words = caption.trim().replace(/\s+/g, " ").replace(/[\s.,;:]+$/, "");
  if (words === "") return "";
  const [first = "", ...rest] = words;
  const capital = first.toLocaleUpperCase() + rest.join("");
  const ended = /[!?…]$/.test(capital) ? capital : capital + ".";
  return ended.length <= LONGEST ? ended : shortened(capital);
}
function shortened(text) {
  const cut = text.slice(0, LONGEST);
  const space = cut.lastIndexOf(" ");
  const kept = space > 0 ? cut.slice(0, space) : cut.slice(0, LONGEST - 1);
  return kept.replace(/[\s.,;:]+$/, "") + ".";
}
function altAttribute(text) {
  const escaped2 = text.replace(/&/g, "&amp;").replace(/"/g, "&quot;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  return `alt="${escaped2}"`;
}

// src/dom.ts
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}
function byId(id, kind) {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`index.html has no ${kind.name} with the id ${id}.`);
  return element;
}
function button(id) {
  return byId(id, HTMLButtonElement);
}
function announce(text) {
  byId("status", HTMLElement).textContent = text;
}
function notify(text) {
  const notice = byId("notice", HTMLElement);
  notice.replaceChildren(
    el("p", {}, text),
    el("button", { type: "button", class: "quiet", click: clearNotice }, icon("close"), "Close")
  );
  notice.hidden = false;
}
function clearNotice() {
  byId("notice", HTMLElement).hidden = true;
}
async function copyText(text, from) {
  const label = from.lastChild;
  const before = label?.textContent ?? "";
  const copied = await writeClipboard(text);
  announce(copied ? "Copied." : "This browser does not let the page copy.");
  if (label && before !== "Copied") {
    label.textContent = copied ? "Copied" : "Cannot copy";
    setTimeout(() => label.textContent = before, 1500);
  }
}
async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const holder = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    holder.value = text;
    const focused = document.activeElement;
    document.body.append(holder);
    holder.select();
    const copied = document.execCommand("copy");
    holder.remove();
    if (focused instanceof HTMLElement) focused.focus();
    return copied;
  }
}

// src/heat.ts
var STEPS = 256;
var DARKEST = 0.2;
var LIGHTEST = 0.95;
var FIRST_HUE = 285;
var LAST_HUE = 465;
var PLACES = [
  ...["at the upper left", "at the top", "at the upper right"],
  ...["on the left", "in the middle", "on the right"],
  ...["at the lower left", "at the bottom", "at the lower right"]
];
function spread(grid) {
  const least = Math.min(...grid);
  const range = Math.max(...grid) - least;
  return grid.map((value) => range > 0 ? (value - least) / range : 0);
}
function weighted(queries, weights) {
  const size = queries[0]?.length ?? 0;
  return Array.from(
    { length: size },
    (_, cell) => queries.reduce((sum, query, at) => sum + (weights[at] ?? 0) * (query[cell] ?? 0), 0)
  );
}
function heatPixels(grid, rows, columns, width, height) {
  const values = spread(grid);
  const colours = colourMap();
  const image = new ImageData(width, height);
  for (let y = 0; y < height; y++) {
    const [top, bottom, down] = between((y + 0.5) / height * rows - 0.5, rows);
    for (let x = 0; x < width; x++) {
      const [left, right, across] = between((x + 0.5) / width * columns - 0.5, columns);
      const at = (row, column) => values[row * columns + column] ?? 0;
      const above = at(top, left) * (1 - across) + at(top, right) * across;
      const below = at(bottom, left) * (1 - across) + at(bottom, right) * across;
      const value = above * (1 - down) + below * down;
      const [red, green, blue] = colours[Math.round(value * (STEPS - 1))] ?? [0, 0, 0];
      image.data.set([red, green, blue, 255], (y * width + x) * 4);
    }
  }
  return image;
}
function between(place, cells) {
  const inside = Math.min(Math.max(place, 0), cells - 1);
  const first = Math.floor(inside);
  return [first, Math.min(first + 1, cells - 1), inside - first];
}
function mostlyWhere(grid, rows, columns) {
  const sums = Array.from({ length: 9 }, () => 0);
  const third = (at, of) => Math.min(2, Math.floor((at + 0.5) / of * 3));
  grid.forEach((value, cell) => {
    const region = third(Math.floor(cell / columns), rows) * 3 + third(cell % columns, columns);
    sums[region] = (sums[region] ?? 0) + value;
  });
  return PLACES[sums.indexOf(Math.max(...sums))] ?? "";
}
function colourMap() {
  return Array.from({ length: STEPS }, (_, step) => {
    const share = step / (STEPS - 1);
    const lightness = DARKEST + (LIGHTEST - DARKEST) * share;
    const hue = (FIRST_HUE + (LAST_HUE - FIRST_HUE) * share) * Math.PI / 180;
    return mostColourful(lightness, hue);
  });
}
function mostColourful(lightness, hue) {
  let strong = 0.19;
  while (strong > 0 && !linearRgb(lightness, strong, hue).every((one) => one >= 0 && one <= 1)) strong -= 5e-3;
  return linearRgb(lightness, Math.max(0, strong), hue).map(toByte);
}
function linearRgb(lightness, chroma, hue) {
  const a = chroma * Math.cos(hue);
  const b = chroma * Math.sin(hue);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s
  ];
}
function toByte(linear) {
  const inside = Math.min(Math.max(linear, 0), 1);
  const encoded2 = inside <= 31308e-7 ? 12.92 * inside : 1.055 * inside ** (1 / 2.4) - 0.055;
  return Math.round(encoded2 * 255);
}

// src/attention_view.ts
var LONGEST_SIDE2 = 512;
var AttentionView = class {
  panel = byId("attention", HTMLElement);
  canvas = byId("heat", HTMLCanvasElement);
  heading = byId("attention-title", HTMLElement);
  words = byId("words", HTMLElement);
  said = byId("attention-said", HTMLElement);
  query = byId("query", HTMLSelectElement);
  opacity = byId("opacity", HTMLInputElement);
  kinds = Array.from(this.panel.querySelectorAll("input[name=map]"));
  looked = null;
  attention = null;
  word = 0;
  constructor(opacity, onOpacity, onClose) {
    this.opacity.value = String(Math.round(opacity * 100));
    this.applyOpacity();
    this.opacity.addEventListener("input", () => {
      this.applyOpacity();
      onOpacity(Number(this.opacity.value) / 100);
    });
    for (const kind of this.kinds) kind.addEventListener("change", () => void this.load());
    this.query.addEventListener("change", () => this.draw());
    button("close-attention").addEventListener("click", onClose);
    drawLegend();
  }
  get openFor() {
    return this.looked?.turnId ?? null;
  }
  async open(looked) {
    this.close();
    this.looked = looked;
    this.word = 0;
    for (const kind of this.kinds) kind.checked = kind.value === "average";
    byId("attention-of", HTMLElement).textContent = looked.answer;
    this.panel.hidden = false;
    this.heading.focus({ preventScroll: true });
    this.panel.parentElement?.scrollIntoView({ block: "nearest" });
    await this.load();
  }
  close() {
    this.looked = null;
    this.attention = null;
    this.panel.hidden = true;
    this.canvas.hidden = true;
  }
  kind() {
    return this.kinds.find((one) => one.checked)?.value ?? "average";
  }
  /** Fetches what the chosen map needs and has not been fetched, then draws. */
  async load() {
    const looked = this.looked;
    if (!looked) return;
    const byWord = this.kind() === "word";
    byId("query-choice", HTMLElement).hidden = this.kind() !== "query";
    this.words.hidden = !byWord;
    byId("attention-of", HTMLElement).hidden = byWord;
    if (!this.attention || byWord && !this.attention.words) {
      this.words.replaceChildren();
      this.say(byWord ? "Tracing each word back to the picture…" : "Asking where it looked…", "busy");
      try {
        const attention = await looked.load(byWord);
        if (this.looked !== looked) return;
        this.attention = attention;
      } catch (error) {
        if (this.looked === looked) this.fail(error instanceof Error ? error.message : String(error));
        return;
      }
      this.listQueries();
    }
    if (byWord) this.listWords();
    this.draw();
  }
  fail(message) {
    this.say(message, "failed");
    this.said.append(" ", el("button", { type: "button", click: () => void this.load() }, "Try again"));
  }
  listQueries() {
    const chosen = this.query.value || "0";
    const count = this.attention?.queries.length ?? 0;
    this.query.replaceChildren(
      ...Array.from({ length: count }, (_, at) => el("option", { value: String(at) }, String(at + 1)))
    );
    this.query.value = Number(chosen) < count ? chosen : "0";
  }
  listWords() {
    const words = this.attention?.words ?? [];
    const focused = this.words.contains(document.activeElement);
    this.words.replaceChildren(
      ...words.map(({ text }, at) => {
        const choose = () => {
          this.word = at;
          this.listWords();
          this.draw();
        };
        const pressed = String(at === this.word);
        return el("button", { type: "button", "aria-pressed": pressed, click: choose }, text.trim() || "␣");
      })
    );
    if (focused) this.words.querySelectorAll("button")[this.word]?.focus();
  }
  draw() {
    const { looked, attention } = this;
    if (!looked || !attention) return;
    const [rows, columns] = attention.grid;
    const grid = this.chosenMap(attention);
    const scale = LONGEST_SIDE2 / Math.max(looked.width, looked.height);
    this.canvas.width = Math.max(1, Math.round(looked.width * scale));
    this.canvas.height = Math.max(1, Math.round(looked.height * scale));
    const pixels = heatPixels(grid, rows, columns, this.canvas.width, this.canvas.height);
    this.canvas.getContext("2d")?.putImageData(pixels, 0, 0);
    this.canvas.hidden = false;
    this.say(`${this.subject(attention)} mostly ${mostlyWhere(grid, rows, columns)}.`, "done");
  }
  chosenMap(attention) {
    const word = attention.words?.[this.word];
    if (this.kind() === "query") return attention.queries[Number(this.query.value)] ?? attention.average;
    if (this.kind() === "word" && word) return weighted(attention.queries, word.weights);
    return attention.average;
  }
  subject(attention) {
    if (this.kind() === "query") return `Query ${Number(this.query.value) + 1} of ${attention.num_queries} looked`;
    if (this.kind() === "word") return `For “${attention.words?.[this.word]?.text.trim() ?? ""}” it looked`;
    return "On average it looked";
  }
  say(text, state) {
    this.said.textContent = text;
    this.said.dataset["state"] = state;
  }
  applyOpacity() {
    this.canvas.style.opacity = String(Number(this.opacity.value) / 100);
  }
};
function drawLegend() {
  const canvas = byId("legend", HTMLCanvasElement);
  const ramp = Array.from({ length: canvas.width }, (_, at) => at);
  const context = canvas.getContext("2d");
  context?.putImageData(heatPixels(ramp, 1, ramp.length, canvas.width, 1), 0, 0);
}

// src/chat_view.ts
var ChatView = class {
  // whether the reader stands at the end; one who scrolled back is left there
  constructor(actions, canLook) {
    this.actions = actions;
    this.canLook = canLook;
    document.addEventListener("scroll", () => this.follows = this.isAtEnd(), { capture: true, passive: true });
    new ResizeObserver(() => {
      if (this.follows && this.scroller() === this.scroll) this.toEnd();
    }).observe(this.scroll);
  }
  actions;
  canLook;
  log = byId("log", HTMLElement);
  scroll = byId("scroll", HTMLElement);
  shown = /* @__PURE__ */ new Map();
  follows = true;
  /** A whole conversation at once, which is not news to be read aloud. */
  showAll(turns, pictures) {
    this.log.setAttribute("aria-live", "off");
    this.shown.clear();
    this.log.replaceChildren();
    for (const turn of turns) this.show(turn, pictures);
    setTimeout(() => this.log.setAttribute("aria-live", "polite"), 500);
  }
  /** A new turn, or one that changed. */
  show(turn, pictures) {
    const made = this.turn(turn, pictures.get(turn.pictureId));
    const before = this.shown.get(turn.id);
    if (before) before.article.replaceWith(made.article);
    else this.log.append(made.article);
    this.shown.set(turn.id, made);
    this.toEnd();
  }
  addPiece(turn, piece) {
    const shown = this.shown.get(turn.id);
    if (!shown?.streamed) return;
    shown.article.dataset["state"] = turn.state;
    shown.streamed.appendData(piece);
    if (this.follows) this.toEnd();
  }
  /** Which turn's map is open, so that its button says so. */
  markLooked(turnId) {
    for (const [id, { article }] of this.shown) {
      article.querySelector(".look")?.setAttribute("aria-expanded", String(id === turnId));
    }
  }
  focusLook(turnId) {
    this.shown.get(turnId)?.article.querySelector(".look")?.focus();
  }
  isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller();
    return scrollHeight - scrollTop - clientHeight < 60;
  }
  toEnd() {
    const scroller = this.scroller();
    scroller.scrollTop = scroller.scrollHeight;
    this.follows = true;
  }
  /** On a wide page the conversation scrolls for itself, on a phone the whole page does. */
  scroller() {
    return getComputedStyle(this.scroll).overflowY === "auto" ? this.scroll : document.documentElement;
  }
  turn(turn, picture) {
    const streamed = isRunning(turn) ? document.createTextNode(turn.answer) : null;
    const article = el(
      "article",
      { class: "turn", "data-state": turn.state, "data-kind": turn.kind, "aria-label": askedText(turn) },
      this.asked(turn, picture)
    );
    if (streamed) {
      const looking = el("span", { class: "looking" }, "Looking…");
      const caret = el("span", { class: "caret" });
      article.append(el("p", { class: "answer", "aria-hidden": "true" }, looking, streamed, caret));
    } else {
      article.append(...this.answered(turn));
    }
    return { article, streamed };
  }
  asked(turn, picture) {
    const line = el("div", { class: "asked" });
    if (picture) {
      const label = `About ${picture.name}. Show it`;
      const show = () => this.actions.showPicture(picture.id);
      line.append(
        el(
          "button",
          { type: "button", class: "thumb", title: picture.name, "aria-label": label, click: show },
          el("img", { src: pictureUrl(picture), alt: "", class: "small-picture" })
        )
      );
    }
    line.append(el("p", { class: "question" }, askedText(turn)));
    return line;
  }
  answered(turn) {
    const text = turn.kind === "alt" ? tidyAltText(turn.answer) : turn.answer.trim();
    const parts = [];
    if (text !== "") parts.push(el("p", { class: "answer" }, text));
    if (text === "" && turn.state === "done") parts.push(el("p", { class: "answer none" }, "(an empty answer)"));
    const notes = turn.state === "stopped" ? ["Stopped.", ...turn.notes] : turn.notes;
    for (const note of notes) parts.push(el("p", { class: "note" }, note));
    if (turn.state === "failed") parts.push(el("p", { class: "error" }, turn.error));
    parts.push(this.buttons(turn, text));
    return parts;
  }
  buttons(turn, text) {
    const row = el("div", { class: "turn-actions" });
    if (turn.state === "failed" || turn.state === "stopped") {
      const again = () => this.actions.again(turn);
      row.append(el("button", { type: "button", click: again }, icon("again"), "Try again"));
    }
    if (text === "") return row;
    if (this.canLook && turn.state !== "failed") {
      const panel = { "aria-expanded": "false", "aria-controls": "attention" };
      const look = () => this.actions.look(turn);
      row.append(
        el("button", { type: "button", class: "quiet look", ...panel, click: look }, icon("look"), "What it looked at")
      );
    }
    row.append(copyButton("Copy", text));
    if (turn.kind === "alt") row.append(copyButton('Copy as alt="…"', altAttribute(text)));
    return row;
  }
};
function copyButton(label, text) {
  const made = el("button", { type: "button", class: "quiet" }, icon("copy"), label);
  made.addEventListener("click", () => void copyText(text, made));
  return made;
}

// src/composer.ts
var Composer = class {
  form = byId("composer", HTMLFormElement);
  question = byId("question", HTMLTextAreaElement);
  system = byId("system", HTMLTextAreaElement);
  maxTokens = byId("max-tokens", HTMLInputElement);
  temperature = byId("temperature", HTMLInputElement);
  /** `onAsk` says whether it took the question; if so the field is emptied. */
  constructor(onAsk, onStop) {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (onAsk(this.question.value.trim())) this.question.value = "";
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    button("stop").addEventListener("click", () => {
      onStop();
      this.focus();
    });
  }
  showSettings(settings, mostTokens, onChange) {
    this.system.value = settings.system;
    this.maxTokens.max = String(mostTokens);
    this.writeNumbers(settings);
    const read2 = () => {
      settings.system = this.system.value.trim();
      settings.maxTokens = within(this.maxTokens, 1, mostTokens);
      settings.temperature = within(this.temperature, 0, 2) ?? 0;
      onChange(settings);
    };
    for (const field of [this.system, this.maxTokens, this.temperature]) {
      field.addEventListener("input", read2);
      field.addEventListener("change", () => this.writeNumbers(settings));
    }
  }
  writeNumbers(settings) {
    this.maxTokens.value = settings.maxTokens === null ? "" : String(settings.maxTokens);
    this.temperature.value = String(settings.temperature);
  }
  focus() {
    this.question.focus({ preventScroll: true });
  }
  setBusy(busy) {
    button("send").hidden = busy;
    button("stop").hidden = !busy;
  }
};
function within(field, least, most) {
  if (field.value.trim() === "" || Number.isNaN(field.valueAsNumber)) return null;
  const value = Math.min(Math.max(field.valueAsNumber, least), most);
  return field.step === "1" ? Math.round(value) : value;
}

// src/conversations_view.ts
var ConversationsView = class {
  constructor(actions, lasts) {
    this.actions = actions;
    this.lasts = lasts;
    button("close-conversations").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }
  actions;
  lasts;
  dialog = byId("conversations", HTMLDialogElement);
  list = byId("conversation-list", HTMLUListElement);
  note = byId("conversations-note", HTMLElement);
  current = "";
  async show(current) {
    this.current = current;
    await this.fill();
    this.dialog.showModal();
  }
  async fill() {
    const { conversations, pictures } = await this.actions.list();
    this.note.textContent = conversations.length === 0 ? "None yet. Each picture you show begins one." : this.lasts ? "Kept in this browser only." : "This browser keeps nothing for the page: they are gone when the tab closes.";
    this.list.replaceChildren(...conversations.map((one) => this.row(one, pictures)));
  }
  row(conversation, pictures) {
    const title = titleOf(conversation, pictures);
    const picture = pictures.get(conversation.pictureIds.at(-1) ?? "");
    const isCurrent = conversation.id === this.current;
    const open = () => this.open(conversation);
    const rename = () => this.askName(item, conversation, title);
    const remove = () => this.askWhether(item, conversation, title);
    const small = { class: "small-picture" };
    const item = el(
      "li",
      {},
      el(
        "button",
        { type: "button", class: "conversation-open", "aria-current": isCurrent && "true", click: open },
        picture ? el("img", { ...small, src: pictureUrl(picture), alt: "" }) : el("span", small),
        el("span", { class: "conversation-title" }, title, el("small", {}, whenAndHowLong(conversation)))
      ),
      el(
        "div",
        { class: "conversation-actions" },
        el("button", { type: "button", class: "quiet", "aria-label": `Rename ${title}`, click: rename }, "Rename"),
        el("button", { type: "button", class: "quiet", "aria-label": `Delete ${title}`, click: remove }, "Delete")
      )
    );
    return item;
  }
  open(conversation) {
    this.dialog.close();
    this.actions.open(conversation);
  }
  askName(item, conversation, title) {
    const field = el("input", { type: "text", "aria-label": "New name", maxlength: "120" });
    field.value = title;
    const keep = async () => {
      await this.actions.rename(conversation, field.value.trim());
      await this.fillAndFocus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") void keep();
      if (event.key !== "Escape") return;
      event.preventDefault();
      void this.fillAndFocus();
    });
    item.replaceChildren(field, el("button", { type: "button", click: () => void keep() }, "Keep name"));
    field.select();
  }
  askWhether(item, conversation, title) {
    const remove = async () => {
      await this.actions.remove(conversation);
      if (conversation.id === this.current) this.current = "";
      await this.fillAndFocus();
    };
    const no = el("button", { type: "button", click: () => void this.fillAndFocus() }, "Keep it");
    item.replaceChildren(
      el("p", {}, `Delete “${title}” and its pictures?`),
      el("button", { type: "button", class: "danger", click: () => void remove() }, "Delete"),
      no
    );
    no.focus();
  }
  async fillAndFocus() {
    await this.fill();
    (this.list.querySelector("button") ?? button("close-conversations")).focus();
  }
};
function whenAndHowLong(conversation) {
  const when = new Date(conversation.updated).toLocaleString(void 0, { dateStyle: "medium", timeStyle: "short" });
  const count = conversation.turns.length;
  return `${when} · ${count === 0 ? "nothing asked yet" : count === 1 ? "1 answer" : `${count} answers`}`;
}

// src/export.ts
async function asJson(conversation, pictures, model) {
  const shown = conversation.pictureIds.map((id) => pictures.get(id)).filter((one) => one !== void 0);
  const content = {
    format: "blip2-conversation",
    version: 1,
    title: titleOf(conversation, pictures),
    model,
    created: new Date(conversation.created).toISOString(),
    updated: new Date(conversation.updated).toISOString(),
    pictures: await Promise.all(
      shown.map(async ({ id, name, width, height, credit, blob }) => ({
        id,
        name,
        width,
        height,
        ...credit === "" ? {} : { credit },
        data: await dataUrl(blob)
      }))
    ),
    turns: conversation.turns.map(({ kind, pictureId, question, answer, state, notes }) => ({
      kind,
      picture: pictureId,
      question,
      answer,
      state,
      notes
    }))
  };
  return JSON.stringify(content, null, 2) + "\n";
}
function asMarkdown(conversation, pictures, model) {
  const lines = [`# ${escaped(titleOf(conversation, pictures))}`, "", `Answers of the model ${escaped(model)}.`, ""];
  let shown = "";
  for (const turn of conversation.turns) {
    const picture = pictures.get(turn.pictureId);
    if (picture && picture.id !== shown) {
      lines.push(`## ${escaped(picture.name)} (${picture.width} × ${picture.height})`, "");
      shown = picture.id;
    }
    lines.push(`**${escaped(askedText(turn))}**`, "", escaped(turn.answer) || "(no answer)", "");
    if (turn.state === "stopped") lines.push("(stopped)", "");
  }
  return lines.join("\n");
}
function escaped(text) {
  return text.replace(/[\\`*_[\]<>#|]/g, "\\$&").replace(/\s*\n\s*/g, "  \n");
}
function fileName(title, ending) {
  const words = title.normalize("NFC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  return `${words || "conversation"}.${ending}`;
}
function download(text, name, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1e4);
}

// ../examples/pictures/pictures.json
var pictures_default = {
  pictures: [
    {
      file: "chair-and-flamingo.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "What is to the right of the chair?",
        "What colour is the flamingo?",
        "Is there a waffle?"
      ]
    },
    {
      file: "accordions-and-turtle.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "How many accordions are there?",
        "What is above the turtle?"
      ]
    },
    {
      file: "tractor-syringe-hamster.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "How many things are there?",
        "What is below the syringe?"
      ]
    },
    {
      file: "whale-and-hippopotamus.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "What colour is the whale?",
        "Is the hippopotamus to the left of the whale?"
      ]
    },
    {
      file: "llama-and-castle.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "What is to the left of the castle?",
        "What colour is the llama?"
      ]
    },
    {
      file: "sandwich-and-magnet.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "What is above the magnet?",
        "Is there a magnet?"
      ]
    },
    {
      file: "sunflower-duck-house.webp",
      licence: "GPL-2.0 AND MIT AND OFL-1.1",
      source: "composed as `blip2 data build` composes new_scenes, of Tux Paint stamps, Fluent and Noto emoji; not trained on",
      questions: [
        "How many things are there?",
        "What is above the house?"
      ]
    },
    {
      file: "twemoji-lion.webp",
      licence: "CC-BY-4.0",
      source: "Twemoji 12 (CC-BY-4.0, Twitter and contributors), the style that is never trained on",
      questions: [
        "What is in the picture?"
      ]
    },
    {
      file: "twemoji-rocket.webp",
      licence: "CC-BY-4.0",
      source: "Twemoji 12 (CC-BY-4.0, Twitter and contributors), the style that is never trained on",
      questions: [
        "What is in the picture?"
      ]
    },
    {
      file: "photo-cat.jpg",
      licence: "CC0-1.0",
      source: "Chelsea, photographed by Stéfan van der Walt, from scikit-image",
      questions: [
        "What is in the picture?",
        "Is there a cat?"
      ]
    },
    {
      file: "photo-rocket.jpg",
      licence: "CC0-1.0",
      source: "Launch of a Falcon 9 photographed by SpaceX, from scikit-image",
      questions: [
        "What is in the picture?"
      ]
    }
  ]
};

// src/guide.ts
var QUESTIONS_FOR_ANY = ["What is in the picture?", "How many things are there?", "What colour is it?"];
function creditOf(name) {
  const found = pictures_default.pictures.find((one) => one.file === name);
  return found ? `${found.source.replaceAll("`", "")} (${found.licence})` : "";
}
function hideGuide() {
  byId("guide", HTMLElement).replaceChildren();
}
function showWelcome(canGenerate, canLook, model) {
  const steps = [
    "Show it a picture: your own, or an example.",
    "Ask what you want to know. Go on asking; it knows what was said before.",
    ...canLook ? ["Under an answer, “What it looked at” shows where in the picture the answer came from."] : []
  ];
  const list = el("ol", {}, ...steps.map((step) => el("li", {}, el("span", {}, step))));
  const refusal2 = `The model ${model} has no language model, so it cannot answer. Serve one that has.`;
  byId("guide", HTMLElement).replaceChildren(
    el("h2", {}, "Chat about pictures"),
    canGenerate ? list : el("p", { class: "error" }, refusal2),
    el("p", { class: "soft" }, "Pictures go to this server and nowhere else. Conversations are kept in this browser.")
  );
}
function showFirstQuestions(picture, ask) {
  const own = picture.credit === "" ? [] : pictures_default.pictures.find((one) => one.file === picture.name)?.questions ?? [];
  const questions = own.length > 1 ? own : [.../* @__PURE__ */ new Set([...own, ...QUESTIONS_FOR_ANY])];
  const button2 = (question) => el("button", { type: "button", click: () => ask(question) }, question);
  byId("guide", HTMLElement).replaceChildren(
    el("h2", {}, "What do you want to know?"),
    el("ul", { class: "suggestions" }, ...questions.map((question) => el("li", {}, button2(question)))),
    el("p", { class: "soft" }, "Or let it write a caption or an alt text: the buttons are with the picture.")
  );
}

// src/settings.ts
var DEFAULTS = { system: "", maxTokens: null, temperature: 0, opacity: 0.65 };
function readSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(read(localStorageOrNull(), "blip2.settings") || "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}
function writeSettings(settings) {
  write(localStorageOrNull(), "blip2.settings", JSON.stringify(settings));
}
function readOpenConversation() {
  return read(localStorageOrNull(), "blip2.open");
}
function writeOpenConversation(id) {
  write(localStorageOrNull(), "blip2.open", id);
}
var keyOfThisPage = "";
function readKey() {
  return read(sessionStorageOrNull(), "blip2.key") || keyOfThisPage;
}
function writeKey(key) {
  keyOfThisPage = key;
  write(sessionStorageOrNull(), "blip2.key", key);
}
function localStorageOrNull() {
  try {
    return localStorage;
  } catch {
    return null;
  }
}
function sessionStorageOrNull() {
  try {
    return sessionStorage;
  } catch {
    return null;
  }
}
function read(storage, name) {
  return storage?.getItem(name) ?? "";
}
function write(storage, name, value) {
  try {
    storage?.setItem(name, value);
  } catch {
  }
}

// src/stage_view.ts
var LARGEST_ENLARGEMENT = 3;
var StageView = class {
  constructor(actions) {
    this.actions = actions;
    const choose = () => this.chooser.click();
    for (const id of ["choose-picture", "another-picture"]) button(id).addEventListener("click", choose);
    this.chooser.addEventListener("change", () => {
      const file = this.chooser.files?.[0];
      this.chooser.value = "";
      if (file) actions.file(file);
    });
    button("caption").addEventListener("click", actions.caption);
    button("alt-text").addEventListener("click", actions.altText);
    this.acceptDrops();
    document.addEventListener("paste", (event) => {
      const file = pictureFile(event.clipboardData);
      if (!file) return;
      event.preventDefault();
      actions.file(file);
    });
  }
  actions;
  image = byId("picture", HTMLImageElement);
  strip = byId("strip", HTMLUListElement);
  chooser = byId("file", HTMLInputElement);
  listExamples(examples) {
    byId("examples-block", HTMLElement).hidden = examples.length === 0;
    byId("examples", HTMLUListElement).replaceChildren(
      ...examples.map(
        (example) => el(
          "li",
          {},
          el(
            "button",
            { type: "button", class: "example", title: example.alt, click: () => this.actions.example(example) },
            el("img", { src: example.url, alt: example.alt, loading: "lazy" })
          )
        )
      )
    );
  }
  /** Shows `shown` among the conversation's pictures; with none, the ways to bring one. */
  show(shown, pictures, description) {
    byId("welcome", HTMLElement).hidden = shown !== null;
    byId("viewer", HTMLElement).hidden = shown === null;
    if (!shown) return;
    const frame = byId("frame", HTMLElement);
    frame.style.setProperty("--ratio", String(shown.width / shown.height));
    frame.style.setProperty("--most", `${shown.width * LARGEST_ENLARGEMENT}px`);
    this.image.src = pictureUrl(shown);
    this.image.alt = description;
    byId("picture-name", HTMLElement).textContent = shown.name;
    const latest = pictures.at(-1) ?? shown;
    const facts = [
      ...latest === shown ? [] : [`an earlier picture; questions are about ${latest.name}`],
      `${shown.width} × ${shown.height}`,
      ...shown.credit === "" ? [] : [shown.credit]
    ];
    byId("picture-facts", HTMLElement).textContent = facts.join(" · ");
    this.listPictures(shown, pictures);
  }
  setBusy(busy) {
    for (const id of ["caption", "alt-text"]) button(id).disabled = busy;
  }
  listPictures(shown, pictures) {
    this.strip.hidden = pictures.length < 2;
    const focused = this.strip.contains(document.activeElement);
    this.strip.replaceChildren(
      ...pictures.map((picture, at) => {
        const isLatest = at === pictures.length - 1;
        const label = isLatest ? `${picture.name}, the one questions are about` : picture.name;
        const pressed = String(picture === shown);
        const show = () => this.actions.showPicture(picture.id);
        const thumb = el(
          "button",
          { type: "button", class: "thumb", title: label, "aria-label": label, "aria-pressed": pressed, click: show },
          el("img", { src: pictureUrl(picture), alt: "", class: "small-picture" })
        );
        return el("li", {}, thumb);
      })
    );
    if (focused) this.strip.querySelector("[aria-pressed=true]")?.focus();
  }
  acceptDrops() {
    const veil = byId("dropping", HTMLElement);
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      veil.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) veil.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!hasFiles(event)) return;
      event.preventDefault();
      const file = pictureFile(event.dataTransfer);
      if (file) this.actions.file(file);
    });
  }
};

// src/chat.ts
var Chat = class {
  constructor(server, store, settings) {
    this.server = server;
    this.store = store;
    this.settings = settings;
    const showPicture = (id) => this.showPicture(id);
    this.stage = new StageView({
      file: (file) => void this.addFile(file),
      example: (example) => void this.addExample(example),
      caption: () => this.ask("caption", ""),
      altText: () => this.ask("alt", ""),
      showPicture
    });
    this.stage.listExamples(server.info.examples);
    this.view = new ChatView(
      { again: (turn) => this.again(turn), look: (turn) => this.look(turn), showPicture },
      server.info.can.attention
    );
    this.composer = new Composer((question) => this.ask("question", question), () => this.stop());
    this.composer.showSettings(settings, server.info.limits.max_tokens, writeSettings);
    const keepOpacity = (opacity) => writeSettings(Object.assign(settings, { opacity }));
    this.attention = new AttentionView(settings.opacity, keepOpacity, () => this.closeAttention());
    this.list = new ConversationsView(
      {
        list: () => this.listed(),
        open: (conversation) => void this.open(conversation),
        rename: (conversation, title) => this.rename(conversation, title),
        remove: (conversation) => this.remove(conversation)
      },
      store.lasts
    );
    button("show-conversations").addEventListener("click", () => void this.list.show(this.conversation.id));
    button("new-conversation").addEventListener("click", () => this.startOver());
    button("export-json").addEventListener("click", () => void this.exportJson());
    button("export-markdown").addEventListener("click", () => this.exportMarkdown());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
      if (this.running) this.stop();
      else if (this.attention.openFor) this.closeAttention();
    });
  }
  server;
  store;
  settings;
  conversation = newConversation();
  pictures = /* @__PURE__ */ new Map();
  shownPicture = null;
  running = null;
  attentions = /* @__PURE__ */ new Map();
  // by turn
  removed = /* @__PURE__ */ new Set();
  // conversations that a late answer must not bring back
  stage;
  view;
  composer;
  attention;
  list;
  /** Opens the conversation with this id, or an empty one where it is gone. */
  async begin(id) {
    const found = (await this.store.conversations()).find((one) => one.id === id);
    await this.open(found ?? newConversation());
  }
  async open(conversation) {
    if (conversation.id === this.conversation.id) return;
    this.stop();
    this.running = null;
    this.conversation = conversation;
    for (const turn of conversation.turns) if (isRunning(turn)) turn.state = "stopped";
    for (const picture of await this.store.pictures(conversation.pictureIds)) this.remember(picture);
    writeOpenConversation(conversation.id);
    this.shownPicture = this.latestPicture();
    this.view.showAll(conversation.turns, this.pictures);
    this.attention.close();
    this.refresh();
  }
  startOver() {
    void this.open(newConversation()).then(() => {
      announce("A new conversation. Choose a picture.");
      button("choose-picture").focus();
    });
  }
  async addFile(file) {
    clearNotice();
    try {
      await this.addPicture(await openPicture(file, file.name || "pasted picture", this.server.info.formats));
    } catch (error) {
      if (!(error instanceof UnreadablePicture)) throw error;
      notify(error.message);
    }
  }
  async addExample(example) {
    clearNotice();
    try {
      const response = await fetch(example.url);
      if (!response.ok) throw new UnreadablePicture(`The example ${example.name} is missing on this server.`);
      const picture = await openPicture(await response.blob(), example.name, this.server.info.formats);
      await this.addPicture({ ...picture, alt: example.alt, credit: creditOf(example.name) });
    } catch (error) {
      notify(error instanceof UnreadablePicture ? error.message : UNREACHABLE);
    }
  }
  async addPicture(picture) {
    this.remember(picture);
    this.conversation.pictureIds.push(picture.id);
    this.shownPicture = picture;
    this.attention.close();
    this.view.markLooked(null);
    this.refresh();
    this.composer.focus();
    announce(`${picture.name} is shown. Ask about it.`);
    await this.save(picture);
  }
  /** Whether the question was taken up; where not, the page says why. */
  ask(kind, question) {
    clearNotice();
    const picture = this.latestPicture();
    if (this.running) return false;
    if (!picture) {
      notify("Show it a picture first: drop one, paste one, or choose a file.");
      return false;
    }
    if (kind === "question" && question === "") {
      announce("Write a question first.");
      return false;
    }
    const turn = newTurn(kind, picture.id, question);
    this.conversation.turns.push(turn);
    if (this.shownPicture !== picture) this.closeAttention();
    this.shownPicture = picture;
    void this.answer(turn);
    this.composer.focus();
    return true;
  }
  again(turn) {
    if (this.running) return;
    Object.assign(turn, { answer: "", error: "", notes: [], state: "waiting" });
    this.attentions.delete(turn.id);
    if (this.attention.openFor === turn.id) this.attention.close();
    this.composer.focus();
    void this.answer(turn);
  }
  async answer(turn) {
    const conversation = this.conversation;
    const stop = new AbortController();
    this.running = { turn, stop };
    this.refresh();
    this.view.show(turn, this.pictures);
    announce("Looking at the picture.");
    await this.save();
    try {
      const { sent, leftOut } = this.toSend(turn);
      if (leftOut > 0) turn.notes.push(leftOutNote(leftOut));
      await this.fetchAnswer(turn, sent, stop.signal);
      turn.state = "done";
    } catch (error) {
      turn.state = stop.signal.aborted ? "stopped" : "failed";
      turn.error = error instanceof ServerError ? error.message : `The page came upon an error: ${String(error)}`;
    }
    if (this.running?.turn === turn) this.running = null;
    conversation.updated = Date.now();
    await this.save(null, conversation);
    if (this.conversation !== conversation) return;
    this.view.show(turn, this.pictures);
    this.refresh();
    announce(turn.state === "done" ? "" : turn.state === "stopped" ? "Stopped." : turn.error);
  }
  async fetchAnswer(turn, sent, signal) {
    if (turn.kind !== "question") {
      const { text, notes: notes2 } = await this.server.answer(sent, this.pictures, signal);
      turn.answer = text;
      turn.notes.push(...notes2);
      return;
    }
    const notes = await this.server.streamAnswer(sent, this.pictures, this.settings, signal, (piece) => {
      turn.state = "streaming";
      turn.answer += piece;
      this.view.addPiece(turn, piece);
    });
    turn.notes.push(...notes);
  }
  stop() {
    this.running?.stop.abort();
  }
  look(turn) {
    const picture = this.pictures.get(turn.pictureId);
    if (!picture) return;
    if (this.attention.openFor === turn.id) return this.closeAttention();
    this.showPicture(picture.id);
    void this.attention.open({
      turnId: turn.id,
      answer: turn.answer.trim(),
      width: picture.width,
      height: picture.height,
      load: (byWord) => this.attentionOf(turn, byWord)
    });
    this.view.markLooked(turn.id);
  }
  async attentionOf(turn, byWord) {
    const known = this.attentions.get(turn.id);
    if (known && (known.words || !byWord)) return known;
    const system = turn.kind === "question" ? this.settings.system : "";
    const found = await this.server.attention(this.toSend(turn).sent, this.pictures, system, turn.answer, byWord);
    this.attentions.set(turn.id, found);
    return found;
  }
  closeAttention() {
    const turnId = this.attention.openFor;
    this.attention.close();
    this.view.markLooked(null);
    if (turnId) this.view.focusLook(turnId);
  }
  showPicture(id) {
    const picture = this.pictures.get(id);
    if (!picture || picture === this.shownPicture) return;
    this.shownPicture = picture;
    this.attention.close();
    this.view.markLooked(null);
    this.refresh();
  }
  /** Of the picture shown, for who cannot see it: what is known of it, or what the model has said. */
  description() {
    const shown = this.shownPicture;
    const caption = this.conversation.turns.findLast(
      (turn) => turn.kind !== "question" && turn.pictureId === shown?.id && turn.state === "done"
    );
    return shown?.alt || tidyAltText(caption?.answer ?? "") || (shown?.name ?? "");
  }
  toSend(turn) {
    const hasSystemLine = this.settings.system !== "";
    return turnsToSend(this.conversation.turns, turn, this.pictures, this.server.info.limits, hasSystemLine);
  }
  latestPicture() {
    return this.pictures.get(this.conversation.pictureIds.at(-1) ?? "") ?? null;
  }
  remember(picture) {
    if (!this.pictures.has(picture.id)) this.pictures.set(picture.id, picture);
  }
  refresh() {
    const { conversation } = this;
    const { can, model } = this.server.info;
    const pictures = conversation.pictureIds.map((id) => this.pictures.get(id)).filter((one) => one !== void 0);
    this.stage.show(this.shownPicture, pictures, this.description());
    this.stage.setBusy(this.running !== null || !can.generate);
    this.composer.setBusy(this.running !== null);
    byId("talk-head", HTMLElement).hidden = conversation.turns.length === 0;
    const title = titleOf(conversation, this.pictures);
    byId("title", HTMLElement).textContent = title;
    document.title = conversation.pictureIds.length === 0 ? "blip2" : `${title} · blip2`;
    const latest = this.latestPicture();
    const ask = (question) => this.ask("question", question);
    if (!latest || !can.generate) showWelcome(can.generate, can.attention, model);
    else if (conversation.turns.length === 0) showFirstQuestions(latest, ask);
    else hideGuide();
  }
  async save(picture = null, conversation = this.conversation) {
    if (this.removed.has(conversation.id)) return;
    try {
      if (picture) await this.store.savePicture(picture);
      await this.store.saveConversation(conversation);
      if (conversation === this.conversation) writeOpenConversation(conversation.id);
    } catch {
      notify("This browser has no room left. Delete conversations, or this one is gone when the tab closes.");
    }
  }
  async listed() {
    const conversations = await this.store.conversations();
    const ids = conversations.flatMap(({ pictureIds }) => [...pictureIds.slice(0, 1), ...pictureIds.slice(-1)]);
    const unknown = ids.filter((id) => !this.pictures.has(id));
    for (const picture of await this.store.pictures(unknown)) this.remember(picture);
    return { conversations, pictures: this.pictures };
  }
  async rename(conversation, title) {
    const isOpen = conversation.id === this.conversation.id;
    const renamed = isOpen ? this.conversation : conversation;
    renamed.title = title;
    await this.save(null, renamed);
    if (isOpen) this.refresh();
  }
  async remove(conversation) {
    this.removed.add(conversation.id);
    if (conversation.id === this.conversation.id) await this.open(newConversation());
    await this.store.remove(conversation);
    for (const id of conversation.pictureIds) {
      this.pictures.delete(id);
      forgetPicture(id);
    }
  }
  async exportJson() {
    const text = await asJson(this.conversation, this.pictures, this.server.info.model);
    download(text, fileName(titleOf(this.conversation, this.pictures), "json"), "application/json");
  }
  exportMarkdown() {
    const text = asMarkdown(this.conversation, this.pictures, this.server.info.model);
    download(text, fileName(titleOf(this.conversation, this.pictures), "md"), "text/markdown");
  }
};
function leftOutNote(count) {
  const turns = count === 1 ? "The oldest question was" : `The ${count} oldest questions were`;
  return `${turns} left out of what the model reads: the conversation is longer than this server takes.`;
}

// src/key_view.ts
var KeyView = class {
  dialog = byId("key-dialog", HTMLDialogElement);
  field = byId("key", HTMLInputElement);
  asking = null;
  current() {
    return readKey();
  }
  ask(wasRefused) {
    this.asking ??= this.show(wasRefused).finally(() => this.asking = null);
    return this.asking;
  }
  show(wasRefused) {
    byId("key-reason", HTMLElement).textContent = wasRefused ? "The key it was given is not the right one." : "Whoever runs it can tell you the key.";
    this.field.value = "";
    this.dialog.showModal();
    this.field.focus();
    return new Promise((resolve) => {
      const listening = new AbortController();
      const until = { signal: listening.signal };
      let given = null;
      byId("key-form", HTMLFormElement).addEventListener(
        "submit",
        (event) => {
          event.preventDefault();
          const key = this.field.value.trim();
          if (key === "") return this.field.focus();
          given = key;
          this.dialog.close();
        },
        until
      );
      button("key-cancel").addEventListener("click", () => this.dialog.close(), until);
      this.dialog.addEventListener(
        "close",
        () => {
          listening.abort();
          this.field.value = "";
          if (given !== null) writeKey(given);
          resolve(given);
        },
        until
      );
    });
  }
};

// src/store.ts
async function openStore() {
  try {
    return new DatabaseStore(await openDatabase());
  } catch {
    return new MemoryStore();
  }
}
function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("blip2", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("pictures", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
function committed(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}
var DatabaseStore = class {
  constructor(database) {
    this.database = database;
  }
  database;
  lasts = true;
  async conversations() {
    const all = await result(this.reading("conversations").getAll());
    return latestFirst(all);
  }
  async pictures(ids) {
    const pictures = this.reading("pictures");
    const found = await Promise.all(ids.map((id) => result(pictures.get(id))));
    return found.filter((one) => one !== void 0);
  }
  saveConversation(conversation) {
    const transaction = this.database.transaction("conversations", "readwrite");
    transaction.objectStore("conversations").put(conversation);
    return committed(transaction);
  }
  savePicture(picture) {
    const transaction = this.database.transaction("pictures", "readwrite");
    transaction.objectStore("pictures").put(picture);
    return committed(transaction);
  }
  remove(conversation) {
    const transaction = this.database.transaction(["conversations", "pictures"], "readwrite");
    transaction.objectStore("conversations").delete(conversation.id);
    for (const id of conversation.pictureIds) transaction.objectStore("pictures").delete(id);
    return committed(transaction);
  }
  reading(name) {
    return this.database.transaction(name).objectStore(name);
  }
};
var MemoryStore = class {
  lasts = false;
  kept = /* @__PURE__ */ new Map();
  keptPictures = /* @__PURE__ */ new Map();
  async conversations() {
    return latestFirst([...this.kept.values()]);
  }
  async pictures(ids) {
    return ids.map((id) => this.keptPictures.get(id)).filter((one) => one !== void 0);
  }
  async saveConversation(conversation) {
    this.kept.set(conversation.id, conversation);
  }
  async savePicture(picture) {
    this.keptPictures.set(picture.id, picture);
  }
  async remove(conversation) {
    this.kept.delete(conversation.id);
    for (const id of conversation.pictureIds) this.keptPictures.delete(id);
  }
};
function latestFirst(conversations) {
  return conversations.sort((a, b) => b.updated - a.updated);
}

// src/main.ts
async function begin() {
  const info = await fetchPageInfo();
  const model = byId("model", HTMLElement);
  model.textContent = `${info.model} · ${info.version}`;
  model.title = `Model ${info.model}, ${info.name} ${info.version}`;
  model.hidden = false;
  const key = new KeyView();
  const chat = new Chat(new Server(info, key), await openStore(), readSettings());
  await chat.begin(readOpenConversation());
  if (info.needs_key && key.current() === "") await key.ask(false);
}
begin().catch((error) => {
  if (!(error instanceof ServerError)) console.error(error);
  notify("The page could not begin. See whether the server is running, then load the page anew.");
});
