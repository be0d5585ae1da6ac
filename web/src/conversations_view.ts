// The list of conversations: open one, rename it, delete it after a second question.
// A dialog that slides in from the side, so that the picture keeps its room.

import { titleOf, type Conversation, type Picture } from "./conversation";
import { byId, button, el } from "./dom";
import { pictureUrl } from "./picture";

export interface ConversationActions {
  list(): Promise<{ conversations: Conversation[]; pictures: Map<string, Picture> }>;
  open(conversation: Conversation): void;
  rename(conversation: Conversation, title: string): Promise<void>;
  remove(conversation: Conversation): Promise<void>;
}

export class ConversationsView {
  private readonly dialog = byId("conversations", HTMLDialogElement);
  private readonly list = byId("conversation-list", HTMLUListElement);
  private readonly note = byId("conversations-note", HTMLElement);
  private current = "";

  constructor(
    private readonly actions: ConversationActions,
    private readonly lasts: boolean,
  ) {
    button("close-conversations").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // the backdrop counts as the dialog itself
    });
  }

  async show(current: string): Promise<void> {
    this.current = current;
    await this.fill();
    this.dialog.showModal();
  }

  private async fill(): Promise<void> {
    const { conversations, pictures } = await this.actions.list();
    this.note.textContent =
      conversations.length === 0
        ? "None yet. Each picture you show begins one."
        : this.lasts
          ? "Kept in this browser only."
          : "This browser keeps nothing for the page: they are gone when the tab closes.";
    this.list.replaceChildren(...conversations.map((one) => this.row(one, pictures)));
  }

  private row(conversation: Conversation, pictures: Map<string, Picture>): HTMLLIElement {
    const title = titleOf(conversation, pictures);
    const picture = pictures.get(conversation.pictureIds.at(-1) ?? "");
    const isCurrent = conversation.id === this.current;
    const open = () => this.open(conversation);
    const rename = () => this.askName(item, conversation, title);
    const remove = () => this.askWhether(item, conversation, title);
    const small = { class: "small-picture" };
    const item: HTMLLIElement = el(
      "li",
      {},
      el(
        "button",
        { type: "button", class: "conversation-open", "aria-current": isCurrent && "true", click: open },
        picture ? el("img", { ...small, src: pictureUrl(picture), alt: "" }) : el("span", small),
        el("span", { class: "conversation-title" }, title, el("small", {}, whenAndHowLong(conversation))),
      ),
      el(
        "div",
        { class: "conversation-actions" },
        el("button", { type: "button", class: "quiet", "aria-label": `Rename ${title}`, click: rename }, "Rename"),
        el("button", { type: "button", class: "quiet", "aria-label": `Delete ${title}`, click: remove }, "Delete"),
      ),
    );
    return item;
  }

  private open(conversation: Conversation): void {
    this.dialog.close();
    this.actions.open(conversation);
  }

  private askName(item: HTMLLIElement, conversation: Conversation, title: string): void {
    const field = el("input", { type: "text", "aria-label": "New name", maxlength: "120" });
    field.value = title;
    const keep = async () => {
      await this.actions.rename(conversation, field.value.trim());
      await this.fillAndFocus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") void keep();
      if (event.key !== "Escape") return;
      event.preventDefault(); // else the dialog closes too
      void this.fillAndFocus();
    });
    item.replaceChildren(field, el("button", { type: "button", click: () => void keep() }, "Keep name"));
    field.select();
  }

  private askWhether(item: HTMLLIElement, conversation: Conversation, title: string): void {
    const remove = async () => {
      await this.actions.remove(conversation);
      if (conversation.id === this.current) this.current = "";
      await this.fillAndFocus();
    };
    const no = el("button", { type: "button", click: () => void this.fillAndFocus() }, "Keep it");
    item.replaceChildren(
      el("p", {}, `Delete “${title}” and its pictures?`),
      el("button", { type: "button", class: "danger", click: () => void remove() }, "Delete"),
      no,
    );
    no.focus();
  }

  private async fillAndFocus(): Promise<void> {
    await this.fill();
    (this.list.querySelector("button") ?? button("close-conversations")).focus();
  }
}

function whenAndHowLong(conversation: Conversation): string {
  const when = new Date(conversation.updated).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const count = conversation.turns.length;
  return `${when} · ${count === 0 ? "nothing asked yet" : count === 1 ? "1 answer" : `${count} answers`}`;
}
