// The page at work: which conversation is open, which picture shown, what is being answered.
// The views call its actions; it changes the conversation, saves it and tells the views.

import { tidyAltText } from "./alt_text";
import { ServerError, UNREACHABLE, type Attention, type Example, type Server } from "./api";
import { AttentionView } from "./attention_view";
import { ChatView } from "./chat_view";
import { Composer } from "./composer";
import {
  isRunning,
  newConversation,
  newTurn,
  titleOf,
  turnsToSend,
  type Conversation,
  type Picture,
  type SentTurn,
  type Turn,
  type TurnKind,
} from "./conversation";
import { ConversationsView } from "./conversations_view";
import { announce, byId, button, clearNotice, notify } from "./dom";
import { asJson, asMarkdown, download, fileName } from "./export";
import { creditOf, hideGuide, showFirstQuestions, showWelcome } from "./guide";
import { forgetPicture, openPicture, UnreadablePicture } from "./picture";
import { writeOpenConversation, writeSettings, type Settings } from "./settings";
import { StageView } from "./stage_view";
import type { Store } from "./store";

export class Chat {
  private conversation = newConversation();
  private readonly pictures = new Map<string, Picture>();
  private shownPicture: Picture | null = null;
  private running: { turn: Turn; stop: AbortController } | null = null;
  private readonly attentions = new Map<string, Attention>(); // by turn
  private readonly removed = new Set<string>(); // conversations that a late answer must not bring back
  private readonly stage: StageView;
  private readonly view: ChatView;
  private readonly composer: Composer;
  private readonly attention: AttentionView;
  private readonly list: ConversationsView;

