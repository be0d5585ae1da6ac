// The picture, large, with its name and its buttons; before there is one, the ways to bring one.
// Files arrive by choosing, dropping anywhere on the page, or pasting anywhere.

import type { Example } from "./api";
import type { Picture } from "./conversation";
import { byId, button, el } from "./dom";
import { pictureFile, pictureUrl } from "./picture";

const LARGEST_ENLARGEMENT = 3; // beyond it a small picture is only blur

export interface StageActions {
  file(file: File): void;
  example(example: Example): void;
  caption(): void;
  altText(): void;
  showPicture(id: string): void;
}

export class StageView {
  private readonly image = byId("picture", HTMLImageElement);
  private readonly strip = byId("strip", HTMLUListElement);
  private readonly chooser = byId("file", HTMLInputElement);

  constructor(private readonly actions: StageActions) {
    const choose = () => this.chooser.click();
    for (const id of ["choose-picture", "another-picture"]) button(id).addEventListener("click", choose);
    this.chooser.addEventListener("change", () => {
      const file = this.chooser.files?.[0];
      this.chooser.value = ""; // so that choosing the same file again is a change too
      if (file) actions.file(file);
    });
    button("caption").addEventListener("click", actions.caption);
    button("alt-text").addEventListener("click", actions.altText);
    this.acceptDrops();
    document.addEventListener("paste", (event) => {
      const file = pictureFile(event.clipboardData);
      if (!file) return; // text pasted into the question
      event.preventDefault();
      actions.file(file);
    });
  }

  listExamples(examples: readonly Example[]): void {
    byId("examples-block", HTMLElement).hidden = examples.length === 0;
    byId("examples", HTMLUListElement).replaceChildren(
      ...examples.map((example) =>
        el(
          "li",
          {},
          el(
            "button",
            { type: "button", class: "example", title: example.alt, click: () => this.actions.example(example) },
            el("img", { src: example.url, alt: example.alt, loading: "lazy" }),
          ),
        ),
      ),
    );
  }

  /** Shows `shown` among the conversation's pictures; with none, the ways to bring one. */
  show(shown: Picture | null, pictures: readonly Picture[], description: string): void {
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
      ...(latest === shown ? [] : [`an earlier picture; questions are about ${latest.name}`]),
      `${shown.width} × ${shown.height}`,
      ...(shown.credit === "" ? [] : [shown.credit]),
    ];
    byId("picture-facts", HTMLElement).textContent = facts.join(" · ");
    this.listPictures(shown, pictures);
  }

  setBusy(busy: boolean): void {
    for (const id of ["caption", "alt-text"]) button(id).disabled = busy;
  }

  private listPictures(shown: Picture, pictures: readonly Picture[]): void {
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
          el("img", { src: pictureUrl(picture), alt: "", class: "small-picture" }),
        );
        return el("li", {}, thumb);
      }),
    );
    if (focused) this.strip.querySelector<HTMLElement>("[aria-pressed=true]")?.focus();
  }

  private acceptDrops(): void {
    const veil = byId("dropping", HTMLElement);
    const hasFiles = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      veil.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) veil.hidden = true; // it left the window
    });
    document.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!hasFiles(event)) return;
      event.preventDefault();
      const file = pictureFile(event.dataTransfer);
      if (file) this.actions.file(file);
    });
  }
}
