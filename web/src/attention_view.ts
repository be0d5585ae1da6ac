// "What it looked at": the heat map over the picture and the controls beneath it.
// The map is the average over queries, one query's, or one word's of the answer.

import type { Attention } from "./api";
import { byId, button, el } from "./dom";
import { heatPixels, mostlyWhere, weighted } from "./heat";

const LONGEST_SIDE = 512; // pixels of the drawn map; the browser smooths from there

type MapKind = "average" | "query" | "word";

export interface Looked {
  turnId: string;
  answer: string;
  width: number; // of the picture
  height: number;
  load(byWord: boolean): Promise<Attention>; // rejects with a message a person can read
}

export class AttentionView {
  private readonly panel = byId("attention", HTMLElement);
  private readonly canvas = byId("heat", HTMLCanvasElement);
  private readonly heading = byId("attention-title", HTMLElement);
  private readonly words = byId("words", HTMLElement);
  private readonly said = byId("attention-said", HTMLElement);
  private readonly query = byId("query", HTMLSelectElement);
  private readonly opacity = byId("opacity", HTMLInputElement);
  private readonly kinds = Array.from(this.panel.querySelectorAll<HTMLInputElement>("input[name=map]"));
  private looked: Looked | null = null;
  private attention: Attention | null = null;
  private word = 0;

  constructor(opacity: number, onOpacity: (opacity: number) => void, onClose: () => void) {
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

  get openFor(): string | null {
    return this.looked?.turnId ?? null;
  }

  async open(looked: Looked): Promise<void> {
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

  close(): void {
    this.looked = null;
    this.attention = null;
    this.panel.hidden = true;
    this.canvas.hidden = true;
  }

  private kind(): MapKind {
    return (this.kinds.find((one) => one.checked)?.value ?? "average") as MapKind;
  }

  /** Fetches what the chosen map needs and has not been fetched, then draws. */
  private async load(): Promise<void> {
    const looked = this.looked;
    if (!looked) return;
    const byWord = this.kind() === "word";
    byId("query-choice", HTMLElement).hidden = this.kind() !== "query";
    this.words.hidden = !byWord;
    byId("attention-of", HTMLElement).hidden = byWord; // the words say it
    if (!this.attention || (byWord && !this.attention.words)) {
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

  private fail(message: string): void {
    this.say(message, "failed");
    this.said.append(" ", el("button", { type: "button", click: () => void this.load() }, "Try again"));
  }

  private listQueries(): void {
    const chosen = this.query.value || "0";
    const count = this.attention?.queries.length ?? 0;
    this.query.replaceChildren(
      ...Array.from({ length: count }, (_, at) => el("option", { value: String(at) }, String(at + 1))),
    );
    this.query.value = Number(chosen) < count ? chosen : "0";
  }

  private listWords(): void {
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
      }),
    );
    if (focused) this.words.querySelectorAll("button")[this.word]?.focus();
  }

  private draw(): void {
    const { looked, attention } = this;
    if (!looked || !attention) return;
    const [rows, columns] = attention.grid;
    const grid = this.chosenMap(attention);
    const scale = LONGEST_SIDE / Math.max(looked.width, looked.height);
    this.canvas.width = Math.max(1, Math.round(looked.width * scale));
    this.canvas.height = Math.max(1, Math.round(looked.height * scale));
    const pixels = heatPixels(grid, rows, columns, this.canvas.width, this.canvas.height);
    this.canvas.getContext("2d")?.putImageData(pixels, 0, 0);
    this.canvas.hidden = false;
    this.say(`${this.subject(attention)} mostly ${mostlyWhere(grid, rows, columns)}.`, "done");
  }

  private chosenMap(attention: Attention): number[] {
    const word = attention.words?.[this.word];
    if (this.kind() === "query") return attention.queries[Number(this.query.value)] ?? attention.average;
    if (this.kind() === "word" && word) return weighted(attention.queries, word.weights);
    return attention.average;
  }

  private subject(attention: Attention): string {
    if (this.kind() === "query") return `Query ${Number(this.query.value) + 1} of ${attention.num_queries} looked`;
    if (this.kind() === "word") return `For “${attention.words?.[this.word]?.text.trim() ?? ""}” it looked`;
    return "On average it looked";
  }

  private say(text: string, state: "busy" | "failed" | "done"): void {
    this.said.textContent = text;
    this.said.dataset["state"] = state;
  }

  private applyOpacity(): void {
    this.canvas.style.opacity = String(Number(this.opacity.value) / 100);
  }
}

function drawLegend(): void {
  const canvas = byId("legend", HTMLCanvasElement);
  const ramp = Array.from({ length: canvas.width }, (_, at) => at);
  const context = canvas.getContext("2d");
  context?.putImageData(heatPixels(ramp, 1, ramp.length, canvas.width, 1), 0, 0);
}