  constructor(
    private readonly server: Server,
    private readonly store: Store,
    private readonly settings: Settings,
  ) {
    const showPicture = (id: string) => this.showPicture(id);
    this.stage = new StageView({
      file: (file) => void this.addFile(file),
      example: (example) => void this.addExample(example),
      caption: () => this.ask("caption", ""),
      altText: () => this.ask("alt", ""),
      showPicture,
    });
    this.stage.listExamples(server.info.examples);
    this.view = new ChatView(
      { again: (turn) => this.again(turn), look: (turn) => this.look(turn), showPicture },
      server.info.can.attention,
    );
    this.composer = new Composer((question) => this.ask("question", question), () => this.stop());
    this.composer.showSettings(settings, server.info.limits.max_tokens, writeSettings);
    const keepOpacity = (opacity: number) => writeSettings(Object.assign(settings, { opacity }));
    this.attention = new AttentionView(settings.opacity, keepOpacity, () => this.closeAttention());
    this.list = new ConversationsView(
      {
        list: () => this.listed(),
        open: (conversation) => void this.open(conversation),
        rename: (conversation, title) => this.rename(conversation, title),
        remove: (conversation) => this.remove(conversation),
      },
      store.lasts,
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

  /** Opens the conversation with this id, or an empty one where it is gone. */
  async begin(id: string): Promise<void> {
    const found = (await this.store.conversations()).find((one) => one.id === id);
    await this.open(found ?? newConversation());
  }

  private async open(conversation: Conversation): Promise<void> {
    if (conversation.id === this.conversation.id) return;
    this.stop();
    this.running = null; // what was being answered ends for itself, in the conversation that is left
    this.conversation = conversation;
    for (const turn of conversation.turns) if (isRunning(turn)) turn.state = "stopped"; // the page was left meanwhile
    for (const picture of await this.store.pictures(conversation.pictureIds)) this.remember(picture);
    writeOpenConversation(conversation.id);
    this.shownPicture = this.latestPicture();
    this.view.showAll(conversation.turns, this.pictures);
    this.attention.close();
    this.refresh();
  }

  private startOver(): void {
    void this.open(newConversation()).then(() => {
      announce("A new conversation. Choose a picture.");
      button("choose-picture").focus();
    });
  }

  private async addFile(file: File): Promise<void> {
    clearNotice();
    try {
      await this.addPicture(await openPicture(file, file.name || "pasted picture", this.server.info.formats));
    } catch (error) {
      if (!(error instanceof UnreadablePicture)) throw error;
      notify(error.message);
    }
  }

  private async addExample(example: Example): Promise<void> {
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

  private async addPicture(picture: Picture): Promise<void> {
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
  private ask(kind: TurnKind, question: string): boolean {
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

  private again(turn: Turn): void {
    if (this.running) return;
    Object.assign(turn, { answer: "", error: "", notes: [], state: "waiting" });
    this.attentions.delete(turn.id);
    if (this.attention.openFor === turn.id) this.attention.close();
    this.composer.focus();
    void this.answer(turn);
  }

  private async answer(turn: Turn): Promise<void> {
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

  private async fetchAnswer(turn: Turn, sent: SentTurn[], signal: AbortSignal): Promise<void> {
    if (turn.kind !== "question") {
      const { text, notes } = await this.server.answer(sent, this.pictures, signal);
      turn.answer = text;
      turn.notes.push(...notes);
      return;
    }
    const notes = await this.server.streamAnswer(sent, this.pictures, this.settings, signal, (piece) => {
      turn.state = "streaming";
      turn.answer += piece;
      this.view.addPiece(turn, piece);
    });
    turn.notes.push(...notes);
  }

  private stop(): void {
    this.running?.stop.abort();
  }

  private look(turn: Turn): void {
    const picture = this.pictures.get(turn.pictureId);
    if (!picture) return;
    if (this.attention.openFor === turn.id) return this.closeAttention();
    this.showPicture(picture.id);
    void this.attention.open({
      turnId: turn.id,
      answer: turn.answer.trim(),
      width: picture.width,
      height: picture.height,
      load: (byWord) => this.attentionOf(turn, byWord),
    });
    this.view.markLooked(turn.id);
  }

  private async attentionOf(turn: Turn, byWord: boolean): Promise<Attention> {
    const known = this.attentions.get(turn.id);
    if (known && (known.words || !byWord)) return known;
    const system = turn.kind === "question" ? this.settings.system : "";
    const found = await this.server.attention(this.toSend(turn).sent, this.pictures, system, turn.answer, byWord);
    this.attentions.set(turn.id, found);
    return found;
  }

  private closeAttention(): void {
    const turnId = this.attention.openFor;
    this.attention.close();
    this.view.markLooked(null);
    if (turnId) this.view.focusLook(turnId);
  }

  private showPicture(id: string): void {
    const picture = this.pictures.get(id);
    if (!picture || picture === this.shownPicture) return;
    this.shownPicture = picture;
    this.attention.close();
    this.view.markLooked(null);
    this.refresh();
  }

  /** Of the picture shown, for who cannot see it: what is known of it, or what the model has said. */
  private description(): string {
    const shown = this.shownPicture;
    const caption = this.conversation.turns.findLast(
      (turn) => turn.kind !== "question" && turn.pictureId === shown?.id && turn.state === "done",
    );
    return shown?.alt || tidyAltText(caption?.answer ?? "") || (shown?.name ?? "");
  }

  private toSend(turn: Turn): { sent: SentTurn[]; leftOut: number } {
    const hasSystemLine = this.settings.system !== "";
    return turnsToSend(this.conversation.turns, turn, this.pictures, this.server.info.limits, hasSystemLine);
  }

  private latestPicture(): Picture | null {
    return this.pictures.get(this.conversation.pictureIds.at(-1) ?? "") ?? null;
  }

  private remember(picture: Picture): void {
    // the first object stays, so that "the picture shown" can be told by identity
    if (!this.pictures.has(picture.id)) this.pictures.set(picture.id, picture);
  }

  private refresh(): void {
    const { conversation } = this;
    const { can, model } = this.server.info;
    const pictures = conversation.pictureIds.map((id) => this.pictures.get(id)).filter((one) => one !== undefined);
    this.stage.show(this.shownPicture, pictures, this.description());
    this.stage.setBusy(this.running !== null || !can.generate);
    this.composer.setBusy(this.running !== null);
    byId("talk-head", HTMLElement).hidden = conversation.turns.length === 0;
    const title = titleOf(conversation, this.pictures);
    byId("title", HTMLElement).textContent = title;
    document.title = conversation.pictureIds.length === 0 ? "blip2" : `${title} · blip2`;
    const latest = this.latestPicture();
    const ask = (question: string) => this.ask("question", question);
    if (!latest || !can.generate) showWelcome(can.generate, can.attention, model);
    else if (conversation.turns.length === 0) showFirstQuestions(latest, ask);
    else hideGuide();
  }

  private async save(picture: Picture | null = null, conversation = this.conversation): Promise<void> {
    if (this.removed.has(conversation.id)) return;
    try {
      if (picture) await this.store.savePicture(picture);
      await this.store.saveConversation(conversation);
      if (conversation === this.conversation) writeOpenConversation(conversation.id);
    } catch {
      notify("This browser has no room left. Delete conversations, or this one is gone when the tab closes.");
    }
  }

  private async listed(): Promise<{ conversations: Conversation[]; pictures: Map<string, Picture> }> {
    const conversations = await this.store.conversations();
    const ids = conversations.flatMap(({ pictureIds }) => [...pictureIds.slice(0, 1), ...pictureIds.slice(-1)]);
    const unknown = ids.filter((id) => !this.pictures.has(id));
    for (const picture of await this.store.pictures(unknown)) this.remember(picture);
    return { conversations, pictures: this.pictures };
  }

  private async rename(conversation: Conversation, title: string): Promise<void> {
    const isOpen = conversation.id === this.conversation.id;
    const renamed = isOpen ? this.conversation : conversation;
    renamed.title = title;
    await this.save(null, renamed);
    if (isOpen) this.refresh();
  }

  private async remove(conversation: Conversation): Promise<void> {
    this.removed.add(conversation.id);
    if (conversation.id === this.conversation.id) await this.open(newConversation());
    await this.store.remove(conversation);
    for (const id of conversation.pictureIds) {
      this.pictures.delete(id);
      forgetPicture(id);
    }
  }

  private async exportJson(): Promise<void> {
    const text = await asJson(this.conversation, this.pictures, this.server.info.model);
    download(text, fileName(titleOf(this.conversation, this.pictures), "json"), "application/json");
  }

  private exportMarkdown(): void {
    const text = asMarkdown(this.conversation, this.pictures, this.server.info.model);
    download(text, fileName(titleOf(this.conversation, this.pictures), "md"), "text/markdown");
  }
}

function leftOutNote(count: number): string {
  const turns = count === 1 ? "The oldest question was" : `The ${count} oldest questions were`;
  return `${turns} left out of what the model reads: the conversation is longer than this server takes.`;
}
