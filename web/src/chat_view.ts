// Questions and answers as they stand on the page, the newest last.
// While an answer streams, screen readers are kept from it; the whole of it then enters the log and is read once.

import { altAttribute, tidyAltText } from "./alt_text";
import { askedText, isRunning, type Picture, type Turn } from "./conversation";
import { byId, copyText, el, icon } from "./dom";
import { pictureUrl } from "./picture";

export interface TurnActions {
  again(turn: Turn): void;
  look(turn: Turn): void;
  showPicture(id: string): void;
}

interface ShownTurn {
  article: HTMLElement;
  streamed: Text | null;
}

export class ChatView {
  private readonly log = byId("log", HTMLElement);
  private readonly scroll = byId("scroll", HTMLElement);
  private readonly shown = new Map<string, ShownTurn>();
  private follows = true; // whether the reader stands at the end; one who scrolled back is left there

  constructor(
    private readonly actions: TurnActions,
    private readonly canLook: boolean,
  ) {
    document.addEventListener("scroll", () => (this.follows = this.isAtEnd()), { capture: true, passive: true });
    // the composer grows and takes its room from the conversation
    new ResizeObserver(() => {
      if (this.follows && this.scroller() === this.scroll) this.toEnd();
    }).observe(this.scroll);
  }

  /** A whole conversation at once, which is not news to be read aloud. */
  showAll(turns: readonly Turn[], pictures: ReadonlyMap<string, Picture>): void {
    this.log.setAttribute("aria-live", "off");
    this.shown.clear();
    this.log.replaceChildren();
    for (const turn of turns) this.show(turn, pictures);
    setTimeout(() => this.log.setAttribute("aria-live", "polite"), 500);
  }

  /** A new turn, or one that changed. */
  show(turn: Turn, pictures: ReadonlyMap<string, Picture>): void {
    const made = this.turn(turn, pictures.get(turn.pictureId));
    const before = this.shown.get(turn.id);
    if (before) before.article.replaceWith(made.article);
    else this.log.append(made.article);
    this.shown.set(turn.id, made);
    this.toEnd();
  }

  addPiece(turn: Turn, piece: string): void {
    const shown = this.shown.get(turn.id);
    if (!shown?.streamed) return;
    shown.article.dataset["state"] = turn.state;
    shown.streamed.appendData(piece);
    if (this.follows) this.toEnd();
  }

  /** Which turn's map is open, so that its button says so. */
  markLooked(turnId: string | null): void {
    for (const [id, { article }] of this.shown) {
      article.querySelector(".look")?.setAttribute("aria-expanded", String(id === turnId));
    }
  }

  focusLook(turnId: string): void {
    this.shown.get(turnId)?.article.querySelector<HTMLElement>(".look")?.focus();
  }

  private isAtEnd(): boolean {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller();
    return scrollHeight - scrollTop - clientHeight < 60;
  }

  private toEnd(): void {
    const scroller = this.scroller();
    scroller.scrollTop = scroller.scrollHeight;
    this.follows = true;
  }

  /** On a wide page the conversation scrolls for itself, on a phone the whole page does. */
  private scroller(): Element {
    return getComputedStyle(this.scroll).overflowY === "auto" ? this.scroll : document.documentElement;
  }

  private turn(turn: Turn, picture: Picture | undefined): ShownTurn {
    const streamed = isRunning(turn) ? document.createTextNode(turn.answer) : null;
    const article = el(
      "article",
      { class: "turn", "data-state": turn.state, "data-kind": turn.kind, "aria-label": askedText(turn) },
      this.asked(turn, picture),
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

  private asked(turn: Turn, picture: Picture | undefined): HTMLElement {
    const line = el("div", { class: "asked" });
    if (picture) {
      const label = `About ${picture.name}. Show it`;
      const show = () => this.actions.showPicture(picture.id);
      line.append(
        el(
          "button",
          { type: "button", class: "thumb", title: picture.name, "aria-label": label, click: show },
          el("img", { src: pictureUrl(picture), alt: "", class: "small-picture" }),
        ),
      );
    }
    line.append(el("p", { class: "question" }, askedText(turn)));
    return line;
  }

  private answered(turn: Turn): HTMLElement[] {
    const text = turn.kind === "alt" ? tidyAltText(turn.answer) : turn.answer.trim();
    const parts: HTMLElement[] = [];
    if (text !== "") parts.push(el("p", { class: "answer" }, text));
    if (text === "" && turn.state === "done") parts.push(el("p", { class: "answer none" }, "(an empty answer)"));
    const notes = turn.state === "stopped" ? ["Stopped.", ...turn.notes] : turn.notes;
    for (const note of notes) parts.push(el("p", { class: "note" }, note));
    if (turn.state === "failed") parts.push(el("p", { class: "error" }, turn.error));
    parts.push(this.buttons(turn, text));
    return parts;
  }

  private buttons(turn: Turn, text: string): HTMLElement {
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
        el("button", { type: "button", class: "quiet look", ...panel, click: look }, icon("look"), "What it looked at"),
      );
    }
    row.append(copyButton("Copy", text));
    if (turn.kind === "alt") row.append(copyButton("Copy as alt=\"…\"", altAttribute(text)));
    return row;
  }
}

function copyButton(label: string, text: string): HTMLButtonElement {
  const made = el("button", { type: "button", class: "quiet" }, icon("copy"), label);
  made.addEventListener("click", () => void copyText(text, made));
  return made;
}
