// The server's answers: what it can do, a conversation continued (whole or streamed), what the model looked at.
// Everything that goes wrong leaves here as a ServerError whose message a person can read.

import type { Limits, Picture, SentTurn } from "./conversation";
import { dataUrl } from "./picture";
import type { Settings } from "./settings";
import { serverSentEvents } from "./sse";

export interface Example {
  name: string;
  url: string;
  alt: string;
}

export interface PageInfo {
  name: string;
  version: string;
  needs_key: boolean;
  model: string;
  can: { generate: boolean; match: boolean; attention: boolean };
  examples: Example[];
  limits: Limits;
  formats: string[];
}

export interface Attention {
  grid: [rows: number, columns: number];
  num_queries: number;
  average: number[];
  queries: number[][];
  words?: { text: string; weights: number[] }[];
}

export interface Answer {
  text: string;
  notes: string[];
}

interface Choice {
  message?: { content?: string };
  delta?: { content?: string };
  finish_reason?: string | null;
}

interface Completion {
  choices?: Choice[];
  warnings?: string[];
  error?: { message?: string };
}

type Message = { role: string; content: unknown };

export class ServerError extends Error {}

export const UNREACHABLE = "The server does not answer. See whether it is still running, then try again.";

/** What the page needs of a key: the one it has, and a new one from the user, or null where they decline. */
export interface KeyHolder {
  current(): string;
  ask(wasRefused: boolean): Promise<string | null>;
}

export async function fetchPageInfo(): Promise<PageInfo> {
  const response = await send("/page.json", {});
  return (await response.json()) as PageInfo;
}

export class Server {
  constructor(
    readonly info: PageInfo,
    private readonly key: KeyHolder,
  ) {}

  /** The answer in one piece. Captions are asked for so, because then the server may choose the best of several. */
  async answer(sent: SentTurn[], pictures: Map<string, Picture>, signal: AbortSignal): Promise<Answer> {
    const response = await this.post("/v1/chat/completions", { messages: await messages(sent, pictures, "") }, signal);
    const completion = (await response.json()) as Completion;
    const choice = completion.choices?.[0];
    if (!choice) throw new ServerError("The server sent no answer. Try again.");
    return { text: choice.message?.content ?? "", notes: notesOf(completion) };
  }

  /** The answer as it is written: `onPiece` gets each new piece of text. */
  async streamAnswer(
    sent: SentTurn[],
    pictures: Map<string, Picture>,
    settings: Settings,
    signal: AbortSignal,
    onPiece: (piece: string) => void,
  ): Promise<string[]> {
    const body = {
      messages: await messages(sent, pictures, settings.system),
      stream: true,
      temperature: settings.temperature,
      ...(settings.maxTokens === null ? {} : { max_tokens: settings.maxTokens }),
    };
    const response = await this.post("/v1/chat/completions", body, signal);
    if (!response.body) throw new ServerError(UNREACHABLE);
    const notes: string[] = [];
    for await (const data of readable(serverSentEvents(response.body), signal)) {
      if (data === "[DONE]") return notes;
      const chunk = JSON.parse(data) as Completion;
      if (chunk.error) throw new ServerError(chunk.error.message ?? "The server stopped with an error. Try again.");
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) onPiece(piece);
      notes.push(...notesOf(chunk));
    }
    throw new ServerError("The connection ended before the answer did. Try again.");
  }

  async attention(
    sent: SentTurn[],
    pictures: Map<string, Picture>,
    system: string,
    answer: string,
    byWord: boolean,
  ): Promise<Attention> {
    const body = { messages: await messages(sent, pictures, system), answer, by_word: byWord };
    const response = await this.post("/v1/attention", body, null);
    return (await response.json()) as Attention;
  }

  private async post(path: string, body: object, signal: AbortSignal | null): Promise<Response> {
    const text = JSON.stringify({ model: this.info.model, ...body });
    for (let wasRefused = false; ; wasRefused = true) {
      let key = this.key.current();
      if (wasRefused || (this.info.needs_key && key === "")) {
        const given = await this.key.ask(wasRefused);
        if (given === null) throw new ServerError("This server answers only to those who have its key.");
        key = given;
      }
      const headers: Record<string, string> = { "Content-Type": "application/json" };
      if (key !== "") headers["Authorization"] = `Bearer ${key}`;
      const response = await send(path, { method: "POST", headers, body: text, signal }, [401]);
      if (response.status !== 401) return response;
    }
  }
}

/** Turns as OpenAI's messages: a picture stands in its own user turn, before the words. */
async function messages(sent: SentTurn[], pictures: Map<string, Picture>, system: string): Promise<Message[]> {
  const out: Message[] = [];
  if (system !== "") out.push({ role: "system", content: system });
  for (const [at, { turn, withPicture }] of sent.entries()) {
    const parts: object[] = [];
    const picture = pictures.get(turn.pictureId);
    if (withPicture && picture) parts.push({ type: "image_url", image_url: { url: await dataUrl(picture.blob) } });
    if (turn.kind === "question") parts.push({ type: "text", text: turn.question });
    out.push({ role: "user", content: parts });
    if (at < sent.length - 1) out.push({ role: "assistant", content: turn.answer });
  }
  return out;
}

function notesOf(completion: Completion): string[] {
  const notes = [...(completion.warnings ?? [])];
  const reason = completion.choices?.[0]?.finish_reason;
  if (reason === "length") notes.push("Cut at the longest length allowed.");
  if (reason === "content_filter") notes.push("Part of the answer was held back by the server's filter.");
  return notes;
}

/** `fetch`, with all but success and the statuses in `passed` as a ServerError. Stopping stays an AbortError. */
async function send(path: string, options: RequestInit, passed: number[] = []): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError(UNREACHABLE);
  }
  if (response.ok || passed.includes(response.status)) return response;
  throw new ServerError(await messageOf(response));
}

async function* readable(events: AsyncGenerator<string>, signal: AbortSignal): AsyncGenerator<string> {
  try {
    yield* events;
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ServerError("The connection broke off before the answer was whole. Try again.");
  }
}

async function messageOf(response: Response): Promise<string> {
  const body = (await response.json().catch(() => null)) as Completion | null;
  const said = body?.error?.message ?? `The server refused with status ${response.status}.`;
  const wait = response.status === 429 || response.status === 503 ? secondsToWait(response) : null;
  return wait === null ? said : `${said} Try again in ${duration(wait)}.`;
}

/** Of Retry-After, which is a number of seconds or a date. */
function secondsToWait(response: Response): number | null {
  const header = response.headers.get("Retry-After");
  if (header === null) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
}

function duration(seconds: number): string {
  if (seconds < 120) return seconds === 1 ? "1 second" : `${seconds} seconds`;
  return `${Math.ceil(seconds / 60)} minutes`;
}
