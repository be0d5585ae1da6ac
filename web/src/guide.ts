// What a newcomer reads where the conversation will stand: how it works, then first questions to try.
// The examples' own questions come from the list of pictures in the repository, with their credits.

import known from "../../examples/pictures/pictures.json";
import type { Picture } from "./conversation";
import { byId, el } from "./dom";

const QUESTIONS_FOR_ANY = ["What is in the picture?", "How many things are there?", "What colour is it?"];

/** Source and licence of an example, to stand beneath it; empty for other pictures. */
export function creditOf(name: string): string {
  const found = known.pictures.find((one) => one.file === name);
  return found ? `${found.source.replaceAll("`", "")} (${found.licence})` : "";
}

export function hideGuide(): void {
  byId("guide", HTMLElement).replaceChildren();
}

export function showWelcome(canGenerate: boolean, canLook: boolean, model: string): void {
  const steps = [
    "Show it a picture: your own, or an example.",
    "Ask what you want to know. Go on asking; it knows what was said before.",
    ...(canLook ? ["Under an answer, “What it looked at” shows where in the picture the answer came from."] : []),
  ];
  const list = el("ol", {}, ...steps.map((step) => el("li", {}, el("span", {}, step))));
  const refusal = `The model ${model} has no language model, so it cannot answer. Serve one that has.`;
  byId("guide", HTMLElement).replaceChildren(
    el("h2", {}, "Chat about pictures"),
    canGenerate ? list : el("p", { class: "error" }, refusal),
    el("p", { class: "soft" }, "Pictures go to this server and nowhere else. Conversations are kept in this browser."),
  );
}

export function showFirstQuestions(picture: Picture, ask: (question: string) => void): void {
  const own = picture.credit === "" ? [] : (known.pictures.find((one) => one.file === picture.name)?.questions ?? []);
  const questions = own.length > 1 ? own : [...new Set([...own, ...QUESTIONS_FOR_ANY])];
  const button = (question: string) => el("button", { type: "button", click: () => ask(question) }, question);
  byId("guide", HTMLElement).replaceChildren(
    el("h2", {}, "What do you want to know?"),
    el("ul", { class: "suggestions" }, ...questions.map((question) => el("li", {}, button(question)))),
    el("p", { class: "soft" }, "Or let it write a caption or an alt text: the buttons are with the picture."),
  );
}
